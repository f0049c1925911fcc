// SPDX-License-Identifier: GPL-2.0-only
/*
 * Metadata of a qcow2 image with an external data file: reading L1 and L2
 * tables, allocating metadata clusters, and the commit.
 */
#include <linux/bio.h>
#include <linux/completion.h>
#include <linux/device-mapper.h>
#include <linux/highmem.h>
#include <linux/log2.h>
#include <linux/mempool.h>
#include <linux/mm.h>
#include <linux/slab.h>
#include <linux/vmalloc.h>

#include "compat.h"
#include "dm-qcow2-metadata.h"

#define DM_MSG_PREFIX "qcow2"

/* What one round of a commit can take. */
#define QCOW2_BATCH		128
#define QCOW2_BATCH_RESERVE	16

/* Slices that are kept in reserve. */
#define QCOW2_STATE_RESERVE	16
/* What the limit leaves for slices, at least. */
#define QCOW2_MIN_CACHE		(256U << 10)
/* What it is without one: states of 16 TiB at 64 KiB clusters */
#define QCOW2_DEFAULT_CACHE	(64U << 20)

/*
 * The allocator looks no further than this: beyond it lies nothing that an
 * image can need (4 Mi L2 tables with their refcounts).
 */
#define QCOW2_MAX_CLUSTERS	BIT_ULL(27)

/* One block of an L2 table, on its way to the disk. */
struct qcow2_batch_entry {
	struct qcow2_slice *slice;
	unsigned int block;		/* of the slice */
	bool fresh;			/* its L2 table is not on disk yet */
	u64 offset;			/* on the metadata device */
	void *buf;
	/*
	 * The block's states when it was taken; for busy units what they were
	 * before.
	 */
	unsigned long *words;
};

/* Owned by the commit worker. */
struct qcow2_batch {
	unsigned int nr;
	unsigned int nr_bufs;
	unsigned int nr_fresh;
	unsigned int nr_reftable;
	unsigned long fresh[QCOW2_BATCH];	/* L1 indices of new tables */
	unsigned long reftable[QCOW2_BATCH];	/* blocks to be written */
	void *bufs[QCOW2_BATCH];
	struct qcow2_batch_entry entries[QCOW2_BATCH];
	unsigned long words[];
};

/*----------------------------------------------------------------
 * I/O on the metadata device
 *----------------------------------------------------------------
 */

/* A number of bios, and someone who waits for all of them. */
struct qcow2_ios {
	atomic_t pending;
	blk_status_t status;	/* of any that failed; WRITE_ONCE */
	struct completion done;
};

static void qcow2_ios_init(struct qcow2_ios *ios)
{
	atomic_set(&ios->pending, 1);
	ios->status = BLK_STS_OK;
	init_completion(&ios->done);
}

static void qcow2_ios_endio(struct bio *bio)
{
	struct qcow2_ios *ios = bio->bi_private;

	if (bio->bi_status)
		WRITE_ONCE(ios->status, bio->bi_status);
	bio_put(bio);
	if (atomic_dec_and_test(&ios->pending))
		complete(&ios->done);
}

static int qcow2_ios_wait(struct qcow2_ios *ios)
{
	if (!atomic_dec_and_test(&ios->pending))
		wait_for_completion_io(&ios->done);
	return blk_status_to_errno(READ_ONCE(ios->status));
}

static struct bio *qcow2_ios_bio(struct qcow2_metadata *md,
				 struct qcow2_ios *ios, blk_opf_t opf,
				 u64 offset, unsigned int nr_vecs)
{
	struct bio *bio;

	bio = bio_alloc_bioset(md->bdev, nr_vecs, opf | REQ_META | REQ_SYNC,
			       GFP_NOIO, &md->bs);
	bio->bi_iter.bi_sector = offset >> SECTOR_SHIFT;
	bio->bi_private = ios;
	bio->bi_end_io = qcow2_ios_endio;
	atomic_inc(&ios->pending);
	return bio;
}

/*
 * Start I/O on @len bytes of kernel memory (kmalloc or vmalloc).  Each bio is
 * submitted before the next one is allocated, so that the bio set's reserve
 * suffices.
 */
static void qcow2_ios_rw(struct qcow2_metadata *md, struct qcow2_ios *ios,
			 blk_opf_t opf, u64 offset, void *buf, size_t len)
{
	if (op_is_write(opf) && is_vmalloc_addr(buf))
		flush_kernel_vmap_range(buf, len);
	while (len) {
		struct bio *bio;
		unsigned int vecs = DIV_ROUND_UP(offset_in_page(buf) + len,
						 PAGE_SIZE);

		vecs = bio_max_segs(vecs);
		bio = qcow2_ios_bio(md, ios, opf, offset, vecs);
		while (len && vecs--) {
			struct page *page = is_vmalloc_addr(buf) ?
				vmalloc_to_page(buf) : virt_to_page(buf);
			unsigned int n = min_t(size_t, len,
					       PAGE_SIZE - offset_in_page(buf));

			__bio_add_page(bio, page, n, offset_in_page(buf));
			buf += n;
			offset += n;
			len -= n;
		}
		submit_bio(bio);
	}
}

/* Start writing @len bytes of zeros, a multiple of 512. */
static void qcow2_ios_zero(struct qcow2_metadata *md, struct qcow2_ios *ios,
			   u64 offset, u64 len)
{
	while (len) {
		struct bio *bio;
		unsigned int vecs = DIV_ROUND_UP_ULL(len, QCOW2_ZERO_BYTES);

		vecs = bio_max_segs(vecs);
		bio = qcow2_ios_bio(md, ios, REQ_OP_WRITE, offset, vecs);
		while (len && vecs--) {
			unsigned int n = min_t(u64, len, QCOW2_ZERO_BYTES);

			__bio_add_page(bio, qcow2_zeros, n, 0);
			offset += n;
			len -= n;
		}
		submit_bio(bio);
	}
}

static int qcow2_md_rw(struct qcow2_metadata *md, blk_opf_t opf, u64 offset,
		       void *buf, size_t len)
{
	struct qcow2_ios ios;
	int r;

	qcow2_ios_init(&ios);
	qcow2_ios_rw(md, &ios, opf, offset, buf, len);
	r = qcow2_ios_wait(&ios);
	if (!op_is_write(opf) && is_vmalloc_addr(buf))
		invalidate_kernel_vmap_range(buf, len);
	return r;
}

static int qcow2_md_flush(struct qcow2_metadata *md)
{
	return blkdev_issue_flush(md->bdev);
}

/*----------------------------------------------------------------
 * States
 *----------------------------------------------------------------
 */

static void qcow2_set_words(unsigned long *words, unsigned int first,
			    unsigned int last, enum qcow2_state state)
{
	unsigned long pattern = (~0UL / 3) * state;

	while (first <= last) {
		unsigned int shift = first % QCOW2_UNITS_PER_WORD;
		unsigned int n = min_t(unsigned int, last - first + 1,
				       QCOW2_UNITS_PER_WORD - shift);
		unsigned long *word = words + first / QCOW2_UNITS_PER_WORD;
		unsigned long mask = ~0UL >> (BITS_PER_LONG - 2 * n) << 2 * shift;

		WRITE_ONCE(*word, (*word & ~mask) | (pattern & mask));
		first += n;
	}
}

void qcow2_set_states(struct qcow2_slice *slice, unsigned int first,
		      unsigned int last, enum qcow2_state state)
{
	qcow2_set_words(slice->words, first, last, state);
}

bool qcow2_mark_dirty(struct qcow2_metadata *md, struct qcow2_slice *slice,
		      unsigned int first, unsigned int last)
{
	u32 blocks = GENMASK(last / md->units_per_block,
			     first / md->units_per_block);
	bool was_clean;	/* the first one arms the timer of the commit */

	WRITE_ONCE(slice->dirty, slice->dirty | blocks);

	spin_lock(&md->lock);
	WRITE_ONCE(md->changed, md->changed + 1);
	was_clean = list_empty(&md->dirty);
	if (list_empty(&slice->dirty_node)) {
		list_add_tail(&slice->dirty_node, &md->dirty);
		md->nr_dirty++;
	}
	spin_unlock(&md->lock);

	/*
	 * Whoever sees the new state sees md->changed and the dirty bit; pairs
	 * with smp_rmb() in qcow2_range_durable().
	 */
	smp_wmb();
	return was_clean;
}

