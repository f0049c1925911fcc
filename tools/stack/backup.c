// SPDX-License-Identifier: GPL-2.0-or-later
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

#include "image/bitmaps.h"
#include "image/make.h"
#include "image/walk.h"
#include "lib/interrupt.h"
#include "lib/util.h"
#include "stack/attach.h"
#include "stack/backup.h"
#include "stack/change.h"
#include "stack/mapping.h"
#include "system/claim.h"
#include "system/device.h"
#include "system/freeze.h"
#include "system/live.h"
#include "system/loop.h"

#define SECTOR		512
#define RUN		"/run/qcow2setup"
/* Of the image for others: as few tables as can be */
#define IMAGE_BITS	21

void backup_device_name(char *out, size_t size, const char *name)
{
	snprintf(out, size, "%s%s", name, BACKUP_SUFFIX);
}

/*
 * Notes: a line for each, with a word and a value in hexadecimal digits
 */

static void notes_path(char *path, size_t size, const char *name)
{
	snprintf(path, size, "%s/%s.backup", RUN, name);
}

static void put_note(FILE *f, const char *word, const char *value)
{
	fprintf(f, "%s ", word);
	for (; *value; value++)
		fprintf(f, "%02x", (unsigned char)*value);
	fprintf(f, "\n");
}

static int write_notes(const char *name, const struct backup_notes *n)
{
	char path[400];
	unsigned int i;
	FILE *f;

	if (mkdir(RUN, 0755) && errno != EEXIST)
		return fail_errno("%s: cannot create the folder", RUN);
	notes_path(path, sizeof(path), name);
	f = fopen(path, "we");
	if (!f)
		return fail_errno("%s: cannot create it", esc(path));
	if (n->image)
		put_note(f, "image", n->image);
	if (n->checkpoint)
		put_note(f, "checkpoint", n->checkpoint);
	if (n->id)
		put_note(f, "id", n->id);
	for (i = 0; i < n->bitmaps; i++)
		put_note(f, "bitmap", n->bitmap[i]);
	if (fflush(f) || ferror(f)) {
		fclose(f);
		unlink(path);
		return fail_errno("%s: cannot write it", esc(path));
	}
	fclose(f);
	return 0;
}

static char *decode(const char *hex)
{
	size_t n = strspn(hex, "0123456789abcdef") / 2, i;
	char *s = calloc(1, n + 1);
	unsigned int byte;

	for (i = 0; s && i < n; i++)
		if (sscanf(hex + 2 * i, "%2x", &byte) == 1)
			s[i] = byte;
	return s;
}

bool backup_notes_read(const char *name, struct backup_notes *n)
{
	char path[400], *line = NULL;
	size_t size = 0;
	FILE *f;

	*n = (struct backup_notes){ NULL };
	notes_path(path, sizeof(path), name);
	f = fopen(path, "re");
	if (!f)
		return false;
	while (getline(&line, &size, f) > 0) {
		if (starts_with(line, "image ") && !n->image)
			n->image = decode(line + 6);
		else if (starts_with(line, "checkpoint ") && !n->checkpoint)
			n->checkpoint = decode(line + 11);
		else if (starts_with(line, "id ") && !n->id)
			n->id = decode(line + 3);
		else if (starts_with(line, "bitmap ") &&
			 n->bitmaps < BACKUP_MAX_BITMAPS)
			n->bitmap[n->bitmaps++] = decode(line + 7);
	}
	free(line);
	fclose(f);
	return true;
}

void backup_notes_free(struct backup_notes *n)
{
	unsigned int i;

	free(n->image);
	free(n->checkpoint);
	free(n->id);
	for (i = 0; i < n->bitmaps; i++)
		free(n->bitmap[i]);
	*n = (struct backup_notes){ NULL };
}

/*
 * What is under way
 */

const char *backup_view_text(const char *view)
{
	if (!strcmp(view, "valid"))
		return "valid";
	if (!strcmp(view, "no_space"))
		return "over: no space for what is to be kept";
	if (!strcmp(view, "limit"))
		return "over: more has changed than was to be kept";
	if (!strcmp(view, "cow_device"))
		return "over: what is to be kept cannot be written";
	if (!strcmp(view, "device"))
		return "over: what is to be kept cannot be read";
	if (!strcmp(view, "no_memory"))
		return "over: no memory for what is to be kept";
	return "over";
}

