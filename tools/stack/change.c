// SPDX-License-Identifier: GPL-2.0-or-later
#include <errno.h>
#include <fcntl.h>
#include <linux/loop.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "image/bitmaps.h"
#include "lib/interrupt.h"
#include "lib/util.h"
#include "stack/change.h"
#include "system/device.h"
#include "system/dm.h"
#include "system/live.h"
#include "system/locks.h"

#define SECTOR		512
#define LOCK_MS		3000
#define PARAMS_MAX	1024

/* For image_make_room(); the node in the image is a copy. */
static int metadata_resized(struct image *img)
{
	struct part *p = img->resized_arg;
	int ret = part_update(p);

	img->node.size = p->node.size;
	return ret;
}

/* Two at once must not do this to one device. */
static int live_lock(struct live *l)
{
	l->lock = open(l->meta.path, O_RDONLY | O_CLOEXEC);
	if (l->lock < 0)
		return fail_errno("%s: cannot open it", esc(l->meta.path));
	/* udev takes such a lock, too, for moments. */
	if (!node_flock(l->lock, LOCK_MS))
		return fail(EX_BUSY,
			    "%s: is being changed, or locked by another program; try again later",
			    esc(l->name));
	return 0;
}

/* Is there such a device, and is it ours?  Before it is locked. */
static int check_device(const struct live *l)
{
	char type[64], remedy[300];
	enum device_kind kind;
	struct dm_dev_info info;
	int ret;

	ret = dm_query(l->name, &info);
	if (ret)
		return ret;
	if (!info.exists)
		return dm_gone(l->name);
	kind = device_kind(l->name, info.uuid, type, sizeof(type));
	if (kind != DEVICE_OURS) {
		snprintf(remedy, sizeof(remedy),
			 "remove it (dmsetup remove %s), and change the image",
			 shell_quote(l->name));
		return device_not_ours(l->name, kind, type, remedy);
	}
	if (info.read_only)
		return fail(EX_WRONG,
			    "%s: is open read-only; close it (qcow2setup close %s), and change the image",
			    esc(l->name), shell_quote(l->name));
	return 0;
}

static int read_table(struct live *l)
{
	char *type;
	int ret;

	free(l->params);
	l->params = NULL;
	ret = dm_params(l->name, false, &type, &l->params, &l->sectors);
	if (ret)
		return ret == -ENXIO ? dm_gone(l->name) : ret;
	free(type);
	/* What is not known could not be in the new table. */
	if (!target_parse_table(l->params, &l->table) || l->table.f.unknown)
		return fail(EX_WRONG,
			    "%s: table is not understood; use a newer qcow2setup",
			    esc(l->name));
	return 0;
}

/* Can it be suspended and changed?  When nobody else does that. */
static int check_state(struct live *l)
{
	struct target_status status;
	struct dm_dev_info info;
	int ret;

	ret = dm_query(l->name, &info);
	if (ret)
		return ret;
	l->left = info.suspended && info.inactive;
	if (l->left)
		note("%s: was left suspended by a command that was killed",
		     esc(l->name));
	else if (info.suspended)
		return fail(EX_BUSY,
			    "%s: is suspended; resume it first (dmsetup resume %s)",
			    esc(l->name), esc(l->name));
	ret = live_status(l->name, &status);
	if (ret)
		return ret == -ENXIO ? dm_gone(l->name) : ret;
	/* What there was no space for may be written in the suspend. */
	if (strcmp(status.mode, "rw") && strcmp(status.mode, "nospc"))
		return fail(EX_WRONG,
			    "%s: is in mode %s; close it (qcow2setup close %s), and check the image",
			    esc(l->name), esc(status.mode),
			    shell_quote(l->name));
	return 0;
}

int live_open(struct live *l, const char *name, const char *what)
{
	int ret;

	l->name = name;
	l->what = what;
	ret = dm_check(true);
	if (!ret)
		ret = check_device(l);
	if (!ret)
		ret = read_table(l);
	if (!ret)
		ret = part_open(&l->meta, l->table.metadata_dev, 0);
	if (!ret)
		ret = live_lock(l);
	/* Another one may have been at it until now. */
	if (!ret)
		ret = check_state(l);
	if (!ret)
		ret = read_table(l);
	if (!ret)
		ret = dm_check_table(l->name, l->params);
	if (!ret &&
	    !device_is_node(l->table.metadata_dev, &l->meta.node))
		ret = fail(EX_BUSY, "%s: has just been given another table; try again",
			   esc(l->name));
	if (!ret)
		ret = part_open(&l->data, l->table.data_dev, 0);
	if (!ret && l->table.f.backing_dev)
		ret = part_open(&l->backing, l->table.f.backing_dev,
				NODE_READ_ONLY);
	if (ret)
		return ret;
	part_open_file(&l->meta);
	part_open_file(&l->data);
	return 0;
}

