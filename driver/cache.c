// SPDX-License-Identifier: GPL-2.0-only
/*
 * What of the map is in core.
 */
#include <linux/device-mapper.h>
#include <linux/mm.h>
#include <linux/moduleparam.h>
#include <linux/mutex.h>
#include <linux/percpu.h>
#include <linux/slab.h>

#include "cache.h"
#include "compat.h"
#include "l2.h"
#include "trace.h"

#define DM_MSG_PREFIX "qcow2"

/* Slices that are kept in reserve, by a writer and by a reader */
#define QCOW2_SLICE_RESERVE	16
#define QCOW2_SLICE_READ_RESERVE 2
/* What the limit leaves for slices, at least. */
#define QCOW2_MIN_CACHE		(256U << 10)
/* What it is without one: states of 16 TiB at 64 KiB clusters */
#define QCOW2_DEFAULT_CACHE	(64U << 20)
/* Slices to drop at once: the search has its cost, too. */
#define QCOW2_DROP_BATCH	8

/* Of memory, for all devices together, unless cache_limit says otherwise */
#define QCOW2_TOTAL_SHARE	8

/*
 * Bytes of all devices, without their directories, which cannot be dropped; written
 * and read anywhere
 */
static atomic_long_t qcow2_total_bytes;

static unsigned long cache_limit;
module_param(cache_limit, ulong, 0644);
MODULE_PARM_DESC(cache_limit, "Bytes of memory for the maps of all devices (0: an eighth of memory)");

/*
 * All caches; whose turn it is comes first.  Who holds the lock may drop slices of any,
 * and waits for nothing else.
 */
static LIST_HEAD(qcow2_caches);
static DEFINE_MUTEX(qcow2_caches_lock);

/* A load under way; lives on the stack of the worker that does it. */
struct qcow2_load {
	struct list_head node;		/* bucket->loads; bucket lock */
	unsigned long index;
	struct list_head waiters;	/* bucket lock */
};

/*----------------------------------------------------------------
 * Memory
 *----------------------------------------------------------------
 */

static void *qcow2_slice_pool_alloc(gfp_t gfp, void *pool_data)
{
	struct qcow2_map *map = pool_data;
	struct qcow2_slice *slice = kmalloc(sizeof(*slice), gfp);

	if (!slice)
		return NULL;
	slice->words = kmalloc(qcow2_words_bytes(map), gfp);
	if (!slice->words) {
		kfree(slice);
		return NULL;
	}
	return slice;
}

static void qcow2_slice_pool_free(void *element, void *pool_data)
{
	struct qcow2_slice *slice = element;

	kfree(slice->words);
	kfree(slice);
}

/*
 * @gfp: GFP_NOIO, for writeback may be waiting for the bio that needs it; or GFP_NOWAIT.
 *
 * The former cannot fail: what the pool's reserve was used for gets clean by commits, which
 * need no slices, and no worker of those who do; then it is dropped by the shrinker,
 * or by the next one who looks for room.
 */
static struct qcow2_slice *qcow2_slice_alloc(struct qcow2_cache *cache,
					     unsigned long index, gfp_t gfp)
{
	struct qcow2_slice *slice = mempool_alloc(&cache->slices, gfp);

	if (!slice)
		return NULL;
	slice->index = index;
	slice->referenced = true;
	slice->ready = false;
	slice->bad = false;
	slice->ahead = false;
	slice->dirty = 0;
	slice->failed = 0;
	slice->exact = 0;
	slice->pins = 0;
	slice->trim = NULL;
	INIT_LIST_HEAD(&slice->node);
	INIT_LIST_HEAD(&slice->dirty_node);
	return slice;
}

static void qcow2_cache_free_slice(struct qcow2_map *map,
				   struct qcow2_slice *slice)
{
	struct qcow2_cache *cache = map->cache;

	mempool_free(slice, &cache->slices);
}

