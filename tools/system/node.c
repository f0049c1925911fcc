// SPDX-License-Identifier: GPL-2.0-or-later
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "lib/util.h"
#include "system/loop.h"
#include "system/node.h"

/* A page: it is what the kernel reads of a device at least. */
#define PIECE	4096

static int open_failed(const char *path, unsigned int flags, int err)
{
	errno = err;
	if (err == EROFS || (!(flags & NODE_READ_ONLY) &&
			     (err == EACCES || err == EPERM)))
		return fail(EX_PERMISSION,
			    "%s: cannot open it for writing: %s; %s",
			    esc(path), strerror(err),
			    OR_READONLY("get write access"));
	if (err == ELOOP)
		return fail(EX_WRONG,
			    "%s: symbolic link in a name that was taken from an image; name the file on the command line",
			    esc(path));
	if (err == ENOENT)
		return fail(EX_WRONG, "%s: no such file or device; check the name",
			    esc(path));
	if (err == EISDIR)
		return fail(EX_WRONG,
			    "%s: a directory; name a regular file or a block device",
			    esc(path));
	return fail_errno("%s: cannot open it", esc(path));
}

int node_open(struct node *node, int dirfd, const char *path,
	      unsigned int flags)
{
	/* O_NONBLOCK: a FIFO must not make us wait for its other end. */
	int mode = O_CLOEXEC | O_NOCTTY | O_NONBLOCK;
	struct stat st;
	int value, ret;

	*node = (struct node){ .fd = -1, .path = path };
	node->read_only = flags & NODE_READ_ONLY;
	mode |= node->read_only ? O_RDONLY : O_RDWR;
	if (flags & NODE_NOFOLLOW)
		mode |= O_NOFOLLOW;

	node->fd = openat(dirfd, path, mode);
	if (node->fd < 0)
		return open_failed(path, flags, errno);
	if (fstat(node->fd, &st))
		return fail_errno("%s: cannot stat it", esc(path));
	if (!S_ISREG(st.st_mode) && !S_ISBLK(st.st_mode))
		return fail(EX_WRONG,
			    "%s: neither a regular file nor a block device; name one of these",
			    esc(path));
	if (fcntl(node->fd, F_SETFL, mode & O_ACCMODE))
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
	ret = loop_check_ends(path, node->rdev, &node->pieces);
	/* Nor may the kernel read ahead then. */
	if (!ret && node->pieces)
		posix_fadvise(node->fd, 0, 0, POSIX_FADV_RANDOM);
	return ret;
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
