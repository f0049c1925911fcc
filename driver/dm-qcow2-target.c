// SPDX-License-Identifier: GPL-2.0-only
/*
 * Device-mapper target "qcow2": qcow2 images with an external data file as
 * block devices.
 *
 * Since the data file keeps each cluster at its guest offset, a request to an
 * allocated cluster needs nothing but a look at the cluster's state and a new
 * bi_bdev.  That much is done in map(), without a lock.  So are reads of zeros
 * and first writes to clusters whose L2 table is in core.  Everything that has
 * to wait (for an L2 table, for memory, for another first write, for a
 * metadata cluster) goes to a workqueue, where the bio is cut into runs of
 * equal state.  So do discards and write zeroes, which change states, and first
 * writes that have to copy from a backing device.  All metadata is written by
 * one ordered worker, see dm-qcow2-metadata.c.
 */
#include <linux/bio.h>
#include <linux/delay.h>
#include <linux/device-mapper.h>
#include <linux/dm-kcopyd.h>
#include <linux/module.h>
#include <linux/percpu.h>
#include <linux/sched/mm.h>
#include <linux/slab.h>
#include <linux/wait.h>
#include <linux/workqueue.h>

#include "compat.h"
#include "dm-qcow2-args.h"
#include "dm-qcow2-metadata.h"

#define DM_MSG_PREFIX "qcow2"

/* Changes become durable this long after they were made, flush or no flush. */
#define QCOW2_COMMIT_PERIOD	HZ

/* Commits that are tried at suspend, if tables cannot be read */
#define QCOW2_LAST_TRIES	3

/* Bios that are kept in reserve, so that I/O goes on when memory is short. */
#define QCOW2_BIO_RESERVE	64

/* Discards that are passed down at a time: writes to their units have to wait. */
#define QCOW2_MAX_PASSDOWNS	64

struct page *qcow2_zeros;

/*
 * A device gets worse only: a table that has gone ro or fail stays so until
 * another one is loaded.
 */
enum qcow2_mode {
	QCOW2_RW,	/* all is well */
	QCOW2_RO,	/* asked for, or the metadata is corrupt: no writes */
	QCOW2_FAIL,	/* metadata could not be written: no flush, no FUA, no
			 * first write; what is in core is still right
			 */
};

/*
 * Per CPU: changed with this_cpu_inc(), summed with READ_ONCE(); where that reads
 * half of a change (32 bits), status shows a wrong number once.
 */
struct qcow2_stats {
	u64 hits;
	u64 misses;
	u64 first_writes;
};

struct qcow2_target {
	/* Constant while the table lives; read by map() */
	struct qcow2_metadata *md;
	struct block_device *data_bdev;
	struct block_device *backing_bdev;	/* NULL: reads as zeros */
	sector_t backing_end;		/* sectors of it; behind are zeros */
	bool raw;			/* data_file_raw */
	bool passdown;			/* of discards to the data device */
	bool read_only;			/* by argument or mode of the table */
	bool read_only_arg;
	/* enum qcow2_mode; written under @lock, read anywhere (READ_ONCE) */
	unsigned int mode;
	/*
	 * The metadata is corrupt: no writes at all, also in mode fail.  Written
	 * under @lock, before @mode; read anywhere (READ_ONCE).
	 */
	bool corrupt;
	struct qcow2_stats __percpu *stats;

	struct dm_target *ti;
	struct dm_dev *meta_dev;
	struct dm_dev *data_dev;
	struct dm_dev *backing_dev;
	u64 cache_limit;		/* bytes; 0 = not given */
	bool ext_l2;
	bool no_passdown_arg;
	struct dm_kcopyd_client *kcopyd;	/* with a backing device */
	struct shrinker *shrinker;

	/* Parts of bios that had to be cut, fills of first writes, discards */
	struct bio_set bs;
	struct bio_set fill_bs;
	struct bio_set trim_bs;

	/* Runs qcow2_process() for each deferred bio, many at once. */
	struct workqueue_struct *io_wq;
	/* Ordered; the only writer of metadata. */
	struct workqueue_struct *commit_wq;
	struct work_struct worker;
	struct delayed_work waker;
	/*
	 * Passes discards down after a commit.  Its queue (NULL without
	 * @passdown) is its own, for all of @io_wq may be waiting for slices
	 * that it lets go.
	 */
	struct workqueue_struct *trim_wq;
	struct work_struct trimmer;

	spinlock_t lock;		/* of what names it; no lock nests in it */
	struct list_head reservations;	/* ios that need an L2 table; @lock */
	struct list_head waiters;	/* ios that need a commit; @lock */
	bool set_corrupt;		/* header bit is to be set; @lock */

	unsigned long commits;		/* written by the commit worker */
	unsigned long refused;		/* for want of space; likewise */
	unsigned long commit_tries;	/* likewise */
	atomic_t passdowns;		/* in flight */
	wait_queue_head_t room;		/* for the last two to change */
	/* ios that are more than a remap; for suspend, see there */
	atomic_t slow;
	/* First writes whose data is on its way: they will be dirty */
	atomic_t first_writes;
};

enum qcow2_io_kind {
	QCOW2_IO_PLAIN,		/* nothing to be done at its end */
	QCOW2_IO_SLOW,		/* is cut into parts, or waits for a commit */
	QCOW2_IO_FIRST_WRITE,
	QCOW2_IO_OVER,		/* ended by the target itself */
};

/*
 * What the target knows of a bio: one of DM's clones, or a part of one.  Owned
 * by whoever works on it: map(), then the workqueue, or the list that it is
 * on, or the completion of its bio and fills.
 *
 * A hit touches no field but @kind.
 */
struct qcow2_io {
	enum qcow2_io_kind kind;
	blk_status_t status;		/* of any part; WRITE_ONCE */
	bool commit;			/* must be durable before it ends */
	atomic_t pending;		/* who may still need this struct */
	struct qcow2_target *q;
	struct bio *bio;
	struct qcow2_io *parent;	/* NULL: the bio is DM's */

	/* On one of: a write's or a load's waiters, q's lists. */
	struct list_head node;

	union {
		/* QCOW2_IO_SLOW: what is still to be done */
		struct {
			struct work_struct work;
			sector_t sector;
			unsigned int left;	/* sectors */
		};
		/* QCOW2_IO_FIRST_WRITE: units of the slice that it writes */
		struct qcow2_write write;
	};
};

struct qcow2_part {
	struct qcow2_io io;
	struct bio bio;		/* last: the bio set's front pad ends here */
};

/* A discard that is passed down. */
struct qcow2_passdown {
	struct qcow2_target *q;
	struct qcow2_write write;
	struct bio bio;		/* last, as above */
};

static enum qcow2_mode qcow2_mode(struct qcow2_target *q)
{
	return READ_ONCE(q->mode);
}

/* May nothing be written, not even to clusters that are in use? */
static bool qcow2_no_writes(struct qcow2_target *q, enum qcow2_mode mode)
{
	return mode == QCOW2_RO ||
	       (mode == QCOW2_FAIL && READ_ONCE(q->corrupt));
}

static const char *qcow2_mode_name(enum qcow2_mode mode)
{
	switch (mode) {
	case QCOW2_RW:
		return "rw";
	case QCOW2_RO:
		return "ro";
	case QCOW2_FAIL:
		break;
	}
	return "fail";
}

/* Process context. */
static void qcow2_set_mode(struct qcow2_target *q, enum qcow2_mode mode)
{
	bool worse;

	spin_lock_irq(&q->lock);
	worse = mode > q->mode;
	if (worse)
		WRITE_ONCE(q->mode, mode);
	spin_unlock_irq(&q->lock);

	if (worse) {
		DMERR("%s: switching to mode %s", q->md->name,
		      qcow2_mode_name(mode));
		dm_table_event(q->ti->table);
	}
}

/* The metadata is corrupt, which has been logged.  Process context. */
static void qcow2_corrupt(struct qcow2_target *q)
{
	bool first;

	spin_lock_irq(&q->lock);
	first = q->mode == QCOW2_RW;
	if (first)
		q->set_corrupt = true;
	WRITE_ONCE(q->corrupt, true);
	spin_unlock_irq(&q->lock);

	qcow2_set_mode(q, QCOW2_RO);
	if (first)
		queue_work(q->commit_wq, &q->worker);
}

/*----------------------------------------------------------------
 * Life of an io
 *----------------------------------------------------------------
 */

static void qcow2_io_init(struct qcow2_target *q, struct qcow2_io *io,
			  struct bio *bio, struct qcow2_io *parent)
{
	io->kind = QCOW2_IO_SLOW;
	io->status = BLK_STS_OK;
	io->commit = false;
	atomic_set(&io->pending, 1);
	io->q = q;
	io->bio = bio;
	io->parent = parent;
	if (!parent) {
		atomic_inc(&q->slow);
		/* Whoever polls for it could wait for more than a device. */
		bio_clear_polled(bio);
	}
}

/* DM's bio needs nothing more of us than a plain remap. */
static void qcow2_io_release(struct qcow2_io *io)
{
	io->kind = QCOW2_IO_PLAIN;
	atomic_dec(&io->q->slow);
}

/* End a bio of DM's.  Any context. */
static void qcow2_io_end(struct qcow2_io *io)
{
	struct bio *bio = io->bio;

	bio->bi_status = READ_ONCE(io->status);
	qcow2_io_release(io);
	io->kind = QCOW2_IO_OVER;
	/* It may have been through bio_endio() already, and through rq_qos. */
	bio_clear_flag(bio, BIO_QOS_THROTTLED);
	bio_clear_flag(bio, BIO_QOS_MERGED);
	bio_endio(bio);
}

static void qcow2_process(struct work_struct *work);

