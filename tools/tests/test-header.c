// SPDX-License-Identifier: GPL-2.0-or-later
#include <stdlib.h>
#include <string.h>

#include "image/header.h"
#include "lib/util.h"
#include "test.h"

#define CLUSTER		65536

/* A header that is built field by field, in a buffer of exactly its size. */
struct build {
	uint8_t *p;
	size_t len;
	size_t at;		/* next extension */
};

static void put32(uint8_t *p, uint32_t v)
{
	__be32 be = cpu_to_be32(v);

	memcpy(p, &be, 4);
}

static void put64(uint8_t *p, uint64_t v)
{
	__be64 be = cpu_to_be64(v);

	memcpy(p, &be, 8);
}

static void start(struct build *b, size_t len)
{
	struct qcow2_header h = {
		.magic = cpu_to_be32(QCOW2_MAGIC),
		.version = cpu_to_be32(3),
		.cluster_bits = cpu_to_be32(16),
		.size = cpu_to_be64(1 << 30),
		.l1_size = cpu_to_be32(2),
		.l1_table_offset = cpu_to_be64(3 * CLUSTER),
		.refcount_table_offset = cpu_to_be64(CLUSTER),
		.refcount_table_clusters = cpu_to_be32(1),
		.incompatible_features = cpu_to_be64(QCOW2_INCOMPAT_DATA_FILE),
		.refcount_order = cpu_to_be32(4),
		.header_length = cpu_to_be32(112),
	};

	b->len = len;
	/* exactly, so that valgrind sees any access beyond */
	b->p = calloc(1, len);
	assert_non_null(b->p);
	memcpy(b->p, &h, min_u64(sizeof(h), len));
	b->at = 112;
}

static int set_up(void **state)
{
	struct build *b = malloc(sizeof(*b));

	start(b, CLUSTER);
	*state = b;
	return 0;
}

static int tear_down(void **state)
{
	struct build *b = *state;

	free(b->p);
	free(b);
	return 0;
}

static void extension(struct build *b, uint32_t type, const void *data,
		      uint32_t len)
{
	put32(b->p + b->at, type);
	put32(b->p + b->at + 4, len);
	memcpy(b->p + b->at + 8, data, len);
	b->at += 8 + align_up(len, 8);
}

static void backing(struct build *b, uint64_t off, const char *name, size_t len)
{
	put64(b->p + 8, off);
	put32(b->p + 16, len);
	memcpy(b->p + off, name, len);
}

static void expect_fault(struct build *b, enum header_fault want)
{
	struct header h;
	enum header_fault got = header_parse(b->p, b->len, &h);

	if (got != want)
		fail_msg("fault is '%s', not '%s'", header_fault_str(got),
			 header_fault_str(want));
}

static void expect_span(const struct span *s, const char *want)
{
	assert_non_null(s->s);
	assert_int_equal(s->len, strlen(want));
	assert_memory_equal(s->s, want, s->len);
}

static void test_plain(void **state)
{
	struct build *b = *state;
	struct qcow2_geometry g;
	struct header h;

	assert_int_equal(header_parse(b->p, b->len, &h), HEADER_OK);
	assert_int_equal(h.version, 3);
	assert_int_equal(h.cluster_bits, 16);
	assert_int_equal(h.refcount_order, 4);
	assert_int_equal(h.size, 1 << 30);
	assert_int_equal(h.incompatible, QCOW2_INCOMPAT_DATA_FILE);
	assert_null(h.data_file.s);
	assert_null(h.backing_file.s);
	assert_false(h.has_bitmaps);
	/* what is kept of it is what the shared check needs */
	assert_int_equal(qcow2_header_check(&h.raw, false, &g), QCOW2_OK);
	assert_int_equal(g.l1_offset, 3 * CLUSTER);
	assert_int_equal(g.l1_entries, 2);
}

static void test_short(void **state)
{
	struct build *b = *state;
	struct header h;
	size_t len;

	for (len = 0; len < 300; len++)
		assert_int_equal(header_parse(b->p, len, &h), HEADER_SHORT);
	assert_int_equal(header_parse(b->p, CLUSTER - 1, &h), HEADER_SHORT);
}

