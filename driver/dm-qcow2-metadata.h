/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Metadata of a qcow2 image with an external data file: the in-core map and
 * its way from and to the metadata device.
 */
#ifndef DM_QCOW2_METADATA_H
#define DM_QCOW2_METADATA_H

#include <linux/bitops.h>
#include <linux/blkdev.h>
#include <linux/list.h>
#include <linux/rcupdate.h>
#include <linux/spinlock.h>

#include "dm-qcow2-format.h"

/*
 * The map
 * -------
 * With an external data file a guest offset is its own host offset, so that
 * the map holds no addresses but a two-bit state per unit (enum qcow2_state).
 *
 * States are cached in slices.  A slice is an L2 table or, where clusters are
 * larger than 64 KiB, 64 KiB of one.  The directory has a slot per slice:
 *
 *	NULL		not loaded
 *	tagged value	loaded, all units are in the state in the tag and on
 *			disk: costs nothing but the slot
 *	pointer		a struct qcow2_slice
 *
 * With extended L2 entries a unit is a subcluster, and a slice 8 KiB of a table.
 *
 * Lookups run under rcu_read_lock() and take no lock.  All changes to slots
 * and states are made under the lock of the slice's bucket, which is taken
 * from any context (irqsave).  Lock order: bucket->lock, then md->lock.
 *
 * Slices that are clean and that nobody works with can be dropped, to keep to
 * a limit or because the system needs memory.  Tagged slots stay.
 */
#define QCOW2_MAX_SLICE_BYTES	65536U
/* 512 entries of 32 subclusters: 4 KiB of states */
#define QCOW2_EXT_SLICE_BYTES	8192U
/* The unit of L2, L1 and refcount I/O, unless clusters are smaller. */
#define QCOW2_BLOCK_BYTES	4096U
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
	 * Used since it was last looked at by qcow2_metadata_drop().  Written
	 * (WRITE_ONCE) by anyone who finds it clear, so that the line stays
	 * clean as long as nothing has to be dropped; bucket lock else.
	 */
	bool referenced;
	/*
	 * May be committed: there is an L2 table on disk, or a cluster is
	 * reserved for it, and the tables' clusters are known to be disjoint.
	 * Set under the bucket lock, never cleared; a reader that sees it
	 * clear asks the commit worker, so that no order is needed.
	 */
	bool has_l2;
	/* Some busy units are corrupt entries on disk; constant. */
	bool bad;
	/*
	 * Low half: blocks of the slice that are newer in core than on disk.
	 * High half: blocks that the commit under way is writing; they stay
	 * set if it fails for good.  Written under the bucket lock, before a unit's
	 * state becomes data; read without it after that state was seen
	 * (qcow2_range_durable()).
	 */
	u32 dirty;
	unsigned int pins;		/* struct qcow2_write that name it; bucket lock */
	struct qcow2_trim *trim;	/* or NULL; bucket lock */
	union {
		/* On bucket->slices; bucket lock. */
		struct list_head node;
		/* On its way to qcow2_slice_free_rcu() */
		struct qcow2_metadata *md;
	};
	union {
		/* On md->dirty or md->committing, or empty; md->lock. */
		struct list_head dirty_node;
		struct rcu_head rcu;
	};
};

/*
 * Units of a slice that became zero, so that the data device may discard them
 * as soon as that is on stable storage.  Two bitmaps with a bit per unit: @fresh
 * for units whose block has not been taken by a commit since, @taken for the
 * others.  A unit that is written is taken out of both.  Protected by the bucket
 * lock; @node (on md->trims or md->trimming if @taken has bits) by md->lock.
 */
struct qcow2_trim {
	struct list_head node;
	struct qcow2_slice *slice;	/* constant */
	unsigned long *taken;		/* constant */
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
	struct list_head waiters;	/* of struct qcow2_io; bucket lock */
};

