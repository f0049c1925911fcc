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

#include "image/header.h"
#include "image/space.h"
#include "system/node.h"

struct undo;

/* How an image file gets longer. */
enum image_space {
	IMAGE_REAL,		/* all that it can need is taken at once */
	IMAGE_SPARSE,		/* the user does not want that: it is said */
	IMAGE_PASSING,		/* sparse, since it is cut off again */
};

struct image {
	struct node node;
	uint8_t *first;			/* first cluster */
	struct header h;
	/* Valid if image_reasons() found nothing. */
	struct qcow2_geometry geo;
	__be64 *l1;			/* image_load_tables() */
	__be64 *reftable;
	uint8_t *bitmap_dir;		/* image_load_bitmaps() */
	uint64_t bitmap_bytes;		/* what bitmaps can need; image_end() */
	struct undo *undo;		/* newest first */
	/* The file, or the one behind a device; fd -1: it cannot get longer. */
	struct space space;
	enum image_space space_kind;
	/* Lets a device see that its file has another length. */
	int (*resized)(struct image *img);
	void *resized_arg;
};

#define IMAGE_CLOSED	{ .node = NODE_CLOSED, .space.fd = -1 }

/* Open, read and parse the header.  Prints why it failed; an exit code. */
int image_open(struct image *img, int dirfd, const char *path,
	       unsigned int node_flags);
/* The same for a node that is open already; it becomes the image's. */
int image_attach(struct image *img, const struct node *node);
/* The virtual size of the image in a node, which stays the caller's; an exit code. */
int image_virtual_size(const struct node *node, uint64_t *size);
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
 * The steps of such changes, for those who make others (grow.c).  What
 * image_change() overwrites can be put back by image_undo(), in the same order
 * backwards; image_sync() makes all before it durable.
 */
int image_change(struct image *img, const void *buf, size_t len, uint64_t off);
int image_sync(struct image *img);
/* Write h.raw: one sector, and so all of it or nothing; then image_sync(). */
int image_change_header(struct image *img);
/* Count @n clusters from cluster @at on, which nothing uses, as used. */
int image_take_clusters(struct image *img, uint64_t at, uint64_t n);
/* Take one from the refcounts of @n clusters from cluster @from on. */
int image_put_clusters(struct image *img, uint64_t from, uint64_t n);
int image_clear_autoclear(struct image *img);

struct room {
	uint64_t size;		/* virtual size that room is made for */
	uint64_t more;		/* clusters besides L2 tables */
	bool required;		/* refuse, and do not only warn, if it is not there */
};

int image_make_room(struct image *img, const struct room *room);

/* What image_grow() has to know; see grow.c. */
struct growth {
	uint64_t size;			/* the new one */
	const struct node *data;	/* NULL: not at hand */
	/* What the backing file is as a disk; NULL: none, or not at hand. */
	const struct node *backing;
	uint64_t backing_size;		/* 0: none; UINT64_MAX: not known */
};

/*
 * Give the image a larger virtual size: the new area reads as zeros, or with a
 * raw data file as that.  After image_load_tables(); durable when this returns
 * 0.  The same size makes room only.
 */
int image_grow(struct image *img, const struct growth *g);

/*
 * Cut the unused end off a file that is not in use.  Does nothing if there is
 * any doubt about what is used.
 */
int image_trim(struct image *img, uint64_t *cut);

#endif
