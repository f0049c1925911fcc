// SPDX-License-Identifier: GPL-2.0-or-later
/* Reports of devices as JSON, and the numbers in them.  Pure code. */
#include <stdio.h>
#include <string.h>

#include "lib/util.h"
#include "stack/advice.h"
#include "stack/report.h"

size_t report_numbers(const struct target_status *s, struct report_number *n)
{
	const struct report_number list[REPORT_NUMBERS] = {
		{ "l2-tables", s->l2_tables, 0 },
		{ "l1-entries", s->l1_entries, 0 },
		{ "slices-cached", s->slices_cached, 0 },
		{ "state-bytes", s->state_bytes, 0 },
		{ "dirty-slices", s->dirty_slices, 0 },
		{ "hits", s->hits, 0 },
		{ "misses", s->misses, 0 },
		{ "first-writes", s->first_writes, 0 },
		{ "commits", s->commits, 0 },
		{ "drops", s->drops, 0 },
		{ "refused", s->refused, 0 },
		{ "unwritten", s->unwritten, STATUS_UNWRITTEN },
		{ "free-clusters", s->free_clusters, STATUS_FREE_CLUSTERS },
		{ "trims", s->trims, STATUS_TRIMS },
		{ "bitmaps", s->bitmaps, STATUS_BITMAPS },
		{ "exact-granules", s->exact_granules, STATUS_EXACT_GRANULES },
		{ "durable-granules", s->durable_granules,
		  STATUS_DURABLE_GRANULES },
		{ "mark-waits", s->mark_waits, STATUS_MARK_WAITS },
		{ "taken-back", s->taken_back, STATUS_TAKEN_BACK },
	};
	size_t i, count = 0;

	for (i = 0; i < REPORT_NUMBERS && list[i].name; i++)
		if ((s->given & list[i].given) == list[i].given)
			n[count++] = list[i];
	return count;
}

void report_compare(const struct target_status *before,
		    const struct target_status *after, uint64_t ms,
		    struct report_interval *v)
{
	*v = (struct report_interval){ .ms = ms };
	/* Counters begin anew with each table. */
	v->other = after->hits < before->hits ||
		   after->misses < before->misses ||
		   after->first_writes < before->first_writes ||
		   after->commits < before->commits;
	if (v->other)
		return;
	v->hits = after->hits - before->hits;
	v->misses = after->misses - before->misses;
	v->first_writes = after->first_writes - before->first_writes;
	v->commits = after->commits - before->commits;
}

/* What a device reads below it, and so on down. */
static void json_backing(struct json *j, const struct report *r)
{
	if (!r->table.f.backing_dev)
		return;
	json_object(j, "backing");
	json_string(j, "device", r->backing.node);
	if (r->below && r->below->has_table) {
		json_string(j, "filename", report_origin(&r->below->metadata));
		json_string(j, "data-file", report_origin(&r->below->data));
		json_number(j, "virtual-size", r->below->size);
		json_backing(j, r->below);
	} else {
		json_string(j, "filename", report_origin(&r->backing));
	}
	json_object_end(j);
}

static void json_table(struct json *j, const struct report *r)
{
	unsigned int f;

	json_number(j, "cluster-size", 1ULL << r->table.cluster_bits);
	json_number(j, "refcount-bits", 1ULL << r->table.refcount_order);
	json_string(j, "filename", report_origin(&r->metadata));
	json_string(j, "data-file", report_origin(&r->data));
	json_bool(j, "data-file-raw", r->table.f.data_file_raw);
	json_string(j, "metadata-device", r->metadata.node);
	json_string(j, "data-device", r->data.node);
	json_bool(j, "extended-l2", r->table.f.extended_l2);
	json_bool(j, "no-discard-passdown", r->table.f.no_discard_passdown);
	if (r->table.f.cache_limit)
		json_number(j, "cache-limit", r->table.f.cache_limit);
	json_backing(j, r);
	json_array(j, "features");
	for (f = 0; f < r->table.f.count; f++)
		json_string(j, NULL, r->table.f.name[f]);
	json_array_end(j);
}

