/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Small helpers that everything else needs: exit codes, one-line messages that
 * are safe to print, complete reads and writes, sizes.
 */
#ifndef QCOW2SETUP_UTIL_H
#define QCOW2SETUP_UTIL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>

#define ARRAY_SIZE(a)	(sizeof(a) / sizeof((a)[0]))
#define KIB		1024ULL
#define MIB		(1024ULL * KIB)

/* Exit codes, those of cryptsetup. */
enum {
	EX_DONE		= 0,
	EX_PARAMETER	= 1,
	EX_PERMISSION	= 2,
	EX_MEMORY	= 3,
	EX_WRONG	= 4,	/* wrong device or image */
	EX_BUSY		= 5,	/* exists already, or in use */
};

extern bool verbose;
/* What is drawn on a terminal has to be wiped away first: progress.c sets it. */
extern void (*before_message)(void);

/* A remedy names an option only if the action takes it: main() says so. */
extern bool takes_readonly, takes_trust;
#define OR_READONLY(remedy)	\
	(takes_readonly ? remedy ", or use --readonly" : remedy)

/*
 * Print "qcow2setup: ..." as one line on stderr and return @code, so that a
 * failing function can say "return fail(...)".
 */
int fail(int code, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/* The same for a failed system call: the exit code follows from errno. */
int fail_errno(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
int fail_nomem(void);
/* What fail() was called with first; NULL: it was not called. */
struct failure {
	int code;			/* exit code */
	char *message;			/* the line, without the program's name */
	const char *remedy;		/* in @message; NULL: none */
};
const struct failure *first_failure(void);
/* Where the mistake is, "FILE:LINE": in front of all messages, until it is NULL again */
extern const char *message_place;
void warning(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
/* What is as it should be, but not a matter of course */
void inform(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
/* With --verbose only */
void note(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
int errno_to_exit(int err);
/*
 * As strerror(), and one error more: a device shows more than there is below it.
 * error_ends_early() says where, with a remedy, and returns it.
 */
const char *error_text(int err);
int error_ends_early(const char *fmt, ...)
	__attribute__((format(printf, 1, 2)));

/*
 * Names come from images and command lines and may hold anything: these make
 * them harmless to a terminal.  Everything but printable ASCII becomes \xHH.
 * esc() and escn() return one of a few static buffers, long names are cut:
 * for messages only.
 */
const char *esc(const char *s);
const char *escn(const char *s, size_t len);
void put_escaped(FILE *f, const char *s, size_t len);
size_t escape(char *out, size_t out_size, const char *s, size_t len);

/*
 * For commands that a message prints: a file's name as one word for a shell, which
 * is not taken for an option or a protocol; any text as one word.  Both return one
 * of a few static buffers.
 */
const char *shell_quote(const char *path);
const char *shell_word(const char *s, size_t len);
/*
 * The image @path as qemu-img takes it after --image-opts, with @more options.
 * Without its data file it can be opened wherever that is: good for what changes
 * metadata only.
 */
const char *qemu_image_opts(const char *path, const char *more);
#define QEMU_NO_DATA	",data-file.driver=null-co"

/* The file that @fd is, once more, and with @mode as for open(); or -1, errno. */
int reopen(int fd, int mode);
/* Of a clock that nobody sets, from some time on: milliseconds */
uint64_t now_ms(void);

/* Short reads and EINTR handled; a file that ends early gives -EIO. */
int read_at(int fd, void *buf, size_t len, uint64_t off);
int write_at(int fd, const void *buf, size_t len, uint64_t off);

/* Are all @len bytes 0? */
bool all_zero(const void *buf, size_t len);
/* Plain decimal number. */
bool parse_u64(const char *s, uint64_t *v);

static inline bool starts_with(const char *s, const char *prefix)
{
	return !strncmp(s, prefix, strlen(prefix));
}

/* "1.5 GiB"; returns one of a few static buffers. */
const char *human_size(uint64_t size);

static inline uint64_t div_up(uint64_t a, uint64_t b)
{
	return a / b + !!(a % b);
}

static inline uint64_t align_up(uint64_t a, uint64_t b)
{
	return div_up(a, b) * b;
}

static inline uint64_t min_u64(uint64_t a, uint64_t b)
{
	return a < b ? a : b;
}

static inline uint64_t max_u64(uint64_t a, uint64_t b)
{
	return a > b ? a : b;
}

#endif
