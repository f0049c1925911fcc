// SPDX-License-Identifier: GPL-2.0-or-later
/* qcow2setup close: remove a device, then cut the image's unused end off. */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "commands/commands.h"
#include "image/image.h"
#include "lib/interrupt.h"
#include "lib/util.h"
#include "stack/backup.h"
#include "stack/clone.h"
#include "system/device.h"
#include "system/dm.h"
#include "system/live.h"
#include "system/locks.h"
#include "system/loop.h"
#include "system/mark.h"
#include "system/node.h"
#include "system/partitions.h"
#include "system/target.h"

#define WAIT_STEP_MS	50
#define WAIT_STEPS	60

static void wait_step(void)
{
	struct timespec ts = { .tv_nsec = WAIT_STEP_MS * 1000 * 1000 };

	nanosleep(&ts, NULL);
}

/* One device, and what it is made of. */
struct layer {
	char name[128];
	struct device metadata, data, backing;
	char metadata_dev[32], data_dev[32];	/* as in its table */
	bool no_tails;		/* none of them is what dm_remove_tails() removes */
};

/* What has to be known before the device is gone: it, and the chain below. */
struct below {
	struct layer layer[1 + MAX_BACKING_FILES];
	unsigned int layers;
	struct node image;	/* the file to trim, if it is open */
};

/*
 * Open the image by the name that the loop device knows, and make sure that
 * the loop device means the same file, and that it was given to open, as a file:
 * the device's @uuid says so.
 */
static void open_image(struct below *b, const char *uuid)
{
	const struct device *metadata = &b->layer[0].metadata;
	struct loop_view v;
	struct stat st;
	int fd;
	bool same;

	/* The file may be gone, or out of reach: the device is closed all the same. */
	if (stat(metadata->file, &st)) {
		note("%s: not trimmed: %s", esc(metadata->file),
		     strerror(errno));
		return;
	}
	if (node_open(&b->image, AT_FDCWD, metadata->file, 0)) {
		node_close(&b->image);
		return;
	}
	fd = open(metadata->node, O_RDONLY | O_CLOEXEC);
	same = fd >= 0 && loop_look(fd, &v) && v.ours &&
	       v.dev == b->image.dev && v.ino == b->image.ino &&
	       !b->image.bdev && device_made_of(uuid, &b->image);
	if (fd >= 0)
		close(fd);
	if (!same) {
		note("%s: not trimmed: it is not the open image any more",
		     esc(metadata->file));
		node_close(&b->image);
	}
}

/* By its name, if that could be found out */
static bool may_be_tail(const struct device *d)
{
	const size_t len = sizeof(DM_TAIL_SUFFIX) - 1;
	size_t n = strlen(d->dm_name);

	return !*d->kernel_name ||
	       (n > len && !strcmp(d->dm_name + n - len, DM_TAIL_SUFFIX));
}

/*
 * Look at one device.  If it has one of ours below it, set @next to its name,
 * else to nothing.
 */
static void look_at(struct layer *l, char *next, size_t size)
{
	char *type = NULL, *params = NULL;
	struct target_table table;
	uint64_t sectors;

	*next = 0;
	/* Without a table there is nothing below, but the device can go. */
	if (dm_params(l->name, false, &type, &params, &sectors))
		return;
	if (!strcmp(type, DM_TARGET) && target_parse_table(params, &table)) {
		device_look_up(table.data_dev, &l->data);
		device_look_up(table.metadata_dev, &l->metadata);
		snprintf(l->metadata_dev, sizeof(l->metadata_dev), "%s",
			 table.metadata_dev);
		snprintf(l->data_dev, sizeof(l->data_dev), "%s", table.data_dev);
		if (table.f.backing_dev &&
		    device_look_up(table.f.backing_dev, &l->backing) &&
		    l->backing.qcow2)
			snprintf(next, size, "%s", l->backing.dm_name);
		l->no_tails = !may_be_tail(&l->metadata) &&
			      (!table.f.backing_dev || !may_be_tail(&l->backing));
	}
	free(type);
	free(params);
}

