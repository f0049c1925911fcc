// SPDX-License-Identifier: GPL-2.0-or-later
#include <stdio.h>
#include <string.h>

#include "lib/util.h"
#include "system/target.h"
#include "test.h"

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

#define TABLE	"7:0 7:1 16 196608 2 65536 1 4"

static void test_table_view(void **state)
{
	const struct target_features f = {
		.cache_limit = 1 << 20, .zeroed_from = 1 << 21,
		.bitmaps = true, .view = "253:9", .view_granularity = 4096,
	}, plain = { .view = "/dev/mapper/cow" };
	char line[256];
	struct target_table t;

	(void)state;
	assert_true(target_format_table(line, sizeof(line), "7:0", "7:1", &geo,
					&f));
	assert_string_equal(line, TABLE " 9 cache_limit 1048576 zeroed_from 2097152 bitmaps view 253:9 view_granularity 4096");
	assert_true(target_parse_table(line, &t));
	assert_string_equal(t.f.view, "253:9");
	assert_int_equal(t.f.view_granularity, 4096);
	assert_int_equal(t.f.cache_limit, 1 << 20);
	assert_int_equal(t.f.zeroed_from, 1 << 21);
	assert_true(t.f.bitmaps);
	assert_null(t.f.unknown);
	assert_int_equal(t.f.count, 5);
	assert_string_equal(t.f.name[3], "view");
	assert_string_equal(t.f.name[4], "view_granularity");
	assert_true(target_format_table(line, sizeof(line), "7:0", "7:1", &geo,
					&plain));
	assert_string_equal(line, TABLE " 2 view /dev/mapper/cow");
	assert_true(target_parse_table(line, &t));
	assert_string_equal(t.f.view, "/dev/mapper/cow");
	assert_int_equal(t.f.view_granularity, 0);
	/* in another order, and a device named like a feature */
	assert_true(target_parse_table(TABLE " 4 view_granularity 18446744073709551615 view view_granularity",
				       &t));
	assert_int_equal(t.f.view_granularity, UINT64_MAX);
	assert_string_equal(t.f.view, "view_granularity");
	assert_int_equal(t.f.count, 2);
	/* It is the name of a device, and no feature. */
	assert_true(target_parse_table(TABLE " 2 backing_dev view", &t));
	assert_null(t.f.view);
	assert_string_equal(t.f.backing_dev, "view");
	/* Not these, which a newer target may have */
	assert_true(target_parse_table(TABLE " 2 views View", &t));
	assert_null(t.f.view);
	assert_string_equal(t.f.unknown, "views");
	assert_true(target_parse_table(TABLE, &t));
	assert_null(t.f.view);
	assert_int_equal(t.f.view_granularity, 0);
}

