/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * An image's metadata, as the tool sees and changes it while the device is not
 * live.  Everything that is changed is written down, so that image_undo() can
 * leave the image as it was found.
 */
#ifndef QCOW2SETUP_IMAGE_H
#define QCOW2SETUP_IMAGE_H

#include <stdbool.h>
#include <stdint.h>

#include "header.h"
#include "node.h"

struct undo;

struct image {
	struct node node;
	uint64_t size_before;		/* of the file, when it was opened */
	uint8_t *first;			/* first cluster */
	struct header h;
	/* Valid if image_reasons() found nothing. */
	struct qcow2_geometry geo;
	__be64 *l1;			/* image_load_tables() */
	__be64 *reftable;
	uint8_t *bitmap_dir;		/* image_load_bitmaps() */
	struct undo *undo;		/* newest first */
};

#define IMAGE_CLOSED	{ .node = NODE_CLOSED }

/* Open, read and parse the header.  Prints why it failed; an exit code. */
int image_open(struct image *img, int dirfd, const char *path,
	       unsigned int node_flags);
/* The same for a node that is open already; it becomes the image's. */
int image_attach(struct image *img, const struct node *node);
void image_close(struct image *img);

/* Why an image cannot be mapped, most important first. */
#define MAX_REASONS	8
struct reasons {
	unsigned int n;
	struct {
		char cause[640];
		const char *remedy;
	} r[MAX_REASONS];
};

void image_reasons(struct image *img, bool read_only, struct reasons *r);

/*
 * Read L1 and refcount table.  With @strict, entries that are impossible, or
 * that name a cluster twice, are refused; else they are only warned about.
 */
int image_load_tables(struct image *img, bool strict);
/* Read and check the bitmap directory; @why is set if it returns EX_WRONG. */
int image_load_bitmaps(struct image *img, const char **why);
/* The header says that its bitmaps are up to date. */
bool image_has_bitmaps(const struct image *img);

/* First byte behind everything that is in use; reads refcounts. */
int image_end(struct image *img, uint64_t *end);

/*
 * Make an image that is about to be written ready for the kernel: room for all
 * metadata, refcount table large enough, unknown autoclear bits clear, bitmaps
 * marked.  All of it is durable when this returns 0.
 */
int image_prepare(struct image *img);
/* Does not print anything unless it fails. */
void image_undo(struct image *img);

/*
 * Cut the unused end off a file that is not in use.  Does nothing if there is
 * any doubt about what is used.
 */
int image_trim(struct image *img, uint64_t *cut);

#endif
