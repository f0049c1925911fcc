/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * New metadata in clusters that nothing refers to yet: from one cluster on, what
 * the caller needs, then a new refcount table if there must be one, then the
 * refcount blocks that count all that.
 *
 * The kernel may go on with the image until area_count(): what area_write() writes
 * is in the area only.  The refcount block of the area's first clusters can be one
 * that the kernel writes, or makes, meanwhile; so can entries of the refcount
 * table.  They are looked at again.
 */
#ifndef QCOW2SETUP_AREA_H
#define QCOW2SETUP_AREA_H

#include "image/image.h"

struct area {
	uint64_t from, n;		/* the caller's clusters */
	uint64_t reftable_clusters;	/* 0: the refcount table stays */
	uint64_t end;			/* behind the last cluster */
	uint64_t first, last;		/* refcount blocks that count it */
	__be64 *table;			/* the refcount table that is to be */
	uint64_t entries;
};

/* Find a place for everything; @from, @n and @reftable_clusters are set. */
int area_lay_out(struct area *a, const struct image *img);
/* Not durable when it returns; can be written at any time. */
int area_write(const struct area *a, struct image *img);
/*
 * Count it, with tables that have just been loaded and when nobody else writes: all
 * of it is in use then, and leaked if nothing comes to refer to it.  Durable.
 */
int area_count(struct area *a, struct image *img);
void area_free(struct area *a);

#endif
