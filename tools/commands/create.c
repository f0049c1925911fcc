// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * qcow2setup create: a new image for a data file or device that exists.  The
 * data is not touched.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "commands/commands.h"
#include "image/bitmaps.h"
#include "image/image.h"
#include "image/plan.h"
#include "lib/interrupt.h"
#include "lib/util.h"
#include "system/claim.h"
#include "system/locks.h"
#include "system/node.h"

struct target_file {
	const char *path;
	struct node node;
	bool made;		/* by us: to be removed if anything fails */
	int dir;		/* its folder, if it was made */
	const char *name;	/* in the folder */
};

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

/* What the new image is to have below it. */
struct new_backing {
	struct node node;
	uint64_t size;		/* of the disk that it is */
	char *name;		/* for the header; NULL: no backing file */
	const char *format;
};

/* Bitmaps of the new image, if there are some. */
struct new_bitmaps {
	struct image img;	/* its geometry and name */
	struct bitmaps s;
	void *dir;
	struct qcow2_bitmaps_ext ext;
};

/* Fill the first cluster; false if the names do not fit. */
static bool make_header(uint8_t *p, const struct qcow2_geometry *g,
			const char *data_file, bool raw,
			const struct new_backing *backing,
			const struct new_bitmaps *bitmaps)
{
	size_t cluster = 1UL << g->cluster_bits, at = sizeof(struct qcow2_header);
	size_t name_len = strlen(data_file);
	size_t backing_len = backing->name ? strlen(backing->name) : 0;
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
		.autoclear_features = cpu_to_be64((raw ? QCOW2_AUTOCLEAR_RAW_DATA : 0) |
			(bitmaps->dir ? QCOW2_AUTOCLEAR_BITMAPS : 0)),
		.refcount_order = cpu_to_be32(g->refcount_order),
		.header_length = cpu_to_be32(sizeof(h)),
	};
	/* names, format, and the end marker */
	size_t need = at + 8 + ((name_len + 7) & ~7UL) + 8 +
		      (backing->name ? 16 + backing_len : 0) +
		      (bitmaps->dir ? 8 + sizeof(bitmaps->ext) : 0);

	memset(p, 0, cluster);
	if (name_len > cluster || need > cluster)
		return false;
	/* The first one, so that it lies in one sector. */
	if (bitmaps->dir)
		at += put_extension(p + at, QCOW2_EXT_BITMAPS, &bitmaps->ext,
				    sizeof(bitmaps->ext));
	if (backing->name)
		at += put_extension(p + at, QCOW2_EXT_BACKING_FORMAT,
				    backing->format, strlen(backing->format));
	at += put_extension(p + at, QCOW2_EXT_DATA_FILE, data_file, name_len);
	if (need + 8 + sizeof(feature_names) <= cluster)
		at += put_extension(p + at, QCOW2_EXT_FEATURE_NAMES,
				    feature_names, sizeof(feature_names));
	if (backing->name) {
		/* behind the end marker */
		at += sizeof(struct qcow2_extension);
		memcpy(p + at, backing->name, backing_len);
		h.backing_file_offset = cpu_to_be64(at);
		h.backing_file_size = cpu_to_be32(backing_len);
	}
	memcpy(p, &h, sizeof(h));
	return true;
}

/* Write @n big-endian numbers: those of @value() for 0 to @n - 1. */
typedef __be64 value_fn(const struct qcow2_geometry *g,
			const struct plan_new *p, uint64_t i);

static int write_failed(const struct target_file *t, int err)
{
	errno = err;
	return fail_errno("%s: cannot write the image", esc(t->path));
}

static int write_table(const struct target_file *t,
		       const struct qcow2_geometry *g, const struct plan_new *p,
		       value_fn *value, uint64_t n, uint64_t at)
{
	__be64 chunk[8192];
	uint64_t i = 0;
	size_t k;
	int ret;

	while (i < n) {
		for (k = 0; k < ARRAY_SIZE(chunk) && i < n; k++)
			chunk[k] = value(g, p, i++);
		ret = write_at(t->node.fd, chunk, k * 8, at);
		if (ret)
			return write_failed(t, -ret);
		at += k * 8;
		if (interrupted())
			return EX_WRONG;
	}
	return 0;
}

