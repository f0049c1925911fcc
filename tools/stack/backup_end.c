// SPDX-License-Identifier: GPL-2.0-or-later
/* Backups end: the view goes, and if they have failed, no bitmap forgets anything. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "lib/util.h"
#include "stack/backup_parts.h"
#include "stack/change.h"
#include "system/device.h"
#include "system/live.h"

struct ending {
	const struct backup_notes *notes;
	bool merge;
};

static int merge_back(struct bitmaps *s, void *arg)
{
	const struct ending *e = arg;
	unsigned int i;
	int ret = 0;

	/* They change with the table: it was not begun. */
	if (!bitmaps_find(s, e->notes->checkpoint))
		return 0;
	for (i = 0; !ret && i < e->notes->bitmaps; i++)
		ret = bitmaps_merge(s, e->notes->checkpoint, e->notes->bitmap[i]);
	return ret;
}

static int prepare_end(struct live *l, void *arg)
{
	const struct ending *e = arg;
	int ret;

	ret = live_look(l, false);
	return ret || !e->merge ? ret :
	       live_prepare_bitmaps(l, true, merge_back, arg);
}

static int apply_end(struct live *l, void *arg)
{
	const struct ending *e = arg;

	l->view = "";
	return e->merge ? live_apply_bitmaps(l, merge_back, arg) : 0;
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
	char device[DM_NAME_MAX + 16];
	struct backup_notes notes;
	struct ending e = { .notes = &notes };
	struct dm_dev_info info;
	bool noted;
	int ret;

	ret = dm_check(false);
	if (ret)
		return ret;
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
	backup_notes_remove(name);
out:
	backup_notes_free(&notes);
	return ret;
}