void qcow2_begin_write(struct qcow2_metadata *md, struct qcow2_write *w,
		       bool shared)
{
	struct qcow2_bucket *bucket = qcow2_bucket(md, w->slice->index);
	struct qcow2_trim *trim = w->slice->trim;

	w->slice->pins++;
	if (trim) {
		bitmap_clear(trim->fresh, w->first, w->last - w->first + 1);
		bitmap_clear(trim->taken, w->first, w->last - w->first + 1);
	}
	if (shared)
		return;
	INIT_LIST_HEAD(&w->waiters);
	qcow2_set_states(w->slice, w->first, w->last, QCOW2_BUSY);
	list_add_tail(&w->node, &bucket->writes);
}

void qcow2_end_write(struct qcow2_metadata *md, struct qcow2_write *w,
		     bool shared)
{
	w->slice->pins--;
	if (!shared)
		list_del(&w->node);
}

/*----------------------------------------------------------------
 * Slices
 *----------------------------------------------------------------
 */

static size_t qcow2_words_bytes(struct qcow2_metadata *md)
{
	return (1U << md->slice_shift) / 4;
}

static unsigned long qcow2_slice_bytes(struct qcow2_metadata *md)
{
	return sizeof(struct qcow2_slice) + qcow2_words_bytes(md);
}

static void *qcow2_state_pool_alloc(gfp_t gfp, void *pool_data)
{
	struct qcow2_metadata *md = pool_data;
	struct qcow2_slice *slice = kmalloc(sizeof(*slice), gfp);

	if (!slice)
		return NULL;
	slice->words = kmalloc(qcow2_words_bytes(md), gfp);
	if (!slice->words) {
		kfree(slice);
		return NULL;
	}
	return slice;
}

static void qcow2_state_pool_free(void *element, void *pool_data)
{
	struct qcow2_slice *slice = element;

	kfree(slice->words);
	kfree(slice);
}

/*
 * Cannot fail: what the pool's reserve was used for gets clean by commits, and
 * free of hints by the trimmer, which need no slices, and no worker of those who
 * do; then it is dropped by the shrinker, or by the next one who looks for room.
 */
static struct qcow2_slice *qcow2_slice_alloc(struct qcow2_metadata *md,
					     unsigned long index)
{
	/* GFP_NOIO because writeback may be waiting for the bio that needs it */
	struct qcow2_slice *slice = mempool_alloc(&md->state_pool, GFP_NOIO);

	slice->index = index;
	slice->referenced = true;
	slice->has_l2 = false;
	slice->bad = false;
	slice->dirty = 0;
	slice->pins = 0;
	slice->trim = NULL;
	INIT_LIST_HEAD(&slice->node);
	INIT_LIST_HEAD(&slice->dirty_node);
	return slice;
}

static void qcow2_slice_free(struct qcow2_metadata *md,
			     struct qcow2_slice *slice)
{
	kfree(slice->trim);
	mempool_free(slice, &md->state_pool);
}

static void qcow2_slice_free_rcu(struct rcu_head *head)
{
	struct qcow2_slice *slice = container_of(head, struct qcow2_slice, rcu);

	qcow2_slice_free(slice->md, slice);
}

/* Where a slot is changed; the caller holds the bucket's lock. */
static struct qcow2_slice *qcow2_slot(struct qcow2_metadata *md,
				      unsigned long index)
{
	return rcu_dereference_protected(md->dir[index],
					 lockdep_is_held(&qcow2_bucket(md, index)->lock));
}

struct qcow2_slice *qcow2_ready_slice(struct qcow2_metadata *md, u64 unit,
				      u64 last, enum qcow2_state state)
{
	struct qcow2_slice *slice = qcow2_slot(md, unit >> md->slice_shift);
	unsigned int mask = (1U << md->slice_shift) - 1;
	enum qcow2_state seen;

	if (!slice || qcow2_is_tag(slice) || !slice->has_l2 || slice->bad)
		return NULL;
	if (qcow2_words_run(slice->words, unit & mask, last & mask, &seen) !=
	    last - unit + 1 || seen != state)
		return NULL;
	return slice;
}

void qcow2_slot_publish(struct qcow2_metadata *md, unsigned long index,
			struct qcow2_slice *slot)
{
	struct qcow2_bucket *bucket = qcow2_bucket(md, index);
	struct qcow2_slice *old = qcow2_slot(md, index);

	rcu_assign_pointer(md->dir[index], slot);
	if (!qcow2_is_tag(slot)) {
		list_add_tail(&slot->node, &bucket->slices);
		bucket->nr_slices++;
	}

	spin_lock(&md->lock);
	if (!old)
		md->nr_slices_cached++;
	if (!qcow2_is_tag(slot))
		md->nr_slice_structs++;
	spin_unlock(&md->lock);
}

/*
 * Is there an L2 table that may be written, or a cluster reserved for it?  What
 * was reserved has to be seen here: the slice that was there then may have been
 * dropped since, and would be so again and again until the table is there.
 */
static bool qcow2_has_l2(struct qcow2_metadata *md, unsigned long index)
{
	unsigned long i = index >> md->slices_per_l2_shift;
	u64 entry;

	if (!READ_ONCE(md->reftable_read))
		return false;
	spin_lock(&md->l1_lock);
	entry = be64_to_cpu(md->l1[i]);
	spin_unlock(&md->l1_lock);
	if (entry & QCOW2_OFFSET_MASK)
		return entry & QCOW2_OFLAG_COPIED;
	/* It goes after the entry has come: then we ask once more, in vain. */
	return READ_ONCE(md->reserved[i]);
}

void qcow2_slot_expand(struct qcow2_metadata *md, unsigned long index)
{
	struct qcow2_bucket *bucket = qcow2_bucket(md, index);
	struct qcow2_slice *slice = qcow2_slice_alloc(md, index), *slot;

	spin_lock_irq(&bucket->lock);
	slot = qcow2_slot(md, index);
	if (slot && qcow2_is_tag(slot)) {
		qcow2_set_states(slice, 0, (1U << md->slice_shift) - 1,
				 qcow2_tag_state(slot));
		slice->has_l2 = qcow2_has_l2(md, index);
		qcow2_slot_publish(md, index, slice);
		slice = NULL;
	}
	spin_unlock_irq(&bucket->lock);

	if (slice) {
		qcow2_slice_free(md, slice);
		qcow2_metadata_put_room(md);
	}
}

/* May a slice go? */
static bool qcow2_slice_idle(const struct qcow2_slice *slice)
{
	return !slice->dirty && !slice->pins && !slice->trim;
}

/* How many slices of a bucket are looked at under its lock, at most. */
#define QCOW2_DROP_SCAN		64

/* One turn of the hand: second chance for what was used since the last one. */
static unsigned long qcow2_bucket_drop(struct qcow2_metadata *md,
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
		RCU_INIT_POINTER(md->dir[slice->index], NULL);
		list_del(&slice->node);
		bucket->nr_slices--;
		slice->md = md;
		call_rcu(&slice->rcu, qcow2_slice_free_rcu);
		dropped++;
	}
	if (dropped) {
		spin_lock(&md->lock);
		md->nr_slices_cached -= dropped;
		md->nr_slice_structs -= dropped;
		md->state_bytes -= dropped * qcow2_slice_bytes(md);
		md->drops += dropped;
		spin_unlock(&md->lock);
	}
	spin_unlock_irqrestore(&bucket->lock, flags);
	return dropped;
}

unsigned long qcow2_metadata_drop(struct qcow2_metadata *md, unsigned long nr)
{
	unsigned long slices = READ_ONCE(md->nr_slice_structs);
	unsigned long visits = 2 * (slices / QCOW2_DROP_SCAN + QCOW2_BUCKETS);
	unsigned long dropped = 0, i;

	/*
	 * About twice around, if slices are spread evenly: what the first turn
	 * spared, the second takes.
	 */
	for (i = 0; i < visits && dropped < nr; i++) {
		unsigned int hand = atomic_inc_return(&md->drop_hand);

		dropped += qcow2_bucket_drop(md, md->buckets +
					     hand % QCOW2_BUCKETS,
					     nr - dropped);
		cond_resched();
	}
	return dropped;
}

unsigned long qcow2_metadata_droppable(struct qcow2_metadata *md)
{
	unsigned long structs = READ_ONCE(md->nr_slice_structs);
	unsigned long dirty = READ_ONCE(md->nr_dirty);

	return structs > dirty ? structs - dirty : 0;
}

static bool qcow2_account(struct qcow2_metadata *md, bool force)
{
	unsigned long bytes = qcow2_slice_bytes(md);
	unsigned long flags;
	bool ok;

	spin_lock_irqsave(&md->lock, flags);
	ok = force || md->state_bytes + bytes <= md->cache_limit;
	if (ok)
		md->state_bytes += bytes;
	spin_unlock_irqrestore(&md->lock, flags);
	return ok;
}

