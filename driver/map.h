/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The map: what each unit of the device is, in core.
 *
 * With an external data file a guest offset is its own host offset, so that
 * the map holds no addresses but a two-bit state per unit (enum qcow2_state).
 * A unit is a cluster or, with extended L2 entries, a subcluster.
 *
 * States are cached in slices.  A slice is an L2 table or, where clusters are
 * larger than 64 KiB, 64 KiB of one; with extended L2 entries, 8 KiB of one.  The
 * directory has a slot per slice:
 *
 *	NULL		not loaded
 *	tagged value	loaded, all units are in the state in the tag and on
 *			disk: costs nothing but the slot
 *	pointer		a struct qcow2_slice
 *
 * What happens to a unit (the code names the rows):
 *
 *	row  state            event                           new state   block
 *	 1   unalloc., zero   first write begins              busy [1]
 *	 2   busy [1]         first write succeeds            data        dirty
 *	 3   busy [1]         first write fails               as before
 *	 4   unalloc., data   discarded, zeroes written       zero [2]    dirty
 *	 5   zero [2]         is to be discarded below        busy
 *	 6   busy             that has ended, or failed       zero
 *	 7   not in core      load; bad entries are busy      as on disk
 *	     tag              a slice is made of it           the same
 *	 8   in core          dropped, or suspend             not in core
 *
 *	[1] with data_file_raw it keeps its state, and others may write it, too
 *	[2] a hint may go with it: below, the space can be given back (struct
 *	    qcow2_trim); a discard of a unit that is zero changes nothing else
 *
 * and to a block, a piece of an L2 table that is written at once:
 *
 *	 9   any              rows 2, 4                       dirty
 *	10   dirty            a commit takes it               taken
 *	11   taken            is on stable storage            clean
 *	12   taken            could not be written            dirty, failed
 *
 * A block can be taken and dirty.  What is dirty or taken is not durable.  Rows 1
 * to 4 need a slice that is ready: with an L2 table, or a cluster for one.  To be
 * dropped it needs clean blocks, and nobody may work in it; what is dirty when a table
 * is removed is lost.
 *
 * Lookups run under rcu_read_lock() and take no lock.  All changes to slots
 * and states are made under the lock of the slice's bucket, which is taken
 * from any context (irqsave).  Lock order: bucket->lock, then map->lock.
 */
#ifndef DM_QCOW2_MAP_H
#define DM_QCOW2_MAP_H

#include <linux/bitops.h>
#include <linux/list.h>
#include <linux/rcupdate.h>
#include <linux/spinlock.h>
#include <linux/xarray.h>

#include "format.h"
#include "mdio.h"

#define QCOW2_MAX_SLICE_BYTES	65536U
/* 512 entries of 32 subclusters: 4 KiB of states */
#define QCOW2_EXT_SLICE_BYTES	8192U
#define QCOW2_MAX_BLOCKS	(QCOW2_MAX_SLICE_BYTES / QCOW2_BLOCK_BYTES)

#define QCOW2_UNITS_PER_WORD	(BITS_PER_LONG / 2)

