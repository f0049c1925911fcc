// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * qcow2setup attach, detach: open and close a device as its line in /etc/qcow2tab has
 * it.  This is what systemd's services run (tools/systemd); both succeed if there is
 * nothing left to be done.
 */
#include <fcntl.h>
#include <string.h>

#include "commands/commands.h"
#include "lib/tabfile.h"
#include "lib/util.h"
#include "system/device.h"
#include "system/dm.h"
#include "system/node.h"

/* As open has it: the table of options asks for no more than the name. */
static const struct action open_action = { .name = "open", .handler = cmd_open };

struct wanted {
	const char *name;
	bool wrong;		/* its line has a mistake, which has been told */
};

/* Other lines are no concern of this one. */
static void tell(unsigned int line, const char *name, const char *why, void *arg)
{
	struct wanted *w = arg;

	if (strcmp(name, w->name))
		return;
	w->wrong = true;
	fail(EX_PARAMETER, "%s:%u: %s", tab_file(), line, why);
}

/* The initramfs may have opened it, or somebody has by hand. */
static int already_open(const struct tab_entry *e, const struct dm_dev_info *info)
{
	struct node image = NODE_CLOSED;
	bool same;
	int ret;

	ret = node_open(&image, AT_FDCWD, e->image, NODE_READ_ONLY);
	if (ret)
		return ret;
	same = device_made_of(info->uuid, &image);
	node_close(&image);
	if (!same)
		return device_name_taken(e->name, info->uuid);
	inform("%s: is open already", esc(e->name));
	return 0;
}

static int attach_entry(const struct tab_entry *e)
{
	char *args[] = { (char *)e->image, (char *)e->name, NULL };
	struct dm_dev_info info;
	struct options opt = { .data_file = e->data };
	int ret;

	ret = options_tab(&open_action, e, &opt);
	if (!ret)
		ret = dm_check(true);
	if (!ret)
		ret = dm_query(e->name, &info);
	if (ret)
		return ret;
	return info.exists ? already_open(e, &info) : cmd_open(&opt, args);
}

int cmd_attach(const struct options *opt, char **args)
{
	struct wanted wanted = { .name = args[0] };
	const struct tab_entry *e;
	char place[300];
	struct tab tab;
	int ret;

	(void)opt;
	ret = tab_load(&tab, tell, &wanted);
	if (ret)
		return ret;
	e = tab_find(&tab, args[0]);
	if (e) {
		snprintf(place, sizeof(place), "%s:%u", tab_file(), e->line);
		message_place = place;
		ret = attach_entry(e);
		message_place = NULL;
	} else if (wanted.wrong) {
		ret = EX_PARAMETER;
	} else {
		ret = fail(EX_PARAMETER,
			   "%s: is not in %s; add a line for it, or use qcow2setup open",
			   esc(args[0]), esc(tab_file()));
	}
	tab_free(&tab);
	return ret;
}

int cmd_detach(const struct options *opt, char **args)
{
	const char *name = device_name(args[0]);
	struct dm_dev_info info;
	int ret;

	ret = dm_check_name(name);
	if (!ret)
		ret = dm_check(false);
	if (!ret)
		ret = dm_query(name, &info);
	if (ret)
		return ret;
	if (info.exists)
		return cmd_close(opt, args);
	note("%s: is not open", esc(name));
	return 0;
}
