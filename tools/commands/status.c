// SPDX-License-Identifier: GPL-2.0-or-later
/* qcow2setup status: what is open, and how it does. */
#include <errno.h>
#include <inttypes.h>
#include <libsmartcols.h>
#include <stdlib.h>
#include <string.h>

#include "commands/commands.h"
#include "lib/json.h"
#include "lib/util.h"
#include "system/device.h"
#include "system/dm.h"
#include "system/live.h"
#include "system/target.h"

/* All that is known about one device. */
struct open_device {
	char name[128];
	struct dm_dev_info info;
	enum device_kind kind;
	char type[64];			/* of target */
	uint64_t size;			/* bytes */
	bool has_table, has_status;
	bool gone;			/* while we looked */
	struct target_table table;
	struct target_status status;
	struct device metadata, data, backing;
	struct open_device *below;	/* the backing device, if it is ours */
};

static void free_below(struct open_device *d)
{
	while (d->below) {
		struct open_device *next = d->below;

		d->below = next->below;
		free(next);
	}
}

/* -ENXIO: it has gone, without a message; as of dm_params(). */
static int get_device(const char *name, struct open_device *d);

static int get_below(struct open_device *d)
{
	if (!d->table.f.backing_dev ||
	    !device_look_up(d->table.f.backing_dev, &d->backing) ||
	    !*d->backing.dm_name)
		return 0;
	d->below = calloc(1, sizeof(*d->below));
	if (!d->below)
		return fail_nomem();
	snprintf(d->below->name, sizeof(d->below->name), "%s",
		 d->backing.dm_name);
	return get_device(d->backing.dm_name, d->below);
}

static int get_device(const char *name, struct open_device *d)
{
	char *type, *params;
	uint64_t sectors;
	int ret;

	ret = dm_params(name, false, &type, &params, &sectors);
	if (ret)
		return ret;
	if (!strcmp(type, DM_TARGET)) {
		d->size = sectors * 512;
		d->has_table = target_parse_table(params, &d->table);
	}
	free(type);
	free(params);
	if (!d->has_table)
		return 0;
	device_look_up(d->table.metadata_dev, &d->metadata);
	device_look_up(d->table.data_dev, &d->data);
	ret = get_below(d);
	if (ret)
		return ret;

	ret = live_status(name, &d->status);
	d->has_status = !ret;
	return ret;
}

/* The file behind a device, or the device itself. */
static const char *origin(const struct device *d)
{
	return d->file[0] ? d->file : d->node;
}

/* Who has made it */
static const char *maker(const struct open_device *d)
{
	return d->kind == DEVICE_OURS ? "qcow2setup" : "dmsetup";
}

static const char *mode(const struct open_device *d)
{
	return d->has_status ? d->status.mode : "unknown";
}

/*
 * Names of numbers in both kinds of output.  Blanks in one are dashes in the
 * other, as in those of qemu-img.
 */
struct number {
	const char *name;
	uint64_t value;
	unsigned int given;		/* what must be, for there to be one */
};

#define MAX_NUMBERS	20

static size_t numbers(const struct target_status *s, struct number *n)
{
	const struct number list[MAX_NUMBERS] = {
		{ "l2-tables", s->l2_tables, 0 },
		{ "l1-entries", s->l1_entries, 0 },
		{ "slices-cached", s->slices_cached, 0 },
		{ "state-bytes", s->state_bytes, 0 },
		{ "dirty-slices", s->dirty_slices, 0 },
		{ "hits", s->hits, 0 },
		{ "misses", s->misses, 0 },
		{ "first-writes", s->first_writes, 0 },
		{ "commits", s->commits, 0 },
		{ "drops", s->drops, 0 },
		{ "refused", s->refused, 0 },
		{ "unwritten", s->unwritten, STATUS_UNWRITTEN },
		{ "free-clusters", s->free_clusters, STATUS_FREE_CLUSTERS },
		{ "trims", s->trims, STATUS_TRIMS },
		{ "bitmaps", s->bitmaps, STATUS_BITMAPS },
		{ "exact-granules", s->exact_granules, STATUS_EXACT_GRANULES },
		{ "durable-granules", s->durable_granules,
		  STATUS_DURABLE_GRANULES },
		{ "mark-waits", s->mark_waits, STATUS_MARK_WAITS },
		{ "taken-back", s->taken_back, STATUS_TAKEN_BACK },
	};
	size_t i, count = 0;

	for (i = 0; i < MAX_NUMBERS && list[i].name; i++)
		if ((s->given & list[i].given) == list[i].given)
			n[count++] = list[i];
	return count;
}

