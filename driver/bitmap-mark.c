// SPDX-License-Identifier: GPL-2.0-only
/*
 * Dirty bitmaps: marks are written, so that who waits for them may go on.  How they overlap is
 * in bitmap.h.
 */
#include <linux/blkdev.h>
#include <linux/ktime.h>

#include "bitmap-internal.h"

#define DM_MSG_PREFIX "qcow2"

/*
 * Bits that nobody has asked for are taken back when there was no mark for so long, and when none
 * of those that were marked ahead was used: a writer may be slow.
 */
#define QCOW2_IDLE_PERIOD	(2 * HZ)
/* Waiting for more requests to mark for: this part of what a round takes, or so many ns */
#define QCOW2_GATHER_PART	4
#define QCOW2_GATHER_MOST	(2 * NSEC_PER_MSEC)

bool qcow2_crowd_is_back(struct qcow2_bitmaps *bm)
{
	unsigned int waiting = READ_ONCE(bm->nr_waiting);
	unsigned int crowd = READ_ONCE(bm->crowd);

	crowd -= crowd / 32;
	return 2 * waiting >= crowd ||
	       waiting + READ_ONCE(bm->nr_served) >= crowd;
}

/*
 * Take blocks that are to be written; they are the caller's.  Of one that is just being
 * written that is for whoever ends that.  The lock is held.
 */
static void qcow2_take_todo(struct qcow2_bitmaps *bm, struct qcow2_marker *m)
{
	struct qcow2_bits *b, *next;

	m->nr = 0;
	if (bm->paused)
		return;
	list_for_each_entry_safe(b, next, &bm->todo, todo) {
		if (b->writing)
			continue;
		if (m->nr == QCOW2_MARK_WAVE)
			break;
		list_del_init(&b->todo);
		b->writing = true;
		b->rounds++;
		m->marks[m->nr++] = (struct qcow2_mark){ .bits = b };
	}
}

void qcow2_get_buffers(struct qcow2_bitmaps *bm, struct qcow2_marker *m,
		       bool marks)
{
	unsigned int i, nr = m->nr;

	for (i = 0; i < nr; i++) {
		m->marks[i].buf = mempool_alloc(&bm->buffers, i ?
						GFP_NOWAIT | __GFP_NOWARN :
						GFP_NOIO);
		if (!m->marks[i].buf)
			break;
	}
	m->nr = i;
	spin_lock_irq(&bm->lock);
	for (; i < nr; i++) {
		struct qcow2_bits *b = m->marks[i].bits;

		b->writing = false;
		if (!marks)
			continue;
		b->rounds--;
		if (list_empty(&b->todo))
			list_add_tail(&b->todo, &bm->todo);
	}
	spin_unlock_irq(&bm->lock);
}

/* What a mark writes */
static void qcow2_fill_mark(struct qcow2_bitmaps *bm, struct qcow2_mark *mark)
{
	struct qcow2_bits *b = mark->bits;
	unsigned long *to = mark->buf;
	const unsigned long *exact = (unsigned long *)b->exact;
	unsigned int i;

	memcpy(to, b->durable, qcow2_bits_bytes(bm));
	for (i = b->new_first; i < b->new_end; i++)
		to[i] |= exact[i];
	mark->first = b->new_first;
	mark->end = b->new_end;
	if (b->ahead_first != b->ahead_end) {
		qcow2_bits_set(mark->buf, b->ahead_first,
			       b->ahead_end - b->ahead_first);
		qcow2_widen(&mark->first, &mark->end, b->ahead_first,
			    b->ahead_end);
		b->loose = true;
	}
}

void qcow2_write_marks(struct qcow2_bitmaps *bm, struct qcow2_marker *m)
{
	struct qcow2_ios ios;
	struct blk_plug plug;
	unsigned int i;

	qcow2_ios_init(&ios);
	blk_start_plug(&plug);
	for (i = 0; i < m->nr; i++) {
		struct qcow2_mark *mark = m->marks + i;

		qcow2_mdio_start(bm->io, &ios, &mark->error, REQ_OP_WRITE,
				 qcow2_bits_offset(bm, mark->bits), mark->buf,
				 qcow2_bits_bytes(bm));
	}
	blk_finish_plug(&plug);
	qcow2_ios_wait(&ios);
	for (i = 0; i < m->nr; i++)
		if (qcow2_error_get(&m->marks[i].error))
			DMERR_LIMIT("%s: cannot write a bitmap at %#llx",
				    bm->io->name, (unsigned long long)
				    qcow2_bits_offset(bm, m->marks[i].bits));
}

int qcow2_flush_marks(struct qcow2_bitmaps *bm)
{
	int r = qcow2_mdio_flush(bm->io);

	if (r) {
		DMERR("%s: cannot flush the metadata device: %d", bm->io->name, r);
		qcow2_mode_fail(bm->health);
	}
	return r;
}

