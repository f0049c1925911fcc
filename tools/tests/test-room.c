// SPDX-License-Identifier: GPL-2.0-or-later
#include "lib/util.h"
#include "system/room.h"
#include "test.h"

#define C	(64 * KIB)

static struct target_status status(uint64_t tables, uint64_t free)
{
	return (struct target_status){
		.cluster_sectors = 128, .l2_tables = tables, .l1_entries = 1000,
		.given = STATUS_FREE_CLUSTERS, .free_clusters = free, .mode = "rw",
	};
}

static void test_device(void **state)
{
	static const struct {
		uint64_t tables, free, clusters;
		enum room_left room;
		uint64_t more;
	} t[] = {
		/* All that can come has room. */
		{ 0, 1000, 2000, ROOM_ENOUGH, 0 },
		{ 999, 1, 2000, ROOM_ENOUGH, 0 },
		{ 1000, 0, 2000, ROOM_ENOUGH, 0 },
		/* Not all, but there is much. */
		{ 0, 126, 2000, ROOM_ENOUGH, 874 + 15 + 2 },
		{ 0, 17, 100, ROOM_ENOUGH, 983 + 15 + 2 },
		/* A sixteenth, or 16 clusters */
		{ 0, 125, 2000, ROOM_LOW, 875 + 15 + 2 },
		{ 0, 16, 100, ROOM_LOW, 984 + 15 + 2 },
		{ 0, 0, 100, ROOM_LOW, 1000 + 15 + 2 },
		{ 998, 1, 2000, ROOM_LOW, 1 + 0 + 2 },
		/* Just loaded: what is in use is not known yet, and yet there are 22 tables. */
		{ 22, 26, 26, ROOM_LOW, 978 + 15 + 2 },
		{ 22, 27, 27, ROOM_LOW, 977 + 15 + 2 },
		{ 900, 1200, 1200, ROOM_ENOUGH, 0 },
	};
	struct target_status s;
	uint64_t more;
	size_t i;

	(void)state;
	for (i = 0; i < ARRAY_SIZE(t); i++) {
		s = status(t[i].tables, t[i].free);
		if (room_of_device(&s, t[i].clusters * C, &more) != t[i].room ||
		    more != t[i].more * C)
			fail_msg("case %zu: %llu more", i, (unsigned long long)more);
	}
}

static void test_device_failed(void **state)
{
	struct target_status s = status(0, 500);
	uint64_t more;

	(void)state;
	s.refused = 1;
	assert_int_equal(room_of_device(&s, 2000 * C, &more), ROOM_OUT);
	assert_true(more == (500 + 15 + 2) * C);
	s.refused = 0;
	s.mode = "nospc";
	assert_int_equal(room_of_device(&s, 2000 * C, &more), ROOM_OUT);
	s = status(0, 0);
	s.mode = "ro";
	assert_int_equal(room_of_device(&s, 2000 * C, &more), ROOM_ENOUGH);
	s.mode = "fail";
	assert_int_equal(room_of_device(&s, 2000 * C, &more), ROOM_ENOUGH);
	/* A module that does not tell */
	s = status(0, 0);
	s.given = 0;
	assert_int_equal(room_of_device(&s, 2000 * C, &more), ROOM_ENOUGH);
}

static void test_file(void **state)
{
	struct target_status s = status(0, 2000);
	uint64_t more;

	(void)state;
	assert_int_equal(room_of_file(&s, 1000, 1000, 0, &more), ROOM_ENOUGH);
	assert_true(more == 0);
	/* The blocks of a file can be more than its length. */
	assert_int_equal(room_of_file(&s, 1000, 4096, 0, &more), ROOM_ENOUGH);
	assert_int_equal(room_of_file(&s, 1000, 600, 800, &more), ROOM_ENOUGH);
	assert_true(more == 400);
	assert_int_equal(room_of_file(&s, 1000, 600, 799, &more), ROOM_LOW);
	assert_int_equal(room_of_file(&s, 1000, 600, 0, &more), ROOM_LOW);
	s.mode = "nospc";
	assert_int_equal(room_of_file(&s, 1000, 600, 5000, &more), ROOM_OUT);
	assert_true(more == 400);
	s.mode = "rw";
	s.refused = 3;
	assert_int_equal(room_of_file(&s, 1000, 600, 5000, &more), ROOM_OUT);
	s.mode = "ro";
	assert_int_equal(room_of_file(&s, 1000, 600, 0, &more), ROOM_ENOUGH);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_device),
		cmocka_unit_test(test_device_failed),
		cmocka_unit_test(test_file),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