static unsigned long qcow2_cache_drop(struct qcow2_cache *cache,
				      unsigned long nr)
{
	unsigned long dropped = qcow2_map_drop(cache->map, nr);

	if (!dropped && cache->drop_more)
		dropped = cache->drop_more(cache->drop_arg, nr);
	return dropped ? dropped : qcow2_map_forget_trims(cache->map, nr);
}

static bool qcow2_account(struct qcow2_cache *cache, bool force)
{
	struct qcow2_map *map = cache->map;
	unsigned long bytes = qcow2_slice_bytes(map);
	unsigned long flags;
	bool ok;

	spin_lock_irqsave(&map->lock, flags);
	ok = force || map->state_bytes + bytes <= cache->limit;
	if (ok)
		qcow2_add_bytes(map, bytes);
	spin_unlock_irqrestore(&map->lock, flags);
	return ok;
}

static unsigned long qcow2_total_limit(void)
{
	unsigned long limit = READ_ONCE(cache_limit);

	return limit ? limit :
	       totalram_pages() / QCOW2_TOTAL_SHARE << PAGE_SHIFT;
}

/*
 * All devices together have more than they should: some of them lose slices, in turn.
 * Those that are used come back at once, and have others go then.
 */
static void qcow2_drop_total(void)
{
	unsigned long limit = qcow2_total_limit();
	struct qcow2_cache *cache, *first = NULL;

	mutex_lock(&qcow2_caches_lock);
	while (atomic_long_read(&qcow2_total_bytes) > limit) {
		cache = list_first_entry(&qcow2_caches, struct qcow2_cache,
					 node);
		/* Once around: what is dirty or in use has to stay. */
		if (cache == first)
			break;
		list_move_tail(&cache->node, &qcow2_caches);
		if (qcow2_map_droppable(cache->map) &&
		    qcow2_map_drop(cache->map, QCOW2_DROP_BATCH))
			first = NULL;
		else if (!first)
			first = cache;
	}
	mutex_unlock(&qcow2_caches_lock);
}

static bool qcow2_drop_for_room(struct qcow2_cache *cache)
{
	if (unlikely(atomic_long_read(&qcow2_total_bytes) > qcow2_total_limit()))
		qcow2_drop_total();
	while (!qcow2_account(cache, false))
		if (!qcow2_cache_drop(cache, QCOW2_DROP_BATCH))
			return false;
	return true;
}

void qcow2_cache_take_room(struct qcow2_cache *cache, unsigned long bytes)
{
	struct qcow2_map *map = cache->map;
	unsigned long flags;

	while (READ_ONCE(map->state_bytes) + bytes > cache->limit)
		if (!qcow2_cache_drop(cache, QCOW2_DROP_BATCH))
			break;
	spin_lock_irqsave(&map->lock, flags);
	qcow2_add_bytes(map, bytes);
	spin_unlock_irqrestore(&map->lock, flags);
}

bool qcow2_cache_has_room(struct qcow2_cache *cache)
{
	struct qcow2_map *map = cache->map;
	u64 bytes = qcow2_trim_bytes(map);

	if (READ_ONCE(map->state_bytes) + bytes > cache->limit)
		qcow2_map_drop(map, QCOW2_DROP_BATCH);
	return READ_ONCE(map->state_bytes) + bytes <= cache->limit;
}

/*
 * Account for one more slice.  If all that could go to make room for it is
 * dirty, have that written first.
 */
static void qcow2_get_room(struct qcow2_cache *cache)
{
	if (likely(qcow2_drop_for_room(cache)))
		return;
	if (cache->commit)
		qcow2_commit_now(cache->commit);
	/* It may be in use, or be dirty again: then the limit has to wait. */
	if (!qcow2_drop_for_room(cache))
		qcow2_account(cache, true);
}

