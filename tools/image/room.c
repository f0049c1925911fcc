// SPDX-License-Identifier: GPL-2.0-or-later
/* Room for metadata: space of the file, and a refcount table that can count it. */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "image/plan.h"
#include "image/tables.h"
#include "lib/util.h"

/* How many clusters in [@from, @to) have a refcount that is not 0? */
static int count_used(const struct image *img, uint64_t from, uint64_t to,
		      uint64_t *used)
{
	uint64_t per_block = refcounts_per_block(&img->geo);
	uint8_t *block = malloc(cluster_size(img));
	uint64_t i, c;
	int ret = 0;

	*used = 0;
	if (!block)
		return fail_nomem();
	for (i = from / per_block; i < image_reftable_entries(img) &&
	     i * per_block < to; i++) {
		uint64_t off;

		ret = image_read_refblock(img, img->reftable, i, block, &off);
		if (ret)
			break;
		if (!off)
			continue;
		for (c = max_u64(from, i * per_block);
		     c < min_u64(to, (i + 1) * per_block); c++)
			if (qcow2_refcount_get(block, c - i * per_block,
					       img->geo.refcount_order))
				++*used;
	}
	free(block);
	return ret;
}

/* Set the refcounts of clusters [@from, @to) that @block counts. */
static void set_refcounts(uint8_t *block, uint64_t first, uint64_t per_block,
			  uint64_t from, uint64_t to, unsigned int order)
{
	uint64_t c = max_u64(from, first);

	for (; c < min_u64(to, first + per_block); c++)
		qcow2_refcount_set(block, c - first, order, 1);
}

/*
 * Give the image a refcount table of @clusters clusters, at cluster @at, with
 * the refcount blocks that are needed to count it and themselves behind it.
 *
 * A crash before the header is switched leaves clusters that are counted but
 * not used, one after it a table that is: nothing that qemu-img check would
 * call more than a leak.
 */
static int grow_reftable(struct image *img, uint64_t at, uint32_t clusters)
{
	struct qcow2_geometry *g = &img->geo;
	uint64_t per_block = refcounts_per_block(g), cs = cluster_size(img);
	uint64_t old_at = g->reftable_offset / cs, old = g->reftable_clusters;
	uint64_t next = at + clusters, end = next, last, i;
	uint64_t entries = clusters * blocks_per_reftable_cluster(g);
	uint8_t *block = malloc(cs);
	__be64 *table = calloc(clusters, cs);
	int ret = 0;

	if (!block || !table) {
		ret = fail_nomem();
		goto out;
	}
	memcpy(table, img->reftable, old * cs);

	/* [at, end) is what is new; blocks for it may need more blocks. */
	do {
		last = end;
		end = next;
		for (i = at / per_block; i <= (last - 1) / per_block; i++)
			if (i < entries && !table[i])
				end++;
	} while (end != last);
	if ((end - 1) / per_block >= entries) {
		ret = fail(EX_WRONG,
			   "%s: no refcount table could reach the end of the file; make another image: " QEMU_CONVERT,
			   esc(img->node.path), shell_quote(img->node.path));
		goto out;
	}

	for (i = at / per_block; i <= (end - 1) / per_block; i++) {
		uint64_t off;

		ret = image_read_refblock(img, table, i, block, &off);
		if (ret)
			goto out;
		if (!off) {
			memset(block, 0, cs);
			off = next++ * cs;
			table[i] = cpu_to_be64(off);
		}
		set_refcounts(block, i * per_block, per_block, at, end,
			      g->refcount_order);
		ret = image_change(img, block, cs, off);
		if (ret)
			goto out;
	}
	ret = image_change(img, table, clusters * cs, at * cs);
	if (!ret)
		ret = image_sync(img);
	if (ret)
		goto out;

	img->h.raw.refcount_table_offset = cpu_to_be64(at * cs);
	img->h.raw.refcount_table_clusters = cpu_to_be32(clusters);
	ret = image_change_header(img);
	if (ret)
		goto out;
	free(img->reftable);
	img->reftable = table;
	table = NULL;
	g->reftable_offset = at * cs;
	g->reftable_clusters = clusters;

	ret = image_put_clusters(img, old_at, old);
out:
	free(block);
	free(table);
	return ret;
}

