/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Dirty bitmaps, kept while the device is written.
 *
 * A bitmap that records has a bit for each granule of the disk.  On stable storage the bit
 * is set before anything of the granule changes; so what is on disk is at every
 * instant a superset of what has changed, and valid.
 *
 * Two bits of each granule are in core, for each bitmap, in blocks that are read when
 * one of their granules is to change for the first time; and one for all of them, the gate:
 *
 *	exact	  a request has asked to change the granule, or the bit was set when the
 *		  block was read.  It stays so as long as the table is live.
 *	durable	  the bit is set on stable storage, for certain.
 *	gate	  open: in all bitmaps the granule is exact and durable, and if there is a
 *		  view (view.h) nothing of it has to be kept, so that it may change without
 *		  anything being done before.
 *
 *	exact durable  gate
 *	  0      0     closed	 clean
 *	  0      1     closed	 marked ahead of a sequential writer, or left of that
 *	  1      0     closed	 a request waits for its mark, or has seen it fail
 *	  1      1     either	 dirty; who comes next opens the gate if it is closed
 *
 * What happens, and who does it; all of it under the lock but for the look at the gate:
 *
 *	 event				exact	durable		gate
 *	1 a block is read		disk	disk		closed
 *	2 a request finds it open	-	-		stays open, no lock taken
 *	3 a request finds it closed,
 *	  and the granule durable	1	-		opens if so in all bitmaps
 *	4 the same, not durable		1	-		closed; the block is to be written
 *	5 a mark has been written and
 *	  flushed			-	1 where it was	closed: its waiters come by 3
 *					written as 1
 *	6 a mark has failed		-	-		closed; its waiters fail, and
 *								the block stays to be written
 *	7 taking back begins		-	= exact		as it is: open ones are exact
 *	8 taking back has been written	-	-		-
 *	9 taking back has failed	-	-		- ; the block is to be written
 *	10 a block is dropped		gone	gone		closed first; what requests
 *								have seen open is on disk
 *
 * Requests that a round has let go are often back at once with the next granule. A round
 * that began with the first of them would leave the others to the round after it; so it
 * waits until about as many have come as there were, or half of them (the other round has
 * the other half), but for a quarter of a round at most.
 *
 * A block is written by one worker at a time.  What a mark writes is what is exact or durable when
 * the write begins, and a piece ahead of sequential writers, which does not get smaller as long
 * as a mark of the block is on its way.  So two marks overlap: while one waits for its flush the
 * other one writes, the same blocks too, for each only adds to what the one before has
 * written.  Taking back takes away from it, so it waits until no mark of
 * that block is on its way, and no mark begins before it has ended.
 *
 * A flush of the metadata device that fails ends all of it (mode fail), as it does for
 * commits.
 */
#ifndef DM_QCOW2_BITMAP_H
#define DM_QCOW2_BITMAP_H

#include <linux/mempool.h>
#include <linux/mutex.h>
#include <linux/rcupdate.h>
#include <linux/wait.h>
#include <linux/workqueue.h>
#include <linux/xarray.h>

#include "cache.h"
#include "directory.h"
#include "view.h"

struct qcow2_bitmaps;

/* Bits of the gate that are in one piece */
#define QCOW2_GATE_BITS		(PAGE_SIZE * 8)

struct qcow2_piece;

/* Looked at by map(): constant while the table is live, but for the pieces. */
struct qcow2_gate {
	unsigned int shift;		/* log2 of sectors per bit */
	unsigned long nr_pieces;
	/*
	 * Each of QCOW2_GATE_BITS bits, or NULL: all closed.  Bits are set and pieces come
	 * under the bitmaps' lock; read under RCU.
	 */
	struct qcow2_piece __rcu **pieces;
};

struct qcow2_piece {
	unsigned long *words;
	struct rcu_head rcu;
};

/* A bitmap that records; constant while the table is live, but for @blocks. */
struct qcow2_record {
	unsigned int shift;		/* log2 of sectors per granule */
	u32 *clusters;			/* where its bits are, by cluster of bits */
	/* struct qcow2_bits by index; added by who reads them, erased under the lock */
	struct xarray blocks;
};