/* No slice has come of it. */
static void qcow2_put_room(struct qcow2_cache *cache)
{
	struct qcow2_map *map = cache->map;
	unsigned long flags;

	spin_lock_irqsave(&map->lock, flags);
	qcow2_add_bytes(map, -(long)qcow2_slice_bytes(map));
	spin_unlock_irqrestore(&map->lock, flags);
}

static unsigned long qcow2_shrink_count(struct shrinker *shrinker,
					struct shrink_control *sc)
{
	struct qcow2_cache *cache = qcow2_shrinker_private(shrinker);

	return qcow2_map_droppable(cache->map);
}

static unsigned long qcow2_shrink_scan(struct shrinker *shrinker,
				       struct shrink_control *sc)
{
	struct qcow2_cache *cache = qcow2_shrinker_private(shrinker);
	unsigned long dropped = qcow2_cache_drop(cache, sc->nr_to_scan);

	return dropped ? dropped : SHRINK_STOP;
}

/*----------------------------------------------------------------
 * Loading
 *----------------------------------------------------------------
 */

static bool qcow2_slice_ready(struct qcow2_cache *cache, unsigned long index)
{
	return cache->alloc &&
	       qcow2_alloc_has_table(cache->alloc, index >>
				     cache->map->slices_per_l2_shift);
}

/*
 * Read a slice; @slot is set to the new content of its slot.  Impossible entries
 * become busy units of a slice that is marked bad; the result is still 0.
 */
static int qcow2_read_slice(struct qcow2_cache *cache, unsigned long index,
			    gfp_t gfp, struct qcow2_slice **slot)
{
	struct qcow2_map *map = cache->map;
	unsigned long sub = index & (BIT(map->slices_per_l2_shift) - 1);
	enum qcow2_state state;
	bool copied;
	u64 offset;
	void *buf;
	int r;

	r = qcow2_l1_table(cache->l1, index >> map->slices_per_l2_shift,
			   &offset, &copied);
	if (r)
		return r;
	if (!offset) {
		/*
		 * The commit worker may be creating the table just now, but
		 * not with entries of this slice: to have any, it must have
		 * been loaded.
		 */
		*slot = qcow2_tag(QCOW2_UNALLOCATED);
		trace_qcow2_load(cache->io->name, index, 0, 0);
		return 0;
	}

	*slot = qcow2_slice_alloc(cache, index, gfp);
	if (!*slot)
		return -ENOMEM;
	buf = mempool_alloc(&cache->buffers, gfp);
	if (!buf) {
		mempool_free(*slot, &cache->slices);
		return -ENOMEM;
	}
	offset += (u64)sub * map->slice_bytes;
	r = qcow2_mdio_rw(cache->io, REQ_OP_READ, offset, buf, map->slice_bytes);
	if (r) {
		DMERR_LIMIT("%s: cannot read the L2 table at %#llx: %d",
			    cache->io->name, (unsigned long long)offset, r);
		mempool_free(*slot, &cache->slices);
	} else if (qcow2_l2_decode_slice(map, cache->io->name, *slot, buf, &state)) {
		mempool_free(*slot, &cache->slices);
		*slot = qcow2_tag(state);
	} else {
		(*slot)->ready = qcow2_slice_ready(cache, index);
	}
	mempool_free(buf, &cache->buffers);
	trace_qcow2_load(cache->io->name, index, offset, r);
	return r;
}

/*
 * 0: the caller is to load it.  Else it is there already (-EEXIST), or somebody else loads it:
 * 1 if @waiter has been left there, -EBUSY without one.
 */
static int qcow2_load_begin(struct qcow2_cache *cache, struct qcow2_load *load,
			    struct list_head *waiter)
{
	struct qcow2_map *map = cache->map;
	struct qcow2_bucket *bucket = qcow2_bucket(map, load->index);
	struct qcow2_load *other;
	int r = 0;

