// SPDX-License-Identifier: GPL-2.0-or-later
#include <ctype.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sysmacros.h>

#include "lib/util.h"
#include "lib/words.h"
#include "stack/advice.h"
#include "stack/metrics.h"
#include "stack/report.h"
#include "system/udev.h"
#include "test.h"

static const struct target_version version = { 1, 4, 0 };

static void test_words(void **state)
{
	(void)state;
	assert_string_equal(human_share(0, 0), "-");
	assert_string_equal(human_share(0, 10), "0%");
	assert_string_equal(human_share(10, 10), "100%");
	assert_string_equal(human_share(11, 10), "100%");
	assert_string_equal(human_share(1, 1000000), "<0.1%");
	assert_string_equal(human_share(999999, 1000000), ">99.9%");
	assert_string_equal(human_share(1, 8), "12.5%");
	assert_string_equal(human_share(1, 100), "1.0%");
	assert_string_equal(human_share(998, 1000), "99.8%");
	/* No overflow in between */
	assert_string_equal(human_share(UINT64_MAX / 2, UINT64_MAX), "50%");
	assert_string_equal(human_rate(5, 0), "-");
	assert_string_equal(human_rate(0, 1000), "0/s");
	assert_string_equal(human_rate(5, 2000), "2.5/s");
	assert_string_equal(human_rate(123456, 1000), "123456/s");
	assert_string_equal(human_rate(1, 1000), "1/s");
	assert_string_equal(human_rate(1, 86400000), "<0.01/s");
}

/* Clusters of 64K, a disk of 4 GiB: 8 L2 tables, of which there are 3 */
static struct report *device(const char *features, const char *keys,
			     const char *mode)
{
	struct report *r = calloc(1, sizeof(*r));
	char line[512];

	assert_non_null(r);
	snprintf(r->name, sizeof(r->name), "vm");
	r->kind = DEVICE_OURS;
	r->size = 4ULL << 30;
	r->info.exists = true;
	r->info.rdev = makedev(253, 7);
	r->metadata.ours = true;
	snprintf(r->metadata.node, sizeof(r->metadata.node), "/dev/loop3");
	snprintf(r->metadata.file, sizeof(r->metadata.file), "/images/vm.qcow2");
	r->has_table = target_parse_table("7:3 8:1 16 196608 8 65536 1 4",
					  &r->table);
	assert_true(r->has_table);
	snprintf(line, sizeof(line), "128 3/8 5 640 2 90 10 30 12 1 %s %s %s %s",
		 strstr(keys, "REFUSED") ? "4" : "0", features,
		 strstr(keys, "REFUSED") ? keys + strlen("REFUSED ") : keys, mode);
	r->has_status = target_parse_status(line, &version, &r->status);
	assert_true(r->has_status);
	return r;
}

#define PLENTY	"6 unwritten 0 free_clusters 20 trims 1"
#define FEW	"6 unwritten 0 free_clusters 4 trims 1"
#define WAITING	"6 unwritten 3 free_clusters 20 trims 0"

static void test_health(void **state)
{
	static const struct {
		const char *features, *mode, *name;
		enum health health;
	} cases[] = {
		{ "0", "rw", "rw", HEALTH_RW },
		{ "0", "nospc", "nospc", HEALTH_NOSPC },
		{ "0", "fail", "fail", HEALTH_FAIL },
		{ "1 read_only", "ro", "read-only", HEALTH_READ_ONLY },
		{ "1 data_file_raw", "ro", "corrupt", HEALTH_CORRUPT },
		{ "0", "ro", "corrupt", HEALTH_CORRUPT },
		/* One that is only read can fail no flush, but who knows */
		{ "1 read_only", "fail", "fail", HEALTH_FAIL },
	};
	struct report *r;
	size_t i;

	(void)state;
	for (i = 0; i < ARRAY_SIZE(cases); i++) {
		r = device(cases[i].features, PLENTY, cases[i].mode);
		assert_int_equal(report_health(r), cases[i].health);
		assert_string_equal(health_name(report_health(r)), cases[i].name);
		free(r);
	}
	r = device("0", PLENTY, "rw");
	r->has_status = false;
	assert_int_equal(report_health(r), HEALTH_UNKNOWN);
	free(r);
}

