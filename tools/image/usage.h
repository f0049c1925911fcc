/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * How much of a disk its image has allocated.  For those who only want to know: nothing is
 * printed, and what cannot be told is said with a word.
 */
#ifndef QCOW2SETUP_USAGE_H
#define QCOW2SETUP_USAGE_H

#include <stdbool.h>
#include <stdint.h>

#include "system/node.h"

struct image_usage {
	bool has_header;		/* the next ones are valid */
	bool corrupt;			/* the header is marked */
	uint32_t bitmaps;		/* that the header vouches for */
	bool known;			/* the next ones are valid */
	uint64_t data, zero;		/* bytes of the disk: map says the same */
	uint64_t tables_needed;		/* L2 tables of the whole disk */
	const char *why;		/* if not @known */
};

/*
 * Read header and tables of the image in @node, which the kernel may write meanwhile: it
 * is counted what is on disk.  That is 1/8192 of the disk's size, of what is allocated,
 * with clusters of 64K.
 */
void image_usage_read(const struct node *node, struct image_usage *u);

#endif
