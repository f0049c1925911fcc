// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * qcow2setup map: list the extents of an image.  Opens the image, or the
 * metadata device of an open one, and nothing else.
 *
 * What is printed is what qemu-img map prints, with two differences, since no
 * path of an image is followed.  What an image with a backing file does not
 * hold itself is one extent at depth 1 that is neither present, zero nor data:
 * what it reads as only the backing file knows.  And holes of the data file
 * are not looked for, which QEMU does in images whose metadata is sparse.
 */
#include <inttypes.h>
#include <libsmartcols.h>
#include <stdlib.h>
#include <string.h>

#include "commands/commands.h"
#include "image/bitmaps.h"
#include "image/extents.h"
#include "image/image.h"
#include "image/walk.h"
#include "lib/json.h"
#include "lib/util.h"
#include "stack/attach.h"
#include "stack/mapping.h"
#include "system/device.h"
#include "system/dm.h"

struct map {
	struct image img;
	struct qcow2_geometry g;
	bool backing, raw;
	/* With --bitmap: what is not printed yet, for it may be longer */
	struct bitmaps bitmaps;
	struct bitmap_reader reader;
	struct dirty_extent {
		uint64_t start, length;
		bool dirty, zero;
	} last;
	int (*print)(struct map *m, const struct dirty_extent *e);
	uint64_t printed;
	struct libscols_table *table;
	size_t rows;
};

/* Lines of a table that are formatted and kept at a time. */
#define TABLE_ROWS	1000

/* One extent a line, as qemu-img has it: it can be many of them. */
static int print_json(const struct extent *e, void *arg)
{
	struct map *m = arg;
	bool unallocated = e->state == QCOW2_UNALLOCATED;
	bool below = unallocated && m->backing;

	printf("%s{ \"start\": %" PRIu64 ", \"length\": %" PRIu64 ", \"depth\": %d, \"present\": %s, \"zero\": %s, \"data\": %s",
	       m->printed++ ? ",\n" : "", e->start, e->length, below,
	       unallocated ? "false" : "true",
	       e->state == QCOW2_ZERO || (unallocated && !below) ?
	       "true" : "false",
	       e->state == QCOW2_DATA ? "true" : "false");
	if (e->has_offset && !below)
		printf(", \"offset\": %" PRIu64, e->start);
	printf("}");
	return 0;
}

/* As qemu-img shows it over NBD: what is dirty is no data. */
static int print_dirty_json(struct map *m, const struct dirty_extent *e)
{
	printf("%s{ \"start\": %" PRIu64 ", \"length\": %" PRIu64 ", \"depth\": 0, \"present\": %s, \"zero\": %s, \"data\": %s",
	       m->printed++ ? ",\n" : "", e->start, e->length,
	       e->dirty ? "false" : "true", e->zero ? "true" : "false",
	       e->dirty ? "false" : "true");
	if (!e->dirty)
		printf(", \"offset\": %" PRIu64, e->start);
	printf("}");
	return 0;
}

static const char *state_name(enum qcow2_state state)
{
	switch (state) {
	case QCOW2_DATA:
		return "data";
	case QCOW2_ZERO:
		return "zero";
	default:
		return "unallocated";
	}
}

/* Columns are as wide as the size, so that all tables are alike. */
static int new_table(struct map *m)
{
	char size[24];
	int width;

	width = snprintf(size, sizeof(size), "%llu", m->g.size);
	if (width < (int)strlen("LENGTH"))
		width = strlen("LENGTH");
	scols_init_debug(0);
	m->table = scols_new_table();
	m->rows = 0;
	if (!m->table ||
	    !scols_table_new_column(m->table, "START", width,
				     SCOLS_FL_RIGHT | SCOLS_FL_STRICTWIDTH) ||
	    !scols_table_new_column(m->table, "LENGTH", width,
				     SCOLS_FL_RIGHT | SCOLS_FL_STRICTWIDTH) ||
	    !scols_table_new_column(m->table, "STATE", 0, 0))
		return fail_nomem();
	scols_table_enable_noheadings(m->table, m->printed > 0);
	return 0;
}

static int print_table(struct map *m)
{
	int ret = 0;

	if (m->table && m->rows)
		ret = scols_print_table(m->table);
	scols_unref_table(m->table);
	m->table = NULL;
	return ret ? fail_nomem() : 0;
}

static int add_row(struct map *m, uint64_t from, uint64_t bytes,
		   const char *state)
{
	struct libscols_line *line;
	char start[24], length[24];
	int ret = 0;

	if (m->table && m->rows == TABLE_ROWS)
		ret = print_table(m);
	if (!ret && !m->table)
		ret = new_table(m);
	if (ret)
		return ret;
	snprintf(start, sizeof(start), "%" PRIu64, from);
	snprintf(length, sizeof(length), "%" PRIu64, bytes);
	line = scols_table_new_line(m->table, NULL);
	if (!line || scols_line_set_data(line, 0, start) ||
	    scols_line_set_data(line, 1, length) ||
	    scols_line_set_data(line, 2, state))
		return fail_nomem();
	m->rows++;
	m->printed++;
	return 0;
}

