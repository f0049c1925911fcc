/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * An image and its data, opened, locked and found to fit together: what open
 * and table have in common.
 */
#ifndef QCOW2SETUP_MAPPING_H
#define QCOW2SETUP_MAPPING_H

#include "commands.h"
#include "image.h"
#include "node.h"

struct mapping {
	struct image img;
	struct node data;
	char *data_path;	/* if it was taken from the image */
};

#define MAPPING_CLOSED	{ .img = IMAGE_CLOSED, .data = NODE_CLOSED }

/*
 * Open, lock and check.  Changes nothing.  Prints why it failed, returns an
 * exit code; mapping_close() is due in any case.
 */
int mapping_open(struct mapping *m, const struct options *opt,
		 const char *path);
void mapping_close(struct mapping *m);
/* The guest sees the data file as it is. */
bool mapping_raw(const struct mapping *m);

/* Is @name a plain path that may be opened?  @why: what it is instead. */
bool plain_path(const struct span *name, const char **why);

#endif
