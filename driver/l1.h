/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The L1 table in core: what the virtual size needs of it.
 */
#ifndef DM_QCOW2_L1_H
#define DM_QCOW2_L1_H

#include <linux/spinlock.h>

#include "format.h"
#include "mdio.h"

struct qcow2_l1 {
	/* Constant */
	struct qcow2_mdio *io;
	struct qcow2_geometry geo;
	unsigned long needed;		/* entries that the size needs */

	spinlock_t lock;		/* of what follows; nests in bucket locks */
	/*
	 * As on disk, up to a whole block.  Read at resume; changed by the
	 * commit worker.
	 */
	__be64 *entries;
	unsigned long used;		/* entries with a table */
};

/*
 * @geo is checked with qcow2_geometry_check().  0 or -ENOMEM; qcow2_l1_exit() is
 * right after both.  Process context.
 */
int qcow2_l1_init(struct qcow2_l1 *l1, struct qcow2_mdio *io,
		  const struct qcow2_geometry *geo);
void qcow2_l1_exit(struct qcow2_l1 *l1);

/* Read the table.  0 or a negative errno; process context, device suspended. */
int qcow2_l1_read(struct qcow2_l1 *l1);

/**
 * qcow2_l1_table() - find an L2 table
 * @l1: the table
 * @i: index of the entry, less than @l1->needed
 * @offset: set to the place of the L2 table, bytes; 0 if there is none
 * @copied: set if the table is exclusively owned
 *
 * Returns 0, or -EUCLEAN if the entry is impossible, which is logged.  Process
 * context.
 */
int qcow2_l1_table(struct qcow2_l1 *l1, unsigned long i, u64 *offset,
		   bool *copied);

/* An entry as it is, in CPU byte order.  Any context. */
u64 qcow2_l1_entry(struct qcow2_l1 *l1, unsigned long i);

/* Log that an entry is impossible.  Returns -EUCLEAN. */
int qcow2_l1_bad(struct qcow2_l1 *l1, unsigned long i, u64 entry,
		 enum qcow2_fault fault);

/* Make each use of an entry fail from now on.  The table is not written any more. */
void qcow2_l1_spoil(struct qcow2_l1 *l1, unsigned long i);

/* Entries per block of I/O */
static inline unsigned int qcow2_l1_per_block(const struct qcow2_l1 *l1)
{
	return l1->io->block_bytes / 8;
}

/* Copy a block of the table.  The commit worker. */
void qcow2_l1_copy_block(struct qcow2_l1 *l1, unsigned long block, __be64 *buf);

/* The entry of an L2 table that is exclusively owned */
static inline __be64 qcow2_l1_link(u64 offset)
{
	return cpu_to_be64(offset | QCOW2_OFLAG_COPIED);
}

/* The entry is on disk: have it in core, too.  The commit worker. */
void qcow2_l1_set(struct qcow2_l1 *l1, unsigned long i, u64 offset);

#endif /* DM_QCOW2_L1_H */
