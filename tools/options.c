// SPDX-License-Identifier: GPL-2.0-or-later
#include <getopt.h>
#include <stdlib.h>
#include <string.h>

#include "lib/size.h"
#include "lib/tab.h"
#include "lib/util.h"
#include "options.h"

#ifndef VERSION
#define VERSION "unknown"
#endif

struct option_row;

/*
 * A kind of options: puts the value @arg of option @o into @opt.  Returns an exit
 * code; has said what is wrong if it is not 0.
 */
typedef int parse_fn(const struct option_row *o, const char *arg,
		     struct options *opt);

static parse_fn parse_flag, parse_text, parse_backing, parse_bitmap, parse_bytes,
	parse_length, parse_new_length, parse_power, parse_word;

/* As size_error(), for a plain number. */
static const char *u64_error(const char *s, uint64_t *v)
{
	return parse_u64(s, v) ? NULL : "is not possible";
}

/*
 * One row for each option; a second one if it means something else for another
 * action.  Whether it takes a value must be the same in both.
 */
static const struct option_row {
	const char *name;
	const char *arg;		/* NULL: none */
	const char *actions;		/* that take it: words */
	const char *help;
	parse_fn *parse;
	size_t at;			/* of its field in struct options */
	/* parse_bytes, parse_power: how it is written, and what is possible */
	const char *(*number)(const char *s, uint64_t *v);
	uint64_t min, max;
	/* parse_word: the words, each of which stands for its place, from @first on */
	const char *const *words;
	unsigned int first;
	const char *wrong;		/* what is wrong with others, and the remedy */
} rows[] = {
#define ROW(NAME, ARG, ACTIONS, HELP, PARSE, FIELD, ...)			\
	{ .name = NAME, .arg = ARG, .actions = ACTIONS, .help = HELP,		\
	  .parse = PARSE, .at = offsetof(struct options, FIELD), __VA_ARGS__ }

	ROW("data-file", "DEV|FILE", "create open table",
	    "where the guest's data is", parse_text, data_file),
	ROW("data-file", "DEV|FILE", "resize",
	    "the data of a closed image that is raw, or that is to grow or be cut, too",
	    parse_text, data_file),
	ROW("size", "SIZE", "create",
	    "virtual size (default: that of the data file)", parse_length, size),
	ROW("format", "FORMAT", "import",
	    "of SOURCE, as qemu-img calls it (default: looked for, where that is safe)",
	    parse_text, format),
	ROW("verify", NULL, "import", "read it back, and compare", parse_flag,
	    verify),
	ROW("overwrite-device", NULL, "import",
	    "TARGET is a block device: overwrite it", parse_flag,
	    overwrite_device),
	ROW("trust-image-paths", NULL, "import",
	    "read the files that SOURCE names, too", parse_flag,
	    trust_image_paths),
	ROW("json", NULL, "import", "print how far it is, for programs",
	    parse_flag, json),
	ROW("dir", "DIR", "clone",
	    "the folder for NAME.qcow2 and NAME.data (default: the current one)",
	    parse_text, dir),
	ROW("size", "SIZE", "clone", "virtual size (default: that of the base)",
	    parse_length, size),
	ROW("backing-format", "FORMAT", "clone",
	    "of the base: raw, or qcow2 with its data elsewhere", parse_word,
	    backing_format,
	    .words = (const char *const[]){ "raw", "qcow2", NULL },
	    .first = BACKING_FORMAT_RAW,
	    .wrong = "is not possible; use raw or qcow2"),
	ROW("backing-file", "DEV|FILE[,data-file=DEV|FILE]", "clone",
	    "what is below the base; again for what is below that", parse_backing,
	    backing_file),
	ROW("no-discard-passdown", NULL, "clone",
	    "keep discarded blocks of the data file", parse_flag,
	    no_discard_passdown),
	ROW("force", NULL, "reset",
	    "also if a program has the device open (not if it is mounted)",
	    parse_flag, force),
	ROW("delete", NULL, "close", "remove the files that clone has made, too",
	    parse_flag, remove_files),
	ROW("size", "SIZE", "measure", "virtual size", parse_length, size),
	ROW("size", "SIZE|+SIZE|auto", "resize",
	    "the new size; +: so much more; auto: that of the data",
	    parse_new_length, size),
	ROW("data-file-raw", NULL, "create",
	    "the data file is a raw image: keep its content", parse_flag,
	    data_file_raw),
	ROW("accept-data", NULL, "create",
	    "take the data file also if it begins as a qcow2 image does",
	    parse_flag, accept_data),
	ROW("cluster-size", "SIZE", "create measure", "512 to 2M (default: 64K)",
	    parse_power, cluster_size, .number = size_error,
	    .min = 512, .max = 2 * MIB,
	    .wrong = "is not possible; use a power of two from 512 to 2M"),
	ROW("extended-l2", NULL, "create measure",
	    "divide each cluster into 32 subclusters", parse_flag, extended_l2),
	ROW("refcount-bits", "N", "create measure", "1 to 64 (default: 16)",
	    parse_power, refcount_bits, .number = u64_error, .min = 1, .max = 64,
	    .wrong = "is not possible; use 1, 2, 4, 8, 16, 32 or 64"),
	ROW("preallocation", "MODE", "create",
	    "off, or metadata: make all L2 tables now", parse_word, preallocate,
	    .words = (const char *const[]){ "off", "metadata", NULL },
	    .wrong = "is not known; use off or metadata"),
	ROW("backing-file", "DEV|FILE", "create",
	    "what unallocated clusters read as", parse_backing, backing_file),
	ROW("backing-file", "DEV|FILE[,data-file=DEV|FILE]", "open table",
	    "what unallocated clusters read as; again for what is below it",
	    parse_backing, backing_file),
	ROW("backing-file", "DEV|FILE", "resize",
	    "the backing file of a closed image", parse_backing, backing_file),
	ROW("backing-format", "FORMAT", "create",
	    "of the backing file: raw or qcow2", parse_word, backing_format,
	    .words = (const char *const[]){ "raw", "qcow2", NULL },
	    .first = BACKING_FORMAT_RAW,
	    .wrong = "is not possible; use raw or qcow2"),
	ROW("bitmap", "NAME[,granularity=SIZE]", "create measure",
	    "record in a bitmap what is written; again for more",
	    parse_bitmap, bitmap),
	ROW("cow", "DEV|DIR", "backup",
	    "begin: where old content is kept until the end", parse_text, cow),
	ROW("checkpoint", "NAME[,granularity=SIZE]", "backup",
	    "begin: the bitmap that begins at that instant", parse_text,
	    checkpoint),
	ROW("bitmap", "NAME", "backup",
	    "what has changed since it began; again for more",
	    parse_bitmap, bitmap),
	ROW("image", "FILE", "backup",
	    "begin: where the image for others goes (default: in /run)",
	    parse_text, backup_image),
	ROW("socket", "PATH", "backup", "serve: a socket of the system",
	    parse_text, socket),
	ROW("listen", "HOST:PORT", "backup", "serve: an address", parse_text,
	    listen),
	ROW("resume", NULL, "backup", "copy: go on where it was stopped",
	    parse_flag, resume),
	ROW("increment-of", "FILE", "backup",
	    "copy: keep what has changed by itself: FILE is the copy before",
	    parse_text, increment_of),
	ROW("verify", NULL, "backup",
	    "copy, restore: read it back, and compare", parse_flag, verify),
	ROW("overwrite-device", NULL, "backup",
	    "copy, restore: TARGET is a block device: overwrite it", parse_flag,
	    overwrite_device),
	ROW("dirty-only", NULL, "backup",
	    "begin: keep only what the bitmaps say has changed", parse_flag,
	    dirty_only),
	ROW("size", "SIZE", "backup",
	    "begin: keep no more than this, of each device", parse_bytes, size,
	    .number = size_error, .min = MIB, .max = UINT64_MAX,
	    .wrong = "is too little; use a number such as 10G, from 1M on"),
	ROW("freeze", NULL, "backup",
	    "begin: with the file systems that are mounted here at rest",
	    parse_flag, freeze),
	ROW("failed", NULL, "backup",
	    "end: what has changed goes to the checkpoint: it is not lost",
	    parse_flag, failed),
	ROW("bitmap", "NAME", "map",
	    "list what is dirty in this bitmap, and what is not", parse_text,
	    map_bitmap),
	ROW("stop", "NAME", "checkpoint", "the bitmap that ends", parse_text,
	    stop),
	ROW("start", "NAME[,granularity=SIZE]", "checkpoint",
	    "the bitmap that begins", parse_text, start),
	ROW("overwrite-device", NULL, "create",
	    "IMAGE is a block device: overwrite it", parse_flag,
	    overwrite_device),
	ROW("readonly", NULL, "open table", "do not change image or data",
	    parse_flag, read_only),
	ROW("trust-image-paths", NULL, "open", "use the files that the image names",
	    parse_flag, trust_image_paths),
	ROW("trust-image-paths", NULL, "backup",
	    "restore: read copies that are in other folders, too", parse_flag,
	    trust_image_paths),
	ROW("no-discard-passdown", NULL, "open table",
	    "keep discarded blocks of the data device", parse_flag,
	    no_discard_passdown),
	ROW("cache-limit", "SIZE", "open table clone",
	    "memory for the map (default: 64M)", parse_bytes, cache_limit,
	    .number = size_error, .min = 1, .max = UINT64_MAX,
	    .wrong = "is too little; use a number such as 64M"),
	ROW("sparse", NULL, "open resize bitmap checkpoint backup",
	    "take no space for metadata before it is needed", parse_flag, sparse),
	ROW("shrink", NULL, "resize",
	    "make a closed image smaller: what is behind the new end is lost",
	    parse_flag, shrink),
	ROW("drop-bitmaps", NULL, "open",
	    "do not keep bitmaps: they are marked as not valid", parse_flag,
	    drop_bitmaps),
	ROW("host", NULL, "open clone",
	    "the disk is this host's: mounts by UUID=, LVM ... see it", parse_flag,
	    host),
	ROW("partitions", NULL, "open clone",
	    "make its partitions devices, too: NAME1, or NAMEp1", parse_flag,
	    partitions),
	ROW("deferred", NULL, "close", "remove the device when it is unused",
	    parse_flag, deferred),
	ROW("extend-command", "COMMAND", "monitor",
	    "makes the device or file system larger that is low: see the manual",
	    parse_text, extend_command),
	ROW("repair", "WHAT", "check",
	    "leaks; all that can be repaired; or bitmaps: give them up",
	    parse_word, repair,
	    .words = (const char *const[]){ "leaks", "all", "bitmaps", NULL },
	    .first = REPAIR_LEAKS,
	    .wrong = "is not known; use leaks, all or bitmaps"),
	ROW("granularity", "SIZE", "bitmap",
	    "add: bytes for each bit, 512 to 2G (default: a cluster, 4K to 64K)",
	    parse_power, granularity, .number = size_error,
	    .min = 512, .max = 2048 * MIB,
	    .wrong = "is not possible; use a power of two from 512 to 2G"),
	ROW("disabled", NULL, "bitmap", "add: do not record what is written",
	    parse_flag, disabled),
	ROW("prometheus", NULL, "status",
	    "print metrics, for node_exporter's textfile collector", parse_flag,
	    prometheus),
	ROW("interval", "SECONDS", "status",
	    "wait so long, and tell what happened meanwhile", parse_bytes, interval,
	    .number = u64_error, .min = 1, .max = 86400,
	    .wrong = "is not possible; use a number of seconds from 1 to 86400"),
	ROW("quick", NULL, "list status",
	    "do not read images, and so do not tell what is allocated", parse_flag,
	    quick),
	ROW("json", NULL, "info list status map check measure", "print JSON",
	    parse_flag, json),
	ROW("json", NULL, "bitmap", "list: print JSON", parse_flag, json),
	ROW("json", NULL, "backup", "status, extents, copy, restore: print JSON",
	    parse_flag, json),
#undef ROW
};

