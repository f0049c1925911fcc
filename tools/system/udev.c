// SPDX-License-Identifier: GPL-2.0-or-later
#include <ctype.h>
#include <libdevmapper.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "lib/interrupt.h"
#include "lib/util.h"
#include "system/udev.h"

/* Partitions are what their device is: "part1-" comes before its uuid, as for kpartx. */
static const char *whole_uuid(const char *uuid)
{
	const char *s = uuid + 4;

	if (!starts_with(uuid, "part"))
		return uuid;
	while (isdigit((unsigned char)*s))
		s++;
	return s > uuid + 4 && *s == '-' ? s + 1 : uuid;
}

/* tools/udev has the same for those who resume a device without us. */
uint16_t udev_flags(const char *name, const char *uuid)
{
	uuid = whole_uuid(uuid);
	if (starts_with(uuid, DM_UUID_HOST_PREFIX))
		return 0;
	if (starts_with(uuid, DM_UUID_TAIL_PREFIX) || starts_with(name, DM_BACKING_PREFIX))
		return DM_UDEV_DISABLE_SUBSYSTEM_RULES_FLAG |
		       DM_UDEV_DISABLE_DISK_RULES_FLAG |
		       DM_UDEV_DISABLE_OTHER_RULES_FLAG;
	/*
	 * With DISABLE_OTHER_RULES systemd would take it for not ready at each
	 * "add" event, and stop what needs it.
	 */
	return DM_UDEV_DISABLE_DISK_RULES_FLAG;
}

/*
 * Without a sign of life of udev, and with one: it gives its programs three minutes
 * itself.
 */
#define IDLE_MS		30000
#define WORKING_MS	200000
/* Is there while udev has something to do. */
#define QUEUE		"/run/udev/queue"

void udev_wait(uint32_t cookie)
{
	struct timespec step = { .tv_nsec = 1000 * 1000 };
	uint64_t begun = now_ms();
	unsigned int waited;
	int ready = 0;

	if (!cookie)
		return;
	for (;;) {
		if (!dm_udev_wait_immediate(cookie, &ready) || ready)
			return;
		waited = now_ms() - begun;
		if (interrupted() ||
		    waited >= (access(QUEUE, F_OK) ? IDLE_MS : WORKING_MS))
			break;
		nanosleep(&step, NULL);
		if (step.tv_nsec < 30 * 1000 * 1000)
			step.tv_nsec *= 2;
	}
	if (!interrupted())
		warning("udev has not answered for %u seconds and is not waited for any longer; see systemctl status systemd-udevd, or set DM_DISABLE_UDEV=1 where it cannot answer (IPC name space of a container)",
			waited / 1000);
	/* In its place, so that the semaphore goes. */
	dm_udev_complete(cookie);
	dm_udev_wait_immediate(cookie, &ready);
	dm_udev_set_sync_support(0);
}
