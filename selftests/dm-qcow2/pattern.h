/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What qcow2stress and qcow2race share: requests, random numbers, and content that tells
 * who wrote it.
 */
#ifndef PATTERN_H
#define PATTERN_H

#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
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

#endif /* PATTERN_H */
