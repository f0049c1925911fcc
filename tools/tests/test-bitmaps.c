// SPDX-License-Identifier: GPL-2.0-or-later
#include <stdlib.h>
#include <string.h>

#include "image/bits.h"
#include "image/extensions.h"
#include "lib/util.h"
#include "test.h"

#define SECTOR		512
#define MOST_CLUSTER	4096

/*
 * Bits
 */

static void test_bits(void **state)
{
	uint8_t bits[32], one[256];
	unsigned int from, to, i, n, round;

	(void)state;
	srandom(1);
	for (round = 0; round < 20000; round++) {
		from = random() % 257;
		to = from + random() % (257 - from);
		for (i = 0; i < 256; i++)
			one[i] = random() % (1 + round % 3) > 0;
		memset(bits, 0, sizeof(bits));
		for (i = 0; i < 256; i++)
			bits[i / 8] |= one[i] << i % 8;
		for (i = n = 0; i < to; i++)
			n += one[i];
		assert_int_equal(bits_count(bits, to), n);
		for (i = from; i < to && !one[i]; i++)
			;
		assert_int_equal(bits_find(bits, from, to, true), i);
		assert_int_equal(bits_clear(bits, from, to), i < to);
		for (i = from; i < to; i++)
			one[i] = 0;
		for (i = 0; i < 256; i++)
			assert_int_equal(bits[i / 8] >> i % 8 & 1, one[i]);
		from = random() % 257;
		to = from + random() % (257 - from);
		bits_set(bits, from, to);
		for (i = from; i < to; i++)
			one[i] = 1;
		for (i = 0; i < 256; i++)
			assert_int_equal(bits[i / 8] >> i % 8 & 1, one[i]);
		for (i = 0; i < 256 && one[i]; i++)
			;
		assert_int_equal(bits_find(bits, 0, 256, false), i);
	}
}

/*
 * The place of the extension
 */

struct layout {
	size_t cluster;
	size_t before, behind;	/* bytes of unknown extensions; 0: none */
	bool bitmaps;
	size_t name;		/* bytes of a backing file name; 0: none */
};

static size_t put(uint8_t *p, uint32_t type, const void *data, uint32_t len)
{
	struct qcow2_extension ext = {
		.type = cpu_to_be32(type), .len = cpu_to_be32(len),
	};

	memcpy(p, &ext, sizeof(ext));
	if (data)
		memcpy(p + sizeof(ext), data, len);
	else
		memset(p + sizeof(ext), 'x', len);
	return sizeof(ext) + ((len + 7) & ~7U);
}

static struct qcow2_bitmaps_ext extension(uint32_t n)
{
	struct qcow2_bitmaps_ext ext = {
		.nb_bitmaps = cpu_to_be32(n),
		.directory_size = cpu_to_be64(n * 64ULL),
		.directory_offset = cpu_to_be64((uint64_t)n << 20),
	};

	return ext;
}

/* What must not fit is not made. */
static bool make(const struct layout *l, uint8_t *p)
{
	struct qcow2_bitmaps_ext ext = extension(7);
	struct qcow2_header h = {
		.magic = cpu_to_be32(QCOW2_MAGIC), .version = cpu_to_be32(3),
		.cluster_bits = cpu_to_be32(__builtin_ctzl(l->cluster)),
		.size = cpu_to_be64(1 << 20),
		.header_length = cpu_to_be32(sizeof(h)),
	};
	size_t at = sizeof(h);

	if (at + l->before + l->behind + l->name + 9 * 8 > l->cluster)
		return false;
	memset(p, 0, l->cluster);
	at += put(p + at, QCOW2_EXT_DATA_FILE, "d.raw", 5);
	if (l->before)
		at += put(p + at, 0x11111111, NULL, l->before - 8);
	if (l->bitmaps)
		at += put(p + at, QCOW2_EXT_BITMAPS, &ext, sizeof(ext));
	if (l->behind)
		at += put(p + at, 0x22222222, NULL, l->behind - 8);
	at += 8;
	if (at + l->name > l->cluster)
		return false;
	if (l->name) {
		memset(p + at, 'n', l->name);
		h.backing_file_offset = cpu_to_be64(at);
		h.backing_file_size = cpu_to_be32(l->name);
	}
	memcpy(p, &h, sizeof(h));
	return true;
}

