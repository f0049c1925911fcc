// SPDX-License-Identifier: GPL-2.0-or-later
#include <stdio.h>

#include "lib/words.h"

#define BUF_SIZE	32

static char *buffer(void)
{
	static char buf[6][BUF_SIZE];
	static unsigned int next;

	return buf[next++ % (sizeof(buf) / sizeof(buf[0]))];
}

const char *human_share(uint64_t part, uint64_t whole)
{
	char *b = buffer();
	double v;

	if (!whole)
		return "-";
	if (!part)
		return "0%";
	if (part >= whole)
		return "100%";
	v = 100.0 * part / whole;
	if (v < 0.1)
		return "<0.1%";
	if (v > 99.9)
		return ">99.9%";
	snprintf(b, BUF_SIZE, v < 9.95 ? "%.1f%%" : "%.3g%%", v);
	return b;
}

const char *human_rate(uint64_t count, uint64_t ms)
{
	char *b = buffer();
	double v;

	if (!ms)
		return "-";
	v = 1000.0 * count / ms;
	if (count && v < 0.01)
		return "<0.01/s";
	snprintf(b, BUF_SIZE, v < 99.95 ? "%.3g/s" : "%.0f/s", v);
	return b;
}
