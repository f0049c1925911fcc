/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Table and status line of the qcow2 target, as text.  Pure code. */
#ifndef QCOW2SETUP_TARGET_H
#define QCOW2SETUP_TARGET_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "../../driver/format.h"

#define TARGET_MAX_FEATURES	16

/* Of the target, in the module that is loaded. */
struct target_version {
	unsigned int major, minor, patch;
};

/* All of this major number can be used; what is not in each minor one is told. */
#define TARGET_MAJOR		1
/* From this minor one on there is "zeroed_from". */
#define TARGET_MINOR_ZEROED	2
/* From this one on there is "bitmaps". */
#define TARGET_MINOR_BITMAPS	3
/* From this one on there is "view", and the target qcow2-view. */
#define TARGET_MINOR_VIEW	4

/* Feature arguments, of a table or of a status line. */
struct target_features {
	bool read_only, data_file_raw, extended_l2, no_discard_passdown;
	bool bitmaps;			/* they are kept */
	const char *backing_dev;	/* NULL: none */
	uint64_t cache_limit;		/* bytes; 0: the driver's default */
	uint64_t zeroed_from;		/* bytes, on the metadata device; 0: nowhere */
	const char *view;		/* the device for what is kept; NULL: no view */
	uint64_t view_granularity;	/* bytes; 0: the driver's default */
	const char *unknown;		/* the first that is not known here, or NULL */
	/* The names as they are given, also those that are not known here. */
	unsigned int count;
	const char *name[TARGET_MAX_FEATURES];
};

/* Words point into the copy of the line that is kept here. */
struct target_table {
	char line[1024];
	const char *metadata_dev, *data_dev;
	unsigned int cluster_bits, refcount_order;
	uint64_t l1_offset, l1_entries;
	uint64_t reftable_offset, reftable_clusters;
	struct target_features f;
};

struct target_status {
	char line[4096];
	uint64_t cluster_sectors;
	uint64_t l2_tables, l1_entries;
	uint64_t slices_cached, state_bytes, dirty_slices;
	uint64_t hits, misses, first_writes, commits, drops;
	uint64_t refused;		/* first writes, for want of space */
	struct target_features f;
	/* From version 1.1 on, if @given says so. */
	unsigned int given;
	uint64_t unwritten;		/* blocks that wait to be written again */
	uint64_t free_clusters;		/* of metadata, at most */
	uint64_t trims;			/* slices with discards to be passed down */
	/* If bitmaps are kept: how many, granules of what is in core of them ... */
	uint64_t bitmaps, exact_granules, durable_granules;
	/* ... requests that waited for a mark, and granules that were unmarked again */
	uint64_t mark_waits, taken_back;
	/* If there is a view: "valid", or why it is over; granules kept, and those of zeros */
	const char *view;
	uint64_t view_kept, view_zero;
	const char *mode;		/* "rw", "nospc", "ro" or "fail" */
};

#define STATUS_UNWRITTEN	(1U << 0)
#define STATUS_FREE_CLUSTERS	(1U << 1)
#define STATUS_TRIMS		(1U << 2)
#define STATUS_BITMAPS		(1U << 3)
#define STATUS_EXACT_GRANULES	(1U << 4)
#define STATUS_DURABLE_GRANULES	(1U << 5)
#define STATUS_MARK_WAITS	(1U << 6)
#define STATUS_TAKEN_BACK	(1U << 7)
#define STATUS_VIEW_KEPT	(1U << 8)
#define STATUS_VIEW_ZERO	(1U << 9)

bool target_parse_table(const char *params, struct target_table *t);
/* The line of a target of version @v; false if it is not just what that has. */
bool target_parse_status(const char *params, const struct target_version *v,
			 struct target_status *s);

/* The first feature of a table that a target of version @v lacks, or NULL. */
const char *target_lacks(const struct target_version *v,
			 const struct target_table *t);

/*
 * Write the parameters for an image to @out.  Of @f the names are not looked
 * at; extended_l2 is taken from @g.  Returns false if they do not fit.
 */
bool target_format_table(char *out, size_t size, const char *metadata_dev,
			 const char *data_dev, const struct qcow2_geometry *g,
			 const struct target_features *f);

#endif
