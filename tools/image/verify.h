/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Is the metadata of an image as it must be?  Looks at everything and changes
 * nothing; what is wrong is told on stderr, a line each, and counted.
 *
 * What is counted, and as what, is what qemu-img check counts.  On top of that
 * come faults that it does not know: data at another place than that of the
 * guest's, tables that the end of the file cuts off, clusters that are used
 * twice although their refcount allows it, and more reserved bits.
 */
#ifndef QCOW2SETUP_VERIFY_H
#define QCOW2SETUP_VERIFY_H

#include <stdbool.h>
#include <stdint.h>

#include "image/image.h"
#include "image/refcounts.h"

/* Neighbouring clusters with the same refcount, wrong for the same reason. */
struct refcount_run {
	uint64_t first, n, stored, expected;
};

/*
 * What was said, by hashes: a repair is followed by another look, which finds again what
 * could not be repaired.
 */
struct verify_told {
	uint64_t hash[1024];
	size_t n;
};

struct verify {
	struct image *img;
	struct verify_told *told;	/* NULL: what is found is said each time */
	/* findings */
	uint64_t corruptions, leaks;
	uint64_t errors;		/* could not be read */
	uint64_t total_clusters, allocated_clusters, image_end;
	/* what a repair needs to know */
	bool stopped;			/* too broken to look further */
	bool uncertain;			/* more may be in use than is known */
	bool rebuild;			/* refcounts have no good place */
	bool cut;			/* the file ends within a table */
	struct refs refs;
	uint64_t clusters;		/* of the metadata; the last may be cut */
	uint64_t reftable_entries;
	/* kept here */
	uint64_t shown;
	struct refcount_run run;
};

/*
 * Returns an exit code, after a message, if there is nothing that can be
 * checked, or no memory; else 0, whatever was found.  Can be called again.
 */
int verify_image(struct verify *v, struct image *img);
void verify_free(struct verify *v);

/* A refcount block that can be read and is nothing else, and its place. */
bool verify_block(const struct verify *v, uint64_t index, uint64_t *off);
/* Nothing else is in this cluster. */
bool verify_once(const struct verify *v, uint64_t off);
/* The same, and the file has all of it, so that it can be written as a whole. */
bool verify_alone(const struct verify *v, uint64_t off);
/* L1 entry @index names a table that can be looked at. */
bool verify_l2(const struct verify *v, uint32_t index, uint64_t *off);

/*
 * Are bits set in the last cluster of a bitmap that the disk does not reach up to?
 * Then @buf has that cluster without them, and *@off is where it is.
 */
bool verify_bitmap_rest(struct verify *v, const struct bitmap *b, uint8_t *buf,
			uint64_t *off);

/* One refcount; @block is NULL if there is none that counts it. */
struct counted {
	uint64_t cluster, stored;
	struct ref_group group;
	uint8_t *block;
	uint64_t block_off, i;		/* entry in the block */
};

typedef void counted_fn(struct verify *v, const struct counted *c, void *arg);

/*
 * Call @fn for each cluster that has a refcount or is in use.  @write: blocks
 * that @fn has changed are written, unless something else is in them, too.
 * Returns 0 or -errno.
 */
int verify_refcounts(struct verify *v, bool write, counted_fn *fn, void *arg);

/* Read metadata; behind the end of the file it reads as zeros.  0 or -errno. */
int verify_read(const struct verify *v, void *buf, size_t len, uint64_t off);

#endif
