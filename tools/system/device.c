// SPDX-License-Identifier: GPL-2.0-or-later
#include <ctype.h>
#include <dirent.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "lib/util.h"
#include "system/device.h"
#include "system/dm.h"
#include "system/loop.h"
#include "system/node.h"
#include "system/sysfs.h"

const char *device_name(const char *name)
{
	static const char prefix[] = "/dev/mapper/";

	if (!strncmp(name, prefix, sizeof(prefix) - 1))
		return name + sizeof(prefix) - 1;
	return name;
}

enum device_kind device_kind(const char *name, const char *uuid, char *type,
			     size_t size)
{
	char *t, *params;
	uint64_t sectors;
	bool qcow2;

	snprintf(type, size, "%s", DM_TARGET);
	if (starts_with(uuid, DM_UUID_PREFIX))
		return DEVICE_OURS;
	/* What LVM has made is one of its volumes. */
	if (starts_with(uuid, "LVM-")) {
		snprintf(type, size, "LVM's");
		return DEVICE_OTHER;
	}
	snprintf(type, size, "none");
	/* Who may not ask gets no answer, and no error. */
	if (access("/dev/mapper/control", R_OK | W_OK) ||
	    dm_params(name, false, &t, &params, &sectors))
		return DEVICE_OTHER;
	if (*t)
		snprintf(type, size, "%s", t);
	qcow2 = !strcmp(t, DM_TARGET);
	free(t);
	free(params);
	return qcow2 ? DEVICE_FOREIGN : DEVICE_OTHER;
}

int device_not_ours(const char *name, enum device_kind kind, const char *type,
		    const char *remedy)
{
	if (kind == DEVICE_FOREIGN)
		return fail(EX_WRONG,
			    "%s: not opened by qcow2setup, but made with dmsetup; %s",
			    esc(name), remedy);
	return fail(EX_WRONG,
		    "%s: not a qcow2 device (its target is %s); qcow2setup status lists those that are open",
		    esc(name), esc(type));
}

int device_name_taken(const char *name, const char *uuid)
{
	char type[64];

	switch (device_kind(name, uuid, type, sizeof(type))) {
	case DEVICE_OURS:
		return fail(EX_BUSY,
			    "%s: a device of that name exists; close it (qcow2setup close %s), or choose another name",
			    esc(name), shell_quote(name));
	case DEVICE_FOREIGN:
		return fail(EX_BUSY,
			    "%s: a device of that name exists, made with dmsetup; remove it (dmsetup remove %s), or choose another name",
			    esc(name), shell_quote(name));
	default:
		return fail(EX_BUSY,
			    "%s: a device of that name exists (its target is %s); choose another name",
			    esc(name), esc(type));
	}
}

const char *device_live_name(const char *arg, char *name, size_t size)
{
	char uuid[160] = "", type[64];
	struct stat st;

	if (stat(arg, &st)) {
		snprintf(name, size, "/dev/mapper/%s", arg);
		return !strchr(arg, '/') && !stat(name, &st) ? arg : NULL;
	}
	if (!S_ISBLK(st.st_mode) ||
	    !sysfs_read(name, size, "/sys/dev/block/%u:%u/dm/name",
			major(st.st_rdev), minor(st.st_rdev)))
		return NULL;
	sysfs_read(uuid, sizeof(uuid), "/sys/dev/block/%u:%u/dm/uuid",
		   major(st.st_rdev), minor(st.st_rdev));
	return device_kind(name, uuid, type, sizeof(type)) == DEVICE_OTHER ?
	       NULL : name;
}

/* Last component of what a link in sysfs points to. */
static bool sysfs_link(char *out, size_t size, const char *path)
{
	char target[PATH_MAX];
	ssize_t n = readlink(path, target, sizeof(target) - 1);
	const char *slash;

	if (n < 0)
		return false;
	target[n] = 0;
	slash = strrchr(target, '/');
	return snprintf(out, size, "%s", slash ? slash + 1 : target) <
	       (int)size;
}

/*
 * The loop device of the file below a helper that completes its last sector:
 * its name, and the file.
 */
static bool look_below_tail(const char *kernel_name, char *loop, size_t loop_size,
			    char *file, size_t file_size)
{
	char path[300], uuid[160], name[PATH_MAX];
	struct dirent *e;
	bool found = false;
	DIR *dir;

	if (!sysfs_read(uuid, sizeof(uuid), "/sys/block/%s/dm/uuid",
			kernel_name) ||
	    !starts_with(uuid, DM_UUID_TAIL_PREFIX))
		return false;
	snprintf(path, sizeof(path), "/sys/block/%s/slaves", kernel_name);
	dir = opendir(path);
	if (!dir)
		return false;
	while ((e = readdir(dir))) {
		if (!starts_with(e->d_name, "loop"))
			continue;
		/* the other one is a piece of memory */
		if (sysfs_read(name, sizeof(name),
			       "/sys/block/%s/loop/backing_file", e->d_name) &&
		    !starts_with(name, "/memfd:")) {
			snprintf(loop, loop_size, "%.30s", e->d_name);
			snprintf(file, file_size, "%s", name);
			found = true;
		}
	}
	closedir(dir);
	return found;
}

