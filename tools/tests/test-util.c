// SPDX-License-Identifier: GPL-2.0-or-later
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

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
	};
	static const char * const bad[] = {
		"", "K", "-1", "+1", " 1", "1 ", "1.5G", "1KB", "1Ki", "1GG",
		"0x10", "18446744073709551616", "16384P", "1S", "1X", "1iB",
		"36028797018963968s",
	};
	uint64_t v;
	size_t i;

	(void)state;
	for (i = 0; i < ARRAY_SIZE(good); i++) {
		assert_true(parse_size(good[i].s, &v));
		assert_int_equal(v, good[i].v);
	}
	for (i = 0; i < ARRAY_SIZE(bad); i++)
		if (parse_size(bad[i], &v))
			fail_msg("'%s' was taken as a size", bad[i]);
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
