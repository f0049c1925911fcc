/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * QEMU's image locks: byte ranges that say what the holder does and what it
 * does not let others do.  They belong to the open file description, so that a
 * loop device that is made from the descriptor goes on holding them.
 */
#ifndef QCOW2SETUP_LOCKS_H
#define QCOW2SETUP_LOCKS_H

#include <stdbool.h>

#include "system/node.h"

/*
 * Refuse if somebody else holds a lock that conflicts.  Prints why it failed,
 * returns an exit code.
 */
int node_lock(const struct node *node, bool write);
/* The same without a word; returns 0, -EAGAIN if locked, or -errno. */
int node_try_lock(int fd, bool write);
/* Would it be refused?  Takes no lock. */
bool node_locked(const struct node *node, bool write);

/*
 * Wait at most @ms milliseconds for the exclusive lock of flock().  False: it is
 * somebody else's, or does not exist here.
 */
bool node_flock(int fd, unsigned int ms);

#endif
