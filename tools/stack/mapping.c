// SPDX-License-Identifier: GPL-2.0-or-later
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "lib/util.h"
#include "stack/mapping.h"
#include "system/claim.h"
#include "system/device.h"
#include "system/locks.h"
#include "system/sysfs.h"

#define DATA_FILE_WORD	",data-file="

bool plain_path(const struct span *name, const char **why)
{
	size_t i;

	*why = NULL;
	if (!name->len)
		*why = "empty";
	else if (name->len >= PATH_MAX)
		*why = "longer than a path can be";
	else if (memchr(name->s, 0, name->len))
		*why = "no string";
	/* "json:{...}", "nbd://..." and the like, as QEMU tells them apart */
	for (i = 0; !*why && i < name->len && name->s[i] != '/'; i++)
		if (name->s[i] == ':')
			*why = "a protocol and not a path";
	return !*why;
}

int open_folder_of(const char *path)
{
	const char *slash = strrchr(path, '/');
	char *dir;
	int fd;

	if (!slash)
		return open(".", O_PATH | O_DIRECTORY | O_CLOEXEC);
	dir = strndup(path, slash - path + 1);
	if (!dir)
		return -1;
	fd = open(dir, O_PATH | O_DIRECTORY | O_CLOEXEC);
	free(dir);
	return fd;
}

char *backing_arg_split(char *arg)
{
	char *at = strstr(arg, DATA_FILE_WORD);

	if (!at)
		return NULL;
	*at = 0;
	return at + strlen(DATA_FILE_WORD);
}

/* What a walk down the chain carries with it. */
struct walk {
	const struct chain *chain;
	unsigned int next;	/* --backing-file that has its turn */
	unsigned int depth;
};

/* A file or device may have only one place in a chain. */
static int check_once(const struct mapping *m, const struct node *node)
{
	for (; m; m = m->above) {
		if (node == &m->img.node || node == &m->data)
			continue;
		if (node_same(node, &m->img.node) ||
		    (m->data.fd >= 0 && node_same(node, &m->data)))
			return fail(EX_WRONG,
				    "%s: has two places in the chain of %s; name another file",
				    esc(node->path), esc(m->img.node.path));
	}
	return 0;
}

/*
 * A name that an image records.  It is used only if the user says so, and only
 * if it is a path.  @kind and @option: what it names, and how else to name it.
 */
static int recorded_path(const struct mapping *m, const struct walk *w,
			 const struct span *name, const char *kind,
			 const char *option, char **out)
{
	const char *path = m->img.node.path, *why;

	if (!w->chain->trust_image_paths && name->s)
		return fail(EX_PARAMETER,
			    "%s: the %s file is not named; give %s (the image says %s)%s",
			    esc(path), kind, option, escn(name->s, name->len),
			    takes_trust ? ", or --trust-image-paths" : "");
	if (!name->s)
		return fail(EX_PARAMETER,
			    "%s: the %s file is not named, nor does the image name one; give %s",
			    esc(path), kind, option);
	if (!plain_path(name, &why))
		return fail(EX_WRONG,
			    "%s: the %s file that the image names (%s) is %s; give %s",
			    esc(path), kind, escn(name->s, name->len), why,
			    option);
	*out = strndup(name->s, name->len);
	return *out ? 0 : fail_nomem();
}

/* @named: by the user; NULL: take what the image says */
static int open_data(struct mapping *m, const struct walk *w, int dir,
		     const char *named, bool read_only)
{
	const char *option = m->above ? "--backing-file IMAGE,data-file=DEV|FILE" :
					"--data-file DEV|FILE";
	const struct node *image = &m->img.node;
	unsigned int flags = read_only ? NODE_READ_ONLY : 0;
	int ret;

	if (named) {
		ret = node_open(&m->data, AT_FDCWD, named, flags);
	} else {
		ret = recorded_path(m, w, &m->img.h.data_file, "data", option,
				    &m->data_path);
		if (!ret)
			ret = node_open_recorded(&m->data, dir, m->data_path,
						 flags, option);
	}
	if (ret)
		return ret;
	if (node_same(image, &m->data))
		return fail(EX_WRONG,
			    "%s: image and data are the same file or device; give the data file of the image with --data-file",
			    esc(m->data.path));
	ret = check_once(m, &m->data);
	if (!ret)
		ret = node_lock(&m->data, !read_only);
	if (!ret)
		ret = claim_check(&m->data, !read_only);
	return ret;
}