static void *field(const struct option_row *o, struct options *opt)
{
	return (char *)opt + o->at;
}

/* How the option was written: for the command line, unless options_tab() is at it. */
static const char *dashes = "--", *behind_name = " ";

/* What is wrong with it is @why, or else what the row says, as is the remedy. */
static int wrong_value(const struct option_row *o, const char *arg,
		       const char *why)
{
	const char *remedy = strstr(o->wrong, "; ");

	return fail(EX_PARAMETER, "%s%s%s%s %.*s; %s", dashes, o->name,
		    behind_name, esc(arg),
		    why ? (int)strlen(why) : (int)(remedy - o->wrong),
		    why ? why : o->wrong, remedy + 2);
}

static int parse_flag(const struct option_row *o, const char *arg,
		      struct options *opt)
{
	(void)arg;
	*(bool *)field(o, opt) = true;
	return 0;
}

static int parse_text(const struct option_row *o, const char *arg,
		      struct options *opt)
{
	*(const char **)field(o, opt) = arg;
	return 0;
}

static int parse_backing(const struct option_row *o, const char *arg,
			 struct options *opt)
{
	const char **list = field(o, opt);

	if (opt->backing_files == MAX_BACKING_FILES)
		return fail(EX_PARAMETER,
			    "more than %d backing files; merge some: qemu-img rebase -f qcow2 -F qcow2 -b BASE IMAGE",
			    MAX_BACKING_FILES);
	list[opt->backing_files++] = arg;
	return 0;
}

