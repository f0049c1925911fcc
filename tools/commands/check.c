// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * qcow2setup check: is an image's metadata as it must be, and make it so.
 * Opens the image and nothing else.  Exit codes are those of qemu-img check.
 */
#include <fcntl.h>
#include <inttypes.h>

#include "commands/commands.h"
#include "image/image.h"
#include "image/repair.h"
#include "image/verify.h"
#include "lib/json.h"
#include "lib/util.h"
#include "stack/mapping.h"

enum {
	CHECK_GOOD	= 0,
	CHECK_FAILED	= 1,
	CHECK_CORRUPT	= 2,
	CHECK_LEAKS	= 3,
};

/* How many fewer there are now. */
static uint64_t fixed(uint64_t before, uint64_t after)
{
	return before > after ? before - after : 0;
}

static void print_json(const struct verify *before, const struct verify *v)
{
	struct json j;

	json_start(&j, stdout);
	json_object(&j, NULL);
	json_version(&j);
	json_number(&j, "image-end-offset", v->image_end);
	json_number(&j, "total-clusters", v->total_clusters);
	json_number(&j, "allocated-clusters", v->allocated_clusters);
	json_number(&j, "check-errors", v->errors);
	json_number(&j, "corruptions", v->corruptions);
	json_number(&j, "leaks", v->leaks);
	json_number(&j, "corruptions-fixed",
		    fixed(before->corruptions, v->corruptions));
	json_number(&j, "leaks-fixed", fixed(before->leaks, v->leaks));
	json_string(&j, "filename", v->img->node.path);
	json_string(&j, "format", "qcow2");
	json_object_end(&j);
	json_end(&j);
}

static const char *plural(uint64_t n)
{
	return n == 1 ? "" : "s";
}

static void print_text(const struct verify *before, const struct verify *v,
		       enum repair what)
{
	uint64_t corruptions = fixed(before->corruptions, v->corruptions);
	uint64_t leaks = fixed(before->leaks, v->leaks);

	if (corruptions || leaks)
		printf("Repaired: %" PRIu64 " error%s, %" PRIu64 " leaked cluster%s.\n",
		       corruptions, plural(corruptions), leaks, plural(leaks));
	if (v->errors)
		printf("The check could not be completed: %" PRIu64 " error%s.\n",
		       v->errors, plural(v->errors));
	if (v->corruptions)
		printf("%" PRIu64 " error%s in the image: data may be wrong, and writing may make it worse.\n",
		       v->corruptions, plural(v->corruptions));
	if (v->leaks)
		printf("%" PRIu64 " leaked cluster%s: space is wasted, but nothing is harmed.\n",
		       v->leaks, plural(v->leaks));
	if (what == REPAIR_ALL && (v->errors || v->corruptions || v->leaks))
		puts("What is left cannot be repaired: restore the image from a backup, or save what can be read\n"
		     "of it: open it with --readonly.");
	if (!v->errors && !v->corruptions && !v->leaks)
		puts("No errors were found on the image.");
	if (v->stopped)
		return;
	printf("%" PRIu64 "/%" PRIu64 " = %.2f%% allocated\n",
	       v->allocated_clusters, v->total_clusters,
	       100.0 * v->allocated_clusters / v->total_clusters);
	printf("Image end offset: %" PRIu64 "\n", v->image_end);
}

static void tell_marks(const struct image *img)
{
	if (img->h.incompatible & QCOW2_INCOMPAT_CORRUPT)
		warning("%s: %s; if no errors are left, --repair all clears the mark",
			esc(img->node.path),
			qcow2_fault_str(QCOW2_FAULT_CORRUPT));
	if (img->h.incompatible & QCOW2_INCOMPAT_DIRTY)
		warning("%s: %s; --repair all corrects them and clears the mark",
			esc(img->node.path),
			qcow2_fault_str(QCOW2_FAULT_DIRTY));
}

static bool wanted(const struct verify *v, enum repair what)
{
	if (v->stopped || v->errors)
		return false;
	return what == REPAIR_ALL ? v->corruptions || v->leaks :
	       what == REPAIR_LEAKS && v->leaks;
}

/*
 * Repair, and look again: what counts is what is then found.  Once more if only
 * the first repair has made sure what is leaked.
 */
static int repair(const struct verify *before, struct verify *v,
		  enum repair what)
{
	bool uncertain = before->uncertain;
	unsigned int round;
	int ret = 0;

	for (round = 0; round < 2 && wanted(v, what); round++) {
		ret = what == REPAIR_ALL ? repair_all(v) : repair_leaks(v);
		if (ret)
			return ret;
		note("%s: checked again", esc(v->img->node.path));
		ret = verify_image(v, v->img);
		if (ret || !uncertain || v->uncertain)
			break;
	}
	if (!ret && what == REPAIR_BITMAPS) {
		ret = repair_bitmaps(v->img);
		if (!ret)
			ret = verify_image(v, v->img);
	}
	if (!ret && what == REPAIR_ALL && !v->corruptions && !v->errors)
		ret = repair_marks(v->img);
	return ret;
}

static int check(const struct options *opt, struct image *img)
{
	struct verify_told told = { .n = 0 };
	struct verify before, v = { .img = img, .told = &told };
	int ret;

	ret = verify_image(&v, img);
	/* numbers only */
	before = v;
	before.refs = (struct refs){ .ref = NULL };
	if (!ret)
		ret = repair(&before, &v, opt->repair);
	if (!ret) {
		tell_marks(img);
		if (opt->json)
			print_json(&before, &v);
		else
			print_text(&before, &v, opt->repair);
	}
	if (ret || v.errors)
		ret = CHECK_FAILED;
	else if (v.corruptions)
		ret = CHECK_CORRUPT;
	else
		ret = v.leaks ? CHECK_LEAKS : CHECK_GOOD;
	verify_free(&v);
	return ret;
}

int cmd_check(const struct options *opt, char **args)
{
	bool write = opt->repair != REPAIR_NONE;
	struct image img = IMAGE_CLOSED;
	int ret;

	ret = image_open_locked(&img, args[0], write);
	ret = ret ? CHECK_FAILED : check(opt, &img);
	image_close(&img);
	return ret;
}
