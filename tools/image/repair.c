// SPDX-License-Identifier: GPL-2.0-or-later
#include <errno.h>
#include <inttypes.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "image/extents.h"
#include "image/plan.h"
#include "image/repair.h"
#include "lib/util.h"

#define SECTOR	512

static uint64_t cluster_size(const struct image *img)
{
	return 1ULL << img->geo.cluster_bits;
}

static int failed(const struct image *img, int err)
{
	errno = err;
	return fail_errno("%s: cannot repair its metadata", esc(img->node.path));
}

static int sync_image(const struct image *img)
{
	if (fsync(img->node.fd))
		return failed(img, errno);
	node_drop_cache(&img->node);
	return 0;
}

/* All that ever changes in the header lies in its first sector. */
static int write_header(struct image *img)
{
	int ret;

	memcpy(img->first, &img->h.raw,
	       min_u64(img->h.header_length, sizeof(img->h.raw)));
	ret = write_at(img->node.fd, img->first, SECTOR, 0);
	return ret ? failed(img, -ret) : sync_image(img);
}

static int keep_autoclear(struct image *img, uint64_t keep)
{
	if (!(img->h.autoclear & ~keep))
		return 0;
	img->h.autoclear &= keep;
	img->h.raw.autoclear_features = cpu_to_be64(img->h.autoclear);
	return write_header(img);
}

/* Whoever writes to an image must clear what he does not know. */
static int clear_autoclear(struct image *img)
{
	return keep_autoclear(img, QCOW2_AUTOCLEAR_KNOWN);
}

int repair_bitmaps(struct image *img)
{
	return keep_autoclear(img, QCOW2_AUTOCLEAR_KNOWN &
				   ~QCOW2_AUTOCLEAR_BITMAPS);
}

int repair_marks(struct image *img)
{
	uint64_t marks = QCOW2_INCOMPAT_DIRTY | QCOW2_INCOMPAT_CORRUPT;
	int ret;

	if (!(img->h.incompatible & marks))
		return 0;
	ret = clear_autoclear(img);
	if (ret)
		return ret;
	img->h.incompatible &= ~marks;
	img->h.raw.incompatible_features = cpu_to_be64(img->h.incompatible);
	return write_header(img);
}

/*
 * What a refcount should be.  Of a cluster that is used twice nobody can say
 * who is right, but it is not free.
 */
static uint64_t right_count(const struct verify *v, uint64_t users,
			    uint64_t stored)
{
	if (v->uncertain || users > 1)
		return max_u64(stored, users > 0);
	return users;
}

static void set_count(const struct verify *v, const struct counted *c,
		      uint64_t count)
{
	if (c->block)
		qcow2_refcount_set(c->block, c->i, v->img->geo.refcount_order,
				   count);
}

static void raise_count(struct verify *v, const struct counted *c, void *arg)
{
	uint64_t right = right_count(v, c->group.n, c->stored);

	(void)arg;
	if (right > c->stored)
		set_count(v, c, right);
}

static void lower_count(struct verify *v, const struct counted *c, void *arg)
{
	uint64_t right = right_count(v, c->group.n, c->stored);

	(void)arg;
	if (right >= c->stored || !c->block ||
	    !verify_alone(v, c->block_off))
		return;
	set_count(v, c, right);
	if (c->group.n)
		c->group.ref->lowered = true;
}

static int change_refcounts(struct verify *v, counted_fn *fn)
{
	int ret = verify_refcounts(v, true, fn, NULL);

	return ret ? failed(v->img, -ret) : sync_image(v->img);
}

/* An L1 entry with nothing but COPIED: there is no table that it is true of. */
static int empty_entries(struct verify *v)
{
	struct image *img = v->img;
	const __be64 none = 0;
	uint32_t i;
	int ret;

	for (i = 0; i < img->geo.l1_entries; i++) {
		uint64_t at = img->geo.l1_offset + i * 8ULL;

		/*
		 * Unless something else is there, too: then it may be that's.
		 * The file may end behind the last entry.
		 */
		if (be64_to_cpu(img->l1[i]) != QCOW2_OFLAG_COPIED ||
		    !verify_once(v, at & ~((1ULL << img->geo.cluster_bits) - 1)))
			continue;
		ret = write_at(img->node.fd, &none, sizeof(none), at);
		if (ret)
			return failed(img, -ret);
	}
	return sync_image(img);
}

