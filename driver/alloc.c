// SPDX-License-Identifier: GPL-2.0-only
/*
 * Allocation of metadata clusters.
 */
#include <linux/device-mapper.h>
#include <linux/log2.h>
#include <linux/mm.h>
#include <linux/slab.h>

#include "alloc.h"
#include "compat.h"
#include "mode.h"
#include "trace.h"

#define DM_MSG_PREFIX "qcow2"

/*
 * The allocator looks no further than this: beyond it lies nothing that an
 * image can need (4 Mi L2 tables with their refcounts).
 */
#define QCOW2_MAX_CLUSTERS	BIT_ULL(27)

/* The piece of the L1 table that is looked at in one go; bytes */
#define QCOW2_SCAN_BYTES	65536U

static unsigned long qcow2_reftable_entries(struct qcow2_alloc *a)
{
	return (unsigned long)a->geo.reftable_clusters << (a->geo.cluster_bits - 3);
}

/* What is known of the clusters of a structure */
enum qcow2_use { QCOW2_USE_OK, QCOW2_USE_OVERLAP, QCOW2_USE_BEYOND };

/* Note them as used; they should not be so already. */
static enum qcow2_use qcow2_use(struct qcow2_alloc *a, u64 offset, u64 len)
{
	u64 c = offset >> a->geo.cluster_bits;
	u64 end = (offset + len + (1ULL << a->geo.cluster_bits) - 1) >>
		a->geo.cluster_bits;
	enum qcow2_use use = end <= a->nr_clusters ? QCOW2_USE_OK :
						     QCOW2_USE_BEYOND;

	for (; c < end && c < a->nr_clusters; c++)
		if (__test_and_set_bit(c, a->used))
			use = QCOW2_USE_OVERLAP;
	return use;
}

/* The same for one cluster that an entry names. */
static enum qcow2_fault qcow2_use_entry(struct qcow2_alloc *a, u64 offset)
{
	switch (qcow2_use(a, offset, 1ULL << a->geo.cluster_bits)) {
	case QCOW2_USE_OK:
		break;
	case QCOW2_USE_OVERLAP:
		return QCOW2_FAULT_ENTRY_OVERLAP;
	case QCOW2_USE_BEYOND:
		/* Whether it overlaps no one can tell, so it is not a fault. */
		if (!a->beyond)
			DMWARN("%s: %#llx lies behind what can be accounted for: no first writes",
			       a->io->name, (unsigned long long)offset);
		a->beyond = true;
		break;
	}
	return QCOW2_OK;
}

enum qcow2_fault qcow2_alloc_use(struct qcow2_alloc *a, u64 offset, u64 len)
{
	switch (qcow2_use(a, offset, len)) {
	case QCOW2_USE_OK:
		return QCOW2_OK;
	case QCOW2_USE_OVERLAP:
		return QCOW2_FAULT_ENTRY_OVERLAP;
	case QCOW2_USE_BEYOND:
		break;
	}
	return QCOW2_FAULT_ENTRY_BEYOND;
}

static int qcow2_read_reftable(struct qcow2_alloc *a)
{
	unsigned long i, n = qcow2_reftable_entries(a);
	int r;

	r = qcow2_mdio_rw(a->io, REQ_OP_READ, a->geo.reftable_offset,
			  a->reftable, n * 8);
	if (r) {
		DMERR_LIMIT("%s: cannot read the refcount table: %d",
			    a->io->name, r);
		return r;
	}
	for (i = 0; i < n; i++) {
		u64 entry = be64_to_cpu(a->reftable[i]);
		enum qcow2_fault fault;

		fault = qcow2_reftable_check(entry, a->geo.cluster_bits,
					     a->io->size);
		if (!fault && entry)
			fault = qcow2_use_entry(a, entry);
		if (fault) {
			DMERR_LIMIT("%s: refcount table entry %lu is corrupt (%#llx): %s",
				    a->io->name, i, (unsigned long long)entry,
				    qcow2_fault_str(fault));
			return -EUCLEAN;
		}
		cond_resched();
	}
	if (!a->beyond)
		WRITE_ONCE(a->ready, true);
	return 0;
}

