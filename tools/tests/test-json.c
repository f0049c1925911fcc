// SPDX-License-Identifier: GPL-2.0-or-later
#include <stdlib.h>
#include <string.h>

#include "lib/json.h"
#include "lib/util.h"
#include "test.h"

/* What is printed while a test runs. */
struct output {
	char *text;
	size_t len;
	FILE *f;
	struct json j;
};

static int set_up(void **state)
{
	struct output *o = calloc(1, sizeof(*o));

	if (!o)
		return -1;
	o->f = open_memstream(&o->text, &o->len);
	json_start(&o->j, o->f);
	*state = o;
	return 0;
}

static int tear_down(void **state)
{
	struct output *o = *state;

	fclose(o->f);
	free(o->text);
	free(o);
	return 0;
}

static void expect(struct output *o, const char *want)
{
	json_end(&o->j);
	fflush(o->f);
	assert_string_equal(o->text, want);
}

static void test_nested(void **state)
{
	struct output *o = *state;

	json_object(&o->j, NULL);
	json_string(&o->j, "a", "b");
	json_number(&o->j, "n", UINT64_MAX);
	json_bool(&o->j, "t", true);
	json_array(&o->j, "list");
	json_bool(&o->j, NULL, false);
	json_object(&o->j, NULL);
	json_object_end(&o->j);
	json_array_end(&o->j);
	json_object_end(&o->j);
	expect(o, "{\n"
		  "    \"a\": \"b\",\n"
		  "    \"n\": 18446744073709551615,\n"
		  "    \"t\": true,\n"
		  "    \"list\": [\n"
		  "        false,\n"
		  "        {}\n"
		  "    ]\n"
		  "}\n");
}

static void test_empty(void **state)
{
	struct output *o = *state;

	json_array(&o->j, NULL);
	json_array_end(&o->j);
	expect(o, "[]\n");
}

static void test_control(void **state)
{
	struct output *o = *state;

	json_stringn(&o->j, NULL, "q\"b\\n\n\0\x1b\x7f", 9);
	expect(o, "\"q\\\"b\\\\n\\u000a\\u0000\\u001b\\u007f\"\n");
}

/* Some terminals take U+009b as the beginning of an escape sequence. */
static void test_c1(void **state)
{
	struct output *o = *state;

	json_string(&o->j, NULL, "\xc2\x9b" "31m\xc2\x80\xc2\xa0");
	expect(o, "\"\\u009b31m\\u0080\xc2\xa0\"\n");
}

static void test_utf8(void **state)
{
	struct output *o = *state;

	json_string(&o->j, NULL, "\xc3\xa4 \xe2\x82\xac \xf0\x9f\x90\x8b");
	expect(o, "\"\xc3\xa4 \xe2\x82\xac \xf0\x9f\x90\x8b\"\n");
}

#define BAD "\\ufffd"

static void test_not_utf8(void **state)
{
	struct output *o = *state;

	/* lone byte, cut sequence, overlong, surrogate, beyond the end */
	json_array(&o->j, NULL);
	json_string(&o->j, NULL, "\xff");
	json_string(&o->j, NULL, "\x80x");
	json_string(&o->j, NULL, "\xe2\x82");
	json_string(&o->j, NULL, "\xc0\xaf");
	json_string(&o->j, NULL, "\xe0\x80\xaf");
	json_string(&o->j, NULL, "\xed\xa0\x80");
	json_string(&o->j, NULL, "\xf4\x90\x80\x80");
	json_array_end(&o->j);
	expect(o, "[\n"
		  "    \"" BAD "\",\n"
		  "    \"" BAD "x\",\n"
		  "    \"" BAD BAD "\",\n"
		  "    \"" BAD BAD "\",\n"
		  "    \"" BAD BAD BAD "\",\n"
		  "    \"" BAD BAD BAD "\",\n"
		  "    \"" BAD BAD BAD BAD "\"\n"
		  "]\n");
}

static void test_failure(void **state)
{
	struct output *o = *state;

	fprintf(o->j.f, "[");
	fail(EX_BUSY, "%s: is \"in\" use; %s", "a; b", "wait; or not");
	fail(EX_WRONG, "what follows; leave it");
	json_failure(o->j.f, 7);
	expect(o, "[\n{\"version\": 1, \"error\": {\"exit\": 7, \"kind\": \"busy\", "
	       "\"message\": \"a; b: is \\\"in\\\" use; wait; or not\", "
	       "\"remedy\": \"wait; or not\"}}\n\n");
	/* A whole value was printed now. */
	json_failure(o->j.f, 7);
	fflush(o->f);
	assert_null(strstr(o->text + 1, "}}\n\n{"));
}

#define TEST(f) cmocka_unit_test_setup_teardown(f, set_up, tear_down)

int main(void)
{
	const struct CMUnitTest tests[] = {
		TEST(test_nested),
		TEST(test_empty),
		TEST(test_control),
		TEST(test_c1),
		TEST(test_utf8),
		TEST(test_not_utf8),
		TEST(test_failure),
	};

	return cmocka_run_group_tests_name("json", tests, NULL, NULL);
}
