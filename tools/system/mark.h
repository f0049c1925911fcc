/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Marks for loop devices of ours, which the rules for udev (tools/udev) look for:
 * what is on them is a guest's, or metadata, and not to be probed.
 */
#ifndef QCOW2SETUP_MARK_H
#define QCOW2SETUP_MARK_H

/*
 * In this order; @name: "loop3".  mark_attaching() is due before udev can hear of
 * it, while nobody else can attach something to the device; @fd is the device.
 * There may be no udev, and no place for marks: that is no error.
 */
void mark_attaching(const char *name);
void mark_attached(const char *name, int fd);
/* After the two, or if it failed. */
void mark_attaching_done(const char *name);

/* Take marks away that belong to nothing any more; they do no harm till then. */
void mark_sweep(void);

#endif
