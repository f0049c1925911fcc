/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Metadata clusters: which are free, and their refcounts.
 *
 * A cluster for an L2 table is reserved before the first change that needs the
 * table.  Its zeros are written then, and those of a refcount block if one is
 * needed: so want of space shows before anything is acknowledged that depends on
 * it.  Nothing on disk refers to either before a commit has written the refcounts.
 *
 * A worker of its own makes reservations; no commit waits for it, nor it for one.
 */
#ifndef DM_QCOW2_ALLOC_H
#define DM_QCOW2_ALLOC_H

#include "l1.h"

struct qcow2_health;

#define QCOW2_MAX_SKIPPED	64

struct qcow2_alloc {
	/* Constant */
	struct qcow2_mdio *io;
	struct qcow2_l1 *l1;
	struct qcow2_health *health;
	struct qcow2_geometry geo;
	u64 nr_clusters;		/* that can be told to be free */
	u64 zeroed_from;		/* what is free from here on is real, and zeros; bytes */

	/*
	 * Owned by the reservation worker while the device is live, by resume
	 * else; @cursor is read anywhere (READ_ONCE).
	 */
	unsigned long *used;		/* bitmap: referenced or reserved */
	u64 cursor;			/* no free cluster below */
	void *refblock;			/* one block of refcounts */
	u64 refblock_offset;		/* where it is from; 0 = nowhere */
	unsigned long tables;		/* that there are, or are reserved */
	bool low;			/* that free clusters get rare was told */
	/* Clusters that could not be written: tried when there are no others */
	u32 skipped[QCOW2_MAX_SKIPPED];
	unsigned int nr_skipped;	/* WRITE_ONCE; read anywhere */
	/* Something lies where no one can tell what is free: nothing is taken */
	bool beyond;

	/*
	 * The refcount table is in core and checked; set by the reservation
	 * worker, others may look at it (READ_ONCE).
	 */
	bool ready;
	/*
	 * L1 index -> cluster, 0 = none.  Set by the reservation worker,
	 * then changed by the commit worker alone (smp_store_release() when it
	 * goes, after the L1 entry has come); read with smp_load_acquire().
	 */
	u32 *reserved;

	spinlock_t lock;		/* of the rest */
	/* In core; with entries whose refcount block is not on disk yet */
	__be64 *reftable;
	unsigned long *fresh;		/* bitmap: those entries */
};

/* In @reserved: the L1 entry may be on disk, so the cluster is the table's. */
#define QCOW2_LINK_TRIED	BIT(31)

/*
 * For a writer.  @zeroed_from: from this byte on, what no refcount counts has space
 * below it, and reads as zeros; 0 = nowhere.  @geo is checked with
 * qcow2_geometry_check().  0 or -ENOMEM; qcow2_alloc_exit() is right after both.
 * Process context.
 */
int qcow2_alloc_init(struct qcow2_alloc *a, struct qcow2_mdio *io,
		     struct qcow2_l1 *l1, struct qcow2_health *health,
		     const struct qcow2_geometry *geo, u64 zeroed_from);
void qcow2_alloc_exit(struct qcow2_alloc *a);

/**
 * qcow2_alloc_resume() - forget all reservations; look at the whole L1 table
 * @a: the allocator
 *
 * qcow2_l1_read() has been called.  Entries beyond the virtual size are read in
 * pieces.  Returns 0, a negative errno, or -EUCLEAN if an L1 entry is impossible,
 * which is logged: each load that needs it fails then, all else can be read.
 * Process context, device suspended.
 */
int qcow2_alloc_resume(struct qcow2_alloc *a);

/*
 * Something else lies there, @len bytes from @offset on: nothing else may.  QCOW2_OK, or what
 * is wrong.  Process context, device suspended, after qcow2_alloc_resume().
 */
enum qcow2_fault qcow2_alloc_use(struct qcow2_alloc *a, u64 offset, u64 len);

/*
 * Is there an L2 table that may be written, or a cluster reserved for it, for
 * L1 entry @i?  Any context.
 */
bool qcow2_alloc_has_table(struct qcow2_alloc *a, unsigned long i);

/**
 * qcow2_alloc_reserve() - make sure that an L2 table can be committed
 * @a: the allocator
 * @i: index of the L1 entry
 *
 * Returns 0; -ENOSPC if no cluster is free, or no space below; -EUCLEAN if
 * metadata is impossible, which is logged; or another negative errno.  After an
 * error it can be tried again.  The reservation worker.
 */
int qcow2_alloc_reserve(struct qcow2_alloc *a, unsigned long i);

/* Clusters that may still be free.  Any context. */
static inline u64 qcow2_alloc_free(struct qcow2_alloc *a)
{
	return a->nr_clusters - READ_ONCE(a->cursor) + READ_ONCE(a->nr_skipped);
}

/*----------------------------------------------------------------
 * For the commit worker
 *----------------------------------------------------------------
 */

/*
 * The cluster that is reserved for L1 entry @i.  *@tried is set if a link to it may
 * be on disk.
 */
u64 qcow2_alloc_reserved(struct qcow2_alloc *a, unsigned long i, bool *tried);

/* A link to it is about to be written. */
void qcow2_alloc_link_tried(struct qcow2_alloc *a, unsigned long i);

/* The L1 entry is on disk and in core: the reservation is over. */
void qcow2_alloc_linked(struct qcow2_alloc *a, unsigned long i);

/* log2 of the clusters that a refcount block covers */
static inline unsigned int qcow2_alloc_region_shift(const struct qcow2_alloc *a)
{
	return a->geo.cluster_bits + 3 - a->geo.refcount_order;
}

/*
 * Where on disk is the refcount of a cluster whose refcount block exists, or is
 * reserved?  Returns the offset of the block of I/O, and sets @i to the entry in it.
 */
u64 qcow2_alloc_refcount(struct qcow2_alloc *a, u64 cluster, unsigned int *i);

/* Is the refcount block of region @region not in the refcount table on disk yet? */
bool qcow2_alloc_fresh(struct qcow2_alloc *a, unsigned long region);

/*
 * Copy block @block of the refcount table, without entries that are not on disk;
 * add that of a region whose refcount block is.
 */
void qcow2_alloc_copy_reftable(struct qcow2_alloc *a, unsigned long block,
			       __be64 *buf);
void qcow2_alloc_add_region(struct qcow2_alloc *a, unsigned long region,
			    __be64 *buf);

/* The refcount table names it on disk now. */
void qcow2_alloc_region_done(struct qcow2_alloc *a, unsigned long region);

#endif /* DM_QCOW2_ALLOC_H */
