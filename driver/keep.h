/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Keeping what a view shows before it changes: copies of old content.
 */
#ifndef DM_QCOW2_KEEP_H
#define DM_QCOW2_KEEP_H

#include "io.h"

/* For a table with a view.  0 or -ENOMEM; qcow2_keep_exit() is right after both. */
int qcow2_keep_pools(struct qcow2_target *q);
void qcow2_keep_exit(struct qcow2_target *q);

/*
 * What map() can do at once, waiting for nothing, for a write to one granule: have that kept.  True
 * if the io waits for it, and is no longer the caller's; process() will look at all again.  Whoever
 * has to wait for something else, too, says so with @wait.
 */
bool qcow2_keep_now(struct qcow2_io *io, bool wait);

/*
 * Begin to keep what an io is about to change, as far as that can be said without waiting for
 * anything but memory.  Workqueue context.
 */
void qcow2_keep_begin(struct qcow2_io *io);

/*
 * Have all kept that an io is about to change.  True if that is so, or if the view is over; false
 * if the io waits, and is no longer the caller's.  Workqueue context.
 */
bool qcow2_keep_all(struct qcow2_io *io);

#endif /* DM_QCOW2_KEEP_H */
