// SPDX-License-Identifier: GPL-2.0-or-later
#include <stdio.h>
#include <stdlib.h>

#include "image/refcounts.h"
#include "lib/util.h"

/* 1 GiB; an image as large as the format allows has 4 Mi L2 tables */
#define MAX_REFS	(64U << 20)

bool refs_add(struct refs *refs, enum ref_kind kind, uint32_t index,
	      uint64_t off, uint64_t len, unsigned int cluster_bits)
{
	uint64_t c, end;

	if (!len)
		return true;
	end = ((off + len - 1) >> cluster_bits) + 1;
	/* The sum is an image's to choose: it must not be all memory. */
	if (end - (off >> cluster_bits) > MAX_REFS - refs->n)
		return false;
	for (c = off >> cluster_bits; c < end; c++) {
		if (refs->n == refs->room) {
			size_t room = refs->room ? 2 * refs->room : 1024;
			struct ref *ref = reallocarray(refs->ref, room,
						       sizeof(*ref));

			if (!ref)
				return false;
			refs->ref = ref;
			refs->room = room;
		}
		refs->ref[refs->n++] = (struct ref){
			.cluster = c, .index = index, .kind = kind,
		};
	}
	return true;
}

static int ref_cmp(const void *a, const void *b)
{
	const struct ref *x = a, *y = b;

	if (x->cluster != y->cluster)
		return x->cluster < y->cluster ? -1 : 1;
	if (x->kind != y->kind)
		return x->kind < y->kind ? -1 : 1;
	return x->index < y->index ? -1 : x->index > y->index;
}

void refs_sort(struct refs *refs)
{
	if (refs->n)
		qsort(refs->ref, refs->n, sizeof(*refs->ref), ref_cmp);
}

void refs_free(struct refs *refs)
{
	free(refs->ref);
	*refs = (struct refs){ .ref = NULL };
}

bool refs_next(const struct refs *refs, size_t *i, struct ref_group *group)
{
	if (*i >= refs->n)
		return false;
	group->ref = refs->ref + *i;
	for (group->n = 0; *i < refs->n; group->n++, ++*i)
		if (refs->ref[*i].cluster != group->ref->cluster)
			break;
	return true;
}

struct ref_group refs_at(const struct refs *refs, uint64_t cluster)
{
	struct ref_group group = { .ref = NULL };
	size_t from = 0, to = refs->n;

	while (from < to) {
		size_t mid = from + (to - from) / 2;

		if (refs->ref[mid].cluster < cluster)
			from = mid + 1;
		else
			to = mid;
	}
	if (refs_next(refs, &from, &group) && group.ref->cluster != cluster)
		group.n = 0;
	return group;
}

const char *ref_name(const struct ref *ref)
{
	static char buf[4][48];
	static unsigned int next;
	char *b = buf[next++ % ARRAY_SIZE(buf)];

	switch (ref->kind) {
	case REF_L2:
		snprintf(b, sizeof(buf[0]), "L2 table %u", ref->index);
		return b;
	case REF_BLOCK:
		snprintf(b, sizeof(buf[0]), "refcount block %u", ref->index);
		return b;
	case REF_BITMAP_TABLE:
		snprintf(b, sizeof(buf[0]), "the table of bitmap %u", ref->index);
		return b;
	case REF_BITMAP_DATA:
		snprintf(b, sizeof(buf[0]), "bitmap %u", ref->index);
		return b;
	case REF_HEADER:
		return "the header";
	case REF_L1:
		return "the L1 table";
	case REF_REFTABLE:
		return "the refcount table";
	case REF_BITMAP_DIR:
		return "the bitmap directory";
	case REF_LUKS:
		return "the encryption header";
	default:
		return "something unknown";
	}
}
