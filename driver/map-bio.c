// SPDX-License-Identifier: GPL-2.0-only
/*
 * map and end_io: the way of every request.
 *
 * Since the data file keeps each cluster at its guest offset, a request to an
 * allocated cluster needs nothing but a look at the cluster's state and a new
 * bi_bdev.  That much is done here, without a lock.  So are reads of zeros and
 * first writes to clusters whose L2 table is in core.  Everything that has to wait,
 * or has to be cut into more than two, goes to the slow path (process.c).
 */
#include "compat.h"
#include "fill.h"
#include "keep.h"
#include "map-bio.h"
#include "process.h"

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

/* A bio is for the workqueue. */
static void qcow2_prepare(struct qcow2_target *q, struct qcow2_io *io,
			  struct bio *bio)
{
	qcow2_io_init(q, io, bio, NULL);
	io->sector = bio->bi_iter.bi_sector;
	io->left = bio_sectors(bio);
	io->marked = io->sector;
	io->mark_round = 0;
	io->kept = io->sector;
	/* Changes of states are all that it writes, if it is not passed on. */
	if (qcow2_zeroing(bio) && !q->raw)
		qcow2_fua_to_commit(io, bio);
}

/* Leave a bio to the workqueue. */
static int qcow2_defer(struct qcow2_target *q, struct qcow2_io *io,
		       struct bio *bio)
{
	if (bio->bi_opf & REQ_NOWAIT)
		return qcow2_would_block(bio);
	qcow2_prepare(q, io, bio);
	qcow2_io_queue(io);
	return DM_MAPIO_SUBMITTED;
}

/*
 * A bio that must not wait: it can be left to the job that keeps what it changes, if that can be
 * made at once.  Its submitter does not wait then.
 */
static int qcow2_keep_nowait(struct qcow2_target *q, struct qcow2_io *io,
			     struct bio *bio)
{
	/* Marks are waited for longer, and by many: that is for who may. */
	if (!q->view || q->bitmaps.count)
		return qcow2_would_block(bio);
	qcow2_prepare(q, io, bio);
	bio->bi_opf &= ~REQ_NOWAIT;
	if (qcow2_keep_now(io, true))
		return DM_MAPIO_SUBMITTED;
	bio->bi_opf |= REQ_NOWAIT;
	qcow2_io_release(io);
	return qcow2_would_block(bio);
}

/* Leave a bio to the workqueue when what it changes has been marked, and kept. */
static int qcow2_defer_to_mark(struct qcow2_target *q, struct qcow2_io *io,
			       struct bio *bio)
{
	if (bio->bi_opf & REQ_NOWAIT)
		return qcow2_keep_nowait(q, io, bio);
	qcow2_prepare(q, io, bio);
	/* Both at the same time, if it needs marks, too */
	if (q->view && qcow2_keep_now(io, !q->bitmaps.count))
		return DM_MAPIO_SUBMITTED;
	if (!qcow2_bitmaps_join(&q->bitmaps, io->sector, io->left,
				&io->wait.node, &io->mark_round))
		qcow2_io_queue(io);
	return DM_MAPIO_SUBMITTED;
}

/* Has everything been done that the bitmaps need before a bio changes anything? */
static bool qcow2_may_change(struct qcow2_target *q, struct bio *bio)
{
	return likely(!q->gated) ||
	       qcow2_bitmaps_pass(&q->bitmaps, bio->bi_iter.bi_sector,
				  bio_sectors(bio));
}

static int qcow2_map_flush(struct qcow2_target *q, struct qcow2_io *io,
			   struct bio *bio)
{
	if (qcow2_mode(&q->health) == QCOW2_FAIL)
		return DM_MAPIO_KILL;
	if (qcow2_map_clean(&q->map))
		return qcow2_remap(q, bio);
	qcow2_io_init(q, io, bio, NULL);
	qcow2_commit_wait(&q->commit, &io->wait);
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

/* A read that is not of one unit of data */
static noinline int qcow2_map_read(struct qcow2_target *q, struct qcow2_io *io,
				   struct bio *bio)
{
	sector_t sector = bio->bi_iter.bi_sector;
	enum qcow2_state state;
	unsigned int nr;