/* 64 KiB of zeros, to be written */
#define QCOW2_ZERO_BYTES	65536U
extern struct page *qcow2_zeros;

/* A load under way; lives on the stack of the worker that does it. */
struct qcow2_load {
	struct list_head node;
	unsigned long index;
	struct list_head waiters;	/* of struct qcow2_io */
};

/*
 * Slices hash to buckets by their index.  A bucket's lock protects the slots
 * and states of its slices, and the two lists.
 */
struct qcow2_bucket {
	spinlock_t lock;		/* see above */
	struct list_head writes;	/* struct qcow2_write */
	struct list_head loads;		/* struct qcow2_load */
	/* struct qcow2_slice; those at the head are looked at first */
	struct list_head slices;
	unsigned int nr_slices;		/* on @slices */
} ____cacheline_aligned_in_smp;

#define QCOW2_BUCKETS	64

struct qcow2_batch;

/* What the table line says about the metadata. */
struct qcow2_config {
	struct qcow2_geometry geo;	/* checked with qcow2_geometry_check() */
	bool raw;			/* data_file_raw */
	bool backing;			/* there is a backing device */
	bool read_only;			/* nothing is written */
	u64 cache_limit;		/* bytes of states; 0 = the default */
};

struct qcow2_metadata {
	/* Constant after qcow2_metadata_create(): the hot path reads these. */
	unsigned int unit_shift;	/* log2 of sectors per unit */
	unsigned int slice_shift;	/* log2 of units per slice */
	unsigned long nr_slices;
	struct qcow2_slice __rcu **dir;

	struct qcow2_bucket *buckets;

	/*
	 * Numbers of changes to the map that were made, and that are on stable
	 * storage.  The device is clean if they are equal.  @changed is
	 * written under @lock, @durable by the commit worker alone (while the
	 * device is live, that is); both are read anywhere
	 * (qcow2_metadata_clean()).
	 */
	unsigned long changed ____cacheline_aligned_in_smp;
	unsigned long durable;
	/* See qcow2_metadata_set_lost(); WRITE_ONCE, cleared while suspended */
	bool lost;

	spinlock_t lock;		/* of what names it; nests in bucket locks */
	struct list_head dirty;		/* slices; protected by @lock */
	struct list_head committing;	/* slices; protected by @lock */
	unsigned long nr_dirty;		/* on either list; @lock */
	unsigned long nr_slices_cached;	/* loaded slots; @lock */
	unsigned long nr_slice_structs;	/* struct qcow2_slice among them; @lock */
	u64 state_bytes;		/* memory they use; @lock */
	unsigned long drops;		/* slices that were dropped; @lock */
	struct list_head trims;		/* with units that a commit took; @lock */
	struct list_head trimming;	/* being passed down; @lock */
	atomic_t drop_hand;		/* bucket to look at next */

	/* Constant. */
	struct block_device *bdev;	/* metadata */
	struct block_device *data_bdev;
	const char *name;		/* for messages */
	struct qcow2_geometry geo;
	bool raw;			/* the table says data_file_raw */
	bool backing;			/* the table has a backing device */
	bool read_only;			/* by the table: nothing is written */
	u64 cache_limit;		/* of @state_bytes */
	u64 meta_size;			/* bytes */
	unsigned int block_bytes;	/* unit of metadata I/O */
	unsigned int slice_bytes;	/* on disk */
	unsigned int slices_per_l2_shift;
	unsigned int entry_shift;	/* log2 of units per L2 entry */
	unsigned int units_per_block;	/* a multiple of BITS_PER_LONG */
	unsigned long l1_needed;	/* entries that the size needs */

	/*
	 * L1 table as it is on disk, up to a whole block.  Read at resume.
	 * Entries are written by the commit worker under @l1_lock; others
	 * read them under it.
	 */
	__be64 *l1;
	spinlock_t l1_lock;		/* of entries of @l1; nests in bucket locks */
	unsigned long l1_used;		/* entries with a table; @l1_lock */