/* The image in the metadata device, as it is now. */
static int attach(struct live *l, struct image *img)
{
	struct reasons reasons;
	int ret;

	/* The kernel wrote behind whatever was read of it before. */
	node_drop_cache(&l->meta.node);
	ret = image_attach(img, &l->meta.node);
	/* It is the image's now, and closed with it. */
	l->meta.node.fd = dup(img->node.fd);
	if (!ret && l->meta.node.fd < 0)
		ret = fail_errno("%s: cannot duplicate it", esc(l->meta.path));
	if (ret)
		return ret;
	if (l->meta.file.fd >= 0) {
		img->resized = metadata_resized;
		img->resized_arg = &l->meta;
	}
	image_reasons(img, false, &reasons);
	if (reasons.n)
		return fail(EX_WRONG, "%s: %s; %s", esc(l->name),
			    reasons.r[0].cause, reasons.r[0].remedy);
	return image_load_tables(img, true);
}

int live_look(struct live *l, bool sparse)
{
	struct image *img = &l->before;
	int ret;

	ret = attach(l, img);
	if (ret || l->meta.file.fd < 0)
		return ret;
	img->space.fd = l->meta.file.fd;
	img->space.path = l->meta.file.path;
	img->space.in_use = true;
	img->space_kind = sparse ? IMAGE_SPARSE : IMAGE_REAL;
	return 0;
}

/*
 * What the helper does if this program is killed
 */

struct undo_files {
	struct {
		int file, device;
		uint64_t size;
	} f[2];
};

/* Files get the length that they had. */
static enum keeper_result undo_files(const void *data, size_t len)
{
	const struct undo_files *u = data;
	struct stat st;
	size_t i;

	(void)len;
	for (i = 0; i < ARRAY_SIZE(u->f); i++) {
		if (u->f[i].file < 0 || fstat(u->f[i].file, &st) ||
		    (uint64_t)st.st_size <= u->f[i].size)
			continue;
		/* Pages that are written behind the end would be an error. */
		fsync(u->f[i].device);
		posix_fadvise(u->f[i].device, 0, 0, POSIX_FADV_DONTNEED);
		if (ftruncate(u->f[i].file, u->f[i].size) ||
		    ioctl(u->f[i].device, LOOP_SET_CAPACITY, 0))
			warning("a file cannot be given its length again: %s",
				strerror(errno));
	}
	return KEEPER_GO_ON;
}

struct undo_table {
	struct undo_files files;
	bool changed;		/* another table was to be loaded, or is */
	uint64_t sectors;
	char what[32];
	char name[DM_NAME_MAX + 28];
	char params[];
};

static bool is_suspended(const char *name)
{
	struct dm_dev_info info;

	return !dm_query(name, &info) && info.exists && info.suspended;
}

static enum keeper_result undo_table(const void *data, size_t len)
{
	const struct undo_table *u = data;
	const struct dm_line line = {
		.sectors = u->sectors, .type = DM_TARGET, .params = u->params,
	};

	(void)len;
	if (!is_suspended(u->name))
		return u->changed ? KEEPER_STOP : KEEPER_GO_ON;
	if (u->changed) {
		/* A table sees how long its devices are when it is loaded. */
		undo_files(&u->files, sizeof(u->files));
		dm_load(u->name, &line);
	}
	if (!dm_resume(u->name) && !is_suspended(u->name))
		warning("%s: %s was killed, and the device is as it was before",
			esc(u->name), u->what);
	else
		warning("%s: %s was killed, and the device stays suspended; try dmsetup resume %s",
			esc(u->name), u->what, esc(u->name));
	return KEEPER_GO_ON;
}

struct undo_change {
	uint64_t off, len;	/* @len 0: make durable what was undone */
	char name[DM_NAME_MAX + 28], what[32];
	int fd;
	uint8_t old[];
};

static enum keeper_result undo_change(const void *data, size_t len)
{
	static bool stuck;
	const struct undo_change *u = data;
	int ret;

