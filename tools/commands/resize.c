// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * qcow2setup resize: give an image another size, or a device that is open.
 *
 * A live one is suspended for the switch: the kernel has then written all that it
 * knows, and reads header and L1 table again when it is resumed.  All that takes
 * longer is done before, beside the guest's requests (image/grow.c).  Whatever goes
 * wrong, the old image and the old table come back.
 *
 * If this program is killed on the way, a helper brings them back (system/keeper.c).  If
 * that is killed, too, the device stays suspended.  Before the image changes
 * another table is loaded, the old one at first, so that a device in that state is
 * known again: another resize goes on from there.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <linux/loop.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "commands/commands.h"
#include "image/image.h"
#include "image/shrink.h"
#include "lib/interrupt.h"
#include "lib/util.h"
#include "stack/mapping.h"
#include "system/claim.h"
#include "system/device.h"
#include "system/dm.h"
#include "system/keeper.h"
#include "system/live.h"
#include "system/locks.h"
#include "system/loop.h"
#include "system/node.h"
#include "system/target.h"

#define SECTOR		512
#define LOCK_MS		3000

/* @size: of the data, which is made longer if it ends within a sector */
static int choose_size(const struct options *opt, const char *path,
		       uint64_t size, unsigned int block, uint64_t *new)
{
	*new = opt->size_auto ? align_up(size, block) : opt->size;
	if (*new % block)
		return fail(EX_PARAMETER,
			    "%s: size of %llu bytes is no multiple of %u; give --size %llu",
			    esc(path), (unsigned long long)*new, block,
			    (unsigned long long)align_up(*new, block));
	return 0;
}

/* A file that is made longer, and can be put back. */
struct grown_file {
	int fd;			/* -1: none */
	const char *path;
	uint64_t before;
	bool grown;
};

static int grow_file(struct grown_file *f, uint64_t size)
{
	struct stat st;

	if (fstat(f->fd, &st))
		return fail_errno("%s: cannot stat it", esc(f->path));
	f->before = st.st_size;
	if (f->before >= size)
		return 0;
	/* Durable before an image says that it is there. */
	if (ftruncate(f->fd, size) || fsync(f->fd)) {
		int ret = fail_errno("%s: cannot extend it to %s",
				     esc(f->path), human_size(size));

		if (ftruncate(f->fd, f->before))
			warning("%s: cannot cut it off again", esc(f->path));
		return ret;
	}
	f->grown = true;
	note("%s: extended to %s", esc(f->path), human_size(size));
	return 0;
}

