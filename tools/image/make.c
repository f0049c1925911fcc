// SPDX-License-Identifier: GPL-2.0-or-later
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "image/make.h"
#include "lib/interrupt.h"
#include "lib/progress.h"
#include "lib/util.h"

bool new_image_plan(struct new_image *n, uint64_t size, unsigned int cluster_bits)
{
	n->g = (struct qcow2_geometry){
		.size = size, .cluster_bits = cluster_bits, .refcount_order = 4,
	};
	if (!plan_new(&n->g, true, &n->p))
		return false;
	plan_place(&n->g, &n->p);
	return true;
}

static size_t put_extension(uint8_t *p, uint32_t type, const void *data,
			    uint32_t len)
{
	struct qcow2_extension ext = {
		.type = cpu_to_be32(type), .len = cpu_to_be32(len),
	};

	memcpy(p, &ext, sizeof(ext));
	memcpy(p + sizeof(ext), data, len);
	return sizeof(ext) + ((len + 7) & ~7U);
}

struct feature_name {
	uint8_t type, bit;
	char name[46];
} __attribute__((packed));

/* So that a program that does not know a feature can say what it is. */
static const struct feature_name feature_names[] = {
	{ 0, 0, "dirty bit" },
	{ 0, 1, "corrupt bit" },
	{ 0, 2, "external data file" },
	{ 0, 3, "compression type" },
	{ 0, 4, "extended L2 entries" },
	{ 1, 0, "lazy refcounts" },
	{ 2, 0, "bitmaps" },
	{ 2, 1, "raw external data" },
};

/* Fill the first cluster; false if the names do not fit. */
bool new_image_header(const struct new_image *n, uint8_t *p)
{
	const struct qcow2_geometry *g = &n->g;
	size_t cluster = 1UL << g->cluster_bits, at = sizeof(struct qcow2_header);
	size_t name_len = strlen(n->data_file);
	size_t backing_len = n->backing ? strlen(n->backing) : 0;
	struct qcow2_header h = {
		.magic = cpu_to_be32(QCOW2_MAGIC),
		.version = cpu_to_be32(3),
		.cluster_bits = cpu_to_be32(g->cluster_bits),
		.size = cpu_to_be64(g->size),
		.l1_size = cpu_to_be32(g->l1_entries),
		.l1_table_offset = cpu_to_be64(g->l1_offset),
		.refcount_table_offset = cpu_to_be64(g->reftable_offset),
		.refcount_table_clusters = cpu_to_be32(g->reftable_clusters),
		.incompatible_features = cpu_to_be64(QCOW2_INCOMPAT_DATA_FILE |
			(g->ext_l2 ? QCOW2_INCOMPAT_EXT_L2 : 0)),
		.autoclear_features = cpu_to_be64((n->raw ? QCOW2_AUTOCLEAR_RAW_DATA : 0) |
			(n->bitmaps ? QCOW2_AUTOCLEAR_BITMAPS : 0)),
		.refcount_order = cpu_to_be32(g->refcount_order),
		.header_length = cpu_to_be32(sizeof(h)),
	};
	/* names, format, and the end marker */
	size_t need = at + 8 + ((name_len + 7) & ~7UL) + 8 +
		      (n->backing ? 16 + backing_len : 0) +
		      (n->bitmaps ? 8 + sizeof(n->bitmaps_ext) : 0) +
		      (n->clone ? 8 + sizeof(*n->clone) : 0);

	memset(p, 0, cluster);
	if (name_len > cluster || need > cluster)
		return false;
	/* The first one, so that it lies in one sector. */
	if (n->bitmaps)
		at += put_extension(p + at, QCOW2_EXT_BITMAPS, &n->bitmaps_ext,
				    sizeof(n->bitmaps_ext));
	if (n->backing)
		at += put_extension(p + at, QCOW2_EXT_BACKING_FORMAT,
				    n->backing_format,
				    strlen(n->backing_format));
	at += put_extension(p + at, QCOW2_EXT_DATA_FILE, n->data_file, name_len);
	if (n->clone)
		at += put_extension(p + at, HEADER_EXT_CLONE, n->clone,
				    sizeof(*n->clone));
	if (need + 8 + sizeof(feature_names) <= cluster)
		at += put_extension(p + at, QCOW2_EXT_FEATURE_NAMES,
				    feature_names, sizeof(feature_names));
	if (n->backing) {
		/* behind the end marker */
		at += sizeof(struct qcow2_extension);
		memcpy(p + at, n->backing, backing_len);
		h.backing_file_offset = cpu_to_be64(at);
		h.backing_file_size = cpu_to_be32(backing_len);
	}
	memcpy(p, &h, sizeof(h));
	return true;
}

/* Write @n big-endian numbers: those of @value() for 0 to @n - 1. */
typedef __be64 value_fn(const struct new_image *n, uint64_t i);

static int write_failed(const struct new_image *n, int err)
{
	errno = err;
	return fail_errno("%s: cannot write the image", esc(n->path));
}

static int write_table(const struct new_image *n, value_fn *value,
		       uint64_t entries, uint64_t at)
{
	__be64 chunk[8192];
	uint64_t i = 0;
	bool some;
	size_t k;
	int ret;

	while (i < entries) {
		progress("write tables", i * 8, entries * 8);
		some = !n->fresh;
		for (k = 0; k < ARRAY_SIZE(chunk) && i < entries; k++) {
			chunk[k] = value(n, i++);
			some |= chunk[k];
		}
		ret = some ? write_at(n->fd, chunk, k * 8, at) : 0;
		if (ret)
			return write_failed(n, -ret);
		at += k * 8;
		if (interrupted()) {
			progress_end();
			return EX_WRONG;
		}
	}
	progress_end();
	return 0;
}