bool device_only_reads(const char *kernel_name, const char *name,
		       const char *number)
{
	char uuid[160] = "", ro[8], *type, *params;
	struct target_table t;
	uint64_t sectors;
	bool reads = false;

	sysfs_read(uuid, sizeof(uuid), "/sys/block/%.200s/dm/uuid", kernel_name);
	/* These are always read-only. */
	if (starts_with(uuid, DM_UUID_TAIL_PREFIX))
		return true;
	if (starts_with(uuid, DM_UUID_PREFIX) &&
	    sysfs_read(ro, sizeof(ro), "/sys/block/%.200s/ro", kernel_name) &&
	    !strcmp(ro, "1"))
		return true;
	if (!sysfs_read(ro, sizeof(ro), "/sys/block/%.200s/dm/suspended",
			kernel_name) ||
	    access("/dev/mapper/control", R_OK | W_OK) ||
	    dm_params(name, false, &type, &params, &sectors))
		return false;
	if (!strcmp(type, DM_TARGET) && target_parse_table(params, &t))
		reads = t.f.read_only ||
			(t.f.backing_dev && !strcmp(t.f.backing_dev, number) &&
			 strcmp(t.data_dev, number) &&
			 strcmp(t.metadata_dev, number));
	free(type);
	free(params);
	return reads;
}

bool device_look_up(const char *number, struct device *d)
{
	char path[64], uuid[160];
	struct loop_view v = { 0 };

	memset(d, 0, sizeof(*d));
	if (strlen(number) > 24)
		return false;
	snprintf(path, sizeof(path), "/sys/dev/block/%s", number);
	if (!sysfs_link(d->kernel_name, sizeof(d->kernel_name), path))
		return false;
	if (sysfs_read(d->dm_name, sizeof(d->dm_name), "%s/dm/name", path)) {
		snprintf(d->node, sizeof(d->node), "/dev/mapper/%s",
			 d->dm_name);
		d->qcow2 = sysfs_read(uuid, sizeof(uuid), "%s/dm/uuid", path) &&
			   starts_with(uuid, DM_UUID_PREFIX);
		look_below_tail(d->kernel_name, d->loop_name,
				sizeof(d->loop_name), d->file,
				sizeof(d->file));
	} else {
		snprintf(d->node, sizeof(d->node), "/dev/%s", d->kernel_name);
		d->loop = sysfs_read(d->file, sizeof(d->file),
				     "%s/loop/backing_file", path);
		if (d->loop)
			snprintf(d->loop_name, sizeof(d->loop_name), "%.30s",
				 d->kernel_name);
	}
	if (d->loop_name[0])
		loop_look_at(d->loop_name, &v);
	d->ours = v.ours;
	/* A part of it is not the file. */
	if (!v.whole)
		d->file[0] = 0;
	return true;
}

bool device_made_of(const char *uuid, const struct node *node)
{
	const char *prefix = DM_UUID_PREFIX;
	char want[64];

	if (starts_with(uuid, DM_UUID_HOST_PREFIX))
		prefix = DM_UUID_HOST_PREFIX;
	snprintf(want, sizeof(want), "%s%016llx-", prefix,
		 (unsigned long long)node_hash(node));
	return starts_with(uuid, want);
}

/* Does the loop device show the file that @node has open, and all of it? */
static bool loop_is_node(const char *kernel_name, const struct node *node)
{
	struct loop_view v;

	return loop_look_at(kernel_name, &v) && v.whole &&
	       v.dev == node->dev && v.ino == node->ino;
}

bool device_is_node(const char *number, const struct node *node)
{
	char want[32], loop[32], file[PATH_MAX];
	struct device d;

	if (node->bdev) {
		snprintf(want, sizeof(want), "%u:%u", major(node->rdev),
			 minor(node->rdev));
		return !strcmp(number, want);
	}
	if (!device_look_up(number, &d))
		return false;
	if (d.loop)
		return loop_is_node(d.kernel_name, node);
	return look_below_tail(d.kernel_name, loop, sizeof(loop), file,
			       sizeof(file)) &&
	       loop_is_node(loop, node);
}

uint64_t device_size(const struct device *d)
{
	uint64_t sectors;
	char text[32];

	return sysfs_read(text, sizeof(text), "/sys/class/block/%s/size",
			  d->kernel_name) &&
	       parse_u64(text, &sectors) ? sectors * 512 : 0;
}

