// SPDX-License-Identifier: GPL-2.0-or-later
#include <errno.h>
#include <stdlib.h>

#include "image/extents.h"
#include "image/header.h"
#include "image/image.h"
#include "image/usage.h"
#include "image/walk.h"
#include "lib/util.h"

static int count(const struct extent *e, void *arg)
{
	struct image_usage *u = arg;

	if (e->state == QCOW2_DATA)
		u->data += e->length;
	else if (e->state == QCOW2_ZERO)
		u->zero += e->length;
	return 0;
}

static void scan(const struct node *node, const struct header *h,
		 struct image_usage *u)
{
	struct extents x = { .states_only = true, .fn = count, .arg = u };
	struct qcow2_geometry g;
	struct scan_fault f;
	enum qcow2_fault fault;

	fault = qcow2_header_check(&h->raw, true, &g);
	if (!fault)
		fault = qcow2_geometry_check(&g, node->size);
	if (fault) {
		u->why = qcow2_fault_str(fault);
		return;
	}
	x.size = g.size;
	u->tables_needed = qcow2_l1_entries_needed(&g);
	u->known = !image_scan(node, &g, &x, &f);
	if (!u->known)
		u->why = f.fault ? qcow2_fault_str(f.fault) :
				   error_text(-f.err);
}

void image_usage_read(const struct node *node, struct image_usage *u)
{
	size_t len = image_first_len(node, node->size);
	void *first = malloc(len ? len : 1);
	enum header_fault fault;
	struct header h;
	int err;

	*u = (struct image_usage){ .why = "" };
	err = first ? node_read(node, first, len, 0) : -ENOMEM;
	if (err) {
		u->why = error_text(-err);
		goto out;
	}
	fault = header_parse(first, len, &h);
	if (fault) {
		u->why = header_fault_str(fault);
		goto out;
	}
	u->has_header = true;
	u->corrupt = h.incompatible & QCOW2_INCOMPAT_CORRUPT;
	if (h.has_bitmaps && h.autoclear & QCOW2_AUTOCLEAR_BITMAPS)
		u->bitmaps = h.bitmap_count;
	scan(node, &h, u);
out:
	free(first);
}
