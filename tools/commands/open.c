// SPDX-License-Identifier: GPL-2.0-or-later
/* qcow2setup open: from an image and its data to /dev/mapper/NAME. */
#include "commands/commands.h"
#include "lib/interrupt.h"
#include "lib/util.h"
#include "stack/activate.h"

int cmd_open(const struct options *opt, char **args)
{
	const char *path = args[0], *name = args[1];
	const struct chain chain = {
		.data_file = opt->data_file,
		.backing_file = opt->backing_file,
		.backing_files = opt->backing_files,
		.read_only = opt->read_only,
		.trust_image_paths = opt->trust_image_paths,
	};
	const struct activation how = {
		.read_only = opt->read_only,
		.no_discard_passdown = opt->no_discard_passdown,
		.sparse = opt->sparse,
		.drop_bitmaps = opt->drop_bitmaps,
		.partitions = opt->partitions,
		.host = opt->host,
		.cache_limit = opt->cache_limit,
	};
	struct mapping m = MAPPING_CLOSED;
	int ret;

	ret = activate_check(name);
	if (ret)
		return ret;
	interrupt_catch();
	ret = mapping_open(&m, &chain, path);
	if (!ret)
		ret = activate_device(&m, name, &how);
	mapping_close(&m);
	return interrupt_result(ret);
}