/* Let the workqueue go on with an io.  Any context. */
static void qcow2_io_queue(struct qcow2_io *io)
{
	/* Its last run may not have returned yet, but will not look at it. */
	INIT_WORK(&io->work, qcow2_process);
	queue_work(io->q->io_wq, &io->work);
}

static void qcow2_queue_list(struct list_head *ios)
{
	struct qcow2_io *io, *next;

	list_for_each_entry_safe(io, next, ios, node)
		qcow2_io_queue(io);
}

/* Have an io wait for a commit that begins after this.  Any context. */
static void qcow2_wait_commit(struct qcow2_target *q, struct qcow2_io *io)
{
	unsigned long flags;

	spin_lock_irqsave(&q->lock, flags);
	list_add_tail(&io->node, &q->waiters);
	/*
	 * Under the lock: as soon as the worker, running for someone else,
	 * takes the list, the io may end, and the target with it.
	 */
	queue_work(q->commit_wq, &q->worker);
	spin_unlock_irqrestore(&q->lock, flags);
}

/*
 * All I/O of a first write is done: its units become data, or what they were.
 * Any context.
 */
static void qcow2_end_first_write(struct qcow2_io *io)
{
	struct qcow2_target *q = io->q;
	struct qcow2_write *w = &io->write;
	struct qcow2_bucket *bucket = qcow2_bucket(q->md, w->slice->index);
	bool arm = false;
	unsigned long flags;
	LIST_HEAD(waiters);

	spin_lock_irqsave(&bucket->lock, flags);
	if (!q->raw)
		list_splice(&w->waiters, &waiters);
	qcow2_end_write(q->md, w, q->raw);
	if (!READ_ONCE(io->status)) {
		arm = qcow2_mark_dirty(q->md, w->slice, w->first, w->last);
		qcow2_set_states(w->slice, w->first, w->last, QCOW2_DATA);
	} else if (!q->raw) {
		qcow2_set_states(w->slice, w->first, w->last, w->prev);
	}
	spin_unlock_irqrestore(&bucket->lock, flags);
	/* It is dirty by now; pairs with qcow2_check_flush(). */
	smp_mb__before_atomic();
	atomic_dec(&q->first_writes);

	qcow2_queue_list(&waiters);
	if (arm)
		queue_delayed_work(q->commit_wq, &q->waker, QCOW2_COMMIT_PERIOD);
}

/*
 * Nobody works on an io any more.  Returns true if it waits for a commit, and
 * thus is no longer the caller's.
 */
static bool qcow2_io_finish(struct qcow2_io *io)
{
	if (io->kind == QCOW2_IO_FIRST_WRITE) {
		qcow2_end_first_write(io);
		io->kind = QCOW2_IO_SLOW;
	}
	if (!io->commit || READ_ONCE(io->status))
		return false;
	qcow2_wait_commit(io->q, io);
	return true;
}

/* Drop a reference; the last one ends the io, and maybe its parent. */
static void qcow2_io_put(struct qcow2_io *io)
{
	while (atomic_dec_and_test(&io->pending)) {
		struct qcow2_io *parent = io->parent;

		if (qcow2_io_finish(io))
			return;
		if (!parent) {
			qcow2_io_end(io);
			return;
		}
		if (READ_ONCE(io->status))
			WRITE_ONCE(parent->status, io->status);
		bio_put(io->bio);
		io = parent;
	}
}

/*
 * A bio that was passed on has failed.  If it was a flush of the data device, or
 * a FUA write, which may be a flush there, then whatever is dirty, or is being
 * first-written, may have lost its data.  Any context.
 */
static void qcow2_check_flush(struct qcow2_target *q, struct bio *bio,
			      blk_status_t status)
{
	if (!(bio->bi_opf & (REQ_PREFLUSH | REQ_FUA)))
		return;
	/* A write that had to wait, or had no place, was not even begun. */
	if (status == BLK_STS_AGAIN ||
	    (status == BLK_STS_NOSPC && !(bio->bi_opf & REQ_PREFLUSH)))
		return;
	if (!atomic_read(&q->first_writes)) {
		/* Those that were there before have changed the map by now. */
		smp_rmb();
		if (qcow2_metadata_clean(q->md))
			return;
	}
	qcow2_metadata_set_lost(q->md);
}

/* DM's clone has come back from below. */
static int qcow2_end_io(struct dm_target *ti, struct bio *bio,
			blk_status_t *error)
{
	struct qcow2_io *io = dm_per_bio_data(bio, sizeof(*io));

	if (likely(io->kind == QCOW2_IO_PLAIN)) {
		if (unlikely(*error))
			qcow2_check_flush(ti->private, bio, *error);
		return DM_ENDIO_DONE;
	}
	if (io->kind == QCOW2_IO_OVER)
		return DM_ENDIO_DONE;

	if (*error)
		WRITE_ONCE(io->status, *error);
	if (!atomic_dec_and_test(&io->pending) || qcow2_io_finish(io))
		return DM_ENDIO_INCOMPLETE;
	*error = READ_ONCE(io->status);
	qcow2_io_release(io);
	return DM_ENDIO_DONE;
}

static void qcow2_part_endio(struct bio *bio)
{
	struct qcow2_io *io = bio->bi_private;

	if (bio->bi_status) {
		qcow2_check_flush(io->q, bio, bio->bi_status);
		WRITE_ONCE(io->status, bio->bi_status);
	}
	qcow2_io_put(io);
}

static void qcow2_fill_endio(struct bio *bio)
{
	struct qcow2_io *io = bio->bi_private;

	if (bio->bi_status)
		WRITE_ONCE(io->status, bio->bi_status);
	bio_put(bio);
	qcow2_io_put(io);
}

/*----------------------------------------------------------------
 * First writes
 *----------------------------------------------------------------
 */

/* A bio that writes zeros on behalf of the first write @orig. */
static struct bio *qcow2_alloc_fill(struct qcow2_target *q, struct bio *orig,
				    sector_t sector, sector_t nr, gfp_t gfp)
{
	u64 len = (u64)nr << SECTOR_SHIFT;
	struct bio *bio;

	/* A cluster is 2 MiB at most: 32 vectors. */
	bio = bio_alloc_bioset(q->data_bdev,
			       DIV_ROUND_UP_ULL(len, QCOW2_ZERO_BYTES),
			       REQ_OP_WRITE | (orig->bi_opf & REQ_SYNC), gfp,
			       &q->fill_bs);
	if (!bio)
		return NULL;
	bio->bi_ioprio = orig->bi_ioprio;
	bio->bi_iter.bi_sector = sector;
	bio->bi_end_io = qcow2_fill_endio;
	while (len) {
		unsigned int n = min_t(u64, len, QCOW2_ZERO_BYTES);

		__bio_add_page(bio, qcow2_zeros, n, 0);
		len -= n;
	}
	return bio;
}

/*
 * Make units busy on behalf of a first write.  False if they are not in state
 * @state any more, or not ready to be written.
 */
static bool qcow2_begin_first_write(struct qcow2_target *q,
				    struct qcow2_io *io, u64 unit, u64 last,
				    enum qcow2_state state)
{
	struct qcow2_metadata *md = q->md;
	unsigned long index = unit >> md->slice_shift;
	unsigned int mask = (1U << md->slice_shift) - 1;
	struct qcow2_bucket *bucket = qcow2_bucket(md, index);
	struct qcow2_slice *slice;
	unsigned long flags;

	spin_lock_irqsave(&bucket->lock, flags);
	slice = qcow2_ready_slice(md, unit, last, state);
	if (!slice)
		goto out;

	io->kind = QCOW2_IO_FIRST_WRITE;
	io->write.slice = slice;
	io->write.first = unit & mask;
	io->write.last = last & mask;
	io->write.prev = state;
	/*
	 * With data_file_raw the rest of a unit need not be filled, so that
	 * writes to the same unit do not get in each other's way.
	 */
	qcow2_begin_write(md, &io->write, q->raw);
	atomic_inc(&q->first_writes);
out:
	spin_unlock_irqrestore(&bucket->lock, flags);
	return slice;
}

/* A part of a unit that a first write leaves to be filled. */
struct qcow2_gap {
	sector_t sector;
	sector_t nr;
	struct bio *bio;	/* that fills it, if it was allocated already */
};

static void qcow2_copied(int read_err, unsigned long write_err, void *context)
{
	struct qcow2_io *io = context;

	if (read_err || write_err)
		WRITE_ONCE(io->status, BLK_STS_IOERR);
	qcow2_io_put(io);
}

/* Copy to the data device from the backing device.  May sleep. */
static void qcow2_copy(struct qcow2_io *io, sector_t sector, sector_t nr)
{
	struct qcow2_target *q = io->q;
	struct dm_io_region from = {
		.bdev = q->backing_bdev, .sector = sector, .count = nr,
	};
	struct dm_io_region to = {
		.bdev = q->data_bdev, .sector = sector, .count = nr,
	};

	atomic_inc(&io->pending);
	dm_kcopyd_copy(q->kcopyd, &from, 1, &to, 0, qcow2_copied, io);
}

/*
 * Give a gap the content that its unit has in state @state.  Sleeps, unless
 * there is a bio already.
 */
static void qcow2_fill_gap(struct qcow2_io *io, struct qcow2_gap *gap,
			   enum qcow2_state state)
{
	struct qcow2_target *q = io->q;
	struct qcow2_io *top = io;
	sector_t nr;

