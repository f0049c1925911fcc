// SPDX-License-Identifier: GPL-2.0-or-later
#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <sys/file.h>
#include <sys/vfs.h>
#include <time.h>

#include "lib/interrupt.h"
#include "lib/util.h"
#include "system/locks.h"

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
