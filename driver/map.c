// SPDX-License-Identifier: GPL-2.0-only
/*
 * The map: directory, slices, states.  What its parts mean, and what may become
 * of what, is in map.h.
 */
#include <linux/log2.h>
#include <linux/mm.h>
#include <linux/sched.h>
#include <linux/slab.h>

#include "compat.h"
#include "map.h"

void qcow2_set_words(unsigned long *words, unsigned int first,
		     unsigned int last, enum qcow2_state state)
{
	unsigned long pattern = (~0UL / 3) * state;

	while (first <= last) {
		unsigned int shift = 2 * (first % QCOW2_UNITS_PER_WORD);
		unsigned int n = min_t(unsigned int, last - first + 1,
				       QCOW2_UNITS_PER_WORD - shift / 2);
		unsigned long *word = words + first / QCOW2_UNITS_PER_WORD;
		unsigned long mask = ~0UL >> (BITS_PER_LONG - 2 * n) << shift;

		WRITE_ONCE(*word, (*word & ~mask) | (pattern & mask));
		first += n;
	}
}

struct qcow2_slice *qcow2_slot(struct qcow2_map *map, unsigned long index)
{
	return rcu_dereference_protected(map->dir[index],
					 lockdep_is_held(&qcow2_bucket(map, index)->lock));
}

struct qcow2_slice *qcow2_ready_slice(struct qcow2_map *map, u64 unit, u64 last,
				      enum qcow2_state state)
{
	struct qcow2_slice *slice = qcow2_slot(map, unit >> map->slice_shift);
	unsigned int mask = (1U << map->slice_shift) - 1;
	enum qcow2_state seen;

	if (!slice || qcow2_is_tag(slice) || !slice->ready || slice->bad)
		return NULL;
	if (qcow2_words_run(slice->words, unit & mask, last & mask, &seen) !=
	    last - unit + 1 || seen != state)
		return NULL;
	return slice;
}

void qcow2_touch(struct qcow2_map *map, struct qcow2_slice *slice)
{
	WRITE_ONCE(slice->referenced, true);
	if (READ_ONCE(slice->ahead)) {
		WRITE_ONCE(slice->ahead, false);
		map->load_ahead(map, slice->index + 1);
	}
}

void qcow2_slot_publish(struct qcow2_map *map, unsigned long index,
			struct qcow2_slice *slot)
{
	struct qcow2_bucket *bucket = qcow2_bucket(map, index);
	struct qcow2_slice *old = qcow2_slot(map, index);
	bool tag = qcow2_is_tag(slot);

	if (!tag) {
		slot->trim = xa_load(&map->trims, index);
		list_add_tail(&slot->node, &bucket->slices);
		bucket->nr_slices++;
	}
	/* row 7 */
	rcu_assign_pointer(map->dir[index], slot);

	spin_lock(&map->lock);
	if (!old)
		map->nr_cached++;
	if (!tag)
		map->nr_slice_structs++;
	spin_unlock(&map->lock);
}

bool qcow2_mark_dirty(struct qcow2_map *map, struct qcow2_slice *slice,
		      unsigned int first, unsigned int last)
{
	bool was_clean;

	/* row 9 */
	WRITE_ONCE(slice->dirty, slice->dirty | qcow2_blocks(map, first, last));

	spin_lock(&map->lock);
	WRITE_ONCE(map->changed, map->changed + 1);
	was_clean = list_empty(&map->dirty);
	if (list_empty(&slice->dirty_node)) {
		list_add_tail(&slice->dirty_node, &map->dirty);
		map->nr_dirty++;
	}
	spin_unlock(&map->lock);

	/*
	 * Whoever sees the new state sees map->changed and the dirty bit; pairs
	 * with smp_rmb() in qcow2_range_durable().
	 */
	smp_wmb();
	return was_clean;
}

void qcow2_begin_write(struct qcow2_map *map, struct qcow2_write *w,
		       bool shared)
{
	struct qcow2_bucket *bucket = qcow2_bucket(map, w->slice->index);
	struct qcow2_trim *trim = w->slice->trim;
	unsigned int n = w->last - w->first + 1;

	w->slice->pins++;
	if (trim) {
		bitmap_clear(trim->fresh, w->first, n);
		bitmap_clear(trim->ready, w->first, n);
		bitmap_clear(trim->done, w->first, n);
	}
	if (shared)
		return;
	INIT_LIST_HEAD(&w->waiters);
	/* rows 1, 5 */
	qcow2_set_states(w->slice, w->first, w->last, QCOW2_BUSY);
	list_add_tail(&w->node, &bucket->writes);
}

