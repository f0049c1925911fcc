/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Pass-down: the data device discards what is zero on stable storage.
 *
 * A unit's way (struct qcow2_trim): zero and fresh; a commit takes its block, and
 * it is ready; the commit succeeds; it is made busy, and discarded; done.  If it is
 * written at any time before, all of this is forgotten.  Hints are only hints: they
 * can be forgotten at any time, and a later discard of the unit brings them back.
 */
#ifndef DM_QCOW2_TRIM_H
#define DM_QCOW2_TRIM_H

#include <linux/wait.h>

#include "cache.h"

/*
 * Discards that are under way at a time: writes to their units have to wait, and so
 * does a suspend.
 */
#define QCOW2_MAX_PASSDOWNS	16

struct qcow2_trims {
	/* Constant */
	struct qcow2_map *map;
	struct qcow2_cache *cache;
	struct qcow2_health *health;
	struct block_device *data_bdev;
	/*
	 * What suspend waits for; the last thing that is touched on behalf of
	 * a discard.
	 */
	atomic_t *slow;

	struct bio_set bs;
	/*
	 * Its queue is its own, for it may wait for slices.  Constant; NULL:
	 * nothing is passed down.
	 */
	struct workqueue_struct *wq;
	struct work_struct work;
	/*
	 * How many may begin; INT_MAX: any number.  Written by suspend and
	 * resume, and while it is another number by the worker, for which they
	 * wait then (WRITE_ONCE).
	 */
	int budget;
	bool busy;			/* there were some when they were stopped */
	bool last;			/* nothing is to be loaded any more */
	atomic_t passdowns;		/* in flight */
	wait_queue_head_t room;		/* for @passdowns to change */
};

/*
 * @t: all zeros but for the constant fields.  0 or a negative errno;
 * qcow2_trims_exit() is right after both.  Process context.
 */
int qcow2_trims_init(struct qcow2_trims *t);
void qcow2_trims_exit(struct qcow2_trims *t);

/* Go on with what is ready.  Any context. */
void qcow2_trims_kick(struct qcow2_trims *t);

/* Begin nothing new from now on.  Process context, like the next two. */
void qcow2_trims_stop(struct qcow2_trims *t);

/*
 * Wait until the worker has noticed that.  What has begun is counted in @slow.
 */
void qcow2_trims_flush(struct qcow2_trims *t);

/*
 * After the last commit: if nothing was to be done before, begin what it allows, as
 * far as all of it can be in flight at the same time.  So a suspend waits for one
 * round of discards at most, whatever a guest has asked for.
 */
void qcow2_trims_last(struct qcow2_trims *t);

void qcow2_trims_start(struct qcow2_trims *t);

#endif /* DM_QCOW2_TRIM_H */
