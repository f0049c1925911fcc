/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Copies of disks: pieces of files and devices go to a new file, to one that is brought up to date,
 * or to a device.  It can be stopped, and gone on with.
 */
#ifndef QCOW2SETUP_COPYING_H
#define QCOW2SETUP_COPYING_H

#include <limits.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "lib/progress.h"
#include "system/node.h"

/* Behind the name of an increment (backup_copy.c): the file with its data */
#define INCREMENT_DATA	".data"

/* Is a copy an increment, and not a raw disk?  Its content is the guest's, and is not looked at. */
bool copy_is_increment(const char *path);

struct copy_piece {
	uint64_t start, length;		/* at the same place everywhere; bytes */
	int from;			/* that it is read from */
	bool zero;			/* it reads as zeros */
};

/* In order, none over another one */
struct copy_list {
	struct copy_piece *p;
	size_t n, room;
	uint64_t bytes;
};

struct copying {
	bool json;			/* say how far it is, for programs */
	bool resume, verify;
	bool overwrite_device;
	const char *source;		/* for messages */
	const char *target;
	const char *id;			/* which copy it is, to go on with it; NULL: none can */
	bool update;			/* the target is a copy already */
	/* Says why the source could not be read, if that is known; an exit code, or 0. */
	int (*why)(const struct copying *c);
	void *arg;			/* for that */
	struct copy_list list;
	uint64_t size;			/* of the disk */
	/* kept here */
	struct node to;
	bool fresh;			/* the target reads as zeros where nothing is written */
	char state[PATH_MAX];		/* the file that says how far it is */
	uint64_t begin;			/* where to go on */
	struct progress progress;
};

/* All of these print why they failed and return an exit code. */

/* Put one at the end. */
int copy_list_add(struct copy_list *l, const struct copy_piece *p);

/* Find or make the target; copying_close() is due in any case. */
int copying_open(struct copying *c);
/* Copy; durable then.  With --verify all is read and compared. */
int copying_run(struct copying *c);
/* It needs not be gone on with any more. */
int copying_done(struct copying *c);
void copying_close(struct copying *c);

#endif