/* Blocks that are written together */
#define QCOW2_MARK_WAVE		16

/* A block that is being written */
struct qcow2_mark {
	struct qcow2_bits *bits;
	void *buf;
	u32 first, end;			/* words of it that may have what is not durable */
	struct qcow2_error error;
};

/* Owned by its work, but for @work. */
struct qcow2_marker {
	struct work_struct work;
	struct qcow2_bitmaps *bm;
	unsigned int nr;
	struct qcow2_mark marks[QCOW2_MARK_WAVE];
};

struct qcow2_bitmaps {
	/* Constant */
	struct qcow2_map *map;
	struct qcow2_mdio *io;
	struct qcow2_alloc *alloc;
	struct qcow2_cache *cache;
	struct qcow2_health *health;

	/* Constant while the table is live */
	unsigned int count;
	struct qcow2_record records[QCOW2_MAX_RECORDING];
	struct qcow2_view *view;	/* NULL: there is none */
	struct qcow2_gate gate;

	mempool_t blocks;		/* struct qcow2_bits with their bits */
	mempool_t buffers;		/* of a block */
	struct workqueue_struct *wq;
	struct qcow2_marker markers[2];	/* they overlap */
	struct delayed_work idle;	/* takes back */
	struct mutex loading;		/* one block at a time is read */
	struct mutex taking;		/* back; of @taker */
	struct qcow2_marker taker;

	spinlock_t lock;		/* of the rest; the map's nests in it */
	struct list_head todo;		/* struct qcow2_bits to be written */
	struct list_head lru;		/* all of them; those used last are last */
	struct list_head waiters;	/* for map->wake(), when a round has ended */
	/* How many those are; @lock, but read without by who gathers them */
	unsigned int nr_waiting;
	unsigned int nr_served;		/* in the rounds that are on their way; likewise */
	unsigned int crowd;		/* the most of both, lately; likewise */
	u32 round_ns;			/* what a round takes, a second at most; likewise */
	wait_queue_head_t gather;	/* for there to be as many as before */
	/* Rounds of marks: how many have begun */
	unsigned long rounds;
	unsigned int nr_rounds;		/* on their way */
	/* Blocks whose last write has failed; @lock, but read without for status */
	unsigned int nr_unsure;
	bool paused;			/* none begins */
	wait_queue_head_t quiet;	/* for @nr_rounds to be 0 */
	/* Sequential writers: where the next one is expected, what was marked ahead; sectors */
	sector_t next;
	sector_t ahead;
	unsigned int streak;		/* marks in a row that have followed the one before */
	bool used;			/* of what was marked ahead, since it was last asked */
	unsigned long waits;		/* requests that had to wait */
	unsigned long taken_back;	/* granules */
};

/**
 * qcow2_bitmaps_init() - get ready to record
 * @bm: all zeros but for the constant fields
 *
 * Returns 0 or -ENOMEM; qcow2_bitmaps_exit() is right after both.  Process context.
 */
int qcow2_bitmaps_init(struct qcow2_bitmaps *bm);
void qcow2_bitmaps_exit(struct qcow2_bitmaps *bm);

/**
 * qcow2_bitmaps_start() - find out what is to be recorded
 * @bm: the bitmaps
 * @geo: of the image
 * @record: bitmaps are to be kept
 * @view: what changes has to be kept for it; NULL: there is none.  It is the caller's.
 * @error: set to the cause on failure
 *
 * qcow2_alloc_resume() has been called.  Returns 0; -EINVAL if a bitmap cannot be recorded, or
 * lies where something else is; or another negative errno.  Process context, device
 * suspended.
 */
int qcow2_bitmaps_start(struct qcow2_bitmaps *bm,
			const struct qcow2_geometry *geo, bool record,
			struct qcow2_view *view, char **error);

/*
 * Nothing is in flight: have on disk what is exact.  False if that could not be written.  There
 * is no timer afterwards.  Process context.
 */
bool qcow2_bitmaps_settle(struct qcow2_bitmaps *bm);

/* What could not be written is to be tried again.  Process context. */
void qcow2_bitmaps_arm(struct qcow2_bitmaps *bm);

