// SPDX-License-Identifier: GPL-2.0-or-later
#include <ctype.h>
#include <dirent.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "lib/util.h"
#include "system/device.h"
#include "system/dm.h"
#include "system/locks.h"
#include "system/loop.h"
#include "system/sysfs.h"
#include "system/users.h"

/* Stacks of devices are not that high. */
#define MAX_STACK	40

static struct user *add(struct users *users, enum user_kind kind)
{
	struct user *u;

	if (users->n == MAX_USERS) {
		users->more++;
		return NULL;
	}
	u = &users->u[users->n++];
	*u = (struct user){ .kind = kind };
	return u;
}

static bool listed(const struct users *users, enum user_kind kind,
		   const char *name)
{
	unsigned int i;

	for (i = 0; i < users->n; i++)
		if (users->u[i].kind == kind && !strcmp(users->u[i].name, name))
			return true;
	return false;
}

/*
 * Is it a helper, which goes with those above it: a piece for the end of a file, or
 * an image that was opened for its overlays?
 */
static bool is_helper(const char *name, const char *uuid)
{
	return starts_with(uuid, DM_UUID_TAIL_PREFIX) ||
	       (starts_with(uuid, DM_UUID_PREFIX) &&
		starts_with(name, DM_BACKING_PREFIX));
}

static unsigned int add_holders(struct users *users, const char *kernel_name,
				const char *on, bool reads, unsigned int depth);

/* The device @holder is on top of @kernel_name. */
static void add_holder(struct users *users, const char *holder,
		       const char *kernel_name, const char *on, bool reads,
		       unsigned int depth)
{
	char name[160], uuid[160] = "", number[32] = "";
	enum user_kind kind = USER_DEVICE;
	struct user *u;

	if (!sysfs_read(name, sizeof(name), "/sys/block/%.200s/dm/name",
			holder))
		snprintf(name, sizeof(name), "%.150s", holder);
	sysfs_read(uuid, sizeof(uuid), "/sys/block/%.200s/dm/uuid", holder);
	if (starts_with(uuid, DM_UUID_PREFIX))
		kind = USER_QCOW2;
	sysfs_read(number, sizeof(number), "/sys/block/%.200s/dev",
		   kernel_name);
	reads = reads || device_only_reads(holder, name, number);
	if (is_helper(name, uuid) &&
	    add_holders(users, holder, on, reads, depth + 1))
		return;
	if (listed(users, kind, name))
		return;
	u = add(users, kind);
	if (!u)
		return;
	snprintf(u->name, sizeof(u->name), "%s", name);
	snprintf(u->on, sizeof(u->on), "%s", on);
	u->reads = reads;
}

/* All devices on top of one; how many there are. */
static unsigned int add_holders(struct users *users, const char *kernel_name,
				const char *on, bool reads, unsigned int depth)
{
	unsigned int found = 0;
	char path[300];
	struct dirent *d;
	DIR *dir;

	if (depth > MAX_STACK)
		return 0;
	snprintf(path, sizeof(path), "/sys/block/%.200s/holders", kernel_name);
	dir = opendir(path);
	if (!dir)
		return 0;
	while ((d = readdir(dir))) {
		if (d->d_name[0] == '.')
			continue;
		found++;
		add_holder(users, d->d_name, kernel_name, on, reads, depth);
	}
	closedir(dir);
	return found;
}

/* Does loop device @name show the file?  Its node may be closed to us. */
static bool loop_shows(const char *name, const struct node *node)
{
	char file[PATH_MAX];
	struct loop_view v;
	struct stat st;

	if (loop_look_at(name, &v))
		return v.dev == node->dev && v.ino == node->ino;
	return sysfs_read(file, sizeof(file), "/sys/block/%.200s/loop/backing_file",
			  name) &&
	       !stat(file, &st) && st.st_dev == node->dev &&
	       st.st_ino == node->ino;
}

struct file_users {
	struct users *users;
	const struct node *node;
};

static bool add_loop(const char *name, void *arg)
{
	const struct file_users *f = arg;
	struct user *u;
	char ro[8];

	if (!loop_shows(name, f->node) ||
	    add_holders(f->users, name, name, false, 0))
		return true;
	u = add(f->users, USER_LOOP);
	if (!u)
		return true;
	snprintf(u->name, sizeof(u->name), "/dev/%.100s", name);
	u->reads = sysfs_read(ro, sizeof(ro), "/sys/block/%.200s/ro", name) &&
		   !strcmp(ro, "1");
	return true;
}

