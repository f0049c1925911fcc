// SPDX-License-Identifier: GPL-2.0-only
/*
 * First writes, and what fills the rest of their units.
 */
#include <linux/slab.h>

#include "compat.h"
#include "fill.h"
#include "trace.h"

/* Fills and copies that are kept in reserve */
#define QCOW2_FILL_RESERVE	16
#define QCOW2_COPY_RESERVE	4

/* What is copied at a time, if there is memory for it */
#define QCOW2_COPY_PAGES	16

/*
 * A copy from the backing device.  It is read, and then written; for that it
 * needs nothing that it has not got from the beginning.
 */
struct qcow2_copy {
	struct work_struct work;
	struct qcow2_io *io;
	sector_t sector;
	sector_t nr;
	struct bio bio;
	struct bio_vec vecs[QCOW2_COPY_PAGES];
};

/* A part of a unit that a first write leaves to be filled. */
struct qcow2_gap {
	sector_t sector;
	sector_t nr;
	struct bio *bio;	/* that fills it, if it was allocated already */
};

/*----------------------------------------------------------------
 * Copies
 *----------------------------------------------------------------
 */

static void qcow2_copy_end(struct qcow2_copy *copy)
{
	struct qcow2_io *io = copy->io;
	struct qcow2_target *q = io->q;
	unsigned int i;

	if (copy->bio.bi_status)
		qcow2_io_error(io, copy->bio.bi_status);
	for (i = 0; i < copy->bio.bi_vcnt; i++)
		mempool_free(copy->vecs[i].bv_page, &q->copy_pages);
	bio_uninit(&copy->bio);
	mempool_free(copy, &q->copies);
	qcow2_io_put(io);
}

static void qcow2_copy_written(struct bio *bio)
{
	qcow2_copy_end(container_of(bio, struct qcow2_copy, bio));
}

static void qcow2_copy_write(struct work_struct *work)
{
	struct qcow2_copy *copy = container_of(work, struct qcow2_copy, work);
	struct bio *origin = qcow2_io_origin(copy->io), *bio = &copy->bio;
	unsigned short vcnt = bio->bi_vcnt, ioprio = bio->bi_ioprio;

	bio_reset(bio, copy->io->q->data_bdev,
		  REQ_OP_WRITE | (origin->bi_opf & REQ_SYNC));
	bio->bi_ioprio = ioprio;
	bio->bi_vcnt = vcnt;
	bio->bi_iter.bi_sector = copy->sector;
	bio->bi_iter.bi_size = copy->nr << SECTOR_SHIFT;
	bio->bi_end_io = qcow2_copy_written;
	dm_submit_bio_remap(origin, bio);
}

static void qcow2_copy_read(struct bio *bio)
{
	struct qcow2_copy *copy = container_of(bio, struct qcow2_copy, bio);

	if (bio->bi_status)
		qcow2_copy_end(copy);
	else
		queue_work(copy->io->q->copy_wq, &copy->work);
}

/*
 * Begin to copy from the backing device.  Returns how many sectors of @nr: what
 * there is memory for.  May sleep.
 */
static sector_t qcow2_copy_some(struct qcow2_io *io, sector_t sector,
				sector_t nr)
{
	struct bio *origin = qcow2_io_origin(io), *bio;
	u64 left = (u64)nr << SECTOR_SHIFT;
	struct qcow2_target *q = io->q;
	struct qcow2_copy *copy;

	copy = mempool_alloc(&q->copies, GFP_NOIO);
	copy->io = io;
	copy->sector = sector;
	INIT_WORK(&copy->work, qcow2_copy_write);
	bio = &copy->bio;
	bio_init(bio, q->backing_bdev, copy->vecs, QCOW2_COPY_PAGES,
		 REQ_OP_READ | (origin->bi_opf & REQ_SYNC));
	bio->bi_ioprio = origin->bi_ioprio;
	bio->bi_iter.bi_sector = sector;
	bio->bi_end_io = qcow2_copy_read;
	while (left && bio->bi_vcnt < QCOW2_COPY_PAGES) {
		unsigned int n = min_t(u64, left, PAGE_SIZE);
		struct page *page;

		/* Whoever waits for one has none that others wait for. */
		page = bio->bi_vcnt ? alloc_page(GFP_NOWAIT | __GFP_NOWARN) :
				      mempool_alloc(&q->copy_pages, GFP_NOIO);
		if (!page)
			break;
		__bio_add_page(bio, page, n, 0);
		left -= n;
	}
	nr -= left >> SECTOR_SHIFT;
	copy->nr = nr;
	atomic_inc(&io->pending);
	dm_submit_bio_remap(origin, bio);
	return nr;
}

