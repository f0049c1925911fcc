// SPDX-License-Identifier: GPL-2.0-or-later
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "lib/util.h"
#include "stack/attach.h"
#include "stack/part.h"
#include "system/device.h"
#include "system/dm.h"
#include "system/live.h"
#include "system/target.h"

/* What is only in the kernel's memory goes to the metadata device. */
static int commit(const char *name)
{
	char path[192];
	int fd, err = 0;

	snprintf(path, sizeof(path), "/dev/mapper/%s", name);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0 || fsync(fd))
		err = errno;
	if (fd >= 0)
		close(fd);
	if (!err)
		return 0;
	return fail(errno_to_exit(err),
		    "/dev/mapper/%s: cannot make it write its metadata: %s; see what qcow2setup status says",
		    esc(name), strerror(err));
}

/*
 * A suspended device has written what it could, and a flush would wait for the
 * resume.
 */
static int check_suspended(const char *name)
{
	struct target_status status;
	uint64_t unwritten;
	int ret;

	ret = live_unwritten(name, &status, &unwritten);
	if (ret || !unwritten)
		return ret;
	return fail(EX_WRONG,
		    "%s: is suspended, and holds metadata that could not be written; see dmesg, and resume it (dmsetup resume %s)",
		    esc(name), esc(name));
}

int attach_live(struct image *img, const char *name, bool bitmaps)
{
	struct dm_dev_info info;
	struct target_table table;
	struct part metadata = PART_CLOSED;
	char *type = NULL, *params = NULL;
	enum device_kind kind;
	struct node node;
	uint64_t sectors;
	bool known;
	char target[64];
	int ret;

	ret = dm_query(name, &info);
	if (ret)
		return ret;
	if (!info.exists)
		return fail(EX_WRONG,
			    "/dev/mapper/%s is inactive; open it first",
			    esc(name));
	/* Nothing is asked of a device that is none of this target's. */
	kind = device_kind(name, info.uuid, target, sizeof(target));
	if (kind == DEVICE_OTHER)
		return device_not_ours(name, kind, target, "");
	ret = info.suspended ? check_suspended(name) : commit(name);
	if (ret)
		return ret;
	ret = dm_params(name, false, &type, &params, &sectors);
	if (ret)
		return ret == -ENXIO ? dm_gone(name) : ret;
	known = !strcmp(type, DM_TARGET) && target_parse_table(params, &table);
	free(type);
	free(params);
	/* A suspend has done as much. */
	if (known && bitmaps && table.f.bitmaps && !info.suspended &&
	    !info.read_only)
		ret = dm_message(name, "bitmap_sync");
	if (ret)
		return fail(errno_to_exit(-ret),
			    "%s: cannot make it write its bitmaps: %s; see dmesg, and what qcow2setup status says",
			    esc(name), strerror(-ret));
	if (!known)
		return fail(EX_WRONG,
			    "%s: table is not understood; use a newer qcow2setup",
			    esc(name));

	/* Never through a file: what is live is what the device shows. */
	ret = part_open(&metadata, table.metadata_dev, NODE_READ_ONLY);
	if (ret) {
		part_close(&metadata);
		return ret;
	}
	/* The node is the image's from now on. */
	node = metadata.node;
	node.path = name;
	return image_attach(img, &node);
}
