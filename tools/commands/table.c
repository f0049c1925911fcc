// SPDX-License-Identifier: GPL-2.0-or-later
/* qcow2setup table: the line that dmsetup takes.  Changes nothing. */
#include <stdio.h>
#include <string.h>
#include <sys/sysmacros.h>

#include "commands/commands.h"
#include "lib/util.h"
#include "stack/mapping.h"
#include "system/dm.h"
#include "system/target.h"

static int need_device(const struct node *node, const char *what)
{
	if (node->bdev)
		return 0;
	/* A loop device has whole sectors: what is behind the last one is lost. */
	if (node->size % 512)
		return fail(EX_WRONG,
			    "%s: %s is a file, and a table names block devices; use qcow2setup open, or give its loop device (truncate -s %%512 %s && losetup --find --show %s, with --direct-io=on where its file system can)",
			    esc(node->path), what, shell_quote(node->path),
			    shell_quote(node->path));
	return fail(EX_WRONG,
		    "%s: %s is a file, and a table names block devices; use qcow2setup open, or give its loop device (losetup --find --show %s, with --direct-io=on where its file system can)",
		    esc(node->path), what, shell_quote(node->path));
}

/* The path, if a table line can have it as it is; else the number. */
static const char *table_name(const struct node *node, char *buf, size_t size)
{
	const char *p = node->path;

	if (*p == '/' && strlen(p) < 200) {
		while (*p > ' ' && *p < 0x7f && *p != '\\')
			p++;
		if (!*p)
			return node->path;
	}
	snprintf(buf, size, "%u:%u", major(node->rdev), minor(node->rdev));
	return buf;
}

int cmd_table(const struct options *opt, char **args)
{
	char params[1024], meta[32], data[32], backing[32];
	struct target_features f = {
		.read_only = opt->read_only,
		.no_discard_passdown = opt->no_discard_passdown,
		.cache_limit = opt->cache_limit,
	};
	struct mapping m = MAPPING_CLOSED;
	const struct chain chain = {
		.data_file = opt->data_file,
		.backing_file = opt->backing_file,
		.backing_files = opt->backing_files,
		/* To look at an image that is to be written needs no write access. */
		.read_only = true,
	};
	struct reasons reasons;
	int ret;

	ret = mapping_open(&m, &chain, args[0]);
	if (!ret && !opt->read_only) {
		image_reasons(&m.img, false, &reasons);
		if (reasons.n)
			ret = fail(EX_WRONG, "%s: %s; %s", esc(args[0]),
				   reasons.r[0].cause, reasons.r[0].remedy);
	}
	if (!ret)
		ret = need_device(&m.img.node, "image");
	if (!ret)
		ret = need_device(&m.data, "data");
	if (!ret && m.backing && m.backing->image)
		ret = fail(EX_WRONG,
			   "%s: backing file is an image, and a table names block devices; open it first (qcow2setup open IMAGE NAME --readonly ...), and give --backing-file /dev/mapper/NAME",
			   esc(m.backing->image->img.node.path));
	else if (!ret && m.backing)
		ret = need_device(&m.backing->node, "backing file");
	if (!ret && !opt->read_only &&
	    m.img.h.autoclear & ~QCOW2_AUTOCLEAR_KNOWN)
		ret = fail(EX_WRONG,
			   "%s: image has autoclear bits that must be cleared before it is written; use qcow2setup open, or --readonly",
			   esc(args[0]));
	if (!ret) {
		f.data_file_raw = mapping_raw(&m);
		if (m.backing)
			f.backing_dev = table_name(&m.backing->node, backing,
						   sizeof(backing));
	}
	if (!ret && !target_format_table(params, sizeof(params),
					 table_name(&m.img.node, meta, sizeof(meta)),
					 table_name(&m.data, data, sizeof(data)),
					 &m.img.geo, &f))
		ret = fail(EX_WRONG, "%s: table line is too long", esc(args[0]));
	if (!ret)
		printf("0 %llu %s %s\n",
		       (unsigned long long)(m.img.geo.size / 512), DM_TARGET,
		       params);
	mapping_close(&m);
	return ret;
}
