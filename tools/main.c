// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * qcow2setup: make qcow2 images with an external data file block devices, by
 * means of the device-mapper target "qcow2".
 */
#include <getopt.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>

#include "commands.h"
#include "dm.h"
#include "util.h"

#ifndef VERSION
#define VERSION "unknown"
#endif

/* What an action takes. */
enum {
	OPT_JSON		= 1U << 0,
	OPT_READ_ONLY		= 1U << 1,
	OPT_TRUST		= 1U << 2,
	OPT_DEFERRED		= 1U << 3,
	OPT_DATA_FILE		= 1U << 4,
	OPT_SIZE		= 1U << 5,
	OPT_CLUSTER_SIZE	= 1U << 6,
	OPT_REFCOUNT_BITS	= 1U << 7,
	OPT_RAW			= 1U << 8,
	OPT_PREALLOCATION	= 1U << 9,
	OPT_OVERWRITE		= 1U << 10,
	OPT_EXTENDED_L2		= 1U << 11,
	OPT_NO_PASSDOWN		= 1U << 12,
	OPT_CACHE_LIMIT		= 1U << 13,
	OPT_BACKING_FILE	= 1U << 14,
	OPT_REPAIR		= 1U << 15,
	OPT_BACKING_FORMAT	= 1U << 16,
	OPT_SPARSE		= 1U << 17,
	OPT_HOST		= 1U << 18,
	/* everywhere */
	OPT_HELP		= 1U << 29,
	OPT_VERSION		= 1U << 30,
};

static const struct action {
	const char *name;
	int (*handler)(const struct options *opt, char **args);
	int min_args, max_args;
	unsigned int options;
	const char *arg_desc;
	const char *desc;
} actions[] = {
	{ "info", cmd_info, 1, 1, OPT_JSON,
	  "IMAGE", "show what an image is, and whether it can be opened" },
	{ "create", cmd_create, 1, 1,
	  OPT_DATA_FILE | OPT_SIZE | OPT_CLUSTER_SIZE | OPT_REFCOUNT_BITS |
	  OPT_RAW | OPT_PREALLOCATION | OPT_OVERWRITE | OPT_EXTENDED_L2 |
	  OPT_BACKING_FILE | OPT_BACKING_FORMAT,
	  "IMAGE --data-file DEV|FILE", "make an image for a data file or device" },
	{ "open", cmd_open, 2, 2,
	  OPT_DATA_FILE | OPT_READ_ONLY | OPT_TRUST | OPT_BACKING_FILE |
	  OPT_NO_PASSDOWN | OPT_CACHE_LIMIT | OPT_SPARSE | OPT_HOST,
	  "IMAGE NAME --data-file DEV|FILE", "make an image the device /dev/mapper/NAME" },
	{ "close", cmd_close, 1, 1, OPT_DEFERRED,
	  "NAME", "remove a device" },
	{ "status", cmd_status, 0, 1, OPT_JSON,
	  "[NAME]", "list devices, or show one" },
	{ "table", cmd_table, 1, 1,
	  OPT_DATA_FILE | OPT_READ_ONLY | OPT_BACKING_FILE | OPT_NO_PASSDOWN |
	  OPT_CACHE_LIMIT,
	  "IMAGE --data-file DEV", "print the table line for dmsetup" },
	{ "map", cmd_map, 1, 1, OPT_JSON,
	  "IMAGE|NAME", "list what is data, zero and unallocated" },
	{ "check", cmd_check, 1, 1, OPT_REPAIR | OPT_JSON,
	  "IMAGE", "check an image's metadata, and repair it" },
	{ "measure", cmd_measure, 0, 0,
	  OPT_SIZE | OPT_CLUSTER_SIZE | OPT_REFCOUNT_BITS | OPT_EXTENDED_L2 |
	  OPT_JSON,
	  "--size SIZE", "tell how much metadata an image can need" },
	{ "resize", cmd_resize, 1, 1,
	  OPT_SIZE | OPT_DATA_FILE | OPT_BACKING_FILE | OPT_SPARSE,
	  "IMAGE|NAME --size SIZE|auto", "give an image another size" },
};

