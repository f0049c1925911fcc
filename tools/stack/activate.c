// SPDX-License-Identifier: GPL-2.0-or-later
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <time.h>
#include <unistd.h>

#include "image/prepare.h"
#include "lib/interrupt.h"
#include "lib/util.h"
#include "stack/activate.h"
#include "system/device.h"
#include "system/dm.h"
#include "system/locks.h"
#include "system/loop.h"
#include "system/mark.h"
#include "system/partitions.h"
#include "system/sysfs.h"
#include "system/target.h"

#define SECTOR	512

/* A block device for a node: itself, or a loop device. */
struct attached {
	struct loop loop;
	char dev[32];		/* "MAJOR:MINOR" for a table line */
};

/* Loop devices that this run has made: see wait_for_loops(). */
static char loops[5 * (MAX_BACKING_FILES + 1)][24];
static unsigned int loop_count;

static int attach(struct attached *a, const struct node *node)
{
	dev_t rdev = node->rdev;
	int ret;

	if (!node->bdev) {
		ret = loop_attach(&a->loop, node->fd, node->path,
				  node->read_only);
		if (ret)
			return ret;
		rdev = a->loop.rdev;
		if (loop_count < ARRAY_SIZE(loops))
			snprintf(loops[loop_count++], sizeof(loops[0]), "%s",
				 a->loop.name);
	}
	snprintf(a->dev, sizeof(a->dev), "%u:%u", major(rdev), minor(rdev));
	return 0;
}

/*
 * After a failure: the kernel takes devices down that were marked to go with
 * their last user, and it needs a moment for that.  Nothing shall be left when
 * this program ends.
 */
static void wait_for_loops(void)
{
	const struct timespec step = { .tv_nsec = 20 * 1000 * 1000 };
	unsigned int i;
	char file[8];
	int tries;

	for (i = 0; i < loop_count; i++)
		for (tries = 0; tries < 150 &&
		     sysfs_read(file, sizeof(file),
				"/sys/block/%s/loop/backing_file", loops[i]);
		     tries++)
			nanosleep(&step, NULL);
}

/* A name that no other device has, and that stays the same for an image. */
static void make_uuid(char *uuid, size_t size, const char *prefix,
		      const struct node *node, const char *name)
{
	snprintf(uuid, size, "%s%016llx-%s", prefix,
		 (unsigned long long)node_hash(node), name);
}

/*
 * A loop device has whole sectors only, but a file may end in the middle of
 * one: qemu-img makes such images, and a raw backing file can be of any size.
 * An image that is written is extended, a file that is only read must stay as
 * it is.  So the last sector is copied to memory, and a helper device puts both
 * parts together, with zeros up to the size that is needed.
 */
struct tail {
	bool made;
	char name[DM_NAME_MAX + 16];
	struct attached memory;
};

#define TAIL_NONE	{ .memory.loop = LOOP_CLOSED }

static int tail_copy(const struct node *node, uint64_t start, uint64_t len,
		     struct node *copy)
{
	size_t bytes = node->size - start;
	uint8_t buf[SECTOR];
	int ret = 0;

	*copy = (struct node){
		.fd = memfd_create("qcow2setup-tail", MFD_CLOEXEC),
		.path = "copy of the last sector", .read_only = true,
		.size = len,
	};
	if (copy->fd < 0)
		return fail_errno("cannot get memory for the last sector");
	if (bytes)
		ret = read_at(node->fd, buf, bytes, start);
	if (!ret && ftruncate(copy->fd, len))
		ret = -errno;
	if (!ret && bytes)
		ret = write_at(copy->fd, buf, bytes, 0);
	errno = -ret;
	return ret ? fail_errno("%s: cannot copy the last sector",
				esc(node->path)) : 0;
}

/*
 * Replace @dev, the device of @node, by one of @size bytes, which are more.
 * The helper is named after @name and @suffix.
 */
static int tail_make(struct tail *tail, const struct node *node, uint64_t size,
		     const char *name, const char *suffix,
		     struct attached *dev)
{
	uint64_t start = node->size / SECTOR * SECTOR;
	uint64_t len = size - start;
	char uuid[160], part[2][64];
	struct dm_line lines[2] = {
		{ 0, start / SECTOR, "linear", part[0] },
		{ start / SECTOR, len / SECTOR, "linear", part[1] },
	};
	struct dm_dev_info info;
	struct node copy;
	int ret;

