/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What the state of a device means, and what is to be done about it.  Pure code. */
#ifndef QCOW2SETUP_ADVICE_H
#define QCOW2SETUP_ADVICE_H

#include "stack/report.h"

/* The modes of a table; two of them are "ro" for the kernel. */
enum health {
	HEALTH_RW,
	HEALTH_READ_ONLY,		/* it was opened so */
	HEALTH_CORRUPT,			/* the kernel found corrupt metadata */
	HEALTH_NOSPC,
	HEALTH_FAIL,
	HEALTH_UNKNOWN,
	HEALTH_LAST = HEALTH_UNKNOWN
};

enum health report_health(const struct report *r);
/* One word for it: "rw", "read-only", "corrupt", "nospc", "fail", "unknown" */
const char *health_name(enum health health);
/* The mode and what it means, a sentence without a full stop. */
const char *health_text(enum health health);

/* Clusters of metadata that L2 tables can still need; 0: none, or that is not known. */
uint64_t report_tables_to_come(const struct report *r);
/* Clusters that are free for metadata; of a device whose status tells (STATUS_FREE_CLUSTERS). */
uint64_t report_free_clusters(const struct report *r);
/* Are fewer free than can be needed?  Not of a device that is only read. */
bool report_short_of_metadata(const struct report *r);

#define MAX_ADVICE	6

/* A line each: what is the matter, and what to do. */
struct advice {
	unsigned int n;
	char line[MAX_ADVICE][9 * 1024];
};

void report_advice(const struct report *r, struct advice *a);

#endif
