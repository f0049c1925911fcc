// SPDX-License-Identifier: GPL-2.0-only
/*
 * Keeping what a view shows before it changes.
 *
 * A job keeps a granule: it reads what the guest would, a piece at a time, and writes that to
 * the view's device.  Until it has ended nothing of the granule changes, for whoever
 * wants that waits for it.  Jobs are nobody's: the ios that wait for one may go on without it
 * as soon as the view is over.  One work goes on with all of them, one step each time: what
 * comes to it while it runs is done together.
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

/* What comes next of a job */
enum qcow2_keep_next {
	QCOW2_KEEP_READ,	/* it is new */
	QCOW2_KEEP_WRITE,	/* a piece has been read */
	QCOW2_KEEP_ON,		/* it has been written */
};

/* Owned by who has made it, until the keeper has it; then by its bio, or the keeper's work. */
struct qcow2_keep {
	struct qcow2_target *q;
	u64 granule;
	sector_t sector, nr;		/* the piece */
	struct qcow2_pages pages;
	enum qcow2_keep_next next;
	struct llist_node due;		/* the keeper's */
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

/*
 * What an io has waited for has been kept.  If it is a hit now, it is on its way; what else there
 * is, and what has to wait again, is for process().
 */
static void qcow2_keep_pass(struct qcow2_io *io)
{
	struct qcow2_target *q = io->q;
	struct bio *bio = io->bio;

	if (io->parent || bio_op(bio) != REQ_OP_WRITE ||
	    (bio->bi_opf & REQ_FUA) || !qcow2_io_whole(io, io->left) ||
	    !qcow2_mode_writes(qcow2_mode(&q->health)) ||
	    !qcow2_bitmaps_pass(&q->bitmaps, io->sector, io->left) ||
	    !qcow2_is_data(&q->map, io->sector, io->left)) {
		qcow2_io_queue(io);
		return;
	}
	qcow2_io_release(io);
	bio_set_dev(bio, q->data_bdev);
	dm_submit_bio_remap(bio, NULL);
}

static void qcow2_keep_end(struct qcow2_keep *job, bool kept)
{
	struct qcow2_target *q = job->q;
	struct qcow2_io *io, *next;
	LIST_HEAD(waiters);

	spin_lock_irq(&q->keeper.lock);
	if (kept)
		qcow2_view_set(q->view, job->granule, 1, QCOW2_GRANULE_KEPT);
	hlist_del(&job->node);
	list_splice(&job->waiters, &waiters);
	spin_unlock_irq(&q->keeper.lock);

	qcow2_pages_put(&job->pages, &q->copy_pages);
	mempool_free(job, &q->keeper.pool);
	list_for_each_entry_safe(io, next, &waiters, wait.node)
		qcow2_keep_pass(io);
	/* Suspend has waited for it: nothing is touched after that. */
	atomic_dec(&q->slow);
}

/* Let the work go on with a job.  Any context. */
static void qcow2_keep_due(struct qcow2_keep *job)
{
	struct qcow2_keeper *keeper = &job->q->keeper;

	if (llist_add(&job->due, &keeper->due))
		queue_work(keeper->wq, &keeper->work);
}

static void qcow2_keep_bio_end(struct bio *bio)
{
	struct qcow2_keep *job = container_of(bio, struct qcow2_keep, bio);

	if (job->next == QCOW2_KEEP_WRITE && job->io.kind != QCOW2_IO_OVER) {
		/* All of it was read by this bio; as its parts would, it goes on with the io. */
		if (bio->bi_status)
			qcow2_io_error(&job->io, bio->bi_status);
		qcow2_io_put(&job->io);
		return;
	}
	qcow2_keep_due(job);
}

static void qcow2_keep_set_bio(struct qcow2_keep *job,
			       struct block_device *bdev, blk_opf_t opf)
{
	struct bio *bio = &job->bio;