/* What is not known has no key. */
static void json_usage(struct json *j, const struct report *r)
{
	const struct target_status *s = &r->status;
	uint64_t cluster = 1ULL << r->table.cluster_bits;

	if (r->usage.known) {
		json_number(j, "allocated", r->usage.data);
		json_number(j, "zeros", r->usage.zero);
	}
	json_object(j, "metadata");
	if (r->metadata_size)
		json_number(j, "size", r->metadata_size);
	if (r->has_status && s->given & STATUS_FREE_CLUSTERS &&
	    !s->f.read_only) {
		json_number(j, "free", report_free_clusters(r) * cluster);
		json_number(j, "needed", report_tables_to_come(r) * cluster);
		json_bool(j, "enough", !report_short_of_metadata(r));
	}
	if (r->has_room) {
		json_bool(j, "sparse", r->sparse);
		json_number(j, "file-system-free", r->room);
	}
	json_object_end(j);
	if (r->usage.has_header) {
		json_bool(j, "marked-corrupt", r->usage.corrupt);
		json_number(j, "bitmap-count", r->usage.bitmaps);
	}
	json_number(j, "bitmaps-recording",
		    s->given & STATUS_BITMAPS ? s->bitmaps : 0);
	if (!s->view)
		return;
	json_object(j, "backup");
	json_string(j, "view", s->view);
	json_bool(j, "valid", !strcmp(s->view, "valid"));
	json_number(j, "kept", report_kept(s));
	json_object_end(j);
}

static void json_advice(struct json *j, const struct report *r)
{
	static struct advice a;		/* large */
	unsigned int i;
	char *p;

	report_advice(r, &a);
	json_array(j, "advice");
	for (i = 0; i < a.n; i++) {
		for (p = a.line[i]; *p; p++)
			if (*p == '\n')
				*p = ' ';
		json_string(j, NULL, a.line[i]);
	}
	json_array_end(j);
}

static void json_interval(struct json *j, const struct report_interval *v)
{
	json_object(j, "interval");
	json_number(j, "milliseconds", v->ms);
	if (!v->other) {
		json_number(j, "hits", v->hits);
		json_number(j, "misses", v->misses);
		json_number(j, "first-writes", v->first_writes);
		json_number(j, "commits", v->commits);
	}
	json_object_end(j);
}

void report_json(struct json *j, const struct report *r,
		 const struct report_interval *v)
{
	struct report_number n[REPORT_NUMBERS];
	char path[160];
	size_t count, i;

	json_object(j, NULL);
	json_version(j);
	json_string(j, "name", r->name);
	snprintf(path, sizeof(path), "/dev/mapper/%s", r->name);
	json_string(j, "device", path);
	json_string(j, "uuid", r->info.uuid);
	json_string(j, "made-by", report_maker(r));
	json_number(j, "virtual-size", r->size);
	json_string(j, "mode", r->has_status ? r->status.mode : "unknown");
	json_string(j, "health", health_name(report_health(r)));
	json_bool(j, "read-only", r->info.read_only);
	json_bool(j, "suspended", r->info.suspended);
	json_bool(j, "deferred-remove", r->info.deferred);
	json_number(j, "open-count", r->info.open_count);
	users_json(j, &r->users);
	json_advice(j, r);
	if (r->has_table) {
		json_table(j, r);
		json_usage(j, r);
	}
	if (r->has_status) {
		json_object(j, "statistics");
		count = report_numbers(&r->status, n);
		for (i = 0; i < count; i++)
			json_number(j, n[i].name, n[i].value);
		json_object_end(j);
	}
	if (v && v->ms)
		json_interval(j, v);
	json_object_end(j);
}

void report_json_all(const struct report_list *list)
{
	struct json j;
	size_t i;

	json_start(&j, stdout);
	json_array(&j, NULL);
	for (i = 0; i < list->n; i++)
		if (!list->r[i].gone)
			report_json(&j, &list->r[i], NULL);
	json_array_end(&j);
	json_end(&j);
}
