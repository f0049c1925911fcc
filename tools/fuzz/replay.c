// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * usage: FUZZER [COUNT SEED] FILE...
 *
 * Runs a fuzzer on files, and then on COUNT variants of them: bytes changed,
 * numbers put to their limits, pieces of other files put in.  The same SEED makes
 * the same ones.  The last line is the sum.
 */
#include <string.h>

#include "fuzz.h"

#define MAX_INPUT	(1U << 16)

struct input {
	uint8_t *data;
	size_t size;
};

static uint64_t state;

/* xorshift64*: the same on every machine, unlike random() */
static uint32_t draw(uint32_t below)
{
	state ^= state >> 12;
	state ^= state << 25;
	state ^= state >> 27;
	return (state * 0x2545f4914f6cdd1dULL >> 32) % below;
}

static void load(struct input *in, const char *path)
{
	FILE *f = fopen(path, "rb");

	in->data = malloc(MAX_INPUT);
	if (!f || !in->data) {
		perror(path);
		exit(1);
	}
	in->size = fread(in->data, 1, MAX_INPUT, f);
	fclose(f);
}

static void mutate(struct input *m, const struct input *other)
{
	static const uint64_t limits[] = {
		0, 1, 2, 0x1ff, 0x200, 0x7fffffff, 0x80000000, 0xffffffff,
		1ULL << 56, 1ULL << 62, 1ULL << 63, INT64_MAX, UINT64_MAX,
	};
	static const char digits[] = "0123456789+- \n/x";
	uint64_t v = limits[draw(sizeof(limits) / sizeof(limits[0]))];
	size_t at = draw(m->size), n, from;

	switch (draw(7)) {
	case 0:
		m->data[at] ^= 1 << draw(8);
		break;
	case 1:
		m->data[at] = draw(256);
		break;
	case 2:
		m->data[at] += draw(33) - 16;
		break;
	case 3:
		m->data[at] = digits[draw(sizeof(digits) - 1)];
		break;
	case 4:
		/* big endian, as in an image */
		for (n = draw(2) ? 8 : 4; n-- && at < m->size; at++)
			m->data[at] = v >> 8 * n;
		break;
	case 5:
		from = draw(other->size);
		n = 1 + draw(64);
		if (n > other->size - from)
			n = other->size - from;
		if (n > m->size - at)
			n = m->size - at;
		memcpy(m->data + at, other->data + from, n);
		break;
	default:
		if (at)
			m->size = at;
	}
}

int main(int argc, char **argv)
{
	long count = argc > 2 ? strtol(argv[1], NULL, 10) : 0, i;
	int first = 1, n, k;
	struct input *in, m = { .data = NULL };

	if (count || (argc > 2 && !strcmp(argv[1], "0"))) {
		state = strtoull(argv[2], NULL, 10) * 2 + 1;
		first = 3;
	}
	n = argc - first;
	in = calloc(n > 0 ? n : 1, sizeof(*in));
	if (n < 1 || !in) {
		fprintf(stderr, "usage: %s [COUNT SEED] FILE...\n", argv[0]);
		return 1;
	}
	for (k = 0; k < n; k++) {
		load(&in[k], argv[first + k]);
		LLVMFuzzerTestOneInput(in[k].data, in[k].size);
	}
	for (i = 0; i < count; i++) {
		const struct input *base = &in[draw(n)];

		if (!base->size)
			continue;
		/* exactly as long as it is, so that reads behind it show */
		m.data = malloc(base->size);
		if (!m.data)
			return 1;
		memcpy(m.data, base->data, base->size);
		m.size = base->size;
		for (k = 1 + draw(6); k; k--) {
			const struct input *other = &in[draw(n)];

			if (other->size)
				mutate(&m, other);
		}
		LLVMFuzzerTestOneInput(m.data, m.size);
		free(m.data);
	}
	for (k = 0; k < n; k++)
		free(in[k].data);
	free(in);
	printf("%s: %d files, %ld variants, nothing found\n", argv[0], n, count);
	return 0;
}
