// SPDX-License-Identifier: GPL-2.0-or-later
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "lib/util.h"
#include "stack/advice.h"
#include "system/room.h"
#include "system/udev.h"

enum health report_health(const struct report *r)
{
	const char *mode = r->has_status ? r->status.mode : "";

	if (!strcmp(mode, "rw"))
		return HEALTH_RW;
	if (!strcmp(mode, "nospc"))
		return HEALTH_NOSPC;
	if (!strcmp(mode, "fail"))
		return HEALTH_FAIL;
	if (!strcmp(mode, "ro"))
		return r->status.f.read_only ? HEALTH_READ_ONLY : HEALTH_CORRUPT;
	return HEALTH_UNKNOWN;
}

const char *health_name(enum health health)
{
	static const char * const names[] = {
		[HEALTH_RW] = "rw", [HEALTH_READ_ONLY] = "read-only",
		[HEALTH_CORRUPT] = "corrupt", [HEALTH_NOSPC] = "nospc",
		[HEALTH_FAIL] = "fail", [HEALTH_UNKNOWN] = "unknown",
	};

	return names[health];
}

const char *health_text(enum health health)
{
	static const char * const texts[] = {
		[HEALTH_RW] = "rw",
		[HEALTH_READ_ONLY] = "ro, it was opened read-only",
		[HEALTH_CORRUPT] = "ro, the metadata is corrupt, and nothing is written any more",
		[HEALTH_NOSPC] = "nospc, there is no space for more metadata",
		[HEALTH_FAIL] = "fail, a flush failed, and what was written last may be lost",
		[HEALTH_UNKNOWN] = "unknown",
	};

	return texts[health];
}

uint64_t report_tables_to_come(const struct report *r)
{
	uint64_t needed;

	if (!r->has_table || !r->has_status || r->status.f.read_only)
		return 0;
	/* What an L2 table covers: a cluster of entries, each of which stands for a cluster. */
	needed = div_up(r->size, 1ULL << (2 * r->table.cluster_bits - 3 -
					  r->table.f.extended_l2));
	return needed > r->status.l2_tables ? needed - r->status.l2_tables : 0;
}

uint64_t report_free_clusters(const struct report *r)
{
	return room_free(&r->status, r->metadata_size);
}

bool report_short_of_metadata(const struct report *r)
{
	return r->status.given & STATUS_FREE_CLUSTERS &&
	       report_free_clusters(r) < report_tables_to_come(r);
}

static void add(struct advice *a, const char *fmt, ...)
	__attribute__((format(printf, 2, 3)));

static void add(struct advice *a, const char *fmt, ...)
{
	va_list ap;

	if (a->n == MAX_ADVICE)
		return;
	va_start(ap, fmt);
	vsnprintf(a->line[a->n++], sizeof(a->line[0]), fmt, ap);
	va_end(ap);
}

/* How it is named for commands that change the image when it is closed */
static const char *image_word(const struct report *r)
{
	const struct device *d = &r->metadata;

	return shell_quote(d->ours && *d->file ? d->file : d->node);
}

static void advise_corrupt(const struct report *r, struct advice *a)
{
	if (r->kind == DEVICE_OURS)
		add(a, "close it (qcow2setup close %s), repair the image (qcow2setup check --repair all %s), and restore from a backup what that cannot repair",
		    shell_quote(r->name), image_word(r));
	else
		add(a, "remove it (dmsetup remove %s), repair the image (qcow2setup check --repair all %s), and restore from a backup what that cannot repair",
		    shell_quote(r->name), image_word(r));
}

/* Of one that was opened so, and not as a part of another one */
static void advise_read_only(const struct report *r, struct advice *a)
{
	if (r->usage.has_header && r->usage.corrupt)
		add(a, "the image is marked corrupt: %s it (%s %s), then repair it (qcow2setup check --repair all %s)",
		    r->kind == DEVICE_OURS ? "close" : "remove",
		    r->kind == DEVICE_OURS ? "qcow2setup close" : "dmsetup remove",
		    shell_quote(r->name), image_word(r));
	else if (r->kind != DEVICE_OURS)
		add(a, "to write to it, remove it (dmsetup remove %s), and open the image with qcow2setup open",
		    shell_quote(r->name));
	else if (starts_with(r->name, DM_BACKING_PREFIX))
		add(a, "it is below other devices, which need it as it is: nothing is to be done");
	else
		add(a, "to write to it, close it (qcow2setup close %s), and open it without --readonly",
		    shell_quote(r->name));
}

static void advise_health(const struct report *r, struct advice *a)
{
	switch (report_health(r)) {
	case HEALTH_CORRUPT:
		advise_corrupt(r, a);
		break;
	case HEALTH_READ_ONLY:
		advise_read_only(r, a);
		break;
	case HEALTH_FAIL:
		add(a, "see dmesg for the device that failed, save what you need, then give up what was written last (dmsetup remove %s), check the image (qcow2setup check %s), and open it again",
		    shell_quote(r->name), image_word(r));
		break;
	default:
		break;
	}
}

/* @what: of the space for metadata */
static void advise_enlarge(const struct report *r, const char *what,
			   struct advice *a)
{
	/* Only what open has made gets longer with its file. */
	const char *file = r->metadata.ours ? r->metadata.file : "";

	if (r->kind == DEVICE_OURS)
		add(a, "The space for metadata %s: %s %s%s,\n"
		    "then let the device use it: qcow2setup resize %s --size %" PRIu64,
		    what, *file ? "free some where" : "enlarge",
		    esc(*file ? file : r->metadata.node),
		    *file ? " is" : "", esc(r->name), r->size);
	else
		add(a, "The space for metadata %s: enlarge %s,\n"
		    "then load its table again: dmsetup table %s | dmsetup reload %s && dmsetup resume %s",
		    what, esc(r->metadata.node), shell_quote(r->name),
		    shell_quote(r->name), shell_quote(r->name));
}

/* What is wrong with the metadata, and what can be done about it. */
static void advise_space(const struct report *r, struct advice *a)
{
	const struct target_status *s = &r->status;

	if (!strcmp(s->mode, "nospc"))
		add(a, "There is no space for metadata that waits to be written: free some where %s is.\n"
		    "It is written then by itself; until then flushes fail.",
		    esc(report_origin(&r->metadata)));
	else if (s->unwritten)
		add(a, "Metadata could not be written, and waits to be written again: see dmesg for what\n"
		    "is wrong with %s. Until then flushes fail; do not remove the device.",
		    esc(report_origin(&r->metadata)));
	if (s->refused)
		advise_enlarge(r, "is used up, and writes were refused", a);
	else if (report_short_of_metadata(r))
		advise_enlarge(r, "is not enough for all of the disk", a);
}

void report_advice(const struct report *r, struct advice *a)
{
	a->n = 0;
	if (r->info.suspended)
		add(a, "it is suspended, and requests wait: resume it (dmsetup resume %s)",
		    shell_quote(r->name));
	if (r->info.deferred)
		add(a, "it is removed when its last user goes; to keep it: dmsetup message %s 0 @cancel_deferred_remove",
		    shell_quote(r->name));
	if (!r->has_status)
		return;
	advise_health(r, a);
	advise_space(r, a);
}