/* All is there; the number of bitmaps, 0 if there is no extension. */
static uint32_t look(const struct layout *l, const uint8_t *p)
{
	unsigned int unknown = !!l->before + !!l->behind;
	struct header h;
	size_t i;

	assert_int_equal(header_parse(p, l->cluster, &h), HEADER_OK);
	assert_int_equal(h.unknown_extensions, unknown);
	assert_int_equal(h.data_file.len, 5);
	assert_memory_equal(h.data_file.s, "d.raw", 5);
	assert_int_equal(h.backing_file.len, l->name);
	for (i = 0; i < l->name; i++)
		assert_int_equal(h.backing_file.s[i], 'n');
	if (!h.has_bitmaps)
		return 0;
	assert_int_equal(h.bitmap_dir_size, h.bitmap_count * 64ULL);
	assert_int_equal(h.bitmap_dir_offset, (uint64_t)h.bitmap_count << 20);
	return h.bitmap_count;
}

/* From @a to @b, of which some sectors are written: either what was, or what is. */
static void cut(const struct layout *l, const uint8_t *a, const uint8_t *b,
		uint32_t was, uint32_t is)
{
	uint8_t torn[MOST_CLUSTER] = { 0 };
	unsigned int sectors = l->cluster / SECTOR, mask, i;
	uint32_t n;

	for (mask = 0; mask < 1U << sectors; mask++) {
		for (i = 0; i < sectors; i++)
			memcpy(torn + i * SECTOR,
			       (mask >> i & 1 ? b : a) + i * SECTOR, SECTOR);
		n = look(l, torn);
		assert_true(n == was || n == is);
	}
}

/* False: there is no room. */
static bool change(const struct layout *l, uint8_t *p, uint32_t was,
		   uint32_t is)
{
	struct qcow2_bitmaps_ext ext = extension(is);
	uint8_t old[MOST_CLUSTER];
	enum extension_step step;
	unsigned int steps = 0;

	do {
		memcpy(old, p, l->cluster);
		step = extension_put(p, l->cluster, &ext);
		if (step == EXTENSION_NO_ROOM) {
			assert_memory_equal(old, p, l->cluster);
			return false;
		}
		/* With clusters of one sector there is one write, of all. */
		if (l->cluster > SECTOR) {
			if (step == EXTENSION_MORE)
				assert_int_equal(look(l, p), was);
			cut(l, old, p, was, is);
		}
		assert_true(++steps < 8);
	} while (step == EXTENSION_MORE);
	assert_int_equal(look(l, p), is);
	return true;
}

static void drop(const struct layout *l, uint8_t *p, uint32_t was)
{
	uint8_t old[MOST_CLUSTER];

	memcpy(old, p, l->cluster);
	extension_drop(p, l->cluster);
	cut(l, old, p, was, 0);
	assert_int_equal(look(l, p), 0);
}

static bool try(const struct layout *l)
{
	uint8_t p[MOST_CLUSTER] = { 0 }, old[MOST_CLUSTER];
	uint32_t was = l->bitmaps ? 7 : 0;

	if (!make(l, p))
		return true;
	assert_int_equal(look(l, p), was);
	if (!change(l, p, was, 3))
		return false;
	/* It stays where it is then: one write. */
	memcpy(old, p, l->cluster);
	assert_int_equal(extension_put(p, l->cluster,
				       &(struct qcow2_bitmaps_ext){ 0 }),
			 EXTENSION_DONE);
	memcpy(p, old, l->cluster);
	assert_true(change(l, p, 3, 9));
	drop(l, p, 9);
	/* And again, where something is left of it. */
	assert_true(change(l, p, 0, 5));
	drop(l, p, 5);
	return true;
}

static void test_places(void **state)
{
	static const size_t behinds[] = { 0, 16, 400 };
	static const size_t names[] = { 0, 1, 8, 100, 300 };
	struct layout l = { 0 };
	unsigned int i, k, failed = 0, tried = 0;

	(void)state;
	for (l.cluster = 512; l.cluster <= MOST_CLUSTER; l.cluster *= 2)
		for (l.before = 0; l.before < 1100; l.before += 8)
			for (i = 0; i < ARRAY_SIZE(behinds); i++)
				for (k = 0; k < ARRAY_SIZE(names); k++) {
					l.behind = behinds[i];
					l.name = names[k];
					/* all of 8 sectors takes long */
					if (l.cluster == MOST_CLUSTER &&
					    (l.before < 300 || l.before > 500))
						continue;
					for (l.bitmaps = false;;
					     l.bitmaps = true) {
						tried++;
						failed += !try(&l);
						if (l.bitmaps)
							break;
					}
				}
	/* In small clusters only, that are full. */
	assert_true(failed < tried / 10);
	l = (struct layout){ .cluster = 4096, .before = 488 - 128,
			     .behind = 400, .name = 300, .bitmaps = true };
	assert_true(try(&l));
}