bool device_attached(const struct device *d)
{
	char file[8];

	return sysfs_read(file, sizeof(file), "/sys/block/%s/loop/backing_file",
			  d->loop_name);
}

/* A list of users, as it grows. */
struct user_list {
	char *out;
	size_t size, len;
	unsigned int n;
};

static void add_user(struct user_list *u, const char *fmt, ...)
	__attribute__((format(printf, 2, 3)));

static void add_user(struct user_list *u, const char *fmt, ...)
{
	va_list ap;
	int n;

	/* A few are enough to know where to begin. */
	if (++u->n > 4 || u->len + 3 >= u->size)
		return;
	if (u->len)
		u->len += snprintf(u->out + u->len, u->size - u->len, ", ");
	va_start(ap, fmt);
	n = vsnprintf(u->out + u->len, u->size - u->len, fmt, ap);
	va_end(ap);
	u->len = min_u64(u->len + n, u->size - 1);
}

/* In place: \040 and the like, as the kernel writes blanks in such files. */
static void unescape_octal(char *s)
{
	char *to = s;

	for (; *s; s++) {
		if (s[0] == '\\' && s[1] >= '0' && s[1] <= '3' &&
		    s[2] >= '0' && s[2] <= '7' && s[3] >= '0' && s[3] <= '7') {
			*to++ = (s[1] - '0') << 6 | (s[2] - '0') << 3 |
				(s[3] - '0');
			s += 3;
		} else {
			*to++ = *s;
		}
	}
	*to = 0;
}

/* Of file systems that have no number of their device: what they were mounted from. */
static dev_t mounted_device(const char *number, const char *source)
{
	unsigned int major, minor;
	struct stat st;

	if (sscanf(number, "%u:%u", &major, &minor) != 2)
		return 0;
	if (major)
		return makedev(major, minor);
	return source && *source == '/' && !stat(source, &st) &&
	       S_ISBLK(st.st_mode) ? st.st_rdev : 0;
}

void device_each_mount(device_each_mount_fn *fn, void *arg)
{
	FILE *f = fopen("/proc/self/mountinfo", "re");
	char *line = NULL, *save, *id, *number, *where, *word, *source;
	size_t size = 0;
	dev_t rdev;

	if (!f)
		return;
	while (getline(&line, &size, f) > 0) {
		/* ID parent MAJOR:MINOR root where options [more...] - type source options */
		id = strtok_r(line, " ", &save);
		if (!id || !strtok_r(NULL, " ", &save))
			continue;
		number = strtok_r(NULL, " ", &save);
		strtok_r(NULL, " ", &save);
		where = strtok_r(NULL, " ", &save);
		if (!number || !where)
			continue;
		do
			word = strtok_r(NULL, " ", &save);
		while (word && strcmp(word, "-"));
		source = word && strtok_r(NULL, " ", &save) ?
			 strtok_r(NULL, " \n", &save) : NULL;
		unescape_octal(where);
		if (source)
			unescape_octal(source);
		rdev = mounted_device(number, source);
		if (rdev)
			fn(rdev, strtoul(id, NULL, 10), where, arg);
	}
	free(line);
	fclose(f);
}

struct mounts_of {
	dev_t rdev;
	device_mount_fn *fn;
	void *arg;
};

static void mount_of(dev_t rdev, unsigned long id, const char *where, void *arg)
{
	struct mounts_of *m = arg;

	(void)id;
	if (rdev == m->rdev)
		m->fn("mounted on", where, m->arg);
}

static void each_mount(dev_t rdev, device_mount_fn *fn, void *arg)
{
	struct mounts_of m = { rdev, fn, arg };

	device_each_mount(mount_of, &m);
}

static void each_swap(dev_t rdev, device_mount_fn *fn, void *arg)
{
	FILE *f = fopen("/proc/swaps", "re");
	char *line = NULL, *save, *path;
	size_t size = 0;
	struct stat st;

	if (!f)
		return;
	while (getline(&line, &size, f) > 0) {
		path = strtok_r(line, " \t", &save);
		if (!path || *path != '/')
			continue;
		unescape_octal(path);
		if (!stat(path, &st) && S_ISBLK(st.st_mode) &&
		    st.st_rdev == rdev)
			fn("used as swap", "", arg);
	}
	free(line);
	fclose(f);
}

void device_mounts(dev_t rdev, device_mount_fn *fn, void *arg)
{
	each_mount(rdev, fn, arg);
	each_swap(rdev, fn, arg);
}

static void add_mount(const char *what, const char *where, void *arg)
{
	add_user(arg, "%s%s%s", what, *where ? " " : "", esc(where));
}

