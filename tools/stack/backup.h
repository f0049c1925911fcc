/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Backups of devices that are open: a view of each, which shows the disk as it was at one
 * instant, as a device of its own and as an image over that for other people's programs.
 *
 * What belongs to a backup is known by names: device NAME-backup, and the notes in
 * /run/qcow2setup/NAME.backup, which say where the image is and which bitmaps it is about. A crash
 * of the host ends all of it; bitmaps stay what they are.
 */
#ifndef QCOW2SETUP_BACKUP_H
#define QCOW2SETUP_BACKUP_H

#include <limits.h>
#include <stdbool.h>
#include <stdint.h>

#include "system/dm.h"

/* Behind the device's name */
#define BACKUP_SUFFIX		"-backup"
#define BACKUP_MAX_BITMAPS	64

struct backup_request {
	const char *cow;		/* device, or folder for files */
	const char *checkpoint;		/* NAME[,granularity=SIZE], or NULL */
	const char *const *bitmap;	/* what has changed since they began */
	unsigned int bitmaps;
	bool dirty_only;
	bool sparse;
	bool freeze;			/* file systems on them, for that instant */
	uint64_t most;			/* bytes that may be kept of each; 0: no limit */
};

/* What is noted of a backup; backup_notes_free() */
struct backup_notes {
	char *image;			/* NULL: there is none (yet) */
	char *checkpoint;		/* name only; NULL */
	char *id;			/* no other one has it; NULL */
	char *bitmap[BACKUP_MAX_BITMAPS];
	unsigned int bitmaps;
};

/* All of these print why they failed and return an exit code. */

/* Begin backups of these devices, @n of them, at one instant; @image: of the only one, or NULL. */
int backup_begin(const struct backup_request *r, char *const *names, unsigned int n,
		 const char *image);
/*
 * End one; @failed: what the bitmaps say is kept in the checkpoint.  What there is of it goes, however
 * far it had come.
 */
int backup_end(const char *name, bool failed);

/* What is noted of a backup that is under way, whose view is valid */
int backup_find(const char *name, struct backup_notes *notes);

/* Of the disk, in order; those that follow each other are of different kinds. */
struct backup_piece {
	uint64_t start, length;
	bool dirty;			/* in any of the bitmaps, or there is none */
	bool zero;			/* it reads as zeros */
};

/* A result other than 0 ends it all. */
typedef int backup_piece_fn(const struct backup_piece *p, void *arg);

/*
 * What there is to be copied of a backup; *@size: of the disk, before @fn is called.  *@bits gets
 * no larger than log2 of the smallest granularity of the bitmaps; NULL: not asked for.
 */
int backup_pieces(const struct backup_notes *notes, const char *const *bitmap,
		  unsigned int bitmaps, backup_piece_fn *fn, void *arg,
		  uint64_t *size, unsigned int *bits);

/* What status says of a view, in words */
const char *backup_view_text(const char *view);

void backup_device_name(char *out, size_t size, const char *name);
/* False if there are none. */
bool backup_notes_read(const char *name, struct backup_notes *notes);
void backup_notes_free(struct backup_notes *notes);

#endif