/* No end marker, since the names begin there: what they say must not come to be seen. */
static void test_no_marker(void **state)
{
	struct layout l = { .cluster = 1024, .name = 40 };
	struct qcow2_bitmaps_ext ext = extension(1);
	uint8_t p[1024], old[1024];
	struct qcow2_header h;

	(void)state;
	assert_true(make(&l, p));
	memcpy(&h, p, sizeof(h));
	memmove(p + 128, p + 136, 40);
	h.backing_file_offset = cpu_to_be64(128);
	memcpy(p, &h, sizeof(h));
	assert_int_equal(look(&l, p), 0);
	memcpy(old, p, sizeof(p));
	assert_int_equal(extension_put(p, sizeof(p), &ext), EXTENSION_NO_ROOM);
	assert_memory_equal(old, p, sizeof(p));
}

/*
 * What the kernel and the tool say of an entry
 */

static void test_record(void **state)
{
	struct qcow2_bitmap b = {
		.table_offset = 1 << 16, .table_size = 4,
		.flags = QCOW2_BITMAP_AUTO, .type = QCOW2_BITMAP_TYPE_DIRTY,
		.granularity_bits = 9, .name_size = 1,
	}, bad;

	(void)state;
	assert_int_equal(qcow2_bitmap_entries(1 << 30, 9, 16), 4);
	assert_int_equal(qcow2_bitmap_entries((1 << 30) + 1, 9, 16), 5);
	assert_int_equal(qcow2_bitmap_bits(512, 31), 1);
	assert_int_equal(qcow2_bitmap_record_check(&b, 1 << 30, 16, 1 << 20),
			 QCOW2_OK);
	assert_int_equal(qcow2_bitmap_record_check(&b, (1 << 30) + 512, 16,
						   1 << 20),
			 QCOW2_FAULT_BITMAP_TABLE_SIZE);
	assert_int_equal(qcow2_bitmap_record_check(&b, 1 << 30, 16,
						   (1 << 16) + 32), QCOW2_OK);
	assert_int_equal(qcow2_bitmap_record_check(&b, 1 << 30, 16,
						   (1 << 16) + 31),
			 QCOW2_FAULT_BITMAP_TABLE_BEYOND);
	bad = b;
	bad.type = 2;
	assert_int_equal(qcow2_bitmap_record_check(&bad, 1 << 30, 16, 1 << 20),
			 QCOW2_FAULT_BITMAP_TYPE);
	bad = b;
	bad.flags |= 8;
	assert_int_equal(qcow2_bitmap_record_check(&bad, 1 << 30, 16, 1 << 20),
			 QCOW2_FAULT_BITMAP_FLAGS);
	bad = b;
	bad.extra_size = 8;
	assert_int_equal(qcow2_bitmap_record_check(&bad, 1 << 30, 16, 1 << 20),
			 QCOW2_FAULT_BITMAP_EXTRA);
	bad = b;
	assert_true(qcow2_bitmap_records(&bad));
	bad.flags |= QCOW2_BITMAP_IN_USE;
	assert_false(qcow2_bitmap_records(&bad));
	bad.flags = 0;
	assert_false(qcow2_bitmap_records(&bad));
}

static void test_entry(void **state)
{
	__u64 off = 1;

	(void)state;
	assert_int_equal(qcow2_bitmap_entry_check(0, 16, 1 << 20, &off),
			 QCOW2_OK);
	assert_int_equal(off, 0);
	assert_int_equal(qcow2_bitmap_entry_check(1, 16, 1 << 20, &off),
			 QCOW2_OK);
	assert_int_equal(off, 0);
	assert_int_equal(qcow2_bitmap_entry_check(0xf0000, 16, 1 << 20, &off),
			 QCOW2_OK);
	assert_int_equal(off, 0xf0000);
	assert_int_equal(qcow2_bitmap_entry_check(0xf0001, 16, 1 << 20, &off),
			 QCOW2_FAULT_ENTRY_RESERVED);
	assert_int_equal(qcow2_bitmap_entry_check(2, 16, 1 << 20, &off),
			 QCOW2_FAULT_ENTRY_RESERVED);
	assert_int_equal(qcow2_bitmap_entry_check(BIT_ULL(56), 16, 1 << 20, &off),
			 QCOW2_FAULT_ENTRY_RESERVED);
	assert_int_equal(qcow2_bitmap_entry_check(0xf0200, 16, 1 << 20, &off),
			 QCOW2_FAULT_ENTRY_UNALIGNED);
	assert_int_equal(qcow2_bitmap_entry_check(0x100000, 16, 1 << 20, &off),
			 QCOW2_FAULT_ENTRY_BEYOND);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_bits),
		cmocka_unit_test(test_places),
		cmocka_unit_test(test_no_marker),
		cmocka_unit_test(test_record),
		cmocka_unit_test(test_entry),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
