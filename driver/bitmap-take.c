// SPDX-License-Identifier: GPL-2.0-only
/*
 * Dirty bitmaps: bits that nobody has asked for are taken back, when it is quiet, when somebody
 * wants to know, and at suspend.
 */
#include <linux/bitops.h>

#include "bitmap-internal.h"

/* Taking back is tried at suspend so often. */
#define QCOW2_TAKE_TRIES	3

/* Blocks that have something to be taken back, or that have to be written; the lock is held. */
static void qcow2_take_loose(struct qcow2_bitmaps *bm, struct qcow2_marker *m)
{
	struct qcow2_bits *b;

	m->nr = 0;
	list_for_each_entry(b, &bm->lru, lru) {
		if (m->nr == QCOW2_MARK_WAVE)
			break;
		if (!b->unsure &&
		    (!b->loose || !memcmp(b->exact, b->durable,
					  qcow2_bits_bytes(bm)))) {
			b->loose = false;
			continue;
		}
		b->writing = true;
		m->marks[m->nr++] = (struct qcow2_mark){ .bits = b };
	}
}

/* Row 7 */
static void qcow2_fill_taken(struct qcow2_bitmaps *bm, struct qcow2_mark *mark)
{
	struct qcow2_bits *b = mark->bits;
	unsigned int bytes = qcow2_bits_bytes(bm);
	const unsigned long *exact = (unsigned long *)b->exact;
	unsigned long *durable = (unsigned long *)b->durable;
	unsigned int i;

	memcpy(mark->buf, exact, bytes);
	for (i = 0; i < bytes / sizeof(long); i++) {
		bm->taken_back += hweight_long(durable[i] & ~exact[i]);
		durable[i] &= exact[i];
	}
}

/* One wave of it.  1 if there was nothing to be done, 0, or a negative errno. */
static int qcow2_take_wave(struct qcow2_bitmaps *bm)
{
	struct qcow2_marker *m = &bm->taker;
	unsigned int i;
	int r = 0;

	spin_lock_irq(&bm->lock);
	qcow2_take_loose(bm, m);
	spin_unlock_irq(&bm->lock);
	if (!m->nr)
		return 1;
	qcow2_get_buffers(bm, m, false);
	spin_lock_irq(&bm->lock);
	for (i = 0; i < m->nr; i++)
		qcow2_fill_taken(bm, m->marks + i);
	spin_unlock_irq(&bm->lock);
	qcow2_write_marks(bm, m);
	r = qcow2_flush_marks(bm);

	spin_lock_irq(&bm->lock);
	for (i = 0; i < m->nr; i++) {
		struct qcow2_bits *b = m->marks[i].bits;
		blk_status_t status = qcow2_error_get(&m->marks[i].error);
		unsigned int k;

		b->writing = false;
		qcow2_set_unsure(bm, b, r || status);
		if (b->unsure) {
			/* row 9 */
			if (!r)
				r = blk_status_to_errno(status);
			continue;
		}
		/* Row 8.  What had not been marked before is now. */
		b->loose = false;
		for (k = 0; k < qcow2_bits_bytes(bm) / sizeof(long); k++)
			((unsigned long *)b->durable)[k] |=
				((unsigned long *)m->marks[i].buf)[k];
	}
	spin_unlock_irq(&bm->lock);
	for (i = 0; i < m->nr; i++)
		mempool_free(m->marks[i].buf, &bm->buffers);
	return r;
}

static void qcow2_pause_marks(struct qcow2_bitmaps *bm, bool pause)
{
	spin_lock_irq(&bm->lock);
	bm->paused = pause;
	spin_unlock_irq(&bm->lock);
	if (pause)
		wait_event(bm->quiet, !READ_ONCE(bm->nr_rounds));
	else
		qcow2_kick_markers(bm);
}

int qcow2_bitmaps_sync(struct qcow2_bitmaps *bm)
{
	int r = 0;

	mutex_lock(&bm->taking);
	while (!r) {
		if (qcow2_mode(bm->health) == QCOW2_FAIL) {
			r = -EIO;
			break;
		}
		/* Marks wait for a wave, no more. */
		qcow2_pause_marks(bm, true);
		r = qcow2_take_wave(bm);
		qcow2_pause_marks(bm, false);
	}
	mutex_unlock(&bm->taking);
	return min(r, 0);
}

void qcow2_idle_worker(struct work_struct *work)
{
	struct qcow2_bitmaps *bm = container_of(to_delayed_work(work),
						struct qcow2_bitmaps, idle);
	bool used;

	spin_lock_irq(&bm->lock);
	used = bm->used;
	bm->used = false;
	spin_unlock_irq(&bm->lock);
	if (qcow2_mode(bm->health) == QCOW2_FAIL)
		return;
	if (used || qcow2_bitmaps_sync(bm))
		qcow2_bitmaps_arm(bm);
}

bool qcow2_bitmaps_settle(struct qcow2_bitmaps *bm)
{
	unsigned int tries;
	int r = -EIO;

	cancel_delayed_work_sync(&bm->idle);
	for (tries = 0; tries < QCOW2_TAKE_TRIES && r; tries++)
		r = qcow2_bitmaps_sync(bm);
	cancel_delayed_work_sync(&bm->idle);
	flush_workqueue(bm->wq);
	return !r;
}
