/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * How much metadata an image can come to need.  Pure code.
 *
 * The kernel never grows a file and never rewrites the header, so before an
 * image goes live there must be room for every L2 table that its size can
 * need, for the refcount blocks that count those, and a refcount table that
 * can name the blocks.
 */
#ifndef QCOW2SETUP_PLAN_H
#define QCOW2SETUP_PLAN_H

#include <stdbool.h>
#include <stdint.h>

#include "../../driver/format.h"

struct plan {
	/* Clusters that the metadata must have room for, from offset 0. */
	uint64_t clusters;
	/*
	 * Clusters of the new refcount table, that goes to cluster @end; 0 if
	 * the one that is there reaches far enough.
	 */
	uint32_t reftable_clusters;
	/*
	 * False if no refcount table that is allowed could address all that:
	 * the last clusters stay out of reach.
	 */
	bool addressable;
};

/* Refcounts in one refcount block. */
static inline uint64_t refcounts_per_block(const struct qcow2_geometry *g)
{
	return (8ULL << g->cluster_bits) >> g->refcount_order;
}

/* Refcount blocks that one cluster of refcount table names. */
static inline uint64_t blocks_per_reftable_cluster(const struct qcow2_geometry *g)
{
	return 1ULL << (g->cluster_bits - 3);
}

/**
 * plan_worst_case() - room for everything an image can need
 * @g: checked geometry
 * @reftable: the refcount table, big endian
 * @end: no cluster from here on is in use, except for @leaked ones
 * @leaked: clusters behind @end whose refcounts say that they are taken
 * @l2_missing: L2 tables that do not exist yet
 * @limit: clusters there can be at most (a block device does not grow)
 */
struct plan plan_worst_case(const struct qcow2_geometry *g,
			    const __be64 *reftable, uint64_t end,
			    uint64_t leaked, uint64_t l2_missing,
			    uint64_t limit);

/* Layout of a new image, in clusters, all of it in use; see plan_new(). */
struct plan_new {
	uint64_t reftable_at, reftable_clusters;
	uint64_t blocks_at, blocks;
	uint64_t l1_at, l1_clusters;
	uint64_t l2_at, l2_tables;
	uint64_t bitmaps_at, bitmaps;
	uint64_t clusters;		/* in use */
	uint64_t worst_case;		/* clusters the image can grow to */
};

/**
 * plan_new() - where things go in a new image
 * @g: size, cluster_bits and refcount_order are used
 * @with_l2: all L2 tables exist from the start
 * @p: filled in
 *
 * The refcount table is large enough for the worst case, so that it never has
 * to grow.  Returns false if it would exceed its limit.
 */
bool plan_new(const struct qcow2_geometry *g, bool with_l2, struct plan_new *p);
/* The same with @bitmaps clusters for bitmaps, and @bits more that they come to need. */
bool plan_new_bitmaps(const struct qcow2_geometry *g, bool with_l2,
		      uint64_t bitmaps, uint64_t bits, struct plan_new *p);
/* What a header says of such a layout: tables that it names, with their offsets */
void plan_place(struct qcow2_geometry *g, const struct plan_new *p);

#endif
