// SPDX-License-Identifier: GPL-2.0-or-later
/* qcow2setup open: from an image and its data to /dev/mapper/NAME. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "dm.h"
#include "interrupt.h"
#include "loop.h"
#include "mapping.h"
#include "target.h"
#include "util.h"

#define SECTOR	512

/* A block device for a node: itself, or a loop device. */
struct attached {
	struct loop loop;
	char dev[32];		/* "MAJOR:MINOR" for a table line */
};

static int attach(struct attached *a, const struct node *node)
{
	dev_t rdev = node->rdev;
	int ret;

	if (!node->bdev) {
		ret = loop_attach(&a->loop, node);
		if (ret)
			return ret;
		rdev = a->loop.rdev;
	}
	snprintf(a->dev, sizeof(a->dev), "%u:%u", major(rdev), minor(rdev));
	return 0;
}

/*
 * A name that no other device has, and that stays the same for an image: a
 * hash (FNV-1a) of where the image is, and the name.
 */
static void make_uuid(char *uuid, size_t size, const char *prefix,
		      const struct node *node, const char *name)
{
	uint64_t parts[2] = { node->bdev ? node->rdev : node->dev,
			      node->bdev ? 0 : node->ino };
	uint64_t hash = 0xcbf29ce484222325ULL;
	unsigned int i;

	for (i = 0; i < 16; i++) {
		hash ^= (parts[i / 8] >> 8 * (i % 8)) & 0xff;
		hash *= 0x100000001b3ULL;
	}
	snprintf(uuid, size, "%s%016llx-%s", prefix, (unsigned long long)hash,
		 name);
}

/*
 * A loop device has whole sectors only, but the last table of an image may end
 * in the middle of one: qemu-img makes such files.  An image that is written
 * is extended, one that is only read must stay as it is.  So the last sectors
 * are copied to memory, and a helper device puts both parts together.
 */
struct tail {
	bool made;
	char name[DM_NAME_MAX + 16];
	struct attached memory;
};

static int tail_copy(const struct image *img, uint64_t start, uint64_t len,
		     struct node *copy)
{
	size_t bytes = img->node.size - start;
	uint8_t buf[SECTOR];
	int ret;

	*copy = (struct node){
		.fd = memfd_create("qcow2setup-tail", MFD_CLOEXEC),
		.path = "copy of the last sector", .read_only = true,
		.size = len,
	};
	if (copy->fd < 0)
		return fail_errno("cannot get memory for the last sector");
	ret = read_at(img->node.fd, buf, bytes, start);
	if (!ret && ftruncate(copy->fd, len))
		ret = -errno;
	if (!ret)
		ret = write_at(copy->fd, buf, bytes, 0);
	errno = -ret;
	return ret ? fail_errno("%s: cannot copy the last sector",
				esc(img->node.path)) : 0;
}

/* Replace @meta's device by one that ends with a whole cluster. */
static int tail_make(struct tail *tail, const struct mapping *m,
		     const char *name, struct attached *meta)
{
	const struct node *node = &m->img.node;
	uint64_t cs = 1ULL << m->img.geo.cluster_bits;
	uint64_t start = node->size / SECTOR * SECTOR;
	uint64_t len = align_up(node->size, cs) - start;
	char uuid[160], part[2][64];
	struct dm_line lines[2] = {
		{ 0, start / SECTOR, "linear", part[0] },
		{ start / SECTOR, len / SECTOR, "linear", part[1] },
	};
	struct dm_dev_info info;
	struct node copy;
	int ret;

	ret = tail_copy(&m->img, start, len, &copy);
	if (!ret)
		ret = attach(&tail->memory, &copy);
	node_close(&copy);
	if (ret)
		return ret;

	snprintf(tail->name, sizeof(tail->name), "%s" DM_TAIL_SUFFIX, name);
	make_uuid(uuid, sizeof(uuid), DM_UUID_TAIL_PREFIX, node, name);
	snprintf(part[0], sizeof(part[0]), "%s 0", meta->dev);
	snprintf(part[1], sizeof(part[1]), "%s 0", tail->memory.dev);
	ret = dm_make(tail->name, uuid, lines, 2, true, true);
	if (ret)
		return ret;
	tail->made = true;
	ret = dm_query(tail->name, &info);
	if (ret)
		return ret;
	snprintf(meta->dev, sizeof(meta->dev), "%u:%u", major(info.rdev),
		 minor(info.rdev));
	return 0;
}

static void tail_remove(struct tail *tail, bool deferred)
{
	int ret;

	if (tail->made) {
		ret = dm_remove(tail->name, deferred);
		if (ret)
			warning("%s: helper device cannot be removed; try dmsetup remove",
				esc(tail->name));
	}
	loop_release(&tail->memory.loop);
}

static int make_device(const struct mapping *m, const char *name,
		       const char *meta, const char *data, bool read_only)
{
	struct dm_line line = {
		.sectors = m->img.geo.size / SECTOR, .type = DM_TARGET,
	};
	char params[512], uuid[160];

	if (!target_format_table(params, sizeof(params), meta, data,
				 &m->img.geo, read_only, mapping_raw(m)))
		return fail(EX_WRONG, "%s: table line is too long", esc(name));
	line.params = params;
	make_uuid(uuid, sizeof(uuid), DM_UUID_PREFIX, &m->img.node, name);
	note("0 %llu %s %s", (unsigned long long)line.sectors, DM_TARGET,
	     params);
	return dm_make(name, uuid, &line, 1, read_only, false);
}

/* From checked files to a live device; takes back what it did if it fails. */
static int activate(struct mapping *m, const char *name, bool read_only)
{
	struct attached meta = { .loop = LOOP_CLOSED };
	struct attached data = { .loop = LOOP_CLOSED };
	struct tail tail = { .memory.loop = LOOP_CLOSED };
	int ret = 0;

	if (!read_only)
		ret = image_prepare(&m->img);
	if (!ret && interrupted())
		ret = EX_WRONG;
	if (!ret)
		ret = attach(&meta, &m->img.node);
	if (!ret)
		ret = attach(&data, &m->data);
	if (!ret && read_only && m->img.node.size % SECTOR)
		ret = tail_make(&tail, m, name, &meta);
	if (!ret && interrupted())
		ret = EX_WRONG;
	if (!ret)
		ret = make_device(m, name, meta.dev, data.dev, read_only);

	/*
	 * The device holds everything below it now.  The helper, marked like
	 * this, goes when the device goes, as the loop devices do.
	 */
	tail_remove(&tail, !ret);
	loop_release(&meta.loop);
	loop_release(&data.loop);
	if (ret)
		image_undo(&m->img);
	return ret;
}

int cmd_open(const struct options *opt, char **args)
{
	const char *path = args[0], *name = args[1];
	struct dm_dev_info info;
	struct mapping m = MAPPING_CLOSED;
	int ret;

	ret = dm_check_name(name);
	if (!ret)
		ret = dm_check(true);
	if (!ret)
		ret = dm_query(name, &info);
	if (ret)
		return ret;
	if (info.exists)
		return fail(EX_BUSY,
			    "%s: a device of that name exists; close it, or choose another name",
			    esc(name));
	interrupt_catch();
	ret = mapping_open(&m, opt, path);
	if (!ret)
		ret = interrupted() ? EX_WRONG :
				      activate(&m, name, opt->read_only);
	mapping_close(&m);
	return interrupt_result(ret);
}