/* How does a descriptor of a process see it?  False: not at all. */
static bool descriptor_is(const char *pid, const char *fd,
			  const struct node *node, bool *reads)
{
	char path[64], line[64];
	unsigned int flags;
	struct statx st;
	FILE *f;

	snprintf(path, sizeof(path), "/proc/%.12s/fd/%.12s", pid, fd);
	/* What others have open may be on a server that does not answer. */
	if (statx(AT_FDCWD, path, AT_STATX_DONT_SYNC,
		  STATX_TYPE | STATX_INO, &st))
		return false;
	if (node->bdev ? !S_ISBLK(st.stx_mode) ||
	    makedev(st.stx_rdev_major, st.stx_rdev_minor) != node->rdev :
	    makedev(st.stx_dev_major, st.stx_dev_minor) != node->dev ||
	    st.stx_ino != node->ino)
		return false;
	*reads = false;
	snprintf(path, sizeof(path), "/proc/%.12s/fdinfo/%.12s", pid, fd);
	f = fopen(path, "re");
	if (!f)
		return true;
	while (fgets(line, sizeof(line), f))
		if (sscanf(line, "flags: %o", &flags) == 1)
			*reads = (flags & O_ACCMODE) == O_RDONLY;
	fclose(f);
	return true;
}

/* A process has it if one of its descriptors is one of it. */
static void add_process(struct users *users, const char *pid,
			const struct node *node)
{
	char path[64], comm[64];
	bool found = false, reads = true, one;
	struct dirent *d;
	struct user *u;
	DIR *dir;

	snprintf(path, sizeof(path), "/proc/%.12s/fd", pid);
	dir = opendir(path);
	if (!dir)
		return;
	while ((d = readdir(dir))) {
		if (d->d_name[0] == '.' ||
		    !descriptor_is(pid, d->d_name, node, &one))
			continue;
		found = true;
		reads = reads && one;
	}
	closedir(dir);
	if (!found)
		return;
	if (!sysfs_read(comm, sizeof(comm), "/proc/%.12s/comm", pid))
		snprintf(comm, sizeof(comm), "?");
	/* udev looks at devices for moments. */
	if (strstr(comm, "udevd") || strstr(comm, "udev-worker"))
		return;
	u = add(users, USER_PROCESS);
	if (!u)
		return;
	snprintf(u->name, sizeof(u->name), "%s", comm);
	u->pid = atoi(pid);
	u->reads = reads;
}

static void add_processes(struct users *users, const struct node *node)
{
	DIR *dir = opendir("/proc");
	struct dirent *d;
	char self[16];

	if (!dir)
		return;
	snprintf(self, sizeof(self), "%d", getpid());
	while ((d = readdir(dir)))
		if (isdigit((unsigned char)d->d_name[0]) &&
		    strcmp(d->d_name, self))
			add_process(users, d->d_name, node);
	closedir(dir);
}

static void add_mount(const char *what, const char *where, void *arg)
{
	struct user *u = add(arg, *where ? USER_MOUNT : USER_SWAP);

	if (!u)
		return;
	snprintf(u->name, sizeof(u->name), "%s", what);
	snprintf(u->on, sizeof(u->on), "%.159s", where);
}

/* Swap has no place: how to name it is how it was named. */
static void name_swap(struct users *users, const char *path)
{
	unsigned int i;

	for (i = 0; i < users->n; i++)
		if (users->u[i].kind == USER_SWAP)
			snprintf(users->u[i].on, sizeof(users->u[i].on),
				 "%.159s", path);
}

/* What is on top of a block device, and where it is mounted */
static void find_above(const struct node *node, struct users *users)
{
	char link[64], path[PATH_MAX];
	const char *slash;

	snprintf(link, sizeof(link), "/sys/dev/block/%u:%u",
		 major(node->rdev), minor(node->rdev));
	slash = realpath(link, path) ? strrchr(path, '/') : NULL;
	if (slash)
		add_holders(users, slash + 1, "", false, 0);
	device_mounts(node->rdev, add_mount, users);
	name_swap(users, node->path);
}

void users_find(const struct node *node, struct users *users)
{
	memset(users, 0, sizeof(*users));
	users->locked_write = node_locked(node, true);
	users->locked_read = node_locked(node, false);
	if (node->bdev)
		find_above(node, users);
	else
		loop_each(add_loop, &(struct file_users){ users, node });
	/* Who has a file without a lock is in nobody's way. */
	if (node->bdev || users->locked_write || users->locked_read)
		add_processes(users, node);
}

void users_find_device(dev_t rdev, const char *path, struct users *users)
{
	const struct node node = {
		.fd = -1, .path = path, .bdev = true, .rdev = rdev,
	};

	memset(users, 0, sizeof(*users));
	find_above(&node, users);
	add_processes(users, &node);
}

/* The kernel and we keep others out where no lock of QEMU's does. */
static bool taken(const struct users *users, bool write)
{
	unsigned int i;

	for (i = 0; i < users->n; i++)
		if (users->u[i].kind != USER_PROCESS &&
		    (write || !users->u[i].reads))
			return true;
	return false;
}

bool users_let_write(const struct users *users)
{
	return !users->locked_write && !taken(users, true);
}

bool users_let_read(const struct users *users)
{
	return !users->locked_read && !taken(users, false);
}
