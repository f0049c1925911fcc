/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Table and status line of the qcow2 target, as text.  Pure code. */
#ifndef QCOW2SETUP_TARGET_H
#define QCOW2SETUP_TARGET_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "../driver/dm-qcow2-format.h"

#define TARGET_MAX_FEATURES	16

/* Feature arguments, of a table or of a status line. */
struct target_features {
	bool read_only, data_file_raw, extended_l2, no_discard_passdown;
	const char *backing_dev;	/* NULL: none */
	uint64_t cache_limit;		/* bytes; 0: the driver's default */
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
	char line[1024];
	uint64_t cluster_sectors;
	uint64_t l2_tables, l1_entries;
	uint64_t slices_cached, state_bytes, dirty_slices;
	uint64_t hits, misses, first_writes, commits, drops;
	uint64_t refused;		/* first writes, for want of space */
	struct target_features f;
	const char *mode;		/* "rw", "ro" or "fail" */
};

bool target_parse_table(const char *params, struct target_table *t);
bool target_parse_status(const char *params, struct target_status *s);

/*
 * Write the parameters for an image to @out.  Of @f the names are not looked
 * at; extended_l2 is taken from @g.  Returns false if they do not fit.
 */
bool target_format_table(char *out, size_t size, const char *metadata_dev,
			 const char *data_dev, const struct qcow2_geometry *g,
			 const struct target_features *f);

#endif
