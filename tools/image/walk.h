/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef QCOW2SETUP_WALK_H
#define QCOW2SETUP_WALK_H

#include "image/extents.h"
#include "image/image.h"

/*
 * Hand all of the disk to @x, table by table.  @g: of the image, checked.  Prints why it
 * failed, an exit code, or returns what x->fn did.
 */
int image_walk(const struct image *img, const struct qcow2_geometry *g,
	       struct extents *x);

/* What the header says, checked.  Prints why it failed, an exit code. */
int image_geometry(const struct image *img, struct qcow2_geometry *g);

#endif
