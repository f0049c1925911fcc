// SPDX-License-Identifier: GPL-2.0-or-later
/* Bitmaps that record are made ready for the kernel. */
#include <stdlib.h>

#include "image/bitmap_items.h"
#include "lib/interrupt.h"
#include "lib/util.h"

/* Written at a time */
#define PIECE		MIB

static int check_ready(const struct bitmaps *s, unsigned int *n)
{
	const char *path = shell_quote(s->img->node.path), *why;
	const struct bitmap_item *b;

	*n = 0;
	for (b = s->item; b < s->item + s->n; b++) {
		if (!qcow2_bitmap_records(&b->head))
			continue;
		why = bitmap_why_unusable(s, b);
		if (why)
			return fail(EX_WRONG,
				    "%s: bitmap %s cannot be kept up to date: %s; remove it: qcow2setup bitmap remove %s %s",
				    image_name(s), name_of(b), why, path,
				    shell_word(b->name, b->head.name_size));
		if (++*n > MOST_RECORDING)
			return fail(EX_WRONG,
				    "%s: more than %u bitmaps record, which cannot all be kept up to date; stop one: qcow2setup bitmap disable %s %s",
				    image_name(s), MOST_RECORDING, path,
				    shell_word(b->name, b->head.name_size));
	}
	return 0;
}

/* Entries that have no cluster; of those that record. */
static int count_missing(const struct bitmaps *s, uint64_t *n)
{
	const struct bitmap_item *b;
	enum qcow2_fault fault;
	uint64_t off;
	uint32_t i;

	*n = 0;
	for (b = s->item; b < s->item + s->n; b++) {
		if (!qcow2_bitmap_records(&b->head))
			continue;
		for (i = 0; i < b->head.table_size; i++) {
			fault = bitmap_entry_at(s, b, i, &off);
			if (fault)
				return bitmap_cannot_use(s, b, qcow2_fault_str(fault));
			*n += !off;
		}
	}
	return 0;
}

/* Write clusters for entries that have none, from *@at on. */
static int write_missing(struct bitmaps *s, struct bitmap_item *b, uint64_t *at)
{
	uint64_t cs = cluster_size(s), most = max_u64(PIECE / cs, 1), n = 0;
	uint8_t *buf = malloc(most * cs);
	uint64_t start = *at, off;
	uint32_t i;
	int ret = buf ? 0 : fail_nomem();

	for (i = 0; !ret && i < b->head.table_size; i++) {
		bitmap_entry_at(s, b, i, &off);
		if (!off) {
			ret = bitmap_read_bits(s, b, i, buf + n++ * cs);
			b->table[i] = cpu_to_be64(*at);
			*at += cs;
		}
		if (ret || !n || (n < most && i < b->head.table_size - 1))
			continue;
		ret = image_change(s->img, buf, n * cs, start);
		if (!ret && interrupted())
			ret = EX_WRONG;
		start = *at;
		n = 0;
	}
	free(buf);
	return ret;
}

/* Whatever part of it gets to the disk: each entry says what it said before. */
static int name_missing(struct bitmaps *s, const struct bitmap_item *b)
{
	uint64_t done = 0, n, total = b->head.table_size * 8ULL;
	int ret = 0;

	for (; !ret && done < total; done += n) {
		n = min_u64(PIECE, total - done);
		ret = image_change(s->img, (uint8_t *)b->table + done, n,
				   b->head.table_offset + done);
	}
	return ret;
}

static int make_ready(struct bitmaps *s, uint64_t missing)
{
	struct refs used = { .ref = NULL };
	uint64_t cluster, at;
	struct bitmap_item *b;
	int ret;

	ret = clusters_used(s->img, &used);
	if (!ret)
		ret = bitmaps_check_clusters(s, &used);
	if (!ret && missing)
		ret = clusters_take(s->img, &used, missing, &cluster);
	refs_free(&used);
	if (ret || !missing)
		return ret;
	at = cluster * cluster_size(s);
	for (b = s->item; !ret && b < s->item + s->n; b++)
		if (qcow2_bitmap_records(&b->head))
			ret = write_missing(s, b, &at);
	if (!ret)
		ret = image_sync(s->img);
	for (b = s->item; !ret && b < s->item + s->n; b++)
		if (qcow2_bitmap_records(&b->head))
			ret = name_missing(s, b);
	return ret ? ret : image_sync(s->img);
}

int image_bitmaps_ready(struct image *img, unsigned int *n)
{
	uint64_t missing = 0;
	struct bitmaps s;
	int ret;

	ret = bitmaps_load(&s, img);
	if (!ret)
		ret = check_ready(&s, n);
	if (!ret)
		ret = count_missing(&s, &missing);
	if (!ret && *n)
		ret = make_ready(&s, missing);
	bitmaps_free(&s);
	return ret;
}
