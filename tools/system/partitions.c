// SPDX-License-Identifier: GPL-2.0-or-later
#include <blkid/blkid.h>
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sysmacros.h>
#include <time.h>
#include <unistd.h>

#include "lib/interrupt.h"
#include "lib/util.h"
#include "system/device.h"
#include "system/dm.h"
#include "system/partitions.h"

#define SECTOR		512
#define UUID_MAX	128	/* of the kernel's */
#define WAIT_STEP_MS	50
#define WAIT_STEPS	60

static struct partition *add(struct partitions *parts)
{
	struct partition *p;

	if (parts->n == parts->room) {
		parts->room = 2 * parts->room + 16;
		p = realloc(parts->p, parts->room * sizeof(*p));
		if (!p)
			return NULL;
		parts->p = p;
	}
	p = &parts->p[parts->n++];
	*p = (struct partition){ .params = NULL };
	return p;
}

void partitions_free(struct partitions *parts)
{
	size_t i;

	for (i = 0; i < parts->n; i++)
		free(parts->p[i].params);
	free(parts->p);
	*parts = (struct partitions){ .p = NULL };
}

static int make_one(const struct partition *p)
{
	const struct dm_line line = {
		.sectors = p->sectors, .type = "linear", .params = p->params,
	};

	return dm_make(p->name, p->uuid, &line, 1, p->read_only);
}

/* A number that the table of a guest gives is no more than that. */
static int plan_one(struct partitions *parts, const char *name,
		    const struct dm_dev_info *info, uint64_t sectors,
		    blkid_partition part)
{
	bool digit = isdigit((unsigned char)name[strlen(name) - 1]);
	int number = blkid_partition_get_partno(part);
	blkid_loff_t start = blkid_partition_get_start(part);
	blkid_loff_t size = blkid_partition_get_size(part);
	struct partition *p;
	char params[64];

	/* It holds others, and nothing else. */
	if (blkid_partition_is_extended(part))
		return 0;
	if (number <= 0 || start <= 0 || size <= 0 ||
	    (uint64_t)start >= sectors || (uint64_t)size > sectors - start) {
		warning("%s: partition %d is not on the disk, and is left out",
			esc(name), number);
		return 0;
	}
	p = add(parts);
	if (!p)
		return fail_nomem();
	snprintf(p->name, sizeof(p->name), "%s%s%d", name, digit ? "p" : "",
		 number);
	if (snprintf(p->uuid, sizeof(p->uuid), "part%d-%s", number,
		     info->uuid) > UUID_MAX)
		return fail(EX_PARAMETER,
			    "name %s is too long for a device with partitions; use a shorter one",
			    esc(name));
	snprintf(params, sizeof(params), "%u:%u %llu", major(info->rdev),
		 minor(info->rdev), (unsigned long long)start);
	p->params = strdup(params);
	p->sectors = size;
	p->read_only = info->read_only;
	return p->params ? 0 : fail_nomem();
}

static int plan(struct partitions *parts, const char *name,
		const struct dm_dev_info *info, int fd)
{
	blkid_probe probe = blkid_new_probe();
	blkid_partlist list = NULL;
	uint64_t sectors;
	int ret = 0, i, n;

	if (!probe)
		return fail_nomem();
	if (blkid_probe_set_device(probe, fd, 0, 0) ||
	    blkid_probe_enable_superblocks(probe, 0) ||
	    blkid_probe_enable_partitions(probe, 1)) {
		ret = fail(EX_WRONG, "%s: its partition table cannot be read; see dmesg",
			   esc(name));
		goto out;
	}
	sectors = blkid_probe_get_size(probe) / SECTOR;
	list = blkid_probe_get_partitions(probe);
	n = list ? blkid_partlist_numof_partitions(list) : 0;
	if (n <= 0)
		warning("%s: no partitions are found on it", esc(name));
	for (i = 0; !ret && i < n; i++)
		ret = plan_one(parts, name, info, sectors,
			       blkid_partlist_get_partition(list, i));
out:
	blkid_free_probe(probe);
	return ret;
}

