// SPDX-License-Identifier: GPL-2.0-or-later
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/loop.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <time.h>
#include <unistd.h>

#include "loop.h"
#include "util.h"

#define ATTACH_TRIES	64

static void wait_a_little(void)
{
	struct timespec ts = { .tv_nsec = 20 * 1000 * 1000 };

	nanosleep(&ts, NULL);
}

/* Open a loop device that was free a moment ago; its number, or -errno. */
static int open_free(int control, struct loop *loop)
{
	char path[32];
	struct stat st;
	int nr = ioctl(control, LOOP_CTL_GET_FREE);

	if (nr < 0)
		return -errno;
	snprintf(loop->name, sizeof(loop->name), "loop%d", nr);
	snprintf(path, sizeof(path), "/dev/%s", loop->name);
	loop->fd = open(path, O_RDWR | O_CLOEXEC);
	if (loop->fd < 0)
		return -errno;
	if (fstat(loop->fd, &st))
		return -errno;
	loop->rdev = st.st_rdev;
	return nr;
}

int loop_attach(struct loop *loop, const struct node *node)
{
	struct loop_config config = {
		.fd = node->fd,
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
	int control, ret = -EAGAIN, i;

	*loop = (struct loop)LOOP_CLOSED;
	if (node->read_only)
		config.info.lo_flags |= LO_FLAGS_READ_ONLY;
	/* What losetup shows; cut if need be. */
	snprintf((char *)config.info.lo_file_name, LO_NAME_SIZE, "%.*s",
		 LO_NAME_SIZE - 1, node->path);

	control = open("/dev/loop-control", O_RDWR | O_CLOEXEC);
	if (control < 0) {
		if (errno == EACCES || errno == EPERM)
			return fail_errno("loop devices");
		return fail(EX_WRONG,
			    "loop devices are not available: %s; load the loop module",
			    strerror(errno));
	}
	for (i = 0; i < ATTACH_TRIES; i++) {
		ret = open_free(control, loop);
		if (ret == -ENOENT || ret == -ENXIO || ret == -EBUSY) {
			/* the node is not there yet, or the device just went */
			wait_a_little();
			continue;
		}
		if (ret < 0)
			break;
		ret = ioctl(loop->fd, LOOP_CONFIGURE, &config) ? -errno : 0;
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
		return fail_errno("%s: cannot make it a loop device",
				  esc(node->path));
	}
	loop->direct_io = !ioctl(loop->fd, LOOP_GET_STATUS64, &info) &&
			  info.lo_flags & LO_FLAGS_DIRECT_IO;
	note("%s is /dev/%s%s", esc(node->path), loop->name,
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

static bool backing(int fd, dev_t *dev, ino_t *ino, bool *read_only)
{
	struct loop_info64 info;

	if (ioctl(fd, LOOP_GET_STATUS64, &info))
		return false;
	*dev = decode_dev(info.lo_device);
	*ino = info.lo_inode;
	*read_only = info.lo_flags & LO_FLAGS_READ_ONLY;
	return true;
}

bool loop_backing(int fd, dev_t *dev, ino_t *ino)
{
	struct stat st;
	bool ro;

	/* Other drivers may know the same ioctl number by another name. */
	if (fstat(fd, &st) || !S_ISBLK(st.st_mode) || major(st.st_rdev) != 7)
		return false;
	return backing(fd, dev, ino, &ro);
}

bool loop_find(dev_t dev, ino_t ino, bool skip_read_only, char *name,
	       size_t size)
{
	struct dirent *d;
	bool found = false;
	DIR *dir = opendir("/sys/block");

	if (!dir)
		return false;
	while (!found && (d = readdir(dir))) {
		char path[300];
		dev_t b_dev;
		ino_t b_ino;
		bool ro;
		int fd;

		if (strncmp(d->d_name, "loop", 4))
			continue;
		snprintf(path, sizeof(path), "/sys/block/%s/loop/backing_file",
			 d->d_name);
		if (access(path, F_OK))
			continue;
		snprintf(path, sizeof(path), "/dev/%s", d->d_name);
		fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
		if (fd < 0)
			continue;
		if (backing(fd, &b_dev, &b_ino, &ro) && b_dev == dev &&
		    b_ino == ino && !(ro && skip_read_only)) {
			snprintf(name, size, "%.20s", d->d_name);
			found = true;
		}
		close(fd);
	}
	closedir(dir);
	return found;
}
