// SPDX-License-Identifier: GPL-2.0-or-later
#include <stdlib.h>
#include <string.h>

#include "image/extents.h"
#include "lib/util.h"
#include "test.h"

/* What came out: "D0+4 u4+2", with a capital if there is an offset. */
struct text {
	char s[4096];
	size_t len;
	unsigned int stop_after;
};

static int put(const struct extent *e, void *arg)
{
	static const char names[2][4] = { "uzdb", "UZDB" };
	struct text *t = arg;

	t->len += snprintf(t->s + t->len, sizeof(t->s) - t->len,
			   "%s%c%llu+%llu", t->len ? " " : "",
			   names[e->has_offset][e->state],
			   (unsigned long long)e->start,
			   (unsigned long long)e->length);
	return t->stop_after && !--t->stop_after ? 77 : 0;
}

static void test_merge(void **state)
{
	struct text t = { .len = 0 };
	struct extents x = { .size = 100, .fn = put, .arg = &t };

	(void)state;
	extents_add(&x, 10, QCOW2_UNALLOCATED, false);
	extents_add(&x, 10, QCOW2_UNALLOCATED, false);
	extents_add(&x, 10, QCOW2_UNALLOCATED, true);
	extents_add(&x, 0, QCOW2_DATA, true);
	extents_add(&x, 10, QCOW2_ZERO, true);
	extents_add(&x, 10, QCOW2_ZERO, false);
	extents_add(&x, 10, QCOW2_DATA, true);
	/* the rest of it is behind the end */
	extents_add(&x, 70, QCOW2_DATA, true);
	extents_add(&x, 70, QCOW2_ZERO, true);
	assert_int_equal(extents_end(&x), 0);
	assert_string_equal(t.s, "u0+20 U20+10 Z30+10 z40+10 D50+50");
}

static void test_states_only(void **state)
{
	struct text t = { .len = 0 };
	struct extents x = {
		.size = 100, .states_only = true, .fn = put, .arg = &t,
	};

	(void)state;
	extents_add(&x, 10, QCOW2_UNALLOCATED, false);
	extents_add(&x, 10, QCOW2_UNALLOCATED, true);
	extents_add(&x, 10, QCOW2_ZERO, true);
	extents_add(&x, 10, QCOW2_ZERO, false);
	extents_add(&x, 60, QCOW2_DATA, true);
	assert_int_equal(extents_end(&x), 0);
	assert_string_equal(t.s, "u0+20 z20+20 d40+60");
}

static void test_stop(void **state)
{
	struct text t = { .stop_after = 2 };
	struct extents x = { .size = 100, .fn = put, .arg = &t };
	unsigned int i;

	(void)state;
	for (i = 0; i < 10; i++)
		extents_add(&x, 10, i & 1 ? QCOW2_DATA : QCOW2_ZERO, true);
	assert_int_equal(extents_end(&x), 77);
	assert_string_equal(t.s, "Z0+10 D10+10");
}

static const struct qcow2_geometry standard = {
	.size = 40 * 512 - 100, .cluster_bits = 9,
};

static void test_standard(void **state)
{
	struct text t = { .len = 0 };
	struct extents x = { .size = standard.size, .fn = put, .arg = &t };
	__be64 table[64] = { 0 };
	uint32_t bad;

	(void)state;
	assert_int_equal(l2_entries(&standard), 64);
	table[0] = cpu_to_be64(QCOW2_OFLAG_COPIED);
	table[1] = cpu_to_be64(QCOW2_OFLAG_COPIED | 512);
	table[2] = cpu_to_be64(QCOW2_OFLAG_ZERO);
	table[3] = cpu_to_be64(QCOW2_OFLAG_COPIED | 1536 | QCOW2_OFLAG_ZERO);
	table[39] = cpu_to_be64(39 * 512);
	/* behind the end: nobody minds */
	table[40] = cpu_to_be64(QCOW2_OFLAG_COMPRESSED | 4);
	assert_int_equal(extents_add_l2(&x, &standard, table, &bad), QCOW2_OK);
	assert_int_equal(extents_end(&x), 0);
	assert_string_equal(t.s, "D0+1024 z1024+512 Z1536+512 u2048+17920 D19968+412");
}

/* Cluster 0 that is zero has no place, as QEMU sees it. */
static void test_zero_at_zero(void **state)
{
	struct text t = { .len = 0 };
	struct extents x = { .size = 1024, .fn = put, .arg = &t };
	__be64 table[64] = { 0 };
	uint32_t bad;

	(void)state;
	table[0] = cpu_to_be64(QCOW2_OFLAG_COPIED | QCOW2_OFLAG_ZERO);
	table[1] = cpu_to_be64(QCOW2_OFLAG_COPIED | QCOW2_OFLAG_ZERO | 512);
	assert_int_equal(extents_add_l2(&x, &standard, table, &bad), QCOW2_OK);
	extents_end(&x);
	assert_string_equal(t.s, "z0+512 Z512+512");
}

static void test_faults(void **state)
{
	static const uint64_t entries[] = {
		QCOW2_OFLAG_COMPRESSED, 1ULL << 60, 2048, 5 * 512,
		QCOW2_OFLAG_COPIED,
	};
	unsigned int i;

	(void)state;
	for (i = 0; i < ARRAY_SIZE(entries); i++) {
		struct text t = { .len = 0 };
		struct extents x = {
			.size = standard.size, .fn = put, .arg = &t,
		};
		__be64 table[64] = { 0 };
		uint32_t bad = 0;

		table[7] = cpu_to_be64(entries[i]);
		assert_int_not_equal(extents_add_l2(&x, &standard, table, &bad),
				     QCOW2_OK);
		assert_int_equal(bad, 7);
	}
}

static void test_extended(void **state)
{
	const struct qcow2_geometry g = {
		.size = 4 << 14, .cluster_bits = 14, .ext_l2 = true,
	};
	struct text t = { .len = 0 };
	struct extents x = { .size = g.size, .fn = put, .arg = &t };
	__be64 *table = calloc(1, 1 << 14);
	uint32_t bad = 0;

	(void)state;
	assert_non_null(table);
	assert_int_equal(l2_entries(&g), 1024);
	/* allocated, but nothing in it but the last subcluster */
	table[0] = cpu_to_be64(QCOW2_OFLAG_COPIED);
	table[1] = cpu_to_be64(1ULL << 31);
	/* no place, subclusters 1 and 2 are zero */
	table[3] = cpu_to_be64(3ULL << 33);
	/* all data but the first, which is zero */
	table[4] = cpu_to_be64(QCOW2_OFLAG_COPIED | 2 << 14);
	table[5] = cpu_to_be64(1ULL << 32 | 0xfffffffe);
	assert_int_equal(extents_add_l2(&x, &g, table, &bad), QCOW2_OK);
	extents_end(&x);
	assert_string_equal(t.s, "U0+15872 D15872+512 u16384+512 z16896+1024 u17920+14848 Z32768+512 D33280+15872 u49152+16384");

	x = (struct extents){ .size = g.size, .fn = put, .arg = &t };
	table[5] = cpu_to_be64(1ULL << 32 | 0xffffffff);
	assert_int_equal(extents_add_l2(&x, &g, table, &bad),
			 QCOW2_FAULT_SUBCLUSTER_BOTH);
	assert_int_equal(bad, 2);
	free(table);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_merge),
		cmocka_unit_test(test_states_only),
		cmocka_unit_test(test_stop),
		cmocka_unit_test(test_standard),
		cmocka_unit_test(test_zero_at_zero),
		cmocka_unit_test(test_faults),
		cmocka_unit_test(test_extended),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