static void test_not_qcow2(void **state)
{
	struct build *b = *state;

	b->p[3] = 0xfa;
	expect_fault(b, HEADER_MAGIC);
	b->len = 4;
	expect_fault(b, HEADER_MAGIC);
}

static void test_version(void **state)
{
	struct build *b = *state;

	put32(b->p + 4, 1);
	expect_fault(b, HEADER_VERSION);
	put32(b->p + 4, 4);
	expect_fault(b, HEADER_VERSION);
}

static void test_version_2(void **state)
{
	struct build *b = *state;
	struct header h;

	put32(b->p + 4, 2);
	/* what would be version 3 fields are the first extension here */
	memset(b->p + 72, 0, 40);
	b->at = 72;
	extension(b, QCOW2_EXT_BACKING_FORMAT, "raw", 3);
	assert_int_equal(header_parse(b->p, b->len, &h), HEADER_OK);
	assert_int_equal(h.header_length, 72);
	assert_int_equal(h.refcount_order, 4);
	assert_int_equal(h.incompatible, 0);
	expect_span(&h.backing_format, "raw");
}

static void test_cluster_bits(void **state)
{
	struct build *b = *state;
	uint32_t bits;

	for (bits = 0; bits < 40; bits++) {
		put32(b->p + 20, bits);
		if (bits < 9 || bits > 21)
			expect_fault(b, HEADER_CLUSTER_BITS);
		else
			expect_fault(b, bits <= 16 ? HEADER_OK : HEADER_SHORT);
	}
	put32(b->p + 20, 0xffffffff);
	expect_fault(b, HEADER_CLUSTER_BITS);
}

static void test_header_length(void **state)
{
	static const struct {
		uint32_t len;
		enum header_fault fault;
	} cases[] = {
		{ 0, HEADER_LENGTH }, { 72, HEADER_LENGTH },
		{ 103, HEADER_LENGTH }, { 104, HEADER_OK },
		{ 105, HEADER_LENGTH }, { 112, HEADER_OK },
		{ 120, HEADER_OK }, { CLUSTER, HEADER_OK },
		{ CLUSTER + 8, HEADER_LENGTH }, { 0xfffffff8, HEADER_LENGTH },
	};
	struct build *b = *state;
	size_t i;

	for (i = 0; i < ARRAY_SIZE(cases); i++) {
		put32(b->p + 100, cases[i].len);
		expect_fault(b, cases[i].fault);
	}
}

static void test_extensions(void **state)
{
	struct build *b = *state;
	struct header h;

	extension(b, QCOW2_EXT_DATA_FILE, "data.raw", 8);
	extension(b, 0x12345678, "what is this", 12);
	extension(b, QCOW2_EXT_BACKING_FORMAT, "qcow2", 5);
	extension(b, 0x12345678, "", 0);
	assert_int_equal(header_parse(b->p, b->len, &h), HEADER_OK);
	expect_span(&h.data_file, "data.raw");
	expect_span(&h.backing_format, "qcow2");
	assert_int_equal(h.unknown_extensions, 2);
}

/* Which files clone has made; what is no such mark is none, and no fault. */
static void test_clone_mark(void **state)
{
	static const uint8_t mark[16] = { [6] = 1, [7] = 2, [8] = 3, [15] = 4 };
	struct build *b = *state;
	struct header h;

	extension(b, HEADER_EXT_CLONE, mark, 16);
	assert_int_equal(header_parse(b->p, b->len, &h), HEADER_OK);
	assert_true(h.clone);
	assert_int_equal(h.clone_image, 0x102);
	assert_int_equal(h.clone_data, 0x0300000000000004);
	assert_int_equal(h.unknown_extensions, 0);
	/* The last one counts. */
	extension(b, HEADER_EXT_CLONE, mark, 15);
	assert_int_equal(header_parse(b->p, b->len, &h), HEADER_OK);
	assert_false(h.clone);
}

/* What follows the end marker is no extension. */
static void test_end_marker(void **state)
{
	struct build *b = *state;
	struct header h;

	extension(b, QCOW2_EXT_END, "", 0);
	extension(b, QCOW2_EXT_DATA_FILE, "data.raw", 8);
	assert_int_equal(header_parse(b->p, b->len, &h), HEADER_OK);
	assert_null(h.data_file.s);
}

