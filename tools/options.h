/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What the command line can say.  An option is told in one place, the table of
 * options.c, and kept in a field here.
 */
#ifndef QCOW2SETUP_OPTIONS_H
#define QCOW2SETUP_OPTIONS_H

#include <stdbool.h>
#include <stdint.h>

#include "stack/mapping.h"

struct options {
	bool json;
	bool read_only;
	bool trust_image_paths;
	bool deferred;
	bool remove_files;		/* of a clone: close --delete */
	bool force;
	bool partitions;
	const char *dir;
	const char *format;		/* of what is imported */
	bool data_file_raw;
	bool accept_data;		/* also if it looks like an image */
	bool overwrite_device;
	bool extended_l2;
	bool no_discard_passdown;
	bool drop_bitmaps;
	bool sparse;
	bool shrink;
	bool host;			/* the content is this host's own */
	bool quick;			/* images are not read */
	bool prometheus;
	uint64_t interval;		/* seconds; 0: none */
	bool disabled;			/* a new bitmap does not record */
	const char *data_file;
	uint64_t size;			/* bytes; 0: that of the data file */
	bool size_auto;			/* --size auto */
	bool size_more;			/* --size +...: @size is to be added */
	uint64_t cluster_size;		/* bytes; 0: the default */
	uint64_t refcount_bits;		/* 0: the default */
	uint64_t cache_limit;		/* bytes; 0: the driver's default */
	uint64_t granularity;		/* bytes; 0: the default */
	/* --backing-file, from top to bottom */
	const char *backing_file[MAX_BACKING_FILES];
	unsigned int backing_files;
	const char *map_bitmap;		/* --bitmap of map */
	const char *stop, *start;	/* bitmaps */
	const char *cow, *checkpoint, *backup_image;
	const char *increment_of;
	const char *socket, *listen;	/* of backup serve */
	const char *extend_command;	/* of monitor; NULL or "": none */
	bool dirty_only, failed, resume, verify, freeze;
	/* --bitmap, of a new image */
	const char *bitmap[MOST_RECORDING];
	unsigned int bitmaps;
	/* One of some words: how the table counts them, from 0 on. */
	unsigned int preallocate;
	enum backing_format {
		BACKING_FORMAT_UNSET,
		BACKING_FORMAT_RAW,
		BACKING_FORMAT_QCOW2,
	} backing_format;
	enum repair {
		REPAIR_NONE,
		REPAIR_LEAKS,		/* refcounts that are too high */
		REPAIR_ALL,
		REPAIR_BITMAPS,		/* give them up */
	} repair;
};

/* What can be done. */
struct action {
	const char *name;
	/* An exit code; if it is not 0, it has been said why. */
	int (*handler)(const struct options *opt, char **args);
	int min_args, max_args;
	const char *arguments;		/* as in the usage line */
	const char *summary;		/* a line; NULL: not for people */
	const char *example;		/* a command, and what it does */
	const char *page;		/* "open": qcow2setup-open(8); NULL: qcow2setup(8) */
};

/* In the order of the help; the last one has no name. */
extern const struct action actions[];

/*
 * Parse a command line.  Returns -1 if *@action shall be run with *@args, else an
 * exit code: help was asked for and printed, or something is wrong and it was said.
 */
int options_parse(int argc, char **argv, struct options *opt,
		  const struct action **action, char ***args);

struct tab_entry;

/*
 * Set the options of an action that a line of qcow2tab has, whose values are kept.
 * Returns an exit code; has said what is wrong if it is not 0.
 */
int options_tab(const struct action *action, const struct tab_entry *e,
		struct options *opt);

/* Does an action take an option of that name? */
bool action_takes(const struct action *action, const char *option);

/* What is told of an option, for shells. */
struct option_facts {
	const char *name, *arg, *help;	/* @arg: NULL: it has none */
	const char *const *words;	/* all that it can be, or NULL */
};

/* Of an option of @action, or, if that is NULL, of any; false: there is none. */
bool option_facts(const struct action *action, const char *option,
		  struct option_facts *facts);
/* Call @fn for each option of @action; stops if it returns not 0, and returns that. */
int options_each(const struct action *action,
		 int (*fn)(const struct option_facts *o, void *arg), void *arg);

#endif
