/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The target's arguments, as text in and numbers out: no device is looked at.
 * Uses nothing of the kernel but dm's and libc-like helpers for words, so that
 * it can be built in userspace, too, and be fuzzed there.
 */
#ifndef DM_QCOW2_ARGS_H
#define DM_QCOW2_ARGS_H

#include "format.h"

/* Log2 of bytes: what a granule of a view can be, and is if nothing is said */
#define QCOW2_VIEW_BITS_MIN	12
#define QCOW2_VIEW_BITS_MAX	20
#define QCOW2_VIEW_BITS		16

struct qcow2_args {
	const char *metadata_dev;
	const char *data_dev;
	const char *backing_dev;	/* NULL: none */
	u64 cache_limit;		/* bytes; 0 = not given */
	u64 zeroed_from;		/* bytes; 0 = not given */
	bool read_only;
	bool raw;			/* data_file_raw */
	bool no_passdown;
	bool bitmaps;			/* they are to be kept */
	const char *cow_dev;		/* for what a view keeps; NULL: there is no view */
	bool view_bits_given;
	unsigned int view_bits;		/* log2 of bytes per granule of the view */
	struct qcow2_geometry geo;	/* as given; size is the target's */
};

/**
 * qcow2_parse_args() - take the arguments of a table line apart
 * @args: filled in; its strings are those of @argv
 * @begin: first sector of the target
 * @len: sectors
 * @argc: number of arguments
 * @argv: the arguments
 * @error: set if the result is not 0
 *
 * The numbers are such that they fit their types, no more: the caller checks the
 * geometry.  Returns 0 or -EINVAL.
 */
int qcow2_parse_args(struct qcow2_args *args, sector_t begin, sector_t len,
		     unsigned int argc, char **argv, char **error);

#endif /* DM_QCOW2_ARGS_H */
