// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Give an image a larger virtual size.  Everything that the new size needs is
 * written first, where nothing reads it: behind the end, or behind the old
 * virtual size.  The header is written last, and is the switch: one sector, so
 * that a crash leaves the old image or the new one, and leaked clusters at most.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "image/image.h"
#include "lib/util.h"

struct grower {
	struct image *img;
	const struct growth *g;
	struct qcow2_geometry geo;	/* the new one */
	uint64_t cs, unit;
	/*
	 * What new units become.  Nothing is to be seen there of the backing
	 * file, so units up to its end are made zero, and the others stay
	 * unallocated.  With a raw data file all are data.
	 */
	bool raw;
	uint64_t zero_end;
	/* The last old unit, if it is cut by the old size: what becomes of it. */
	bool cut_is_data;
	__be64 *l1;			/* the new table */
	bool l1_moves;
	uint64_t l1_clusters;		/* of a new place for it */
	uint64_t new_tables;
	uint64_t at;			/* next cluster of those that were taken */
};

static uint64_t start_of(uint64_t v, uint64_t unit)
{
	return v & ~(unit - 1);
}

static uint64_t end_of(uint64_t v, uint64_t unit)
{
	return (v + unit - 1) & ~(unit - 1);
}

/*
 * A bitmap whose table does not have just the entries that the size needs is
 * not loaded by QEMU.  One that is in use is not valid in any case.
 */
static int check_bitmap(const struct bitmap *b, void *arg)
{
	const struct grower *w = arg;
	uint64_t bits = div_up(w->geo.size, 1ULL << b->granularity_bits);

	if (b->flags & BITMAP_IN_USE ||
	    div_up(div_up(bits, 8), w->cs) == b->table_size)
		return 0;
	return fail(EX_WRONG,
		    "%s: bitmap %s would have to grow, too, which is not supported; remove it with qemu-img bitmap --remove, and add it again",
		    esc(w->img->node.path), escn(b->name.s, b->name.len));
}

static int check_bitmaps(struct grower *w)
{
	struct image *img = w->img;
	const char *why;
	int ret;

	if (!image_has_bitmaps(img))
		return 0;
	ret = image_load_bitmaps(img, &why);
	if (!ret)
		ret = bitmaps_parse(img->bitmap_dir, img->h.bitmap_dir_size,
				    img->h.bitmap_count, img->h.cluster_bits,
				    check_bitmap, w, &why);
	else
		ret = -1;
	if (ret < 0)
		return fail(EX_WRONG, "%s: %s; remove the bitmaps with qemu-img",
			    esc(img->node.path), why);
	return ret;
}

/* Can there be an image of that size at all? */
static int check_size(struct grower *w)
{
	uint64_t needed;

	if (w->geo.size > QCOW2_MAX_OFFSET)
		return fail(EX_WRONG, "%s; give a smaller --size",
			    qcow2_fault_str(QCOW2_FAULT_SIZE_BIG));
	needed = qcow2_l1_entries_needed(&w->geo);
	if (needed > QCOW2_MAX_L1_ENTRIES)
		return fail(EX_WRONG,
			    "%s: with clusters of %s an image can have at most %s; give a smaller --size, or convert it to larger clusters",
			    esc(w->img->node.path), human_size(w->cs),
			    human_size((uint64_t)QCOW2_MAX_L1_ENTRIES <<
				       qcow2_l2_cover_bits(&w->geo)));
	w->geo.l1_entries = max_u64(needed, w->geo.l1_entries);
	return 0;
}

static uint64_t l2_offset(const struct grower *w, uint64_t i)
{
	return i < w->img->geo.l1_entries ?
	       be64_to_cpu(w->img->l1[i]) & QCOW2_OFFSET_MASK : 0;
}

static int read_failed(const struct grower *w, int err)
{
	errno = -err;
	return fail_errno("%s: cannot read its metadata",
			  esc(w->img->node.path));
}

static int write_failed(const struct node *node, int err)
{
	errno = -err;
	return fail_errno("%s: cannot write it", esc(node->path));
}

/* State of the unit at @pos; tables that are faulty are refused. */
static int unit_state(const struct grower *w, uint64_t pos,
		      enum qcow2_state *state)
{
	const struct qcow2_geometry *g = &w->geo;
	unsigned int words = g->ext_l2 ? 2 : 1;
	uint64_t off = l2_offset(w, pos >> qcow2_l2_cover_bits(g));
	uint64_t entries = w->cs / (8 * words), index;
	uint64_t guest = start_of(pos, w->cs);
	enum qcow2_fault fault;
	struct qcow2_ext_entry e;
	__be64 entry[2] = { 0, 0 };
	int ret;

