// SPDX-License-Identifier: GPL-2.0-or-later
/* Bitmaps as they are: load, find and read them. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "image/bitmap_items.h"
#include "image/bits.h"
#include "lib/util.h"

/* Bytes of bits that QEMU stores; it would drop a bitmap that has more. */
#define MOST_BYTES	(512 * MIB)
/* Names of bitmaps that a message has */
#define NAMES_SHOWN	8

int bitmaps_malformed(const struct bitmaps *s, const char *why)
{
	return fail(EX_WRONG,
		    "%s: %s; remove the bitmaps: qcow2setup check --repair bitmaps %s",
		    image_name(s), why, shell_quote(s->img->node.path));
}

static int read_meta(const struct bitmaps *s, void *buf, size_t len,
		     uint64_t off)
{
	int ret = node_read(&s->img->node, buf, len, off);

	if (!ret)
		return 0;
	errno = -ret;
	return fail_errno("%s: cannot read its metadata", image_name(s));
}

unsigned int bitmap_granularity_bits(unsigned int cluster_bits)
{
	return cluster_bits < 12 ? 12 : cluster_bits > 16 ? 16 : cluster_bits;
}

bool bitmap_too_large(uint64_t size, unsigned int granularity_bits,
		      unsigned int cluster_bits)
{
	return qcow2_bitmap_bits(size, granularity_bits) > 8 * MOST_BYTES ||
	       qcow2_bitmap_entries(size, granularity_bits, cluster_bits) >
	       QCOW2_MAX_BITMAP_TABLE;
}

/*
 * Load
 */

void bitmap_item_free(struct bitmap_item *b)
{
	uint32_t i;

	for (i = 0; b->bits && i < b->head.table_size; i++)
		free(b->bits[i]);
	free(b->bits);
	free(b->table);
	free(b->name);
	free(b->extra);
}

void bitmaps_free(struct bitmaps *s)
{
	size_t i;

	for (i = 0; i < s->n; i++)
		bitmap_item_free(&s->item[i]);
	free(s->item);
	clusters_free(&s->freed);
	*s = (struct bitmaps){ .img = NULL };
}

struct bitmap_item *bitmap_item_new(struct bitmaps *s,
				    const struct qcow2_bitmap *head)
{
	struct bitmap_item *more, *b;

	more = reallocarray(s->item, s->n + 1, sizeof(*more));
	if (!more)
		return NULL;
	s->item = more;
	b = &more[s->n++];
	*b = (struct bitmap_item){
		.head = *head, .flags = head->flags,
		.name = calloc(1, head->name_size + 1UL),
		.extra = calloc(1, head->extra_size + 1UL),
		.table = calloc(head->table_size + 1UL, sizeof(__be64)),
	};
	return b->name && b->extra && b->table ? b : NULL;
}

struct load {
	struct bitmaps *s;
	int ret;
};

static int load_item(const struct bitmap *b, void *arg)
{
	struct load *l = arg;
	struct bitmap_item *item = bitmap_item_new(l->s, &b->head);

	if (!item) {
		l->ret = fail_nomem();
		return 1;
	}
	item->at = b->at;
	memcpy(item->name, b->name.s, b->name.len);
	memcpy(item->extra, b->name.s - b->head.extra_size, b->head.extra_size);
	l->ret = read_meta(l->s, item->table, b->head.table_size * 8UL,
			   b->head.table_offset);
	return l->ret;
}

int bitmaps_load(struct bitmaps *s, struct image *img)
{
	struct load l = { .s = s };
	const char *why;
	int ret;

	*s = (struct bitmaps){ .img = img };
	if (!image_has_bitmaps(img))
		return 0;
	ret = image_load_bitmaps(img, &why);
	if (ret == EX_MEMORY)
		return fail_nomem();
	if (ret)
		return bitmaps_malformed(s, why);
	bitmaps_parse(img->bitmap_dir, img->h.bitmap_dir_size,
		      img->h.bitmap_count, img->h.cluster_bits, load_item, &l,
		      &why);
	return l.ret;
}

/*
 * Find
 */

struct bitmap_item *bitmaps_find(const struct bitmaps *s, const char *name)
{
	size_t len = strlen(name), i;

	for (i = 0; i < s->n; i++)
		if (s->item[i].head.name_size == len &&
		    !memcmp(s->item[i].name, name, len))
			return &s->item[i];
	return NULL;
}

int bitmaps_not_there(const struct bitmaps *s, const char *name)
{
	char list[1024];
	size_t i, at = 0;

	if (!s->n)
		return fail(EX_WRONG,
			    "%s: has no bitmaps, and so no %s; add it: qcow2setup bitmap add %s %s",
			    image_name(s), esc(name),
			    shell_quote(s->img->node.path),
			    shell_word(name, strlen(name)));
	for (i = 0; i < s->n && i < NAMES_SHOWN; i++)
		at += snprintf(list + at, sizeof(list) - at, "%s%.100s",
			       i ? ", " : "", name_of(&s->item[i]));
	return fail(EX_WRONG, "%s: has no bitmap %s; choose one that is there: %s%s",
		    image_name(s), esc(name), list, i < s->n ? " ..." : "");
}

int bitmap_cannot_use(const struct bitmaps *s, const struct bitmap_item *b,
		      const char *why)
{
	return fail(EX_WRONG,
		    "%s: bitmap %s: %s; remove it: qcow2setup bitmap remove %s %s",
		    image_name(s), name_of(b), why,
		    shell_quote(s->img->node.path),
		    shell_word(b->name, b->head.name_size));
}

