/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Space for a file: what lies in front of it is taken before it is needed, and can
 * be given back.
 */
#ifndef QCOW2SETUP_SPACE_H
#define QCOW2SETUP_SPACE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

struct space {
	int fd;			/* somebody else's; -1: nothing can get longer */
	const char *path;	/* for messages */
	/* Somebody writes there: what was a hole may be none any more, and stays. */
	bool in_use;
	bool said;		/* that it stays sparse, by whoever wants that */
	/* What was there before; valid if something was taken. */
	bool taken, filled;
	/* Bytes from here on are real, and read as zeros; 0: that is not known. */
	uint64_t zeros;
	off_t length;
	struct hole *holes;
	size_t nr_holes;
};

/* Nothing but ftruncate(), with its length as it is now. */
#define SPACE_SPARSE	0

/*
 * Make the file at least @size bytes long, with no hole before @real: from then on
 * writes there cannot fail for want of space, unless the file system copies on
 * write.  Where a file system cannot do that, the file becomes sparse, and a
 * warning says so.  Durable when it returns 0; else it prints why, and what it has
 * done remains to be given back.  To be called again before that, it must want the
 * same kind.
 */
int space_take(struct space *s, uint64_t size, uint64_t real);
/*
 * Give the file the length that it had, and its holes; what was written since
 * must have been undone.  Returns 0 or -errno.
 */
int space_give_back(struct space *s);
void space_free(struct space *s);

#endif