	*state = QCOW2_UNALLOCATED;
	if (!off)
		return 0;
	index = (pos >> g->cluster_bits) & (entries - 1);
	ret = node_read(&w->img->node, entry, 8 * words,
		      off + index * 8 * words);
	if (ret)
		return read_failed(w, ret);
	if (g->ext_l2) {
		e = qcow2_ext_entry(be64_to_cpu(entry[0]),
				    be64_to_cpu(entry[1]));
		fault = qcow2_l2_ext_check(&e, guest, g->cluster_bits);
		*state = qcow2_ext_state(&e, (pos - guest) / w->unit);
	} else {
		fault = qcow2_l2_decode(be64_to_cpu(entry[0]), guest,
					g->cluster_bits, state);
	}
	if (fault)
		return fail(EX_WRONG,
			    "%s: corrupt image: L2 entry of offset %llu: %s; see what qcow2setup check says, and restore it from a backup",
			    esc(w->img->node.path), (unsigned long long)guest,
			    qcow2_fault_str(fault));
	return 0;
}

/* Write @len bytes from @buf, or zeros, to the data at @off. */
static int write_data(const struct grower *w, const void *buf, uint64_t off,
		      uint64_t len)
{
	uint8_t *zeros = NULL;
	int ret;

	if (!buf) {
		zeros = calloc(1, len);
		if (!zeros)
			return fail_nomem();
	}
	ret = write_at(w->g->data->fd, buf ? buf : zeros, len, off);
	free(zeros);
	return ret ? write_failed(w->g->data, ret) : 0;
}

/* Fetch what the old part of the cut unit reads as from the backing file. */
static int copy_cut(const struct grower *w, uint64_t start, uint64_t len)
{
	const struct node *b = w->g->backing;
	uint64_t have = b->size > start ? min_u64(len, b->size - start) : 0;
	uint8_t *buf = calloc(1, len);
	int ret;

	if (!buf)
		return fail_nomem();
	ret = have ? node_read(b, buf, have, start) : 0;
	if (ret) {
		errno = -ret;
		ret = fail_errno("%s: cannot read it", esc(b->path));
	} else {
		ret = write_data(w, buf, start, len);
	}
	free(buf);
	return ret;
}

/*
 * The old size may end within a unit, whose rest now comes to be seen.  That of
 * a data unit holds whatever the data file has there; that of an unallocated
 * one, what the backing file has.
 */
static int fill_cut_unit(struct grower *w)
{
	uint64_t old = w->img->geo.size, start = start_of(old, w->unit);
	uint64_t end = min_u64(end_of(old, w->unit), w->geo.size);
	enum qcow2_state state;
	int ret;

	if (start == old || w->raw)
		return 0;
	ret = unit_state(w, start, &state);
	if (ret)
		return ret;
	if (state == QCOW2_ZERO ||
	    (state == QCOW2_UNALLOCATED && w->g->backing_size <= old))
		return 0;
	if (!w->g->data)
		return fail(EX_PARAMETER,
			    "%s: what follows the old end must be cleared in the data; give --data-file DEV|FILE",
			    esc(w->img->node.path));
	if (state == QCOW2_UNALLOCATED) {
		if (!w->g->backing)
			return fail(EX_WRONG,
				    "%s: the end of the image shows its backing file, in a part of a cluster; open it, and resize the open device",
				    esc(w->img->node.path));
		ret = copy_cut(w, start, old - start);
		w->cut_is_data = true;
	}
	if (!ret)
		ret = write_data(w, NULL, old, end - old);
	if (!ret && fsync(w->g->data->fd))
		ret = write_failed(w->g->data, -errno);
	return ret;
}

/* Set the unit at @pos, in the L2 table for what begins at @base. */
static void set_unit(const struct grower *w, __be64 *table, uint64_t base,
		     uint64_t pos, enum qcow2_state state)
{
	uint64_t index = (pos - base) >> w->geo.cluster_bits;
	uint64_t guest = start_of(pos, w->cs), bitmap;
	unsigned int bit;

	if (!w->geo.ext_l2) {
		table[index] = state == QCOW2_DATA ?
			       cpu_to_be64(qcow2_l2_data_entry(guest)) :
			       state == QCOW2_ZERO ?
			       cpu_to_be64(QCOW2_OFLAG_ZERO) : 0;
		return;
	}
	/* the low half of the bitmap says data, the high one zero */
	bit = (pos - guest) / w->unit;
	bitmap = be64_to_cpu(table[2 * index + 1]);
	bitmap &= ~(1ULL << bit | 1ULL << (bit + 32));
	if (state == QCOW2_DATA) {
		bitmap |= 1ULL << bit;
		table[2 * index] = cpu_to_be64(qcow2_l2_data_entry(guest));
	} else if (state == QCOW2_ZERO) {
		bitmap |= 1ULL << (bit + 32);
	}
	if (!(uint32_t)bitmap)
		table[2 * index] = 0;
	table[2 * index + 1] = cpu_to_be64(bitmap);
}