static void shrink_file(struct grown_file *f)
{
	if (f->grown && ftruncate(f->fd, f->before))
		warning("%s: cannot cut it off again: %s", esc(f->path),
			strerror(errno));
	f->grown = false;
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
		ret = choose_size(opt, path, o.data.size, block, &g.size);
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

/* A block device below it, and the file if it is a loop device. */
struct part {
	struct device d;
	struct node node;
	struct grown_file file;		/* fd -1: no file that could grow */
	char path[300];			/* what node.path points to */
};

#define PART_CLOSED	{ .node = NODE_CLOSED, .file.fd = -1 }

struct live {
	const char *name;
	uint64_t sectors;
	char *params;			/* of the table that is live */
	struct target_table table;
	struct part meta, data, backing;
	/* As it is while the kernel has it, and when it is at rest */
	struct image before, img;
	struct grower *grower;
	struct keeper keeper;
	int meta_fd;			/* the helper has this one, too */
	int lock;
	bool left;			/* suspended by a resize that was killed */
};

static int part_open(struct part *p, const char *number, unsigned int flags)
{
	char now[32];
	int ret;

	if (!device_look_up(number, &p->d))
		return fail(EX_WRONG, "device %s: cannot be found; check /sys/dev/block",
			    esc(number));
	/* The kernel's own name is there without udev, too. */
	snprintf(p->path, sizeof(p->path), "/dev/%s", p->d.kernel_name);
	ret = node_open(&p->node, AT_FDCWD, p->path, flags);
	if (ret)
		return ret;
	snprintf(now, sizeof(now), "%u:%u", major(p->node.rdev),
		 minor(p->node.rdev));
	if (!p->node.bdev || strcmp(now, number))
		return fail(EX_WRONG, "%s: is not device %s; check /dev",
			    esc(p->path), esc(number));
	p->node.path = p->d.ours && p->d.file[0] ? p->d.file : p->d.node;
	return 0;
}

/*
 * The file of a loop device that open has made, if it is still what its name
 * says.  What was given as a device stays as long as it is.
 */
static void part_open_file(struct part *p)
{
	struct loop_view v;
	struct stat st;
	int fd;

	if (!p->d.loop || !loop_look(p->node.fd, &v) || !v.ours)
		return;
	fd = open(p->d.file, O_RDWR | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);
	if (fd < 0)
		return;
	if (fstat(fd, &st) || !S_ISREG(st.st_mode) || st.st_dev != v.dev ||
	    st.st_ino != v.ino) {
		close(fd);
		return;
	}
	p->file.fd = fd;
	p->file.path = p->d.file;
	p->file.before = st.st_size;
}

static void part_close(struct part *p)
{
	node_close(&p->node);
	if (p->file.fd >= 0)
		close(p->file.fd);
	p->file.fd = -1;
}

/* Let a loop device see how long its file is; its size may stay less. */
static int part_update(struct part *p)
{
	if (p->d.loop && p->d.ours && ioctl(p->node.fd, LOOP_SET_CAPACITY, 0))
		return fail_errno("%s: cannot update its size", esc(p->path));
	if (ioctl(p->node.fd, BLKGETSIZE64, &p->node.size))
		return fail_errno("%s: cannot get its size", esc(p->path));
	return 0;
}

/* Make the device of a file longer. */
static int part_extend(struct part *p, uint64_t size)
{
	int ret = 0;

	if (p->file.fd >= 0)
		ret = grow_file(&p->file, size);
	if (!ret)
		ret = part_update(p);
	if (ret || p->node.size >= size)
		return ret;
	return fail(EX_WRONG,
		    "%s: device has %llu bytes, less than the %llu that are needed; enlarge the device",
		    esc(p->node.path), (unsigned long long)p->node.size,
		    (unsigned long long)size);
}

/* For image_make_room(); the node in the image is a copy. */
static int metadata_resized(struct image *img)
{
	struct part *p = img->resized_arg;
	int ret = part_update(p);

	img->node.size = p->node.size;
	return ret;
}

/* Two at once must not do this to one device. */
static int live_lock(struct live *l)
{
	l->lock = open(l->meta.path, O_RDONLY | O_CLOEXEC);
	if (l->lock < 0)
		return fail_errno("%s: cannot open it", esc(l->meta.path));
	/* udev takes such a lock, too, for moments. */
	if (!node_flock(l->lock, LOCK_MS))
		return fail(EX_BUSY,
			    "%s: is being resized, or locked by another program; try again later",
			    esc(l->name));
	return 0;
}

/* Is there such a device, and is it ours?  Before it is locked. */
static int check_device(const struct live *l)
{
	char type[64], remedy[300];
	enum device_kind kind;
	struct dm_dev_info info;
	int ret;

	ret = dm_query(l->name, &info);
	if (ret)
		return ret;
	if (!info.exists)
		return dm_gone(l->name);
	kind = device_kind(l->name, info.uuid, type, sizeof(type));
	if (kind != DEVICE_OURS) {
		snprintf(remedy, sizeof(remedy),
			 "remove it (dmsetup remove %s), and resize the image",
			 shell_quote(l->name));
		return device_not_ours(l->name, kind, type, remedy);
	}
	if (info.read_only)
		return fail(EX_WRONG,
			    "%s: is open read-only; close it (qcow2setup close %s), and resize the image",
			    esc(l->name), shell_quote(l->name));
	return 0;
}

static int read_table(struct live *l)
{
	char *type;
	int ret;

	free(l->params);
	l->params = NULL;
	ret = dm_params(l->name, false, &type, &l->params, &l->sectors);
	if (ret)
		return ret == -ENXIO ? dm_gone(l->name) : ret;
	free(type);
	/* What is not known could not be in the new table. */
	if (!target_parse_table(l->params, &l->table) || l->table.f.unknown)
		return fail(EX_WRONG,
			    "%s: table is not understood; use a newer qcow2setup",
			    esc(l->name));
	return 0;
}

/* Can it be suspended and changed?  When nobody else does that. */
static int check_state(struct live *l)
{
	struct target_status status;
	struct dm_dev_info info;
	int ret;

	ret = dm_query(l->name, &info);
	if (ret)
		return ret;
	l->left = info.suspended && info.inactive;
	if (l->left)
		note("%s: was left suspended by a resize that was killed",
		     esc(l->name));
	else if (info.suspended)
		return fail(EX_BUSY,
			    "%s: is suspended; resume it first (dmsetup resume %s)",
			    esc(l->name), esc(l->name));
	ret = live_status(l->name, &status);
	if (ret)
		return ret == -ENXIO ? dm_gone(l->name) : ret;
	/* What there was no space for may be written in the suspend. */
	if (strcmp(status.mode, "rw") && strcmp(status.mode, "nospc"))
		return fail(EX_WRONG,
			    "%s: is in mode %s; close it (qcow2setup close %s), and check the image",
			    esc(l->name), esc(status.mode),
			    shell_quote(l->name));
	return 0;
}

static int open_live(struct live *l)
{
	int ret;

	ret = check_device(l);
	if (!ret)
		ret = read_table(l);
	if (!ret)
		ret = part_open(&l->meta, l->table.metadata_dev, 0);
	if (!ret)
		ret = live_lock(l);
	/* Another one may have been at it until now. */
	if (!ret)
		ret = check_state(l);
	if (!ret)
		ret = read_table(l);
	if (!ret)
		ret = dm_check_table(l->name, l->params);
	if (!ret &&
	    !device_is_node(l->table.metadata_dev, &l->meta.node))
		ret = fail(EX_BUSY, "%s: has just been given another table; try again",
			   esc(l->name));
	if (!ret)
		ret = part_open(&l->data, l->table.data_dev, 0);
	if (!ret && l->table.f.backing_dev)
		ret = part_open(&l->backing, l->table.f.backing_dev,
				NODE_READ_ONLY);
	if (ret)
		return ret;
	part_open_file(&l->meta);
	part_open_file(&l->data);
	return 0;
}

/* The image in the metadata device, as it is now. */
static int attach(struct live *l, struct image *img)
{
	struct reasons reasons;
	int ret;

	/* The kernel wrote behind whatever was read of it before. */
	node_drop_cache(&l->meta.node);
	ret = image_attach(img, &l->meta.node);
	/* It is the image's now, and closed with it. */
	l->meta.node.fd = dup(img->node.fd);
	if (!ret && l->meta.node.fd < 0)
		ret = fail_errno("%s: cannot duplicate it", esc(l->meta.path));
	if (ret)
		return ret;
	if (l->meta.file.fd >= 0) {
		img->resized = metadata_resized;
		img->resized_arg = &l->meta;
	}
	image_reasons(img, false, &reasons);
	if (reasons.n)
		return fail(EX_WRONG, "%s: %s; %s", esc(l->name),
			    reasons.r[0].cause, reasons.r[0].remedy);
	return image_load_tables(img, true);
}

/* What is new, where the kernel does not look: beside its work. */
static int prepare_live(struct live *l, const struct options *opt,
			const struct growth *g)
{
	struct image *img = &l->before;
	int ret;

	ret = attach(l, img);
	if (ret)
		return ret;
	if (l->meta.file.fd >= 0) {
		img->space.fd = l->meta.file.fd;
		img->space.path = l->meta.file.path;
		img->space.in_use = true;
		img->space_kind = opt->sparse ? IMAGE_SPARSE : IMAGE_REAL;
	}
	if (g->size < img->geo.size)
		return fail(EX_WRONG,
			    "%s: image has %llu bytes already; give --size %llu",
			    esc(l->name), (unsigned long long)img->geo.size,
			    (unsigned long long)img->geo.size);
	return image_grow_begin(img, g, &l->grower);
}

/*
 * What the helper does if this program is killed
 */

struct undo_files {
	struct {
		int file, device;
		uint64_t size;
	} f[2];
};

/* Files get the length that they had. */
static enum keeper_result undo_files(const void *data, size_t len)
{
	const struct undo_files *u = data;
	struct stat st;
	size_t i;

	(void)len;
	for (i = 0; i < ARRAY_SIZE(u->f); i++) {
		if (u->f[i].file < 0 || fstat(u->f[i].file, &st) ||
		    (uint64_t)st.st_size <= u->f[i].size)
			continue;
		/* Pages that are written behind the end would be an error. */
		fsync(u->f[i].device);
		posix_fadvise(u->f[i].device, 0, 0, POSIX_FADV_DONTNEED);
		if (ftruncate(u->f[i].file, u->f[i].size) ||
		    ioctl(u->f[i].device, LOOP_SET_CAPACITY, 0))
			warning("a file cannot be given its length again: %s",
				strerror(errno));
	}
	return KEEPER_GO_ON;
}

struct undo_table {
	struct undo_files files;
	bool changed;		/* another table was to be loaded, or is */
	uint64_t sectors;
	char name[DM_NAME_MAX + 28];
	char params[];
};

static bool is_suspended(const char *name)
{
	struct dm_dev_info info;

	return !dm_query(name, &info) && info.exists && info.suspended;
}

static enum keeper_result undo_table(const void *data, size_t len)
{
	const struct undo_table *u = data;
	const struct dm_line line = {
		.sectors = u->sectors, .type = DM_TARGET, .params = u->params,
	};

	(void)len;
	if (!is_suspended(u->name))
		return u->changed ? KEEPER_STOP : KEEPER_GO_ON;
	if (u->changed) {
		/* A table sees how long its devices are when it is loaded. */
		undo_files(&u->files, sizeof(u->files));
		dm_load(u->name, &line);
	}
	if (!dm_resume(u->name) && !is_suspended(u->name))
		warning("%s: resize was killed, and the device is as it was before",
			esc(u->name));
	else
		warning("%s: resize was killed, and the device stays suspended; try dmsetup resume %s",
			esc(u->name), esc(u->name));
	return KEEPER_GO_ON;
}

struct undo_change {
	uint64_t off, len;	/* @len 0: make durable what was undone */
	char name[DM_NAME_MAX + 28];
	int fd;
	uint8_t old[];
};

static enum keeper_result undo_change(const void *data, size_t len)
{
	static bool stuck;
	const struct undo_change *u = data;
	int ret;

	(void)len;
	/* Resumed: it was just done, or just undone. */
	if (!is_suspended(u->name))
		return KEEPER_STOP;
	/* Not a step before the one after it: as safe as forward. */
	if (stuck)
		return KEEPER_GO_ON;
	ret = u->len ? write_at(u->fd, u->old, u->len, u->off) : fsync(u->fd);
	if (!ret)
		return KEEPER_GO_ON;
	stuck = true;
	warning("%s: resize was killed, and the image could not be put back as it was; check it with qcow2setup check",
		esc(u->name));
	return KEEPER_GO_ON;
}

static struct undo_files files_as_they_are(const struct live *l)
{
	return (struct undo_files){ .f = {
		{ l->meta.file.fd, l->meta_fd, l->meta.file.before },
		{ l->data.file.fd, l->data.node.fd, l->data.file.before },
	} };
}

static int tell_files(struct live *l)
{
	struct undo_files u = files_as_they_are(l);

	return keeper_tell(&l->keeper, undo_files, &u, sizeof(u));
}

static int tell_table(struct live *l, bool changed)
{
	size_t len = sizeof(struct undo_table) + strlen(l->params) + 1;
	struct undo_table *u = calloc(1, len);
	int ret;

	if (!u)
		return fail_nomem();
	u->files = files_as_they_are(l);
	/* The data is given back when the old table is live. */
	u->files.f[1].file = -1;
	u->changed = changed;
	u->sectors = l->sectors;
	snprintf(u->name, sizeof(u->name), "%s", l->name);
	strcpy(u->params, l->params);
	ret = keeper_tell(&l->keeper, undo_table, u, len);
	free(u);
	return ret;
}

/* For image_change() and the like. */
static int tell_change(struct image *img, uint64_t off, const void *old,
		       size_t len)
{
	struct live *l = img->changing_arg;
	struct undo_change *u = calloc(1, sizeof(*u) + len);
	int ret;

	if (!u)
		return fail_nomem();
	u->off = off;
	u->len = len;
	u->fd = l->meta_fd;
	snprintf(u->name, sizeof(u->name), "%s", l->name);
	memcpy(u->old, old, len);
	ret = keeper_tell(&l->keeper, undo_change, u, sizeof(*u) + len);
	free(u);
	return ret;
}

/* Is there anything in the table that is loaded that the image has not any more? */
static bool is_changed(const struct live *l)
{
	const struct qcow2_geometry *g = &l->img.geo;
	const struct target_table *t = &l->table;

	return g->size / SECTOR != l->sectors || g->l1_offset != t->l1_offset ||
	       g->l1_entries != t->l1_entries ||
	       g->reftable_offset != t->reftable_offset ||
	       g->reftable_clusters != t->reftable_clusters;
}

/* Everything that is done while nothing can be read or written. */
static int change_suspended(struct live *l)
{
	struct dm_line line = {
		.sectors = l->sectors, .type = DM_TARGET, .params = l->params,
	};
	struct target_features f = l->table.f;
	struct image *img = &l->img;
	char params[1024];
	int ret;

	node_drop_cache(&l->data.node);
	if (l->backing.node.fd >= 0)
		node_drop_cache(&l->backing.node);
	ret = attach(l, img);
	img->space = l->before.space;
	img->space_kind = l->before.space_kind;
	l->before.space = (struct space){ .fd = -1 };
	if (!ret && interrupted())
		ret = EX_WRONG;
	if (!ret)
		ret = tell_table(l, true);
	/* From now on it shows that it was not suspended by somebody else. */
	if (!ret && !l->left)
		ret = dm_load(l->name, &line);
	img->changing = tell_change;
	img->changing_arg = l;
	if (!ret)
		ret = image_grow_end(img, l->grower);
	if (ret)
		return ret;

	/*
	 * Tables of a resize that was given up may lie in what was zeros before, but
	 * not where the file was not yet.
	 */
	if (f.zeroed_from && is_changed(l))
		f.zeroed_from = align_up(img->space.zeros,
					 1ULL << img->geo.cluster_bits);
	line.sectors = img->geo.size / SECTOR;
	line.params = params;
	if (!target_format_table(params, sizeof(params), l->table.metadata_dev,
				 l->table.data_dev, &img->geo, &f))
		return fail(EX_WRONG, "%s: table line is too long; close it, and resize the image",
			    esc(l->name));
	ret = dm_load(l->name, &line);
	if (!ret)
		ret = dm_resume(l->name);
	if (!ret)
		note("%s: 0 %llu %s %s", esc(l->name),
		     (unsigned long long)line.sectors, DM_TARGET, params);
	return ret;
}

/*
 * Is all that the guest wrote on the disks?  A commit that fails does not make
 * the suspend fail, but what it did not write is in the live table only.
 */
static int check_committed(const struct live *l)
{
	const char *below = l->meta.node.path;
	struct target_status status;
	uint64_t unwritten;
	int ret;

	ret = live_unwritten(l->name, &status, &unwritten);
	if (ret)
		return ret;
	if (strcmp(status.mode, "rw") && strcmp(status.mode, "nospc"))
		return fail(EX_WRONG,
			    "%s: metadata could not be written; see dmesg, and save what the device holds before it is closed",
			    esc(l->name));
	if (!unwritten)
		return 0;
	if (!strcmp(status.mode, "nospc"))
		return fail(EX_BUSY,
			    "%s: there is no space for metadata that waits to be written; free some where %s is, then try again",
			    esc(l->name), esc(below));
	return fail(EX_BUSY,
		    "%s: metadata could not be written, and waits to be written again; see dmesg for what is wrong with %s, then try again",
		    esc(l->name), esc(below));
}

/* With the table that it has: another would forget. */
static void resume_as_it_is(const struct live *l)
{
	/* What is loaded then would become live. */
	if (!l->left && !dm_resume(l->name))
		return;
	warning("%s: device stays suspended; see dmesg, then try dmsetup resume %s",
		esc(l->name), esc(l->name));
}

/* The image is as it was: so shall be the device. */
static void bring_back(struct live *l)
{
	struct dm_line line = {
		.sectors = l->sectors, .type = DM_TARGET, .params = l->params,
	};
	struct dm_dev_info info;

	image_undo(&l->img);
	/* If the new table did not come to be live, it must not do so now. */
	if (dm_load(l->name, &line))
		warning("%s: old table is not loaded again; it may still be live",
			esc(l->name));
	if (!dm_resume(l->name) && !dm_query(l->name, &info) &&
	    !info.suspended)
		return;
	warning("%s: device stays suspended; see dmesg, then try dmsetup resume %s",
		esc(l->name), esc(l->name));
}

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

/*
 * Metadata that could not be written before is tried again first: what is wrong
 * with the disks is better said so than by whatever else meets it.
 */
static int commit_rest(struct live *l)
{
	struct target_status status;
	uint64_t unwritten;
	char path[256];
	int fd, ret;

	/* Whether it fails is seen by what is left then. */
	snprintf(path, sizeof(path), "/dev/mapper/%s", l->name);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd >= 0) {
		if (fsync(fd))
			note("%s: %s", esc(path), strerror(errno));
		close(fd);
	}
	ret = live_unwritten(l->name, &status, &unwritten);
	if (ret || !unwritten)
		return ret;
	ret = tell_table(l, false);
	if (!ret)
		ret = dm_suspend(l->name);
	if (ret)
		return ret;
	ret = check_committed(l);
	resume_as_it_is(l);
	return ret;
}

