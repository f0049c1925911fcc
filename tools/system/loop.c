// SPDX-License-Identifier: GPL-2.0-or-later
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/loop.h>
#include <linux/major.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <time.h>
#include <unistd.h>

#include "lib/interrupt.h"
#include "lib/util.h"
#include "system/loop.h"
#include "system/mark.h"
#include "system/sysfs.h"

#define ATTACH_TRIES	64
/* With 20 ms each: so long another program may take to attach its file. */
#define BUSY_TRIES	1500
/* So long the node of a new device may take that udev or the kernel makes. */
#define NODE_TRIES	15

/*
 * Before the name that a loop device of ours has: offset, limit and autoclear
 * can be the same for one that somebody else has made.
 */
#define MARK	"qcow2setup:"

static void wait_a_little(void)
{
	struct timespec ts = { .tv_nsec = 20 * 1000 * 1000 };

	nanosleep(&ts, NULL);
}

/*
 * Open a loop device that was free a moment ago; its number, or -errno.  Nobody
 * else can attach something to it while it is open like this.
 */
static int open_free(int control, struct loop *loop)
{
	char path[32];
	struct stat st;
	int nr = ioctl(control, LOOP_CTL_GET_FREE);

	if (nr < 0)
		return -errno;
	snprintf(loop->name, sizeof(loop->name), "loop%d", nr);
	snprintf(path, sizeof(path), "/dev/%s", loop->name);
	loop->fd = open(path, O_RDWR | O_EXCL | O_CLOEXEC);
	if (loop->fd < 0)
		return -errno;
	if (fstat(loop->fd, &st))
		return -errno;
	loop->rdev = st.st_rdev;
	return nr;
}

/* Nobody makes nodes here, as in a container: do it.  An exit code. */
static int make_node(const char *name)
{
	unsigned int major_nr, minor_nr;
	char number[32], path[32];
	int err;

	if (!sysfs_read(number, sizeof(number), "/sys/block/%s/dev", name) ||
	    sscanf(number, "%u:%u", &major_nr, &minor_nr) != 2)
		return fail(EX_WRONG,
			    "loop devices: the kernel offers %s, and neither /dev nor /sys/block has it; make them available here",
			    name);
	snprintf(path, sizeof(path), "/dev/%s", name);
	if (!mknod(path, S_IFBLK | 0600, makedev(major_nr, minor_nr)) ||
	    errno == EEXIST)
		return 0;
	err = errno;
	return fail(errno_to_exit(err),
		    "%s: is missing and cannot be made: %s; make it where that is allowed: mknod %s b %u %u",
		    path, strerror(err), path, major_nr, minor_nr);
}

/* 0 or -errno */
static int configure(struct loop *loop, const struct loop_config *config)
{
	char path[32];
	int ret, fd;

	mark_attaching(loop->name);
	ret = ioctl(loop->fd, LOOP_CONFIGURE, config) ? -errno : 0;
	if (!ret)
		mark_attached(loop->name, loop->fd);
	mark_attaching_done(loop->name);
	if (ret)
		return ret;
	/* Now others shall have it, too, first of all device-mapper. */
	snprintf(path, sizeof(path), "/dev/%s", loop->name);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return -errno;
	close(loop->fd);
	loop->fd = fd;
	return 0;
}

int loop_attach(struct loop *loop, int fd, const char *path, bool read_only)
{
	struct loop_config config = {
		.fd = fd,
		/*
		 * Pinned: newer kernels would take the larger blocks of the
		 * file system, and the guest would see its sector size change
		 * with the file's place.  Where 512 bytes are too few for
		 * direct I/O the kernel falls back to the page cache.
		 */
		.block_size = 512,
		.info.lo_flags = LO_FLAGS_AUTOCLEAR | LO_FLAGS_DIRECT_IO,
	};
	struct loop_info64 info;
	int control, ret = -EAGAIN, i, missing = 0, busy = 0, code;

	*loop = (struct loop)LOOP_CLOSED;
	if (read_only)
		config.info.lo_flags |= LO_FLAGS_READ_ONLY;
	/* Cut if need be; losetup shows the name that the kernel knows. */
	snprintf((char *)config.info.lo_file_name, LO_NAME_SIZE, MARK "%.*s",
		 LO_NAME_SIZE - (int)sizeof(MARK), path);

	mark_sweep();
	control = open("/dev/loop-control", O_RDWR | O_CLOEXEC);
	if (control < 0) {
		if (errno == EACCES || errno == EPERM)
			return fail_errno("loop devices");
		return fail(EX_WRONG,
			    "loop devices are not available: %s; load the loop module (modprobe loop)",
			    strerror(errno));
	}
	for (i = 0; i < ATTACH_TRIES && busy < BUSY_TRIES;
	     ret == -EBUSY ? busy++ : i++) {
		if (interrupted()) {
			close(control);
			return EX_WRONG;
		}
		ret = open_free(control, loop);
		if (ret == -ENOENT || ret == -ENXIO || ret == -EBUSY) {
			/* the node is not there yet, or the device just went */
			if (ret == -ENOENT && ++missing >= NODE_TRIES) {
				code = make_node(loop->name);
				if (code) {
					close(control);
					return code;
				}
			}
			wait_a_little();
			continue;
		}
		if (ret < 0)
			break;
		ret = configure(loop, &config);
		if (!ret)
			break;
		close(loop->fd);
		loop->fd = -1;
		/* Somebody else was quicker: ask for another one. */
		if (ret != -EBUSY)
			break;
	}
	close(control);
	if (ret < 0) {
		loop_release(loop);
		errno = -ret;
		return fail_errno("%s: cannot make it a loop device", esc(path));
	}
	loop->direct_io = !ioctl(loop->fd, LOOP_GET_STATUS64, &info) &&
			  info.lo_flags & LO_FLAGS_DIRECT_IO;
	note("%s is /dev/%s%s", esc(path), loop->name,
	     loop->direct_io ? "" : ", without direct I/O");
	return 0;
}

