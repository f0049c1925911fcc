// SPDX-License-Identifier: GPL-2.0-only
/*
 * The slow path: a workqueue cuts an io into runs of equal state, and does one after
 * the other.  Whatever has to be waited for (an L2 table, memory, another
 * first write, a reservation) is waited for here.
 */
#include "compat.h"
#include "fill.h"
#include "keep.h"
#include "process.h"

#define DM_MSG_PREFIX "qcow2"

/*
 * Load all slices that an io needs, so that it is not cut at their borders;
 * without data that would not matter.  Results as qcow2_cache_load().
 */
static int qcow2_load_all(struct qcow2_io *io)
{
	struct qcow2_map *map = &io->q->map;
	unsigned int shift = map->unit_shift + map->slice_shift;
	unsigned long index = io->sector >> shift;
	unsigned long last = (io->sector + io->left - 1) >> shift;
	u64 first = io->sector >> map->unit_shift;
	int r = 0;

	if (qcow2_zeroing(io->bio))
		last = index;

	for (; !r && index <= last; index++) {
		if (rcu_access_pointer(map->dir[index]))
			continue;
		r = qcow2_cache_load(&io->q->cache, index, &io->wait.node);
		if (!r)
			qcow2_cache_follow(&io->q->cache, index,
					   (u64)index << map->slice_shift < first ?
					   first & map->slice_mask : 0);
	}
	return r;
}

enum qcow2_busy qcow2_why_busy(struct qcow2_map *map, sector_t sector)
{
	u64 unit = sector >> map->unit_shift;
	unsigned int i = unit & ((1U << map->slice_shift) - 1);
	enum qcow2_busy busy = QCOW2_BUSY_GONE;
	struct qcow2_slice *slot;

	rcu_read_lock();
	slot = rcu_dereference(map->dir[unit >> map->slice_shift]);
	/* No first writes go into a bad slice: its busy units are corrupt. */
	if (slot && !qcow2_is_tag(slot) &&
	    qcow2_get_state(slot->words, i) == QCOW2_BUSY)
		busy = slot->bad ? QCOW2_BUSY_BAD : QCOW2_BUSY_WRITE;
	rcu_read_unlock();
	return busy;
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
		if (io->ours) {
			bio_set_dev(io->bio, bdev);
			submit_bio(io->bio);
			return false;
		}
		qcow2_io_release(io);
		qcow2_submit(io, bdev);
		return false;
	}
	part = qcow2_alloc_part(io, nr);
	bio_set_dev(part->bio, bdev);
	qcow2_advance(io, nr);
	if (io->ours)
		submit_bio(part->bio);
	else
		dm_submit_bio_remap(io->bio, part->bio);
	return true;
}

