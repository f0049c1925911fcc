// SPDX-License-Identifier: GPL-2.0-or-later
#include <errno.h>
#include <fcntl.h>
#include <linux/dm-ioctl.h>
#include <poll.h>
#include <signal.h>
#include <stddef.h>
#include <sys/ioctl.h>
#include <time.h>

#include "lib/interrupt.h"
#include "lib/util.h"
#include "system/events.h"

#define CONTROL	"/dev/mapper/control"

static sigset_t before;

int events_open(void)
{
	int fd = open(CONTROL, O_RDWR | O_CLOEXEC);
	sigset_t set;

	if (fd < 0) {
		fail_errno("cannot open " CONTROL);
		return -1;
	}
	sigemptyset(&set);
	sigaddset(&set, SIGINT);
	sigaddset(&set, SIGTERM);
	sigaddset(&set, SIGHUP);
	sigaddset(&set, SIGQUIT);
	sigprocmask(SIG_BLOCK, &set, &before);
	return fd;
}

/* libdevmapper keeps the descriptor that has to be polled to itself. */
int events_arm(int fd)
{
	struct dm_ioctl io = {
		.version = { DM_VERSION_MAJOR, 37, 0 },
		.data_size = sizeof(io), .data_start = sizeof(io),
	};

	if (ioctl(fd, DM_DEV_ARM_POLL, &io))
		return fail_errno("cannot wait for events of device-mapper");
	return 0;
}

int events_wait(int fd, int ms)
{
	struct timespec limit = {
		.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000L,
	};
	struct pollfd p = { .fd = fd, .events = POLLIN };

	if (ppoll(&p, 1, &limit, &before) < 0 && errno != EINTR)
		return fail_errno("cannot wait for events of device-mapper");
	return 0;
}

/* Where there is one event after another, ppoll() returns before it looks for signals. */
bool events_stop(void)
{
	sigset_t held;

	sigprocmask(SIG_SETMASK, &before, &held);
	sigprocmask(SIG_SETMASK, &held, NULL);
	return interrupted();
}

void events_let_signals(void)
{
	sigprocmask(SIG_SETMASK, &before, NULL);
}
