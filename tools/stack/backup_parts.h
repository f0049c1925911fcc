/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What the files of backup.h share, and nobody else needs.  Calls go down this list:
 *
 *	backup_begin.c	beginning
 *	backup_end.c	the end
 *	backup_image.c	the image for others
 *	backup_pieces.c	what is under way, and what there is to be copied of it
 *	backup_notes.c	notes
 *
 * Functions that return an int print why they failed, and return an exit code.
 */
#ifndef QCOW2SETUP_BACKUP_PARTS_H
#define QCOW2SETUP_BACKUP_PARTS_H

#include <limits.h>
#include <stdbool.h>
#include <stdint.h>

#include "image/bitmaps.h"
#include "stack/backup.h"
#include "system/dm.h"
#include "system/loop.h"

#define SECTOR		512
#define RUN		"/run/qcow2setup"

/* One of those that begin */
struct backup_disk {
	const struct backup_request *r;
	const char *name;
	char device[DM_NAME_MAX + 16];
	char image[PATH_MAX];
	bool image_given;		/* its name is the user's */
	struct loop loop;
	char cow[32];			/* "MAJOR:MINOR" */
	struct node cow_node;
	dev_t rdev;
	uint64_t granularity;
	bool noted;			/* the notes are this one's */
};

/*
 * backup_notes.c
 */

int backup_notes_write(const char *name, const struct backup_notes *n);
void backup_notes_remove(const char *name);

/*
 * backup_pieces.c
 */

/* Several bitmaps as one: dirty in any of them */
struct union_reader {
	struct bitmap_reader reader[BACKUP_MAX_BITMAPS];
	unsigned int n;
};

/* To be closed in any case */
int union_open(struct union_reader *u, const struct bitmaps *s,
	       const char *const *name, unsigned int n);
/* As bitmap_reader_run(), but no further than *@end; without a bitmap all of it is dirty. */
int union_run(struct union_reader *u, uint64_t at, bool *dirty, uint64_t *end);
void union_close(struct union_reader *u);

/*
 * backup_image.c
 */

/* Of @sectors, over the view; with the bitmaps that have ended. */
int backup_make_image(const struct backup_disk *d, uint64_t sectors);

#endif