struct qcow2_slice {
	/*
	 * Two bits per unit.  Written in whole words (WRITE_ONCE) under the
	 * bucket lock, read with READ_ONCE under that lock or RCU.
	 */
	unsigned long *words;
	unsigned long index;		/* slot; constant */
	/*
	 * Used since it was last looked at by qcow2_map_drop().  Written
	 * (WRITE_ONCE) by anyone who finds it clear, so that the line stays
	 * clean as long as nothing has to be dropped; bucket lock else.
	 */
	bool referenced;
	/*
	 * May be changed: there is an L2 table on disk, or a cluster is
	 * reserved for it, and the tables' clusters are known to be disjoint.
	 * Set under the bucket lock, never cleared; a reader that sees it
	 * clear asks for a reservation, so that no order is needed.
	 */
	bool ready;
	/* Some busy units are corrupt entries on disk; constant. */
	bool bad;
	/*
	 * Loaded before anyone asked for it: when somebody does, it is the next one's
	 * turn.  Cleared (WRITE_ONCE) by whoever that is, or by two of them.
	 */
	bool ahead;
	/*
	 * Low half: blocks that are dirty.  High half: blocks that are taken.
	 * Written under the bucket lock, before a unit's state becomes data;
	 * read without it after that state was seen (qcow2_range_durable()).
	 */
	u32 dirty;
	u16 failed;			/* dirty blocks that have failed; bucket lock */
	/*
	 * Blocks whose entries on disk are just what qcow2_l2_encode_block() makes
	 * of their states, so that they need not be read for a change; constant,
	 * for what it makes of them then is so, too.
	 */
	u16 exact;
	unsigned int pins;		/* struct qcow2_write that name it; bucket lock */
	struct qcow2_trim *trim;	/* that of map->trims, or NULL; bucket lock */
	union {
		/* On bucket->slices; bucket lock. */
		struct list_head node;
		/* On its way to qcow2_slice_free_rcu() */
		struct qcow2_map *map;
	};
	union {
		/* On map->dirty or with the commit, or empty; map->lock. */
		struct list_head dirty_node;
		struct rcu_head rcu;
	};
};

/*
 * Hints for the units of a slice that are zero: three bitmaps with a bit per unit.
 * @fresh: to be discarded below, but the block is dirty and has not been taken
 * since; @ready: it can be done as soon as the block is not taken (any more);
 * @done: this has been done.  A unit that is written leaves them all.  The bitmaps
 * are protected by the bucket lock.  It may outlive its slice.
 */
struct qcow2_trim {
	/* On map->trims_todo if @ready has bits, else empty; map->lock */
	struct list_head node;
	unsigned long index;		/* of the slice; constant */
	unsigned long *ready;		/* constant */
	unsigned long *done;		/* constant */
	unsigned long fresh[];
};

/*
 * Someone who works on busy units: a first write, or a discard on its way to
 * the data device.
 */
struct qcow2_write {
	struct list_head node;		/* bucket->writes; bucket lock */
	struct qcow2_slice *slice;	/* constant from here on, while it is listed */
	unsigned int first;		/* units of the slice */
	unsigned int last;
	enum qcow2_state prev;		/* what the units read as meanwhile */
	struct list_head waiters;	/* for map->wake(); bucket lock */
};

/*
 * Slices hash to buckets by their index.  A bucket's lock protects the slots
 * and states of its slices, and the lists.
 */
struct qcow2_bucket {
	spinlock_t lock;		/* see above */
	struct list_head writes;	/* struct qcow2_write */
	struct list_head loads;		/* struct qcow2_load, see cache.c */
	/* struct qcow2_slice; those at the head are looked at first */
	struct list_head slices;
	unsigned int nr_slices;		/* on @slices */
} ____cacheline_aligned_in_smp;

#define QCOW2_BUCKETS	64

struct qcow2_map {
	/* Constant after qcow2_map_init(): the hot path reads these. */
	unsigned int unit_shift;	/* log2 of sectors per unit */
	unsigned int slice_shift;	/* log2 of units per slice */
	unsigned int slice_mask;	/* units per slice - 1 */
	unsigned int block_shift;	/* log2 of units per block */
	unsigned long nr_slices;
	struct qcow2_slice __rcu **dir;
	struct qcow2_bucket *buckets;

	/*
	 * Numbers of changes to the map that were made, and that are on stable
	 * storage.  The device is clean if they are equal.  @changed is
	 * written under @lock, @durable by the commit worker alone; both are
	 * read anywhere (qcow2_map_clean()).
	 */
	unsigned long changed ____cacheline_aligned_in_smp;
	unsigned long durable;

