/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Sectors that say what they are: which kind of content, whose sector, and by
 * which request of which run it was written.  qcow2load writes them, qcow2replay
 * knows them again.
 */
#ifndef QCOW2STAMP_H
#define QCOW2STAMP_H

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#define SECTOR		512
#define STAMP_WORDS	(SECTOR / 8)

enum stamp_kind {
	STAMP_REQUEST = 'R',	/* written by a request */
	STAMP_POISON = 'P',	/* was on the data device before: never to be read */
	STAMP_BACKING = 'B',	/* the backing device's */
	STAMP_JUNK = 'J',	/* was in the metadata device's free space before */
};

static inline void stamp(void *buf, enum stamp_kind kind, uint64_t seed,
			 uint64_t sector, uint64_t seq)
{
	uint64_t *w = buf, x;
	unsigned int i;

	/* No valid L1, L2 or refcount table entry in either byte order. */
	w[0] = 0x7fa5c3e100d15c00ULL | (unsigned char)kind;
	w[1] = sector;
	w[2] = seq;
	w[3] = seed;
	x = w[0] ^ (sector << 20) ^ (seq << 44) ^ seed ^ 0x9e3779b97f4a7c15ULL;
	for (i = 4; i < STAMP_WORDS; i++) {
		x ^= x << 13;
		x ^= x >> 7;
		x ^= x << 17;
		w[i] = x;
	}
}

/* Is a sector, in all its bytes, what stamp() made of its first four words? */
static inline bool stamp_valid(const void *buf)
{
	uint64_t w[4], whole[STAMP_WORDS];

	memcpy(w, buf, sizeof(w));
	if (w[0] >> 8 != 0x7fa5c3e100d15cULL)
		return false;
	stamp(whole, w[0] & 0xff, w[3], w[1], w[2]);
	return !memcmp(whole, buf, SECTOR);
}

#endif /* QCOW2STAMP_H */
