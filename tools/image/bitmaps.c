// SPDX-License-Identifier: GPL-2.0-or-later
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "image/bitmaps.h"
#include "image/bits.h"
#include "image/extensions.h"
#include "lib/interrupt.h"
#include "lib/size.h"
#include "lib/util.h"

#define SECTOR		512
/* Written at a time by image_bitmaps_ready() */
#define PIECE		MIB
/* Bytes of bits that QEMU stores; it would drop a bitmap that has more. */
#define MOST_BYTES	(512 * MIB)
/* Names of bitmaps that a message has */
#define NAMES_SHOWN	8

static uint64_t cluster_size(const struct bitmaps *s)
{
	return 1ULL << s->img->geo.cluster_bits;
}

static const char *image_name(const struct bitmaps *s)
{
	return esc(s->img->node.path);
}

static const char *name_of(const struct bitmap_item *b)
{
	return escn(b->name, b->head.name_size);
}

static int malformed(const struct bitmaps *s, const char *why)
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

static void free_item(struct bitmap_item *b)
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
		free_item(&s->item[i]);
	free(s->item);
	clusters_free(&s->freed);
	*s = (struct bitmaps){ .img = NULL };
}

/* An item with room for its name, extra data and table. */
static struct bitmap_item *new_item(struct bitmaps *s,
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
	struct bitmap_item *item = new_item(l->s, &b->head);

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
		return malformed(s, why);
	bitmaps_parse(img->bitmap_dir, img->h.bitmap_dir_size,
		      img->h.bitmap_count, img->h.cluster_bits, load_item, &l,
		      &why);
	return l.ret;
}

/*
 * Find
 */

static struct bitmap_item *find(const struct bitmaps *s, const char *name)
{
	size_t len = strlen(name), i;

	for (i = 0; i < s->n; i++)
		if (s->item[i].head.name_size == len &&
		    !memcmp(s->item[i].name, name, len))
			return &s->item[i];
	return NULL;
}

static int not_there(const struct bitmaps *s, const char *name)
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

static int cannot_use(const struct bitmaps *s, const struct bitmap_item *b,
		      const char *why)
{
	return fail(EX_WRONG,
		    "%s: bitmap %s: %s; remove it: qcow2setup bitmap remove %s %s",
		    image_name(s), name_of(b), why,
		    shell_quote(s->img->node.path),
		    shell_word(b->name, b->head.name_size));
}

