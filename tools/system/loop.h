/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Loop devices: how a file becomes a block device. */
#ifndef QCOW2SETUP_LOOP_H
#define QCOW2SETUP_LOOP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

struct loop {
	int fd;			/* keeps the device, which is autoclear, alive */
	dev_t rdev;
	char name[24];		/* "loop7" */
	bool direct_io;
};

#define LOOP_CLOSED	{ .fd = -1 }

/*
 * Attach the file @fd; @path is for messages, and for who lists loop devices.  The
 * device detaches itself when nobody has it open any more.  Prints why it failed,
 * returns an exit code.
 */
int loop_attach(struct loop *loop, int fd, const char *path, bool read_only);
/* Let go; without another user this detaches the device. */
void loop_release(struct loop *loop);

/* What a loop device shows of which file. */
struct loop_view {
	dev_t dev;
	ino_t ino;
	uint64_t offset, limit;	/* @limit 0: up to the end of the file */
	bool read_only;
	bool whole;		/* all of the file, as it is */
	bool ours;		/* made by loop_attach(), for the whole file */
};

/* False if @fd is no loop device, or has no file. */
bool loop_look(int fd, struct loop_view *v);
/* The same for a device by its name, "loop3". */
bool loop_look_at(const char *name, struct loop_view *v);

/* Call @fn for each loop device with a file, by names such as "loop3", while it returns true. */
typedef bool loop_fn(const char *name, void *arg);
void loop_each(loop_fn *fn, void *arg);

/*
 * Is a file attached to some loop device?  @skip_read_only: those that cannot
 * write do not count.  @name is set to "loopN".
 */
bool loop_find(dev_t dev, ino_t ino, bool skip_read_only, char *name,
	       size_t size);

/*
 * A loop device whose file has been cut off shows zeros for what is missing,
 * and for what was read together with it.  Refuse a block device that has such a
 * one below it; @path is for messages.  Sets @unseen to the name of one whose file is
 * out of reach, or to "".
 */
int loop_check_ends(const char *path, dev_t rdev, char *unseen, size_t size);

#endif
