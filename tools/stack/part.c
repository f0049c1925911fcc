// SPDX-License-Identifier: GPL-2.0-or-later
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <linux/loop.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "lib/util.h"
#include "stack/part.h"
#include "system/loop.h"

int grow_file(struct grown_file *f, uint64_t size)
{
	struct stat st;

	if (fstat(f->fd, &st))
		return fail_errno("%s: cannot stat it", esc(f->path));
	f->before = st.st_size;
	if (f->before >= size)
		return 0;
	/* Durable before an image says that it is there. */
	if (ftruncate(f->fd, size) || fsync(f->fd)) {
		int ret = fail_errno("%s: cannot extend it to %s",
				     esc(f->path), human_size(size));

		if (ftruncate(f->fd, f->before))
			warning("%s: cannot cut it off again", esc(f->path));
		return ret;
	}
	f->grown = true;
	note("%s: extended to %s", esc(f->path), human_size(size));
	return 0;
}

void shrink_file(struct grown_file *f)
{
	if (f->grown && ftruncate(f->fd, f->before))
		warning("%s: cannot cut it off again: %s", esc(f->path),
			strerror(errno));
	f->grown = false;
}

int part_open(struct part *p, const char *number, unsigned int flags)
{
	char now[32];
	int ret;

	if (!device_look_up(number, &p->d))
		return fail(EX_WRONG, "device %s: cannot be found; check /sys/dev/block",
			    esc(number));
	/* The kernel's own name is there without udev, too. */
	snprintf(p->path, sizeof(p->path), "/dev/%s", p->d.kernel_name);
	ret = node_open(&p->node, AT_FDCWD, p->path, flags);
	if (ret)
		return ret;
	snprintf(now, sizeof(now), "%u:%u", major(p->node.rdev),
		 minor(p->node.rdev));
	if (!p->node.bdev || strcmp(now, number))
		return fail(EX_WRONG, "%s: is not device %s; check /dev",
			    esc(p->path), esc(number));
	p->node.path = p->d.ours && p->d.file[0] ? p->d.file : p->d.node;
	return 0;
}

void part_open_file(struct part *p)
{
	struct loop_view v;
	struct stat st;
	int fd;

	if (!p->d.loop || !loop_look(p->node.fd, &v) || !v.ours)
		return;
	fd = open(p->d.file, O_RDWR | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);
	if (fd < 0)
		return;
	if (fstat(fd, &st) || !S_ISREG(st.st_mode) || st.st_dev != v.dev ||
	    st.st_ino != v.ino) {
		close(fd);
		return;
	}
	p->file.fd = fd;
	p->file.path = p->d.file;
	p->file.before = st.st_size;
}

void part_close(struct part *p)
{
	node_close(&p->node);
	if (p->file.fd >= 0)
		close(p->file.fd);
	p->file.fd = -1;
}

int part_update(struct part *p)
{
	if (p->d.loop && p->d.ours && ioctl(p->node.fd, LOOP_SET_CAPACITY, 0))
		return fail_errno("%s: cannot update its size", esc(p->path));
	if (ioctl(p->node.fd, BLKGETSIZE64, &p->node.size))
		return fail_errno("%s: cannot get its size", esc(p->path));
	return 0;
}

int part_extend(struct part *p, uint64_t size)
{
	int ret = 0;

	if (p->file.fd >= 0)
		ret = grow_file(&p->file, size);
	if (!ret)
		ret = part_update(p);
	if (ret || p->node.size >= size)
		return ret;
	return fail(EX_WRONG,
		    "%s: device has %llu bytes, less than the %llu that are needed; enlarge the device",
		    esc(p->node.path), (unsigned long long)p->node.size,
		    (unsigned long long)size);
}
