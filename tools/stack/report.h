/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * All that can be told of devices that are open: what list, status and its --json and
 * --prometheus show.
 */
#ifndef QCOW2SETUP_REPORT_H
#define QCOW2SETUP_REPORT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "image/usage.h"
#include "lib/json.h"
#include "system/device.h"
#include "system/dm.h"
#include "system/target.h"
#include "system/users.h"

/* All that is known about one device. */
struct report {
	char name[128];
	struct dm_dev_info info;
	enum device_kind kind;
	char type[64];			/* of target */
	uint64_t size;			/* bytes */
	bool has_table, has_status;
	bool gone;			/* while we looked */
	struct target_table table;
	struct target_status status;
	struct device metadata, data, backing;
	struct report *below;		/* the backing device, if it is ours */
	/* From here on not of what is below another one */
	struct image_usage usage;
	struct users users;
	uint64_t metadata_size;		/* bytes; 0: not known */
	/* Of an image file: it has holes, and what its file system has left, bytes */
	bool has_room, sparse;
	uint64_t room;
};

struct report_list {
	struct report *r;
	size_t n;
};

/* What is looked for, beside table and status */
struct report_wishes {
	bool quick;			/* read nothing of images, so never wait for I/O */
	bool users;
};

/* All of these print why they failed and return an exit code. */

/* One device by its name; report_free() in any case. */
int report_get(const char *name, const struct report_wishes *w, struct report *r);
void report_free(struct report *r);
/*
 * All devices, by their names; report_list_free() in any case.  One that cannot be
 * understood does not keep the others from being shown: that is *@wrong, an exit code.
 */
int report_get_all(const struct report_wishes *w, struct report_list *list,
		   int *wrong);
void report_list_free(struct report_list *list);

/* What happened between two looks at the same device */
struct report_interval {
	uint64_t ms;			/* 0: there was only one look */
	bool other;			/* it was made anew, or got another table */
	uint64_t hits, misses, first_writes, commits;
};

/* The rest is pure code. */

void report_compare(const struct target_status *before,
		    const struct target_status *after, uint64_t ms,
		    struct report_interval *v);

/* One object; @v: NULL, or what happened lately. */
void report_json(struct json *j, const struct report *r,
		 const struct report_interval *v);
/* The whole output: an array of them */
void report_json_all(const struct report_list *list);

/* The file behind a device, or the device itself. */
static inline const char *report_origin(const struct device *d)
{
	return d->file[0] ? d->file : d->node;
}

/* Who has made it */
static inline const char *report_maker(const struct report *r)
{
	return r->kind == DEVICE_OURS ? "qcow2setup" : "dmsetup";
}

/* A view's granule that is kept, in bytes; at the end of the disk it is counted as a whole one. */
static inline uint64_t report_kept(const struct target_status *s)
{
	return s->view_kept *
	       (s->f.view_granularity ? s->f.view_granularity : 65536);
}

/*
 * Names of counters in text and JSON; blanks in one are dashes in the other, as in those of
 * qemu-img.
 */
struct report_number {
	const char *name;
	uint64_t value;
	unsigned int given;		/* what must be, for there to be one */
};

#define REPORT_NUMBERS	20

/* Those that are given; how many. */
size_t report_numbers(const struct target_status *s, struct report_number *n);

#endif
