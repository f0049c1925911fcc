// SPDX-License-Identifier: GPL-2.0-or-later
/* qcow2setup status: what is open, and how it does. */
#include <errno.h>
#include <inttypes.h>
#include <string.h>
#include <time.h>

#include "commands/commands.h"
#include "lib/json.h"
#include "lib/util.h"
#include "lib/words.h"
#include "stack/advice.h"
#include "stack/metrics.h"
#include "stack/report.h"
#include "stack/report_table.h"
#include "system/device.h"
#include "system/dm.h"
#include "system/live.h"

/* How it is called, and where what follows begins */
#define LABEL	"  %-15s"

static void print_path(const char *what, const struct device *d)
{
	printf(LABEL, what);
	put_escaped(stdout, report_origin(d), strlen(report_origin(d)));
	if (d->file[0])
		printf(" (%s)", esc(d->node));
	putchar('\n');
}

/* One line for each that is below, from top to bottom. */
static void print_backing(const struct report *r)
{
	for (; r && r->table.f.backing_dev; r = r->below) {
		if (!r->below || !r->below->has_table) {
			print_path("backing:", &r->backing);
			continue;
		}
		printf(LABEL "%s (%s), data ", "backing:",
		       esc(report_origin(&r->below->metadata)),
		       esc(r->backing.node));
		put_escaped(stdout, report_origin(&r->below->data),
			    strlen(report_origin(&r->below->data)));
		putchar('\n');
	}
}

static void print_options(const struct target_features *f)
{
	printf(LABEL "%s\n", "data file raw:", f->data_file_raw ? "yes" : "no");
	if (f->extended_l2)
		printf(LABEL "yes\n", "extended L2:");
	if (f->no_discard_passdown)
		printf(LABEL "not passed down\n", "discards:");
	if (f->cache_limit)
		printf(LABEL "%s\n", "cache limit:", human_size(f->cache_limit));
}

/* The mode, and what is to be done; lines after the first one below it */
static void print_mode(const struct report *r)
{
	static struct advice a;		/* large */
	const char *p, *end;
	unsigned int i;

	report_advice(r, &a);
	printf(LABEL "%s%s\n", "mode:", health_text(report_health(r)),
	       report_health(r) == HEALTH_RW && !a.n ? ", all is well" : "");
	for (i = 0; i < a.n; i++) {
		for (p = a.line[i]; (end = strchr(p, '\n')); p = end + 1)
			printf(LABEL "%.*s\n", p == a.line[i] ? "what to do:" : "",
			       (int)(end - p), p);
		printf(LABEL "%s\n", p == a.line[i] ? "what to do:" : "", p);
	}
}

static void print_allocated(const struct report *r)
{
	const struct image_usage *u = &r->usage;

	if (!u->known) {
		printf(LABEL "not known (%s)\n", "allocated:", esc(u->why));
		return;
	}
	printf(LABEL "%s, %s", "allocated:", human_size(u->data),
	       human_share(u->data, r->size));
	if (u->zero)
		printf("; and %s of zeros", human_size(u->zero));
	putchar('\n');
}

/* How much of the space for metadata is taken, and how long it lasts */
static void print_metadata(const struct report *r)
{
	const struct target_status *s = &r->status;
	uint64_t cluster = 1ULL << r->table.cluster_bits, free, more;

	if (!r->metadata_size)
		return;
	printf(LABEL "%s", "metadata:", human_size(r->metadata_size));
	if (r->has_status && s->given & STATUS_FREE_CLUSTERS &&
	    !s->f.read_only) {
		free = report_free_clusters(r);
		more = report_tables_to_come(r);
		printf(", %s of it taken; room for %" PRIu64 " more clusters, ",
		       human_share(r->metadata_size - min_u64(free * cluster, r->metadata_size),
				   r->metadata_size), free);
		if (more)
			printf("%" PRIu64 " at most are needed", more);
		else
			printf("none is needed");
	}
	putchar('\n');
	if (r->has_room)
		printf(LABEL "its file %s; its file system has %s free\n", "",
		       r->sparse ? "has holes, which take space when they are written" :
		       "has all of that space",
		       human_size(r->room));
}

