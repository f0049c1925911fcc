// SPDX-License-Identifier: GPL-2.0-or-later
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "lib/util.h"
#include "system/keeper.h"
#include "test.h"

struct letter {
	int fd;
	char c;
};

static enum keeper_result say(const void *data, size_t len)
{
	const struct letter *l = data;

	return write(l->fd, &l->c, len ? 1 : 0) == 1 ? KEEPER_GO_ON : KEEPER_STOP;
}

static enum keeper_result stop(const void *data, size_t len)
{
	say(data, len);
	return KEEPER_STOP;
}

static int tell(struct keeper *k, keeper_fn *fn, int fd, char c)
{
	struct letter l;

	/* what is between its members, too: all of it is sent */
	memset(&l, 0, sizeof(l));
	l.fd = fd;
	l.c = c;
	return keeper_tell(k, fn, &l, sizeof(l));
}

/*
 * Run @tool as a process of its own; what it and its helper have written is in @text
 * when both are gone.  Returns how the process ended.
 */
static int run(void (*tool)(int fd), char *text, size_t size)
{
	int fds[2], status;
	size_t n = 0;
	ssize_t got;
	pid_t pid;

	assert_int_equal(pipe(fds), 0);
	pid = fork();
	assert_true(pid >= 0);
	if (!pid) {
		close(fds[0]);
		tool(fds[1]);
		_exit(0);
	}
	close(fds[1]);
	while (n < size - 1 && (got = read(fds[0], text + n, size - 1 - n)) > 0)
		n += got;
	text[n] = 0;
	close(fds[0]);
	assert_int_equal(waitpid(pid, &status, 0), pid);
	return status;
}

static void start(struct keeper *k)
{
	if (keeper_start(k))
		_exit(1);
}

static void killed(int fd)
{
	struct keeper k;

	start(&k);
	if (tell(&k, say, fd, 'a') || tell(&k, say, fd, 'b') ||
	    tell(&k, say, fd, 'c'))
		_exit(1);
	raise(SIGKILL);
}

static void killed_at_once(int fd)
{
	struct keeper k;

	(void)fd;
	start(&k);
	raise(SIGKILL);
}

static void killed_later(int fd)
{
	struct keeper k;

	start(&k);
	if (tell(&k, say, fd, 'a') || tell(&k, stop, fd, 'b') ||
	    tell(&k, say, fd, 'c'))
		_exit(1);
	raise(SIGKILL);
}

static void dismissed(int fd)
{
	struct keeper k;

	start(&k);
	if (tell(&k, say, fd, 'a'))
		_exit(1);
	keeper_dismiss(&k);
	/* It is gone, and not waited for a second time. */
	if (k.fd >= 0 || !kill(k.pid, 0))
		_exit(2);
	keeper_dismiss(&k);
	raise(SIGKILL);
}

/* Whoever ends all that he sees with a signal, ends the tool only. */
static void signalled(int fd)
{
	static const int signals[] = { SIGINT, SIGTERM, SIGHUP, SIGQUIT };
	struct keeper k;
	size_t i;

	start(&k);
	if (tell(&k, say, fd, 'a'))
		_exit(1);
	for (i = 0; i < ARRAY_SIZE(signals); i++)
		kill(k.pid, signals[i]);
	if (getsid(k.pid) != k.pid || tell(&k, say, fd, 'b'))
		_exit(2);
	raise(SIGKILL);
}

static void without_helper(int fd)
{
	struct keeper k;

	start(&k);
	if (tell(&k, say, fd, 'a'))
		_exit(1);
	kill(k.pid, SIGKILL);
	close(STDERR_FILENO);
	if (tell(&k, say, fd, 'b') != EX_WRONG)
		_exit(2);
	keeper_dismiss(&k);
}

static void none(int fd)
{
	struct keeper k = KEEPER_NONE;

	if (tell(&k, say, fd, 'a'))
		_exit(1);
	keeper_dismiss(&k);
}

/* More than fits into any buffer on the way */
static enum keeper_result measure(const void *data, size_t len)
{
	const char *p = data;
	size_t i;

	for (i = sizeof(struct letter); i < len; i++)
		if (p[i] != (char)(i * 7))
			return KEEPER_STOP;
	return say(data, len);
}

static void much(int fd)
{
	size_t len = 5 << 20, i;
	char *p = malloc(len);
	struct keeper k;

	if (!p)
		_exit(1);
	for (i = 0; i < len; i++)
		p[i] = i * 7;
	*(struct letter *)p = (struct letter){ fd, 'm' };
	start(&k);
	if (keeper_tell(&k, measure, p, len) || tell(&k, say, fd, 'z'))
		_exit(1);
	raise(SIGKILL);
}

static void expect(void (*tool)(int fd), const char *want, bool is_killed)
{
	char text[16];
	int status = run(tool, text, sizeof(text));

	assert_string_equal(text, want);
	if (is_killed)
		assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
	else
		assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

static void test_undo(void **state)
{
	(void)state;
	expect(killed, "cba", true);
	expect(killed_at_once, "", true);
	expect(killed_later, "cb", true);
	expect(much, "zm", true);
}

static void test_dismissed(void **state)
{
	(void)state;
	expect(dismissed, "", true);
	expect(none, "", false);
}

static void test_signals(void **state)
{
	(void)state;
	expect(signalled, "ba", true);
	expect(without_helper, "", false);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_undo),
		cmocka_unit_test(test_dismissed),
		cmocka_unit_test(test_signals),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