/* All units of one L2 table that are new, or were cut. */
static void set_units(const struct grower *w, __be64 *table, uint64_t base)
{
	uint64_t old = w->img->geo.size;
	uint64_t end = base + (1ULL << qcow2_l2_cover_bits(&w->geo));
	uint64_t pos = max_u64(base, end_of(old, w->unit));

	if (w->cut_is_data && start_of(old, w->unit) >= base &&
	    start_of(old, w->unit) < end)
		set_unit(w, table, base, start_of(old, w->unit), QCOW2_DATA);
	for (; pos < end; pos += w->unit) {
		enum qcow2_state state = QCOW2_UNALLOCATED;

		/* Entries behind the new end may be anything, and stay. */
		if (pos >= w->geo.size)
			break;
		if (w->raw)
			state = QCOW2_DATA;
		else if (pos < w->zero_end)
			state = QCOW2_ZERO;
		set_unit(w, table, base, pos, state);
	}
}

/* Must there be an L2 table for what begins at @base? */
static bool needs_table(const struct grower *w, uint64_t base)
{
	return w->raw || base < w->zero_end ||
	       (w->cut_is_data && base <= w->img->geo.size);
}

/* First L1 entry that has to do with the new area. */
static uint64_t first_table(const struct grower *w)
{
	return start_of(w->img->geo.size, w->unit) >>
	       qcow2_l2_cover_bits(&w->geo);
}

static int count_tables(struct grower *w)
{
	unsigned int cover = qcow2_l2_cover_bits(&w->geo);
	uint64_t needed = qcow2_l1_entries_needed(&w->geo), i;

	w->new_tables = 0;
	for (i = first_table(w); i < needed; i++)
		if (needs_table(w, i << cover) && !l2_offset(w, i))
			w->new_tables++;
	return 0;
}

/* Tables that do not exist yet: nothing refers to them before the switch. */
static int write_new_tables(struct grower *w)
{
	unsigned int cover = qcow2_l2_cover_bits(&w->geo);
	uint64_t needed = qcow2_l1_entries_needed(&w->geo), i;
	__be64 *table = malloc(w->cs);
	int ret = 0;

	if (!table)
		return fail_nomem();
	for (i = first_table(w); !ret && i < needed; i++) {
		if (l2_offset(w, i) || !needs_table(w, i << cover))
			continue;
		memset(table, 0, w->cs);
		set_units(w, table, i << cover);
		w->l1[i] = cpu_to_be64(w->at * w->cs | QCOW2_OFLAG_COPIED);
		ret = write_at(w->img->node.fd, table, w->cs, w->at * w->cs);
		if (ret)
			ret = write_failed(&w->img->node, ret);
		w->at++;
	}
	free(table);
	return ret;
}

/* Tables that exist: what they say about the new area is not valid any more. */
static int change_old_tables(struct grower *w)
{
	unsigned int cover = qcow2_l2_cover_bits(&w->geo);
	uint64_t needed = qcow2_l1_entries_needed(&w->geo), i, off;
	__be64 *table = malloc(w->cs), *was = malloc(w->cs);
	int ret = 0;

	if (!table || !was)
		ret = fail_nomem();
	for (i = first_table(w); !ret && i < needed; i++) {
		off = l2_offset(w, i);
		if (!off)
			continue;
		ret = node_read(&w->img->node, was, w->cs, off);
		if (ret) {
			ret = read_failed(w, ret);
			break;
		}
		memcpy(table, was, w->cs);
		set_units(w, table, i << cover);
		if (!memcmp(table, was, w->cs))
			continue;
		if (!(be64_to_cpu(w->img->l1[i]) & QCOW2_OFLAG_COPIED))
			ret = fail(EX_WRONG,
				   "%s: L2 table %llu is shared; repair the image with qcow2setup check --repair all",
				   esc(w->img->node.path),
				   (unsigned long long)i);
		else
			ret = image_change(w->img, table, w->cs, off);
	}
	free(table);
	free(was);
	return ret;
}

