// SPDX-License-Identifier: GPL-2.0-or-later
#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

#include "image/area.h"
#include "image/clusters.h"
#include "image/plan.h"
#include "lib/util.h"

static uint64_t cluster_size(const struct image *img)
{
	return 1ULL << img->geo.cluster_bits;
}

static uint64_t reftable_entries(const struct image *img)
{
	return img->geo.reftable_clusters *
	       blocks_per_reftable_cluster(&img->geo);
}

static int read_meta(const struct image *img, void *buf, size_t len,
		     uint64_t off)
{
	int ret = node_read(&img->node, buf, len, off);

	if (!ret)
		return 0;
	errno = -ret;
	return fail_errno("%s: cannot read its metadata",
			  esc(img->node.path));
}

/*
 * What is in use
 */

struct collect {
	struct image *img;
	struct refs *refs;
	uint32_t index;
	int ret;
};

static int add(struct collect *c, enum ref_kind kind, uint64_t off,
	       uint64_t len)
{
	return refs_add(c->refs, kind, c->index, off, len,
			c->img->geo.cluster_bits) ? 0 : fail_nomem();
}

static int add_bitmap(const struct bitmap *b, void *arg)
{
	uint64_t off = b->head.table_offset, left = b->head.table_size * 8ULL;
	struct collect *c = arg;
	__be64 chunk[512];
	size_t i, n;

	c->ret = add(c, REF_BITMAP_TABLE, off, left);
	for (; !c->ret && left; left -= n, off += n) {
		n = min_u64(left, sizeof(chunk));
		c->ret = read_meta(c->img, chunk, n, off);
		for (i = 0; !c->ret && i < n / 8; i++) {
			uint64_t at = be64_to_cpu(chunk[i]) & QCOW2_OFFSET_MASK;

			if (at)
				c->ret = add(c, REF_BITMAP_DATA, at,
					     cluster_size(c->img));
		}
	}
	c->index++;
	return c->ret;
}

static int add_bitmaps(struct collect *c)
{
	struct image *img = c->img;
	const char *why;
	int ret;

	if (!image_has_bitmaps(img))
		return 0;
	ret = image_load_bitmaps(img, &why);
	if (ret == EX_MEMORY)
		return fail_nomem();
	if (!ret)
		ret = add(c, REF_BITMAP_DIR, img->h.bitmap_dir_offset,
			  img->h.bitmap_dir_size);
	else
		ret = fail(EX_WRONG,
			   "%s: %s; remove the bitmaps: qcow2setup check --repair bitmaps %s",
			   esc(img->node.path), why,
			   shell_quote(img->node.path));
	if (ret)
		return ret;
	bitmaps_parse(img->bitmap_dir, img->h.bitmap_dir_size,
		      img->h.bitmap_count, img->h.cluster_bits, add_bitmap, c,
		      &why);
	return c->ret;
}

int clusters_used(struct image *img, struct refs *refs)
{
	struct collect c = { .img = img, .refs = refs };
	const struct qcow2_geometry *g = &img->geo;
	uint64_t cs = cluster_size(img), off;
	uint32_t i;
	int ret;

	refs_free(refs);
	ret = add(&c, REF_HEADER, 0, cs);
	if (!ret)
		ret = add(&c, REF_L1, g->l1_offset, g->l1_entries * 8ULL);
	if (!ret)
		ret = add(&c, REF_REFTABLE, g->reftable_offset,
			  g->reftable_clusters * cs);
	for (i = 0; !ret && i < g->l1_entries; i++) {
		off = be64_to_cpu(img->l1[i]) & QCOW2_OFFSET_MASK;
		if (off)
			ret = add(&c, REF_L2, off, cs);
	}
	for (i = 0; !ret && i < reftable_entries(img); i++) {
		off = be64_to_cpu(img->reftable[i]) &
		      QCOW2_REFTABLE_OFFSET_MASK;
		if (off)
			ret = add(&c, REF_BLOCK, off, cs);
	}
	if (!ret)
		ret = add_bitmaps(&c);
	refs_sort(refs);
	return ret;
}

/*
 * Take
 */

/* The refcount block @i, if there is one; *@off is 0 if there is none. */
static int read_block(const struct image *img, uint64_t i, uint8_t *block,
		      uint64_t *off)
{
	*off = i < reftable_entries(img) ?
	       be64_to_cpu(img->reftable[i]) & QCOW2_REFTABLE_OFFSET_MASK : 0;
	return *off ? read_meta(img, block, cluster_size(img), *off) : 0;
}

