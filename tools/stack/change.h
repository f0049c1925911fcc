/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Change the image of a device that is open.
 *
 * It is suspended for the switch: the kernel has then written all that it knows, and
 * reads the metadata again when it is resumed.  All that takes longer is done
 * before, beside the guest's requests.  Whatever goes wrong, the old image and
 * the old table come back.
 *
 * If this program is killed on the way, a helper brings them back (system/keeper.c).  If
 * that is killed, too, the device stays suspended.  Before the image changes
 * another table is loaded, the old one at first, so that a device in that state is
 * known again: another change goes on from there.
 */
#ifndef QCOW2SETUP_CHANGE_H
#define QCOW2SETUP_CHANGE_H

#include <stdbool.h>
#include <stdint.h>

#include "image/image.h"
#include "stack/part.h"
#include "system/keeper.h"
#include "system/target.h"

struct live {
	const char *name;
	const char *what;		/* that is done, for messages: "resize" */
	bool takes;			/* clusters for bitmaps, perhaps */
	uint64_t sectors;
	char *params;			/* of the table that is live */
	/* Of the table that is to come, if it is not to be as before: see change->apply */
	const char *view;		/* "MAJOR:MINOR", or "": none */
	uint64_t view_granularity;
	struct target_table table;
	struct part meta, data, backing;
	/* As it is while the kernel has it, and when it is at rest */
	struct image before, img;
	/* kept here */
	struct keeper keeper;
	int meta_fd;			/* the helper has this one, too */
	int lock;
	bool left;			/* suspended by one that was killed */
	enum live_step {
		LIVE_AS_BEFORE,
		LIVE_PREPARED,
		LIVE_SUSPENDED,		/* and not changed */
		LIVE_CHANGED,		/* and suspended, or perhaps not any more */
		LIVE_DONE,
	} step;
};

#define LIVE_CLOSED							\
	{								\
		.before = IMAGE_CLOSED, .img = IMAGE_CLOSED,		\
		.meta = PART_CLOSED, .data = PART_CLOSED,		\
		.backing = PART_CLOSED, .keeper = KEEPER_NONE,		\
		.lock = -1,						\
	}

/* All of these print why they failed and return an exit code. */

/*
 * Find a device that is open and can be written, with all that is below, and keep
 * other changes of it away; live_close() is due in any case.
 */
int live_open(struct live *l, const char *name, const char *what);
void live_close(struct live *l);

/* Read l->before, beside the kernel; its file can get longer, by holes if @sparse. */
int live_look(struct live *l, bool sparse);

struct change {
	/*
	 * Beside the guest's requests: calls live_look(), and takes the space that will
	 * be needed.  What it has written nothing refers to.
	 */
	int (*prepare)(struct live *l, void *arg);
	/* Changes l->img, which is at rest, by few writes. */
	int (*apply)(struct live *l, void *arg);
	void *arg;
};

/*
 * For prepare, after live_look(), and for apply, of what changes bitmaps: @fn does it to
 * what was loaded, twice: to see what space it takes, and for good.  @quiet: the user has
 * not asked for something that takes any.
 */
struct bitmaps;
typedef int bitmaps_fn(struct bitmaps *s, void *arg);
int live_prepare_bitmaps(struct live *l, bool quiet, bitmaps_fn *fn, void *arg);
int live_apply_bitmaps(struct live *l, bitmaps_fn *fn, void *arg);

/*
 * What is held while any of the devices is suspended: taken when all are prepared, and let go of, if
 * that was all right, when none is suspended any more.
 */
struct hold {
	int (*take)(void *arg);
	void (*let_go)(void *arg);
	void *arg;
};

/*
 * Change @n devices in one step: they are suspended and changed in this order, what is on top of
 * others first, and all have changed before the first one is resumed, the last of them first.  Of a
 * failure in between nothing is left.  If one cannot be resumed it is as before, and
 * those that were resumed before it have changed: l->step says so.  @hold: NULL, nothing.
 */
int live_change_all(struct live *l, const struct change *c, unsigned int n,
		    const struct hold *hold);
int live_change(struct live *l, const struct change *c);

#endif
