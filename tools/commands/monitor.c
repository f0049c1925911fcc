// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * qcow2setup monitor: see to it that devices do not run out of room for metadata.
 *
 * The target raises an event when clusters get rare.  Then, and once in a while for
 * what makes no event (file systems that others fill), each device is looked at.  If
 * one is low, --extend-command makes what is below it larger, and "resize" with the
 * same size makes the room known to the target, or takes it in an image file.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/wait.h>
#include <unistd.h>

#include "commands/commands.h"
#include "lib/interrupt.h"
#include "lib/util.h"
#include "system/device.h"
#include "system/dm.h"
#include "system/events.h"
#include "system/live.h"
#include "system/room.h"
#include "system/target.h"

/* Between looks without an event, and until what did not help is tried again */
#define LOOK_MS		10000
#define AGAIN_MS	60000

/* What was said and done about a device that is low. */
struct low {
	struct low *next;
	char uuid[160];
	enum room_left said, acted;
	uint64_t length;		/* of the metadata device, when it was tried */
	uint64_t tried;			/* milliseconds; 0: never */
	bool there;
};

static struct low *lows;

/* One device, looked at */
struct look {
	const struct options *opt;
	const char *name;
	struct dm_dev_info info;
	struct target_status status;
	uint64_t sectors;
	struct device metadata;
	bool file;			/* the image is one, behind our loop device */
	enum room_left room;
	uint64_t length, more;		/* bytes */
};

/* The note of a device; @make: if there is none, a new one.  NULL: none. */
static struct low *low_of(const char *uuid, bool make)
{
	struct low *l;

	for (l = lows; l; l = l->next)
		if (!strcmp(l->uuid, uuid))
			return l;
	l = make ? calloc(1, sizeof(*l)) : NULL;
	if (!l)
		return NULL;
	snprintf(l->uuid, sizeof(l->uuid), "%s", uuid);
	l->next = lows;
	lows = l;
	return l;
}

static void forget(const char *uuid)
{
	struct low **p = &lows, *l;

	while (*p && strcmp((*p)->uuid, uuid))
		p = &(*p)->next;
	l = *p;
	if (l)
		*p = l->next;
	free(l);
}

/* Those that were not met in the last round are gone. */
static void forget_gone(void)
{
	struct low *l, *next;

	for (l = lows; l; l = next) {
		next = l->next;
		if (!l->there)
			forget(l->uuid);
		else
			l->there = false;
	}
}

static int judge(struct look *k)
{
	struct statvfs vfs;
	struct stat st;

	k->file = k->metadata.loop && k->metadata.ours && *k->metadata.file &&
		  !stat(k->metadata.file, &st) && S_ISREG(st.st_mode);
	k->length = k->file ? (uint64_t)st.st_size : device_size(&k->metadata);
	if (!k->file) {
		k->room = room_of_device(&k->status, k->length, &k->more);
		return 0;
	}
	if (statvfs(k->metadata.file, &vfs))
		return fail_errno("%s: cannot ask for the space of its file system",
				  esc(k->metadata.file));
	k->room = room_of_file(&k->status, st.st_size, st.st_blocks * 512ULL,
			       (uint64_t)vfs.f_bavail * vfs.f_frsize, &k->more);
	return 0;
}

/* All there is to know; -ENXIO: not one of ours that can run out of room */
static int look(struct look *k)
{
	char *type, *params, kind[64];
	struct target_table table;
	int ret;

	ret = dm_query(k->name, &k->info);
	if (ret)
		return ret;
	if (!k->info.exists || k->info.read_only || k->info.suspended ||
	    device_kind(k->name, k->info.uuid, kind, sizeof(kind)) != DEVICE_OURS)
		return -ENXIO;
	ret = dm_params(k->name, false, &type, &params, &k->sectors);
	if (ret)
		return ret;
	if (strcmp(type, DM_TARGET) || !target_parse_table(params, &table) ||
	    !device_look_up(table.metadata_dev, &k->metadata))
		ret = -ENXIO;
	free(type);
	free(params);
	if (!ret)
		ret = live_status(k->name, &k->status);
	return ret ? ret : judge(k);
}