void qcow2_end_write(struct qcow2_map *map, struct qcow2_write *w,
		     bool shared)
{
	w->slice->pins--;
	if (!shared)
		list_del(&w->node);
}

struct qcow2_write *qcow2_find_writer(struct qcow2_map *map,
				      unsigned long index, unsigned int i)
{
	struct qcow2_write *w;

	list_for_each_entry(w, &qcow2_bucket(map, index)->writes, node)
		if (w->slice->index == index && w->first <= i && i <= w->last)
			return w;
	return NULL;
}

/*----------------------------------------------------------------
 * Blocks
 *----------------------------------------------------------------
 */

/* There is something to be passed down; the bucket lock is held. */
static void qcow2_trim_todo(struct qcow2_map *map, struct qcow2_trim *trim)
{
	spin_lock(&map->lock);
	if (list_empty(&trim->node)) {
		list_add_tail(&trim->node, &map->trims_todo);
		map->nr_trims_todo++;
	}
	spin_unlock(&map->lock);
}

/* A block is taken (or, if @back is set, has not been written after all). */
static void qcow2_take_trim(struct qcow2_map *map, struct qcow2_trim *trim,
			    unsigned int block, bool back)
{
	unsigned int longs = BIT(map->block_shift) / BITS_PER_LONG;
	unsigned long *fresh = trim->fresh + block * longs;
	unsigned long *ready = trim->ready + block * longs;
	unsigned long any = 0;
	unsigned int i;

	for (i = 0; i < longs; i++) {
		if (back) {
			fresh[i] |= ready[i];
			ready[i] = 0;
		} else {
			ready[i] |= fresh[i];
			fresh[i] = 0;
			any |= ready[i];
		}
	}
	if (any)
		qcow2_trim_todo(map, trim);
}

void qcow2_block_take(struct qcow2_map *map, struct qcow2_slice *slice,
		      unsigned int block, unsigned long *words)
{
	struct qcow2_bucket *bucket = qcow2_bucket(map, slice->index);
	unsigned int nr_words = BIT(map->block_shift) / QCOW2_UNITS_PER_WORD;
	unsigned int start = block << map->block_shift;
	unsigned int end = start + BIT(map->block_shift) - 1;
	struct qcow2_write *w;

	memcpy(words, slice->words + block * nr_words, nr_words * sizeof(long));
	list_for_each_entry(w, &bucket->writes, node) {
		unsigned int first = max(w->first, start);
		unsigned int last = min(w->last, end);

		if (w->slice == slice && first <= last)
			qcow2_set_words(words, first - start, last - start,
					w->prev);
	}
	if (slice->trim)
		qcow2_take_trim(map, slice->trim, block, false);
	/* row 10 */
	WRITE_ONCE(slice->dirty, (slice->dirty & ~BIT(block)) |
				 BIT(block + QCOW2_MAX_BLOCKS));
}

void qcow2_block_done(struct qcow2_map *map, struct qcow2_slice *slice,
		      unsigned int block, bool failed)
{
	u32 dirty = slice->dirty & ~BIT(block + QCOW2_MAX_BLOCKS);
	bool before = slice->failed & BIT(block);

	/* row 12, or 11 */
	if (failed) {
		dirty |= BIT(block);
		slice->failed |= BIT(block);
		if (slice->trim)
			qcow2_take_trim(map, slice->trim, block, true);
		spin_lock(&map->lock);
		if (list_empty(&slice->dirty_node)) {
			list_add_tail(&slice->dirty_node, &map->dirty);
			map->nr_dirty++;
		}
		spin_unlock(&map->lock);
	} else {
		slice->failed &= ~BIT(block);
	}
	if (failed != before)
		WRITE_ONCE(map->unwritten, map->unwritten + (failed ? 1 : -1));
	WRITE_ONCE(slice->dirty, dirty);
}

bool qcow2_range_failed(struct qcow2_map *map, sector_t sector, sector_t nr)
{
	u64 unit = sector >> map->unit_shift;
	u64 last = (sector + nr - 1) >> map->unit_shift;
	unsigned int mask = (1U << map->slice_shift) - 1;
	bool failed = false;

	for (; !failed && unit <= last; unit = (unit | mask) + 1) {
		unsigned long index = unit >> map->slice_shift;
		struct qcow2_bucket *bucket = qcow2_bucket(map, index);
		struct qcow2_slice *slot;
		unsigned long flags;

		spin_lock_irqsave(&bucket->lock, flags);
		slot = qcow2_slot(map, index);
		if (slot && !qcow2_is_tag(slot))
			failed = slot->failed &
				 qcow2_blocks(map, unit & mask,
					      min(last, unit | mask) & mask);
		spin_unlock_irqrestore(&bucket->lock, flags);
	}
	return failed;
}

