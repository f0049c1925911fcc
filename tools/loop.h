/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Loop devices: how a file becomes a block device. */
#ifndef QCOW2SETUP_LOOP_H
#define QCOW2SETUP_LOOP_H

#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>

#include "node.h"

struct loop {
	int fd;			/* keeps the device, which is autoclear, alive */
	dev_t rdev;
	char name[24];		/* "loop7" */
	bool direct_io;
};

#define LOOP_CLOSED	{ .fd = -1 }

/*
 * Attach @node's descriptor.  The device detaches itself when nobody has it
 * open any more.  Prints why it failed, returns an exit code.
 */
int loop_attach(struct loop *loop, const struct node *node);
/* Let go; without another user this detaches the device. */
void loop_release(struct loop *loop);

/* The file behind the loop device @fd; false if it is no loop device. */
bool loop_backing(int fd, dev_t *dev, ino_t *ino);

/*
 * Is a file attached to some loop device?  @skip_read_only: those that cannot
 * write do not count.  @name is set to "loopN".
 */
bool loop_find(dev_t dev, ino_t ino, bool skip_read_only, char *name,
	       size_t size);

#endif