static void test_table_too_long(void **state)
{
	const struct target_features f = {
		.read_only = true, .backing_dev = "253:7",
		.no_discard_passdown = true, .cache_limit = 1 << 20,
		.zeroed_from = 1 << 20, .bitmaps = true, .view = "253:8",
		.view_granularity = 1 << 20,
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
		TABLE " 1 view",
		TABLE " 1 view 7:2",
		TABLE " 3 view 7:2",
		TABLE " 2 view 7:2 view",
		TABLE " 3 view 7:2 view",
		TABLE " 3 bitmaps read_only view",
		TABLE " 1 view_granularity",
		TABLE " 1 view_granularity 4096",
		TABLE " 3 view 7:2 view_granularity",
		TABLE " 3 view 7:2 view_granularity 4096",
		TABLE " 4 view 7:2 view_granularity x",
		TABLE " 4 view 7:2 view_granularity 4K",
		TABLE " 4 view 7:2 view_granularity -1",
		TABLE " 4 view 7:2 view_granularity 0x1000",
		TABLE " 4 view 7:2 view_granularity 18446744073709551616",
		TABLE " 4 view view_granularity 4096",
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

/* The first version, whose status line cannot grow, and that in which it can. */
static const struct target_version v1_0 = { 1, 0, 0 }, v1_1 = { 1, 1, 0 };

#define NUMBERS	"128 3/2048 4 16384 1 5 6 7 8 9 10 "

static void test_status_old(void **state)
{
	struct target_status s;

	(void)state;
	assert_true(target_parse_status(NUMBERS "1 data_file_raw rw", &v1_0,
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
	assert_int_equal(s.given, 0);
	assert_string_equal(s.mode, "rw");
	assert_true(target_parse_status("128 0/2 0 0 0 0 0 0 0 0 0 0 fail",
					&v1_0, &s));
	assert_string_equal(s.mode, "fail");
	assert_true(target_parse_status("128 0/2 0 0 0 0 0 0 0 0 3 3 extended_l2 backing_dev 7:1 rw",
					&v1_0, &s));
	assert_int_equal(s.refused, 3);
	assert_string_equal(s.f.backing_dev, "7:1");
	assert_string_equal(s.mode, "rw");
}

static void test_status(void **state)
{
	static const char * const modes[] = { "rw", "nospc", "ro", "fail" };
	static const struct target_version later = { 1, 7, 3 };
	struct target_status s;
	char line[256];
	size_t i;

	(void)state;
	for (i = 0; i < ARRAY_SIZE(modes); i++) {
		snprintf(line, sizeof(line),
			 NUMBERS "1 data_file_raw 6 unwritten 11 free_clusters 12 trims 13 %s",
			 modes[i]);
		assert_true(target_parse_status(line, &v1_1, &s));
		assert_int_equal(s.refused, 10);
		assert_int_equal(s.f.count, 1);
		assert_true(s.f.data_file_raw);
		assert_int_equal(s.given, STATUS_UNWRITTEN |
				 STATUS_FREE_CLUSTERS | STATUS_TRIMS);
		assert_int_equal(s.unwritten, 11);
		assert_int_equal(s.free_clusters, 12);
		assert_int_equal(s.trims, 13);
		assert_string_equal(s.mode, modes[i]);
	}
	/* if bitmaps are kept */
	assert_true(target_parse_status(NUMBERS "1 bitmaps 10 bitmaps 2 exact_granules 3 durable_granules 4 mark_waits 5 taken_back 6 rw",
					&later, &s));
	assert_true(s.f.bitmaps);
	assert_int_equal(s.given, STATUS_BITMAPS | STATUS_EXACT_GRANULES |
			 STATUS_DURABLE_GRANULES | STATUS_MARK_WAITS |
			 STATUS_TAKEN_BACK);
	assert_int_equal(s.bitmaps, 2);
	assert_int_equal(s.exact_granules, 3);
	assert_int_equal(s.durable_granules, 4);
	assert_int_equal(s.mark_waits, 5);
	assert_int_equal(s.taken_back, 6);
	/* in any order, and among others that a newer target has */
	assert_true(target_parse_status(NUMBERS "0 10 trims 1 a b unwritten 18446744073709551615 rw ro 7 seven rw",
					&later, &s));
	assert_int_equal(s.given, STATUS_UNWRITTEN | STATUS_TRIMS);
	assert_int_equal(s.unwritten, UINT64_MAX);
	assert_int_equal(s.trims, 1);
	assert_string_equal(s.mode, "rw");
	/* what is named like a key, but is none */
	assert_true(target_parse_status(NUMBERS "2 backing_dev unwritten 2 key trims ro",
					&v1_1, &s));
	assert_int_equal(s.given, 0);
	assert_string_equal(s.f.backing_dev, "unwritten");
	assert_true(target_parse_status(NUMBERS "0 0 nospc", &v1_1, &s));
	assert_int_equal(s.given, 0);
	assert_string_equal(s.mode, "nospc");
}

/* What a target says of a view, which is there as long as it has one. */
static void test_status_view(void **state)
{
	static const char * const views[] = {
		"valid", "ended", "no_space", "cow_device", "device",
		"no_memory", "what-a-newer-one-says", "view_kept", "7",
	};
	static const struct target_version v1_4 = { 1, 4, 0 };
	struct target_status s;
	char line[256];
	size_t i;

	(void)state;
	for (i = 0; i < ARRAY_SIZE(views); i++) {
		snprintf(line, sizeof(line),
			 NUMBERS "4 view 7:9 view_granularity 4096 12 unwritten 1 free_clusters 2 trims 3 view %s view_kept 18446744073709551615 view_zero 5 rw",
			 views[i]);
		assert_true(target_parse_status(line, &v1_4, &s));
		assert_string_equal(s.view, views[i]);
		assert_int_equal(s.given, STATUS_UNWRITTEN |
				 STATUS_FREE_CLUSTERS | STATUS_TRIMS |
				 STATUS_VIEW_KEPT | STATUS_VIEW_ZERO);
		assert_int_equal(s.view_kept, UINT64_MAX);
		assert_int_equal(s.view_zero, 5);
		assert_int_equal(s.trims, 3);
		assert_string_equal(s.f.view, "7:9");
		assert_int_equal(s.f.view_granularity, 4096);
		assert_string_equal(s.mode, "rw");
	}
	/* among others, and in another order */
	assert_true(target_parse_status(NUMBERS "2 view 7:9 10 view_zero 3 new key view_kept 2 view valid more 1 nospc",
					&v1_4, &s));
	assert_string_equal(s.view, "valid");
	assert_int_equal(s.given, STATUS_VIEW_KEPT | STATUS_VIEW_ZERO);
	assert_int_equal(s.view_kept, 2);
	assert_int_equal(s.view_zero, 3);
	assert_string_equal(s.mode, "nospc");
	/* what is named so, but is none: the table has a view, the line tells nothing of it */
	assert_true(target_parse_status(NUMBERS "2 view valid 4 key view trims 1 ro",
					&v1_4, &s));
	assert_null(s.view);
	assert_string_equal(s.f.view, "valid");
	assert_int_equal(s.given, STATUS_TRIMS);
	assert_true(target_parse_status(NUMBERS "0 2 unwritten 0 rw", &v1_4,
					&s));
	assert_null(s.view);
	assert_null(s.f.view);
	assert_int_equal(s.view_kept, 0);
	assert_int_equal(s.view_zero, 0);
}

/* As many keys as there will ever be. */
static void test_status_long(void **state)
{
	char line[4096];
	struct target_status s;
	int n, i;

	(void)state;
	n = snprintf(line, sizeof(line), NUMBERS "0 202 unwritten 5");
	for (i = 0; i < 100; i++)
		n += snprintf(line + n, sizeof(line) - n, " of-a-newer-one-%d %d",
			      i, i);
	snprintf(line + n, sizeof(line) - n, " rw");
	assert_true(n > 1024);
	assert_true(target_parse_status(line, &v1_1, &s));
	assert_int_equal(s.unwritten, 5);
	memset(line + n, ' ', sizeof(line) - n - 1);
	line[sizeof(line) - 1] = 0;
	memcpy(line + n + 1, "rw", 2);
	assert_true(target_parse_status(line, &v1_1, &s));
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
		"128 0/2 0 0 0 0 0 0 0 0 0 0 nospc",
		"128 0/2 0 0 0 0 0 0 0 0 0 0 rw more",
		"128 0/2 0 0 0 0 0 0 0 0 0 1 rw",
		"128 0/2 0 0 0 0 0 0 0 0 x 0 rw",
		"128 0/2 0 0 0 0 x 0 0 0 0 0 rw",
		"128 0/2 0 0 0 0 0 0 0 0 0 1 backing_dev rw",
		/* the line of 1.1 */
		"128 0/2 0 0 0 0 0 0 0 0 0 0 2 unwritten 0 rw",
		"Fail",
	};
	struct target_status s;
	size_t i;

	(void)state;
	for (i = 0; i < ARRAY_SIZE(bad); i++)
		if (target_parse_status(bad[i], &v1_0, &s))
			fail_msg("'%s' was taken as a status", bad[i]);
}

static void test_status_bad_keys(void **state)
{
	static const char * const bad[] = {
		/* the line of 1.0 */
		"rw",
		"0",
		"0 x",
		"0 rx",
		"0 0 0",
		"0 rw more",
		"-0 rw",
		"x rw",
		"1 unwritten rw",
		"1 rw",
		"2 unwritten rw",
		"2 unwritten 0",
		"2 unwritten x rw",
		"2 unwritten -1 rw",
		"2 unwritten 18446744073709551616 rw",
		"2 unwritten 0 trims 1 rw",
		"4 unwritten 0 rw",
		"4 unwritten 0 unwritten 0 rw",
		"6 unwritten 0 trims 1 rw",
		"3 unwritten 0 trims 1 rw",
		"3 unwritten 0 rw",
		"18446744073709551615 unwritten 0 rw",
		"18446744073709551616 unwritten 0 rw",
		"2 unwritten 0 nospace",
		"2 unwritten 0 rw rw",
		"1 view rw",
		"2 view rw",
		"2 view valid",
		"3 view valid view_kept rw",
		"4 view valid view_kept rw",
		"4 view valid view valid rw",
		"6 view valid trims 1 view ended rw",
		"2 view_kept x rw",
		"2 view_kept -1 rw",
		"2 view_kept 18446744073709551616 rw",
		"4 view_kept 0 view_kept 0 rw",
		"2 view_zero valid rw",
		"4 view_zero 1 view_zero 1 rw",
	};
	static const struct target_version others[] = {
		{ 0, 9, 0 }, { 2, 0, 0 }, { 2, 1, 0 },
	};
	const char *good = NUMBERS "0 8 unwritten 0 view valid view_kept 1 view_zero 2 rw";
	struct target_status s;
	char line[256];
	size_t i;

	(void)state;
	for (i = 0; i < ARRAY_SIZE(bad); i++) {
		snprintf(line, sizeof(line), NUMBERS "0 %s", bad[i]);
		if (target_parse_status(line, &v1_1, &s))
			fail_msg("'%s' was taken as a status", line);
	}
	/* every beginning of a line */
	assert_true(target_parse_status(good, &v1_1, &s));
	for (i = 0; i < strlen(good); i++) {
		memcpy(line, good, i);
		line[i] = 0;
		assert_false(target_parse_status(line, &v1_1, &s));
	}
	for (i = 0; i < ARRAY_SIZE(others); i++)
		assert_false(target_parse_status(good, &others[i], &s));
}

static void test_lacks(void **state)
{
	static const struct target_version old = { 0, 9, 0 };
	struct target_table t;

	(void)state;
	assert_true(target_parse_table("7:0 7:1 16 196608 2 65536 1 4", &t));
	assert_null(target_lacks(&v1_0, &t));
	assert_true(target_parse_table("7:0 7:1 16 196608 2 65536 1 4 8 read_only data_file_raw extended_l2 backing_dev 7:2 no_discard_passdown cache_limit 65536",
				       &t));
	assert_null(t.f.unknown);
	assert_null(target_lacks(&v1_0, &t));
	assert_null(target_lacks(&v1_1, &t));
	assert_string_equal(target_lacks(&old, &t), "read_only");
	assert_true(target_parse_table("7:0 7:1 16 196608 2 65536 1 4 4 read_only shiny cache_limit 65536",
				       &t));
	assert_string_equal(t.f.unknown, "shiny");
	assert_string_equal(target_lacks(&v1_1, &t), "shiny");
}

/* Each with the first version that has it */
static void test_lacks_newer(void **state)
{
	static const struct {
		const char *features, *first;
		unsigned int minor;
	} newer[] = {
		{ "2 zeroed_from 65536", "zeroed_from", 2 },
		{ "2 read_only bitmaps", "bitmaps", 3 },
		{ "2 view 7:2", "view", 4 },
		{ "4 view_granularity 4096 view 7:2", "view_granularity", 4 },
		{ "5 view 7:2 view_granularity 4096 bitmaps", "view", 4 },
	};
	struct target_version v = { TARGET_MAJOR, 0, 9 };
	struct target_table t;
	char line[256];
	size_t i;

	(void)state;
	for (i = 0; i < ARRAY_SIZE(newer); i++) {
		snprintf(line, sizeof(line), TABLE " %s", newer[i].features);
		assert_true(target_parse_table(line, &t));
		assert_null(t.f.unknown);
		for (v.minor = 0; v.minor < newer[i].minor; v.minor++) {
			const char *lacks = target_lacks(&v, &t);

			assert_non_null(lacks);
			/* an older one lacks what it lacks first */
			assert_string_equal(lacks, newer[i].first);
		}
		assert_null(target_lacks(&v, &t));
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_table),
		cmocka_unit_test(test_table_features),
		cmocka_unit_test(test_table_all_features),
		cmocka_unit_test(test_table_view),
		cmocka_unit_test(test_table_too_long),
		cmocka_unit_test(test_table_bad),
		cmocka_unit_test(test_status_old),
		cmocka_unit_test(test_status),
		cmocka_unit_test(test_status_view),
		cmocka_unit_test(test_status_long),
		cmocka_unit_test(test_status_bad),
		cmocka_unit_test(test_status_bad_keys),
		cmocka_unit_test(test_lacks),
		cmocka_unit_test(test_lacks_newer),
	};

	return cmocka_run_group_tests_name("target", tests, NULL, NULL);
}
