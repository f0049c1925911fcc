// SPDX-License-Identifier: GPL-2.0-only
/*
 * Keeping what a view shows before it changes.
 *
 * A job keeps a granule: it reads what the guest would, a piece at a time, and writes that to
 * the view's device.  Until it has ended nothing of the granule changes, for whoever
 * wants that waits for it.  Jobs are nobody's: the ios that wait for one may go on without it
 * as soon as the view is over.
 */
#include <linux/hash.h>

#include "compat.h"
#include "keep.h"
#include "pages.h"

#define DM_MSG_PREFIX "qcow2"

/* Jobs, and pages for them, that are kept in reserve */
#define QCOW2_KEEP_RESERVE	4
/* Granules that one io has kept at a time */
#define QCOW2_KEEP_AHEAD	16

/* Owned by who works on it: process(), its bio, its work. */
struct qcow2_keep {
	struct qcow2_target *q;
	u64 granule;
	sector_t sector, nr;		/* the piece */
	struct qcow2_pages pages;
	struct work_struct work;	/* what comes when a bio has ended */
	bool written;			/* that was the one that writes */
	/* q->keeper.lock: */
	struct hlist_node node;
	struct list_head waiters;	/* ios */

	struct qcow2_io io;		/* reads */
	struct bio bio;
	struct bio_vec vecs[QCOW2_PAGES_MOST];
};

static struct hlist_head *qcow2_keep_bucket(struct qcow2_target *q, u64 granule)
{
	return q->keeper.jobs + hash_64(granule, QCOW2_KEEP_HASH_BITS);
}

/* The job of a granule, or NULL; the lock is held. */
static struct qcow2_keep *qcow2_keep_find(struct qcow2_target *q, u64 granule)
{
	struct qcow2_keep *job;

	hlist_for_each_entry(job, qcow2_keep_bucket(q, granule), node)
		if (job->granule == granule)
			return job;
	return NULL;
}

/* A job is over.  Any context. */
static void qcow2_keep_end(struct qcow2_keep *job, bool kept)
{
	struct qcow2_target *q = job->q;
	unsigned long flags;
	LIST_HEAD(waiters);

	spin_lock_irqsave(&q->keeper.lock, flags);
	if (kept)
		qcow2_view_set(q->view, job->granule, 1, QCOW2_GRANULE_KEPT);
	hlist_del(&job->node);
	list_splice(&job->waiters, &waiters);
	spin_unlock_irqrestore(&q->keeper.lock, flags);

	qcow2_pages_put(&job->pages, &q->copy_pages);
	mempool_free(job, &q->keeper.pool);
	qcow2_io_wake(&waiters, 0);
	/* Suspend has waited for it: nothing is touched after that. */
	atomic_dec(&q->slow);
}

static void qcow2_keep_bio_end(struct bio *bio)
{
	struct qcow2_keep *job = container_of(bio, struct qcow2_keep, bio);
	struct qcow2_target *q = job->q;
	sector_t end = job->sector + job->nr;

	if (!job->written && job->io.kind != QCOW2_IO_OVER) {
		/* All of it was read by this bio; as its parts would, it goes on with the io. */
		if (bio->bi_status)
			qcow2_io_error(&job->io, bio->bi_status);
		qcow2_io_put(&job->io);
		return;
	}
	if (job->written && !bio->bi_status &&
	    end == qcow2_view_granule_end(q->view, job->sector))
		qcow2_keep_end(job, true);
	else
		queue_work(q->keeper.wq, &job->work);
}

/* Read the next piece. */
static void qcow2_keep_read(struct qcow2_keep *job)
{
	struct qcow2_target *q = job->q;
	struct bio *bio = &job->bio;

	job->written = false;
	bio_init(bio, q->data_bdev, job->vecs, ARRAY_SIZE(job->vecs),
		 REQ_OP_READ | REQ_SYNC);
	bio->bi_iter.bi_sector = job->sector;
	bio->bi_end_io = qcow2_keep_bio_end;
	qcow2_pages_add(&job->pages, bio, 0, job->nr << SECTOR_SHIFT);
	qcow2_io_init(q, &job->io, bio, NULL);
	job->io.ours = true;
	job->io.sector = job->sector;
	job->io.left = job->nr;
	q->process(&job->io.work);
}

static void qcow2_keep_write(struct qcow2_keep *job)
{
	struct qcow2_target *q = job->q;
	struct bio *bio = &job->bio;

	job->written = true;
	bio_init(bio, q->cow_dev->bdev, job->vecs, ARRAY_SIZE(job->vecs),
		 REQ_OP_WRITE | REQ_SYNC);
	bio->bi_iter.bi_sector = job->sector;
	bio->bi_end_io = qcow2_keep_bio_end;
	qcow2_pages_add(&job->pages, bio, 0, job->nr << SECTOR_SHIFT);
	submit_bio(bio);
}