static bool qcow2_overwrite(struct qcow2_io *io, unsigned int nr)
{
	struct qcow2_target *q = io->q;
	bool durable = !(io->bio->bi_opf & REQ_FUA) ||
		       qcow2_range_durable(&q->map, io->sector, nr);
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

/* Who works on an io's next unit?  The bucket lock is held. */
static struct qcow2_write *qcow2_io_writer(struct qcow2_io *io)
{
	struct qcow2_map *map = &io->q->map;
	u64 unit = io->sector >> map->unit_shift;

	return qcow2_find_writer(map, unit >> map->slice_shift,
				 unit & ((1U << map->slice_shift) - 1));
}

static struct qcow2_bucket *qcow2_io_bucket(struct qcow2_io *io)
{
	struct qcow2_map *map = &io->q->map;

	return qcow2_bucket(map, io->sector >> (map->unit_shift + map->slice_shift));
}

/* Wait for whoever works on the io's next unit. */
static bool qcow2_wait_busy(struct qcow2_io *io)
{
	struct qcow2_bucket *bucket = qcow2_io_bucket(io);
	struct qcow2_write *w;

	spin_lock_irq(&bucket->lock);
	w = qcow2_io_writer(io);
	if (w)
		list_add_tail(&io->wait.node, &w->waiters);
	spin_unlock_irq(&bucket->lock);
	return !w;
}

/* What do busy units read as?  Shortens @nr to those that are known. */
static enum qcow2_state qcow2_busy_state(struct qcow2_io *io, unsigned int *nr)
{
	struct qcow2_bucket *bucket = qcow2_io_bucket(io);
	struct qcow2_map *map = &io->q->map;
	enum qcow2_state state = QCOW2_BUSY;
	struct qcow2_write *w;
	sector_t end;

	spin_lock_irq(&bucket->lock);
	w = qcow2_io_writer(io);
	if (w) {
		end = ((u64)w->slice->index << map->slice_shift) + w->last + 1;
		*nr = min_t(sector_t, *nr, (end << map->unit_shift) - io->sector);
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
	struct qcow2_map *map = &q->map;
	unsigned long index = io->sector >> (map->unit_shift + map->slice_shift);
	struct qcow2_slice *slot;
	bool tag, ready;

	rcu_read_lock();
	slot = rcu_dereference(map->dir[index]);
	tag = slot && qcow2_is_tag(slot);
	ready = slot && !tag && READ_ONCE(slot->ready);
	rcu_read_unlock();

	if (!slot)
		return QCOW2_AGAIN;
	if (tag) {
		qcow2_cache_expand(&q->cache, index);
		return QCOW2_AGAIN;
	}
	if (ready)
		return QCOW2_READY;
	spin_lock_irq(&q->lock);
	list_add_tail(&io->wait.node, &q->reservations);
	queue_work(q->alloc_wq, &q->reserver);
	spin_unlock_irq(&q->lock);
	return QCOW2_WAIT;
}

static bool qcow2_write_new(struct qcow2_io *io, unsigned int nr,
			    enum qcow2_state state)
{
	bool zeros = qcow2_zeroing(io->bio);
	enum qcow2_begun begun;
	enum qcow2_ready ready;
	struct qcow2_io *part;

	ready = qcow2_make_ready(io);
	if (ready != QCOW2_READY)
		return ready == QCOW2_AGAIN;

	nr = qcow2_slice_end(io->q, io->sector, nr) - io->sector;
	if (qcow2_io_whole(io, nr) && !zeros) {
		/* A first write's fields overwrite io->sector and the like. */
		begun = qcow2_first_write(io, io->sector, nr, state, true);
		if (begun == QCOW2_NOT_BEGUN)
			return true;
		qcow2_fua_to_commit(io, io->bio);
		if (begun == QCOW2_BEGUN)
			qcow2_submit(io, io->q->data_bdev);
		else
			qcow2_io_put(io);
		return false;
	}
	part = qcow2_alloc_part(io, nr);
	begun = qcow2_first_write(part, io->sector, nr, state, true);
	if (begun == QCOW2_NOT_BEGUN) {
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
	if (begun == QCOW2_BEGUN)
		dm_submit_bio_remap(io->bio, part->bio);
	else
		qcow2_io_put(part);
	return true;
}

/*----------------------------------------------------------------
 * Discards and write zeroes
 *----------------------------------------------------------------
 */

/*
 * Make units zero that are all in @state, and leave a hint if @passdown is set; false
 * if they are not in that state any more.
 */
static bool qcow2_zero_units(struct qcow2_target *q, u64 unit, u64 last,
			     enum qcow2_state state, bool passdown)
{
	struct qcow2_map *map = &q->map;
	unsigned int mask = (1U << map->slice_shift) - 1;
	unsigned long index = unit >> map->slice_shift;
	struct qcow2_bucket *bucket = qcow2_bucket(map, index);
	struct qcow2_trim *trim = NULL;
	struct qcow2_slice *slice;
	bool arm = false, todo = false;

	/* Over the limit there is no room for hints. */
	passdown = passdown && qcow2_cache_has_room(&q->cache);
	if (passdown)
		trim = qcow2_trim_alloc(map);

	spin_lock_irq(&bucket->lock);
	slice = qcow2_ready_slice(map, unit, last, state);
	if (slice) {
		/* row 4 */
		arm = qcow2_mark_dirty(map, slice, unit & mask, last & mask);
		qcow2_set_states(slice, unit & mask, last & mask, QCOW2_ZERO);
	}
	if (slice && passdown &&
	    qcow2_add_trim(map, slice, unit & mask, last & mask, true, trim,
			   &todo))
		trim = NULL;
	spin_unlock_irq(&bucket->lock);

	kfree(trim);
	if (arm)
		qcow2_commit_arm(&q->commit);
	return slice;
}

bool qcow2_discards_zeros(struct qcow2_target *q, struct bio *bio)
{
	return bio_op(bio) == REQ_OP_DISCARD && q->passdown &&
	       qcow2_mode_writes(qcow2_mode(&q->health));
}

/*
 * Leave a hint for units that are zero already.  No metadata changes for that, so
 * nothing of it can fail.
 */
static void qcow2_hint_zeros(struct qcow2_target *q, u64 unit, u64 last)
{
	struct qcow2_map *map = &q->map;
	unsigned int mask = (1U << map->slice_shift) - 1;
	unsigned long index = unit >> map->slice_shift;
	struct qcow2_bucket *bucket = qcow2_bucket(map, index);
	enum qcow2_state state = QCOW2_UNALLOCATED;
	struct qcow2_trim *trim;
	struct qcow2_slice *slot;
	bool todo = false;

	if (!qcow2_cache_has_room(&q->cache))
		return;
	trim = qcow2_trim_alloc(map);
	if (!trim)
		return;
	qcow2_cache_expand(&q->cache, index);

	spin_lock_irq(&bucket->lock);
	slot = qcow2_slot(map, index);
	if (slot && !qcow2_is_tag(slot) && !slot->bad &&
	    qcow2_words_run(slot->words, unit & mask, last & mask, &state) ==
	    last - unit + 1 && state == QCOW2_ZERO &&
	    qcow2_add_trim(map, slot, unit & mask, last & mask, false, trim,
			   &todo))
		trim = NULL;
	spin_unlock_irq(&bucket->lock);

	kfree(trim);
	if (todo)
		qcow2_trims_kick(&q->trims);
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
	unsigned int shift = q->map.unit_shift;
	sector_t mask = (1ULL << shift) - 1;
	bool discard = bio_op(io->bio) == REQ_OP_DISCARD;
	enum qcow2_ready ready;
	sector_t end;

	if (qcow2_reads_zeros(q, io->sector, state) &&
	    (state != QCOW2_ZERO || !qcow2_discards_zeros(q, io->bio))) {
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
	if (!qcow2_mode_writes(qcow2_mode(&q->health))) {
		qcow2_io_error(io, BLK_STS_IOERR);
		return true;
	}
	end = qcow2_slice_end(q, io->sector, end - io->sector);
	if (state == QCOW2_ZERO) {
		qcow2_hint_zeros(q, io->sector >> shift, (end - 1) >> shift);
		qcow2_advance(io, end - io->sector);
		return true;
	}
	ready = qcow2_make_ready(io);
	if (ready != QCOW2_READY)
		return ready == QCOW2_AGAIN;
	if (qcow2_zero_units(q, io->sector >> shift, (end - 1) >> shift, state,
			     q->passdown && state == QCOW2_DATA &&
			     !(io->bio->bi_opf & REQ_NOUNMAP)))
		qcow2_advance(io, end - io->sector);
	return true;
}

/*----------------------------------------------------------------
 * Runs
 *----------------------------------------------------------------
 */

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
		enum qcow2_busy busy = qcow2_why_busy(&q->map, io->sector);

		if (busy == QCOW2_BUSY_BAD)
			qcow2_io_error(io, BLK_STS_IOERR);
		if (busy != QCOW2_BUSY_WRITE)
			return true;
	}
	if (bio_op(io->bio) == REQ_OP_READ)
		return qcow2_read_run(io, nr, state);
	mode = qcow2_mode(&q->health);
	if (qcow2_mode_no_writes(&q->health, mode) ||
	    (mode == QCOW2_FAIL &&
	     (state != QCOW2_DATA || (io->bio->bi_opf & REQ_FUA)))) {
		qcow2_io_error(io, BLK_STS_IOERR);
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

/*
 * Have all of an io marked in the bitmaps before any of it changes.  True if that is so, or
 * if it has failed, which is noted; false if the io waits, and is no longer the caller's.
 */
static bool qcow2_mark_all(struct qcow2_io *io)
{
	struct qcow2_bitmaps *bm = &io->q->bitmaps;
	sector_t end = io->sector + io->left;

	while (io->marked < end) {
		sector_t to = qcow2_bitmaps_piece(bm, io->marked, end);
		int r = qcow2_bitmaps_mark(bm, io->marked, to - io->marked,
					   &io->wait.node, &io->mark_round);

		if (r > 0)
			return false;
		if (r < 0) {
			qcow2_io_error(io, errno_to_blk_status(r));
			return true;
		}
		io->marked = to;
		io->mark_round = 0;
		cond_resched();
	}
	return true;
}

/*
 * Have all done that has to be before an io changes anything.  True if that is so, or if it has
 * failed, which is noted; false if the io waits, and is no longer the caller's.
 */
static bool qcow2_pass_gate(struct qcow2_io *io)
{
	struct qcow2_target *q = io->q;

	/* Both at the same time */
	if (q->view)
		qcow2_keep_begin(io);
	if (!qcow2_mark_all(io))
		return false;
	return !q->view || qcow2_error_get(&io->error) || qcow2_keep_all(io);
}

void qcow2_process(struct work_struct *work)
{
	struct qcow2_io *io = container_of(work, struct qcow2_io, work);
	struct qcow2_target *q = io->q;
	enum qcow2_state state;
	unsigned int nr;
	int r;

	if (q->gated && op_is_write(bio_op(io->bio)) && !qcow2_pass_gate(io))
		return;
	/* "External data file": with the raw bit set it reads as the guest. */
	if (io->ours && q->raw) {
		qcow2_read_from(io, io->left, q->data_bdev);
		return;
	}
	/* All else of it has been done by map(). */
	if (q->raw && qcow2_zeroing(io->bio) && !qcow2_error_get(&io->error)) {
		qcow2_io_release(io);
		qcow2_submit(io, q->data_bdev);
		return;
	}
	while (io->left && !qcow2_error_get(&io->error)) {
		r = qcow2_load_all(io);
		if (r > 0)
			return;
		if (r < 0) {
			qcow2_io_error(io, errno_to_blk_status(r));
			break;
		}
		nr = io->left;
		/* one slice at a time, as it is loaded */
		if (qcow2_zeroing(io->bio))
			nr = qcow2_slice_end(q, io->sector, nr) - io->sector;
		nr = qcow2_lookup(&q->map, io->sector, nr, &state);
		if (nr && !qcow2_process_run(io, nr, state))
			return;
		cond_resched();
	}
	qcow2_io_put(io);
}

/*----------------------------------------------------------------
 * Reservations
 *----------------------------------------------------------------
 */

/* See to a cluster for the L2 table of a slice.  0 or a negative errno. */
static int qcow2_reserve(struct qcow2_target *q, unsigned long index)
{
	struct qcow2_map *map = &q->map;
	struct qcow2_bucket *bucket = qcow2_bucket(map, index);
	unsigned long i = index >> map->slices_per_l2_shift;
	enum qcow2_mode mode = qcow2_mode(&q->health);
	struct qcow2_slice *slot;
	int r;

	if (!qcow2_mode_writes(mode))
		return -EIO;
	/* Of what waits for space there is enough. */
	if (mode == QCOW2_NOSPC && !qcow2_alloc_has_table(&q->alloc, i))
		return -ENOSPC;
	r = qcow2_alloc_reserve(&q->alloc, i);
	if (r == -EUCLEAN) {
		qcow2_mode_corrupt(&q->health);
		return -EIO;
	}
	if (r)
		return r;
	spin_lock_irq(&bucket->lock);
	slot = qcow2_slot(map, index);
	if (slot && !qcow2_is_tag(slot))
		WRITE_ONCE(slot->ready, true);
	spin_unlock_irq(&bucket->lock);
	return 0;
}

void qcow2_reserver(struct work_struct *work)
{
	struct qcow2_target *q = container_of(work, struct qcow2_target, reserver);
	unsigned int shift = q->map.unit_shift + q->map.slice_shift;
	struct qcow2_io *io, *next;
	LIST_HEAD(ios);

	spin_lock_irq(&q->lock);
	list_splice_init(&q->reservations, &ios);
	spin_unlock_irq(&q->lock);

	list_for_each_entry_safe(io, next, &ios, wait.node) {
		int r = qcow2_reserve(q, io->sector >> shift);

		if ((r == -ENOSPC || r == -EFBIG) &&
		    bio_op(io->bio) == REQ_OP_DISCARD) {
			/* It is a hint: dropped, as far as the slice goes. */
			qcow2_advance(io, qcow2_slice_end(q, io->sector, io->left) -
					  io->sector);
			r = 0;
		} else if (r == -ENOSPC) {
			WRITE_ONCE(q->refused, q->refused + 1);
			/* One is enough to tell someone to make room. */
			if (q->refused == 1)
				qcow2_mode_event(&q->health);
		}
		if (r) {
			qcow2_io_error(io, r == -ENOSPC ? BLK_STS_NOSPC :
							  BLK_STS_IOERR);
			qcow2_io_put(io);
		} else {
			qcow2_io_queue(io);
		}
	}
}
