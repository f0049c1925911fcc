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
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <libsmartcols.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "commands/commands.h"
#include "image/extents.h"
#include "image/image.h"
#include "lib/util.h"
#include "stack/mapping.h"
#include "system/device.h"
#include "system/dm.h"
#include "system/live.h"
#include "system/target.h"

struct map {
	struct image img;
	struct qcow2_geometry g;
	bool backing;
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

static int add_row(const struct extent *e, void *arg)
{
	struct map *m = arg;
	struct libscols_line *line;
	char start[24], length[24];
	int ret = 0;

	if (m->table && m->rows == TABLE_ROWS)
		ret = print_table(m);
	if (!ret && !m->table)
		ret = new_table(m);
	if (ret)
		return ret;
	snprintf(start, sizeof(start), "%" PRIu64, e->start);
	snprintf(length, sizeof(length), "%" PRIu64, e->length);
	line = scols_table_new_line(m->table, NULL);
	if (!line || scols_line_set_data(line, 0, start) ||
	    scols_line_set_data(line, 1, length) ||
	    scols_line_set_data(line, 2, state_name(e->state)))
		return fail_nomem();
	m->rows++;
	m->printed++;
	return 0;
}

static int bad_entry(const struct map *m, uint64_t l1, int64_t l2,
		     enum qcow2_fault fault)
{
	char where[48] = "";

	if (l2 >= 0)
		snprintf(where, sizeof(where), ", L2 entry %" PRId64, l2);
	return fail(EX_WRONG,
		    "%s: corrupt image: L1 entry %" PRIu64 "%s: %s; see what qcow2setup check says",
		    esc(m->img.node.path), l1, where, qcow2_fault_str(fault));
}

static int read_failed(const struct map *m, int err)
{
	errno = -err;
	return fail_errno("%s: cannot read its metadata",
			  esc(m->img.node.path));
}

/* Hand all of the disk to @x. */
static int walk(struct map *m, struct extents *x)
{
	const struct qcow2_geometry *g = &m->g;
	uint64_t tables = qcow2_l1_entries_needed(g), i, entry, off;
	uint64_t cs = 1ULL << g->cluster_bits;
	__be64 *l1 = malloc(tables * 8);
	void *l2 = malloc(cs);
	enum qcow2_fault fault;
	uint32_t bad;
	int ret;

	if (!l1 || !l2) {
		ret = fail_nomem();
		goto out;
	}
	ret = node_read(&m->img.node, l1, tables * 8, g->l1_offset);
	if (ret) {
		ret = read_failed(m, ret);
		goto out;
	}
	for (i = 0; i < tables && !x->ret; i++) {
		entry = be64_to_cpu(l1[i]);
		off = entry & QCOW2_OFFSET_MASK;
		fault = qcow2_l1_check(entry, g->cluster_bits,
				       m->img.node.size);
		if (!fault && off && qcow2_in_fixed_area(g, off))
			fault = QCOW2_FAULT_ENTRY_OVERLAP;
		if (fault) {
			ret = bad_entry(m, i, -1, fault);
			goto out;
		}
		if (!off) {
			extents_add(x, 1ULL << qcow2_l2_cover_bits(g),
				    QCOW2_UNALLOCATED, false);
			continue;
		}
		ret = node_read(&m->img.node, l2, cs, off);
		if (ret) {
			ret = read_failed(m, ret);
			goto out;
		}
		fault = extents_add_l2(x, g, l2, &bad);
		if (fault) {
			ret = bad_entry(m, i, bad, fault);
			goto out;
		}
	}
	ret = extents_end(x);
out:
	free(l1);
	free(l2);
	return ret;
}

static int print_map(struct map *m, bool json)
{
	struct extents x = {
		.size = m->g.size, .states_only = !json,
		.fn = json ? print_json : add_row, .arg = m,
	};
	int ret;

	/* If it ends with an error, the array does not end. */
	if (json) {
		printf("[");
		ret = walk(m, &x);
		if (!ret)
			puts("]");
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
	return 0;
}

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

/*
 * The metadata of a device that is open.  The kernel goes on writing it, but
 * an entry is never half written, and no L2 table moves or goes.
 */
static int open_live(struct map *m, const char *name)
{
	struct dm_dev_info info;
	struct target_table table;
	struct device metadata;
	char *type = NULL, *params = NULL;
	enum device_kind kind;
	struct node node;
	uint64_t sectors;
	bool known;
	char number[32], target[64];
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
	if (!known || !device_look_up(table.metadata_dev, &metadata))
		return fail(EX_WRONG,
			    "%s: table is not understood; use a newer qcow2setup",
			    esc(name));

	/* Never through a file: what is live is what the device shows. */
	ret = node_open(&node, AT_FDCWD, metadata.node, NODE_READ_ONLY);
	snprintf(number, sizeof(number), "%u:%u", major(node.rdev),
		 minor(node.rdev));
	if (!ret && (!node.bdev || strcmp(number, table.metadata_dev)))
		ret = fail(EX_WRONG,
			   "%s: is not the device %s that it should be; run udevadm settle and try again",
			   esc(metadata.node), table.metadata_dev);
	if (ret) {
		node_close(&node);
		return ret;
	}
	node.path = name;
	return image_attach(&m->img, &node);
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
			ret = open_live(&m, live);
	} else {
		ret = image_open_locked(&m.img, args[0], false);
	}
	if (!ret)
		ret = get_geometry(&m);
	if (!ret)
		ret = print_map(&m, opt->json);
	image_close(&m.img);
	return ret;
}
