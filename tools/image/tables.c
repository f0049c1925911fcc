// SPDX-License-Identifier: GPL-2.0-or-later
/* L1, refcount table and refcount blocks, and the directory of bitmaps: read, and looked at. */
#include <errno.h>
#include <stdlib.h>

#include "image/tables.h"
#include "lib/util.h"

/* Where a metadata cluster is that a table names. */
struct claim {
	uint64_t off;
	bool l2;		/* else a refcount block */
	uint32_t index;
};

static int claim_cmp(const void *a, const void *b)
{
	const struct claim *x = a, *y = b;

	return x->off < y->off ? -1 : x->off > y->off;
}

/* Report an impossible entry; refuse it only if the image will be written. */
static int bad_entry(const struct image *img, bool strict, bool l2,
		     uint32_t index, uint64_t entry, const char *what)
{
	const char *table = l2 ? "L1" : "refcount table";
	const char *path = img->node.path;

	if (strict && l2)
		return fail(EX_WRONG,
			    OR_READONLY("%s: corrupt image: L1 entry %u (0x%llx): %s; see what qcow2setup check says, and restore it from a backup"),
			    esc(path), index, (unsigned long long)entry, what);
	if (strict)
		return fail(EX_WRONG,
			    OR_READONLY("%s: corrupt image: refcount table entry %u (0x%llx): %s; repair it with qcow2setup check --repair all %s"),
			    esc(path), index, (unsigned long long)entry, what,
			    shell_quote(path));
	warning("%s: corrupt image: %s entry %u (0x%llx): %s",
		esc(img->node.path), table, index, (unsigned long long)entry,
		what);
	return 0;
}

uint32_t image_reftable_entries(const struct image *img)
{
	return (uint64_t)img->geo.reftable_clusters << (img->geo.cluster_bits - 3);
}

/* Check all entries of both tables; see image_load_tables(). */
static int check_tables(const struct image *img, bool strict)
{
	const struct qcow2_geometry *g = &img->geo;
	uint32_t entries = image_reftable_entries(img), i;
	struct claim *claims;
	enum qcow2_fault fault;
	size_t n = 0, k;
	int ret = 0, warned = 0;

	claims = calloc((size_t)g->l1_entries + entries + 1, sizeof(*claims));
	if (!claims)
		return fail_nomem();
	for (i = 0; i < g->l1_entries + entries; i++) {
		bool l2 = i < g->l1_entries;
		uint32_t index = l2 ? i : i - g->l1_entries;
		uint64_t entry = be64_to_cpu(l2 ? img->l1[index] :
					     img->reftable[index]);
		uint64_t off = entry & QCOW2_OFFSET_MASK;

		fault = l2 ? qcow2_l1_check(entry, g->cluster_bits,
					    img->node.size) :
			     qcow2_reftable_check(entry, g->cluster_bits,
						  img->node.size);
		if (!fault && off && qcow2_in_fixed_area(&img->geo, off))
			fault = QCOW2_FAULT_ENTRY_OVERLAP;
		if (!fault && off) {
			claims[n].off = off;
			claims[n].l2 = l2;
			claims[n++].index = index;
		}
		if (!fault)
			continue;
		ret = bad_entry(img, strict, l2, index, entry,
				qcow2_fault_str(fault));
		if (ret || ++warned == 8)
			goto out;
	}
	qsort(claims, n, sizeof(*claims), claim_cmp);
	for (k = 1; k < n; k++) {
		if (claims[k].off != claims[k - 1].off)
			continue;
		ret = bad_entry(img, strict, claims[k].l2,
				claims[k].index, claims[k].off,
				qcow2_fault_str(QCOW2_FAULT_ENTRY_OVERLAP));
		if (ret || ++warned == 8)
			goto out;
	}
out:
	free(claims);
	return ret;
}

int image_load_tables(struct image *img, bool strict)
{
	const struct qcow2_geometry *g = &img->geo;
	size_t l1_bytes = (size_t)g->l1_entries * 8;
	size_t rt_bytes = (size_t)g->reftable_clusters << g->cluster_bits;
	int ret;

	free(img->l1);
	free(img->reftable);
	img->l1 = malloc(l1_bytes + 1);
	img->reftable = malloc(rt_bytes);
	if (!img->l1 || !img->reftable)
		return fail_nomem();
	ret = node_read(&img->node, img->l1, l1_bytes, g->l1_offset);
	if (!ret)
		ret = node_read(&img->node, img->reftable, rt_bytes,
			      g->reftable_offset);
	if (ret) {
		errno = -ret;
		return fail_errno("%s: cannot read its tables",
				  esc(img->node.path));
	}
	return check_tables(img, strict);
}

bool image_has_bitmaps(const struct image *img)
{
	return img->h.has_bitmaps &&
	       img->h.autoclear & QCOW2_AUTOCLEAR_BITMAPS;
}

/*
 * The tables of all bitmaps are read as often as the image is opened, and each of
 * their entries is remembered by a check.  So much of them is 512 GiB of bitmaps,
 * with clusters of 64 KiB.
 */
#define MAX_BITMAP_TABLES	(64ULL << 20)

/* For image_load_bitmaps(): tables lie in the file, and are not too many. */
struct table_sum {
	const struct image *img;
	uint64_t bytes;
	const char *why;
};

static int add_table(const struct bitmap *b, void *arg)
{
	struct table_sum *sum = arg;
	uint64_t bytes = (uint64_t)b->head.table_size * 8;

	sum->bytes += bytes;
	if (sum->bytes > MAX_BITMAP_TABLES) {
		sum->why = "bitmap tables have more than 64 MiB";
		return -1;
	}
	if (b->head.table_offset > sum->img->node.size ||
	    bytes > sum->img->node.size - b->head.table_offset) {
		sum->why = "bitmap table lies beyond the end of the metadata";
		return -1;
	}
	return 0;
}

int image_load_bitmaps(struct image *img, const char **why)
{
	struct table_sum sum = { .img = img };
	uint64_t len = img->h.bitmap_dir_size;

	*why = NULL;
	free(img->bitmap_dir);
	img->bitmap_dir = NULL;
	if (!img->h.has_bitmaps)
		return 0;
	if (img->h.bitmap_dir_offset > img->node.size ||
	    len > img->node.size - img->h.bitmap_dir_offset) {
		*why = "bitmap directory lies beyond the end of the metadata";
		return EX_WRONG;
	}
	img->bitmap_dir = malloc(len);
	if (!img->bitmap_dir) {
		*why = "out of memory";
		return EX_MEMORY;
	}
	if (node_read(&img->node, img->bitmap_dir, len,
		    img->h.bitmap_dir_offset)) {
		*why = "bitmap directory cannot be read";
		return EX_WRONG;
	}
	if (bitmaps_parse(img->bitmap_dir, len, img->h.bitmap_count,
			  img->h.cluster_bits, add_table, &sum, why)) {
		if (!*why)
			*why = sum.why;
		free(img->bitmap_dir);
		img->bitmap_dir = NULL;
		return EX_WRONG;
	}
	return 0;
}

int image_read_failed(const struct image *img, int err)
{
	errno = -err;
	return fail_errno("%s: cannot read its metadata", esc(img->node.path));
}

int image_read_refblock(const struct image *img, const __be64 *table,
			uint64_t i, uint8_t *block, uint64_t *off)
{
	int ret;

	*off = be64_to_cpu(table[i]) & QCOW2_REFTABLE_OFFSET_MASK;
	if (!*off)
		return 0;
	ret = node_read(&img->node, block, cluster_size(img), *off);
	return ret ? image_read_failed(img, ret) : 0;
}
