// SPDX-License-Identifier: GPL-2.0-or-later
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "lib/util.h"

bool verbose;
bool takes_readonly, takes_trust;
const char *message_place;

static struct failure failure;

const struct failure *first_failure(void)
{
	return failure.code ? &failure : NULL;
}

/*
 * What has failed first is the reason, and the rest follows from it.  Where the
 * remedy begins is told by the format: names can hold anything.
 */
static void keep_failure(int code, const char *fmt, va_list ap)
{
	const char *semicolon = strstr(fmt, "; ");
	char *with_mark, *p;

	/* Findings of a check are told by it, with 0. */
	if (!code || failure.code)
		return;
	with_mark = strdup(fmt);
	if (!with_mark)
		return;
	/* Messages have no control characters of their own. */
	if (semicolon)
		with_mark[semicolon - fmt] = '\1';
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wformat-nonliteral"
	if (vasprintf(&failure.message, with_mark, ap) >= 0)
		failure.code = code;
#pragma GCC diagnostic pop
	free(with_mark);
	p = failure.code ? strchr(failure.message, '\1') : NULL;
	if (p) {
		*p = ';';
		failure.remedy = p + 2;
	}
}

void (*before_message)(void);

static void vmessage(const char *kind, const char *fmt, va_list ap)
{
	/* What scripts read from stdout shall not come after its error. */
	fflush(stdout);
	if (before_message)
		before_message();
	fprintf(stderr, "qcow2setup: %s%s%s", message_place ? message_place : "",
		message_place ? ": " : "", kind);
	vfprintf(stderr, fmt, ap);
	fputc('\n', stderr);
}

int fail(int code, const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	keep_failure(code, fmt, ap);
	va_end(ap);
	va_start(ap, fmt);
	vmessage("", fmt, ap);
	va_end(ap);
	return code;
}

int errno_to_exit(int err)
{
	switch (err) {
	case EACCES:
	case EPERM:
		return EX_PERMISSION;
	case ENOMEM:
		return EX_MEMORY;
	case EBUSY:
	case EEXIST:
		return EX_BUSY;
	default:
		return EX_WRONG;
	}
}

/* No error of the kernel's */
#define EENDSEARLY	4096

static char ends_early[512];

const char *error_text(int err)
{
	return err == EENDSEARLY ? ends_early : strerror(err);
}

int error_ends_early(const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(ends_early, sizeof(ends_early), fmt, ap);
	va_end(ap);
	return EENDSEARLY;
}

int fail_errno(const char *fmt, ...)
{
	int err = errno;
	char text[6144];
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(text, sizeof(text), fmt, ap);
	va_end(ap);
	if (err == EACCES || err == EPERM)
		return fail(EX_PERMISSION, "%s: %s; run as root, or get access to it",
			    text, strerror(err));
	return fail(errno_to_exit(err), "%s: %s", text, error_text(err));
}

int fail_nomem(void)
{
	return fail(EX_MEMORY, "out of memory");
}

void warning(const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	vmessage("warning: ", fmt, ap);
	va_end(ap);
}

void inform(const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	vmessage("", fmt, ap);
	va_end(ap);
}

void note(const char *fmt, ...)
{
	va_list ap;

	if (!verbose)
		return;
	va_start(ap, fmt);
	vmessage("", fmt, ap);
	va_end(ap);
}

/* Write the escaped form of one byte to @out (5 bytes), return its length. */
static size_t escape_byte(char *out, unsigned char c)
{
	static const char hex[] = "0123456789abcdef";

	if (c == '\\') {
		memcpy(out, "\\\\", 2);
		return 2;
	}
	if (c >= 0x20 && c < 0x7f) {
		*out = c;
		return 1;
	}
	memcpy(out, "\\x", 2);
	out[2] = hex[c >> 4];
	out[3] = hex[c & 15];
	return 4;
}

size_t escape(char *out, size_t out_size, const char *s, size_t len)
{
	size_t n = 0, i;

	for (i = 0; i < len; i++) {
		/* room for an escape, "..." and NUL */
		if (n + 8 > out_size) {
			memcpy(out + n, "...", 3);
			n += 3;
			break;
		}
		n += escape_byte(out + n, s[i]);
	}
	out[n] = 0;
	return n;
}

const char *escn(const char *s, size_t len)
{
	static char buf[6][1100];
	static unsigned int next;
	char *b = buf[next++ % ARRAY_SIZE(buf)];

	escape(b, sizeof(buf[0]), s, len);
	return b;
}

const char *esc(const char *s)
{
	return escn(s, strlen(s));
}

/* Longer than a path can be.  For what is longer still another word must do. */
#define WORD_MAX	(4 * 4096)
#define QUOTED_MAX	(4 * WORD_MAX + 16)