/*----------------------------------------------------------------
 * Hints for discards
 *----------------------------------------------------------------
 */

static unsigned int qcow2_trim_longs(const struct qcow2_map *map)
{
	return BITS_TO_LONGS(BIT(map->slice_shift));
}

size_t qcow2_trim_bytes(const struct qcow2_map *map)
{
	return struct_size_t(struct qcow2_trim, fresh, 3 * qcow2_trim_longs(map));
}

struct qcow2_trim *qcow2_trim_alloc(struct qcow2_map *map)
{
	unsigned int longs = qcow2_trim_longs(map);
	struct qcow2_trim *trim;

	/* Without memory for it a hint is forgotten. */
	trim = kzalloc(qcow2_trim_bytes(map),
		       GFP_NOIO | __GFP_NORETRY | __GFP_NOWARN);
	if (trim) {
		INIT_LIST_HEAD(&trim->node);
		trim->ready = trim->fresh + longs;
		trim->done = trim->ready + longs;
	}
	return trim;
}

bool qcow2_add_trim(struct qcow2_map *map, struct qcow2_slice *slice,
		    unsigned int first, unsigned int last, bool changed,
		    struct qcow2_trim *trim, bool *todo)
{
	unsigned int i, n;
	bool used = false;

	*todo = false;
	if (!slice->trim && trim) {
		trim->index = slice->index;
		used = !xa_is_err(xa_store(&map->trims, slice->index, trim,
					   GFP_ATOMIC | __GFP_NOWARN));
		if (used) {
			slice->trim = trim;
			spin_lock(&map->lock);
			qcow2_add_bytes(map, qcow2_trim_bytes(map));
			spin_unlock(&map->lock);
		}
	}
	trim = slice->trim;
	if (!trim)
		return false;
	/*
	 * What was known of units that were not zero is of a time before the
	 * slice was loaded, when somebody else may have used the image.
	 */
	if (changed) {
		bitmap_clear(trim->ready, first, last - first + 1);
		bitmap_clear(trim->done, first, last - first + 1);
	}
	/* A block is a number of whole words. */
	for (i = first; i <= last; i += n) {
		unsigned int block = i >> map->block_shift;
		unsigned int shift = i % BITS_PER_LONG, word = BIT_WORD(i);
		unsigned long bits;

		n = min_t(unsigned int, last - i + 1, BITS_PER_LONG - shift);
		bits = ~0UL >> (BITS_PER_LONG - n) << shift;
		bits &= ~(trim->done[word] | trim->ready[word]);
		if (!bits)
			continue;
		if (slice->dirty & BIT(block)) {
			trim->fresh[word] |= bits;
		} else {
			trim->ready[word] |= bits;
			*todo = true;
		}
	}
	if (*todo)
		qcow2_trim_todo(map, trim);
	return used;
}

void qcow2_free_trim(struct qcow2_map *map, struct qcow2_trim *trim)
{
	struct qcow2_slice *slot = qcow2_slot(map, trim->index);

	if (slot && !qcow2_is_tag(slot))
		slot->trim = NULL;
	xa_erase(&map->trims, trim->index);
	spin_lock(&map->lock);
	if (!list_empty(&trim->node)) {
		list_del(&trim->node);
		map->nr_trims_todo--;
	}
	qcow2_add_bytes(map, -(long)qcow2_trim_bytes(map));
	spin_unlock(&map->lock);
	kfree(trim);
}

unsigned long qcow2_map_forget_trims(struct qcow2_map *map, unsigned long nr)
{
	unsigned long n;

	for (n = 0; n < nr; n++) {
		struct qcow2_bucket *bucket;
		struct qcow2_trim *trim;
		unsigned long index = 0;

		spin_lock_irq(&map->lock);
		trim = list_first_entry_or_null(&map->trims_todo,
						struct qcow2_trim, node);
		if (trim)
			index = trim->index;
		spin_unlock_irq(&map->lock);
		if (!trim)
			break;
		bucket = qcow2_bucket(map, index);
		spin_lock_irq(&bucket->lock);
		trim = xa_load(&map->trims, index);
		if (trim)
			qcow2_free_trim(map, trim);
		spin_unlock_irq(&bucket->lock);
	}
	return n;
}

