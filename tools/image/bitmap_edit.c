// SPDX-License-Identifier: GPL-2.0-or-later
/* Changes of bitmaps, in memory: which there are, whether they record, and their bits. */
#include <stdlib.h>
#include <string.h>

#include "image/bitmap_items.h"
#include "image/bits.h"
#include "lib/interrupt.h"
#include "lib/size.h"
#include "lib/util.h"

int bitmap_make_fresh(struct bitmaps *s, struct bitmap_item *b)
{
	uint64_t n = div_up(b->head.table_size * 8ULL, cluster_size(s)), i;
	int ret = 0;

	for (i = 0; !ret && !b->fresh && i < n; i++)
		ret = clusters_later(&s->freed,
				     b->head.table_offset / cluster_size(s) + i);
	b->fresh = true;
	s->changed = true;
	return ret;
}

int bitmap_drop_bits(struct bitmaps *s, struct bitmap_item *b, uint64_t i)
{
	uint64_t off;
	enum qcow2_fault fault = bitmap_entry_at(s, b, i, &off);

	if (fault)
		return bitmaps_malformed(s, qcow2_fault_str(fault));
	if (b->bits) {
		free(b->bits[i]);
		b->bits[i] = NULL;
	}
	b->table[i] = 0;
	return off ? clusters_later(&s->freed, off / cluster_size(s)) : 0;
}

static bool is_empty(const struct bitmap_item *b)
{
	uint32_t i;

	for (i = 0; i < b->head.table_size; i++)
		if (b->table[i] || new_bits(b, i))
			return false;
	return true;
}

/* The kernel keeps so many up to date, and would refuse the image with more. */
static int check_recording(const struct bitmaps *s, const char *name)
{
	unsigned int n = 0;
	size_t i;

	for (i = 0; i < s->n; i++)
		if (qcow2_bitmap_records(&s->item[i].head))
			n++;
	if (n < MOST_RECORDING)
		return 0;
	return fail(EX_WRONG,
		    "%s: %u bitmaps record already, and no more can: %s would be one too many; stop one: qcow2setup bitmap disable %s NAME",
		    image_name(s), n, esc(name),
		    shell_quote(s->img->node.path));
}

int bitmaps_add(struct bitmaps *s, const char *name,
		unsigned int granularity_bits, bool records)
{
	const struct qcow2_geometry *g = &s->img->geo;
	struct qcow2_bitmap head = {
		.flags = records ? QCOW2_BITMAP_AUTO : 0,
		.name_size = strlen(name), .type = QCOW2_BITMAP_TYPE_DIRTY,
		.granularity_bits = granularity_bits,
	};
	unsigned int most = granularity_bits;
	struct bitmap_item *b;
	int ret;

	if (!*name || strlen(name) > QCOW2_MAX_BITMAP_NAME)
		return fail(EX_PARAMETER,
			    "a bitmap's name has 1 to %u bytes; choose another name",
			    QCOW2_MAX_BITMAP_NAME);
	if (bitmaps_find(s, name))
		return fail(EX_BUSY,
			    "%s: has a bitmap %s already; choose another name, or remove it: qcow2setup bitmap remove %s %s",
			    image_name(s), esc(name),
			    shell_quote(s->img->node.path),
			    shell_word(name, strlen(name)));
	if (s->n >= QCOW2_MAX_BITMAPS)
		return fail(EX_WRONG,
			    "%s: has %zu bitmaps, and cannot have more; remove one: qcow2setup bitmap remove %s NAME",
			    image_name(s), s->n, shell_quote(s->img->node.path));
	/* Of the largest one, 2^25 bits are enough for any disk. */
	while (bitmap_too_large(g->size, most, g->cluster_bits))
		most++;
	if (most > granularity_bits)
		return fail(EX_WRONG,
			    "%s: a bitmap of granularity %s would be too large for a disk of %s; choose a granularity of %llu",
			    image_name(s), human_size(1ULL << granularity_bits),
			    human_size(g->size), 1ULL << most);
	ret = records ? check_recording(s, name) : 0;
	if (ret)
		return ret;
	head.table_size = qcow2_bitmap_entries(g->size, granularity_bits,
					       g->cluster_bits);
	b = bitmap_item_new(s, &head);
	if (!b)
		return fail_nomem();
	memcpy(b->name, name, head.name_size);
	b->fresh = true;
	s->changed = true;
	return 0;
}