/* Run @argv, with what it has to know in its environment; the exit status, or -1. */
static int run(const char *const argv[], const struct look *k)
{
	pid_t pid = fork();
	char more[32];
	int status;

	if (pid < 0)
		return -1;
	if (!pid) {
		events_let_signals();
		snprintf(more, sizeof(more), "%llu", (unsigned long long)k->more);
		if (setenv("QCOW2_NAME", k->name, 1) ||
		    setenv("QCOW2_MORE", more, 1) ||
		    setenv("QCOW2_DEVICE", k->file ? "" : k->metadata.node, 1) ||
		    setenv("QCOW2_FILE", k->file ? k->metadata.file : "", 1))
			_exit(127);
		execv(argv[0], (char **)argv);
		_exit(127);
	}
	while (waitpid(pid, &status, 0) < 0)
		if (errno != EINTR)
			return -1;
	return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

static void extend(const struct look *k)
{
	const char *argv[] = { "/bin/sh", "-c", k->opt->extend_command, NULL };
	int ret = run(argv, k);

	if (ret)
		warning("%s: the extend command has failed (status %d); run it by hand to see why",
			esc(k->name), ret);
}

/* The same size again: the target looks at its metadata device, a file gets space. */
static int take(const struct look *k)
{
	char path[160], size[32];
	const char *argv[] = { "/proc/self/exe", "resize", path, "--size", size, NULL };

	snprintf(path, sizeof(path), "/dev/mapper/%s", k->name);
	snprintf(size, sizeof(size), "%llu", (unsigned long long)k->sectors * 512);
	return run(argv, k);
}

static void say(const struct look *k)
{
	const char *what = k->file ? k->metadata.file : k->metadata.node;

	if (k->room == ROOM_OUT)
		warning("%s: no room for metadata is left, and writes fail: %s needs %s more",
			esc(k->name), esc(what), human_size(k->more));
	else
		warning("%s: room for metadata is low: %s needs %s more", esc(k->name),
			esc(what), human_size(k->more));
}

/*
 * A new table gives back a cluster or two, which are soon gone: it takes all that may
 * be needed, or a longer device.
 */
static bool room_again(const struct look *k, const struct low *l)
{
	return k->room == ROOM_ENOUGH && (!k->more || k->length > l->length);
}

/* Has it helped?  If not, what has to be done by hand is said once. */
static void see(struct look *k, struct low *l)
{
	uint64_t before = k->more;

	if (look(k))
		return;
	if (room_again(k, l)) {
		inform("%s: has room for metadata again", esc(k->name));
		forget(l->uuid);
	} else if (l->said != l->acted || k->more < before) {
		l->said = l->acted;
		warning("%s: room for metadata is still missing; enlarge %s, then run qcow2setup resize %s --size %llu",
			esc(k->name), k->file ? "its file system" : esc(k->metadata.node),
			shell_quote(k->name), (unsigned long long)k->sectors * 512);
	}
}

static int look_after(const char *name, void *arg)
{
	struct look k = { .opt = arg, .name = name };
	struct low *l;
	int ret;

	if (events_stop())
		return 0;
	ret = look(&k);
	l = low_of(k.info.uuid, !ret && k.room != ROOM_ENOUGH);
	if (l)
		l->there = true;
	/* One that cannot be looked at is no reason to leave the others alone. */
	if (ret || !l)
		return 0;
	if (k.room == ROOM_ENOUGH) {
		if (room_again(&k, l))
			forget(l->uuid);
		return 0;
	}
	if (l->tried && now_ms() - l->tried < AGAIN_MS && k.room <= l->acted)
		return 0;
	if (!l->tried)
		say(&k);
	l->tried = now_ms();
	l->acted = k.room;
	l->length = k.length;
	if (k.opt->extend_command && *k.opt->extend_command)
		extend(&k);
	take(&k);
	see(&k, l);
	return 0;
}

int cmd_monitor(const struct options *opt, char **args)
{
	int ret, fd;

	(void)args;
	ret = dm_check(false);
	if (ret)
		return ret;
	interrupt_catch();
	fd = events_open();
	if (fd < 0)
		return EX_WRONG;
	while (!ret && !events_stop()) {
		/* What happens while they are looked at is not missed. */
		ret = events_arm(fd);
		if (!ret)
			ret = dm_each(look_after, (void *)opt);
		if (ret || events_stop())
			break;
		forget_gone();
		ret = events_wait(fd, LOOK_MS);
	}
	close(fd);
	while (lows)
		forget(lows->uuid);
	return ret;
}
