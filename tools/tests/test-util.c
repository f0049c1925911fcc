// SPDX-License-Identifier: GPL-2.0-or-later
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "lib/size.h"
#include "lib/util.h"
#include "test.h"

static void test_parse_size(void **state)
{
	static const struct {
		const char *s;
		uint64_t v;
	} good[] = {
		{ "0", 0 }, { "512", 512 }, { "7s", 3584 }, { "1K", 1024 },
		{ "1k", 1024 }, { "3M", 3 << 20 }, { "2G", 2ULL << 30 },
		{ "5T", 5ULL << 40 }, { "1P", 1ULL << 50 }, { "9B", 9 },
		{ "4KiB", 4096 }, { "18446744073709551615", UINT64_MAX },
		{ "16383P", 16383ULL << 50 },
		/* in every spelling the same */
		{ "10G", 10ULL << 30 }, { "10g", 10ULL << 30 },
		{ "10GB", 10ULL << 30 }, { "10gb", 10ULL << 30 },
		{ "10Gb", 10ULL << 30 }, { "10GiB", 10ULL << 30 },
		{ "10gib", 10ULL << 30 }, { "1KB", 1024 }, { "7S", 3584 },
		{ "9b", 9 }, { "15E", 15ULL << 60 }, { "1EiB", 1ULL << 60 },
		{ "007", 7 },
		/* exact, with as many digits as it takes */
		{ "1.5G", 3ULL << 29 }, { "0.5K", 512 }, { "2.0", 2 },
		{ "1.50000000000000000000000000000K", 1536 },
		{ "0.0009765625K", 1 }, { "1.0009765625KiB", 1025 },
		{ "1.001953125s", 513 }, { "8191.5P", 16383ULL << 49 },
		{ "0.0000000000000000008673617379884035472059622406959533691"
		  "40625E", 1 },
		{ "15.999999999999999999132638262011596452794037759304046630"
		  "859375E", UINT64_MAX },
		{ "0x0", 0 }, { "0x10", 16 }, { "0XfF", 255 }, { "0x1b", 27 },
		{ "0x1E", 30 }, { "0xffffffffffffffff", UINT64_MAX },
	};
	uint64_t v;
	size_t i;

	(void)state;
	for (i = 0; i < ARRAY_SIZE(good); i++) {
		if (!parse_size(good[i].s, &v))
			fail_msg("'%s' was not taken as a size", good[i].s);
		assert_int_equal(v, good[i].v);
	}
}

/* What is not taken says why, and leaves the number as it is. */
static void test_size_error(void **state)
{
	static const struct {
		const char *why, *s[12];
	} bad[] = {
		{ "is no number", { "", "K", " 1", ".5G", "x", "auto", "1.",
				    "1.G" } },
		{ "is no number", { "0x", "0xg", ",5G", "iB" } },
		{ "has a sign", { "-1", "+1", "-", "+1G" } },
		{ "is no whole number of bytes",
		  { "1.5", "1.5B", "0.3K", "0.1s", "0.1P", "1.0000001K",
		    "0.00000000000000000043368086899420177360298112034797668"
		    "45703125E" } },
		{ "is too large", { "18446744073709551616", "16384P", "16E",
				    "16.0E", "36028797018963968s",
				    "0x10000000000000000",
				    "99999999999999999999999" } },
		{ "has a unit that is not known",
		  { "1GG", "1 ", "1 G", "1X", "1iB", "1Ki", "10Gbit", "1sB",
		    "1,5G" } },
		{ "has a unit, which a hexadecimal number cannot have",
		  { "0x10G", "0x1s", "0x1.8", "0x1 ", "0x1KiB" } },
		{ "has a unit that is not known",
		  { "1e9", "1.2.3", "1Bi", "1BB", "0b1", "1.5GHz" } },
	};
	const char *const *s;
	const char *why;
	uint64_t v;
	size_t i;

	(void)state;
	assert_null(size_error("10G", &v));
	for (i = 0; i < ARRAY_SIZE(bad); i++)
		for (s = bad[i].s; *s; s++) {
			v = 42;
			why = size_error(*s, &v);
			if (!why)
				fail_msg("'%s' was taken as a size", *s);
			if (strcmp(why, bad[i].why) || v != 42)
				fail_msg("'%s': %s", *s, why);
			assert_false(parse_size(*s, &v));
		}
}

static void test_parse_u64(void **state)
{
	static const char * const bad[] = {
		"", " 1", "-1", "1a", "18446744073709551616",
	};
	uint64_t v;
	size_t i;

	(void)state;
	assert_true(parse_u64("18446744073709551615", &v));
	assert_true(v == UINT64_MAX);
	for (i = 0; i < ARRAY_SIZE(bad); i++)
		assert_false(parse_u64(bad[i], &v));
}

static void test_escape(void **state)
{
	char all[256], out[2048];
	size_t i, n;

	(void)state;
	assert_string_equal(esc("plain /path-1.qcow2"), "plain /path-1.qcow2");
	assert_string_equal(esc("a\nb\x1b[31m\\\xff"),
			    "a\\x0ab\\x1b[31m\\\\\\xff");
	assert_string_equal(escn("a\0b", 3), "a\\x00b");
	for (i = 0; i < sizeof(all); i++)
		all[i] = i;
	n = escape(out, sizeof(out), all, sizeof(all));
	assert_int_equal(n, strlen(out));
	for (i = 0; i < n; i++)
		assert_in_range((unsigned char)out[i], 0x20, 0x7e);
}