/* Slices to drop at once: the search has its cost, too. */
#define QCOW2_DROP_BATCH	8

bool qcow2_metadata_get_room(struct qcow2_metadata *md, bool force)
{
	while (!qcow2_account(md, false)) {
		if (!qcow2_metadata_drop(md, QCOW2_DROP_BATCH))
			return force && qcow2_account(md, true);
	}
	return true;
}

void qcow2_metadata_put_room(struct qcow2_metadata *md)
{
	unsigned long flags;

	spin_lock_irqsave(&md->lock, flags);
	md->state_bytes -= qcow2_slice_bytes(md);
	spin_unlock_irqrestore(&md->lock, flags);
}

/*----------------------------------------------------------------
 * Pass-down of discards
 *
 * A unit's way: zero and in @fresh; a commit takes its block, and moves it to
 * @taken; the commit succeeds; the unit is made busy, and discarded.  If it is
 * written at any time before, it leaves the bitmaps.
 *----------------------------------------------------------------
 */

struct qcow2_trim *qcow2_trim_alloc(struct qcow2_metadata *md)
{
	unsigned int longs = BITS_TO_LONGS(1U << md->slice_shift);
	struct qcow2_trim *trim;

	/* A discard is a hint: without memory for it, it is forgotten. */
	trim = kzalloc(struct_size(trim, fresh, 2 * longs),
		       GFP_NOIO | __GFP_NORETRY | __GFP_NOWARN);
	if (trim) {
		INIT_LIST_HEAD(&trim->node);
		trim->taken = trim->fresh + longs;
	}
	return trim;
}

bool qcow2_add_trim(struct qcow2_metadata *md, struct qcow2_slice *slice,
		    unsigned int first, unsigned int last,
		    struct qcow2_trim *trim)
{
	bool used = !slice->trim && trim;

	if (used) {
		trim->slice = slice;
		slice->trim = trim;
	}
	if (slice->trim)
		bitmap_set(slice->trim->fresh, first, last - first + 1);
	return used;
}

/* A commit takes a block (or, if @back is set, has not written it after all). */
static void qcow2_take_trim(struct qcow2_metadata *md, struct qcow2_trim *trim,
			    unsigned int block, bool back)
{
	unsigned int longs = md->units_per_block / BITS_PER_LONG;
	unsigned long *fresh = trim->fresh + block * longs;
	unsigned long *taken = trim->taken + block * longs;
	unsigned int i;

	for (i = 0; i < longs; i++) {
		if (back) {
			fresh[i] |= taken[i];
			taken[i] = 0;
		} else {
			taken[i] |= fresh[i];
			fresh[i] = 0;
		}
	}
	if (back)
		return;
	spin_lock(&md->lock);
	if (list_empty(&trim->node))
		list_add_tail(&trim->node, &md->trims);
	spin_unlock(&md->lock);
}

void qcow2_metadata_start_trims(struct qcow2_metadata *md)
{
	spin_lock_irq(&md->lock);
	list_splice_tail_init(&md->trims, &md->trimming);
	spin_unlock_irq(&md->lock);
}

/* A bio has less than 4 GiB. */
#define QCOW2_MAX_TRIM		(BIT(31) >> SECTOR_SHIFT)	/* sectors */

/* The next units of a slice that may be discarded; the bucket lock is held. */
static bool qcow2_trim_run(struct qcow2_metadata *md, struct qcow2_trim *trim,
			   struct qcow2_write *w, bool *later)
{
	unsigned int n = 1U << md->slice_shift, first = 0, last, run;
	struct qcow2_slice *slice = trim->slice;
	enum qcow2_state state;

	*later = false;
	for (;; first = last + 1) {
		first = find_next_bit(trim->taken, n, first);
		if (first >= n)
			return false;
		last = first | (md->units_per_block - 1);
		if (slice->dirty & BIT(first / md->units_per_block +
				       QCOW2_MAX_BLOCKS)) {
			/* A commit that has taken it is not at its end. */
			*later = true;
			continue;
		}
		last = min_t(unsigned int, last,
			     first + (QCOW2_MAX_TRIM >> md->unit_shift) - 1);
		last = find_next_zero_bit(trim->taken, last + 1, first) - 1;
		run = qcow2_words_run(slice->words, first, last, &state);
		last = first + run - 1;
		if (!WARN_ON_ONCE(state != QCOW2_ZERO))
			break;
		/* Whatever it is, it is not to be discarded. */
		bitmap_clear(trim->taken, first, run);
	}
	w->slice = slice;
	w->first = first;
	w->last = last;
	w->prev = QCOW2_ZERO;
	return true;
}

bool qcow2_metadata_next_trim(struct qcow2_metadata *md, struct qcow2_write *w,
			      sector_t *sector, sector_t *nr)
{
	sector_t end = md->geo.size >> SECTOR_SHIFT;

	for (;;) {
		struct qcow2_bucket *bucket;
		struct qcow2_trim *trim;
		bool found, later, empty;

		spin_lock_irq(&md->lock);
		trim = list_first_entry_or_null(&md->trimming,
						struct qcow2_trim, node);
		spin_unlock_irq(&md->lock);
		if (!trim)
			return false;

		/* Nobody else frees it, nor its slice. */
		bucket = qcow2_bucket(md, trim->slice->index);
		spin_lock_irq(&bucket->lock);
		found = qcow2_trim_run(md, trim, w, &later);
		if (found) {
			/* takes the units out of the bitmaps */
			qcow2_begin_write(md, w, false);
			*sector = (((sector_t)trim->slice->index <<
				    md->slice_shift) + w->first) << md->unit_shift;
			*nr = min((sector_t)(w->last - w->first + 1) << md->unit_shift,
				  end - *sector);
		} else {
			spin_lock(&md->lock);
			if (later)
				list_move_tail(&trim->node, &md->trims);
			else
				list_del_init(&trim->node);
			spin_unlock(&md->lock);
			empty = !later && bitmap_empty(trim->fresh,
						       1U << md->slice_shift);
			if (empty) {
				trim->slice->trim = NULL;
				kfree(trim);
			}
		}
		spin_unlock_irq(&bucket->lock);
		if (found)
			return true;
	}
}

/*----------------------------------------------------------------
 * Loading
 *----------------------------------------------------------------
 */

static int qcow2_bad_l1(struct qcow2_metadata *md, unsigned long i, u64 entry,
			enum qcow2_fault fault)
{
	DMERR_LIMIT("%s: L1 entry %lu is corrupt (%#llx): %s", md->name, i,
		    (unsigned long long)entry, qcow2_fault_str(fault));
	return -EUCLEAN;
}

static void qcow2_bad_l2(struct qcow2_metadata *md, u64 guest, u64 entry,
			 enum qcow2_fault fault)
{
	DMERR_LIMIT("%s: L2 entry of guest offset %#llx is corrupt (%#llx): %s",
		    md->name, (unsigned long long)guest,
		    (unsigned long long)entry, qcow2_fault_str(fault));
}

/* Find the L2 table of a slice; *@offset is 0 if there is none. */
static int qcow2_l2_offset(struct qcow2_metadata *md, unsigned long index,
			   u64 *offset, bool *copied)
{
	unsigned long i = index >> md->slices_per_l2_shift;
	enum qcow2_fault fault;
	u64 entry;

	spin_lock_irq(&md->l1_lock);
	entry = be64_to_cpu(md->l1[i]);
	spin_unlock_irq(&md->l1_lock);

	fault = qcow2_l1_check(entry, md->geo.cluster_bits, md->meta_size);
	*offset = entry & QCOW2_OFFSET_MASK;
	*copied = entry & QCOW2_OFLAG_COPIED;
	if (!fault && *offset && qcow2_in_fixed_area(&md->geo, *offset))
		fault = QCOW2_FAULT_ENTRY_OVERLAP;
	return fault ? qcow2_bad_l1(md, i, entry, fault) : 0;
}

/* An L2 entry of either kind; @i counts from @buf. */
static struct qcow2_ext_entry qcow2_get_entry(struct qcow2_metadata *md,
					      const __be64 *buf, unsigned int i)
{
	if (md->geo.ext_l2)
		return qcow2_ext_entry(be64_to_cpu(buf[2 * i]),
				       be64_to_cpu(buf[2 * i + 1]));
	return qcow2_ext_entry(be64_to_cpu(buf[i]), 0);
}

