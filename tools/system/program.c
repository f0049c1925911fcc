// SPDX-License-Identifier: GPL-2.0-or-later
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "lib/interrupt.h"
#include "lib/util.h"
#include "system/program.h"

/* How soon an interruption is seen */
#define STEP_MS		200
#define LINE_MAX	1024

/* One of its two outputs, cut into lines */
struct output {
	int fd;
	char line[LINE_MAX];
	size_t len;
	program_line_fn *fn;
	void *arg;
};

static void end_line(struct output *o)
{
	o->line[o->len] = 0;
	if (o->len)
		o->fn(o->line, o->arg);
	o->len = 0;
}

/* False: it has ended. */
static bool take(struct output *o)
{
	char buf[512];
	ssize_t n, k;

	n = read(o->fd, buf, sizeof(buf));
	if (n < 0 && (errno == EINTR || errno == EAGAIN))
		return true;
	for (k = 0; k < n; k++) {
		if (buf[k] == '\n' || buf[k] == '\r')
			end_line(o);
		else if (o->len < LINE_MAX - 1)
			o->line[o->len++] = buf[k];
	}
	if (n > 0)
		return true;
	end_line(o);
	return false;
}

static void keep_on(int fd)
{
	if (fd >= 0)
		fcntl(fd, F_SETFD, 0);
}

static void be(const char *const *argv, int fd1, int fd2, const int *out,
	       const int *err, pid_t parent)
{
	int null = open("/dev/null", O_RDONLY);

	prctl(PR_SET_PDEATHSIG, SIGTERM);
	/* Those of a terminal are ours; we say when it has to end. */
	setpgid(0, 0);
	setenv("LC_ALL", "C", 1);
	if (getppid() != parent || null < 0)
		_exit(127);
	dup2(null, STDIN_FILENO);
	dup2(out[1], STDOUT_FILENO);
	dup2(err[1], STDERR_FILENO);
	keep_on(fd1);
	keep_on(fd2);
	execvp(argv[0], (char *const *)argv);
	dprintf(STDERR_FILENO, "%s\n", strerror(errno));
	_exit(127);
}

struct last {
	char *text;
	size_t size;
};

static void keep_last(const char *line, void *arg)
{
	const struct last *l = arg;

	/* Usage hints and the like come first; the reason has a colon. */
	snprintf(l->text, l->size, "%s", esc(line));
}

static int wait_for(pid_t pid)
{
	int status;

	while (waitpid(pid, &status, 0) < 0)
		if (errno != EINTR)
			return -1;
	return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

static int follow(pid_t pid, struct output *o)
{
	struct pollfd p[2] = {
		{ .fd = o[0].fd, .events = POLLIN },
		{ .fd = o[1].fd, .events = POLLIN },
	};
	bool told = false;
	int i;

	while (p[0].fd >= 0 || p[1].fd >= 0) {
		if (interrupted() && !told) {
			kill(pid, SIGTERM);
			told = true;
		}
		if (poll(p, 2, STEP_MS) <= 0)
			continue;
		for (i = 0; i < 2; i++)
			if (p[i].fd >= 0 && p[i].revents && !take(o + i))
				p[i].fd = -1;
	}
	return wait_for(pid);
}

int program_run(const char *const *argv, int fd1, int fd2, program_line_fn *line,
		void *arg, char *why, size_t why_size)
{
	struct last last = { why, why_size };
	struct output *o = calloc(2, sizeof(*o));
	int out[2] = { -1, -1 }, err[2] = { -1, -1 }, ret = -1;
	pid_t pid = -1, self = getpid();

	*why = 0;
	if (o && !pipe2(out, O_CLOEXEC) && !pipe2(err, O_CLOEXEC))
		pid = fork();
	if (!pid)
		be(argv, fd1, fd2, out, err, self);
	if (pid < 0)
		snprintf(why, why_size, "%s: %s", argv[0], strerror(errno));
	if (out[1] >= 0)
		close(out[1]);
	if (err[1] >= 0)
		close(err[1]);
	if (pid > 0) {
		o[0] = (struct output){ .fd = out[0], .fn = line, .arg = arg };
		o[1] = (struct output){ .fd = err[0], .fn = keep_last, .arg = &last };
		ret = follow(pid, o);
	}
	if (pid > 0 && ret < 0 && !*why)
		snprintf(why, why_size, "%s was killed", argv[0]);
	if (ret == 127) {
		snprintf(why, why_size,
			 "%s cannot be run; install it (qemu-utils on Debian)", argv[0]);
		ret = -1;
	}
	if (out[0] >= 0)
		close(out[0]);
	if (err[0] >= 0)
		close(err[0]);
	free(o);
	return ret;
}