static int parse_bitmap(const struct option_row *o, const char *arg,
			struct options *opt)
{
	const char **list = field(o, opt);

	if (opt->bitmaps == MOST_RECORDING)
		return fail(EX_PARAMETER,
			    "more than %d bitmaps cannot record; leave some --bitmap out",
			    MOST_RECORDING);
	list[opt->bitmaps++] = arg;
	return 0;
}

static int parse_bytes(const struct option_row *o, const char *arg,
		       struct options *opt)
{
	uint64_t *v = field(o, opt);
	const char *why = o->number(arg, v);

	return !why && *v >= o->min && *v <= o->max ? 0 :
	       wrong_value(o, arg, why);
}

static const char *length_error(const char *arg, uint64_t *v)
{
	const char *why = size_error(arg, v);

	return !why && !*v ? "is nothing" : why;
}

/* A virtual size, or what "auto" stands for. */
static int parse_length(const struct option_row *o, const char *arg,
			struct options *opt)
{
	const char *why;

	opt->size_auto = !strcmp(arg, "auto");
	why = opt->size_auto ? NULL : length_error(arg, field(o, opt));
	return !why ? 0 :
	       fail(EX_PARAMETER, "--%s %s %s; use a number such as 10G",
		    o->name, esc(arg), why);
}