	/*
	 * Allocation of metadata clusters.  Owned by the commit worker while
	 * the device is live, by resume and suspend else.
	 */
	__be64 *reftable;		/* as on disk */
	bool reftable_read;		/* and checked; others may look at it */
	u64 nr_clusters;		/* that the allocator may use */
	unsigned long *used;		/* bitmap: referenced or reserved */
	u64 cursor;			/* no free cluster below */
	void *refblock;			/* one block of refcounts */
	u64 refblock_offset;		/* where it is from; 0 = nowhere */
	/* L1 index -> cluster, 0 = none; WRITE_ONCE, others may look at it */
	u32 *reserved;

	struct qcow2_batch *batch;

	struct bio_set bs;
	mempool_t state_pool;		/* struct qcow2_slice with their words */
	mempool_t slice_pool;		/* buffers of slice_bytes */
	mempool_t page_pool;		/* buffers of block_bytes */
};

/*----------------------------------------------------------------
 * Lookup
 *----------------------------------------------------------------
 */

static inline struct qcow2_bucket *qcow2_bucket(struct qcow2_metadata *md,
						unsigned long index)
{
	return md->buckets + index % QCOW2_BUCKETS;
}

/* Tagged slots: see "The map". */
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

/**
 * qcow2_lookup() - find the state of a range, as far as it is the same
 * @md: the metadata
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
static inline unsigned int qcow2_lookup(struct qcow2_metadata *md,
					sector_t sector, unsigned int nr,
					enum qcow2_state *state)
{
	u64 first = sector >> md->unit_shift;
	u64 last = (sector + nr - 1) >> md->unit_shift;
	unsigned int mask = (1U << md->slice_shift) - 1;
	u64 unit = first;

	rcu_read_lock();
	do {
		u64 end = min(last, unit | mask);
		struct qcow2_slice *slot;
		enum qcow2_state s;
		unsigned int run;

		slot = rcu_dereference(md->dir[unit >> md->slice_shift]);
		if (!slot)
			break;
		if (qcow2_is_tag(slot)) {
			s = qcow2_tag_state(slot);
			run = end - unit + 1;
		} else {
			if (unlikely(!READ_ONCE(slot->referenced)))
				WRITE_ONCE(slot->referenced, true);
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
	return (unit << md->unit_shift) - sector;
}

/**
 * qcow2_metadata_clean() - is every change to the map on stable storage?
 * @md: the metadata
 *
 * Any context.  Covers all changes of which the caller knows, that is, those
 * whose write was acknowledged before the caller was asked to flush: it cannot
 * but see a @changed that counts them, and a @durable equal to that one covers
 * them too, whichever of the two is read first.
 */
static inline bool qcow2_metadata_clean(struct qcow2_metadata *md)
{
	return READ_ONCE(md->durable) == READ_ONCE(md->changed);
}

/**
 * qcow2_metadata_set_lost() - the data device may have lost what is not committed
 * @md: the metadata
 *
 * No commit from now on succeeds, nor does one whose flush has not ended yet,
 * until all is clean and suspended: then there was nothing to lose.
 * Any context.
 */
static inline void qcow2_metadata_set_lost(struct qcow2_metadata *md)
{
	WRITE_ONCE(md->lost, true);
}

/**
 * qcow2_range_durable() - are the L2 entries of a range on stable storage?
 * @md: the metadata
 * @sector: first sector
 * @nr: number of sectors
 *
 * For a range that qcow2_lookup() has just called data.  Any context.
 */
