/* SPDX-License-Identifier: GPL-2.0-or-later */
/* How much room is left for the metadata of a device that is open.  Pure code. */
#ifndef QCOW2SETUP_ROOM_H
#define QCOW2SETUP_ROOM_H

#include <stdbool.h>
#include <stdint.h>

#include "system/target.h"

enum room_left {
	ROOM_ENOUGH,
	ROOM_LOW,		/* writes go on; it is time to make more */
	ROOM_OUT,		/* writes have failed, or will at any moment */
};

/*
 * Clusters that are free for metadata, as the target's status says, but no more than there
 * can be on a metadata device of @bytes (0: not known).
 */
uint64_t room_free(const struct target_status *s, uint64_t bytes);

/*
 * Of a metadata device of fixed size, @bytes.  *@more: how much longer it would have
 * to be for all L2 tables that can still come.
 */
enum room_left room_of_device(const struct target_status *s, uint64_t bytes, uint64_t *more);

/*
 * Of an image file of @length bytes, of which @taken are real; its file system has
 * @free.  *@more: how much is not real yet.
 */
enum room_left room_of_file(const struct target_status *s, uint64_t length, uint64_t taken,
			    uint64_t free, uint64_t *more);

#endif
