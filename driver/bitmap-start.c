// SPDX-License-Identifier: GPL-2.0-only
/*
 * Dirty bitmaps: their beginning and their end, and what status says of them.
 */
#include <linux/mm.h>
#include <linux/sched/mm.h>
#include <linux/slab.h>

#include "bitmap-internal.h"

/* Buffers for blocks that are kept in reserve */
#define QCOW2_MARK_RESERVE	4

void qcow2_bitmaps_forget(struct qcow2_bitmaps *bm)
{
	unsigned int i, count;
	LIST_HEAD(gone);

	/* Whoever looks for room, or for status, may be at it. */
	spin_lock_irq(&bm->lock);
	count = bm->count;
	WRITE_ONCE(bm->count, 0);
	list_splice_init(&bm->lru, &gone);
	INIT_LIST_HEAD(&bm->todo);
	for (i = 0; i < count; i++)
		xa_destroy(&bm->records[i].blocks);
	qcow2_empty_gate(bm);
	bm->next = 0;
	bm->ahead = 0;
	bm->streak = 0;
	WRITE_ONCE(bm->nr_unsure, 0);
	spin_unlock_irq(&bm->lock);
	qcow2_free_blocks(bm, &gone);
	for (i = 0; i < count; i++) {
		kvfree(bm->records[i].clusters);
		bm->records[i].clusters = NULL;
	}
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
	r = qcow2_bits_pool_init(bm);
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
