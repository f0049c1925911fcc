// SPDX-License-Identifier: GPL-2.0-only
/*
 * Dirty bitmaps: what is in core of them, the gate and blocks of bits, and how they come and
 * go.  What the bits mean is in bitmap.h.
 */
#include <linux/mm.h>
#include <linux/slab.h>

#include "bitmap-internal.h"

#define DM_MSG_PREFIX "qcow2"

/* Blocks that are kept in reserve */
#define QCOW2_BITS_RESERVE	(2 * QCOW2_MAX_RECORDING)

/* The gate's granules are as large as is needed for it to have no more pieces. */
#define QCOW2_MAX_PIECES	BIT(17)
/* Bits of the gate that are looked at after a mark */
#define QCOW2_OPEN_MOST		128

static size_t qcow2_bits_memory(const struct qcow2_bitmaps *bm)
{
	return sizeof(struct qcow2_bits) + 2 * qcow2_bits_bytes(bm);
}

bool qcow2_bits_all(const u8 *bits, unsigned int first, unsigned int n)
{
	if (n == 1)
		return bits[first / 8] & BIT(first % 8);
	return find_next_zero_bit_le(bits, first + n, first) >= first + n;
}

void qcow2_bits_set(u8 *bits, unsigned int first, unsigned int n)
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

u64 qcow2_bits_offset(struct qcow2_bitmaps *bm, const struct qcow2_bits *b)
{
	unsigned int bits = bm->map->geo.cluster_bits;
	u64 at = (u64)b->index * qcow2_bits_bytes(bm);

	return ((u64)b->rec->clusters[at >> bits] << bits) +
	       (at & ((1ULL << bits) - 1));
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

void qcow2_open_gate(struct qcow2_bitmaps *bm, sector_t sector, sector_t nr)
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

void qcow2_empty_gate(struct qcow2_bitmaps *bm)
{
	unsigned long p;

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
}

int qcow2_start_gate(struct qcow2_bitmaps *bm,
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

int qcow2_bits_pool_init(struct qcow2_bitmaps *bm)
{
	return mempool_init(&bm->blocks, QCOW2_BITS_RESERVE, qcow2_bits_pool_alloc,
			    qcow2_bits_pool_free, bm);
}

static void qcow2_account_bits(struct qcow2_bitmaps *bm, long n)
{
	unsigned long flags;

	spin_lock_irqsave(&bm->map->lock, flags);
	qcow2_add_bytes(bm->map, n * (long)qcow2_bits_memory(bm));
	spin_unlock_irqrestore(&bm->map->lock, flags);
}

void qcow2_free_blocks(struct qcow2_bitmaps *bm, struct list_head *gone)
{
	struct qcow2_bits *b, *next;

	list_for_each_entry_safe(b, next, gone, lru) {
		mempool_free(b, &bm->blocks);
		qcow2_account_bits(bm, -1);
	}
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

int qcow2_load_bits(struct qcow2_bitmaps *bm, struct qcow2_record *rec,
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
	qcow2_free_blocks(bm, &gone);
	if (!dropped && bm->count)
		mod_delayed_work(bm->wq, &bm->idle, 0);
	return dropped;
}
