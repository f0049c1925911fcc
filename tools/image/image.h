/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * An image's metadata, as the tool sees and changes it while the device is not
 * live.  Everything that is changed is written down, so that image_undo() can
 * leave the image as it was found.  Which file has what is said in tables.h.
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
	bool keep_bitmaps;		/* the kernel can; for image_prepare() */
	unsigned int recording;		/* bitmaps that it keeps then */
	struct undo *undo;		/* newest first */
	uint64_t put_end;		/* behind all clusters that were given back */
	uint64_t taken_end;		/* bytes; behind all that clusters_take() gave */
	/* The file, or the one behind a device; fd -1: it cannot get longer. */
	struct space space;
	enum image_space space_kind;
	/* Lets a device see that its file has another length. */
	int (*resized)(struct image *img);
	void *resized_arg;
	/*
	 * Told before each change what was there, and (@len 0) of each point at
	 * which all before is made durable; to be undone in the same way.
	 */
	int (*changing)(struct image *img, uint64_t off, const void *old,
			size_t len);
	void *changing_arg;
};

#define IMAGE_CLOSED	{ .node = NODE_CLOSED, .space.fd = -1 }

/* Does it begin as an image does?  That is a guess, and nothing follows from it by itself. */
bool image_has_magic(const struct node *node);

/*
 * Bytes of the first cluster of what has @size bytes, by what its beginning says; less if
 * that is all there is.  What is behind need not be readable.
 */
size_t image_first_len(const struct node *node, uint64_t size);

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
		char remedy[2048];
	} r[MAX_REASONS];
};

/* What makes another image of one; the names of what is new are the user's choice. */
#define QEMU_CONVERT	"qemu-img convert -f qcow2 -O qcow2 -o data_file=FILE %s NEW"

void image_reasons(struct image *img, bool read_only, struct reasons *r);

/*
 * Read L1 and refcount table.  With @strict, entries that are impossible, or
 * that name a cluster twice, are refused; else they are only warned about.
 */
int image_load_tables(struct image *img, bool strict);
/* So many bitmaps the kernel keeps up to date. */
#define MOST_RECORDING	16
/* Read and check the bitmap directory; @why is set if it returns EX_WRONG. */
int image_load_bitmaps(struct image *img, const char **why);
/* The header says that its bitmaps are up to date. */
bool image_has_bitmaps(const struct image *img);

/* First byte behind everything that is in use; reads refcounts. */
int image_end(struct image *img, uint64_t *end);

/* Does not print anything unless it fails. */
void image_undo(struct image *img);
/* What was changed stays, for good; image_close() does that, too. */
void image_forget_changes(struct image *img);

/*
 * The steps of such changes, for those who make others (grow.c).  What
 * image_change() overwrites can be put back by image_undo(), in the same order
 * backwards; image_sync() makes all before it durable.
 */
int image_change(struct image *img, const void *buf, size_t len, uint64_t off);
int image_sync(struct image *img);
/* Write h.raw: one sector, and so all of it or nothing; then image_sync(). */
int image_change_header(struct image *img);
/*
 * Write the entries [@from, @to) of the refcount table that differ; @table begins
 * with the first of them.  Durable.
 */
int image_name_refblocks(struct image *img, uint64_t from, uint64_t to,
			 const __be64 *table);
/* Take one from the refcounts of @n clusters from cluster @from on. */
int image_put_clusters(struct image *img, uint64_t from, uint64_t n);
int image_clear_autoclear(struct image *img);

struct room {
	uint64_t size;		/* virtual size that room is made for */
	bool required;		/* refuse, and do not only warn, if it is not there */
	bool quiet;		/* do not warn */
	/* What is built now: L2 tables of those that are missing, and others */
	uint64_t tables, more;
	uint64_t from;		/* cluster where that goes to; 0: behind the end */
};

/* Have the space, and a refcount table that is large enough. */
int image_make_room(struct image *img, const struct room *room);
/*
 * The space only: sets *@at to the cluster where what is built goes to, and
 * *@reftable_clusters to what a new refcount table needs; 0: the old one is enough.
 * Can be called again, and while the kernel writes.
 */
int image_take_room(struct image *img, const struct room *room, uint64_t *at,
		    uint64_t *reftable_clusters);
/* Is there space for it, and does it need a new refcount table?  Takes nothing. */
int image_plan_room(struct image *img, const struct room *room,
		    uint64_t *reftable_clusters, bool *fits);
/*
 * First cluster that a live table over this image, whose tables have just been
 * loaded, cannot take or write, whatever it is asked to do; a whole page of it.
 *
 * The kernel takes the first cluster that is free, and none behind the end of the
 * device as it was when the table was loaded, which is not behind what it is now.
 * It takes as many as there are L2 tables missing, a refcount block for each piece
 * of the image that has none, and others instead of those that cannot be written.
 */
int image_live_end(struct image *img, uint64_t *end);

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
 * The same in two steps, for an image that is live.  image_grow_begin() takes the
 * space and writes what is new and more than a few clusters, where the kernel does
 * not write, and durably; image_grow_end() needs the image at rest and attached
 * anew, to which the space that was taken then belongs, and writes a few clusters
 * only.  In between nothing refers to what is new: to undo it, give back the space.
 */
struct grower;
int image_grow_begin(struct image *img, const struct growth *g,
		     struct grower **w);
int image_grow_end(struct image *img, struct grower *w);
void image_grow_free(struct grower *w);

/*
 * Cut the unused end off a file that is not in use.  Does nothing if there is
 * any doubt about what is used.
 */
int image_trim(struct image *img, uint64_t *cut);

#endif
