// SPDX-License-Identifier: GPL-2.0-or-later
#include <stdlib.h>
#include <string.h>

#include "image/plan.h"
#include "lib/util.h"
#include "test.h"

/*
 * Allocate as the kernel does, one cluster after the other, with a refcount
 * block for each range that has none.  Returns the end of what was taken.
 */
static uint64_t allocate(const struct qcow2_geometry *g, const __be64 *table,
			 uint64_t entries, uint64_t end, uint64_t l2_tables)
{
	uint64_t per_block = refcounts_per_block(g);
	/* ranges below this one have a block, or did not need one */
	uint64_t covered = div_up(end, per_block), next = end;

	/* the range that @end lies in may lack its block, too */
	if (end % per_block && !(end / per_block < entries &&
				 table[end / per_block]))
		covered = end / per_block;
	while (l2_tables--) {
		for (;;) {
			uint64_t range = next / per_block;

			if (range < covered ||
			    (range < entries && table[range])) {
				covered = max_u64(covered, range + 1);
				break;
			}
			/* the block itself takes the first cluster of it */
			covered = range + 1;
			next++;
		}
		next++;
	}
	return next;
}

static void check_worst_case(unsigned int cluster_bits, unsigned int order,
			     uint64_t size, bool ext_l2)
{
	struct qcow2_geometry g = {
		.size = size, .cluster_bits = cluster_bits,
		.refcount_order = order, .reftable_clusters = 1,
		.ext_l2 = ext_l2,
	};
	uint64_t entries = blocks_per_reftable_cluster(&g), need, used, end;
	__be64 *table = calloc(entries, 8);
	struct plan p;

	assert_non_null(table);
	need = qcow2_l1_entries_needed(&g);
	end = 3 + div_up(need * 8, 1ULL << cluster_bits);
	table[0] = cpu_to_be64(2ULL << cluster_bits);
	p = plan_worst_case(&g, table, end, 0, need, UINT64_MAX >> cluster_bits);
	assert_true(p.addressable);
	used = allocate(&g, table, entries, end, need);
	used += p.reftable_clusters;
	/* enough, and not much more */
	assert_true(used <= p.clusters);
	assert_true(p.clusters - used <= 3 + p.clusters / 32);
	assert_true(p.clusters <= max_u64(p.reftable_clusters, 1) *
		    blocks_per_reftable_cluster(&g) * refcounts_per_block(&g));
	if (p.reftable_clusters)
		assert_true(div_up(p.clusters, refcounts_per_block(&g)) > entries);
	free(table);
}

static void test_worst_case(void **state)
{
	static const uint64_t sizes[] = {
		512, 1 << 20, 100 << 20, (100 << 20) + 512, 5ULL << 30,
		128ULL << 30,
	};
	unsigned int bits, order, i;

	(void)state;
	for (bits = 9; bits <= 21; bits++)
		for (order = 0; order <= 6; order++)
			for (i = 0; i < ARRAY_SIZE(sizes); i++)
				check_worst_case(bits, order, sizes[i],
						 bits >= 14 && order % 2);
}

/* The figures of a case that can be done by hand. */
static void test_by_hand(void **state)
{
	/* 512-byte clusters, 64-bit refcounts: 64 per block, 64 blocks */
	struct qcow2_geometry g = {
		.size = 64ULL << 20, .cluster_bits = 9, .refcount_order = 6,
		.reftable_clusters = 1,
	};
	__be64 table[64] = { cpu_to_be64(1024) };
	struct plan p;

	(void)state;
	assert_int_equal(refcounts_per_block(&g), 64);
	assert_int_equal(blocks_per_reftable_cluster(&g), 64);
	/* 2048 L2 tables behind cluster 35: 34 blocks, one is there */
	p = plan_worst_case(&g, table, 35, 0, 2048, UINT64_MAX >> 9);
	assert_int_equal(p.clusters, 35 + 2048 + 33);
	assert_int_equal(p.reftable_clusters, 0);
	/* 4096 more do not fit the table of 64 blocks: 96 + 2 and a new one */
	p = plan_worst_case(&g, table, 35, 0, 6144, UINT64_MAX >> 9);
	assert_int_equal(p.reftable_clusters, 2);
	assert_int_equal(p.clusters, 35 + 6144 + 2 + 98);
	/* leaked clusters take room, too */
	p = plan_worst_case(&g, table, 35, 64, 2048, UINT64_MAX >> 9);
	assert_int_equal(p.clusters, 35 + 64 + 2048 + 34);
	/* a full image needs nothing */
	p = plan_worst_case(&g, table, 35, 0, 0, UINT64_MAX >> 9);
	assert_int_equal(p.clusters, 35);
}

