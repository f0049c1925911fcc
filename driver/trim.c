// SPDX-License-Identifier: GPL-2.0-only
/*
 * Pass-down of discards.
 */
#include <linux/bio.h>
#include <linux/delay.h>

#include "compat.h"
#include "trace.h"
#include "trim.h"

/* How long until a slice that somebody else loads is looked at again, ms */
#define QCOW2_TRIM_PAUSE	10

/* A discard that is passed down. */
struct qcow2_passdown {
	struct qcow2_trims *t;
	struct qcow2_write write;
	struct bio bio;		/* last: the bio set's front pad ends here */
};

/* The first units that may be discarded now, @max at most; the bucket lock is held. */
static bool qcow2_trim_run(struct qcow2_map *map, struct qcow2_slice *slice,
			   unsigned int max, struct qcow2_write *w, bool *later)
{
	unsigned int n = BIT(map->slice_shift), first = 0, last, run;
	struct qcow2_trim *trim = slice->trim;
	enum qcow2_state state;

	*later = false;
	/* There is no telling what else of it is not true. */
	if (slice->bad)
		bitmap_zero(trim->ready, n);
	for (;;) {
		first = find_next_bit(trim->ready, n, first);
		if (first >= n)
			return false;
		/* Not while a commit that has taken the block is not at its end */
		if (slice->dirty & BIT((first >> map->block_shift) +
				       QCOW2_MAX_BLOCKS)) {
			*later = true;
			first = (first | (BIT(map->block_shift) - 1)) + 1;
			continue;
		}
		last = first | (BIT(map->block_shift) - 1);
		while (last + 1 < n && last - first < max &&
		       !(slice->dirty & BIT(((last + 1) >> map->block_shift) +
					    QCOW2_MAX_BLOCKS)))
			last += BIT(map->block_shift);
		last = min(last, first + max - 1);
		last = find_next_zero_bit(trim->ready, last + 1, first) - 1;
		run = qcow2_words_run(slice->words, first, last, &state);
		if (state == QCOW2_ZERO) {
			w->last = first + run - 1;
			break;
		}
		/* It was another thing on disk when it was loaded again. */
		bitmap_clear(trim->ready, first, run);
	}
	w->slice = slice;
	w->first = first;
	w->prev = QCOW2_ZERO;
	return true;
}

/* The index of the first slice with something to do; to the end of the queue. */
static bool qcow2_next_todo(struct qcow2_map *map, unsigned long *index)
{
	struct qcow2_trim *trim;

	spin_lock_irq(&map->lock);
	trim = list_first_entry_or_null(&map->trims_todo, struct qcow2_trim,
					node);
	if (trim) {
		*index = trim->index;
		list_move_tail(&trim->node, &map->trims_todo);
	}
	spin_unlock_irq(&map->lock);
	return trim;
}

enum qcow2_next {
	QCOW2_NEXT_RUN,		/* has begun to work on units */
	QCOW2_NEXT_NONE,	/* nothing (more) to do here */
	QCOW2_NEXT_LATER,	/* a commit has to end first */
	QCOW2_NEXT_ABSENT,	/* not in core as a slice */
};

/* Take the next units of a slice. */
static enum qcow2_next qcow2_next_run(struct qcow2_trims *t,
				      unsigned long index,
				      struct qcow2_write *w)
{
	struct qcow2_map *map = t->map;
	struct qcow2_bucket *bucket = qcow2_bucket(map, index);
	/*
	 * One request below, so that their number is what is waited for.  A device
	 * may say that it takes as much as can be said.
	 */
	unsigned int max = clamp_t(unsigned int,
				   bdev_max_discard_sectors(t->data_bdev) >>
				   map->unit_shift, 1, BIT(map->slice_shift));
	enum qcow2_next next = QCOW2_NEXT_NONE;
	struct qcow2_slice *slot;
	struct qcow2_trim *trim;
	bool later = false;