/* The spec leaves the content of the padding open. */
static void test_padding(void **state)
{
	struct build *b = *state;
	struct header h;

	extension(b, QCOW2_EXT_DATA_FILE, "abc", 3);
	memset(b->p + b->at - 5, 0xff, 5);
	extension(b, QCOW2_EXT_BACKING_FORMAT, "raw", 3);
	assert_int_equal(header_parse(b->p, b->len, &h), HEADER_OK);
	expect_span(&h.data_file, "abc");
	expect_span(&h.backing_format, "raw");
}

/* Extensions that fill the room to its last byte have no end marker. */
static void test_no_end_marker(void **state)
{
	struct build *b = *state;
	char name[CLUSTER];
	struct header h;

	memset(name, 'n', sizeof(name));
	extension(b, QCOW2_EXT_DATA_FILE, name, CLUSTER - 120);
	assert_int_equal(b->at, CLUSTER);
	assert_int_equal(header_parse(b->p, b->len, &h), HEADER_OK);
	assert_int_equal(h.data_file.len, CLUSTER - 120);
	/* the same without the padding */
	put32(b->p + 116, CLUSTER - 121);
	assert_int_equal(header_parse(b->p, b->len, &h), HEADER_OK);
	assert_int_equal(h.data_file.len, CLUSTER - 121);
}

static void test_extension_too_long(void **state)
{
	struct build *b = *state;

	extension(b, QCOW2_EXT_DATA_FILE, "abc", 3);
	put32(b->p + 116, CLUSTER - 119);
	expect_fault(b, HEADER_EXT_LEN);
	put32(b->p + 116, 0xffffffff);
	expect_fault(b, HEADER_EXT_LEN);
}

/* With a backing file the extensions end where its name starts. */
static void test_extension_meets_backing(void **state)
{
	struct build *b = *state;
	struct header h;

	extension(b, QCOW2_EXT_DATA_FILE, "abcdefgh", 8);
	backing(b, 128, "base", 4);
	assert_int_equal(header_parse(b->p, b->len, &h), HEADER_OK);
	expect_span(&h.backing_file, "base");
	backing(b, 127, "base", 4);
	expect_fault(b, HEADER_EXT_LEN);
	backing(b, 119, "base", 4);
	expect_fault(b, HEADER_EXT_CUT);
	backing(b, 112, "base", 4);
	expect_fault(b, HEADER_OK);
	/* a few bytes before it that are zero are padding */
	memset(b->p + 112, 0, 16);
	backing(b, 117, "base", 4);
	expect_fault(b, HEADER_OK);
}

static void test_extension_twice(void **state)
{
	static const uint32_t types[] = {
		QCOW2_EXT_DATA_FILE, QCOW2_EXT_BACKING_FORMAT,
		QCOW2_EXT_FEATURE_NAMES, QCOW2_EXT_LUKS, QCOW2_EXT_BITMAPS,
	};
	static const uint32_t lens[] = { 3, 3, 48, 16, 24 };
	uint8_t data[48] = "abc";
	size_t i;

	(void)state;
	for (i = 0; i < ARRAY_SIZE(types); i++) {
		struct build b;

		start(&b, CLUSTER);
		if (types[i] == QCOW2_EXT_BITMAPS) {
			memset(data, 0, sizeof(data));
			put32(data, 1);
			put64(data + 8, 32);
			put64(data + 16, CLUSTER);
		}
		extension(&b, types[i], data, lens[i]);
		expect_fault(&b, HEADER_OK);
		extension(&b, types[i], data, lens[i]);
		expect_fault(&b, HEADER_EXT_TWICE);
		free(b.p);
	}
}

