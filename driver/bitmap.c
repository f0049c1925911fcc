// SPDX-License-Identifier: GPL-2.0-only
/*
 * Dirty bitmaps.  What the bits mean, and what becomes of them, is in bitmap.h.
 */
#include <linux/device-mapper.h>
#include <linux/log2.h>
#include <linux/mm.h>
#include <linux/sched/mm.h>
#include <linux/sizes.h>
#include <linux/slab.h>

#include "bitmap.h"
#include "compat.h"

#define DM_MSG_PREFIX "qcow2"

/* Blocks, and buffers for them, that are kept in reserve */
#define QCOW2_BITS_RESERVE	(2 * QCOW2_MAX_RECORDING)
#define QCOW2_MARK_RESERVE	4

/* The gate's granules are as large as is needed for it to have no more pieces. */
#define QCOW2_MAX_PIECES	BIT(17)
/* Bits of the gate that are looked at after a mark */
#define QCOW2_OPEN_MOST		128

/* What is marked ahead of a sequential writer: from, up to; sectors */
#define QCOW2_AHEAD_FIRST	(SZ_64K >> SECTOR_SHIFT)
#define QCOW2_AHEAD_MOST	(SZ_16M >> SECTOR_SHIFT)
/* So many times a mark has to follow the one before until that is done. */
#define QCOW2_AHEAD_STREAK	2

/*
 * Bits that nobody has asked for are taken back when there was no mark for so long, and when none
 * of those that were marked ahead was used: a writer may be slow.
 */
#define QCOW2_IDLE_PERIOD	(2 * HZ)
/* Waiting for more requests to mark for: this part of what a round takes, or so many ns */
#define QCOW2_GATHER_PART	4
#define QCOW2_GATHER_MOST	(2 * NSEC_PER_MSEC)

/* Taking back is tried at suspend so often. */
#define QCOW2_TAKE_TRIES	3

/* A block of a bitmap */
struct qcow2_bits {
	/* Constant */
	struct qcow2_record *rec;
	unsigned long index;

	/* All of the rest: bm->lock */
	struct list_head lru;
	struct list_head todo;		/* on bm->todo, or empty */
	unsigned int users;		/* who work with it: it cannot go */
	unsigned int rounds;		/* marks of it that are on their way */
	bool writing;			/* by a marker, or by who takes back */
	bool loose;			/* more may be durable than is exact */
	bool unsure;			/* a write has failed: it has to be written */
	/* Bits to be marked ahead; the same: none.  While @rounds is not 0 they stay. */
	u32 ahead_first, ahead_end;
	/*
	 * What is exact and not durable is in these words (longs); the same: nothing is.
	 * They stay while @rounds is not 0.
	 */
	u32 new_first, new_end;
	unsigned long tried;		/* the last round that has written it */
	blk_status_t status;		/* what came of that */
	/* As on disk: byte by byte, the lowest bit first ("Bitmap") */
	u8 *exact, *durable;
};

static unsigned int qcow2_bits_bytes(const struct qcow2_bitmaps *bm)
{
	return bm->io->block_bytes;
}

static unsigned int qcow2_bits_shift(const struct qcow2_bitmaps *bm)
{
	return ilog2(bm->io->block_bytes) + 3;
}

static size_t qcow2_bits_memory(const struct qcow2_bitmaps *bm)
{
	return sizeof(struct qcow2_bits) + 2 * qcow2_bits_bytes(bm);
}

static bool qcow2_bits_all(const u8 *bits, unsigned int first, unsigned int n)
{
	if (n == 1)
		return bits[first / 8] & BIT(first % 8);
	return find_next_zero_bit_le(bits, first + n, first) >= first + n;
}

static void qcow2_bits_set(u8 *bits, unsigned int first, unsigned int n)
{
	unsigned int bytes;

	for (; n && first % 8; n--, first++)
		bits[first / 8] |= BIT(first % 8);
	bytes = n / 8;
	memset(bits + first / 8, 0xff, bytes);
	first += bytes * 8;
	for (n %= 8; n; n--, first++)
		bits[first / 8] |= BIT(first % 8);
}

/* Where a block is on the metadata device */
static u64 qcow2_bits_offset(struct qcow2_bitmaps *bm,
			     const struct qcow2_bits *b)
{
	unsigned int bits = bm->map->geo.cluster_bits;
	u64 at = (u64)b->index * qcow2_bits_bytes(bm);

	return ((u64)b->rec->clusters[at >> bits] << bits) +
	       (at & ((1ULL << bits) - 1));
}

static struct qcow2_bits *qcow2_find_bits(struct qcow2_record *rec, u64 index)
{
	return xa_load(&rec->blocks, index);
}

/* The bits of a range in the only block that has them, see qcow2_bitmaps_piece(). */
static void qcow2_bits_range(struct qcow2_bitmaps *bm, struct qcow2_record *rec,
			     sector_t sector, sector_t nr, unsigned int *first,
			     unsigned int *n)
{
	u64 from = sector >> rec->shift, to = (sector + nr - 1) >> rec->shift;

	*first = from & (BIT(qcow2_bits_shift(bm)) - 1);
	*n = to - from + 1;
}