/* Check an entry, and set @state to what a standard one says. */
static enum qcow2_fault qcow2_check_entry(struct qcow2_metadata *md,
					  const struct qcow2_ext_entry *e,
					  u64 guest, enum qcow2_state *state)
{
	enum qcow2_fault fault;

	if (md->geo.ext_l2)
		fault = qcow2_l2_ext_check(e, guest, md->geo.cluster_bits);
	else
		fault = qcow2_l2_decode(e->entry, guest, md->geo.cluster_bits,
					state);
	if (fault)
		qcow2_bad_l2(md, guest, e->entry, fault);
	return fault;
}

/* Decode @buf into states; all-equal ones become a tag. */
static struct qcow2_slice *qcow2_decode(struct qcow2_metadata *md,
					unsigned long index, const __be64 *buf)
{
	unsigned int unit_bits = md->unit_shift + SECTOR_SHIFT;
	unsigned int i, n = 1U << md->slice_shift;
	unsigned int sub_mask = (1U << md->entry_shift) - 1;
	u64 guest = (u64)index << (md->slice_shift + unit_bits);
	enum qcow2_state first = QCOW2_UNALLOCATED, state = first;
	enum qcow2_fault fault = QCOW2_OK;
	struct qcow2_slice *slice = NULL;
	struct qcow2_ext_entry e;

	for (i = 0; i < n; i++, guest += 1ULL << unit_bits) {
		/*
		 * Entries beyond the virtual size are not ours; giving them
		 * the first one's state lets the slice be a tag.
		 */
		if (guest >= md->geo.size) {
			if (slice)
				qcow2_set_states(slice, i, n - 1, first);
			break;
		}
		if (!(i & sub_mask)) {
			e = qcow2_get_entry(md, buf, i >> md->entry_shift);
			fault = qcow2_check_entry(md, &e, guest, &state);
		}
		if (fault)
			state = QCOW2_BUSY;
		else if (md->geo.ext_l2)
			state = qcow2_ext_state(&e, i & sub_mask);
		if (!i)
			first = state;
		if (!slice && (fault || state != first)) {
			slice = qcow2_slice_alloc(md, index);
			if (i)
				qcow2_set_states(slice, 0, i - 1, first);
		}
		if (fault)
			slice->bad = true;
		if (slice)
			qcow2_set_states(slice, i, i, state);
	}
	return slice ? slice : qcow2_tag(first);
}

int qcow2_metadata_load(struct qcow2_metadata *md, unsigned long index,
			struct qcow2_slice **slot)
{
	unsigned long sub = index & ((1UL << md->slices_per_l2_shift) - 1);
	bool copied;
	void *buf;
	u64 offset;
	int r;

	r = qcow2_l2_offset(md, index, &offset, &copied);
	if (r)
		return r;
	if (!offset) {
		/*
		 * The commit worker may be creating the table just now, but
		 * not with entries of this slice: to have any, it must have
		 * been loaded.
		 */
		*slot = qcow2_tag(QCOW2_UNALLOCATED);
		return 0;
	}

	buf = mempool_alloc(&md->slice_pool, GFP_NOIO);
	offset += (u64)sub * md->slice_bytes;
	r = qcow2_md_rw(md, REQ_OP_READ, offset, buf, md->slice_bytes);
	if (r) {
		DMERR_LIMIT("%s: cannot read the L2 table at %#llx: %d",
			    md->name, (unsigned long long)offset, r);
	} else {
		*slot = qcow2_decode(md, index, buf);
		if (!qcow2_is_tag(*slot))
			(*slot)->has_l2 = copied && READ_ONCE(md->reftable_read);
	}
	mempool_free(buf, &md->slice_pool);
	return r;
}

/*----------------------------------------------------------------
 * Header
 *----------------------------------------------------------------
 */

static const char *qcow2_compare_header(struct qcow2_metadata *md,
					bool read_only,
					const struct qcow2_header *h)
{
	u64 autoclear = be64_to_cpu(h->autoclear_features);
	struct qcow2_geometry geo;
	enum qcow2_fault fault;

	fault = qcow2_header_check(h, read_only, &geo);
	if (fault)
		return qcow2_fault_str(fault);
	if (geo.ext_l2 != md->geo.ext_l2)
		return geo.ext_l2 ? "image has extended L2 entries: extended_l2 is needed" :
				    "extended_l2 is given, but the image has standard L2 entries";
	if (!!h->backing_file_offset != md->backing)
		return md->backing ? "backing_dev is given, but the image has no backing file" :
				     "image has a backing file: backing_dev is needed";
	if (geo.cluster_bits != md->geo.cluster_bits)
		return "cluster_bits differ from the image's header";
	if (geo.size != md->geo.size)
		return "length differs from the virtual size in the image's header";
	if (geo.l1_offset != md->geo.l1_offset)
		return "L1 table offset differs from the image's header";
	if (geo.l1_entries != md->geo.l1_entries)
		return "number of L1 entries differs from the image's header";
	if (geo.reftable_offset != md->geo.reftable_offset)
		return "refcount table offset differs from the image's header";
	if (geo.reftable_clusters != md->geo.reftable_clusters)
		return "refcount table clusters differ from the image's header";
	if (geo.refcount_order != md->geo.refcount_order)
		return "refcount order differs from the image's header";
	if (!!(autoclear & QCOW2_AUTOCLEAR_RAW_DATA) != md->raw)
		return md->raw ? "data_file_raw is given, but the image has not the raw bit" :
				 "image has the raw bit: data_file_raw is needed";
	if (!read_only && (autoclear & ~QCOW2_AUTOCLEAR_KNOWN))
		return "unknown autoclear bits are set: use qcow2setup, or read_only";
	return NULL;
}

int qcow2_metadata_check_header(struct qcow2_metadata *md, bool read_only,
				char **error)
{
	const char *cause;
	void *buf;
	int r;

	buf = kmalloc(md->block_bytes, GFP_NOIO);
	if (!buf) {
		*error = "Cannot allocate memory for the header";
		return -ENOMEM;
	}
	r = qcow2_md_rw(md, REQ_OP_READ, 0, buf, md->block_bytes);
	if (r) {
		*error = "Cannot read the image's header";
	} else {
		cause = qcow2_compare_header(md, read_only, buf);
		if (cause) {
			*error = (char *)cause;
			r = -EINVAL;
		}
	}
	kfree(buf);
	return r;
}

int qcow2_metadata_set_corrupt(struct qcow2_metadata *md)
{
	unsigned int len = bdev_logical_block_size(md->bdev);
	struct qcow2_header *h;
	int r;

	h = mempool_alloc(&md->page_pool, GFP_NOIO);
	r = qcow2_md_rw(md, REQ_OP_READ, 0, h, len);
	/* Whatever lies there now, it is not ours to change. */
	if (!r && h->magic != cpu_to_be32(QCOW2_MAGIC))
		r = -EUCLEAN;
	if (!r) {
		h->incompatible_features |= cpu_to_be64(QCOW2_INCOMPAT_CORRUPT);
		r = qcow2_md_rw(md, REQ_OP_WRITE | REQ_FUA, 0, h, len);
	}
	mempool_free(h, &md->page_pool);
	return r;
}

/*----------------------------------------------------------------
 * Allocation of metadata clusters (commit worker)
 *----------------------------------------------------------------
 */

/* log2 of the clusters that a refcount block covers */
static unsigned int qcow2_refblock_shift(struct qcow2_metadata *md)
{
	return md->geo.cluster_bits + 3 - md->geo.refcount_order;
}

static unsigned long qcow2_reftable_entries(struct qcow2_metadata *md)
{
	return (unsigned long)md->geo.reftable_clusters << (md->geo.cluster_bits - 3);
}

/*
 * Note the clusters of a structure; false if one was taken already, or lies
 * where no one can tell.
 */
static bool qcow2_use(struct qcow2_metadata *md, u64 offset, u64 len)
{
	u64 c = offset >> md->geo.cluster_bits;
	u64 end = (offset + len + (1ULL << md->geo.cluster_bits) - 1) >>
		md->geo.cluster_bits;
	bool free = end <= md->nr_clusters;

	for (; c < end && c < md->nr_clusters; c++)
		if (__test_and_set_bit(c, md->used))
			free = false;
	return free;
}

