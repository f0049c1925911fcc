/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Clusters of the metadata that are taken, and given back, while the image is at
 * rest.  All after image_load_tables(); image_undo() undoes it.
 */
#ifndef QCOW2SETUP_CLUSTERS_H
#define QCOW2SETUP_CLUSTERS_H

#include "image/image.h"
#include "image/refcounts.h"

/*
 * All that something refers to, sorted; to be freed with refs_free().  Bitmaps that
 * the header does not vouch for refer to nothing.
 */
int clusters_used(struct image *img, struct refs *refs);
/*
 * Take @n clusters, one behind the other: from those that are free, and that nothing
 * refers to, or behind all that is in use.  Sets *@at to the first of them.  Their
 * refcounts are durable when this returns 0, and what they contain is anything.
 *
 * Others that were given back before can be among them: what is written to them must
 * be written with image_change().
 */
int clusters_take(struct image *img, const struct refs *used, uint64_t n,
		  uint64_t *at);

/* Clusters that are to be given back. */
struct cluster_list {
	uint64_t *cluster;
	size_t n, room;
};

int clusters_later(struct cluster_list *list, uint64_t cluster);
/* Take one from the refcount of each, block by block; durable.  Empties the list. */
int clusters_put(struct image *img, struct cluster_list *list);
void clusters_free(struct cluster_list *list);

#endif
