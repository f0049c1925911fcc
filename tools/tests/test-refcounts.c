// SPDX-License-Identifier: GPL-2.0-or-later
#include <stdlib.h>
#include <string.h>

#include "image/refcounts.h"
#include "lib/util.h"
#include "test.h"

static void test_empty(void **state)
{
	struct refs refs = { .ref = NULL };
	struct ref_group group;
	size_t i = 0;

	(void)state;
	refs_sort(&refs);
	assert_false(refs_next(&refs, &i, &group));
	assert_int_equal(refs_at(&refs, 0).n, 0);
	refs_free(&refs);
}

static void test_ranges(void **state)
{
	struct refs refs = { .ref = NULL };

	(void)state;
	/* nothing, one byte, a cluster, and one that lies across a border */
	assert_true(refs_add(&refs, REF_L1, 0, 65536, 0, 16));
	assert_int_equal(refs.n, 0);
	assert_true(refs_add(&refs, REF_L1, 0, 65536, 1, 16));
	assert_int_equal(refs.n, 1);
	assert_true(refs_add(&refs, REF_L2, 5, 131072, 65536, 16));
	assert_int_equal(refs.n, 2);
	assert_true(refs_add(&refs, REF_L2, 6, 131072 + 512, 65536, 16));
	assert_int_equal(refs.n, 4);
	refs_sort(&refs);
	assert_int_equal(refs_at(&refs, 0).n, 0);
	assert_int_equal(refs_at(&refs, 1).n, 1);
	assert_int_equal(refs_at(&refs, 2).n, 2);
	assert_int_equal(refs_at(&refs, 3).n, 1);
	assert_int_equal(refs_at(&refs, 3).ref->index, 6);
	assert_int_equal(refs_at(&refs, 4).n, 0);
	refs_free(&refs);
}

/* Against counters, in any order and with any number of users. */
static void test_many(void **state)
{
	enum { CLUSTERS = 700, REFS = 5000 };
	unsigned int count[CLUSTERS] = { 0 }, c, n;
	struct refs refs = { .ref = NULL };
	struct ref_group group;
	uint64_t last = 0;
	size_t i = 0, seen = 0;

	(void)state;
	srandom(1);
	for (n = 0; n < REFS; n++) {
		c = random() % CLUSTERS;
		if (c % 3)
			continue;
		count[c]++;
		assert_true(refs_add(&refs, random() % (REF_LUKS + 1), n,
				     c * 512ULL, 512, 9));
	}
	refs_sort(&refs);
	while (refs_next(&refs, &i, &group)) {
		assert_true(!seen || group.ref->cluster > last);
		last = group.ref->cluster;
		assert_int_equal(group.n, count[last]);
		for (n = 1; n < group.n; n++)
			assert_true(group.ref[n].kind >= group.ref[n - 1].kind);
		seen += group.n;
	}
	assert_int_equal(seen, refs.n);
	for (c = 0; c < CLUSTERS; c++)
		assert_int_equal(refs_at(&refs, c).n, count[c]);
	refs_free(&refs);
}

static void test_names(void **state)
{
	struct ref ref = { .index = 4294967295U };
	unsigned int kind, other;
	char name[REF_LUKS + 1][48];

	(void)state;
	for (kind = 0; kind <= REF_LUKS; kind++) {
		ref.kind = kind;
		snprintf(name[kind], sizeof(name[0]), "%s", ref_name(&ref));
		assert_null(strstr(name[kind], "unknown"));
		for (other = 0; other < kind; other++)
			assert_string_not_equal(name[kind], name[other]);
	}
	assert_string_equal(name[REF_L2], "L2 table 4294967295");
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_empty),
		cmocka_unit_test(test_ranges),
		cmocka_unit_test(test_many),
		cmocka_unit_test(test_names),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
