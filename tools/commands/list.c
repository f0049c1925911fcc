// SPDX-License-Identifier: GPL-2.0-or-later
/* qcow2setup list: the devices that are open, in a table. */
#include <string.h>

#include "commands/commands.h"
#include "lib/util.h"
#include "lib/words.h"
#include "stack/advice.h"
#include "stack/report.h"
#include "stack/report_table.h"

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

static const struct report_column columns[] = {
	{ "NAME", false, report_name_cell },
	{ "SIZE", true, report_size_cell },
	{ "ALLOCATED", true, allocated_cell },
	{ "MODE", false, mode_cell },
	{ "BITMAPS", true, bitmaps_cell },
	{ "BACKUP", false, backup_cell },
	{ "USERS", false, users_cell },
};

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
		ret = report_table(&list, columns, ARRAY_SIZE(columns));
	report_list_free(&list);
	return ret ? ret : wrong;
}
