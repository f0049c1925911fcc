// SPDX-License-Identifier: GPL-2.0-only
/*
 * Metadata of a qcow2 image with an external data file: reading L1 and L2
 * tables, allocating metadata clusters, and the commit.
 */
#include <linux/bio.h>
#include <linux/completion.h>
#include <linux/device-mapper.h>
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
	/* the block's states when it was taken */
	unsigned long words[QCOW2_BLOCK_BYTES / 8 / QCOW2_UNITS_PER_WORD];
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

	qcow2_ios_init(&ios);
	qcow2_ios_rw(md, &ios, opf, offset, buf, len);
	return qcow2_ios_wait(&ios);
}

static int qcow2_md_flush(struct qcow2_metadata *md)
{
	return blkdev_issue_flush(md->bdev);
}

/*----------------------------------------------------------------
 * States
 *----------------------------------------------------------------
 */

static unsigned long *qcow2_alloc_words(struct qcow2_metadata *md, gfp_t gfp)
{
	return kmalloc((1U << md->slice_shift) / 4, gfp);
}

void qcow2_set_states(struct qcow2_slice *slice, unsigned int first,
		      unsigned int last, enum qcow2_state state)
{
	unsigned long pattern = (~0UL / 3) * state;

	while (first <= last) {
		unsigned int shift = first % QCOW2_UNITS_PER_WORD;
		unsigned int n = min_t(unsigned int, last - first + 1,
				       QCOW2_UNITS_PER_WORD - shift);
		unsigned long *word = slice->words + first / QCOW2_UNITS_PER_WORD;
		unsigned long mask = ~0UL >> (BITS_PER_LONG - 2 * n) << 2 * shift;

		WRITE_ONCE(*word, (*word & ~mask) | (pattern & mask));
		first += n;
	}
}

