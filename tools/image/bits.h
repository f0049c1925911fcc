/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The bits of a bitmap: bit n is bit n % 8 of byte n / 8.  Pure code. */
#ifndef QCOW2SETUP_BITS_H
#define QCOW2SETUP_BITS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Set the bits [@from, @to). */
void bits_set(uint8_t *bits, uint64_t from, uint64_t to);
/* Clear the bits [@from, @to); were some of them set? */
bool bits_clear(uint8_t *bits, uint64_t from, uint64_t to);
/* How many of the first @n bits are set? */
uint64_t bits_count(const uint8_t *bits, uint64_t n);
/* First bit in [@from, @to) that is @value, or @to. */
uint64_t bits_find(const uint8_t *bits, uint64_t from, uint64_t to, bool value);

#endif
