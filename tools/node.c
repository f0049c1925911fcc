// SPDX-License-Identifier: GPL-2.0-or-later
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/fs.h>
#include <linux/loop.h>
#include <linux/magic.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/vfs.h>
#include <time.h>
#include <unistd.h>

#include "devlink.h"
#include "interrupt.h"
#include "loop.h"
#include "node.h"
#include "util.h"

/* A page: it is what the kernel reads of a device at least. */
#define PIECE	4096
#define SECTOR	512

static int open_failed(const char *path, unsigned int flags, int err)
{
	errno = err;
	if (err == EROFS || (!(flags & NODE_READ_ONLY) &&
			     (err == EACCES || err == EPERM)))
		return fail(EX_PERMISSION,
			    "%s: cannot open it for writing: %s; %s",
			    esc(path), strerror(err),
			    OR_READONLY("get write access"));
	if (err == ENOENT)
		return fail(EX_WRONG, "%s: no such file or device; check the name",
			    esc(path));
	if (err == EISDIR)
		return fail(EX_WRONG,
			    "%s: a directory; name a regular file or a block device",
			    esc(path));
	return fail_errno("%s: cannot open it", esc(path));
}

/* O_NONBLOCK: a FIFO must not make us wait for its other end. */
static int open_mode(unsigned int flags)
{
	return O_CLOEXEC | O_NOCTTY | O_NONBLOCK |
	       (flags & NODE_READ_ONLY ? O_RDONLY : O_RDWR);
}

/* What has just been opened: is it of a kind that can be used, and how is it? */
static int set_up(struct node *node)
{
	const char *path = node->path;
	struct stat st;
	int value, ret;

	if (fstat(node->fd, &st))
		return fail_errno("%s: cannot stat it", esc(path));
	if (!S_ISREG(st.st_mode) && !S_ISBLK(st.st_mode))
		return fail(EX_WRONG,
			    "%s: neither a regular file nor a block device; name one of these",
			    esc(path));
	/* No other flag than how it is opened */
	if (fcntl(node->fd, F_SETFL, 0))
		return fail_errno("%s: cannot set it up", esc(path));

	node->dev = st.st_dev;
	node->ino = st.st_ino;
	node->disk_usage = (uint64_t)st.st_blocks * 512;
	node->block_size = 512;
	node->size = st.st_size;
	if (S_ISREG(st.st_mode))
		return 0;

	node->bdev = true;
	node->rdev = st.st_rdev;
	if (ioctl(node->fd, BLKGETSIZE64, &node->size))
		return fail_errno("%s: cannot get its size", esc(path));
	if (!ioctl(node->fd, BLKSSZGET, &value) && value > 0)
		node->block_size = value;
	if (!node->read_only && !ioctl(node->fd, BLKROGET, &value) && value)
		return fail(EX_PERMISSION,
			    "%s: device is read-only; %s", esc(path),
			    OR_READONLY("make it writable"));
	node_drop_cache(node);
	ret = loop_check_ends(node);
	/* Nor may the kernel read ahead then. */
	if (!ret && node->pieces)
		posix_fadvise(node->fd, 0, 0, POSIX_FADV_RANDOM);
	return ret;
}

int node_open(struct node *node, int dirfd, const char *path,
	      unsigned int flags)
{
	*node = (struct node){ .fd = -1, .path = path };
	node->read_only = flags & NODE_READ_ONLY;
	node->fd = openat(dirfd, path, open_mode(flags));
	return node->fd < 0 ? open_failed(path, flags, errno) : set_up(node);
}

/* A device by one of the names that links of the system's give it; or -1, errno. */
static int open_devlink(const char *path, int mode)
{
	char self[40];
	int found = devlink_find(path), fd, err;

	if (found < 0) {
		errno = -found;
		return -1;
	}
	/* What was found, whatever the name may mean by now */
	snprintf(self, sizeof(self), "/proc/self/fd/%d", found);
	fd = open(self, mode);
	err = errno;
	close(found);
	errno = err;
	return fd;
}

/* The folder that @dirfd is, for a message; the text stays valid. */
static const char *folder_name(int dirfd)
{
	static char name[PATH_MAX];
	char self[40];
	ssize_t n;

	snprintf(self, sizeof(self), "/proc/self/fd/%d", dirfd);
	n = readlink(self, name, sizeof(name) - 1);
	name[n < 0 ? 0 : n] = 0;
	return n > 0 ? name : "the folder of the image";
}

int node_open_recorded(struct node *node, int dirfd, const char *path,
		       unsigned int flags, const char *option)
{
	*node = (struct node){ .fd = -1, .path = path };
	node->read_only = flags & NODE_READ_ONLY;
	node->fd = openat(dirfd, path, open_mode(flags) | O_NOFOLLOW);
	if (node->fd < 0 && errno == ELOOP)
		node->fd = open_devlink(path, open_mode(flags));
	if (node->fd >= 0)
		return set_up(node);
	if (errno == ELOOP)
		return fail(EX_WRONG,
			    "%s: symbolic link in a name that was taken from an image, and not one to a device that root has made below /dev; give %s",
			    esc(path), option);
	if (errno == ENOENT && *path != '/')
		return fail(EX_WRONG,
			    "%s: no such file or device in %s, where the image says it is; give %s",
			    esc(path), esc(folder_name(dirfd)), option);
	if (errno == ENOENT)
		return fail(EX_WRONG,
			    "%s: no such file or device, which the image names; give %s",
			    esc(path), option);
	return open_failed(path, flags, errno);
}

