/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The persistent bitmaps of an image that is at rest: read them, change them in
 * memory, and let all changes become true at once.  After image_reasons() and
 * image_load_tables(); image_undo() undoes what was written.
 *
 * What is new is written where nothing refers to it, and durably.  Then one write of
 * the bitmaps extension, or of a flag, is the switch, and then the clusters of what
 * was before become free: a crash leaves the old bitmaps or the new ones, and leaked
 * clusters at most.
 *
 * An image whose header does not vouch for its bitmaps (autoclear bit 0) has none.
 */
#ifndef QCOW2SETUP_BITMAPS_H
#define QCOW2SETUP_BITMAPS_H

#include "image/clusters.h"
#include "image/image.h"

struct bitmap_item {
	struct qcow2_bitmap head;	/* as it shall be */
	char *name;			/* head.name_size bytes, and a NUL */
	uint8_t *extra;			/* head.extra_size bytes */
	__be64 *table;			/* as on disk, but for the entries of ... */
	uint8_t **bits;			/* ... clusters that are to be written; or NULL */
	bool fresh;			/* the table is to be written */
	bool grows;			/* marked while the image grows */
	/* what the directory on disk has */
	uint64_t at;			/* bytes from its start */
	uint32_t flags;
};

struct bitmaps {
	struct image *img;
	struct bitmap_item *item;
	size_t n;
	bool changed;			/* more than flags */
	struct cluster_list freed;	/* by what is changed */
};

/* Read the directory, and all tables; bitmaps_free() in any case. */
int bitmaps_load(struct bitmaps *s, struct image *img);
void bitmaps_free(struct bitmaps *s);
/* NULL: it is not there. */
struct bitmap_item *bitmaps_find(const struct bitmaps *s, const char *name);

static inline bool bitmap_inconsistent(const struct bitmap_item *b)
{
	return b->head.flags & QCOW2_BITMAP_IN_USE;
}

/*
 * Changes in memory.  All refuse, with cause and remedy, what is not there, and, but
 * for bitmaps_remove(), what is inconsistent.
 */
int bitmaps_add(struct bitmaps *s, const char *name, unsigned int granularity_bits,
		bool records);
/* NAME[,granularity=SIZE], given with --@option: one that records */
int bitmaps_add_option(struct bitmaps *s, const char *text, const char *option);
int bitmaps_remove(struct bitmaps *s, const char *name);
int bitmaps_clear(struct bitmaps *s, const char *name);
int bitmaps_record(struct bitmaps *s, const char *name, bool records);
/* The end of a history: it must record until now. */
int bitmaps_stop(struct bitmaps *s, const char *name);
/* What is set in @source is set in @target, too. */
int bitmaps_merge(struct bitmaps *s, const char *target, const char *source);

/* Make all of them true; durable when it returns 0. */
int bitmaps_write(struct bitmaps *s);
/*
 * Clusters that bitmaps_write() and image_bitmaps_ready() can need for what has been
 * changed so far, at most, if the image is live now and at rest then.
 */
uint64_t bitmaps_need(const struct bitmaps *s);

/*
 * How many bytes of the disk are dirty.  False: that cannot be told, of what is
 * inconsistent or malformed; *@why says why.
 */
bool bitmaps_count(const struct bitmaps *s, const struct bitmap_item *b,
		   uint64_t *bytes, const char **why);

/* One bitmap, cluster by cluster. */
struct bitmap_reader {
	const struct bitmaps *s;
	const struct bitmap_item *b;
	uint64_t i;			/* whose bits these are */
	uint8_t *bits;
};

/*
 * Refuses, with cause and remedy, what is not there or inconsistent; to be closed in
 * any case.
 */
int bitmap_reader_open(struct bitmap_reader *r, const struct bitmaps *s,
		       const char *name);
/* Is the byte @at of the disk dirty; and up to which one, or one before it, are others? */
int bitmap_reader_run(struct bitmap_reader *r, uint64_t at, bool *dirty,
		      uint64_t *end);
void bitmap_reader_close(struct bitmap_reader *r);

/* What @r, of another image, has set is set in @target, too; in memory. */
int bitmaps_set_from(struct bitmaps *s, const char *target,
		     struct bitmap_reader *r);

/* What a bitmap of a disk of @size bytes has unless it is told: as QEMU does it. */
unsigned int bitmap_granularity_bits(unsigned int cluster_bits);
/* Is that too much for QEMU to store it?  It would be lost. */
bool bitmap_too_large(uint64_t size, unsigned int granularity_bits,
		      unsigned int cluster_bits);

/*
 * The image gets @size bytes; before its header says so, and after that.  Bitmaps
 * whose tables have to be longer are marked in between, so that a crash leaves them
 * known to be invalid; others are valid all the time.
 */
int bitmaps_grow_begin(struct bitmaps *s, struct image *img, uint64_t size);
/*
 * Refuses what these would refuse; *@need: clusters that these two, and
 * image_bitmaps_ready() then, need at most.
 */
int bitmaps_grow_plan(struct image *img, uint64_t size, uint64_t *need);
int bitmaps_grow_end(struct bitmaps *s);

/*
 * Make the bitmaps that record ready for the kernel, which allocates nothing for
 * them: each entry of their tables gets a cluster of its own.  Refuses those that
 * the kernel would refuse, and sets *@n to how many there are.  Durable.
 */
int image_bitmaps_ready(struct image *img, unsigned int *n);

/*
 * For an image that is to be made: after bitmaps_add(), with its geometry.  Clusters
 * of the directory and of all tables, and those of bits that the kernel wants.
 */
uint64_t bitmaps_new_clusters(const struct bitmaps *s, uint64_t *bits);
/*
 * The directory, as it goes to cluster @at with the tables behind it, which are all
 * zeros; *@ext is the header's extension.  NULL: no memory.
 */
void *bitmaps_new_dir(struct bitmaps *s, uint64_t at,
		      struct qcow2_bitmaps_ext *ext);

#endif