static __be64 reftable_entry(const struct qcow2_geometry *g,
			     const struct plan_new *p, uint64_t i)
{
	if (i >= p->blocks)
		return 0;
	return cpu_to_be64((p->blocks_at + i) << g->cluster_bits);
}

static __be64 l1_entry(const struct qcow2_geometry *g, const struct plan_new *p,
		       uint64_t i)
{
	if (i >= p->l2_tables)
		return 0;
	return cpu_to_be64(((p->l2_at + i) << g->cluster_bits) |
			   QCOW2_OFLAG_COPIED);
}

/* All L2 tables lie behind each other, so that this is the guest's cluster. */
static __be64 l2_entry(const struct qcow2_geometry *g, const struct plan_new *p,
		       uint64_t i)
{
	uint64_t cluster = g->ext_l2 ? i / 2 : i;

	(void)p;
	if (cluster << g->cluster_bits >= g->size)
		return 0;
	/* Behind each extended entry: all subclusters are allocated. */
	if (g->ext_l2 && i % 2)
		return cpu_to_be64(0xffffffff);
	return cpu_to_be64(qcow2_l2_data_entry(cluster << g->cluster_bits));
}

static int write_refcounts(const struct target_file *t,
			   const struct qcow2_geometry *g,
			   const struct plan_new *p)
{
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
		ret = write_at(t->node.fd, block, cluster,
			       (p->blocks_at + i) << g->cluster_bits);
		if (ret)
			ret = write_failed(t, -ret);
	}
	free(block);
	return ret;
}

/* The directory, and tables that are all zeros. */
static int write_bitmaps(const struct target_file *t,
			 const struct qcow2_geometry *g,
			 const struct plan_new *p,
			 const struct new_bitmaps *bitmaps, const uint8_t *zeros)
{
	uint64_t at = p->bitmaps_at, end = at + p->bitmaps;
	int ret = 0;

	for (; !ret && at < end; at++)
		ret = write_at(t->node.fd, zeros, 1UL << g->cluster_bits,
			       at << g->cluster_bits);
	if (!ret)
		ret = write_at(t->node.fd, bitmaps->dir,
			       be64_to_cpu(bitmaps->ext.directory_size),
			       p->bitmaps_at << g->cluster_bits);
	return ret ? write_failed(t, -ret) : 0;
}

/* Everything but the header; then the header, which makes it an image. */
static int write_image(const struct target_file *t,
		       const struct qcow2_geometry *g, const struct plan_new *p,
		       const uint8_t *header, bool raw,
		       const struct new_bitmaps *bitmaps)
{
	uint64_t cs = 1ULL << g->cluster_bits, i, entries;
	uint8_t *zeros = calloc(1, cs);
	int ret;

	if (!zeros)
		return fail_nomem();
	ret = write_at(t->node.fd, zeros, cs, 0);
	/*
	 * A file reads as zeros where nothing was written; on a device, and in
	 * the last cluster of a table, zeros must be written.
	 */
	if (!ret && t->made && ftruncate(t->node.fd, p->clusters * cs))
		ret = -errno;
	if (ret) {
		ret = write_failed(t, -ret);
		goto out;
	}
	entries = (p->reftable_clusters * cs) / 8;
	ret = write_table(t, g, p, reftable_entry, entries, p->reftable_at * cs);
	if (!ret)
		ret = write_refcounts(t, g, p);
	if (!ret)
		ret = write_table(t, g, p, l1_entry, p->l1_clusters * cs / 8,
				  p->l1_at * cs);
	if (!ret && raw)
		ret = write_table(t, g, p, l2_entry, p->l2_tables * cs / 8,
				  p->l2_at * cs);
	for (i = 0; !ret && !raw && !t->made && i < p->l2_tables; i++) {
		ret = write_at(t->node.fd, zeros, cs, (p->l2_at + i) * cs);
		if (ret)
			ret = write_failed(t, -ret);
		else if (interrupted())
			ret = EX_WRONG;
	}
	if (!ret && bitmaps->dir)
		ret = write_bitmaps(t, g, p, bitmaps, zeros);
	if (ret)
		goto out;

	if (fsync(t->node.fd)) {
		ret = write_failed(t, errno);
		goto out;
	}
	ret = write_at(t->node.fd, header, cs, 0);
	if (ret)
		ret = write_failed(t, -ret);
	else if (fsync(t->node.fd) || (t->made && fsync(t->dir)))
		ret = write_failed(t, errno);
out:
	free(zeros);
	return ret;
}

