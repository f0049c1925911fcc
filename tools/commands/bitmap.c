// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * qcow2setup bitmap: the persistent bitmaps of an image, which say what was written
 * since they were made.  Of an image that nobody has open: what is not, is refused
 * when it is locked.
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
#include "stack/mapping.h"

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

static const struct what {
	const char *name;
	const char *arguments;		/* as in the usage line */
	change_fn *change;		/* NULL: it only shows them */
	int min_names, max_names;
	const char *options;		/* that it takes: words */
} whats[] = {
	{ "list", "IMAGE [--json]", NULL, 0, 0, "json" },
	{ "add", "IMAGE NAME [--granularity SIZE] [--disabled]", add, 1, 1,
	  "granularity disabled" },
	{ "remove", "IMAGE NAME", remove_one, 1, 1, "" },
	{ "clear", "IMAGE NAME", clear, 1, 1, "" },
	{ "enable", "IMAGE NAME", enable, 1, 1, "" },
	{ "disable", "IMAGE NAME", disable, 1, 1, "" },
	{ "merge", "IMAGE TARGET SOURCE...", merge, 2, 1 << 20, "" },
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

static int open_image(struct image *img, const char *path, bool write)
{
	struct reasons reasons;
	int ret = image_open_locked(img, path, write);

	if (ret)
		return ret;
	image_reasons(img, !write, &reasons);
	if (reasons.n)
		return fail(EX_WRONG, "%s: %s; %s", esc(path),
			    reasons.r[0].cause, reasons.r[0].remedy);
	return write ? image_load_tables(img, true) : 0;
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
		if (options[i].given && !strstr(what->options, options[i].name))
			return fail(EX_PARAMETER,
				    "bitmap %s takes no option --%s; usage: qcow2setup bitmap %s %s",
				    what->name, options[i].name, what->name,
				    what->arguments);
	return 0;
}

static int find_what(const char *name, const struct what **what)
{
	size_t i;

	for (i = 0; i < ARRAY_SIZE(whats); i++)
		if (!strcmp(whats[i].name, name)) {
			*what = &whats[i];
			return 0;
		}
	return fail(EX_PARAMETER,
		    "bitmap %s is not known; use bitmap list, add, remove, clear, enable, disable or merge",
		    esc(name));
}

int cmd_bitmap(const struct options *opt, char **args)
{
	const struct what *what = NULL;
	struct image img = IMAGE_CLOSED;
	struct bitmaps s = { .img = NULL };
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
	if (what->change)
		interrupt_catch();
	ret = open_image(&img, args[1], what->change);
	if (!ret)
		ret = bitmaps_load(&s, &img);
	if (!ret)
		ret = what->change ? change(what, opt, &s, args + 2) :
				     show(opt, &img, &s);
	bitmaps_free(&s);
	image_close(&img);
	return interrupt_result(ret);
}
