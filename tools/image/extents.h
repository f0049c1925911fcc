/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What an image says about each byte of the disk, in runs that are as long as
 * possible.  Pure code: L2 tables in, extents out.
 */
#ifndef QCOW2SETUP_EXTENTS_H
#define QCOW2SETUP_EXTENTS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "../../driver/format.h"

struct extent {
	uint64_t start, length;		/* bytes of the disk */
	enum qcow2_state state;
	/*
	 * The data file has a place for it.  As everywhere in such an image
	 * that is at the same offset; what it holds matters only to data.
	 */
	bool has_offset;
};

/* Called for each extent, in order; a result other than 0 ends it all. */
typedef int extent_fn(const struct extent *e, void *arg);

struct extents {
	uint64_t size;			/* of the disk: nothing is behind it */
	bool states_only;		/* has_offset makes no difference */
	extent_fn *fn;
	void *arg;
	/* kept here */
	struct extent last;		/* can still grow */
	int ret;			/* what fn returned */
};

/* What comes next on the disk. */
void extents_add(struct extents *x, uint64_t length, enum qcow2_state state,
		 bool has_offset);
/* Nothing comes any more; returns what fn returned. */
int extents_end(struct extents *x);

/**
 * extents_add_l2() - what an L2 table says comes next
 * @x: ends where the table begins
 * @g: checked geometry
 * @table: a cluster
 * @index: set to the number of the entry if it is faulty
 *
 * Entries behind the end of the disk are not looked at.
 */
enum qcow2_fault extents_add_l2(struct extents *x,
				const struct qcow2_geometry *g,
				const void *table, uint32_t *index);

/* Entries in an L2 table. */
static inline uint32_t l2_entries(const struct qcow2_geometry *g)
{
	return 1U << (g->cluster_bits - qcow2_l2_entry_bits(g));
}

/* Entry @i of an L2 table; the bitmaps of a standard one are 0. */
static inline struct qcow2_ext_entry l2_entry(const struct qcow2_geometry *g,
					      const void *table, uint32_t i)
{
	const __be64 *p = table;

	if (g->ext_l2)
		return qcow2_ext_entry(be64_to_cpu(p[2 * (size_t)i]),
				       be64_to_cpu(p[2 * (size_t)i + 1]));
	return (struct qcow2_ext_entry){ .entry = be64_to_cpu(p[i]) };
}

/*
 * Does it name a place in the data file?  Nobody can tell that of the disk's
 * first cluster but by COPIED, since its place is at 0.
 */
static inline bool l2_entry_normal(const struct qcow2_ext_entry *e)
{
	return e->entry & (QCOW2_OFFSET_MASK | QCOW2_OFLAG_COPIED);
}

#endif
