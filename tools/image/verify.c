// SPDX-License-Identifier: GPL-2.0-or-later
#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include "image/bits.h"
#include "image/extents.h"
#include "image/plan.h"
#include "image/verify.h"
#include "lib/progress.h"
#include "lib/util.h"

/* More than that nobody reads, unless he asks for it. */
#define FINDINGS_SHOWN	1000

/* Of a LUKS header with its key slots; 2 MiB are usual. */
#define MAX_LUKS	(64U << 20)

static uint64_t cluster_size(const struct verify *v)
{
	return 1ULL << v->img->geo.cluster_bits;
}

static void say(struct verify *v, const char *fmt, ...)
	__attribute__((format(printf, 2, 3)));

/* Was the same said already? */
static bool told_before(struct verify_told *told, const char *text)
{
	uint64_t hash = 1469598103934665603ULL;
	size_t i;

	if (!told)
		return false;
	for (; *text; text++)
		hash = (hash ^ (unsigned char)*text) * 1099511628211ULL;
	for (i = 0; i < told->n; i++)
		if (told->hash[i] == hash)
			return true;
	if (told->n < ARRAY_SIZE(told->hash))
		told->hash[told->n++] = hash;
	return false;
}

static void say(struct verify *v, const char *fmt, ...)
{
	char text[800];
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(text, sizeof(text), fmt, ap);
	va_end(ap);
	if (v->shown >= FINDINGS_SHOWN && !verbose) {
		if (v->shown++ == FINDINGS_SHOWN && !told_before(v->told, "more"))
			fail(0, "%s: more is wrong than is shown; --verbose shows it all",
			     esc(v->img->node.path));
		return;
	}
	if (told_before(v->told, text))
		return;
	v->shown++;
	fail(0, "%s: %s", esc(v->img->node.path), text);
}

/* Cannot be read, or there is no memory for it: told, and counted. */
static void error(struct verify *v, const char *what, int err)
{
	v->errors++;
	v->uncertain = true;
	say(v, "%s cannot be read: %s", what, error_text(-err));
}

static void no_memory(struct verify *v)
{
	error(v, "all of it", -ENOMEM);
}

int verify_read(const struct verify *v, void *buf, size_t len, uint64_t off)
{
	uint64_t size = v->img->node.size;
	size_t n = off < size ? min_u64(len, size - off) : 0;

	memset((uint8_t *)buf + n, 0, len - n);
	return n ? node_read(&v->img->node, buf, n, off) : 0;
}

static void add_ref(struct verify *v, enum ref_kind kind, uint32_t index,
		    uint64_t off, uint64_t len)
{
	if (!refs_add(&v->refs, kind, index, off, len,
		      v->img->geo.cluster_bits))
		no_memory(v);
}

/*
 * Header
 */

/*
 * Faults that QEMU's check lives with are counted, and taken out of a copy of
 * the header: what is left must be good enough to find everything else.
 */
