/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Finding the bitmaps of an image: the header's extension, the directory, and the
 * bitmaps' tables.  Nothing here is written.
 */
#ifndef DM_QCOW2_DIRECTORY_H
#define DM_QCOW2_DIRECTORY_H

#include "format.h"
#include "mdio.h"

/* Bitmaps of a device that can record at the same time */
#define QCOW2_MAX_RECORDING	16

/* What is to be recorded */
struct qcow2_recording {
	struct qcow2_bitmap_dir dir;
	unsigned int count;
	struct qcow2_bitmap bitmaps[QCOW2_MAX_RECORDING];
};

/**
 * qcow2_directory_read() - find the bitmaps that record
 * @io: the metadata device
 * @geo: of the image; checked with qcow2_geometry_check()
 * @rec: filled in; nothing is to be recorded if the header does not vouch for the bitmaps
 * @error: set to the cause on failure
 *
 * A bitmap that asks to be kept up to date, and that cannot be, is a failure, as is one
 * more than there may be; what others are like is nobody's concern here.  Returns 0,
 * -EINVAL, or another negative errno.  Process context; may run while another table for
 * the same device is live.
 */
int qcow2_directory_read(struct qcow2_mdio *io, const struct qcow2_geometry *geo,
			 struct qcow2_recording *rec, char **error);

/**
 * qcow2_bitmap_read_table() - read the table of a bitmap
 * @io: the metadata device
 * @geo: of the image
 * @b: the bitmap; qcow2_bitmap_record_check() has passed it
 * @clusters: set to where each of its clusters is, by cluster
 * @error: set to the cause on failure
 *
 * Each entry has to name a cluster, for nothing is allocated later.  Returns 0, -EINVAL,
 * or another negative errno.  Process context.
 */
int qcow2_bitmap_read_table(struct qcow2_mdio *io,
			    const struct qcow2_geometry *geo,
			    const struct qcow2_bitmap *b, u32 *clusters,
			    char **error);

#endif /* DM_QCOW2_DIRECTORY_H */
