/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the target knows of a bio that is more than a remap, and how it lives.
 */
#ifndef DM_QCOW2_IO_H
#define DM_QCOW2_IO_H

#include <linux/device-mapper.h>
#include <linux/llist.h>

#include "bitmap.h"
#include "claim.h"
#include "header.h"
#include "trim.h"
#include "view.h"

/*
 * Per CPU: changed with this_cpu_inc(), summed with READ_ONCE(); where that reads
 * half of a change (32 bits), status shows a wrong number once.
 */
struct qcow2_stats {
	u64 hits;
	u64 first_writes;
};

#define QCOW2_KEEP_HASH_BITS	6

/* What is just being kept for a view: see keep.c */
struct qcow2_keeper {
	struct workqueue_struct *wq;
	struct work_struct work;	/* goes on with all that are due */
	struct llist_head due;		/* jobs */
	mempool_t pool;			/* struct qcow2_keep */
	spinlock_t lock;		/* of the rest; the view's nests in it */
	struct hlist_head jobs[1 << QCOW2_KEEP_HASH_BITS];
};

struct qcow2_target {
	/* Constant while the table lives; read by map() */
	struct block_device *data_bdev;
	struct block_device *backing_bdev;	/* NULL: reads as zeros */
	sector_t backing_end;		/* sectors of it; behind are zeros */
	bool raw;			/* data_file_raw */
	bool passdown;			/* of discards to the data device */
	/* Bitmaps, or a view: changes pass the gate; written while suspended */
	bool gated;
	struct qcow2_stats __percpu *stats;

	struct qcow2_health health;
	struct qcow2_map map;
	struct qcow2_bitmaps bitmaps;	/* if they are to be kept */

	/* ios that are more than a remap; for suspend, see there */
	atomic_t slow;
	/* First writes whose data is on its way: they will be dirty */
	atomic_t first_writes;

	/* Constant */
	struct dm_target *ti;
	struct dm_dev *meta_dev;
	struct dm_dev *data_dev;
	struct dm_dev *backing_dev;
	struct dm_dev *cow_dev;		/* for what a view keeps; NULL: there is none */
	struct qcow2_config config;
	u64 cache_limit;		/* bytes; 0 = not given */
	u64 zeroed_from;		/* bytes; 0 = not given */
	bool read_only_arg;
	bool no_passdown_arg;
	bool bitmaps_arg;
	bool view_bits_arg;
	unsigned int view_bits;		/* log2 of bytes per granule */
	/* Goes on with an io on @io_wq */
	void (*process)(struct work_struct *work);

	struct qcow2_mdio mdio;
	struct qcow2_l1 l1;
	struct qcow2_alloc alloc;	/* for a writer, as the next two */
	struct qcow2_commit commit;
	struct qcow2_trims trims;
	struct qcow2_cache cache;
	struct qcow2_claim claim;
	/* Set by resume to that of the table before, if it goes on; NULL: none */
	struct qcow2_view *view;
	struct qcow2_keeper keeper;
	/*
	 * The map was left as it is at suspend, and is still so at resume.
	 * Suspend and resume only, which DM serialises.
	 */
	bool kept;

	/* Parts of bios that had to be cut, and fills of first writes */
	struct bio_set bs;
	struct bio_set fill_bs;
	/* Copies from the backing device: struct qcow2_copy */
	mempool_t copies;
	/* A page for each of them, and of what a view keeps */
	mempool_t copy_pages;
	/* Their second halves; none of its works waits for any memory. */
	struct workqueue_struct *copy_wq;

	/* Runs @process for each deferred bio, many at once. */
	struct workqueue_struct *io_wq;
	/* Ordered: makes reservations */
	struct workqueue_struct *alloc_wq;
	struct work_struct reserver;

	spinlock_t lock;		/* of the next one; no lock nests in it */
	struct list_head reservations;	/* ios that need an L2 table */
	unsigned long refused;		/* for want of space; the reserver */
};

enum qcow2_io_kind {
	QCOW2_IO_PLAIN,		/* nothing to be done at its end */
	QCOW2_IO_SLOW,		/* is cut into parts, or waits for a commit */
	QCOW2_IO_FIRST_WRITE,
	QCOW2_IO_OVER,		/* ended by the target itself */
};

/*
 * One of DM's clones, or a part of one.  Owned by whoever works on it: map(), then
 * the workqueue, or the list that it is on, or the completion of its bio and fills.
 *
 * A hit touches no field but @kind.
 */
struct qcow2_io {
	enum qcow2_io_kind kind;
	struct qcow2_error error;	/* of any part */
	bool commit;			/* must be durable before it ends */
	bool ours;			/* the bio is not DM's, and reads for a view */
	atomic_t pending;		/* who may still need this struct */
	struct qcow2_target *q;
	struct bio *bio;
	struct qcow2_io *parent;	/* NULL: the bio is DM's */