static int get_geometry(struct verify *v)
{
	struct image *img = v->img;
	struct qcow2_header h = img->h.raw;
	struct qcow2_geometry *g = &img->geo, with_table;
	enum qcow2_fault fault;

	/* The metadata of an encrypted image is not encrypted. */
	h.crypt_method = 0;
	if (h.nb_snapshots) {
		h.nb_snapshots = 0;
		v->corruptions++;
		v->uncertain = true;
		say(v, "%s", qcow2_fault_str(QCOW2_FAULT_SNAPSHOTS));
	}
	/* A place for a name, but no name */
	if (!h.backing_file_size)
		h.backing_file_offset = 0;
	fault = qcow2_header_check(&h, true, g);
	if (fault == QCOW2_FAULT_RAW_BACKING) {
		v->corruptions++;
		say(v, "%s", qcow2_fault_str(fault));
		h.backing_file_offset = 0;
		fault = qcow2_header_check(&h, true, g);
	}
	if (!fault)
		fault = qcow2_geometry_check(g, img->node.size);
	switch (fault) {
	case QCOW2_OK:
		v->reftable_entries = (uint64_t)g->reftable_clusters <<
				      (g->cluster_bits - 3);
		return 0;
	case QCOW2_FAULT_REFTABLE_NONE:
	case QCOW2_FAULT_REFTABLE_HEADER:
	case QCOW2_FAULT_REFTABLE_BEYOND:
		/* It can be made again; is all else good? */
		v->corruptions++;
		v->rebuild = true;
		say(v, "%s", qcow2_fault_str(fault));
		with_table = *g;
		with_table.reftable_clusters = 1;
		with_table.reftable_offset =
			align_up(g->l1_offset + (uint64_t)g->l1_entries * 8,
				 1ULL << g->cluster_bits);
		g->reftable_clusters = 0;
		if (!qcow2_geometry_check(&with_table, UINT64_MAX))
			return 0;
		v->stopped = true;
		return 0;
	case QCOW2_FAULT_L1_BEYOND:
	case QCOW2_FAULT_L1_HEADER:
	case QCOW2_FAULT_L1_REFTABLE:
		v->corruptions++;
		v->stopped = true;
		say(v, "%s", qcow2_fault_str(fault));
		return 0;
	case QCOW2_FAULT_NO_DATA_FILE:
	case QCOW2_FAULT_VERSION:
		return fail(EX_WRONG, "%s: %s; use qemu-img check %s",
			    esc(img->node.path), qcow2_fault_str(fault),
			    shell_quote(img->node.path));
	case QCOW2_FAULT_SIZE_ZERO:
		return fail(EX_WRONG, "%s: %s; enlarge it with qemu-img resize -f qcow2 %s SIZE",
			    esc(img->node.path), qcow2_fault_str(fault),
			    shell_quote(img->node.path));
	default:
		return fail(EX_WRONG, "%s: %s; restore it from a backup",
			    esc(img->node.path), qcow2_fault_str(fault));
	}
}

static uint64_t get_be64(const uint8_t *p)
{
	__be64 v;

	memcpy(&v, p, sizeof(v));
	return be64_to_cpu(v);
}

/* Header extensions were found to be well formed when the header was parsed. */
static void collect_luks(struct verify *v)
{
	const struct image *img = v->img;
	size_t at = img->h.header_length, end = cluster_size(v);

	if (img->h.crypt_method != 2)
		return;
	if (img->h.raw.backing_file_offset)
		end = be64_to_cpu(img->h.raw.backing_file_offset);
	while (at + sizeof(struct qcow2_extension) <= end) {
		struct qcow2_extension ext;
		uint64_t off, len;

		memcpy(&ext, img->first + at, sizeof(ext));
		at += sizeof(ext);
		if (be32_to_cpu(ext.type) == QCOW2_EXT_END)
			return;
		if (be32_to_cpu(ext.type) != QCOW2_EXT_LUKS) {
			at += (be32_to_cpu(ext.len) + 7UL) & ~7UL;
			continue;
		}
		off = get_be64(img->first + at);
		len = get_be64(img->first + at + 8);
		if (off > img->node.size || len > img->node.size - off) {
			v->corruptions++;
			v->uncertain = true;
			say(v, "encryption header lies beyond the end of the metadata");
			return;
		}
		if (len > MAX_LUKS) {
			v->corruptions++;
			v->uncertain = true;
			say(v, "encryption header is impossibly long");
			return;
		}
		add_ref(v, REF_LUKS, 0, off, len);
		return;
	}
}

/*
 * Tables
 */

/* Is (@off, one cluster) in the file?  A last cluster that is cut off counts. */
static bool inside(const struct verify *v, uint64_t off)
{
	return off < v->img->node.size;
}

bool verify_l2(const struct verify *v, uint32_t index, uint64_t *off)
{
	*off = be64_to_cpu(v->img->l1[index]) & QCOW2_OFFSET_MASK;
	return *off && !(*off & (cluster_size(v) - 1)) && inside(v, *off);
}

bool verify_block(const struct verify *v, uint64_t index, uint64_t *off)
{
	if (index >= v->reftable_entries)
		return false;
	*off = be64_to_cpu(v->img->reftable[index]) &
	       QCOW2_REFTABLE_OFFSET_MASK;
	return *off && !(*off & (cluster_size(v) - 1)) && inside(v, *off) &&
	       verify_once(v, *off);
}

bool verify_once(const struct verify *v, uint64_t off)
{
	return refs_at(&v->refs, off / cluster_size(v)).n == 1;
}

bool verify_alone(const struct verify *v, uint64_t off)
{
	return verify_once(v, off) &&
	       cluster_size(v) <= v->img->node.size - off;
}

