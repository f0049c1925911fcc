/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Which clusters of the metadata are in use, and by what.  Pure code but for
 * memory.
 *
 * A list that is sorted in the end: it takes memory for what is in use, not
 * for the size of a file or device that an image claims to need.
 */
#ifndef QCOW2SETUP_REFCOUNTS_H
#define QCOW2SETUP_REFCOUNTS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum ref_kind {
	REF_HEADER,
	REF_L1,
	REF_REFTABLE,
	REF_L2,			/* index: of the L1 entry */
	REF_BLOCK,		/* index: of the refcount table entry */
	REF_BITMAP_DIR,
	REF_BITMAP_TABLE,	/* index: of the bitmap */
	REF_BITMAP_DATA,	/* the same */
	REF_LUKS,
};

struct ref {
	uint64_t cluster;
	uint32_t index;
	uint8_t kind;
	bool lowered;		/* for whoever repairs */
};

struct refs {
	struct ref *ref;
	size_t n, room;
};

/* A cluster, and all that is said to be in it. */
struct ref_group {
	struct ref *ref;
	size_t n;
};

/* Clusters that [@off, @off + @len) touches.  False: out of memory. */
bool refs_add(struct refs *refs, enum ref_kind kind, uint32_t index,
	      uint64_t off, uint64_t len, unsigned int cluster_bits);
void refs_sort(struct refs *refs);
void refs_free(struct refs *refs);

/*
 * All clusters one after the other, after refs_sort(): begin with *@i 0.
 * False: there are no more.
 */
bool refs_next(const struct refs *refs, size_t *i, struct ref_group *group);
/* What is in @cluster; none has n 0. */
struct ref_group refs_at(const struct refs *refs, uint64_t cluster);

/* "L2 table 5"; returns one of a few static buffers. */
const char *ref_name(const struct ref *ref);

#endif
