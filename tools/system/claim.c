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
#include "system/dm.h"
#include "system/loop.h"
#include "system/sysfs.h"
#include "system/target.h"

static bool is_number(const char *number, dev_t rdev)
{
	char want[32];

	snprintf(want, sizeof(want), "%u:%u", major(rdev), minor(rdev));
	return number && !strcmp(number, want);
}

/*
 * Does the device-mapper device @kernel_name do no more than read @rdev?  A
 * qcow2 device does so if it cannot write, or if this is its backing device.
 */
static bool only_reads(const char *kernel_name, const char *name, dev_t rdev)
{
	char uuid[160], ro[8], *type, *params;
	struct target_table t;
	uint64_t sectors;
	bool reads = false;

	if (!sysfs_read(uuid, sizeof(uuid), "/sys/block/%s/dm/uuid",
			kernel_name))
		return false;
	/* These are always read-only. */
	if (!strncmp(uuid, DM_UUID_TAIL_PREFIX, strlen(DM_UUID_TAIL_PREFIX)))
		return true;
	if (strncmp(uuid, DM_UUID_PREFIX, strlen(DM_UUID_PREFIX)))
		return false;
	if (sysfs_read(ro, sizeof(ro), "/sys/block/%s/ro", kernel_name) &&
	    !strcmp(ro, "1"))
		return true;
	if (dm_params(name, false, &type, &params, &sectors))
		return false;
	if (!strcmp(type, DM_TARGET) && target_parse_table(params, &t))
		reads = is_number(t.f.backing_dev, rdev) &&
			!is_number(t.data_dev, rdev) &&
			!is_number(t.metadata_dev, rdev);
	free(type);
	free(params);
	return reads;
}

/* Devices on top of a block device; *holders is set to their number. */
static int check_holders(const struct node *node, bool write, int *holders)
{
	char path[64], name[160];
	struct dirent *d;
	int ret = 0;
	DIR *dir;

	*holders = 0;
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
		if (!write && only_reads(d->d_name, name, node->rdev))
			continue;
		ret = fail(EX_BUSY, "%s: in use by device %s; close that first",
			   esc(node->path), esc(name));
	}
	closedir(dir);
	return ret;
}

static int check_bdev_unused(const struct node *node, bool write)
{
	char self[40];
	int holders, fd, ret;

	ret = check_holders(node, write, &holders);
	/* The kernel lets only one kind of user claim a device. */
	if (ret || holders)
		return ret;
	snprintf(self, sizeof(self), "/proc/self/fd/%d", node->fd);
	fd = open(self, O_RDONLY | O_EXCL | O_CLOEXEC | O_NONBLOCK);
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