unsigned int mapping_block_size(const struct mapping *m)
{
	return m->data.bdev ? m->data.block_size : 512;
}

static int check_data(const struct mapping *m)
{
	const struct node *data = &m->data;
	uint64_t size = m->img.geo.size, unit;
	unsigned int block = mapping_block_size(m);

	unit = 1ULL << qcow2_unit_bits(&m->img.geo);
	if (block > unit)
		return fail(EX_WRONG,
			    "%s: data device has blocks of %u bytes, larger than the image's %s of %llu; put the data on a device with smaller blocks, or in a file",
			    esc(data->path), block,
			    m->img.geo.ext_l2 ? "subclusters" : "clusters",
			    (unsigned long long)unit);
	if (size % block)
		return fail(EX_WRONG,
			    "%s: size of %llu bytes is no multiple of the data device's blocks of %u; resize the image (qcow2setup resize %s --size %llu), or put the data in a file",
			    esc(m->img.node.path), (unsigned long long)size,
			    block, shell_quote(m->img.node.path),
			    (unsigned long long)align_up(size, block));
	if (data->size >= size)
		return 0;
	if (data->bdev)
		return fail(EX_WRONG,
			    "%s: data device has %llu bytes, the image needs %llu; enlarge the device",
			    esc(data->path), (unsigned long long)data->size,
			    (unsigned long long)size);
	return fail(EX_WRONG,
		    "%s: data file has %llu bytes, the image needs %llu; enlarge it with truncate -s %llu %s",
		    esc(data->path), (unsigned long long)data->size,
		    (unsigned long long)size, (unsigned long long)size,
		    shell_quote(data->path));
}

/* Does a backing of @size bytes fit below @m? */
static int check_backing_size(const struct mapping *m, const char *path,
			      uint64_t size, bool device)
{
	unsigned int block = mapping_block_size(m);

	/* What is read past its end are zeros, in whole blocks. */
	if (size >= m->img.geo.size || !(size % block))
		return 0;
	return fail(EX_WRONG,
		    "%s: size of %llu bytes is no multiple of the blocks of %u bytes of the data device of %s; %s",
		    esc(path), (unsigned long long)size, block,
		    esc(m->img.node.path), device ?
		    "give it another size, or put the data in a file" :
		    "resize it with qcow2setup resize, or put the data in a file");
}

static int check_backing_device(const struct mapping *m,
				const struct node *node)
{
	uint64_t unit = 1ULL << qcow2_unit_bits(&m->img.geo);

	if (node->block_size > unit)
		return fail(EX_WRONG,
			    "%s: backing device has blocks of %u bytes, larger than the image's %s of %llu; copy it to a device with smaller blocks, or to a file",
			    esc(node->path), node->block_size,
			    m->img.geo.ext_l2 ? "subclusters" : "clusters",
			    (unsigned long long)unit);
	return check_backing_size(m, node->path, node->size, true);
}

/*
 * Is a device a qcow2 one, whoever has made it?  If so, it must not be written under
 * an overlay.
 */
static int check_stacked(const struct node *node, bool *ours)
{
	char number[32], uuid[160] = "", type[64];
	struct device d;

	snprintf(number, sizeof(number), "%u:%u", major(node->rdev),
		 minor(node->rdev));
	*ours = false;
	if (!device_look_up(number, &d) || !*d.dm_name)
		return 0;
	sysfs_read(uuid, sizeof(uuid), "/sys/block/%.200s/dm/uuid",
		   d.kernel_name);
	*ours = device_kind(d.dm_name, uuid, type, sizeof(type)) != DEVICE_OTHER;
	if (!*ours || device_only_reads(d.kernel_name, d.dm_name, ""))
		return 0;
	return fail(EX_BUSY,
		    "%s: qcow2 device that can be written, so it cannot be a backing device; close it, and open it with --readonly",
		    esc(node->path));
}

