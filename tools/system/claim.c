// SPDX-License-Identifier: GPL-2.0-or-later
/* Who has a file or block device already, as far as locks do not tell. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "lib/util.h"
#include "system/claim.h"
#include "system/device.h"
#include "system/dm.h"
#include "system/loop.h"
#include "system/sysfs.h"

static int in_use(const struct node *node, const char *kernel_name,
		  const char *name)
{
	char uuid[160];

	if (sysfs_read(uuid, sizeof(uuid), "/sys/block/%.200s/dm/uuid",
		       kernel_name) &&
	    starts_with(uuid, DM_UUID_PREFIX))
		return fail(EX_BUSY,
			    "%s: in use by device %s; close that first (qcow2setup close %s)",
			    esc(node->path), esc(name), shell_quote(name));
	return fail(EX_BUSY, "%s: in use by device %s; close that first",
		    esc(node->path), esc(name));
}

/* Devices on top of a block device; *holders is set to their number. */
static int check_holders(const struct node *node, bool write, int *holders)
{
	char path[64], name[160], number[32];
	struct dirent *d;
	int ret = 0;
	DIR *dir;

	*holders = 0;
	snprintf(number, sizeof(number), "%u:%u", major(node->rdev),
		 minor(node->rdev));
	snprintf(path, sizeof(path), "/sys/dev/block/%u:%u/holders",
		 major(node->rdev), minor(node->rdev));
	dir = opendir(path);
	if (!dir)
		return 0;
	while (!ret && (d = readdir(dir))) {
		if (d->d_name[0] == '.')
			continue;
		++*holders;
		if (!sysfs_read(name, sizeof(name), "/sys/block/%s/dm/name",
				d->d_name))
			snprintf(name, sizeof(name), "%.100s", d->d_name);
		if (!write && device_only_reads(d->d_name, name, number))
			continue;
		ret = in_use(node, d->d_name, name);
	}
	closedir(dir);
	return ret;
}

static int check_bdev_unused(const struct node *node, bool write)
{
	int holders, fd, ret;

	ret = check_holders(node, write, &holders);
	/* The kernel lets only one kind of user claim a device. */
	if (ret || holders)
		return ret;
	fd = reopen(node->fd, O_RDONLY | O_EXCL | O_CLOEXEC | O_NONBLOCK);
	if (fd >= 0) {
		close(fd);
		return 0;
	}
	if (errno == EBUSY)
		return fail(EX_BUSY,
			    "%s: device, or a partition of it, is mounted or in use; unmount or release it first",
			    esc(node->path));
	return fail_errno("%s: cannot open it exclusively", esc(node->path));
}

int claim_check(const struct node *node, bool write)
{
	char name[24];

	if (node->bdev)
		return check_bdev_unused(node, write);
	if (loop_find(node->dev, node->ino, !write, name, sizeof(name)))
		return fail(EX_BUSY,
			    "%s: attached to /dev/%s; detach it first (losetup --detach /dev/%s)",
			    esc(node->path), name, name);
	return 0;
}
