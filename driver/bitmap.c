// SPDX-License-Identifier: GPL-2.0-only
/*
 * Dirty bitmaps: what requests ask of them.  What the bits mean, and what becomes of them, is in
 * bitmap.h.
 */
#include <linux/sizes.h>

#include "bitmap-internal.h"

/* What is marked ahead of a sequential writer: from, up to; sectors */
#define QCOW2_AHEAD_FIRST	(SZ_64K >> SECTOR_SHIFT)
#define QCOW2_AHEAD_MOST	(SZ_16M >> SECTOR_SHIFT)
/* So many times a mark has to follow the one before until that is done. */
#define QCOW2_AHEAD_STREAK	2

sector_t qcow2_bitmaps_piece(struct qcow2_bitmaps *bm, sector_t sector,
			     sector_t end)
{
	unsigned int shift = bm->records[0].shift, i;

	if (!bm->count)
		return end;
	/* A block of the finest one lies within one of each of the others. */
	for (i = 1; i < bm->count; i++)
		shift = min(shift, bm->records[i].shift);
	shift += qcow2_bits_shift(bm);
	return min(end, ((sector >> shift) + 1) << shift);
}

/* Row 3: is a range durable in all bitmaps?  Blocks are there.  The lock is held. */
static bool qcow2_range_is_durable(struct qcow2_bitmaps *bm, sector_t sector,
				   sector_t nr)
{
	unsigned int i, first, n;

	for (i = 0; i < bm->count; i++) {
		struct qcow2_record *rec = bm->records + i;
		struct qcow2_bits *b = qcow2_range_bits(bm, rec, sector);

		if (!b)
			return false;
		qcow2_bits_range(bm, rec, sector, nr, &first, &n);
		if (!qcow2_bits_all(b->durable, first, n))
			return false;
	}
	return true;
}

/* A request asks to change what has these bits.  The lock is held. */
static void qcow2_set_exact(struct qcow2_bitmaps *bm, struct qcow2_bits *b,
			    unsigned int first, unsigned int n)
{
	qcow2_bits_set(b->exact, first, n);
	if (!list_is_last(&b->lru, &bm->lru))
		list_move_tail(&b->lru, &bm->lru);
}

/* Row 4, in all bitmaps; blocks are there.  The lock is held. */
static void qcow2_range_set_exact(struct qcow2_bitmaps *bm, sector_t sector,
				  sector_t nr)
{
	unsigned int i, first, n;

	for (i = 0; i < bm->count; i++) {
		struct qcow2_record *rec = bm->records + i;
		struct qcow2_bits *b = qcow2_range_bits(bm, rec, sector);

		qcow2_bits_range(bm, rec, sector, nr, &first, &n);
		qcow2_set_exact(bm, b, first, n);
		qcow2_widen(&b->new_first, &b->new_end, first, first + n);
	}
}

/* Row 3: make a range exact if it is durable.  The lock is held. */
static bool qcow2_range_pass(struct qcow2_bitmaps *bm, sector_t sector,
			     sector_t nr)
{
	struct qcow2_bits *bits[QCOW2_MAX_RECORDING];
	unsigned int i, first, n;

	for (i = 0; i < bm->count; i++) {
		struct qcow2_record *rec = bm->records + i;

		bits[i] = qcow2_range_bits(bm, rec, sector);
		if (!bits[i])
			return false;
		qcow2_bits_range(bm, rec, sector, nr, &first, &n);
		if (!qcow2_bits_all(bits[i]->durable, first, n))
			return false;
	}
	for (i = 0; i < bm->count; i++) {
		qcow2_bits_range(bm, bm->records + i, sector, nr, &first, &n);
		qcow2_set_exact(bm, bits[i], first, n);
	}
	bm->used = true;
	/* It is all over if there is nothing: see qcow2_map_forget(). */
	return bm->count || bm->view;
}

/* Granules of a view that are looked at where there is no time for more */
#define QCOW2_VIEW_MOST		128

/* Need a view keep nothing of a range any more?  It may say no too often. */
static bool qcow2_view_done(struct qcow2_bitmaps *bm, sector_t sector,
			    sector_t nr)
{
	return !bm->view || (nr >> bm->view->shift < QCOW2_VIEW_MOST &&
			     qcow2_view_passes(bm->view, sector, nr));
}