void node_close(struct node *node)
{
	if (node->fd >= 0)
		close(node->fd);
	node->fd = -1;
}

void node_drop_cache(const struct node *node)
{
	if (node->bdev)
		posix_fadvise(node->fd, 0, 0, POSIX_FADV_DONTNEED);
}

static bool all_zero(const uint8_t *p, size_t len)
{
	return !len || (!*p && !memcmp(p, p + 1, len - 1));
}

/*
 * The page at @off reads as zeros, or not at all (@err), and where the file below
 * ends is not known.  Sector by sector, and past the page cache, what lies before
 * its end can be read all the same: if that is something, the end is in this page.
 * Nothing tells an end behind zeros, or between pages, from zeros.
 */
static int check_page(const struct node *node, uint64_t off, int err)
{
	uint8_t buf[2 * SECTOR], *sector = buf + SECTOR - (uintptr_t)buf % SECTOR;
	uint64_t at, end = min_u64(off + PIECE, node->size);
	bool something = false, ended = false;
	char self[40];
	int fd, ret;

	snprintf(self, sizeof(self), "/proc/self/fd/%d", node->fd);
	fd = open(self, O_RDONLY | O_DIRECT | O_CLOEXEC);
	if (fd < 0)
		return err;
	for (at = off; at < end; at += SECTOR) {
		ret = read_at(fd, sector, SECTOR, at);
		if (ret == -EINVAL)
			break;
		/* An end has nothing behind it; a bad place may have. */
		if (!ret && ended)
			something = false;
		else if (!ret && (err || !all_zero(sector, SECTOR)))
			something = true;
		ended = ret;
	}
	close(fd);
	if (!something && err)
		return -error_ends_early("Input/output error; the file of /dev/%s is out of reach from here, and may have been cut off: compare its length with what losetup --list shows",
					 node->loop);
	if (!something)
		return 0;
	return -error_ends_early("the file of /dev/%s, which is out of reach from here, ends behind byte %llu of the device, in the middle of a page, which would read as zeros; restore the file, or make the device shorter with losetup --set-capacity /dev/%s",
				 node->loop, (unsigned long long)off,
				 node->loop);
}

int node_read(const struct node *node, void *buf, size_t len, uint64_t off)
{
	uint8_t *p = buf;
	size_t n;
	int ret = 0;

	if (!node->pieces)
		return read_at(node->fd, buf, len, off);
	for (; !ret && len; len -= n, off += n, p += n) {
		n = min_u64(len, PIECE - off % PIECE);
		ret = read_at(node->fd, p, n, off);
		if (ret == -EIO || (!ret && all_zero(p, n)))
			ret = check_page(node, off - off % PIECE, ret);
	}
	return ret;
}

/* FNV-1a over where it is. */
uint64_t node_hash(const struct node *node)
{
	uint64_t parts[2] = { node->bdev ? node->rdev : node->dev,
			      node->bdev ? 0 : node->ino };
	uint64_t hash = 0xcbf29ce484222325ULL;
	unsigned int i;

	for (i = 0; i < 16; i++) {
		hash ^= (parts[i / 8] >> 8 * (i % 8)) & 0xff;
		hash *= 0x100000001b3ULL;
	}
	return hash;
}

/* Of two loop devices: do they show the same bytes of a file? */
static bool loops_overlap(const struct node *a, const struct node *b)
{
	struct loop_view x, y;

	return loop_look(a->fd, &x) && loop_look(b->fd, &y) &&
	       x.dev == y.dev && x.ino == y.ino &&
	       x.offset < y.offset + b->size && y.offset < x.offset + a->size;
}

bool node_same(const struct node *a, const struct node *b)
{
	struct loop_view v;

	if (a->bdev && b->bdev)
		return a->rdev == b->rdev || loops_overlap(a, b);
	if (!a->bdev && !b->bdev)
		return a->dev == b->dev && a->ino == b->ino;
	if (b->bdev) {
		const struct node *t = a;

		a = b;
		b = t;
	}
	return loop_look(a->fd, &v) && v.dev == b->dev && v.ino == b->ino;
}

/*
 * What QEMU does with an image is a set of permissions, numbered as here.  The
 * byte of a permission at LOCK_USED is locked by those who use it, the one at
 * LOCK_UNSHARED by those who do not let others use it.  All locks are read
 * locks: whoever wants to know looks whether a write lock would be granted.
 */