static int qcow2_read_reftable(struct qcow2_metadata *md)
{
	unsigned long i, n = qcow2_reftable_entries(md);
	int r;

	r = qcow2_md_rw(md, REQ_OP_READ, md->geo.reftable_offset, md->reftable,
			n * 8);
	if (r) {
		DMERR_LIMIT("%s: cannot read the refcount table: %d", md->name, r);
		return r;
	}
	for (i = 0; i < n; i++) {
		u64 entry = be64_to_cpu(md->reftable[i]);
		enum qcow2_fault fault;

		fault = qcow2_reftable_check(entry, md->geo.cluster_bits,
					     md->meta_size);
		if (!fault && entry &&
		    !qcow2_use(md, entry, 1ULL << md->geo.cluster_bits))
			fault = QCOW2_FAULT_ENTRY_OVERLAP;
		if (fault) {
			DMERR_LIMIT("%s: refcount table entry %lu is corrupt (%#llx): %s",
				    md->name, i, (unsigned long long)entry,
				    qcow2_fault_str(fault));
			return -EUCLEAN;
		}
	}
	WRITE_ONCE(md->reftable_read, true);
	return 0;
}

/*
 * Bring the block with a cluster's refcount into md->refblock.  The cluster's
 * refcount block exists.  *@i is set to the place in md->refblock.
 */
static int qcow2_get_refblock(struct qcow2_metadata *md, u64 cluster,
			      unsigned int *i)
{
	unsigned int order = md->geo.refcount_order;
	unsigned int shift = qcow2_refblock_shift(md);
	/* log2 of the refcounts in a block */
	unsigned int block_shift = ilog2(md->block_bytes) + 3 - order;
	u64 in_refblock = cluster & ((1ULL << shift) - 1);
	u64 offset = be64_to_cpu(md->reftable[cluster >> shift]) +
		     (in_refblock >> block_shift) * md->block_bytes;
	int r;

	*i = in_refblock & ((1U << block_shift) - 1);
	if (md->refblock_offset == offset)
		return 0;
	md->refblock_offset = 0;
	r = qcow2_md_rw(md, REQ_OP_READ, offset, md->refblock, md->block_bytes);
	if (r)
		DMERR_LIMIT("%s: cannot read the refcounts at %#llx: %d",
			    md->name, (unsigned long long)offset, r);
	else
		md->refblock_offset = offset;
	return r;
}

/*
 * Find a free cluster, and reserve it in core.  The first cluster of a region
 * that has no refcount block yet is kept for that block, which the commit
 * creates: thus a reservation covers all that the commit needs.
 */
static int qcow2_alloc_cluster(struct qcow2_metadata *md, u64 *cluster)
{
	unsigned int shift = qcow2_refblock_shift(md);
	unsigned long entries = qcow2_reftable_entries(md);
	int r;

	for (; md->cursor < md->nr_clusters; md->cursor++) {
		u64 c = md->cursor;
		unsigned int i;

		if (c >> shift >= entries)
			break;
		if (md->reftable[c >> shift]) {
			r = qcow2_get_refblock(md, c, &i);
			if (r)
				return r;
			if (qcow2_refcount_get(md->refblock, i,
					       md->geo.refcount_order))
				continue;
		}
		if (test_bit(c, md->used)) {
			DMERR_LIMIT("%s: refcount of cluster %#llx is corrupt (0): %s",
				    md->name,
				    (unsigned long long)c << md->geo.cluster_bits,
				    qcow2_fault_str(QCOW2_FAULT_REFCOUNT_ZERO));
			return -EUCLEAN;
		}
		if (!md->reftable[c >> shift] && !(c & ((1ULL << shift) - 1)))
			continue;
		__set_bit(c, md->used);
		md->cursor++;
		*cluster = c;
		return 0;
	}
	DMERR_LIMIT("%s: no free metadata cluster for an L2 table", md->name);
	return -ENOSPC;
}

int qcow2_metadata_reserve(struct qcow2_metadata *md, unsigned long index)
{
	struct qcow2_bucket *bucket = qcow2_bucket(md, index);
	unsigned long i = index >> md->slices_per_l2_shift;
	struct qcow2_slice *slot;
	u64 offset, cluster;
	bool copied;
	int r;

	/* Before the first change, so that overlaps are known by then. */
	if (!md->reftable_read) {
		r = qcow2_read_reftable(md);
		if (r)
			return r;
	}
	r = qcow2_l2_offset(md, index, &offset, &copied);
	if (r)
		return r;
	/*
	 * The format would have us copy the table.  Nothing makes such images
	 * with an external data file, which cannot have snapshots.
	 */
	if (offset && !copied) {
		qcow2_bad_l1(md, i, offset, QCOW2_FAULT_ENTRY_SHARED);
		return -EIO;
	}
	if (!offset && !md->reserved[i]) {
		r = qcow2_alloc_cluster(md, &cluster);
		if (r)
			return r;
		WRITE_ONCE(md->reserved[i], cluster);
	}

	spin_lock_irq(&bucket->lock);
	slot = qcow2_slot(md, index);
	if (slot && !qcow2_is_tag(slot))
		WRITE_ONCE(slot->has_l2, true);
	spin_unlock_irq(&bucket->lock);
	return 0;
}

/*----------------------------------------------------------------
 * Commit (commit worker)
 *
 * The order of writes, which is all that keeps the image consistent at every
 * instant, is that of qcow2_commit_batch().
 *----------------------------------------------------------------
 */

static int qcow2_write_refblock(struct qcow2_metadata *md)
{
	return qcow2_md_rw(md, REQ_OP_WRITE, md->refblock_offset, md->refblock,
			   md->block_bytes);
}

/* Set the refcount of a cluster to 1 on disk; its refcount block exists. */
static int qcow2_take_cluster(struct qcow2_metadata *md, u64 cluster)
{
	unsigned int i;
	int r;

	r = qcow2_get_refblock(md, cluster, &i);
	if (r)
		return r;
	qcow2_refcount_set(md->refblock, i, md->geo.refcount_order, 1);
	return qcow2_write_refblock(md);
}

/*
 * Write the refcount of the cluster that was reserved for a new L2 table, and
 * the refcount block for it if need be.
 */
static int qcow2_commit_refcount(struct qcow2_metadata *md, u64 cluster)
{
	unsigned int bits = md->geo.cluster_bits;
	unsigned long rb = cluster >> qcow2_refblock_shift(md);
	struct qcow2_batch *batch = md->batch;
	int r;

	if (!md->reftable[rb]) {
		u64 self = (u64)rb << qcow2_refblock_shift(md);
		struct qcow2_ios ios;

		qcow2_ios_init(&ios);
		qcow2_ios_zero(md, &ios, self << bits, 1ULL << bits);
		r = qcow2_ios_wait(&ios);
		if (r)
			return r;
		__set_bit(self, md->used);
		md->reftable[rb] = cpu_to_be64(self << bits);
		batch->reftable[batch->nr_reftable++] =
			rb * 8 / md->block_bytes;
		r = qcow2_take_cluster(md, self);
		if (r)
			return r;
	}
	return qcow2_take_cluster(md, cluster);
}

/*
 * Steps of the commit that make new L2 tables safe to point at: refcounts,
 * then the tables themselves.  Nothing refers to any of it before the caller
 * writes L1.
 */
static int qcow2_commit_tables(struct qcow2_metadata *md)
{
	unsigned int bits = md->geo.cluster_bits;
	struct qcow2_batch *batch = md->batch;
	struct qcow2_ios ios;
	unsigned int i;
	int r;

	for (i = 0; i < batch->nr_fresh; i++) {
		r = qcow2_commit_refcount(md, md->reserved[batch->fresh[i]]);
		if (r)
			return r;
	}

	qcow2_ios_init(&ios);
	for (i = 0; i < batch->nr_fresh; i++)
		qcow2_ios_zero(md, &ios,
			       (u64)md->reserved[batch->fresh[i]] << bits,
			       1ULL << bits);
	r = qcow2_ios_wait(&ios);
	if (r)
		return r;

	qcow2_ios_init(&ios);
	for (i = 0; i < batch->nr; i++)
		if (batch->entries[i].fresh)
			qcow2_ios_rw(md, &ios, REQ_OP_WRITE,
				     batch->entries[i].offset,
				     batch->entries[i].buf, md->block_bytes);
	r = qcow2_ios_wait(&ios);
	if (r)
		return r;
	r = qcow2_md_flush(md);
	if (r || !batch->nr_reftable)
		return r;

	/* New refcount blocks are complete: now the table may name them. */
	qcow2_ios_init(&ios);
	for (i = 0; i < batch->nr_reftable; i++) {
		u64 block = (u64)batch->reftable[i] * md->block_bytes;

		qcow2_ios_rw(md, &ios, REQ_OP_WRITE,
			     md->geo.reftable_offset + block,
			     (void *)md->reftable + block, md->block_bytes);
	}
	r = qcow2_ios_wait(&ios);
	return r ? r : qcow2_md_flush(md);
}