static void test_limit(void **state)
{
	struct qcow2_geometry g = {
		.size = 64ULL << 20, .cluster_bits = 9, .refcount_order = 6,
		.reftable_clusters = 1,
	};
	__be64 table[64] = { cpu_to_be64(1024) };
	struct plan p;

	(void)state;
	p = plan_worst_case(&g, table, 35, 0, 6144, 100);
	assert_int_equal(p.clusters, 100);
	assert_int_equal(p.reftable_clusters, 0);
}

/* A table of 8 MiB is the largest: what it cannot reach must be left out. */
static void test_not_addressable(void **state)
{
	struct qcow2_geometry g = {
		.size = 1ULL << 20, .cluster_bits = 9, .refcount_order = 6,
		.reftable_clusters = QCOW2_MAX_REFTABLE_BYTES >> 9,
	};
	__be64 *table = calloc(1, QCOW2_MAX_REFTABLE_BYTES);
	uint64_t reach = QCOW2_MAX_REFTABLE_BYTES / 8 * 64;
	struct plan p;

	(void)state;
	assert_non_null(table);
	p = plan_worst_case(&g, table, reach - 10, 0, 1000, UINT64_MAX >> 9);
	assert_false(p.addressable);
	assert_int_equal(p.clusters, reach);
	assert_int_equal(p.reftable_clusters, 0);
	free(table);
}

static void check_new(unsigned int bits, unsigned int order, uint64_t size,
		      bool with_l2, bool ext_l2)
{
	struct qcow2_geometry g = {
		.size = size, .cluster_bits = bits, .refcount_order = order,
		.ext_l2 = ext_l2,
	};
	uint64_t l2 = qcow2_l1_entries_needed(&g);
	struct plan_new p;

	assert_true(plan_new(&g, with_l2, &p));
	/* one after the other, without holes */
	assert_int_equal(p.reftable_at, 1);
	assert_int_equal(p.blocks_at, p.reftable_at + p.reftable_clusters);
	assert_int_equal(p.l1_at, p.blocks_at + p.blocks);
	assert_int_equal(p.l2_at, p.l1_at + p.l1_clusters);
	assert_int_equal(p.clusters, p.l2_at + p.l2_tables);
	assert_int_equal(p.l2_tables, with_l2 ? l2 : 0);
	assert_true(p.l1_clusters << bits >= l2 * 8);
	/* all counted, and no block for nothing */
	assert_true(p.blocks * refcounts_per_block(&g) >= p.clusters);
	assert_true((p.blocks - 1) * refcounts_per_block(&g) < p.clusters);
	/* the table reaches as far as the image can ever grow */
	assert_true(p.clusters <= p.worst_case);
	assert_true(p.reftable_clusters * blocks_per_reftable_cluster(&g) *
		    refcounts_per_block(&g) >= p.worst_case);
	assert_true(p.worst_case >= 1 + p.l1_clusters + l2 +
		    p.reftable_clusters +
		    div_up(p.worst_case, refcounts_per_block(&g)));
}

static void test_new(void **state)
{
	static const uint64_t sizes[] = {
		512, 65536, (10 << 20) + 512, 7ULL << 30, 128ULL << 30,
	};
	unsigned int bits, order, i;

	(void)state;
	for (bits = 9; bits <= 21; bits++)
		for (order = 0; order <= 6; order++)
			for (i = 0; i < ARRAY_SIZE(sizes); i++) {
				bool ext = bits >= 14 && order % 2;

				check_new(bits, order, sizes[i], false, ext);
				check_new(bits, order, sizes[i], true, ext);
			}
}

/* Extended entries are twice as long: twice as many tables, and no more. */
static void test_extended(void **state)
{
	struct qcow2_geometry g = {
		.size = 10ULL << 40, .cluster_bits = 16, .refcount_order = 4,
		.reftable_clusters = 1,
	};
	struct plan_new std, ext;

	(void)state;
	assert_true(plan_new(&g, true, &std));
	g.ext_l2 = true;
	assert_true(plan_new(&g, true, &ext));
	assert_int_equal(std.l2_tables, 10 * 2048);
	assert_int_equal(ext.l2_tables, 2 * std.l2_tables);
	assert_true(ext.worst_case > std.worst_case + std.l2_tables);
	assert_true(ext.worst_case <= 2 * std.worst_case);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_worst_case),
		cmocka_unit_test(test_by_hand),
		cmocka_unit_test(test_limit),
		cmocka_unit_test(test_not_addressable),
		cmocka_unit_test(test_new),
		cmocka_unit_test(test_extended),
	};

	return cmocka_run_group_tests_name("plan", tests, NULL, NULL);
}