	if (state == QCOW2_UNALLOCATED && gap->sector < q->backing_end) {
		nr = min(gap->nr, q->backing_end - gap->sector);
		qcow2_copy(io, gap->sector, nr);
		gap->sector += nr;
		gap->nr -= nr;
	}
	if (!gap->nr)
		return;
	if (!gap->bio)
		gap->bio = qcow2_alloc_fill(q, io->bio, gap->sector, gap->nr,
					    GFP_NOIO);
	gap->bio->bi_private = io;
	atomic_inc(&io->pending);
	/* On behalf of the cgroup that the request came from, as all parts */
	while (top->parent)
		top = top->parent;
	dm_submit_bio_remap(top->bio, gap->bio);
}

/*
 * Get the bios that fill gaps without waiting for anything; false if that is
 * not possible, or not enough.
 */
static bool qcow2_prepare_gaps(struct qcow2_io *io, struct qcow2_gap *gaps,
			       enum qcow2_state state)
{
	struct qcow2_target *q = io->q;
	struct bio *bio = io->bio;
	unsigned int i;

	if (!gaps[0].nr && !gaps[1].nr)
		return true;
	/* fills may have to wait for a request below */
	if (bio->bi_opf & REQ_NOWAIT)
		return false;
	for (i = 0; i < 2; i++) {
		if (!gaps[i].nr)
			continue;
		if (state == QCOW2_UNALLOCATED && gaps[i].sector < q->backing_end)
			return false;
		gaps[i].bio = qcow2_alloc_fill(q, bio, gaps[i].sector, gaps[i].nr,
					       GFP_NOWAIT | __GFP_NOWARN);
		if (!gaps[i].bio)
			return false;
	}
	return true;
}

/*
 * Begin a first write of sectors that lie in one slice and are all in @state.
 * The caller submits the io's bio if the result is true; if it is false, the
 * io has not been touched, and the state has to be looked up again (or, unless
 * @may_block, the workqueue has to do it).
 */
static bool qcow2_first_write(struct qcow2_io *io, sector_t sector,
			      unsigned int nr, enum qcow2_state state,
			      bool may_block)
{
	struct qcow2_target *q = io->q;
	unsigned int shift = q->md->unit_shift;
	sector_t end = sector + nr;
	u64 unit = sector >> shift, last = (end - 1) >> shift;
	struct qcow2_gap gaps[2] = {};
	unsigned int i;

	if (!q->raw) {
		gaps[0].sector = unit << shift;
		gaps[0].nr = sector - gaps[0].sector;
		gaps[1].sector = end;
		/* the last unit ends with the device */
		gaps[1].nr = min_t(sector_t, (last + 1) << shift, q->ti->len) -
			     end;
	}
	if ((!may_block && !qcow2_prepare_gaps(io, gaps, state)) ||
	    !qcow2_begin_first_write(q, io, unit, last, state)) {
		for (i = 0; i < 2; i++)
			if (gaps[i].bio)
				bio_put(gaps[i].bio);
		return false;
	}
	this_cpu_inc(q->stats->first_writes);

	/* The bio's own reference is there; it has not been submitted. */
	for (i = 0; i < 2; i++)
		if (gaps[i].nr)
			qcow2_fill_gap(io, gaps + i, state);
	return true;
}

/*
 * The commit flushes the data device, which does for a write what its FUA flag
 * would have done.
 */
static void qcow2_fua_to_commit(struct qcow2_io *io, struct bio *bio)
{
	if (bio->bi_opf & REQ_FUA) {
		bio->bi_opf &= ~REQ_FUA;
		io->commit = true;
	}
}

/*----------------------------------------------------------------
 * The slow path (workqueue)
 *----------------------------------------------------------------
 */

/*
 * Account for one more slice.  If all that could go to make room for it is
 * dirty, have that written first: the commit needs no slices itself, and no
 * worker of this queue.
 */
static void qcow2_get_room(struct qcow2_target *q)
{
	struct qcow2_metadata *md = q->md;
	unsigned long tries = READ_ONCE(q->commit_tries);

	if (likely(qcow2_metadata_get_room(md, false)))
		return;
	if (qcow2_mode(q) == QCOW2_RW && !qcow2_metadata_clean(md)) {
		mod_delayed_work(q->commit_wq, &q->waker, 0);
		wait_event(q->room, READ_ONCE(q->commit_tries) != tries);
	}
	/* It may be in use, or be dirty again: then the limit has to wait. */
	qcow2_metadata_get_room(md, true);
}

/*
 * Get the slice of @index into core.  Returns 0, a negative errno, or 1 if
 * another worker is loading it: then the io has been left with that one.
 */
static int qcow2_load(struct qcow2_io *io, unsigned long index)
{
	struct qcow2_target *q = io->q;
	struct qcow2_metadata *md = q->md;
	struct qcow2_bucket *bucket = qcow2_bucket(md, index);
	struct qcow2_slice *slot = NULL;
	struct qcow2_load load, *other;
	struct qcow2_io *waiter, *next;
	int r;

	load.index = index;
	INIT_LIST_HEAD(&load.waiters);

	spin_lock_irq(&bucket->lock);
	if (rcu_access_pointer(md->dir[index])) {
		spin_unlock_irq(&bucket->lock);
		return 0;
	}
	list_for_each_entry(other, &bucket->loads, node) {
		if (other->index == index) {
			list_add_tail(&io->node, &other->waiters);
			spin_unlock_irq(&bucket->lock);
			return 1;
		}
	}
	list_add_tail(&load.node, &bucket->loads);
	spin_unlock_irq(&bucket->lock);

	this_cpu_inc(q->stats->misses);
	qcow2_get_room(q);
	r = qcow2_metadata_load(md, index, &slot);
	if (r || qcow2_is_tag(slot))
		qcow2_metadata_put_room(md);
	/* Before anyone can see the slice: no first write goes into it. */
	if (r == -EUCLEAN || (!r && !qcow2_is_tag(slot) && slot->bad))
		qcow2_corrupt(q);

	spin_lock_irq(&bucket->lock);
	if (!r)
		qcow2_slot_publish(md, index, slot);
	list_del(&load.node);
	spin_unlock_irq(&bucket->lock);

	if (!r) {
		qcow2_queue_list(&load.waiters);
		return 0;
	}
	list_for_each_entry_safe(waiter, next, &load.waiters, node) {
		WRITE_ONCE(waiter->status, errno_to_blk_status(r));
		qcow2_io_put(waiter);
	}
	return r;
}

/* Discards and write zeroes: those without data, that may be very long */
static bool qcow2_zeroing(const struct bio *bio)
{
	return bio_op(bio) == REQ_OP_DISCARD ||
	       bio_op(bio) == REQ_OP_WRITE_ZEROES;
}

/*
 * Load all slices that an io needs, so that it is not cut at their borders;
 * without data that would not matter.  Results as qcow2_load().
 */
static int qcow2_load_all(struct qcow2_io *io)
{
	struct qcow2_metadata *md = io->q->md;
	unsigned int shift = md->unit_shift + md->slice_shift;
	unsigned long index = io->sector >> shift;
	unsigned long last = (io->sector + io->left - 1) >> shift;
	int r = 0;

	if (qcow2_zeroing(io->bio))
		last = index;

	for (; !r && index <= last; index++)
		if (!rcu_access_pointer(md->dir[index]))
			r = qcow2_load(io, index);
	return r;
}

enum qcow2_busy {
	QCOW2_BUSY_WRITE,	/* someone works on it */
	QCOW2_BUSY_BAD,		/* its entry is corrupt */
	QCOW2_BUSY_GONE,	/* it is not busy any more, or not in core */
};

/* Why was a unit seen busy?  Any context. */
static enum qcow2_busy qcow2_why_busy(struct qcow2_metadata *md,
				      sector_t sector)
{
	u64 unit = sector >> md->unit_shift;
	unsigned int i = unit & ((1U << md->slice_shift) - 1);
	enum qcow2_busy busy = QCOW2_BUSY_GONE;
	struct qcow2_slice *slot;

	rcu_read_lock();
	slot = rcu_dereference(md->dir[unit >> md->slice_shift]);
	/* No first writes go into a bad slice: its busy units are corrupt. */
	if (slot && !qcow2_is_tag(slot) &&
	    qcow2_get_state(slot->words, i) == QCOW2_BUSY)
		busy = slot->bad ? QCOW2_BUSY_BAD : QCOW2_BUSY_WRITE;
	rcu_read_unlock();
	return busy;
}

/* Are the next @nr sectors of an io all of its bio? */
static bool qcow2_io_whole(struct qcow2_io *io, unsigned int nr)
{
	return nr == bio_sectors(io->bio);
}

/* A clone of the next @nr sectors of an io, as an io of its own. */
static struct qcow2_io *qcow2_alloc_part(struct qcow2_io *io, unsigned int nr)
{
	struct qcow2_target *q = io->q;
	struct qcow2_part *part;
	struct bio *bio;

	bio = bio_alloc_clone(q->data_bdev, io->bio, GFP_NOIO, &q->bs);
	bio_trim(bio, bio_sectors(io->bio) - io->left, nr);
	part = container_of(bio, struct qcow2_part, bio);
	qcow2_io_init(q, &part->io, bio, io);
	bio->bi_private = &part->io;
	bio->bi_end_io = qcow2_part_endio;
	atomic_inc(&io->pending);
	return &part->io;
}

static void qcow2_advance(struct qcow2_io *io, unsigned int nr)
{
	io->sector += nr;
	io->left -= nr;
}

/* Send DM's bio to a device below. */
static void qcow2_submit(struct qcow2_io *io, struct block_device *bdev)
{
	bio_set_dev(io->bio, bdev);
	dm_submit_bio_remap(io->bio, NULL);
}

/*
 * The functions below do the next @nr sectors of an io.  They return true if
 * the io can go on, false if it is no longer the caller's: it has been
 * submitted, or is waiting somewhere.
 */
