// SPDX-License-Identifier: GPL-2.0-or-later
#include <string.h>

#include "image/bits.h"
#include "lib/util.h"

/* The bits [@from, @to) of one byte; @to can be more than it has. */
static uint8_t mask(uint64_t from, uint64_t to)
{
	return (to >= 8 ? 0xff : (1U << to) - 1) & ~((1U << from) - 1);
}

void bits_set(uint8_t *bits, uint64_t from, uint64_t to)
{
	while (from < to && from % 8) {
		bits[from / 8] |= mask(from % 8, from % 8 + to - from);
		from = min_u64(to, (from / 8 + 1) * 8);
	}
	if (from >= to)
		return;
	memset(bits + from / 8, 0xff, to / 8 - from / 8);
	if (to % 8)
		bits[to / 8] |= mask(0, to % 8);
}

bool bits_clear(uint8_t *bits, uint64_t from, uint64_t to)
{
	bool some = bits_find(bits, from, to, true) < to;

	for (; some && from < to; from = min_u64(to, (from / 8 + 1) * 8))
		bits[from / 8] &= ~mask(from % 8, from % 8 + to - from);
	return some;
}

uint64_t bits_count(const uint8_t *bits, uint64_t n)
{
	uint64_t count = 0, word, i;

	for (i = 0; i + 64 <= n; i += 64) {
		memcpy(&word, bits + i / 8, sizeof(word));
		count += __builtin_popcountll(word);
	}
	for (; i < n; i += 8)
		count += __builtin_popcount(bits[i / 8] & mask(0, n - i));
	return count;
}

uint64_t bits_find(const uint8_t *bits, uint64_t from, uint64_t to, bool value)
{
	uint8_t skip = value ? 0 : 0xff;

	while (from < to) {
		/* whole bytes at once */
		if (!(from % 8) && bits[from / 8] == skip)
			from += 8;
		else if ((bits[from / 8] >> from % 8 & 1) == value)
			return from;
		else
			from++;
	}
	return to;
}
