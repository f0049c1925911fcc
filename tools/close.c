// SPDX-License-Identifier: GPL-2.0-or-later
/* qcow2setup close: remove a device, then cut the image's unused end off. */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "commands.h"
#include "device.h"
#include "dm.h"
#include "image.h"
#include "loop.h"
#include "node.h"
#include "target.h"
#include "util.h"

#define WAIT_STEP_MS	50
#define WAIT_STEPS	60

static void wait_step(void)
{
	struct timespec ts = { .tv_nsec = WAIT_STEP_MS * 1000 * 1000 };

	nanosleep(&ts, NULL);
}

/* What has to be known before the device is gone. */
struct below {
	struct device metadata, data;
	struct node image;	/* the file to trim, if it is open */
};

/*
 * Open the image by the name that the loop device knows, and make sure that
 * the loop device means the same file.
 */
static void open_image(struct below *b)
{
	dev_t dev;
	ino_t ino;
	int fd;
	bool same;

	if (node_open(&b->image, AT_FDCWD, b->metadata.file, 0)) {
		node_close(&b->image);
		return;
	}
	fd = open(b->metadata.node, O_RDONLY | O_CLOEXEC);
	same = fd >= 0 && loop_backing(fd, &dev, &ino) &&
	       dev == b->image.dev && ino == b->image.ino &&
	       !b->image.bdev;
	if (fd >= 0)
		close(fd);
	if (!same) {
		note("%s: not trimmed: it is not the open image any more",
		     esc(b->metadata.file));
		node_close(&b->image);
	}
}

static void look_below(const char *name, bool trim, struct below *b)
{
	char *type = NULL, *params = NULL;
	struct target_table table;
	uint64_t sectors;

	*b = (struct below){ .image = NODE_CLOSED };
	/* Without a table there is nothing below, but the device can go. */
	if (dm_params(name, false, &type, &params, &sectors))
		return;
	if (!strcmp(type, DM_TARGET) && target_parse_table(params, &table)) {
		device_look_up(table.data_dev, &b->data);
		if (device_look_up(table.metadata_dev, &b->metadata) &&
		    b->metadata.loop && trim)
			open_image(b);
	}
	free(type);
	free(params);
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
			   "%s: cannot flush it, see dmesg: %s; repair what is below it, or give up what was written last with dmsetup remove %s",
			   esc(name), strerror(errno), esc(name));
	close(fd);
	return ret;
}

static int busy(const char *name, const struct dm_dev_info *info)
{
	char who[2048];

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
		if (i == WAIT_STEPS || device_users(info.rdev, who, sizeof(who)))
			return busy(name, &info);
		wait_step();
	}
}

/*
 * The loop devices, and with them the locks, go when their last user goes: a
 * moment later if udev looks at them.
 */
static void wait_for_loops(const struct below *b)
{
	int i;

	for (i = 0; i < WAIT_STEPS; i++) {
		if (!(b->metadata.loop && device_attached(&b->metadata)) &&
		    !(b->data.loop && device_attached(&b->data)))
			return;
		wait_step();
	}
}

/*
 * The helper of a read-only image goes by itself with its last user, if it
 * could be told so when it was made.
 */
static void remove_tail(const char *name)
{
	char tail[DM_NAME_MAX + 16];
	struct dm_dev_info info;

	snprintf(tail, sizeof(tail), "%s" DM_TAIL_SUFFIX, name);
	if (!dm_query(tail, &info) && info.exists &&
	    !strncmp(info.uuid, DM_UUID_TAIL_PREFIX,
		     strlen(DM_UUID_TAIL_PREFIX)) &&
	    dm_remove(tail, false) == -EBUSY)
		warning("%s: helper device is in use; remove it with dmsetup remove",
			esc(tail));
}

static int trim(struct node *node)
{
	struct image img = IMAGE_CLOSED;
	uint64_t cut;
	int ret, i;

	for (i = 0; ; i++) {
		ret = node_try_lock(node->fd, true);
		if (!ret || i == WAIT_STEPS)
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

int cmd_close(const struct options *opt, char **args)
{
	const char *name = device_name(args[0]);
	struct dm_dev_info info;
	struct below below;
	int ret;

	ret = dm_check_name(name);
	if (!ret)
		ret = dm_check(false);
	if (!ret)
		ret = dm_query(name, &info);
	if (ret)
		return ret;
	if (!info.exists)
		return fail(EX_WRONG,
			    "%s: no such device; qcow2setup status lists those that are open",
			    esc(name));
	if (strncmp(info.uuid, DM_UUID_PREFIX, strlen(DM_UUID_PREFIX)))
		return fail(EX_WRONG,
			    "%s: not opened by qcow2setup; remove it with dmsetup remove",
			    esc(name));

	if (!opt->deferred && !info.suspended && !info.read_only) {
		ret = flush(name);
		if (ret)
			return ret;
	}
	look_below(name, !info.read_only && !opt->deferred, &below);
	ret = remove_device(name, opt->deferred);
	if (!ret && !opt->deferred) {
		remove_tail(name);
		wait_for_loops(&below);
		if (below.image.fd >= 0)
			ret = trim(&below.image);
	}
	node_close(&below.image);
	return ret;
}
