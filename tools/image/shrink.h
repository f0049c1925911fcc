/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef QCOW2SETUP_SHRINK_H
#define QCOW2SETUP_SHRINK_H

#include "image/image.h"

/*
 * Give an image a smaller virtual size: what is behind it is lost.  After
 * image_load_tables(); durable when this returns 0.
 */
int image_shrink(struct image *img, uint64_t size);

#endif