void loop_release(struct loop *loop)
{
	if (loop->fd >= 0)
		close(loop->fd);
	loop->fd = -1;
}

/* The kernel's encoding of a device number in 64 bits. */
static dev_t decode_dev(__u64 dev)
{
	return makedev((dev >> 8) & 0xfff,
		       (dev & 0xff) | ((dev >> 12) & 0xfff00));
}

bool loop_look(int fd, struct loop_view *v)
{
	struct loop_info64 info;
	struct stat st;

	*v = (struct loop_view){ 0 };
	/* Other drivers may know the same ioctl number by another name. */
	if (fstat(fd, &st) || !S_ISBLK(st.st_mode) ||
	    major(st.st_rdev) != LOOP_MAJOR ||
	    ioctl(fd, LOOP_GET_STATUS64, &info))
		return false;
	v->dev = decode_dev(info.lo_device);
	v->ino = info.lo_inode;
	v->offset = info.lo_offset;
	v->limit = info.lo_sizelimit;
	v->read_only = info.lo_flags & LO_FLAGS_READ_ONLY;
	v->whole = !v->offset && !v->limit;
	v->ours = v->whole && info.lo_flags & LO_FLAGS_AUTOCLEAR &&
		  starts_with((char *)info.lo_file_name, MARK);
	return true;
}

bool loop_look_at(const char *name, struct loop_view *v)
{
	char path[64];
	bool found;
	int fd;

	snprintf(path, sizeof(path), "/dev/%.40s", name);
	fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
	if (fd < 0)
		return false;
	found = loop_look(fd, v);
	close(fd);
	return found;
}

void loop_each(loop_fn *fn, void *arg)
{
	DIR *dir = opendir("/sys/block");
	struct dirent *d;
	bool more = true;
	char path[300];

	if (!dir)
		return;
	while (more && (d = readdir(dir))) {
		if (!starts_with(d->d_name, "loop"))
			continue;
		snprintf(path, sizeof(path), "/sys/block/%s/loop/backing_file",
			 d->d_name);
		if (!access(path, F_OK))
			more = fn(d->d_name, arg);
	}
	closedir(dir);
}

struct wanted {
	dev_t dev;
	ino_t ino;
	bool skip_read_only;
	char *name;
	size_t size;
	bool found;
};

static bool is_wanted(const char *name, void *arg)
{
	struct wanted *w = arg;
	struct loop_view v;

	if (!loop_look_at(name, &v) || v.dev != w->dev || v.ino != w->ino ||
	    (v.read_only && w->skip_read_only))
		return true;
	snprintf(w->name, w->size, "%.20s", name);
	w->found = true;
	return false;
}

bool loop_find(dev_t dev, ino_t ino, bool skip_read_only, char *name,
	       size_t size)
{
	struct wanted w = {
		.dev = dev, .ino = ino, .skip_read_only = skip_read_only,
		.name = name, .size = size,
	};

	loop_each(is_wanted, &w);
	return w.found;
}

static bool stat_is(const char *path, const struct loop_view *v,
		    struct stat *st)
{
	return !stat(path, st) && st->st_dev == v->dev && st->st_ino == v->ino;
}

