// SPDX-License-Identifier: GPL-2.0-or-later
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>

#include "image/walk.h"
#include "lib/util.h"

static int bad_entry(const struct image *img, uint64_t l1, int64_t l2,
		     enum qcow2_fault fault)
{
	char where[48] = "";

	if (l2 >= 0)
		snprintf(where, sizeof(where), ", L2 entry %" PRId64, l2);
	return fail(EX_WRONG,
		    "%s: corrupt image: L1 entry %" PRIu64 "%s: %s; see what qcow2setup check says",
		    esc(img->node.path), l1, where, qcow2_fault_str(fault));
}

int image_scan(const struct node *node, const struct qcow2_geometry *g,
	       struct extents *x, struct scan_fault *f)
{
	uint64_t tables = qcow2_l1_entries_needed(g), i, entry, off;
	uint64_t cs = 1ULL << g->cluster_bits;
	__be64 *l1 = malloc(tables * 8);
	void *l2 = malloc(cs);
	uint32_t bad;

	*f = (struct scan_fault){ .l2 = -1 };
	if (!l1 || !l2) {
		f->err = -ENOMEM;
		goto out;
	}
	f->err = node_read(node, l1, tables * 8, g->l1_offset);
	for (i = 0; !f->err && i < tables && !x->ret; i++) {
		entry = be64_to_cpu(l1[i]);
		off = entry & QCOW2_OFFSET_MASK;
		f->l1 = i;
		f->fault = qcow2_l1_check(entry, g->cluster_bits, node->size);
		if (!f->fault && off && qcow2_in_fixed_area(g, off))
			f->fault = QCOW2_FAULT_ENTRY_OVERLAP;
		if (f->fault)
			goto out;
		if (!off) {
			extents_add(x, 1ULL << qcow2_l2_cover_bits(g),
				    QCOW2_UNALLOCATED, false);
			continue;
		}
		f->err = node_read(node, l2, cs, off);
		if (f->err)
			goto out;
		f->fault = extents_add_l2(x, g, l2, &bad);
		if (f->fault) {
			f->l2 = bad;
			goto out;
		}
	}
	if (!f->err)
		extents_end(x);
out:
	free(l1);
	free(l2);
	return f->err || f->fault ? -1 : x->ret;
}

int image_walk(const struct image *img, const struct qcow2_geometry *g,
	       struct extents *x)
{
	struct scan_fault f;
	int ret = image_scan(&img->node, g, x, &f);

	if (f.fault)
		return bad_entry(img, f.l1, f.l2, f.fault);
	if (f.err == -ENOMEM)
		return fail_nomem();
	if (!f.err)
		return ret;
	errno = -f.err;
	return fail_errno("%s: cannot read its metadata", esc(img->node.path));
}

int image_geometry(const struct image *img, struct qcow2_geometry *g)
{
	enum qcow2_fault fault = qcow2_header_check(&img->h.raw, true, g);

	if (!fault)
		fault = qcow2_geometry_check(g, img->node.size);
	if (!fault)
		return 0;
	return fail(EX_WRONG, "%s: %s; see what qcow2setup check %s says",
		    esc(img->node.path), qcow2_fault_str(fault),
		    shell_quote(img->node.path));
}
