/* SPDX-License-Identifier: GPL-2.0-or-later */
/* From an image and its data, opened and locked, to a device. */
#ifndef QCOW2SETUP_ACTIVATE_H
#define QCOW2SETUP_ACTIVATE_H

#include <stdbool.h>
#include <stdint.h>

#include "stack/change.h"
#include "stack/mapping.h"

/* What the device is to be like. */
struct activation {
	bool read_only;
	bool no_discard_passdown;
	bool sparse;			/* no space for metadata is taken ahead */
	bool passing;			/* as sparse, and nothing is said of it */
	bool drop_bitmaps;
	bool partitions;		/* they become devices, too */
	bool host;			/* the content is this host's own */
	uint64_t cache_limit;		/* bytes; 0: the driver's default */
};

/* All of these print why they failed and return an exit code. */

/* Can there be a new device of that name? */
int activate_check(const char *name);
/*
 * Make the devices of a chain from the bottom up, then /dev/mapper/NAME.  If it fails,
 * or is interrupted, all that it did is taken back, and @m is closed.
 */
int activate_device(struct mapping *m, const char *name,
		    const struct activation *how);
/*
 * Give a device that is open another image with other data, both files, in one step: its
 * backing device and all that was said when it was opened stay.  What was written to the
 * old image meanwhile is its own affair.  If it fails, all is as before.
 */
int activate_instead(struct live *l, const char *image, const char *data);

#endif
