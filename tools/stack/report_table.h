/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Reports of devices as a table for people: what list, and status without a name, print. */
#ifndef QCOW2SETUP_REPORT_TABLE_H
#define QCOW2SETUP_REPORT_TABLE_H

#include <stdbool.h>
#include <stddef.h>

#include "stack/report.h"

struct report_column {
	const char *name;
	bool right;			/* where its text ends, not where it begins */
	/* The text, for one device; the table escapes it. */
	void (*cell)(char *out, size_t size, const struct report *r);
};

/* A line for each device that has not gone meanwhile; nothing if there are none.  An exit code. */
int report_table(const struct report_list *list, const struct report_column *column,
		 size_t columns);

/* What both have */
void report_name_cell(char *out, size_t size, const struct report *r);
void report_size_cell(char *out, size_t size, const struct report *r);

#endif