/* Have a range marked with the next marks of its blocks, those in core.  The lock is held. */
static void qcow2_ahead_range(struct qcow2_bitmaps *bm, sector_t from,
			      sector_t end, bool todo)
{
	unsigned int i;

	while (from < end) {
		sector_t to = qcow2_bitmaps_piece(bm, from, end);

		for (i = 0; i < bm->count; i++) {
			struct qcow2_record *rec = bm->records + i;
			struct qcow2_bits *b = qcow2_range_bits(bm, rec, from);
			unsigned int first, n;

			if (!b)
				continue;
			qcow2_bits_range(bm, rec, from, to - from, &first, &n);
			if (b->ahead_first != b->ahead_end &&
			    first <= b->ahead_end && first + n >= b->ahead_first) {
				b->ahead_first = min(b->ahead_first, first);
				b->ahead_end = max(b->ahead_end, first + n);
			} else if (!b->rounds) {
				b->ahead_first = first;
				b->ahead_end = first + n;
			}
			if (todo && list_empty(&b->todo) &&
			    !qcow2_bits_all(b->durable, first, n))
				list_add_tail(&b->todo, &bm->todo);
		}
		from = to;
	}
}

/* More is marked ahead from now on; up to where.  The lock is held. */
static sector_t qcow2_ahead_end(struct qcow2_bitmaps *bm, sector_t from)
{
	sector_t size = bm->map->geo.size >> SECTOR_SHIFT;

	bm->ahead = clamp_t(sector_t, 2 * bm->ahead, QCOW2_AHEAD_FIRST,
			    QCOW2_AHEAD_MOST);
	return min(from + bm->ahead, size);
}

/*
 * A sequential writer has used half of what is marked ahead of him: he need not wait
 * for what comes then.  The lock is held.
 */
static void qcow2_mark_on(struct qcow2_bitmaps *bm, sector_t sector,
			  sector_t end)
{
	sector_t from = bm->next;

	if (!bm->ahead || end > from || from - sector > bm->ahead ||
	    from - end > bm->ahead / 2)
		return;
	bm->next = qcow2_ahead_end(bm, from);
	qcow2_ahead_range(bm, from, bm->next, true);
	qcow2_kick_markers(bm);
}

bool qcow2_bitmaps_pass(struct qcow2_bitmaps *bm, sector_t sector, sector_t nr)
{
	unsigned long flags;
	bool durable;

	if (nr <= UINT_MAX && qcow2_gate_open(&bm->gate, sector, nr))
		return true;
	/* It may be long: not here */
	if (qcow2_bitmaps_piece(bm, sector, sector + nr) != sector + nr ||
	    !qcow2_view_done(bm, sector, nr))
		return false;
	spin_lock_irqsave(&bm->lock, flags);
	durable = qcow2_range_pass(bm, sector, nr);
	if (durable) {
		qcow2_open_gate(bm, sector, nr);
		qcow2_mark_on(bm, sector, sector + nr);
	}
	spin_unlock_irqrestore(&bm->lock, flags);
	return durable;
}

/*
 * Who writes on from where somebody has written before has more marked than he needs, the
 * more the longer it goes on.  The lock is held.
 */
static void qcow2_mark_ahead(struct qcow2_bitmaps *bm, sector_t sector,
			     sector_t end)
{
	/* In what has been marked ahead last, or will be */
	bool follows = sector < bm->next && bm->next - sector <= bm->ahead;
	unsigned int i;

	if (follows && end <= bm->next)
		return;
	/* What lies between them, or is of the same granule, needs no mark. */
	for (i = 0; !follows && bm->next && sector >= bm->next - 1 &&
	     i < bm->count; i++) {
		unsigned int shift = bm->records[i].shift;

		follows = (sector >> shift) - ((bm->next - 1) >> shift) <= 1;
	}
	if (!follows) {
		bm->next = end;
		bm->ahead = 0;
		bm->streak = 0;
		return;
	}
	if (++bm->streak < QCOW2_AHEAD_STREAK) {
		bm->next = end;
		return;
	}
	bm->next = qcow2_ahead_end(bm, end);
	qcow2_ahead_range(bm, end, bm->next, false);
}

