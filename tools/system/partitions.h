/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Partitions of a device of ours, as devices of their own: named and marked as kpartx does
 * it, so that either can take away what the other has made.
 */
#ifndef QCOW2SETUP_PARTITIONS_H
#define QCOW2SETUP_PARTITIONS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "system/dm.h"

struct partition {
	char name[160], uuid[160];
	char *params;			/* of its line, of target "linear" */
	uint64_t sectors;
	bool read_only;
};

struct partitions {
	struct partition *p;
	size_t n, room;
};

/* All of these print why they failed and return an exit code. */

/*
 * Make those that the table on /dev/mapper/@name has: NAME1, or NAMEp1 if NAME ends in a digit.
 * None is left if it fails.  Where there is no table, it is said, and is no error.
 */
int partitions_make(const char *name);

/* Those of a device, in no order; partitions_free() is due in any case. */
int partitions_find(struct partitions *parts, const struct dm_dev_info *info);
void partitions_free(struct partitions *parts);

/*
 * Remove them; none is removed if one is in use, after a moment for those that only look
 * at devices.  @deferred: each with its last user
 */
int partitions_remove(const struct partitions *parts, bool deferred);
/* Make them again, as they were; without a word but for what cannot be. */
void partitions_put_back(const struct partitions *parts);

#endif
