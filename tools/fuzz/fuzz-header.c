// SPDX-License-Identifier: GPL-2.0-or-later
/* Header, extensions and bitmap directory, and the judgement on a geometry. */
#include <string.h>

#include "fuzz.h"
#include "image/header.h"
#include "image/plan.h"

struct walk {
	const uint8_t *dir;
	size_t len;
	unsigned int n;
};

static int see_bitmap(const struct bitmap *b, void *arg)
{
	struct walk *w = arg;
	const uint8_t *name = (const uint8_t *)b->name.s;

	MUST(name >= w->dir && name + b->name.len <= w->dir + w->len);
	MUST(b->at + sizeof(struct qcow2_bitmap_head) <= w->len);
	MUST(b->name.len && b->name.len < 1024);
	w->n++;
	return 0;
}

static void inside(const struct span *s, const uint8_t *data, uint64_t cluster)
{
	const uint8_t *p = (const uint8_t *)s->s;

	if (!p)
		return;
	MUST(p >= data && s->len <= cluster &&
	     p + s->len <= data + cluster);
}

static void see_geometry(const struct qcow2_geometry *g, uint64_t meta_size)
{
	uint64_t cs = 1ULL << g->cluster_bits, end;

	MUST(!__builtin_add_overflow(g->l1_offset, g->l1_entries * 8ULL, &end));
	MUST(end <= meta_size);
	MUST(!__builtin_add_overflow(g->reftable_offset,
				     (uint64_t)g->reftable_clusters * cs, &end));
	MUST(end <= meta_size);
	MUST(g->l1_entries <= QCOW2_MAX_L1_ENTRIES);
	MUST(g->reftable_clusters * cs <= QCOW2_MAX_REFTABLE_BYTES);
	MUST(qcow2_l1_entries_needed(g) <= g->l1_entries);
	MUST(qcow2_in_fixed_area(g, 0));
	MUST(qcow2_in_fixed_area(g, g->l1_offset));
	MUST(qcow2_in_fixed_area(g, g->reftable_offset));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct header h;
	struct qcow2_geometry g;
	enum header_fault fault;
	enum qcow2_fault f;
	uint64_t cluster;
	const char *why = NULL;
	unsigned int type, bit;
	int ro;

	/* A directory with numbers of its own */
	if (size && !(data[0] & 0x80)) {
		struct walk w = { .dir = data + 1, .len = size - 1 };

		for (ro = 0; ro < 2; ro++) {
			int ret = bitmaps_parse(data + 1, size - 1, data[0],
						9 + 12 * ro, see_bitmap, &w,
						&why);

			MUST(ret || w.n == data[0]);
			MUST(!ret || why);
			w.n = 0;
		}
	}

	fault = header_parse(data, size, &h);
	MUST(header_fault_str(fault));
	if (fault != HEADER_OK)
		return 0;
	cluster = 1ULL << h.cluster_bits;
	MUST(cluster <= size);
	MUST(h.header_length <= cluster);
	inside(&h.backing_file, data, cluster);
	inside(&h.backing_format, data, cluster);
	inside(&h.data_file, data, cluster);
	inside(&h.features, data, cluster);
	for (type = 0; type < 3; type++) {
		for (bit = 0; bit < 64; bit++) {
			struct span name = header_feature_name(&h, type, bit);

			inside(&name, data, cluster);
		}
	}
	for (ro = 0; ro < 2; ro++) {
		uint64_t meta_size = ro ? size : UINT64_MAX;

		f = qcow2_header_check(&h.raw, ro, &g);
		MUST(qcow2_fault_str(f));
		if (f && f < QCOW2_FAULT_CORRUPT)
			continue;
		f = qcow2_geometry_check(&g, meta_size);
		MUST(qcow2_fault_str(f));
		if (!f)
			see_geometry(&g, meta_size);
	}
	return 0;
}
