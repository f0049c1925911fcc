// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Preload (LD_PRELOAD) that lets one system call of the tool go wrong, to see
 * that it takes back what it did before.
 *
 * INJECT_AT=N: the Nth call, from 1 on, of those below fails.
 * INJECT_SIGNAL=SIG: a signal arrives there instead.
 * INJECT_COMMAND=CMD: a shell command is run there instead.
 * INJECT_COUNT=FILE: the number of calls is written to FILE at the end.
 * INJECT_READS=1: calls that open and read files count, too.
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
#include <sys/ioctl.h>

static long calls;

/* Count a call; true if it shall fail. */
static int goes_wrong(void)
{
	const char *at = getenv("INJECT_AT"), *sig = getenv("INJECT_SIGNAL");
	const char *command = getenv("INJECT_COMMAND");

	if (++calls != (at ? atol(at) : 0))
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
	errno = EIO;
	return 1;
}

__attribute__((destructor)) static void report(void)
{
	const char *name = getenv("INJECT_COUNT");
	FILE *f = name ? fopen(name, "w") : NULL;

	if (!f)
		return;
	fprintf(f, "%ld\n", calls);
	fclose(f);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t pwrite64(int fd, const void *buf, size_t len, off_t off);
ssize_t pwrite64(int fd, const void *buf, size_t len, off_t off)
{
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

int memfd_create(const char *name, unsigned int flags);
int memfd_create(const char *name, unsigned int flags)
{
	return goes_wrong() ? -1 : REAL(memfd_create)(name, flags);
}

int ioctl(int fd, unsigned long request, ...);
int ioctl(int fd, unsigned long request, ...)
{
	va_list ap;
	void *arg;

	va_start(ap, request);
	arg = va_arg(ap, void *);
	va_end(ap);
	if ((request == LOOP_CONFIGURE || request == LOOP_CTL_GET_FREE ||
	     request == LOOP_SET_CAPACITY ||
	     _IOC_TYPE(request) == DM_IOCTL) && goes_wrong())
		return -1;
	return REAL(ioctl)(fd, request, arg);
}

static int read_goes_wrong(void)
{
	return getenv("INJECT_READS") && goes_wrong();
}

ssize_t pread64(int fd, void *buf, size_t len, off_t off);
ssize_t pread64(int fd, void *buf, size_t len, off_t off)
{
	return read_goes_wrong() ? -1 : REAL(pread64)(fd, buf, len, off);
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