	INIT_LIST_HEAD(&load->waiters);
	spin_lock_irq(&bucket->lock);
	if (rcu_access_pointer(map->dir[load->index]))
		r = -EEXIST;
	list_for_each_entry(other, &bucket->loads, node) {
		if (r || other->index != load->index)
			continue;
		if (waiter)
			list_add_tail(waiter, &other->waiters);
		r = waiter ? 1 : -EBUSY;
	}
	if (!r)
		list_add_tail(&load->node, &bucket->loads);
	spin_unlock_irq(&bucket->lock);
	return r;
}

/* @slot: what has come of it, or NULL; @r: for those who wait for it */
static void qcow2_load_end(struct qcow2_cache *cache, struct qcow2_load *load,
			   struct qcow2_slice *slot, int r)
{
	struct qcow2_map *map = cache->map;
	struct qcow2_bucket *bucket = qcow2_bucket(map, load->index);

	spin_lock_irq(&bucket->lock);
	if (slot)
		qcow2_slot_publish(map, load->index, slot);
	list_del(&load->node);
	spin_unlock_irq(&bucket->lock);
	map->wake(&load->waiters, r);
}

int qcow2_cache_load(struct qcow2_cache *cache, unsigned long index,
		     struct list_head *waiter)
{
	struct qcow2_load load = { .index = index };
	struct qcow2_slice *slot = NULL;
	int r;

	r = qcow2_load_begin(cache, &load, waiter);
	if (r)
		return r == -EEXIST ? 0 : r;
	this_cpu_inc(*cache->misses);
	qcow2_get_room(cache);
	r = qcow2_read_slice(cache, index, GFP_NOIO, &slot);
	if (r || qcow2_is_tag(slot))
		qcow2_put_room(cache);
	/* Before anyone can see the slice: no first write goes into it. */
	if (r == -EUCLEAN || (!r && !qcow2_is_tag(slot) && slot->bad))
		qcow2_mode_corrupt(cache->health);
	qcow2_load_end(cache, &load, r ? NULL : slot, r);
	return r;
}

/* Nobody waits for it yet, so it is worth neither memory that is short nor a commit. */
static void qcow2_ahead_worker(struct work_struct *work)
{
	struct qcow2_cache *cache = container_of(work, struct qcow2_cache,
						 ahead);
	struct qcow2_load load = { .index = READ_ONCE(cache->ahead_index) };
	struct qcow2_slice *slot = NULL;

	if (load.index >= cache->map->nr_slices ||
	    qcow2_load_begin(cache, &load, NULL))
		return;
	if (qcow2_drop_for_room(cache)) {
		if (qcow2_read_slice(cache, load.index,
				     GFP_NOWAIT | __GFP_NOWARN, &slot))
			slot = NULL;
		if (slot && !qcow2_is_tag(slot)) {
			slot->referenced = false;
			slot->ahead = true;
			/* When it is used it is found, and is said. */
			if (slot->bad) {
				mempool_free(slot, &cache->slices);
				slot = NULL;
			}
		}
		if (!slot || qcow2_is_tag(slot))
			qcow2_put_room(cache);
	}
	/* Who has come meanwhile looks for himself. */
	qcow2_load_end(cache, &load, slot, 0);
}

static void qcow2_load_ahead(struct qcow2_map *map, unsigned long index)
{
	struct qcow2_cache *cache = map->cache;

	WRITE_ONCE(cache->ahead_index, index);
	queue_work(cache->wq, &cache->ahead);
}

/* Who comes from the slice before does not begin far behind its start. */
#define QCOW2_FOLLOW_SHARE	16

void qcow2_cache_follow(struct qcow2_cache *cache, unsigned long index,
			unsigned int unit)
{
	struct qcow2_map *map = cache->map;

	if (index && rcu_access_pointer(map->dir[index - 1]) &&
	    unit <= map->slice_mask / QCOW2_FOLLOW_SHARE)
		qcow2_load_ahead(map, index + 1);
}

