// SPDX-License-Identifier: GPL-2.0-or-later
/* What is said of how far something is.  When, and where, tests/progress.sh looks at. */
#include "test.h"

#include "lib/progress.h"
#include "lib/util.h"

static void text_is(struct progress *p, uint64_t now, const char *want)
{
	char text[200];

	progress_text(p, now, text, sizeof(text));
	assert_string_equal(text, want);
}

static void test_text(void **state)
{
	struct progress p = {
		.what = "copy", .total = 4096 * MIB, .done = 1024 * MIB,
		.begun = 5000, .since = 5000,
	};

	(void)state;
	/* No rate is known in the first moment. */
	text_is(&p, 5000, "copy: 1 GiB of 4 GiB (25%)");
	text_is(&p, 7000, "copy: 1 GiB of 4 GiB (25%), 512 MiB/s, 6 s left");
	p.done = 0;
	text_is(&p, 7000, "copy: 0 B of 4 GiB (0%)");
	p.done = p.total;
	text_is(&p, 9000, "copy: 4 GiB of 4 GiB (100%), 1 GiB/s, 0 s left");
}

/* Of what was there before, nothing says how fast it is now. */
static void test_skipped(void **state)
{
	struct progress p = { .what = "copy", .total = 1000 * MIB };

	(void)state;
	progress_skip(&p, 500 * MIB);
	progress_at(&p, 510 * MIB);
	text_is(&p, 1000, "copy: 510 MiB of 1000 MiB (51%), 10 MiB/s, 49 s left");
	/* It does not go back. */
	progress_at(&p, 400 * MIB);
	assert_int_equal(p.done, 510 * MIB);
}

static void test_long(void **state)
{
	char small[20];
	struct progress p = { .what = "x", .total = 100000 * KIB, .done = KIB };

	(void)state;
	text_is(&p, 1000, "x: 1 KiB of 97.7 MiB (0%), 1 KiB/s, 27 h 46 min left");
	p.total = 101 * KIB;
	text_is(&p, 1000, "x: 1 KiB of 101 KiB (0%), 1 KiB/s, 1 min 40 s left");
	/* Nothing overflows. */
	p.total = UINT64_MAX;
	p.done = UINT64_MAX - 1;
	progress_text(&p, 1000, small, sizeof(small));
	p.total = 0;
	text_is(&p, 0, "x: 0 B of 0 B (100%)");
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_text),
		cmocka_unit_test(test_skipped),
		cmocka_unit_test(test_long),
	};

	return cmocka_run_group_tests_name("progress", tests, NULL, NULL);
}