static int print_row(const struct extent *e, void *arg)
{
	return add_row(arg, e->start, e->length, state_name(e->state));
}

static int print_dirty_row(struct map *m, const struct dirty_extent *e)
{
	return add_row(m, e->start, e->length,
		       e->dirty ? e->zero ? "dirty, zero" : "dirty" :
				  e->zero ? "clean, zero" : "clean");
}

/* What the bitmap says of one extent */
static int split_dirty(const struct extent *x, void *arg)
{
	struct map *m = arg;
	uint64_t at = x->start, stop = x->start + x->length, end;
	struct dirty_extent *last = &m->last;
	/* A raw data file has what it has where nothing is allocated, too. */
	bool zero = !m->raw && (x->state == QCOW2_ZERO ||
				(x->state == QCOW2_UNALLOCATED && !m->backing));
	bool dirty;
	int ret = 0;

	for (; !ret && at < stop; at = end) {
		ret = bitmap_reader_run(&m->reader, at, &dirty, &end);
		if (ret)
			break;
		end = min_u64(end, stop);
		if (last->length && dirty == last->dirty && zero == last->zero) {
			last->length += end - at;
			continue;
		}
		if (last->length)
			ret = m->print(m, last);
		*last = (struct dirty_extent){ at, end - at, dirty, zero };
	}
	return ret;
}

static int walk(struct map *m, struct extents *x)
{
	int ret = image_walk(&m->img, &m->g, x);

	if (!ret && m->last.length)
		ret = m->print(m, &m->last);
	return ret;
}

static int print_map(struct map *m, bool json)
{
	struct extents x = {
		.size = m->g.size, .states_only = !json || m->reader.b,
		.fn = json ? print_json : print_row, .arg = m,
	};
	struct json j;
	int ret;

	m->print = json ? print_dirty_json : print_dirty_row;
	if (m->reader.b)
		x.fn = split_dirty;

	/* If it ends with an error, the array does not end. */
	if (json) {
		json_start(&j, stdout);
		printf("[");
		ret = walk(m, &x);
		if (!ret) {
			printf("]");
			json_end(&j);
		}
		return ret;
	}
	ret = walk(m, &x);
	if (!ret)
		return print_table(m);
	scols_unref_table(m->table);
	return ret;
}

static int get_geometry(struct map *m)
{
	struct image *img = &m->img;
	enum qcow2_fault fault;

	fault = qcow2_header_check(&img->h.raw, true, &m->g);
	if (!fault)
		fault = qcow2_geometry_check(&m->g, img->node.size);
	if (fault == QCOW2_FAULT_NO_DATA_FILE || fault == QCOW2_FAULT_VERSION)
		return fail(EX_WRONG, "%s: %s; use qemu-img map %s",
			    esc(img->node.path), qcow2_fault_str(fault),
			    shell_quote(img->node.path));
	if (fault)
		return fail(EX_WRONG, "%s: %s; see what qcow2setup info %s says",
			    esc(img->node.path), qcow2_fault_str(fault),
			    shell_quote(img->node.path));
	m->backing = img->h.backing_file.s;
	m->raw = img->h.autoclear & QCOW2_AUTOCLEAR_RAW_DATA;
	return 0;
}

/* One that is not there, or not valid, is no empty bitmap. */
static int open_bitmap(struct map *m, const char *name)
{
	int ret;

	m->img.geo = m->g;
	ret = bitmaps_load(&m->bitmaps, &m->img);
	return ret ? ret : bitmap_reader_open(&m->reader, &m->bitmaps, name);
}

int cmd_map(const struct options *opt, char **args)
{
	struct map m = { .img = IMAGE_CLOSED };
	const char *live;
	char name[160];
	int ret;

	live = device_live_name(args[0], name, sizeof(name));
	if (live) {
		ret = dm_check_name(live);
		if (!ret)
			ret = dm_check(false);
		if (!ret)
			ret = attach_live(&m.img, live, opt->map_bitmap);
	} else {
		ret = image_open_locked(&m.img, args[0], false);
	}
	if (!ret)
		ret = get_geometry(&m);
	if (!ret && opt->map_bitmap)
		ret = open_bitmap(&m, opt->map_bitmap);
	if (!ret)
		ret = print_map(&m, opt->json);
	bitmap_reader_close(&m.reader);
	bitmaps_free(&m.bitmaps);
	image_close(&m.img);
	return ret;
}
