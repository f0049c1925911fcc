// SPDX-License-Identifier: GPL-2.0-or-later
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "lib/json.h"
#include "lib/progress.h"
#include "lib/util.h"

#define FIRST_MS	1000
#define STEP_MS		200
#define JSON_MS		1000
/* A rate is that of so long, or of twice as long */
#define RATE_MS		5000

/* Bytes each second; 0: not known yet */
static uint64_t rate_at(const struct progress *p, uint64_t now)
{
	uint64_t ms = now - p->since, bytes = p->done - p->since_done;

	if (ms < STEP_MS)
		return p->rate;
	return bytes < UINT64_MAX / 1000 ? bytes * 1000 / ms : bytes / ms * 1000;
}

static void put_time(char *out, size_t size, uint64_t s)
{
	if (s < 60)
		snprintf(out, size, "%u s", (unsigned int)s);
	else if (s < 3600)
		snprintf(out, size, "%u min %u s", (unsigned int)(s / 60),
			 (unsigned int)(s % 60));
	else
		snprintf(out, size, "%u h %u min",
			 (unsigned int)min_u64(s / 3600, 99999),
			 (unsigned int)(s % 3600 / 60));
}

int progress_text(const struct progress *p, uint64_t now, char *out, size_t size)
{
	uint64_t rate = rate_at(p, now), done = min_u64(p->done, p->total);
	char left[48];
	int n;

	n = snprintf(out, size, "%s: %s of %s (%u%%)", p->what,
		     human_size(done), human_size(p->total), p->total ?
		     (unsigned int)((double)done / p->total * 100) : 100);
	if (!rate || n < 0 || (size_t)n >= size)
		return n;
	put_time(left, sizeof(left), div_up(p->total - done, rate));
	return n + snprintf(out + n, size - n, ", %s/s, %s left",
			    human_size(rate), left);
}

static void put_json(const struct progress *p, uint64_t now)
{
	printf("{\"version\": %d, \"done\": %" PRIu64 ", \"total\": %" PRIu64 ", \"rate\": %" PRIu64 "}\n",
	       JSON_VERSION, p->done, p->total, rate_at(p, now));
	fflush(stdout);
}

/* What is drawn, if something is: there is one terminal. */
static struct progress *drawn;

static void wipe(void)
{
	if (drawn && drawn->width)
		fprintf(stderr, "\r%*s\r", drawn->width, "");
	if (drawn)
		drawn->width = 0;
}

static void draw(struct progress *p, uint64_t now)
{
	char text[200];
	int len;

	drawn = p;
	before_message = wipe;
	progress_text(p, now, text, sizeof(text));
	len = fprintf(stderr, "\rqcow2setup: %s", text);
	/* What was longer before */
	if (len < p->width)
		fprintf(stderr, "%*s", p->width - len, "");
	if (len > p->width)
		p->width = len;
}

void progress_begin(struct progress *p, const char *what, uint64_t total,
		    bool json)
{
	uint64_t now = now_ms();

	*p = (struct progress){
		.what = what, .total = total, .json = json,
		.terminal = !json && isatty(STDERR_FILENO),
		.begun = now, .since = now, .next = now + FIRST_MS,
	};
}

void progress_skip(struct progress *p, uint64_t bytes)
{
	p->done += bytes;
	p->since_done += bytes;
}

void progress_at(struct progress *p, uint64_t done)
{
	uint64_t now;

	if (done < p->done)
		return;
	p->done = done;
	if (!p->json && !p->terminal)
		return;
	now = now_ms();
	if (now < p->next || !p->total)
		return;
	p->next = now + (p->json ? JSON_MS : STEP_MS);
	if (p->json)
		put_json(p, now);
	else
		draw(p, now);
	if (now < p->since + RATE_MS)
		return;
	p->rate = rate_at(p, now);
	p->since = now;
	p->since_done = done;
}

void progress_finish(struct progress *p, bool complete)
{
	if (complete && p->json) {
		p->done = p->total;
		put_json(p, now_ms());
	}
	if (drawn == p) {
		wipe();
		drawn = NULL;
	}
	memset(p, 0, sizeof(*p));
}

static struct progress only;

void progress(const char *what, uint64_t done, uint64_t total)
{
	if (!only.what)
		progress_begin(&only, what, total, false);
	only.total = total;
	progress_at(&only, done);
}

void progress_end(void)
{
	progress_finish(&only, false);
}
