// SPDX-License-Identifier: GPL-2.0-or-later
/* Bitmaps of an image that gets larger: they know nothing of what is new, and have bits for it. */
#include <stdlib.h>
#include <string.h>

#include "image/bitmap_items.h"
#include "image/bits.h"
#include "lib/util.h"

/* What is behind the end was not set by anybody, and is seen now. */
static int clear_rest(struct bitmaps *s, struct bitmap_item *b)
{
	uint64_t i = b->head.table_size - 1, n, off;
	enum qcow2_fault fault = bitmap_entry_at(s, b, i, &off);
	uint8_t *bits;
	int ret;

	if (fault)
		return bitmap_cannot_use(s, b, qcow2_fault_str(fault));
	n = bitmap_bits_in(s, b, i, s->img->geo.size);
	if (!b->table[i] || n == bits_per_cluster(s))
		return 0;
	bits = malloc(cluster_size(s));
	if (!bits)
		return fail_nomem();
	ret = bitmap_read_bits(s, b, i, bits);
	if (ret || (off && !bits_clear(bits, n, bits_per_cluster(s)))) {
		free(bits);
		return ret;
	}
	ret = bitmap_make_fresh(s, b);
	if (!ret)
		ret = bitmap_drop_bits(s, b, i);
	if (!ret)
		return bitmap_set_bits(b, i, bits);
	free(bits);
	return ret;
}

/* Can they have bits for so many bytes? */
static int check_growth(const struct bitmaps *s, uint64_t size)
{
	const struct bitmap_item *b;
	const char *why;

	for (b = s->item; b < s->item + s->n; b++) {
		if (bitmap_inconsistent(b))
			continue;
		why = bitmap_why_unusable(s, b);
		if (!why && bitmap_too_large(size, b->head.granularity_bits,
					     s->img->geo.cluster_bits))
			why = "it would be too large for the new size";
		if (why)
			return bitmap_cannot_use(s, b, why);
	}
	return 0;
}

static uint64_t entries_for(const struct bitmaps *s,
			    const struct bitmap_item *b, uint64_t size)
{
	return qcow2_bitmap_entries(size, b->head.granularity_bits,
				    s->img->geo.cluster_bits);
}

int bitmaps_grow_plan(struct image *img, uint64_t size, uint64_t *need)
{
	const struct bitmap_item *b;
	struct bitmaps s;
	uint64_t n;
	int ret;

	*need = 0;
	ret = bitmaps_load(&s, img);
	if (!ret)
		ret = check_growth(&s, size);
	for (b = s.item; !ret && b < s.item + s.n; b++) {
		if (bitmap_inconsistent(b))
			continue;
		/* Its rest is cleared, then it gets longer, and its bits clusters. */
		n = entries_for(&s, b, size);
		*need += 1 + table_clusters(&s, b) +
			 div_up(n * 8, cluster_size(&s)) +
			 n - b->head.table_size;
	}
	if (s.n)
		*need += 2 * div_up(bitmaps_dir_size(s.item, s.n),
				    cluster_size(&s));
	bitmaps_free(&s);
	return ret;
}

int bitmaps_grow_begin(struct bitmaps *s, struct image *img, uint64_t size)
{
	unsigned int marked = 0;
	struct bitmap_item *b;
	int ret;

	ret = bitmaps_load(s, img);
	if (!ret)
		ret = check_growth(s, size);
	for (b = s->item; !ret && b < s->item + s->n; b++) {
		if (bitmap_inconsistent(b))
			continue;
		ret = clear_rest(s, b);
		b->grows = b->head.table_size != entries_for(s, b, size);
	}
	if (!ret)
		ret = bitmaps_write(s);
	for (b = s->item; !ret && b < s->item + s->n; b++) {
		if (!b->grows)
			continue;
		b->head.flags |= QCOW2_BITMAP_IN_USE;
		ret = bitmap_write_flags(s, b);
		b->head.flags &= ~QCOW2_BITMAP_IN_USE;
		marked++;
	}
	return ret || !marked ? ret : image_sync(img);
}

/* Entries that are 0: none of it is dirty. */
static int make_longer(struct bitmaps *s, struct bitmap_item *b)
{
	uint64_t n = qcow2_bitmap_entries(s->img->geo.size,
					  b->head.granularity_bits,
					  s->img->geo.cluster_bits);
	__be64 *table = calloc(n, sizeof(*table));
	int ret = table ? bitmap_make_fresh(s, b) : fail_nomem();

	if (ret) {
		free(table);
		return ret;
	}
	memcpy(table, b->table, b->head.table_size * sizeof(*table));
	free(b->table);
	free(b->bits);
	b->table = table;
	/* All was written before. */
	b->bits = NULL;
	b->head.table_size = n;
	b->grows = false;
	return 0;
}

int bitmaps_grow_end(struct bitmaps *s)
{
	struct bitmap_item *b;
	int ret = 0;

	for (b = s->item; !ret && b < s->item + s->n; b++)
		if (b->grows)
			ret = make_longer(s, b);
	return ret || !s->changed ? ret : bitmaps_write(s);
}
