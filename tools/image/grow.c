// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Give an image a larger virtual size.  Everything that the new size needs is
 * written first, where nothing reads it: behind the end, or behind the old
 * virtual size.  The header is written last, and is the switch: one sector, so
 * that a crash leaves the old image or the new one, and leaked clusters at most.
 *
 * While the image is live, new tables are written behind all that the kernel can
 * come to use.  It may add L2 tables and refcount blocks of the old area meanwhile:
 * when it is at rest, the new L1 and refcount tables take these over.  The L2 table
 * that has the old end in it is its as well, and is made then if it is not there.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "image/area.h"
#include "image/bitmaps.h"
#include "image/image.h"
#include "lib/interrupt.h"
#include "lib/progress.h"
#include "lib/util.h"

/* So much is written while the image is at rest, and lies closer. */
#define FEW_CLUSTERS	8
#define FEW_BYTES	MIB
/* Written at a time, and made durable: a signal is seen in between. */
#define PIECE		MIB
#define SYNC_PIECES	8
#define SECTOR		512

struct grower {
	struct image *img;
	const struct growth *g;
	bool live;
	bool later;			/* nothing was written: it is little */
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
	uint64_t old_size;
	__be64 *l1;			/* the new table */
	bool l1_moves;
	uint64_t l1_clusters;		/* of a new place for it */
	uint64_t new_tables;
	struct area area;		/* L1, L2 tables */
	struct bitmaps bitmaps;
};

static uint64_t start_of(uint64_t v, uint64_t unit)
{
	return v & ~(unit - 1);
}

static uint64_t end_of(uint64_t v, uint64_t unit)
{
	return (v + unit - 1) & ~(unit - 1);
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
			    "%s: with clusters of %s an image can have at most %s; give a smaller --size, or make an image with larger clusters: " QEMU_CONVERT,
			    esc(w->img->node.path), human_size(w->cs),
			    human_size((uint64_t)QCOW2_MAX_L1_ENTRIES <<
				       qcow2_l2_cover_bits(&w->geo)),
			    shell_quote(w->img->node.path));
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

/*
 * Is it the kernel's, too, while the image is live?  If it has to be made, it comes
 * first.
 */
static bool has_old_end(const struct grower *w, uint64_t i)
{
	return (i << qcow2_l2_cover_bits(&w->geo)) < w->old_size;
}

static bool must_be_made(const struct grower *w, uint64_t i)
{
	return needs_table(w, i << qcow2_l2_cover_bits(&w->geo)) &&
	       !l2_offset(w, i);
}

static void count_tables(struct grower *w)
{
	uint64_t needed = qcow2_l1_entries_needed(&w->geo), i;

	w->new_tables = 0;
	for (i = first_table(w); i < needed; i++)
		if (must_be_made(w, i))
			w->new_tables++;
}

static int sync_area(const struct grower *w)
{
	if (interrupted())
		return EX_WRONG;
	return fsync(w->img->node.fd) ?
	       write_failed(&w->img->node, -errno) : 0;
}

/*
 * Tables that do not exist yet: nothing refers to them before the switch.  What the
 * kernel may make is left out.
 */
static int write_new_tables(struct grower *w)
{
	unsigned int cover = qcow2_l2_cover_bits(&w->geo), pieces = 0;
	uint64_t needed = qcow2_l1_entries_needed(&w->geo), i;
	uint64_t at = w->area.from + w->l1_clusters, first, n = 0;
	uint64_t most = max_u64(PIECE / w->cs, 1), done = 0;
	uint8_t *buf = malloc(most * w->cs);
	int ret = 0;

	if (!buf)
		return fail_nomem();
	first = at;
	for (i = first_table(w); !ret && i < needed; i++) {
		__be64 *table = (__be64 *)(buf + n * w->cs);

		if (must_be_made(w, i)) {
			memset(table, 0, w->cs);
			if (!has_old_end(w, i)) {
				set_units(w, table, i << cover);
				w->l1[i] = cpu_to_be64(at * w->cs |
						       QCOW2_OFLAG_COPIED);
			}
			at++;
			n++;
		}
		if (!n || (n < most && i < needed - 1))
			continue;
		/* It is told of changes when a device is suspended for them. */
		if (!w->img->changing)
			progress("writing tables", done * w->cs,
				 w->new_tables * w->cs);
		ret = write_at(w->img->node.fd, buf, n * w->cs, first * w->cs);
		if (ret)
			ret = write_failed(&w->img->node, ret);
		else if (interrupted())
			ret = EX_WRONG;
		else if (++pieces % SYNC_PIECES == 0)
			ret = sync_area(w);
		done += n;
		first = at;
		n = 0;
	}
	progress_end();
	free(buf);
	return ret;
}

/*
 * The table that has the old end in it.  If it had to be made, and the kernel has
 * not done that, it is made now.
 */