static const struct opt_desc {
	unsigned int flag;
	const char *name;
	const char *arg;
	const char *desc;
} opt_descs[] = {
	{ OPT_DATA_FILE, "data-file", "DEV|FILE", "where the guest's data is" },
	{ OPT_READ_ONLY, "readonly", NULL, "do not change image or data" },
	{ OPT_TRUST, "trust-image-paths", NULL, "use the files that the image names" },
	{ OPT_DEFERRED, "deferred", NULL, "remove the device when it is unused" },
	{ OPT_SIZE, "size", "SIZE", "virtual size (default: that of the data file)" },
	{ OPT_CLUSTER_SIZE, "cluster-size", "SIZE", "512 to 2M (default: 64K)" },
	{ OPT_REFCOUNT_BITS, "refcount-bits", "N", "1 to 64 (default: 16)" },
	{ OPT_RAW, "data-file-raw", NULL, "the data file is a raw image: keep its content" },
	{ OPT_PREALLOCATION, "preallocation", "MODE", "off, or metadata: make all L2 tables now" },
	{ OPT_EXTENDED_L2, "extended-l2", NULL, "divide each cluster into 32 subclusters" },
	{ OPT_BACKING_FILE, "backing-file", "DEV|FILE", "what unallocated clusters read as; see the manual" },
	{ OPT_BACKING_FORMAT, "backing-format", "FORMAT", "of the backing file: raw or qcow2" },
	{ OPT_NO_PASSDOWN, "no-discard-passdown", NULL, "keep discarded blocks of the data device" },
	{ OPT_CACHE_LIMIT, "cache-limit", "SIZE", "memory for the map (default: 64M)" },
	{ OPT_SPARSE, "sparse", NULL, "take no space for metadata before it is needed" },
	{ OPT_HOST, "host", NULL, "the disk is this host's: mounts by UUID=, LVM ... see it" },
	{ OPT_REPAIR, "repair", "WHAT", "leaks, or all: everything that can be repaired" },
	{ OPT_OVERWRITE, "overwrite-device", NULL, "IMAGE is a block device: overwrite it" },
	{ OPT_JSON, "json", NULL, "print JSON" },
};

static void usage(FILE *f)
{
	size_t i;

	fputs("Usage: qcow2setup ACTION [ARGUMENTS] [OPTIONS]\n\n"
	      "qcow2 images with an external data file as block devices.\n\n"
	      "Actions:\n", f);
	for (i = 0; i < ARRAY_SIZE(actions); i++)
		fprintf(f, "  %-8s%-32s%s\n", actions[i].name,
			actions[i].arg_desc, actions[i].desc);
	fputs("\nOptions:\n", f);
	for (i = 0; i < ARRAY_SIZE(opt_descs); i++)
		fprintf(f, "  --%s%s%-*s %s\n", opt_descs[i].name,
			opt_descs[i].arg ? " " : "",
			(int)(25 - strlen(opt_descs[i].name) -
			      !!opt_descs[i].arg),
			opt_descs[i].arg ? opt_descs[i].arg : "",
			opt_descs[i].desc);
	fputs("  -v, --verbose               say what is done\n"
	      "  -h, --help                  show this help\n"
	      "  -V, --version               show the version\n\n"
	      "SIZE is in bytes; K, M, G, T and P are powers of 1024, s is 512 bytes.\n"
	      "Exit status: 0 done, 1 wrong parameters, 2 no permission, 3 no memory,\n"
	      "4 wrong device or image, 5 exists already or in use.  See qcow2setup(8).\n",
	      f);
}

/* Number of an option is that of its bit, behind all characters. */
#define OPT_BASE	256

static int option_nr(unsigned int flag)
{
	return OPT_BASE + __builtin_ctz(flag);
}