/*
 * So much, and not more, can be meant for the metadata of an image of @size bytes:
 * twice what a new one could need.  The rest is for old tables that are larger
 * than that, and for clusters that crashes have leaked.
 */
static uint64_t most_space(const struct image *img, uint64_t size)
{
	struct qcow2_geometry geo = img->geo;
	struct plan_new p;

	geo.size = size;
	plan_new(&geo, true, &p);
	return 2 * (p.worst_case * cluster_size(img) + img->bitmap_bytes) +
	       64 * MIB;
}

/*
 * Make the file longer, or the one behind the device, and all of it real: up to
 * @need bytes, or to its end.  Who made the image said where its clusters lie: he
 * must not be able to take more of the file system than such an image needs.
 */
static int take_space(struct image *img, uint64_t need, uint64_t virtual_size)
{
	uint64_t size = max_u64(align_up(img->node.size, cluster_size(img)),
				need);
	uint64_t real = SPACE_SPARSE, most;
	int ret;

	if (img->space_kind == IMAGE_REAL) {
		most = most_space(img, virtual_size);
		if (need > most)
			return fail(EX_WRONG,
				    "%s: metadata is spread over %s, far more than an image of %s can need, and all of that would have to take space; free what is leaked (qcow2setup check --repair leaks %s), or use --sparse",
				    esc(img->node.path), human_size(need),
				    human_size(virtual_size),
				    shell_quote(img->node.path));
		/* What is longer than it can need was made so by somebody. */
		real = size > most ? need : size;
	} else if (img->space_kind == IMAGE_SPARSE && !img->space.said) {
		img->space.said = true;
		warning("%s: stays sparse: when its file system is full, writes that need more metadata fail",
			esc(img->space.path));
	}
	ret = space_take(&img->space, size, real);
	if (ret || size == img->node.size)
		return ret;
	if (!img->resized)
		img->node.size = size;
	else
		ret = img->resized(img);
	if (!ret && img->node.size < size)
		ret = fail(EX_WRONG,
			   "%s: device has %llu bytes, less than the %llu that are needed; enlarge the device",
			   esc(img->node.path),
			   (unsigned long long)img->node.size,
			   (unsigned long long)size);
	if (!ret)
		note("%s: extended to %s", esc(img->node.path),
		     human_size(size));
	return ret;
}

/* A device that cannot get longer has only so much room. */
static int check_limit(const struct image *img, const struct room *room,
		       const struct plan *plan, uint64_t limit)
{
	uint64_t need = plan->clusters * cluster_size(img);

	if (plan->clusters <= limit)
		return 0;
	if (room->required)
		return fail(EX_WRONG,
			    "%s: device has %llu bytes, the metadata of an image of %s can need %llu; enlarge the device",
			    esc(img->node.path),
			    (unsigned long long)img->node.size,
			    human_size(room->size), (unsigned long long)need);
	warning("%s: device of %s may become too small for the metadata, which can need %s: enlarge it, or allocating writes can fail",
		esc(img->node.path), human_size(img->node.size),
		human_size(need));
	return 0;
}

/* Clusters below cluster @to that the kernel takes before it takes others. */
static int count_holes(const struct image *img, uint64_t to, uint64_t *holes)
{
	uint64_t reach = image_reftable_entries(img) * refcounts_per_block(&img->geo);
	uint64_t used;
	int ret;

	to = min_u64(to, reach);
	ret = count_used(img, 0, to, &used);
	*holes = ret ? 0 : to - used;
	return ret;
}

/* First cluster behind all that is in use, or that image_undo() would need again. */
static int end_cluster(struct image *img, uint64_t *end)
{
	int ret = image_end(img, end);

	*end = max_u64(*end / cluster_size(img), img->put_end);
	return ret;
}

/* L2 tables that an image of that geometry can come to need. */
static uint64_t missing_tables(const struct image *img,
			       const struct qcow2_geometry *g)
{
	uint32_t needed = qcow2_l1_entries_needed(g), i;
	uint64_t n = 0;

	for (i = 0; i < needed; i++)
		if (i >= img->geo.l1_entries ||
		    !(be64_to_cpu(img->l1[i]) & QCOW2_OFFSET_MASK))
			n++;
	return n;
}