/*----------------------------------------------------------------
 * The gate; the lock is held
 *----------------------------------------------------------------
 */

static void qcow2_piece_free(struct rcu_head *head)
{
	struct qcow2_piece *piece = container_of(head, struct qcow2_piece, rcu);

	kfree(piece->words);
	kfree(piece);
}

static struct qcow2_piece *qcow2_get_piece(struct qcow2_bitmaps *bm, u64 bit)
{
	return rcu_dereference_protected(bm->gate.pieces[bit / QCOW2_GATE_BITS],
					 lockdep_is_held(&bm->lock));
}

static void qcow2_account_piece(struct qcow2_bitmaps *bm, long n)
{
	spin_lock(&bm->map->lock);
	qcow2_add_bytes(bm->map, n * (long)(PAGE_SIZE + sizeof(struct qcow2_piece)));
	spin_unlock(&bm->map->lock);
}

static struct qcow2_piece *qcow2_make_piece(struct qcow2_bitmaps *bm, u64 bit)
{
	struct qcow2_piece *piece = qcow2_get_piece(bm, bit);

	if (piece)
		return piece;
	/* Without memory the gate stays closed, which costs time only. */
	piece = kmalloc(sizeof(*piece), GFP_NOWAIT | __GFP_NOWARN);
	if (!piece)
		return NULL;
	piece->words = kzalloc(PAGE_SIZE, GFP_NOWAIT | __GFP_NOWARN);
	if (!piece->words) {
		kfree(piece);
		return NULL;
	}
	rcu_assign_pointer(bm->gate.pieces[bit / QCOW2_GATE_BITS], piece);
	qcow2_account_piece(bm, 1);
	return piece;
}

/* Are all granules of a range both exact and durable in a bitmap? */
static bool qcow2_is_marked(struct qcow2_bitmaps *bm, struct qcow2_record *rec,
			    sector_t sector, sector_t end)
{
	unsigned int shift = qcow2_bits_shift(bm);
	u64 bit = sector >> rec->shift, last = (end - 1) >> rec->shift;

	while (bit <= last) {
		struct qcow2_bits *b = qcow2_find_bits(rec, bit >> shift);
		unsigned int i = bit & (BIT(shift) - 1);
		unsigned int n = min_t(u64, last - bit + 1, BIT(shift) - i);

		if (!b || !qcow2_bits_all(b->exact, i, n) ||
		    !qcow2_bits_all(b->durable, i, n))
			return false;
		bit += n;
	}
	return true;
}

/*
 * Open what may be open of a range, which is exact and durable in all bitmaps.  A
 * granule of theirs that is smaller than one of the gate's may be neither; and a view may
 * have to keep it yet.
 */
static void qcow2_open_gate(struct qcow2_bitmaps *bm, sector_t sector,
			    sector_t nr)
{
	unsigned int shift = bm->gate.shift, i, most = QCOW2_OPEN_MOST;
	u64 bit = sector >> shift, last = (sector + nr - 1) >> shift;

	for (; bit <= last && most--; bit++) {
		sector_t end = min_t(sector_t, (bit + 1) << shift,
				     bm->map->geo.size >> SECTOR_SHIFT);
		struct qcow2_piece *piece;
		unsigned long *word;

		for (i = 0; i < bm->count; i++)
			if (bm->records[i].shift < shift &&
			    !qcow2_is_marked(bm, bm->records + i, bit << shift,
					     end))
				break;
		if (i < bm->count ||
		    (bm->view && !qcow2_view_passes(bm->view, bit << shift,
						    end - (bit << shift))))
			continue;
		piece = qcow2_make_piece(bm, bit);
		if (!piece)
			break;
		word = piece->words + bit % QCOW2_GATE_BITS / BITS_PER_LONG;
		WRITE_ONCE(*word, *word | BIT(bit % BITS_PER_LONG));
	}
}

/* Row 10: close all that a block has to do with. */
static void qcow2_close_gate(struct qcow2_bitmaps *bm, struct qcow2_bits *b)
{
	unsigned int shift = qcow2_bits_shift(bm) + b->rec->shift;
	u64 bit = ((u64)b->index << shift) >> bm->gate.shift;
	u64 end = min_t(u64, ((u64)b->index + 1) << shift,
			bm->map->geo.size >> SECTOR_SHIFT);

	end = ((end - 1) >> bm->gate.shift) + 1;
	while (bit < end) {
		struct qcow2_piece *piece = qcow2_get_piece(bm, bit);
		unsigned int i = bit % QCOW2_GATE_BITS;
		unsigned int n = min_t(u64, end - bit, QCOW2_GATE_BITS - i);
		unsigned int k;

		bit += n;
		if (!piece)
			continue;
		for (k = i; k < i + n; k++) {
			unsigned long *word = piece->words + k / BITS_PER_LONG;

			WRITE_ONCE(*word, *word & ~BIT(k % BITS_PER_LONG));
		}
		if (!bitmap_empty(piece->words, QCOW2_GATE_BITS))
			continue;
		RCU_INIT_POINTER(bm->gate.pieces[(bit - 1) / QCOW2_GATE_BITS],
				 NULL);
		qcow2_account_piece(bm, -1);
		call_rcu(&piece->rcu, qcow2_piece_free);
	}
}