static bool qcow2_read_zeros(struct qcow2_io *io, unsigned int nr)
{
	if (qcow2_io_whole(io, nr)) {
		zero_fill_bio(io->bio);
	} else {
		struct qcow2_io *part = qcow2_alloc_part(io, nr);

		zero_fill_bio(part->bio);
		qcow2_io_put(part);
	}
	qcow2_advance(io, nr);
	return true;
}

static bool qcow2_read_from(struct qcow2_io *io, unsigned int nr,
			    struct block_device *bdev)
{
	struct qcow2_io *part;

	if (qcow2_io_whole(io, nr)) {
		qcow2_io_release(io);
		qcow2_submit(io, bdev);
		return false;
	}
	part = qcow2_alloc_part(io, nr);
	bio_set_dev(part->bio, bdev);
	qcow2_advance(io, nr);
	dm_submit_bio_remap(io->bio, part->bio);
	return true;
}

static bool qcow2_overwrite(struct qcow2_io *io, unsigned int nr)
{
	struct qcow2_target *q = io->q;
	bool durable = !(io->bio->bi_opf & REQ_FUA) ||
		       qcow2_range_durable(q->md, io->sector, nr);
	struct qcow2_io *part;

	if (qcow2_io_whole(io, nr)) {
		if (durable)
			qcow2_io_release(io);
		else
			qcow2_fua_to_commit(io, io->bio);
		qcow2_submit(io, q->data_bdev);
		return false;
	}
	part = qcow2_alloc_part(io, nr);
	if (!durable)
		qcow2_fua_to_commit(io, part->bio);
	qcow2_advance(io, nr);
	dm_submit_bio_remap(io->bio, part->bio);
	return true;
}

/*
 * Find who works on an io's next unit.  The bucket lock is held.  NULL if the
 * unit is not busy any more.
 */
static struct qcow2_write *qcow2_find_writer(struct qcow2_io *io,
					     struct qcow2_bucket *bucket)
{
	struct qcow2_metadata *md = io->q->md;
	u64 unit = io->sector >> md->unit_shift;
	unsigned long index = unit >> md->slice_shift;
	unsigned int i = unit & ((1U << md->slice_shift) - 1);
	struct qcow2_write *w;

	list_for_each_entry(w, &bucket->writes, node)
		if (w->slice->index == index && w->first <= i && i <= w->last)
			return w;
	return NULL;
}

static struct qcow2_bucket *qcow2_io_bucket(struct qcow2_io *io)
{
	struct qcow2_metadata *md = io->q->md;

	return qcow2_bucket(md, io->sector >> (md->unit_shift + md->slice_shift));
}

/* Wait for whoever works on the io's next unit. */
static bool qcow2_wait_busy(struct qcow2_io *io)
{
	struct qcow2_bucket *bucket = qcow2_io_bucket(io);
	struct qcow2_write *w;

	spin_lock_irq(&bucket->lock);
	w = qcow2_find_writer(io, bucket);
	if (w)
		list_add_tail(&io->node, &w->waiters);
	spin_unlock_irq(&bucket->lock);
	return !w;
}

/* What do busy units read as?  Shortens @nr to those that are known. */
static enum qcow2_state qcow2_busy_state(struct qcow2_io *io, unsigned int *nr)
{
	struct qcow2_bucket *bucket = qcow2_io_bucket(io);
	struct qcow2_metadata *md = io->q->md;
	enum qcow2_state state = QCOW2_BUSY;
	struct qcow2_write *w;
	sector_t end;

	spin_lock_irq(&bucket->lock);
	w = qcow2_find_writer(io, bucket);
	if (w) {
		end = ((u64)w->slice->index << md->slice_shift) + w->last + 1;
		*nr = min_t(sector_t, *nr, (end << md->unit_shift) - io->sector);
		state = w->prev;
	}
	spin_unlock_irq(&bucket->lock);
	return state;
}

/*
 * Is the slice of the io's next sector ready for changes?  If not, see to it.
 * After QCOW2_WAIT the io is no longer the caller's, and may be gone.
 */
enum qcow2_ready { QCOW2_READY, QCOW2_AGAIN, QCOW2_WAIT };

static enum qcow2_ready qcow2_make_ready(struct qcow2_io *io)
{
	struct qcow2_target *q = io->q;
	struct qcow2_metadata *md = q->md;
	unsigned long index = io->sector >> (md->unit_shift + md->slice_shift);
	struct qcow2_slice *slot;
	bool tag, has_l2;

	rcu_read_lock();
	slot = rcu_dereference(md->dir[index]);
	tag = slot && qcow2_is_tag(slot);
	has_l2 = slot && !tag && READ_ONCE(slot->has_l2);
	rcu_read_unlock();

	if (!slot)
		return QCOW2_AGAIN;
	if (tag) {
		qcow2_get_room(q);
		qcow2_slot_expand(md, index);
		return QCOW2_AGAIN;
	}
	if (has_l2)
		return QCOW2_READY;
	spin_lock_irq(&q->lock);
	list_add_tail(&io->node, &q->reservations);
	queue_work(q->commit_wq, &q->worker);
	spin_unlock_irq(&q->lock);
	return QCOW2_WAIT;
}

/* The end of an io's next @nr sectors, or that of their slice. */
static sector_t qcow2_slice_end(struct qcow2_io *io, unsigned int nr)
{
	unsigned int shift = io->q->md->unit_shift + io->q->md->slice_shift;

	return min(((io->sector >> shift) + 1) << shift, io->sector + nr);
}

/*
 * Write zeroes to a part of a unit, for an io or a part of one.  Not as write
 * zeroes: a device can refuse those at any time.
 */
static void qcow2_write_zeros(struct qcow2_io *io, sector_t sector,
			      unsigned int nr)
{
	struct qcow2_gap gap = { .sector = sector, .nr = nr };

	qcow2_fill_gap(io, &gap, QCOW2_ZERO);
}

static bool qcow2_write_new(struct qcow2_io *io, unsigned int nr,
			    enum qcow2_state state)
{
	bool zeros = qcow2_zeroing(io->bio);
	enum qcow2_ready ready;
	struct qcow2_io *part;

	ready = qcow2_make_ready(io);
	if (ready != QCOW2_READY)
		return ready == QCOW2_AGAIN;

	nr = qcow2_slice_end(io, nr) - io->sector;
	if (qcow2_io_whole(io, nr) && !zeros) {
		/* A first write's fields overwrite io->sector and the like. */
		if (!qcow2_first_write(io, io->sector, nr, state, true))
			return true;
		qcow2_fua_to_commit(io, io->bio);
		qcow2_submit(io, io->q->data_bdev);
		return false;
	}
	part = qcow2_alloc_part(io, nr);
	if (!qcow2_first_write(part, io->sector, nr, state, true)) {
		qcow2_io_put(part);
		return true;
	}
	if (zeros) {
		qcow2_write_zeros(part, io->sector, nr);
		qcow2_advance(io, nr);
		qcow2_io_put(part);
		return true;
	}
	qcow2_fua_to_commit(io, part->bio);
	qcow2_advance(io, nr);
	dm_submit_bio_remap(io->bio, part->bio);
	return true;
}

/* Make units zero that are all in @state; false if they are not any more. */
static bool qcow2_zero_units(struct qcow2_target *q, u64 unit, u64 last,
			     enum qcow2_state state, bool passdown)
{
	struct qcow2_metadata *md = q->md;
	unsigned int mask = (1U << md->slice_shift) - 1;
	unsigned long index = unit >> md->slice_shift;
	struct qcow2_bucket *bucket = qcow2_bucket(md, index);
	struct qcow2_trim *trim = NULL;
	struct qcow2_slice *slice;
	bool arm = false;

	/*
	 * A slice with a trim stays in core.  Over the limit it has to become
	 * one that can be dropped, so the hint is forgotten.
	 */
	if (READ_ONCE(md->state_bytes) > md->cache_limit)
		passdown = false;
	if (passdown)
		trim = qcow2_trim_alloc(md);

	spin_lock_irq(&bucket->lock);
	slice = qcow2_ready_slice(md, unit, last, state);
	if (slice) {
		arm = qcow2_mark_dirty(md, slice, unit & mask, last & mask);
		qcow2_set_states(slice, unit & mask, last & mask, QCOW2_ZERO);
		if (passdown && qcow2_add_trim(md, slice, unit & mask,
					       last & mask, trim))
			trim = NULL;
	}
	spin_unlock_irq(&bucket->lock);

	kfree(trim);
	if (arm)
		queue_delayed_work(q->commit_wq, &q->waker, QCOW2_COMMIT_PERIOD);
	return slice;
}

/*
 * Discard or write zeroes to the next @nr sectors of an io, which are in
 * @state.  What is done depends on whether they begin and end with a unit: a
 * part of one is left alone by a discard, and written by write zeroes.
 */
static bool qcow2_zero_run(struct qcow2_io *io, unsigned int nr,
			   enum qcow2_state state)
{
	struct qcow2_target *q = io->q;
	unsigned int shift = q->md->unit_shift;
	sector_t mask = (1ULL << shift) - 1;
	bool discard = bio_op(io->bio) == REQ_OP_DISCARD;
	enum qcow2_ready ready;
	sector_t end;

	if (state == QCOW2_ZERO ||
	    (state == QCOW2_UNALLOCATED && io->sector >= q->backing_end)) {
		qcow2_advance(io, nr);
		return true;
	}
	if (state == QCOW2_UNALLOCATED)
		nr = min_t(sector_t, nr, round_up(q->backing_end, mask + 1) -
			   io->sector);

