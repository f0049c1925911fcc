/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The actions, and what the command line can say to them. */
#ifndef QCOW2SETUP_COMMANDS_H
#define QCOW2SETUP_COMMANDS_H

#include <stdbool.h>
#include <stdint.h>

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
};

/* All return an exit code, and have said why if it is not 0. */
int cmd_info(const struct options *opt, char **args);
int cmd_create(const struct options *opt, char **args);
int cmd_open(const struct options *opt, char **args);
int cmd_close(const struct options *opt, char **args);
int cmd_status(const struct options *opt, char **args);
int cmd_table(const struct options *opt, char **args);

#endif
