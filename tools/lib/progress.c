// SPDX-License-Identifier: GPL-2.0-or-later
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "lib/progress.h"
#include "lib/util.h"

#define FIRST_MS	1000
#define STEP_MS		200

static struct {
	bool running;
	int width;		/* of what is on the terminal; 0: nothing */
	uint64_t next;		/* not again before; milliseconds */
} state;

static uint64_t now_ms(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec * 1000ULL + ts.tv_nsec / 1000000;
}

void progress(const char *what, uint64_t done, uint64_t total)
{
	uint64_t now = now_ms();
	int len;

	if (!state.running) {
		state.running = true;
		state.next = now + FIRST_MS;
	}
	if (now < state.next || !total || !isatty(STDERR_FILENO))
		return;
	state.next = now + STEP_MS;
	len = fprintf(stderr, "\rqcow2setup: %s: %s of %s (%u%%)", what,
		      human_size(done), human_size(total),
		      (unsigned int)(100 * done / total));
	/* What was longer before */
	if (len < state.width)
		fprintf(stderr, "%*s", state.width - len, "");
	if (len > state.width)
		state.width = len;
}

void progress_end(void)
{
	if (state.width)
		fprintf(stderr, "\r%*s\r", state.width, "");
	memset(&state, 0, sizeof(state));
}