/*----------------------------------------------------------------
 * Blocks in core
 *----------------------------------------------------------------
 */

static void *qcow2_bits_pool_alloc(gfp_t gfp, void *pool_data)
{
	struct qcow2_bitmaps *bm = pool_data;
	struct qcow2_bits *b = kmalloc(sizeof(*b), gfp);

	if (!b)
		return NULL;
	b->exact = kmalloc(qcow2_bits_bytes(bm), gfp);
	b->durable = kmalloc(qcow2_bits_bytes(bm), gfp);
	if (b->exact && b->durable)
		return b;
	kfree(b->exact);
	kfree(b->durable);
	kfree(b);
	return NULL;
}

static void qcow2_bits_pool_free(void *element, void *pool_data)
{
	struct qcow2_bits *b = element;

	kfree(b->exact);
	kfree(b->durable);
	kfree(b);
}

static void qcow2_account_bits(struct qcow2_bitmaps *bm, long n)
{
	unsigned long flags;

	spin_lock_irqsave(&bm->map->lock, flags);
	qcow2_add_bytes(bm->map, n * (long)qcow2_bits_memory(bm));
	spin_unlock_irqrestore(&bm->map->lock, flags);
}

/* A block that is in core, which stays until it is unpinned; or NULL */
static struct qcow2_bits *qcow2_pin_bits(struct qcow2_bitmaps *bm,
					 struct qcow2_record *rec, u64 index)
{
	struct qcow2_bits *b;

	spin_lock_irq(&bm->lock);
	b = qcow2_find_bits(rec, index);
	if (b)
		b->users++;
	spin_unlock_irq(&bm->lock);
	return b;
}

/* Row 1, if need be.  Sets @bits to the block, pinned.  0 or a negative errno. */
static int qcow2_load_bits(struct qcow2_bitmaps *bm, struct qcow2_record *rec,
			   u64 index, struct qcow2_bits **bits)
{
	struct qcow2_bits *b;
	int r = 0;

	*bits = qcow2_pin_bits(bm, rec, index);
	if (*bits)
		return 0;

	/*
	 * One after the other: what is read here must not be older than what somebody
	 * else has read, changed and dropped meanwhile.
	 */
	mutex_lock(&bm->loading);
	*bits = qcow2_pin_bits(bm, rec, index);
	if (*bits)
		goto out;
	qcow2_cache_take_room(bm->cache, qcow2_bits_memory(bm));
	b = mempool_alloc(&bm->blocks, GFP_NOIO);
	b->rec = rec;
	b->index = index;
	INIT_LIST_HEAD(&b->lru);
	INIT_LIST_HEAD(&b->todo);
	b->users = 1;
	b->rounds = 0;
	b->writing = false;
	b->loose = false;
	b->unsure = false;
	b->ahead_first = 0;
	b->ahead_end = 0;
	b->new_first = 0;
	b->new_end = 0;
	b->tried = 0;
	b->status = BLK_STS_OK;
	r = qcow2_mdio_rw(bm->io, REQ_OP_READ, qcow2_bits_offset(bm, b),
			  b->exact, qcow2_bits_bytes(bm));
	if (r) {
		DMERR_LIMIT("%s: cannot read a bitmap at %#llx: %d", bm->io->name,
			    (unsigned long long)qcow2_bits_offset(bm, b), r);
	} else {
		memcpy(b->durable, b->exact, qcow2_bits_bytes(bm));
		r = xa_err(xa_store_irq(&rec->blocks, index, b, GFP_NOIO));
	}
	if (r) {
		mempool_free(b, &bm->blocks);
		qcow2_account_bits(bm, -1);
		goto out;
	}
	spin_lock_irq(&bm->lock);
	/* qcow2_bitmaps_pass() may have found it, and moved it there, already. */
	list_move_tail(&b->lru, &bm->lru);
	spin_unlock_irq(&bm->lock);
	*bits = b;
out:
	mutex_unlock(&bm->loading);
	return r;
}

/* Nothing on disk depends on what is in core of it, and nobody works with it. */
static bool qcow2_bits_idle(const struct qcow2_bits *b)
{
	return !b->users && !b->rounds && !b->writing && !b->loose &&
	       !b->unsure && list_empty(&b->todo);
}