static void test_escape_cuts(void **state)
{
	char out[32], in[4096];
	size_t size;

	(void)state;
	memset(in, 1, sizeof(in));
	for (size = 8; size <= sizeof(out); size++) {
		memset(out, 'x', sizeof(out));
		escape(out, size, in, sizeof(in));
		assert_true(strlen(out) < size);
		assert_string_equal(out + strlen(out) - 3, "...");
	}
	/* longer than any static buffer */
	assert_true(strlen(escn(in, sizeof(in))) < 2048);
}

/* What a shell makes of a word is @want. */
static void assert_word(const char *word, const char *want, size_t len)
{
	char cmd[64], path[] = "/tmp/test-util-XXXXXX", got[512];
	int fd = mkstemp(path);
	FILE *shell;

	assert_true(fd >= 0);
	snprintf(cmd, sizeof(cmd), "bash > %s", path);
	shell = popen(cmd, "w");
	assert_non_null(shell);
	fprintf(shell, "printf %%s %s\n", word);
	assert_int_equal(pclose(shell), 0);
	assert_int_equal(read(fd, got, sizeof(got)), len);
	assert_memory_equal(got, want, len);
	close(fd);
	unlink(path);
}

static void test_words_for_a_shell(void **state)
{
	char all[255], long_name[80000];
	const char *word, *p;
	size_t i;

	(void)state;
	assert_string_equal(shell_quote("/dev/vg/vm-1.qcow2"), "/dev/vg/vm-1.qcow2");
	assert_string_equal(shell_quote("it's"), "'it'\\''s'");
	assert_string_equal(shell_quote(""), "''");
	assert_string_equal(shell_quote("-x"), "./-x");
	assert_string_equal(shell_quote("nbd:x"), "./nbd:x");
	assert_string_equal(shell_quote("/a/nbd:x"), "/a/nbd:x");
	assert_string_equal(shell_quote("~root"), "'~root'");
	assert_string_equal(shell_word("-x", 2), "-x");
	for (i = 0; i < sizeof(all); i++)
		all[i] = i + 1;
	word = shell_word(all, sizeof(all));
	for (p = word; *p; p++)
		assert_in_range((unsigned char)*p, 0x20, 0x7e);
	assert_word(word, all, sizeof(all));
	/* without what is no text */
	assert_word(shell_word(all + 0x1f, 0x5f), all + 0x1f, 0x5f);
	memset(long_name, '\1', sizeof(long_name) - 1);
	long_name[sizeof(long_name) - 1] = 0;
	assert_string_equal(shell_quote(long_name), "FILE");
	assert_int_equal(strlen(shell_word(long_name, 16000)), 16000 * 4 + 3);
	assert_string_equal(qemu_image_opts("a,b:c", ",x=y"),
			    "driver=qcow2,file.filename=./a,,b:c,x=y");
	assert_word(qemu_image_opts("it's", ""), "driver=qcow2,file.filename=it's", 31);
}

static void test_human_size(void **state)
{
	(void)state;
	assert_string_equal(human_size(0), "0 B");
	assert_string_equal(human_size(512), "512 B");
	assert_string_equal(human_size(1023), "1023 B");
	assert_string_equal(human_size(65536), "64 KiB");
	assert_string_equal(human_size(1536), "1.5 KiB");
	assert_string_equal(human_size(16ULL << 40), "16 TiB");
	assert_string_equal(human_size(1ULL << 60), "1 EiB");
}

static void test_exit_codes(void **state)
{
	(void)state;
	assert_int_equal(errno_to_exit(EACCES), EX_PERMISSION);
	assert_int_equal(errno_to_exit(EPERM), EX_PERMISSION);
	assert_int_equal(errno_to_exit(ENOMEM), EX_MEMORY);
	assert_int_equal(errno_to_exit(EBUSY), EX_BUSY);
	assert_int_equal(errno_to_exit(EEXIST), EX_BUSY);
	assert_int_equal(errno_to_exit(ENOENT), EX_WRONG);
	assert_int_equal(errno_to_exit(EIO), EX_WRONG);
}

static void test_read_write_at(void **state)
{
	char buf[16] = { 0 };
	FILE *f = tmpfile();

	(void)state;
	assert_non_null(f);
	assert_int_equal(write_at(fileno(f), "0123456789", 10, 5), 0);
	assert_int_equal(read_at(fileno(f), buf, 10, 5), 0);
	assert_string_equal(buf, "0123456789");
	/* a file that ends early is an error, not zeros */
	assert_int_equal(read_at(fileno(f), buf, 11, 5), -EIO);
	assert_int_equal(read_at(-1, buf, 1, 0), -EBADF);
	assert_int_equal(write_at(-1, buf, 1, 0), -EBADF);
	fclose(f);
}

static void test_rounding(void **state)
{
	(void)state;
	assert_int_equal(div_up(0, 7), 0);
	assert_int_equal(div_up(14, 7), 2);
	assert_int_equal(div_up(15, 7), 3);
	assert_true(div_up(UINT64_MAX, 1) == UINT64_MAX);
	assert_int_equal(align_up(1, 512), 512);
	assert_int_equal(align_up(512, 512), 512);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_parse_size),
		cmocka_unit_test(test_size_error),
		cmocka_unit_test(test_parse_u64),
		cmocka_unit_test(test_escape),
		cmocka_unit_test(test_escape_cuts),
		cmocka_unit_test(test_words_for_a_shell),
		cmocka_unit_test(test_human_size),
		cmocka_unit_test(test_exit_codes),
		cmocka_unit_test(test_read_write_at),
		cmocka_unit_test(test_rounding),
	};

	return cmocka_run_group_tests_name("util", tests, NULL, NULL);
}
