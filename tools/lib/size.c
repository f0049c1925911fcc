// SPDX-License-Identifier: GPL-2.0-or-later
#include <ctype.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "lib/size.h"

/* More digits than this behind the point are never a whole number of bytes. */
#define MAX_SHIFT	60

static const char no_number[] = "is no number";
static const char too_large[] = "is too large";

static const char *from_hex(const char *s, uint64_t *size)
{
	uint64_t v;
	char *end;

	/* strtoull() would take "0x0x1". */
	if (!isxdigit((unsigned char)s[2]))
		return no_number;
	errno = 0;
	v = strtoull(s, &end, 16);
	if (errno)
		return too_large;
	if (*end)
		return "has a unit, which a hexadecimal number cannot have";
	*size = v;
	return NULL;
}

/* The power of 2 that a unit stands for; -1: it is not known. */
static int unit_shift(const char *unit)
{
	static const char letters[] = "KMGTPE";
	const char *letter;

	if (!*unit || !strcasecmp(unit, "B"))
		return 0;
	if (!strcasecmp(unit, "s"))
		return 9;
	letter = strchr(letters, toupper((unsigned char)*unit));
	if (!letter || (unit[1] && strcasecmp(unit + 1, "B") &&
			strcasecmp(unit + 1, "iB")))
		return -1;
	return 10 * (letter - letters + 1);
}

/*
 * 2^@shift times the fraction with these digits, which has to be a whole number: by
 * doubling it as one does on paper, so that nothing is ever rounded.
 */
static bool scale_fraction(const char *digits, size_t n, int shift,
			   uint64_t *whole)
{
	uint8_t d[MAX_SHIFT];
	unsigned int carry;
	size_t i;

	while (n && digits[n - 1] == '0')
		n--;
	/* Each doubling makes it one digit shorter at best. */
	if (n > (size_t)shift)
		return false;
	for (i = 0; i < n; i++)
		d[i] = digits[i] - '0';
	for (*whole = 0; shift; shift--) {
		for (carry = 0, i = n; i--; carry = d[i] / 10, d[i] %= 10)
			d[i] = 2 * d[i] + carry;
		*whole = *whole << 1 | carry;
	}
	for (i = 0; i < n; i++)
		if (d[i])
			return false;
	return true;
}

const char *size_error(const char *s, uint64_t *size)
{
	const char *digits = "";
	uint64_t v, part;
	size_t n = 0;
	char *end;
	int shift;

	if (*s == '-' || *s == '+')
		return "has a sign";
	if (*s == '0' && (s[1] == 'x' || s[1] == 'X'))
		return from_hex(s, size);
	if (!isdigit((unsigned char)*s))
		return no_number;
	errno = 0;
	v = strtoull(s, &end, 10);
	if (errno)
		return too_large;
	if (*end == '.') {
		digits = end + 1;
		n = strspn(digits, "0123456789");
		end += 1 + n;
		if (!n)
			return no_number;
	}
	shift = unit_shift(end);
	if (shift < 0)
		return "has a unit that is not known";
	if (shift && v >> (64 - shift))
		return too_large;
	if (!scale_fraction(digits, n, shift, &part))
		return "is no whole number of bytes";
	*size = (v << shift) + part;
	return NULL;
}