/* Open the folder of @path, and say what the file is called in it. */
static int open_folder(struct target_file *t)
{
	const char *slash = strrchr(t->path, '/');
	char *dir;

	t->name = slash ? slash + 1 : t->path;
	dir = slash ? strndup(t->path, slash - t->path + 1) : strdup(".");
	if (!dir)
		return fail_nomem();
	t->dir = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (t->dir < 0) {
		int ret = errno == ENOENT ?
			  fail(EX_WRONG, "%s: no such folder; create it, or check the name",
			       esc(dir)) :
			  fail_errno("%s: cannot open the folder", esc(dir));

		free(dir);
		return ret;
	}
	free(dir);
	return 0;
}

static int make_file(struct target_file *t)
{
	bool device;
	struct stat st;
	int ret;

	ret = open_folder(t);
	if (ret)
		return ret;
	t->node.fd = openat(t->dir, t->name,
			    O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW,
			    0644);
	if (t->node.fd >= 0) {
		t->made = true;
		t->node.path = t->path;
		return 0;
	}
	if (errno != EEXIST)
		return fail_errno("%s: cannot create it", esc(t->path));
	device = !stat(t->path, &st) && S_ISBLK(st.st_mode);
	return fail(EX_BUSY, device ?
		    "%s: is a block device; give --overwrite-device to destroy what is on it" :
		    "%s: exists; remove it, or choose another name",
		    esc(t->path));
}

static int open_device(struct target_file *t)
{
	int ret = node_open(&t->node, AT_FDCWD, t->path, 0);

	if (ret)
		return ret;
	if (!t->node.bdev)
		return fail(EX_BUSY,
			    "%s: exists and is no block device; remove it, or choose another name",
			    esc(t->path));
	ret = node_lock(&t->node, true);
	return ret ? ret : claim_check(&t->node, true);
}

/* Take the size from the backing or data file, and see that both fit together. */
static int choose_size(const struct options *opt, const struct node *data,
		       const struct new_backing *backing,
		       struct qcow2_geometry *g)
{
	uint64_t size = opt->size ? opt->size :
			backing->name ? backing->size : data->size;

	if (!size)
		return fail(EX_WRONG,
			    "%s: is smaller than a sector (%llu bytes); give a larger --size and data file",
			    esc(opt->size || !backing->name ? data->path :
				backing->node.path),
			    (unsigned long long)size);
	if (size > QCOW2_MAX_OFFSET)
		return fail(EX_WRONG, "%s; give a smaller --size",
			    qcow2_fault_str(QCOW2_FAULT_SIZE_BIG));
	/* Whole sectors; what is behind the last one would be lost. */
	g->size = align_up(size, 512);
	if (g->size <= data->size)
		return 0;
	if (size <= data->size)
		return fail(EX_WRONG,
			    "%s: data file ends in the middle of a sector; enlarge it with truncate -s %llu, or give a smaller --size",
			    esc(data->path), (unsigned long long)g->size);
	return fail(EX_WRONG,
		    "%s: data %s has %llu bytes, less than the size of %llu; enlarge it, or give a smaller --size",
		    esc(data->path), data->bdev ? "device" : "file",
		    (unsigned long long)data->size,
		    (unsigned long long)g->size);
}

static int add_bitmaps(const struct options *opt, const char *path,
		       const struct qcow2_geometry *g, struct new_bitmaps *b)
{
	unsigned int i;
	int ret = 0;

	b->img = (struct image){ .geo = *g, .node.path = path };
	b->s.img = &b->img;
	for (i = 0; !ret && i < opt->bitmaps; i++)
		ret = bitmaps_add_option(&b->s, opt->bitmap[i],
					 "bitmap");
	return ret;
}

