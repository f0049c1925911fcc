// SPDX-License-Identifier: GPL-2.0-or-later
/* The image over a view, for other people's programs */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "image/make.h"
#include "image/walk.h"
#include "lib/util.h"
#include "stack/attach.h"
#include "stack/backup_parts.h"
#include "stack/mapping.h"

/* As few tables as can be */
#define IMAGE_BITS	21

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
	struct qcow2_geometry g = { 0 };
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

static int write_image(const struct backup_disk *d, uint64_t sectors,
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
static int copy_bitmaps(const struct backup_disk *d)
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

int backup_make_image(const struct backup_disk *d, uint64_t sectors)
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