	spinlock_t lock;		/* of what names it; nests in bucket locks */
	struct list_head dirty;		/* slices that no commit has taken; @lock */
	unsigned long nr_dirty;		/* slices with a dirty block; @lock */
	unsigned long nr_cached;	/* loaded slots; @lock */
	unsigned long nr_slice_structs;	/* struct qcow2_slice among them; @lock */
	u64 state_bytes;		/* memory for all of it; @lock */
	/* Constant: bytes, without directories, of all maps that share a limit, or NULL */
	atomic_long_t *total_bytes;
	unsigned long drops;		/* slices that were dropped; @lock */
	struct list_head trims_todo;	/* struct qcow2_trim; @lock */
	unsigned long nr_trims_todo;	/* on that list; @lock */
	/* Blocks that have failed; written by the commit worker (WRITE_ONCE) */
	unsigned long unwritten;
	/*
	 * struct qcow2_trim by index of the slice.  Changed under the slice's
	 * bucket lock; its own lock nests in that, and interrupts are off.
	 */
	struct xarray trims;
	atomic_t drop_hand;		/* bucket to look at next */

	/* Constant. */
	struct qcow2_geometry geo;
	unsigned int block_bytes;	/* on disk */
	unsigned int slice_bytes;	/* on disk */
	unsigned int slices_per_l2_shift;
	unsigned int entry_shift;	/* log2 of units per L2 entry */
	/* Who has its memory, and gives back what has been taken out */
	void *cache;
	void (*free_slice)(struct qcow2_map *map, struct qcow2_slice *slice);
	/* Has slice @index loaded some time.  Any context. */
	void (*load_ahead)(struct qcow2_map *map, unsigned long index);
	/*
	 * Lets those go on who have waited for something: 0, or a negative
	 * errno if it has failed.  Any context.
	 */
	void (*wake)(struct list_head *waiters, int error);
};

/*----------------------------------------------------------------
 * Lookup
 *----------------------------------------------------------------
 */

static inline struct qcow2_bucket *qcow2_bucket(struct qcow2_map *map,
						unsigned long index)
{
	return map->buckets + index % QCOW2_BUCKETS;
}

/* Tagged slots: see above. */
static inline struct qcow2_slice *qcow2_tag(enum qcow2_state state)
{
	return (struct qcow2_slice *)((unsigned long)state << 1 | 1);
}

static inline bool qcow2_is_tag(const struct qcow2_slice *slot)
{
	return (unsigned long)slot & 1;
}

static inline enum qcow2_state qcow2_tag_state(const struct qcow2_slice *slot)
{
	return (unsigned long)slot >> 1;
}

static inline enum qcow2_state qcow2_get_state(const unsigned long *words,
					       unsigned int i)
{
	return READ_ONCE(words[i / QCOW2_UNITS_PER_WORD]) >>
		2 * (i % QCOW2_UNITS_PER_WORD) & 3;
}

/*
 * Length of the run of equal states that begins at unit @i and ends at unit
 * @last at the latest.
 */
static inline unsigned int qcow2_words_run(const unsigned long *words,
					   unsigned int i, unsigned int last,
					   enum qcow2_state *state)
{
	unsigned int shift = i % QCOW2_UNITS_PER_WORD, run = 0, n, same;
	unsigned long word, pattern;

	word = READ_ONCE(words[i / QCOW2_UNITS_PER_WORD]) >> 2 * shift;
	*state = word & 3;
	pattern = (~0UL / 3) * *state;
	n = QCOW2_UNITS_PER_WORD - shift;
	for (;;) {
		same = word == pattern ? QCOW2_UNITS_PER_WORD :
					 __ffs(word ^ pattern) / 2;
		n = min(n, last - i + 1);
		if (same < n)
			return run + same;
		run += n;
		i += n;
		if (i > last)
			return run;
		word = READ_ONCE(words[i / QCOW2_UNITS_PER_WORD]);
		n = QCOW2_UNITS_PER_WORD;
	}
}

/* A slice is used that has not been for some time.  Under RCU; any context. */
void qcow2_touch(struct qcow2_map *map, struct qcow2_slice *slice);

/**
 * qcow2_is_data() - is all of a range data, and at hand?
 * @map: the map
 * @sector: first sector, inside the device
 * @nr: number of sectors, at least 1
 *
 * What most requests are about, and qcow2_lookup() would say in more words: if this
 * says no, that one is to be asked.  Any context; takes no lock and writes nothing.
 *
 * It is short enough not to be preempted, which is cheaper than rcu_read_lock(), and
 * what call_rcu() and synchronize_rcu() wait for just as well.
 */
