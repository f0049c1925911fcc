/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The actions, and what the command line can say to them. */
#ifndef QCOW2SETUP_COMMANDS_H
#define QCOW2SETUP_COMMANDS_H

#include <stdbool.h>
#include <stdint.h>

/* A chain can be no longer: each image of it is a device on top of the next. */
#define MAX_BACKING_FILES	32

struct options {
	bool json;
	bool read_only;
	bool trust_image_paths;
	bool deferred;
	bool data_file_raw;
	bool preallocate;		/* --preallocation metadata */
	bool overwrite_device;
	const char *data_file;
	uint64_t size;			/* 0: that of the data file */
	uint64_t cluster_size;		/* 0: the default */
	uint64_t refcount_bits;		/* 0: the default */
	bool extended_l2;
	bool size_auto;			/* --size auto */
	bool no_discard_passdown;
	bool sparse;
	bool host;			/* the content is this host's own */
	uint64_t cache_limit;		/* bytes; 0: the driver's default */
	/* --backing-file, from top to bottom */
	const char *backing_file[MAX_BACKING_FILES];
	unsigned int backing_files;
	enum backing_format {
		BACKING_FORMAT_UNSET,
		BACKING_FORMAT_RAW,
		BACKING_FORMAT_QCOW2,
	} backing_format;		/* --backing-format */
	enum repair {
		REPAIR_NONE,
		REPAIR_LEAKS,		/* refcounts that are too high */
		REPAIR_ALL,
	} repair;
};

/* All return an exit code, and have said why if it is not 0. */
int cmd_info(const struct options *opt, char **args);
int cmd_create(const struct options *opt, char **args);
int cmd_open(const struct options *opt, char **args);
int cmd_close(const struct options *opt, char **args);
int cmd_status(const struct options *opt, char **args);
int cmd_table(const struct options *opt, char **args);
int cmd_map(const struct options *opt, char **args);
int cmd_check(const struct options *opt, char **args);
int cmd_measure(const struct options *opt, char **args);
int cmd_resize(const struct options *opt, char **args);

#endif