static __be64 reftable_entry(const struct new_image *n, uint64_t i)
{
	if (i >= n->p.blocks)
		return 0;
	return cpu_to_be64((n->p.blocks_at + i) << n->g.cluster_bits);
}

static __be64 l1_entry(const struct new_image *n, uint64_t i)
{
	if (i >= n->p.l2_tables)
		return 0;
	return cpu_to_be64(((n->p.l2_at + i) << n->g.cluster_bits) |
			   QCOW2_OFLAG_COPIED);
}

/* All L2 tables lie behind each other, so that this is the guest's cluster. */
static __be64 l2_entry(const struct new_image *n, uint64_t i)
{
	const struct qcow2_geometry *g = &n->g;
	uint64_t cluster = g->ext_l2 ? i / 2 : i;

	if (cluster << g->cluster_bits >= g->size)
		return 0;
	/* Behind each extended entry: all subclusters are allocated. */
	if (g->ext_l2 && i % 2)
		return cpu_to_be64(0xffffffff);
	switch (n->state ? n->state(n->arg, cluster) : QCOW2_DATA) {
	case QCOW2_UNALLOCATED:
		return 0;
	case QCOW2_ZERO:
		return cpu_to_be64(QCOW2_OFLAG_ZERO);
	default:
		break;
	}
	return cpu_to_be64(qcow2_l2_data_entry(cluster << g->cluster_bits));
}

static int write_refcounts(const struct new_image *n)
{
	const struct qcow2_geometry *g = &n->g;
	const struct plan_new *p = &n->p;
	uint64_t per_block = refcounts_per_block(g), i, c;
	size_t cluster = 1UL << g->cluster_bits;
	uint8_t *block = malloc(cluster);
	int ret = 0;

	if (!block)
		return fail_nomem();
	for (i = 0; !ret && i < p->blocks; i++) {
		memset(block, 0, cluster);
		for (c = i * per_block;
		     c < min_u64(p->clusters, (i + 1) * per_block); c++)
			qcow2_refcount_set(block, c - i * per_block,
					   g->refcount_order, 1);
		ret = write_at(n->fd, block, cluster,
			       (p->blocks_at + i) << g->cluster_bits);
		if (ret)
			ret = write_failed(n, -ret);
	}
	free(block);
	return ret;
}

/* The directory, and tables that are all zeros. */
static int write_bitmaps(const struct new_image *n, const uint8_t *zeros)
{
	uint64_t at = n->p.bitmaps_at, end = at + n->p.bitmaps;
	int ret = 0;

	for (; !ret && at < end; at++)
		ret = write_at(n->fd, zeros, 1UL << n->g.cluster_bits,
			       at << n->g.cluster_bits);
	if (!ret)
		ret = write_at(n->fd, n->bitmaps,
			       be64_to_cpu(n->bitmaps_ext.directory_size),
			       n->p.bitmaps_at << n->g.cluster_bits);
	return ret ? write_failed(n, -ret) : 0;
}

/* All tables, but not the header, which makes it an image */
static int write_tables(const struct new_image *n, const uint8_t *zeros)
{
	const struct plan_new *p = &n->p;
	uint64_t cs = 1ULL << n->g.cluster_bits, i;
	bool tables = n->raw || n->state;
	int ret;

	ret = write_table(n, reftable_entry, p->reftable_clusters * cs / 8,
			  p->reftable_at * cs);
	if (!ret)
		ret = write_refcounts(n);
	if (!ret)
		ret = write_table(n, l1_entry, p->l1_clusters * cs / 8,
				  p->l1_at * cs);
	if (!ret && tables)
		ret = write_table(n, l2_entry, p->l2_tables * cs / 8,
				  p->l2_at * cs);
	for (i = 0; !ret && !tables && !n->fresh && i < p->l2_tables; i++) {
		ret = write_at(n->fd, zeros, cs, (p->l2_at + i) * cs);
		if (ret)
			ret = write_failed(n, -ret);
		else if (interrupted())
			ret = EX_WRONG;
	}
	if (!ret && n->bitmaps)
		ret = write_bitmaps(n, zeros);
	return ret;
}

int new_image_write(const struct new_image *n, const uint8_t *header)
{
	uint64_t cs = 1ULL << n->g.cluster_bits;
	uint8_t *zeros = calloc(1, cs);
	int ret;

	if (!zeros)
		return fail_nomem();
	ret = write_at(n->fd, zeros, cs, 0);
	/*
	 * A file reads as zeros where nothing was written; on a device, and in
	 * the last cluster of a table, zeros must be written.
	 */
	if (!ret && n->fresh && ftruncate(n->fd, n->p.clusters * cs))
		ret = -errno;
	ret = ret ? write_failed(n, -ret) : write_tables(n, zeros);
	free(zeros);
	if (ret)
		return ret;

	if (fsync(n->fd))
		return write_failed(n, errno);
	ret = write_at(n->fd, header, cs, 0);
	if (ret)
		return write_failed(n, -ret);
	if (fsync(n->fd) || (n->dir >= 0 && fsync(n->dir)))
		return write_failed(n, errno);
	return 0;
}