/*----------------------------------------------------------------
 * Fills
 *----------------------------------------------------------------
 */

static void qcow2_fill_endio(struct bio *bio)
{
	struct qcow2_io *io = bio->bi_private;

	if (bio->bi_status)
		qcow2_io_error(io, bio->bi_status);
	bio_put(bio);
	qcow2_io_put(io);
}

/* A bio that writes zeros on behalf of the first write @orig. */
static struct bio *qcow2_alloc_fill(struct qcow2_target *q, struct bio *orig,
				    sector_t sector, sector_t nr, gfp_t gfp)
{
	u64 len = (u64)nr << SECTOR_SHIFT;
	struct bio *bio;

	/* A cluster is 2 MiB at most: 32 vectors. */
	bio = bio_alloc_bioset(q->data_bdev,
			       DIV_ROUND_UP_ULL(len, QCOW2_ZERO_BYTES),
			       REQ_OP_WRITE | (orig->bi_opf & REQ_SYNC), gfp,
			       &q->fill_bs);
	if (!bio)
		return NULL;
	bio->bi_ioprio = orig->bi_ioprio;
	bio->bi_iter.bi_sector = sector;
	bio->bi_end_io = qcow2_fill_endio;
	while (len) {
		unsigned int n = min_t(u64, len, QCOW2_ZERO_BYTES);

		__bio_add_page(bio, qcow2_zeros, n, 0);
		len -= n;
	}
	return bio;
}

/*
 * Give a gap the content that its unit has in state @state.  Sleeps, unless
 * there is a bio already.
 */
static void qcow2_fill_gap(struct qcow2_io *io, struct qcow2_gap *gap,
			   enum qcow2_state state)
{
	struct qcow2_target *q = io->q;

	while (state == QCOW2_UNALLOCATED && gap->nr &&
	       gap->sector < q->backing_end) {
		sector_t nr = qcow2_copy_some(io, gap->sector,
					      min(gap->nr, q->backing_end - gap->sector));

		gap->sector += nr;
		gap->nr -= nr;
	}
	if (!gap->nr)
		return;
	if (!gap->bio)
		gap->bio = qcow2_alloc_fill(q, io->bio, gap->sector, gap->nr,
					    GFP_NOIO);
	gap->bio->bi_private = io;
	atomic_inc(&io->pending);
	/* On behalf of the cgroup that the request came from, as all parts */
	dm_submit_bio_remap(qcow2_io_origin(io), gap->bio);
}

void qcow2_write_zeros(struct qcow2_io *io, sector_t sector, unsigned int nr)
{
	struct qcow2_gap gap = { .sector = sector, .nr = nr };

	qcow2_fill_gap(io, &gap, QCOW2_ZERO);
}

/*
 * Get the bios that fill gaps without waiting for anything; false if that is
 * not possible, or not enough.
 */
static bool qcow2_prepare_gaps(struct qcow2_io *io, struct qcow2_gap *gaps,
			       enum qcow2_state state)
{
	struct qcow2_target *q = io->q;
	struct bio *bio = io->bio;
	unsigned int i;

	if (!gaps[0].nr && !gaps[1].nr)
		return true;
	/* fills may have to wait for a request below */
	if (bio->bi_opf & REQ_NOWAIT)
		return false;
	for (i = 0; i < 2; i++) {
		if (!gaps[i].nr)
			continue;
		if (state == QCOW2_UNALLOCATED && gaps[i].sector < q->backing_end)
			return false;
		gaps[i].bio = qcow2_alloc_fill(q, bio, gaps[i].sector, gaps[i].nr,
					       GFP_NOWAIT | __GFP_NOWARN);
		if (!gaps[i].bio)
			return false;
	}
	return true;
}