static __always_inline bool qcow2_is_data(struct qcow2_map *map,
					  sector_t sector, unsigned int nr)
{
	const unsigned long pattern = (~0UL / 3) * QCOW2_DATA;
	u64 unit = sector >> map->unit_shift;
	unsigned int more = ((sector + nr - 1) >> map->unit_shift) - unit;
	unsigned int i = unit % QCOW2_UNITS_PER_WORD;
	unsigned long word = 0;
	struct qcow2_slice *slot;

	/* A slice has whole words. */
	if (i + more >= QCOW2_UNITS_PER_WORD)
		return false;
	rcu_read_lock_sched();
	slot = rcu_dereference_sched(map->dir[unit >> map->slice_shift]);
	/* An empty slot is like the tag of units that are unallocated. */
	BUILD_BUG_ON(QCOW2_UNALLOCATED);
	if (!((unsigned long)slot & ~7UL)) {
		if (qcow2_tag_state(slot) == QCOW2_DATA)
			word = pattern;
	} else if (likely(READ_ONCE(slot->referenced))) {
		word = READ_ONCE(slot->words[(unit & map->slice_mask) /
					     QCOW2_UNITS_PER_WORD]);
	}
	rcu_read_unlock_sched();
	return !((word ^ pattern) >> 2 * i << (BITS_PER_LONG - 2 - 2 * more));
}

/**
 * qcow2_lookup() - find the state of a range, as far as it is the same
 * @map: the map
 * @sector: first sector, inside the device
 * @nr: number of sectors, at least 1
 * @state: set to the state of the sectors of the run
 *
 * Returns the length of the run in sectors, 0 if the state of the first one is
 * not in core.  Any context; takes no lock and writes nothing.
 *
 * The states can change as soon as they are read.  A state of data is seen
 * only after the unit's bytes are on the data device.
 */
static inline unsigned int qcow2_lookup(struct qcow2_map *map, sector_t sector,
					unsigned int nr, enum qcow2_state *state)
{
	u64 first = sector >> map->unit_shift;
	u64 last = (sector + nr - 1) >> map->unit_shift;
	unsigned int mask = (1U << map->slice_shift) - 1;
	u64 unit = first;

	rcu_read_lock();
	do {
		u64 end = min(last, unit | mask);
		struct qcow2_slice *slot;
		enum qcow2_state s;
		unsigned int run;

		slot = rcu_dereference(map->dir[unit >> map->slice_shift]);
		if (!slot)
			break;
		if (qcow2_is_tag(slot)) {
			s = qcow2_tag_state(slot);
			run = end - unit + 1;
		} else {
			if (unlikely(!READ_ONCE(slot->referenced)))
				qcow2_touch(map, slot);
			run = qcow2_words_run(slot->words, unit & mask,
					      end & mask, &s);
		}
		if (unit == first)
			*state = s;
		else if (s != *state || s == QCOW2_BUSY)
			/* busy: each slice may have a reason of its own */
			break;
		unit += run;
		if (unit <= end)
			break;
	} while (unit <= last);
	rcu_read_unlock();

	if (unit > last)
		return nr;
	if (unit == first)
		return 0;
	return (unit << map->unit_shift) - sector;
}

/**
 * qcow2_map_clean() - is every change to the map on stable storage?
 * @map: the map
 *
 * Any context.  Covers all changes of which the caller knows, that is, those
 * whose write was acknowledged before the caller was asked to flush: it cannot
 * but see a @changed that counts them, and a @durable equal to that one covers
 * them too, whichever of the two is read first.
 */
static inline bool qcow2_map_clean(struct qcow2_map *map)
{
	return READ_ONCE(map->durable) == READ_ONCE(map->changed);
}

/* The blocks of units @first to @last, as the low half of slice->dirty */
static inline u32 qcow2_blocks(struct qcow2_map *map, unsigned int first,
			       unsigned int last)
{
	return GENMASK(last >> map->block_shift, first >> map->block_shift);
}