int partitions_make(const char *name)
{
	struct partitions parts = { .p = NULL };
	struct dm_dev_info info;
	char path[32];
	size_t i = 0;
	int fd, ret;

	ret = dm_query(name, &info);
	if (ret)
		return ret;
	/* Its name below /dev may not be there. */
	snprintf(path, sizeof(path), "/dev/dm-%u", minor(info.rdev));
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return fail_errno("%s: cannot open it", esc(path));
	ret = plan(&parts, name, &info, fd);
	close(fd);
	for (; !ret && i < parts.n; i++) {
		ret = interrupted() ? EX_WRONG : make_one(&parts.p[i]);
		if (ret)
			break;
	}
	/* What the failure itself has left is nothing. */
	while (ret && i > 0)
		if (dm_remove(parts.p[--i].name, true))
			warning("%s: cannot be removed again; try dmsetup remove %s",
				esc(parts.p[i].name), esc(parts.p[i].name));
	partitions_free(&parts);
	return ret;
}

struct search {
	struct partitions *parts;
	const char *uuid;
};

/* "part12-" and the uuid of the device: also what kpartx has made */
static bool is_part_of(const char *uuid, const char *whole)
{
	if (!starts_with(uuid, "part") || !isdigit((unsigned char)uuid[4]))
		return false;
	for (uuid += 4; isdigit((unsigned char)*uuid); uuid++)
		;
	return *uuid == '-' && !strcmp(uuid + 1, whole);
}

static int search_one(const char *name, void *arg)
{
	struct search *s = arg;
	struct dm_dev_info info;
	struct partition *p;
	char *type, *params;
	uint64_t sectors;
	int ret;

	/* One that goes at this moment is no error. */
	if (dm_query(name, &info) || !info.exists ||
	    !is_part_of(info.uuid, s->uuid))
		return 0;
	ret = dm_params(name, false, &type, &params, &sectors);
	if (ret)
		return ret == -ENXIO ? 0 : ret;
	free(type);
	p = add(s->parts);
	if (!p) {
		free(params);
		return fail_nomem();
	}
	p->params = params;
	p->sectors = sectors;
	p->read_only = info.read_only;
	snprintf(p->name, sizeof(p->name), "%s", name);
	snprintf(p->uuid, sizeof(p->uuid), "%s", info.uuid);
	return 0;
}

int partitions_find(struct partitions *parts, const struct dm_dev_info *info)
{
	struct search s = { .parts = parts, .uuid = info->uuid };

	*parts = (struct partitions){ .p = NULL };
	/* Each has the device open: without a user there is none to be searched for. */
	return *info->uuid && info->open_count ? dm_each(search_one, &s) : 0;
}

/* Wait for who only looks at it. */
static int check_unused(const struct partition *p)
{
	const struct timespec step = { .tv_nsec = WAIT_STEP_MS * 1000 * 1000 };
	struct dm_dev_info info;
	char who[2048];
	int ret, i;

	for (i = 0; ; i++) {
		ret = dm_query(p->name, &info);
		if (ret || !info.open_count)
			return ret;
		if (interrupted())
			return EX_WRONG;
		if (device_users(info.rdev, who, sizeof(who)))
			break;
		if (i == WAIT_STEPS) {
			snprintf(who, sizeof(who), "opened %d times",
				 info.open_count);
			break;
		}
		nanosleep(&step, NULL);
	}
	return fail(EX_BUSY, "%s: partition is in use: %s; stop that first, or use --deferred",
		    esc(p->name), who);
}

static void put_back(const struct partitions *parts, size_t n)
{
	size_t i;

	for (i = 0; i < n; i++)
		if (make_one(&parts->p[i]))
			warning("%s: is not made again", esc(parts->p[i].name));
}

void partitions_put_back(const struct partitions *parts)
{
	put_back(parts, parts->n);
}

int partitions_remove(const struct partitions *parts, bool deferred)
{
	size_t i;
	int ret = 0;

	for (i = 0; !ret && !deferred && i < parts->n; i++)
		ret = check_unused(&parts->p[i]);
	for (i = 0; !ret && i < parts->n; i++) {
		while ((ret = dm_remove(parts->p[i].name, deferred)) == -EBUSY) {
			ret = check_unused(&parts->p[i]);
			if (ret)
				break;
		}
		if (ret)
			put_back(parts, i);
	}
	return ret;
}