static inline bool qcow2_range_durable(struct qcow2_metadata *md,
				       sector_t sector, unsigned int nr)
{
	u64 unit = sector >> md->unit_shift;
	u64 last = (sector + nr - 1) >> md->unit_shift;
	unsigned int mask = (1U << md->slice_shift) - 1;
	bool durable = true;

	/*
	 * The write that made it data need not have been acknowledged yet, so
	 * order what follows after the look at the state; pairs with smp_wmb()
	 * in qcow2_mark_dirty().
	 */
	smp_rmb();
	if (qcow2_metadata_clean(md))
		return true;
	rcu_read_lock();
	for (; durable && unit <= last; unit = (unit | mask) + 1) {
		struct qcow2_slice *slot;

		slot = rcu_dereference(md->dir[unit >> md->slice_shift]);
		if (slot && !qcow2_is_tag(slot) && READ_ONCE(slot->dirty))
			durable = false;
	}
	rcu_read_unlock();
	return durable;
}

/*----------------------------------------------------------------
 * Changes; the caller holds the lock of the slice's bucket
 *----------------------------------------------------------------
 */

/*
 * The slice of units @unit to @last, if it can be changed and committed, and they
 * are all in @state; else NULL.
 */
struct qcow2_slice *qcow2_ready_slice(struct qcow2_metadata *md, u64 unit,
				      u64 last, enum qcow2_state state);

void qcow2_set_states(struct qcow2_slice *slice, unsigned int first,
		      unsigned int last, enum qcow2_state state);

/*
 * Note that units @first to @last are about to become data or zero.  Returns
 * true if nothing was dirty before, so that the caller has to arm the timer.
 */
bool qcow2_mark_dirty(struct qcow2_metadata *md, struct qcow2_slice *slice,
		      unsigned int first, unsigned int last);

/*
 * Begin and end to work on units, which qcow2_begin_write() makes busy unless
 * @shared is set: then others may work on them, too, they keep their state, and
 * nobody can wait for them.  Pass-downs that were due for them are off.
 */
void qcow2_begin_write(struct qcow2_metadata *md, struct qcow2_write *w,
		       bool shared);
void qcow2_end_write(struct qcow2_metadata *md, struct qcow2_write *w,
		     bool shared);

/*
 * Let the data device discard units, which the caller makes zero, after the
 * next commit.  @trim comes from qcow2_trim_alloc(), for a slice that has none;
 * returns true if it was used.
 */
bool qcow2_add_trim(struct qcow2_metadata *md, struct qcow2_slice *slice,
		    unsigned int first, unsigned int last,
		    struct qcow2_trim *trim);

/*----------------------------------------------------------------
 * The cache's size; process context, no locks held
 *----------------------------------------------------------------
 */

/**
 * qcow2_metadata_drop() - drop clean slices that were not used lately
 * @md: the metadata
 * @nr: how many at most
 *
 * Returns how many it was.
 */
unsigned long qcow2_metadata_drop(struct qcow2_metadata *md, unsigned long nr);

/* How many slices could be dropped, more or less. */
unsigned long qcow2_metadata_droppable(struct qcow2_metadata *md);

/**
 * qcow2_metadata_get_room() - account for a slice that is about to be added
 * @md: the metadata
 * @force: do so even if the limit is exceeded
 *
 * Drops others if need be.  False if there was nothing to drop.  To be paired
 * with qcow2_metadata_put_room() if no slice comes of it.
 */
bool qcow2_metadata_get_room(struct qcow2_metadata *md, bool force);
void qcow2_metadata_put_room(struct qcow2_metadata *md);

/* Memory for qcow2_add_trim(), or NULL; may sleep, does no I/O. */
struct qcow2_trim *qcow2_trim_alloc(struct qcow2_metadata *md);

/*
 * Pass-down: what the commits so far allow to discard.  To be called by one
 * worker only: qcow2_metadata_start_trims(), then qcow2_metadata_next_trim()
 * until it returns false.  Else it has made the units of @w busy, which are
 * those of sectors @sector to @sector + @nr - 1, less than 4 GiB; the caller
 * ends this with qcow2_end_write() and, under the same lock, the state zero.
 */
void qcow2_metadata_start_trims(struct qcow2_metadata *md);
bool qcow2_metadata_next_trim(struct qcow2_metadata *md, struct qcow2_write *w,
			      sector_t *sector, sector_t *nr);