void qcow2_cache_expand(struct qcow2_cache *cache, unsigned long index)
{
	struct qcow2_map *map = cache->map;
	struct qcow2_bucket *bucket = qcow2_bucket(map, index);
	struct qcow2_slice *slice, *slot;

	slot = rcu_access_pointer(map->dir[index]);
	if (!slot || !qcow2_is_tag(slot))
		return;
	qcow2_get_room(cache);
	slice = qcow2_slice_alloc(cache, index, GFP_NOIO);
	spin_lock_irq(&bucket->lock);
	slot = qcow2_slot(map, index);
	if (slot && qcow2_is_tag(slot)) {
		qcow2_set_states(slice, 0, BIT(map->slice_shift) - 1,
				 qcow2_tag_state(slot));
		/* There is no table, or it has nothing but zeros there. */
		if (qcow2_tag_state(slot) == QCOW2_UNALLOCATED)
			slice->exact = qcow2_exact_blocks(map, index);
		slice->ready = qcow2_slice_ready(cache, index);
		qcow2_slot_publish(map, index, slice);
		slice = NULL;
	}
	spin_unlock_irq(&bucket->lock);

	if (slice) {
		mempool_free(slice, &cache->slices);
		qcow2_put_room(cache);
	}
}

/*----------------------------------------------------------------
 * Life
 *----------------------------------------------------------------
 */

int qcow2_cache_init(struct qcow2_cache *cache)
{
	struct qcow2_map *map = cache->map;
	bool writer = cache->commit;
	int r;

	map->cache = cache;
	map->free_slice = qcow2_cache_free_slice;
	map->load_ahead = qcow2_load_ahead;
	INIT_WORK(&cache->ahead, qcow2_ahead_worker);
	INIT_LIST_HEAD(&cache->node);
	cache->limit = cache->limit ?
		       max(cache->limit, map->state_bytes + QCOW2_MIN_CACHE) :
		       map->state_bytes + QCOW2_DEFAULT_CACHE;
	map->total_bytes = &qcow2_total_bytes;
	cache->misses = alloc_percpu(unsigned long);
	if (!cache->misses)
		return -ENOMEM;
	r = mempool_init(&cache->slices, writer ? QCOW2_SLICE_RESERVE :
						  QCOW2_SLICE_READ_RESERVE,
			 qcow2_slice_pool_alloc, qcow2_slice_pool_free, map);
	if (r)
		return r;
	r = mempool_init_kmalloc_pool(&cache->buffers, writer ? 2 : 1,
				      map->slice_bytes);
	if (r)
		return r;
	cache->shrinker = qcow2_shrinker_alloc(cache, qcow2_shrink_count,
					       qcow2_shrink_scan,
					       cache->io->name);
	if (!cache->shrinker)
		return -ENOMEM;
	mutex_lock(&qcow2_caches_lock);
	list_add_tail(&cache->node, &qcow2_caches);
	mutex_unlock(&qcow2_caches_lock);
	return 0;
}

void qcow2_cache_settle(struct qcow2_cache *cache)
{
	cancel_work_sync(&cache->ahead);
}

void qcow2_cache_stop(struct qcow2_cache *cache)
{
	/* Nobody knows of it if it never came to be there. */
	if (cache->node.next) {
		qcow2_cache_settle(cache);
		mutex_lock(&qcow2_caches_lock);
		list_del_init(&cache->node);
		mutex_unlock(&qcow2_caches_lock);
	}
	if (cache->shrinker)
		qcow2_shrinker_free(cache->shrinker);
	cache->shrinker = NULL;
}

void qcow2_cache_exit(struct qcow2_cache *cache)
{
	struct qcow2_map *map = cache->map;

	/* hints that never came to be passed down */
	if (map && map->total_bytes)
		atomic_long_sub(map->state_bytes - qcow2_dir_bytes(map),
				map->total_bytes);
	mempool_exit(&cache->buffers);
	mempool_exit(&cache->slices);
	free_percpu(cache->misses);
}