/*
 * The blocks of a slice that can be exact: not the one in which the device ends, for
 * the entries behind that are not ours.
 */
static inline u16 qcow2_exact_blocks(const struct qcow2_map *map,
				     unsigned long index)
{
	u64 first = (u64)index << map->slice_shift;
	u64 end = map->geo.size >> (map->unit_shift + SECTOR_SHIFT);
	unsigned int n = BIT(map->slice_shift - map->block_shift);
	u16 blocks = GENMASK(n - 1, 0);

	if (end < first + BIT(map->slice_shift))
		blocks &= BIT((end - first) >> map->block_shift) - 1;
	return blocks;
}

/**
 * qcow2_range_durable() - are the L2 entries of a range on stable storage?
 * @map: the map
 * @sector: first sector
 * @nr: number of sectors
 *
 * For a range that qcow2_lookup() has just called data.  Any context.
 */
static inline bool qcow2_range_durable(struct qcow2_map *map, sector_t sector,
				       unsigned int nr)
{
	u64 unit = sector >> map->unit_shift;
	u64 last = (sector + nr - 1) >> map->unit_shift;
	unsigned int mask = (1U << map->slice_shift) - 1;
	bool durable = true;

	/*
	 * The write that made it data need not have been acknowledged yet, so
	 * order what follows after the look at the state; pairs with smp_wmb()
	 * in qcow2_mark_dirty().
	 */
	smp_rmb();
	if (qcow2_map_clean(map))
		return true;
	rcu_read_lock();
	for (; durable && unit <= last; unit = (unit | mask) + 1) {
		struct qcow2_slice *slot;
		u32 blocks;

		slot = rcu_dereference(map->dir[unit >> map->slice_shift]);
		if (!slot || qcow2_is_tag(slot))
			continue;
		blocks = qcow2_blocks(map, unit & mask, min(last, unit | mask) & mask);
		if (READ_ONCE(slot->dirty) & (blocks | blocks << QCOW2_MAX_BLOCKS))
			durable = false;
	}
	rcu_read_unlock();
	return durable;
}

/*----------------------------------------------------------------
 * Life; process context
 *----------------------------------------------------------------
 */

/**
 * qcow2_map_init() - make an empty map
 * @map: all zeros but for the two callbacks
 * @geo: checked with qcow2_geometry_check()
 * @block_bytes: unit of metadata I/O
 *
 * Returns 0 or -ENOMEM; qcow2_map_exit() is right after both.
 */
int qcow2_map_init(struct qcow2_map *map, const struct qcow2_geometry *geo,
		   unsigned int block_bytes);
void qcow2_map_exit(struct qcow2_map *map);

/*
 * Forget all states; what is dirty is lost.  Hints for discards stay, as far as
 * they do not depend on a commit.  Nobody changes the map meanwhile.
 */
void qcow2_map_forget(struct qcow2_map *map);

/* Bytes of the states of a slice, and of the whole of it */
static inline size_t qcow2_words_bytes(const struct qcow2_map *map)
{
	return (1U << map->slice_shift) / 4;
}

static inline unsigned long qcow2_slice_bytes(const struct qcow2_map *map)
{
	return sizeof(struct qcow2_slice) + qcow2_words_bytes(map);
}

static inline unsigned long qcow2_dir_bytes(const struct qcow2_map *map)
{
	return map->nr_slices * sizeof(*map->dir);
}

/* Memory of the map comes or goes; map->lock is held. */
static inline void qcow2_add_bytes(struct qcow2_map *map, long bytes)
{
	map->state_bytes += bytes;
	if (map->total_bytes)
		atomic_long_add(bytes, map->total_bytes);
}

/*
 * Take @nr slices out of core, at most, that are clean and were not used lately.
 * Returns how many it was.  Process context, no locks held.
 */
unsigned long qcow2_map_drop(struct qcow2_map *map, unsigned long nr);