/* As parse_length(), or how much more. */
static int parse_new_length(const struct option_row *o, const char *arg,
			    struct options *opt)
{
	const char *why;

	opt->size_more = *arg == '+';
	if (!opt->size_more && *arg != '-')
		return parse_length(o, arg, opt);
	opt->size_auto = false;
	why = length_error(arg + opt->size_more, field(o, opt));
	return !why ? 0 :
	       fail(EX_PARAMETER,
		    "--%s %s %s; use +10G for 10G more, or the new size, such as 10G",
		    o->name, esc(arg), why);
}

static int parse_power(const struct option_row *o, const char *arg,
		       struct options *opt)
{
	const uint64_t *v = field(o, opt);
	int ret = parse_bytes(o, arg, opt);

	return ret || !(*v & (*v - 1)) ? ret : wrong_value(o, arg, NULL);
}

static int parse_word(const struct option_row *o, const char *arg,
		      struct options *opt)
{
	unsigned int i;

	for (i = 0; o->words[i]; i++)
		if (!strcmp(o->words[i], arg)) {
			*(unsigned int *)field(o, opt) = o->first + i;
			return 0;
		}
	return wrong_value(o, arg, NULL);
}

static bool has_word(const char *words, const char *word)
{
	size_t len = strlen(word);
	const char *at;

	for (at = words; (at = strstr(at, word)); at += len)
		if ((at == words || at[-1] == ' ') &&
		    (!at[len] || at[len] == ' '))
			return true;
	return false;
}

static const struct option_row *find_row(const struct action *action,
					 const char *option)
{
	size_t i;

	for (i = 0; i < ARRAY_SIZE(rows); i++)
		if (!strcmp(rows[i].name, option) &&
		    has_word(rows[i].actions, action->name))
			return &rows[i];
	return NULL;
}

bool action_takes(const struct action *action, const char *option)
{
	return find_row(action, option);
}

static struct option_facts facts_of(const struct option_row *o)
{
	return (struct option_facts){
		.name = o->name, .arg = o->arg, .help = o->help,
		.words = o->words,
	};
}

