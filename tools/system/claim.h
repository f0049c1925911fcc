/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef QCOW2SETUP_CLAIM_H
#define QCOW2SETUP_CLAIM_H

#include <stdbool.h>

#include "system/node.h"

/*
 * Refuse what is in use in a way that locks do not show: a mounted or claimed
 * block device, a file behind somebody's loop device.  What others only read,
 * a reader may have, too.  Prints why it failed, returns an exit code.
 */
int claim_check(const struct node *node, bool write);

#endif
