/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef QCOW2SETUP_WALK_H
#define QCOW2SETUP_WALK_H

#include "image/extents.h"
#include "image/image.h"

/* Where a scan had to end */
struct scan_fault {
	int err;			/* -errno of a read, or 0 */
	enum qcow2_fault fault;		/* of an entry, or 0 */
	uint64_t l1;			/* entry of the L1 table */
	int64_t l2;			/* entry of the L2 table; -1: that of the L1 table */
};

/*
 * Hand all of the disk to @x, table by table, without a message.  @g: of the image, checked.
 * Returns 0, what x->fn did, or -1: @f says why.
 */
int image_scan(const struct node *node, const struct qcow2_geometry *g,
	       struct extents *x, struct scan_fault *f);

/*
 * Hand all of the disk to @x, table by table.  @g: of the image, checked.  Prints why it
 * failed, an exit code, or returns what x->fn did.
 */
int image_walk(const struct image *img, const struct qcow2_geometry *g,
	       struct extents *x);

/* What the header says, checked.  Prints why it failed, an exit code. */
int image_geometry(const struct image *img, struct qcow2_geometry *g);

#endif