static void test_names(void **state)
{
	static const struct {
		uint32_t type, len;
		const char *data;
		enum header_fault fault;
	} cases[] = {
		{ QCOW2_EXT_DATA_FILE, 0, "", HEADER_DATA_FILE_LEN },
		{ QCOW2_EXT_DATA_FILE, 3, "a\0b", HEADER_DATA_FILE_NUL },
		{ QCOW2_EXT_DATA_FILE, 4, "abc\0", HEADER_DATA_FILE_NUL },
		{ QCOW2_EXT_DATA_FILE, 2, "\n\xff", HEADER_OK },
		{ QCOW2_EXT_BACKING_FORMAT, 0, "", HEADER_FORMAT_LEN },
		{ QCOW2_EXT_BACKING_FORMAT, 15, "123456789012345", HEADER_OK },
		{ QCOW2_EXT_BACKING_FORMAT, 16, "1234567890123456", HEADER_FORMAT_LEN },
		{ QCOW2_EXT_BACKING_FORMAT, 3, "r\0w", HEADER_FORMAT_NUL },
		{ QCOW2_EXT_FEATURE_NAMES, 0, "", HEADER_OK },
		{ QCOW2_EXT_FEATURE_NAMES, 2, "ab", HEADER_FEATURES_LEN },
		{ QCOW2_EXT_LUKS, 15, "123456789012345", HEADER_LUKS_LEN },
		{ QCOW2_EXT_LUKS, 16, "1234567890123456", HEADER_OK },
	};
	size_t i;

	(void)state;
	for (i = 0; i < ARRAY_SIZE(cases); i++) {
		struct build b;

		start(&b, CLUSTER);
		extension(&b, cases[i].type, cases[i].data, cases[i].len);
		expect_fault(&b, cases[i].fault);
		free(b.p);
	}
}

static enum qcow2_fault header_check_of(const struct build *b)
{
	struct qcow2_geometry g;
	struct qcow2_header h;

	memcpy(&h, b->p, sizeof(h));
	return qcow2_header_check(&h, false, &g);
}

static void test_backing(void **state)
{
	struct build *b = *state;
	char name[1024];
	struct header h;

	memset(name, 'b', sizeof(name));
	backing(b, 1024, name, 1023);
	assert_int_equal(header_parse(b->p, b->len, &h), HEADER_OK);
	assert_int_equal(h.backing_file.len, 1023);
	/* a place, but no name */
	backing(b, 1024, name, 0);
	assert_int_equal(header_parse(b->p, b->len, &h), HEADER_OK);
	assert_null(h.backing_file.s);
	backing(b, 1024, name, 1024);
	expect_fault(b, HEADER_BACKING_NAME);
	backing(b, CLUSTER - 4, name, 4);
	expect_fault(b, HEADER_OK);
	put64(b->p + 8, CLUSTER - 3);
	expect_fault(b, HEADER_BACKING_OFFSET);
	put64(b->p + 8, UINT64_MAX);
	expect_fault(b, HEADER_BACKING_OFFSET);
	put64(b->p + 8, 111);
	expect_fault(b, HEADER_BACKING_OFFSET);
	backing(b, 2048, "a\0b", 3);
	expect_fault(b, HEADER_BACKING_NUL);
	/* A name longer than the cluster leaves no place that is right. */
	put32(b->p + 20, 9);
	put64(b->p + 8, 1 << 24);
	put32(b->p + 16, 583);
	expect_fault(b, HEADER_BACKING_OFFSET);
	assert_int_equal(header_check_of(b), QCOW2_FAULT_BACKING_OFFSET);
}

static void test_feature_names(void **state)
{
	struct build *b = *state;
	uint8_t table[96] = { 0, 63 };
	struct header h;
	struct span name;

	memset(table + 2, 'x', 46);
	table[48] = 2;
	table[49] = 7;
	memcpy(table + 50, "seven", 5);
	extension(b, QCOW2_EXT_FEATURE_NAMES, table, sizeof(table));
	assert_int_equal(header_parse(b->p, b->len, &h), HEADER_OK);
	name = header_feature_name(&h, 0, 63);
	assert_int_equal(name.len, 46);
	name = header_feature_name(&h, 2, 7);
	expect_span(&name, "seven");
	name = header_feature_name(&h, 0, 7);
	assert_null(name.s);
}

static void bitmaps_extension(struct build *b, uint32_t nb, uint32_t reserved,
			      uint64_t size, uint64_t off)
{
	uint8_t data[24];

	put32(data, nb);
	put32(data + 4, reserved);
	put64(data + 8, size);
	put64(data + 16, off);
	b->at = 112;
	extension(b, QCOW2_EXT_BITMAPS, data, sizeof(data));
}