	nr = qcow2_lookup(&q->map, sector, bio_sectors(bio), &state);
	if (!nr)
		return qcow2_defer(q, io, bio);
	if (state == QCOW2_UNALLOCATED && sector < q->backing_end)
		return qcow2_map_backing(q, bio, nr);
	if (state == QCOW2_BUSY) {
		enum qcow2_busy busy = qcow2_why_busy(&q->map, sector);

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

/* A write that is not to one unit of data, or is FUA, or finds another mode than rw */
static noinline int qcow2_map_write(struct qcow2_target *q, struct qcow2_io *io,
				    struct bio *bio)
{
	struct qcow2_map *map = &q->map;
	sector_t sector = bio->bi_iter.bi_sector;
	enum qcow2_mode mode = qcow2_mode(&q->health);
	enum qcow2_begun begun;
	enum qcow2_state state;
	unsigned int nr;

	if (unlikely(!qcow2_mode_writes(mode)) &&
	    (qcow2_mode_no_writes(&q->health, mode) || (bio->bi_opf & REQ_FUA)))
		return DM_MAPIO_KILL;
	if (q->gated) {
		if (!qcow2_may_change(q, bio))
			return qcow2_defer_to_mark(q, io, bio);
		/* The gate was closed, but for that it is a hit. */
		if (qcow2_mode_writes(mode) && !(bio->bi_opf & REQ_FUA) &&
		    qcow2_is_data(map, sector, bio_sectors(bio))) {
			this_cpu_inc(q->stats->hits);
			return qcow2_remap(q, bio);
		}
	}
	nr = qcow2_lookup(map, sector, bio_sectors(bio), &state);
	if (!nr)
		return qcow2_defer(q, io, bio);

	if (likely(state == QCOW2_DATA)) {
		if (!qcow2_accept(bio, nr))
			return qcow2_would_block(bio);
		this_cpu_inc(q->stats->hits);
		if ((bio->bi_opf & REQ_FUA) &&
		    !qcow2_range_durable(map, sector, nr)) {
			qcow2_io_init(q, io, bio, NULL);
			qcow2_fua_to_commit(io, bio);
		}
		return qcow2_remap(q, bio);
	}

	if (unlikely(!qcow2_mode_writes(mode)))
		return DM_MAPIO_KILL;
	if (state == QCOW2_BUSY)
		return qcow2_defer(q, io, bio);
	nr = qcow2_slice_end(q, sector, nr) - sector;
	if (!qcow2_accept(bio, nr))
		return qcow2_would_block(bio);
	qcow2_io_init(q, io, bio, NULL);
	begun = qcow2_first_write(io, sector, nr, state, false);
	if (begun == QCOW2_NOT_BEGUN) {
		qcow2_io_release(io);
		return qcow2_defer(q, io, bio);
	}
	qcow2_fua_to_commit(io, bio);
	if (begun == QCOW2_BEGUN)
		return qcow2_remap(q, bio);
	qcow2_io_put(io);
	return DM_MAPIO_SUBMITTED;
}

/* Slices that map() looks at for a request that may be for very many */
#define QCOW2_MAP_SLICES	16

/* Discard and write zeroes */
static int qcow2_map_zeroes(struct qcow2_target *q, struct qcow2_io *io,
			    struct bio *bio)
{
	struct qcow2_map *map = &q->map;
	enum qcow2_state state;
	unsigned int nr;

	if (unlikely(qcow2_mode_no_writes(&q->health, qcow2_mode(&q->health))))
		return DM_MAPIO_KILL;
	if (!qcow2_may_change(q, bio))
		return qcow2_defer_to_mark(q, io, bio);
	/* Whatever the data device reads as then, the guest does, too. */
	if (q->raw)
		return qcow2_remap(q, bio);
	/* It may be long: not here */
	if (bio_sectors(bio) >> (map->unit_shift + map->slice_shift) >
	    QCOW2_MAP_SLICES)
		return qcow2_defer(q, io, bio);
	nr = qcow2_lookup(map, bio->bi_iter.bi_sector, bio_sectors(bio), &state);
	if (nr != bio_sectors(bio) || (bio->bi_opf & REQ_FUA))
		return qcow2_defer(q, io, bio);
	if (!qcow2_reads_zeros(q, bio->bi_iter.bi_sector, state) ||
	    (state == QCOW2_ZERO && qcow2_discards_zeros(q, bio)))
		return qcow2_defer(q, io, bio);
	bio_endio(bio);
	return DM_MAPIO_SUBMITTED;
}

static noinline int qcow2_map_other(struct qcow2_target *q, struct qcow2_io *io,
				    struct bio *bio)
{
	if (bio->bi_opf & REQ_PREFLUSH)
		return qcow2_map_flush(q, io, bio);
	switch (bio_op(bio)) {
	case REQ_OP_WRITE:
		return qcow2_map_write(q, io, bio);
	case REQ_OP_DISCARD:
	case REQ_OP_WRITE_ZEROES:
		return qcow2_map_zeroes(q, io, bio);
	default:
		return DM_MAPIO_KILL;
	}
}

int qcow2_map_bio(struct dm_target *ti, struct bio *bio)
{
	struct qcow2_io *io = dm_per_bio_data(bio, sizeof(*io));
	struct qcow2_target *q = ti->private;
	sector_t sector = bio->bi_iter.bi_sector;

	io->kind = QCOW2_IO_PLAIN;
	switch ((__force u32)(bio->bi_opf & (REQ_OP_MASK | REQ_PREFLUSH |
					     REQ_FUA))) {
	case (__force u32)REQ_OP_READ:
		/* "External data file": with the raw bit set it reads as the guest. */
		if (!q->raw && unlikely(!qcow2_is_data(&q->map, sector,
						       bio_sectors(bio))))
			return qcow2_map_read(q, io, bio);
		break;
	case (__force u32)REQ_OP_WRITE:
		if (unlikely(!qcow2_mode_writes(qcow2_mode(&q->health))) ||
		    (q->gated &&
		     !qcow2_gate_open(&q->bitmaps.gate, sector,
				      bio_sectors(bio))) ||
		    unlikely(!qcow2_is_data(&q->map, sector, bio_sectors(bio))))
			return qcow2_map_write(q, io, bio);
		break;
	default:
		return qcow2_map_other(q, io, bio);
	}
	this_cpu_inc(q->stats->hits);
	return qcow2_remap(q, bio);
}

/* An end that is more than that of a request which was just passed on */
static noinline int qcow2_end_other(struct dm_target *ti, struct bio *bio,
				    blk_status_t *error)
{
	struct qcow2_io *io = dm_per_bio_data(bio, sizeof(*io));

	if (io->kind == QCOW2_IO_PLAIN) {
		if (*error)
			qcow2_check_flush(ti->private, bio, *error);
		return DM_ENDIO_DONE;
	}
	if (io->kind == QCOW2_IO_OVER)
		return DM_ENDIO_DONE;

	if (*error)
		qcow2_io_error(io, *error);
	if (!atomic_dec_and_test(&io->pending) || qcow2_io_finish(io))
		return DM_ENDIO_INCOMPLETE;
	*error = qcow2_error_get(&io->error);
	qcow2_io_release(io);
	return DM_ENDIO_DONE;
}

int qcow2_end_bio(struct dm_target *ti, struct bio *bio, blk_status_t *error)
{
	struct qcow2_io *io = dm_per_bio_data(bio, sizeof(*io));

	if (likely(io->kind == QCOW2_IO_PLAIN && !*error))
		return DM_ENDIO_DONE;
	return qcow2_end_other(ti, bio, error);
}