/*----------------------------------------------------------------
 * First writes
 *----------------------------------------------------------------
 */

/*
 * Make units busy on behalf of a first write.  False if they are not in state
 * @state any more, or not ready to be written.
 */
static bool qcow2_begin_first_write(struct qcow2_target *q,
				    struct qcow2_io *io, u64 unit, u64 last,
				    enum qcow2_state state)
{
	struct qcow2_map *map = &q->map;
	unsigned long index = unit >> map->slice_shift;
	unsigned int mask = (1U << map->slice_shift) - 1;
	struct qcow2_bucket *bucket = qcow2_bucket(map, index);
	struct qcow2_slice *slice;
	unsigned long flags;

	spin_lock_irqsave(&bucket->lock, flags);
	slice = qcow2_ready_slice(map, unit, last, state);
	if (!slice)
		goto out;

	io->kind = QCOW2_IO_FIRST_WRITE;
	io->write.slice = slice;
	io->write.first = unit & mask;
	io->write.last = last & mask;
	io->write.prev = state;
	/*
	 * With data_file_raw the rest of a unit need not be filled, so that
	 * writes to the same unit do not get in each other's way.
	 */
	qcow2_begin_write(map, &io->write, q->raw);
	atomic_inc(&q->first_writes);
out:
	spin_unlock_irqrestore(&bucket->lock, flags);
	return slice;
}

bool qcow2_first_write(struct qcow2_io *io, sector_t sector, unsigned int nr,
		       enum qcow2_state state, bool may_block)
{
	struct qcow2_target *q = io->q;
	unsigned int shift = q->map.unit_shift;
	sector_t end = sector + nr;
	u64 unit = sector >> shift, last = (end - 1) >> shift;
	struct qcow2_gap gaps[2] = {};
	unsigned int i;

	if (!q->raw) {
		gaps[0].sector = unit << shift;
		gaps[0].nr = sector - gaps[0].sector;
		gaps[1].sector = end;
		/* the last unit ends with the device */
		gaps[1].nr = min_t(sector_t, (last + 1) << shift, q->ti->len) -
			     end;
	}
	if ((!may_block && !qcow2_prepare_gaps(io, gaps, state)) ||
	    !qcow2_begin_first_write(q, io, unit, last, state)) {
		for (i = 0; i < 2; i++)
			if (gaps[i].bio)
				bio_put(gaps[i].bio);
		return false;
	}
	this_cpu_inc(q->stats->first_writes);
	trace_qcow2_first_write(q->mdio.name, sector, nr, gaps[0].nr + gaps[1].nr,
				state == QCOW2_UNALLOCATED && q->backing_bdev);

	/* The bio's own reference is there; it has not been submitted. */
	for (i = 0; i < 2; i++)
		if (gaps[i].nr)
			qcow2_fill_gap(io, gaps + i, state);
	return true;
}

/*----------------------------------------------------------------
 * Life
 *----------------------------------------------------------------
 */

int qcow2_fill_pools(struct qcow2_target *q)
{
	int r;

	r = bioset_init(&q->fill_bs, QCOW2_FILL_RESERVE, 0, BIOSET_NEED_BVECS);
	if (r || !q->backing_bdev)
		return r;
	q->copy_wq = alloc_workqueue("dm-qcow2-copy",
				     WQ_UNBOUND | WQ_MEM_RECLAIM, 0);
	if (!q->copy_wq)
		return -ENOMEM;
	r = mempool_init_kmalloc_pool(&q->copies, QCOW2_COPY_RESERVE,
				      sizeof(struct qcow2_copy));
	if (r)
		return r;
	return mempool_init_page_pool(&q->copy_pages, QCOW2_COPY_RESERVE, 0);
}

void qcow2_fill_exit(struct qcow2_target *q)
{
	if (q->copy_wq)
		destroy_workqueue(q->copy_wq);
	mempool_exit(&q->copy_pages);
	mempool_exit(&q->copies);
	bioset_exit(&q->fill_bs);
}
