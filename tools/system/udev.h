/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What udev is told of our devices, and how long it is waited for. */
#ifndef QCOW2SETUP_UDEV_H
#define QCOW2SETUP_UDEV_H

#include <stdint.h>

/* By these the rules know what a device is. */
#define DM_UUID_PREFIX		"QCOW2-"
/* Those of them that are the host's own: open --host */
#define DM_UUID_HOST_PREFIX	"QCOW2-HOST-"
/* Helpers that vanish with the device they serve. */
#define DM_UUID_TAIL_PREFIX	"QCOW2TAIL-"
/* What a backup reads of one. */
#define DM_UUID_VIEW_PREFIX	"QCOW2VIEW-"
/* Images that were opened for those above them, and go with the last of them. */
#define DM_BACKING_PREFIX	"qcow2-backing-"

/* What rules shall leave alone of a device: flags for a cookie. */
uint16_t udev_flags(const char *name, const char *uuid);

/*
 * Wait until udev is done with what @cookie stands for, but not for ever, and not
 * after SIGINT and the like.  Without an answer a warning is printed, and libdevmapper
 * makes and removes the nodes itself from then on.
 */
void udev_wait(uint32_t cookie);

#endif