	(void)len;
	/* Resumed: it was just done, or just undone. */
	if (!is_suspended(u->name))
		return KEEPER_STOP;
	/* Not a step before the one after it: as safe as forward. */
	if (stuck)
		return KEEPER_GO_ON;
	ret = u->len ? write_at(u->fd, u->old, u->len, u->off) : fsync(u->fd);
	if (!ret)
		return KEEPER_GO_ON;
	stuck = true;
	warning("%s: %s was killed, and the image could not be put back as it was; check it with qcow2setup check",
		esc(u->name), u->what);
	return KEEPER_GO_ON;
}

static struct undo_files files_as_they_are(const struct live *l)
{
	return (struct undo_files){ .f = {
		{ l->meta.file.fd, l->meta_fd, l->meta.file.before },
		{ l->data.file.fd, l->data.node.fd, l->data.file.before },
	} };
}

static int tell_files(struct live *l)
{
	struct undo_files u = files_as_they_are(l);

	return keeper_tell(&l->keeper, undo_files, &u, sizeof(u));
}

/*
 * The line of the old table, for when an image was changed and put back.  Clusters that
 * were taken then need not be zeros any more from @zeros on.
 */
static int old_params(const struct live *l, uint64_t zeros, char *params,
		      size_t size)
{
	struct target_features f = l->table.f;
	const struct target_table *t = &l->table;
	const struct qcow2_geometry geo = {
		.cluster_bits = t->cluster_bits,
		.refcount_order = t->refcount_order,
		.l1_offset = t->l1_offset, .l1_entries = t->l1_entries,
		.reftable_offset = t->reftable_offset,
		.reftable_clusters = t->reftable_clusters,
	};

	if (!f.zeroed_from || f.zeroed_from >= zeros) {
		snprintf(params, size, "%s", l->params);
		return 0;
	}
	f.zeroed_from = zeros == UINT64_MAX ? 0 : zeros;
	return target_format_table(params, size, t->metadata_dev, t->data_dev,
				   &geo, &f) ? 0 : EX_WRONG;
}

static int tell_table(struct live *l, bool changed)
{
	size_t len = sizeof(struct undo_table) + PARAMS_MAX;
	struct undo_table *u = calloc(1, len);
	int ret;

	if (!u)
		return fail_nomem();
	u->files = files_as_they_are(l);
	/* The data is given back when the old table is live. */
	u->files.f[1].file = -1;
	u->changed = changed;
	u->sectors = l->sectors;
	snprintf(u->name, sizeof(u->name), "%s", l->name);
	snprintf(u->what, sizeof(u->what), "%s", l->what);
	/* Which clusters will be taken is not known yet. */
	ret = old_params(l, image_has_bitmaps(&l->before) || l->takes ?
			    UINT64_MAX : 0, u->params, PARAMS_MAX);
	if (!ret)
		ret = keeper_tell(&l->keeper, undo_table, u, len);
	free(u);
	return ret;
}

/* For image_change() and the like. */
static int tell_change(struct image *img, uint64_t off, const void *old,
		       size_t len)
{
	struct live *l = img->changing_arg;
	struct undo_change *u = calloc(1, sizeof(*u) + len);
	int ret;

	if (!u)
		return fail_nomem();
	u->off = off;
	u->len = len;
	u->fd = l->meta_fd;
	snprintf(u->name, sizeof(u->name), "%s", l->name);
	snprintf(u->what, sizeof(u->what), "%s", l->what);
	memcpy(u->old, old, len);
	ret = keeper_tell(&l->keeper, undo_change, u, sizeof(*u) + len);
	free(u);
	return ret;
}

/* Is there anything in the table that is loaded that the image has not any more? */
static bool is_changed(const struct live *l)
{
	const struct qcow2_geometry *g = &l->img.geo;
	const struct target_table *t = &l->table;

	return g->size / SECTOR != l->sectors || g->l1_offset != t->l1_offset ||
	       g->l1_entries != t->l1_entries ||
	       g->reftable_offset != t->reftable_offset ||
	       g->reftable_clusters != t->reftable_clusters;
}