int bitmaps_add_option(struct bitmaps *s, const char *text, const char *option)
{
	static const char key[] = ",granularity=";
	const char *comma = strstr(text, key);
	uint64_t granularity;
	char *name;
	int ret;

	if (!comma)
		return bitmaps_add(s, text,
				   bitmap_granularity_bits(s->img->geo.cluster_bits),
				   true);
	if (!parse_size(comma + strlen(key), &granularity) ||
	    granularity & (granularity - 1) ||
	    granularity < 1ULL << QCOW2_MIN_GRANULARITY_BITS ||
	    granularity > 1ULL << QCOW2_MAX_GRANULARITY_BITS)
		return fail(EX_PARAMETER,
			    "--%s %s: granularity is not possible; use a power of two from 512 to 2G",
			    option, esc(text));
	name = strndup(text, comma - text);
	if (!name)
		return fail_nomem();
	ret = bitmaps_add(s, name, __builtin_ctzll(granularity), true);
	free(name);
	return ret;
}

int bitmaps_remove(struct bitmaps *s, const char *name)
{
	struct bitmap_item *b = bitmaps_find(s, name);
	uint32_t i;
	int ret;

	if (!b)
		return bitmaps_not_there(s, name);
	ret = bitmap_make_fresh(s, b);
	for (i = 0; !ret && i < b->head.table_size; i++)
		ret = bitmap_drop_bits(s, b, i);
	if (ret)
		return ret;
	bitmap_item_free(b);
	s->n--;
	memmove(b, b + 1, (s->item + s->n - b) * sizeof(*b));
	return 0;
}

int bitmaps_clear(struct bitmaps *s, const char *name)
{
	struct bitmap_item *b;
	uint32_t i;
	int ret;

	ret = bitmaps_get(s, name, &b);
	if (ret || is_empty(b))
		return ret;
	ret = bitmap_make_fresh(s, b);
	for (i = 0; !ret && i < b->head.table_size; i++)
		ret = bitmap_drop_bits(s, b, i);
	return ret;
}

int bitmaps_record(struct bitmaps *s, const char *name, bool records)
{
	struct bitmap_item *b;
	int ret;

	ret = bitmaps_get(s, name, &b);
	if (ret || records == qcow2_bitmap_records(&b->head))
		return ret;
	if (!records)
		b->head.flags &= ~QCOW2_BITMAP_AUTO;
	else
		ret = check_recording(s, name);
	if (!ret && records)
		b->head.flags |= QCOW2_BITMAP_AUTO;
	return ret;
}

int bitmaps_stop(struct bitmaps *s, const char *name)
{
	struct bitmap_item *b;
	int ret;

	ret = bitmaps_get(s, name, &b);
	if (!ret && !qcow2_bitmap_records(&b->head))
		ret = fail(EX_WRONG,
			   "%s: bitmap %s does not record, and so does not know what was written until now; choose one that does, see qcow2setup bitmap list %s",
			   image_name(s), esc(name),
			   shell_quote(s->img->node.path));
	return ret ? ret : bitmaps_record(s, name, false);
}

/* The bitmap that others are merged into, and one of its clusters. */
struct target {
	struct bitmaps *s;
	struct bitmap_item *b;
	uint64_t i;		/* whose bits are these; UINT64_MAX: of none */
	uint8_t *bits;
};

