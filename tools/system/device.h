/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What sysfs and procfs know about devices that are live. */
#ifndef QCOW2SETUP_DEVICE_H
#define QCOW2SETUP_DEVICE_H

#include <limits.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "system/node.h"

/* A block device that a table names. */
struct device {
	char node[300];			/* "/dev/loop3", "/dev/mapper/vg-lv" */
	char kernel_name[256];		/* "loop3" */
	char dm_name[128];		/* "vg-lv"; empty: not device-mapper's */
	bool qcow2;			/* a device of ours */
	bool loop;
	char loop_name[32];		/* it, or the one below a helper */
	bool ours;			/* that is made by open, and goes with its user */
	char file[PATH_MAX];		/* that it shows, if it is all of it */
};

/* @number as in a table line: "7:3".  False if there is no such device. */
bool device_look_up(const char *number, struct device *d);
/* In bytes, without opening it, which would be in the way of its removal; 0: not known */
uint64_t device_size(const struct device *d);
/* Is it still attached to a file? */
bool device_attached(const struct device *d);
/*
 * Was one of our devices, with this uuid, made of the image @node, and not of
 * another file or device that leads there?
 */
bool device_made_of(const char *uuid, const struct node *node);
/* Is @number this file or device, also through a loop device or a helper? */
bool device_is_node(const char *number, const struct node *node);

/* The name of our device, also if it was given as a path below /dev/mapper. */
const char *device_name(const char *name);

/*
 * The name of one of our devices, or NULL if @arg is an image.  A file goes
 * before a device of the same name: say /dev/mapper/NAME then.
 */
const char *device_live_name(const char *arg, char *name, size_t size);

/* What a name of device-mapper's stands for. */
enum device_kind {
	DEVICE_OURS,		/* what open has made, by its uuid */
	DEVICE_FOREIGN,		/* of the target qcow2, but made with dmsetup */
	DEVICE_OTHER,		/* anything else */
};

/*
 * Of a device that exists, with this uuid.  Sets @type to its (first) target, if it
 * has to be asked for: not for DEVICE_OURS.
 */
enum device_kind device_kind(const char *name, const char *uuid, char *type,
			     size_t size);
/*
 * Refuse a device that is not ours, with what it is; @remedy: what to do with one of
 * the target qcow2.
 */
int device_not_ours(const char *name, enum device_kind kind, const char *type,
		    const char *remedy);
/* Refuse to make a device, since there is one of that name; with what it is. */
int device_name_taken(const char *name, const char *uuid);

/*
 * Does the device-mapper device @kernel_name, called @name, no more than read the
 * one with that @number ("7:3")?  A qcow2 device does so if it cannot write, or if
 * this is its backing device.
 */
bool device_only_reads(const char *kernel_name, const char *name,
		       const char *number);

/*
 * Is the block device @dev, or that of a file system, @below, or made of it; also through files
 * of loop devices, so far as these can be seen?
 */
bool device_is_above(dev_t dev, dev_t below);

/* Where it is mounted, and whether it is swap: @what, and @where or "" */
typedef void device_mount_fn(const char *what, const char *where, void *arg);
void device_mounts(dev_t rdev, device_mount_fn *fn, void *arg);

/*
 * Each place where something of a block device is mounted that this process can see; @id: the
 * kernel's, for another one may be mounted over it.
 */
typedef void device_each_mount_fn(dev_t rdev, unsigned long id, const char *where,
				  void *arg);
void device_each_mount(device_each_mount_fn *fn, void *arg);

/*
 * Who keeps a device busy, as a phrase: mounts, swap, other devices,
 * processes.  Returns false if nobody was found.
 */
bool device_users(dev_t rdev, char *out, size_t size);

#endif
