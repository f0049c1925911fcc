// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Give an image a smaller virtual size.  The header is written first: from then on
 * nothing shows what lies behind the new end, and what is still there of it is what
 * images may have in any case.  Then it is forgotten, and only when that is durable
 * its clusters become free: a crash leaves the old image or the new one, and leaked
 * clusters at most.
 *
 * Bitmaps have the size of the image, and cannot change with it in one write.  Those
 * that have to become shorter are marked as in use meanwhile, so that a crash leaves
 * none that is wrong.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "image/clusters.h"
#include "image/image.h"
#include "image/plan.h"
#include "image/shrink.h"
#include "lib/interrupt.h"
#include "lib/util.h"

struct shrinker {
	struct image *img;
	struct qcow2_geometry geo;	/* the new one */
	uint64_t cs;
	struct cluster_list freed;
};

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
 * Bitmaps
 */

static uint64_t bits_of(const struct shrinker *s, const struct bitmap *b)
{
	return qcow2_bitmap_bits(s->geo.size, b->head.granularity_bits);
}

static uint64_t entries_of(const struct shrinker *s, const struct bitmap *b)
{
	return qcow2_bitmap_entries(s->geo.size, b->head.granularity_bits,
				    s->geo.cluster_bits);
}

/* Those that nobody vouches for stay as they are. */
static bool is_changed(const struct shrinker *s, const struct bitmap *b)
{
	return !(b->head.flags & QCOW2_BITMAP_IN_USE) &&
	       entries_of(s, b) <= b->head.table_size;
}

static uint64_t entry_at(const struct shrinker *s, const struct bitmap *b)
{
	return s->img->h.bitmap_dir_offset + b->at + offsetof(struct qcow2_bitmap_head, table_size);
}

/* Size of the table and flags: eight bytes that lie in one sector. */
static int write_entry(struct shrinker *s, const struct bitmap *b,
		       uint32_t size, uint32_t flags)
{
	__be32 entry[2] = { cpu_to_be32(size), cpu_to_be32(flags) };

	return image_change(s->img, entry, sizeof(entry), entry_at(s, b));
}

static int mark_bitmap(const struct bitmap *b, void *arg)
{
	struct shrinker *s = arg;

	if (!is_changed(s, b))
		return 0;
	return write_entry(s, b, b->head.table_size, b->head.flags | QCOW2_BITMAP_IN_USE);
}

/* What is set behind the new end would be counted. */
static int clear_rest(struct shrinker *s, const struct bitmap *b,
		      uint64_t cluster)
{
	uint64_t bits = bits_of(s, b) % (s->cs * 8);
	uint8_t *buf;
	int ret;

	if (!cluster || !bits)
		return 0;
	buf = malloc(s->cs);
	if (!buf)
		return fail_nomem();
	ret = read_meta(s->img, buf, s->cs, cluster);
	if (!ret) {
		if (bits % 8)
			buf[bits / 8] &= (1U << bits % 8) - 1;
		bits = div_up(bits, 8);
		memset(buf + bits, 0, s->cs - bits);
		ret = image_change(s->img, buf, s->cs, cluster);
	}
	free(buf);
	return ret;
}

static int cut_bitmap(const struct bitmap *b, void *arg)
{
	struct shrinker *s = arg;
	uint64_t want = entries_of(s, b), i, at;
	__be64 *table;
	int ret;

	if (!is_changed(s, b))
		return 0;
	table = malloc((size_t)b->head.table_size * 8 + 1);
	if (!table)
		return fail_nomem();
	ret = read_meta(s->img, table, (size_t)b->head.table_size * 8,
			b->head.table_offset);
	for (i = want - 1; !ret && i < b->head.table_size; i++) {
		at = be64_to_cpu(table[i]) & QCOW2_OFFSET_MASK;
		if (i < want)
			ret = clear_rest(s, b, at);
		else if (at)
			ret = clusters_later(&s->freed, at / s->cs);
	}
	for (i = div_up(want * 8, s->cs);
	     !ret && i < div_up((uint64_t)b->head.table_size * 8, s->cs); i++)
		ret = clusters_later(&s->freed, b->head.table_offset / s->cs + i);
	free(table);
	return ret;
}

static int unmark_bitmap(const struct bitmap *b, void *arg)
{
	struct shrinker *s = arg;

	if (!is_changed(s, b))
		return 0;
	return write_entry(s, b, entries_of(s, b), b->head.flags);
}

static int each_bitmap(struct shrinker *s, bitmap_fn *fn)
{
	struct image *img = s->img;
	const char *why;
	int ret;

	if (!image_has_bitmaps(img))
		return 0;
	ret = bitmaps_parse(img->bitmap_dir, img->h.bitmap_dir_size,
			    img->h.bitmap_count, img->h.cluster_bits, fn, s,
			    &why);
	/* It has been parsed before. */
	if (ret < 0)
		return fail(EX_WRONG, "%s: %s; remove the bitmaps with qemu-img",
			    esc(img->node.path), why);
	return ret ? ret : image_sync(img);
}

static int load_bitmaps(struct shrinker *s)
{
	const char *why;

	if (image_has_bitmaps(s->img) && image_load_bitmaps(s->img, &why))
		return fail(EX_WRONG, "%s: %s; remove the bitmaps with qemu-img",
			    esc(s->img->node.path), why);
	return 0;
}

/*
 * Tables
 */

