/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * An image and its data, and the chain of backing files below it: opened,
 * locked and found to fit together.  What open and table have in common.
 */
#ifndef QCOW2SETUP_MAPPING_H
#define QCOW2SETUP_MAPPING_H

#include <stdbool.h>
#include <stdint.h>

#include "image/image.h"
#include "system/node.h"

/* A chain can be no longer: each image of it is a device on top of the next. */
#define MAX_BACKING_FILES	32

/* The files of a chain as the user names them. */
struct chain {
	const char *data_file;			/* NULL: not named */
	const char *const *backing_file;	/* from top to bottom */
	unsigned int backing_files;
	bool read_only;
	bool trust_image_paths;		/* what is not named is as the images say */
};

/* What the clusters read as that an image has not allocated. */
struct backing {
	struct node node;	/* a device, or a raw file */
	struct mapping *image;	/* else: an image to be opened read-only */
	char *arg;		/* what node.path points into */
};

struct mapping {
	struct image img;
	struct node data;
	char *data_path;		/* if it was taken from the image */
	struct backing *backing;	/* NULL: none */
	const struct mapping *above;	/* that this one is the backing of */
};

#define MAPPING_CLOSED	{ .img = IMAGE_CLOSED, .data = NODE_CLOSED }

/*
 * Open, lock and check.  Changes nothing.  Prints why it failed, returns an
 * exit code; mapping_close() is due in any case.
 */
int mapping_open(struct mapping *m, const struct chain *chain,
		 const char *path);
void mapping_close(struct mapping *m);
/* The guest sees the data file as it is. */
bool mapping_raw(const struct mapping *m);
/* Bytes that a device on top must be a multiple of. */
unsigned int mapping_block_size(const struct mapping *m);

/*
 * Open an image by itself: lock it before anything is read, and make sure that no
 * one else writes.  Prints why it failed, returns an exit code.
 */
int image_open_locked(struct image *img, const char *path, bool write);

/*
 * "PATH[,data-file=PATH]", what --backing-file takes, cut in place; returns the
 * second path, or NULL.
 */
char *backing_arg_split(char *arg);
/*
 * Is @node, which an image with header @h has as its backing file, an image, or a
 * disk that shows what the guest would see?  @data: the data file that the user
 * named for it, or NULL; @trust: then it may be the one that it records.  Sets
 * *@image; refuses what is a mistake, with an exit code.
 */
int backing_is_image(const struct header *h, const struct node *node,
		     const char *data, bool trust, bool *image);

/* Is @name a plain path that may be opened?  @why: what it is instead. */
bool plain_path(const struct span *name, const char **why);
/* The folder that @path is in, where relative names in an image start; or -1 */
int open_folder_of(const char *path);

#endif
