/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What the target says of a device of ours that is open. */
#ifndef QCOW2SETUP_LIVE_H
#define QCOW2SETUP_LIVE_H

#include <stdint.h>

#include "system/target.h"

/*
 * Read a device's status, in the words of the module that is loaded.  A line that
 * is not understood is an error.  Both print why they failed, and return an exit
 * code; but if there is no such device any more, live_status() returns -ENXIO
 * without a message.
 */
int live_status(const char *name, struct target_status *s);
/*
 * The same; *@unwritten is how much metadata a suspended device has in core only,
 * since it could not be written: it is gone when another table is loaded, or when
 * the device is removed.
 */
int live_unwritten(const char *name, struct target_status *s,
		   uint64_t *unwritten);

#endif