/* @b: zeros; it is large, and most of it stays as it is */
static void look_below(const char *name, const char *uuid, bool trim,
		       struct below *b)
{
	char next[128];

	b->image = (struct node)NODE_CLOSED;
	snprintf(next, sizeof(next), "%s", name);
	while (*next && b->layers < ARRAY_SIZE(b->layer)) {
		struct layer *l = &b->layer[b->layers++];

		snprintf(l->name, sizeof(l->name), "%s", next);
		look_at(l, next, sizeof(next));
	}
	/* What was given as a device stays as long as it is. */
	if (trim && b->layer[0].metadata.loop && b->layer[0].metadata.ours)
		open_image(b, uuid);
}

/*
 * The kernel commits when it removes a device, but then it is too late to hear
 * that it failed.  What cannot be written now might be later, so nothing is
 * thrown away without being asked for.
 */
static int flush(const char *name)
{
	char path[256];
	int fd, ret = 0;

	snprintf(path, sizeof(path), "/dev/mapper/%s", name);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return 0;
	if (fsync(fd))
		ret = fail(EX_WRONG,
			   "%s: cannot flush it, see dmesg: %s; %s, or give up what was written last with dmsetup remove %s",
			   esc(name), strerror(errno), errno == ENOSPC ?
			   "free some space below it" : "repair what is below it",
			   esc(name));
	close(fd);
	return ret;
}

/* A flush would wait for the resume, and the kernel has tried all it can. */
static int check_suspended(const char *name)
{
	struct target_status status;
	uint64_t unwritten;
	int ret;

	ret = live_unwritten(name, &status, &unwritten);
	if (ret || (!unwritten && strcmp(status.mode, "fail")))
		return ret;
	return fail(EX_WRONG,
		    "%s: is suspended, and its metadata could not be written; see dmesg, resume it (dmsetup resume %s), or give up what was written last with dmsetup remove %s",
		    esc(name), esc(name), esc(name));
}

static int busy(const char *name, const struct dm_dev_info *info)
{
	struct dm_dev_info view;
	char who[2048], device[160];

	backup_device_name(device, sizeof(device), name);
	if (!dm_query(device, &view) && view.exists &&
	    starts_with(view.uuid, DM_UUID_VIEW_PREFIX))
		return fail(EX_BUSY,
			    "%s: in use: a backup of it is under way; end it first (qcow2setup backup end %s)",
			    esc(name), shell_quote(name));
	if (device_users(info->rdev, who, sizeof(who)))
		return fail(EX_BUSY, "%s: in use: %s; stop that first, or use --deferred",
			    esc(name), who);
	return fail(EX_BUSY, "%s: in use, opened %d times; stop its users first, or use --deferred",
		    esc(name), info->open_count);
}

/* Remove; wait for users that only look at the device for a moment. */
static int remove_device(const char *name, bool deferred)
{
	struct dm_dev_info info;
	char who[256];
	int ret, i;

	for (i = 0; ; i++) {
		ret = dm_remove(name, deferred);
		if (ret != -EBUSY)
			return ret;
		ret = dm_query(name, &info);
		if (ret)
			return ret;
		if (i == WAIT_STEPS || interrupted() ||
		    device_users(info.rdev, who, sizeof(who)))
			return busy(name, &info);
		wait_step();
	}
}

static void wait_for_loop(const struct device *d)
{
	int i;

	for (i = 0; i < WAIT_STEPS && d->ours && device_attached(d) &&
	     !interrupted(); i++)
		wait_step();
}

/*
 * The loop devices, and with them the locks, go when their last user goes: a
 * moment later if udev looks at them.  Devices that were made for this one go,
 * too, unless others share them.
 */
