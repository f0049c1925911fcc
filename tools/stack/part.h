/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A block device below a device that is open, and the file behind it, if it is a
 * loop device that open has made.
 */
#ifndef QCOW2SETUP_PART_H
#define QCOW2SETUP_PART_H

#include <stdbool.h>
#include <stdint.h>

#include "system/device.h"
#include "system/node.h"

/* A file that is made longer, and can be put back. */
struct grown_file {
	int fd;			/* -1: none */
	const char *path;
	uint64_t before;
	bool grown;
};

/* Durable, and at least @size bytes; else it prints why, an exit code. */
int grow_file(struct grown_file *f, uint64_t size);
void shrink_file(struct grown_file *f);

struct part {
	struct device d;
	struct node node;
	struct grown_file file;		/* fd -1: no file that could grow */
	char path[300];			/* what node.path points to */
};

#define PART_CLOSED	{ .node = NODE_CLOSED, .file.fd = -1 }

/* The device of this "MAJOR:MINOR"; prints why it failed, an exit code. */
int part_open(struct part *p, const char *number, unsigned int flags);
/*
 * The file of a loop device that open has made, if it is still what its name
 * says.  What was given as a device stays as long as it is.
 */
void part_open_file(struct part *p);
void part_close(struct part *p);
/* Let a loop device see how long its file is; its size may stay less. */
int part_update(struct part *p);
/* Make the device of a file longer. */
int part_extend(struct part *p, uint64_t size);

#endif