/*
 * Forget hints that wait, of @nr slices at most.  Returns of how many it was.
 * Process context, no locks held.
 */
unsigned long qcow2_map_forget_trims(struct qcow2_map *map, unsigned long nr);

/* How much the two could do, more or less.  Any context. */
unsigned long qcow2_map_droppable(struct qcow2_map *map);

/*----------------------------------------------------------------
 * Changes; the caller holds the lock of the slice's bucket
 *----------------------------------------------------------------
 */

struct qcow2_slice *qcow2_slot(struct qcow2_map *map, unsigned long index);

/* Put a loaded slot into its place, or a struct into that of a tag. */
void qcow2_slot_publish(struct qcow2_map *map, unsigned long index,
			struct qcow2_slice *slot);

/*
 * The slice of units @unit to @last, if it can be changed and committed, and they
 * are all in @state; else NULL.
 */
struct qcow2_slice *qcow2_ready_slice(struct qcow2_map *map, u64 unit, u64 last,
				      enum qcow2_state state);

void qcow2_set_words(unsigned long *words, unsigned int first,
		     unsigned int last, enum qcow2_state state);

static inline void qcow2_set_states(struct qcow2_slice *slice,
				    unsigned int first, unsigned int last,
				    enum qcow2_state state)
{
	qcow2_set_words(slice->words, first, last, state);
}

/*
 * Note that units @first to @last are about to become data or zero.  Returns
 * true if nothing was dirty before, so that the caller has to arm the timer.
 */
bool qcow2_mark_dirty(struct qcow2_map *map, struct qcow2_slice *slice,
		      unsigned int first, unsigned int last);

/*
 * Begin and end to work on units, which qcow2_begin_write() makes busy unless
 * @shared is set: then others may work on them, too, they keep their state, and
 * nobody can wait for them.  Hints for them are forgotten.
 */
void qcow2_begin_write(struct qcow2_map *map, struct qcow2_write *w,
		       bool shared);
void qcow2_end_write(struct qcow2_map *map, struct qcow2_write *w,
		     bool shared);

/* Who works on a unit of a slot?  NULL if it is not busy any more. */
struct qcow2_write *qcow2_find_writer(struct qcow2_map *map,
				      unsigned long index, unsigned int i);

/*
 * A block that is dirty becomes taken (row 10).  @words gets its states; for
 * busy units what they were before: what makes them busy may be under way for
 * long, and must not keep an older change from getting to the disk.
 */
void qcow2_block_take(struct qcow2_map *map, struct qcow2_slice *slice,
		      unsigned int block, unsigned long *words);

/* A block that was taken is written (row 11), or is not (row 12). */
void qcow2_block_done(struct qcow2_map *map, struct qcow2_slice *slice,
		      unsigned int block, bool failed);

/*----------------------------------------------------------------
 * Hints for discards; the caller holds the lock of the slice's bucket
 *----------------------------------------------------------------
 */

size_t qcow2_trim_bytes(const struct qcow2_map *map);

/* Memory for qcow2_add_trim(), or NULL.  Does no I/O; process context. */
struct qcow2_trim *qcow2_trim_alloc(struct qcow2_map *map);

/*
 * Let the data device discard units that are zero, as soon as that is durable, and
 * unless it has done so already.  @changed: they have just become so, and their
 * blocks are dirty.  @trim comes from qcow2_trim_alloc(), for a slice that has
 * none, or is NULL.  Returns true if it was used.  *@todo is set if something can
 * be done at once.
 */
bool qcow2_add_trim(struct qcow2_map *map, struct qcow2_slice *slice,
		    unsigned int first, unsigned int last, bool changed,
		    struct qcow2_trim *trim, bool *todo);

/* Take hints out of core. */
void qcow2_free_trim(struct qcow2_map *map, struct qcow2_trim *trim);

/*
 * A FUA write has waited for a commit that has failed: has any of its entries?
 * Any context, without the lock.
 */
bool qcow2_range_failed(struct qcow2_map *map, sector_t sector, sector_t nr);

#endif /* DM_QCOW2_MAP_H */