static const char *option_name(unsigned int flag)
{
	size_t i;

	for (i = 0; i < ARRAY_SIZE(opt_descs); i++)
		if (opt_descs[i].flag == flag)
			return opt_descs[i].name;
	return "?";
}

static int parse_option(unsigned int flag, const char *arg, struct options *opt)
{
	switch (flag) {
	case OPT_JSON:
		opt->json = true;
		return 0;
	case OPT_READ_ONLY:
		opt->read_only = true;
		return 0;
	case OPT_TRUST:
		opt->trust_image_paths = true;
		return 0;
	case OPT_DEFERRED:
		opt->deferred = true;
		return 0;
	case OPT_RAW:
		opt->data_file_raw = true;
		return 0;
	case OPT_OVERWRITE:
		opt->overwrite_device = true;
		return 0;
	case OPT_DATA_FILE:
		opt->data_file = arg;
		return 0;
	case OPT_EXTENDED_L2:
		opt->extended_l2 = true;
		return 0;
	case OPT_NO_PASSDOWN:
		opt->no_discard_passdown = true;
		return 0;
	case OPT_BACKING_FILE:
		if (opt->backing_files == MAX_BACKING_FILES)
			return fail(EX_PARAMETER,
				    "more than %d backing files; merge some with qemu-img commit or rebase",
				    MAX_BACKING_FILES);
		opt->backing_file[opt->backing_files++] = arg;
		return 0;
	case OPT_BACKING_FORMAT:
		if (!strcmp(arg, "raw"))
			opt->backing_format = BACKING_FORMAT_RAW;
		else if (!strcmp(arg, "qcow2"))
			opt->backing_format = BACKING_FORMAT_QCOW2;
		else
			return fail(EX_PARAMETER,
				    "--backing-format %s is not possible; use raw or qcow2",
				    esc(arg));
		return 0;
	case OPT_CACHE_LIMIT:
		if (!parse_size(arg, &opt->cache_limit) || !opt->cache_limit)
			return fail(EX_PARAMETER, "--cache-limit %s is not a size; use a number such as 64M",
				    esc(arg));
		return 0;
	case OPT_HOST:
		opt->host = true;
		return 0;
	case OPT_SPARSE:
		opt->sparse = true;
		return 0;
	case OPT_REPAIR:
		if (strcmp(arg, "leaks") && strcmp(arg, "all"))
			return fail(EX_PARAMETER,
				    "--repair %s is not known; use leaks or all",
				    esc(arg));
		opt->repair = strcmp(arg, "all") ? REPAIR_LEAKS : REPAIR_ALL;
		return 0;
	case OPT_SIZE:
		opt->size_auto = !strcmp(arg, "auto");
		if (opt->size_auto)
			return 0;
		if (!parse_size(arg, &opt->size) || !opt->size)
			return fail(EX_PARAMETER, "--size %s is not a size; use a number such as 10G",
				    esc(arg));
		return 0;
	case OPT_CLUSTER_SIZE:
		if (!parse_size(arg, &opt->cluster_size) ||
		    opt->cluster_size < 512 || opt->cluster_size > 2 * MIB ||
		    opt->cluster_size & (opt->cluster_size - 1))
			return fail(EX_PARAMETER,
				    "--cluster-size %s is not possible; use a power of two from 512 to 2M",
				    esc(arg));
		return 0;
	case OPT_REFCOUNT_BITS:
		if (!parse_u64(arg, &opt->refcount_bits) ||
		    !opt->refcount_bits || opt->refcount_bits > 64 ||
		    opt->refcount_bits & (opt->refcount_bits - 1))
			return fail(EX_PARAMETER,
				    "--refcount-bits %s is not possible; use 1, 2, 4, 8, 16, 32 or 64",
				    esc(arg));
		return 0;
	case OPT_PREALLOCATION:
		if (strcmp(arg, "off") && strcmp(arg, "metadata"))
			return fail(EX_PARAMETER,
				    "--preallocation %s is not known; use off or metadata",
				    esc(arg));
		opt->preallocate = !strcmp(arg, "metadata");
		return 0;
	default:
		return EX_PARAMETER;
	}
}

