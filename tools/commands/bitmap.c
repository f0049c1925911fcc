// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * qcow2setup bitmap, checkpoint: the persistent bitmaps of an image, which say what
 * was written since they were made; of an image that nobody has open, or of a device
 * that is (stack/change.c).
 */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "commands/commands.h"
#include "image/bitmaps.h"
#include "image/image.h"
#include "lib/interrupt.h"
#include "lib/json.h"
#include "lib/util.h"
#include "stack/attach.h"
#include "stack/change.h"
#include "stack/mapping.h"
#include "system/device.h"
#include "system/dm.h"

/* Changes in memory; @names ends with NULL. */
typedef int change_fn(const struct options *opt, struct bitmaps *s,
		      char **names);

static int add(const struct options *opt, struct bitmaps *s, char **names)
{
	unsigned int bits = opt->granularity ?
		(unsigned int)__builtin_ctzll(opt->granularity) :
		bitmap_granularity_bits(s->img->geo.cluster_bits);

	return bitmaps_add(s, names[0], bits, !opt->disabled);
}

static int remove_one(const struct options *opt, struct bitmaps *s,
		      char **names)
{
	(void)opt;
	return bitmaps_remove(s, names[0]);
}

static int clear(const struct options *opt, struct bitmaps *s, char **names)
{
	(void)opt;
	return bitmaps_clear(s, names[0]);
}

static int enable(const struct options *opt, struct bitmaps *s, char **names)
{
	(void)opt;
	return bitmaps_record(s, names[0], true);
}

static int disable(const struct options *opt, struct bitmaps *s, char **names)
{
	(void)opt;
	return bitmaps_record(s, names[0], false);
}

static int merge(const struct options *opt, struct bitmaps *s, char **names)
{
	char **source;
	int ret = 0;

	(void)opt;
	for (source = names + 1; !ret && *source; source++)
		ret = bitmaps_merge(s, names[0], *source);
	return ret;
}

/* In one step: it ends there, and begins there. */
static int stop_and_start(const struct options *opt, struct bitmaps *s,
			  char **names)
{
	int ret = 0;

	(void)names;
	if (opt->stop)
		ret = bitmaps_stop(s, opt->stop);
	return ret ? ret : bitmaps_add_option(s, opt->start, "start");
}

static const struct what {
	const char *name;
	const char *arguments;		/* as in the usage line */
	change_fn *change;		/* NULL: it only shows them */
	int min_names, max_names;
	const char *options;		/* that it takes: words */
} verbs[] = {
	{ "list", "IMAGE|NAME [--json]", NULL, 0, 0, "json" },
	{ "add", "IMAGE|NAME BITMAP [--granularity SIZE] [--disabled]", add, 1, 1,
	  "granularity disabled" },
	{ "remove", "IMAGE|NAME BITMAP", remove_one, 1, 1, "" },
	{ "clear", "IMAGE|NAME BITMAP", clear, 1, 1, "" },
	{ "enable", "IMAGE|NAME BITMAP", enable, 1, 1, "" },
	{ "disable", "IMAGE|NAME BITMAP", disable, 1, 1, "" },
	{ "merge", "IMAGE|NAME TARGET SOURCE...", merge, 2, 1 << 20, "" },
};

static void print_json(const struct bitmaps *s)
{
	const struct bitmap_item *b;
	uint64_t count;
	const char *why;
	struct json j;

	json_start(&j, stdout);
	json_array(&j, NULL);
	for (b = s->item; b < s->item + s->n; b++) {
		json_object(&j, NULL);
		json_version(&j);
		json_stringn(&j, "name", b->name, b->head.name_size);
		json_number(&j, "granularity", 1ULL << b->head.granularity_bits);
		/* One that is not known must not look like an empty bitmap. */
		if (bitmaps_count(s, b, &count, &why))
			json_number(&j, "count", count);
		json_bool(&j, "recording", qcow2_bitmap_records(&b->head));
		json_bool(&j, "busy", false);
		json_bool(&j, "persistent", true);
		json_bool(&j, "inconsistent", bitmap_inconsistent(b));
		json_object_end(&j);
	}
	json_array_end(&j);
	json_end(&j);
}

static void print_text(const struct bitmaps *s)
{
	const struct bitmap_item *b;
	uint64_t count;
	const char *why;

	for (b = s->item; b < s->item + s->n; b++) {
		put_escaped(stdout, b->name, b->head.name_size);
		printf(": granularity %s, ",
		       human_size(1ULL << b->head.granularity_bits));
		if (bitmaps_count(s, b, &count, &why))
			printf("%" PRIu64 " bytes dirty%s\n", count,
			       qcow2_bitmap_records(&b->head) ? ", recording" : "");
		else
			printf("%s\n", why);
	}
}

static int show(const struct options *opt, const struct image *img,
		const struct bitmaps *s)
{
	if (img->h.has_bitmaps && !image_has_bitmaps(img))
		warning("%s: its bitmaps are not valid: it was changed by a program that does not know them",
			esc(img->node.path));
	if (opt->json)
		print_json(s);
	else
		print_text(s);
	return 0;
}

static int change(const struct what *what, const struct options *opt,
		  struct bitmaps *s, char **names)
{
	struct image *img = s->img;
	uint64_t cut;
	int ret;

	ret = what->change(opt, s, names);
	if (ret)
		return ret;
	/* It is cut off again. */
	img->space_kind = IMAGE_PASSING;
	ret = bitmaps_write(s);
	if (ret)
		image_undo(img);
	else
		image_trim(img, &cut);
	return ret;
}