	ret = tail_copy(node, start, len, &copy);
	if (!ret)
		ret = attach(&tail->memory, &copy);
	node_close(&copy);
	if (ret)
		return ret;

	snprintf(tail->name, sizeof(tail->name), "%s%s", name, suffix);
	make_uuid(uuid, sizeof(uuid), DM_UUID_TAIL_PREFIX, node, name);
	snprintf(part[0], sizeof(part[0]), "%s 0", dev->dev);
	snprintf(part[1], sizeof(part[1]), "%s 0", tail->memory.dev);
	ret = dm_make(tail->name, uuid, start ? lines : lines + 1,
		      start ? 2 : 1, true);
	if (ret)
		return ret;
	tail->made = true;
	ret = dm_query(tail->name, &info);
	if (ret)
		return ret;
	snprintf(dev->dev, sizeof(dev->dev), "%u:%u", major(info.rdev),
		 minor(info.rdev));
	return 0;
}

static void tail_remove(struct tail *tail, bool deferred)
{
	int ret;

	if (tail->made) {
		ret = dm_remove(tail->name, deferred);
		if (ret)
			warning("%s: helper device cannot be removed; try dmsetup remove %s",
				esc(tail->name), esc(tail->name));
	}
	loop_release(&tail->memory.loop);
}

/* A device below, kept from going away until something else uses it. */
struct lower {
	int fd;
	char name[128];
	char dev[32];
	bool goes;		/* by itself, with its last user */
};

#define LOWER_NONE	{ .fd = -1 }

/* Open a device, so that nobody can remove it; -EAGAIN if somebody has. */
static int lower_hold(struct lower *l)
{
	struct dm_dev_info info;
	struct stat st;
	char path[32];
	int ret;

	ret = dm_query(l->name, &info);
	if (ret)
		return ret;
	/* Its name below /dev may not be there yet, or not any more. */
	snprintf(path, sizeof(path), "/dev/dm-%u", minor(info.rdev));
	l->fd = info.exists ? open(path, O_RDONLY | O_CLOEXEC) : -1;
	if (l->fd < 0 || fstat(l->fd, &st) || st.st_rdev != info.rdev)
		return -EAGAIN;
	snprintf(l->dev, sizeof(l->dev), "%u:%u", major(info.rdev),
		 minor(info.rdev));
	return 0;
}

static void lower_release(struct lower *l, bool failed)
{
	if (l->fd < 0)
		return;
	close(l->fd);
	l->fd = -1;
	if (failed && l->goes) {
		struct dm_dev_info info;

		dm_wait_gone(l->name);
		if (!dm_query(l->name, &info) && !info.exists)
			dm_remove_tails(l->name);
	}
}

/* Search for a device that an image has been made already. */
struct search {
	const struct mapping *m;
	const char *backing;		/* device of an image below it */
	char name[128];			/* of what was found */
};

static bool same_backing(const struct mapping *m, const char *backing,
			 const struct target_table *t)
{
	if (!m->backing)
		return !t->f.backing_dev;
	if (!t->f.backing_dev)
		return false;
	return m->backing->image ? !strcmp(t->f.backing_dev, backing) :
	       device_is_node(t->f.backing_dev, &m->backing->node);
}

static int search_one(const char *name, void *arg)
{
	struct search *s = arg;
	struct target_table t;
	struct dm_dev_info info;
	char *type, *params;
	uint64_t sectors;
	int ret = 0;

	/* One that goes at this moment is no error. */
	if (*s->name || dm_query(name, &info) || !info.exists ||
	    !info.read_only || !device_made_of(info.uuid, &s->m->img.node) ||
	    dm_params(name, false, &type, &params, &sectors))
		return 0;
	if (!strcmp(type, DM_TARGET) && target_parse_table(params, &t) &&
	    device_is_node(t.metadata_dev, &s->m->img.node)) {
		if (device_is_node(t.data_dev, &s->m->data) &&
		    same_backing(s->m, s->backing, &t))
			snprintf(s->name, sizeof(s->name), "%s", name);
		else
			ret = fail(EX_BUSY,
				   "%s: is open as %s with another data or backing file; name the same, or close that first",
				   esc(s->m->img.node.path), esc(name));
	}
	free(type);
	free(params);
	return ret;
}