static int open_layer(struct mapping *m, struct walk *w, int dir,
		      struct node *node, const char *data, bool read_only);

/* An image as the backing of @m; takes @b->node over. */
static int open_backing_image(struct mapping *m, struct walk *w, int dir,
			      const char *data)
{
	struct backing *b = m->backing;
	struct node node = b->node;
	int ret;

	b->node = (struct node)NODE_CLOSED;
	b->image = calloc(1, sizeof(*b->image));
	if (!b->image) {
		node_close(&node);
		return fail_nomem();
	}
	*b->image = (struct mapping)MAPPING_CLOSED;
	b->image->above = m;
	ret = open_layer(b->image, w, dir, &node, data, true);
	if (!ret)
		ret = check_backing_size(m, b->image->img.node.path,
					 b->image->img.geo.size, false);
	return ret;
}

static bool span_is(const struct span *s, const char *text)
{
	return s->s && s->len == strlen(text) && !memcmp(s->s, text, s->len);
}

int backing_is_image(const struct header *h, const struct node *node,
		     const char *data, bool trust, bool *image)
{
	bool qcow2 = span_is(&h->backing_format, "qcow2"), ours = false;
	int ret;

	if (node->bdev) {
		ret = check_stacked(node, &ours);
		if (ret)
			return ret;
	}
	if (data && (!qcow2 || ours))
		return fail(EX_PARAMETER,
			    "%s: is used as a raw disk, which has no data file; leave " DATA_FILE_WORD " out",
			    esc(node->path));
	/*
	 * A device that stands for an image shows what the image holds: one
	 * of ours, or qemu-nbd's.  It is a mistake if it shows the image file.
	 */
	if (qcow2 && node->bdev && !ours && !data && !trust && image_has_magic(node))
		return fail(EX_PARAMETER,
			    "%s: holds a qcow2 image, whose data file is not named; give --backing-file %s" DATA_FILE_WORD "DEV|FILE",
			    esc(node->path), esc(node->path));
	*image = qcow2 && (!node->bdev || data || (!ours && image_has_magic(node)));
	return 0;
}

/* The device or file at @b->node is what @m names as its backing file. */
static int use_backing(struct mapping *m, struct walk *w, int dir,
		       const char *data)
{
	struct node *node = &m->backing->node;
	bool image;
	int ret;

	ret = check_once(m, node);
	if (!ret)
		ret = backing_is_image(&m->img.h, node, data,
				       w->chain->trust_image_paths, &image);
	if (ret)
		return ret;
	if (image)
		return open_backing_image(m, w, dir, data);

	ret = node_lock(node, false);
	if (!ret)
		ret = claim_check(node, false);
	if (!ret && node->bdev)
		ret = check_backing_device(m, node);
	return ret;
}

static int open_backing(struct mapping *m, struct walk *w, int dir)
{
	static const char option[] = "--backing-file DEV|FILE";
	struct backing *b;
	char *data = NULL;
	int ret, at = AT_FDCWD;

	if (!m->img.h.backing_file.s) {
		if (w->next < w->chain->backing_files)
			return fail(EX_PARAMETER,
				    "%s: image has no backing file; leave --backing-file %s out",
				    esc(m->img.node.path),
				    esc(w->chain->backing_file[w->next]));
		return 0;
	}
	if (++w->depth > MAX_BACKING_FILES)
		return fail(EX_WRONG,
			    "%s: chain has more than %d backing files; merge some: qemu-img rebase -f qcow2 -F qcow2 -b BASE IMAGE",
			    esc(m->img.node.path), MAX_BACKING_FILES);
	b = m->backing = calloc(1, sizeof(*b));
	if (!b)
		return fail_nomem();
	b->node = (struct node)NODE_CLOSED;
	if (w->next < w->chain->backing_files) {
		b->arg = strdup(w->chain->backing_file[w->next++]);
		if (!b->arg)
			return fail_nomem();
		data = backing_arg_split(b->arg);
		ret = node_open(&b->node, at, b->arg, NODE_READ_ONLY);
	} else {
		at = dir;
		ret = recorded_path(m, w, &m->img.h.backing_file, "backing",
				    option, &b->arg);
		if (!ret)
			ret = node_open_recorded(&b->node, at, b->arg,
						 NODE_READ_ONLY, option);
	}
	if (ret)
		return ret;
	/* Names in the image below start in its own folder. */
	dir = openat(at, ".", O_PATH | O_DIRECTORY | O_CLOEXEC);
	if (dir >= 0 && strchr(b->arg, '/')) {
		char *folder = strndup(b->arg, strrchr(b->arg, '/') - b->arg + 1);
		int below = folder ? openat(dir, folder, O_PATH | O_DIRECTORY |
					    O_CLOEXEC) : -1;

		free(folder);
		close(dir);
		dir = below;
	}
	ret = use_backing(m, w, dir, data);
	if (dir >= 0)
		close(dir);
	return ret;
}

