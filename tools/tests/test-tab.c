// SPDX-License-Identifier: GPL-2.0-or-later
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "lib/names.h"
#include "lib/tab.h"
#include "lib/util.h"
#include "test.h"

/* The mistakes of the last text, a line each: "LINE NAME: WHY" */
static char said[8192];

static void tell(unsigned int line, const char *name, const char *why, void *arg)
{
	size_t n = strlen(said);

	assert_ptr_equal(arg, said);
	snprintf(said + n, sizeof(said) - n, "%u %s: %s\n", line, name, why);
}

static struct tab tab;

static void parse(const char *text)
{
	/* Of just that length: what reads behind it is found by valgrind. */
	char *copy = malloc(strlen(text) + !*text);

	memcpy(copy, text, strlen(text));
	tab_free(&tab);
	*said = 0;
	assert_true(tab_parse(&tab, copy, strlen(text), tell, said));
	free(copy);
}

static const struct tab_entry *one(const char *text)
{
	parse(text);
	if (*said)
		fail_msg("refused: %s", said);
	assert_int_equal(tab.nr, 1);
	return &tab.entries[0];
}

static int clean(void **state)
{
	(void)state;
	tab_free(&tab);
	return 0;
}

static void test_fields(void **state)
{
	const struct tab_entry *e;

	(void)state;
	e = one("vm /srv/vm.qcow2 /dev/vg/vm");
	assert_string_equal(e->name, "vm");
	assert_string_equal(e->image, "/srv/vm.qcow2");
	assert_string_equal(e->data, "/dev/vg/vm");
	assert_int_equal(e->line, 1);
	assert_int_equal(e->nr_words, 0);
	assert_false(e->nofail || e->noauto || e->netdev || e->initrd);
	assert_null(e->device_timeout);
	e = one("\tvm\t /a \t/b  - \t\r\n");
	assert_string_equal(e->image, "/a");
	assert_string_equal(e->data, "/b");
	e = one("vm /a - trust-image-paths\n");
	assert_null(e->data);
	assert_int_equal(e->nr_words, 1);
	assert_string_equal(e->words[0].name, "trust-image-paths");
	assert_null(e->words[0].value);
}

static void test_lines(void **state)
{
	(void)state;
	parse("");
	assert_int_equal(tab.nr, 0);
	parse("\n# text\n  \t\n\t# vm /a /b\n#");
	assert_int_equal(tab.nr, 0);
	assert_string_equal(said, "");
	parse("# names\na /a /b\n\nb /c /d\n c /e /f");
	assert_int_equal(tab.nr, 3);
	assert_int_equal(tab.entries[0].line, 2);
	assert_int_equal(tab.entries[1].line, 4);
	assert_int_equal(tab.entries[2].line, 5);
	assert_ptr_equal(tab_find(&tab, "b"), &tab.entries[1]);
	assert_string_equal(tab_find(&tab, "c")->data, "/f");
	assert_null(tab_find(&tab, "d"));
}

static void test_escapes(void **state)
{
	const struct tab_entry *e;

	(void)state;
	e = one("vm /a\\040b\\134\\011 /c\\054\\303\\244 backing-file=/d\\054e\\040f,sparse");
	assert_string_equal(e->image, "/a b\\\t");
	assert_string_equal(e->data, "/c,\303\244");
	assert_int_equal(e->nr_words, 2);
	assert_string_equal(e->words[0].value, "/d,e f");
	assert_string_equal(e->words[1].name, "sparse");
	e = one("vm /.a/..b/... /b../c.");
	assert_string_equal(e->image, "/.a/..b/...");
	/* What is none stays. */
	e = one("vm /a\\400\\08\\x\\000 /b\\");
	assert_string_equal(e->image, "/a\\400\\08\\x\\000");
	assert_string_equal(e->data, "/b\\");
}

static void test_specs(void **state)
{
	const struct tab_entry *e;

	(void)state;
	e = one("vm UUID=4f-A LABEL=a/b\\040\\303\\244 backing-file=PARTUUID=1,data-file=PARTLABEL=x:y");
	assert_string_equal(e->image, "/dev/disk/by-uuid/4f-A");
	assert_string_equal(e->data, "/dev/disk/by-label/a\\x2fb\\x20\303\244");
	assert_int_equal(e->nr_words, 1);
	assert_string_equal(e->words[0].name, "backing-file");
	assert_string_equal(e->words[0].value,
			    "/dev/disk/by-partuuid/1,data-file=/dev/disk/by-partlabel/x:y");
}

