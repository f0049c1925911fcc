// SPDX-License-Identifier: GPL-2.0-only
#include <linux/device-mapper.h>
#include <linux/kstrtox.h>
#include <linux/string.h>

#include "args.h"

#define QCOW2_NR_ARGS		8
#define QCOW2_MAX_FEATURES	15	/* words */

static int qcow2_parse_granularity(const char *value, unsigned int *bits)
{
	u64 bytes;

	if (kstrtou64(value, 10, &bytes))
		return -EINVAL;
	for (*bits = QCOW2_VIEW_BITS_MIN; *bits <= QCOW2_VIEW_BITS_MAX; ++*bits)
		if (bytes == 1ULL << *bits)
			return 0;
	return -EINVAL;
}

static int qcow2_parse_feature(struct qcow2_args *args, const char *name,
			       const char *value, char **error)
{
	bool *flag = NULL, given;

	if (!strcasecmp(name, "read_only"))
		flag = &args->read_only;
	else if (!strcasecmp(name, "data_file_raw"))
		flag = &args->raw;
	else if (!strcasecmp(name, "extended_l2"))
		flag = &args->geo.ext_l2;
	else if (!strcasecmp(name, "no_discard_passdown"))
		flag = &args->no_passdown;
	else if (!strcasecmp(name, "bitmaps"))
		flag = &args->bitmaps;

	if (flag) {
		given = *flag;
		*flag = true;
	} else if (!strcasecmp(name, "backing_dev")) {
		given = args->backing_dev;
		args->backing_dev = value;
	} else if (!strcasecmp(name, "cache_limit")) {
		given = args->cache_limit;
		if (kstrtou64(value, 10, &args->cache_limit) ||
		    !args->cache_limit) {
			*error = "Invalid cache limit";
			return -EINVAL;
		}
	} else if (!strcasecmp(name, "zeroed_from")) {
		given = args->zeroed_from;
		if (kstrtou64(value, 10, &args->zeroed_from) ||
		    !args->zeroed_from) {
			*error = "Invalid offset of zeroed metadata";
			return -EINVAL;
		}
	} else if (!strcasecmp(name, "view")) {
		given = args->cow_dev;
		args->cow_dev = value;
	} else if (!strcasecmp(name, "view_granularity")) {
		given = args->view_bits_given;
		args->view_bits_given = true;
		if (qcow2_parse_granularity(value, &args->view_bits)) {
			*error = "Granularity of a view is no power of 2 from 4096 to 1048576";
			return -EINVAL;
		}
	} else {
		*error = "Unknown feature argument";
		return -EINVAL;
	}
	if (given) {
		*error = "Feature argument given twice";
		return -EINVAL;
	}
	return 0;
}

static int qcow2_parse_features(struct qcow2_args *args, struct dm_arg_set *as,
				char **error)
{
	static const struct dm_arg arg[] = {
		{0, QCOW2_MAX_FEATURES, "Invalid number of feature arguments"},
	};
	unsigned int n;
	int r;

	if (!as->argc)
		return 0;
	r = dm_read_arg_group(arg, as, &n, error);
	if (r)
		return r;
	while (n--) {
		const char *name = dm_shift_arg(as), *value = NULL;

		if (!strcasecmp(name, "backing_dev") ||
		    !strcasecmp(name, "cache_limit") ||
		    !strcasecmp(name, "zeroed_from") ||
		    !strcasecmp(name, "view") ||
		    !strcasecmp(name, "view_granularity")) {
			if (!n--) {
				*error = "Feature argument lacks its value";
				return -EINVAL;
			}
			value = dm_shift_arg(as);
		}
		r = qcow2_parse_feature(args, name, value, error);
		if (r)
			return r;
	}
	if (as->argc) {
		*error = "Too many arguments";
		return -EINVAL;
	}
	return 0;
}

int qcow2_parse_args(struct qcow2_args *args, sector_t begin, sector_t len,
		     unsigned int argc, char **argv, char **error)
{
	struct qcow2_geometry *geo = &args->geo;
	struct dm_arg_set as;
	int r;

	memset(args, 0, sizeof(*args));
	if (argc < QCOW2_NR_ARGS) {
		*error = "Not enough arguments";
		return -EINVAL;
	}
	as.argc = argc - QCOW2_NR_ARGS;
	as.argv = argv + QCOW2_NR_ARGS;
	if (begin) {
		*error = "Target must start at sector 0";
		return -EINVAL;
	}
	if (len > QCOW2_MAX_OFFSET >> SECTOR_SHIFT) {
		*error = "Target is longer than 2^56 bytes";
		return -EINVAL;
	}
	args->metadata_dev = argv[0];
	args->data_dev = argv[1];
	geo->size = (u64)len << SECTOR_SHIFT;
	if (kstrtou32(argv[2], 10, &geo->cluster_bits)) {
		*error = "Invalid cluster_bits";
		return -EINVAL;
	}
	if (kstrtou64(argv[3], 10, &geo->l1_offset)) {
		*error = "Invalid L1 table offset";
		return -EINVAL;
	}
	if (kstrtou32(argv[4], 10, &geo->l1_entries)) {
		*error = "Invalid number of L1 entries";
		return -EINVAL;
	}
	if (kstrtou64(argv[5], 10, &geo->reftable_offset)) {
		*error = "Invalid refcount table offset";
		return -EINVAL;
	}
	if (kstrtou32(argv[6], 10, &geo->reftable_clusters)) {
		*error = "Invalid number of refcount table clusters";
		return -EINVAL;
	}
	if (kstrtou32(argv[7], 10, &geo->refcount_order)) {
		*error = "Invalid refcount order";
		return -EINVAL;
	}
	r = qcow2_parse_features(args, &as, error);
	if (r)
		return r;
	if (args->raw && args->backing_dev) {
		*error = "data_file_raw and backing_dev exclude each other";
		return -EINVAL;
	}
	if (args->view_bits_given && !args->cow_dev) {
		*error = "view_granularity needs view";
		return -EINVAL;
	}
	if (!args->view_bits_given)
		args->view_bits = QCOW2_VIEW_BITS;
	return 0;
}