/*
 * COPIED says that a cluster has one user: set it where that is so.  It is so
 * for every table that only one L1 entry names, once its refcount is right;
 * with @lowered only those whose refcount has just become 1 are looked at.
 */
static int copied_tables(struct verify *v, bool lowered)
{
	struct image *img = v->img;
	struct ref_group group;
	size_t i = 0;
	int ret;

	while (refs_next(&v->refs, &i, &group)) {
		uint32_t index = group.ref->index;
		uint64_t entry, off;

		if (group.ref->kind != REF_L2 || group.n != 1 ||
		    !verify_l2(v, index, &off) ||
		    (lowered && !group.ref->lowered))
			continue;
		entry = be64_to_cpu(img->l1[index]);
		if (entry & (QCOW2_OFLAG_COPIED | QCOW2_L1_RESERVED))
			continue;
		img->l1[index] = cpu_to_be64(entry | QCOW2_OFLAG_COPIED);
		ret = write_at(img->node.fd, &img->l1[index], 8,
			       img->geo.l1_offset + index * 8ULL);
		if (ret)
			return failed(img, -ret);
	}
	return sync_image(img);
}

/*
 * Set COPIED in all entries that are good but for that.  Returns how many bytes
 * from the start of the table are to be written.
 */
static size_t copied_entries(const struct qcow2_geometry *g, uint32_t index,
			     __be64 *table)
{
	uint64_t guest = (uint64_t)index << qcow2_l2_cover_bits(g);
	unsigned int words = g->ext_l2 ? 2 : 1;
	uint32_t n = l2_entries(g), i;
	enum qcow2_state state;
	size_t changed = 0;

	for (i = 0; i < n; i++, guest += 1ULL << g->cluster_bits) {
		struct qcow2_ext_entry e = l2_entry(g, table, i);

		if (!(e.entry & QCOW2_OFFSET_MASK) ||
		    e.entry & QCOW2_OFLAG_COPIED)
			continue;
		if (g->ext_l2 ? qcow2_l2_ext_check(&e, guest, g->cluster_bits) :
		    qcow2_l2_decode(e.entry, guest, g->cluster_bits, &state))
			continue;
		table[(size_t)i * words] =
			cpu_to_be64(e.entry | QCOW2_OFLAG_COPIED);
		changed = ((size_t)i + 1) * words * 8;
	}
	return changed;
}

static int copied_data(struct verify *v)
{
	struct image *img = v->img;
	__be64 *table = malloc(cluster_size(img));
	struct ref_group group;
	size_t i = 0, len;
	uint64_t off;
	int ret = 0;

	if (!table)
		return fail_nomem();
	while (!ret && refs_next(&v->refs, &i, &group)) {
		if (group.ref->kind != REF_L2 || group.n != 1 ||
		    !verify_l2(v, group.ref->index, &off) ||
		    !verify_alone(v, off))
			continue;
		ret = verify_read(v, table, cluster_size(img), off);
		if (ret)
			break;
		len = copied_entries(&img->geo, group.ref->index, table);
		if (len)
			ret = write_at(img->node.fd, table, len, off);
	}
	free(table);
	return ret ? failed(img, -ret) : sync_image(img);
}

struct rest {
	struct verify *v;
	uint8_t *buf;
	int ret;
};

static int clear_rest(const struct bitmap *b, void *arg)
{
	struct rest *r = arg;
	struct verify *v = r->v;
	uint64_t off;

	if (verify_bitmap_rest(v, b, r->buf, &off) && verify_alone(v, off))
		r->ret = write_at(v->img->node.fd, r->buf, cluster_size(v->img),
				  off);
	return r->ret;
}