/* Can the table become longer where it is?  Its last cluster is its own. */
static void plan_l1(struct grower *w)
{
	uint64_t have = div_up((uint64_t)w->img->geo.l1_entries * 8, w->cs);
	uint64_t need = div_up((uint64_t)w->geo.l1_entries * 8, w->cs);

	w->l1_moves = need > have;
	w->l1_clusters = w->l1_moves ? need : 0;
}

static int write_l1(struct grower *w)
{
	uint64_t len = (uint64_t)w->geo.l1_entries * 8;
	uint64_t from = min_u64(first_table(w), w->img->geo.l1_entries) * 8;
	int ret;

	if (!w->l1_moves)
		return len == from ? 0 :
		       image_change(w->img, (uint8_t *)w->l1 + from,
				    len - from, w->geo.l1_offset + from);
	ret = write_at(w->img->node.fd, w->l1, w->l1_clusters * w->cs,
		       w->geo.l1_offset);
	return ret ? write_failed(&w->img->node, ret) : 0;
}

/* Take the clusters for new tables and L1, and fill them. */
static int build(struct grower *w)
{
	struct image *img = w->img;
	uint64_t end;
	int ret;

	/* whole clusters, so that the rest of the last one is zeros */
	w->l1 = calloc(div_up((uint64_t)w->geo.l1_entries * 8, w->cs) + 1,
		       w->cs);
	if (!w->l1)
		return fail_nomem();
	memcpy(w->l1, img->l1, (size_t)img->geo.l1_entries * 8);
	if (w->new_tables + w->l1_clusters) {
		ret = image_end(img, &end);
		if (ret)
			return ret;
		w->at = end / w->cs;
		ret = image_take_clusters(img, w->at,
					  w->new_tables + w->l1_clusters);
		if (ret)
			return ret;
	}
	if (w->l1_moves) {
		w->geo.l1_offset = w->at * w->cs;
		w->at += w->l1_clusters;
	}
	ret = write_new_tables(w);
	/* An entry must not name a table before that is initialised. */
	if (!ret)
		ret = image_sync(img);
	if (!ret)
		ret = change_old_tables(w);
	if (!ret)
		ret = write_l1(w);
	return ret ? ret : image_sync(img);
}

static int switch_over(struct grower *w)
{
	uint64_t old_at = w->img->geo.l1_offset / w->cs;
	uint64_t old = div_up((uint64_t)w->img->geo.l1_entries * 8, w->cs);
	struct image *img = w->img;
	int ret;

	img->h.raw.size = cpu_to_be64(w->geo.size);
	img->h.raw.l1_size = cpu_to_be32(w->geo.l1_entries);
	img->h.raw.l1_table_offset = cpu_to_be64(w->geo.l1_offset);
	ret = image_change_header(img);
	if (ret)
		return ret;
	img->h.size = w->geo.size;
	img->geo = w->geo;
	free(img->l1);
	img->l1 = w->l1;
	w->l1 = NULL;
	return w->l1_moves ? image_put_clusters(img, old_at, old) : 0;
}

int image_grow(struct image *img, const struct growth *g)
{
	struct room room = { .size = g->size };
	struct grower w = {
		.img = img, .g = g, .geo = img->geo,
		.cs = 1ULL << img->geo.cluster_bits,
		.unit = 1ULL << qcow2_unit_bits(&img->geo),
		.raw = img->h.autoclear & QCOW2_AUTOCLEAR_RAW_DATA,
	};
	int ret;

	w.geo.size = g->size;
	if (g->size == img->geo.size)
		return image_make_room(img, &room);
	if (g->backing_size > img->geo.size)
		w.zero_end = min_u64(g->size, g->backing_size);
	ret = check_size(&w);
	if (!ret)
		ret = check_bitmaps(&w);
	if (!ret) {
		plan_l1(&w);
		room.more = w.l1_clusters;
		room.required = true;
		ret = image_make_room(img, &room);
	}
	/* The refcount table may have moved. */
	w.geo.reftable_offset = img->geo.reftable_offset;
	w.geo.reftable_clusters = img->geo.reftable_clusters;
	if (!ret)
		ret = fill_cut_unit(&w);
	if (!ret)
		ret = count_tables(&w);
	if (!ret)
		ret = build(&w);
	if (!ret)
		ret = switch_over(&w);
	free(w.l1);
	return ret;
}