/* What is attached on the way to one device. */
struct parts {
	struct attached meta, data, backing;
	struct tail meta_tail, backing_tail;
	struct lower lower;
};

#define PARTS_NONE {							\
		.meta.loop = LOOP_CLOSED, .data.loop = LOOP_CLOSED,	\
		.backing.loop = LOOP_CLOSED, .meta_tail = TAIL_NONE,	\
		.backing_tail = TAIL_NONE, .lower = LOWER_NONE		\
	}

static int make_device(const struct mapping *m, const char *name,
		       const struct parts *p, const struct activation *opt)
{
	struct dm_line line = {
		.sectors = m->img.geo.size / SECTOR, .type = DM_TARGET,
	};
	/* What is for the device itself, is not for those below it. */
	struct target_features f = {
		.read_only = !opt || opt->read_only,
		.data_file_raw = mapping_raw(m),
		.backing_dev = !m->backing ? NULL : m->backing->image ?
			       p->lower.dev : p->backing.dev,
		.no_discard_passdown = opt && opt->no_discard_passdown,
		.cache_limit = opt ? opt->cache_limit : 0,
		.bitmaps = m->img.recording,
	};
	struct target_version version;
	char params[512], uuid[160];
	int ret;

	/* It saves time, and an older module does without. */
	ret = dm_target_version(&version);
	if (ret)
		return ret;
	if (version.minor >= TARGET_MINOR_ZEROED)
		f.zeroed_from = align_up(m->img.space.zeros,
					 1ULL << m->img.geo.cluster_bits);
	if (!target_format_table(params, sizeof(params), p->meta.dev,
				 p->data.dev, &m->img.geo, &f))
		return fail(EX_WRONG, "%s: table line is too long", esc(name));
	line.params = params;
	make_uuid(uuid, sizeof(uuid),
		  opt && opt->host ? DM_UUID_HOST_PREFIX : DM_UUID_PREFIX,
		  &m->img.node, name);
	note("%s: 0 %llu %s %s", esc(name), (unsigned long long)line.sectors,
	     DM_TARGET, params);
	ret = dm_check_table(name, params);
	if (ret)
		return ret;
	ret = dm_make(name, uuid, &line, 1, f.read_only);
	if (!ret && m->img.recording)
		inform("%s: what is written is recorded in %u bitmap%s", esc(name),
		       m->img.recording, m->img.recording == 1 ? "" : "s");
	if (!ret && opt && !opt->host)
		note("%s: udev leaves alone what is on it: mounts by UUID= or LABEL=, and volumes on it, need open --host",
		     esc(name));
	return ret;
}

static int attach_backing(const struct mapping *m, const char *name,
			  struct parts *p)
{
	const struct node *node = &m->backing->node;
	uint64_t size;
	int ret;

	ret = attach(&p->backing, node);
	if (ret || node->bdev)
		return ret;
	/* What lies beyond the end is zeros, but only beyond a whole block. */
	size = align_up(max_u64(node->size, 1), mapping_block_size(m));
	if (size == node->size ||
	    (node->size >= m->img.geo.size && !(node->size % SECTOR)))
		return 0;
	return tail_make(&p->backing_tail, node, size, name,
			 DM_BACKING_TAIL_SUFFIX, &p->backing);
}

/* An older module cannot: then they are marked, which is said. */
static int keep_bitmaps(struct mapping *m, const struct activation *opt)
{
	struct target_version version;
	int ret = dm_target_version(&version);

	if (!ret)
		m->img.keep_bitmaps = !opt->drop_bitmaps &&
				      version.minor >= TARGET_MINOR_BITMAPS;
	return ret;
}

/* A device that was just made, and was not written to */
static void take_away(const char *name)
{
	const struct timespec step = { .tv_nsec = 20 * 1000 * 1000 };
	int tries = 0;

	/* Its partitions go a moment later, if somebody looks at them. */
	while (dm_remove(name, false)) {
		if (++tries == 150) {
			warning("%s: cannot be removed again; try dmsetup remove %s",
				esc(name), esc(name));
			return;
		}
		nanosleep(&step, NULL);
	}
}

/*
 * From checked files to a live device; takes back what it did if it fails.
 * @opt: NULL for one that is only there for what is above it
 */
