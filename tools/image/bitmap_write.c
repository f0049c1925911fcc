// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * What has changed in memory becomes true on disk; bitmaps.h says how a crash leaves it.
 */
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "image/bitmap_items.h"
#include "image/extensions.h"
#include "lib/interrupt.h"
#include "lib/util.h"

#define SECTOR		512

/*
 * The bitmaps extension
 */

/*
 * Write what differs in the first cluster, in one piece; durable.  It is looked at
 * first, as everybody will do.
 */
static int write_first(struct image *img, const uint8_t *first)
{
	size_t cs = 1UL << img->geo.cluster_bits, from = 0, to = cs;
	struct header h;
	int ret;

	while (from < cs && first[from] == img->first[from])
		from++;
	if (from == cs)
		return 0;
	while (first[to - 1] == img->first[to - 1])
		to--;
	if (header_parse(first, cs, &h) != HEADER_OK)
		return fail(EX_WRONG,
			    "%s: cannot change its header extensions; make another image: " QEMU_CONVERT,
			    esc(img->node.path), shell_quote(img->node.path));
	ret = image_change(img, first + from, to - from, from);
	if (!ret)
		ret = image_sync(img);
	if (ret)
		return ret;
	memcpy(img->first, first, cs);
	header_parse(img->first, cs, &img->h);
	return 0;
}

static int no_room(const struct image *img)
{
	return fail(EX_WRONG,
		    "%s: the header has no room for what says where bitmaps are; use shorter names of files, or make an image with larger clusters: " QEMU_CONVERT,
		    esc(img->node.path), shell_quote(img->node.path));
}

/* @try: only see whether there is room */
static int put_extension(struct image *img, const struct qcow2_bitmaps_ext *ext,
			 bool try)
{
	size_t cs = 1UL << img->geo.cluster_bits;
	uint8_t *first = malloc(cs);
	enum extension_step step;
	int ret = 0;

	if (!first)
		return fail_nomem();
	memcpy(first, img->first, cs);
	do {
		step = extension_put(first, cs, ext);
		if (step == EXTENSION_NO_ROOM)
			ret = no_room(img);
		else if (!try && (cs > SECTOR || step == EXTENSION_DONE))
			ret = write_first(img, first);
	} while (!ret && step == EXTENSION_MORE);
	free(first);
	return ret;
}

static int drop_extension(struct image *img)
{
	size_t cs = 1UL << img->geo.cluster_bits;
	uint8_t *first = malloc(cs);
	int ret;

	if (!first)
		return fail_nomem();
	memcpy(first, img->first, cs);
	extension_drop(first, cs);
	ret = write_first(img, first);
	free(first);
	return ret;
}

static int set_autoclear(struct image *img, bool bitmaps)
{
	if (bitmaps)
		img->h.autoclear |= QCOW2_AUTOCLEAR_BITMAPS;
	else
		img->h.autoclear &= ~QCOW2_AUTOCLEAR_BITMAPS;
	img->h.raw.autoclear_features = cpu_to_be64(img->h.autoclear);
	return image_change_header(img);
}

/* The first bitmap: vouched for when it is there.  The last one: the reverse. */
static int switch_over(struct image *img, const struct qcow2_bitmaps_ext *ext)
{
	bool had = image_has_bitmaps(img);
	int ret = 0;

	if (ext->nb_bitmaps) {
		ret = put_extension(img, ext, false);
		return ret || had ? ret : set_autoclear(img, true);
	}
	if (had)
		ret = set_autoclear(img, false);
	return ret ? ret : drop_extension(img);
}

/*
 * Write
 */

uint64_t bitmaps_dir_size(const struct bitmap_item *item, size_t n)
{
	uint64_t size = 0;

	while (n--)
		size += qcow2_bitmap_bytes(&item++->head);
	return size;
}

static void bitmaps_dir_fill(const struct bitmap_item *item, size_t n,
			     uint8_t *dir)
{
	for (; n--; item++) {
		const struct qcow2_bitmap *b = &item->head;
		struct qcow2_bitmap_head head = {
			.table_offset = cpu_to_be64(b->table_offset),
			.table_size = cpu_to_be32(b->table_size),
			.flags = cpu_to_be32(b->flags),
			.type = b->type,
			.granularity_bits = b->granularity_bits,
			.name_size = cpu_to_be16(b->name_size),
			.extra_size = cpu_to_be32(b->extra_size),
		};
		size_t len = qcow2_bitmap_bytes(b);

		memset(dir, 0, len);
		memcpy(dir, &head, sizeof(head));
		memcpy(dir + sizeof(head), item->extra, b->extra_size);
		memcpy(dir + sizeof(head) + b->extra_size, item->name,
		       b->name_size);
		dir += len;
	}
}