/* The new table's features: what is in the image now. */
static int new_features(struct live *l, struct target_features *f)
{
	struct image *img = &l->img;
	uint64_t cs = 1ULL << img->geo.cluster_bits;
	unsigned int n = 0;
	int ret = 0;

	*f = l->table.f;
	if (l->view) {
		f->view = *l->view ? l->view : NULL;
		f->view_granularity = l->view_granularity;
	}
	if (image_has_bitmaps(img))
		ret = image_bitmaps_ready(img, &n);
	f->bitmaps = n;
	/*
	 * Tables of a change that was given up may lie in what was zeros before, but
	 * not where the file was not yet.
	 */
	if (f->zeroed_from && is_changed(l))
		f->zeroed_from = align_up(img->space.zeros, cs);
	/* They may be given back some time. */
	if (f->zeroed_from)
		f->zeroed_from = max_u64(f->zeroed_from, img->taken_end);
	return ret;
}

/* Everything that is done while nothing can be read or written; the new table is loaded then. */
static int change_suspended(struct live *l, const struct change *c)
{
	struct dm_line line = {
		.sectors = l->sectors, .type = DM_TARGET, .params = l->params,
	};
	struct target_features f;
	struct image *img = &l->img;
	char params[PARAMS_MAX];
	int ret;

	l->step = LIVE_CHANGED;
	node_drop_cache(&l->data.node);
	if (l->backing.node.fd >= 0)
		node_drop_cache(&l->backing.node);
	ret = attach(l, img);
	img->space = l->before.space;
	img->space_kind = l->before.space_kind;
	l->before.space = (struct space){ .fd = -1 };
	if (!ret && interrupted())
		ret = EX_WRONG;
	if (!ret)
		ret = tell_table(l, true);
	/* From now on it shows that it was not suspended by somebody else. */
	if (!ret && !l->left)
		ret = dm_load(l->name, &line);
	img->changing = tell_change;
	img->changing_arg = l;
	if (!ret)
		ret = c->apply(l, c->arg);
	if (!ret)
		ret = new_features(l, &f);
	if (ret)
		return ret;

	line.sectors = img->geo.size / SECTOR;
	line.params = params;
	if (!target_format_table(params, sizeof(params), l->table.metadata_dev,
				 l->table.data_dev, &img->geo, &f))
		return fail(EX_WRONG, "%s: table line is too long; close it, and change the image",
			    esc(l->name));
	ret = dm_load(l->name, &line);
	if (!ret && strcmp(params, l->params))
		note("%s: 0 %llu %s %s", esc(l->name),
		     (unsigned long long)line.sectors, DM_TARGET, params);
	return ret;
}

/*
 * Is all that the guest wrote on the disks?  A commit that fails does not make
 * the suspend fail, but what it did not write is in the live table only.
 */
static int check_committed(const struct live *l)
{
	const char *below = l->meta.node.path;
	struct target_status status;
	uint64_t unwritten;
	int ret;

	ret = live_unwritten(l->name, &status, &unwritten);
	if (ret)
		return ret;
	if (strcmp(status.mode, "rw") && strcmp(status.mode, "nospc"))
		return fail(EX_WRONG,
			    "%s: metadata could not be written; see dmesg, and save what the device holds before it is closed",
			    esc(l->name));
	if (!unwritten)
		return 0;
	if (!strcmp(status.mode, "nospc"))
		return fail(EX_BUSY,
			    "%s: there is no space for metadata that waits to be written; free some where %s is, then try again",
			    esc(l->name), esc(below));
	return fail(EX_BUSY,
		    "%s: metadata could not be written, and waits to be written again; see dmesg for what is wrong with %s, then try again",
		    esc(l->name), esc(below));
}

/* With the table that it has: another would forget. */
static void resume_as_it_is(const struct live *l)
{
	/* What is loaded then would become live. */
	if (!l->left && !dm_resume(l->name))
		return;
	warning("%s: device stays suspended; see dmesg, then try dmsetup resume %s",
		esc(l->name), esc(l->name));
}

/* The image is as it was: so shall be the device. */
static void bring_back(struct live *l)
{
	char params[PARAMS_MAX];
	struct dm_line line = {
		.sectors = l->sectors, .type = DM_TARGET, .params = params,
	};
	struct dm_dev_info info;

	image_undo(&l->img);
	/* If the new table did not come to be live, it must not do so now. */
	if (old_params(l, l->img.taken_end, params, sizeof(params)) ||
	    dm_load(l->name, &line))
		warning("%s: old table is not loaded again; it may still be live",
			esc(l->name));
	if (!dm_resume(l->name) && !dm_query(l->name, &info) &&
	    !info.suspended)
		return;
	warning("%s: device stays suspended; see dmesg, then try dmsetup resume %s",
		esc(l->name), esc(l->name));
}

