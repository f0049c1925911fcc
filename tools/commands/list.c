// SPDX-License-Identifier: GPL-2.0-or-later
/* qcow2setup list: the devices that are open, in a table. */
#include <libsmartcols.h>
#include <string.h>

#include "commands/commands.h"
#include "lib/util.h"
#include "lib/words.h"
#include "stack/advice.h"
#include "stack/report.h"

/* So many users are named, and the others are counted. */
#define NAMED_USERS	3

static void allocated_cell(char *out, size_t size, const struct report *r)
{
	if (r->usage.known)
		snprintf(out, size, "%s (%s)", human_size(r->usage.data),
			 human_share(r->usage.data, r->size));
	else
		snprintf(out, size, "?");
}

static void mode_cell(char *out, size_t size, const struct report *r)
{
	snprintf(out, size, "%s%s%s", health_name(report_health(r)),
		 r->info.suspended ? ",suspended" : "",
		 r->info.deferred ? ",deferred" : "");
}

/* How many record, of how many there are */
static void bitmaps_cell(char *out, size_t size, const struct report *r)
{
	unsigned int kept = r->status.given & STATUS_BITMAPS ?
		r->status.bitmaps : 0;

	if (!r->usage.has_header)
		snprintf(out, size, "%u/?", kept);
	else if (r->usage.bitmaps)
		snprintf(out, size, "%u/%u", kept, r->usage.bitmaps);
	else
		snprintf(out, size, "-");
}

static void backup_cell(char *out, size_t size, const struct report *r)
{
	snprintf(out, size, "%s", !r->status.view ? "-" :
		 !strcmp(r->status.view, "valid") ? "valid" : "over");
}

static void users_cell(char *out, size_t size, const struct report *r)
{
	const struct users *users = &r->users;
	unsigned int i, named = min_u64(users->n, NAMED_USERS);
	unsigned int others = users->n - named + users->more;
	size_t n = 0;

	*out = 0;
	for (i = 0; i < named && n < size - 1; i++) {
		const struct user *u = &users->u[i];
		char pid[16] = "";

		if (u->pid)
			snprintf(pid, sizeof(pid), "(%d)", u->pid);
		n += snprintf(out + n, size - n, "%s%s%s", i ? "," : "",
			      u->kind == USER_MOUNT ? u->on :
			      u->kind == USER_SWAP ? "swap" : u->name, pid);
	}
	if (others && n < size - 1)
		snprintf(out + n, size - n, ",+%u", others);
	/* Somebody has it, and cannot be seen from here. */
	if (!users->n)
		snprintf(out, size, r->info.open_count > 0 ? "?" : "-");
}

static int fill_line(struct libscols_table *table, const struct report *r)
{
	struct libscols_line *line = scols_table_new_line(table, NULL);
	char allocated[80], mode[64], bitmaps[32], backup[16], users[600];

	if (!line)
		return -1;
	allocated_cell(allocated, sizeof(allocated), r);
	mode_cell(mode, sizeof(mode), r);
	bitmaps_cell(bitmaps, sizeof(bitmaps), r);
	backup_cell(backup, sizeof(backup), r);
	users_cell(users, sizeof(users), r);
	/* libsmartcols escapes what it prints. */
	return scols_line_set_data(line, 0, r->name) ||
	       scols_line_set_data(line, 1, human_size(r->size)) ||
	       scols_line_set_data(line, 2, allocated) ||
	       scols_line_set_data(line, 3, mode) ||
	       scols_line_set_data(line, 4, bitmaps) ||
	       scols_line_set_data(line, 5, backup) ||
	       scols_line_set_data(line, 6, users);
}

static int print_table(const struct report_list *list)
{
	static const struct {
		const char *name;
		int flags;
	} columns[] = {
		{ "NAME", 0 }, { "SIZE", SCOLS_FL_RIGHT },
		{ "ALLOCATED", SCOLS_FL_RIGHT }, { "MODE", 0 },
		{ "BITMAPS", SCOLS_FL_RIGHT }, { "BACKUP", 0 },
		{ "USERS", 0 },
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
		if (!list->r[i].gone)
			ret = fill_line(table, &list->r[i]);
	if (!ret)
		ret = scols_print_table(table);
	scols_unref_table(table);
	return ret ? fail_nomem() : 0;
}

int cmd_list(const struct options *opt, char **args)
{
	const struct report_wishes wishes = {
		.quick = opt->quick, .users = true,
	};
	struct report_list list;
	int ret, wrong = 0;

	(void)args;
	ret = dm_check(false);
	if (ret)
		return ret;
	ret = report_get_all(&wishes, &list, &wrong);
	if (!ret && opt->json)
		report_json_all(&list);
	else if (!ret)
		ret = print_table(&list);
	report_list_free(&list);
	return ret ? ret : wrong;
}
