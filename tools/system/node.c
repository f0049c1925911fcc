// SPDX-License-Identifier: GPL-2.0-or-later
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/fs.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "lib/util.h"
#include "system/devlink.h"
#include "system/loop.h"
#include "system/node.h"

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
	ret = loop_check_ends(path, node->rdev, node->loop, sizeof(node->loop));
	node->pieces = *node->loop;
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
	int found = devlink_find(path), fd, err;

	if (found < 0) {
		errno = -found;
		return -1;
	}
	/* What was found, whatever the name may mean by now */
	fd = reopen(found, mode);
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
	int fd, ret;

	fd = reopen(node->fd, O_RDONLY | O_DIRECT | O_CLOEXEC);
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
