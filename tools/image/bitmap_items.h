/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What the files of bitmaps.h share, and nobody else needs.  Calls go down this list:
 *
 *	bitmap_grow.c	the image gets larger
 *	bitmap_ready.c	what records is made ready for the kernel
 *	bitmap_write.c	changes become true on disk
 *	bitmap_edit.c	changes in memory
 *	bitmap_load.c	what is there: load, find, read
 *
 * Functions that return an int print why they failed, and return an exit code.
 */
#ifndef QCOW2SETUP_BITMAP_ITEMS_H
#define QCOW2SETUP_BITMAP_ITEMS_H

#include "image/bitmaps.h"
#include "lib/util.h"

static inline uint64_t cluster_size(const struct bitmaps *s)
{
	return 1ULL << s->img->geo.cluster_bits;
}

static inline const char *image_name(const struct bitmaps *s)
{
	return esc(s->img->node.path);
}

static inline const char *name_of(const struct bitmap_item *b)
{
	return escn(b->name, b->head.name_size);
}

static inline uint64_t bits_per_cluster(const struct bitmaps *s)
{
	return cluster_size(s) * 8;
}

/* What entry @i is to have, if it is to be written. */
static inline uint8_t *new_bits(const struct bitmap_item *b, uint64_t i)
{
	return b->bits ? b->bits[i] : NULL;
}

static inline uint64_t table_clusters(const struct bitmaps *s,
				      const struct bitmap_item *b)
{
	return div_up(b->head.table_size * 8ULL, cluster_size(s));
}

/*
 * bitmap_load.c
 */

/* The directory, or what it refers to, cannot be: @why. */
int bitmaps_malformed(const struct bitmaps *s, const char *why);

/* An item with room for its name, extra data and table. */
struct bitmap_item *bitmap_item_new(struct bitmaps *s,
				    const struct qcow2_bitmap *head);
/* What an item has; not the item. */
void bitmap_item_free(struct bitmap_item *b);

/* What to say of one that bitmaps_find() does not find */
int bitmaps_not_there(const struct bitmaps *s, const char *name);

/* Why nothing but its removal is possible; NULL: all is. */
const char *bitmap_why_unusable(const struct bitmaps *s,
				const struct bitmap_item *b);
/* Say that, with the remedy. */
int bitmap_cannot_use(const struct bitmaps *s, const struct bitmap_item *b,
		      const char *why);
/* Find one that can be used. */
int bitmaps_get(const struct bitmaps *s, const char *name,
		struct bitmap_item **b);

/* Bits of the cluster of entry @i that a disk of @size bytes has. */
uint64_t bitmap_bits_in(const struct bitmaps *s, const struct bitmap_item *b,
			uint64_t i, uint64_t size);
/* It gets @bits, which are taken over, in any case. */
int bitmap_set_bits(struct bitmap_item *b, uint64_t i, uint8_t *bits);
/* Sets *@off to the cluster of entry @i in bytes; 0: it has none. */
enum qcow2_fault bitmap_entry_at(const struct bitmaps *s,
				 const struct bitmap_item *b, uint64_t i,
				 uint64_t *off);
/* What the cluster of entry @i has, if it is not to be written. */
int bitmap_read_bits(const struct bitmaps *s, const struct bitmap_item *b,
		     uint64_t i, uint8_t *bits);

/*
 * bitmap_edit.c
 */

/* Its table is to be written: that is in another place, so that the old one is free. */
int bitmap_make_fresh(struct bitmaps *s, struct bitmap_item *b);
/* The cluster of entry @i is not used any more. */
int bitmap_drop_bits(struct bitmaps *s, struct bitmap_item *b, uint64_t i);

/*
 * bitmap_write.c
 */

/* Of the directory, in bytes */
uint64_t bitmaps_dir_size(const struct bitmap_item *item, size_t n);
/* A cluster that is something else, too, must neither be written nor given back. */
int bitmaps_check_clusters(const struct bitmaps *s, const struct refs *used);
/* Where it is in the directory on disk; not durable. */
int bitmap_write_flags(struct bitmaps *s, struct bitmap_item *b);

#endif