static void test_bitmaps_extension(void **state)
{
	struct build *b = *state;
	struct header h;

	bitmaps_extension(b, 2, 0, 64, 5 * CLUSTER);
	assert_int_equal(header_parse(b->p, b->len, &h), HEADER_OK);
	assert_true(h.has_bitmaps);
	assert_int_equal(h.bitmap_count, 2);
	assert_int_equal(h.bitmap_dir_size, 64);
	assert_int_equal(h.bitmap_dir_offset, 5 * CLUSTER);

	bitmaps_extension(b, 2, 1, 64, CLUSTER);
	expect_fault(b, HEADER_BITMAPS_RESERVED);
	bitmaps_extension(b, 0, 0, 64, CLUSTER);
	expect_fault(b, HEADER_BITMAPS_COUNT);
	bitmaps_extension(b, 65536, 0, 65536 * 32, CLUSTER);
	expect_fault(b, HEADER_BITMAPS_COUNT);
	bitmaps_extension(b, 65535, 0, 65535 * 24, CLUSTER);
	expect_fault(b, HEADER_OK);
	bitmaps_extension(b, 2, 0, 47, CLUSTER);
	expect_fault(b, HEADER_BITMAPS_DIR_SIZE);
	bitmaps_extension(b, 2, 0, 1024 * 65535 + 1, CLUSTER);
	expect_fault(b, HEADER_BITMAPS_DIR_SIZE);
	bitmaps_extension(b, 2, 0, UINT64_MAX, CLUSTER);
	expect_fault(b, HEADER_BITMAPS_DIR_SIZE);
	bitmaps_extension(b, 2, 0, 64, CLUSTER + 512);
	expect_fault(b, HEADER_BITMAPS_DIR_OFFSET);
	bitmaps_extension(b, 2, 0, 64, 0);
	expect_fault(b, HEADER_BITMAPS_DIR_OFFSET);
	bitmaps_extension(b, 2, 0, 64, 1ULL << 60);
	expect_fault(b, HEADER_BITMAPS_DIR_OFFSET);
	bitmaps_extension(b, 2, 0, 64, CLUSTER);
	put32(b->p + 116, 23);
	expect_fault(b, HEADER_BITMAPS_LEN);
}

/* Any header with one byte changed is parsed without a fault of ours. */
static void test_every_byte(void **state)
{
	struct build *b = *state;
	struct header h;
	unsigned int v;
	size_t i;

	extension(b, QCOW2_EXT_DATA_FILE, "data.raw", 8);
	bitmaps_extension(b, 1, 0, 32, CLUSTER);
	for (i = 0; i < 160; i++)
		for (v = 0; v < 256; v += 5) {
			uint8_t old = b->p[i];

			b->p[i] = v;
			assert_in_range(header_parse(b->p, b->len, &h),
					HEADER_OK, HEADER_FAULT_LAST - 1);
			b->p[i] = old;
		}
}

static void test_fault_texts(void **state)
{
	int i, k;

	(void)state;
	for (i = 0; i < HEADER_FAULT_LAST; i++) {
		assert_string_not_equal(header_fault_str(i), "unknown fault");
		for (k = 0; k < i; k++)
			assert_string_not_equal(header_fault_str(i),
						header_fault_str(k));
	}
}

/*
 * Bitmap directory
 */

/* Append an entry; returns the new length. */
static size_t entry(uint8_t *p, size_t at, uint32_t flags, const char *name,
		    size_t name_len, uint32_t extra)
{
	put64(p + at, 7 * CLUSTER);
	put32(p + at + 8, 1);
	put32(p + at + 12, flags);
	p[at + 16] = 1;
	p[at + 17] = 16;
	p[at + 18] = name_len >> 8;
	p[at + 19] = name_len;
	put32(p + at + 20, extra);
	memcpy(p + at + 24 + extra, name, name_len);
	return at + align_up(24 + extra + name_len, 8);
}

struct seen {
	unsigned int n, stop_at;
	struct bitmap b[4];
};

static int see(const struct bitmap *b, void *arg)
{
	struct seen *s = arg;

	if (s->n < ARRAY_SIZE(s->b))
		s->b[s->n] = *b;
	return ++s->n == s->stop_at ? 42 : 0;
}