/* Link new L2 tables, in core and on disk; the caller flushes. */
static void qcow2_commit_l1(struct qcow2_metadata *md, struct qcow2_ios *ios)
{
	unsigned int per_block = md->block_bytes / 8;
	struct qcow2_batch *batch = md->batch;
	unsigned int i, j;

	for (i = 0; i < batch->nr_fresh; i++) {
		unsigned long l1_index = batch->fresh[i];
		u64 offset = (u64)md->reserved[l1_index] << md->geo.cluster_bits;

		spin_lock_irq(&md->l1_lock);
		md->l1[l1_index] = cpu_to_be64(offset | QCOW2_OFLAG_COPIED);
		md->l1_used++;
		spin_unlock_irq(&md->l1_lock);
		WRITE_ONCE(md->reserved[l1_index], 0);
	}
	for (i = 0; i < batch->nr_fresh; i++) {
		unsigned long block = batch->fresh[i] / per_block;

		for (j = 0; j < i; j++)
			if (batch->fresh[j] / per_block == block)
				break;
		if (j == i)
			qcow2_ios_rw(md, ios, REQ_OP_WRITE,
				     md->geo.l1_offset +
				     (u64)block * md->block_bytes,
				     md->l1 + block * per_block,
				     md->block_bytes);
	}
}

static void qcow2_note_fresh(struct qcow2_batch *batch, unsigned long l1_index)
{
	unsigned int i;

	for (i = 0; i < batch->nr_fresh; i++)
		if (batch->fresh[i] == l1_index)
			return;
	batch->fresh[batch->nr_fresh++] = l1_index;
}

/*
 * Put the states that busy units had before into a block that was just taken:
 * what makes them busy may be under way for long, and must not keep an older
 * change from getting to the disk.
 */
static void qcow2_take_busy(struct qcow2_metadata *md, struct qcow2_batch_entry *e)
{
	struct qcow2_bucket *bucket = qcow2_bucket(md, e->slice->index);
	unsigned int start = e->block * md->units_per_block;
	unsigned int end = start + md->units_per_block - 1;
	struct qcow2_write *w;

	list_for_each_entry(w, &bucket->writes, node) {
		unsigned int first = max(w->first, start);
		unsigned int last = min(w->last, end);

		if (w->slice == e->slice && first <= last)
			qcow2_set_words(e->words, first - start, last - start,
					w->prev);
	}
}

/*
 * Move a slice's dirty blocks into the batch; the bucket lock is held.  Returns
 * false if the batch had not room for all of them.
 */
static bool qcow2_take_slice(struct qcow2_metadata *md,
			     struct qcow2_slice *slice)
{
	struct qcow2_batch *batch = md->batch;
	unsigned int words = md->units_per_block / QCOW2_UNITS_PER_WORD;
	unsigned long blocks = slice->dirty & (BIT(QCOW2_MAX_BLOCKS) - 1);
	u32 dirty = slice->dirty;
	unsigned int b;

	for_each_set_bit(b, &blocks, QCOW2_MAX_BLOCKS) {
		struct qcow2_batch_entry *e = batch->entries + batch->nr;

		if (batch->nr == batch->nr_bufs)
			break;
		e->slice = slice;
		e->block = b;
		e->buf = batch->bufs[batch->nr];
		e->words = batch->words + batch->nr++ * words;
		memcpy(e->words, slice->words + b * words,
		       words * sizeof(long));
		qcow2_take_busy(md, e);
		if (slice->trim)
			qcow2_take_trim(md, slice->trim, b, false);
		dirty &= ~BIT(b);
		dirty |= BIT(b + QCOW2_MAX_BLOCKS);
	}
	WRITE_ONCE(slice->dirty, dirty);
	if (dirty & (BIT(QCOW2_MAX_BLOCKS) - 1))
		return false;
	spin_lock(&md->lock);
	list_del_init(&slice->dirty_node);
	md->nr_dirty--;
	spin_unlock(&md->lock);
	return true;
}

/*
 * Fill the batch from md->committing.  Waits for no memory beyond the first
 * buffer, which the last batch has returned.
 */
static void qcow2_take_batch(struct qcow2_metadata *md)
{
	struct qcow2_batch *batch = md->batch;

	batch->nr = 0;
	batch->nr_bufs = 0;
	batch->nr_fresh = 0;
	batch->nr_reftable = 0;
	for (;;) {
		struct qcow2_bucket *bucket;
		struct qcow2_slice *slice;
		bool whole;

		spin_lock_irq(&md->lock);
		slice = list_first_entry_or_null(&md->committing,
						 struct qcow2_slice, dirty_node);
		spin_unlock_irq(&md->lock);
		if (!slice)
			return;

		while (batch->nr_bufs < QCOW2_BATCH &&
		       batch->nr_bufs < batch->nr + QCOW2_MAX_BLOCKS) {
			void *buf = mempool_alloc(&md->page_pool, batch->nr_bufs ?
						  GFP_NOWAIT | __GFP_NOWARN :
						  GFP_NOIO);

			if (!buf)
				break;
			batch->bufs[batch->nr_bufs++] = buf;
		}
		if (batch->nr == batch->nr_bufs)
			return;

		bucket = qcow2_bucket(md, slice->index);
		spin_lock_irq(&bucket->lock);
		whole = qcow2_take_slice(md, slice);
		spin_unlock_irq(&bucket->lock);
		/*
		 * No second look at a slice in the same batch: a block that
		 * has become dirty again meanwhile would be in it twice, and
		 * be written twice in no order.
		 */
		if (!whole)
			return;
	}
}

/* Nothing of the batch was written: its blocks are as dirty as they were. */
static void qcow2_untake_batch(struct qcow2_metadata *md)
{
	struct qcow2_batch *batch = md->batch;
	unsigned int i;

	for (i = 0; i < batch->nr; i++) {
		struct qcow2_batch_entry *e = batch->entries + i;
		struct qcow2_bucket *bucket = qcow2_bucket(md, e->slice->index);

		spin_lock_irq(&bucket->lock);
		WRITE_ONCE(e->slice->dirty,
			   (e->slice->dirty & ~BIT(e->block + QCOW2_MAX_BLOCKS)) |
			   BIT(e->block));
		if (e->slice->trim)
			qcow2_take_trim(md, e->slice->trim, e->block, true);
		spin_lock(&md->lock);
		if (list_empty(&e->slice->dirty_node)) {
			list_add_tail(&e->slice->dirty_node, &md->committing);
			md->nr_dirty++;
		}
		spin_unlock(&md->lock);
		spin_unlock_irq(&bucket->lock);
	}
}

static void qcow2_free_batch(struct qcow2_metadata *md)
{
	struct qcow2_batch *batch = md->batch;

	while (batch->nr_bufs)
		mempool_free(batch->bufs[--batch->nr_bufs], &md->page_pool);
	batch->nr = 0;
}

/* Find the place of each block, and start to read those that exist. */
static int qcow2_read_batch(struct qcow2_metadata *md, struct qcow2_ios *ios)
{
	unsigned long sub_mask = (1UL << md->slices_per_l2_shift) - 1;
	struct qcow2_batch *batch = md->batch;
	unsigned int i;
	bool copied;
	int r;

	for (i = 0; i < batch->nr; i++) {
		struct qcow2_batch_entry *e = batch->entries + i;
		unsigned long index = e->slice->index;
		unsigned long l1_index = index >> md->slices_per_l2_shift;

		r = qcow2_l2_offset(md, index, &e->offset, &copied);
		if (r)
			return r;
		e->fresh = !e->offset;
		if (e->fresh) {
			qcow2_note_fresh(batch, l1_index);
			e->offset = (u64)md->reserved[l1_index] <<
				md->geo.cluster_bits;
			memset(e->buf, 0, md->block_bytes);
		}
		e->offset += (u64)(index & sub_mask) * md->slice_bytes +
			     e->block * md->block_bytes;
		if (!e->fresh)
			qcow2_ios_rw(md, ios, REQ_OP_READ, e->offset, e->buf,
				     md->block_bytes);
	}
	return 0;
}

/*
 * Give one standard entry the state that its unit had when the block was taken,
 * unless the disk says so already.
 */
