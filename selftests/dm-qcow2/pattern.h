/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What qcow2stress and qcow2race share: requests, random numbers, and content that tells
 * who wrote it.
 */
#ifndef PATTERN_H
#define PATTERN_H

#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

/* What both programs ask of a device */
enum kind {
	READ, READ_NOWAIT, WRITE, WRITE_FUA, DISCARD, ZERO_OUT, ZERO_RANGE, PUNCH_HOLE, FLUSH, KINDS
};

static const char *const names[KINDS] = {
	"read", "read (nowait)", "write", "write (FUA)", "discard", "BLKZEROOUT",
	"zero range", "punch hole", "flush",
};

#define SECTOR		512UL

#define MIN(a, b)	((a) < (b) ? (a) : (b))
#define MAX(a, b)	((a) > (b) ? (a) : (b))

static void __attribute__((noreturn, format(printf, 1, 2))) die(const char *format, ...)
{
	va_list args;

	fflush(stdout);
	fprintf(stderr, "%s: ", PROGRAM);
	va_start(args, format);
	vfprintf(stderr, format, args);
	va_end(args);
	fputc('\n', stderr);
	_exit(1);
}

/* splitmix64 */
static uint64_t next(uint64_t *state)
{
	uint64_t z = (*state += 0x9e3779b97f4a7c15ULL);

	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
	return z ^ (z >> 31);
}

/* Content that names the request that wrote it, and the sector where. */
static void fill(unsigned char *buffer, uint64_t offset, uint64_t length, uint64_t id)
{
	uint64_t *word = (uint64_t *)buffer;
	uint64_t sector, i, mix;

	for (sector = offset / SECTOR; sector < (offset + length) / SECTOR; sector++) {
		mix = id * 0x9e3779b97f4a7c15ULL ^ sector * 0xbf58476d1ce4e5b9ULL;
		*word++ = id;
		*word++ = sector;
		for (i = 2; i < SECTOR / 8; i++)
			*word++ = mix += 0x94d049bb133111ebULL;
	}
}

/* Do the device and those below it say that they take write zeroes? */
static bool zeroes_offered(int fd)
{
	unsigned long long bytes;
	bool offered = true;
	char path[100];
	struct stat st;
	glob_t found;
	size_t i;
	FILE *f;

	if (fstat(fd, &st))
		die("fstat: %s", strerror(errno));
	snprintf(path, sizeof(path), "/sys/dev/block/%u:%u/{,slaves/*/}queue/write_zeroes_max_bytes",
		 major(st.st_rdev), minor(st.st_rdev));
	if (glob(path, GLOB_BRACE, NULL, &found))
		die("%s: nothing there", path);
	for (i = 0; i < found.gl_pathc; i++) {
		f = fopen(found.gl_pathv[i], "r");
		if (!f || fscanf(f, "%llu", &bytes) != 1)
			die("%s: %s", found.gl_pathv[i], strerror(errno));
		fclose(f);
		offered = offered && bytes;
	}
	globfree(&found);
	return offered;
}

/*
 * Punch a hole; returns 0 or an errno.  @raw: of data_file_raw, whose write zeroes go to
 * the data device: from 6.11 on that takes none any more once it has refused one of some
 * kind.
 */
static int punch_hole(int fd, uint64_t offset, uint64_t length, bool raw)
{
	uint64_t range[2] = { offset, length };
	int mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
	int err = fallocate(fd, mode, offset, length) ? errno : 0;

	if (err == EOPNOTSUPP && raw && !zeroes_offered(fd))
		err = ioctl(fd, BLKZEROOUT, range) ? errno : 0;
	return err;
}

#endif /* PATTERN_H */