static const struct action *find_action(const char *name)
{
	size_t i;

	for (i = 0; i < ARRAY_SIZE(actions); i++)
		if (!strcmp(actions[i].name, name))
			return &actions[i];
	return NULL;
}

/* All options of opt_descs, and the common ones, for getopt_long(). */
static void fill_long_options(struct option *o)
{
	size_t i;

	for (i = 0; i < ARRAY_SIZE(opt_descs); i++)
		*o++ = (struct option){
			.name = opt_descs[i].name,
			.has_arg = opt_descs[i].arg ? required_argument :
						      no_argument,
			.val = option_nr(opt_descs[i].flag),
		};
	*o++ = (struct option){ .name = "verbose", .val = 'v' };
	*o++ = (struct option){ .name = "help", .val = 'h' };
	*o++ = (struct option){ .name = "version", .val = 'V' };
	*o = (struct option){ .name = NULL };
}

/*
 * Parse everything; @args is set to the arguments.  Returns -1 if an action
 * shall be run.
 */
static int parse_command_line(int argc, char **argv, struct options *opt,
			      const struct action **action, char ***args)
{
	struct option longs[ARRAY_SIZE(opt_descs) + 4];
	unsigned int given = 0, wrong;
	int c, ret, n;

	fill_long_options(longs);
	while ((c = getopt_long(argc, argv, ":hVv", longs, NULL)) != -1) {
		switch (c) {
		case 'h':
			usage(stdout);
			return EX_DONE;
		case 'V':
			puts("qcow2setup " VERSION);
			return EX_DONE;
		case 'v':
			verbose = true;
			break;
		case ':':
			return fail(EX_PARAMETER, "option %s needs a value; see qcow2setup --help",
				    esc(argv[optind - 1]));
		case '?':
			return fail(EX_PARAMETER, "option %s is not known; see qcow2setup --help",
				    esc(argv[optind - 1]));
		default:
			given |= 1U << (c - OPT_BASE);
			ret = parse_option(1U << (c - OPT_BASE), optarg, opt);
			if (ret)
				return ret;
		}
	}
	if (optind == argc)
		return fail(EX_PARAMETER, "no action is given; see qcow2setup --help");
	*action = find_action(argv[optind]);
	if (!*action)
		return fail(EX_PARAMETER, "action %s is not known; see qcow2setup --help",
			    esc(argv[optind]));
	wrong = given & ~(*action)->options;
	if (wrong)
		return fail(EX_PARAMETER, "%s takes no option --%s; see qcow2setup --help",
			    (*action)->name, option_name(wrong & -wrong));
	n = argc - optind - 1;
	if (n < (*action)->min_args || n > (*action)->max_args)
		return fail(EX_PARAMETER, "wrong number of arguments; usage: qcow2setup %s %s",
			    (*action)->name, (*action)->arg_desc);
	*args = argv + optind + 1;
	return -1;
}

int main(int argc, char **argv)
{
	const struct action *action = NULL;
	struct options opt = { 0 };
	char **args = NULL;
	int ret;

	/* A limit on the size of files is an error like others: EFBIG. */
	signal(SIGXFSZ, SIG_IGN);
	ret = parse_command_line(argc, argv, &opt, &action, &args);
	if (ret < 0 && action) {
		/* info speaks of what open would say. */
		takes_readonly = action->options & OPT_READ_ONLY ||
				 action->handler == cmd_info;
		takes_trust = action->options & OPT_TRUST;
		ret = action->handler(&opt, args);
	}
	dm_exit();
	/* A full disk or closed pipe must not look like success. */
	if (fflush(stdout) && !ret)
		ret = fail(EX_WRONG, "cannot write the output");
	return ret;
}