/* All that is done beside the guest's requests; a signal ends it. */
static int before_suspend(struct live *l, const struct options *opt,
			  const struct growth *g)
{
	int ret;

	ret = tell_files(l);
	if (!ret && g->size > l->data.node.size)
		ret = part_extend(&l->data, g->size);
	if (!ret && interrupted())
		ret = EX_WRONG;
	if (!ret)
		ret = prepare_live(l, opt, g);
	if (!ret && interrupted())
		ret = EX_WRONG;
	if (ret)
		return ret;
	/*
	 * While the device is suspended nothing must have to be read from it, or
	 * written to it, be it to get memory: the root file system may be on it.
	 */
	keeper_lock_memory();
	return l->left ? 0 : tell_table(l, false);
}

static int resize_live(struct live *l, const struct options *opt)
{
	uint64_t have = l->data.node.size;
	unsigned int block = l->data.node.block_size;
	struct growth g = { .data = &l->data.node };
	int ret;

	/* A file may have grown without its loop device knowing. */
	if (l->data.file.fd >= 0)
		have = max_u64(have, l->data.file.before);
	ret = choose_size(opt, l->name, have, block, &g.size);
	if (!ret)
		ret = check_larger(l, opt, g.size);
	if (ret)
		return ret;
	if (l->table.f.backing_dev) {
		g.backing = &l->backing.node;
		g.backing_size = l->backing.node.size;
	}
	l->meta_fd = l->meta.node.fd;
	ret = keeper_start(&l->keeper);
	if (ret)
		return ret;
	if (!l->left) {
		ret = commit_rest(l);
	} else {
		ret = check_committed(l);
		if (ret)
			resume_as_it_is(l);
	}
	if (ret)
		goto out;
	ret = before_suspend(l, opt, &g);
	if (!ret && !l->left)
		ret = dm_suspend(l->name);
	if (ret) {
		image_undo(&l->before);
		if (l->left)
			bring_back(l);
		goto out;
	}
	ret = check_committed(l);
	if (ret) {
		image_undo(&l->before);
		resume_as_it_is(l);
		goto out;
	}
	ret = change_suspended(l);
	if (ret)
		bring_back(l);
out:
	if (ret && l->data.file.grown) {
		shrink_file(&l->data.file);
		part_update(&l->data);
	}
	keeper_dismiss(&l->keeper);
	return ret;
}

