// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Backups begin: for all devices at one instant, with views that show them as they were then.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "image/walk.h"
#include "lib/util.h"
#include "stack/attach.h"
#include "stack/backup_parts.h"
#include "stack/change.h"
#include "system/claim.h"
#include "system/device.h"
#include "system/freeze.h"
#include "system/live.h"
#include "system/loop.h"

/* NAME of NAME[,granularity=SIZE] */
static char *checkpoint_name(const char *text)
{
	const char *comma = strrchr(text, ',');

	return comma && starts_with(comma + 1, "granularity=") ?
		strndup(text, comma - text) : strdup(text);
}

/* One history ends here, the next one begins; and how fine is what they know? */
static int rotate(struct bitmaps *s, void *arg)
{
	struct backup_disk *d = arg;
	const struct backup_request *r = d->r;
	const struct bitmap_item *b;
	unsigned int i, bits = 16;
	struct bitmap_reader reader = { .s = NULL };
	int ret = 0;

	for (i = 0; !ret && i < r->bitmaps; i++) {
		b = bitmaps_find(s, r->bitmap[i]);
		if (b && qcow2_bitmap_records(&b->head)) {
			ret = bitmaps_stop(s, r->bitmap[i]);
		} else {
			/* It is there and valid, or this says what is wrong. */
			ret = bitmap_reader_open(&reader, s, r->bitmap[i]);
			bitmap_reader_close(&reader);
		}
		if (!ret && b->head.granularity_bits < bits)
			bits = b->head.granularity_bits;
	}
	d->granularity = bits < 12 ? 1 << 12 : 1ULL << bits;
	if (!ret && r->checkpoint)
		ret = bitmaps_add_option(s, r->checkpoint, "checkpoint");
	return ret;
}

static int prepare(struct live *l, void *arg)
{
	struct backup_disk *d = arg;
	int ret;

	ret = live_look(l, d->r->sparse);
	return ret || !d->r->checkpoint ? ret :
	       live_prepare_bitmaps(l, true, rotate, d);
}

static int apply(struct live *l, void *arg)
{
	struct backup_disk *d = arg;

	l->view = d->cow;
	l->view_granularity = d->granularity == 1 << 16 ? 0 : d->granularity;
	return d->r->checkpoint ? live_apply_bitmaps(l, rotate, d) : 0;
}