static u64 qcow2_region_block(struct qcow2_alloc *a, unsigned long region)
{
	u64 entry;

	spin_lock(&a->lock);
	entry = be64_to_cpu(a->reftable[region]);
	spin_unlock(&a->lock);
	return entry;
}

u64 qcow2_alloc_refcount(struct qcow2_alloc *a, u64 cluster, unsigned int *i)
{
	unsigned int order = a->geo.refcount_order;
	unsigned int shift = qcow2_alloc_region_shift(a);
	/* log2 of the refcounts in a block of I/O */
	unsigned int block_shift = ilog2(a->io->block_bytes) + 3 - order;
	u64 in_region = cluster & ((1ULL << shift) - 1);

	*i = in_region & ((1U << block_shift) - 1);
	return qcow2_region_block(a, cluster >> shift) +
	       (in_region >> block_shift) * a->io->block_bytes;
}

/* The refcount of a cluster on disk, for which there is a refcount block. */
static int qcow2_read_refcount(struct qcow2_alloc *a, u64 cluster,
			       u64 *refcount)
{
	unsigned int i;
	u64 offset = qcow2_alloc_refcount(a, cluster, &i);
	int r;

	if (a->refblock_offset != offset) {
		a->refblock_offset = 0;
		r = qcow2_mdio_rw(a->io, REQ_OP_READ, offset, a->refblock,
				  a->io->block_bytes);
		if (r) {
			DMERR_LIMIT("%s: cannot read the refcounts at %#llx: %d",
				    a->io->name, (unsigned long long)offset, r);
			return r;
		}
		a->refblock_offset = offset;
	}
	/*
	 * Commits write refcounts of clusters below the cursor only, so that
	 * what has been read stays true for those that are asked for.
	 */
	*refcount = qcow2_refcount_get(a->refblock, i, a->geo.refcount_order);
	return 0;
}

/* Find a free cluster, from the cursor on.  0, -ENOSPC, or as above. */
static int qcow2_find_cluster(struct qcow2_alloc *a, u64 *cluster)
{
	unsigned int shift = qcow2_alloc_region_shift(a);
	unsigned long entries = qcow2_reftable_entries(a);
	u64 c;
	int r;

	for (c = a->cursor; c < a->nr_clusters; c++) {
		bool block;
		u64 refcount;

		if (c >> shift >= entries)
			break;
		WRITE_ONCE(a->cursor, c);
		block = qcow2_region_block(a, c >> shift);
		if (block) {
			r = qcow2_read_refcount(a, c, &refcount);
			if (r)
				return r;
			if (refcount)
				continue;
		}
		if (test_bit(c, a->used)) {
			DMERR_LIMIT("%s: refcount of cluster %#llx is corrupt (0): %s",
				    a->io->name,
				    (unsigned long long)c << a->geo.cluster_bits,
				    qcow2_fault_str(QCOW2_FAULT_REFCOUNT_ZERO));
			return -EUCLEAN;
		}
		/* The first one of a region without refcounts is for them. */
		if (!block && !(c & ((1ULL << shift) - 1)))
			continue;
		*cluster = c;
		return 0;
	}
	WRITE_ONCE(a->cursor, a->nr_clusters);
	return -ENOSPC;
}

/*
 * Make the space of a cluster real, and have it read as zeros.  Where the table
 * line says that both are the case already there is nothing to do: no table of this
 * device has written a cluster there without counting or keeping it.
 */
static int qcow2_zero_cluster(struct qcow2_alloc *a, u64 cluster)
{
	unsigned int bits = a->geo.cluster_bits;
	struct qcow2_ios ios;

	if (cluster << bits >= a->zeroed_from)
		return 0;
	qcow2_ios_init(&ios);
	qcow2_mdio_start_zero(a->io, &ios, cluster << bits, 1ULL << bits);
	return qcow2_ios_wait(&ios);
}