/*----------------------------------------------------------------
 * Memory
 *----------------------------------------------------------------
 */

static void qcow2_slice_free_rcu(struct rcu_head *head)
{
	struct qcow2_slice *slice = container_of(head, struct qcow2_slice, rcu);

	slice->map->free_slice(slice->map, slice);
}

/* May a slice go? */
static bool qcow2_slice_idle(const struct qcow2_slice *slice)
{
	return !slice->dirty && !slice->pins;
}

/* How many slices of a bucket are looked at under its lock, at most. */
#define QCOW2_DROP_SCAN		64

/* One turn of the hand: second chance for what was used since the last one. */
static unsigned long qcow2_bucket_drop(struct qcow2_map *map,
				       struct qcow2_bucket *bucket,
				       unsigned long nr)
{
	struct qcow2_slice *slice;
	unsigned long dropped = 0;
	unsigned int scan;
	unsigned long flags;

	spin_lock_irqsave(&bucket->lock, flags);
	scan = min_t(unsigned int, bucket->nr_slices, QCOW2_DROP_SCAN);
	while (scan-- && dropped < nr) {
		slice = list_first_entry(&bucket->slices, struct qcow2_slice,
					 node);
		if (!qcow2_slice_idle(slice) || READ_ONCE(slice->referenced)) {
			WRITE_ONCE(slice->referenced, false);
			list_move_tail(&slice->node, &bucket->slices);
			continue;
		}
		/* What has been done below need not be remembered for long. */
		if (slice->trim && list_empty(&slice->trim->node))
			qcow2_free_trim(map, slice->trim);
		/* row 8 */
		RCU_INIT_POINTER(map->dir[slice->index], NULL);
		list_del(&slice->node);
		bucket->nr_slices--;
		slice->map = map;
		call_rcu(&slice->rcu, qcow2_slice_free_rcu);
		dropped++;
	}
	if (dropped) {
		spin_lock(&map->lock);
		map->nr_cached -= dropped;
		map->nr_slice_structs -= dropped;
		qcow2_add_bytes(map, -(long)(dropped * qcow2_slice_bytes(map)));
		map->drops += dropped;
		spin_unlock(&map->lock);
	}
	spin_unlock_irqrestore(&bucket->lock, flags);
	return dropped;
}

unsigned long qcow2_map_drop(struct qcow2_map *map, unsigned long nr)
{
	unsigned long slices = READ_ONCE(map->nr_slice_structs);
	unsigned long visits = 2 * (slices / QCOW2_DROP_SCAN + QCOW2_BUCKETS);
	unsigned long dropped = 0, i;

	/*
	 * About twice around, if slices are spread evenly: what the first turn
	 * spared, the second takes.
	 */
	for (i = 0; i < visits && dropped < nr; i++) {
		unsigned int hand = atomic_inc_return(&map->drop_hand);

		dropped += qcow2_bucket_drop(map, map->buckets +
					     hand % QCOW2_BUCKETS,
					     nr - dropped);
		cond_resched();
	}
	return dropped;
}

unsigned long qcow2_map_droppable(struct qcow2_map *map)
{
	unsigned long structs = READ_ONCE(map->nr_slice_structs);
	unsigned long dirty = READ_ONCE(map->nr_dirty);

	return (structs > dirty ? structs - dirty : 0) +
	       READ_ONCE(map->nr_trims_todo);
}

/*----------------------------------------------------------------
 * Life
 *----------------------------------------------------------------
 */