/* A file without a name: it goes with the loop device, whatever happens. */
static int make_cow_file(struct backup_disk *d, uint64_t size)
{
	const char *dir = d->r->cow;
	char path[PATH_MAX];
	struct stat st;
	int fd, ret;

	fd = open(dir, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
	if (fd < 0 && (errno == EOPNOTSUPP || errno == EISDIR)) {
		snprintf(path, sizeof(path), "%s/.qcow2setup-XXXXXX", dir);
		fd = mkostemp(path, O_CLOEXEC);
		if (fd >= 0)
			unlink(path);
	}
	if (fd < 0)
		return fail_errno("%s: cannot create a file there", esc(dir));
	if (fstat(fd, &st) || ftruncate(fd, size)) {
		ret = fail_errno("%s: cannot make a file of %s there", esc(dir),
				 human_size(size));
		close(fd);
		return ret;
	}
	if (device_is_above(st.st_dev, d->rdev)) {
		close(fd);
		return fail(EX_WRONG,
			    "%s: is on a file system on %s, which would wait for itself; give --cow a folder or device elsewhere",
			    esc(dir), esc(d->name));
	}
	snprintf(path, sizeof(path), "%s/%s.cow", dir, d->name);
	ret = loop_attach(&d->loop, fd, path, false);
	close(fd);
	if (!ret)
		snprintf(d->cow, sizeof(d->cow), "%u:%u", major(d->loop.rdev),
			 minor(d->loop.rdev));
	return ret;
}

static int open_cow_device(struct backup_disk *d, uint64_t size)
{
	struct node *node = &d->cow_node;
	int ret;

	ret = node_open(node, AT_FDCWD, d->r->cow, 0);
	if (ret)
		return ret;
	if (!node->bdev)
		return fail(EX_WRONG,
			    "%s: is a file; give --cow a folder, or a block device of at least %s",
			    esc(d->r->cow), human_size(size));
	if (node->size < size)
		return fail(EX_WRONG,
			    "%s: device of %s is smaller than %s, of %s; enlarge it, or give --cow another one",
			    esc(d->r->cow), human_size(node->size), esc(d->name),
			    human_size(size));
	if (device_is_above(node->rdev, d->rdev))
		return fail(EX_WRONG,
			    "%s: is on %s, which would wait for itself; give --cow a folder or device elsewhere",
			    esc(d->r->cow), esc(d->name));
	ret = claim_check(node, true);
	if (!ret)
		snprintf(d->cow, sizeof(d->cow), "%u:%u", major(node->rdev),
			 minor(node->rdev));
	return ret;
}

static int check_free(const struct backup_disk *d)
{
	struct dm_dev_info info;
	int ret;

	ret = dm_check_name(d->device);
	if (!ret)
		ret = dm_query(d->device, &info);
	if (ret)
		return ret;
	if (info.exists)
		return fail(EX_BUSY,
			    "%s: a device of that name exists; end the backup that it is of (qcow2setup backup end %s), or remove it",
			    esc(d->device), shell_quote(d->name));
	if (access(d->image, F_OK))
		return 0;
	if (d->image_given)
		return fail(EX_BUSY,
			    "%s: exists; remove it, or give --image another name",
			    esc(d->image));
	return fail(EX_BUSY,
		    "%s: exists; end the backup that it is of (qcow2setup backup end %s), or remove it",
		    esc(d->image), shell_quote(d->name));
}

/* What needs no suspend */
static int open_disk(struct backup_disk *d, struct live *l)
{
	struct target_version v;
	struct stat st;
	int ret;

	ret = live_open(l, d->name, "backup");
	l->takes = d->r->checkpoint;
	if (!ret)
		ret = dm_target_version(&v);
	if (ret)
		return ret;
	if (v.minor < TARGET_MINOR_VIEW)
		return fail(EX_WRONG,
			    "the loaded dm-qcow2 module is of version %u.%u.%u, which has no views; reload the module: close all devices, then modprobe -r dm-qcow2 && modprobe dm-qcow2",
			    v.major, v.minor, v.patch);
	if (l->table.f.view)
		return fail(EX_BUSY,
			    "%s: a backup of it is under way; end it first (qcow2setup backup end %s)",
			    esc(d->name), shell_quote(d->name));
	ret = check_free(d);
	if (ret)
		return ret;
	if (!stat(d->r->cow, &st) && S_ISDIR(st.st_mode))
		return make_cow_file(d, l->sectors * SECTOR);
	return open_cow_device(d, l->sectors * SECTOR);
}

static int make_view(const struct backup_disk *d, uint64_t sectors)
{
	char params[80], uuid[160];
	struct dm_line line = {
		.sectors = sectors, .type = DM_VIEW_TARGET, .params = params,
	};

	snprintf(params, sizeof(params), "%u:%u %s", major(d->rdev),
		 minor(d->rdev), d->cow);
	snprintf(uuid, sizeof(uuid), "%s%s", DM_UUID_VIEW_PREFIX, d->name);
	return dm_make(d->device, uuid, &line, 1, true);
}

static int note_disk(struct backup_disk *d)
{
	struct backup_notes n = { .image = (char *)d->image };
	uint64_t random[2];
	unsigned int i;
	char id[40];
	int ret;

	if (getrandom(random, sizeof(random), 0) != sizeof(random))
		return fail_errno("no random numbers");
	snprintf(id, sizeof(id), "%016" PRIx64 "%016" PRIx64, random[0], random[1]);
	n.id = id;

	if (d->r->checkpoint) {
		n.checkpoint = checkpoint_name(d->r->checkpoint);
		if (!n.checkpoint)
			return fail_nomem();
	}
	for (i = 0; i < d->r->bitmaps; i++)
		n.bitmap[n.bitmaps++] = (char *)d->r->bitmap[i];
	ret = backup_notes_write(d->name, &n);
	d->noted = !ret;
	free(n.checkpoint);
	return ret;
}

static int tell_view(const struct backup_disk *d, const char *text)
{
	int ret = dm_message(d->name, text);

	return ret ? fail(errno_to_exit(-ret),
			  "%s: cannot tell it what is not wanted: %s; leave its table alone meanwhile, and try again",
			  esc(d->name), strerror(-ret)) : 0;
}

/* Only what is dirty is wanted, in any of the bitmaps: whole granules that are not, are not. */
static int skip_clean(const struct backup_disk *d, uint64_t sectors)
{
	struct image img = IMAGE_CLOSED;
	struct bitmaps s = { .img = NULL };
	struct union_reader reader = { .n = 0 };
	uint64_t size = sectors * SECTOR, at, end, clean = 0;
	char text[80];
	int ret;

	ret = attach_live(&img, d->name, false);
	if (!ret)
		ret = image_geometry(&img, &img.geo);
	if (!ret)
		ret = bitmaps_load(&s, &img);
	if (!ret)
		ret = union_open(&reader, &s, d->r->bitmap, d->r->bitmaps);
	for (at = 0; !ret && at <= size; at = end) {
		bool dirty = true;

		end = size;
		if (at < size)
			ret = union_run(&reader, at, &dirty, &end);
		if (ret || !dirty)
			continue;
		if (at > clean) {
			snprintf(text, sizeof(text), "view_skip %" PRIu64 " %" PRIu64,
				 clean / SECTOR, (at - clean) / SECTOR);
			ret = tell_view(d, text);
		}
		clean = end;
		if (at == size)
			break;
	}
	union_close(&reader);
	bitmaps_free(&s);
	image_close(&img);
	return ret;
}

static int limit_view(const struct backup_disk *d)
{
	char text[64];

	snprintf(text, sizeof(text), "view_limit %" PRIu64, d->r->most / SECTOR);
	return tell_view(d, text);
}

static int finish_disk(const struct backup_disk *d, uint64_t sectors)
{
	int ret = d->r->most ? limit_view(d) : 0;

	if (!ret)
		ret = make_view(d, sectors);
	if (!ret && d->r->dirty_only)
		ret = skip_clean(d, sectors);
	return ret ? ret : backup_make_image(d, sectors);
}

static int compare_order(const struct backup_disk *a, const struct backup_disk *b)
{
	return device_is_above(a->rdev, b->rdev) ? -1 :
	       device_is_above(b->rdev, a->rdev) ? 1 : 0;
}

/* What is on top of others comes first; they are few.  Nothing of them is open yet. */
static int sort_disks(struct backup_disk *d, unsigned int n)
{
	struct dm_dev_info info;
	unsigned int i, k;
	int ret;

	for (i = 0; i < n; i++) {
		ret = dm_query(d[i].name, &info);
		if (!ret && !info.exists)
			ret = dm_gone(d[i].name);
		if (ret)
			return ret;
		d[i].rdev = info.rdev;
	}
	for (i = 0; i < n; i++)
		for (k = i + 1; k < n; k++)
			if (compare_order(d + i, d + k) > 0) {
				struct backup_disk disk = d[i];

				d[i] = d[k];
				d[k] = disk;
			}
	return 0;
}

static int freeze(void *arg)
{
	return freezer_freeze(arg);
}

static void thaw(void *arg)
{
	freezer_thaw(arg);
}

static int begin(struct backup_disk *d, struct live *l, struct change *c,
		 unsigned int n, struct freezer *f)
{
	const struct hold hold = { .take = freeze, .let_go = thaw, .arg = f };
	bool frozen = d->r->freeze;
	unsigned int i;
	int ret;

	ret = dm_check(true);
	if (!ret)
		ret = sort_disks(d, n);
	for (i = 0; !ret && i < n; i++)
		ret = open_disk(d + i, l + i);
	for (i = 0; !ret && frozen && i < n; i++)
		ret = freezer_find(f, d[i].rdev);
	for (i = 0; !ret && frozen && i < n; i++)
		ret = freezer_check(f, d[i].rdev, d[i].name);
	if (!ret && frozen)
		ret = freezer_start(f);
	if (ret)
		return ret;
	for (i = 0; !ret && i < n; i++) {
		c[i] = (struct change){
			.prepare = prepare, .apply = apply, .arg = d + i,
		};
		/* Before there is anything that they are about */
		ret = note_disk(d + i);
	}
	return ret ? ret : live_change_all(l, c, n, frozen ? &hold : NULL);
}

/* One whose instant was there: what has ended does not begin again, but nothing is lost. */
static void undo(const struct backup_disk *d)
{
	char *checkpoint;

	if (backup_end(d->name, true) || !d->r->bitmaps)
		return;
	checkpoint = checkpoint_name(d->r->checkpoint);
	if (checkpoint)
		warning("%s: bitmap %s has begun, and has all that is in those that have ended; give that one as --bitmap the next time",
			esc(d->name), esc(checkpoint));
	free(checkpoint);
}

int backup_begin(const struct backup_request *r, char *const *names,
		 unsigned int n, const char *image)
{
	struct backup_disk *d = calloc(n, sizeof(*d));
	struct live *l = calloc(n, sizeof(*l));
	struct change *c = calloc(n, sizeof(*c));
	uint64_t *sectors = calloc(n, sizeof(*sectors));
	bool *done = calloc(n, sizeof(*done));
	struct freezer freezer = FREEZER_NONE;
	unsigned int i;
	int ret;

	if (!d || !l || !c || !sectors || !done) {
		ret = fail_nomem();
		goto out;
	}
	for (i = 0; i < n; i++) {
		l[i] = (struct live)LIVE_CLOSED;
		d[i] = (struct backup_disk){
			.r = r, .name = names[i], .loop = LOOP_CLOSED,
			.cow_node = NODE_CLOSED, .granularity = 1 << 16,
			.image_given = image,
		};
		backup_device_name(d[i].device, sizeof(d[i].device), names[i]);
		if (image)
			snprintf(d[i].image, sizeof(d[i].image), "%s", image);
		else
			snprintf(d[i].image, sizeof(d[i].image), "%s/%s.qcow2",
				 RUN, d[i].device);
	}
	ret = begin(d, l, c, n, &freezer);
	freezer_close(&freezer);
	for (i = 0; i < n; i++) {
		done[i] = l[i].step == LIVE_DONE;
		sectors[i] = l[i].sectors;
		live_close(&l[i]);
	}
	for (i = 0; !ret && i < n; i++)
		ret = finish_disk(d + i, sectors[i]);
	/* The tables and the views have them open. */
	for (i = 0; i < n; i++) {
		loop_release(&d[i].loop);
		node_close(&d[i].cow_node);
	}
	for (i = 0; ret && i < n; i++) {
		if (done[i])
			undo(d + i);
		else if (d[i].noted)
			backup_notes_remove(d[i].name);
	}
out:
	free(d);
	free(l);
	free(c);
	free(sectors);
	free(done);
	return ret;
}
