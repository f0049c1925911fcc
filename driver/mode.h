/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What a table is still good for.  Everything above this may find a reason to
 * change it.
 */
#ifndef DM_QCOW2_MODE_H
#define DM_QCOW2_MODE_H

#include <linux/spinlock.h>
#include <linux/workqueue.h>

#include "mdio.h"

struct dm_target;

/*
 * It gets worse only, and stays so until another table is loaded; but nospc ends
 * by itself.
 */
enum qcow2_mode {
	QCOW2_RW,	/* all is well */
	QCOW2_NOSPC,	/* metadata waits for space: no new L2 tables */
	QCOW2_RO,	/* asked for, or the metadata is corrupt: no writes */
	QCOW2_FAIL,	/* a flush has failed: no flush, no FUA, no first write;
			 * what is in core is still right
			 */
};

struct qcow2_health {
	spinlock_t lock;	/* of what names it; no lock nests in it */
	/* enum qcow2_mode; written under @lock, read anywhere (READ_ONCE) */
	unsigned int mode;
	/*
	 * The metadata is corrupt: no writes at all, also in mode fail.
	 * Written under @lock, before @mode; read anywhere (READ_ONCE).
	 */
	bool corrupt;

	/* Constant */
	bool read_only;		/* the image is not to be changed by a bit */
	struct dm_target *ti;
	struct qcow2_mdio *io;
	struct workqueue_struct *wq;	/* of @marker; NULL if @read_only */
	struct work_struct marker;	/* sets the corrupt bit in the header */
};

/* @read_only: the mode is ro from the beginning; else the caller sets @h->wq */
void qcow2_health_init(struct qcow2_health *h, struct dm_target *ti,
		       struct qcow2_mdio *io, bool read_only);

static inline enum qcow2_mode qcow2_mode(struct qcow2_health *h)
{
	return READ_ONCE(h->mode);
}

/* May the map be changed, so far as space allows? */
static inline bool qcow2_mode_writes(enum qcow2_mode mode)
{
	return mode <= QCOW2_NOSPC;
}

/* May nothing be written, not even to units that are data? */
static inline bool qcow2_mode_no_writes(struct qcow2_health *h,
					enum qcow2_mode mode)
{
	return mode == QCOW2_RO ||
	       (mode == QCOW2_FAIL && READ_ONCE(h->corrupt));
}

const char *qcow2_mode_name(enum qcow2_mode mode);

/* The rest raises events, and needs process context. */

/* A flush has failed, or the caches below may have lost what was in them. */
void qcow2_mode_fail(struct qcow2_health *h);

/* The metadata is corrupt, which has been logged: ro, and the header says so. */
void qcow2_mode_corrupt(struct qcow2_health *h);

/* Does metadata wait for space?  Called by the commit worker. */
void qcow2_mode_space(struct qcow2_health *h, bool nospc);

/* Tell userspace to look at the status. */
void qcow2_mode_event(struct qcow2_health *h);

#endif /* DM_QCOW2_MODE_H */
