// SPDX-License-Identifier: GPL-2.0-or-later
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>

#include "lib/util.h"
#include "stack/part.h"
#include "stack/report.h"
#include "system/live.h"

void report_free(struct report *r)
{
	while (r->below) {
		struct report *next = r->below;

		r->below = next->below;
		free(next);
	}
}

/* -ENXIO: it has gone, without a message; as of dm_params(). */
static int get_device(const char *name, struct report *r);

static int get_below(struct report *r)
{
	if (!r->table.f.backing_dev ||
	    !device_look_up(r->table.f.backing_dev, &r->backing) ||
	    !*r->backing.dm_name)
		return 0;
	r->below = calloc(1, sizeof(*r->below));
	if (!r->below)
		return fail_nomem();
	snprintf(r->below->name, sizeof(r->below->name), "%s",
		 r->backing.dm_name);
	return get_device(r->backing.dm_name, r->below);
}

static int get_device(const char *name, struct report *r)
{
	char *type, *params;
	uint64_t sectors;
	int ret;

	ret = dm_params(name, false, &type, &params, &sectors);
	if (ret)
		return ret;
	if (!strcmp(type, DM_TARGET)) {
		r->size = sectors * 512;
		r->has_table = target_parse_table(params, &r->table);
	}
	free(type);
	free(params);
	if (!r->has_table)
		return 0;
	device_look_up(r->table.metadata_dev, &r->metadata);
	device_look_up(r->table.data_dev, &r->data);
	ret = get_below(r);
	if (ret)
		return ret;

	ret = live_status(name, &r->status);
	r->has_status = !ret;
	return ret;
}

/* The metadata device, and what the file system of an image file has left */
static void get_room(struct report *r)
{
	struct statvfs fs;
	struct stat st;

	r->metadata_size = device_size(&r->metadata);
	if (!*r->metadata.file || stat(r->metadata.file, &st) ||
	    !S_ISREG(st.st_mode) || statvfs(r->metadata.file, &fs))
		return;
	r->has_room = true;
	r->sparse = (uint64_t)st.st_blocks * 512 < (uint64_t)st.st_size;
	r->room = (uint64_t)fs.f_bavail * fs.f_frsize;
}

/*
 * What is written is not asked for: a look must change nothing, and end also if the device
 * cannot write any more.
 */
static void get_usage(struct report *r, bool quick)
{
	struct part p = PART_CLOSED;

	r->usage = (struct image_usage){ .why = "not looked for" };
	if (quick)
		return;
	r->usage.why = "metadata device cannot be opened";
	if (!part_open(&p, r->table.metadata_dev, NODE_READ_ONLY))
		image_usage_read(&p.node, &r->usage);
	part_close(&p);
}

static int get_all_of(const struct report_wishes *w, struct report *r)
{
	char path[160];
	int ret = get_device(r->name, r);

	if (ret || !r->has_table)
		return ret;
	get_room(r);
	get_usage(r, w->quick);
	if (w->users) {
		snprintf(path, sizeof(path), "/dev/mapper/%s", r->name);
		users_find_device(r->info.rdev, path, &r->users);
	}
	return 0;
}

int report_get(const char *name, const struct report_wishes *w, struct report *r)
{
	int ret;

	*r = (struct report){ 0 };
	snprintf(r->name, sizeof(r->name), "%s", name);
	ret = dm_query(name, &r->info);
	if (ret)
		return ret;
	if (!r->info.exists)
		return fail(EX_WRONG, "/dev/mapper/%s is inactive; open it first",
			    esc(name));
	r->kind = device_kind(name, r->info.uuid, r->type, sizeof(r->type));
	if (r->kind == DEVICE_OTHER)
		return device_not_ours(name, r->kind, r->type, "");
	ret = get_all_of(w, r);
	if (ret == -ENXIO)
		return dm_gone(name);
	if (ret || r->has_table)
		return ret;
	return fail(EX_WRONG,
		    "%s: has no table, or one that is not understood; close it (%s %s), or use a newer qcow2setup",
		    esc(name), r->kind == DEVICE_OURS ?
		    "qcow2setup close" : "dmsetup remove",
		    shell_quote(name));
}

static int add_device(const char *name, void *arg)
{
	struct report_list *list = arg;
	struct report *r;
	struct dm_dev_info info;
	enum device_kind kind;
	char type[64];

	/* One that went meanwhile is no error. */
	if (dm_query(name, &info) || !info.exists)
		return 0;
	kind = device_kind(name, info.uuid, type, sizeof(type));
	if (kind == DEVICE_OTHER)
		return 0;
	r = reallocarray(list->r, list->n + 1, sizeof(*r));
	if (!r)
		return fail_nomem();
	list->r = r;
	r += list->n;
	memset(r, 0, sizeof(*r));
	snprintf(r->name, sizeof(r->name), "%s", name);
	r->info = info;
	r->kind = kind;
	list->n++;
	return 0;
}

static int by_name(const void *a, const void *b)
{
	const struct report *x = a, *y = b;

	return strcmp(x->name, y->name);
}

/*
 * Parsed lines hold pointers into themselves: fill the entries only when the
 * array does not move any more.
 */
int report_get_all(const struct report_wishes *w, struct report_list *list,
		   int *wrong)
{
	size_t i;
	int ret;

	*list = (struct report_list){ 0 };
	ret = dm_each(add_device, list);
	if (ret || !list->n)
		return ret;
	qsort(list->r, list->n, sizeof(*list->r), by_name);
	for (i = 0; i < list->n; i++) {
		ret = get_all_of(w, &list->r[i]);
		/* One that went meanwhile is no error, and not in the list. */
		if (ret == -ENXIO)
			list->r[i].gone = true;
		else if (ret)
			*wrong = ret;
	}
	return 0;
}

void report_list_free(struct report_list *list)
{
	size_t i;

	for (i = 0; i < list->n; i++)
		report_free(&list->r[i]);
	free(list->r);
	*list = (struct report_list){ 0 };
}