void qcow2_bitmaps_arm(struct qcow2_bitmaps *bm)
{
	mod_delayed_work(bm->wq, &bm->idle, QCOW2_IDLE_PERIOD);
}

void qcow2_set_unsure(struct qcow2_bitmaps *bm, struct qcow2_bits *b,
		      bool unsure)
{
	WRITE_ONCE(bm->nr_unsure, bm->nr_unsure + unsure - b->unsure);
	b->unsure = unsure;
}

/* Row 5, or 6 */
static void qcow2_marked(struct qcow2_bitmaps *bm, struct qcow2_mark *mark,
			 unsigned long round, blk_status_t status)
{
	unsigned long *durable = (unsigned long *)mark->bits->durable;
	const unsigned long *written = mark->buf;
	struct qcow2_bits *b = mark->bits;
	unsigned int i;

	b->rounds--;
	if (!b->rounds)
		b->ahead_first = b->ahead_end;
	b->tried = round;
	b->status = status;
	if (status) {
		qcow2_set_unsure(bm, b, true);
		return;
	}
	for (i = mark->first; i < mark->end; i++)
		durable[i] |= written[i];
	/* All that has been asked for is durable, if nobody has come since. */
	if (!b->rounds && list_empty(&b->todo) && !b->unsure)
		b->new_first = b->new_end;
}

static void qcow2_gather(struct qcow2_bitmaps *bm)
{
	u32 ns = min_t(u32, READ_ONCE(bm->round_ns) / QCOW2_GATHER_PART,
		       QCOW2_GATHER_MOST);

	if (!qcow2_crowd_is_back(bm))
		wait_event_hrtimeout(bm->gather, qcow2_crowd_is_back(bm),
				     ns_to_ktime(ns));
}

void qcow2_marker_worker(struct work_struct *work)
{
	struct qcow2_marker *m = container_of(work, struct qcow2_marker, work);
	struct qcow2_bitmaps *bm = m->bm;
	unsigned int served, crowd, unsure;
	unsigned long round;
	u64 begun;
	u32 took;
	LIST_HEAD(waiters);
	unsigned int i;
	bool more, failing;
	int r = 0;

	qcow2_gather(bm);
	spin_lock_irq(&bm->lock);
	qcow2_take_todo(bm, m);
	if (!m->nr) {
		spin_unlock_irq(&bm->lock);
		return;
	}
	bm->nr_rounds++;
	spin_unlock_irq(&bm->lock);
	qcow2_get_buffers(bm, m, true);

	/* Who comes from here on is served by another round. */
	spin_lock_irq(&bm->lock);
	round = ++bm->rounds;
	begun = ktime_get_ns();
	list_splice_init(&bm->waiters, &waiters);
	served = bm->nr_waiting;
	WRITE_ONCE(bm->nr_waiting, 0);
	WRITE_ONCE(bm->nr_served, bm->nr_served + served);
	/* It gets smaller slowly, for some are late. */
	crowd = bm->crowd - DIV_ROUND_UP(bm->crowd, 16);
	WRITE_ONCE(bm->crowd, max(crowd, bm->nr_served));
	for (i = 0; i < m->nr; i++)
		qcow2_fill_mark(bm, m->marks + i);
	spin_unlock_irq(&bm->lock);
	qcow2_write_marks(bm, m);

	spin_lock_irq(&bm->lock);
	for (i = 0; i < m->nr; i++)
		m->marks[i].bits->writing = false;
	more = !list_empty(&bm->todo);
	spin_unlock_irq(&bm->lock);
	if (more)
		qcow2_kick_markers(bm);
	r = qcow2_flush_marks(bm);

	spin_lock_irq(&bm->lock);
	unsure = bm->nr_unsure;
	for (i = 0; i < m->nr; i++)
		qcow2_marked(bm, m->marks + i, round,
			     r ? BLK_STS_IOERR :
			     qcow2_error_get(&m->marks[i].error));
	failing = !unsure && bm->nr_unsure;
	WRITE_ONCE(bm->nr_served, bm->nr_served - served);
	took = min_t(u64, ktime_get_ns() - begun, NSEC_PER_SEC);
	WRITE_ONCE(bm->round_ns, bm->round_ns / 4 * 3 + took / 4);
	bm->nr_rounds--;
	wake_up_all(&bm->quiet);
	spin_unlock_irq(&bm->lock);
	for (i = 0; i < m->nr; i++)
		mempool_free(m->marks[i].buf, &bm->buffers);
	/* A flush that has failed has been told with the mode. */
	if (failing && !r)
		qcow2_mode_event(bm->health);
	qcow2_bitmaps_arm(bm);
	/* Each looks for himself. */
	bm->map->wake(&waiters, 0);
}