	end = io->sector + nr;
	if (!(io->sector & mask) && end != q->ti->len)
		end &= ~mask;
	if ((io->sector & mask) || end == io->sector) {
		/* Part of a unit, up to the unit's end */
		nr = min_t(sector_t, nr, ((io->sector | mask) + 1) - io->sector);
		if (state == QCOW2_DATA && !discard)
			qcow2_write_zeros(io, io->sector, nr);
		if (state == QCOW2_DATA || discard) {
			qcow2_advance(io, nr);
			return true;
		}
		if (state == QCOW2_BUSY)
			return qcow2_wait_busy(io);
		return qcow2_write_new(io, nr, state);
	}

	if (state == QCOW2_BUSY)
		return qcow2_wait_busy(io);
	if (qcow2_mode(q) != QCOW2_RW) {
		WRITE_ONCE(io->status, BLK_STS_IOERR);
		return true;
	}
	ready = qcow2_make_ready(io);
	if (ready != QCOW2_READY)
		return ready == QCOW2_AGAIN;
	end = qcow2_slice_end(io, end - io->sector);
	if (qcow2_zero_units(q, io->sector >> shift, (end - 1) >> shift, state,
			     q->passdown && state == QCOW2_DATA &&
			     !(io->bio->bi_opf & REQ_NOUNMAP)))
		qcow2_advance(io, end - io->sector);
	return true;
}

static bool qcow2_read_run(struct qcow2_io *io, unsigned int nr,
			   enum qcow2_state state)
{
	struct qcow2_target *q = io->q;

	/* Busy units read as before, which without a backing device is zeros. */
	if (state == QCOW2_BUSY && q->backing_bdev) {
		state = qcow2_busy_state(io, &nr);
		if (state == QCOW2_BUSY)
			return true;
	}
	if (state == QCOW2_DATA)
		return qcow2_read_from(io, nr, q->data_bdev);
	if (state == QCOW2_UNALLOCATED && io->sector < q->backing_end) {
		nr = min_t(sector_t, nr, q->backing_end - io->sector);
		return qcow2_read_from(io, nr, q->backing_bdev);
	}
	return qcow2_read_zeros(io, nr);
}

static bool qcow2_process_run(struct qcow2_io *io, unsigned int nr,
			      enum qcow2_state state)
{
	struct qcow2_target *q = io->q;
	enum qcow2_mode mode;

	if (state == QCOW2_BUSY) {
		enum qcow2_busy busy = qcow2_why_busy(q->md, io->sector);

		if (busy == QCOW2_BUSY_BAD)
			WRITE_ONCE(io->status, BLK_STS_IOERR);
		if (busy != QCOW2_BUSY_WRITE)
			return true;
	}
	if (bio_op(io->bio) == REQ_OP_READ)
		return qcow2_read_run(io, nr, state);
	mode = qcow2_mode(q);
	if (qcow2_no_writes(q, mode) ||
	    (mode == QCOW2_FAIL &&
	     (state != QCOW2_DATA || (io->bio->bi_opf & REQ_FUA)))) {
		WRITE_ONCE(io->status, BLK_STS_IOERR);
		return true;
	}
	if (qcow2_zeroing(io->bio))
		return qcow2_zero_run(io, nr, state);
	if (state == QCOW2_DATA)
		return qcow2_overwrite(io, nr);
	if (state == QCOW2_BUSY)
		return qcow2_wait_busy(io);
	return qcow2_write_new(io, nr, state);
}

static void qcow2_process(struct work_struct *work)
{
	struct qcow2_io *io = container_of(work, struct qcow2_io, work);
	struct qcow2_metadata *md = io->q->md;
	enum qcow2_state state;
	unsigned int nr;
	int r;

	while (io->left && !READ_ONCE(io->status)) {
		r = qcow2_load_all(io);
		if (r > 0)
			return;
		if (r < 0) {
			WRITE_ONCE(io->status, errno_to_blk_status(r));
			break;
		}
		nr = io->left;
		/* one slice at a time, as it is loaded */
		if (qcow2_zeroing(io->bio))
			nr = qcow2_slice_end(io, nr) - io->sector;
		nr = qcow2_lookup(md, io->sector, nr, &state);
		if (nr && !qcow2_process_run(io, nr, state))
			return;
		cond_resched();
	}
	qcow2_io_put(io);
}

/*----------------------------------------------------------------
 * The commit worker
 *----------------------------------------------------------------
 */

/* Let those go on who wait for room, whatever came of it. */
static void qcow2_commit_tried(struct qcow2_target *q)
{
	WRITE_ONCE(q->commit_tries, q->commit_tries + 1);
	wake_up_all(&q->room);
}

static int qcow2_commit(struct qcow2_target *q)
{
	bool fatal = false;
	int r;

	if (qcow2_mode(q) == QCOW2_FAIL) {
		r = -EIO;
		goto out;
	}
	r = qcow2_metadata_commit(q->md, &fatal);
	if (!r) {
		WRITE_ONCE(q->commits, q->commits + 1);
		/* A discard waits for all that it makes obsolete to be so. */
		if (q->passdown)
			queue_work(q->trim_wq, &q->trimmer);
	} else if (fatal) {
		qcow2_set_mode(q, QCOW2_FAIL);
	} else {
		if (r == -EUCLEAN)
			qcow2_corrupt(q);
		queue_delayed_work(q->commit_wq, &q->waker,
				   QCOW2_COMMIT_PERIOD);
	}
out:
	qcow2_commit_tried(q);
	return r;
}

static void qcow2_passdown_endio(struct bio *bio)
{
	struct qcow2_passdown *p = container_of(bio, struct qcow2_passdown, bio);
	struct qcow2_write *w = &p->write;
	struct qcow2_target *q = p->q;
	struct qcow2_bucket *bucket = qcow2_bucket(q->md, w->slice->index);
	unsigned long flags;
	LIST_HEAD(waiters);

	/* An error means that the space stays in use: no one is to be told. */
	spin_lock_irqsave(&bucket->lock, flags);
	list_splice(&w->waiters, &waiters);
	qcow2_end_write(q->md, w, false);
	qcow2_set_states(w->slice, w->first, w->last, QCOW2_ZERO);
	spin_unlock_irqrestore(&bucket->lock, flags);

	qcow2_queue_list(&waiters);
	bio_put(bio);
	atomic_dec(&q->passdowns);
	wake_up_all(&q->room);
	atomic_dec(&q->slow);
}

/* Pass down the discards that are on stable storage. */
static void qcow2_trimmer(struct work_struct *work)
{
	struct qcow2_target *q = container_of(work, struct qcow2_target, trimmer);
	sector_t sector, nr;

	qcow2_metadata_start_trims(q->md);
	for (;;) {
		struct qcow2_passdown *p;
		struct bio *bio;

		/* What has not begun is given up when a write comes. */
		wait_event(q->room, atomic_read(&q->passdowns) < QCOW2_MAX_PASSDOWNS);
		bio = bio_alloc_bioset(q->data_bdev, 0, REQ_OP_DISCARD, GFP_NOIO,
				       &q->trim_bs);
		p = container_of(bio, struct qcow2_passdown, bio);
		if (!qcow2_metadata_next_trim(q->md, &p->write, &sector, &nr)) {
			bio_put(bio);
			return;
		}
		atomic_inc(&q->slow);
		atomic_inc(&q->passdowns);
		p->q = q;
		bio->bi_iter.bi_sector = sector;
		bio->bi_iter.bi_size = nr << SECTOR_SHIFT;
		bio->bi_end_io = qcow2_passdown_endio;
		submit_bio(bio);
	}
}

static void qcow2_do_reservations(struct qcow2_target *q, struct list_head *ios)
{
	struct qcow2_metadata *md = q->md;
	struct qcow2_io *io, *next;
	int r;

	list_for_each_entry_safe(io, next, ios, node) {
		r = -EIO;
		if (qcow2_mode(q) == QCOW2_RW)
			r = qcow2_metadata_reserve(md, io->sector >>
						   (md->unit_shift + md->slice_shift));
		if (r == -EUCLEAN)
			qcow2_corrupt(q);
		if (r == -ENOSPC) {
			WRITE_ONCE(q->refused, q->refused + 1);
			/* One is enough to tell someone to make room. */
			if (q->refused == 1)
				dm_table_event(q->ti->table);
		}
		if (!r) {
			qcow2_io_queue(io);
		} else {
			WRITE_ONCE(io->status, r == -EUCLEAN ? BLK_STS_IOERR :
				   errno_to_blk_status(r));
			qcow2_io_put(io);
		}
	}
}

static void qcow2_do_waiters(struct qcow2_target *q, struct list_head *ios)
{
	struct qcow2_io *io, *next;
	blk_status_t status;

	if (list_empty(ios))
		return;
	status = errno_to_blk_status(qcow2_commit(q));
	list_for_each_entry_safe(io, next, ios, node) {
		WRITE_ONCE(io->status, status);
		qcow2_io_end(io);
	}
}

static void qcow2_worker(struct work_struct *work)
{
	struct qcow2_target *q = container_of(work, struct qcow2_target, worker);
	LIST_HEAD(reservations);
	LIST_HEAD(waiters);
	bool set_corrupt;
	int r;

	/*
	 * Waiters first, the dirty set later (in the commit): so all that they
	 * wait for is in that set.
	 */
	spin_lock_irq(&q->lock);
	list_splice_init(&q->reservations, &reservations);
	list_splice_init(&q->waiters, &waiters);
	set_corrupt = q->set_corrupt;
	q->set_corrupt = false;
	spin_unlock_irq(&q->lock);

	qcow2_do_reservations(q, &reservations);
	qcow2_do_waiters(q, &waiters);
	if (set_corrupt && !q->read_only) {
		r = qcow2_metadata_set_corrupt(q->md);
		if (r)
			DMERR("%s: cannot mark the image corrupt: %d",
			      q->md->name, r);
	}
}