const char *bitmap_why_unusable(const struct bitmaps *s,
				const struct bitmap_item *b)
{
	enum qcow2_fault fault;

	if (bitmap_inconsistent(b))
		return "inconsistent, since who recorded in it has not ended orderly";
	fault = qcow2_bitmap_record_check(&b->head, s->img->geo.size,
					  s->img->geo.cluster_bits,
					  s->img->node.size);
	if (!fault && bitmap_too_large(s->img->geo.size,
				       b->head.granularity_bits,
				       s->img->geo.cluster_bits))
		return "it has more bits than can be stored";
	return fault ? qcow2_fault_str(fault) : NULL;
}

int bitmaps_get(const struct bitmaps *s, const char *name,
		struct bitmap_item **b)
{
	const char *why;

	*b = bitmaps_find(s, name);
	if (!*b)
		return bitmaps_not_there(s, name);
	why = bitmap_why_unusable(s, *b);
	return why ? bitmap_cannot_use(s, *b, why) : 0;
}

/*
 * Bits
 */

uint64_t bitmap_bits_in(const struct bitmaps *s, const struct bitmap_item *b,
			uint64_t i, uint64_t size)
{
	uint64_t n = qcow2_bitmap_bits(size, b->head.granularity_bits);

	n -= min_u64(n, i * bits_per_cluster(s));
	return min_u64(n, bits_per_cluster(s));
}

int bitmap_set_bits(struct bitmap_item *b, uint64_t i, uint8_t *bits)
{
	if (!b->bits)
		b->bits = calloc(b->head.table_size, sizeof(*b->bits));
	if (!b->bits) {
		free(bits);
		return fail_nomem();
	}
	free(b->bits[i]);
	b->bits[i] = bits;
	return 0;
}

enum qcow2_fault bitmap_entry_at(const struct bitmaps *s,
				 const struct bitmap_item *b, uint64_t i,
				 uint64_t *off)
{
	enum qcow2_fault fault;
	__u64 at = 0;

	fault = qcow2_bitmap_entry_check(be64_to_cpu(b->table[i]),
					 s->img->geo.cluster_bits,
					 s->img->node.size, &at);
	*off = at;
	return fault;
}

int bitmap_read_bits(const struct bitmaps *s, const struct bitmap_item *b,
		     uint64_t i, uint8_t *bits)
{
	uint64_t off;
	enum qcow2_fault fault = bitmap_entry_at(s, b, i, &off);

	if (fault)
		return bitmap_cannot_use(s, b, qcow2_fault_str(fault));
	if (off)
		return read_meta(s, bits, cluster_size(s), off);
	memset(bits, 0, cluster_size(s));
	if (b->table[i])
		bits_set(bits, 0, bitmap_bits_in(s, b, i, s->img->geo.size));
	return 0;
}

bool bitmaps_count(const struct bitmaps *s, const struct bitmap_item *b,
		   uint64_t *bytes, const char **why)
{
	uint64_t bits = qcow2_bitmap_bits(s->img->geo.size, b->head.granularity_bits);
	uint64_t count = 0, last = 0, i, n, off, tail;
	enum qcow2_fault fault;
	uint8_t *buf;

	*why = bitmap_why_unusable(s, b);
	if (*why)
		return false;
	buf = malloc(cluster_size(s));
	if (!buf)
		*why = "out of memory";
	for (i = 0; !*why && i < b->head.table_size; i++) {
		fault = bitmap_entry_at(s, b, i, &off);
		n = bitmap_bits_in(s, b, i, s->img->geo.size);
		if (fault)
			*why = qcow2_fault_str(fault);
		if (fault || !b->table[i])
			continue;
		if (off && node_read(&s->img->node, buf, cluster_size(s), off)) {
			*why = "it cannot be read";
			break;
		}
		count += off ? bits_count(buf, n) : n;
		/* Has the last one of the disk been set? */
		if (i == b->head.table_size - 1)
			last = !off || bits_find(buf, n - 1, n, true) < n;
	}
	free(buf);
	*bytes = count << b->head.granularity_bits;
	tail = (bits << b->head.granularity_bits) - s->img->geo.size;
	if (last)
		*bytes -= tail;
	return !*why;
}

int bitmap_reader_open(struct bitmap_reader *r, const struct bitmaps *s,
		       const char *name)
{
	struct bitmap_item *b;
	int ret;

	*r = (struct bitmap_reader){ .s = s, .i = UINT64_MAX };
	ret = bitmaps_get(s, name, &b);
	if (ret)
		return ret;
	r->b = b;
	r->bits = malloc(cluster_size(s));
	return r->bits ? 0 : fail_nomem();
}

int bitmap_reader_run(struct bitmap_reader *r, uint64_t at, bool *dirty,
		      uint64_t *end)
{
	unsigned int g = r->b->head.granularity_bits;
	uint64_t size = r->s->img->geo.size, bit = at >> g, n;
	uint64_t i = bit / bits_per_cluster(r->s);
	uint64_t base = i * bits_per_cluster(r->s);
	int ret = 0;

	if (i != r->i)
		ret = bitmap_read_bits(r->s, r->b, i, r->bits);
	r->i = ret ? UINT64_MAX : i;
	if (ret)
		return ret;
	n = bitmap_bits_in(r->s, r->b, i, size);
	bit -= base;
	*dirty = bits_find(r->bits, bit, bit + 1, true) == bit;
	*end = min_u64(size, (base + bits_find(r->bits, bit, n, !*dirty)) << g);
	return 0;
}

void bitmap_reader_close(struct bitmap_reader *r)
{
	free(r->bits);
	r->bits = NULL;
}
