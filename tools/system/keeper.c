// SPDX-License-Identifier: GPL-2.0-or-later
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "lib/util.h"
#include "system/keeper.h"

struct step {
	struct step *next;
	keeper_fn *fn;
	size_t len;
	uint64_t data[];	/* aligned for whatever it is */
};

/* In front of what is told; without a function, all is done. */
struct message {
	keeper_fn *fn;
	size_t len;
};

void keeper_lock_memory(void)
{
	if (mlockall(MCL_CURRENT | MCL_FUTURE))
		note("memory cannot be locked: %s", strerror(errno));
#ifdef PR_SET_IO_FLUSHER
	if (prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0))
		note("memory reclaim may do I/O: %s", strerror(errno));
#endif
}

/* All of it; false if the other end is closed, or cannot be used. */
static bool receive(int fd, void *buf, size_t len)
{
	uint8_t *p = buf;
	ssize_t n;

	for (; len; p += n, len -= n) {
		do
			n = recv(fd, p, len, 0);
		while (n < 0 && errno == EINTR);
		if (n <= 0)
			return false;
	}
	return true;
}

static bool transmit(int fd, const void *buf, size_t len)
{
	const uint8_t *p = buf;
	ssize_t n;

	for (; len; p += n, len -= n) {
		do
			n = send(fd, p, len, MSG_NOSIGNAL);
		while (n < 0 && errno == EINTR);
		if (n < 0)
			return false;
	}
	return true;
}

/*
 * The helper
 */

static void leave_terminal(void)
{
	static char line[2048];
	int null = open("/dev/null", O_RDWR | O_CLOEXEC);
	int log = open("/dev/kmsg", O_WRONLY | O_CLOEXEC | O_NOCTTY);

	dup2(null, STDIN_FILENO);
	dup2(null, STDOUT_FILENO);
	dup2(log >= 0 ? log : null, STDERR_FILENO);
	if (log > STDERR_FILENO)
		close(log);
	if (null > STDERR_FILENO)
		close(null);
	/* Each write is an entry of the log. */
	setvbuf(stderr, line, _IOLBF, sizeof(line));
	verbose = false;
}

static void outlive(void)
{
	static const int ignored[] = {
		SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGPIPE, SIGALRM, SIGUSR1,
		SIGUSR2, SIGTSTP, SIGTTIN, SIGTTOU,
	};
	size_t i;
	int fd;

	for (i = 0; i < ARRAY_SIZE(ignored); i++)
		signal(ignored[i], SIG_IGN);
	setsid();
	prctl(PR_SET_NAME, "qcow2setup-keep");
	fd = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
	if (fd >= 0) {
		/* Not everybody may do this; then it stays as it is. */
		if (write(fd, "-1000", 5) < 0)
			note("may be killed for memory: %s", strerror(errno));
		close(fd);
	}
	if (chdir("/"))
		note("stays in its folder: %s", strerror(errno));
	keeper_lock_memory();
	leave_terminal();
}

static void act(const struct step *s)
{
	for (; s; s = s->next)
		if (s->fn(s->data, s->len) == KEEPER_STOP)
			return;
}

static void __attribute__((noreturn)) helper(int fd)
{
	struct step *steps = NULL, *s;
	struct message m;
	char ready = 0;

	outlive();
	if (!transmit(fd, &ready, 1))
		_exit(0);
	while (receive(fd, &m, sizeof(m))) {
		if (!m.fn)
			_exit(0);
		s = malloc(sizeof(*s) + m.len);
		/* It is not answered, which ends the work. */
		if (!s)
			break;
		s->fn = m.fn;
		s->len = m.len;
		if (!receive(fd, s->data, m.len))
			break;
		s->next = steps;
		steps = s;
		/* Whoever is gone needs no answer. */
		transmit(fd, &ready, 1);
	}
	/* What cannot be told any more will not be done. */
	shutdown(fd, SHUT_WR);
	while (receive(fd, &ready, 1))
		;
	act(steps);
	_exit(0);
}

/*
 * Who has one
 */

int keeper_start(struct keeper *k)
{
	char ready;
	int sv[2];

	*k = (struct keeper)KEEPER_NONE;
	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sv))
		return fail_errno("cannot make a pair of sockets");
	fflush(NULL);
	k->pid = fork();
	if (!k->pid) {
		close(sv[0]);
		helper(sv[1]);
	}
	close(sv[1]);
	if (k->pid < 0) {
		close(sv[0]);
		return fail_errno("cannot start a helper process");
	}
	k->fd = sv[0];
	if (receive(k->fd, &ready, 1))
		return 0;
	keeper_dismiss(k);
	return fail(EX_WRONG, "helper process was killed; try again");
}

int keeper_tell(struct keeper *k, keeper_fn *fn, const void *data, size_t len)
{
	struct message m = { .fn = fn, .len = len };
	char ready;

	if (k->fd < 0)
		return 0;
	if (transmit(k->fd, &m, sizeof(m)) && transmit(k->fd, data, len) &&
	    receive(k->fd, &ready, 1))
		return 0;
	return fail(EX_WRONG, "helper process was killed; try again");
}

void keeper_dismiss(struct keeper *k)
{
	struct message m = { .fn = NULL };

	if (k->fd < 0)
		return;
	transmit(k->fd, &m, sizeof(m));
	close(k->fd);
	k->fd = -1;
	while (waitpid(k->pid, NULL, 0) < 0 && errno == EINTR)
		;
}
