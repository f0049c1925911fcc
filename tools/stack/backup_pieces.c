// SPDX-License-Identifier: GPL-2.0-or-later
/* What there is to be copied of a backup that is under way */
#include <errno.h>
#include <string.h>

#include "image/walk.h"
#include "lib/interrupt.h"
#include "lib/util.h"
#include "stack/backup_parts.h"
#include "stack/mapping.h"
#include "system/live.h"

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

int union_open(struct union_reader *u, const struct bitmaps *s,
	       const char *const *name, unsigned int n)
{
	int ret = 0;

	while (!ret && u->n < n) {
		ret = bitmap_reader_open(&u->reader[u->n], s, name[u->n]);
		u->n++;
	}
	return ret;
}

int union_run(struct union_reader *u, uint64_t at, bool *dirty, uint64_t *end)
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

void union_close(struct union_reader *u)
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
