/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A file or block device that was opened once.  Everything later works on the
 * descriptor: no path is looked at twice, so that nobody can swap what is
 * behind it.
 */
#ifndef QCOW2SETUP_NODE_H
#define QCOW2SETUP_NODE_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

struct node {
	int fd;
	const char *path;	/* as the user wrote it; for messages */
	bool bdev;
	bool read_only;
	uint64_t size;		/* bytes */
	uint64_t disk_usage;	/* bytes allocated to a file */
	unsigned int block_size; /* logical, of a block device */
	dev_t dev;		/* the file system's device */
	ino_t ino;
	dev_t rdev;		/* a block device's own number */
	bool pieces;		/* how it is read; see node_read() */
	char loop[24];		/* then: the loop device that may end early */
};

#define NODE_CLOSED	{ .fd = -1 }

#define NODE_READ_ONLY	2U

/*
 * Open @path relative to @dirfd (AT_FDCWD).  Anything but a regular file or a
 * block device is refused.  Prints why it failed, returns an exit code.
 */
int node_open(struct node *node, int dirfd, const char *path,
	      unsigned int flags);
/*
 * The same for a name that is taken from an image: its end must not be a symbolic
 * link, unless it is one that root has made to a device (devlink.h).  @option: how
 * to name something else.
 */
int node_open_recorded(struct node *node, int dirfd, const char *path,
		       unsigned int flags, const char *option);
void node_close(struct node *node);

/*
 * As read_at().  Where a read that crosses the end of what is below a device
 * could come back as zeros, all of it, it is not more than a page at once; and a
 * page that has something in front of that end is an error (error_ends_early()).
 */
int node_read(const struct node *node, void *buf, size_t len, uint64_t off);

/* Tells files and devices apart, and stays the same for one. */
uint64_t node_hash(const struct node *node);

/*
 * Are both the same file or device, or do loop devices show the same bytes of
 * one?
 */
bool node_same(const struct node *a, const struct node *b);

/* Drop cached pages of a block device: the kernel may have written behind it. */
void node_drop_cache(const struct node *node);

#endif