static void qcow2_waker(struct work_struct *work)
{
	struct qcow2_target *q = container_of(to_delayed_work(work),
					      struct qcow2_target, waker);

	/* Who asked for it may have seen an older state of affairs. */
	if (qcow2_metadata_clean(q->md))
		qcow2_commit_tried(q);
	else
		qcow2_commit(q);
}

/*----------------------------------------------------------------
 * map
 *----------------------------------------------------------------
 */

static int qcow2_remap(struct qcow2_target *q, struct bio *bio)
{
	bio_set_dev(bio, q->data_bdev);
	return DM_MAPIO_REMAPPED;
}

/*
 * Take only the first @nr sectors of a bio.  False if it must not be cut: of a
 * NOWAIT bio's parts one might have to wait when others are on their way, and
 * then EAGAIN would come too late for io_uring to try again.
 */
static bool qcow2_accept(struct bio *bio, unsigned int nr)
{
	if (likely(nr >= bio_sectors(bio)))
		return true;
	if (bio->bi_opf & REQ_NOWAIT)
		return false;
	dm_accept_partial_bio(bio, nr);
	return true;
}

static int qcow2_would_block(struct bio *bio)
{
	bio_wouldblock_error(bio);
	return DM_MAPIO_SUBMITTED;
}

/* Leave a bio to the workqueue. */
static int qcow2_defer(struct qcow2_target *q, struct qcow2_io *io,
		       struct bio *bio)
{
	if (bio->bi_opf & REQ_NOWAIT)
		return qcow2_would_block(bio);
	qcow2_io_init(q, io, bio, NULL);
	io->sector = bio->bi_iter.bi_sector;
	io->left = bio_sectors(bio);
	/* Changes of states are all that it writes. */
	if (qcow2_zeroing(bio))
		qcow2_fua_to_commit(io, bio);
	qcow2_io_queue(io);
	return DM_MAPIO_SUBMITTED;
}

static int qcow2_map_flush(struct qcow2_target *q, struct qcow2_io *io,
			   struct bio *bio)
{
	if (qcow2_mode(q) == QCOW2_FAIL)
		return DM_MAPIO_KILL;
	if (qcow2_metadata_clean(q->md))
		return qcow2_remap(q, bio);
	qcow2_io_init(q, io, bio, NULL);
	qcow2_wait_commit(q, io);
	return DM_MAPIO_SUBMITTED;
}

/* Read @nr sectors, or what the backing device has of them, from there. */
static int qcow2_map_backing(struct qcow2_target *q, struct bio *bio,
			     unsigned int nr)
{
	nr = min_t(sector_t, nr, q->backing_end - bio->bi_iter.bi_sector);
	if ((bio->bi_opf & REQ_NOWAIT) && !bdev_nowait(q->backing_bdev))
		return qcow2_would_block(bio);
	if (!qcow2_accept(bio, nr))
		return qcow2_would_block(bio);
	this_cpu_inc(q->stats->hits);
	bio_set_dev(bio, q->backing_bdev);
	return DM_MAPIO_REMAPPED;
}

static int qcow2_map_read(struct qcow2_target *q, struct qcow2_io *io,
			  struct bio *bio)
{
	sector_t sector = bio->bi_iter.bi_sector;
	enum qcow2_state state;
	unsigned int nr;

	/* "External data file": with the raw bit set it reads as the guest. */
	if (q->raw) {
		this_cpu_inc(q->stats->hits);
		return qcow2_remap(q, bio);
	}
	nr = qcow2_lookup(q->md, sector, bio_sectors(bio), &state);
	if (!nr)
		return qcow2_defer(q, io, bio);
	if (state == QCOW2_UNALLOCATED && sector < q->backing_end)
		return qcow2_map_backing(q, bio, nr);
	if (state == QCOW2_BUSY) {
		enum qcow2_busy busy = qcow2_why_busy(q->md, sector);

		if (busy == QCOW2_BUSY_BAD)
			return DM_MAPIO_KILL;
		/* What is it now, or what was it before? */
		if (busy == QCOW2_BUSY_GONE || q->backing_bdev)
			return qcow2_defer(q, io, bio);
	}
	if (!qcow2_accept(bio, nr))
		return qcow2_would_block(bio);
	this_cpu_inc(q->stats->hits);
	if (likely(state == QCOW2_DATA))
		return qcow2_remap(q, bio);
	zero_fill_bio(bio);
	bio_endio(bio);
	return DM_MAPIO_SUBMITTED;
}

static int qcow2_map_write(struct qcow2_target *q, struct qcow2_io *io,
			   struct bio *bio)
{
	struct qcow2_metadata *md = q->md;
	sector_t sector = bio->bi_iter.bi_sector, slice_end;
	enum qcow2_mode mode = qcow2_mode(q);
	unsigned int shift = md->unit_shift + md->slice_shift, nr;
	enum qcow2_state state;

	if (unlikely(mode != QCOW2_RW) &&
	    (qcow2_no_writes(q, mode) || (bio->bi_opf & REQ_FUA)))
		return DM_MAPIO_KILL;
	nr = qcow2_lookup(md, sector, bio_sectors(bio), &state);
	if (!nr)
		return qcow2_defer(q, io, bio);

	if (likely(state == QCOW2_DATA)) {
		if (!qcow2_accept(bio, nr))
			return qcow2_would_block(bio);
		this_cpu_inc(q->stats->hits);
		if ((bio->bi_opf & REQ_FUA) &&
		    !qcow2_range_durable(md, sector, nr)) {
			qcow2_io_init(q, io, bio, NULL);
			qcow2_fua_to_commit(io, bio);
		}
		return qcow2_remap(q, bio);
	}

	if (unlikely(mode != QCOW2_RW))
		return DM_MAPIO_KILL;
	if (state == QCOW2_BUSY)
		return qcow2_defer(q, io, bio);
	slice_end = ((sector >> shift) + 1) << shift;
	nr = min_t(sector_t, nr, slice_end - sector);
	if (!qcow2_accept(bio, nr))
		return qcow2_would_block(bio);
	qcow2_io_init(q, io, bio, NULL);
	if (!qcow2_first_write(io, sector, nr, state, false)) {
		qcow2_io_release(io);
		return qcow2_defer(q, io, bio);
	}
	qcow2_fua_to_commit(io, bio);
	return qcow2_remap(q, bio);
}

/* Slices that map() looks at for a request that may be for very many */
#define QCOW2_MAP_SLICES	16

/* Discard and write zeroes */
static int qcow2_map_zeroes(struct qcow2_target *q, struct qcow2_io *io,
			    struct bio *bio)
{
	enum qcow2_state state;
	unsigned int nr;

	if (unlikely(qcow2_no_writes(q, qcow2_mode(q))))
		return DM_MAPIO_KILL;
	/* Whatever the data device reads as then, the guest does, too. */
	if (q->raw)
		return qcow2_remap(q, bio);
	/* It may be long: not here */
	if (bio_sectors(bio) >> (q->md->unit_shift + q->md->slice_shift) >
	    QCOW2_MAP_SLICES)
		return qcow2_defer(q, io, bio);
	nr = qcow2_lookup(q->md, bio->bi_iter.bi_sector, bio_sectors(bio),
			  &state);
	if (nr != bio_sectors(bio) || (bio->bi_opf & REQ_FUA) ||
	    (state != QCOW2_ZERO &&
	     (state != QCOW2_UNALLOCATED ||
	      bio->bi_iter.bi_sector < q->backing_end)))
		return qcow2_defer(q, io, bio);
	bio_endio(bio);
	return DM_MAPIO_SUBMITTED;
}

static int qcow2_map(struct dm_target *ti, struct bio *bio)
{
	struct qcow2_io *io = dm_per_bio_data(bio, sizeof(*io));
	struct qcow2_target *q = ti->private;

	io->kind = QCOW2_IO_PLAIN;
	if (unlikely(bio->bi_opf & REQ_PREFLUSH))
		return qcow2_map_flush(q, io, bio);
	switch (bio_op(bio)) {
	case REQ_OP_READ:
		return qcow2_map_read(q, io, bio);
	case REQ_OP_WRITE:
		return qcow2_map_write(q, io, bio);
	case REQ_OP_DISCARD:
	case REQ_OP_WRITE_ZEROES:
		return qcow2_map_zeroes(q, io, bio);
	default:
		return DM_MAPIO_KILL;
	}
}

/*----------------------------------------------------------------
 * Suspend and resume
 *----------------------------------------------------------------
 */

/*
 * Polling: whoever ends the last one must not touch q any more, as a wake-up
 * would, and suspends are rare.
 */
static void qcow2_wait_slow(struct qcow2_target *q)
{
	while (atomic_read(&q->slow))
		fsleep(1000);
}

static void qcow2_postsuspend(struct dm_target *ti)
{
	struct qcow2_target *q = ti->private;
	unsigned int tries = QCOW2_LAST_TRIES;

	/*
	 * On suspend DM has waited for all bios.  On removal it has not, but
	 * nobody has the device open; wait for what a last opener may have
	 * left behind.
	 */
	qcow2_wait_slow(q);
	cancel_delayed_work_sync(&q->waker);
	flush_workqueue(q->io_wq);
	flush_workqueue(q->commit_wq);

	/*
	 * The last commits are the worker's, too: what has failed has set the
	 * timer, and of two at the same time each would take the other's batch.
	 */
	while (!qcow2_metadata_clean(q->md) && tries-- &&
	       qcow2_mode(q) != QCOW2_FAIL) {
		mod_delayed_work(q->commit_wq, &q->waker, 0);
		flush_delayed_work(&q->waker);
	}
	/* There will be no other try. */
	cancel_delayed_work_sync(&q->waker);
	if (!qcow2_metadata_clean(q->md))
		qcow2_set_mode(q, QCOW2_FAIL);
	flush_workqueue(q->commit_wq);
	/* What it allows to discard is discarded now, or never. */
	flush_work(&q->trimmer);
	qcow2_wait_slow(q);
	/* What could not be written is in core only. */
	if (qcow2_mode(q) != QCOW2_FAIL)
		qcow2_metadata_suspend(q->md);
}