#define LOCK_USED	100
#define LOCK_UNSHARED	200
#define PERM_READ	(1U << 0)
#define PERM_WRITE	(1U << 1)
#define PERM_RESIZE	(1U << 3)
#define PERM_BITS	4

static int lock_byte(int fd, off_t byte)
{
	struct flock fl = {
		.l_type = F_RDLCK, .l_whence = SEEK_SET,
		.l_start = byte, .l_len = 1,
	};

	return fcntl(fd, F_OFD_SETLK, &fl) ? -errno : 0;
}

/* 0: nobody else has it, -EAGAIN: somebody has, or -errno */
static int probe_byte(int fd, off_t byte)
{
	struct flock fl = {
		.l_type = F_WRLCK, .l_whence = SEEK_SET,
		.l_start = byte, .l_len = 1,
	};

	if (fcntl(fd, F_OFD_GETLK, &fl))
		return -errno;
	return fl.l_type == F_UNLCK ? 0 : -EAGAIN;
}

/* What one does who opens it, and what he does not let others do */
static void permissions(bool write, unsigned int *used, unsigned int *unshared)
{
	*used = PERM_READ | (write ? PERM_WRITE | PERM_RESIZE : 0);
	*unshared = PERM_WRITE | PERM_RESIZE;
}

/* Does somebody else have what conflicts?  0, -EAGAIN or -errno */
static int probe(int fd, unsigned int used, unsigned int unshared)
{
	unsigned int i;
	int ret = 0;

	for (i = 0; !ret && i < PERM_BITS; i++) {
		if (unshared & (1U << i))
			ret = probe_byte(fd, LOCK_USED + i);
		if (!ret && used & (1U << i))
			ret = probe_byte(fd, LOCK_UNSHARED + i);
	}
	return ret;
}

bool node_locked(const struct node *node, bool write)
{
	unsigned int used, unshared;

	permissions(write, &used, &unshared);
	return probe(node->fd, used, unshared) == -EAGAIN;
}

static int try_lock(int fd, bool write)
{
	unsigned int used, unshared, i;
	int ret;

	permissions(write, &used, &unshared);
	/* Lock first and look then: of two that do so, one at least sees it. */
	for (i = 0; i < PERM_BITS; i++) {
		if (used & (1U << i)) {
			ret = lock_byte(fd, LOCK_USED + i);
			if (ret)
				return ret;
		}
		if (unshared & (1U << i)) {
			ret = lock_byte(fd, LOCK_UNSHARED + i);
			if (ret)
				return ret;
		}
	}
	return probe(fd, used, unshared);
}

/*
 * On these a lock of flock() is one of all bytes, and whoever lets go of it lets
 * go of the bytes' own locks, too.
 */
static bool flock_is_apart(int fd)
{
	struct statfs st;

	if (fstatfs(fd, &st))
		return false;
	switch ((uint32_t)st.f_type) {
	case NFS_SUPER_MAGIC:
	case SMB_SUPER_MAGIC:
	case CIFS_SUPER_MAGIC:
	case SMB2_SUPER_MAGIC:
	case V9FS_MAGIC:
	case AFS_SUPER_MAGIC:
	case AFS_FS_MAGIC:
		return false;
	default:
		return true;
	}
}

bool node_flock(int fd, unsigned int ms)
{
	const struct timespec step = { .tv_nsec = 10 * 1000 * 1000 };
	unsigned int waited;

	if (!flock_is_apart(fd))
		return false;
	for (waited = 0; flock(fd, LOCK_EX | LOCK_NB); waited += 10) {
		if (errno != EWOULDBLOCK || waited >= ms || interrupted())
			return false;
		nanosleep(&step, NULL);
	}
	return true;
}

int node_try_lock(int fd, bool write)
{
	bool held;
	int ret;

	/*
	 * One after the other, so that of two at the same time one wins, and not
	 * none.  For others flock() may mean something else: no long wait.
	 */
	held = node_flock(fd, 1000);
	ret = try_lock(fd, write);
	if (held)
		flock(fd, LOCK_UN);
	return ret;
}

int node_lock(const struct node *node, bool write)
{
	int ret = node_try_lock(node->fd, write);

	if (ret == -EAGAIN || ret == -EACCES)
		return fail(EX_BUSY,
			    "%s: locked by QEMU or by another open qcow2 device%s; stop or close that first (qcow2setup info %s tells who it is)",
			    esc(node->path),
			    write ? "" : " that writes to it",
			    shell_quote(node->path));
	errno = -ret;
	return ret ? fail_errno("%s: cannot lock it", esc(node->path)) : 0;
}

bool sysfs_read(char *buf, size_t size, const char *fmt, ...)
{
	char path[512];
	va_list ap;
	ssize_t n;
	int fd;

	va_start(ap, fmt);
	vsnprintf(path, sizeof(path), fmt, ap);
	va_end(ap);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return false;
	n = read(fd, buf, size - 1);
	close(fd);
	if (n < 0)
		return false;
	if (n && buf[n - 1] == '\n')
		n--;
	buf[n] = 0;
	return true;
}
