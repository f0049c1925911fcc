// SPDX-License-Identifier: GPL-2.0-or-later
#include <string.h>

#include "lib/util.h"
#include "system/room.h"

#define SECTOR		512

/* A request was refused since the table was loaded, or a commit found no space. */
static bool failed(const struct target_status *s)
{
	return s->refused || !strcmp(s->mode, "nospc");
}

/* Nothing is allocated any more: nothing can run out. */
static bool at_rest(const struct target_status *s)
{
	return strcmp(s->mode, "rw") && strcmp(s->mode, "nospc");
}

/*
 * Until the first cluster is allocated after a table is loaded, the target has not read
 * the refcounts, and counts all clusters as free.  What is in use for certain: the header,
 * refcounts, the L1 table, and each L2 table.
 */
uint64_t room_free(const struct target_status *s, uint64_t bytes)
{
	uint64_t cluster = s->cluster_sectors * SECTOR;
	uint64_t entries = cluster / 8, used, clusters;

	if (!cluster || !bytes)
		return s->free_clusters;
	clusters = bytes / cluster;
	used = 3 + (s->l1_entries + entries - 1) / entries + s->l2_tables;
	return min_u64(s->free_clusters, clusters - min_u64(used, clusters));
}

/*
 * The target raises an event at the same mark: a sixteenth of the device, or 16
 * clusters (driver/alloc.c).
 */
enum room_left room_of_device(const struct target_status *s, uint64_t bytes, uint64_t *more)
{
	uint64_t cluster = s->cluster_sectors * SECTOR;
	uint64_t need = s->l1_entries - min_u64(s->l2_tables, s->l1_entries);
	uint64_t clusters = cluster ? bytes / cluster : 0, have;

	*more = 0;
	if (at_rest(s) || !(s->given & STATUS_FREE_CLUSTERS) || !cluster)
		return ROOM_ENOUGH;
	have = room_free(s, bytes);
	if (have < need)
		/* Each 64 tables may need a refcount block, with the widest refcounts. */
		*more = (need - have + need / 64 + 2) * cluster;
	if (failed(s))
		return ROOM_OUT;
	return *more && have <= max_u64(clusters / 16, 16) ? ROOM_LOW :
									  ROOM_ENOUGH;
}

/*
 * It is long enough: open has seen to that.  But where it is sparse, others can take
 * the space, so it is taken while there is twice of what is needed.
 */
enum room_left room_of_file(const struct target_status *s, uint64_t length, uint64_t taken,
			    uint64_t free, uint64_t *more)
{
	*more = length - min_u64(taken, length);
	if (at_rest(s))
		return ROOM_ENOUGH;
	if (failed(s))
		return ROOM_OUT;
	return *more && free / 2 < *more ? ROOM_LOW : ROOM_ENOUGH;
}