static int resize_device(const struct options *opt, const char *name)
{
	struct live l = {
		.name = name, .lock = -1, .keeper = KEEPER_NONE,
		.before = IMAGE_CLOSED, .img = IMAGE_CLOSED,
		.meta = PART_CLOSED, .data = PART_CLOSED,
		.backing = PART_CLOSED,
	};
	int ret;

	if (opt->data_file || opt->backing_files)
		return fail(EX_PARAMETER,
			    "%s: is open and has its data; leave --data-file and --backing-file out",
			    esc(name));
	ret = dm_check(true);
	if (!ret)
		ret = open_live(&l);
	if (!ret)
		ret = resize_live(&l, opt);
	image_grow_free(l.grower);
	image_close(&l.img);
	image_close(&l.before);
	part_close(&l.meta);
	part_close(&l.data);
	part_close(&l.backing);
	if (l.lock >= 0)
		close(l.lock);
	free(l.params);
	return ret;
}

int cmd_resize(const struct options *opt, char **args)
{
	char buf[160];
	const char *name = device_live_name(args[0], buf, sizeof(buf));
	int ret;

	if (!opt->size && !opt->size_auto)
		return fail(EX_PARAMETER,
			    "resize needs to know the new size; give --size SIZE|auto");
	interrupt_catch();
	ret = name ? resize_device(opt, name) : resize_image(opt, args[0]);
	return interrupt_result(ret);
}