/* Set the bits [@from, @to) of cluster @i; it is written only if that is new. */
static int set_in_cluster(struct target *t, uint64_t i, uint64_t from,
			  uint64_t to)
{
	struct bitmap_item *b = t->b;
	int ret = 0;

	if (!new_bits(b, i) && t->i != i) {
		t->i = UINT64_MAX;
		ret = bitmap_read_bits(t->s, b, i, t->bits);
		if (ret)
			return ret;
		t->i = i;
	}
	if (!new_bits(b, i)) {
		if (bits_find(t->bits, from, to, false) == to)
			return 0;
		ret = bitmap_make_fresh(t->s, b);
		if (!ret)
			ret = bitmap_drop_bits(t->s, b, i);
		if (ret)
			return ret;
		ret = bitmap_set_bits(b, i, t->bits);
		t->i = UINT64_MAX;
		t->bits = malloc(cluster_size(t->s));
		if (!ret && !t->bits)
			ret = fail_nomem();
		if (ret)
			return ret;
	}
	bits_set(b->bits[i], from, to);
	return 0;
}

/* Set all that [@from, @to) of the disk touches. */
static int set_bytes(struct target *t, uint64_t from, uint64_t to)
{
	uint64_t per = bits_per_cluster(t->s), bit, end;
	unsigned int g = t->b->head.granularity_bits;
	int ret = 0;

	bit = from >> g;
	end = ((to - 1) >> g) + 1;
	while (!ret && bit < end) {
		uint64_t i = bit / per;
		uint64_t stop = min_u64(end, (i + 1) * per);

		ret = set_in_cluster(t, i, bit - i * per, stop - i * per);
		bit = stop;
	}
	return ret;
}

static int merge_cluster(struct target *t, const struct bitmap_item *source,
			 uint64_t i, const uint8_t *bits)
{
	uint64_t size = t->s->img->geo.size, n = bitmap_bits_in(t->s, source, i, size);
	uint64_t base = i * bits_per_cluster(t->s), from, to = 0;
	unsigned int g = source->head.granularity_bits;
	int ret = 0;

	while (!ret) {
		from = bits_find(bits, to, n, true);
		if (from == n)
			break;
		to = bits_find(bits, from, n, false);
		ret = set_bytes(t, (base + from) << g,
				min_u64(size, (base + to) << g));
	}
	return ret;
}

int bitmaps_merge(struct bitmaps *s, const char *target, const char *source)
{
	struct target t = { .s = s, .i = UINT64_MAX };
	struct bitmap_item *from = NULL;
	uint8_t *buf;
	uint32_t i;
	int ret;

	ret = bitmaps_get(s, target, &t.b);
	if (!ret)
		ret = bitmaps_get(s, source, &from);
	if (ret || from == t.b)
		return ret;
	t.bits = malloc(cluster_size(s));
	buf = malloc(cluster_size(s));
	if (!t.bits || !buf)
		ret = fail_nomem();
	for (i = 0; !ret && i < from->head.table_size; i++) {
		if (!from->table[i] && !new_bits(from, i))
			continue;
		if (interrupted())
			ret = EX_WRONG;
		else if (!new_bits(from, i))
			ret = bitmap_read_bits(s, from, i, buf);
		if (!ret)
			ret = merge_cluster(&t, from, i,
					    new_bits(from, i) ? new_bits(from, i) :
					    buf);
	}
	free(t.bits);
	free(buf);
	return ret;
}

int bitmaps_set_from(struct bitmaps *s, const char *target,
		     struct bitmap_reader *r)
{
	struct target t = { .s = s, .i = UINT64_MAX };
	uint64_t size = s->img->geo.size, at, end;
	bool dirty;
	int ret;

	ret = bitmaps_get(s, target, &t.b);
	if (ret)
		return ret;
	t.bits = malloc(cluster_size(s));
	if (!t.bits)
		return fail_nomem();
	for (at = 0; !ret && at < size; at = end) {
		ret = bitmap_reader_run(r, at, &dirty, &end);
		end = min_u64(end, size);
		if (!ret && dirty)
			ret = set_bytes(&t, at, end);
		if (!ret && interrupted())
			ret = EX_WRONG;
	}
	free(t.bits);
	return ret;
}
