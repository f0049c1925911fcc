// SPDX-License-Identifier: GPL-2.0-or-later
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "lib/util.h"
#include "system/mark.h"
#include "system/sysfs.h"

/*
 * "loop3" is there while something is being attached.  It is a link to our folder
 * in /proc, so that it leads nowhere if we are killed.
 *
 * "loop3.17" is the device as long as its sequence number is 17.  The kernel gives
 * it another whenever it is attached or detached, and none twice: a mark that is
 * left over means nobody.
 */
#define MARKS	"/run/qcow2setup"

void mark_attaching(const char *name)
{
	char path[64], self[32];

	snprintf(path, sizeof(path), MARKS "/%.30s", name);
	snprintf(self, sizeof(self), "/proc/%d", getpid());
	if (mkdir(MARKS, 0755) && errno != EEXIST) {
		note("%s: cannot be made, so udev may look at what is in the image: %s",
		     MARKS, strerror(errno));
		return;
	}
	/* Of one that was killed. */
	unlink(path);
	if (symlink(self, path))
		note("%s: cannot be made: %s", path, strerror(errno));
}

void mark_attached(const char *name, int fd)
{
	char path[64];
	uint64_t seq;
	int mark;

	if (ioctl(fd, BLKGETDISKSEQ, &seq))
		return;
	snprintf(path, sizeof(path), MARKS "/%.30s.%llu", name,
		 (unsigned long long)seq);
	mark = open(path, O_WRONLY | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0644);
	if (mark >= 0)
		close(mark);
}

void mark_attaching_done(const char *name)
{
	char path[64];

	snprintf(path, sizeof(path), MARKS "/%.30s", name);
	unlink(path);
}

void mark_sweep(void)
{
	struct dirent *d;
	DIR *dir;

	/* Without it there is no telling. */
	if (access("/sys/block", F_OK))
		return;
	dir = opendir(MARKS);
	if (!dir)
		return;
	while ((d = readdir(dir))) {
		char now[32], file[8];
		const char *dot = strchr(d->d_name, '.');

		if (!starts_with(d->d_name, "loop") || !dot)
			continue;
		if (sysfs_read(now, sizeof(now), "/sys/block/%.*s/diskseq",
			       (int)(dot - d->d_name), d->d_name) &&
		    !strcmp(now, dot + 1) &&
		    sysfs_read(file, sizeof(file),
			       "/sys/block/%.*s/loop/backing_file",
			       (int)(dot - d->d_name), d->d_name))
			continue;
		unlinkat(dirfd(dir), d->d_name, 0);
	}
	closedir(dir);
}