static void qcow2_patch_std(__be64 *entry, u64 guest, enum qcow2_state disk,
			    enum qcow2_state state)
{
	if (state == QCOW2_DATA && disk != QCOW2_DATA)
		*entry = cpu_to_be64(qcow2_l2_data_entry(guest));
	else if (state == QCOW2_ZERO && disk != QCOW2_ZERO)
		*entry = cpu_to_be64(QCOW2_OFLAG_ZERO);
}

/* The same for an extended entry, whose @n first units are on the device. */
static void qcow2_patch_ext(__be64 *entry, u64 guest, struct qcow2_ext_entry e,
			    const unsigned long *words, unsigned int unit,
			    unsigned int n)
{
	u32 data = 0, zero = 0, alloc;
	unsigned int i;

	for (i = 0; i < n; i++) {
		enum qcow2_state state = qcow2_get_state(words, unit + i);

		if (state == QCOW2_DATA)
			data |= BIT(i);
		else if (state == QCOW2_ZERO)
			zero |= BIT(i);
	}
	alloc = (e.alloc & ~zero) | data;
	zero = (e.zero & ~data) | zero;
	if (alloc == e.alloc && zero == e.zero)
		return;
	/* A cluster that has nothing left in the data file is let go. */
	if (!alloc)
		e.entry = 0;
	else if (data & ~e.alloc)
		e.entry = qcow2_l2_data_entry(guest);
	entry[0] = cpu_to_be64(e.entry);
	entry[1] = cpu_to_be64((u64)zero << 32 | alloc);
}

/*
 * Write the entries of those units that were data or zero when the block was
 * taken, and are not so on disk.  All other entries, and all other bits, stay
 * as they are.
 */
static int qcow2_patch_entry(struct qcow2_metadata *md,
			     struct qcow2_batch_entry *e)
{
	unsigned int unit_bits = md->unit_shift + SECTOR_SHIFT;
	unsigned int per_entry = 1U << md->entry_shift, unit;
	u64 guest = (((u64)e->slice->index << md->slice_shift) +
		     e->block * md->units_per_block) << unit_bits;
	__be64 *entry = e->buf;

	for (unit = 0; unit < md->units_per_block; unit += per_entry) {
		enum qcow2_state disk = QCOW2_UNALLOCATED, state;
		struct qcow2_ext_entry old;
		unsigned int run;

		if (guest >= md->geo.size)
			break;
		run = qcow2_words_run(e->words, unit, unit + per_entry - 1,
				      &state);
		if (run == per_entry && state != QCOW2_DATA && state != QCOW2_ZERO)
			goto next;
		old = qcow2_get_entry(md, entry, 0);
		/* it was sane when it was loaded */
		if (qcow2_check_entry(md, &old, guest, &disk))
			return -EUCLEAN;
		if (md->geo.ext_l2)
			qcow2_patch_ext(entry, guest, old, e->words, unit,
					min_t(u64, per_entry,
					      ((md->geo.size - guest - 1) >> unit_bits) + 1));
		else
			qcow2_patch_std(entry, guest, disk, state);
next:
		guest += (u64)per_entry << unit_bits;
		entry += md->geo.ext_l2 ? 2 : 1;
	}
	return 0;
}

static int qcow2_commit_batch(struct qcow2_metadata *md, bool *fatal)
{
	struct qcow2_batch *batch = md->batch;
	struct blk_plug plug;
	struct qcow2_ios ios;
	unsigned int i;
	int r, r2, r3;

	/*
	 * 1. The units that the batch calls data were written before it was
	 * taken; the flush makes them durable, together with all writes that
	 * were acknowledged so far.  Reading the blocks can go on meanwhile.
	 */
	qcow2_ios_init(&ios);
	/*
	 * A batch may be more than md->bs has in reserve: who has to wait for
	 * a bio submits what is plugged, for it sleeps.
	 */
	blk_start_plug(&plug);
	r = qcow2_read_batch(md, &ios);
	blk_finish_plug(&plug);
	r2 = blkdev_issue_flush(md->data_bdev);
	/*
	 * What the device has lost of the data it may not report a second
	 * time.  Some other flush may have been told, before or while this one
	 * was waiting for it.
	 */
	if (!r2 && READ_ONCE(md->lost))
		r2 = -EIO;
	*fatal = r2;
	if (r2)
		DMERR("%s: cannot flush the data device: %d", md->name, r2);
	r3 = qcow2_ios_wait(&ios);
	if (r3)
		DMERR_LIMIT("%s: cannot read an L2 table: %d", md->name, r3);
	if (!r)
		r = r2 ? r2 : r3;
	for (i = 0; !r && i < batch->nr; i++)
		r = qcow2_patch_entry(md, batch->entries + i);
	if (r || !batch->nr)
		return r;
	*fatal = true;

	/* 2. New L2 tables and their refcounts, durable before L1 names them */
	if (batch->nr_fresh) {
		r = qcow2_commit_tables(md);
		if (r)
			return r;
	}

	/* 3. Entries that point at what is durable by now */
	qcow2_ios_init(&ios);
	blk_start_plug(&plug);
	for (i = 0; i < batch->nr; i++)
		if (!batch->entries[i].fresh)
			qcow2_ios_rw(md, &ios, REQ_OP_WRITE,
				     batch->entries[i].offset,
				     batch->entries[i].buf, md->block_bytes);
	qcow2_commit_l1(md, &ios);
	blk_finish_plug(&plug);
	r = qcow2_ios_wait(&ios);
	if (!r)
		r = qcow2_md_flush(md);
	if (r)
		return r;

	for (i = 0; i < batch->nr; i++) {
		struct qcow2_batch_entry *e = batch->entries + i;
		struct qcow2_bucket *bucket = qcow2_bucket(md, e->slice->index);

		spin_lock_irq(&bucket->lock);
		WRITE_ONCE(e->slice->dirty, e->slice->dirty &
			   ~BIT(e->block + QCOW2_MAX_BLOCKS));
		spin_unlock_irq(&bucket->lock);
	}
	return 0;
}

int qcow2_metadata_commit(struct qcow2_metadata *md, bool *fatal)
{
	unsigned long changed;
	int r;

	/*
	 * Slices that get dirty from here on wait for the next commit, so that
	 * this one comes to an end.
	 */
	spin_lock_irq(&md->lock);
	changed = md->changed;
	list_splice_tail_init(&md->dirty, &md->committing);
	spin_unlock_irq(&md->lock);

	do {
		qcow2_take_batch(md);
		r = qcow2_commit_batch(md, fatal);
		if (r && !*fatal)
			qcow2_untake_batch(md);
		qcow2_free_batch(md);
	} while (!r && !list_empty_careful(&md->committing));

	if (!r) {
		WRITE_ONCE(md->durable, changed);
		return 0;
	}
	DMERR_LIMIT("%s: commit failed: %d", md->name, r);
	if (!*fatal) {
		spin_lock_irq(&md->lock);
		list_splice_init(&md->committing, &md->dirty);
		spin_unlock_irq(&md->lock);
	}
	return r;
}

/*----------------------------------------------------------------
 * Life cycle
 *----------------------------------------------------------------
 */

static int qcow2_check_l1(struct qcow2_metadata *md)
{
	unsigned int bits = md->geo.cluster_bits;
	unsigned long i;
	int r = 0;

	md->l1_used = 0;
	for (i = 0; i < md->geo.l1_entries; i++) {
		u64 entry = be64_to_cpu(md->l1[i]);
		enum qcow2_fault fault;

		if (!entry)
			continue;
		md->l1_used++;
		if (md->read_only)
			continue;
		fault = qcow2_l1_check(entry, bits, md->meta_size);
		entry &= QCOW2_OFFSET_MASK;
		if (!fault && entry && !qcow2_use(md, entry, 1ULL << bits))
			fault = QCOW2_FAULT_ENTRY_OVERLAP;
		if (!fault || i >= md->l1_needed)
			continue;
		r = qcow2_bad_l1(md, i, be64_to_cpu(md->l1[i]), fault);
		/*
		 * Fail each load that needs it.  The table is not written any
		 * more: the device goes read-only.
		 */
		md->l1[i] = cpu_to_be64(QCOW2_L1_RESERVED);
	}
	return r;
}