static int choose_layout(const struct options *opt, const char *path,
			 struct qcow2_geometry *g, struct plan_new *p,
			 struct new_bitmaps *bitmaps)
{
	uint64_t cluster = opt->cluster_size ? opt->cluster_size : 64 * KIB;
	uint64_t bits = opt->refcount_bits ? opt->refcount_bits : 16;
	uint64_t l1, clusters, later;
	int ret;

	g->cluster_bits = __builtin_ctzll(cluster);
	g->ext_l2 = opt->extended_l2;
	if (g->ext_l2 && g->cluster_bits < QCOW2_MIN_CLUSTER_BITS_EXT_L2)
		return fail(EX_PARAMETER,
			    "--extended-l2 needs clusters of 16K or more; give a larger --cluster-size");
	g->refcount_order = __builtin_ctzll(bits);
	l1 = qcow2_l1_entries_needed(g);
	if (l1 > QCOW2_MAX_L1_ENTRIES)
		return fail(EX_WRONG,
			    "with clusters of %s an image can have at most %s; give a larger --cluster-size",
			    human_size(cluster),
			    human_size((uint64_t)QCOW2_MAX_L1_ENTRIES <<
				       qcow2_l2_cover_bits(g)));
	ret = add_bitmaps(opt, path, g, bitmaps);
	if (ret)
		return ret;
	clusters = bitmaps_new_clusters(&bitmaps->s, &later);
	if (!plan_new_bitmaps(g, opt->data_file_raw || opt->preallocate,
			      clusters, later, p))
		return fail(EX_WRONG,
			    "the refcount table would be larger than 8 MiB; give a larger --cluster-size or smaller --refcount-bits");
	g->l1_entries = l1;
	g->l1_offset = p->l1_at << g->cluster_bits;
	g->reftable_offset = p->reftable_at << g->cluster_bits;
	g->reftable_clusters = p->reftable_clusters;
	if (!clusters)
		return 0;
	bitmaps->dir = bitmaps_new_dir(&bitmaps->s, p->bitmaps_at,
				       &bitmaps->ext);
	return bitmaps->dir ? 0 : fail_nomem();
}

static int check_device(const struct target_file *t, const struct node *data,
			const struct node *backing,
			const struct qcow2_geometry *g,
			const struct plan_new *p)
{
	uint64_t cs = 1ULL << g->cluster_bits;

	if (node_same(&t->node, data))
		return fail(EX_WRONG,
			    "%s: image and data are the same device; name two devices",
			    esc(t->path));
	if (backing->fd >= 0 && node_same(&t->node, backing))
		return fail(EX_WRONG,
			    "%s: image and backing are the same device; name two devices",
			    esc(t->path));
	if (t->node.block_size > cs)
		return fail(EX_WRONG,
			    "%s: device has blocks of %u bytes; give at least that as --cluster-size",
			    esc(t->path), t->node.block_size);
	if (p->clusters * cs > t->node.size)
		return fail(EX_WRONG,
			    "%s: device of %s is too small, the image needs %s; enlarge it, or give a larger --cluster-size",
			    esc(t->path), human_size(t->node.size),
			    human_size(p->clusters * cs));
	if (p->worst_case * cs > t->node.size)
		warning("%s: device of %s may become too small for the metadata, which can need %s",
			esc(t->path), human_size(t->node.size),
			human_size(p->worst_case * cs));
	return 0;
}

/*
 * The name for the header.  There a relative one starts in the folder of the
 * image, but here, as all names do, in that of the caller.
 */
static int header_name(char **name, const char *arg, const char *image)
{
	*name = *arg == '/' || !strchr(image, '/') ? strdup(arg) :
						     realpath(arg, NULL);
	if (!*name)
		return errno == ENOMEM ? fail_nomem() :
		       fail_errno("%s: cannot find its full name", esc(arg));
	return 0;
}