/*
 * A cluster cannot be written: the next request tries another one.  But it may be
 * the device, and not the cluster; so it comes last, and not too many do.
 */
static void qcow2_skip(struct qcow2_alloc *a, u64 cluster)
{
	if (a->nr_skipped == QCOW2_MAX_SKIPPED)
		return;
	memmove(a->skipped + 1, a->skipped, a->nr_skipped * sizeof(*a->skipped));
	a->skipped[0] = cluster;
	WRITE_ONCE(a->nr_skipped, a->nr_skipped + 1);
	if (cluster >= a->cursor)
		WRITE_ONCE(a->cursor, cluster + 1);
}

/* Have a refcount block for a region, if only of zeros that nothing refers to. */
static int qcow2_reserve_region(struct qcow2_alloc *a, unsigned long region)
{
	u64 self = (u64)region << qcow2_alloc_region_shift(a);
	int r;

	if (qcow2_region_block(a, region))
		return 0;
	r = qcow2_zero_cluster(a, self);
	if (r)
		return r;
	__set_bit(self, a->used);
	spin_lock(&a->lock);
	a->reftable[region] = cpu_to_be64(self << a->geo.cluster_bits);
	__set_bit(region, a->fresh);
	spin_unlock(&a->lock);
	return 0;
}

/* Say once that it is time to make room. */
static void qcow2_check_low(struct qcow2_alloc *a)
{
	u64 left = qcow2_alloc_free(a), need = a->l1->needed - a->tables;

	if (a->low || left >= need || left > max(a->nr_clusters >> 4, 16ULL))
		return;
	a->low = true;
	DMWARN("%s: %llu metadata clusters are left, and up to %llu L2 tables to come",
	       a->io->name, (unsigned long long)left, (unsigned long long)need);
	qcow2_mode_event(a->health);
}

static int qcow2_reserve_cluster(struct qcow2_alloc *a, u64 *cluster)
{
	int r;

	r = qcow2_find_cluster(a, cluster);
	if (r == -ENOSPC && a->nr_skipped) {
		WRITE_ONCE(a->nr_skipped, a->nr_skipped - 1);
		*cluster = a->skipped[a->nr_skipped];
		r = 0;
	}
	if (r == -ENOSPC)
		DMERR_LIMIT("%s: no free metadata cluster for an L2 table",
			    a->io->name);
	if (r)
		return r;
	r = qcow2_reserve_region(a, *cluster >> qcow2_alloc_region_shift(a));
	if (!r)
		r = qcow2_zero_cluster(a, *cluster);
	if (r) {
		if (r != -ENOSPC || *cluster < a->cursor)
			qcow2_skip(a, *cluster);
		DMERR_LIMIT("%s: cannot write a new metadata cluster at %#llx: %d",
			    a->io->name,
			    (unsigned long long)*cluster << a->geo.cluster_bits, r);
		return r;
	}
	__set_bit(*cluster, a->used);
	WRITE_ONCE(a->cursor, max(a->cursor, *cluster + 1));
	return 0;
}

int qcow2_alloc_reserve(struct qcow2_alloc *a, unsigned long i)
{
	u64 offset, cluster;
	bool copied;
	int r;

	/* Before the first change, so that overlaps are known by then. */
	if (!a->ready && !a->beyond) {
		r = qcow2_read_reftable(a);
		if (r)
			return r;
	}
	if (a->beyond)
		return -EFBIG;
	/* First this, then L1: see the other end of it, qcow2_alloc_linked(). */
	if (smp_load_acquire(&a->reserved[i]))
		return 0;
	r = qcow2_l1_table(a->l1, i, &offset, &copied);
	if (r)
		return r;
	/*
	 * The format would have us copy the table.  Nothing makes such images
	 * with an external data file, which cannot have snapshots.
	 */
	if (offset && !copied) {
		qcow2_l1_bad(a->l1, i, offset, QCOW2_FAULT_ENTRY_SHARED);
		return -EIO;
	}
	if (offset)
		return 0;
	r = qcow2_reserve_cluster(a, &cluster);
	trace_qcow2_reserve(a->io->name, i, r ? 0 : cluster, r);
	if (r)
		return r;
	WRITE_ONCE(a->reserved[i], cluster);
	a->tables++;
	qcow2_check_low(a);
	return 0;
}