static int check_image(struct image *img, bool read_only)
{
	struct reasons reasons;

	image_reasons(img, read_only, &reasons);
	if (!reasons.n)
		return 0;
	return fail(EX_WRONG, "%s: %s; %s", esc(img->node.path),
		    reasons.r[0].cause, reasons.r[0].remedy);
}

static int open_image(struct image *img, const char *path, bool write)
{
	int ret = image_open_locked(img, path, write);

	if (!ret)
		ret = check_image(img, !write);
	return ret || !write ? ret : image_load_tables(img, true);
}

static int change_image(const struct what *what, const struct options *opt,
			const char *path, char **names)
{
	struct image img = IMAGE_CLOSED;
	struct bitmaps s = { .img = NULL };
	int ret;

	ret = open_image(&img, path, true);
	if (!ret)
		ret = bitmaps_load(&s, &img);
	if (!ret)
		ret = change(what, opt, &s, names);
	bitmaps_free(&s);
	image_close(&img);
	return ret;
}

/*
 * A device that is open
 */

struct live_bitmaps {
	const struct what *what;
	const struct options *opt;
	char **names;
};

static int change_loaded(struct bitmaps *s, void *arg)
{
	const struct live_bitmaps *b = arg;

	return b->what->change(b->opt, s, b->names);
}

static int prepare(struct live *l, void *arg)
{
	const struct live_bitmaps *b = arg;
	int ret;

	ret = live_look(l, b->opt->sparse);
	return ret ? ret : live_prepare_bitmaps(l, b->what->change != add,
						change_loaded, arg);
}

static int apply(struct live *l, void *arg)
{
	return live_apply_bitmaps(l, change_loaded, arg);
}

static int change_device(const struct what *what, const struct options *opt,
			 const char *name, char **names)
{
	struct live_bitmaps b = { .what = what, .opt = opt, .names = names };
	const struct change c = {
		.prepare = prepare, .apply = apply, .arg = &b,
	};
	struct live l = LIVE_CLOSED;
	int ret;

	ret = live_open(&l, name, what->name);
	l.takes = true;
	if (!ret)
		ret = live_change(&l, &c);
	live_close(&l);
	return ret;
}

static int change_any(const struct what *what, const struct options *opt,
		      char *arg, char **names)
{
	char buf[160];
	const char *name = device_live_name(arg, buf, sizeof(buf));

	interrupt_catch();
	return name ? change_device(what, opt, name, names) :
		      change_image(what, opt, arg, names);
}

static int show_any(const struct options *opt, const char *arg)
{
	struct image img = IMAGE_CLOSED;
	struct bitmaps s = { .img = NULL };
	char buf[160];
	const char *name = device_live_name(arg, buf, sizeof(buf));
	int ret;

	ret = name ? dm_check(false) : open_image(&img, arg, false);
	if (!ret && name)
		ret = attach_live(&img, name, true);
	if (!ret && name)
		ret = check_image(&img, true);
	if (!ret)
		ret = bitmaps_load(&s, &img);
	if (!ret)
		ret = show(opt, &img, &s);
	bitmaps_free(&s);
	image_close(&img);
	return ret;
}

static int check_options(const struct what *what, const struct options *opt)
{
	const struct {
		const char *name;
		bool given;
	} options[] = {
		{ "json", opt->json },
		{ "granularity", opt->granularity },
		{ "disabled", opt->disabled },
	};
	size_t i;

	for (i = 0; i < ARRAY_SIZE(options); i++)
		if (options[i].given && !strstr(what->options, options[i].name)) {
			json_refused = opt->json && !strstr(what->options, "json");
			return fail(EX_PARAMETER,
				    "bitmap %s takes no option --%s; usage: qcow2setup bitmap %s %s",
				    what->name, options[i].name, what->name,
				    what->arguments);
		}
	return 0;
}

static int find_what(const char *name, const struct what **what)
{
	size_t i;

	for (i = 0; i < ARRAY_SIZE(verbs); i++)
		if (!strcmp(verbs[i].name, name)) {
			*what = &verbs[i];
			return 0;
		}
	return fail(EX_PARAMETER,
		    "bitmap %s is not known; use bitmap list, add, remove, clear, enable, disable or merge",
		    esc(name));
}

int cmd_bitmap(const struct options *opt, char **args)
{
	const struct what *what = NULL;
	int n = 0, ret;

	ret = find_what(args[0], &what);
	if (ret)
		return ret;
	while (args[2 + n])
		n++;
	if (n < what->min_names || n > what->max_names)
		return fail(EX_PARAMETER,
			    "wrong number of arguments; usage: qcow2setup bitmap %s %s",
			    what->name, what->arguments);
	ret = check_options(what, opt);
	if (ret)
		return ret;
	ret = what->change ? change_any(what, opt, args[1], args + 2) :
			     show_any(opt, args[1]);
	return interrupt_result(ret);
}

int cmd_checkpoint(const struct options *opt, char **args)
{
	static const struct what checkpoint = {
		.name = "checkpoint", .change = stop_and_start,
	};

	if (!opt->start)
		return fail(EX_PARAMETER,
			    "a checkpoint begins a bitmap; give --start NAME[,granularity=SIZE]");
	return interrupt_result(change_any(&checkpoint, opt, args[0], args + 1));
}