/* Why nothing but its removal is possible; NULL: all is. */
static const char *why_unusable(const struct bitmaps *s,
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

static int get(const struct bitmaps *s, const char *name,
	       struct bitmap_item **b)
{
	const char *why;

	*b = find(s, name);
	if (!*b)
		return not_there(s, name);
	why = why_unusable(s, *b);
	return why ? cannot_use(s, *b, why) : 0;
}

/*
 * Bits
 */

static uint64_t bits_per_cluster(const struct bitmaps *s)
{
	return cluster_size(s) * 8;
}

/* Bits of the cluster of entry @i that the disk has. */
static uint64_t bits_in(const struct bitmaps *s, const struct bitmap_item *b,
			uint64_t i, uint64_t size)
{
	uint64_t n = qcow2_bitmap_bits(size, b->head.granularity_bits);

	n -= min_u64(n, i * bits_per_cluster(s));
	return min_u64(n, bits_per_cluster(s));
}

/* What entry @i is to have, if it is to be written. */
static uint8_t *new_bits(const struct bitmap_item *b, uint64_t i)
{
	return b->bits ? b->bits[i] : NULL;
}

/* It gets @bits, which are taken over, in any case. */
static int set_new_bits(struct bitmap_item *b, uint64_t i, uint8_t *bits)
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

static enum qcow2_fault entry_at(const struct bitmaps *s,
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

/* What the cluster of entry @i has, if it is not to be written. */
static int read_bits(const struct bitmaps *s, const struct bitmap_item *b,
		     uint64_t i, uint8_t *bits)
{
	uint64_t off;
	enum qcow2_fault fault = entry_at(s, b, i, &off);

	if (fault)
		return cannot_use(s, b, qcow2_fault_str(fault));
	if (off)
		return read_meta(s, bits, cluster_size(s), off);
	memset(bits, 0, cluster_size(s));
	if (b->table[i])
		bits_set(bits, 0, bits_in(s, b, i, s->img->geo.size));
	return 0;
}

bool bitmaps_count(const struct bitmaps *s, const struct bitmap_item *b,
		   uint64_t *bytes, const char **why)
{
	uint64_t bits = qcow2_bitmap_bits(s->img->geo.size, b->head.granularity_bits);
	uint64_t count = 0, last = 0, i, n, off, tail;
	enum qcow2_fault fault;
	uint8_t *buf;

	*why = why_unusable(s, b);
	if (*why)
		return false;
	buf = malloc(cluster_size(s));
	if (!buf)
		*why = "out of memory";
	for (i = 0; !*why && i < b->head.table_size; i++) {
		fault = entry_at(s, b, i, &off);
		n = bits_in(s, b, i, s->img->geo.size);
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
	ret = get(s, name, &b);
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
		ret = read_bits(r->s, r->b, i, r->bits);
	r->i = ret ? UINT64_MAX : i;
	if (ret)
		return ret;
	n = bits_in(r->s, r->b, i, size);
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

/*
 * Changes
 */

/* Its table is to be written: that is in another place, so that the old one is free. */
static int make_fresh(struct bitmaps *s, struct bitmap_item *b)
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

/* The cluster of entry @i is not used any more. */
static int drop_bits(struct bitmaps *s, struct bitmap_item *b, uint64_t i)
{
	uint64_t off;
	enum qcow2_fault fault = entry_at(s, b, i, &off);

	if (fault)
		return malformed(s, qcow2_fault_str(fault));
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
	if (find(s, name))
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
	b = new_item(s, &head);
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
	struct bitmap_item *b = find(s, name);
	uint32_t i;
	int ret;

	if (!b)
		return not_there(s, name);
	ret = make_fresh(s, b);
	for (i = 0; !ret && i < b->head.table_size; i++)
		ret = drop_bits(s, b, i);
	if (ret)
		return ret;
	free_item(b);
	s->n--;
	memmove(b, b + 1, (s->item + s->n - b) * sizeof(*b));
	return 0;
}

int bitmaps_clear(struct bitmaps *s, const char *name)
{
	struct bitmap_item *b;
	uint32_t i;
	int ret;

	ret = get(s, name, &b);
	if (ret || is_empty(b))
		return ret;
	ret = make_fresh(s, b);
	for (i = 0; !ret && i < b->head.table_size; i++)
		ret = drop_bits(s, b, i);
	return ret;
}

int bitmaps_record(struct bitmaps *s, const char *name, bool records)
{
	struct bitmap_item *b;
	int ret;

	ret = get(s, name, &b);
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

	ret = get(s, name, &b);
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
		ret = read_bits(t->s, b, i, t->bits);
		if (ret)
			return ret;
		t->i = i;
	}
	if (!new_bits(b, i)) {
		if (bits_find(t->bits, from, to, false) == to)
			return 0;
		ret = make_fresh(t->s, b);
		if (!ret)
			ret = drop_bits(t->s, b, i);
		if (ret)
			return ret;
		ret = set_new_bits(b, i, t->bits);
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
	uint64_t size = t->s->img->geo.size, n = bits_in(t->s, source, i, size);
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
	struct bitmap_item *from;
	uint8_t *buf;
	uint32_t i;
	int ret;

	ret = get(s, target, &t.b);
	if (!ret)
		ret = get(s, source, &from);
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
			ret = read_bits(s, from, i, buf);
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

	ret = get(s, target, &t.b);
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

static uint64_t bitmaps_dir_size(const struct bitmap_item *item, size_t n)
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

/* A cluster that is something else, too, must neither be written nor given back. */
static int check_clusters(const struct bitmaps *s, const struct refs *used)
{
	struct ref_group group;
	size_t i = 0;

	while (refs_next(used, &i, &group)) {
		const struct ref *last = &group.ref[group.n - 1];

		if (group.n > 1 && (last->kind == REF_BITMAP_DIR ||
				    last->kind == REF_BITMAP_TABLE ||
				    last->kind == REF_BITMAP_DATA))
			return malformed(s, "a cluster of a bitmap is used twice");
	}
	return 0;
}

static uint64_t table_clusters(const struct bitmaps *s,
			       const struct bitmap_item *b)
{
	return div_up(b->head.table_size * 8ULL, cluster_size(s));
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
		ret = check_clusters(s, &used);
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

static int write_flags(struct bitmaps *s, struct bitmap_item *b)
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
		ret = write_flags(s, other);
	return ret ? ret : image_sync(s->img);
}

/*
 * A larger image
 */

/* What is behind the end was not set by anybody, and is seen now. */
static int clear_rest(struct bitmaps *s, struct bitmap_item *b)
{
	uint64_t i = b->head.table_size - 1, n, off;
	enum qcow2_fault fault = entry_at(s, b, i, &off);
	uint8_t *bits;
	int ret;

	if (fault)
		return cannot_use(s, b, qcow2_fault_str(fault));
	n = bits_in(s, b, i, s->img->geo.size);
	if (!b->table[i] || n == bits_per_cluster(s))
		return 0;
	bits = malloc(cluster_size(s));
	if (!bits)
		return fail_nomem();
	ret = read_bits(s, b, i, bits);
	if (ret || (off && !bits_clear(bits, n, bits_per_cluster(s)))) {
		free(bits);
		return ret;
	}
	ret = make_fresh(s, b);
	if (!ret)
		ret = drop_bits(s, b, i);
	if (!ret)
		return set_new_bits(b, i, bits);
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
		why = why_unusable(s, b);
		if (!why && bitmap_too_large(size, b->head.granularity_bits,
					     s->img->geo.cluster_bits))
			why = "it would be too large for the new size";
		if (why)
			return cannot_use(s, b, why);
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
		ret = write_flags(s, b);
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
	int ret = table ? make_fresh(s, b) : fail_nomem();

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

/*
 * For the kernel
 */

static int check_ready(const struct bitmaps *s, unsigned int *n)
{
	const char *path = shell_quote(s->img->node.path), *why;
	const struct bitmap_item *b;

	*n = 0;
	for (b = s->item; b < s->item + s->n; b++) {
		if (!qcow2_bitmap_records(&b->head))
			continue;
		why = why_unusable(s, b);
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
			fault = entry_at(s, b, i, &off);
			if (fault)
				return cannot_use(s, b, qcow2_fault_str(fault));
			*n += !off;
		}
	}
	return 0;
}

/* Write clusters for entries that have none, from *@at on. */
static int write_missing(struct bitmaps *s, struct bitmap_item *b,
			 uint64_t *at)
{
	uint64_t cs = cluster_size(s), most = max_u64(PIECE / cs, 1), n = 0;
	uint8_t *buf = malloc(most * cs);
	uint64_t start = *at, off;
	uint32_t i;
	int ret = buf ? 0 : fail_nomem();

	for (i = 0; !ret && i < b->head.table_size; i++) {
		entry_at(s, b, i, &off);
		if (!off) {
			ret = read_bits(s, b, i, buf + n++ * cs);
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
		ret = check_clusters(s, &used);
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
