/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What driver/args.c takes from the kernel, for userspace. */
#ifndef FUZZ_LINUX_DEVICE_MAPPER_H
#define FUZZ_LINUX_DEVICE_MAPPER_H

#include <errno.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

typedef uint32_t u32;
/* as the kernel has it: not the same type as uint64_t here */
typedef unsigned long long u64;
typedef u64 sector_t;

#define SECTOR_SHIFT	9

struct dm_arg_set {
	unsigned int argc;
	char **argv;
};

struct dm_arg {
	unsigned int min, max;
	char *error;
};

static inline const char *dm_shift_arg(struct dm_arg_set *as)
{
	if (!as->argc)
		return NULL;
	as->argc--;
	return *as->argv++;
}

/* A number within the limits of @arg, of words that must follow. */
static inline int dm_read_arg_group(const struct dm_arg *arg,
				    struct dm_arg_set *as, unsigned int *n,
				    char **error)
{
	const char *word = dm_shift_arg(as);
	char more;

	if (word && sscanf(word, "%u%c", n, &more) == 1 && *n >= arg->min &&
	    *n <= arg->max && *n <= as->argc)
		return 0;
	*error = arg->error;
	return -EINVAL;
}

#endif