static int activate(struct mapping *m, const char *name,
		    const struct activation *opt, struct parts *p)
{
	uint64_t cs = 1ULL << m->img.geo.cluster_bits;
	bool read_only = !opt || opt->read_only;
	int ret = 0;

	if (!read_only && (opt->sparse || opt->passing))
		m->img.space_kind = opt->passing ? IMAGE_PASSING : IMAGE_SPARSE;
	if (!read_only)
		ret = keep_bitmaps(m, opt);
	if (!ret && !read_only)
		ret = image_prepare(&m->img);
	if (!ret && interrupted())
		ret = EX_WRONG;
	if (!ret)
		ret = attach(&p->meta, &m->img.node);
	if (!ret)
		ret = attach(&p->data, &m->data);
	if (!ret && m->backing && !m->backing->image)
		ret = attach_backing(m, name, p);
	if (!ret && read_only && m->img.node.size % SECTOR)
		ret = tail_make(&p->meta_tail, &m->img.node,
				align_up(m->img.node.size, cs), name,
				DM_TAIL_SUFFIX, &p->meta);
	if (!ret && interrupted())
		ret = EX_WRONG;
	if (!ret)
		ret = make_device(m, name, p, opt);
	if (!ret && opt && opt->partitions) {
		ret = partitions_make(name);
		if (ret)
			take_away(name);
	}

	/*
	 * The device holds everything below it now.  The helpers, marked like
	 * this, go when the device goes, as the loop devices do.
	 */
	tail_remove(&p->meta_tail, !ret);
	tail_remove(&p->backing_tail, !ret);
	loop_release(&p->meta.loop);
	loop_release(&p->data.loop);
	loop_release(&p->backing.loop);
	lower_release(&p->lower, ret);
	if (ret)
		image_undo(&m->img);
	return ret;
}

/* One that is at it needs less than a second. */
#define SERIALIZE_MS	5000

/*
 * Only one at a time may look for the device of an image and make it.  The lock
 * must not stay with the descriptor that a loop device gets.
 */
static int serialize(const struct node *node)
{
	int fd = reopen(node->fd, O_RDONLY | O_CLOEXEC);

	/*
	 * Where it is not supported, or somebody else has it for something else,
	 * two at once may fail.
	 */
	if (fd >= 0)
		node_flock(fd, SERIALIZE_MS);
	return fd;
}

/* Find the device of @m, or make it, and hold it; -EAGAIN: it went meanwhile. */
static int find_or_make(struct mapping *m, struct parts *p, struct lower *l)
{
	struct search s = { .m = m, .backing = p->lower.dev };
	bool made = false;
	int ret;

	ret = dm_each(search_one, &s);
	if (!ret && *s.name) {
		note("%s: is open as %s", esc(m->img.node.path), esc(s.name));
	} else if (!ret) {
		snprintf(s.name, sizeof(s.name), DM_BACKING_PREFIX "%016llx",
			 (unsigned long long)node_hash(&m->img.node));
		ret = activate(m, s.name, NULL, p);
		made = !ret;
	}
	if (ret)
		return ret;

	snprintf(l->name, sizeof(l->name), "%s", s.name);
	l->goes = starts_with(l->name, DM_BACKING_PREFIX);
	ret = lower_hold(l);
	if (!made)
		return ret;
	if (ret == -EAGAIN)
		ret = fail(EX_WRONG, "%s: cannot open the device; check /dev/dm-*",
			   esc(l->name));
	/* Nobody will close it, so it is told to go with its last user. */
	if (!ret)
		ret = dm_remove(l->name, true);
	if (ret) {
		if (l->fd >= 0)
			close(l->fd);
		l->fd = -1;
		if (dm_remove(l->name, false))
			warning("%s: cannot be removed again; try dmsetup remove %s",
				esc(l->name), esc(l->name));
	}
	return ret;
}

/*
 * A device for an image that is only read, as all that are open for something
 * above them: the one that is there, or a new one.
 */
static int lower_open(struct mapping *m, struct lower *l)
{
	const struct timespec step = { .tv_nsec = 50 * 1000 * 1000 };
	struct parts p = PARTS_NONE;
	int ret = 0, lock, tries;

	if (m->backing && m->backing->image)
		ret = lower_open(m->backing->image, &p.lower);
	if (ret)
		return ret;
	lock = serialize(&m->img.node);
	for (tries = 0; ; tries++) {
		ret = interrupted() ? EX_WRONG : find_or_make(m, &p, l);
		if (ret != -EAGAIN)
			break;
		if (tries == 20) {
			ret = fail(EX_BUSY, "%s: is being closed; try again",
				   esc(m->img.node.path));
			break;
		}
		nanosleep(&step, NULL);
	}
	if (lock >= 0)
		close(lock);
	lower_release(&p.lower, ret);
	if (ret)
		lower_release(l, true);
	return ret;
}