static int qcow2_preresume(struct dm_target *ti)
{
	struct qcow2_target *q = ti->private;
	char *error;
	int r;

	if (qcow2_mode(q) == QCOW2_FAIL) {
		DMERR("%s: stays in mode fail until a new table is loaded",
		      q->md->name);
		return 0;
	}
	r = qcow2_metadata_check_header(q->md, qcow2_mode(q) != QCOW2_RW,
					&error);
	if (r) {
		DMERR("%s: cannot resume: %s", q->md->name, error);
		return r;
	}
	r = qcow2_metadata_resume(q->md);
	if (r == -EUCLEAN) {
		qcow2_corrupt(q);
		r = 0;
	}
	return r;
}

/*----------------------------------------------------------------
 * Constructor and the like
 *----------------------------------------------------------------
 */

/* Open the devices, and check that they fit the geometry. */
static int qcow2_get_devices(struct qcow2_target *q,
			     const struct qcow2_args *args)
{
	const struct qcow2_geometry *geo = &args->geo;
	blk_mode_t mode = BLK_OPEN_READ | (q->read_only ? 0 : BLK_OPEN_WRITE);
	struct dm_target *ti = q->ti;
	struct block_device *meta, *data;
	enum qcow2_fault fault;
	u64 l1_len;
	int r;

	r = dm_get_device(ti, args->metadata_dev, mode, &q->meta_dev);
	if (r) {
		ti->error = "Cannot open the metadata device";
		return r;
	}
	r = dm_get_device(ti, args->data_dev, mode, &q->data_dev);
	if (r) {
		ti->error = "Cannot open the data device";
		return r;
	}
	meta = q->meta_dev->bdev;
	data = q->data_dev->bdev;
	q->data_bdev = data;
	if (meta == data) {
		ti->error = "Metadata and data are on the same device";
		return -EINVAL;
	}
	if (!q->read_only && bdev_read_only(meta)) {
		ti->error = "Metadata device is read-only: read_only is needed";
		return -EROFS;
	}
	if (!q->read_only && bdev_read_only(data)) {
		ti->error = "Data device is read-only: read_only is needed";
		return -EROFS;
	}
	if (bdev_nr_bytes(data) < geo->size) {
		ti->error = "Data device is smaller than the target";
		return -EINVAL;
	}

	fault = qcow2_geometry_check(geo, bdev_nr_bytes(meta));
	if (fault) {
		ti->error = (char *)qcow2_fault_str(fault);
		return -EINVAL;
	}
	if (bdev_logical_block_size(meta) >
	    min(1U << geo->cluster_bits, QCOW2_BLOCK_BYTES)) {
		ti->error = "Metadata device's logical block is larger than a cluster or 4 KiB";
		return -EINVAL;
	}
	/* Requests are cut, and units filled, at units' borders. */
	if (bdev_logical_block_size(data) > 1U << qcow2_unit_bits(geo)) {
		ti->error = geo->ext_l2 ?
			    "Data device's logical block is larger than a subcluster" :
			    "Data device's logical block is larger than a cluster";
		return -EINVAL;
	}
	l1_len = round_up((u64)geo->l1_entries * 8,
			  min(1U << geo->cluster_bits, QCOW2_BLOCK_BYTES));
	if (!q->read_only && l1_len > bdev_nr_bytes(meta) - geo->l1_offset) {
		ti->error = "Metadata device ends inside the L1 table's last block: extend it";
		return -EINVAL;
	}
	return 0;
}

/* The backing device is only read, whatever the mode of the table is. */
static int qcow2_get_backing(struct qcow2_target *q,
			     const struct qcow2_args *args)
{
	const struct qcow2_geometry *geo = &args->geo;
	struct dm_target *ti = q->ti;
	struct block_device *bdev;
	u64 size;
	int r;

	if (!args->backing_dev)
		return 0;
	r = dm_get_device(ti, args->backing_dev, BLK_OPEN_READ,
			  &q->backing_dev);
	if (r) {
		ti->error = "Cannot open the backing device";
		return r;
	}
	bdev = q->backing_dev->bdev;
	if (bdev == q->meta_dev->bdev || bdev == q->data_bdev) {
		ti->error = "Backing device is the metadata or the data device";
		return -EINVAL;
	}
	size = bdev_nr_bytes(bdev);
	if (bdev_logical_block_size(bdev) > 1U << qcow2_unit_bits(geo)) {
		ti->error = "Backing device's logical block is larger than a unit";
		return -EINVAL;
	}
	/* The zeros behind it are written to the data device. */
	if (size < geo->size &&
	    size & (bdev_logical_block_size(q->data_bdev) - 1)) {
		ti->error = "Backing device ends inside a block of the data device";
		return -EINVAL;
	}
	q->kcopyd = dm_kcopyd_client_create(NULL);
	if (IS_ERR(q->kcopyd)) {
		r = PTR_ERR(q->kcopyd);
		q->kcopyd = NULL;
		ti->error = "Cannot create a kcopyd client";
		return r;
	}
	q->backing_bdev = bdev;
	q->backing_end = size >> SECTOR_SHIFT;
	return 0;
}

static unsigned long qcow2_shrink_count(struct shrinker *shrinker,
					struct shrink_control *sc)
{
	struct qcow2_target *q = qcow2_shrinker_private(shrinker);

	return qcow2_metadata_droppable(q->md);
}

static unsigned long qcow2_shrink_scan(struct shrinker *shrinker,
				       struct shrink_control *sc)
{
	struct qcow2_target *q = qcow2_shrinker_private(shrinker);
	unsigned long dropped = qcow2_metadata_drop(q->md, sc->nr_to_scan);

	return dropped ? dropped : SHRINK_STOP;
}

static void qcow2_dtr(struct dm_target *ti)
{
	struct qcow2_target *q = ti->private;

	if (q->shrinker)
		qcow2_shrinker_free(q->shrinker);
	if (q->commit_wq)
		destroy_workqueue(q->commit_wq);
	if (q->trim_wq)
		destroy_workqueue(q->trim_wq);
	if (q->io_wq)
		destroy_workqueue(q->io_wq);
	if (q->md)
		qcow2_metadata_destroy(q->md);
	if (q->kcopyd)
		dm_kcopyd_client_destroy(q->kcopyd);
	bioset_exit(&q->trim_bs);
	bioset_exit(&q->fill_bs);
	bioset_exit(&q->bs);
	free_percpu(q->stats);
	if (q->backing_dev)
		dm_put_device(ti, q->backing_dev);
	if (q->data_dev)
		dm_put_device(ti, q->data_dev);
	if (q->meta_dev)
		dm_put_device(ti, q->meta_dev);
	kfree(q);
}

static int qcow2_create_pools(struct qcow2_target *q)
{
	int r;

	q->stats = alloc_percpu(struct qcow2_stats);
	/* unbound: misses wait for the disk */
	q->io_wq = alloc_workqueue("dm-qcow2", WQ_UNBOUND | WQ_MEM_RECLAIM, 0);
	q->commit_wq = alloc_ordered_workqueue("dm-qcow2-commit", WQ_MEM_RECLAIM);
	if (!q->stats || !q->io_wq || !q->commit_wq)
		return -ENOMEM;
	if (q->passdown) {
		q->trim_wq = alloc_ordered_workqueue("dm-qcow2-trim",
						     WQ_MEM_RECLAIM);
		if (!q->trim_wq)
			return -ENOMEM;
	}
	r = bioset_init(&q->bs, QCOW2_BIO_RESERVE,
			offsetof(struct qcow2_part, bio), 0);
	if (r)
		return r;
	r = bioset_init(&q->trim_bs, QCOW2_BIO_RESERVE,
			offsetof(struct qcow2_passdown, bio), 0);
	if (r)
		return r;
	return bioset_init(&q->fill_bs, QCOW2_BIO_RESERVE, 0, BIOSET_NEED_BVECS);
}

/*
 * <metadata_dev> <data_dev> <cluster_bits> <l1_offset> <l1_entries>
 * <refcount_table_offset> <refcount_table_clusters> <refcount_order>
 * [<#feature args> <feature arg>...]
 *
 * Offsets in bytes.  On a reload this runs while the old table is live, so it
 * keeps nothing of what it reads: see qcow2_preresume().
 */
