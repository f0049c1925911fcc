// SPDX-License-Identifier: GPL-2.0-or-later
#include <inttypes.h>
#include <string.h>
#include <sys/sysmacros.h>

#include "lib/json.h"
#include "lib/util.h"
#include "stack/advice.h"
#include "stack/metrics.h"

#define PREFIX	"dm_qcow2_"

/* One value of a device; false: there is none. */
typedef bool value_fn(const struct report *r, uint64_t *v);

#define VALUE(NAME, THERE, IS)						\
	static bool NAME(const struct report *r, uint64_t *v)		\
	{								\
		if (!(THERE))						\
			return false;					\
		*v = (IS);						\
		return true;						\
	}

#define CLUSTER		(1ULL << r->table.cluster_bits)
#define GIVEN(WHAT)	(r->has_status && r->status.given & STATUS_##WHAT)

VALUE(suspended, true, r->info.suspended)
VALUE(deferred, true, r->info.deferred)
VALUE(open_count, true, r->info.open_count)
VALUE(virtual_size, r->has_table, r->size)
VALUE(allocated, r->usage.known, r->usage.data)
VALUE(zeros, r->usage.known, r->usage.zero)
VALUE(marked_corrupt, r->usage.has_header, r->usage.corrupt)
VALUE(metadata_size, r->metadata_size, r->metadata_size)
VALUE(metadata_free, GIVEN(FREE_CLUSTERS) && !r->status.f.read_only,
	report_free_clusters(r) * CLUSTER)
VALUE(metadata_needed, GIVEN(FREE_CLUSTERS) && !r->status.f.read_only,
	report_tables_to_come(r) * CLUSTER)
VALUE(file_system_free, r->has_room, r->room)
VALUE(l2_tables, r->has_status, r->status.l2_tables)
VALUE(slices, r->has_status, r->status.slices_cached)
VALUE(cache_bytes, r->has_status, r->status.state_bytes)
VALUE(dirty_slices, r->has_status, r->status.dirty_slices)
VALUE(unwritten, GIVEN(UNWRITTEN), r->status.unwritten)
VALUE(trims, GIVEN(TRIMS), r->status.trims)
VALUE(hits, r->has_status, r->status.hits)
VALUE(misses, r->has_status, r->status.misses)
VALUE(drops, r->has_status, r->status.drops)
VALUE(first_writes, r->has_status, r->status.first_writes)
VALUE(commits, r->has_status, r->status.commits)
VALUE(refused, r->has_status, r->status.refused)
VALUE(bitmaps, r->has_status, GIVEN(BITMAPS) ? r->status.bitmaps : 0)
VALUE(exact, GIVEN(EXACT_GRANULES), r->status.exact_granules)
VALUE(durable, GIVEN(DURABLE_GRANULES), r->status.durable_granules)
VALUE(mark_waits, GIVEN(MARK_WAITS), r->status.mark_waits)
VALUE(taken_back, GIVEN(TAKEN_BACK), r->status.taken_back)
VALUE(backup, r->has_status, !!r->status.view)
VALUE(backup_valid, r->has_status && r->status.view,
	!strcmp(r->status.view, "valid"))
VALUE(backup_kept, r->has_status && r->status.view, report_kept(&r->status))