	spin_lock_irq(&bucket->lock);
	trim = xa_load(&map->trims, index);
	slot = qcow2_slot(map, index);
	if (!trim)
		goto out;
	if (!slot || qcow2_is_tag(slot)) {
		next = QCOW2_NEXT_ABSENT;
	} else if (qcow2_trim_run(map, slot, max, w, &later)) {
		/* row 5; takes the units out of the bitmaps */
		qcow2_begin_write(map, w, false);
		next = QCOW2_NEXT_RUN;
	} else {
		/* A commit that ends calls again. */
		if (later)
			next = QCOW2_NEXT_LATER;
		spin_lock(&map->lock);
		if (!later && !list_empty(&trim->node)) {
			list_del_init(&trim->node);
			map->nr_trims_todo--;
		}
		spin_unlock(&map->lock);
	}
out:
	spin_unlock_irq(&bucket->lock);
	return next;
}

static void qcow2_passdown_endio(struct bio *bio)
{
	struct qcow2_passdown *p = container_of(bio, struct qcow2_passdown, bio);
	struct qcow2_write *w = &p->write;
	struct qcow2_trims *t = p->t;
	struct qcow2_map *map = t->map;
	struct qcow2_bucket *bucket = qcow2_bucket(map, w->slice->index);
	atomic_t *slow = t->slow;
	unsigned long flags;
	LIST_HEAD(waiters);

	/* An error means that the space stays in use: no one is to be told. */
	spin_lock_irqsave(&bucket->lock, flags);
	list_splice(&w->waiters, &waiters);
	qcow2_end_write(map, w, false);
	/* row 6 */
	qcow2_set_states(w->slice, w->first, w->last, QCOW2_ZERO);
	if (w->slice->trim && !bio->bi_status)
		bitmap_set(w->slice->trim->done, w->first,
			   w->last - w->first + 1);
	spin_unlock_irqrestore(&bucket->lock, flags);

	map->wake(&waiters, 0);
	bio_put(bio);
	atomic_dec(&t->passdowns);
	wake_up_all(&t->room);
	atomic_dec(slow);
}

static void qcow2_passdown(struct qcow2_trims *t, struct qcow2_passdown *p)
{
	struct qcow2_write *w = &p->write;
	struct qcow2_map *map = t->map;
	struct bio *bio = &p->bio;
	sector_t sector, nr;

	sector = (((sector_t)w->slice->index << map->slice_shift) + w->first) <<
		 map->unit_shift;
	nr = min((sector_t)(w->last - w->first + 1) << map->unit_shift,
		 (sector_t)(map->geo.size >> SECTOR_SHIFT) - sector);
	p->t = t;
	bio->bi_iter.bi_sector = sector;
	bio->bi_iter.bi_size = nr << SECTOR_SHIFT;
	bio->bi_end_io = qcow2_passdown_endio;
	trace_qcow2_trim(t->cache->io->name, sector, nr);
	atomic_inc(t->slow);
	atomic_inc(&t->passdowns);
	submit_bio(bio);
}

/* Bring a slice into core as such; false if there is nothing to be had now. */
static bool qcow2_trim_fetch(struct qcow2_trims *t, unsigned long index)
{
	struct qcow2_map *map = t->map;
	struct qcow2_bucket *bucket = qcow2_bucket(map, index);
	struct qcow2_trim *trim;
	int r;

	r = qcow2_cache_load(t->cache, index, NULL);
	if (!r) {
		qcow2_cache_expand(t->cache, index);
		return true;
	}
	if (r == -EBUSY) {
		msleep(QCOW2_TRIM_PAUSE);
		return true;
	}
	/* A table that cannot be read: its hints are forgotten. */
	spin_lock_irq(&bucket->lock);
	trim = xa_load(&map->trims, index);
	if (trim)
		qcow2_free_trim(map, trim);
	spin_unlock_irq(&bucket->lock);
	return false;
}

