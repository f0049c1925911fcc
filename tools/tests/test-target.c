// SPDX-License-Identifier: GPL-2.0-or-later
#include <stdio.h>
#include <string.h>

#include "target.h"
#include "test.h"
#include "util.h"

static const struct qcow2_geometry geo = {
	.size = 1 << 30, .cluster_bits = 16, .l1_offset = 196608,
	.l1_entries = 2, .reftable_offset = 65536, .reftable_clusters = 1,
	.refcount_order = 4,
};

static const struct target_features none;

static void test_table(void **state)
{
	char line[256];
	struct target_table t;

	(void)state;
	assert_true(target_format_table(line, sizeof(line), "7:0", "/dev/sdb",
					&geo, &none));
	assert_string_equal(line, "7:0 /dev/sdb 16 196608 2 65536 1 4");
	assert_true(target_parse_table(line, &t));
	assert_string_equal(t.metadata_dev, "7:0");
	assert_string_equal(t.data_dev, "/dev/sdb");
	assert_int_equal(t.cluster_bits, 16);
	assert_int_equal(t.l1_offset, 196608);
	assert_int_equal(t.l1_entries, 2);
	assert_int_equal(t.reftable_offset, 65536);
	assert_int_equal(t.reftable_clusters, 1);
	assert_int_equal(t.refcount_order, 4);
	assert_int_equal(t.f.count, 0);
}

static void test_table_features(void **state)
{
	const struct target_features f = {
		.read_only = true, .data_file_raw = true,
	};
	char line[256];
	struct target_table t;

	(void)state;
	assert_true(target_format_table(line, sizeof(line), "7:0", "7:1", &geo,
					&f));
	assert_string_equal(line, "7:0 7:1 16 196608 2 65536 1 4 2 read_only data_file_raw");
	assert_true(target_parse_table(line, &t));
	assert_int_equal(t.f.count, 2);
	assert_string_equal(t.f.name[0], "read_only");
	assert_string_equal(t.f.name[1], "data_file_raw");
	assert_true(t.f.read_only && t.f.data_file_raw);
	assert_false(t.f.extended_l2 || t.f.no_discard_passdown);
	assert_null(t.f.backing_dev);
	assert_int_equal(t.f.cache_limit, 0);
}

/* Features with a value count as two words. */
static void test_table_all_features(void **state)
{
	const struct target_features f = {
		.read_only = true, .data_file_raw = true,
		.backing_dev = "253:7", .no_discard_passdown = true,
		.cache_limit = 1ULL << 33,
	};
	struct qcow2_geometry g = geo;
	char line[256];
	struct target_table t;

	(void)state;
	g.ext_l2 = true;
	assert_true(target_format_table(line, sizeof(line), "7:0", "7:1", &g,
					&f));
	assert_string_equal(line, "7:0 7:1 16 196608 2 65536 1 4 8 read_only data_file_raw extended_l2 backing_dev 253:7 no_discard_passdown cache_limit 8589934592");
	assert_true(target_parse_table(line, &t));
	assert_true(t.f.read_only && t.f.data_file_raw && t.f.extended_l2 &&
		    t.f.no_discard_passdown);
	assert_string_equal(t.f.backing_dev, "253:7");
	assert_int_equal(t.f.cache_limit, 1ULL << 33);
	assert_int_equal(t.f.count, 6);
	assert_string_equal(t.f.name[3], "backing_dev");
	assert_string_equal(t.f.name[4], "no_discard_passdown");
	assert_string_equal(t.f.name[5], "cache_limit");
	/* one that is not known yet, and a device named like a feature */
	assert_true(target_parse_table("7:0 7:1 16 196608 2 65536 1 4 3 shiny backing_dev read_only",
				       &t));
	assert_string_equal(t.f.name[0], "shiny");
	assert_string_equal(t.f.backing_dev, "read_only");
	assert_false(t.f.read_only);
}

static void test_table_too_long(void **state)
{
	const struct target_features f = {
		.read_only = true, .backing_dev = "253:7",
		.no_discard_passdown = true, .cache_limit = 1 << 20,
	};
	char line[256];
	size_t size, len;

	(void)state;
	assert_true(target_format_table(line, sizeof(line), "7:0", "7:1", &geo,
					&f));
	len = strlen(line);
	for (size = 0; size <= len; size++)
		assert_false(target_format_table(line, size, "7:0", "7:1",
						 &geo, &f));
	assert_true(target_format_table(line, len + 1, "7:0", "7:1", &geo,
					&f));
}

