// SPDX-License-Identifier: GPL-2.0-only
/*
 * Life of an io.
 */
#include "compat.h"
#include "io.h"

/* Bios that are kept in reserve, so that I/O goes on when memory is short. */
#define QCOW2_BIO_RESERVE	16

struct qcow2_part {
	struct qcow2_io io;
	struct bio bio;		/* last: the bio set's front pad ends here */
};

void qcow2_io_init(struct qcow2_target *q, struct qcow2_io *io,
		   struct bio *bio, struct qcow2_io *parent)
{
	io->kind = QCOW2_IO_SLOW;
	io->error = (struct qcow2_error){};
	io->commit = false;
	io->ours = false;
	io->wait.nr = 0;
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

/* End a bio of DM's.  Any context. */
static void qcow2_io_end(struct qcow2_io *io)
{
	struct bio *bio = io->bio;

	bio->bi_status = qcow2_error_get(&io->error);
	qcow2_io_release(io);
	io->kind = QCOW2_IO_OVER;
	/* It may have been through bio_endio() already, and through rq_qos. */
	bio_clear_flag(bio, BIO_QOS_THROTTLED);
	bio_clear_flag(bio, BIO_QOS_MERGED);
	bio_endio(bio);
}

void qcow2_io_queue(struct qcow2_io *io)
{
	/* Its last run may not have returned yet, but will not look at it. */
	INIT_WORK(&io->work, io->q->process);
	queue_work(io->q->io_wq, &io->work);
}

void qcow2_io_wake(struct list_head *ios, int error)
{
	struct qcow2_io *io, *next;

	list_for_each_entry_safe(io, next, ios, wait.node) {
		if (error) {
			qcow2_io_error(io, errno_to_blk_status(error));
			qcow2_io_put(io);
		} else {
			qcow2_io_queue(io);
		}
	}
}

void qcow2_io_committed(struct qcow2_waiter *wait, blk_status_t status)
{
	struct qcow2_io *io = container_of(wait, struct qcow2_io, wait);

	/* It is DM's: parts leave that to it. */
	if (status)
		qcow2_io_error(io, status);
	qcow2_io_end(io);
}

/*
 * All I/O of a first write is done: its units become data, or what they were.
 * Any context.
 */
static void qcow2_end_first_write(struct qcow2_io *io)
{
	struct qcow2_target *q = io->q;
	struct qcow2_map *map = &q->map;
	struct qcow2_write *w = &io->write;
	struct qcow2_bucket *bucket = qcow2_bucket(map, w->slice->index);
	bool arm = false;
	unsigned long flags;
	LIST_HEAD(waiters);

	spin_lock_irqsave(&bucket->lock, flags);
	if (!q->raw)
		list_splice(&w->waiters, &waiters);
	qcow2_end_write(map, w, q->raw);
	if (!qcow2_error_get(&io->error)) {
		/* row 2 */
		arm = qcow2_mark_dirty(map, w->slice, w->first, w->last);
		qcow2_set_states(w->slice, w->first, w->last, QCOW2_DATA);
	} else if (!q->raw) {
		/* row 3 */
		qcow2_set_states(w->slice, w->first, w->last, w->prev);
	}
	spin_unlock_irqrestore(&bucket->lock, flags);
	/* It is dirty by now; pairs with qcow2_check_flush(). */
	smp_mb__before_atomic();
	atomic_dec(&q->first_writes);

	qcow2_io_wake(&waiters, 0);
	if (arm)
		qcow2_commit_arm(&q->commit);
}

bool qcow2_io_finish(struct qcow2_io *io)
{
	if (io->kind == QCOW2_IO_FIRST_WRITE) {
		qcow2_end_first_write(io);
		io->kind = QCOW2_IO_SLOW;
	}
	if (!io->commit || qcow2_error_get(&io->error))
		return false;
	qcow2_commit_wait(&io->q->commit, &io->wait);
	return true;
}

void qcow2_io_put(struct qcow2_io *io)
{
	while (atomic_dec_and_test(&io->pending)) {
		struct qcow2_io *parent = io->parent;
		blk_status_t status;

		if (qcow2_io_finish(io))
			return;
		if (!parent) {
			qcow2_io_end(io);
			return;
		}
		status = qcow2_error_get(&io->error);
		if (status)
			qcow2_io_error(parent, status);
		bio_put(io->bio);
		io = parent;
	}
}

void qcow2_fua_to_commit(struct qcow2_io *io, struct bio *bio)
{
	if (bio->bi_opf & REQ_FUA) {
		bio->bi_opf &= ~REQ_FUA;
		io->commit = true;
		io->wait.sector = io->bio->bi_iter.bi_sector;
		io->wait.nr = bio_sectors(io->bio);
	}
}

/*
 * Does a FUA write go without a flush?  Devices that are made of others say that they
 * know FUA, whatever those below do about it.
 */
static bool qcow2_knows_fua(struct block_device *bdev)
{
	return !bdev_write_cache(bdev) ||
	       (bdev_fua(bdev) && queue_is_mq(bdev_get_queue(bdev)));
}

/* Can a FUA write with this error have lost what is in a cache? */
static bool qcow2_may_lose_cache(blk_status_t status)
{
	switch (status) {
	case BLK_STS_AGAIN:
	case BLK_STS_NOSPC:
	case BLK_STS_NOTSUPP:
	case BLK_STS_MEDIUM:
	case BLK_STS_PROTECTION:
	case BLK_STS_RESOURCE:
	case BLK_STS_DEV_RESOURCE:
		return false;
	default:
		return true;
	}
}

void qcow2_check_flush(struct qcow2_target *q, struct bio *bio,
		       blk_status_t status)
{
	if (!(bio->bi_opf & (REQ_PREFLUSH | REQ_FUA)))
		return;
	/* A flush that had to wait was not even begun. */
	if (status == BLK_STS_AGAIN)
		return;
	if (!(bio->bi_opf & REQ_PREFLUSH) &&
	    (qcow2_knows_fua(q->data_bdev) || !qcow2_may_lose_cache(status)))
		return;
	if (!atomic_read(&q->first_writes)) {
		/* Those that were there before have changed the map by now. */
		smp_rmb();
		if (qcow2_map_clean(&q->map))
			return;
	}
	qcow2_commit_set_lost(&q->commit);
}

static void qcow2_part_endio(struct bio *bio)
{
	struct qcow2_io *io = bio->bi_private;

	if (bio->bi_status) {
		qcow2_check_flush(io->q, bio, bio->bi_status);
		qcow2_io_error(io, bio->bi_status);
	}
	qcow2_io_put(io);
}

struct qcow2_io *qcow2_alloc_part(struct qcow2_io *io, unsigned int nr)
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

int qcow2_io_pools(struct qcow2_target *q)
{
	/* unbound: misses wait for the disk */
	q->io_wq = alloc_workqueue("dm-qcow2", WQ_UNBOUND | WQ_MEM_RECLAIM, 0);
	q->stats = alloc_percpu(struct qcow2_stats);
	if (!q->io_wq || !q->stats)
		return -ENOMEM;
	return bioset_init(&q->bs, QCOW2_BIO_RESERVE,
			   offsetof(struct qcow2_part, bio), 0);
}

void qcow2_io_exit(struct qcow2_target *q)
{
	if (q->io_wq)
		destroy_workqueue(q->io_wq);
	bioset_exit(&q->bs);
	free_percpu(q->stats);
}