/* Has a mark failed that this range has waited for?  The lock is held. */
static int qcow2_range_error(struct qcow2_bitmaps *bm, sector_t sector,
			     sector_t nr, unsigned long round)
{
	unsigned int i, first, n;

	for (i = 0; round && i < bm->count; i++) {
		struct qcow2_record *rec = bm->records + i;
		struct qcow2_bits *b = qcow2_range_bits(bm, rec, sector);

		qcow2_bits_range(bm, rec, sector, nr, &first, &n);
		if (b->status && (long)(b->tried - round) >= 0 &&
		    !qcow2_bits_all(b->durable, first, n))
			return blk_status_to_errno(b->status);
	}
	return 0;
}

/* Have the blocks of a range written.  The lock is held. */
static void qcow2_want_marks(struct qcow2_bitmaps *bm, sector_t sector,
			     sector_t nr)
{
	unsigned int i, first, n;

	for (i = 0; i < bm->count; i++) {
		struct qcow2_record *rec = bm->records + i;
		struct qcow2_bits *b = qcow2_range_bits(bm, rec, sector);

		qcow2_bits_range(bm, rec, sector, nr, &first, &n);
		if (!qcow2_bits_all(b->durable, first, n) &&
		    list_empty(&b->todo))
			list_add_tail(&b->todo, &bm->todo);
	}
}

/* Row 4: have a range marked, and @waiter woken then.  The lock is held. */
static void qcow2_wait_for_mark(struct qcow2_bitmaps *bm, sector_t sector,
				sector_t nr, struct list_head *waiter,
				unsigned long *round)
{
	qcow2_want_marks(bm, sector, nr);
	if (!*round) {
		qcow2_mark_ahead(bm, sector, sector + nr);
		bm->waits++;
	}
	*round = bm->rounds + 1;
	list_add_tail(waiter, &bm->waiters);
	WRITE_ONCE(bm->nr_waiting, bm->nr_waiting + 1);
	WRITE_ONCE(bm->crowd, max(bm->crowd, bm->nr_waiting + bm->nr_served));
	if (qcow2_crowd_is_back(bm))
		wake_up_all(&bm->gather);
	/* Under the lock: the waiter may end as soon as it is not held. */
	qcow2_kick_markers(bm);
}

bool qcow2_bitmaps_join(struct qcow2_bitmaps *bm, sector_t sector, sector_t nr,
			struct list_head *waiter, unsigned long *round)
{
	bool join;
	unsigned long flags;
	unsigned int i;

	if (qcow2_bitmaps_piece(bm, sector, sector + nr) != sector + nr ||
	    qcow2_mode(bm->health) == QCOW2_FAIL)
		return false;
	spin_lock_irqsave(&bm->lock, flags);
	join = bm->count;
	for (i = 0; join && i < bm->count; i++)
		join = qcow2_range_bits(bm, bm->records + i, sector);
	if (join) {
		qcow2_range_set_exact(bm, sector, nr);
		join = !qcow2_range_is_durable(bm, sector, nr);
	}
	if (join)
		qcow2_wait_for_mark(bm, sector, nr, waiter, round);
	spin_unlock_irqrestore(&bm->lock, flags);
	return join;
}

int qcow2_bitmaps_mark(struct qcow2_bitmaps *bm, sector_t sector, sector_t nr,
		       struct list_head *waiter, unsigned long *round)
{
	struct qcow2_bits *bits[QCOW2_MAX_RECORDING];
	unsigned int i, pinned;
	int r = 0;

	if (!bm->count)
		return 0;
	if (qcow2_mode(bm->health) == QCOW2_FAIL) {
		spin_lock_irq(&bm->lock);
		r = qcow2_range_pass(bm, sector, nr) ? 0 : -EIO;
		spin_unlock_irq(&bm->lock);
		return r;
	}
	for (pinned = 0; pinned < bm->count; pinned++) {
		struct qcow2_record *rec = bm->records + pinned;
		u64 index = sector >> rec->shift >> qcow2_bits_shift(bm);

		r = qcow2_load_bits(bm, rec, index, bits + pinned);
		if (r)
			break;
	}
	spin_lock_irq(&bm->lock);
	if (r)
		goto out;
	qcow2_range_set_exact(bm, sector, nr);
	if (qcow2_range_is_durable(bm, sector, nr)) {
		qcow2_open_gate(bm, sector, nr);
		goto out;
	}
	r = qcow2_range_error(bm, sector, nr, *round);
	if (r)
		goto out;
	qcow2_wait_for_mark(bm, sector, nr, waiter, round);
	r = 1;
out:
	for (i = 0; i < pinned; i++)
		bits[i]->users--;
	spin_unlock_irq(&bm->lock);
	return r;
}
