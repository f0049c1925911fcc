// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * qcow2setup resize: give an image another size, or a device that is open
 * (stack/change.c; what is written beside the guest's requests: image/grow.c).
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "commands/commands.h"
#include "image/image.h"
#include "image/shrink.h"
#include "lib/interrupt.h"
#include "lib/util.h"
#include "stack/change.h"
#include "stack/mapping.h"
#include "system/claim.h"
#include "system/device.h"
#include "system/locks.h"
#include "system/node.h"

#define SECTOR		512

/*
 * @old: bytes of the disk until now; @size: of the data, which is made longer if it
 * ends within a sector
 */
static int choose_size(const struct options *opt, const char *path,
		       uint64_t old, uint64_t size, unsigned int block,
		       uint64_t *new)
{
	*new = opt->size_auto ? align_up(size, block) : opt->size;
	if (opt->size_more && __builtin_add_overflow(old, opt->size, new))
		return fail(EX_WRONG, "%s; give a smaller --size",
			    qcow2_fault_str(QCOW2_FAULT_SIZE_BIG));
	if (*new % block)
		return fail(EX_PARAMETER,
			    "%s: size of %llu bytes is no multiple of %u; give --size %llu",
			    esc(path), (unsigned long long)*new, block,
			    (unsigned long long)align_up(*new, block));
	return 0;
}

/*
 * An image that nobody has open
 */

struct offline {
	struct image img;
	struct node data;
	struct node backing;
	char *backing_arg;
};

static int open_image(struct offline *o, const char *path)
{
	struct reasons reasons;
	int ret = image_open_locked(&o->img, path, true);

	if (ret)
		return ret;
	image_reasons(&o->img, false, &reasons);
	if (reasons.n)
		return fail(EX_WRONG, "%s: %s; %s", esc(path),
			    reasons.r[0].cause, reasons.r[0].remedy);
	return image_load_tables(&o->img, true);
}

static int open_offline_data(struct offline *o, const struct options *opt)
{
	int ret;

	if (!opt->data_file && opt->size_auto)
		return fail(EX_PARAMETER,
			    "%s: --size auto is the size of the data; give --data-file DEV|FILE, too",
			    esc(o->img.node.path));
	if (!opt->data_file)
		return 0;
	ret = node_open(&o->data, AT_FDCWD, opt->data_file, 0);
	if (!ret && node_same(&o->img.node, &o->data))
		return fail(EX_WRONG,
			    "%s: image and data are the same file or device; give the data file of the image with --data-file",
			    esc(o->data.path));
	if (!ret)
		ret = node_lock(&o->data, true);
	return ret ? ret : claim_check(&o->data, true);
}

/*
 * How long is what shows where nothing is allocated?  It need not be known:
 * more is written to be zero then.
 */
static int open_offline_backing(struct offline *o, const struct options *opt,
				struct growth *g)
{
	const char *data;
	bool image;
	int ret;

	if (!o->img.h.backing_file.s && opt->backing_files)
		return fail(EX_PARAMETER,
			    "%s: image has no backing file; leave --backing-file out",
			    esc(o->img.node.path));
	if (!o->img.h.backing_file.s)
		return 0;
	g->backing_size = UINT64_MAX;
	if (!opt->backing_files)
		return 0;
	if (opt->backing_files > 1)
		return fail(EX_PARAMETER,
			    "only the backing file of the image itself is of use; give --backing-file once");
	o->backing_arg = strdup(opt->backing_file[0]);
	if (!o->backing_arg)
		return fail_nomem();
	data = backing_arg_split(o->backing_arg);
	ret = node_open(&o->backing, AT_FDCWD, o->backing_arg, NODE_READ_ONLY);
	if (!ret)
		ret = node_lock(&o->backing, false);
	if (!ret)
		ret = backing_is_image(&o->img.h, &o->backing, data, false,
				       &image);
	if (ret)
		return ret;
	g->backing_size = o->backing.size;
	g->backing = &o->backing;
	if (!image)
		return 0;
	/* What it holds cannot be read here, only how much it is. */
	g->backing = NULL;
	return image_virtual_size(&o->backing, &g->backing_size);
}

static int check_offline_data(const struct offline *o, uint64_t size)
{
	const struct node *data = &o->data;

	if (!data->bdev || data->size >= size)
		return 0;
	return fail(EX_WRONG,
		    "%s: data device has %llu bytes, less than the new size of %llu; enlarge the device",
		    esc(data->path), (unsigned long long)data->size,
		    (unsigned long long)size);
}

/* What lies behind the new end is lost: only if that is wanted. */
static int may_shrink(const struct options *opt, const struct offline *o,
		      uint64_t size)
{
	const char *path = o->img.node.path;

	if (opt->shrink)
		return 0;
	if (opt->size_auto)
		return fail(EX_WRONG,
			    "%s: data has %llu bytes, the image %llu; enlarge the data, or use --shrink if what the image has behind that may be lost",
			    esc(path), (unsigned long long)size,
			    (unsigned long long)o->img.geo.size);
	return fail(EX_WRONG,
		    "%s: has %llu bytes, and what is behind the new end would be lost; use --shrink if it may be",
		    esc(path), (unsigned long long)o->img.geo.size);
}

/* As qemu-img does; a longer file would do no harm. */
static void cut_data(const struct offline *o, uint64_t size)
{
	struct stat st;

	if (o->data.fd < 0 || o->data.bdev || fstat(o->data.fd, &st) ||
	    (uint64_t)st.st_size <= size)
		return;
	if (ftruncate(o->data.fd, size) || fsync(o->data.fd))
		warning("%s: cannot cut it off at %llu bytes: %s",
			esc(o->data.path), (unsigned long long)size,
			strerror(errno));
	else
		note("%s: cut off at %llu bytes", esc(o->data.path),
		     (unsigned long long)size);
}

static int shrink_offline(struct offline *o, uint64_t size)
{
	uint64_t cut;
	int ret;

	ret = image_shrink(&o->img, size);
	if (ret) {
		image_undo(&o->img);
		return ret;
	}
	cut_data(o, size);
	image_trim(&o->img, &cut);
	return 0;
}

/* The image may have the size already; the data must have it in any case. */
static int grow_offline(struct offline *o, struct growth *g)
{
	struct grown_file file = { .fd = -1, .path = o->data.path };
	uint64_t cut;
	int ret = 0;

	if (o->data.fd >= 0 && !o->data.bdev) {
		file.fd = o->data.fd;
		ret = grow_file(&file, g->size);
	}
	if (g->size == o->img.geo.size)
		return ret;
	/* The format wants this of all who write. */
	if (!ret)
		ret = image_clear_autoclear(&o->img);
	o->img.space_kind = IMAGE_PASSING;
	if (!ret && interrupted())
		ret = EX_WRONG;
	if (!ret)
		ret = image_grow(&o->img, g);
	if (ret) {
		image_undo(&o->img);
		shrink_file(&file);
		return ret;
	}
	/* It is done; a longer file would do no harm. */
	image_trim(&o->img, &cut);
	return 0;
}

static int resize_image(const struct options *opt, const char *path)
{
	struct offline o = {
		.img = IMAGE_CLOSED, .data = NODE_CLOSED,
		.backing = NODE_CLOSED,
	};
	struct growth g = { 0 };
	unsigned int block;
	int ret;

	ret = open_image(&o, path);
	if (!ret)
		ret = open_offline_data(&o, opt);
	if (!ret)
		ret = open_offline_backing(&o, opt, &g);
	block = o.data.bdev ? o.data.block_size : SECTOR;
	if (!ret)
		ret = choose_size(opt, path, o.img.geo.size, o.data.size, block,
				  &g.size);
	if (!ret && g.size < o.img.geo.size)
		ret = may_shrink(opt, &o, g.size);
	if (!ret)
		ret = check_offline_data(&o, g.size);
	if (!ret && g.size < o.img.geo.size) {
		ret = shrink_offline(&o, g.size);
	} else if (!ret) {
		if (o.data.fd >= 0)
			g.data = &o.data;
		ret = grow_offline(&o, &g);
	}
	free(o.backing_arg);
	node_close(&o.backing);
	node_close(&o.data);
	image_close(&o.img);
	return ret;
}

/*
 * A device that is open
 */

struct live_resize {
	const struct options *opt;
	struct growth g;
	struct grower *grower;
};

/* Smaller: not while somebody may use what would be cut off. */
static int check_larger(const struct live *l, const struct options *opt,
			uint64_t size)
{
	uint64_t old = l->sectors * SECTOR;
	const char *image = l->meta.node.path;

	if (size >= old)
		return 0;
	if (opt->size_auto)
		return fail(EX_WRONG,
			    "%s: data has %llu bytes, the device %llu, and is not made smaller while it is open; enlarge the data, or close it and use qcow2setup resize %s --size %llu --shrink",
			    esc(l->name), (unsigned long long)size,
			    (unsigned long long)old, esc(image),
			    (unsigned long long)size);
	return fail(EX_WRONG,
		    "%s: has %llu bytes, and is not made smaller while it is open; close it, and use qcow2setup resize %s --size %llu --shrink",
		    esc(l->name), (unsigned long long)old, esc(image),
		    (unsigned long long)size);
}
/* What is new, where the kernel does not look: beside its work. */
static int prepare(struct live *l, void *arg)
{
	struct live_resize *r = arg;
	struct growth *g = &r->g;
	int ret = 0;

	if (g->size > l->data.node.size)
		ret = part_extend(&l->data, g->size);
	if (!ret && interrupted())
		ret = EX_WRONG;
	if (!ret)
		ret = live_look(l, r->opt->sparse);
	if (!ret && g->size < l->before.geo.size)
		ret = fail(EX_WRONG,
			   "%s: image has %llu bytes already; give --size %llu",
			   esc(l->name),
			   (unsigned long long)l->before.geo.size,
			   (unsigned long long)l->before.geo.size);
	return ret ? ret : image_grow_begin(&l->before, g, &r->grower);
}

static int apply(struct live *l, void *arg)
{
	struct live_resize *r = arg;

	return image_grow_end(&l->img, r->grower);
}

static int resize_live(struct live *l, struct live_resize *r)
{
	const struct change c = {
		.prepare = prepare, .apply = apply, .arg = r,
	};
	uint64_t have = l->data.node.size;
	unsigned int block = l->data.node.block_size;
	int ret;

	/* A file may have grown without its loop device knowing. */
	if (l->data.file.fd >= 0)
		have = max_u64(have, l->data.file.before);
	ret = choose_size(r->opt, l->name, l->sectors * SECTOR, have, block,
			  &r->g.size);
	if (!ret)
		ret = check_larger(l, r->opt, r->g.size);
	if (ret)
		return ret;
	r->g.data = &l->data.node;
	if (l->table.f.backing_dev) {
		r->g.backing = &l->backing.node;
		r->g.backing_size = l->backing.node.size;
	}
	return live_change(l, &c);
}

static int resize_device(const struct options *opt, const char *name)
{
	struct live_resize r = { .opt = opt };
	struct live l = LIVE_CLOSED;
	int ret;

	if (opt->data_file || opt->backing_files)
		return fail(EX_PARAMETER,
			    "%s: is open and has its data; leave --data-file and --backing-file out",
			    esc(name));
	ret = live_open(&l, name, "resize");
	if (!ret && l.table.f.view)
		ret = fail(EX_BUSY,
			   "%s: a backup of it is under way; end it first (qcow2setup backup end %s)",
			   esc(name), shell_quote(name));
	if (!ret)
		ret = resize_live(&l, &r);
	image_grow_free(r.grower);
	live_close(&l);
	return ret;
}

int cmd_resize(const struct options *opt, char **args)
{
	char buf[160];
	const char *name = device_live_name(args[0], buf, sizeof(buf));
	int ret;

	if (!opt->size && !opt->size_auto)
		return fail(EX_PARAMETER,
			    "resize needs to know the new size; give --size SIZE|+SIZE|auto");
	interrupt_catch();
	ret = name ? resize_device(opt, name) : resize_image(opt, args[0]);
	return interrupt_result(ret);
}