static void print_bitmaps(const struct report *r)
{
	unsigned int kept = r->status.given & STATUS_BITMAPS ?
		r->status.bitmaps : 0;

	if (r->usage.bitmaps || kept)
		printf(LABEL "%u, %u of which record what is written\n",
		       "bitmaps:", r->usage.bitmaps, kept);
}

static void print_backup(const struct report *r)
{
	const struct target_status *s = &r->status;

	if (!s->view)
		return;
	if (!strcmp(s->view, "valid"))
		printf(LABEL "under way, %s of old content kept\n", "backup:",
		       human_size(report_kept(s)));
	else
		printf(LABEL "over: %s\n", "backup:", esc(s->view));
}

static void print_users(const struct report *r)
{
	const struct users *users = &r->users;
	unsigned int i;

	for (i = 0; i < users->n; i++)
		printf(LABEL "%s%s\n", i ? "" : "held by:",
		       user_text(&users->u[i]),
		       users->u[i].reads ? ", which only reads it" : "");
	if (users->more)
		printf(LABEL "and %u more\n", "", users->more);
	if (users->n)
		return;
	if (r->info.open_count > 0)
		printf(LABEL "somebody who cannot be seen from here, %d times\n",
		       "held by:", r->info.open_count);
	else
		printf(LABEL "nobody\n", "held by:");
}

/* What cache and commits have done since the table was loaded */
static void print_work(const struct target_status *s)
{
	uint64_t looks = s->hits + s->misses;

	if (looks)
		printf(LABEL "%s of %" PRIu64 " lookups were found in memory; it has %s\n",
		       "cache:", human_share(s->hits, looks), looks,
		       human_size(s->state_bytes));
	else
		printf(LABEL "not used yet\n", "cache:");
	if (s->f.read_only)
		return;
	printf(LABEL "%" PRIu64, "commits:", s->commits);
	if (s->commits)
		printf(", of %.3g first writes on average",
		       (double)s->first_writes / s->commits);
	printf("; %s\n", s->unwritten ? "some could not be written" :
	       s->dirty_slices ? "something waits for the next one" :
	       "nothing waits");
}

static void print_interval(const struct report_interval *v)
{
	char label[32];

	if (!v->ms)
		return;
	snprintf(label, sizeof(label), "last %.3g s:", v->ms / 1000.0);
	if (v->other) {
		printf(LABEL "not known, the table is another one\n", label);
		return;
	}
	printf(LABEL "hits %s, misses %s, first writes %s, commits %s\n", label,
	       human_rate(v->hits, v->ms), human_rate(v->misses, v->ms),
	       human_rate(v->first_writes, v->ms), human_rate(v->commits, v->ms));
}

static void print_counters(const struct target_status *s)
{
	struct report_number n[REPORT_NUMBERS];
	size_t count = report_numbers(s, n), i;
	char label[32], *p;

	for (i = 0; i < count; i++) {
		snprintf(label, sizeof(label), "%s:", n[i].name);
		for (p = label; *p; p++)
			if (*p == '-')
				*p = ' ';
		printf("  %-17s %" PRIu64 "\n", label, n[i].value);
	}
}

static void print_text(const struct report *r, const struct report_interval *v)
{
	printf("/dev/mapper/%s is active%s%s%s.\n", esc(r->name),
	       r->info.open_count ? " and is in use" : "",
	       r->info.suspended ? ", but suspended" : "",
	       r->info.deferred ? ", and goes with its last user" : "");
	print_mode(r);
	printf(LABEL "%s (%" PRIu64 " bytes)\n", "size:",
	       human_size(r->size), r->size);
	print_allocated(r);
	print_metadata(r);
	print_users(r);
	if (r->has_status) {
		print_bitmaps(r);
		print_backup(r);
		print_work(&r->status);
		print_interval(v);
	}
	if (r->kind != DEVICE_OURS)
		printf("  made by:       dmsetup: no lock keeps QEMU from the image, and its bitmaps are\n"
		       "                 not looked after; remove it with dmsetup remove %s\n",
		       shell_quote(r->name));
	printf(LABEL "%s\n", "cluster size:",
	       human_size(1ULL << r->table.cluster_bits));
	print_path("image:", &r->metadata);
	print_path("data:", &r->data);
	print_backing(r);
	print_options(&r->table.f);
	if (r->has_status && verbose)
		print_counters(&r->status);
}

