// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * qcow2setup clone: a device that begins as the base is, and has files of its own for what
 * is written.  The base is only read.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>

#include "commands/commands.h"
#include "image/image.h"
#include "lib/interrupt.h"
#include "lib/util.h"
#include "stack/activate.h"
#include "stack/clone.h"
#include "system/node.h"

struct base {
	struct clone_base b;
	char *path;			/* as the image records it */
	bool image;
};

/* A header is looked at only to refuse: what is not named as an image is a raw disk. */
static int look_at_base(const struct options *opt, const struct node *node,
			bool data, struct base *base)
{
	uint64_t bits = 0;
	struct image img;
	int ret;

	base->image = data || opt->backing_format == BACKING_FORMAT_QCOW2;
	base->b.size = node->size;
	if (base->image && opt->backing_format == BACKING_FORMAT_RAW)
		return fail(EX_PARAMETER,
			    "%s: a raw disk has no data file; leave ,data-file= or --backing-format raw out",
			    esc(node->path));
	if (!base->image &&
	    (opt->backing_format == BACKING_FORMAT_RAW ||
	     !image_has_magic(node)))
		return 0;
	ret = image_attach(&img, node);
	bits = img.h.incompatible;
	base->b.size = img.h.size;
	img.node.fd = -1;
	image_close(&img);
	if (ret)
		return ret;
	if (!(bits & QCOW2_INCOMPAT_DATA_FILE))
		return fail(EX_WRONG,
			    "%s: a qcow2 image with its data inside cannot be a base; make a raw disk of it: qcow2setup import %s BASE",
			    esc(node->path), shell_quote(node->path));
	return base->image ? 0 :
	       fail(EX_PARAMETER,
		    "%s: looks like a qcow2 image, which is not guessed; give its data file (%s,data-file=FILE), or --backing-format raw if it is a disk with that on it",
		    esc(node->path), esc(node->path));
}

static int find_base(const struct options *opt, const char *arg,
		     struct base *base)
{
	struct node node = NODE_CLOSED;
	char *path = strdup(arg);
	int ret = 0;

	if (!path)
		return fail_nomem();
	const char *data = backing_arg_split(path);

	ret = node_open(&node, AT_FDCWD, path, NODE_READ_ONLY);
	if (!ret)
		ret = look_at_base(opt, &node, data, base);
	if (!ret) {
		/* Links of LVM and udev to devices stay as they are. */
		base->path = *path == '/' ? strdup(path) : realpath(path, NULL);
		if (!base->path)
			ret = fail_errno("%s: cannot find its full name",
					 esc(path));
	}
	if (!ret && strlen(base->path) > 1023)
		ret = fail(EX_WRONG, "%s: name is longer than 1023 bytes; use a shorter path",
			   esc(base->path));
	if (!ret && opt->size && opt->size < base->b.size)
		ret = fail(EX_WRONG,
			   "%s: has %llu bytes, and a clone is not smaller; give a larger --size, or none",
			   esc(path), (unsigned long long)base->b.size);
	if (!ret && opt->size)
		base->b.size = opt->size;
	base->b.size = align_up(base->b.size, 512);
	if (!ret && !base->b.size)
		ret = fail(EX_WRONG, "%s: is empty; give --size", esc(path));
	if (!ret && base->b.size > QCOW2_MAX_OFFSET)
		ret = fail(EX_WRONG, "%s; give a smaller --size",
			   qcow2_fault_str(QCOW2_FAULT_SIZE_BIG));
	base->b.name = base->path;
	base->b.format = base->image ? "qcow2" : "raw";
	node_close(&node);
	free(path);
	return ret;
}

static int open_clone(const struct options *opt, const char *base,
		      const struct clone *c, const char *name)
{
	const char *backing[MAX_BACKING_FILES + 1] = { base };
	const struct chain chain = {
		.data_file = c->data,
		.backing_file = backing,
		.backing_files = 1 + opt->backing_files,
		.trust_image_paths = opt->trust_image_paths,
	};
	const struct activation how = {
		.no_discard_passdown = opt->no_discard_passdown,
		.passing = true,
		.partitions = opt->partitions,
		.host = opt->host,
		.cache_limit = opt->cache_limit,
	};
	struct mapping m = MAPPING_CLOSED;
	int ret;

	memcpy(backing + 1, opt->backing_file,
	       opt->backing_files * sizeof(*backing));
	ret = mapping_open(&m, &chain, c->image);
	if (!ret)
		ret = activate_device(&m, name, &how);
	mapping_close(&m);
	return ret;
}

int cmd_clone(const struct options *opt, char **args)
{
	const char *name = args[1];
	struct base base = { .path = NULL };
	struct clone c;
	int ret;

	ret = activate_check(name);
	if (!ret)
		ret = find_base(opt, args[0], &base);
	if (!ret)
		ret = clone_names(&c, opt->dir ? opt->dir : ".", name);
	if (!ret) {
		interrupt_catch();
		ret = clone_make(&c, &base.b);
		if (!ret) {
			ret = open_clone(opt, args[0], &c, name);
			if (ret)
				clone_unmake(&c);
		}
	}
	if (!ret)
		note("%s: what is written goes to %s and %s", esc(name),
		     esc(c.image), esc(c.data));
	free(base.path);
	return interrupt_result(ret);
}
