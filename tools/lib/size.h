/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Sizes as people write them.  K, M, G, T, P and E are powers of 1024, also with "B" or
 * "iB" behind, in upper or lower case; B is bytes, s sectors of 512 bytes.  "1.5G" is
 * exact, or not taken.  "0x..." has no unit.
 */
#ifndef QCOW2SETUP_SIZE_H
#define QCOW2SETUP_SIZE_H

#include <stdbool.h>
#include <stdint.h>

/*
 * Puts the bytes that @s stands for into *@size and returns NULL; or says what is
 * wrong, in words that go behind @s, and leaves *@size alone.
 */
const char *size_error(const char *s, uint64_t *size);

/* The same, if it need not be known why. */
static inline bool parse_size(const char *s, uint64_t *size)
{
	return !size_error(s, size);
}

#endif