static const struct family {
	const char *name;
	value_fn *value;
	const char *help;
} families[] = {
	{ "suspended", suspended, "The device is suspended, and requests wait." },
	{ "deferred_remove", deferred, "The device is removed when its last user goes." },
	{ "open_count", open_count, "How often the device is open." },
	{ "virtual_size_bytes", virtual_size, "Size of the disk." },
	{ "allocated_bytes", allocated, "Bytes of the disk that are allocated as data." },
	{ "zero_bytes", zeros, "Bytes of the disk that are allocated as zeros." },
	{ "marked_corrupt", marked_corrupt, "The image is marked corrupt." },
	{ "metadata_size_bytes", metadata_size, "Size of the metadata device." },
	{ "metadata_free_bytes", metadata_free,
	  "Space of the metadata device that can still be made use of, at most." },
	{ "metadata_needed_bytes", metadata_needed,
	  "Space that L2 tables which are not there yet can still need." },
	{ "metadata_file_system_free_bytes", file_system_free,
	  "Free space of the file system that the image file is on." },
	{ "l2_tables", l2_tables, "L2 tables of the image." },
	{ "cache_slices", slices, "Slices of L2 tables in core." },
	{ "cache_size_bytes", cache_bytes, "Memory that the map takes." },
	{ "dirty_slices", dirty_slices, "Slices whose changes wait for a commit." },
	{ "unwritten_blocks", unwritten,
	  "Blocks of metadata that could not be written and wait for the next try." },
	{ "waiting_trims", trims,
	  "Slices with discards that wait to be passed down." },
	{ "hits_total", hits, "Reads and overwrites that were served from the map." },
	{ "misses_total", misses, "Slices that were not in core when they were needed." },
	{ "dropped_slices_total", drops, "Slices that were dropped to save memory." },
	{ "first_writes_total", first_writes, "Writes that were the first ones in their place." },
	{ "commits_total", commits, "Commits of metadata that succeeded." },
	{ "refused_writes_total", refused, "Writes that failed for want of space for metadata." },
	{ "recording_bitmaps", bitmaps, "Dirty bitmaps that are kept." },
	{ "bitmap_exact_granules", exact, "Granules in core that have changed." },
	{ "bitmap_durable_granules", durable, "Granules in core that are marked on disk." },
	{ "bitmap_mark_waits_total", mark_waits, "Requests that had to wait for a mark in a bitmap." },
	{ "bitmap_taken_back_granules_total", taken_back,
	  "Granules that were marked ahead and not needed." },
	{ "backup", backup, "There is a view of the device for a backup." },
	{ "backup_valid", backup_valid, "That view is valid." },
	{ "backup_kept_bytes", backup_kept, "Old content that is kept for that view." },
};

static bool is_counter(const char *name)
{
	const char *end = strrchr(name, '_');

	return end && !strcmp(end, "_total");
}

/* Backslash, quote and newline are escaped; what is no UTF-8 becomes U+FFFD. */
static void put_label(FILE *f, const char *name, const char *value)
{
	size_t len = strlen(value), n;

	fprintf(f, "%s=\"", name);
	for (; len; value += n, len -= n) {
		n = json_utf8_len(value, len);
		if (!n) {
			fputs("\357\277\275", f);
			n = 1;
		} else if (*value == '\n') {
			fputs("\\n", f);
		} else if (*value == '\\' || *value == '"') {
			fprintf(f, "\\%c", *value);
		} else {
			fwrite(value, 1, n, f);
		}
	}
	fputc('"', f);
}

static void put_head(FILE *f, const char *name, const char *help)
{
	fprintf(f, "# HELP " PREFIX "%s %s\n# TYPE " PREFIX "%s %s\n", name,
		help, name, is_counter(name) ? "counter" : "gauge");
}

static void put_sample(FILE *f, const char *name, const struct report *r,
		       const char *label, const char *value, uint64_t v)
{
	fprintf(f, PREFIX "%s{", name);
	put_label(f, "device", r->name);
	if (label) {
		fputc(',', f);
		put_label(f, label, value);
	}
	fprintf(f, "} %" PRIu64 "\n", v);
}

static void print_family(FILE *f, const struct family *m,
			 const struct report *r, size_t n)
{
	bool first = true;
	uint64_t v;

	for (; n; n--, r++) {
		if (r->gone || !m->value(r, &v))
			continue;
		if (first)
			put_head(f, m->name, m->help);
		first = false;
		put_sample(f, m->name, r, NULL, NULL, v);
	}
}

/* For joins with what others say of the same device */
static void print_info(FILE *f, const struct report *r, size_t n)
{
	char kernel[32];

	put_head(f, "info", "Name of the device in the kernel; always 1.");
	for (; n; n--, r++) {
		if (r->gone)
			continue;
		snprintf(kernel, sizeof(kernel), "dm-%u", minor(r->info.rdev));
		put_sample(f, "info", r, "kernel_device", kernel, 1);
	}
}

/* One sample for each mode, so that each can be asked for and none vanishes. */
static void print_health(FILE *f, const struct report *r, size_t n)
{
	unsigned int h;

	put_head(f, "mode", "Mode of the device: 1 for the one that it is in, 0 for the others.");
	for (; n; n--, r++)
		for (h = 0; !r->gone && h <= HEALTH_LAST; h++)
			put_sample(f, "mode", r, "mode", health_name(h),
				   h == report_health(r));
}

void metrics_print(FILE *f, const struct report *r, size_t n, bool all)
{
	size_t i, there = 0;

	for (i = 0; i < n; i++)
		there += !r[i].gone;
	if (all) {
		put_head(f, "devices", "Devices that are open.");
		fprintf(f, PREFIX "devices %zu\n", there);
	}
	if (!there)
		return;
	print_info(f, r, n);
	print_health(f, r, n);
	for (i = 0; i < ARRAY_SIZE(families); i++)
		print_family(f, &families[i], r, n);
}
