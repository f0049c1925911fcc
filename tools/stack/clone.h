/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Clones: an image, NAME.qcow2, with a sparse data file, NAME.data, in one folder, over a
 * base that is only read.  The image says of both files which they are (HEADER_EXT_CLONE):
 * nothing else is ever taken away.
 */
#ifndef QCOW2SETUP_CLONE_H
#define QCOW2SETUP_CLONE_H

#include <limits.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

/*
 * Behind both names, while a device is given new files: until it has them, and then
 * until the old ones are gone.
 */
#define CLONE_RESET	".reset"

struct clone {
	char image[PATH_MAX], data[PATH_MAX];
	/* kept here: what was made, and can be taken away again */
	ino_t image_ino, data_ino;
	bool image_made, data_made;
};

struct clone_base {
	const char *name;		/* for the header */
	const char *format;		/* "raw" or "qcow2" */
	uint64_t size;			/* of the disk; bytes */
};

/* All of these print why they failed and return an exit code, unless it says otherwise. */

/* The names for /dev/mapper/@name in the folder @dir */
int clone_names(struct clone *c, const char *dir, const char *name);
/* Make both files; nothing is left if it fails. */
int clone_make(struct clone *c, const struct clone_base *base);
/* Take away what clone_make() has made. */
void clone_unmake(struct clone *c);

/*
 * The files of a device that is open, by the numbers of its metadata and data device in
 * its table; false, without a message, if they are not what clone has made.  If a reset
 * was killed before its files had their names, they get them.
 */
bool clone_find(struct clone *c, const char *metadata_dev, const char *data_dev);
/* Can that be so, by the names of both files?  Then clone_find() is due. */
bool clone_needs_names(const char *image, const char *data);
/* Remove the files of a clone that is closed, and what a reset that was killed has left. */
int clone_delete(const struct clone *c);
/* The same for what is left of a reset only; says nothing. */
void clone_sweep(const struct clone *c);
/* Give files that clone_make() made with CLONE_RESET the names of @c; the old ones are gone. */
int clone_rename(const struct clone *fresh, const struct clone *c);

#endif
