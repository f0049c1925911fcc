/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Write a new image. */
#ifndef QCOW2SETUP_MAKE_H
#define QCOW2SETUP_MAKE_H

#include <stdbool.h>
#include <stdint.h>

#include "image/header.h"
#include "image/plan.h"

struct new_image {
	struct qcow2_geometry g;
	struct plan_new p;
	const char *path;		/* for messages */
	int fd;
	int dir;			/* its folder, to be made durable, too; -1: none */
	bool fresh;			/* a file that is empty */
	const char *data_file;		/* its name, for the header */
	bool raw;
	const char *backing, *backing_format;	/* likewise; NULL: none */
	/* A directory from bitmaps_new_dir(); NULL: no bitmaps */
	const void *bitmaps;
	struct qcow2_bitmaps_ext bitmaps_ext;
	const struct header_clone *clone;	/* NULL: it is none */
	/*
	 * All L2 tables are written, with what is said of each cluster, in order; NULL: all of
	 * them are data, if @raw, or there are no L2 tables.  @arg is for it.
	 */
	enum qcow2_state (*state)(void *arg, uint64_t cluster);
	void *arg;
};

/*
 * Lay out one with all its L2 tables, and with standard refcounts.  False if no refcount table is
 * large enough.
 */
bool new_image_plan(struct new_image *n, uint64_t size, unsigned int cluster_bits);

/* Fill the first cluster, @p; false if the names do not fit. */
bool new_image_header(const struct new_image *n, uint8_t *p);

/*
 * Everything but the header; then the header, which makes it an image.  Durable.  Prints
 * why it failed, an exit code.
 */
int new_image_write(const struct new_image *n, const uint8_t *header);

#endif
