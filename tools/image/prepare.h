/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef QCOW2SETUP_PREPARE_H
#define QCOW2SETUP_PREPARE_H

#include "image/image.h"

/*
 * Make an image that is about to be written ready for the kernel: room for all
 * metadata, refcount table large enough, unknown autoclear bits clear, bitmaps
 * ready to be kept or marked as not valid.  All of it is durable when this returns 0.
 */
int image_prepare(struct image *img);

#endif