static void find_holders(struct user_list *u, dev_t rdev)
{
	char path[64], name[160];
	struct dirent *d;
	DIR *dir;

	snprintf(path, sizeof(path), "/sys/dev/block/%u:%u/holders",
		 major(rdev), minor(rdev));
	dir = opendir(path);
	if (!dir)
		return;
	while ((d = readdir(dir))) {
		if (d->d_name[0] == '.')
			continue;
		if (sysfs_read(name, sizeof(name), "/sys/block/%s/dm/name",
			       d->d_name))
			add_user(u, "used by device %s (%s)", d->d_name,
				 esc(name));
		else
			add_user(u, "used by device %s", esc(d->d_name));
	}
	closedir(dir);
}

static bool has_open(const char *pid, dev_t rdev)
{
	char path[300];
	struct dirent *d;
	struct stat st;
	bool found = false;
	DIR *dir;

	snprintf(path, sizeof(path), "/proc/%s/fd", pid);
	dir = opendir(path);
	if (!dir)
		return false;
	while (!found && (d = readdir(dir)))
		found = d->d_name[0] != '.' &&
			!fstatat(dirfd(dir), d->d_name, &st, 0) &&
			S_ISBLK(st.st_mode) && st.st_rdev == rdev;
	closedir(dir);
	return found;
}

static void find_processes(struct user_list *u, dev_t rdev)
{
	struct dirent *d;
	char comm[64], self[16];
	DIR *dir = opendir("/proc");

	if (!dir)
		return;
	snprintf(self, sizeof(self), "%d", getpid());
	while ((d = readdir(dir))) {
		/* We may have inherited it, but do not stay. */
		if (!isdigit((unsigned char)d->d_name[0]) ||
		    !strcmp(d->d_name, self) || !has_open(d->d_name, rdev))
			continue;
		if (!sysfs_read(comm, sizeof(comm), "/proc/%s/comm",
				d->d_name))
			snprintf(comm, sizeof(comm), "?");
		/* udev looks at devices for moments: it is not to blame */
		if (strstr(comm, "udevd") || strstr(comm, "udev-worker"))
			continue;
		add_user(u, "open in process %s (%s)", esc(d->d_name),
			 esc(comm));
	}
	closedir(dir);
}

bool device_users(dev_t rdev, char *out, size_t size)
{
	struct user_list u = { .out = out, .size = size };

	*out = 0;
	device_mounts(rdev, add_mount, &u);
	find_holders(&u, rdev);
	find_processes(&u, rdev);
	if (u.n > 4)
		snprintf(out + u.len, size - u.len, ", and %u more", u.n - 4);
	return u.n;
}

/* The devices that @kernel_name is made of, and so on; how deep is limited against loops. */
static bool is_above(const char *kernel_name, dev_t below, unsigned int depth)
{
	char path[300], number[32], name[300], *slash;
	struct dirent *e;
	bool found = false;
	struct stat st;
	ssize_t n;
	DIR *dir;

	if (!sysfs_read(number, sizeof(number), "/sys/class/block/%s/dev",
			kernel_name) || depth > 64)
		return false;
	snprintf(path, sizeof(path), "%u:%u", major(below), minor(below));
	if (!strcmp(number, path))
		return true;
	/* The disk of a partition, the file of a loop device */
	snprintf(path, sizeof(path), "/sys/class/block/%s", kernel_name);
	n = readlink(path, name, sizeof(name) - 1);
	name[n < 0 ? 0 : n] = 0;
	snprintf(path, sizeof(path), "/sys/class/block/%s/partition", kernel_name);
	slash = strrchr(name, '/');
	if (slash && !access(path, F_OK)) {
		*slash = 0;
		slash = strrchr(name, '/');
		if (slash && is_above(slash + 1, below, depth + 1))
			return true;
	}
	if (sysfs_read(name, sizeof(name), "/sys/class/block/%s/loop/backing_file",
		       kernel_name) &&
	    !stat(name, &st) && device_is_above(st.st_dev, below))
		return true;
	snprintf(path, sizeof(path), "/sys/class/block/%s/slaves", kernel_name);
	dir = opendir(path);
	while (dir && !found && (e = readdir(dir)))
		found = *e->d_name != '.' && is_above(e->d_name, below, depth + 1);
	if (dir)
		closedir(dir);
	return found;
}

bool device_is_above(dev_t dev, dev_t below)
{
	char path[64], name[PATH_MAX], *base;
	static unsigned int depth;
	bool found = false;
	ssize_t n;

	snprintf(path, sizeof(path), "/sys/dev/block/%u:%u", major(dev),
		 minor(dev));
	n = readlink(path, name, sizeof(name) - 1);
	if (n < 0 || depth > 16)
		return false;
	name[n] = 0;
	base = strrchr(name, '/');
	depth++;
	if (base)
		found = is_above(base + 1, below, 0);
	depth--;
	return found;
}