int bitmaps_check_clusters(const struct bitmaps *s, const struct refs *used)
{
	struct ref_group group;
	size_t i = 0;

	while (refs_next(used, &i, &group)) {
		const struct ref *last = &group.ref[group.n - 1];

		if (group.n > 1 && (last->kind == REF_BITMAP_DIR ||
				    last->kind == REF_BITMAP_TABLE ||
				    last->kind == REF_BITMAP_DATA))
			return bitmaps_malformed(s, "a cluster of a bitmap is used twice");
	}
	return 0;
}

/* Clusters that are to be written, but for the directory. */
static uint64_t count_new(const struct bitmaps *s)
{
	const struct bitmap_item *b;
	uint64_t n = 0;
	uint32_t i;

	for (b = s->item; b < s->item + s->n; b++) {
		if (!b->fresh)
			continue;
		n += table_clusters(s, b);
		for (i = 0; i < b->head.table_size; i++)
			n += !!new_bits(b, i);
	}
	return n;
}

/* Write @len bytes, and zeros up to the end of their last cluster. */
static int write_clusters(struct bitmaps *s, const void *buf, uint64_t len,
			  uint64_t at)
{
	uint64_t full = align_up(len, cluster_size(s));
	uint8_t *padded = calloc(1, full);
	int ret;

	if (!padded)
		return fail_nomem();
	memcpy(padded, buf, len);
	ret = image_change(s->img, padded, full, at);
	free(padded);
	return ret;
}

/* From *@at on: clusters of bits, and the table that names them. */
static int write_item(struct bitmaps *s, struct bitmap_item *b, uint64_t *at)
{
	uint64_t table = *at, cs = cluster_size(s);
	uint32_t i;
	int ret = 0;

	*at += table_clusters(s, b) * cs;
	for (i = 0; !ret && i < b->head.table_size; i++) {
		if (!new_bits(b, i))
			continue;
		ret = image_change(s->img, b->bits[i], cs, *at);
		b->table[i] = cpu_to_be64(*at);
		*at += cs;
		free(b->bits[i]);
		b->bits[i] = NULL;
		if (!ret && interrupted())
			ret = EX_WRONG;
	}
	b->head.table_offset = table;
	b->fresh = false;
	return ret ? ret : write_clusters(s, b->table, b->head.table_size * 8ULL,
					  table);
}

/* All that is new, where nothing refers to it; sets *@ext to where it is. */
static int write_new(struct bitmaps *s, const struct refs *used,
		     struct qcow2_bitmaps_ext *ext)
{
	uint64_t cs = cluster_size(s), len = bitmaps_dir_size(s->item, s->n);
	uint64_t cluster, at, dir_at;
	struct bitmap_item *b;
	uint8_t *dir;
	int ret;

	*ext = (struct qcow2_bitmaps_ext){ 0 };
	if (!s->n)
		return 0;
	if (len > QCOW2_MAX_BITMAP_DIR_BYTES)
		return fail(EX_WRONG,
			    "%s: bitmap directory would have more than %s; remove a bitmap",
			    image_name(s), human_size(QCOW2_MAX_BITMAP_DIR_BYTES));
	ext->nb_bitmaps = cpu_to_be32(s->n);
	ext->directory_size = cpu_to_be64(len);
	ext->directory_offset = cpu_to_be64(cs);
	/* Before anything is written */
	ret = put_extension(s->img, ext, true);
	if (!ret)
		ret = clusters_take(s->img, used,
				    count_new(s) + div_up(len, cs), &cluster);
	if (ret)
		return ret;
	dir_at = cluster * cs;
	at = dir_at + align_up(len, cs);
	for (b = s->item; !ret && b < s->item + s->n; b++)
		if (b->fresh)
			ret = write_item(s, b, &at);
	dir = calloc(1, len);
	if (!dir)
		ret = fail_nomem();
	if (!ret) {
		bitmaps_dir_fill(s->item, s->n, dir);
		ret = write_clusters(s, dir, len, dir_at);
	}
	free(dir);
	ext->directory_offset = cpu_to_be64(dir_at);
	return ret ? ret : image_sync(s->img);
}