/* An image with data and backing; @node, open already, becomes the image's. */
static int open_layer(struct mapping *m, struct walk *w, int dir,
		      struct node *node, const char *data, bool read_only)
{
	const char *path = node->path;
	struct reasons reasons;
	int ret;

	/* Nothing is read before the lock, so that nothing read is stale. */
	ret = node_lock(node, !read_only);
	if (!ret)
		ret = claim_check(node, !read_only);
	if (ret) {
		node_close(node);
		return ret;
	}
	ret = image_attach(&m->img, node);
	if (ret)
		return ret;
	if (m->above && !(m->img.h.incompatible & QCOW2_INCOMPAT_DATA_FILE))
		return fail(EX_WRONG,
			    "%s: backing image has no external data file; make it a device (qemu-nbd --read-only -f qcow2 --connect=/dev/nbd0 %s), and give --backing-file /dev/nbd0",
			    esc(path), shell_quote(path));
	image_reasons(&m->img, read_only, &reasons);
	if (reasons.n)
		return fail(EX_WRONG, "%s: %s; %s", esc(path),
			    reasons.r[0].cause, reasons.r[0].remedy);
	ret = open_data(m, w, dir, data, read_only);
	if (!ret)
		ret = check_data(m);
	if (!ret)
		ret = image_load_tables(&m->img, !read_only);
	if (!ret)
		ret = open_backing(m, w, dir);
	return ret;
}

int mapping_open(struct mapping *m, const struct chain *chain,
		 const char *path)
{
	struct walk w = { .chain = chain };
	struct node node;
	int dir, ret;

	*m = (struct mapping)MAPPING_CLOSED;
	ret = node_open(&node, AT_FDCWD, path,
			chain->read_only ? NODE_READ_ONLY : 0);
	if (ret) {
		node_close(&node);
		return ret;
	}
	dir = open_folder_of(path);
	ret = open_layer(m, &w, dir, &node, chain->data_file, chain->read_only);
	if (dir >= 0)
		close(dir);
	return ret;
}

void mapping_close(struct mapping *m)
{
	image_close(&m->img);
	node_close(&m->data);
	free(m->data_path);
	m->data_path = NULL;
	if (m->backing) {
		node_close(&m->backing->node);
		if (m->backing->image)
			mapping_close(m->backing->image);
		free(m->backing->image);
		free(m->backing->arg);
		free(m->backing);
		m->backing = NULL;
	}
}

bool mapping_raw(const struct mapping *m)
{
	return m->img.h.autoclear & QCOW2_AUTOCLEAR_RAW_DATA;
}

int image_open_locked(struct image *img, const char *path, bool write)
{
	struct node node;
	int ret;

	*img = (struct image)IMAGE_CLOSED;
	ret = node_open(&node, AT_FDCWD, path, write ? 0 : NODE_READ_ONLY);
	if (!ret)
		ret = node_lock(&node, write);
	if (!ret)
		ret = claim_check(&node, write);
	if (ret) {
		node_close(&node);
		return ret;
	}
	return image_attach(img, &node);
}
