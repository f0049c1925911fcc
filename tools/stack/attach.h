/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef QCOW2SETUP_ATTACH_H
#define QCOW2SETUP_ATTACH_H

#include <stdbool.h>

#include "image/image.h"

/*
 * Read the metadata of a device that is open: what it has only in memory is written
 * first, and with @bitmaps these say no more than what has changed.  The kernel goes on
 * writing it, but an entry is never half written, and nothing moves or goes.
 * Messages call the image by the device's @name.  Prints why it failed, an exit
 * code; image_close() is due in any case.
 */
int attach_live(struct image *img, const char *name, bool bitmaps);

#endif