	bio_init(bio, bdev, job->vecs, ARRAY_SIZE(job->vecs), opf | REQ_SYNC);
	bio->bi_iter.bi_sector = job->sector;
	bio->bi_end_io = qcow2_keep_bio_end;
	qcow2_pages_add(&job->pages, bio, 0, job->nr << SECTOR_SHIFT);
}

/* Read the next piece. */
static void qcow2_keep_read(struct qcow2_keep *job)
{
	struct qcow2_target *q = job->q;

	job->next = QCOW2_KEEP_WRITE;
	qcow2_keep_set_bio(job, q->data_bdev, REQ_OP_READ);
	/* Nothing of it becomes anything else before the job has ended. */
	if (q->raw || qcow2_is_data(&q->map, job->sector, job->nr)) {
		job->io.kind = QCOW2_IO_OVER;
		submit_bio(&job->bio);
		return;
	}
	qcow2_io_init(q, &job->io, &job->bio, NULL);
	job->io.ours = true;
	job->io.sector = job->sector;
	job->io.left = job->nr;
	q->process(&job->io.work);
}

static void qcow2_keep_write(struct qcow2_keep *job)
{
	job->next = QCOW2_KEEP_ON;
	qcow2_keep_set_bio(job, job->q->cow_dev->bdev, REQ_OP_WRITE);
	submit_bio(&job->bio);
}

static void qcow2_keep_fail(struct qcow2_keep *job, blk_status_t status)
{
	struct qcow2_target *q = job->q;
	bool written = job->next == QCOW2_KEEP_ON;
	const char *why = written ? "cow_device" : "device";

	if (written && status == BLK_STS_NOSPC)
		why = "no_space";
	if (qcow2_view_state(q->view) != QCOW2_VIEW_OVER)
		DMERR("%s: the view is over: cannot %s sector %llu: %d",
		      q->mdio.name, written ? "keep" : "read",
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

/* A job is new, or its bio has ended. */
static void qcow2_keep_step(struct qcow2_keep *job)
{
	sector_t end = qcow2_view_granule_end(job->q->view, job->sector);

	if (job->next == QCOW2_KEEP_READ) {
		qcow2_keep_read(job);
		return;
	}
	bio_uninit(&job->bio);
	if (job->bio.bi_status) {
		qcow2_keep_fail(job, job->bio.bi_status);
		return;
	}
	if (job->next == QCOW2_KEEP_WRITE) {
		/* Of one that is in more pieces only the first one asks. */
		if (job->sector == job->granule << job->q->view->shift &&
		    !qcow2_view_take(job->q->view))
			qcow2_keep_too_much(job);
		else
			qcow2_keep_write(job);
		return;
	}
	job->sector += job->nr;
	if (job->sector == end) {
		qcow2_keep_end(job, true);
		return;
	}
	job->nr = min_t(sector_t, job->nr, end - job->sector);
	qcow2_keep_read(job);
}

static void qcow2_keep_worker(struct work_struct *work)
{
	struct qcow2_keeper *keeper = container_of(work, struct qcow2_keeper,
						   work);
	struct llist_node *due = llist_reverse_order(llist_del_all(&keeper->due));
	struct qcow2_keep *job, *next;
	struct blk_plug plug;

	/* Granules that follow each other are written at one go. */
	blk_start_plug(&plug);
	llist_for_each_entry_safe(job, next, due, due) {
		qcow2_keep_step(job);
		cond_resched();
	}
	blk_finish_plug(&plug);
}

/* A job that nobody knows of yet; NULL without memory, which does not happen with GFP_NOIO */
static struct qcow2_keep *qcow2_keep_alloc(struct qcow2_target *q, u64 granule,
					   gfp_t gfp)
{
	const sector_t most = QCOW2_PAGES_MOST << (PAGE_SHIFT - SECTOR_SHIFT);
	sector_t sector = granule << q->view->shift;
	struct qcow2_keep *job;

	job = mempool_alloc(&q->keeper.pool, gfp);
	if (!job)
		return NULL;
	job->q = q;
	job->granule = granule;
	job->next = QCOW2_KEEP_READ;
	job->sector = sector;
	job->nr = min(qcow2_view_granule_end(q->view, sector) - sector, most);
	INIT_LIST_HEAD(&job->waiters);
	job->nr = qcow2_pages_get(&job->pages, &q->copy_pages,
				  job->nr << SECTOR_SHIFT, gfp) >>
		  SECTOR_SHIFT;
	if (job->nr)
		return job;
	mempool_free(job, &q->keeper.pool);
	return NULL;
}

/*
 * See to it that a granule, which is live, is kept; memory for its state is there.  False if there
 * is nothing to wait for: it is kept, or there was no memory that had to be waited for.
 */
static bool qcow2_keep_granule(struct qcow2_target *q, u64 granule, bool wait)
{
	struct qcow2_keep *job, *other;
	bool live;

	spin_lock_irq(&q->keeper.lock);
	other = qcow2_keep_find(q, granule);
	spin_unlock_irq(&q->keeper.lock);
	if (other)
		return true;
	job = qcow2_keep_alloc(q, granule,
			       wait ? GFP_NOIO : GFP_NOWAIT | __GFP_NOWARN);
	if (!job)
		return false;

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
	qcow2_keep_due(job);
	return true;
}

/* As above; false, too, if the view is over. */
static bool qcow2_keep_start(struct qcow2_target *q, u64 granule)
{
	if (qcow2_view_prepare(q->view, granule))
		return qcow2_keep_granule(q, granule, true);
	DMERR("%s: the view is over: no memory", q->mdio.name);
	qcow2_view_end(q->view, "no_memory");
	return false;
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

bool qcow2_keep_now(struct qcow2_io *io, bool wait)
{
	struct qcow2_view *view = io->q->view;
	u64 granule = io->sector >> view->shift;

	if (bio_op(io->bio) != REQ_OP_WRITE ||
	    (io->sector + io->left - 1) >> view->shift != granule ||
	    qcow2_view_state(view) == QCOW2_VIEW_OVER ||
	    !qcow2_view_is_prepared(view, granule) ||
	    qcow2_view_look(view, granule) != QCOW2_GRANULE_LIVE)
		return false;
	/* What reads as zeros needs no job. */
	if (!io->q->raw && !qcow2_is_data(&io->q->map, io->sector, io->left))
		return false;
	return qcow2_keep_granule(io->q, granule, false) && wait &&
	       qcow2_keep_wait(io, granule);
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
	init_llist_head(&q->keeper.due);
	INIT_WORK(&q->keeper.work, qcow2_keep_worker);
	/* It waits for no memory that only it frees; each time it does but little. */
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