static int make_last_table(struct grower *w, uint64_t *unused)
{
	uint64_t i = first_table(w), at = w->area.from + w->l1_clusters;
	__be64 *table;
	int ret;

	*unused = 0;
	if (!w->new_tables || !has_old_end(w, i) ||
	    !needs_table(w, i << qcow2_l2_cover_bits(&w->geo)) || w->l1[i])
		return 0;
	if (l2_offset(w, i)) {
		*unused = at;
		return 0;
	}
	table = calloc(1, w->cs);
	if (!table)
		return fail_nomem();
	set_units(w, table, i << qcow2_l2_cover_bits(&w->geo));
	w->l1[i] = cpu_to_be64(at * w->cs | QCOW2_OFLAG_COPIED);
	ret = write_at(w->img->node.fd, table, w->cs, at * w->cs);
	free(table);
	return ret ? write_failed(&w->img->node, ret) : 0;
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
				   "%s: L2 table %llu is shared; repair the image with qcow2setup check --repair all %s",
				   esc(w->img->node.path),
				   (unsigned long long)i,
				   shell_quote(w->img->node.path));
		else
			ret = image_change(w->img, table, w->cs, off);
	}
	free(table);
	free(was);
	return ret;
}

/*
 * Can the table become longer where it is?  Its last cluster is its own.  Not if it
 * has been longer before, and much would have to be changed while it is live.
 */
static void plan_l1(struct grower *w)
{
	uint64_t have = div_up((uint64_t)w->img->geo.l1_entries * 8, w->cs);
	uint64_t need = div_up((uint64_t)w->geo.l1_entries * 8, w->cs);
	uint64_t change = qcow2_l1_entries_needed(&w->geo) - first_table(w);

	w->l1_moves = need > have ||
		      (w->live && change * 8 > FEW_CLUSTERS * w->cs);
	w->l1_clusters = w->l1_moves ? need : 0;
}

static int alloc_l1(struct grower *w)
{
	/* whole clusters, so that the rest of the last one is zeros */
	w->l1 = calloc(div_up((uint64_t)w->geo.l1_entries * 8, w->cs) + 1,
		       w->cs);
	if (!w->l1)
		return fail_nomem();
	memcpy(w->l1, w->img->l1, (size_t)w->img->geo.l1_entries * 8);
	return 0;
}

/* What the kernel has added since; and the last table, if that has been made. */
static int take_over_l1(struct grower *w, uint64_t made)
{
	const uint64_t per_sector = SECTOR / 8;
	uint64_t n = qcow2_l1_entries_needed(&w->img->geo), i, k;
	int ret = 0;

	for (i = 0; !ret && i < n; i += per_sector) {
		bool changed = made >= i && made < i + per_sector;

		for (k = i; k < min_u64(i + per_sector, n); k++) {
			if (w->l1[k] == w->img->l1[k] || !w->img->l1[k])
				continue;
			w->l1[k] = w->img->l1[k];
			changed = true;
		}
		if (!changed || !w->l1_moves)
			continue;
		ret = write_at(w->img->node.fd, w->l1 + i, SECTOR,
			       w->geo.l1_offset + i * 8);
		if (ret)
			ret = write_failed(&w->img->node, ret);
	}
	return ret;
}

/* In its place: what is new, when that is there. */
static int change_l1(struct grower *w)
{
	uint64_t from = min_u64(first_table(w), w->img->geo.l1_entries);
	uint64_t to = qcow2_l1_entries_needed(&w->geo);

	if (w->l1_moves || from >= to)
		return 0;
	return image_change(w->img, w->l1 + from, (to - from) * 8,
			    w->geo.l1_offset + from * 8);
}

/* Where nothing refers to it. */
static int write_area(struct grower *w)
{
	int ret;

	ret = write_new_tables(w);
	if (!ret && w->l1_moves) {
		ret = write_at(w->img->node.fd, w->l1, w->l1_clusters * w->cs,
			       w->area.from * w->cs);
		if (ret)
			ret = write_failed(&w->img->node, ret);
	}
	if (!ret)
		ret = area_write(&w->area, w->img);
	return ret ? ret : sync_area(w);
}

/*
 * While the kernel uses the image: is it little enough to be written later?  Else
 * it goes where the kernel does not write, if there is room.
 */
static int choose_place(struct grower *w, struct room *room)
{
	uint64_t n = room->tables + room->more, reftable;
	bool fits;
	int ret;

	ret = image_plan_room(w->img, room, &reftable, &fits);
	/* The blocks for that are one or two. */
	n += reftable + 2;
	w->later = n <= FEW_CLUSTERS && n * w->cs <= FEW_BYTES;
	if (ret || w->later)
		return ret;
	ret = image_live_end(w->img, &room->from);
	if (!ret)
		ret = image_plan_room(w->img, room, &reftable, &fits);
	if (ret || fits)
		return ret;
	/* There is just the room that is needed: later, and slow. */
	w->later = true;
	room->from = 0;
	return 0;
}