/* Quote @s as one word. */
static void quote(char *out, const char *s, size_t len)
{
	static const char safe[] = "%+,-./:=@_^";
	bool ansi = false, plain = len;
	char *p = out;
	size_t i;

	for (i = 0; i < len; i++) {
		unsigned char c = s[i];

		if (!isalnum(c) && !strchr(safe, c))
			plain = false;
		if (c < 0x20 || c >= 0x7f)
			ansi = true;
	}
	if (plain) {
		memcpy(out, s, len);
		out[len] = 0;
		return;
	}
	/* What a terminal could take for a command is written as bash reads it. */
	p += sprintf(p, ansi ? "$'" : "'");
	for (i = 0; i < len; i++) {
		if (ansi && s[i] == '\'')
			p += sprintf(p, "\\'");
		else if (ansi)
			p += escape_byte(p, s[i]);
		else if (s[i] == '\'')
			p += sprintf(p, "'\\''");
		else
			*p++ = s[i];
	}
	strcpy(p, "'");
}

/* Would it be taken for an option, or (by QEMU) for a protocol? */
static bool needs_dot(const char *s, size_t len)
{
	const char *colon = memchr(s, ':', len), *slash = memchr(s, '/', len);

	return *s == '-' || (colon && (!slash || colon < slash));
}

const char *shell_word(const char *s, size_t len)
{
	static char buf[6][QUOTED_MAX];
	static unsigned int next;
	char *out = buf[next++ % ARRAY_SIZE(buf)];

	if (len > WORD_MAX)
		return "FILE";
	quote(out, s, len);
	return out;
}

const char *shell_quote(const char *path)
{
	char word[WORD_MAX + 3];

	if (strlen(path) > WORD_MAX || !needs_dot(path, strlen(path)))
		return shell_word(path, strlen(path));
	snprintf(word, sizeof(word), "./%s", path);
	return shell_word(word, strlen(word));
}

const char *qemu_image_opts(const char *path, const char *more)
{
	char word[WORD_MAX], *p = word;

	if (strlen(path) > WORD_MAX / 4)
		path = "FILE";
	p += sprintf(p, "driver=qcow2,file.filename=%s",
		     needs_dot(path, strlen(path)) ? "./" : "");
	for (; *path; path++) {
		/* One comma would end the value. */
		if (*path == ',')
			*p++ = ',';
		*p++ = *path;
	}
	snprintf(p, sizeof(word) - (p - word), "%s", more);
	return shell_word(word, strlen(word));
}

void put_escaped(FILE *f, const char *s, size_t len)
{
	char one[4];
	size_t i, n;

	for (i = 0; i < len; i++) {
		n = escape_byte(one, s[i]);
		fwrite(one, 1, n, f);
	}
}

uint64_t now_ms(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec * 1000ULL + ts.tv_nsec / 1000000;
}

int reopen(int fd, int mode)
{
	char self[40];

	snprintf(self, sizeof(self), "/proc/self/fd/%d", fd);
	return open(self, mode);
}

bool all_zero(const void *buf, size_t len)
{
	const uint8_t *p = buf;

	return !len || (!*p && !memcmp(p, p + 1, len - 1));
}

int read_at(int fd, void *buf, size_t len, uint64_t off)
{
	char *p = buf;

	while (len) {
		ssize_t n = pread(fd, p, len, off);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -errno;
		if (!n)
			return -EIO;
		p += n;
		off += n;
		len -= n;
	}
	return 0;
}

int write_at(int fd, const void *buf, size_t len, uint64_t off)
{
	const char *p = buf;

	while (len) {
		ssize_t n = pwrite(fd, p, len, off);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -errno;
		if (!n)
			return -ENOSPC;
		p += n;
		off += n;
		len -= n;
	}
	return 0;
}

bool parse_u64(const char *s, uint64_t *v)
{
	char *end;

	/* strtoull() would take blanks and a sign. */
	if (!isdigit((unsigned char)*s))
		return false;
	errno = 0;
	*v = strtoull(s, &end, 10);
	return !errno && !*end;
}

const char *human_size(uint64_t size)
{
	static const char * const units[] = {
		"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"
	};
	static char buf[4][32];
	static unsigned int next;
	char *b = buf[next++ % ARRAY_SIZE(buf)];
	unsigned int u = 0;
	double v = size;

	while (v >= 1024 && u < ARRAY_SIZE(units) - 1) {
		v /= 1024;
		u++;
	}
	snprintf(b, sizeof(buf[0]), "%.3g %s", v, units[u]);
	/* 1000..1023 need a fourth digit */
	if (v >= 999.5)
		snprintf(b, sizeof(buf[0]), "%.0f %s", v, units[u]);
	return b;
}