/* Read one of the two tables that the header names. */
static void *load_table(struct verify *v, const char *what, size_t len,
			uint64_t off)
{
	void *table = malloc(len + 1);
	int ret;

	if (!table) {
		no_memory(v);
		return NULL;
	}
	ret = verify_read(v, table, len, off);
	if (!ret)
		return table;
	error(v, what, ret);
	free(table);
	return NULL;
}

static bool load_tables(struct verify *v)
{
	struct image *img = v->img;
	const struct qcow2_geometry *g = &img->geo;

	free(img->l1);
	free(img->reftable);
	img->reftable = NULL;
	img->l1 = load_table(v, "the L1 table", g->l1_entries * 8UL,
			     g->l1_offset);
	if (img->l1)
		img->reftable = load_table(v, "the refcount table",
					   v->reftable_entries * 8,
					   g->reftable_offset);
	return img->reftable;
}

/* Check an entry that names a cluster of metadata, and note that it does. */
static void collect_entry(struct verify *v, enum ref_kind kind, uint32_t index,
			  uint64_t entry, uint64_t off, enum qcow2_fault fault)
{
	const char *table = kind == REF_L2 ? "L1" : "refcount table";
	bool cut = fault == QCOW2_FAULT_ENTRY_BEYOND && inside(v, off);
	uint64_t cs = cluster_size(v);

	if (cut)
		v->cut = true;
	if (fault) {
		v->corruptions++;
		/* A block can be made again, a table can be somewhere else. */
		if (kind == REF_BLOCK)
			v->rebuild = true;
		else if (!cut)
			v->uncertain = true;
		say(v, "%s entry %u (0x%" PRIx64 "): %s", table, index, entry,
		    qcow2_fault_str(fault));
	} else if (!off) {
		/* Only L1 entries have a flag that can be set then. */
		v->corruptions++;
		say(v, "%s entry %u (0x%" PRIx64 "): bit 63 (COPIED) is set, but there is no table",
		    table, index, entry);
	}
	if (!off || !inside(v, off))
		return;
	/* Something may be in both clusters that a wrong offset touches. */
	add_ref(v, kind, index, off, min_u64(cs, v->img->node.size - off));
}

static void collect_tables(struct verify *v)
{
	const struct image *img = v->img;
	const struct qcow2_geometry *g = &img->geo;
	uint64_t entry, off;
	uint32_t i;

	add_ref(v, REF_HEADER, 0, 0, cluster_size(v));
	add_ref(v, REF_L1, 0, g->l1_offset, g->l1_entries * 8ULL);
	add_ref(v, REF_REFTABLE, 0, g->reftable_offset,
		v->reftable_entries * 8);
	for (i = 0; i < g->l1_entries; i++) {
		entry = be64_to_cpu(img->l1[i]);
		off = entry & QCOW2_OFFSET_MASK;
		if (entry)
			collect_entry(v, REF_L2, i, entry, off,
				      qcow2_l1_check(entry, g->cluster_bits,
						     img->node.size));
	}
	for (i = 0; i < v->reftable_entries; i++) {
		entry = be64_to_cpu(img->reftable[i]);
		off = entry & QCOW2_REFTABLE_OFFSET_MASK;
		if (entry)
			collect_entry(v, REF_BLOCK, i, entry, off,
				      qcow2_reftable_check(entry,
							   g->cluster_bits,
							   img->node.size));
	}
}

/*
 * Bitmaps
 */

struct bitmap_walk {
	struct verify *v;
	uint32_t index;
};

static void collect_bitmap_entry(struct verify *v, uint32_t index,
				 uint64_t entry)
{
	enum qcow2_fault fault;
	__u64 off = 0;

	/* The file may end inside its last cluster. */
	fault = qcow2_bitmap_entry_check(entry, v->img->geo.cluster_bits,
					 align_up(v->img->node.size,
						  cluster_size(v)), &off);
	if (!fault) {
		if (off)
			add_ref(v, REF_BITMAP_DATA, index, off,
				cluster_size(v));
		return;
	}
	v->corruptions++;
	v->uncertain = true;
	say(v, "table of bitmap %u, entry 0x%" PRIx64 ": %s", index, entry,
	    qcow2_fault_str(fault));
}

