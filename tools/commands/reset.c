// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * qcow2setup reset: throw away what was written to a clone.
 *
 * It gets new files, by a table that is loaded beside the live one and takes its place in
 * one step of the kernel's: a kill leaves the device with the old files or with the new ones,
 * and never suspended.  Only then the new files get the names of the old ones.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#include "commands/commands.h"
#include "image/image.h"
#include "lib/interrupt.h"
#include "lib/util.h"
#include "stack/activate.h"
#include "stack/change.h"
#include "stack/clone.h"
#include "system/device.h"
#include "system/dm.h"
#include "system/partitions.h"

/* Whoever looks at a device, as udev does, ends soon. */
#define LOOK_STEP_MS	50
#define LOOK_STEPS	60

/*
 * Nobody may mount it, or make a device of it, from now on: they would see something else
 * than they know, so --force is not for them.  Sets *@fd, to be kept until it is reset.
 */
static int check_unused(const char *name, bool force, int *fd)
{
	const struct timespec step = { .tv_nsec = LOOK_STEP_MS * 1000 * 1000 };
	struct dm_dev_info info;
	char who[2048], path[192];
	bool kept;
	int ret, i;

	snprintf(path, sizeof(path), "/dev/mapper/%s", name);
	for (i = 0; ; i++) {
		*who = 0;
		if (*fd < 0)
			*fd = open(path, O_RDONLY | O_EXCL | O_CLOEXEC);
		kept = *fd < 0 && errno == EBUSY;
		if (*fd < 0 && !kept)
			return fail_errno("%s: cannot open it", esc(path));
		ret = dm_query(name, &info);
		if (ret)
			return ret;
		/* This program is one. */
		if (!kept && (force || info.open_count <= 1))
			return 0;
		if (i == LOOK_STEPS || interrupted() ||
		    device_users(info.rdev, who, sizeof(who)))
			break;
		nanosleep(&step, NULL);
	}
	if (interrupted())
		return EX_WRONG;
	if (!*who)
		snprintf(who, sizeof(who), "opened %d times", info.open_count);
	return fail(EX_BUSY, kept ? "%s: in use: %s; stop that first" :
		    "%s: in use: %s; stop that first, or use --force if it does not mind that the disk changes",
		    esc(name), who);
}

static int take_partitions(const char *name, struct partitions *parts)
{
	struct dm_dev_info info;
	int ret;

	ret = dm_query(name, &info);
	if (!ret)
		ret = partitions_find(parts, &info);
	if (!ret)
		ret = partitions_remove(parts, false);
	/* Then they are all there. */
	if (ret)
		partitions_free(parts);
	return ret;
}

static int check_clone(const struct live *l, struct clone *c)
{
	if (l->table.f.view)
		return fail(EX_BUSY,
			    "%s: a backup of it is under way; end it first (qcow2setup backup end %s)",
			    esc(l->name), shell_quote(l->name));
	if (l->table.f.bitmaps)
		return fail(EX_BUSY,
			    "%s: has bitmaps, which would be lost; remove them first (qcow2setup bitmap remove %s BITMAP)",
			    esc(l->name), shell_quote(l->name));
	if (clone_find(c, l->table.metadata_dev, l->table.data_dev))
		return 0;
	return fail(EX_WRONG,
		    "%s: is no clone, or its files have been moved; make one with qcow2setup clone",
		    esc(l->name));
}

/* What the image says of its base; the size stays what it is. */
static int read_base(const struct live *l, const struct clone *c,
		     struct image *img, struct clone_base *base, char **text)
{
	const struct span *s, *f;
	int ret = image_open(img, AT_FDCWD, c->image, NODE_READ_ONLY);

	if (ret)
		return ret;
	s = &img->h.backing_file;
	f = &img->h.backing_format;
	if (!s->s || !f->s)
		return fail(EX_WRONG, "%s: names no base any more; close it, and make a new clone",
			    esc(c->image));
	text[0] = strndup(s->s, s->len);
	text[1] = strndup(f->s, f->len);
	if (!text[0] || !text[1])
		return fail_nomem();
	*base = (struct clone_base){
		.name = text[0], .format = text[1], .size = l->sectors * 512,
	};
	return 0;
}

static int reset(struct live *l, const struct clone *c,
		 const struct clone_base *base, int fd)
{
	struct clone fresh = *c;
	int ret;

	clone_sweep(c);
	strcat(fresh.image, CLONE_RESET);
	strcat(fresh.data, CLONE_RESET);
	ret = clone_make(&fresh, base);
	if (ret)
		return ret;
	/* What somebody has not written yet is thrown away, too ... */
	ioctl(fd, BLKFLSBUF, 0);
	ret = activate_instead(l, fresh.image, fresh.data);
	if (ret) {
		clone_unmake(&fresh);
		return ret;
	}
	/* ... and what has been read. */
	ioctl(fd, BLKFLSBUF, 0);
	return clone_rename(&fresh, c);
}

int cmd_reset(const struct options *opt, char **args)
{
	const char *name = device_name(args[0]);
	struct live l = LIVE_CLOSED;
	struct image img = IMAGE_CLOSED;
	struct clone_base base;
	struct partitions parts = { .p = NULL };
	char *text[2] = { NULL, NULL };
	struct clone c;
	int ret, fd = -1;

	ret = dm_check_name(name);
	if (ret)
		return ret;
	interrupt_catch();
	ret = live_open(&l, name, "reset");
	if (!ret)
		ret = check_clone(&l, &c);
	/* They are those of the base again then, and become devices again. */
	if (!ret)
		ret = take_partitions(name, &parts);
	if (!ret)
		ret = check_unused(name, opt->force, &fd);
	if (!ret)
		ret = read_base(&l, &c, &img, &base, text);
	image_close(&img);
	if (!ret)
		ret = interrupted() ? EX_WRONG :
				      reset(&l, &c, &base, fd);
	if (fd >= 0)
		close(fd);
	live_close(&l);
	if (parts.n && ret)
		partitions_put_back(&parts);
	else if (parts.n)
		ret = partitions_make(name);
	partitions_free(&parts);
	free(text[0]);
	free(text[1]);
	return interrupt_result(ret);
}
