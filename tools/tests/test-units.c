// SPDX-License-Identifier: GPL-2.0-or-later
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "generator/units.h"
#include "lib/util.h"
#include "test.h"

static void none(unsigned int line, const char *name, const char *why, void *arg)
{
	(void)arg;
	fail_msg("line %u, %s: %s", line, name, why);
}

/* The lines that the service of a line has, each of them between two "\n" */
static char *units(const char *line)
{
	struct tab tab;
	char *out, *text;
	size_t len;
	FILE *f;

	assert_true(tab_parse(&tab, line, strlen(line), none, NULL));
	assert_int_equal(tab.nr, 1);
	f = open_memstream(&out, &len);
	unit_write(f, "/etc/tab", &tab.entries[0]);
	fclose(f);
	tab_free(&tab);
	assert_true(asprintf(&text, "\n%s", out) > 0);
	free(out);
	return text;
}

static void has(const char *line, const char *const *want, const char *const *unwanted)
{
	char *text = units(line);

	for (; *want; want++)
		if (!strstr(text, *want))
			fail_msg("'%s': no '%s' in %s", line, *want, text);
	for (; *unwanted; unwanted++)
		if (strstr(text, *unwanted))
			fail_msg("'%s': '%s' in %s", line, *unwanted, text);
	free(text);
}

#define HAS(LINE, ...)	has(LINE, (const char *const[]){ __VA_ARGS__, NULL }, nothing)
static const char *const nothing[] = { NULL };

static void test_devices(void **state)
{
	(void)state;
	HAS("my-vm /dev/vg/meta UUID=1-2",
	    "\nBindsTo=dev-vg-meta.device\nAfter=dev-vg-meta.device blockdev@dev-vg-meta.target\n",
	    "\nBindsTo=dev-disk-by\\x2duuid-1\\x2d2.device\n",
	    "\nWants=blockdev@dev-mapper-my\\x2dvm.target\nBefore=blockdev@dev-mapper-my\\x2dvm.target\n",
	    "\nSourcePath=/etc/tab\n", "\nBefore=qcow2setup.target\n",
	    "\nConflicts=umount.target\nBefore=umount.target\n", "\nAfter=qcow2setup-pre.target\n");
}

static void test_files(void **state)
{
	(void)state;
	HAS("vm /srv/a\\040b%\\042\\134c /dev/sda",
	    "\nRequiresMountsFor=\"/srv/a b%%\\\"\\\\c\"\n", "\nBindsTo=dev-sda.device\n");
	/* There is no escape for it that systemd reads. */
	HAS("vm /srv/a\\011b /srv/c", "\nRequiresMountsFor=\"/srv/a\tb\"\n");
	has("vm /srv/a /srv/b", (const char *const[]){ "\nRequiresMountsFor=\"/srv/b\"\n", NULL },
	    (const char *const[]){ "BindsTo", NULL });
}

static void test_backing(void **state)
{
	(void)state;
	HAS("vm /a /b backing-file=/c,data-file=/dev/d,backing-file=LABEL=e",
	    "\nRequiresMountsFor=\"/c\"\n", "\nBindsTo=dev-d.device\n",
	    "\nBindsTo=dev-disk-by\\x2dlabel-e.device\n");
}

static void test_options(void **state)
{
	(void)state;
	has("vm /a /b nofail", (const char *const[]){ "\nConflicts=umount.target\n", NULL },
	    (const char *const[]){ "Before=qcow2setup.target", NULL });
	has("vm /a /b _netdev",
	    (const char *const[]){ "\nBefore=remote-qcow2setup.target\n", "\nAfter=remote-fs-pre.target\n", NULL },
	    (const char *const[]){ "Before=qcow2setup.target", "qcow2setup-pre", NULL });
	has("vm /a /b x-initrd.attach", (const char *const[]){ "\nBefore=qcow2setup.target\n", NULL },
	    (const char *const[]){ "umount.target", NULL });
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_devices),
		cmocka_unit_test(test_files),
		cmocka_unit_test(test_backing),
		cmocka_unit_test(test_options),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
