/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What sysfs and procfs know about devices that are live. */
#ifndef QCOW2SETUP_DEVICE_H
#define QCOW2SETUP_DEVICE_H

#include <limits.h>
#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>

/* A block device that a table names. */
struct device {
	char node[300];			/* "/dev/loop3", "/dev/mapper/vg-lv" */
	char kernel_name[256];		/* "loop3" */
	bool loop;
	char file[PATH_MAX];		/* behind the loop device */
};

/* @number as in a table line: "7:3".  False if there is no such device. */
bool device_look_up(const char *number, struct device *d);
/* Is it still attached to a file? */
bool device_attached(const struct device *d);

/* The name of our device, also if it was given as a path below /dev/mapper. */
const char *device_name(const char *name);

/*
 * Who keeps a device busy, as a phrase: mounts, swap, other devices,
 * processes.  Returns false if nobody was found.
 */
bool device_users(dev_t rdev, char *out, size_t size);

#endif