static void test_room(void **state)
{
	struct report *r = device("0", PLENTY, "rw");

	(void)state;
	assert_int_equal(report_tables_to_come(r), 5);
	assert_false(report_short_of_metadata(r));
	/* A table of extended entries covers half as much. */
	r->table.f.extended_l2 = true;
	assert_int_equal(report_tables_to_come(r), 13);
	r->size += 512;
	assert_int_equal(report_tables_to_come(r), 14);
	free(r);
	r = device("0", FEW, "rw");
	assert_true(report_short_of_metadata(r));
	free(r);
	/* Just loaded, and all counts as free; but of 10 clusters 7 are in use for certain. */
	r = device("0", PLENTY, "rw");
	r->metadata_size = 10 * 65536;
	assert_true(report_short_of_metadata(r));
	r->metadata_size = 12 * 65536;
	assert_false(report_short_of_metadata(r));
	free(r);
	/* What is only read needs none, and has none. */
	r = device("1 read_only", "6 unwritten 0 free_clusters 0 trims 0", "ro");
	assert_int_equal(report_tables_to_come(r), 0);
	assert_false(report_short_of_metadata(r));
	free(r);
	/* A module that does not tell. */
	r = device("0", "2 unwritten 0", "rw");
	assert_false(report_short_of_metadata(r));
	free(r);
}

/* The one piece of advice, or "" if there is none */
static const char *advice(const struct report *r)
{
	static struct advice a;

	report_advice(r, &a);
	if (a.n > 1)
		fail_msg("%s\n%s", a.line[0], a.line[1]);
	return a.n ? a.line[0] : "";
}

static void test_advice(void **state)
{
	struct report *r;

	(void)state;
	r = device("0", PLENTY, "rw");
	assert_string_equal(advice(r), "");
	r->info.suspended = true;
	assert_non_null(strstr(advice(r), "(dmsetup resume vm)"));
	r->info.suspended = false;
	r->info.deferred = true;
	assert_non_null(strstr(advice(r), "dmsetup message vm 0 @cancel_deferred_remove"));
	free(r);

	r = device("0", PLENTY, "ro");
	assert_non_null(strstr(advice(r), "(qcow2setup close vm)"));
	assert_non_null(strstr(advice(r), "(qcow2setup check --repair all /images/vm.qcow2)"));
	/* Made by dmsetup: close would refuse it, and its loop device stays. */
	r->kind = DEVICE_FOREIGN;
	r->metadata.ours = false;
	assert_non_null(strstr(advice(r), "(dmsetup remove vm)"));
	assert_non_null(strstr(advice(r), "--repair all /dev/loop3)"));
	assert_null(strstr(advice(r), "qcow2setup close"));
	free(r);

	r = device("1 read_only", PLENTY, "ro");
	assert_non_null(strstr(advice(r), "without --readonly"));
	assert_null(strstr(advice(r), "--repair"));
	r->usage.has_header = r->usage.corrupt = true;
	assert_non_null(strstr(advice(r), "marked corrupt: close it (qcow2setup close vm)"));
	r->usage.corrupt = false;
	snprintf(r->name, sizeof(r->name), DM_BACKING_PREFIX "0123");
	assert_null(strstr(advice(r), "close"));
	free(r);

	r = device("0", PLENTY, "fail");
	assert_non_null(strstr(advice(r), "(dmsetup remove vm), check the image (qcow2setup check /images/vm.qcow2)"));
	free(r);
	r = device("0", WAITING, "nospc");
	assert_non_null(strstr(advice(r), "free some where /images/vm.qcow2 is"));
	free(r);
	r = device("0", WAITING, "rw");
	assert_non_null(strstr(advice(r), "do not remove the device"));
	free(r);
}

static void test_advice_room(void **state)
{
	struct report *r;

	(void)state;
	r = device("0", FEW, "rw");
	assert_non_null(strstr(advice(r), "not enough"));
	assert_non_null(strstr(advice(r), "qcow2setup resize vm --size 4294967296"));
	free(r);
	r = device("0", "REFUSED " FEW, "rw");
	assert_non_null(strstr(advice(r), "is used up"));
	assert_non_null(strstr(advice(r), "free some where /images/vm.qcow2 is"));
	/* A device, which does not get longer by itself */
	r->metadata.ours = false;
	assert_non_null(strstr(advice(r), "enlarge /dev/loop3"));
	/* One of dmsetup's, of which resize wants nothing to know */
	r->kind = DEVICE_FOREIGN;
	assert_null(strstr(advice(r), "qcow2setup"));
	assert_non_null(strstr(advice(r), "dmsetup reload vm"));
	free(r);
}

static void test_compare(void **state)
{
	struct report *a = device("0", PLENTY, "rw"), *b = device("0", PLENTY, "rw");
	struct report_interval v;

	(void)state;
	b->status.hits += 7;
	b->status.commits += 2;
	report_compare(&a->status, &b->status, 1500, &v);
	assert_false(v.other);
	assert_int_equal(v.ms, 1500);
	assert_int_equal(v.hits, 7);
	assert_int_equal(v.misses, 0);
	assert_int_equal(v.commits, 2);
	/* Another table has begun to count. */
	report_compare(&b->status, &a->status, 1500, &v);
	assert_true(v.other);
	free(a);
	free(b);
}

static char *metrics(const struct report *r, size_t n, bool all)
{
	char *text = NULL;
	size_t len;
	FILE *f = open_memstream(&text, &len);

	assert_non_null(f);
	metrics_print(f, r, n, all);
	fclose(f);
	return text;
}

