/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What the files of image.h share.  Calls go down this list:
 *
 *	room.c		room for metadata
 *	image.c		opening and closing
 *	changes.c	changes, and their undoing
 *	end.c		where all that is in use ends
 *	reasons.c	why an image cannot be mapped
 *	tables.c	tables are read, and looked at
 */
#ifndef QCOW2SETUP_TABLES_H
#define QCOW2SETUP_TABLES_H

#include "image/image.h"

static inline uint64_t cluster_size(const struct image *img)
{
	return 1ULL << img->h.cluster_bits;
}

/* Entries of the refcount table */
uint32_t image_reftable_entries(const struct image *img);

/*
 * Read the refcount block that entry @i of @table names; *off is where it is,
 * or 0 if it names none: then @block is not touched.
 */
int image_read_refblock(const struct image *img, const __be64 *table,
			uint64_t i, uint8_t *block, uint64_t *off);
/* Its metadata: says so, with an errno; an exit code. */
int image_read_failed(const struct image *img, int err);

#endif