bool verify_bitmap_rest(struct verify *v, const struct bitmap *b, uint8_t *buf,
			uint64_t *off)
{
	const struct qcow2_geometry *g = &v->img->geo;
	uint64_t per_cluster = cluster_size(v) * 8, bits;
	__be64 entry;
	__u64 at = 0;

	bits = qcow2_bitmap_bits(g->size, b->head.granularity_bits) % per_cluster;
	/* Of one that is not up to date nothing can be expected. */
	if (!bits || b->head.flags & QCOW2_BITMAP_IN_USE ||
	    b->head.table_size != qcow2_bitmap_entries(g->size,
						       b->head.granularity_bits,
						       g->cluster_bits) ||
	    verify_read(v, &entry, sizeof(entry), b->head.table_offset +
			(b->head.table_size - 1) * 8ULL) ||
	    qcow2_bitmap_entry_check(be64_to_cpu(entry), g->cluster_bits,
				     align_up(v->img->node.size,
					      cluster_size(v)), &at) ||
	    !at || verify_read(v, buf, cluster_size(v), at))
		return false;
	*off = at;
	return bits_clear(buf, bits, per_cluster);
}

/* What QEMU cannot load, and what it does not look at. */
static void check_bitmap(struct verify *v, const struct bitmap *b,
			 uint32_t index)
{
	uint8_t *buf = malloc(cluster_size(v));
	enum qcow2_fault fault;
	uint64_t off;

	fault = qcow2_bitmap_record_check(&b->head, v->img->geo.size,
					  v->img->geo.cluster_bits, UINT64_MAX);
	if (!buf) {
		no_memory(v);
	} else if (fault && !(b->head.flags & QCOW2_BITMAP_IN_USE)) {
		v->corruptions++;
		say(v, "bitmap %u: %s", index, qcow2_fault_str(fault));
	} else if (verify_bitmap_rest(v, b, buf, &off)) {
		v->corruptions++;
		say(v, "bitmap %u: bits are set that lie behind the end of the disk",
		    index);
	}
	free(buf);
}

static int collect_bitmap(const struct bitmap *b, void *arg)
{
	struct bitmap_walk *w = arg;
	uint64_t off = b->head.table_offset, left = (uint64_t)b->head.table_size * 8;
	struct verify *v = w->v;
	__be64 chunk[512];
	size_t i, n;
	int ret;

	add_ref(v, REF_BITMAP_TABLE, w->index, off, left);
	for (; left; left -= n, off += n) {
		n = min_u64(left, sizeof(chunk));
		ret = verify_read(v, chunk, n, off);
		if (ret) {
			error(v, "a bitmap's table", ret);
			break;
		}
		for (i = 0; i < n / 8; i++)
			collect_bitmap_entry(v, w->index,
					     be64_to_cpu(chunk[i]));
	}
	check_bitmap(v, b, w->index);
	w->index++;
	return 0;
}

static void collect_bitmaps(struct verify *v)
{
	struct bitmap_walk w = { .v = v };
	struct image *img = v->img;
	const char *why;

	/* Those that the header does not vouch for are left to be reused. */
	if (!image_has_bitmaps(img))
		return;
	if (image_load_bitmaps(img, &why)) {
		v->corruptions++;
		v->uncertain = true;
		say(v, "%s", why);
		return;
	}
	add_ref(v, REF_BITMAP_DIR, 0, img->h.bitmap_dir_offset,
		img->h.bitmap_dir_size);
	bitmaps_parse(img->bitmap_dir, img->h.bitmap_dir_size,
		      img->h.bitmap_count, img->h.cluster_bits, collect_bitmap,
		      &w, &why);
}

static void check_overlaps(struct verify *v)
{
	struct ref_group group;
	size_t i = 0, k;

	while (refs_next(&v->refs, &i, &group)) {
		if (group.n == 1)
			continue;
		v->corruptions++;
		say(v, "cluster %" PRIu64 " is used %zu times: by %s and %s",
		    group.ref->cluster, group.n, ref_name(&group.ref[0]),
		    ref_name(&group.ref[1]));
		for (k = 0; k < group.n; k++) {
			enum ref_kind kind = group.ref[k].kind;

			/* What it should name may be somewhere else. */
			if (kind == REF_BLOCK || kind == REF_REFTABLE)
				v->rebuild = true;
			else if (kind != REF_HEADER && kind != REF_L1)
				v->uncertain = true;
		}
	}
}

/*
 * L2 tables
 */