static void mode_cell(char *out, size_t size, const struct report *r)
{
	snprintf(out, size, "%s", r->has_status ? r->status.mode : "unknown");
}

static void cluster_cell(char *out, size_t size, const struct report *r)
{
	snprintf(out, size, "%s", r->has_table ?
		 human_size(1ULL << r->table.cluster_bits) : "");
}

static void image_cell(char *out, size_t size, const struct report *r)
{
	snprintf(out, size, "%s", report_origin(&r->metadata));
}

static void data_cell(char *out, size_t size, const struct report *r)
{
	snprintf(out, size, "%s", report_origin(&r->data));
}

static void maker_cell(char *out, size_t size, const struct report *r)
{
	snprintf(out, size, "%s", report_maker(r));
}

static const struct report_column columns[] = {
	{ "NAME", false, report_name_cell },
	{ "SIZE", true, report_size_cell },
	{ "MODE", false, mode_cell },
	{ "CLUSTER", true, cluster_cell },
	{ "IMAGE", false, image_cell },
	{ "DATA", false, data_cell },
	{ "MADE-BY", false, maker_cell },
};

static int status_all(const struct options *opt)
{
	/* The table needs no more than table and status. */
	bool table = !opt->json && !opt->prometheus;
	const struct report_wishes wishes = {
		.quick = opt->quick || table, .users = opt->json,
	};
	struct report_list list;
	int ret, wrong = 0;

	ret = report_get_all(&wishes, &list, &wrong);
	if (!ret && opt->json)
		report_json_all(&list);
	else if (!ret && opt->prometheus)
		metrics_print(stdout, list.r, list.n, true);
	else if (!ret)
		ret = report_table(&list, columns, ARRAY_SIZE(columns));
	report_list_free(&list);
	return ret ? ret : wrong;
}

/* How its counters change in that time; they are read again, last. */
static int watch(const struct options *opt, const char *name,
		 struct report_interval *v)
{
	struct timespec pause = { .tv_sec = opt->interval };
	static struct target_status before, after;	/* large */
	uint64_t start = now_ms();
	int ret;

	ret = live_status(name, &before);
	while (!ret && clock_nanosleep(CLOCK_MONOTONIC, 0, &pause, &pause) == EINTR)
		;
	if (!ret)
		ret = live_status(name, &after);
	if (ret)
		return ret == -ENXIO ? dm_gone(name) : ret;
	report_compare(&before, &after, now_ms() - start, v);
	return 0;
}

static int status_one(const struct options *opt, const char *name)
{
	const struct report_wishes wishes = {
		.quick = opt->quick, .users = !opt->prometheus,
	};
	struct report_interval v = { 0 };
	struct report r = { 0 };
	struct json j;
	int ret = 0;

	if (opt->interval) {
		/* Is it there, and one of these? */
		ret = report_get(name, &(struct report_wishes){ .quick = true }, &r);
		if (!ret)
			ret = watch(opt, name, &v);
		report_free(&r);
	}
	if (!ret)
		ret = report_get(name, &wishes, &r);
	if (!ret && opt->json) {
		json_start(&j, stdout);
		report_json(&j, &r, &v);
		json_end(&j);
	} else if (!ret && opt->prometheus) {
		metrics_print(stdout, &r, 1, false);
	} else if (!ret) {
		print_text(&r, &v);
	}
	report_free(&r);
	return ret;
}

int cmd_status(const struct options *opt, char **args)
{
	int ret;

	if (opt->prometheus && (opt->json || opt->interval))
		return fail(EX_PARAMETER, "--prometheus is a format by itself, of what has been counted; leave --json and --interval out");
	if (opt->interval && !args[0])
		return fail(EX_PARAMETER, "--interval is for one device; give its NAME, too");
	ret = args[0] ? dm_check_name(device_name(args[0])) : 0;
	if (!ret)
		ret = dm_check(false);
	if (ret)
		return ret;
	return args[0] ? status_one(opt, device_name(args[0])) :
			 status_all(opt);
}
