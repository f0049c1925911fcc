/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Device-mapper: the few things that are asked of libdevmapper. */
#ifndef QCOW2SETUP_DM_H
#define QCOW2SETUP_DM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "lib/names.h"
#include "system/target.h"
#include "system/udev.h"

#define DM_TARGET		"qcow2"
#define DM_VIEW_TARGET		"qcow2-view"
#define DM_TAIL_SUFFIX		"-tail"
#define DM_BACKING_TAIL_SUFFIX	"-backing-tail"
#define DM_NAME_MAX		DEVICE_NAME_MAX

struct dm_dev_info {
	bool exists, suspended, read_only;
	bool inactive;		/* has a table that is not live yet */
	bool deferred;		/* goes with its last user */
	int open_count;
	dev_t rdev;
	char uuid[160];
};

struct dm_line {
	uint64_t start, sectors;
	const char *type, *params;
};

/* All of these print why they failed and return an exit code. */

/*
 * Is device-mapper there, may we use it; and is the qcow2 target there, in a
 * version that is known?
 */
int dm_check(bool need_target);
/* Of the target, whose module is loaded if it is not. */
int dm_target_version(struct target_version *v);
int dm_check_name(const char *name);
int dm_query(const char *name, struct dm_dev_info *info);
/* Say that a device is not there (any more). */
int dm_gone(const char *name);
/* Refuse a table of the qcow2 target with what the loaded module lacks. */
int dm_check_table(const char *name, const char *params);
/*
 * Create a device with @lines as its table and make it live.  Leaves nothing
 * behind if it fails, or if it is interrupted.
 */
int dm_make(const char *name, const char *uuid, const struct dm_line *lines,
	    unsigned int count, bool read_only);
/*
 * Hold back all requests, and let the target write what it has in core; file
 * systems on the device are not asked to come to rest.
 */
int dm_suspend(const char *name);
/* Load another table; it becomes live with dm_resume(). */
int dm_load(const char *name, const struct dm_line *line);
int dm_resume(const char *name);
/* Tell the target of a device with one.  0 or -errno, without a message. */
int dm_message(const char *name, const char *text);
/* The same; free() what it answers. */
int dm_ask(const char *name, const char *text, char **answer);
/* Wait a few seconds for a device that is unused to go by itself. */
void dm_wait_gone(const char *name);
/* -EBUSY is returned without a message; @deferred: when the last user goes */
int dm_remove(const char *name, bool deferred);
/*
 * Remove the helpers of a device that is gone.  They go by themselves with their
 * last user, if they could be told so when they were made.
 */
void dm_remove_tails(const char *name);
/*
 * Table or status of a device with one target; free() what it returns.  -ENXIO is
 * returned without a message: there is no such device any more.
 */
int dm_params(const char *name, bool status, char **type, char **params,
	      uint64_t *sectors);

/* Call @fn for each device; a result other than 0 ends it. */
int dm_each(int (*fn)(const char *name, void *arg), void *arg);
void dm_exit(void);

#endif
