// SPDX-License-Identifier: GPL-2.0-only
/*
 * First writes, and what fills the rest of their units.
 */
#include <linux/slab.h>

#include "compat.h"
#include "fill.h"
#include "pages.h"
#include "trace.h"

/* Fills and copies that are kept in reserve; a fill has a page of vectors, too. */
#define QCOW2_FILL_RESERVE	4
#define QCOW2_COPY_RESERVE	4

/* A request of more segments is written by itself. */
#define QCOW2_TAKE_VECS		16

/*
 * A copy from the backing device.  It is read, and then written; for that it
 * needs nothing that it has not got from the beginning.
 */
struct qcow2_copy {
	struct work_struct work;
	struct qcow2_io *io;
	sector_t sector;
	sector_t nr;
	bool takes;		/* the data of io's bio: inside of it, or at an end */
	struct qcow2_pages pages;
	struct bio bio;
	/* One of the pages may be cut by the request. */
	struct bio_vec vecs[QCOW2_PAGES_MOST + QCOW2_TAKE_VECS + 1];
};

/* A part of a unit that a first write leaves to be filled. */
struct qcow2_gap {
	sector_t sector;
	sector_t nr;
};

/*
 * How a first write's gaps are filled: by one bio that takes the data of the
 * request along; or, if that cannot be, one by one.
 */
struct qcow2_fill {
	struct qcow2_gap gaps[2];	/* before and behind the request */
	struct qcow2_copy *copy;
	struct bio *zeros;
};

/* Segments of a request; more than QCOW2_TAKE_VECS need not be counted. */
static unsigned int qcow2_count_vecs(struct bio *bio)
{
	struct bvec_iter iter;
	struct bio_vec bv;
	unsigned int n = 0;

	bio_for_each_bvec(bv, bio, iter)
		if (++n > QCOW2_TAKE_VECS)
			break;
	return n;
}

/* There is room for them in @to. */
static void qcow2_add_vecs(struct bio *to, struct bio *bio)
{
	struct bvec_iter iter;
	struct bio_vec bv;

	bio_for_each_bvec(bv, bio, iter)
		__bio_add_page(to, bv.bv_page, bv.bv_len, bv.bv_offset);
}

/* What a bio that works for another has of its flags */
static blk_opf_t qcow2_inherited(const struct bio *bio)
{
	return bio->bi_opf & (REQ_SYNC | REQ_META | REQ_PRIO | REQ_IDLE |
			      REQ_BACKGROUND);
}

/*----------------------------------------------------------------
 * Copies
 *----------------------------------------------------------------
 */

static void qcow2_copy_free(struct qcow2_target *q, struct qcow2_copy *copy)
{
	qcow2_pages_put(&copy->pages, &q->copy_pages);
	mempool_free(copy, &q->copies);
}

static void qcow2_copy_end(struct qcow2_copy *copy)
{
	struct qcow2_io *io = copy->io;

	if (copy->bio.bi_status)
		qcow2_io_error(io, copy->bio.bi_status);
	bio_uninit(&copy->bio);
	qcow2_copy_free(io->q, copy);
	qcow2_io_put(io);
}

static void qcow2_copy_endio(struct bio *bio)
{
	qcow2_copy_end(container_of(bio, struct qcow2_copy, bio));
}

/* What has been read up to the data of the request, that, and what is behind it */
static void qcow2_copy_take(struct qcow2_copy *copy)
{
	struct bio *data = copy->io->bio, *bio = &copy->bio;
	sector_t end = copy->sector + copy->nr, start = copy->sector;
	sector_t first = data->bi_iter.bi_sector, last = bio_end_sector(data);

	bio->bi_iter.bi_sector = min(start, first);
	if (start < first)
		qcow2_pages_add(&copy->pages, bio, 0,
				(min(first, end) - start) << SECTOR_SHIFT);
	qcow2_add_vecs(bio, data);
	if (end > last)
		qcow2_pages_add(&copy->pages, bio,
				(max(last, start) - start) << SECTOR_SHIFT,
				(end - start) << SECTOR_SHIFT);
}

