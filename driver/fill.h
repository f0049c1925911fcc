/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * First writes, and what fills the rest of their units: zeros, or a copy of what
 * the backing device has there.
 */
#ifndef DM_QCOW2_FILL_H
#define DM_QCOW2_FILL_H

#include "io.h"

enum qcow2_begun {
	QCOW2_NOT_BEGUN,
	QCOW2_BEGUN,	/* the caller submits the bio */
	QCOW2_TAKEN,	/* what fills the units writes its data, too: the caller
			 * drops the bio's reference (qcow2_io_put())
			 */
};

/**
 * qcow2_first_write() - begin a first write
 * @io: the io; its bio has not been submitted, and is just about these sectors
 *	(for write zeroes, which have no data, it may be about more)
 * @sector: first sector
 * @nr: sectors, in one slice and all in the same state
 * @state: that state, as it was seen
 * @may_block: process context that may sleep
 *
 * If it is not begun, the io has not been touched, and the state has to be looked
 * up again (or, unless @may_block, the workqueue has to do it).
 */
enum qcow2_begun qcow2_first_write(struct qcow2_io *io, sector_t sector,
				   unsigned int nr, enum qcow2_state state,
				   bool may_block);

/*
 * Write zeroes to a part of a unit, for an io or a part of one.  Not as write
 * zeroes: a device can refuse those at any time.  May sleep.
 */
void qcow2_write_zeros(struct qcow2_io *io, sector_t sector, unsigned int nr);

/* For a writer.  0 or a negative errno; qcow2_fill_exit() is right after both. */
int qcow2_fill_pools(struct qcow2_target *q);
void qcow2_fill_exit(struct qcow2_target *q);

#endif /* DM_QCOW2_FILL_H */