static int activate_chain(struct mapping *m, const char *name,
			  const struct activation *opt)
{
	struct parts p = PARTS_NONE;
	int ret;

	if (m->backing && m->backing->image) {
		ret = lower_open(m->backing->image, &p.lower);
		if (ret)
			return ret;
	}
	return activate(m, name, opt, &p);
}

int activate_device(struct mapping *m, const char *name,
		    const struct activation *how)
{
	int ret = interrupted() ? EX_WRONG : activate_chain(m, name, how);

	if (ret) {
		mapping_close(m);
		wait_for_loops();
		mark_sweep();
	}
	return ret;
}

int activate_check(const char *name)
{
	struct dm_dev_info info;
	int ret;

	ret = dm_check_name(name);
	if (!ret)
		ret = dm_check(true);
	if (!ret)
		ret = dm_query(name, &info);
	if (!ret && info.exists)
		ret = device_name_taken(name, info.uuid);
	return ret;
}

/* New files, locked as those of a device are, with their space as it shall be */
static int open_instead(struct mapping *m, const char *image, const char *data)
{
	struct node node;
	int ret;

	ret = node_open(&node, AT_FDCWD, image, 0);
	if (!ret)
		ret = node_lock(&node, true);
	if (ret) {
		node_close(&node);
		return ret;
	}
	ret = image_attach(&m->img, &node);
	/* The geometry is known when there is no reason against it. */
	if (!ret) {
		struct reasons reasons;

		image_reasons(&m->img, false, &reasons);
		if (reasons.n)
			ret = fail(EX_WRONG, "%s: %s; %s", esc(image),
				   reasons.r[0].cause, reasons.r[0].remedy);
	}
	if (!ret)
		ret = node_open(&m->data, AT_FDCWD, data, 0);
	if (!ret)
		ret = node_lock(&m->data, true);
	if (!ret)
		ret = image_load_tables(&m->img, true);
	m->img.space_kind = IMAGE_PASSING;
	return ret ? ret : image_prepare(&m->img);
}

/* A failure may have left another table, and a suspended device. */
static void put_back(const struct live *l)
{
	const struct dm_line line = {
		.sectors = l->sectors, .type = DM_TARGET, .params = l->params,
	};
	struct dm_dev_info info;

	if (!dm_load(l->name, &line) && !dm_resume(l->name) &&
	    !dm_query(l->name, &info) && !info.suspended)
		return;
	warning("%s: device stays suspended; see dmesg, then try dmsetup resume %s",
		esc(l->name), esc(l->name));
}

int activate_instead(struct live *l, const char *image, const char *data)
{
	struct mapping m = MAPPING_CLOSED;
	struct parts p = PARTS_NONE;
	struct target_features f = l->table.f;
	struct dm_line line = { .sectors = l->sectors, .type = DM_TARGET };
	char params[512];
	int ret;

	ret = open_instead(&m, image, data);
	if (!ret)
		ret = attach(&p.meta, &m.img.node);
	if (!ret)
		ret = attach(&p.data, &m.data);
	f.zeroed_from = 0;
	if (!ret && !target_format_table(params, sizeof(params), p.meta.dev,
					 p.data.dev, &m.img.geo, &f))
		ret = fail(EX_WRONG, "%s: table line is too long; close it, and make a new clone",
			   esc(l->name));
	line.params = params;
	if (!ret && interrupted())
		ret = EX_WRONG;
	if (!ret) {
		note("%s: 0 %llu %s %s", esc(l->name),
		     (unsigned long long)line.sectors, DM_TARGET, params);
		ret = dm_load(l->name, &line);
	}
	/* The kernel suspends it, takes the other table, and resumes it. */
	if (!ret) {
		ret = dm_resume(l->name);
		if (ret)
			put_back(l);
	}
	loop_release(&p.meta.loop);
	loop_release(&p.data.loop);
	mapping_close(&m);
	if (ret) {
		wait_for_loops();
		mark_sweep();
	}
	return ret;
}