static void qcow2_copy_write(struct work_struct *work)
{
	struct qcow2_copy *copy = container_of(work, struct qcow2_copy, work);
	struct bio *origin = qcow2_io_origin(copy->io), *bio = &copy->bio;

	bio_uninit(bio);
	bio_init(bio, copy->io->q->data_bdev, copy->vecs,
		 ARRAY_SIZE(copy->vecs), REQ_OP_WRITE | qcow2_inherited(origin));
	bio->bi_ioprio = origin->bi_ioprio;
	bio->bi_iter.bi_sector = copy->sector;
	bio->bi_end_io = qcow2_copy_endio;
	if (copy->takes)
		qcow2_copy_take(copy);
	else
		qcow2_pages_add(&copy->pages, bio, 0, copy->nr << SECTOR_SHIFT);
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
 * Memory for a copy of up to @nr sectors; copy->nr is how many there is memory for.
 * NULL if @gfp does not let it wait.
 */
static struct qcow2_copy *qcow2_copy_alloc(struct qcow2_io *io, sector_t sector,
					   sector_t nr, gfp_t gfp)
{
	const sector_t most = QCOW2_PAGES_MOST << (PAGE_SHIFT - SECTOR_SHIFT);
	struct qcow2_target *q = io->q;
	struct qcow2_copy *copy;

	copy = mempool_alloc(&q->copies, gfp);
	if (!copy)
		return NULL;
	copy->io = io;
	copy->sector = sector;
	copy->takes = false;
	copy->nr = qcow2_pages_get(&copy->pages, &q->copy_pages,
				   min(nr, most) << SECTOR_SHIFT, gfp) >>
		   SECTOR_SHIFT;
	if (!copy->nr) {
		qcow2_copy_free(q, copy);
		return NULL;
	}
	return copy;
}

/* Begin to copy. */
static void qcow2_copy_start(struct qcow2_copy *copy)
{
	struct bio *origin = qcow2_io_origin(copy->io), *bio = &copy->bio;

	INIT_WORK(&copy->work, qcow2_copy_write);
	bio_init(bio, copy->io->q->backing_bdev, copy->vecs,
		 ARRAY_SIZE(copy->vecs), REQ_OP_READ | qcow2_inherited(origin));
	bio->bi_ioprio = origin->bi_ioprio;
	bio->bi_iter.bi_sector = copy->sector;
	bio->bi_end_io = qcow2_copy_read;
	qcow2_pages_add(&copy->pages, bio, 0, copy->nr << SECTOR_SHIFT);
	atomic_inc(&copy->io->pending);
	dm_submit_bio_remap(origin, bio);
}

/*----------------------------------------------------------------
 * Zeros
 *----------------------------------------------------------------
 */

static void qcow2_zeros_endio(struct bio *bio)
{
	struct qcow2_io *io = bio->bi_private;

	if (bio->bi_status)
		qcow2_io_error(io, bio->bi_status);
	bio_put(bio);
	qcow2_io_put(io);
}

static unsigned int qcow2_zeros_vecs(sector_t nr)
{
	return DIV_ROUND_UP_ULL((u64)nr << SECTOR_SHIFT, QCOW2_ZERO_BYTES);
}

static void qcow2_zeros_add(struct bio *bio, sector_t nr)
{
	u64 len = (u64)nr << SECTOR_SHIFT;

	while (len) {
		unsigned int n = min_t(u64, len, QCOW2_ZERO_BYTES);

		__bio_add_page(bio, qcow2_zeros, n, 0);
		len -= n;
	}
}

/* A bio for @vecs segments on behalf of a first write; NULL as @gfp has it. */
static struct bio *qcow2_zeros_alloc(struct qcow2_io *io, sector_t sector,
				     unsigned int vecs, gfp_t gfp)
{
	struct qcow2_target *q = io->q;
	struct bio *bio;

	bio = bio_alloc_bioset(q->data_bdev, vecs,
			       REQ_OP_WRITE | qcow2_inherited(io->bio), gfp,
			       &q->fill_bs);
	if (!bio)
		return NULL;
	bio->bi_ioprio = io->bio->bi_ioprio;
	bio->bi_iter.bi_sector = sector;
	bio->bi_end_io = qcow2_zeros_endio;
	bio->bi_private = io;
	return bio;
}

static void qcow2_zeros_start(struct qcow2_io *io, struct bio *bio)
{
	atomic_inc(&io->pending);
	/* On behalf of the cgroup that the request came from, as all parts */
	dm_submit_bio_remap(qcow2_io_origin(io), bio);
}

void qcow2_write_zeros(struct qcow2_io *io, sector_t sector, unsigned int nr)
{
	struct bio *bio;

	/* A cluster is 2 MiB at most: 32 vectors. */
	bio = qcow2_zeros_alloc(io, sector, qcow2_zeros_vecs(nr), GFP_NOIO);
	qcow2_zeros_add(bio, nr);
	qcow2_zeros_start(io, bio);
}

/*----------------------------------------------------------------
 * Fills
 *----------------------------------------------------------------
 */

/* Zeros, the data of the request, zeros; NULL as @gfp has it. */
static struct bio *qcow2_take_zeros(struct qcow2_io *io,
				    const struct qcow2_gap *gaps, gfp_t gfp)
{
	unsigned int vecs = qcow2_zeros_vecs(gaps[0].nr) +
			    qcow2_zeros_vecs(gaps[1].nr) + QCOW2_TAKE_VECS;
	struct bio *bio;

	bio = qcow2_zeros_alloc(io, gaps[0].sector, vecs, gfp);
	if (!bio)
		return NULL;
	qcow2_zeros_add(bio, gaps[0].nr);
	qcow2_add_vecs(bio, io->bio);
	qcow2_zeros_add(bio, gaps[1].nr);
	return bio;
}

/*
 * What is missing, in one go: with what lies between two gaps, that is less than
 * another request.
 */
static struct qcow2_copy *qcow2_take_copy(struct qcow2_io *io,
					  const struct qcow2_gap *gaps, gfp_t gfp)
{
	sector_t start = gaps[0].nr ? gaps[0].sector : gaps[1].sector;
	sector_t end = gaps[1].nr ? gaps[1].sector + gaps[1].nr :
				    gaps[0].sector + gaps[0].nr;
	struct qcow2_copy *copy;

	if (end - start > QCOW2_PAGES_MOST << (PAGE_SHIFT - SECTOR_SHIFT))
		return NULL;
	copy = qcow2_copy_alloc(io, start, end - start, gfp);
	if (!copy)
		return NULL;
	if (copy->nr < end - start) {
		qcow2_copy_free(io->q, copy);
		return NULL;
	}
	copy->takes = true;
	return copy;
}

/*
 * Get what is needed to fill gaps of units in state @state.  False if @may_block
 * is not set and that means to wait.
 */
static bool qcow2_prepare_fill(struct qcow2_io *io, struct qcow2_fill *fill,
			       enum qcow2_state state, bool may_block)
{
	gfp_t gfp = may_block ? GFP_NOIO : GFP_NOWAIT | __GFP_NOWARN;
	struct qcow2_gap *gaps = fill->gaps;
	sector_t start = gaps[0].sector, end = gaps[1].sector + gaps[1].nr;
	struct qcow2_target *q = io->q;

	if (!gaps[0].nr && !gaps[1].nr)
		return true;
	/* fills may have to wait for a request below */
	if (!may_block && (io->bio->bi_opf & REQ_NOWAIT))
		return false;
	/* Write zeroes have no data. */
	if (!bio_has_data(io->bio) ||
	    qcow2_count_vecs(io->bio) > QCOW2_TAKE_VECS)
		return may_block;
	if (state != QCOW2_UNALLOCATED || start >= q->backing_end)
		fill->zeros = qcow2_take_zeros(io, gaps, gfp);
	else if (end <= q->backing_end)
		fill->copy = qcow2_take_copy(io, gaps, gfp);
	return may_block || fill->zeros || fill->copy;
}

static void qcow2_drop_fill(struct qcow2_target *q, struct qcow2_fill *fill)
{
	if (fill->zeros)
		bio_put(fill->zeros);
	if (fill->copy)
		qcow2_copy_free(q, fill->copy);
}

/* Give a gap the content that its unit has in state @state.  Sleeps. */
static void qcow2_fill_gap(struct qcow2_io *io, struct qcow2_gap *gap,
			   enum qcow2_state state)
{
	struct qcow2_target *q = io->q;

	while (state == QCOW2_UNALLOCATED && gap->nr &&
	       gap->sector < q->backing_end) {
		struct qcow2_copy *copy;

		copy = qcow2_copy_alloc(io, gap->sector,
					min(gap->nr, q->backing_end - gap->sector),
					GFP_NOIO);
		gap->sector += copy->nr;
		gap->nr -= copy->nr;
		qcow2_copy_start(copy);
	}
	if (gap->nr)
		qcow2_write_zeros(io, gap->sector, gap->nr);
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

enum qcow2_begun qcow2_first_write(struct qcow2_io *io, sector_t sector,
				   unsigned int nr, enum qcow2_state state,
				   bool may_block)
{
	struct qcow2_target *q = io->q;
	unsigned int shift = q->map.unit_shift;
	sector_t end = sector + nr;
	u64 unit = sector >> shift, last = (end - 1) >> shift;
	struct qcow2_fill fill = {};
	struct qcow2_gap *gaps = fill.gaps;

	if (!q->raw) {
		gaps[0].sector = unit << shift;
		gaps[0].nr = sector - gaps[0].sector;
		gaps[1].sector = end;
		/* the last unit ends with the device */
		gaps[1].nr = min_t(sector_t, (last + 1) << shift, q->ti->len) -
			     end;
	}
	if (!qcow2_prepare_fill(io, &fill, state, may_block))
		return QCOW2_NOT_BEGUN;
	if (!qcow2_begin_first_write(q, io, unit, last, state)) {
		qcow2_drop_fill(q, &fill);
		return QCOW2_NOT_BEGUN;
	}
	this_cpu_inc(q->stats->first_writes);
	trace_qcow2_first_write(q->mdio.name, sector, nr, gaps[0].nr + gaps[1].nr,
				state == QCOW2_UNALLOCATED && q->backing_bdev);

	/* The bio's own reference is there; it has not been submitted. */
	if (fill.copy)
		qcow2_copy_start(fill.copy);
	if (fill.zeros)
		qcow2_zeros_start(io, fill.zeros);
	if (fill.copy || fill.zeros)
		return QCOW2_TAKEN;
	if (gaps[0].nr)
		qcow2_fill_gap(io, gaps, state);
	if (gaps[1].nr)
		qcow2_fill_gap(io, gaps + 1, state);
	return QCOW2_BEGUN;
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