int backup_find(const char *name, struct backup_notes *notes)
{
	struct target_status s;
	int ret;

	ret = dm_check(true);
	if (!ret)
		ret = live_status(name, &s);
	if (ret)
		return ret == -ENXIO ? dm_gone(name) : ret;
	if (!s.view || !backup_notes_read(name, notes) || !notes->image)
		return fail(EX_WRONG, "%s: no backup of it is under way; begin one with qcow2setup backup begin %s --cow DEV|DIR",
			    esc(name), shell_quote(name));
	if (strcmp(s.view, "valid"))
		return fail(EX_WRONG,
			    "%s: its view is %s; end the backup (qcow2setup backup end %s --failed), and begin another one",
			    esc(name), backup_view_text(s.view), shell_quote(name));
	return 0;
}

/* Several bitmaps as one: dirty in any of them */
struct union_reader {
	struct bitmap_reader reader[BACKUP_MAX_BITMAPS];
	unsigned int n;
};

/* To be closed in any case */
static int union_open(struct union_reader *u, const struct bitmaps *s,
		      const char *const *name, unsigned int n)
{
	int ret = 0;

	while (!ret && u->n < n) {
		ret = bitmap_reader_open(&u->reader[u->n], s, name[u->n]);
		u->n++;
	}
	return ret;
}

/* As bitmap_reader_run(), but no further than *@end; without a bitmap all of it is dirty. */
static int union_run(struct union_reader *u, uint64_t at, bool *dirty, uint64_t *end)
{
	unsigned int i;
	uint64_t stop;
	int ret = 0;
	bool one;

	*dirty = !u->n;
	for (i = 0; !ret && i < u->n; i++) {
		ret = bitmap_reader_run(&u->reader[i], at, &one, &stop);
		if (ret)
			break;
		*dirty |= one;
		*end = min_u64(*end, stop);
	}
	return ret;
}

static void union_close(struct union_reader *u)
{
	unsigned int i;

	for (i = 0; i < u->n; i++)
		bitmap_reader_close(&u->reader[i]);
}

struct cutting {
	struct union_reader reader;
	struct backup_piece last;
	backup_piece_fn *fn;
	void *arg;
};

static int cut_extent(const struct extent *e, void *arg)
{
	struct cutting *c = arg;
	uint64_t at = e->start, end;
	bool zero = e->state != QCOW2_DATA, dirty;
	struct backup_piece *last = &c->last;
	int ret = 0;

	for (; !ret && at < e->start + e->length; at = end) {
		end = e->start + e->length;
		ret = union_run(&c->reader, at, &dirty, &end);
		if (ret)
			return ret;
		if (last->length && last->dirty == dirty && last->zero == zero) {
			last->length += end - at;
			continue;
		}
		if (last->length)
			ret = c->fn(last, c->arg);
		*last = (struct backup_piece){ at, end - at, dirty, zero };
	}
	return !ret && interrupted() ? EX_WRONG : ret;
}

int backup_pieces(const struct backup_notes *notes, const char *const *bitmap,
		  unsigned int bitmaps, backup_piece_fn *fn, void *arg,
		  uint64_t *size, unsigned int *bits)
{
	struct cutting c = { .fn = fn, .arg = arg };
	struct extents x = { .states_only = true, .fn = cut_extent, .arg = &c };
	struct image img = IMAGE_CLOSED;
	struct bitmaps s = { .img = NULL };
	unsigned int i;
	int ret;

	ret = image_open_locked(&img, notes->image, false);
	if (!ret)
		ret = image_geometry(&img, &img.geo);
	if (!ret && bitmaps)
		ret = bitmaps_load(&s, &img);
	if (!ret)
		ret = union_open(&c.reader, &s, bitmap, bitmaps);
	for (i = 0; !ret && bits && i < bitmaps; i++)
		if (c.reader.reader[i].b->head.granularity_bits < *bits)
			*bits = c.reader.reader[i].b->head.granularity_bits;
	if (!ret) {
		*size = x.size = img.geo.size;
		ret = image_walk(&img, &img.geo, &x);
	}
	if (!ret && c.last.length)
		ret = fn(&c.last, arg);
	union_close(&c.reader);
	bitmaps_free(&s);
	image_close(&img);
	return ret;
}