static void test_options(void **state)
{
	const struct tab_entry *e;

	(void)state;
	e = one("vm /a /b nofail,noauto,_netdev,x-initrd.attach,x-other=1,x-systemd.device-timeout=1min30s");
	assert_true(e->nofail && e->noauto && e->netdev && e->initrd);
	assert_string_equal(e->device_timeout, "1min30s");
	assert_int_equal(e->nr_words, 0);
	e = one("vm /a /b ,nofail,fail,noauto,,auto,");
	assert_false(e->nofail || e->noauto);
	e = one("vm /a /b read-only,cache-limit=8M,host,backing-file=/c,no-discard-passdown,"
		"backing-file=/d,data-file=/e,unheard-of");
	assert_int_equal(e->nr_words, 7);
	assert_string_equal(e->words[0].name, "readonly");
	assert_string_equal(e->words[1].name, "cache-limit");
	assert_string_equal(e->words[1].value, "8M");
	assert_string_equal(e->words[3].value, "/c");
	assert_string_equal(e->words[5].value, "/d,data-file=/e");
	/* Who knows it is asked later. */
	assert_string_equal(e->words[6].name, "unheard-of");
}

static void test_mistakes(void **state)
{
	static const struct {
		const char *text, *why;
	} wrong[] = {
		{ "vm", "a name, an image and a data device; give all three" },
		{ "vm /a", "give all three, or put #" },
		{ "vm /a /b - x", "more than four fields; put no blanks" },
		{ "vm /a /b a=b, c", "more than four fields" },
		{ "v/m /a /b", "v/m cannot be the name of a device; use letters" },
		{ "control /a /b", "cannot be the name" },
		{ ".. /a /b", "cannot be the name" },
		{ "v\\040m /a /b", "v m cannot be the name" },
		{ "v\303\244 /a /b", "cannot be the name" },
		{ "vm a /b", "image a is not a full path; begin it with /" },
		{ "vm - /b", "image - is not a full path" },
		{ "vm /a b", "data device b is not a full path" },
		{ "vm uuid=1 /b", "image uuid=1 is not a full path" },
		{ "vm /a\\012b /b", "image /a\\x0ab has a line break in its name; give another name" },
		{ "vm /a /b\\015", "data device /b\\x0d has a line break in its name" },
		{ "vm /dev/../b /c", "image /dev/../b has . or .. in it; give the path without them" },
		{ "vm /a /b/.", "data device /b/. has . or .. in it" },
		{ "vm /a /b backing-file=/./c", "backing file /./c has . or .. in it" },
		{ "vm /a -", "no data device; give it in the third field, or add the option trust-image-paths" },
		{ "vm /a - sparse", "no data device" },
		{ "vm /a /b backing-file=c", "backing file c is not a full path" },
		{ "vm /a /b backing-file=/c,data-file=d", "data file d is not a full path" },
		{ "vm /a /b sparse,data-file=/d", "the data device is not an option; give it in the third field" },
		{ "vm /a /b nofail=1", "option nofail takes no value; leave =1 out" },
		{ "vm /a /b x-systemd.device-timeout", "device-timeout= is not a time; use a number" },
		{ "vm /a /b x-systemd.device-timeout=", "is not a time" },
		{ "vm /a /b x-systemd.device-timeout=soon", "=soon is not a time" },
		{ "vm /a /b x-systemd.device-timeout=5parsec", "is not a time" },
		{ "vm /a /b x-systemd.device-timeout=1\\012X", "is not a time" },
	};
	char text[300], begin[300];
	size_t i;

	(void)state;
	for (i = 0; i < ARRAY_SIZE(wrong); i++) {
		/* Lines around it count. */
		snprintf(text, sizeof(text), "a /1 /2\n%s\nb /3 /4\n", wrong[i].text);
		parse(text);
		snprintf(begin, sizeof(begin), "2 ");
		if (!starts_with(said, begin) || !strstr(said, wrong[i].why) ||
		    strchr(said, '\n') != said + strlen(said) - 1)
			fail_msg("'%s': %s", wrong[i].text, said);
		assert_int_equal(tab.nr, 2);
		assert_non_null(tab_find(&tab, "a"));
		assert_non_null(tab_find(&tab, "b"));
	}
}