/* What a device reads below it, and so on down. */
static void print_json_backing(struct json *j, const struct open_device *d)
{
	if (!d->table.f.backing_dev)
		return;
	json_object(j, "backing");
	json_string(j, "device", d->backing.node);
	if (d->below && d->below->has_table) {
		json_string(j, "filename", origin(&d->below->metadata));
		json_string(j, "data-file", origin(&d->below->data));
		json_number(j, "virtual-size", d->below->size);
		print_json_backing(j, d->below);
	} else {
		json_string(j, "filename", origin(&d->backing));
	}
	json_object_end(j);
}

static void print_json(struct json *j, const struct open_device *d)
{
	struct number n[MAX_NUMBERS];
	char path[160];
	size_t count, i;
	unsigned int f;

	json_object(j, NULL);
	json_version(j);
	json_string(j, "name", d->name);
	snprintf(path, sizeof(path), "/dev/mapper/%s", d->name);
	json_string(j, "device", path);
	json_string(j, "uuid", d->info.uuid);
	json_string(j, "made-by", maker(d));
	json_number(j, "virtual-size", d->size);
	json_string(j, "mode", mode(d));
	json_bool(j, "read-only", d->info.read_only);
	json_bool(j, "suspended", d->info.suspended);
	json_number(j, "open-count", d->info.open_count);
	if (d->has_table) {
		json_number(j, "cluster-size", 1ULL << d->table.cluster_bits);
		json_number(j, "refcount-bits", 1ULL << d->table.refcount_order);
		json_string(j, "filename", origin(&d->metadata));
		json_string(j, "data-file", origin(&d->data));
		json_bool(j, "data-file-raw", d->table.f.data_file_raw);
		json_string(j, "metadata-device", d->metadata.node);
		json_string(j, "data-device", d->data.node);
		json_bool(j, "extended-l2", d->table.f.extended_l2);
		json_bool(j, "no-discard-passdown",
			  d->table.f.no_discard_passdown);
		if (d->table.f.cache_limit)
			json_number(j, "cache-limit", d->table.f.cache_limit);
		print_json_backing(j, d);
		json_array(j, "features");
		for (f = 0; f < d->table.f.count; f++)
			json_string(j, NULL, d->table.f.name[f]);
		json_array_end(j);
	}
	if (d->has_status) {
		json_object(j, "statistics");
		count = numbers(&d->status, n);
		for (i = 0; i < count; i++)
			json_number(j, n[i].name, n[i].value);
		json_object_end(j);
	}
	json_object_end(j);
}

static void print_path(const char *what, const struct device *d)
{
	printf("  %-15s", what);
	put_escaped(stdout, origin(d), strlen(origin(d)));
	if (d->file[0])
		printf(" (%s)", esc(d->node));
	putchar('\n');
}

/* One line for each that is below, from top to bottom. */
static void print_backing(const struct open_device *d)
{
	for (; d && d->table.f.backing_dev; d = d->below) {
		if (!d->below || !d->below->has_table) {
			print_path("backing:", &d->backing);
			continue;
		}
		printf("  backing:       %s (%s), data ",
		       esc(origin(&d->below->metadata)),
		       esc(d->backing.node));
		put_escaped(stdout, origin(&d->below->data),
			    strlen(origin(&d->below->data)));
		putchar('\n');
	}
}

static void print_options(const struct target_features *f)
{
	printf("  data file raw: %s\n", f->data_file_raw ? "yes" : "no");
	if (f->extended_l2)
		puts("  extended L2:   yes");
	if (f->no_discard_passdown)
		puts("  discards:      not passed down");
	if (f->cache_limit)
		printf("  cache limit:   %s\n", human_size(f->cache_limit));
}