static void qcow2_keep_fail(struct qcow2_keep *job, blk_status_t status)
{
	struct qcow2_target *q = job->q;
	const char *why = job->written ? "cow_device" : "device";

	if (job->written && status == BLK_STS_NOSPC)
		why = "no_space";
	if (qcow2_view_state(q->view) != QCOW2_VIEW_OVER)
		DMERR("%s: the view is over: cannot %s sector %llu: %d",
		      q->mdio.name, job->written ? "keep" : "read",
		      (unsigned long long)job->sector,
		      blk_status_to_errno(status));
	qcow2_view_end(q->view, why);
	qcow2_keep_end(job, false);
}

/* No more may be kept than is so already. */
static void qcow2_keep_too_much(struct qcow2_keep *job)
{
	struct qcow2_target *q = job->q;

	if (qcow2_view_state(q->view) != QCOW2_VIEW_OVER)
		DMERR("%s: the view is over: its limit is reached at sector %llu",
		      q->mdio.name, (unsigned long long)job->sector);
	qcow2_view_end(q->view, "limit");
	qcow2_keep_end(job, false);
}

static void qcow2_keep_worker(struct work_struct *work)
{
	struct qcow2_keep *job = container_of(work, struct qcow2_keep, work);
	struct qcow2_target *q = job->q;
	blk_status_t status = job->bio.bi_status;
	sector_t end;

	bio_uninit(&job->bio);
	if (status) {
		qcow2_keep_fail(job, status);
		return;
	}
	if (!job->written) {
		/* Of one that is in more pieces only the first one asks. */
		if (job->sector == job->granule << q->view->shift &&
		    !qcow2_view_take(q->view))
			qcow2_keep_too_much(job);
		else
			qcow2_keep_write(job);
		return;
	}
	job->sector += job->nr;
	end = qcow2_view_granule_end(q->view, job->sector);
	job->nr = min_t(sector_t, job->nr, end - job->sector);
	qcow2_keep_read(job);
}

/*
 * See to it that a granule, which is live, is kept.  False if there is nothing to wait for: it is
 * kept, or the view is over.
 */
static bool qcow2_keep_start(struct qcow2_target *q, u64 granule)
{
	const sector_t most = QCOW2_PAGES_MOST << (PAGE_SHIFT - SECTOR_SHIFT);
	sector_t sector = granule << q->view->shift;
	struct qcow2_keep *job, *other;
	bool live;

	if (!qcow2_view_prepare(q->view, granule)) {
		DMERR("%s: the view is over: no memory", q->mdio.name);
		qcow2_view_end(q->view, "no_memory");
		return false;
	}
	spin_lock_irq(&q->keeper.lock);
	other = qcow2_keep_find(q, granule);
	spin_unlock_irq(&q->keeper.lock);
	if (other)
		return true;

	job = mempool_alloc(&q->keeper.pool, GFP_NOIO);
	job->q = q;
	job->granule = granule;
	job->sector = sector;
	job->nr = min(qcow2_view_granule_end(q->view, sector) - sector, most);
	INIT_WORK(&job->work, qcow2_keep_worker);
	INIT_LIST_HEAD(&job->waiters);
	job->nr = qcow2_pages_get(&job->pages, &q->copy_pages,
				  job->nr << SECTOR_SHIFT, GFP_NOIO) >>
		  SECTOR_SHIFT;

	spin_lock_irq(&q->keeper.lock);
	other = qcow2_keep_find(q, granule);
	live = qcow2_view_look(q->view, granule) == QCOW2_GRANULE_LIVE;
	if (!other && live) {
		hlist_add_head(&job->node, qcow2_keep_bucket(q, granule));
		atomic_inc(&q->slow);
	}
	spin_unlock_irq(&q->keeper.lock);
	if (other || !live) {
		qcow2_pages_put(&job->pages, &q->copy_pages);
		mempool_free(job, &q->keeper.pool);
		return other;
	}
	qcow2_keep_read(job);
	return true;
}

/* Leave an io with the job of a granule; false if there is none. */
static bool qcow2_keep_wait(struct qcow2_io *io, u64 granule)
{
	struct qcow2_target *q = io->q;
	struct qcow2_keep *job;

	spin_lock_irq(&q->keeper.lock);
	job = qcow2_keep_find(q, granule);
	if (job)
		list_add_tail(&io->wait.node, &job->waiters);
	spin_unlock_irq(&q->keeper.lock);
	return job;
}

enum qcow2_keep_step {
	QCOW2_KEEP_DONE,	/* nothing of the granule is to be kept any more */
	QCOW2_KEEP_COPY,	/* a job has to do it */
	/*
	 * A slice has to be loaded.  If that was to be waited for, the io does so, and is no
	 * longer the caller's.
	 */
	QCOW2_KEEP_WAIT,
};

