/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Links below /dev, whose makers are believed. */
#ifndef QCOW2SETUP_DEVLINK_H
#define QCOW2SETUP_DEVLINK_H

/*
 * Find the block device that the absolute @path leads to, if nobody but root can
 * have a say in that: the name begins with /dev and never leaves it, and all its
 * folders and links belong to root and can be written by nobody else.  That is how
 * udev, LVM and device-mapper name devices.
 *
 * Each part of the name is looked at once.  Returns a descriptor (O_PATH) of the
 * device, or -errno; -ELOOP: this is not such a name.
 */
int devlink_find(const char *path);

#endif