/* What is wrong with the metadata, and what can be done about it. */
static void print_trouble(const struct open_device *d)
{
	const struct target_status *s = &d->status;
	/* Only what open has made gets longer with its file. */
	const char *file = d->metadata.ours ? d->metadata.file : "";

	if (!strcmp(s->mode, "nospc"))
		printf("  There is no space for metadata that waits to be written: free some where %s is.\n"
		       "  It is written then by itself; until then flushes fail.\n",
		       esc(origin(&d->metadata)));
	else if (s->unwritten)
		printf("  Metadata could not be written, and waits to be written again: see dmesg for what\n"
		       "  is wrong with %s. Until then flushes fail; do not remove the device.\n",
		       esc(origin(&d->metadata)));
	if (s->refused)
		printf("  The space for metadata is used up, and writes were refused: %s %s%s,\n"
		       "  then let the device use it: qcow2setup resize %s --size %" PRIu64 "\n",
		       *file ? "free some where" : "enlarge",
		       esc(*file ? file : d->metadata.node),
		       *file ? " is" : "", esc(d->name), d->size);
}

static void print_text(const struct open_device *d)
{
	struct number n[MAX_NUMBERS];
	size_t count, i;

	printf("/dev/mapper/%s is active%s%s.\n", esc(d->name),
	       d->info.open_count ? " and is in use" : "",
	       d->info.suspended ? ", but suspended" : "");
	if (d->kind != DEVICE_OURS)
		printf("  made by:       dmsetup: no lock keeps QEMU from the image, and its bitmaps are\n"
		       "                 not looked after; remove it with dmsetup remove %s\n",
		       shell_quote(d->name));
	printf("  mode:          %s\n", mode(d));
	printf("  size:          %s (%" PRIu64 " bytes)\n",
	       human_size(d->size), d->size);
	if (d->has_table) {
		printf("  cluster size:  %s\n",
		       human_size(1ULL << d->table.cluster_bits));
		print_path("image:", &d->metadata);
		print_path("data:", &d->data);
		print_backing(d);
		print_options(&d->table.f);
	}
	if (!d->has_status)
		return;
	count = numbers(&d->status, n);
	for (i = 0; i < count; i++) {
		char label[32], *p;

		snprintf(label, sizeof(label), "%s:", n[i].name);
		for (p = label; *p; p++)
			if (*p == '-')
				*p = ' ';
		printf("  %-14s %" PRIu64 "\n", label, n[i].value);
	}
	print_trouble(d);
}

/* All devices, as they are found. */
struct list {
	struct open_device *d;
	size_t n;
};

static int add_device(const char *name, void *arg)
{
	struct list *list = arg;
	struct open_device *d;
	struct dm_dev_info info;
	enum device_kind kind;
	char type[64];

	/* One that went meanwhile is no error. */
	if (dm_query(name, &info) || !info.exists)
		return 0;
	kind = device_kind(name, info.uuid, type, sizeof(type));
	if (kind == DEVICE_OTHER)
		return 0;
	d = reallocarray(list->d, list->n + 1, sizeof(*d));
	if (!d)
		return fail_nomem();
	list->d = d;
	d += list->n;
	memset(d, 0, sizeof(*d));
	snprintf(d->name, sizeof(d->name), "%s", name);
	d->info = info;
	d->kind = kind;
	list->n++;
	return 0;
}

static int by_name(const void *a, const void *b)
{
	const struct open_device *x = a, *y = b;

	return strcmp(x->name, y->name);
}

/*
 * Parsed lines hold pointers into themselves: fill the entries only when the
 * array does not move any more.  One that cannot be understood does not keep the
 * others from being shown: that is @wrong, an exit code.
 */
static int get_list(struct list *list, int *wrong)
{
	size_t i;
	int ret;

	ret = dm_each(add_device, list);
	if (ret || !list->n)
		return ret;
	qsort(list->d, list->n, sizeof(*list->d), by_name);
	for (i = 0; i < list->n; i++) {
		ret = get_device(list->d[i].name, &list->d[i]);
		/* One that went meanwhile is no error, and not in the list. */
		if (ret == -ENXIO)
			list->d[i].gone = true;
		else if (ret)
			*wrong = ret;
	}
	return 0;
}