/*
 * Beginning
 */

struct disk {
	const struct backup_request *r;
	const char *name;
	char device[DM_NAME_MAX + 16];
	char image[PATH_MAX];
	bool image_given;		/* its name is the user's */
	struct loop loop;
	char cow[32];			/* "MAJOR:MINOR" */
	struct node cow_node;
	dev_t rdev;
	uint64_t granularity;
	bool noted;			/* the notes are this one's */
};

/* NAME of NAME[,granularity=SIZE] */
static char *checkpoint_name(const char *text)
{
	const char *comma = strrchr(text, ',');

	return comma && starts_with(comma + 1, "granularity=") ?
		strndup(text, comma - text) : strdup(text);
}

static const struct bitmap_item *find_bitmap(const struct bitmaps *s,
					     const char *name)
{
	size_t i;

	for (i = 0; i < s->n; i++)
		if (!strcmp(s->item[i].name, name))
			return &s->item[i];
	return NULL;
}

/* One history ends here, the next one begins; and how fine is what they know? */
static int rotate(struct disk *d, struct bitmaps *s)
{
	const struct backup_request *r = d->r;
	const struct bitmap_item *b;
	unsigned int i, bits = 16;
	struct bitmap_reader reader = { .s = NULL };
	int ret = 0;

	for (i = 0; !ret && i < r->bitmaps; i++) {
		b = find_bitmap(s, r->bitmap[i]);
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
	struct disk *d = arg;
	struct image *img = &l->before;
	struct room room = { .quiet = true };
	uint64_t at, reftable;
	struct bitmaps s;
	int ret;

	ret = live_look(l, d->r->sparse);
	if (ret || !d->r->checkpoint)
		return ret;
	img->node.path = l->name;
	ret = bitmaps_load(&s, img);
	if (!ret)
		ret = rotate(d, &s);
	room.size = img->geo.size;
	room.more = bitmaps_need(&s);
	bitmaps_free(&s);
	return ret ? ret : image_take_room(img, &room, &at, &reftable);
}

static int apply(struct live *l, void *arg)
{
	struct disk *d = arg;
	struct bitmaps s;
	int ret;

	l->view = d->cow;
	l->view_granularity = d->granularity == 1 << 16 ? 0 : d->granularity;
	if (!d->r->checkpoint)
		return 0;
	l->img.node.path = l->name;
	ret = bitmaps_load(&s, &l->img);
	if (!ret)
		ret = rotate(d, &s);
	if (!ret)
		ret = bitmaps_write(&s);
	bitmaps_free(&s);
	return ret;
}

/* A file without a name: it goes with the loop device, whatever happens. */
static int make_cow_file(struct disk *d, uint64_t size)
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

static int open_cow_device(struct disk *d, uint64_t size)
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

static int check_free(const struct disk *d)
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
static int open_disk(struct disk *d, struct live *l)
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

static int make_view(const struct disk *d, uint64_t sectors)
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

/*
 * The image for others
 */

struct shown {
	uint8_t *data;			/* a bit for each of its clusters */
	bool backing;
};

static void set_shown(struct shown *s, uint64_t from, uint64_t to)
{
	uint64_t c;

	for (c = from >> IMAGE_BITS; c <= (to - 1) >> IMAGE_BITS; c++)
		s->data[c / 8] |= 1 << c % 8;
}

static enum qcow2_state shown_state(void *arg, uint64_t cluster)
{
	const struct shown *s = arg;

	return s->data[cluster / 8] & 1 << cluster % 8 ? QCOW2_DATA : QCOW2_ZERO;
}

static int see_extent(const struct extent *e, void *arg)
{
	struct shown *s = arg;

	if (e->state == QCOW2_DATA ||
	    (e->state == QCOW2_UNALLOCATED && s->backing))
		set_shown(s, e->start, e->start + e->length);
	return 0;
}

/*
 * What is not data now was none then, unless it has been kept since: after the map, for what is kept
 * now may have become zero before the map was read.
 */
static int see_kept(const char *name, struct shown *s, uint64_t sectors)
{
	uint64_t at = 0, before, n;
	char text[80], *answer, *p, *end;
	int ret;

	while (at < sectors) {
		snprintf(text, sizeof(text), "view_map %" PRIu64 " %" PRIu64, at,
			 sectors - at);
		ret = dm_ask(name, text, &answer);
		if (ret)
			return fail(errno_to_exit(-ret),
				    "%s: cannot ask what its view keeps: %s; leave its table alone meanwhile, and try again",
				    esc(name), strerror(-ret));
		before = at;
		for (p = answer; *p; p = *end ? end + 1 + (end[1] == ' ') : end) {
			n = strtoull(p, &end, 10);
			if (end == p || !*end || n > sectors - at)
				break;
			if (*end == 'k')
				set_shown(s, at * SECTOR, (at + n) * SECTOR);
			at += n;
		}
		free(answer);
		if (at == before)
			return fail(EX_WRONG,
				    "%s: what its view keeps is not understood; use a newer qcow2setup",
				    esc(name));
	}
	return 0;
}

static int find_shown(const char *name, struct shown *s, uint64_t sectors,
		      bool *raw)
{
	struct image img = IMAGE_CLOSED;
	struct extents x = { .states_only = true, .fn = see_extent, .arg = s };
	struct qcow2_geometry g;
	int ret;

	ret = attach_live(&img, name, false);
	if (!ret)
		ret = image_geometry(&img, &g);
	*raw = !ret && img.h.autoclear & QCOW2_AUTOCLEAR_RAW_DATA;
	if (!ret && !*raw) {
		x.size = g.size;
		s->backing = img.h.backing_file.s;
		ret = image_walk(&img, &g, &x);
		if (!ret)
			ret = see_kept(name, s, sectors);
	}
	image_close(&img);
	return ret;
}

static int write_image(const struct disk *d, uint64_t sectors,
		       struct new_image *n)
{
	uint8_t *header = malloc(1UL << IMAGE_BITS);
	char data[160];
	int ret;

	if (!header)
		return fail_nomem();
	snprintf(data, sizeof(data), "/dev/mapper/%s", d->device);
	n->path = d->image;
	n->data_file = data;
	n->raw = true;
	n->fresh = true;
	n->dir = -1;
	ret = new_image_plan(n, sectors * SECTOR, IMAGE_BITS) ? 0 :
	      fail(EX_WRONG, "%s: is too large for an image of its view",
		   esc(d->name));
	n->fd = ret ? -1 : open(d->image, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
	if (!ret && n->fd < 0)
		ret = fail_errno("%s: cannot create it", esc(d->image));
	if (!ret && !new_image_header(n, header))
		ret = fail(EX_WRONG, "%s: is too long a name", esc(data));
	if (!ret)
		ret = new_image_write(n, header);
	if (n->fd >= 0)
		close(n->fd);
	free(header);
	return ret;
}

/* The bitmaps that have ended, so that others can read them along with it */
static int copy_bitmaps(const struct disk *d)
{
	struct image from = IMAGE_CLOSED, to = IMAGE_CLOSED;
	struct bitmaps source = { .img = NULL }, target = { .img = NULL };
	struct bitmap_reader reader = { .s = NULL };
	unsigned int i;
	int ret;

	ret = attach_live(&from, d->name, false);
	if (!ret)
		ret = image_geometry(&from, &from.geo);
	if (!ret)
		ret = bitmaps_load(&source, &from);
	if (!ret)
		ret = image_open_locked(&to, d->image, true);
	if (!ret)
		ret = image_geometry(&to, &to.geo);
	if (!ret)
		ret = image_load_tables(&to, true);
	if (!ret)
		ret = bitmaps_load(&target, &to);
	for (i = 0; !ret && i < d->r->bitmaps; i++) {
		const char *name = d->r->bitmap[i];

		ret = bitmap_reader_open(&reader, &source, name);
		if (!ret)
			ret = bitmaps_add(&target, name,
					  reader.b->head.granularity_bits, false);
		if (!ret)
			ret = bitmaps_set_from(&target, name, &reader);
		bitmap_reader_close(&reader);
	}
	to.space_kind = IMAGE_SPARSE;
	if (!ret)
		ret = bitmaps_write(&target);
	bitmaps_free(&source);
	bitmaps_free(&target);
	image_close(&from);
	image_close(&to);
	return ret;
}

static int make_image(const struct disk *d, uint64_t sectors)
{
	uint64_t clusters = ((sectors * SECTOR - 1) >> IMAGE_BITS) + 1;
	struct shown s = { .data = calloc(clusters / 8 + 1, 1) };
	struct new_image n = { .state = shown_state, .arg = &s };
	bool raw = false;
	int ret;

	if (!s.data)
		return fail_nomem();
	ret = find_shown(d->name, &s, sectors, &raw);
	if (raw)
		n.state = NULL;
	if (!ret)
		ret = write_image(d, sectors, &n);
	free(s.data);
	return !ret && d->r->bitmaps ? copy_bitmaps(d) : ret;
}

static int note_disk(struct disk *d)
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
	ret = write_notes(d->name, &n);
	d->noted = !ret;
	free(n.checkpoint);
	return ret;
}

static int tell_view(const struct disk *d, const char *text)
{
	int ret = dm_message(d->name, text);

	return ret ? fail(errno_to_exit(-ret),
			  "%s: cannot tell it what is not wanted: %s; leave its table alone meanwhile, and try again",
			  esc(d->name), strerror(-ret)) : 0;
}

/* Only what is dirty is wanted, in any of the bitmaps: whole granules that are not, are not. */
static int skip_clean(const struct disk *d, uint64_t sectors)
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

static int limit_view(const struct disk *d)
{
	char text[64];

	snprintf(text, sizeof(text), "view_limit %" PRIu64, d->r->most / SECTOR);
	return tell_view(d, text);
}

static int finish_disk(const struct disk *d, uint64_t sectors)
{
	int ret = d->r->most ? limit_view(d) : 0;

	if (!ret)
		ret = make_view(d, sectors);
	if (!ret && d->r->dirty_only)
		ret = skip_clean(d, sectors);
	return ret ? ret : make_image(d, sectors);
}

static int compare_order(const struct disk *a, const struct disk *b)
{
	return device_is_above(a->rdev, b->rdev) ? -1 :
	       device_is_above(b->rdev, a->rdev) ? 1 : 0;
}

/* What is on top of others comes first; they are few.  Nothing of them is open yet. */
static int sort_disks(struct disk *d, unsigned int n)
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
				struct disk disk = d[i];

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

static int begin(struct disk *d, struct live *l, struct change *c,
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
static void undo(const struct disk *d)
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
	struct disk *d = calloc(n, sizeof(*d));
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
		d[i] = (struct disk){
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
		char path[400];

		if (done[i]) {
			undo(d + i);
			continue;
		}
		notes_path(path, sizeof(path), d[i].name);
		if (d[i].noted)
			unlink(path);
	}
out:
	free(d);
	free(l);
	free(c);
	free(sectors);
	free(done);
	return ret;
}

/*
 * The end
 */

struct ending {
	const struct backup_notes *notes;
	bool merge;
};

static int merge_back(const struct ending *e, struct bitmaps *s)
{
	unsigned int i;
	int ret = 0;

	/* They change with the table: it was not begun. */
	if (!find_bitmap(s, e->notes->checkpoint))
		return 0;
	for (i = 0; !ret && i < e->notes->bitmaps; i++)
		ret = bitmaps_merge(s, e->notes->checkpoint, e->notes->bitmap[i]);
	return ret;
}

static int prepare_end(struct live *l, void *arg)
{
	struct ending *e = arg;
	struct image *img = &l->before;
	struct room room = { .quiet = true };
	uint64_t at, reftable;
	struct bitmaps s;
	int ret;

	ret = live_look(l, false);
	if (ret || !e->merge)
		return ret;
	img->node.path = l->name;
	ret = bitmaps_load(&s, img);
	if (!ret)
		ret = merge_back(e, &s);
	room.size = img->geo.size;
	room.more = bitmaps_need(&s);
	bitmaps_free(&s);
	return ret ? ret : image_take_room(img, &room, &at, &reftable);
}

static int apply_end(struct live *l, void *arg)
{
	struct ending *e = arg;
	struct bitmaps s;
	int ret;

	l->view = "";
	if (!e->merge)
		return 0;
	l->img.node.path = l->name;
	ret = bitmaps_load(&s, &l->img);
	if (!ret)
		ret = merge_back(e, &s);
	if (!ret)
		ret = bitmaps_write(&s);
	bitmaps_free(&s);
	return ret;
}

static int remove_view(const char *device)
{
	struct dm_dev_info info;
	char users[512];
	int ret;

	ret = dm_query(device, &info);
	if (ret || !info.exists)
		return ret;
	if (!starts_with(info.uuid, DM_UUID_VIEW_PREFIX))
		return fail(EX_WRONG,
			    "%s: not made by qcow2setup backup; rename it (dmsetup rename %s NEW), and try again",
			    esc(device), shell_quote(device));
	ret = dm_remove(device, false);
	if (ret != -EBUSY)
		return ret;
	if (!device_users(info.rdev, users, sizeof(users)))
		snprintf(users, sizeof(users), "somebody");
	return fail(EX_BUSY, "/dev/mapper/%s is in use: %s; end that, and try again",
		    esc(device), users);
}

static int switch_back(const char *name, struct ending *e)
{
	const struct change c = {
		.prepare = prepare_end, .apply = apply_end, .arg = e,
	};
	struct live l = LIVE_CLOSED;
	int ret;

	ret = live_open(&l, name, "backup");
	l.takes = e->merge;
	if (!ret && (l.table.f.view || e->merge))
		ret = live_change(&l, &c);
	live_close(&l);
	return ret;
}

/* It is closed, and its image's name is not known here. */
static int cannot_merge(const char *name, const struct backup_notes *n)
{
	char *words = NULL;
	unsigned int i;
	size_t size;
	FILE *f;
	int ret;

	f = open_memstream(&words, &size);
	if (!f)
		return fail_nomem();
	fprintf(f, "%s", shell_word(n->checkpoint, strlen(n->checkpoint)));
	for (i = 0; i < n->bitmaps; i++)
		fprintf(f, " %s", shell_word(n->bitmap[i], strlen(n->bitmap[i])));
	fclose(f);
	ret = fail(EX_WRONG,
		   "%s: is closed, and so its bitmaps cannot be put together; open it again, or do that in its image (qcow2setup bitmap merge IMAGE %s), and leave --failed out",
		   esc(name), words ? words : "");
	free(words);
	return ret;
}

int backup_end(const char *name, bool failed)
{
	char device[DM_NAME_MAX + 16], path[400];
	struct backup_notes notes;
	struct ending e = { .notes = &notes };
	struct dm_dev_info info;
	bool noted;
	int ret;

	noted = backup_notes_read(name, &notes);
	backup_device_name(device, sizeof(device), name);
	e.merge = failed && notes.checkpoint && notes.bitmaps;
	ret = dm_query(name, &info);
	if (!ret)
		ret = remove_view(device);
	if (ret)
		goto out;
	if (!info.exists && !noted)
		ret = dm_gone(name);
	else if (!info.exists && e.merge)
		ret = cannot_merge(name, &notes);
	else if (info.exists)
		ret = switch_back(name, &e);
	if (ret)
		goto out;
	if (notes.image && unlink(notes.image) && errno != ENOENT)
		warning("%s: cannot remove it: %s", esc(notes.image),
			strerror(errno));
	notes_path(path, sizeof(path), name);
	unlink(path);
out:
	backup_notes_free(&notes);
	return ret;
}
