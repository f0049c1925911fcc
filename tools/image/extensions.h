/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Changes of the bitmaps extension in the first cluster of an image, in steps that a
 * power cut can come between.  Pure code.
 *
 * A disk writes a sector as a whole, and no more than that.  So a step changes either
 * what no parser looks at, which is what lies behind the end of the extensions and is
 * no backing file name, or bytes of one sector: those of the extension, the eight with
 * which an extension begins, or the header.
 */
#ifndef QCOW2SETUP_EXTENSIONS_H
#define QCOW2SETUP_EXTENSIONS_H

#include "image/header.h"

enum extension_step {
	EXTENSION_MORE,		/* write it, make it durable, and call again */
	EXTENSION_DONE,		/* write it, make it durable: that was all */
	EXTENSION_NO_ROOM,	/* nothing was changed in this step */
};

/**
 * extension_put() - one step to a header that has this bitmaps extension
 * @first: the first cluster, which header_parse() takes; changed
 * @cluster: its size
 * @ext: what the extension shall say
 *
 * Until the last step the header says what it said before.  With clusters of one
 * sector all steps can be written at once.
 */
enum extension_step extension_put(uint8_t *first, size_t cluster,
				  const struct qcow2_bitmaps_ext *ext);
/* The same, to a header without the extension: always done with one step. */
void extension_drop(uint8_t *first, size_t cluster);

#endif