int qcow2_metadata_resume(struct qcow2_metadata *md)
{
	const struct qcow2_geometry *geo = &md->geo;
	/* whole blocks; the constructor has made sure of them for a writer */
	size_t len = min_t(u64, round_up((size_t)geo->l1_entries * 8,
					 md->block_bytes),
			   md->meta_size - geo->l1_offset);
	int r;

	r = qcow2_md_rw(md, REQ_OP_READ, geo->l1_offset, md->l1, len);
	if (r) {
		DMERR("%s: cannot read the L1 table: %d", md->name, r);
		return r;
	}
	md->changed = 0;
	md->durable = 0;
	md->reftable_read = false;
	md->refblock_offset = 0;
	md->cursor = 0;
	if (!md->read_only) {
		memset(md->reserved, 0, md->l1_needed * sizeof(*md->reserved));
		memset(md->used, 0, BITS_TO_LONGS(md->nr_clusters) * sizeof(long));
		qcow2_use(md, 0, 1);
		qcow2_use(md, geo->l1_offset, (u64)geo->l1_entries * 8);
		qcow2_use(md, geo->reftable_offset,
			  (u64)geo->reftable_clusters << geo->cluster_bits);
	}
	return qcow2_check_l1(md);
}

void qcow2_metadata_suspend(struct qcow2_metadata *md)
{
	struct qcow2_slice *slot, *next;
	LIST_HEAD(slices);
	unsigned long i;

	WRITE_ONCE(md->lost, false);
	for (i = 0; i < md->nr_slices; i++) {
		if (rcu_access_pointer(md->dir[i]) &&
		    qcow2_is_tag(rcu_access_pointer(md->dir[i])))
			RCU_INIT_POINTER(md->dir[i], NULL);
		cond_resched();
	}
	/* The shrinker may be at it, too. */
	for (i = 0; i < QCOW2_BUCKETS; i++) {
		struct qcow2_bucket *bucket = md->buckets + i;

		spin_lock_irq(&bucket->lock);
		list_for_each_entry(slot, &bucket->slices, node)
			RCU_INIT_POINTER(md->dir[slot->index], NULL);
		list_splice_init(&bucket->slices, &slices);
		bucket->nr_slices = 0;
		spin_unlock_irq(&bucket->lock);
		cond_resched();
	}
	spin_lock_irq(&md->lock);
	INIT_LIST_HEAD(&md->dirty);
	INIT_LIST_HEAD(&md->committing);
	INIT_LIST_HEAD(&md->trims);
	INIT_LIST_HEAD(&md->trimming);
	md->nr_dirty = 0;
	md->nr_slices_cached = 0;
	md->nr_slice_structs = 0;
	md->state_bytes = md->nr_slices * sizeof(*md->dir);
	spin_unlock_irq(&md->lock);
	if (list_empty(&slices))
		return;

	/* On removal, map() may be running for a last time. */
	synchronize_rcu();
	list_for_each_entry_safe(slot, next, &slices, node) {
		qcow2_slice_free(md, slot);
		cond_resched();
	}
}

void qcow2_metadata_destroy(struct qcow2_metadata *md)
{
	if (md->dir && md->buckets)
		qcow2_metadata_suspend(md);
	/* for qcow2_slice_free_rcu() */
	rcu_barrier();
	kvfree(md->dir);
	kvfree(md->buckets);
	kvfree(md->l1);
	kvfree(md->reftable);
	kvfree(md->used);
	kvfree(md->reserved);
	kvfree(md->batch);
	kfree(md->refblock);
	mempool_exit(&md->page_pool);
	mempool_exit(&md->slice_pool);
	mempool_exit(&md->state_pool);
	bioset_exit(&md->bs);
	kfree(md);
}

/* What only a writable image needs. */
static int qcow2_create_writer(struct qcow2_metadata *md)
{
	md->nr_clusters = min_t(u64, md->meta_size >> md->geo.cluster_bits,
				QCOW2_MAX_CLUSTERS);
	md->reftable = kvcalloc(qcow2_reftable_entries(md),
				sizeof(*md->reftable), GFP_KERNEL);
	md->used = kvcalloc(BITS_TO_LONGS(md->nr_clusters), sizeof(long),
			    GFP_KERNEL);
	md->reserved = kvcalloc(md->l1_needed, sizeof(*md->reserved),
				GFP_KERNEL);
	md->batch = kvzalloc(struct_size(md->batch, words, QCOW2_BATCH *
					 md->units_per_block / QCOW2_UNITS_PER_WORD),
			     GFP_KERNEL);
	md->refblock = kmalloc(md->block_bytes, GFP_KERNEL);
	if (!md->reftable || !md->used || !md->reserved || !md->batch ||
	    !md->refblock)
		return -ENOMEM;
	return 0;
}

static int qcow2_create_caches(struct qcow2_metadata *md)
{
	unsigned int i;
	int r;

	/* more than INT_MAX bytes are possible, but not to be had */
	md->dir = kvcalloc(md->nr_slices, sizeof(*md->dir),
			   GFP_KERNEL | __GFP_NOWARN);
	md->buckets = kvcalloc(QCOW2_BUCKETS, sizeof(*md->buckets), GFP_KERNEL);
	md->l1 = kvzalloc(round_up((size_t)md->geo.l1_entries * 8,
				   md->block_bytes), GFP_KERNEL);
	if (md->buckets) {
		for (i = 0; i < QCOW2_BUCKETS; i++) {
			spin_lock_init(&md->buckets[i].lock);
			INIT_LIST_HEAD(&md->buckets[i].writes);
			INIT_LIST_HEAD(&md->buckets[i].loads);
			INIT_LIST_HEAD(&md->buckets[i].slices);
		}
	}
	if (!md->dir || !md->buckets || !md->l1)
		return -ENOMEM;
	md->state_bytes = md->nr_slices * sizeof(*md->dir);
	md->cache_limit = md->cache_limit ?
			  max(md->cache_limit, md->state_bytes + QCOW2_MIN_CACHE) :
			  md->state_bytes + QCOW2_DEFAULT_CACHE;
	r = bioset_init(&md->bs, QCOW2_BATCH_RESERVE, 0, BIOSET_NEED_BVECS);
	if (r)
		return r;
	r = mempool_init(&md->state_pool, QCOW2_STATE_RESERVE,
			 qcow2_state_pool_alloc, qcow2_state_pool_free, md);
	if (r)
		return r;
	r = mempool_init_kmalloc_pool(&md->slice_pool, 2, md->slice_bytes);
	if (r)
		return r;
	return mempool_init_kmalloc_pool(&md->page_pool, QCOW2_BATCH_RESERVE,
					 md->block_bytes);
}

struct qcow2_metadata *
qcow2_metadata_create(struct block_device *bdev, struct block_device *data_bdev,
		      const char *name, const struct qcow2_config *config)
{
	const struct qcow2_geometry *geo = &config->geo;
	unsigned int slice_bits = geo->ext_l2 ? ilog2(QCOW2_EXT_SLICE_BYTES) :
				  min_t(unsigned int, geo->cluster_bits,
					ilog2(QCOW2_MAX_SLICE_BYTES));
	unsigned int unit_bits = qcow2_unit_bits(geo);
	struct qcow2_metadata *md;
	int r;

	md = kzalloc(sizeof(*md), GFP_KERNEL);
	if (!md)
		return ERR_PTR(-ENOMEM);
	md->bdev = bdev;
	md->data_bdev = data_bdev;
	md->name = name;
	md->geo = *geo;
	md->raw = config->raw;
	md->backing = config->backing;
	md->read_only = config->read_only;
	md->cache_limit = config->cache_limit;
	md->meta_size = bdev_nr_bytes(bdev);
	md->unit_shift = unit_bits - SECTOR_SHIFT;
	md->entry_shift = geo->cluster_bits - unit_bits;
	md->slice_bytes = 1U << slice_bits;
	md->slice_shift = slice_bits - qcow2_l2_entry_bits(geo) + md->entry_shift;
	md->slices_per_l2_shift = geo->cluster_bits - slice_bits;
	md->nr_slices = ((geo->size - 1) >> (md->slice_shift + unit_bits)) + 1;
	md->block_bytes = min(QCOW2_BLOCK_BYTES, 1U << geo->cluster_bits);
	md->units_per_block = md->block_bytes >> qcow2_l2_entry_bits(geo)
			      << md->entry_shift;
	md->l1_needed = qcow2_l1_entries_needed(geo);
	spin_lock_init(&md->lock);
	spin_lock_init(&md->l1_lock);
	INIT_LIST_HEAD(&md->dirty);
	INIT_LIST_HEAD(&md->committing);
	INIT_LIST_HEAD(&md->trims);
	INIT_LIST_HEAD(&md->trimming);

	r = qcow2_create_caches(md);
	if (!r && !md->read_only)
		r = qcow2_create_writer(md);
	if (r) {
		qcow2_metadata_destroy(md);
		return ERR_PTR(r);
	}
	return md;
}