/* Does process @pid have the file open, or does the name mean it to him? */
static bool stat_through(const char *pid, const char *file,
			 const struct loop_view *v, struct stat *st)
{
	char path[PATH_MAX + 64];
	bool found = false;
	struct dirent *d;
	DIR *dir;

	snprintf(path, sizeof(path), "/proc/%.12s/root/%s", pid, file);
	if (stat_is(path, v, st))
		return true;
	snprintf(path, sizeof(path), "/proc/%.12s/fd", pid);
	dir = opendir(path);
	if (!dir)
		return false;
	while (!found && (d = readdir(dir))) {
		snprintf(path, sizeof(path), "/proc/%.12s/fd/%.12s", pid,
			 d->d_name);
		found = d->d_name[0] != '.' && stat_is(path, v, st);
	}
	closedir(dir);
	return found;
}

/*
 * The name of a file may mean something else here, or now: in another mount
 * namespace it may be right, and one that has been removed may still be open.
 */
static bool stat_file(const char *file, const struct loop_view *v,
		      struct stat *st)
{
	bool found = stat_is(file, v, st);
	struct dirent *d;
	DIR *dir;

	if (found)
		return true;
	dir = opendir("/proc");
	if (!dir)
		return false;
	while (!found && (d = readdir(dir)))
		found = d->d_name[0] >= '1' && d->d_name[0] <= '9' &&
			stat_through(d->d_name, file, v, st);
	closedir(dir);
	return found;
}

/* How long is what a loop device shows?  False: it is out of reach. */
static bool file_size(const char *path, const struct loop_view *v,
		      uint64_t *size)
{
	char sectors[32];
	struct stat st;

	if (!stat_file(path, v, &st))
		return false;
	*size = st.st_size;
	if (!S_ISBLK(st.st_mode))
		return true;
	if (!sysfs_read(sectors, sizeof(sectors), "/sys/dev/block/%u:%u/size",
			major(st.st_rdev), minor(st.st_rdev)) ||
	    !parse_u64(sectors, size))
		return false;
	*size *= 512;
	return true;
}

/* What loop_check_ends() looks at. */
struct stacked {
	const char *path;	/* the device on top; for messages */
	char unseen[24];	/* the loop device whose file is out of reach */
};

static int check_end(struct stacked *s, const char *name, const char *file)
{
	struct loop_view v;
	uint64_t has, size;
	char sectors[32];

	if (!loop_look_at(name, &v) || !file_size(file, &v, &has) ||
	    !sysfs_read(sectors, sizeof(sectors), "/sys/block/%s/size", name) ||
	    !parse_u64(sectors, &size)) {
		snprintf(s->unseen, sizeof(s->unseen), "%.20s", name);
		return 0;
	}
	size = v.offset + size * 512;
	if (has >= size)
		return 0;
	return fail(EX_WRONG,
		    "%s: %s, the file of /dev/%s, has %llu bytes, but the device shows it up to byte %llu: what is missing would read as zeros; restore the file, or make the device shorter with losetup --set-capacity /dev/%s",
		    esc(s->path), esc(file), name, (unsigned long long)has,
		    (unsigned long long)size, name);
}

/* Stacks are not that high, and have no circles. */
#define MAX_STACK	16

/* @sys: a device's folder, or a link to it */
static int check_below(struct stacked *s, const char *sys, unsigned int depth)
{
	char path[PATH_MAX], file[PATH_MAX], *name, *end;
	struct dirent *d;
	int ret = 0;
	DIR *dir;

	if (depth > MAX_STACK || !realpath(sys, path))
		return 0;
	/* Of a partition the device. */
	name = strstr(path, "/block/");
	if (!name)
		return 0;
	name += strlen("/block/");
	end = strchrnul(name, '/');
	*end = 0;
	if (sysfs_read(file, sizeof(file), "/sys/block/%.200s/loop/backing_file",
		       name))
		return check_end(s, name, file);
	if (end - path + sizeof("/slaves") > sizeof(path))
		return 0;
	memcpy(end, "/slaves", sizeof("/slaves"));
	dir = opendir(path);
	if (!dir)
		return 0;
	while (!ret && (d = readdir(dir))) {
		if (d->d_name[0] == '.')
			continue;
		snprintf(file, sizeof(file), "%.*s/%s", PATH_MAX - 300, path,
			 d->d_name);
		ret = check_below(s, file, depth + 1);
	}
	closedir(dir);
	return ret;
}

int loop_check_ends(const char *path, dev_t rdev, char *unseen, size_t size)
{
	struct stacked s = { .path = path };
	char sys[64];
	int ret;

	snprintf(sys, sizeof(sys), "/sys/dev/block/%u:%u", major(rdev),
		 minor(rdev));
	ret = check_below(&s, sys, 0);
	snprintf(unseen, size, "%s", s.unseen);
	return ret;
}
