/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What of the map is in core: loading slices, and letting them go.
 *
 * Slices that are clean and that nobody works with can be dropped, to keep to
 * a limit or because the system needs memory; then hints for discards that wait.
 * Tagged slots stay.
 */
#ifndef DM_QCOW2_CACHE_H
#define DM_QCOW2_CACHE_H

#include <linux/mempool.h>

#include "commit.h"

struct shrinker;

struct qcow2_cache {
	/* Constant */
	struct qcow2_map *map;
	struct qcow2_mdio *io;
	struct qcow2_l1 *l1;
	struct qcow2_alloc *alloc;	/* NULL: read-only */
	struct qcow2_commit *commit;	/* NULL: read-only */
	struct qcow2_health *health;
	struct workqueue_struct *wq;	/* for @ahead */
	u64 limit;			/* of map->state_bytes */

	mempool_t slices;		/* struct qcow2_slice with their words */
	mempool_t buffers;		/* of slice_bytes */
	struct shrinker *shrinker;
	struct list_head node;		/* of all caches, under their lock */
	struct work_struct ahead;
	/* What it is to load.  A hint: who comes last is heard (WRITE_ONCE). */
	unsigned long ahead_index;
	unsigned long __percpu *misses;
	/* Drops other things than slices, if it is not NULL; process context */
	unsigned long (*drop_more)(void *arg, unsigned long nr);
	void *drop_arg;
};

/**
 * qcow2_cache_init() - get ready to load slices
 * @cache: all zeros but for the constant fields; @cache->limit is what was asked for
 *	(bytes), 0 for the default
 *
 * Returns 0 or -ENOMEM; qcow2_cache_exit() is right after both.  Process context.
 */
int qcow2_cache_init(struct qcow2_cache *cache);

/* Nothing is being loaded ahead any more.  Process context. */
void qcow2_cache_settle(struct qcow2_cache *cache);

/* Ends what calls from outside; to be called first. */
void qcow2_cache_stop(struct qcow2_cache *cache);

/* To be called after qcow2_map_exit(). */
void qcow2_cache_exit(struct qcow2_cache *cache);

/**
 * qcow2_cache_load() - get a slice into core
 * @cache: the cache
 * @index: slot
 * @waiter: is left with another worker that loads it just now
 *
 * Returns 0, a negative errno, or 1 if @waiter has been left: then map->wake() is
 * called for it.  Without @waiter that is -EBUSY.  What has been loaded can be
 * dropped again at any time.  Workqueue context.
 */
int qcow2_cache_load(struct qcow2_cache *cache, unsigned long index,
		     struct list_head *waiter);

/**
 * qcow2_cache_follow() - somebody had to wait for a slice: should the next one be loaded?
 * @cache: the cache
 * @index: the slice
 * @unit: the first unit of it that is wanted
 *
 * It should if somebody comes from the slice before.  From then on each of them has the next
 * one loaded when it is used for the first time.  Any context.
 */
void qcow2_cache_follow(struct qcow2_cache *cache, unsigned long index,
			unsigned int unit);

/* Make a struct qcow2_slice of a tagged slot, if it still is one.  Workqueue. */
void qcow2_cache_expand(struct qcow2_cache *cache, unsigned long index);

/*
 * Account for @bytes of memory that are not a slice's, and drop what there is too much of
 * then, if that can be.  Process context.
 */
void qcow2_cache_take_room(struct qcow2_cache *cache, unsigned long bytes);

/*
 * May hints for discards of one more slice use memory?  Drops slices if need be.  Process
 * context.
 */
bool qcow2_cache_has_room(struct qcow2_cache *cache);

#endif /* DM_QCOW2_CACHE_H */
