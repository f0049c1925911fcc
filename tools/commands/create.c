// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * qcow2setup create: a new image for a data file or device that exists, and is not
 * touched, or for a new file.
 */
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "commands/commands.h"
#include "image/bitmaps.h"
#include "image/image.h"
#include "image/make.h"
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

/* Where files can be, and not only devices. */
static bool may_hold_files(const char *folder)
{
	return !starts_with(folder, "/dev/") || starts_with(folder, "/dev/shm/");
}

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

	ret = t->dir < 0 ? open_folder(t) : 0;
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

static void remove_made(struct target_file *t)
{
	if (t->made && unlinkat(t->dir, t->name, 0))
		warning("%s: cannot remove the unfinished file: %s",
			esc(t->path), strerror(errno));
	t->made = false;
}

/* The data file is not there: make it, with nothing but a hole. */
static int make_data(struct target_file *t, uint64_t size)
{
	char self[40], folder[PATH_MAX + 2];
	ssize_t n;
	int ret;

	if (size > QCOW2_MAX_OFFSET)
		return fail(EX_WRONG, "%s; give a smaller --size",
			    qcow2_fault_str(QCOW2_FAULT_SIZE_BIG));
	size = align_up(size, 512);
	ret = open_folder(t);
	if (ret)
		return ret;
	snprintf(self, sizeof(self), "/proc/self/fd/%d", t->dir);
	n = readlink(self, folder, sizeof(folder) - 2);
	strcpy(folder + (n < 0 ? 0 : n), "/");
	if (!may_hold_files(folder))
		return fail(EX_WRONG,
			    "%s: no such device, and no file is made below /dev; check the name",
			    esc(t->path));
	ret = make_file(t);
	if (ret)
		return ret;
	if (ftruncate(t->node.fd, size))
		ret = fail_errno("%s: cannot give it %llu bytes", esc(t->path),
				 (unsigned long long)size);
	else if (fsync(t->node.fd) || fsync(t->dir))
		ret = fail_errno("%s: cannot flush it", esc(t->path));
	node_close(&t->node);
	if (!ret)
		note("%s: made, with %llu bytes, which are a hole", esc(t->path),
		     (unsigned long long)size);
	return ret;
}

/*
 * An image is data only by mistake: its metadata would be read as a disk.  A guest can
 * make its raw disk look like one, and so nothing follows from it but a question.
 */
static int check_data(const struct options *opt, const struct node *data)
{
	uint32_t magic = 0;
	int ret = 0;

	if (opt->accept_data || data->size < sizeof(magic))
		return 0;
	ret = node_read(data, &magic, sizeof(magic), 0);
	if (ret) {
		errno = -ret;
		return fail_errno("%s: cannot be read", esc(data->path));
	}
	if (magic != htobe32(QCOW2_MAGIC))
		return 0;
	return fail(EX_WRONG,
		    "%s: is a qcow2 image, and no data of one; make a raw file of it (qemu-img convert -f qcow2 -O raw %s NEW), or give --accept-data if a disk begins like that",
		    esc(data->path), shell_quote(data->path));
}

/* Read only: nothing here can ever write to data that exists. */
static int open_data(const struct options *opt, const char *image,
		     struct target_file *made, struct node *data)
{
	struct stat st;
	int ret = 0;

	made->path = opt->data_file;
	if (opt->size && lstat(opt->data_file, &st) && errno == ENOENT)
		ret = make_data(made, opt->size);
	else if (!opt->size && stat(opt->data_file, &st) && errno == ENOENT)
		return fail(EX_WRONG,
			    "%s: no such file or device; check the name, or give --size SIZE to make a file",
			    esc(opt->data_file));
	if (!ret)
		ret = node_open(data, AT_FDCWD, opt->data_file, NODE_READ_ONLY);
	if (ret)
		return ret;
	/* One device for both is no matter of what is on it: check_device() says so. */
	if (opt->overwrite_device && data->bdev && !stat(image, &st) &&
	    S_ISBLK(st.st_mode) && st.st_rdev == data->rdev)
		return 0;
	return check_data(opt, data);
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
	plan_place(g, p);
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

static void tell(const struct new_image *n, const struct node *data)
{
	unsigned int bits = n->g.cluster_bits;

	note("%s: made for %s %s, which is %s", esc(n->path),
	     data->bdev ? "device" : "file", esc(data->path),
	     n->raw ? "a raw disk that is kept" : "not looked at");
	note("%s: a disk of %llu bytes, in clusters of %s", esc(n->path),
	     (unsigned long long)n->g.size, human_size(1ULL << bits));
	if (n->backing)
		note("%s: reads as %s (%s) where nothing was written",
		     esc(n->path), esc(n->backing), n->backing_format);
	note("%s: metadata of %s, which can become %s", esc(n->path),
	     human_size(n->p.clusters << bits), human_size(n->p.worst_case << bits));
}

int cmd_create(const struct options *opt, char **args)
{
	struct target_file t = {
		.path = args[0], .node = NODE_CLOSED, .dir = -1,
	};
	struct target_file made = { .node = NODE_CLOSED, .dir = -1 };
	struct new_backing backing = { .node = NODE_CLOSED };
	struct new_bitmaps bitmaps = { .dir = NULL };
	struct node data = NODE_CLOSED;
	struct new_image n = { .path = args[0] };
	uint8_t *header = NULL;
	char *data_name = NULL;
	int ret;

	if (!opt->data_file)
		return fail(EX_PARAMETER,
			    "create needs to know where the data is; give --data-file DEV|FILE");
	ret = open_data(opt, args[0], &made, &data);
	if (!ret)
		ret = header_name(&data_name, opt->data_file, args[0]);
	if (!ret)
		ret = open_backing(opt, args[0], &data, &backing);
	if (!ret)
		ret = choose_size(opt, &data, &backing, &n.g);
	if (!ret)
		ret = choose_layout(opt, args[0], &n.g, &n.p, &bitmaps);
	if (ret)
		goto out;

	header = malloc(1UL << n.g.cluster_bits);
	if (!header) {
		ret = fail_nomem();
		goto out;
	}
	n.data_file = data_name;
	n.raw = opt->data_file_raw;
	n.backing = backing.name;
	n.backing_format = backing.format;
	n.bitmaps = bitmaps.dir;
	n.bitmaps_ext = bitmaps.ext;
	if (!new_image_header(&n, header)) {
		ret = fail(EX_WRONG,
			   "%s: name is too long for a header of %s; use a shorter path, or a larger --cluster-size",
			   esc(backing.name ? backing.name : data_name),
			   human_size(1ULL << n.g.cluster_bits));
		goto out;
	}
	interrupt_catch();
	ret = opt->overwrite_device ? open_device(&t) : make_file(&t);
	if (!ret && !t.made)
		ret = check_device(&t, &data, &backing.node, &n.g, &n.p);
	n.fd = t.node.fd;
	n.dir = t.made ? t.dir : -1;
	n.fresh = t.made;
	if (!ret)
		ret = new_image_write(&n, header);
	if (ret)
		remove_made(&t);
	else
		tell(&n, &data);
out:
	if (ret)
		remove_made(&made);
	free(header);
	free(bitmaps.dir);
	bitmaps_free(&bitmaps.s);
	node_close(&t.node);
	node_close(&data);
	node_close(&backing.node);
	free(backing.name);
	free(data_name);
	if (made.dir >= 0)
		close(made.dir);
	if (t.dir >= 0)
		close(t.dir);
	return interrupt_result(ret);
}
