/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Repair what verify.c has found, as far as it can be done without a guess.
 *
 * Refcounts follow from what is in use, and COPIED from refcounts: both can be
 * made right.  A wrong place of data or tables cannot.
 *
 * A crash at any moment leaves the image no worse: refcounts are raised before
 * they are lowered, a new refcount table is complete before the header names
 * it, and the header's marks are cleared when everything else is durable.
 */
#ifndef QCOW2SETUP_REPAIR_H
#define QCOW2SETUP_REPAIR_H

#include "image/verify.h"

/*
 * Exit codes.  The image changes, and so @v is worth nothing any more: verify
 * it again.
 */
int repair_leaks(struct verify *v);
int repair_all(struct verify *v);

/*
 * Give up all bitmaps: the header says that they are worth nothing.  For those that
 * are malformed, which nobody else would open the image with.
 */
int repair_bitmaps(struct image *img);

/* The image was found to be good: it is neither dirty nor corrupt any more. */
int repair_marks(struct image *img);

#endif