static int open_backing(const struct options *opt, const char *image,
			const struct node *data, struct new_backing *b)
{
	const char *arg = opt->backing_file[0];
	int ret;

	if (!opt->backing_files) {
		if (opt->backing_format)
			return fail(EX_PARAMETER,
				    "--backing-format is given, but no backing file; give --backing-file, too");
		return 0;
	}
	if (opt->backing_files > 1)
		return fail(EX_PARAMETER,
			    "an image has one backing file, which may have one itself; give --backing-file once");
	if (opt->data_file_raw)
		return fail(EX_PARAMETER,
			    "%s; leave --backing-file or --data-file-raw out",
			    qcow2_fault_str(QCOW2_FAULT_RAW_BACKING));
	/* A guest can write what looks like an image into its raw disk. */
	if (!opt->backing_format)
		return fail(EX_PARAMETER,
			    "%s: format of the backing file is not guessed; give --backing-format raw or qcow2",
			    esc(arg));
	b->format = opt->backing_format == BACKING_FORMAT_RAW ? "raw" : "qcow2";
	ret = node_open(&b->node, AT_FDCWD, arg, NODE_READ_ONLY);
	if (ret)
		return ret;
	if (node_same(&b->node, data))
		return fail(EX_WRONG,
			    "%s: data and backing file are the same; name two files",
			    esc(arg));
	b->size = b->node.size;
	if (opt->backing_format == BACKING_FORMAT_QCOW2)
		ret = image_virtual_size(&b->node, &b->size);
	if (ret)
		return ret;
	ret = header_name(&b->name, arg, image);
	if (!ret && strlen(b->name) > 1023)
		ret = fail(EX_WRONG, "%s: name is longer than 1023 bytes; use a shorter path",
			   esc(b->name));
	return ret;
}

int cmd_create(const struct options *opt, char **args)
{
	struct target_file t = {
		.path = args[0], .node = NODE_CLOSED, .dir = -1,
	};
	struct new_backing backing = { .node = NODE_CLOSED };
	struct new_bitmaps bitmaps = { .dir = NULL };
	struct node data = NODE_CLOSED;
	struct qcow2_geometry g = { 0 };
	struct plan_new p;
	uint8_t *header = NULL;
	char *data_name = NULL;
	int ret;

	if (!opt->data_file)
		return fail(EX_PARAMETER,
			    "create needs to know where the data is; give --data-file DEV|FILE");
	/* Read only: nothing here can ever write to it. */
	ret = node_open(&data, AT_FDCWD, opt->data_file, NODE_READ_ONLY);
	if (!ret)
		ret = header_name(&data_name, opt->data_file, args[0]);
	if (!ret)
		ret = open_backing(opt, args[0], &data, &backing);
	if (!ret)
		ret = choose_size(opt, &data, &backing, &g);
	if (!ret)
		ret = choose_layout(opt, args[0], &g, &p, &bitmaps);
	if (ret)
		goto out;

	header = malloc(1UL << g.cluster_bits);
	if (!header) {
		ret = fail_nomem();
		goto out;
	}
	if (!make_header(header, &g, data_name, opt->data_file_raw,
			 &backing, &bitmaps)) {
		ret = fail(EX_WRONG,
			   "%s: name is too long for a header of %s; use a shorter path, or a larger --cluster-size",
			   esc(backing.name ? backing.name : data_name),
			   human_size(1ULL << g.cluster_bits));
		goto out;
	}
	interrupt_catch();
	ret = opt->overwrite_device ? open_device(&t) : make_file(&t);
	if (!ret && !t.made)
		ret = check_device(&t, &data, &backing.node, &g, &p);
	if (!ret)
		ret = write_image(&t, &g, &p, header, opt->data_file_raw,
				  &bitmaps);
	if (ret && t.made && unlinkat(t.dir, t.name, 0))
		warning("%s: cannot remove the unfinished file: %s",
			esc(t.path), strerror(errno));
out:
	free(header);
	free(bitmaps.dir);
	bitmaps_free(&bitmaps.s);
	node_close(&t.node);
	node_close(&data);
	node_close(&backing.node);
	free(backing.name);
	free(data_name);
	if (t.dir >= 0)
		close(t.dir);
	return interrupt_result(ret);
}