/* The first @n clusters below @end that are free; else *@at is 0. */
static int find_hole(struct image *img, const struct refs *used, uint64_t n,
		     uint64_t end, uint64_t *at)
{
	uint64_t per_block = refcounts_per_block(&img->geo), run = 0, i, c, off;
	uint8_t *block = malloc(cluster_size(img));
	int ret = 0;

	*at = 0;
	if (!block)
		return fail_nomem();
	for (i = 0; i * per_block < end && i < reftable_entries(img); i++) {
		ret = read_block(img, i, block, &off);
		if (ret)
			break;
		if (!off) {
			run = 0;
			continue;
		}
		for (c = 0; run < n && c < per_block &&
		     i * per_block + c < end; c++) {
			if (qcow2_refcount_get(block, c, img->geo.refcount_order) ||
			    refs_at(used, i * per_block + c).n)
				run = 0;
			else
				run++;
		}
		if (run == n) {
			*at = i * per_block + c - n;
			break;
		}
	}
	free(block);
	return ret;
}

/* They have refcount blocks. */
static int count_hole(struct image *img, uint64_t at, uint64_t n)
{
	uint64_t per_block = refcounts_per_block(&img->geo), c = at, off;
	uint8_t *block = malloc(cluster_size(img));
	int ret = 0;

	if (!block)
		return fail_nomem();
	while (!ret && c < at + n) {
		uint64_t i = c / per_block;
		uint64_t to = min_u64(at + n, (i + 1) * per_block);

		ret = read_block(img, i, block, &off);
		if (ret)
			break;
		for (; c < to; c++)
			qcow2_refcount_set(block, c - i * per_block,
					   img->geo.refcount_order, 1);
		ret = image_change(img, block, cluster_size(img), off);
	}
	free(block);
	return ret ? ret : image_sync(img);
}

static int take_behind(struct image *img, uint64_t n, uint64_t *at)
{
	const struct room room = { .size = img->geo.size, .more = n };
	struct area area = { .n = n };
	int ret;

	ret = image_take_room(img, &room, &area.from, &area.reftable_clusters);
	if (!ret && area.reftable_clusters)
		note("%s: refcount table grows from %u to %llu clusters",
		     esc(img->node.path), img->geo.reftable_clusters,
		     (unsigned long long)area.reftable_clusters);
	if (!ret)
		ret = area_lay_out(&area, img);
	if (!ret)
		ret = area_write(&area, img);
	img->taken_end = max_u64(img->taken_end, area.end * cluster_size(img));
	/* Blocks are there before they are named. */
	if (!ret)
		ret = image_sync(img);
	if (!ret)
		ret = area_count(&area, img);
	*at = area.from;
	area_free(&area);
	return ret;
}

int clusters_take(struct image *img, const struct refs *used, uint64_t n,
		  uint64_t *at)
{
	uint64_t end;
	int ret;

	ret = image_end(img, &end);
	if (!ret)
		ret = find_hole(img, used, n,
				min_u64(end, img->node.size) / cluster_size(img),
				at);
	if (ret)
		return ret;
	if (!*at)
		return take_behind(img, n, at);
	img->taken_end = max_u64(img->taken_end,
				 (*at + n) * cluster_size(img));
	return count_hole(img, *at, n);
}

/*
 * Give back
 */

int clusters_later(struct cluster_list *list, uint64_t cluster)
{
	if (list->n == list->room) {
		size_t room = 2 * list->room + 64;
		uint64_t *more = reallocarray(list->cluster, room,
					      sizeof(*more));

		if (!more)
			return fail_nomem();
		list->cluster = more;
		list->room = room;
	}
	list->cluster[list->n++] = cluster;
	return 0;
}

static int by_number(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return x < y ? -1 : x > y;
}

int clusters_put(struct image *img, struct cluster_list *list)
{
	uint64_t per_block = refcounts_per_block(&img->geo);
	unsigned int order = img->geo.refcount_order;
	uint8_t *block = malloc(cluster_size(img));
	size_t k = 0;
	int ret = 0;

	if (!block)
		return fail_nomem();
	if (list->n)
		qsort(list->cluster, list->n, sizeof(*list->cluster), by_number);
	while (!ret && k < list->n) {
		uint64_t i = list->cluster[k] / per_block, off;

		ret = read_block(img, i, block, &off);
		for (; k < list->n && list->cluster[k] / per_block == i; k++) {
			uint64_t at = list->cluster[k] % per_block, v;

			v = off && !ret ?
			    qcow2_refcount_get(block, at, order) : 0;
			if (v)
				qcow2_refcount_set(block, at, order, v - 1);
			img->put_end = max_u64(img->put_end,
					       list->cluster[k] + 1);
		}
		if (off && !ret)
			ret = image_change(img, block, cluster_size(img), off);
	}
	free(block);
	list->n = 0;
	return ret ? ret : image_sync(img);
}

void clusters_free(struct cluster_list *list)
{
	free(list->cluster);
	*list = (struct cluster_list){ .cluster = NULL };
}