/*
 * Does a granule read as zeros that are on no device?  Then it needs no job, nor do those behind
 * it up to @end that are so, too: they are done.  With @wait slices are loaded for that.
 */
static enum qcow2_keep_step qcow2_keep_zeros(struct qcow2_io *io, u64 granule,
					     sector_t end, bool wait)
{
	struct qcow2_target *q = io->q;
	struct qcow2_map *map = &q->map;
	unsigned int shift = q->view->shift;
	sector_t from = granule << shift, to = from;
	u64 last = granule | (BIT(QCOW2_VIEW_PIECE_SHIFT) - 1);
	enum qcow2_state state;
	unsigned int nr;
	int r;

	/* It reads as its data device does. */
	if (q->raw)
		return QCOW2_KEEP_COPY;
	end = min3(round_up(end, 1UL << shift), q->view->size,
		   (sector_t)(last + 1) << shift);
	while (to < end) {
		nr = qcow2_lookup(map, to, min_t(sector_t, end - to, UINT_MAX / 2),
				  &state);
		if (!nr && to - from < 1UL << shift) {
			if (!wait)
				return QCOW2_KEEP_WAIT;
			r = qcow2_cache_load(&q->cache, to >> (map->unit_shift +
							       map->slice_shift),
					     &io->wait.node);
			if (r > 0)
				return QCOW2_KEEP_WAIT;
			if (r < 0)
				return QCOW2_KEEP_COPY;
			continue;
		}
		if (!nr || !qcow2_reads_zeros(q, to, state))
			break;
		to += nr;
		cond_resched();
	}
	if (to == q->view->size)
		to = round_up(to, 1UL << shift);
	if (!((to - from) >> shift) || !qcow2_view_prepare(q->view, granule))
		return QCOW2_KEEP_COPY;
	qcow2_view_set(q->view, granule, (to - from) >> shift,
		       QCOW2_GRANULE_ZERO);
	return QCOW2_KEEP_DONE;
}

/*
 * See to what an io changes, from io->kept on, or to the first part of it.  Sets @granule to the
 * first one that has a job, if there is one.
 */
static enum qcow2_keep_step qcow2_keep_range(struct qcow2_io *io, bool wait,
					     u64 *granule)
{
	struct qcow2_target *q = io->q;
	sector_t end = io->sector + io->left, at = io->kept;
	struct qcow2_view *view = q->view;
	enum qcow2_keep_step step;
	unsigned int jobs = 0;

	while (at < end && jobs < QCOW2_KEEP_AHEAD) {
		u64 n = at >> view->shift;

		if (qcow2_view_state(view) == QCOW2_VIEW_OVER)
			return QCOW2_KEEP_DONE;
		step = QCOW2_KEEP_DONE;
		if (qcow2_view_look(view, n) == QCOW2_GRANULE_LIVE)
			step = qcow2_keep_zeros(io, n, end, wait);
		if (step == QCOW2_KEEP_WAIT)
			return step;
		if (step == QCOW2_KEEP_COPY && qcow2_keep_start(q, n) && !jobs++)
			*granule = n;
		at = qcow2_view_granule_end(view, at);
		if (!jobs)
			io->kept = at;
	}
	return jobs ? QCOW2_KEEP_COPY : QCOW2_KEEP_DONE;
}

void qcow2_keep_begin(struct qcow2_io *io)
{
	u64 granule;

	qcow2_keep_range(io, false, &granule);
}

bool qcow2_keep_all(struct qcow2_io *io)
{
	enum qcow2_keep_step step;
	u64 granule;

	for (;;) {
		step = qcow2_keep_range(io, true, &granule);
		if (step == QCOW2_KEEP_DONE)
			return true;
		if (step == QCOW2_KEEP_WAIT || qcow2_keep_wait(io, granule))
			return false;
		/* Its job has ended meanwhile. */
		cond_resched();
	}
}

/*----------------------------------------------------------------
 * Life
 *----------------------------------------------------------------
 */

int qcow2_keep_pools(struct qcow2_target *q)
{
	int r;

	spin_lock_init(&q->keeper.lock);
	/* None of its works waits for memory that only another one frees. */
	q->keeper.wq = alloc_workqueue("dm-qcow2-view",
				       WQ_UNBOUND | WQ_MEM_RECLAIM, 0);
	if (!q->keeper.wq)
		return -ENOMEM;
	r = mempool_init_kmalloc_pool(&q->keeper.pool, QCOW2_KEEP_RESERVE,
				      sizeof(struct qcow2_keep));
	if (r || mempool_initialized(&q->copy_pages))
		return r;
	return mempool_init_page_pool(&q->copy_pages, QCOW2_KEEP_RESERVE, 0);
}

void qcow2_keep_exit(struct qcow2_target *q)
{
	if (q->keeper.wq)
		destroy_workqueue(q->keeper.wq);
	mempool_exit(&q->keeper.pool);
}