/*
 * A plan within @limit clusters, and one without a limit.  *@at is where what is
 * built goes to.
 */
static int make_plan(struct image *img, const struct room *room,
		     uint64_t limit, uint64_t *at, struct plan *plan,
		     struct plan *unlimited)
{
	uint64_t max = UINT64_MAX / cluster_size(img), leaked = 0, found;
	struct qcow2_geometry geo = img->geo;
	uint64_t rest, holes, end;
	int ret, tries;

	geo.size = room->size;
	rest = missing_tables(img, &geo) - room->tables;
	ret = end_cluster(img, at);
	if (room->from)
		*at = room->from;
	if (!ret)
		ret = count_holes(img, *at, &holes);
	if (ret)
		return ret;
	rest -= min_u64(rest, holes);
	end = *at + room->more + room->tables;

	/*
	 * A crash can leave refcounts of clusters that the file never got;
	 * they will not be handed out, so the file must be longer for it.
	 */
	for (tries = 0; tries < 8; tries++) {
		*plan = plan_worst_case(&geo, img->reftable, end, leaked,
					rest, limit);
		ret = count_used(img, *at, plan->clusters, &found);
		if (ret)
			return ret;
		if (found <= leaked)
			break;
		leaked = found;
	}
	*unlimited = plan_worst_case(&geo, img->reftable, end, leaked, rest,
				     max);
	/* A larger table must itself find room, with its blocks. */
	if (limit < max && plan->reftable_clusters &&
	    end + 2 * plan->reftable_clusters + 2 > limit)
		plan->reftable_clusters = 0;
	return 0;
}

static uint64_t room_limit(const struct image *img)
{
	uint64_t cs = cluster_size(img);

	return img->space.fd < 0 ? img->node.size / cs : UINT64_MAX / cs;
}

int image_plan_room(struct image *img, const struct room *room,
		    uint64_t *reftable_clusters, bool *fits)
{
	struct plan plan, unlimited;
	uint64_t at;
	int ret;

	ret = make_plan(img, room, room_limit(img), &at, &plan, &unlimited);
	*reftable_clusters = plan.reftable_clusters;
	*fits = unlimited.clusters <= room_limit(img);
	return ret;
}

int image_take_room(struct image *img, const struct room *room, uint64_t *at,
		    uint64_t *reftable_clusters)
{
	struct plan plan, unlimited;
	int ret;

	ret = make_plan(img, room, room_limit(img), at, &plan, &unlimited);
	if (ret)
		return ret;
	*reftable_clusters = plan.reftable_clusters;
	if (!plan.addressable && room->required)
		return fail(EX_WRONG,
			    "%s: no refcount table could count the metadata of an image of %s; make one with larger clusters of it: " QEMU_CONVERT,
			    esc(img->node.path), human_size(room->size),
			    shell_quote(img->node.path));
	if (!plan.addressable && !room->quiet)
		warning("%s: no refcount table could count all the metadata that the image may need: allocating writes can fail",
			esc(img->node.path));
	if (img->space.fd < 0)
		return check_limit(img, room, &unlimited, room_limit(img));
	return take_space(img, plan.clusters * cluster_size(img), room->size);
}

int image_make_room(struct image *img, const struct room *room)
{
	uint64_t at, clusters;
	int ret;

	ret = image_take_room(img, room, &at, &clusters);
	if (ret || !clusters)
		return ret;
	note("%s: refcount table grows from %u to %llu clusters",
	     esc(img->node.path), img->geo.reftable_clusters,
	     (unsigned long long)clusters);
	return grow_reftable(img, at, clusters);
}

/* Clusters that the kernel can fail to write, and then takes others instead. */
#define MOST_SKIPPED	64

int image_live_end(struct image *img, uint64_t *end)
{
	uint64_t cs = cluster_size(img), device = img->node.size / cs;
	struct plan plan;
	int ret;

	ret = end_cluster(img, end);
	if (ret)
		return ret;
	plan = plan_worst_case(&img->geo, img->reftable, *end, 0,
			       missing_tables(img, &img->geo) + MOST_SKIPPED,
			       UINT64_MAX / cs);
	*end = align_up(min_u64(plan.clusters, device) * cs,
			max_u64(sysconf(_SC_PAGESIZE), cs)) / cs;
	return 0;
}
