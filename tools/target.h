/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Table and status line of the qcow2 target, as text.  Pure code. */
#ifndef QCOW2SETUP_TARGET_H
#define QCOW2SETUP_TARGET_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "../driver/dm-qcow2-format.h"

#define TARGET_MAX_FEATURES	16

/* Words point into the copy of the line that is kept here. */
struct target_table {
	char line[1024];
	const char *metadata_dev, *data_dev;
	unsigned int cluster_bits, refcount_order;
	uint64_t l1_offset, l1_entries;
	uint64_t reftable_offset, reftable_clusters;
	unsigned int features;
	const char *feature[TARGET_MAX_FEATURES];
};

struct target_status {
	char line[1024];
	uint64_t cluster_sectors;
	uint64_t l2_tables, l1_entries;
	uint64_t slices_cached, state_bytes, dirty_slices;
	uint64_t hits, misses, first_writes, commits, drops;
	unsigned int features;
	const char *feature[TARGET_MAX_FEATURES];
	const char *mode;		/* "rw", "ro" or "fail" */
};

bool target_parse_table(const char *params, struct target_table *t);
bool target_parse_status(const char *params, struct target_status *s);

/*
 * Write the parameters for an image to @out.  Returns false if they do not fit.
 */
bool target_format_table(char *out, size_t size, const char *metadata_dev,
			 const char *data_dev, const struct qcow2_geometry *g,
			 bool read_only, bool data_file_raw);

#endif
