// SPDX-License-Identifier: GPL-2.0-or-later
/* Table and status lines, as the tool reads them. */
#include <string.h>

#include "fuzz.h"
#include "lib/util.h"
#include "system/target.h"

/* What is read can be written, and is then read the same. */
static void again(const struct target_table *t)
{
	struct qcow2_geometry g = {
		.cluster_bits = t->cluster_bits,
		.refcount_order = t->refcount_order,
		.l1_offset = t->l1_offset, .l1_entries = t->l1_entries,
		.reftable_offset = t->reftable_offset,
		.reftable_clusters = t->reftable_clusters,
		.ext_l2 = t->f.extended_l2,
	};
	struct target_table u;
	char line[2048];

	MUST(target_format_table(line, sizeof(line), t->metadata_dev,
				 t->data_dev, &g, &t->f));
	/* Numbers without leading zeros are shorter, never longer. */
	MUST(target_parse_table(line, &u));
	MUST(!strcmp(u.metadata_dev, t->metadata_dev));
	MUST(!strcmp(u.data_dev, t->data_dev));
	MUST(u.cluster_bits == t->cluster_bits);
	MUST(u.refcount_order == t->refcount_order);
	MUST(u.l1_offset == t->l1_offset && u.l1_entries == t->l1_entries);
	MUST(u.reftable_offset == t->reftable_offset);
	MUST(u.reftable_clusters == t->reftable_clusters);
	MUST(u.f.read_only == t->f.read_only);
	MUST(u.f.data_file_raw == t->f.data_file_raw);
	MUST(u.f.extended_l2 == t->f.extended_l2);
	MUST(u.f.no_discard_passdown == t->f.no_discard_passdown);
	MUST(u.f.cache_limit == t->f.cache_limit);
	MUST(u.f.zeroed_from == t->f.zeroed_from);
	MUST(u.f.bitmaps == t->f.bitmaps);
	MUST(!u.f.backing_dev == !t->f.backing_dev);
	MUST(!u.f.backing_dev || !strcmp(u.f.backing_dev, t->f.backing_dev));
	MUST(!u.f.view == !t->f.view);
	MUST(!u.f.view || !strcmp(u.f.view, t->f.view));
	MUST(u.f.view_granularity == t->f.view_granularity);
}

static void see_features(const struct target_features *f, const char *line,
			 size_t size)
{
	unsigned int i;

	MUST(f->count <= TARGET_MAX_FEATURES);
	for (i = 0; i < f->count; i++)
		MUST(f->name[i] >= line && f->name[i] < line + size);
	MUST(!f->view || (f->view > line && f->view < line + size));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static const struct target_version versions[] = {
		{ 1, 0, 0 }, { 1, 1, 0 }, { 1, TARGET_MINOR_VIEW, 0 },
	};
	struct target_table t;
	struct target_status s;
	char *line = malloc(size + 1);
	unsigned int i;

	MUST(line);
	memcpy(line, data, size);
	line[size] = 0;
	if (target_parse_table(line, &t)) {
		see_features(&t.f, t.line, sizeof(t.line));
		again(&t);
	}
	for (i = 0; i < ARRAY_SIZE(versions); i++) {
		if (!target_parse_status(line, &versions[i], &s))
			continue;
		see_features(&s.f, s.line, sizeof(s.line));
		MUST(s.mode >= s.line && s.mode < s.line + sizeof(s.line));
		MUST(versions[i].minor || !s.given);
		MUST(s.given & STATUS_UNWRITTEN || !s.unwritten);
		MUST(s.given & STATUS_TRIMS || !s.trims);
		MUST(s.given & STATUS_VIEW_KEPT || !s.view_kept);
		MUST(s.given & STATUS_VIEW_ZERO || !s.view_zero);
		MUST(versions[i].minor || !s.view);
		MUST(!s.view || (s.view > s.line && s.view < s.mode));
	}
	free(line);
	return 0;
}
