// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * qcow2setup measure: how much metadata an image needs, new and at most.  Unlike
 * qemu-img's numbers these are without the data, which is in its own file.
 */
#include "commands/commands.h"
#include "image/bitmaps.h"
#include "image/plan.h"
#include "lib/json.h"
#include "lib/util.h"

static int get_geometry(const struct options *opt, struct qcow2_geometry *g)
{
	uint64_t cluster = opt->cluster_size ? opt->cluster_size : 64 * KIB;
	uint64_t bits = opt->refcount_bits ? opt->refcount_bits : 16;

	if (!opt->size)
		return fail(EX_PARAMETER,
			    "measure needs to know the size of the disk; give it with --size");
	g->cluster_bits = __builtin_ctzll(cluster);
	g->refcount_order = __builtin_ctzll(bits);
	g->ext_l2 = opt->extended_l2;
	if (g->ext_l2 && g->cluster_bits < QCOW2_MIN_CLUSTER_BITS_EXT_L2)
		return fail(EX_PARAMETER,
			    "--extended-l2 needs clusters of at least 16 KiB; give a larger --cluster-size");
	if (opt->size > QCOW2_MAX_OFFSET)
		return fail(EX_PARAMETER, "%s; give a smaller --size",
			    qcow2_fault_str(QCOW2_FAULT_SIZE_BIG));
	/* What create would make of it. */
	g->size = align_up(opt->size, 512);
	if (qcow2_l1_entries_needed(g) > QCOW2_MAX_L1_ENTRIES)
		return fail(EX_PARAMETER,
			    "with clusters of %s an image can have at most %s; give a larger --cluster-size",
			    human_size(cluster),
			    human_size((uint64_t)QCOW2_MAX_L1_ENTRIES <<
				       qcow2_l2_cover_bits(g)));
	return 0;
}

/* Clusters that bitmaps take, and those of bits that they come to need. */
static int count_bitmaps(const struct options *opt,
			 const struct qcow2_geometry *g, uint64_t *clusters,
			 uint64_t *bits)
{
	struct image img = { .geo = *g, .node.path = "measure" };
	struct bitmaps s = { .img = &img };
	unsigned int i;
	int ret = 0;

	for (i = 0; !ret && i < opt->bitmaps; i++)
		ret = bitmaps_add_option(&s, opt->bitmap[i],
					 "bitmap");
	*clusters = bitmaps_new_clusters(&s, bits);
	bitmaps_free(&s);
	return ret;
}

int cmd_measure(const struct options *opt, char **args)
{
	struct qcow2_geometry g = { 0 };
	uint64_t required, full, bitmaps, bits;
	struct plan_new p;
	struct json j;
	int ret;

	(void)args;
	ret = get_geometry(opt, &g);
	if (!ret)
		ret = count_bitmaps(opt, &g, &bitmaps, &bits);
	if (ret)
		return ret;
	if (!plan_new_bitmaps(&g, false, bitmaps, bits, &p))
		return fail(EX_PARAMETER,
			    "the refcount table would be larger than 8 MiB; give a larger --cluster-size or smaller --refcount-bits");
	required = p.clusters << g.cluster_bits;
	full = p.worst_case << g.cluster_bits;
	if (opt->json) {
		json_start(&j, stdout);
		json_object(&j, NULL);
		json_version(&j);
		json_number(&j, "required", required);
		json_number(&j, "fully-allocated", full);
		json_number(&j, "data-file-size", g.size);
		/* Its name before; elsewhere that is a path. */
		json_number(&j, "data-file", g.size);
		json_object_end(&j);
		json_end(&j);
		return 0;
	}
	printf("required size: %llu\n", (unsigned long long)required);
	printf("fully allocated size: %llu\n", (unsigned long long)full);
	printf("data file size: %llu\n", (unsigned long long)g.size);
	return 0;
}
