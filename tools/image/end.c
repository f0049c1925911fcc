// SPDX-License-Identifier: GPL-2.0-or-later
/* Where all that is in use ends, and what is behind that is cut off. */
#include <stdlib.h>
#include <unistd.h>

#include "image/plan.h"
#include "image/tables.h"
#include "lib/util.h"

/* For bitmap_end(): where the last cluster ends that a bitmap uses. */
struct bitmap_end {
	const struct image *img;
	uint64_t end, bytes, bitmaps;
	int err;
	bool beyond;		/* it would lie behind the end of the file */
};

/* So many bitmaps are not asked what they are good for. */
#define USUAL_BITMAPS	64

/* What a bitmap takes if all of it is in use. */
static uint64_t bitmap_bytes(const struct image *img, const struct bitmap *b)
{
	uint64_t cs = cluster_size(img);
	uint64_t data = qcow2_bitmap_entries(img->h.size,
					     b->head.granularity_bits,
					     img->h.cluster_bits);

	return (data + div_up(data * 8, cs)) * cs;
}

static int bitmap_end(const struct bitmap *b, void *arg)
{
	struct bitmap_end *e = arg;
	uint64_t off = b->head.table_offset, left = (uint64_t)b->head.table_size * 8;
	__be64 chunk[512];
	size_t i, n;

	e->end = max_u64(e->end, off + left);
	if (e->bitmaps++ < USUAL_BITMAPS)
		e->bytes += bitmap_bytes(e->img, b);
	for (; left; left -= n, off += n) {
		n = min_u64(left, sizeof(chunk));
		e->err = node_read(&e->img->node, chunk, n, off);
		if (e->err)
			return 1;
		for (i = 0; i < n / 8; i++) {
			uint64_t at = be64_to_cpu(chunk[i]) & QCOW2_OFFSET_MASK;

			if (at >= e->img->node.size) {
				e->beyond = true;
				return 1;
			}
			if (at)
				e->end = max_u64(e->end,
						 at + cluster_size(e->img));
		}
	}
	return 0;
}

static int referenced_by_bitmaps(struct image *img, uint64_t *end)
{
	struct bitmap_end b = { .img = img };
	const char *why;
	int ret;

	ret = image_load_bitmaps(img, &why);
	if (!ret)
		bitmaps_parse(img->bitmap_dir, img->h.bitmap_dir_size,
			      img->h.bitmap_count, img->h.cluster_bits,
			      bitmap_end, &b, &why);
	if (b.beyond) {
		why = "bitmap refers to clusters beyond the end of the metadata";
		ret = EX_WRONG;
	}
	if (b.err)
		return image_read_failed(img, b.err);
	if (ret == EX_MEMORY)
		return fail_nomem();
	/* Bitmaps that the header does not vouch for may be anything. */
	if (ret && !image_has_bitmaps(img))
		return 0;
	if (ret)
		return fail(ret,
			    OR_READONLY("%s: %s; remove the bitmaps: qcow2setup check --repair bitmaps %s"),
			    esc(img->node.path), why,
			    shell_quote(img->node.path));
	*end = max_u64(*end, img->h.bitmap_dir_offset + img->h.bitmap_dir_size);
	*end = max_u64(*end, b.end);
	img->bitmap_bytes = b.bytes;
	return 0;
}

/* End of everything that something in the image refers to. */
static int referenced_end(struct image *img, uint64_t *end)
{
	const struct qcow2_geometry *g = &img->geo;
	uint64_t cs = cluster_size(img), max = cs;
	uint32_t i;
	int ret;

	img->bitmap_bytes = 0;
	max = max_u64(max, g->l1_offset + (uint64_t)g->l1_entries * 8);
	max = max_u64(max, g->reftable_offset +
			   ((uint64_t)g->reftable_clusters << g->cluster_bits));
	for (i = 0; i < g->l1_entries; i++) {
		uint64_t off = be64_to_cpu(img->l1[i]) & QCOW2_OFFSET_MASK;

		if (off)
			max = max_u64(max, off + cs);
	}
	for (i = 0; i < image_reftable_entries(img); i++) {
		uint64_t off = be64_to_cpu(img->reftable[i]) &
			       QCOW2_OFFSET_MASK;

		if (off)
			max = max_u64(max, off + cs);
	}
	if (img->h.has_bitmaps) {
		ret = referenced_by_bitmaps(img, &max);
		if (ret)
			return ret;
	}
	*end = max;
	return 0;
}

/* Last entry that is not 0 in the first @n of @block, plus one; 0: none. */
static uint64_t refcounts_used(const uint8_t *block, uint64_t n,
			       unsigned int order)
{
	while (n) {
		/* whole zero bytes at once where entries are that small */
		if (order < 3 && !(n & ((8U >> order) - 1)) &&
		    !block[((n << order) >> 3) - 1]) {
			n -= 8U >> order;
			continue;
		}
		if (qcow2_refcount_get(block, n - 1, order))
			break;
		n--;
	}
	return n;
}

/* First cluster from which on all refcounts below cluster @limit are 0. */
static int counted_end(const struct image *img, uint64_t limit, uint64_t *end)
{
	uint64_t per_block = refcounts_per_block(&img->geo);
	uint64_t i = min_u64(div_up(limit, per_block), image_reftable_entries(img));
	uint8_t *block = malloc(cluster_size(img));
	int ret = 0;

	*end = 0;
	if (!block)
		return fail_nomem();
	while (i--) {
		uint64_t off, n;

		ret = image_read_refblock(img, img->reftable, i, block, &off);
		if (ret)
			break;
		if (!off)
			continue;
		n = refcounts_used(block, min_u64(per_block,
						  limit - i * per_block),
				   img->geo.refcount_order);
		if (n) {
			*end = i * per_block + n;
			break;
		}
	}
	free(block);
	return ret;
}

int image_end(struct image *img, uint64_t *end)
{
	uint64_t cs = cluster_size(img), counted;
	int ret;

	ret = referenced_end(img, end);
	if (ret)
		return ret;
	/* Refcounts behind the end of the file count nothing that is there. */
	ret = counted_end(img, div_up(img->node.size, cs), &counted);
	if (ret)
		return ret;
	*end = max_u64(align_up(*end, cs), counted * cs);
	return 0;
}

int image_trim(struct image *img, uint64_t *cut)
{
	struct reasons reasons;
	uint64_t end = 0;
	int ret;

	*cut = 0;
	if (img->node.bdev)
		return 0;
	image_reasons(img, false, &reasons);
	if (reasons.n) {
		note("%s: not trimmed: %s", esc(img->node.path),
		     reasons.r[0].cause);
		return 0;
	}
	ret = image_load_tables(img, true);
	if (!ret)
		ret = image_end(img, &end);
	if (ret || end >= img->node.size)
		return ret;
	if (ftruncate(img->node.fd, end) || fsync(img->node.fd))
		return fail_errno("%s: cannot cut off its unused end",
				  esc(img->node.path));
	*cut = img->node.size - end;
	img->node.size = end;
	return 0;
}