/* Bits of bitmaps that lie behind the end of the disk */
static int clear_rests(struct verify *v)
{
	struct rest r = { .v = v, .buf = malloc(cluster_size(v->img)) };
	struct image *img = v->img;
	const char *why;

	if (!r.buf)
		return fail_nomem();
	if (image_has_bitmaps(img) && img->bitmap_dir)
		bitmaps_parse(img->bitmap_dir, img->h.bitmap_dir_size,
			      img->h.bitmap_count, img->h.cluster_bits,
			      clear_rest, &r, &why);
	free(r.buf);
	return r.ret ? failed(img, -r.ret) : sync_image(img);
}

/*
 * New refcount table and blocks
 */

struct rebuild {
	uint64_t at;			/* cluster of the new table */
	uint64_t table_clusters, blocks;
	uint64_t entries;		/* of the new table */
	__be64 *table;
	/* while blocks are written */
	uint8_t *block;
	uint64_t index;			/* of the entry @block belongs to */
	int ret;
};

/* Users of a cluster once the old table and its blocks are gone. */
static uint64_t users_left(const struct ref_group *group)
{
	uint64_t n = 0;
	size_t i;

	for (i = 0; i < group->n; i++)
		n += group->ref[i].kind != REF_REFTABLE &&
		     group->ref[i].kind != REF_BLOCK;
	return n;
}

/* Mark the entry of the block that counts a cluster: it must exist. */
static void need_block(struct rebuild *r, uint64_t index)
{
	if (index >= r->entries) {
		r->ret = -EFBIG;
	} else if (!r->table[index]) {
		r->table[index] = 1;
		r->blocks++;
	}
}

static void need_for(struct verify *v, const struct counted *c, void *arg)
{
	if (right_count(v, users_left(&c->group), c->stored))
		need_block(arg, c->cluster / refcounts_per_block(&v->img->geo));
}

/* Choose place and size; the table and its blocks count themselves. */
static int plan_rebuild(struct verify *v, struct rebuild *r)
{
	const struct qcow2_geometry *g = &v->img->geo;
	uint64_t per_block = refcounts_per_block(g), i, last;
	uint64_t cs = cluster_size(v->img);
	int ret;

	r->entries = QCOW2_MAX_REFTABLE_BYTES / 8;
	r->table = calloc(r->entries, 8);
	r->block = malloc(cs);
	if (!r->table || !r->block)
		return fail_nomem();
	ret = verify_refcounts(v, false, need_for, r);
	if (ret)
		return failed(v->img, -ret);

	/* Where there is nothing, not even what has lost its entry. */
	r->at = v->img->node.bdev ? v->image_end / cs : v->clusters;
	r->table_clusters = max_u64(g->reftable_clusters, 1);
	do {
		last = r->table_clusters + r->blocks;
		for (i = r->at / per_block;
		     !r->ret && i <= (r->at + last - 1) / per_block; i++)
			need_block(r, i);
		i = div_up(div_up(r->at + r->table_clusters + r->blocks,
				  per_block), blocks_per_reftable_cluster(g));
		r->table_clusters = max_u64(r->table_clusters, i);
	} while (!r->ret && r->table_clusters + r->blocks != last);
	if (r->ret || r->table_clusters > QCOW2_MAX_REFTABLE_BYTES / cs)
		return fail(EX_WRONG,
			    "%s: no refcount table could reach all of its metadata; make another image: " QEMU_CONVERT,
			    esc(v->img->node.path),
			    shell_quote(v->img->node.path));
	if (v->img->node.bdev &&
	    r->at + r->table_clusters + r->blocks > v->img->node.size / cs)
		return fail(EX_WRONG,
			    "%s: device has no room for new refcounts, which need %s behind byte %" PRIu64 "; enlarge it",
			    esc(v->img->node.path),
			    human_size((r->table_clusters + r->blocks) * cs),
			    r->at * cs);
	return 0;
}

/* Write the block that is complete, and begin the one that entry @index needs. */
static void next_block(struct verify *v, struct rebuild *r, uint64_t index)
{
	uint64_t cs = cluster_size(v->img);

	if (r->index != UINT64_MAX && !r->ret)
		r->ret = write_at(v->img->node.fd, r->block, cs,
				  be64_to_cpu(r->table[r->index]));
	memset(r->block, 0, cs);
	r->index = index;
}