static int switch_over(struct grower *w)
{
	uint64_t old_at = w->img->geo.l1_offset / w->cs;
	uint64_t old = div_up((uint64_t)w->img->geo.l1_entries * 8, w->cs);
	struct image *img = w->img;
	int ret;

	/* The refcount table may have moved. */
	w->geo.reftable_offset = img->geo.reftable_offset;
	w->geo.reftable_clusters = img->geo.reftable_clusters;
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

static void setup(struct grower *w)
{
	const struct image *img = w->img;
	uint64_t shown = w->g->backing_size;

	w->geo.size = w->g->size;
	w->old_size = img->geo.size;
	w->cs = 1ULL << img->geo.cluster_bits;
	w->unit = 1ULL << qcow2_unit_bits(&img->geo);
	w->raw = img->h.autoclear & QCOW2_AUTOCLEAR_RAW_DATA;
	if (shown > w->old_size)
		w->zero_end = min_u64(w->geo.size, shown);
}

static int begin(struct grower *w)
{
	struct image *img = w->img;
	struct room room = { .size = w->geo.size, .quiet = w->live };
	uint64_t reftable, bitmaps = 0;
	int ret;

	if (w->geo.size == w->old_size) {
		w->later = true;
		return img->space.fd < 0 ? 0 :
		       image_take_room(img, &room, &w->area.from, &reftable);
	}
	ret = check_size(w);
	if (!ret)
		ret = bitmaps_grow_plan(img, w->geo.size, &bitmaps);
	if (ret)
		return ret;
	plan_l1(w);
	count_tables(w);
	room.more = w->l1_clusters + bitmaps;
	room.tables = w->new_tables;
	room.required = true;
	if (w->live)
		ret = choose_place(w, &room);
	if (!ret)
		ret = image_take_room(img, &room, &w->area.from, &reftable);
	if (ret || w->later)
		return ret;
	w->area.n = w->l1_clusters + w->new_tables;
	w->area.reftable_clusters = reftable;
	if (reftable)
		note("%s: refcount table grows from %u to %llu clusters",
		     esc(img->node.path), img->geo.reftable_clusters,
		     (unsigned long long)reftable);
	if (w->l1_moves)
		w->geo.l1_offset = w->area.from * w->cs;
	ret = alloc_l1(w);
	if (ret || !(w->area.n + reftable))
		return ret;
	ret = area_lay_out(&w->area, img);
	return ret ? ret : write_area(w);
}

int image_grow_begin(struct image *img, const struct growth *g,
		     struct grower **out)
{
	struct grower *w = calloc(1, sizeof(*w));

	*out = w;
	if (!w)
		return fail_nomem();
	*w = (struct grower){
		.img = img, .g = g, .live = true, .geo = img->geo,
	};
	setup(w);
	return begin(w);
}

/* What image_grow_begin() knew must still be true. */
static int adopt(struct grower *w, struct image *img)
{
	const struct qcow2_geometry *was = &w->img->geo;

	if (img->geo.size != was->size ||
	    img->geo.l1_offset != was->l1_offset ||
	    img->geo.l1_entries != was->l1_entries ||
	    img->geo.reftable_offset != was->reftable_offset ||
	    img->geo.reftable_clusters != was->reftable_clusters)
		return fail(EX_BUSY, "%s: was changed meanwhile; try again",
			    esc(img->node.path));
	w->img = img;
	return 0;
}

static int end(struct grower *w)
{
	struct image *img = w->img;
	uint64_t unused = 0, made;
	int ret;

	ret = fill_cut_unit(w);
	if (!ret)
		ret = make_last_table(w, &unused);
	made = first_table(w);
	if (!ret)
		ret = take_over_l1(w, w->l1[made] && !l2_offset(w, made) ?
				      made : UINT64_MAX);
	if (!ret && w->area.table)
		ret = area_count(&w->area, img);
	/* These take clusters: none of the area's. */
	if (!ret)
		ret = bitmaps_grow_begin(&w->bitmaps, img, w->geo.size);
	/* An entry must not name a table before that is initialised. */
	if (!ret)
		ret = image_sync(img);
	if (!ret)
		ret = change_old_tables(w);
	if (!ret)
		ret = change_l1(w);
	if (!ret)
		ret = image_sync(img);
	if (!ret)
		ret = switch_over(w);
	if (!ret && unused)
		ret = image_put_clusters(img, unused, 1);
	return ret ? ret : bitmaps_grow_end(&w->bitmaps);
}

int image_grow_end(struct image *img, struct grower *w)
{
	int ret;

	ret = adopt(w, img);
	if (ret)
		return ret;
	return w->later ? image_grow(img, w->g) : end(w);
}

void image_grow_free(struct grower *w)
{
	if (!w)
		return;
	bitmaps_free(&w->bitmaps);
	free(w->l1);
	area_free(&w->area);
	free(w);
}

int image_grow(struct image *img, const struct growth *g)
{
	struct room room = { .size = g->size };
	struct grower w = { .img = img, .g = g, .geo = img->geo };
	int ret;

	if (g->size == img->geo.size)
		return image_make_room(img, &room);
	setup(&w);
	ret = begin(&w);
	if (!ret)
		ret = end(&w);
	bitmaps_free(&w.bitmaps);
	free(w.l1);
	area_free(&w.area);
	return ret;
}