bool qcow2_alloc_has_table(struct qcow2_alloc *a, unsigned long i)
{
	u64 entry;

	if (!READ_ONCE(a->ready))
		return false;
	/*
	 * What was reserved has to be seen here: the slice that was there then
	 * may have been dropped since, and would be so again and again until
	 * the table is there.
	 */
	if (smp_load_acquire(&a->reserved[i]))
		return true;
	entry = qcow2_l1_entry(a->l1, i);
	return (entry & QCOW2_OFFSET_MASK) && (entry & QCOW2_OFLAG_COPIED);
}

u64 qcow2_alloc_reserved(struct qcow2_alloc *a, unsigned long i, bool *tried)
{
	u32 reserved = READ_ONCE(a->reserved[i]);

	*tried = reserved & QCOW2_LINK_TRIED;
	return reserved & ~QCOW2_LINK_TRIED;
}

void qcow2_alloc_link_tried(struct qcow2_alloc *a, unsigned long i)
{
	WRITE_ONCE(a->reserved[i], a->reserved[i] | QCOW2_LINK_TRIED);
}

void qcow2_alloc_linked(struct qcow2_alloc *a, unsigned long i)
{
	/* Whoever does not see it any more sees the L1 entry. */
	smp_store_release(&a->reserved[i], 0);
}

bool qcow2_alloc_fresh(struct qcow2_alloc *a, unsigned long region)
{
	bool fresh;

	spin_lock(&a->lock);
	fresh = test_bit(region, a->fresh);
	spin_unlock(&a->lock);
	return fresh;
}

void qcow2_alloc_copy_reftable(struct qcow2_alloc *a, unsigned long block,
			       __be64 *buf)
{
	unsigned int n = a->io->block_bytes / 8, i;
	unsigned long first = block * n;

	spin_lock(&a->lock);
	for (i = 0; i < n; i++)
		buf[i] = test_bit(first + i, a->fresh) ? 0 :
							 a->reftable[first + i];
	spin_unlock(&a->lock);
}

void qcow2_alloc_add_region(struct qcow2_alloc *a, unsigned long region,
			    __be64 *buf)
{
	buf[region % (a->io->block_bytes / 8)] =
		cpu_to_be64(qcow2_region_block(a, region));
}

void qcow2_alloc_region_done(struct qcow2_alloc *a, unsigned long region)
{
	spin_lock(&a->lock);
	__clear_bit(region, a->fresh);
	spin_unlock(&a->lock);
}

/*----------------------------------------------------------------
 * Life cycle
 *----------------------------------------------------------------
 */

/* Look at the entries that the virtual size needs. */
static int qcow2_check_l1(struct qcow2_alloc *a)
{
	struct qcow2_l1 *l1 = a->l1;
	unsigned long i;
	int r = 0;

	for (i = 0; i < l1->needed; i++) {
		u64 entry = qcow2_l1_entry(l1, i);
		u64 offset = entry & QCOW2_OFFSET_MASK;
		enum qcow2_fault fault;

		fault = qcow2_l1_check(entry, a->geo.cluster_bits, a->io->size);
		if (!fault && offset)
			fault = qcow2_use_entry(a, offset);
		if (fault) {
			r = qcow2_l1_bad(l1, i, entry, fault);
			qcow2_l1_spoil(l1, i);
		}
		cond_resched();
	}
	return r;
}

/*
 * L2 tables behind the virtual size: their clusters are taken.  What is wrong with
 * them is of no consequence.
 */
