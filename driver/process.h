/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The slow path: what cannot be done in map().
 */
#ifndef DM_QCOW2_PROCESS_H
#define DM_QCOW2_PROCESS_H

#include "io.h"

enum qcow2_busy {
	QCOW2_BUSY_WRITE,	/* someone works on it */
	QCOW2_BUSY_BAD,		/* its entry is corrupt */
	QCOW2_BUSY_GONE,	/* it is not busy any more, or not in core */
};

/* Why was a unit seen busy?  Any context. */
enum qcow2_busy qcow2_why_busy(struct qcow2_map *map, sector_t sector);

/* Can @bio free anything where units are zero already?  A hint; any context. */
bool qcow2_discards_zeros(struct qcow2_target *q, struct bio *bio);

/* Work on an io, as far as that goes.  q->process. */
void qcow2_process(struct work_struct *work);

/* Make the reservations that ios wait for.  q->reserver. */
void qcow2_reserver(struct work_struct *work);

#endif /* DM_QCOW2_PROCESS_H */