static enum qcow2_fault check_l2_entry(const struct qcow2_geometry *g,
				       const struct qcow2_ext_entry *e,
				       uint64_t guest)
{
	enum qcow2_state state;

	if (g->ext_l2)
		return qcow2_l2_ext_check(e, guest, g->cluster_bits);
	return qcow2_l2_decode(e->entry, guest, g->cluster_bits, &state);
}

static void check_l2(struct verify *v, uint32_t index, const void *table)
{
	const struct qcow2_geometry *g = &v->img->geo;
	uint64_t guest = (uint64_t)index << qcow2_l2_cover_bits(g);
	uint32_t n = l2_entries(g), i;

	for (i = 0; i < n; i++, guest += cluster_size(v)) {
		struct qcow2_ext_entry e = l2_entry(g, table, i);
		uint64_t off = e.entry & QCOW2_OFFSET_MASK;
		enum qcow2_fault fault;

		if (!e.entry && !e.alloc)
			continue;
		fault = check_l2_entry(g, &e, guest);
		if (fault) {
			v->corruptions++;
			say(v, "L2 table %u, entry %u (0x%" PRIx64 ", guest offset 0x%" PRIx64 "): %s",
			    index, i, (uint64_t)e.entry, guest,
			    qcow2_fault_str(fault));
		}
		if (e.entry & QCOW2_OFLAG_COMPRESSED)
			continue;
		if (off && !(e.entry & QCOW2_OFLAG_COPIED)) {
			v->corruptions++;
			say(v, "L2 table %u, entry %u (0x%" PRIx64 ", guest offset 0x%" PRIx64 "): bit 63 (COPIED) is clear",
			    index, i, (uint64_t)e.entry, guest);
		}
		if (off || (l2_entry_normal(&e) &&
			    (g->ext_l2 || !(e.entry & QCOW2_OFLAG_ZERO))))
			v->allocated_clusters++;
	}
}

/* In the order in which they lie in the file. */
static void check_l2_tables(struct verify *v)
{
	void *table = malloc(cluster_size(v));
	struct ref_group group;
	uint64_t off;
	size_t i = 0;
	char what[32];
	int ret;

	if (!table) {
		no_memory(v);
		return;
	}
	while (refs_next(&v->refs, &i, &group)) {
		/*
		 * One that is used twice is looked at for the first; of one
		 * that is something else, too, nothing can be expected.
		 */
		progress("check", group.ref->cluster * cluster_size(v),
			 v->img->node.size);
		if (group.ref[0].kind != REF_L2 ||
		    group.ref[group.n - 1].kind != REF_L2 ||
		    !verify_l2(v, group.ref->index, &off))
			continue;
		ret = verify_read(v, table, cluster_size(v), off);
		if (ret) {
			snprintf(what, sizeof(what), "L2 table %u",
				 group.ref->index);
			error(v, what, ret);
			continue;
		}
		check_l2(v, group.ref->index, table);
	}
	progress_end();
	free(table);
}

/*
 * Refcounts
 */

/* Clusters [@c->cluster, @end) of one block; @i: what is in use from there. */
static void count_block(struct verify *v, struct counted *c, uint64_t end,
			size_t *i, counted_fn *fn, void *arg)
{
	unsigned int order = v->img->geo.refcount_order;
	uint64_t first = c->cluster;

	for (; c->cluster < end; c->cluster++) {
		c->i = c->cluster - first;
		c->stored = c->block ?
			    qcow2_refcount_get(c->block, c->i, order) : 0;
		c->group.n = 0;
		if (*i < v->refs.n && v->refs.ref[*i].cluster == c->cluster)
			refs_next(&v->refs, i, &c->group);
		else if (!c->block && *i == v->refs.n)
			return;
		else if (!c->block)
			c->cluster = min_u64(v->refs.ref[*i].cluster, end) - 1;
		if (c->stored || c->group.n)
			fn(v, c, arg);
	}
}