	/*
	 * @node: on one of a write's or a load's waiters, q's or the commit's
	 * lists.  The sectors are those that @commit is about.
	 */
	struct qcow2_waiter wait;

	union {
		/* QCOW2_IO_SLOW: what is still to be done */
		struct {
			struct work_struct work;
			sector_t sector;
			unsigned int left;	/* sectors */
			/* Up to where all has been marked in the bitmaps */
			sector_t marked;
			unsigned long mark_round;
			/* Up to where all is kept that a view shows */
			sector_t kept;
		};
		/* QCOW2_IO_FIRST_WRITE: units of the slice that it writes */
		struct qcow2_write write;
	};
};

/* DM's bio becomes more than a remap (@parent is NULL), or a part is made. */
void qcow2_io_init(struct qcow2_target *q, struct qcow2_io *io,
		   struct bio *bio, struct qcow2_io *parent);

/* DM's bio needs nothing more of us than a plain remap. */
static inline void qcow2_io_release(struct qcow2_io *io)
{
	io->kind = QCOW2_IO_PLAIN;
	atomic_dec(&io->q->slow);
}

/* Something has gone wrong with an io.  Any context. */
static inline void qcow2_io_error(struct qcow2_io *io, blk_status_t status)
{
	qcow2_error_note(&io->error, status);
}

/* Let the workqueue go on with an io.  Any context. */
void qcow2_io_queue(struct qcow2_io *io);

/* What map->wake() does for ios that have waited.  Any context. */
void qcow2_io_wake(struct list_head *ios, int error);

/* What commit->done() does.  Any context. */
void qcow2_io_committed(struct qcow2_waiter *wait, blk_status_t status);

/*
 * Nobody works on an io any more.  Returns true if it waits for a commit, and
 * thus is no longer the caller's.  Any context.
 */
bool qcow2_io_finish(struct qcow2_io *io);

/* Drop a reference; the last one ends the io, and maybe its parent. */
void qcow2_io_put(struct qcow2_io *io);

/*
 * The commit flushes the data device, which does for a write what its FUA flag
 * would have done.  @io is DM's, and has not been submitted; @bio is its bio, or
 * that of a part.
 */
void qcow2_fua_to_commit(struct qcow2_io *io, struct bio *bio);

/* A clone of the next @nr sectors of an io, as an io of its own.  May sleep. */
struct qcow2_io *qcow2_alloc_part(struct qcow2_io *io, unsigned int nr);

/*
 * A bio that was passed on has failed.  If it was a flush of the data device, or
 * a FUA write that may be a flush there, then whatever is dirty, or is being
 * first-written, may have lost its data.  Any context.
 */
void qcow2_check_flush(struct qcow2_target *q, struct bio *bio,
		       blk_status_t status);

/* DM's bio of an io: on whose behalf everything is done that it needs */
static inline struct bio *qcow2_io_origin(struct qcow2_io *io)
{
	while (io->parent)
		io = io->parent;
	return io->bio;
}

static inline void qcow2_advance(struct qcow2_io *io, unsigned int nr)
{
	io->sector += nr;
	io->left -= nr;
}

/* Are the next @nr sectors of an io all of its bio? */
static inline bool qcow2_io_whole(struct qcow2_io *io, unsigned int nr)
{
	return nr == bio_sectors(io->bio);
}

/* Discards and write zeroes: those without data, that may be very long */
static inline bool qcow2_zeroing(const struct bio *bio)
{
	return bio_op(bio) == REQ_OP_DISCARD ||
	       bio_op(bio) == REQ_OP_WRITE_ZEROES;
}

/* The end of @nr sectors from @sector on, or that of the slice. */
static inline sector_t qcow2_slice_end(struct qcow2_target *q, sector_t sector,
				       unsigned int nr)
{
	unsigned int shift = q->map.unit_shift + q->map.slice_shift;

	return min(((sector >> shift) + 1) << shift, sector + nr);
}

/* Does a sector read as zeros, being in @state (not busy)?  Any context. */
static inline bool qcow2_reads_zeros(struct qcow2_target *q, sector_t sector,
				     enum qcow2_state state)
{
	return state == QCOW2_ZERO ||
	       (state == QCOW2_UNALLOCATED && sector >= q->backing_end);
}

/* 0 or a negative errno; qcow2_io_exit() is right after both. */
int qcow2_io_pools(struct qcow2_target *q);
void qcow2_io_exit(struct qcow2_target *q);

#endif /* DM_QCOW2_IO_H */
