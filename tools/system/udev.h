/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What udev is told of our devices, and how long it is waited for. */
#ifndef QCOW2SETUP_UDEV_H
#define QCOW2SETUP_UDEV_H

#include <stdint.h>

/* What rules shall leave alone of a device: flags for a cookie. */
uint16_t udev_flags(const char *name, const char *uuid);

/*
 * Wait until udev is done with what @cookie stands for, but not for ever, and not
 * after SIGINT and the like.  Without an answer a warning is printed, and libdevmapper
 * makes and removes the nodes itself from then on.
 */
void udev_wait(uint32_t cookie);

#endif