/*----------------------------------------------------------------
 * Functions that may sleep for I/O
 *
 * All return 0 or a negative errno.  -EUCLEAN means that the metadata device
 * holds something impossible, which has been logged: the target has to go
 * read-only.
 *----------------------------------------------------------------
 */

/**
 * qcow2_metadata_create() - set up, without any I/O
 * @bdev: metadata device
 * @data_bdev: data device, needed to order commits
 * @name: for messages; must live as long as the result
 * @config: from the table line
 *
 * Returns an ERR_PTR on failure.  Process context.
 */
struct qcow2_metadata *
qcow2_metadata_create(struct block_device *bdev, struct block_device *data_bdev,
		      const char *name, const struct qcow2_config *config);
void qcow2_metadata_destroy(struct qcow2_metadata *md);

/**
 * qcow2_metadata_check_header() - compare the header on disk with the table
 * @md: the metadata
 * @read_only: the image will not be written, so that it may be corrupt or dirty
 * @error: set to the cause on failure
 *
 * Process context; may run while another table for the same device is live.
 */
int qcow2_metadata_check_header(struct qcow2_metadata *md, bool read_only,
				char **error);

/**
 * qcow2_metadata_resume() - read L1, become ready for everything below
 *
 * -EUCLEAN leaves the metadata ready for reading: L1 entries that are
 * impossible fail each load that needs them.  Process context, device
 * suspended.
 */
int qcow2_metadata_resume(struct qcow2_metadata *md);

/**
 * qcow2_metadata_suspend() - forget everything that was read
 *
 * The caller has committed, and no I/O is in flight.  Process context.
 */
void qcow2_metadata_suspend(struct qcow2_metadata *md);

/**
 * qcow2_metadata_load() - read a slice
 * @md: the metadata
 * @index: slot
 * @slot: set to the new content of the slot, which the caller publishes
 *
 * Impossible entries become busy units of a slice that is marked bad; the
 * result is still 0.  The caller has called qcow2_metadata_get_room().
 * Workqueue context; concurrent loads of different slots are fine.
 */
int qcow2_metadata_load(struct qcow2_metadata *md, unsigned long index,
			struct qcow2_slice **slot);

/* Put a loaded slot into its place; the caller holds the bucket's lock. */
void qcow2_slot_publish(struct qcow2_metadata *md, unsigned long index,
			struct qcow2_slice *slot);

/**
 * qcow2_slot_expand() - make a struct qcow2_slice of a tagged slot
 *
 * Needed before the first change.  The caller has called
 * qcow2_metadata_get_room().  Allocates; workqueue context.
 */
void qcow2_slot_expand(struct qcow2_metadata *md, unsigned long index);

/*
 * The rest is for the commit worker only: being one ordered worker, it needs
 * no locks against itself.
 */

/**
 * qcow2_metadata_reserve() - make sure that a slice can be committed
 * @md: the metadata
 * @index: slot of the slice, which has been expanded
 *
 * Reserves a cluster for the L2 table if there is none, after a look at all
 * refcount blocks' places.  -ENOSPC if no cluster of the metadata device is
 * free.
 */
int qcow2_metadata_reserve(struct qcow2_metadata *md, unsigned long index);

/**
 * qcow2_metadata_commit() - bring all changes made so far to stable storage
 * @md: the metadata
 * @fatal: set if the result is an error
 *
 * Flushes the data device, even if nothing has changed.  After an error
 * nothing of what was being committed counts as durable.  If it is not @fatal,
 * a later call may succeed; else the function must not be called again.
 */
int qcow2_metadata_commit(struct qcow2_metadata *md, bool *fatal);

/* qcow2_metadata_set_corrupt() - set the corrupt bit in the header, durably */
int qcow2_metadata_set_corrupt(struct qcow2_metadata *md);

#endif /* DM_QCOW2_METADATA_H */