static int qcow2_scan_l1(struct qcow2_alloc *a)
{
	struct qcow2_l1 *l1 = a->l1;
	unsigned int block = a->io->block_bytes;
	u64 offset = a->geo.l1_offset +
		     round_down((u64)l1->needed * 8, block);
	u64 end = a->geo.l1_offset + (u64)a->geo.l1_entries * 8;
	unsigned long i = round_down(l1->needed, block / 8);
	__be64 *buf;
	int r = 0;

	if (l1->needed >= a->geo.l1_entries)
		return 0;
	buf = kvmalloc(QCOW2_SCAN_BYTES, GFP_NOIO);
	if (!buf)
		return -ENOMEM;
	while (!r && offset < end) {
		/* whole blocks; the constructor has made sure of them */
		unsigned int len = min_t(u64, QCOW2_SCAN_BYTES,
					 round_up(end - offset, block));
		unsigned int j;

		r = qcow2_mdio_rw(a->io, REQ_OP_READ, offset, buf, len);
		for (j = 0; !r && j < len / 8 && i < a->geo.l1_entries; j++, i++) {
			u64 entry = be64_to_cpu(buf[j]);

			if (i < l1->needed || !entry)
				continue;
			spin_lock_irq(&l1->lock);
			l1->used++;
			spin_unlock_irq(&l1->lock);
			if (!qcow2_l1_check(entry, a->geo.cluster_bits, a->io->size) &&
			    (entry & QCOW2_OFFSET_MASK))
				qcow2_use_entry(a, entry & QCOW2_OFFSET_MASK);
		}
		offset += len;
		cond_resched();
	}
	kvfree(buf);
	if (r)
		DMERR("%s: cannot read the L1 table: %d", a->io->name, r);
	return r;
}

int qcow2_alloc_resume(struct qcow2_alloc *a)
{
	const struct qcow2_geometry *geo = &a->geo;
	int r;

	a->ready = false;
	a->beyond = false;
	a->nr_skipped = 0;
	a->tables = a->l1->used;
	a->refblock_offset = 0;
	a->cursor = 0;
	memset(a->reserved, 0, a->l1->needed * sizeof(*a->reserved));
	memset(a->used, 0, BITS_TO_LONGS(a->nr_clusters) * sizeof(long));
	memset(a->fresh, 0, BITS_TO_LONGS(qcow2_reftable_entries(a)) * sizeof(long));
	qcow2_use(a, 0, 1);
	qcow2_use(a, geo->l1_offset, (u64)geo->l1_entries * 8);
	qcow2_use(a, geo->reftable_offset,
		  (u64)geo->reftable_clusters << geo->cluster_bits);
	r = qcow2_check_l1(a);
	return r ? r : qcow2_scan_l1(a);
}

int qcow2_alloc_init(struct qcow2_alloc *a, struct qcow2_mdio *io,
		     struct qcow2_l1 *l1, struct qcow2_health *health,
		     const struct qcow2_geometry *geo, u64 zeroed_from)
{
	a->io = io;
	a->l1 = l1;
	a->health = health;
	a->geo = *geo;
	a->zeroed_from = zeroed_from ?: U64_MAX;
	spin_lock_init(&a->lock);
	a->nr_clusters = min_t(u64, io->size >> geo->cluster_bits,
			       QCOW2_MAX_CLUSTERS);
	a->reftable = kvcalloc(qcow2_reftable_entries(a), sizeof(*a->reftable),
			       GFP_KERNEL);
	a->fresh = kvcalloc(BITS_TO_LONGS(qcow2_reftable_entries(a)),
			    sizeof(long), GFP_KERNEL);
	a->used = kvcalloc(BITS_TO_LONGS(a->nr_clusters), sizeof(long),
			   GFP_KERNEL);
	a->reserved = kvcalloc(l1->needed, sizeof(*a->reserved), GFP_KERNEL);
	a->refblock = kmalloc(io->block_bytes, GFP_KERNEL);
	if (!a->reftable || !a->fresh || !a->used || !a->reserved ||
	    !a->refblock)
		return -ENOMEM;
	return 0;
}

void qcow2_alloc_exit(struct qcow2_alloc *a)
{
	kvfree(a->reftable);
	kvfree(a->fresh);
	kvfree(a->used);
	kvfree(a->reserved);
	kfree(a->refblock);
}