bool qcow2_mark_dirty(struct qcow2_metadata *md, struct qcow2_slice *slice,
		      unsigned int first, unsigned int last)
{
	u32 blocks = GENMASK(last / md->entries_per_block,
			     first / md->entries_per_block);
	bool was_clean;

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

static struct qcow2_slice *qcow2_slice_alloc(struct qcow2_metadata *md,
					     unsigned long index)
{
	struct qcow2_slice *slice;

	/*
	 * GFP_NOIO because writeback may be waiting for the bio that needs it.
	 * The bio cannot go on without.  A pool would be no help, since slices
	 * are kept; they are a few KiB at most, and one is needed per 512 MiB
	 * of a disk (at 64 KiB clusters).
	 */
	slice = kmalloc(sizeof(*slice), GFP_NOIO | __GFP_NOFAIL);
	slice->words = qcow2_alloc_words(md, GFP_NOIO | __GFP_NOFAIL);
	slice->index = index;
	INIT_LIST_HEAD(&slice->dirty_node);
	slice->dirty = 0;
	slice->has_l2 = false;
	slice->bad = false;
	return slice;
}

static unsigned long qcow2_slice_bytes(struct qcow2_metadata *md)
{
	return sizeof(struct qcow2_slice) + (1U << md->slice_shift) / 4;
}

void qcow2_slot_free(struct qcow2_metadata *md, struct qcow2_slice *slot)
{
	if (!slot || qcow2_is_tag(slot))
		return;
	kfree(slot->words);
	kfree(slot);
}

void qcow2_slot_publish(struct qcow2_metadata *md, unsigned long index,
			struct qcow2_slice *slot)
{
	struct qcow2_slice *old;

	old = rcu_dereference_protected(md->dir[index],
					lockdep_is_held(&qcow2_bucket(md, index)->lock));
	rcu_assign_pointer(md->dir[index], slot);

	spin_lock(&md->lock);
	if (!old)
		md->nr_slices_cached++;
	if (!qcow2_is_tag(slot))
		md->state_bytes += qcow2_slice_bytes(md);
	spin_unlock(&md->lock);
}

void qcow2_slot_expand(struct qcow2_metadata *md, unsigned long index)
{
	struct qcow2_bucket *bucket = qcow2_bucket(md, index);
	struct qcow2_slice *slice = qcow2_slice_alloc(md, index), *slot;
	u64 entry;

	spin_lock_irq(&bucket->lock);
	slot = rcu_dereference_protected(md->dir[index],
					 lockdep_is_held(&bucket->lock));
	if (slot && qcow2_is_tag(slot)) {
		qcow2_set_states(slice, 0, (1U << md->slice_shift) - 1,
				 qcow2_tag_state(slot));
		spin_lock(&md->l1_lock);
		entry = be64_to_cpu(md->l1[index >> md->slices_per_l2_shift]);
		spin_unlock(&md->l1_lock);
		slice->has_l2 = (entry & QCOW2_OFFSET_MASK) &&
				(entry & QCOW2_OFLAG_COPIED) &&
				READ_ONCE(md->reftable_read);
		qcow2_slot_publish(md, index, slice);
		slice = NULL;
	}
	spin_unlock_irq(&bucket->lock);

	qcow2_slot_free(md, slice);
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

/* Decode @buf into states; all-equal ones become a tag. */
static struct qcow2_slice *qcow2_decode(struct qcow2_metadata *md,
					unsigned long index, const __be64 *buf)
{
	unsigned int i, n = 1U << md->slice_shift;
	unsigned int bits = md->geo.cluster_bits;
	u64 guest = (u64)index << (md->slice_shift + bits);
	enum qcow2_state first = QCOW2_UNALLOCATED, state;
	struct qcow2_slice *slice = NULL;

	for (i = 0; i < n; i++, guest += 1ULL << bits) {
		u64 entry = be64_to_cpu(buf[i]);
		enum qcow2_fault fault;

		/*
		 * Entries beyond the virtual size are not ours; giving them
		 * the first one's state lets the slice be a tag.
		 */
		if (guest >= md->geo.size) {
			if (slice)
				qcow2_set_states(slice, i, n - 1, first);
			break;
		}
		fault = qcow2_l2_decode(entry, guest, bits, &state);
		if (fault) {
			qcow2_bad_l2(md, guest, entry, fault);
			state = QCOW2_BUSY;
		}
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

static const char *qcow2_compare_header(struct qcow2_metadata *md, bool raw,
					bool read_only,
					const struct qcow2_header *h)
{
	u64 autoclear = be64_to_cpu(h->autoclear_features);
	struct qcow2_geometry geo;
	enum qcow2_fault fault;

	fault = qcow2_header_check(h, read_only, &geo);
	if (fault)
		return qcow2_fault_str(fault);
	if (geo.ext_l2)
		return "image has extended L2 entries, which are not supported yet";
	if (h->backing_file_offset)
		return "image has a backing file, which is not supported yet";
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
	if (!!(autoclear & QCOW2_AUTOCLEAR_RAW_DATA) != raw)
		return raw ? "data_file_raw is given, but the image has not the raw bit" :
			     "image has the raw bit: data_file_raw is needed";
	if (!read_only && (autoclear & ~QCOW2_AUTOCLEAR_KNOWN))
		return "unknown autoclear bits are set: use qcow2setup, or read_only";
	return NULL;
}

int qcow2_metadata_check_header(struct qcow2_metadata *md, bool raw,
				bool read_only, char **error)
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
		cause = qcow2_compare_header(md, raw, read_only, buf);
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
		md->reserved[i] = cluster;
	}

	spin_lock_irq(&bucket->lock);
	slot = rcu_dereference_protected(md->dir[index],
					 lockdep_is_held(&bucket->lock));
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
		md->reserved[l1_index] = 0;
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
 * Move a slice's dirty blocks into the batch; the bucket lock is held.  Returns
 * false if the batch had not room for all of them.
 */
static bool qcow2_take_slice(struct qcow2_metadata *md,
			     struct qcow2_slice *slice)
{
	struct qcow2_batch *batch = md->batch;
	unsigned int words = md->entries_per_block / QCOW2_UNITS_PER_WORD;
	unsigned long blocks = slice->dirty & (BIT(QCOW2_MAX_BLOCKS) - 1);
	u32 dirty = slice->dirty;
	unsigned int b;

	for_each_set_bit(b, &blocks, QCOW2_MAX_BLOCKS) {
		struct qcow2_batch_entry *e = batch->entries + batch->nr;

		if (batch->nr == batch->nr_bufs)
			break;
		e->slice = slice;
		e->block = b;
		e->buf = batch->bufs[batch->nr++];
		memcpy(e->words, slice->words + b * words,
		       words * sizeof(long));
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
 * Write the entries of those units that were data when the block was taken and
 * are not on disk.  All other entries, and all other bits, stay as they are.
 */
static int qcow2_patch_entry(struct qcow2_metadata *md,
			     struct qcow2_batch_entry *e)
{
	unsigned int bits = md->geo.cluster_bits, i;
	u64 guest = (((u64)e->slice->index << md->slice_shift) +
		     e->block * md->entries_per_block) << bits;
	__be64 *entries = e->buf;

	for (i = 0; i < md->entries_per_block; i++, guest += 1ULL << bits) {
		enum qcow2_state state;
		enum qcow2_fault fault;

		if (guest >= md->geo.size)
			break;
		if (qcow2_get_state(e->words, i) != QCOW2_DATA)
			continue;
		fault = qcow2_l2_decode(be64_to_cpu(entries[i]), guest, bits,
					&state);
		/* it was sane when it was loaded */
		if (fault) {
			qcow2_bad_l2(md, guest, be64_to_cpu(entries[i]), fault);
			return -EIO;
		}
		if (state != QCOW2_DATA)
			entries[i] = cpu_to_be64(qcow2_l2_data_entry(guest));
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
	blk_start_plug(&plug);
	r = qcow2_read_batch(md, &ios);
	blk_finish_plug(&plug);
	r2 = blkdev_issue_flush(md->data_bdev);
	/*
	 * What the device has lost of the data it may not report a second
	 * time.
	 */
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
	unsigned long i;
	LIST_HEAD(slices);

	for (i = 0; i < md->nr_slices; i++) {
		slot = rcu_dereference_protected(md->dir[i], true);
		if (!slot)
			continue;
		RCU_INIT_POINTER(md->dir[i], NULL);
		if (!qcow2_is_tag(slot))
			list_move(&slot->dirty_node, &slices);
		cond_resched();
	}
	md->nr_dirty = 0;
	md->nr_slices_cached = 0;
	md->state_bytes = md->nr_slices * sizeof(*md->dir);
	if (list_empty(&slices))
		return;

	/* On removal, map() may be running for a last time. */
	synchronize_rcu();
	list_for_each_entry_safe(slot, next, &slices, dirty_node) {
		qcow2_slot_free(md, slot);
		cond_resched();
	}
}

void qcow2_metadata_destroy(struct qcow2_metadata *md)
{
	if (md->dir)
		qcow2_metadata_suspend(md);
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
	md->batch = kvzalloc(sizeof(*md->batch), GFP_KERNEL);
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

	md->dir = kvcalloc(md->nr_slices, sizeof(*md->dir), GFP_KERNEL);
	md->buckets = kvcalloc(QCOW2_BUCKETS, sizeof(*md->buckets), GFP_KERNEL);
	md->l1 = kvzalloc(round_up((size_t)md->geo.l1_entries * 8,
				   md->block_bytes), GFP_KERNEL);
	if (!md->dir || !md->buckets || !md->l1)
		return -ENOMEM;
	md->state_bytes = md->nr_slices * sizeof(*md->dir);
	for (i = 0; i < QCOW2_BUCKETS; i++) {
		spin_lock_init(&md->buckets[i].lock);
		INIT_LIST_HEAD(&md->buckets[i].writes);
		INIT_LIST_HEAD(&md->buckets[i].loads);
	}
	r = bioset_init(&md->bs, QCOW2_BATCH_RESERVE, 0, BIOSET_NEED_BVECS);
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
		      const char *name, const struct qcow2_geometry *geo,
		      bool read_only)
{
	unsigned int slice_bits = min_t(unsigned int, geo->cluster_bits,
					ilog2(QCOW2_MAX_SLICE_BYTES));
	struct qcow2_metadata *md;
	int r;

	md = kzalloc(sizeof(*md), GFP_KERNEL);
	if (!md)
		return ERR_PTR(-ENOMEM);
	md->bdev = bdev;
	md->data_bdev = data_bdev;
	md->name = name;
	md->geo = *geo;
	md->read_only = read_only;
	md->meta_size = bdev_nr_bytes(bdev);
	md->unit_shift = geo->cluster_bits - SECTOR_SHIFT;
	md->slice_bytes = 1U << slice_bits;
	md->slice_shift = slice_bits - 3;
	md->slices_per_l2_shift = geo->cluster_bits - slice_bits;
	md->nr_slices = ((geo->size - 1) >>
			 (md->slice_shift + geo->cluster_bits)) + 1;
	md->block_bytes = min(QCOW2_BLOCK_BYTES, 1U << geo->cluster_bits);
	md->entries_per_block = md->block_bytes / 8;
	md->l1_needed = qcow2_l1_entries_needed(geo);
	spin_lock_init(&md->lock);
	spin_lock_init(&md->l1_lock);
	INIT_LIST_HEAD(&md->dirty);
	INIT_LIST_HEAD(&md->committing);

	r = qcow2_create_caches(md);
	if (!r && !read_only)
		r = qcow2_create_writer(md);
	if (r) {
		qcow2_metadata_destroy(md);
		return ERR_PTR(r);
	}
	return md;
}