static void test_names_of_mistakes(void **state)
{
	(void)state;
	parse("vm a /b\nx\ny /a /b\ny /c /d\n");
	assert_string_equal(said, "1 vm: image a is not a full path; begin it with /, UUID=, LABEL=, PARTUUID= or PARTLABEL=\n"
			    "2 x: a line has a name, an image and a data device; give all three, or put # in front of it\n"
			    "4 y: y is the name of line 3, too; choose another name\n");
	assert_string_equal(tab_find(&tab, "y")->image, "/a");
}

static void test_nul(void **state)
{
	static const char text[] = "vm /a\0 /b\nx /a /b";

	(void)state;
	*said = 0;
	tab_free(&tab);
	assert_true(tab_parse(&tab, text, sizeof(text) - 1, tell, said));
	assert_non_null(strstr(said, "1 vm /a: there is a byte of value 0 in it; write"));
	assert_int_equal(tab.nr, 1);
	assert_string_equal(tab.entries[0].name, "x");
}

/* Every byte, and every length up to where a path cannot be longer */
static void test_long(void **state)
{
	char *text = malloc(70000), *p;
	const struct tab_entry *e;
	int i;

	(void)state;
	p = text + sprintf(text, "vm LABEL=");
	for (i = 0; i < 700; i++)
		p = stpcpy(p, "\\040");
	sprintf(p, " /b");
	e = one(text);
	assert_int_equal(strlen(e->image), strlen("/dev/disk/by-label/") + 4 * 700);
	p = text + sprintf(text, "vm /");
	memset(p, 'a', 5000);
	strcpy(p + 5000, " /b");
	parse(text);
	assert_non_null(strstr(said, "is too long; give a shorter name"));
	assert_int_equal(tab.nr, 0);
	p = text + sprintf(text, "vm /a /b ");
	for (i = 0; i < 3000; i++)
		p = stpcpy(p, "backing-file=UUID=,");
	e = one(text);
	assert_int_equal(e->nr_words, 3000);
	assert_string_equal(e->words[2999].value, "/dev/disk/by-uuid/");
	free(text);
}

static void test_unit_escape(void **state)
{
	static const struct {
		const char *path, *unit;
	} good[] = {
		{ "vm", "vm" }, { "my-vm", "my\\x2dvm" }, { "/dev/vg/a-b", "dev-vg-a\\x2db" },
		{ "//dev///vg//", "dev-vg" }, { "/", "-" }, { "a.b", "a.b" },
		{ ".a", "\\x2ea" }, { "/dev/mapper/.a", "dev-mapper-.a" },
		{ "a:b_c", "a:b_c" }, { "a@b=c#d+", "a\\x40b\\x3dc\\x23d\\x2b" },
		{ "/dev/disk/by-label/a\\x20b", "dev-disk-by\\x2dlabel-a\\x5cx20b" },
		{ "\303\244", "\\xc3\\xa4" }, { "", "" },
	};
	char out[64];
	size_t i;

	(void)state;
	for (i = 0; i < ARRAY_SIZE(good); i++) {
		assert_true(unit_escape(out, sizeof(out), good[i].path));
		assert_string_equal(out, good[i].unit);
		assert_true(unit_escape(out, strlen(good[i].unit) + 1, good[i].path));
		assert_false(unit_escape(out, strlen(good[i].unit), good[i].path));
	}
}

static void test_device_names(void **state)
{
	char name[DEVICE_NAME_MAX + 2];

	(void)state;
	memset(name, 'a', sizeof(name));
	name[DEVICE_NAME_MAX + 1] = 0;
	assert_false(device_name_valid(name));
	name[DEVICE_NAME_MAX] = 0;
	assert_true(device_name_valid(name));
	assert_true(device_name_valid("#+-.:=@_09azAZ"));
	assert_false(device_name_valid(""));
	assert_false(device_name_valid("."));
	assert_false(device_name_valid("a b"));
	assert_false(device_name_valid("a%b"));
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_teardown(test_fields, clean),
		cmocka_unit_test_teardown(test_lines, clean),
		cmocka_unit_test_teardown(test_escapes, clean),
		cmocka_unit_test_teardown(test_specs, clean),
		cmocka_unit_test_teardown(test_options, clean),
		cmocka_unit_test_teardown(test_mistakes, clean),
		cmocka_unit_test_teardown(test_names_of_mistakes, clean),
		cmocka_unit_test_teardown(test_nul, clean),
		cmocka_unit_test_teardown(test_long, clean),
		cmocka_unit_test(test_unit_escape),
		cmocka_unit_test(test_device_names),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