static void qcow2_trimmer(struct work_struct *work)
{
	struct qcow2_trims *t = container_of(work, struct qcow2_trims, work);
	struct qcow2_map *map = t->map;
	unsigned long index, waiting = 0;

	/* Once around all that wait for a commit is enough. */
	while (READ_ONCE(t->budget) > 0 &&
	       qcow2_mode_writes(qcow2_mode(t->health)) &&
	       waiting <= READ_ONCE(map->nr_trims_todo) &&
	       qcow2_next_todo(map, &index)) {
		enum qcow2_next next = QCOW2_NEXT_RUN;

		while (next == QCOW2_NEXT_RUN) {
			struct qcow2_passdown *p;
			struct bio *bio;

			/* What has not begun is given up when a write comes. */
			wait_event(t->room, atomic_read(&t->passdowns) <
					    QCOW2_MAX_PASSDOWNS);
			if (READ_ONCE(t->budget) <= 0)
				return;
			bio = bio_alloc_bioset(t->data_bdev, 0, REQ_OP_DISCARD,
					       GFP_NOIO, &t->bs);
			p = container_of(bio, struct qcow2_passdown, bio);
			next = qcow2_next_run(t, index, &p->write);
			if (next == QCOW2_NEXT_RUN)
				qcow2_passdown(t, p);
			else
				bio_put(bio);
			if (next == QCOW2_NEXT_RUN && t->budget != INT_MAX)
				WRITE_ONCE(t->budget, t->budget - 1);
			if (next == QCOW2_NEXT_ABSENT && !t->last &&
			    qcow2_trim_fetch(t, index))
				next = QCOW2_NEXT_RUN;
			cond_resched();
		}
		if (next == QCOW2_NEXT_LATER || next == QCOW2_NEXT_ABSENT)
			waiting++;
		else
			waiting = 0;
	}
}

void qcow2_trims_kick(struct qcow2_trims *t)
{
	if (t->wq)
		queue_work(t->wq, &t->work);
}

void qcow2_trims_stop(struct qcow2_trims *t)
{
	t->busy = READ_ONCE(t->map->nr_trims_todo) || atomic_read(&t->passdowns);
	WRITE_ONCE(t->budget, 0);
}

void qcow2_trims_flush(struct qcow2_trims *t)
{
	if (t->wq)
		flush_workqueue(t->wq);
}

void qcow2_trims_last(struct qcow2_trims *t)
{
	if (!t->wq)
		return;
	/* The commit has queued the worker, in vain. */
	flush_workqueue(t->wq);
	if (t->busy)
		return;
	/* To load would be to make room, and to commit for that. */
	t->last = true;
	WRITE_ONCE(t->budget, QCOW2_MAX_PASSDOWNS);
	queue_work(t->wq, &t->work);
	flush_workqueue(t->wq);
	WRITE_ONCE(t->budget, 0);
	t->last = false;
}

void qcow2_trims_start(struct qcow2_trims *t)
{
	/* It may not have noticed yet that it was stopped. */
	qcow2_trims_flush(t);
	WRITE_ONCE(t->budget, INT_MAX);
	qcow2_trims_kick(t);
}

int qcow2_trims_init(struct qcow2_trims *t)
{
	INIT_WORK(&t->work, qcow2_trimmer);
	atomic_set(&t->passdowns, 0);
	init_waitqueue_head(&t->room);
	t->wq = alloc_ordered_workqueue("dm-qcow2-trim", WQ_MEM_RECLAIM);
	if (!t->wq)
		return -ENOMEM;
	return bioset_init(&t->bs, QCOW2_MAX_PASSDOWNS,
			   offsetof(struct qcow2_passdown, bio), 0);
}

void qcow2_trims_exit(struct qcow2_trims *t)
{
	if (t->wq)
		destroy_workqueue(t->wq);
	bioset_exit(&t->bs);
}