/*
 * Metadata that could not be written before is tried again first: what is wrong
 * with the disks is better said so than by whatever else meets it.
 */
static int commit_rest(struct live *l)
{
	struct target_status status;
	uint64_t unwritten;
	char path[256];
	int fd, ret;

	/* Whether it fails is seen by what is left then. */
	snprintf(path, sizeof(path), "/dev/mapper/%s", l->name);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd >= 0) {
		if (fsync(fd))
			note("%s: %s", esc(path), strerror(errno));
		close(fd);
	}
	ret = live_unwritten(l->name, &status, &unwritten);
	if (ret || !unwritten)
		return ret;
	ret = tell_table(l, false);
	if (!ret)
		ret = dm_suspend(l->name);
	if (ret)
		return ret;
	ret = check_committed(l);
	resume_as_it_is(l);
	return ret;
}

/* All that is done beside the guest's requests; a signal ends it. */
static int before_suspend(struct live *l, const struct change *c)
{
	int ret;

	ret = tell_files(l);
	if (!ret)
		ret = c->prepare(l, c->arg);
	if (!ret && interrupted())
		ret = EX_WRONG;
	if (ret)
		return ret;
	/*
	 * While the device is suspended nothing must have to be read from it, or
	 * written to it, be it to get memory: the root file system may be on it.
	 */
	keeper_lock_memory();
	return l->left ? 0 : tell_table(l, false);
}

static int commit_before(struct live *l)
{
	int ret;

	if (!l->left)
		return commit_rest(l);
	ret = check_committed(l);
	if (ret)
		resume_as_it_is(l);
	return ret;
}

static int prepare_one(struct live *l, const struct change *c)
{
	int ret;

	l->meta_fd = l->meta.node.fd;
	ret = keeper_start(&l->keeper);
	if (!ret)
		ret = commit_before(l);
	if (ret)
		return ret;
	l->step = LIVE_PREPARED;
	return before_suspend(l, c);
}

static int suspend_one(struct live *l)
{
	int ret;

	if (!l->left) {
		ret = dm_suspend(l->name);
		if (ret)
			return ret;
	}
	l->step = LIVE_SUSPENDED;
	return check_committed(l);
}

static int resume_one(struct live *l)
{
	int ret = dm_resume(l->name);

	if (!ret)
		l->step = LIVE_DONE;
	return ret;
}

/* Nothing is left of it, however far it has come. */
static void undo_one(struct live *l)
{
	switch (l->step) {
	case LIVE_PREPARED:
		image_undo(&l->before);
		if (l->left)
			bring_back(l);
		break;
	case LIVE_SUSPENDED:
		image_undo(&l->before);
		resume_as_it_is(l);
		break;
	case LIVE_CHANGED:
		bring_back(l);
		break;
	default:
		break;
	}
}

int live_change_all(struct live *l, const struct change *c, unsigned int n,
		    const struct hold *hold)
{
	bool held = false;
	unsigned int i;
	int ret = 0;

	for (i = 0; !ret && i < n; i++)
		ret = prepare_one(l + i, c + i);
	if (!ret && hold) {
		ret = hold->take(hold->arg);
		held = !ret;
	}
	for (i = 0; !ret && i < n; i++) {
		ret = suspend_one(l + i);
		/* Before the next one is suspended: this one's image may be on that. */
		if (!ret)
			ret = change_suspended(l + i, c + i);
	}
	for (i = n; !ret && i > 0; i--)
		ret = resume_one(l + i - 1);
	/* What is below others comes back first. */
	for (i = n; ret && i > 0; i--)
		undo_one(l + i - 1);
	if (held)
		hold->let_go(hold->arg);
	for (i = 0; i < n; i++) {
		if (l[i].step != LIVE_DONE && l[i].data.file.grown) {
			shrink_file(&l[i].data.file);
			part_update(&l[i].data);
		}
		keeper_dismiss(&l[i].keeper);
	}
	return ret;
}

int live_change(struct live *l, const struct change *c)
{
	return live_change_all(l, c, 1, NULL);
}

void live_close(struct live *l)
{
	image_close(&l->img);
	image_close(&l->before);
	part_close(&l->meta);
	part_close(&l->data);
	part_close(&l->backing);
	if (l->lock >= 0)
		close(l->lock);
	free(l->params);
}
