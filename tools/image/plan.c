// SPDX-License-Identifier: GPL-2.0-or-later
#include "image/plan.h"
#include "lib/util.h"

static uint64_t reftable_clusters_max(const struct qcow2_geometry *g)
{
	return QCOW2_MAX_REFTABLE_BYTES >> g->cluster_bits;
}

struct plan plan_worst_case(const struct qcow2_geometry *g,
			    const __be64 *reftable, uint64_t end,
			    uint64_t leaked, uint64_t l2_missing,
			    uint64_t limit)
{
	uint64_t per_block = refcounts_per_block(g);
	uint64_t per_table = blocks_per_reftable_cluster(g);
	uint64_t entries = g->reftable_clusters * per_table;
	uint64_t base = end + leaked + l2_missing;
	uint64_t reach, blocks, i = 0, missing = 0, last = 0;
	struct plan p = {
		.clusters = base, .addressable = true,
	};

	/*
	 * Blocks and table count themselves, so take more until it fits.  Each
	 * round adds at most 1/8 of what the round before added.
	 */
	for (;;) {
		uint64_t table;

		if (p.clusters > limit)
			p.clusters = limit;
		blocks = div_up(p.clusters, per_block);
		for (; i < blocks; i++)
			if (i >= entries || !reftable[i])
				missing++;
		table = 0;
		if (blocks > entries) {
			table = div_up(blocks, per_table);
			if (table > reftable_clusters_max(g)) {
				table = reftable_clusters_max(g);
				p.addressable = false;
			}
			if (table <= g->reftable_clusters)
				table = 0;
		}
		p.reftable_clusters = table;
		if (p.clusters == limit || base + missing + table == last)
			break;
		last = base + missing + table;
		p.clusters = last;
	}

	reach = max_u64(p.reftable_clusters, g->reftable_clusters) *
		per_table * per_block;
	if (reach < p.clusters) {
		p.addressable = false;
		p.clusters = max_u64(end, reach);
	}
	return p;
}

bool plan_new(const struct qcow2_geometry *g, bool with_l2, struct plan_new *p)
{
	return plan_new_bitmaps(g, with_l2, 0, 0, p);
}

bool plan_new_bitmaps(const struct qcow2_geometry *g, bool with_l2,
		      uint64_t bitmaps, uint64_t bits, struct plan_new *p)
{
	uint64_t per_block = refcounts_per_block(g);
	uint64_t per_table = blocks_per_reftable_cluster(g);
	uint64_t cluster = 1ULL << g->cluster_bits;
	uint64_t l2 = qcow2_l1_entries_needed(g), all, last;

	*p = (struct plan_new){
		.l1_clusters = div_up(l2 * 8, cluster),
		.l2_tables = with_l2 ? l2 : 0,
		.reftable_at = 1,
		.bitmaps = bitmaps,
	};

	/* The worst case decides about the size of the refcount table. */
	all = 1 + p->l1_clusters + l2 + bitmaps + bits;
	p->worst_case = all;
	p->reftable_clusters = 1;
	do {
		uint64_t blocks = div_up(p->worst_case, per_block);

		last = p->worst_case;
		p->reftable_clusters = div_up(blocks, per_table);
		p->worst_case = all + blocks + p->reftable_clusters;
	} while (p->worst_case != last);
	if (p->reftable_clusters > reftable_clusters_max(g))
		return false;

	p->blocks = 1;
	do {
		last = p->blocks;
		p->clusters = 1 + p->reftable_clusters + last +
			      p->l1_clusters + p->l2_tables + bitmaps;
		p->blocks = div_up(p->clusters, per_block);
	} while (p->blocks != last);

	p->blocks_at = p->reftable_at + p->reftable_clusters;
	p->l1_at = p->blocks_at + p->blocks;
	p->l2_at = p->l1_at + p->l1_clusters;
	p->bitmaps_at = p->l2_at + p->l2_tables;
	return true;
}

void plan_place(struct qcow2_geometry *g, const struct plan_new *p)
{
	g->l1_entries = qcow2_l1_entries_needed(g);
	g->l1_offset = p->l1_at << g->cluster_bits;
	g->reftable_offset = p->reftable_at << g->cluster_bits;
	g->reftable_clusters = p->reftable_clusters;
}
