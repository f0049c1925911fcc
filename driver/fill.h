/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * First writes, and what fills the rest of their units: zeros, or a copy of what
 * the backing device has there.
 */
#ifndef DM_QCOW2_FILL_H
#define DM_QCOW2_FILL_H

#include "io.h"

/**
 * qcow2_first_write() - begin a first write
 * @io: the io; its bio has not been submitted
 * @sector: first sector
 * @nr: sectors, in one slice and all in the same state
 * @state: that state, as it was seen
 * @may_block: process context that may sleep
 *
 * The caller submits the io's bio if the result is true; if it is false, the
 * io has not been touched, and the state has to be looked up again (or, unless
 * @may_block, the workqueue has to do it).
 */
bool qcow2_first_write(struct qcow2_io *io, sector_t sector, unsigned int nr,
		       enum qcow2_state state, bool may_block);

/*
 * Write zeroes to a part of a unit, for an io or a part of one.  Not as write
 * zeroes: a device can refuse those at any time.  May sleep.
 */
void qcow2_write_zeros(struct qcow2_io *io, sector_t sector, unsigned int nr);

/* For a writer.  0 or a negative errno; qcow2_fill_exit() is right after both. */
int qcow2_fill_pools(struct qcow2_target *q);
void qcow2_fill_exit(struct qcow2_target *q);

#endif /* DM_QCOW2_FILL_H */
