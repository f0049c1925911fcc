// SPDX-License-Identifier: GPL-2.0-or-later
#include "image/extents.h"
#include "lib/util.h"

static void flush_last(struct extents *x)
{
	if (x->last.length && !x->ret)
		x->ret = x->fn(&x->last, x->arg);
	x->last.start += x->last.length;
	x->last.length = 0;
}

void extents_add(struct extents *x, uint64_t length, enum qcow2_state state,
		 bool has_offset)
{
	uint64_t at = x->last.start + x->last.length;

	length = min_u64(length, x->size - at);
	if (!length)
		return;
	if (x->states_only)
		has_offset = false;
	if (state != x->last.state || has_offset != x->last.has_offset)
		flush_last(x);
	x->last.state = state;
	x->last.has_offset = has_offset;
	x->last.length += length;
}

int extents_end(struct extents *x)
{
	flush_last(x);
	return x->ret;
}

static void add_subclusters(struct extents *x, const struct qcow2_geometry *g,
			    const struct qcow2_ext_entry *e)
{
	uint64_t bytes = 1ULL << qcow2_unit_bits(g);
	unsigned int i;

	for (i = 0; i < QCOW2_SUBCLUSTERS; i++)
		extents_add(x, bytes, qcow2_ext_state(e, i), l2_entry_normal(e));
}

enum qcow2_fault extents_add_l2(struct extents *x,
				const struct qcow2_geometry *g,
				const void *table, uint32_t *index)
{
	uint64_t cs = 1ULL << g->cluster_bits;
	uint64_t guest = x->last.start + x->last.length;
	uint32_t n = l2_entries(g), i;

	for (i = 0; i < n && guest < x->size && !x->ret; i++, guest += cs) {
		struct qcow2_ext_entry e = l2_entry(g, table, i);
		enum qcow2_fault fault;
		enum qcow2_state state;

		*index = i;
		if (g->ext_l2) {
			fault = qcow2_l2_ext_check(&e, guest, g->cluster_bits);
			if (fault)
				return fault;
			add_subclusters(x, g, &e);
			continue;
		}
		fault = qcow2_l2_decode(e.entry, guest, g->cluster_bits, &state);
		if (fault)
			return fault;
		/* Offset 0 is no place to QEMU, unless it is that of data. */
		extents_add(x, cs, state, state == QCOW2_DATA ||
			    e.entry & QCOW2_OFFSET_MASK);
	}
	return QCOW2_OK;
}