/* Entries of the last table, whose clusters lie behind the new end. */
static int cut_last_table(struct shrinker *s)
{
	unsigned int cover = qcow2_l2_cover_bits(&s->geo);
	unsigned int words = s->geo.ext_l2 ? 2 : 1;
	uint64_t last = (s->geo.size - 1) >> cover, entry, from;
	struct image *img = s->img;
	uint8_t *table, *was;
	int ret;

	entry = last < img->geo.l1_entries ? be64_to_cpu(img->l1[last]) : 0;
	from = (div_up(s->geo.size, s->cs) * s->cs - (last << cover)) /
	       s->cs * 8 * words;
	if (!(entry & QCOW2_OFFSET_MASK) || from >= s->cs)
		return 0;
	table = malloc(s->cs);
	was = malloc(s->cs);
	ret = table && was ? read_meta(img, was, s->cs,
				       entry & QCOW2_OFFSET_MASK) :
			     fail_nomem();
	if (!ret) {
		memcpy(table, was, s->cs);
		memset(table + from, 0, s->cs - from);
		if (memcmp(table, was, s->cs))
			ret = image_change(img, table, s->cs,
					   entry & QCOW2_OFFSET_MASK);
	}
	free(table);
	free(was);
	return ret;
}

/* The table that stays in part is changed, which must be one of this L1 table only. */
static int check_last_table(const struct shrinker *s)
{
	uint64_t last = (s->geo.size - 1) >> qcow2_l2_cover_bits(&s->geo);
	uint64_t entry = be64_to_cpu(s->img->l1[last]);

	if (!(entry & QCOW2_OFFSET_MASK) || entry & QCOW2_OFLAG_COPIED)
		return 0;
	return fail(EX_WRONG,
		    "%s: L2 table %llu is shared; repair the image with qcow2setup check --repair all",
		    esc(s->img->node.path), (unsigned long long)last);
}

/* The L1 table keeps its length, as with qemu-img. */
static int cut_l1(struct shrinker *s)
{
	struct image *img = s->img;
	uint64_t from = qcow2_l1_entries_needed(&s->geo), i;
	uint64_t end = from;
	int ret = 0;

	for (i = from; !ret && i < img->geo.l1_entries; i++) {
		uint64_t off = be64_to_cpu(img->l1[i]) & QCOW2_OFFSET_MASK;

		if (!img->l1[i])
			continue;
		if (off)
			ret = clusters_later(&s->freed, off / s->cs);
		img->l1[i] = 0;
		end = i + 1;
	}
	if (ret || end == from)
		return ret;
	return image_change(img, img->l1 + from, (end - from) * 8,
			    img->geo.l1_offset + from * 8);
}

/*
 * Refcount blocks
 */

/* Does it count nothing, or itself alone? */
static bool counts_nothing(const struct image *img, const uint8_t *block,
			   uint64_t i, uint64_t off, bool *self)
{
	uint64_t per_block = refcounts_per_block(&img->geo), k;
	uint64_t own = off >> img->geo.cluster_bits;

	*self = own / per_block == i;
	for (k = 0; k < per_block; k++) {
		uint64_t v = qcow2_refcount_get(block, k,
						img->geo.refcount_order);

		if (v && !(*self && k == own % per_block && v == 1))
			return false;
	}
	return true;
}

/* One round of it: a block that counted others may be free then. */
static int free_blocks(struct shrinker *s, bool *more)
{
	struct image *img = s->img;
	uint64_t n = img->geo.reftable_clusters *
		     blocks_per_reftable_cluster(&img->geo), i, off;
	uint8_t *block = malloc(s->cs);
	__be64 *table = malloc(n * 8);
	int ret = 0;
	bool self;

	*more = false;
	if (!block || !table)
		ret = fail_nomem();
	else
		memcpy(table, img->reftable, n * 8);
	/* The first one counts the header. */
	for (i = 1; !ret && i < n; i++) {
		off = be64_to_cpu(img->reftable[i]) &
		      QCOW2_REFTABLE_OFFSET_MASK;
		if (!off)
			continue;
		ret = read_meta(img, block, s->cs, off);
		if (ret || !counts_nothing(img, block, i, off, &self))
			continue;
		table[i] = 0;
		*more = true;
		if (!self)
			ret = clusters_later(&s->freed, off / s->cs);
	}
	if (!ret && *more)
		ret = image_name_refblocks(img, 0, n, table);
	if (!ret)
		ret = clusters_put(img, &s->freed);
	free(block);
	free(table);
	return ret;
}

static int set_size(struct shrinker *s)
{
	struct image *img = s->img;
	int ret;

	img->h.raw.size = cpu_to_be64(s->geo.size);
	ret = image_change_header(img);
	if (ret)
		return ret;
	img->h.size = s->geo.size;
	img->geo = s->geo;
	return 0;
}

int image_shrink(struct image *img, uint64_t size)
{
	struct shrinker s = {
		.img = img, .geo = img->geo, .cs = 1ULL << img->geo.cluster_bits,
	};
	bool more = true;
	int ret;

	s.geo.size = size;
	ret = check_last_table(&s);
	if (!ret)
		ret = load_bitmaps(&s);
	if (!ret)
		ret = image_clear_autoclear(img);
	if (!ret)
		ret = each_bitmap(&s, mark_bitmap);
	if (!ret && interrupted())
		ret = EX_WRONG;
	if (!ret)
		ret = set_size(&s);
	if (!ret)
		ret = cut_last_table(&s);
	if (!ret)
		ret = cut_l1(&s);
	if (!ret)
		ret = each_bitmap(&s, cut_bitmap);
	if (!ret)
		ret = image_sync(img);
	if (!ret)
		ret = each_bitmap(&s, unmark_bitmap);
	if (!ret)
		ret = clusters_put(img, &s.freed);
	while (!ret && more)
		ret = free_blocks(&s, &more);
	clusters_free(&s.freed);
	return ret;
}