bool option_facts(const struct action *action, const char *option,
		  struct option_facts *facts)
{
	size_t i;

	for (i = 0; i < ARRAY_SIZE(rows); i++)
		if (!strcmp(rows[i].name, option) &&
		    (!action || has_word(rows[i].actions, action->name))) {
			*facts = facts_of(&rows[i]);
			return true;
		}
	return false;
}

int options_each(const struct action *action,
		 int (*fn)(const struct option_facts *o, void *arg), void *arg)
{
	struct option_facts o;
	int ret = 0;
	size_t i;

	for (i = 0; !ret && i < ARRAY_SIZE(rows); i++) {
		if (!has_word(rows[i].actions, action->name))
			continue;
		o = facts_of(&rows[i]);
		ret = fn(&o, arg);
	}
	return ret;
}

static int apply_word(const struct action *action, const char *name,
		      const char *value, struct options *opt)
{
	const struct option_row *o = find_row(action, name);

	if (!o)
		return fail(EX_PARAMETER, "option %s is not known; see qcow2tab(5)",
			    esc(name));
	if (o->arg && !value)
		return fail(EX_PARAMETER, "option %s needs a value; write %s=%s",
			    name, name, o->arg);
	if (!o->arg && value)
		return fail(EX_PARAMETER, "option %s takes no value; write %s alone",
			    name, name);
	return o->parse(o, value, opt);
}

int options_tab(const struct action *action, const struct tab_entry *e,
		struct options *opt)
{
	size_t i;
	int ret = 0;

	dashes = "";
	behind_name = "=";
	for (i = 0; !ret && i < e->nr_words; i++)
		ret = apply_word(action, e->words[i].name, e->words[i].value, opt);
	dashes = "--";
	behind_name = " ";
	return ret;
}

/* An action by its name; NULL if there is none. */
static const struct action *find_action(const char *name)
{
	const struct action *a;

	for (a = actions; a->name; a++)
		if (!strcmp(a->name, name))
			return a;
	return NULL;
}

static int no_action(const char *name)
{
	return fail(EX_PARAMETER, "action %s is not known; see qcow2setup --help",
		    esc(name));
}

#define HELP_WIDTH	28

static void help_option(const char *name, const char *arg, const char *help)
{
	int n = printf("  %s%s%s", name, arg ? " " : "", arg ? arg : "");

	if (n > HELP_WIDTH)
		printf("\n%*s  %s\n", HELP_WIDTH, "", help);
	else
		printf("%*s  %s\n", HELP_WIDTH - n, "", help);
}

static void help_all(void)
{
	const struct action *a;

	puts("Usage: qcow2setup ACTION [ARGUMENTS] [OPTIONS]\n\n"
	     "qcow2 images with an external data file as block devices.\n\n"
	     "Actions:");
	for (a = actions; a->name; a++)
		if (a->summary)
			printf("  %-8s %-32s%s\n", a->name, a->arguments, a->summary);
	puts("\nqcow2setup help ACTION shows an action's options and an example.\n\n"
	     "Options of all actions:");
	help_option("-v, --verbose", NULL, "say what is done");
	help_option("-h, --help", NULL, "show this help, or that of the action");
	help_option("-V, --version", NULL, "show the version");
	puts("\nSIZE is in bytes; K, M, G, T, P and E are powers of 1024, s is 512 bytes.\n"
	     "Exit status: 0 done, 1 wrong parameters, 2 no permission, 3 no memory,\n"
	     "4 wrong device or image, 5 exists already or in use.  See qcow2setup(8).");
}

static void help_action(const struct action *action)
{
	bool first = true;
	char name[40];
	size_t i;

	printf("Usage: qcow2setup %s %s [OPTIONS]\n\n%s: %s.\n", action->name,
	       action->arguments, action->name,
	       action->summary ? action->summary : "list what fits, for a shell");
	for (i = 0; i < ARRAY_SIZE(rows); i++) {
		if (!has_word(rows[i].actions, action->name))
			continue;
		if (first)
			puts("\nOptions:");
		first = false;
		snprintf(name, sizeof(name), "--%s", rows[i].name);
		help_option(name, rows[i].arg, rows[i].help);
	}
	if (action->example)
		printf("\nExample:\n  %s\n", action->example);
	printf("\nSee qcow2setup%s%s(8).\n", action->page ? "-" : "",
	       action->page ? action->page : "");
}

