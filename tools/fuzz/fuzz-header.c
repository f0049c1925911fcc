// SPDX-License-Identifier: GPL-2.0-or-later
/* Header, extensions and bitmap directory, and the judgement on a geometry. */
#include <string.h>

#include "fuzz.h"
#include "image/extensions.h"
#include "image/header.h"
#include "image/plan.h"

struct walk {
	const uint8_t *dir;
	size_t len;
	unsigned int n;
};

/* What can be recorded has a table for it, all of it inside. */
static void see_record(const struct qcow2_bitmap *b)
{
	static const uint64_t sizes[] = { 512, 1 << 20, 1ULL << 40, QCOW2_MAX_OFFSET };
	unsigned int i, bits;

	for (i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
		for (bits = QCOW2_MIN_CLUSTER_BITS;
		     bits <= QCOW2_MAX_CLUSTER_BITS; bits++) {
			uint64_t meta = sizes[(i + bits) % 4];
			uint64_t reach = b->table_size * 8ULL << bits;
			enum qcow2_fault fault;

			fault = qcow2_bitmap_record_check(b, sizes[i], bits,
							  meta);
			MUST(qcow2_fault_str(fault));
			if (fault)
				continue;
			MUST(b->table_size && !b->extra_size);
			MUST(b->table_offset + b->table_size * 8ULL <= meta);
			MUST(qcow2_bitmap_bits(sizes[i], b->granularity_bits) <=
			     reach);
		}
	}
}

/* The bytes as entries of a bitmap's table */
static void see_entries(const uint8_t *data, size_t size)
{
	uint64_t entry;
	size_t i;

	for (i = 0; i + sizeof(entry) <= size && i < 4096; i += sizeof(entry)) {
		unsigned int bits = 9 + i / 8 % 13;
		__u64 off = 1;

		memcpy(&entry, data + i, sizeof(entry));
		if (qcow2_bitmap_entry_check(entry, bits, size, &off))
			continue;
		MUST(!(off & ((1ULL << bits) - 1)));
		MUST(off ? off + (1ULL << bits) <= size : entry <= 1);
	}
}

/* A header that is good stays so in each step, and says nothing else of the rest. */
static void see_extension(const uint8_t *data, size_t cluster,
			  const struct header *h)
{
	struct qcow2_bitmaps_ext ext = {
		.nb_bitmaps = cpu_to_be32(3),
		.directory_size = cpu_to_be64(96),
		.directory_offset = cpu_to_be64(cluster),
	};
	uint8_t *first = malloc(cluster);
	enum extension_step step;
	unsigned int steps = 0;
	struct header new;

	MUST(first);
	memcpy(first, data, cluster);
	do {
		step = extension_put(first, cluster, &ext);
		MUST(++steps < 8);
		MUST(header_parse(first, cluster, &new) == HEADER_OK);
		MUST(new.data_file.len == h->data_file.len);
		MUST(new.backing_file.len == h->backing_file.len);
		MUST(new.unknown_extensions == h->unknown_extensions);
		if (step == EXTENSION_MORE)
			MUST(new.has_bitmaps == h->has_bitmaps &&
			     new.bitmap_dir_offset == h->bitmap_dir_offset);
	} while (step == EXTENSION_MORE);
	if (step == EXTENSION_DONE) {
		MUST(new.has_bitmaps && new.bitmap_count == 3 &&
		     new.bitmap_dir_offset == cluster);
		extension_drop(first, cluster);
		MUST(header_parse(first, cluster, &new) == HEADER_OK);
		MUST(!new.has_bitmaps);
	}
	free(first);
}

static int see_bitmap(const struct bitmap *b, void *arg)
{
	struct walk *w = arg;
	const uint8_t *name = (const uint8_t *)b->name.s;

	MUST(name >= w->dir && name + b->name.len <= w->dir + w->len);
	MUST(b->at + sizeof(struct qcow2_bitmap_head) <= w->len);
	MUST(b->name.len && b->name.len < 1024);
	see_record(&b->head);
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

	see_entries(data, size);
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
	if (h.version == 3)
		see_extension(data, cluster, &h);
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