static int set_cell(struct libscols_line *line, size_t column, const char *s)
{
	return scols_line_set_data(line, column, s);
}

static int fill_line(struct libscols_table *table, const struct open_device *d)
{
	struct libscols_line *line = scols_table_new_line(table, NULL);
	char cluster[32];

	if (!line)
		return -1;
	snprintf(cluster, sizeof(cluster), "%s", d->has_table ?
		 human_size(1ULL << d->table.cluster_bits) : "");
	/* libsmartcols escapes what it prints, in the same manner. */
	return set_cell(line, 0, d->name) ||
	       set_cell(line, 1, human_size(d->size)) ||
	       set_cell(line, 2, mode(d)) ||
	       set_cell(line, 3, cluster) ||
	       set_cell(line, 4, origin(&d->metadata)) ||
	       set_cell(line, 5, origin(&d->data)) ||
	       set_cell(line, 6, maker(d));
}

static int print_table(const struct list *list)
{
	static const struct {
		const char *name;
		int flags;
	} columns[] = {
		{ "NAME", 0 }, { "SIZE", SCOLS_FL_RIGHT }, { "MODE", 0 },
		{ "CLUSTER", SCOLS_FL_RIGHT }, { "IMAGE", 0 }, { "DATA", 0 },
		{ "MADE-BY", 0 },
	};
	struct libscols_table *table;
	size_t i;
	int ret = 0;

	if (!list->n)
		return 0;
	scols_init_debug(0);
	table = scols_new_table();
	if (!table)
		return fail_nomem();
	for (i = 0; !ret && i < ARRAY_SIZE(columns); i++)
		ret = !scols_table_new_column(table, columns[i].name, 0,
					      columns[i].flags);
	for (i = 0; !ret && i < list->n; i++)
		if (!list->d[i].gone)
			ret = fill_line(table, &list->d[i]);
	if (!ret)
		ret = scols_print_table(table);
	scols_unref_table(table);
	return ret ? fail_nomem() : 0;
}

static int status_all(const struct options *opt)
{
	struct list list = { 0 };
	struct json j;
	int ret, wrong = 0;
	size_t i;

	ret = get_list(&list, &wrong);
	if (!ret && opt->json) {
		json_start(&j, stdout);
		json_array(&j, NULL);
		for (i = 0; i < list.n; i++)
			if (!list.d[i].gone)
				print_json(&j, &list.d[i]);
		json_array_end(&j);
		json_end(&j);
	} else if (!ret) {
		ret = print_table(&list);
	}
	for (i = 0; i < list.n; i++)
		free_below(&list.d[i]);
	free(list.d);
	return ret ? ret : wrong;
}

static int status_one(const struct options *opt, const char *name)
{
	struct open_device d = { 0 };
	struct json j;
	int ret;

	snprintf(d.name, sizeof(d.name), "%s", name);
	ret = dm_query(name, &d.info);
	if (ret)
		return ret;
	if (!d.info.exists)
		return fail(EX_WRONG, "/dev/mapper/%s is inactive; open it first",
			    esc(name));
	d.kind = device_kind(name, d.info.uuid, d.type, sizeof(d.type));
	if (d.kind == DEVICE_OTHER)
		return device_not_ours(name, d.kind, d.type, "");
	ret = get_device(name, &d);
	if (ret == -ENXIO)
		ret = dm_gone(name);
	if (!ret && !d.has_table)
		ret = fail(EX_WRONG,
			   "%s: has no table, or one that is not understood; close it (%s %s), or use a newer qcow2setup",
			   esc(name), d.kind == DEVICE_OURS ?
			   "qcow2setup close" : "dmsetup remove",
			   shell_quote(name));
	if (!ret && opt->json) {
		json_start(&j, stdout);
		print_json(&j, &d);
		json_end(&j);
	} else if (!ret) {
		print_text(&d);
	}
	free_below(&d);
	return ret;
}

int cmd_status(const struct options *opt, char **args)
{
	int ret;

	ret = args[0] ? dm_check_name(device_name(args[0])) : 0;
	if (!ret)
		ret = dm_check(false);
	if (ret)
		return ret;
	return args[0] ? status_one(opt, device_name(args[0])) :
			 status_all(opt);
}