/* "help", or "help ACTION" */
static int help(char **args, int n)
{
	const struct action *action;

	if (n > 1)
		return fail(EX_PARAMETER,
			    "wrong number of arguments; usage: qcow2setup help [ACTION]");
	if (!n) {
		help_all();
		return EX_DONE;
	}
	action = find_action(args[0]);
	if (!action)
		return no_action(args[0]);
	help_action(action);
	return EX_DONE;
}

/* Numbers of options for getopt_long(), behind all characters. */
#define OPT_BASE	256

/* All rows, each name once, and the common ones. */
static void fill_long_options(struct option *o)
{
	size_t i, k;

	for (i = 0; i < ARRAY_SIZE(rows); i++) {
		for (k = 0; k < i && strcmp(rows[k].name, rows[i].name); k++)
			;
		if (k < i)
			continue;
		*o++ = (struct option){
			.name = rows[i].name,
			.has_arg = rows[i].arg ? required_argument : no_argument,
			.val = OPT_BASE + i,
		};
	}
	*o++ = (struct option){ .name = "verbose", .val = 'v' };
	*o++ = (struct option){ .name = "help", .val = 'h' };
	*o++ = (struct option){ .name = "version", .val = 'V' };
	*o = (struct option){ .name = NULL };
}

/* An option as it was given; what it means depends on the action. */
struct given {
	const char *name, *value;
};

static int apply(const struct action *action, const struct given *given,
		 size_t n, struct options *opt)
{
	const struct option_row *o;
	size_t i;
	int ret;

	for (i = 0; i < n; i++) {
		o = find_row(action, given[i].name);
		if (!o)
			return fail(EX_PARAMETER,
				    "%s takes no option --%s; see qcow2setup help %s",
				    action->name, given[i].name, action->name);
		ret = o->parse(o, given[i].value, opt);
		if (ret)
			return ret;
	}
	return 0;
}

static int parse(int argc, char **argv, struct options *opt,
		 struct given *given, const struct action **action, char ***args)
{
	struct option longs[ARRAY_SIZE(rows) + 4];
	bool help_wanted = false;
	size_t options = 0;
	int c, n, ret;

	fill_long_options(longs);
	while ((c = getopt_long(argc, argv, ":hVv", longs, NULL)) != -1) {
		switch (c) {
		case 'h':
			help_wanted = true;
			break;
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
			given[options++] = (struct given){
				rows[c - OPT_BASE].name, optarg
			};
		}
	}
	n = argc - optind - 1;
	if (n >= 0 && !strcmp(argv[optind], "help"))
		return help(argv + optind + 1, n);
	if (help_wanted)
		return help(argv + optind, n >= 0 && find_action(argv[optind]));
	if (n < 0)
		return fail(EX_PARAMETER, "no action is given; see qcow2setup --help");
	*action = find_action(argv[optind]);
	if (!*action)
		return no_action(argv[optind]);
	ret = apply(*action, given, options, opt);
	if (ret)
		return ret;
	if (n < (*action)->min_args || n > (*action)->max_args)
		return fail(EX_PARAMETER, "wrong number of arguments; usage: qcow2setup %s %s",
			    (*action)->name, (*action)->arguments);
	*args = argv + optind + 1;
	return -1;
}

/* Is JSON wanted, of an action that has it, in a line that cannot be parsed? */
static bool wants_json(char **argv)
{
	bool json = false, takes = false;
	const struct action *a;

	for (; *argv && strcmp(*argv, "--"); argv++) {
		json |= !strcmp(*argv, "--json");
		a = takes ? NULL : find_action(*argv);
		takes |= a && action_takes(a, "json");
	}
	return json && takes;
}

int options_parse(int argc, char **argv, struct options *opt,
		  const struct action **action, char ***args)
{
	struct given *given = calloc(argc + 1, sizeof(*given));
	int ret;

	if (!given)
		return fail_nomem();
	ret = parse(argc, argv, opt, given, action, args);
	free(given);
	if (ret > 0)
		opt->json = wants_json(argv + 1);
	return ret;
}