static void assert_has(const char *text, const char *line)
{
	if (!strstr(text, line))
		fail_msg("not in it: %s\n%s", line, text);
}

static void test_metrics(void **state)
{
	struct report *r = device("0", PLENTY, "rw");
	char *text;

	(void)state;
	r->usage.known = r->usage.has_header = true;
	r->usage.data = 1 << 20;
	r->metadata_size = 33 * 65536;
	text = metrics(r, 1, true);
	assert_has(text, "# TYPE dm_qcow2_devices gauge\ndm_qcow2_devices 1\n");
	assert_has(text, "dm_qcow2_info{device=\"vm\",kernel_device=\"dm-7\"} 1\n");
	assert_has(text, "dm_qcow2_mode{device=\"vm\",mode=\"rw\"} 1\n");
	assert_has(text, "dm_qcow2_mode{device=\"vm\",mode=\"corrupt\"} 0\n");
	assert_has(text, "dm_qcow2_virtual_size_bytes{device=\"vm\"} 4294967296\n");
	assert_has(text, "dm_qcow2_allocated_bytes{device=\"vm\"} 1048576\n");
	assert_has(text, "dm_qcow2_metadata_free_bytes{device=\"vm\"} 1310720\n");
	assert_has(text, "dm_qcow2_metadata_needed_bytes{device=\"vm\"} 327680\n");
	assert_has(text, "# TYPE dm_qcow2_hits_total counter\ndm_qcow2_hits_total{device=\"vm\"} 90\n");
	assert_has(text, "# TYPE dm_qcow2_l2_tables gauge\ndm_qcow2_l2_tables{device=\"vm\"} 3\n");
	/* There is no backup, nor bitmaps. */
	assert_null(strstr(text, "backup_kept"));
	assert_null(strstr(text, "mark_waits"));
	free(text);
	/* What is not known is not there, rather than 0. */
	r->usage.known = false;
	text = metrics(r, 1, false);
	assert_null(strstr(text, "allocated"));
	assert_null(strstr(text, "dm_qcow2_devices"));
	free(text);
	text = metrics(NULL, 0, true);
	assert_has(text, "dm_qcow2_devices 0\n");
	assert_null(strchr(text, '{'));
	free(text);
	free(r);
}

static void test_metrics_names(void **state)
{
	struct report *r = device("0", PLENTY, "rw");
	char *text;

	(void)state;
	snprintf(r->name, sizeof(r->name), "a\"b\\c\nd\303\274\377e");
	text = metrics(r, 1, false);
	assert_has(text, "dm_qcow2_commits_total{device=\"a\\\"b\\\\c\\nd\303\274\357\277\275e\"} 12\n");
	free(text);
	free(r);
}

/* Each family in one piece, with one head; no line but of these kinds */
static void test_metrics_families(void **state)
{
	struct report *r = device("0", "16 unwritten 0 free_clusters 20 trims 1 bitmaps 1 exact_granules 2 durable_granules 3 mark_waits 4 taken_back 5",
				  "rw");
	struct report *two = calloc(2, sizeof(*two));
	char *text, *save, *line, family[100] = "";
	char seen[64][100];
	size_t n = 0, i, samples = 0;

	(void)state;
	assert_non_null(two);
	/* Pointers into the line are only good for modes. */
	two[0] = *r;
	two[1] = *r;
	snprintf(two[1].name, sizeof(two[1].name), "vm2");
	text = metrics(two, 2, true);
	for (line = strtok_r(text, "\n", &save); line; line = strtok_r(NULL, "\n", &save)) {
		size_t len = strcspn(line, "{ ");

		if (starts_with(line, "# HELP ")) {
			assert_int_equal(sscanf(line, "# HELP %99s", family), 1);
			for (i = 0; i < n; i++)
				assert_string_not_equal(seen[i], family);
			assert_true(n < ARRAY_SIZE(seen));
			snprintf(seen[n++], sizeof(seen[0]), "%s", family);
			samples = 0;
			continue;
		}
		if (starts_with(line, "# TYPE ")) {
			assert_int_equal(samples, 0);
			continue;
		}
		assert_int_equal(len, strlen(family));
		assert_memory_equal(line, family, len);
		samples++;
		assert_true(isdigit((unsigned char)line[strlen(line) - 1]));
	}
	assert_true(n > 25);
	free(text);
	free(two);
	free(r);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_words),
		cmocka_unit_test(test_health),
		cmocka_unit_test(test_room),
		cmocka_unit_test(test_advice),
		cmocka_unit_test(test_advice_room),
		cmocka_unit_test(test_compare),
		cmocka_unit_test(test_metrics),
		cmocka_unit_test(test_metrics_names),
		cmocka_unit_test(test_metrics_families),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