/* Forget everything, written or not.  No request is on its way.  Process context. */
void qcow2_bitmaps_forget(struct qcow2_bitmaps *bm);

/* Have on disk what is exact, while requests go on.  0 or a negative errno.  Process context. */
int qcow2_bitmaps_sync(struct qcow2_bitmaps *bm);

/**
 * qcow2_gate_open() - may a range change without more?
 * @gate: the gate
 * @sector: first sector, inside the device
 * @nr: number of sectors, at least 1
 *
 * If not, qcow2_bitmaps_pass() knows better.  Any context; takes no lock and writes nothing.
 */
static __always_inline bool qcow2_gate_open(const struct qcow2_gate *gate,
					    sector_t sector, unsigned int nr)
{
	u64 bit = sector >> gate->shift;
	unsigned int more = ((sector + nr - 1) >> gate->shift) - bit;
	unsigned int i = bit % BITS_PER_LONG;
	struct qcow2_piece *piece;
	unsigned long word = 0;

	if (i + more >= BITS_PER_LONG)
		return false;
	rcu_read_lock_sched();
	piece = rcu_dereference_sched(gate->pieces[bit / QCOW2_GATE_BITS]);
	if (piece)
		word = READ_ONCE(piece->words[bit % QCOW2_GATE_BITS /
					      BITS_PER_LONG]);
	rcu_read_unlock_sched();
	return !(~word >> i << (BITS_PER_LONG - 1 - more));
}

/**
 * qcow2_bitmaps_pass() - may a range change, and nobody has to wait for that?
 * @bm: the bitmaps
 * @sector: first sector, inside the device
 * @nr: number of sectors, at least 1
 *
 * If it may it is exact from now on.  Any context.
 */
bool qcow2_bitmaps_pass(struct qcow2_bitmaps *bm, sector_t sector,
			sector_t nr);

/**
 * qcow2_bitmaps_join() - have a range marked before it changes, if that is soon said
 * @bm: the bitmaps
 * @sector: first sector, inside the device
 * @nr: number of sectors, at least 1
 * @waiter: is left there if there is something to wait for
 * @round: 0; kept for qcow2_bitmaps_mark()
 *
 * For who has just heard from qcow2_bitmaps_pass() that he may not go on.  Returns true if
 * @waiter has been left: then map->wake() is called for it.  If not, or then, it is for
 * qcow2_bitmaps_mark() to go on.  Any context.
 */
bool qcow2_bitmaps_join(struct qcow2_bitmaps *bm, sector_t sector, sector_t nr,
			struct list_head *waiter, unsigned long *round);

/* How much can be asked for at once, from a sector on: up to @end, or less */
sector_t qcow2_bitmaps_piece(struct qcow2_bitmaps *bm, sector_t sector,
			     sector_t end);

/**
 * qcow2_bitmaps_mark() - have a range marked before it changes
 * @bm: the bitmaps
 * @sector: first sector, inside the device
 * @nr: number of sectors, at most what qcow2_bitmaps_piece() says
 * @waiter: is left there if there is something to wait for
 * @round: 0 if @waiter has not waited for this range before; kept between calls
 *
 * Returns 0 if the range may change, a negative errno if it must not, for a mark has failed,
 * or 1 if @waiter has been left: then map->wake() is called for it, and this is to be called
 * again.  Workqueue context.
 */
int qcow2_bitmaps_mark(struct qcow2_bitmaps *bm, sector_t sector, sector_t nr,
		       struct list_head *waiter, unsigned long *round);

/*
 * Drop up to @nr blocks, those that have not been used for long; returns how many.  For
 * cache->drop_more().
 */
unsigned long qcow2_bitmaps_drop(struct qcow2_bitmaps *bm, unsigned long nr);

struct qcow2_bitmap_counts {
	u64 exact, durable;		/* granules of blocks that are in core */
	unsigned long unwritten;	/* blocks whose last write has failed */
	unsigned long waits, taken_back;
};

/* For status.  Process context. */
void qcow2_bitmaps_count(struct qcow2_bitmaps *bm,
			 struct qcow2_bitmap_counts *counts);

#endif /* DM_QCOW2_BITMAP_H */