static uint64_t dir_clusters(const struct bitmaps *s)
{
	return div_up(s->img->h.bitmap_dir_size, cluster_size(s));
}

/* What the directory on disk is now */
static void settle(struct bitmaps *s)
{
	uint64_t at = 0;
	size_t i;

	for (i = 0; i < s->n; i++) {
		s->item[i].at = at;
		s->item[i].flags = s->item[i].head.flags;
		at += qcow2_bitmap_bytes(&s->item[i].head);
	}
	s->changed = false;
}

static int write_all(struct bitmaps *s)
{
	struct refs used = { .ref = NULL };
	struct qcow2_bitmaps_ext ext;
	uint64_t old, i;
	int ret;

	ret = image_clear_autoclear(s->img);
	if (!ret)
		ret = clusters_used(s->img, &used);
	if (!ret)
		ret = bitmaps_check_clusters(s, &used);
	old = image_has_bitmaps(s->img) ? dir_clusters(s) : 0;
	for (i = 0; !ret && i < old; i++)
		ret = clusters_later(&s->freed, s->img->h.bitmap_dir_offset /
				     cluster_size(s) + i);
	if (!ret)
		ret = write_new(s, &used, &ext);
	if (!ret && interrupted())
		ret = EX_WRONG;
	if (!ret)
		ret = switch_over(s->img, &ext);
	if (!ret)
		ret = clusters_put(s->img, &s->freed);
	refs_free(&used);
	settle(s);
	return ret;
}

int bitmap_write_flags(struct bitmaps *s, struct bitmap_item *b)
{
	__be32 flags = cpu_to_be32(b->head.flags);

	b->flags = b->head.flags;
	return image_change(s->img, &flags, sizeof(flags),
			    s->img->h.bitmap_dir_offset + b->at +
			    offsetof(struct qcow2_bitmap_head, flags));
}

uint64_t bitmaps_need(const struct bitmaps *s)
{
	uint64_t n = div_up(bitmaps_dir_size(s->item, s->n), cluster_size(s));
	const struct bitmap_item *b;
	uint32_t i;

	for (b = s->item; b < s->item + s->n; b++) {
		/* Which of its clusters have bits may change until then. */
		if (b->fresh)
			n += table_clusters(s, b) + b->head.table_size;
		else if (qcow2_bitmap_records(&b->head))
			for (i = 0; i < b->head.table_size; i++)
				n += !(be64_to_cpu(b->table[i]) &
				       QCOW2_OFFSET_MASK);
	}
	return n;
}

int bitmaps_write(struct bitmaps *s)
{
	struct bitmap_item *b, *other = NULL;
	unsigned int n = 0;
	int ret;

	for (b = s->item; b < s->item + s->n; b++)
		if (b->flags != b->head.flags) {
			other = b;
			n++;
		}
	/* Those of several are in several sectors. */
	if (s->changed || n > 1)
		return write_all(s);
	if (!n)
		return 0;
	ret = image_clear_autoclear(s->img);
	if (!ret)
		ret = bitmap_write_flags(s, other);
	return ret ? ret : image_sync(s->img);
}

/*
 * For a new image
 */

uint64_t bitmaps_new_clusters(const struct bitmaps *s, uint64_t *bits)
{
	uint64_t n = div_up(bitmaps_dir_size(s->item, s->n), cluster_size(s));
	size_t i;

	*bits = 0;
	for (i = 0; i < s->n; i++) {
		n += table_clusters(s, &s->item[i]);
		*bits += s->item[i].head.table_size;
	}
	return n;
}

void *bitmaps_new_dir(struct bitmaps *s, uint64_t at,
		      struct qcow2_bitmaps_ext *ext)
{
	uint64_t len = bitmaps_dir_size(s->item, s->n), cs = cluster_size(s);
	uint8_t *dir = malloc(len + 1);
	uint64_t table = at * cs + align_up(len, cs);
	size_t i;

	*ext = (struct qcow2_bitmaps_ext){
		.nb_bitmaps = cpu_to_be32(s->n),
		.directory_size = cpu_to_be64(len),
		.directory_offset = cpu_to_be64(at * cs),
	};
	for (i = 0; i < s->n; i++) {
		s->item[i].head.table_offset = table;
		table += table_clusters(s, &s->item[i]) * cs;
	}
	if (dir)
		bitmaps_dir_fill(s->item, s->n, dir);
	return dir;
}