static void wait_for_layers(const struct below *b)
{
	struct dm_dev_info info;
	unsigned int i;

	for (i = 0; i < b->layers; i++) {
		const struct layer *l = &b->layer[i];

		if (i) {
			if (!starts_with(l->name, DM_BACKING_PREFIX))
				return;
			dm_wait_gone(l->name);
			if (dm_query(l->name, &info) || info.exists)
				return;
		}
		if (!l->no_tails)
			dm_remove_tails(l->name);
		wait_for_loop(&l->metadata);
		wait_for_loop(&l->data);
		wait_for_loop(&l->backing);
	}
}

static int trim(struct node *node)
{
	struct image img = IMAGE_CLOSED;
	uint64_t cut;
	int ret, i;

	for (i = 0; ; i++) {
		ret = node_try_lock(node->fd, true);
		if (!ret || i == WAIT_STEPS || interrupted())
			break;
		wait_step();
	}
	if (ret) {
		note("%s: not trimmed: in use", esc(node->path));
		node_close(node);
		return 0;
	}
	ret = image_attach(&img, node);
	node->fd = -1;
	if (!ret)
		ret = image_trim(&img, &cut);
	if (!ret && cut)
		note("%s: %s of unused space cut off", esc(img.node.path),
		     human_size(cut));
	image_close(&img);
	return ret;
}

/* Before anything is closed: what is not a clone's is not removed. */
static int check_clone(const char *name, const struct options *opt,
		       const struct layer *l, struct clone *clone)
{
	if (opt->remove_files && opt->deferred)
		return fail(EX_PARAMETER,
			    "the files of a device that is still used are not removed; leave --delete or --deferred out");
	if (!opt->remove_files && !clone_needs_names(l->metadata.file, l->data.file))
		return 0;
	/* It also finishes a reset that was killed. */
	if (clone_find(clone, l->metadata_dev, l->data_dev) ||
	    !opt->remove_files)
		return 0;
	return fail(EX_WRONG,
		    "%s: is no clone, or its files have been moved; leave --delete out, and remove its files yourself",
		    esc(name));
}

int cmd_close(const struct options *opt, char **args)
{
	const char *name = device_name(args[0]);
	char type[64], remedy[300];
	enum device_kind kind;
	struct dm_dev_info info;
	static struct below below;	/* large */
	struct partitions parts = { .p = NULL };
	struct clone clone;
	int ret;

	ret = dm_check_name(name);
	if (!ret)
		ret = dm_check(false);
	if (!ret)
		ret = dm_query(name, &info);
	if (ret)
		return ret;
	if (!info.exists)
		return dm_gone(name);
	kind = device_kind(name, info.uuid, type, sizeof(type));
	if (kind != DEVICE_OURS) {
		snprintf(remedy, sizeof(remedy),
			 "remove it: dmsetup remove %s", shell_quote(name));
		return device_not_ours(name, kind, type, remedy);
	}

	/* From here on it is soon done, or not at all. */
	interrupt_catch();
	look_below(name, info.uuid, !info.read_only && !opt->deferred &&
		   !opt->remove_files, &below);
	ret = check_clone(name, opt, &below.layer[0], &clone);
	if (!ret)
		ret = partitions_find(&parts, &info);
	if (ret)
		goto out;
	/* What is thrown away need not be written. */
	if (!opt->deferred && !info.read_only && !opt->remove_files) {
		/* Without a table nothing was ever written. */
		if (!info.suspended)
			ret = flush(name);
		else if (*below.layer[0].metadata.node)
			ret = check_suspended(name);
		if (!ret && interrupted())
			ret = EX_WRONG;
		if (ret)
			goto out;
	}
	ret = partitions_remove(&parts, opt->deferred);
	if (ret)
		goto out;
	ret = remove_device(name, opt->deferred);
	if (ret)
		partitions_put_back(&parts);
	if (!ret && !opt->deferred) {
		wait_for_layers(&below);
		if (below.image.fd >= 0)
			ret = trim(&below.image);
		if (!ret && opt->remove_files)
			ret = clone_delete(&clone);
	}
out:
	partitions_free(&parts);
	node_close(&below.image);
	mark_sweep();
	return interrupt_result(ret);
}