static int __qcow2_ctr(struct dm_target *ti, unsigned int argc, char **argv)
{
	struct qcow2_config config = {};
	struct qcow2_args args;
	struct qcow2_target *q;
	int r;

	q = kzalloc(sizeof(*q), GFP_KERNEL);
	if (!q) {
		ti->error = "Cannot allocate the target";
		return -ENOMEM;
	}
	ti->private = q;
	q->ti = ti;
	spin_lock_init(&q->lock);
	INIT_LIST_HEAD(&q->reservations);
	INIT_LIST_HEAD(&q->waiters);
	INIT_WORK(&q->worker, qcow2_worker);
	INIT_DELAYED_WORK(&q->waker, qcow2_waker);
	INIT_WORK(&q->trimmer, qcow2_trimmer);
	init_waitqueue_head(&q->room);

	r = qcow2_parse_args(&args, ti->begin, ti->len, argc, argv, &ti->error);
	if (r)
		goto bad;
	q->read_only_arg = args.read_only;
	q->raw = args.raw;
	q->ext_l2 = args.geo.ext_l2;
	q->no_passdown_arg = args.no_passdown;
	q->cache_limit = args.cache_limit;
	q->read_only = q->read_only_arg ||
		       !(dm_table_get_mode(ti->table) & BLK_OPEN_WRITE);
	q->mode = q->read_only ? QCOW2_RO : QCOW2_RW;
	r = qcow2_get_devices(q, &args);
	if (!r)
		r = qcow2_get_backing(q, &args);
	if (r)
		goto bad;
	q->passdown = !q->no_passdown_arg && !q->raw &&
		      bdev_max_discard_sectors(q->data_bdev);
	r = qcow2_create_pools(q);
	if (r) {
		ti->error = "Cannot allocate work queues and pools";
		goto bad;
	}
	config.geo = args.geo;
	config.raw = q->raw;
	config.backing = q->backing_bdev;
	config.read_only = q->read_only;
	config.cache_limit = q->cache_limit;
	q->md = qcow2_metadata_create(q->meta_dev->bdev, q->data_bdev,
				      dm_table_device_name(ti->table), &config);
	if (IS_ERR(q->md)) {
		r = PTR_ERR(q->md);
		q->md = NULL;
		ti->error = "Cannot allocate the map";
		goto bad;
	}
	r = qcow2_metadata_check_header(q->md, q->read_only, &ti->error);
	if (r)
		goto bad;
	q->shrinker = qcow2_shrinker_alloc(q, qcow2_shrink_count,
					   qcow2_shrink_scan,
					   dm_table_device_name(ti->table));
	if (!q->shrinker) {
		ti->error = "Cannot register a shrinker";
		r = -ENOMEM;
		goto bad;
	}

	ti->num_flush_bios = 1;
	if (!q->read_only) {
		/* with data_file_raw: passed down as they are, if at all */
		ti->num_discard_bios = !q->raw || !q->no_passdown_arg;
		ti->discards_supported = !q->raw;
		/* if the data device does */
		ti->num_write_zeroes_bios = 1;
	}
	/* the metadata device may have a cache where the data device has none */
	ti->flush_supported = true;
	ti->accounts_remapped_io = true;
	ti->per_io_data_size = sizeof(struct qcow2_io);
	return 0;
bad:
	qcow2_dtr(ti);
	return r;
}

/*
 * An image that grows gets its new table while the old one is suspended: memory
 * must not be waited for that only a write to this very device would free.
 */
static int qcow2_ctr(struct dm_target *ti, unsigned int argc, char **argv)
{
	unsigned int noio = memalloc_noio_save();
	int r = __qcow2_ctr(ti, argc, argv);

	memalloc_noio_restore(noio);
	return r;
}

static unsigned int qcow2_nr_features(struct qcow2_target *q)
{
	return q->read_only_arg + q->raw + q->ext_l2 +
	       (q->backing_dev ? 2 : 0) + q->no_passdown_arg +
	       (q->cache_limit ? 2 : 0);
}

static unsigned int qcow2_emit_features(struct qcow2_target *q, char *result,
					unsigned int maxlen, unsigned int sz)
{
	DMEMIT("%u", qcow2_nr_features(q));
	if (q->read_only_arg)
		DMEMIT(" read_only");
	if (q->raw)
		DMEMIT(" data_file_raw");
	if (q->ext_l2)
		DMEMIT(" extended_l2");
	if (q->backing_dev)
		DMEMIT(" backing_dev %s", q->backing_dev->name);
	if (q->no_passdown_arg)
		DMEMIT(" no_discard_passdown");
	if (q->cache_limit)
		DMEMIT(" cache_limit %llu", q->cache_limit);
	return sz;
}

/*
 * Info: <cluster size, sectors> <L2 tables>/<L1 entries> <slices in core>
 * <bytes of states> <dirty slices> <hits> <misses> <first writes> <commits>
 * <drops> <refused> <#feature args> <feature arg>* <mode>
 */
static void qcow2_status(struct dm_target *ti, status_type_t type,
			 unsigned int status_flags, char *result,
			 unsigned int maxlen)
{
	struct qcow2_target *q = ti->private;
	struct qcow2_metadata *md = q->md;
	const struct qcow2_geometry *geo = &md->geo;
	struct qcow2_stats sum = {};
	unsigned int sz = 0;
	int cpu;

	switch (type) {
	case STATUSTYPE_INFO:
		for_each_possible_cpu(cpu) {
			struct qcow2_stats *stats = per_cpu_ptr(q->stats, cpu);

			sum.hits += READ_ONCE(stats->hits);
			sum.misses += READ_ONCE(stats->misses);
			sum.first_writes += READ_ONCE(stats->first_writes);
		}
		DMEMIT("%u %lu/%u %lu %llu %lu %llu %llu %llu %lu %lu %lu ",
		       1U << (geo->cluster_bits - SECTOR_SHIFT), READ_ONCE(md->l1_used),
		       geo->l1_entries, READ_ONCE(md->nr_slices_cached),
		       READ_ONCE(md->state_bytes), READ_ONCE(md->nr_dirty),
		       sum.hits, sum.misses, sum.first_writes,
		       READ_ONCE(q->commits), READ_ONCE(md->drops),
		       READ_ONCE(q->refused));
		sz = qcow2_emit_features(q, result, maxlen, sz);
		DMEMIT(" %s", qcow2_mode_name(qcow2_mode(q)));
		break;
	case STATUSTYPE_TABLE:
		DMEMIT("%s %s %u %llu %u %llu %u %u", q->meta_dev->name,
		       q->data_dev->name, geo->cluster_bits, geo->l1_offset,
		       geo->l1_entries, geo->reftable_offset,
		       geo->reftable_clusters, geo->refcount_order);
		if (qcow2_nr_features(q)) {
			DMEMIT(" ");
			sz = qcow2_emit_features(q, result, maxlen, sz);
		}
		break;
	case STATUSTYPE_IMA:
		DMEMIT_TARGET_NAME_VERSION(ti->type);
		DMEMIT(",metadata_device=%s,data_device=%s,cluster_bits=%u",
		       q->meta_dev->name, q->data_dev->name, geo->cluster_bits);
		DMEMIT(",read_only=%c,data_file_raw=%c,extended_l2=%c",
		       q->read_only ? 'y' : 'n', q->raw ? 'y' : 'n',
		       q->ext_l2 ? 'y' : 'n');
		DMEMIT(",backing_device=%s;",
		       q->backing_dev ? q->backing_dev->name : "-");
		break;
	}
}

/* The metadata device has neither the size nor the limits of this one. */
static int qcow2_iterate_devices(struct dm_target *ti,
				 iterate_devices_callout_fn fn, void *data)
{
	struct qcow2_target *q = ti->private;

	return fn(ti, q->data_dev, 0, ti->len, data);
}

/* Requests that are remapped to the backing device have to suit it, too. */
static void qcow2_stack_backing(struct qcow2_target *q,
				struct queue_limits *limits)
{
	unsigned int max_write_zeroes = limits->max_write_zeroes_sectors;

	blk_stack_limits(limits, &bdev_get_queue(q->backing_bdev)->limits, 0);
	/* These never get there. */
	limits->max_write_zeroes_sectors = max_write_zeroes;
}

static void qcow2_io_hints(struct dm_target *ti, struct queue_limits *limits)
{
	struct qcow2_target *q = ti->private;
	unsigned int cluster = 1U << q->md->geo.cluster_bits;
	unsigned int unit = 1U << q->md->unit_shift;	/* sectors */
	unsigned int max = round_down(UINT_MAX >> SECTOR_SHIFT, unit);

	if (q->backing_bdev)
		qcow2_stack_backing(q, limits);

	/* Writes of whole clusters need no fill; keep a stripe's size. */
	if (cluster >= limits->physical_block_size &&
	    (limits->io_opt < cluster || limits->io_opt % cluster))
		limits->io_opt = cluster;

	if (q->raw)
		return;
	qcow2_no_wzeroes_unmap(limits);
	if (q->read_only)
		return;
	limits->discard_granularity = unit << SECTOR_SHIFT;
	limits->discard_alignment = 0;
	limits->max_discard_sectors = max;
	limits->max_hw_discard_sectors = max;
	/* At most parts of two units are written, the rest is metadata. */
	if (limits->max_write_zeroes_sectors)
		limits->max_write_zeroes_sectors = max;
}

static struct target_type qcow2_target = {
	.name = "qcow2",
	.version = {1, 0, 0},
	.features = DM_TARGET_NOWAIT,
	.module = THIS_MODULE,
	.ctr = qcow2_ctr,
	.dtr = qcow2_dtr,
	.map = qcow2_map,
	.end_io = qcow2_end_io,
	.postsuspend = qcow2_postsuspend,
	.preresume = qcow2_preresume,
	.status = qcow2_status,
	.iterate_devices = qcow2_iterate_devices,
	.io_hints = qcow2_io_hints,
};

static int __init qcow2_init(void)
{
	int r;

	qcow2_zeros = alloc_pages(GFP_KERNEL | __GFP_ZERO | __GFP_COMP,
				  get_order(QCOW2_ZERO_BYTES));
	if (!qcow2_zeros)
		return -ENOMEM;
	r = dm_register_target(&qcow2_target);
	if (r)
		__free_pages(qcow2_zeros, get_order(QCOW2_ZERO_BYTES));
	return r;
}

static void __exit qcow2_exit(void)
{
	dm_unregister_target(&qcow2_target);
	__free_pages(qcow2_zeros, get_order(QCOW2_ZERO_BYTES));
}

module_init(qcow2_init);
module_exit(qcow2_exit);

MODULE_DESCRIPTION(DM_NAME " target for qcow2 images with an external data file");
MODULE_AUTHOR("The dm-qcow2 authors");
MODULE_LICENSE("GPL");