static void test_directory(void **state)
{
	uint8_t dir[256] = { 0 };
	struct seen s = { 0 };
	const char *why = NULL;
	size_t len;

	(void)state;
	len = entry(dir, 0, QCOW2_BITMAP_AUTO, "first", 5, 0);
	len = entry(dir, len, QCOW2_BITMAP_IN_USE, "second one", 10, 8);
	assert_int_equal(bitmaps_parse(dir, len, 2, 16, see, &s, &why), 0);
	assert_int_equal(s.n, 2);
	expect_span(&s.b[0].name, "first");
	assert_int_equal(s.b[0].head.flags, QCOW2_BITMAP_AUTO);
	assert_int_equal(s.b[0].at, 0);
	assert_int_equal(s.b[0].head.table_offset, 7 * CLUSTER);
	assert_int_equal(s.b[0].head.table_size, 1);
	assert_int_equal(s.b[0].head.granularity_bits, 16);
	expect_span(&s.b[1].name, "second one");
	assert_int_equal(s.b[1].head.flags, QCOW2_BITMAP_IN_USE);
	assert_int_equal(s.b[1].at, 32);

	s = (struct seen){ .stop_at = 1 };
	assert_int_equal(bitmaps_parse(dir, len, 2, 16, see, &s, &why), 42);
	assert_int_equal(s.n, 1);
}

static void expect_bad_dir(const uint8_t *dir, size_t len, uint32_t count)
{
	const char *why = NULL;
	uint8_t *copy = malloc(len);

	/* a copy of exactly that size, for valgrind */
	assert_non_null(copy);
	memcpy(copy, dir, len);
	assert_int_equal(bitmaps_parse(copy, len, count, 16, NULL, NULL, &why),
			 -1);
	assert_non_null(why);
	free(copy);
}

static void test_directory_bad(void **state)
{
	uint8_t good[256] = { 0 }, dir[256];
	const char *why;
	size_t len, i;

	(void)state;
	len = entry(good, 0, 0, "name", 4, 0);
	assert_int_equal(bitmaps_parse(good, len, 1, 16, NULL, NULL, &why), 0);

	for (i = 0; i < len; i++)	/* cut anywhere */
		expect_bad_dir(good, i ? i : 1, 1);
	expect_bad_dir(good, len, 2);	/* counts too many */
	expect_bad_dir(good, len + 8, 1); /* something is left */

#define BAD(change) do {					\
		memcpy(dir, good, sizeof(dir));			\
		change;						\
		expect_bad_dir(dir, len, 1);			\
	} while (0)

	BAD(put64(dir, 0));
	BAD(put64(dir, CLUSTER + 512));
	BAD(put64(dir, 1ULL << 60));
	BAD(put32(dir + 8, 0x8000001));
	BAD(dir[16] = 0);
	BAD(dir[16] = 2);
	BAD(dir[17] = 8);
	BAD(dir[17] = 32);
	BAD(dir[19] = 0);
	BAD(dir[19] = 9);
	BAD(dir[25] = 0);
	BAD(put32(dir + 20, 8));
	BAD(put32(dir + 20, 0xffffffff));
}

#define TEST(f) cmocka_unit_test_setup_teardown(f, set_up, tear_down)

int main(void)
{
	const struct CMUnitTest tests[] = {
		TEST(test_plain),
		TEST(test_short),
		TEST(test_not_qcow2),
		TEST(test_version),
		TEST(test_version_2),
		TEST(test_cluster_bits),
		TEST(test_header_length),
		TEST(test_extensions),
		TEST(test_clone_mark),
		TEST(test_end_marker),
		TEST(test_padding),
		TEST(test_no_end_marker),
		TEST(test_extension_too_long),
		TEST(test_extension_meets_backing),
		TEST(test_extension_twice),
		TEST(test_names),
		TEST(test_backing),
		TEST(test_feature_names),
		TEST(test_bitmaps_extension),
		TEST(test_every_byte),
		TEST(test_fault_texts),
		TEST(test_directory),
		TEST(test_directory_bad),
	};

	return cmocka_run_group_tests_name("header", tests, NULL, NULL);
}
