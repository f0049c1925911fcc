// SPDX-License-Identifier: GPL-2.0-or-later
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "image/area.h"
#include "image/plan.h"
#include "lib/util.h"

#define SECTOR	512

static uint64_t cluster_size(const struct image *img)
{
	return 1ULL << img->geo.cluster_bits;
}

static uint64_t old_entries(const struct image *img)
{
	return img->geo.reftable_clusters *
	       blocks_per_reftable_cluster(&img->geo);
}

static int write_area(const struct image *img, const void *buf, size_t len,
		      uint64_t off)
{
	int ret = write_at(img->node.fd, buf, len, off);

	if (!ret)
		return 0;
	errno = -ret;
	return fail_errno("%s: cannot write it", esc(img->node.path));
}

/* Is this block a new one, in the area? */
static bool is_new(const struct area *a, const struct image *img, uint64_t i)
{
	uint64_t cluster = be64_to_cpu(a->table[i]) / cluster_size(img);

	return cluster >= a->from && cluster < a->end;
}

int area_lay_out(struct area *a, const struct image *img)
{
	uint64_t per_block = refcounts_per_block(&img->geo);
	uint64_t cs = cluster_size(img), have = old_entries(img), last, i;
	uint64_t next = a->from + a->n + a->reftable_clusters;

	a->entries = a->reftable_clusters ? a->reftable_clusters *
		     blocks_per_reftable_cluster(&img->geo) : have;
	a->first = a->from / per_block;
	/* The blocks for it may need more blocks. */
	a->end = next;
	do {
		last = a->end;
		a->end = next;
		for (i = a->first; i <= (last - 1) / per_block; i++)
			if (i >= have || !img->reftable[i])
				a->end++;
	} while (a->end != last);
	a->last = (a->end - 1) / per_block;
	if (a->last >= a->entries || a->end > img->node.size / cs)
		return fail(EX_WRONG,
			    "%s: no room for %llu more clusters of metadata; enlarge the device",
			    esc(img->node.path), (unsigned long long)a->n);
	a->table = calloc(a->entries, sizeof(*a->table));
	if (!a->table)
		return fail_nomem();
	memcpy(a->table, img->reftable,
	       min_u64(have, a->entries) * sizeof(*a->table));
	for (i = a->first; i <= a->last; i++)
		if (!a->table[i])
			a->table[i] = cpu_to_be64(next++ * cs);
	return 0;
}

/* All refcounts of the area that block @i has, among what it has already. */
static void count_in(const struct area *a, const struct image *img,
		     uint64_t i, uint8_t *block)
{
	uint64_t per_block = refcounts_per_block(&img->geo);
	uint64_t c = max_u64(a->from, i * per_block);
	uint64_t end = min_u64(a->end, (i + 1) * per_block);

	for (; c < end; c++)
		qcow2_refcount_set(block, c - i * per_block,
				   img->geo.refcount_order, 1);
}

int area_write(const struct area *a, struct image *img)
{
	uint64_t cs = cluster_size(img), i;
	uint8_t *block = malloc(cs);
	int ret = 0;

	if (!block)
		return fail_nomem();
	for (i = a->first; !ret && i <= a->last; i++) {
		if (!is_new(a, img, i))
			continue;
		memset(block, 0, cs);
		count_in(a, img, i, block);
		ret = write_area(img, block, cs, be64_to_cpu(a->table[i]));
	}
	free(block);
	if (!ret && a->reftable_clusters)
		ret = write_area(img, a->table, a->reftable_clusters * cs,
				 (a->from + a->n) * cs);
	return ret;
}

/* Blocks that were there before count a part of it, too. */
static int count_in_old_blocks(const struct area *a, struct image *img)
{
	uint64_t cs = cluster_size(img), i, off;
	uint8_t *block = malloc(cs);
	int ret = 0;

	if (!block)
		return fail_nomem();
	for (i = a->first; !ret && i <= a->last; i++) {
		if (is_new(a, img, i))
			continue;
		off = be64_to_cpu(a->table[i]) & QCOW2_REFTABLE_OFFSET_MASK;
		ret = node_read(&img->node, block, cs, off);
		if (ret) {
			errno = -ret;
			ret = fail_errno("%s: cannot read its metadata",
					 esc(img->node.path));
			break;
		}
		count_in(a, img, i, block);
		ret = image_change(img, block, cs, off);
	}
	free(block);
	return ret ? ret : image_sync(img);
}

/*
 * Take over what has been written into the old refcount table since, also into its
 * copy.  *@unused is set to a block that is not needed any more.
 */
static int take_over(struct area *a, struct image *img, uint64_t *unused)
{
	const uint64_t per_sector = SECTOR / 8;
	uint64_t have = min_u64(old_entries(img), a->entries), i, k;
	int ret = 0;

	*unused = 0;
	for (i = 0; !ret && i < have; i += per_sector) {
		uint64_t n = min_u64(per_sector, have - i);
		bool changed = false;

		for (k = i; k < i + n; k++) {
			if (a->table[k] == img->reftable[k] ||
			    !img->reftable[k])
				continue;
			if (is_new(a, img, k))
				*unused = be64_to_cpu(a->table[k]) /
					  cluster_size(img);
			a->table[k] = img->reftable[k];
			changed = true;
		}
		if (changed && a->reftable_clusters)
			ret = write_area(img, a->table + i, n * 8,
					 (a->from + a->n) * cluster_size(img) +
					 i * 8);
	}
	return ret;
}

/* Let the header name the new table. */
static int switch_table(struct area *a, struct image *img)
{
	struct qcow2_geometry *g = &img->geo;
	uint64_t cs = cluster_size(img), old_at = g->reftable_offset / cs;
	uint64_t old = g->reftable_clusters, at = a->from + a->n;
	__be64 *table;
	int ret;

	table = malloc(a->entries * sizeof(*table));
	if (!table)
		return fail_nomem();
	memcpy(table, a->table, a->entries * sizeof(*table));
	img->h.raw.refcount_table_offset = cpu_to_be64(at * cs);
	img->h.raw.refcount_table_clusters = cpu_to_be32(a->reftable_clusters);
	ret = image_change_header(img);
	if (ret) {
		free(table);
		return ret;
	}
	free(img->reftable);
	img->reftable = table;
	g->reftable_offset = at * cs;
	g->reftable_clusters = a->reftable_clusters;
	return image_put_clusters(img, old_at, old);
}

int area_count(struct area *a, struct image *img)
{
	uint64_t unused;
	int ret;

	ret = take_over(a, img, &unused);
	/* Counted before anything names it. */
	if (!ret)
		ret = count_in_old_blocks(a, img);
	if (ret)
		return ret;
	if (a->reftable_clusters)
		ret = switch_table(a, img);
	else
		ret = image_name_refblocks(img, a->first, a->last + 1,
					   a->table + a->first);
	if (!ret && unused)
		ret = image_put_clusters(img, unused, 1);
	return ret;
}

void area_free(struct area *a)
{
	free(a->table);
	a->table = NULL;
}
