// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Preload (LD_PRELOAD) that lets one system call of the tool go wrong, to see
 * that it takes back what it did before.
 *
 * INJECT_AT=N: the Nth call, from 1 on, of those below fails; with errno
 * INJECT_ERRNO, or EIO.
 * INJECT_SIGNAL=SIG: a signal arrives there instead.
 * INJECT_COMMAND=CMD: a shell command is run there instead.
 * INJECT_COUNT=FILE: the number of calls is written to FILE at the end.
 * INJECT_READS=1: calls that open and read files count, too.
 * INJECT_SENDS=1: what is sent to a helper process counts, too.
 * INJECT_VERSION=A.B.C: what the kernel says to be the version of the target.
 * INJECT_STATUS="WORD...": what follows the features in the status line.
 * INJECT_SUSPENDED=FILE: the number of bytes that were written between a suspend and
 * the resume is written to FILE at the end.
 * INJECT_HELD=FILE: the number of calls, those that open, read and send among them, between
 * the first suspend and the last resume is written to FILE at the end.
 *
 * All this is for the process that was started, not for its children.
 */
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/dm-ioctl.h>
#include <linux/loop.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

static long calls;
static pid_t started;
static int suspended;			/* devices */
static unsigned long long written, held;

__attribute__((constructor)) static void start(void)
{
	started = getpid();
}

/* Count a call; true if it shall fail. */
static int goes_wrong(void)
{
	const char *at = getenv("INJECT_AT"), *sig = getenv("INJECT_SIGNAL");
	const char *command = getenv("INJECT_COMMAND");

	held += suspended && getpid() == started;
	if (getpid() != started || ++calls != (at ? atol(at) : 0))
		return 0;
	if (sig) {
		raise(atoi(sig));
		return 0;
	}
	if (command) {
		unsetenv("LD_PRELOAD");
		if (system(command))
			abort();
		return 0;
	}
	errno = getenv("INJECT_ERRNO") ? atoi(getenv("INJECT_ERRNO")) : EIO;
	return 1;
}

static void report_number(const char *name, unsigned long long n)
{
	FILE *f = name ? fopen(name, "w") : NULL;

	if (!f)
		return;
	fprintf(f, "%llu\n", n);
	fclose(f);
}

__attribute__((destructor)) static void report(void)
{
	if (getpid() != started)
		return;
	report_number(getenv("INJECT_COUNT"), calls);
	report_number(getenv("INJECT_SUSPENDED"), written);
	report_number(getenv("INJECT_HELD"), held);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t pwrite64(int fd, const void *buf, size_t len, off_t off);
ssize_t pwrite64(int fd, const void *buf, size_t len, off_t off)
{
	if (suspended)
		written += len;
	return goes_wrong() ? -1 : REAL(pwrite64)(fd, buf, len, off);
}

int ftruncate64(int fd, off_t len);
int ftruncate64(int fd, off_t len)
{
	return goes_wrong() ? -1 : REAL(ftruncate64)(fd, len);
}

int fsync(int fd);
int fsync(int fd)
{
	return goes_wrong() ? -1 : REAL(fsync)(fd);
}

int fallocate64(int fd, int mode, off_t off, off_t len);
int fallocate64(int fd, int mode, off_t off, off_t len)
{
	return goes_wrong() ? -1 : REAL(fallocate64)(fd, mode, off, len);
}

int memfd_create(const char *name, unsigned int flags);
int memfd_create(const char *name, unsigned int flags)
{
	return goes_wrong() ? -1 : REAL(memfd_create)(name, flags);
}

/* The @n-th word of @text, from 1 on; NULL if there are not so many. */
static char *word(char *text, int n)
{
	while (text && --n > 0) {
		text = strchr(text, ' ');
		text += text ? 1 : 0;
	}
	return text;
}

/* Put @end behind the features of a status line. */
static void set_status(char *line, const char *end)
{
	char *features = word(line, 12);

	if (!features || !word(features, atoi(features) + 2))
		abort();
	strcpy(word(features, atoi(features) + 2), end);
}

/* Let the kernel speak as another one would do. */
static void other_target(unsigned long request, struct dm_ioctl *dmi)
{
	const char *version = getenv("INJECT_VERSION");
	const char *status = getenv("INJECT_STATUS");
	char *data = (char *)dmi + dmi->data_start;
	struct dm_target_spec *spec = (void *)data;
	struct dm_target_versions *v = (void *)data;

	if (_IOC_NR(request) == DM_GET_TARGET_VERSION_CMD && version &&
	    sscanf(version, "%u.%u.%u", &v->version[0], &v->version[1],
		   &v->version[2]) != 3)
		abort();
	if (_IOC_NR(request) == DM_TABLE_STATUS_CMD && status &&
	    !(dmi->flags & DM_STATUS_TABLE_FLAG) && dmi->target_count == 1 &&
	    !strcmp(spec->target_type, "qcow2"))
		set_status((char *)(spec + 1), status);
}

int ioctl(int fd, unsigned long request, ...);
int ioctl(int fd, unsigned long request, ...)
{
	va_list ap;
	void *arg;
	int ret;

	va_start(ap, request);
	arg = va_arg(ap, void *);
	va_end(ap);
	if ((request == LOOP_CONFIGURE || request == LOOP_CTL_GET_FREE ||
	     request == LOOP_SET_CAPACITY ||
	     _IOC_TYPE(request) == DM_IOCTL) && goes_wrong())
		return -1;
	ret = REAL(ioctl)(fd, request, arg);
	if (!ret && _IOC_TYPE(request) == DM_IOCTL) {
		other_target(request, arg);
		/* The same request ends it, with another flag. */
		if (_IOC_NR(request) == DM_DEV_SUSPEND_CMD)
			suspended += ((struct dm_ioctl *)arg)->flags & DM_SUSPEND_FLAG ? 1 : -!!suspended;
	}
	return ret;
}

/* A call that counts only if that is wanted */
static int may_go_wrong(const char *wanted)
{
	if (getenv(wanted))
		return goes_wrong();
	held += suspended && getpid() == started;
	return 0;
}

static int read_goes_wrong(void)
{
	return may_go_wrong("INJECT_READS");
}

ssize_t pread64(int fd, void *buf, size_t len, off_t off);
ssize_t pread64(int fd, void *buf, size_t len, off_t off)
{
	return read_goes_wrong() ? -1 : REAL(pread64)(fd, buf, len, off);
}

ssize_t send(int fd, const void *buf, size_t len, int flags)
{
	return may_go_wrong("INJECT_SENDS") ? -1 :
	       REAL(send)(fd, buf, len, flags);
}

/* The tool makes no files by them: no mode. */
int open64(const char *path, int flags, ...);
int open64(const char *path, int flags, ...)
{
	return read_goes_wrong() ? -1 : REAL(open64)(path, flags);
}

int openat64(int dir, const char *path, int flags, ...);
int openat64(int dir, const char *path, int flags, ...)
{
	return read_goes_wrong() ? -1 : REAL(openat64)(dir, path, flags);
}