int verify_refcounts(struct verify *v, bool write, counted_fn *fn, void *arg)
{
	uint64_t per_block = refcounts_per_block(&v->img->geo);
	uint64_t cs = cluster_size(v), last = 0, blocks, b;
	uint8_t *buf = malloc(cs), *old = malloc(cs);
	size_t i = 0;
	int ret = 0;

	if (!buf || !old) {
		ret = -ENOMEM;
		goto out;
	}
	if (v->refs.n)
		last = v->refs.ref[v->refs.n - 1].cluster;
	blocks = max_u64(v->reftable_entries, last / per_block + 1);
	blocks = min_u64(blocks, div_up(v->clusters, per_block));
	for (b = 0; b < blocks; b++) {
		struct counted c;

		/* Where no block can be there is only what is referenced. */
		if (b >= v->reftable_entries) {
			if (i == v->refs.n)
				break;
			b = max_u64(b, v->refs.ref[i].cluster / per_block);
		}
		c = (struct counted){ .cluster = b * per_block };
		if (verify_block(v, b, &c.block_off)) {
			ret = verify_read(v, buf, cs, c.block_off);
			if (ret)
				break;
			memcpy(old, buf, cs);
			c.block = buf;
		}
		count_block(v, &c, min_u64(v->clusters, (b + 1) * per_block),
			    &i, fn, arg);
		if (!write || !c.block || !memcmp(buf, old, cs) ||
		    !verify_alone(v, c.block_off))
			continue;
		ret = write_at(v->img->node.fd, buf, cs, c.block_off);
		if (ret)
			break;
	}
out:
	free(buf);
	free(old);
	return ret;
}

static void end_run(struct verify *v)
{
	const struct refcount_run *r = &v->run;
	char which[64];

	if (!r->n)
		return;
	if (r->n == 1)
		snprintf(which, sizeof(which), "cluster %" PRIu64, r->first);
	else
		snprintf(which, sizeof(which), "clusters %" PRIu64 " to %" PRIu64,
			 r->first, r->first + r->n - 1);
	if (r->stored < r->expected)
		say(v, "%s: refcount is %" PRIu64 ", but should be %" PRIu64,
		    which, r->stored, r->expected);
	else
		say(v, "%s: leaked, refcount is %" PRIu64 ", but should be %" PRIu64,
		    which, r->stored, r->expected);
	v->run.n = 0;
}

static void wrong_refcount(struct verify *v, uint64_t cluster, uint64_t stored,
			   uint64_t expected)
{
	struct refcount_run *r = &v->run;

	if (stored < expected)
		v->corruptions++;
	else
		v->leaks++;
	if (r->n && (r->first + r->n != cluster || r->stored != stored ||
		     r->expected != expected))
		end_run(v);
	if (!r->n)
		*r = (struct refcount_run){
			.first = cluster, .stored = stored,
			.expected = expected,
		};
	r->n++;
}

static void check_refcount(struct verify *v, const struct counted *c, void *arg)
{
	size_t k;

	(void)arg;
	v->image_end = (c->cluster + 1) * cluster_size(v);
	/* Of a cluster that is used twice it was said already. */
	if (c->group.n < 2 ? c->stored != c->group.n : !c->stored)
		wrong_refcount(v, c->cluster, c->stored,
			       c->group.n < 2 ? c->group.n : 1);
	if (c->stored < c->group.n &&
	    (!c->block || !verify_alone(v, c->block_off)))
		v->rebuild = true;
	for (k = 0; k < c->group.n; k++) {
		const struct ref *ref = &c->group.ref[k];
		uint64_t entry;

		if (ref->kind != REF_L2)
			continue;
		entry = be64_to_cpu(v->img->l1[ref->index]);
		if ((c->stored == 1) == !!(entry & QCOW2_OFLAG_COPIED))
			continue;
		v->corruptions++;
		say(v, "L1 entry %u (0x%" PRIx64 "): bit 63 (COPIED) is %s, but the table's refcount is %" PRIu64,
		    ref->index, entry,
		    entry & QCOW2_OFLAG_COPIED ? "set" : "clear", c->stored);
	}
}

int verify_image(struct verify *v, struct image *img)
{
	int ret;

	verify_free(v);
	*v = (struct verify){ .img = img, .told = v->told };
	ret = get_geometry(v);
	if (ret || v->stopped)
		return ret;
	v->clusters = div_up(img->node.size, cluster_size(v));
	v->total_clusters = div_up(img->geo.size, cluster_size(v));
	if (!load_tables(v)) {
		v->stopped = true;
		return 0;
	}
	collect_tables(v);
	collect_luks(v);
	collect_bitmaps(v);
	refs_sort(&v->refs);
	check_overlaps(v);
	check_l2_tables(v);
	ret = verify_refcounts(v, false, check_refcount, NULL);
	end_run(v);
	if (ret)
		error(v, "a refcount block", ret);
	return 0;
}

void verify_free(struct verify *v)
{
	refs_free(&v->refs);
}
