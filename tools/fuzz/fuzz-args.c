// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Arguments of the target, as the driver reads them.  Input: two bytes that make
 * the length, then words.
 */
#include <string.h>

#include <linux/device-mapper.h>

#include "../driver/args.h"
#include "fuzz.h"
#include "system/target.h"

#define MAX_ARGS	64

/* A line that the driver takes, is written by the tool, and read by both. */
static void again(const struct qcow2_args *a, sector_t len)
{
	const struct target_features f = {
		.read_only = a->read_only, .data_file_raw = a->raw,
		.backing_dev = a->backing_dev,
		.no_discard_passdown = a->no_passdown,
		.cache_limit = a->cache_limit, .zeroed_from = a->zeroed_from,
		.bitmaps = a->bitmaps, .view = a->cow_dev,
		.view_granularity = a->view_bits_given ? 1ULL << a->view_bits : 0,
	};
	struct target_table t;
	struct qcow2_args b;
	char line[1024], copy[1024], *argv[MAX_ARGS], *save, *word;
	char *error = NULL;
	unsigned int argc = 0;

	/* Words can be longer than the tool writes them. */
	if (!target_format_table(line, sizeof(line), a->metadata_dev,
				 a->data_dev, &a->geo, &f))
		return;
	memcpy(copy, line, sizeof(copy));
	for (word = strtok_r(copy, " ", &save); word;
	     word = strtok_r(NULL, " ", &save))
		argv[argc++] = word;
	MUST(!qcow2_parse_args(&b, 0, len, argc, argv, &error));
	MUST(!strcmp(a->metadata_dev, b.metadata_dev));
	MUST(!strcmp(a->data_dev, b.data_dev));
	MUST(!a->backing_dev == !b.backing_dev);
	MUST(!a->backing_dev || !strcmp(a->backing_dev, b.backing_dev));
	MUST(a->cache_limit == b.cache_limit);
	MUST(a->zeroed_from == b.zeroed_from);
	MUST(a->bitmaps == b.bitmaps);
	MUST(!a->cow_dev == !b.cow_dev);
	MUST(!a->cow_dev || !strcmp(a->cow_dev, b.cow_dev));
	MUST(a->view_bits == b.view_bits);
	MUST(a->view_bits_given == b.view_bits_given);
	MUST(a->read_only == b.read_only && a->raw == b.raw);
	MUST(a->no_passdown == b.no_passdown);
	MUST(a->geo.size == b.geo.size && a->geo.ext_l2 == b.geo.ext_l2);
	MUST(a->geo.l1_offset == b.geo.l1_offset);
	MUST(a->geo.l1_entries == b.geo.l1_entries);
	MUST(a->geo.reftable_offset == b.geo.reftable_offset);
	MUST(a->geo.reftable_clusters == b.geo.reftable_clusters);
	MUST(a->geo.cluster_bits == b.geo.cluster_bits);
	MUST(a->geo.refcount_order == b.geo.refcount_order);
	if (a->geo.cluster_bits <= QCOW2_MAX_CLUSTER_BITS &&
	    a->geo.refcount_order <= QCOW2_MAX_REFCOUNT_ORDER) {
		MUST(target_parse_table(line, &t));
		MUST(!t.f.view == !a->cow_dev);
		MUST(!t.f.view || !strcmp(t.f.view, a->cow_dev));
		MUST(t.f.view_granularity == f.view_granularity);
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	char *argv[MAX_ARGS], *words, *p, *error = NULL;
	unsigned int argc = 0, i;
	struct qcow2_args args;
	sector_t begin, len;
	int ret;

	if (size < 2)
		return 0;
	begin = data[0] & 1;
	len = (sector_t)(data[1] & 7) << (data[1] >> 2);
	data += 2;
	size -= 2;
	words = malloc(size + 1);
	MUST(words);
	memcpy(words, data, size);
	words[size] = 0;
	/* at white space, as dm does it */
	for (p = words; *p && argc < MAX_ARGS;) {
		p += strspn(p, " \t\n");
		if (*p)
			argv[argc++] = p;
		p += strcspn(p, " \t\n");
		if (*p)
			*p++ = 0;
	}
	ret = qcow2_parse_args(&args, begin, len, argc, argv, &error);
	if (ret) {
		MUST(ret == -EINVAL && error);
	} else {
		MUST(!error && !begin);
		MUST(argc >= 8 && args.metadata_dev == argv[0] &&
		     args.data_dev == argv[1]);
		for (i = 8; args.backing_dev && args.backing_dev != argv[i]; i++)
			MUST(i < argc);
		for (i = 8; args.cow_dev && args.cow_dev != argv[i]; i++)
			MUST(i < argc);
		MUST(args.view_bits >= QCOW2_VIEW_BITS_MIN &&
		     args.view_bits <= QCOW2_VIEW_BITS_MAX);
		MUST(args.cow_dev || !args.view_bits_given);
		MUST(args.view_bits_given || args.view_bits == QCOW2_VIEW_BITS);
		MUST(args.geo.size >> SECTOR_SHIFT == len);
		/* Any numbers: this judges them, and must not stumble. */
		qcow2_geometry_check(&args.geo, 1ULL << (len & 63));
		again(&args, len);
	}
	free(words);
	return 0;
}