unsigned long qcow2_bitmaps_drop(struct qcow2_bitmaps *bm, unsigned long nr)
{
	struct qcow2_bits *b, *next;
	unsigned long dropped = 0;
	LIST_HEAD(gone);

	spin_lock_irq(&bm->lock);
	list_for_each_entry_safe(b, next, &bm->lru, lru) {
		if (dropped == nr)
			break;
		if (!qcow2_bits_idle(b) ||
		    memcmp(b->exact, b->durable, qcow2_bits_bytes(bm)))
			continue;
		qcow2_close_gate(bm, b);
		xa_erase(&b->rec->blocks, b->index);
		list_move(&b->lru, &gone);
		dropped++;
	}
	/* What is left can go when it has been taken back, whoever uses it. */
	if (!dropped)
		bm->used = false;
	spin_unlock_irq(&bm->lock);
	list_for_each_entry_safe(b, next, &gone, lru) {
		mempool_free(b, &bm->blocks);
		qcow2_account_bits(bm, -1);
	}
	if (!dropped && bm->count)
		mod_delayed_work(bm->wq, &bm->idle, 0);
	return dropped;
}

/*----------------------------------------------------------------
 * Requests
 *----------------------------------------------------------------
 */

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

static struct qcow2_bits *qcow2_range_bits(struct qcow2_bitmaps *bm,
					   struct qcow2_record *rec,
					   sector_t sector)
{
	return qcow2_find_bits(rec, sector >> rec->shift >>
				    qcow2_bits_shift(bm));
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

/* Have all words in a range of them, which is empty if both are the same, that have these bits. */
static void qcow2_widen(u32 *first, u32 *end, u32 bit, u32 bit_end)
{
	u32 from = bit / BITS_PER_LONG, to = (bit_end - 1) / BITS_PER_LONG + 1;
	bool empty = *first == *end;

	*first = empty ? from : min(*first, from);
	*end = empty ? to : max(*end, to);
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

static void qcow2_kick_markers(struct qcow2_bitmaps *bm)
{
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(bm->markers); i++)
		queue_work(bm->wq, &bm->markers[i].work);
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

/*
 * Most of those who waited lately do so again, or half of them, for there are two
 * rounds.  Any context.
 */
static bool qcow2_crowd_is_back(struct qcow2_bitmaps *bm)
{
	unsigned int waiting = READ_ONCE(bm->nr_waiting);
	unsigned int crowd = READ_ONCE(bm->crowd);

	crowd -= crowd / 32;
	return 2 * waiting >= crowd ||
	       waiting + READ_ONCE(bm->nr_served) >= crowd;
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

/*----------------------------------------------------------------
 * Marks
 *----------------------------------------------------------------
 */

/*
 * Take blocks that are to be written; they are the caller's.  Of one that is just being
 * written that is for whoever ends that.  The lock is held.
 */
static void qcow2_take_todo(struct qcow2_bitmaps *bm, struct qcow2_marker *m)
{
	struct qcow2_bits *b, *next;

	m->nr = 0;
	if (bm->paused)
		return;
	list_for_each_entry_safe(b, next, &bm->todo, todo) {
		if (b->writing)
			continue;
		if (m->nr == QCOW2_MARK_WAVE)
			break;
		list_del_init(&b->todo);
		b->writing = true;
		b->rounds++;
		m->marks[m->nr++] = (struct qcow2_mark){ .bits = b };
	}
}

/* There is memory for one block at least; others have to come later. */
static void qcow2_get_buffers(struct qcow2_bitmaps *bm, struct qcow2_marker *m,
			      bool marks)
{
	unsigned int i, nr = m->nr;

	for (i = 0; i < nr; i++) {
		m->marks[i].buf = mempool_alloc(&bm->buffers, i ?
						GFP_NOWAIT | __GFP_NOWARN :
						GFP_NOIO);
		if (!m->marks[i].buf)
			break;
	}
	m->nr = i;
	spin_lock_irq(&bm->lock);
	for (; i < nr; i++) {
		struct qcow2_bits *b = m->marks[i].bits;

		b->writing = false;
		if (!marks)
			continue;
		b->rounds--;
		if (list_empty(&b->todo))
			list_add_tail(&b->todo, &bm->todo);
	}
	spin_unlock_irq(&bm->lock);
}

/* What a mark writes */
static void qcow2_fill_mark(struct qcow2_bitmaps *bm, struct qcow2_mark *mark)
{
	struct qcow2_bits *b = mark->bits;
	unsigned long *to = mark->buf;
	const unsigned long *exact = (unsigned long *)b->exact;
	unsigned int i;

	memcpy(to, b->durable, qcow2_bits_bytes(bm));
	for (i = b->new_first; i < b->new_end; i++)
		to[i] |= exact[i];
	mark->first = b->new_first;
	mark->end = b->new_end;
	if (b->ahead_first != b->ahead_end) {
		qcow2_bits_set(mark->buf, b->ahead_first,
			       b->ahead_end - b->ahead_first);
		qcow2_widen(&mark->first, &mark->end, b->ahead_first,
			    b->ahead_end);
		b->loose = true;
	}
}

/* Write what is in the buffers. */
static void qcow2_write_marks(struct qcow2_bitmaps *bm, struct qcow2_marker *m)
{
	struct qcow2_ios ios;
	struct blk_plug plug;
	unsigned int i;

	qcow2_ios_init(&ios);
	blk_start_plug(&plug);
	for (i = 0; i < m->nr; i++) {
		struct qcow2_mark *mark = m->marks + i;

		qcow2_mdio_start(bm->io, &ios, &mark->error, REQ_OP_WRITE,
				 qcow2_bits_offset(bm, mark->bits), mark->buf,
				 qcow2_bits_bytes(bm));
	}
	blk_finish_plug(&plug);
	qcow2_ios_wait(&ios);
	for (i = 0; i < m->nr; i++)
		if (qcow2_error_get(&m->marks[i].error))
			DMERR_LIMIT("%s: cannot write a bitmap at %#llx",
				    bm->io->name, (unsigned long long)
				    qcow2_bits_offset(bm, m->marks[i].bits));
}

/* 0, or a negative errno, and nothing is certain any more. */
static int qcow2_flush_marks(struct qcow2_bitmaps *bm)
{
	int r = qcow2_mdio_flush(bm->io);

	if (r) {
		DMERR("%s: cannot flush the metadata device: %d", bm->io->name, r);
		qcow2_mode_fail(bm->health);
	}
	return r;
}

void qcow2_bitmaps_arm(struct qcow2_bitmaps *bm)
{
	mod_delayed_work(bm->wq, &bm->idle, QCOW2_IDLE_PERIOD);
}

/* Does what is on disk of a block have to be written again?  The lock is held. */
static void qcow2_set_unsure(struct qcow2_bitmaps *bm, struct qcow2_bits *b,
			     bool unsure)
{
	WRITE_ONCE(bm->nr_unsure, bm->nr_unsure + unsure - b->unsure);
	b->unsure = unsure;
}

/* Row 5, or 6 */
static void qcow2_marked(struct qcow2_bitmaps *bm, struct qcow2_mark *mark,
			 unsigned long round, blk_status_t status)
{
	unsigned long *durable = (unsigned long *)mark->bits->durable;
	const unsigned long *written = mark->buf;
	struct qcow2_bits *b = mark->bits;
	unsigned int i;

	b->rounds--;
	if (!b->rounds)
		b->ahead_first = b->ahead_end;
	b->tried = round;
	b->status = status;
	if (status) {
		qcow2_set_unsure(bm, b, true);
		return;
	}
	for (i = mark->first; i < mark->end; i++)
		durable[i] |= written[i];
	/* All that has been asked for is durable, if nobody has come since. */
	if (!b->rounds && list_empty(&b->todo) && !b->unsure)
		b->new_first = b->new_end;
}

static void qcow2_gather(struct qcow2_bitmaps *bm)
{
	u32 ns = min_t(u32, READ_ONCE(bm->round_ns) / QCOW2_GATHER_PART,
		       QCOW2_GATHER_MOST);

	if (!qcow2_crowd_is_back(bm))
		wait_event_hrtimeout(bm->gather, qcow2_crowd_is_back(bm),
				     ns_to_ktime(ns));
}

static void qcow2_marker_worker(struct work_struct *work)
{
	struct qcow2_marker *m = container_of(work, struct qcow2_marker, work);
	struct qcow2_bitmaps *bm = m->bm;
	unsigned int served, crowd, unsure;
	unsigned long round;
	u64 begun;
	u32 took;
	LIST_HEAD(waiters);
	unsigned int i;
	bool more, failing;
	int r = 0;

	qcow2_gather(bm);
	spin_lock_irq(&bm->lock);
	qcow2_take_todo(bm, m);
	if (!m->nr) {
		spin_unlock_irq(&bm->lock);
		return;
	}
	bm->nr_rounds++;
	spin_unlock_irq(&bm->lock);
	qcow2_get_buffers(bm, m, true);

	/* Who comes from here on is served by another round. */
	spin_lock_irq(&bm->lock);
	round = ++bm->rounds;
	begun = ktime_get_ns();
	list_splice_init(&bm->waiters, &waiters);
	served = bm->nr_waiting;
	WRITE_ONCE(bm->nr_waiting, 0);
	WRITE_ONCE(bm->nr_served, bm->nr_served + served);
	/* It gets smaller slowly, for some are late. */
	crowd = bm->crowd - DIV_ROUND_UP(bm->crowd, 16);
	WRITE_ONCE(bm->crowd, max(crowd, bm->nr_served));
	for (i = 0; i < m->nr; i++)
		qcow2_fill_mark(bm, m->marks + i);
	spin_unlock_irq(&bm->lock);
	qcow2_write_marks(bm, m);

	spin_lock_irq(&bm->lock);
	for (i = 0; i < m->nr; i++)
		m->marks[i].bits->writing = false;
	more = !list_empty(&bm->todo);
	spin_unlock_irq(&bm->lock);
	if (more)
		qcow2_kick_markers(bm);
	r = qcow2_flush_marks(bm);

	spin_lock_irq(&bm->lock);
	unsure = bm->nr_unsure;
	for (i = 0; i < m->nr; i++)
		qcow2_marked(bm, m->marks + i, round,
			     r ? BLK_STS_IOERR :
			     qcow2_error_get(&m->marks[i].error));
	failing = !unsure && bm->nr_unsure;
	WRITE_ONCE(bm->nr_served, bm->nr_served - served);
	took = min_t(u64, ktime_get_ns() - begun, NSEC_PER_SEC);
	WRITE_ONCE(bm->round_ns, bm->round_ns / 4 * 3 + took / 4);
	bm->nr_rounds--;
	wake_up_all(&bm->quiet);
	spin_unlock_irq(&bm->lock);
	for (i = 0; i < m->nr; i++)
		mempool_free(m->marks[i].buf, &bm->buffers);
	/* A flush that has failed has been told with the mode. */
	if (failing && !r)
		qcow2_mode_event(bm->health);
	qcow2_bitmaps_arm(bm);
	/* Each looks for himself. */
	bm->map->wake(&waiters, 0);
}

/*----------------------------------------------------------------
 * Taking back
 *----------------------------------------------------------------
 */

/* Blocks that have something to be taken back, or that have to be written; the lock is held. */
static void qcow2_take_loose(struct qcow2_bitmaps *bm, struct qcow2_marker *m)
{
	struct qcow2_bits *b;

	m->nr = 0;
	list_for_each_entry(b, &bm->lru, lru) {
		if (m->nr == QCOW2_MARK_WAVE)
			break;
		if (!b->unsure &&
		    (!b->loose || !memcmp(b->exact, b->durable,
					  qcow2_bits_bytes(bm)))) {
			b->loose = false;
			continue;
		}
		b->writing = true;
		m->marks[m->nr++] = (struct qcow2_mark){ .bits = b };
	}
}

/* Row 7 */
static void qcow2_fill_taken(struct qcow2_bitmaps *bm, struct qcow2_mark *mark)
{
	struct qcow2_bits *b = mark->bits;
	unsigned int bytes = qcow2_bits_bytes(bm);
	const unsigned long *exact = (unsigned long *)b->exact;
	unsigned long *durable = (unsigned long *)b->durable;
	unsigned int i;

	memcpy(mark->buf, exact, bytes);
	for (i = 0; i < bytes / sizeof(long); i++) {
		bm->taken_back += hweight_long(durable[i] & ~exact[i]);
		durable[i] &= exact[i];
	}
}

/* One wave of it.  1 if there was nothing to be done, 0, or a negative errno. */
static int qcow2_take_wave(struct qcow2_bitmaps *bm)
{
	struct qcow2_marker *m = &bm->taker;
	unsigned int i;
	int r = 0;

	spin_lock_irq(&bm->lock);
	qcow2_take_loose(bm, m);
	spin_unlock_irq(&bm->lock);
	if (!m->nr)
		return 1;
	qcow2_get_buffers(bm, m, false);
	spin_lock_irq(&bm->lock);
	for (i = 0; i < m->nr; i++)
		qcow2_fill_taken(bm, m->marks + i);
	spin_unlock_irq(&bm->lock);
	qcow2_write_marks(bm, m);
	r = qcow2_flush_marks(bm);

	spin_lock_irq(&bm->lock);
	for (i = 0; i < m->nr; i++) {
		struct qcow2_bits *b = m->marks[i].bits;
		blk_status_t status = qcow2_error_get(&m->marks[i].error);
		unsigned int k;

		b->writing = false;
		qcow2_set_unsure(bm, b, r || status);
		if (b->unsure) {
			/* row 9 */
			if (!r)
				r = blk_status_to_errno(status);
			continue;
		}
		/* Row 8.  What had not been marked before is now. */
		b->loose = false;
		for (k = 0; k < qcow2_bits_bytes(bm) / sizeof(long); k++)
			((unsigned long *)b->durable)[k] |=
				((unsigned long *)m->marks[i].buf)[k];
	}
	spin_unlock_irq(&bm->lock);
	for (i = 0; i < m->nr; i++)
		mempool_free(m->marks[i].buf, &bm->buffers);
	return r;
}

static void qcow2_pause_marks(struct qcow2_bitmaps *bm, bool pause)
{
	spin_lock_irq(&bm->lock);
	bm->paused = pause;
	spin_unlock_irq(&bm->lock);
	if (pause)
		wait_event(bm->quiet, !READ_ONCE(bm->nr_rounds));
	else
		qcow2_kick_markers(bm);
}

int qcow2_bitmaps_sync(struct qcow2_bitmaps *bm)
{
	int r = 0;

	mutex_lock(&bm->taking);
	while (!r) {
		if (qcow2_mode(bm->health) == QCOW2_FAIL) {
			r = -EIO;
			break;
		}
		/* Marks wait for a wave, no more. */
		qcow2_pause_marks(bm, true);
		r = qcow2_take_wave(bm);
		qcow2_pause_marks(bm, false);
	}
	mutex_unlock(&bm->taking);
	return min(r, 0);
}

static void qcow2_idle_worker(struct work_struct *work)
{
	struct qcow2_bitmaps *bm = container_of(to_delayed_work(work),
						struct qcow2_bitmaps, idle);
	bool used;

	spin_lock_irq(&bm->lock);
	used = bm->used;
	bm->used = false;
	spin_unlock_irq(&bm->lock);
	if (qcow2_mode(bm->health) == QCOW2_FAIL)
		return;
	if (used || qcow2_bitmaps_sync(bm))
		qcow2_bitmaps_arm(bm);
}

/*----------------------------------------------------------------
 * Life
 *----------------------------------------------------------------
 */

void qcow2_bitmaps_forget(struct qcow2_bitmaps *bm)
{
	struct qcow2_bits *b, *next;
	unsigned int i, count;
	unsigned long p;
	LIST_HEAD(gone);

	/* Whoever looks for room, or for status, may be at it. */
	spin_lock_irq(&bm->lock);
	count = bm->count;
	WRITE_ONCE(bm->count, 0);
	list_splice_init(&bm->lru, &gone);
	INIT_LIST_HEAD(&bm->todo);
	for (i = 0; i < count; i++)
		xa_destroy(&bm->records[i].blocks);
	for (p = 0; bm->gate.pieces && p < bm->gate.nr_pieces; p++) {
		struct qcow2_piece *piece;

		piece = rcu_dereference_protected(bm->gate.pieces[p],
						  lockdep_is_held(&bm->lock));
		if (!piece)
			continue;
		RCU_INIT_POINTER(bm->gate.pieces[p], NULL);
		qcow2_account_piece(bm, -1);
		call_rcu(&piece->rcu, qcow2_piece_free);
	}
	bm->next = 0;
	bm->ahead = 0;
	bm->streak = 0;
	WRITE_ONCE(bm->nr_unsure, 0);
	spin_unlock_irq(&bm->lock);
	list_for_each_entry_safe(b, next, &gone, lru) {
		mempool_free(b, &bm->blocks);
		qcow2_account_bits(bm, -1);
	}
	for (i = 0; i < count; i++) {
		kvfree(bm->records[i].clusters);
		bm->records[i].clusters = NULL;
	}
}

bool qcow2_bitmaps_settle(struct qcow2_bitmaps *bm)
{
	unsigned int tries;
	int r = -EIO;

	cancel_delayed_work_sync(&bm->idle);
	for (tries = 0; tries < QCOW2_TAKE_TRIES && r; tries++)
		r = qcow2_bitmaps_sync(bm);
	cancel_delayed_work_sync(&bm->idle);
	flush_workqueue(bm->wq);
	return !r;
}

/* One bitmap: its table, and whether its clusters are its own */
static int qcow2_start_record(struct qcow2_bitmaps *bm,
			      const struct qcow2_geometry *geo,
			      const struct qcow2_bitmap *b, char **error)
{
	struct qcow2_record *rec = bm->records + bm->count;
	enum qcow2_fault fault;
	u32 i;
	int r;

	rec->shift = b->granularity_bits - SECTOR_SHIFT;
	rec->clusters = kvmalloc_array(b->table_size, sizeof(*rec->clusters),
				       GFP_KERNEL | __GFP_NOWARN);
	if (!rec->clusters) {
		*error = "Cannot allocate memory for a bitmap table";
		return -ENOMEM;
	}
	xa_init_flags(&rec->blocks, XA_FLAGS_LOCK_IRQ);
	bm->count++;
	r = qcow2_bitmap_read_table(bm->io, geo, b, rec->clusters, error);
	if (r)
		return r;
	fault = qcow2_alloc_use(bm->alloc, b->table_offset,
				(u64)b->table_size * 8);
	for (i = 0; !fault && i < b->table_size; i++)
		fault = qcow2_alloc_use(bm->alloc, (u64)rec->clusters[i] <<
					geo->cluster_bits,
					1ULL << geo->cluster_bits);
	if (fault) {
		*error = (char *)qcow2_fault_str(fault);
		return -EINVAL;
	}
	return 0;
}

static int qcow2_start_gate(struct qcow2_bitmaps *bm,
			    const struct qcow2_geometry *geo, char **error)
{
	u64 sectors = geo->size >> SECTOR_SHIFT;
	struct qcow2_gate *gate = &bm->gate;
	unsigned long nr;
	unsigned int i;

	gate->shift = bm->view ? bm->view->shift : 31;
	for (i = 0; i < bm->count; i++)
		gate->shift = min(gate->shift, bm->records[i].shift);
	while (((sectors - 1) >> gate->shift) / QCOW2_GATE_BITS >=
	       QCOW2_MAX_PIECES)
		gate->shift++;
	nr = ((sectors - 1) >> gate->shift) / QCOW2_GATE_BITS + 1;
	if (gate->pieces && nr == gate->nr_pieces)
		return 0;
	kvfree(gate->pieces);
	gate->nr_pieces = nr;
	gate->pieces = kvcalloc(nr, sizeof(*gate->pieces),
				GFP_KERNEL | __GFP_NOWARN);
	if (!gate->pieces) {
		*error = "Cannot allocate memory for the bitmaps";
		return -ENOMEM;
	}
	return 0;
}

/* Find what records, and get ready for it. */
static int qcow2_start_records(struct qcow2_bitmaps *bm,
			       const struct qcow2_geometry *geo, char **error)
{
	struct qcow2_recording *found;
	unsigned int i;
	int r;

	found = kmalloc(sizeof(*found), GFP_KERNEL);
	if (!found) {
		*error = "Cannot allocate memory for the bitmaps";
		return -ENOMEM;
	}
	r = qcow2_directory_read(bm->io, geo, found, error);
	if (!r && found->count) {
		enum qcow2_fault fault = qcow2_alloc_use(bm->alloc,
							 found->dir.offset,
							 found->dir.size);

		if (fault) {
			*error = (char *)qcow2_fault_str(fault);
			r = -EINVAL;
		}
	}
	for (i = 0; !r && i < found->count; i++)
		r = qcow2_start_record(bm, geo, found->bitmaps + i, error);
	kfree(found);
	return r;
}

int qcow2_bitmaps_start(struct qcow2_bitmaps *bm,
			const struct qcow2_geometry *geo, bool record,
			struct qcow2_view *view, char **error)
{
	/* Only a resume would end a wait for memory that is to be written to this device. */
	unsigned int noio = memalloc_noio_save();
	int r = 0;

	bm->view = view;
	if (record)
		r = qcow2_start_records(bm, geo, error);
	if (!r && (bm->count || view))
		r = qcow2_start_gate(bm, geo, error);
	if (r)
		qcow2_bitmaps_forget(bm);
	memalloc_noio_restore(noio);
	return r;
}

void qcow2_bitmaps_count(struct qcow2_bitmaps *bm,
			 struct qcow2_bitmap_counts *counts)
{
	unsigned int i;

	*counts = (struct qcow2_bitmap_counts){};
	for (i = 0; i < READ_ONCE(bm->count); i++) {
		unsigned long index = 0;
		struct qcow2_bits *b;

		do {
			spin_lock_irq(&bm->lock);
			b = xa_find(&bm->records[i].blocks, &index, ULONG_MAX,
				    XA_PRESENT);
			if (b) {
				counts->exact += memweight(b->exact,
							   qcow2_bits_bytes(bm));
				counts->durable += memweight(b->durable,
							     qcow2_bits_bytes(bm));
			}
			spin_unlock_irq(&bm->lock);
			index++;
			cond_resched();
		} while (b);
	}
	counts->unwritten = READ_ONCE(bm->nr_unsure);
	counts->waits = READ_ONCE(bm->waits);
	counts->taken_back = READ_ONCE(bm->taken_back);
}

static unsigned long qcow2_drop_blocks(void *arg, unsigned long nr)
{
	return qcow2_bitmaps_drop(arg, nr);
}

int qcow2_bitmaps_init(struct qcow2_bitmaps *bm)
{
	unsigned int i;
	int r;

	spin_lock_init(&bm->lock);
	mutex_init(&bm->loading);
	mutex_init(&bm->taking);
	init_waitqueue_head(&bm->quiet);
	init_waitqueue_head(&bm->gather);
	INIT_LIST_HEAD(&bm->todo);
	INIT_LIST_HEAD(&bm->lru);
	INIT_LIST_HEAD(&bm->waiters);
	INIT_DELAYED_WORK(&bm->idle, qcow2_idle_worker);
	for (i = 0; i < ARRAY_SIZE(bm->markers); i++) {
		bm->markers[i].bm = bm;
		INIT_WORK(&bm->markers[i].work, qcow2_marker_worker);
	}
	bm->wq = alloc_workqueue("dm-qcow2-bitmap", WQ_UNBOUND | WQ_MEM_RECLAIM,
				 0);
	if (!bm->wq)
		return -ENOMEM;
	r = mempool_init(&bm->blocks, QCOW2_BITS_RESERVE, qcow2_bits_pool_alloc,
			 qcow2_bits_pool_free, bm);
	if (!r)
		r = mempool_init_kmalloc_pool(&bm->buffers, QCOW2_MARK_RESERVE,
					      qcow2_bits_bytes(bm));
	if (r)
		return r;
	bm->cache->drop_arg = bm;
	bm->cache->drop_more = qcow2_drop_blocks;
	return 0;
}

void qcow2_bitmaps_exit(struct qcow2_bitmaps *bm)
{
	if (!bm->wq)
		return;
	cancel_delayed_work_sync(&bm->idle);
	destroy_workqueue(bm->wq);
	qcow2_bitmaps_forget(bm);
	/* for qcow2_piece_free() */
	rcu_barrier();
	kvfree(bm->gate.pieces);
	mempool_exit(&bm->buffers);
	mempool_exit(&bm->blocks);
}