/* Set counts of the new structures themselves up to cluster @end. */
static void fill_own(struct verify *v, struct rebuild *r, uint64_t *own,
		     uint64_t end)
{
	uint64_t per_block = refcounts_per_block(&v->img->geo);

	for (; *own < end; ++*own) {
		if (r->index != *own / per_block)
			next_block(v, r, *own / per_block);
		qcow2_refcount_set(r->block, *own % per_block,
				   v->img->geo.refcount_order, 1);
	}
}

static void fill_count(struct verify *v, const struct counted *c, void *arg)
{
	uint64_t per_block = refcounts_per_block(&v->img->geo);
	uint64_t count = right_count(v, users_left(&c->group), c->stored);
	struct rebuild *r = arg;

	if (!count)
		return;
	if (r->index != c->cluster / per_block)
		next_block(v, r, c->cluster / per_block);
	qcow2_refcount_set(r->block, c->cluster % per_block,
			   v->img->geo.refcount_order, count);
}

static int write_rebuild(struct verify *v, struct rebuild *r)
{
	struct image *img = v->img;
	uint64_t cs = cluster_size(img), next, own, i;
	int ret;

	next = r->at + r->table_clusters;
	for (i = 0; i < r->entries; i++)
		if (r->table[i])
			r->table[i] = cpu_to_be64(next++ * cs);
	if (!img->node.bdev) {
		if (ftruncate(img->node.fd, next * cs))
			return failed(img, errno);
		img->node.size = next * cs;
	}
	own = r->at;
	r->index = UINT64_MAX;
	/* All others lie before the new structures. */
	ret = verify_refcounts(v, false, fill_count, r);
	if (ret)
		return failed(img, -ret);
	fill_own(v, r, &own, next);
	next_block(v, r, UINT64_MAX);
	if (!r->ret)
		r->ret = write_at(img->node.fd, r->table, r->table_clusters * cs,
				  r->at * cs);
	if (r->ret)
		return failed(img, -r->ret);
	ret = sync_image(img);
	if (ret)
		return ret;
	img->h.raw.refcount_table_offset = cpu_to_be64(r->at * cs);
	img->h.raw.refcount_table_clusters = cpu_to_be32(r->table_clusters);
	return write_header(img);
}

static int rebuild_refcounts(struct verify *v)
{
	struct rebuild r = { .ret = 0 };
	int ret;

	note("%s: refcount table and blocks are made anew",
	     esc(v->img->node.path));
	ret = plan_rebuild(v, &r);
	if (!ret)
		ret = write_rebuild(v, &r);
	free(r.table);
	free(r.block);
	return ret;
}

static void tell_uncertain(const struct verify *v)
{
	if (v->leaks && v->uncertain)
		fail(0, "%s: leaked clusters are not freed: not all that is in use is known; repair the rest first",
		     esc(v->img->node.path));
}

int repair_leaks(struct verify *v)
{
	int ret;

	tell_uncertain(v);
	if (v->uncertain)
		return 0;
	ret = clear_autoclear(v->img);
	if (!ret)
		ret = change_refcounts(v, lower_count);
	return ret ? ret : copied_tables(v, true);
}

int repair_all(struct verify *v)
{
	struct image *img = v->img;
	uint64_t end = v->clusters * cluster_size(img);
	int ret;

	ret = clear_autoclear(img);
	if (!ret && v->cut && !img->node.bdev) {
		/* As everybody reads it who does not mind. */
		if (ftruncate(img->node.fd, end))
			return failed(img, errno);
		img->node.size = end;
		ret = sync_image(img);
	}
	tell_uncertain(v);
	if (!ret && v->rebuild)
		ret = rebuild_refcounts(v);
	else if (!ret)
		ret = change_refcounts(v, raise_count);
	if (!ret && !v->rebuild && !v->uncertain)
		ret = change_refcounts(v, lower_count);
	if (!ret)
		ret = empty_entries(v);
	if (!ret)
		ret = clear_rests(v);
	/* Without right refcounts nobody can tell. */
	if (!ret && !v->uncertain)
		ret = copied_tables(v, false);
	return ret ? ret : copied_data(v);
}
