/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The commit: it makes changes of the map durable.
 *
 * A commit takes all blocks that are dirty (their states as they are then), and
 * goes through stages.  The order is all that keeps the image consistent at
 * every instant; each stage ends with one flush, however many entries there are:
 *
 *	data	  the data device is flushed: units that the blocks call data are
 *		  durable, and so is all that was acknowledged before
 *	tables	  refcounts of new L2 tables (and of new refcount blocks), and the
 *		  blocks of new tables
 *	reftable  new refcount blocks get into the refcount table
 *	links	  new tables get into the L1 table; blocks of tables that are linked
 *		  already are written
 *
 * Stages without entries are left out.  An entry is a block.  Entries fail one by
 * one: refcounts that cannot be written hold back the tables whose counts they
 * carry, a block of a new table holds back its table, an entry of the refcount table
 * the tables of its region, an L1 entry its table; no more.  What has failed is
 * dirty again, and the next commit takes it along; a timer starts one.  A table whose
 * link was tried may be linked on disk: it keeps its cluster, and its blocks are
 * written as those of a table that is linked.
 *
 * A flush that fails ends it all (mode fail): what was lost with a cache nobody
 * can write again.
 *
 * One ordered worker runs all commits, and is the only writer of L1 and L2 tables,
 * refcounts and the refcount table while the device is live.  (Zeros of new
 * clusters, which nothing refers to, are the reservation worker's.)  A commit
 * serves everyone who has asked for one before it began.
 */
#ifndef DM_QCOW2_COMMIT_H
#define DM_QCOW2_COMMIT_H

#include <linux/wait.h>
#include <linux/workqueue.h>

#include "alloc.h"
#include "map.h"
#include "mode.h"

/* Changes become durable this long after they were made, flush or no flush. */
#define QCOW2_COMMIT_PERIOD	HZ

/* Someone who waits for a commit. */
struct qcow2_waiter {
	struct list_head node;		/* commit->lock */
	sector_t sector;		/* what must be durable; constant */
	sector_t nr;			/* 0: everything */
};

/* Blocks that are read or written at the same time */
#define QCOW2_WAVE	128

struct qcow2_entry;

/* A block of refcounts on its way, see qcow2_refcounts() */
struct qcow2_refpart {
	u64 offset;			/* bytes */
	void *buf;
	struct qcow2_error error;
	bool unread;			/* so it cannot be written either */
};

#define QCOW2_REFPARTS	16

struct qcow2_commit {
	/* Constant */
	struct qcow2_map *map;
	struct qcow2_mdio *io;
	struct qcow2_l1 *l1;
	struct qcow2_alloc *alloc;
	struct qcow2_health *health;
	struct block_device *data_bdev;
	/* Ends a waiter; any context */
	void (*done)(struct qcow2_waiter *w, blk_status_t status);
	/* Queued after each commit but one that fails for good; or NULL */
	struct workqueue_struct *then_wq;
	struct work_struct *then;

	struct workqueue_struct *wq;	/* ordered */
	struct work_struct worker;	/* for waiters */
	struct delayed_work waker;	/* the timer */

	spinlock_t lock;		/* of the next one; no lock nests in it */
	struct list_head waiters;

	/*
	 * The devices' caches may have lost what is not committed: see
	 * qcow2_commit_set_lost().  WRITE_ONCE; cleared while suspended.
	 */
	bool lost;

	/* Written by the worker (WRITE_ONCE), read anywhere */
	unsigned long commits;		/* that have succeeded */
	unsigned long tries;
	wait_queue_head_t tried;	/* for @tries to change */

	/* The rest is the worker's alone. */
	mempool_t entry_pool;
	struct list_head committing;	/* slices that are still to be taken */
	struct list_head entries;	/* struct qcow2_entry, by place in the map */
	struct list_head tables;	/* first entries of new tables, by cluster */
	struct qcow2_error error;	/* of any entry of the commit */
	unsigned int nr_entries;
	unsigned int nr_tables;		/* of @tables */
	bool corrupt;			/* an entry on disk is impossible */
	unsigned int nr_wave;
	struct qcow2_entry *wave[QCOW2_WAVE];
	unsigned int nr_parts;
	struct qcow2_refpart parts[QCOW2_REFPARTS];
	unsigned long counted;		/* region whose new block is counted */
	struct list_head kept;		/* struct qcow2_kept; or suspend's */
	unsigned int nr_kept;
};

/**
 * qcow2_commit_init() - get ready for commits
 * @c: all zeros but for the constant fields
 *
 * Returns 0 or a negative errno; qcow2_commit_exit() is right after both.
 * Process context.
 */
int qcow2_commit_init(struct qcow2_commit *c);

/* After qcow2_commit_stop() */
void qcow2_commit_exit(struct qcow2_commit *c);

/* End @w when a commit has ended that begins after this.  Any context. */
void qcow2_commit_wait(struct qcow2_commit *c, struct qcow2_waiter *w);

/* Something has become dirty, which was not before.  Any context. */
void qcow2_commit_arm(struct qcow2_commit *c);

/*
 * Start a commit if something is dirty that has not failed before, and wait until it,
 * or another one, has ended.  Process context, but not that of the worker.
 */
void qcow2_commit_now(struct qcow2_commit *c);

/*
 * The data device may have lost what is not committed: no commit from now on
 * succeeds, nor does one whose flush has not ended yet, until all is clean and
 * suspended: then there was nothing to lose.  Any context.
 */
static inline void qcow2_commit_set_lost(struct qcow2_commit *c)
{
	WRITE_ONCE(c->lost, true);
}

/**
 * qcow2_commit_suspend() - commit what is left
 * @c: the commit
 *
 * Tries several times if there are errors.  What is dirty then stays so.  No I/O
 * is in flight.  Afterwards there is no timer.  Process context.
 */
void qcow2_commit_suspend(struct qcow2_commit *c);

/* No timer from now on.  Nothing gets dirty any more; process context. */
void qcow2_commit_stop(struct qcow2_commit *c);

/* The map has been forgotten. */
void qcow2_commit_reset(struct qcow2_commit *c);

#endif /* DM_QCOW2_COMMIT_H */