int qcow2_map_init(struct qcow2_map *map, const struct qcow2_geometry *geo,
		   unsigned int block_bytes)
{
	unsigned int slice_bits = geo->ext_l2 ? ilog2(QCOW2_EXT_SLICE_BYTES) :
				  min_t(unsigned int, geo->cluster_bits,
					ilog2(QCOW2_MAX_SLICE_BYTES));
	unsigned int entry_bits = qcow2_l2_entry_bits(geo);
	unsigned int unit_bits = qcow2_unit_bits(geo);
	unsigned int i;

	map->geo = *geo;
	map->unit_shift = unit_bits - SECTOR_SHIFT;
	map->entry_shift = geo->cluster_bits - unit_bits;
	map->slice_bytes = 1U << slice_bits;
	map->slice_shift = slice_bits - entry_bits + map->entry_shift;
	map->slice_mask = BIT(map->slice_shift) - 1;
	map->slices_per_l2_shift = geo->cluster_bits - slice_bits;
	map->nr_slices = ((geo->size - 1) >> (map->slice_shift + unit_bits)) + 1;
	map->block_bytes = block_bytes;
	map->block_shift = ilog2(block_bytes) - entry_bits + map->entry_shift;
	spin_lock_init(&map->lock);
	INIT_LIST_HEAD(&map->dirty);
	INIT_LIST_HEAD(&map->trims_todo);
	xa_init(&map->trims);

	/* more than INT_MAX bytes are possible, but not to be had */
	map->dir = kvcalloc(map->nr_slices, sizeof(*map->dir),
			    GFP_KERNEL | __GFP_NOWARN);
	map->buckets = kvcalloc(QCOW2_BUCKETS, sizeof(*map->buckets), GFP_KERNEL);
	if (!map->dir || !map->buckets)
		return -ENOMEM;
	for (i = 0; i < QCOW2_BUCKETS; i++) {
		spin_lock_init(&map->buckets[i].lock);
		INIT_LIST_HEAD(&map->buckets[i].writes);
		INIT_LIST_HEAD(&map->buckets[i].loads);
		INIT_LIST_HEAD(&map->buckets[i].slices);
	}
	map->state_bytes = qcow2_dir_bytes(map);
	return 0;
}

/* What is ready stays; what waits for a commit waits for nothing. */
static void qcow2_forget_fresh(struct qcow2_map *map)
{
	struct qcow2_trim *trim;
	unsigned long index;

	xa_for_each(&map->trims, index, trim) {
		struct qcow2_bucket *bucket = qcow2_bucket(map, index);

		spin_lock_irq(&bucket->lock);
		/* The shrinker may have been faster. */
		trim = xa_load(&map->trims, index);
		if (trim) {
			bitmap_zero(trim->fresh, BIT(map->slice_shift));
			bitmap_zero(trim->done, BIT(map->slice_shift));
			if (list_empty(&trim->node))
				qcow2_free_trim(map, trim);
		}
		spin_unlock_irq(&bucket->lock);
		cond_resched();
	}
}

void qcow2_map_forget(struct qcow2_map *map)
{
	struct qcow2_slice *slot, *next;
	LIST_HEAD(slices);
	unsigned long i;

	for (i = 0; i < map->nr_slices; i++) {
		if (rcu_access_pointer(map->dir[i]) &&
		    qcow2_is_tag(rcu_access_pointer(map->dir[i])))
			RCU_INIT_POINTER(map->dir[i], NULL);
		cond_resched();
	}
	/* The shrinker may be at it, too. */
	for (i = 0; i < QCOW2_BUCKETS; i++) {
		struct qcow2_bucket *bucket = map->buckets + i;

		spin_lock_irq(&bucket->lock);
		/* row 8 */
		list_for_each_entry(slot, &bucket->slices, node)
			RCU_INIT_POINTER(map->dir[slot->index], NULL);
		spin_lock(&map->lock);
		map->nr_slice_structs -= bucket->nr_slices;
		qcow2_add_bytes(map, -(long)(bucket->nr_slices *
					   qcow2_slice_bytes(map)));
		spin_unlock(&map->lock);
		list_splice_init(&bucket->slices, &slices);
		bucket->nr_slices = 0;
		spin_unlock_irq(&bucket->lock);
		cond_resched();
	}
	spin_lock_irq(&map->lock);
	INIT_LIST_HEAD(&map->dirty);
	map->nr_dirty = 0;
	map->nr_cached = 0;
	spin_unlock_irq(&map->lock);
	map->changed = 0;
	map->durable = 0;
	map->unwritten = 0;
	qcow2_forget_fresh(map);
	if (list_empty(&slices))
		return;

	/* On removal, map() may be running for a last time. */
	synchronize_rcu();
	list_for_each_entry_safe(slot, next, &slices, node) {
		map->free_slice(map, slot);
		cond_resched();
	}
}

void qcow2_map_exit(struct qcow2_map *map)
{
	struct qcow2_trim *trim;
	unsigned long index;

	if (map->dir && map->buckets) {
		qcow2_map_forget(map);
		/* for qcow2_slice_free_rcu() */
		rcu_barrier();
		xa_for_each(&map->trims, index, trim)
			kfree(trim);
		xa_destroy(&map->trims);
	}
	kvfree(map->dir);
	kvfree(map->buckets);
}
