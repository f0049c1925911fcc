/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * File systems on devices, or on what is made of them, brought to rest for a moment: all is on the
 * device then, and nothing is half done.  A helper lets them go on if this program is killed.
 */
#ifndef QCOW2SETUP_FREEZE_H
#define QCOW2SETUP_FREEZE_H

#include <stdbool.h>
#include <sys/types.h>

#include "system/keeper.h"

#define FREEZE_MOST	64

struct freezer {
	struct keeper keeper;
	unsigned int n;
	struct {
		int fd;			/* where it is mounted */
		dev_t dev;		/* that its files say they are on */
		dev_t rdev;		/* that it is on */
		char *where;
		bool frozen;		/* by us */
	} fs[FREEZE_MOST];
};

#define FREEZER_NONE	{ .keeper = KEEPER_NONE }

/* These print why they failed and return an exit code. */

/* Look for those that are mounted of a device, and of all above it; for more devices again. */
int freezer_find(struct freezer *f, dev_t rdev);
/* A device that would be waited for must not be made of what is to be frozen. */
int freezer_check(const struct freezer *f, dev_t rdev, const char *name);
/* Start the helper: before anything of it is suspended. */
int freezer_start(struct freezer *f);
/* All of them, or none.  One that somebody else has frozen is left to him. */
int freezer_freeze(struct freezer *f);

/* They go on.  Can be called at any time. */
void freezer_thaw(struct freezer *f);
void freezer_close(struct freezer *f);

#endif