static void test_table_bad(void **state)
{
	static const char * const bad[] = {
		"",
		"7:0 7:1 16 196608 2 65536 1",
		"7:0 7:1 x 196608 2 65536 1 4",
		"7:0 7:1 22 196608 2 65536 1 4",
		"7:0 7:1 16 196608 -2 65536 1 4",
		"7:0 7:1 16 196608 2 65536 1 7",
		"7:0 7:1 16 196608 2 65536 1 4 1",
		"7:0 7:1 16 196608 2 65536 1 4 2 read_only",
		"7:0 7:1 16 196608 2 65536 1 4 1 read_only more",
		"7:0 7:1 16 196608 2 65536 1 4 99 read_only",
		"7:0 7:1 16 196608 2 65536 1 4 1 backing_dev",
		"7:0 7:1 16 196608 2 65536 1 4 1 backing_dev 7:2",
		"7:0 7:1 16 196608 2 65536 1 4 1 cache_limit",
		"7:0 7:1 16 196608 2 65536 1 4 2 cache_limit x",
	};
	struct target_table t;
	char line[2048];
	size_t i;

	(void)state;
	for (i = 0; i < ARRAY_SIZE(bad); i++)
		if (target_parse_table(bad[i], &t))
			fail_msg("'%s' was taken as a table", bad[i]);
	memset(line, 'a', sizeof(line) - 1);
	line[sizeof(line) - 1] = 0;
	assert_false(target_parse_table(line, &t));
	for (i = 0; i < sizeof(line) - 1; i += 2)
		line[i] = ' ';
	assert_false(target_parse_table(line, &t));
}

static void test_status(void **state)
{
	struct target_status s;

	(void)state;
	assert_true(target_parse_status("128 3/2048 4 16384 1 5 6 7 8 9 10 1 data_file_raw rw",
					&s));
	assert_int_equal(s.cluster_sectors, 128);
	assert_int_equal(s.l2_tables, 3);
	assert_int_equal(s.l1_entries, 2048);
	assert_int_equal(s.slices_cached, 4);
	assert_int_equal(s.state_bytes, 16384);
	assert_int_equal(s.dirty_slices, 1);
	assert_int_equal(s.hits, 5);
	assert_int_equal(s.misses, 6);
	assert_int_equal(s.first_writes, 7);
	assert_int_equal(s.commits, 8);
	assert_int_equal(s.drops, 9);
	assert_int_equal(s.refused, 10);
	assert_int_equal(s.f.count, 1);
	assert_true(s.f.data_file_raw);
	assert_string_equal(s.mode, "rw");
	assert_true(target_parse_status("128 0/2 0 0 0 0 0 0 0 0 0 0 fail", &s));
	assert_string_equal(s.mode, "fail");
	assert_true(target_parse_status("128 0/2 0 0 0 0 0 0 0 0 3 3 extended_l2 backing_dev 7:1 rw", &s));
	assert_int_equal(s.refused, 3);
	assert_string_equal(s.f.backing_dev, "7:1");
	assert_string_equal(s.mode, "rw");
}

static void test_status_bad(void **state)
{
	static const char * const bad[] = {
		"",
		"128 0/2 0 0 0 0 0 0 0 0 0 0",
		"128 0/2 0 0 0 0 0 0 0 0 0 rw",
		"128 02 0 0 0 0 0 0 0 0 0 0 rw",
		"128 0/ 0 0 0 0 0 0 0 0 0 0 rw",
		"128 0/2 0 0 0 0 0 0 0 0 0 0 rx",
		"128 0/2 0 0 0 0 0 0 0 0 0 0 rw more",
		"128 0/2 0 0 0 0 0 0 0 0 0 1 rw",
		"128 0/2 0 0 0 0 0 0 0 0 x 0 rw",
		"128 0/2 0 0 0 0 x 0 0 0 0 0 rw",
		"128 0/2 0 0 0 0 0 0 0 0 0 1 backing_dev rw",
		"Fail",
	};
	struct target_status s;
	size_t i;

	(void)state;
	for (i = 0; i < ARRAY_SIZE(bad); i++)
		if (target_parse_status(bad[i], &s))
			fail_msg("'%s' was taken as a status", bad[i]);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_table),
		cmocka_unit_test(test_table_features),
		cmocka_unit_test(test_table_all_features),
		cmocka_unit_test(test_table_too_long),
		cmocka_unit_test(test_table_bad),
		cmocka_unit_test(test_status),
		cmocka_unit_test(test_status_bad),
	};

	return cmocka_run_group_tests_name("target", tests, NULL, NULL);
}
