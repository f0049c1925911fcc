// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Entries of L1, L2 and refcount tables, and of refcount blocks.  Input: how to
 * take the rest (cluster_bits, refcount order, extended), then entries.
 */
#include <string.h>

#include "fuzz.h"
#include "image/extents.h"

struct seen {
	uint64_t end;
	enum qcow2_state last;
	bool any;
};

static int see_extent(const struct extent *e, void *arg)
{
	struct seen *s = arg;

	MUST(e->length);
	MUST(e->start == s->end);
	MUST(e->state <= QCOW2_DATA);
	/* else they would be one */
	MUST(!s->any || e->state != s->last);
	s->end = e->start + e->length;
	s->last = e->state;
	s->any = true;
	return 0;
}

/* All entries of a table one by one, and the table as a whole, say the same. */
static void see_table(const struct qcow2_geometry *g, const uint8_t *table)
{
	struct seen s = { 0 };
	struct extents x = {
		.size = g->size, .states_only = true, .fn = see_extent,
		.arg = &s,
	};
	uint64_t cs = 1ULL << g->cluster_bits;
	enum qcow2_fault fault, first = QCOW2_OK;
	uint32_t i, bad = 0, where = 0;

	for (i = 0; i < l2_entries(g) && i * cs < g->size && !first; i++) {
		struct qcow2_ext_entry e = l2_entry(g, table, i);
		enum qcow2_state state = QCOW2_BUSY;
		unsigned int k;

		if (!g->ext_l2) {
			first = qcow2_l2_decode(e.entry, i * cs,
						g->cluster_bits, &state);
			MUST(first || state <= QCOW2_DATA);
			/* The driver writes entries that it would accept. */
			MUST(!qcow2_l2_decode(qcow2_l2_data_entry(i * cs),
					      i * cs, g->cluster_bits, &state));
			MUST(state == QCOW2_DATA);
		} else {
			first = qcow2_l2_ext_check(&e, i * cs, g->cluster_bits);
			for (k = 0; !first && k < QCOW2_SUBCLUSTERS; k++)
				MUST(qcow2_ext_state(&e, k) <= QCOW2_DATA);
		}
		where = i;
	}
	fault = extents_add_l2(&x, g, table, &bad);
	MUST(fault == first);
	MUST(!fault || bad == where);
	if (fault)
		return;
	MUST(!extents_end(&x));
	MUST(s.end <= g->size);
}

static void see_refcounts(const uint8_t *data, size_t size, unsigned int order)
{
	uint64_t n = (uint64_t)size * 8 >> order, max, i;
	uint8_t *copy = malloc(size);

	MUST(copy);
	max = order == 6 ? UINT64_MAX : (1ULL << (1U << order)) - 1;
	memset(copy, 0, size);
	/* Taken out and put back they are the same, and touch no other. */
	for (i = 0; i < n; i++) {
		uint64_t v = qcow2_refcount_get(data, i, order);

		MUST(v <= max);
		qcow2_refcount_set(copy, i, order, ~0ULL);
		qcow2_refcount_set(copy, i, order, v);
		MUST(qcow2_refcount_get(copy, i, order) == v);
	}
	MUST(!memcmp(copy, data, size));
	free(copy);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct qcow2_geometry g = { 0 };
	unsigned int bits, k;
	uint8_t *table;
	uint64_t cs;

	if (size < 3 + 8)
		return 0;
	bits = 9 + data[0] % 13;
	cs = 1ULL << bits;
	g.cluster_bits = bits;
	g.ext_l2 = data[1] & 0x80 && bits >= QCOW2_MIN_CLUSTER_BITS_EXT_L2;
	/* the table is cut by the end of the disk */
	g.size = ((uint64_t)data[2] + 1) << (bits - 2);
	see_refcounts(data + 3, (size - 3) & ~7UL, data[1] % 7);

	for (k = 3; k + 8 <= size; k += 8) {
		enum qcow2_fault fault;
		__be64 be;
		uint64_t e;

		memcpy(&be, data + k, 8);
		e = be64_to_cpu(be);
		fault = qcow2_l1_check(e, bits, 1ULL << (data[2] & 63));
		MUST(qcow2_fault_str(fault));
		MUST(fault || (e & QCOW2_OFFSET_MASK) == 0 ||
		     (e & QCOW2_OFFSET_MASK) + cs <= 1ULL << (data[2] & 63));
		fault = qcow2_reftable_check(e, bits, 1ULL << (data[2] & 63));
		MUST(fault || !e || e + cs <= 1ULL << (data[2] & 63));
	}
	table = calloc(1, cs);
	MUST(table);
	memcpy(table, data + 3, size - 3 < cs ? size - 3 : cs);
	see_table(&g, table);
	free(table);
	return 0;
}
