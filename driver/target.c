// SPDX-License-Identifier: GPL-2.0-only
/*
 * Device-mapper target "qcow2": qcow2 images with an external data file as
 * block devices.
 *
 * What is where (calls go down this list, never up):
 *
 *	target.c	constructor, limits, suspend and resume, status
 *	view-target.c	target "qcow2-view": reads what a view shows
 *	map-bio.c	map() and end_io(): the way of every request
 *	process.c	the slow path: runs of equal state, reservations
 *	keep.c		what a view shows is kept before it changes
 *	fill.c		first writes, zeros and copies around them
 *	pages.c		memory for copies
 *	io.c		life of a request that is more than a remap
 *	trim.c		discards that are passed down
 *	bitmap-start.c	dirty bitmaps: beginning, end, counts
 *	bitmap.c	dirty bitmaps: what requests ask of them
 *	bitmap-take.c	dirty bitmaps: taking back
 *	bitmap-mark.c	dirty bitmaps: writing marks
 *	bitmap-core.c	dirty bitmaps: the gate, and blocks in core
 *	view.c		views: which granules are kept
 *	directory.c	finding the bitmaps of an image
 *	cache.c		loading slices, and letting them go
 *	commit.c	making changes durable
 *	alloc.c		metadata clusters and their refcounts
 *	l2.c		L2 entries and states
 *	map.c		states in core; the table of what may become of them is in map.h
 *	l1.c		the L1 table
 *	mode.c		what the table is still good for
 *	header.c	the image's header
 *	mdio.c		I/O on the metadata device, kinds of errors
 *	claim.c		who uses a metadata device
 *	args.c		the table line's arguments
 *	format.h	what is on disk; shared with qcow2setup
 */
#include <linux/delay.h>
#include <linux/module.h>
#include <linux/sched/mm.h>
#include <linux/slab.h>

#include "args.h"
#include "compat.h"
#include "fill.h"
#include "keep.h"
#include "map-bio.h"
#include "process.h"
#include "version.h"
#include "view-target.h"

#define DM_MSG_PREFIX "qcow2"

/* Of the mapped device that a table is for */
static dev_t qcow2_dev(struct dm_target *ti)
{
	return disk_devt(dm_disk(dm_table_get_md(ti->table)));
}

/*----------------------------------------------------------------
 * Suspend and resume
 *----------------------------------------------------------------
 */

static void qcow2_presuspend(struct dm_target *ti)
{
	struct qcow2_target *q = ti->private;

	if (q->passdown)
		qcow2_trims_stop(&q->trims);
}

static void qcow2_presuspend_undo(struct dm_target *ti)
{
	struct qcow2_target *q = ti->private;

	qcow2_trims_start(&q->trims);
}

/*
 * Polling: whoever ends the last one must not touch q any more, as a wake-up
 * would, and suspends are rare.
 */
static void qcow2_wait_slow(struct qcow2_target *q)
{
	while (atomic_read(&q->slow))
		fsleep(1000);
}

static void qcow2_postsuspend(struct dm_target *ti)
{
	struct qcow2_bitmap_counts counts = {};
	struct qcow2_target *q = ti->private;
	bool failed, settled;

	/*
	 * On suspend DM has waited for all bios.  On removal it has not, but
	 * nobody has the device open; wait for what a last opener may have
	 * left behind.
	 */
	qcow2_trims_flush(&q->trims);
	qcow2_wait_slow(q);
	flush_workqueue(q->io_wq);
	if (!q->config.read_only) {
		flush_workqueue(q->alloc_wq);
		qcow2_commit_suspend(&q->commit);
	}
	qcow2_trims_last(&q->trims);
	qcow2_wait_slow(q);
	qcow2_cache_settle(&q->cache);

	/* What could not be written is in core only. */
	settled = !q->gated || qcow2_bitmaps_settle(&q->bitmaps);
	failed = qcow2_mode(&q->health) == QCOW2_FAIL;
	q->kept = failed || !settled || !qcow2_map_clean(&q->map);
	if (!q->kept) {
		if (q->gated)
			qcow2_bitmaps_forget(&q->bitmaps);
		q->gated = false;
		qcow2_map_forget(&q->map);
		if (!q->config.read_only)
			qcow2_commit_reset(&q->commit);
	}
	if (!q->kept) {
		qcow2_claim_drop(&q->claim);
	} else if (failed) {
		qcow2_claim_park(&q->claim);
	} else {
		if (q->gated)
			qcow2_bitmaps_count(&q->bitmaps, &counts);
		DMWARN("%s: %lu blocks of metadata could not be written yet",
		       q->mdio.name, q->map.unwritten + counts.unwritten);
		qcow2_claim_wait(&q->claim);
	}
	if (q->view)
		qcow2_view_hold(q->view, ti);
}

/* Does the table keep the bitmaps that the image wants to be kept? */
static int qcow2_check_bitmaps(struct qcow2_target *q, char **error)
{
	struct qcow2_recording *found;
	int r;

	found = kmalloc(sizeof(*found), GFP_NOIO);
	if (!found) {
		*error = "Cannot allocate memory for the bitmaps";
		return -ENOMEM;
	}
	r = qcow2_directory_read(&q->mdio, &q->config.geo, found, error);
	if (!r && found->count && !q->bitmaps_arg) {
		*error = "image has bitmaps that record: bitmaps is needed";
		r = -EINVAL;
	}
	kfree(found);
	return r;
}

static int qcow2_start_bitmaps(struct qcow2_target *q)
{
	char *error;
	int r = 0;

	if (!q->bitmaps_arg)
		r = qcow2_check_bitmaps(q, &error);
	if (!r && (q->bitmaps_arg || q->view))
		r = qcow2_bitmaps_start(&q->bitmaps, &q->config.geo,
					q->bitmaps_arg, q->view, &error);
	if (r)
		DMERR("%s: cannot resume: %s", q->mdio.name, error);
	q->gated = !r && (q->bitmaps.count || q->view);
	return r;
}

/* Read what is needed before the first request. */
static int qcow2_start(struct qcow2_target *q)
{
	bool writer = qcow2_mode_writes(qcow2_mode(&q->health));
	char *error;
	int r;

	r = qcow2_header_compare(&q->mdio, &q->config, !writer, &error);
	if (r) {
		DMERR("%s: cannot resume: %s", q->mdio.name, error);
		return r;
	}
	/*
	 * What a device's cache has from a commit that did not end would else be
	 * taken for durable.
	 */
	if (!q->config.read_only) {
		r = qcow2_mdio_flush(&q->mdio);
		if (r) {
			DMERR("%s: cannot flush the metadata device: %d",
			      q->mdio.name, r);
			return r;
		}
	}
	r = qcow2_l1_read(&q->l1);
	if (r || q->config.read_only)
		return r;
	r = qcow2_alloc_resume(&q->alloc);
	if (r == -EUCLEAN) {
		qcow2_mode_corrupt(&q->health);
		/* Nothing can be written. */
		return 0;
	}
	return r ? r : qcow2_start_bitmaps(q);
}

static int __qcow2_preresume(struct qcow2_target *q)
{
	int r;

	r = qcow2_claim_take(&q->claim, q->mdio.bdev->bd_dev,
			     !q->config.read_only);
	if (r) {
		DMERR("%s: cannot resume: another table %s the metadata device",
		      q->mdio.name, r == -EBUSY ? "uses" : "has written");
		return r;
	}
	if (qcow2_mode(&q->health) == QCOW2_FAIL) {
		DMERR("%s: stays in mode fail until a new table is loaded",
		      q->mdio.name);
		return 0;
	}
	/* Nobody else has changed the metadata since: the claim was here. */
	if (q->kept)
		return 0;
	if (q->view)
		q->view = qcow2_view_adopt(q->view);
	r = qcow2_start(q);
	if (r)
		qcow2_claim_drop(&q->claim);
	return r;
}

static int qcow2_preresume(struct dm_target *ti)
{
	struct qcow2_target *q = ti->private;
	int r = __qcow2_preresume(q);

	if (!r)
		qcow2_view_resume(q->view, qcow2_dev(ti), ti);
	return r;
}

static void qcow2_resume(struct dm_target *ti)
{
	struct qcow2_target *q = ti->private;

	if (!qcow2_map_clean(&q->map) && qcow2_mode(&q->health) != QCOW2_FAIL)
		qcow2_commit_arm(&q->commit);
	if (q->gated)
		qcow2_bitmaps_arm(&q->bitmaps);
	qcow2_trims_start(&q->trims);
}

/*----------------------------------------------------------------
 * Constructor and the like
 *----------------------------------------------------------------
 */

/* Open the devices, and check that they fit the geometry. */
static int qcow2_get_devices(struct qcow2_target *q,
			     const struct qcow2_args *args)
{
	const struct qcow2_geometry *geo = &args->geo;
	blk_mode_t mode = BLK_OPEN_READ | (q->config.read_only ? 0 : BLK_OPEN_WRITE);
	struct dm_target *ti = q->ti;
	struct block_device *meta, *data;
	enum qcow2_fault fault;
	u64 l1_len;
	int r;

	r = dm_get_device(ti, args->metadata_dev, mode, &q->meta_dev);
	if (r) {
		ti->error = "Cannot open the metadata device";
		return r;
	}
	r = dm_get_device(ti, args->data_dev, mode, &q->data_dev);
	if (r) {
		ti->error = "Cannot open the data device";
		return r;
	}
	meta = q->meta_dev->bdev;
	data = q->data_dev->bdev;
	q->data_bdev = data;
	if (meta == data) {
		ti->error = "Metadata and data are on the same device";
		return -EINVAL;
	}
	if (!q->config.read_only && bdev_read_only(meta)) {
		ti->error = "Metadata device is read-only: read_only is needed";
		return -EROFS;
	}
	if (!q->config.read_only && bdev_read_only(data)) {
		ti->error = "Data device is read-only: read_only is needed";
		return -EROFS;
	}
	if (bdev_nr_bytes(data) < geo->size) {
		ti->error = "Data device is smaller than the target";
		return -EINVAL;
	}

	fault = qcow2_geometry_check(geo, bdev_nr_bytes(meta));
	if (fault) {
		ti->error = (char *)qcow2_fault_str(fault);
		return -EINVAL;
	}
	if (bdev_logical_block_size(meta) >
	    min(1U << geo->cluster_bits, QCOW2_BLOCK_BYTES)) {
		ti->error = "Metadata device's logical block is larger than a cluster or 4 KiB";
		return -EINVAL;
	}
	/* Requests are cut, and units filled, at units' borders. */
	if (bdev_logical_block_size(data) > 1U << qcow2_unit_bits(geo)) {
		ti->error = geo->ext_l2 ?
			    "Data device's logical block is larger than a subcluster" :
			    "Data device's logical block is larger than a cluster";
		return -EINVAL;
	}
	l1_len = round_up((u64)geo->l1_entries * 8,
			  min(1U << geo->cluster_bits, QCOW2_BLOCK_BYTES));
	if (!q->config.read_only && l1_len > bdev_nr_bytes(meta) - geo->l1_offset) {
		ti->error = "Metadata device ends inside the L1 table's last block: extend it";
		return -EINVAL;
	}
	return 0;
}

/* The backing device is only read, whatever the mode of the table is. */
static int qcow2_get_backing(struct qcow2_target *q,
			     const struct qcow2_args *args)
{
	const struct qcow2_geometry *geo = &args->geo;
	struct dm_target *ti = q->ti;
	struct block_device *bdev;
	u64 size;
	int r;

	if (!args->backing_dev)
		return 0;
	r = dm_get_device(ti, args->backing_dev, BLK_OPEN_READ,
			  &q->backing_dev);
	if (r) {
		ti->error = "Cannot open the backing device";
		return r;
	}
	bdev = q->backing_dev->bdev;
	if (bdev == q->meta_dev->bdev || bdev == q->data_bdev) {
		ti->error = "Backing device is the metadata or the data device";
		return -EINVAL;
	}
	size = bdev_nr_bytes(bdev);
	if (bdev_logical_block_size(bdev) > 1U << qcow2_unit_bits(geo)) {
		ti->error = "Backing device's logical block is larger than a unit";
		return -EINVAL;
	}
	/* The zeros behind it are written to the data device. */
	if (size < geo->size &&
	    size & (bdev_logical_block_size(q->data_bdev) - 1)) {
		ti->error = "Backing device ends inside a block of the data device";
		return -EINVAL;
	}
	q->backing_bdev = bdev;
	q->backing_end = size >> SECTOR_SHIFT;
	return 0;
}

/* A view keeps what changes, whatever the kind of table is that changes it. */
static int qcow2_get_view(struct qcow2_target *q, const struct qcow2_args *args)
{
	struct dm_target *ti = q->ti;
	struct block_device *bdev;
	dev_t dev;
	int r;

	if (!args->cow_dev)
		return 0;
	if (q->config.read_only) {
		ti->error = "view needs a table that may write";
		return -EINVAL;
	}
	/* Before it is opened: some of these cannot be, for writing. */
	r = qcow2_view_device(args->cow_dev, &dev);
	if (!r && (dev == q->meta_dev->bdev->bd_dev ||
		   dev == q->data_bdev->bd_dev || dev == qcow2_dev(ti) ||
		   (q->backing_bdev && dev == q->backing_bdev->bd_dev))) {
		ti->error = "View's device is one of the image";
		return -EINVAL;
	}
	if (!r)
		r = dm_get_device(ti, args->cow_dev,
				  BLK_OPEN_READ | BLK_OPEN_WRITE, &q->cow_dev);
	if (r) {
		ti->error = "Cannot open the view's device";
		return r;
	}
	bdev = q->cow_dev->bdev;
	if (bdev_read_only(bdev)) {
		ti->error = "View's device is read-only";
		return -EROFS;
	}
	if (bdev_nr_sectors(bdev) < ti->len) {
		ti->error = "View's device is smaller than the target";
		return -EINVAL;
	}
	if (bdev_logical_block_size(bdev) > 1U << args->view_bits ||
	    ti->len & ((bdev_logical_block_size(bdev) >> SECTOR_SHIFT) - 1)) {
		ti->error = "Target is no multiple of the logical block of the view's device";
		return -EINVAL;
	}
	q->view_bits = args->view_bits;
	q->view = qcow2_view_create(qcow2_dev(ti), bdev->bd_dev, ti->len,
				    args->view_bits, &ti->error);
	return q->view ? 0 : -ENOMEM;
}

static void qcow2_dtr(struct dm_target *ti)
{
	struct qcow2_target *q = ti->private;

	/* Who calls from outside first, then from the top down. */
	qcow2_cache_stop(&q->cache);
	qcow2_commit_stop(&q->commit);
	qcow2_trims_exit(&q->trims);
	if (q->alloc_wq)
		destroy_workqueue(q->alloc_wq);
	qcow2_keep_exit(q);
	qcow2_fill_exit(q);
	qcow2_io_exit(q);
	qcow2_bitmaps_exit(&q->bitmaps);
	qcow2_commit_exit(&q->commit);
	qcow2_map_exit(&q->map);
	qcow2_cache_exit(&q->cache);
	qcow2_alloc_exit(&q->alloc);
	qcow2_l1_exit(&q->l1);
	qcow2_mdio_exit(&q->mdio);
	qcow2_claim_drop(&q->claim);
	if (q->view) {
		qcow2_view_leave(q->view, ti);
		qcow2_view_put(q->view);
	}
	if (q->cow_dev)
		dm_put_device(ti, q->cow_dev);
	if (q->backing_dev)
		dm_put_device(ti, q->backing_dev);
	if (q->data_dev)
		dm_put_device(ti, q->data_dev);
	if (q->meta_dev)
		dm_put_device(ti, q->meta_dev);
	kfree(q);
}

/* What only a table needs that may write */
static int qcow2_create_writer(struct qcow2_target *q)
{
	int r;

	q->alloc_wq = alloc_ordered_workqueue("dm-qcow2-alloc", WQ_MEM_RECLAIM);
	if (!q->alloc_wq)
		return -ENOMEM;
	r = qcow2_fill_pools(q);
	if (!r && q->view)
		r = qcow2_keep_pools(q);
	if (r)
		return r;
	r = qcow2_alloc_init(&q->alloc, &q->mdio, &q->l1, &q->health,
			     &q->config.geo, q->zeroed_from);
	if (r)
		return r;
	q->commit.map = &q->map;
	q->commit.io = &q->mdio;
	q->commit.l1 = &q->l1;
	q->commit.alloc = &q->alloc;
	q->commit.health = &q->health;
	q->commit.data_bdev = q->data_bdev;
	q->commit.done = qcow2_io_committed;
	r = qcow2_commit_init(&q->commit);
	if (r)
		return r;
	q->health.wq = q->commit.wq;
	q->cache.alloc = &q->alloc;
	q->cache.commit = &q->commit;
	return 0;
}

static int qcow2_create_trims(struct qcow2_target *q)
{
	int r;

	q->trims.map = &q->map;
	q->trims.cache = &q->cache;
	q->trims.health = &q->health;
	q->trims.data_bdev = q->data_bdev;
	q->trims.slow = &q->slow;
	r = qcow2_trims_init(&q->trims);
	q->commit.then_wq = q->trims.wq;
	q->commit.then = &q->trims.work;
	return r;
}

static int qcow2_create_bitmaps(struct qcow2_target *q)
{
	struct qcow2_bitmaps *bm = &q->bitmaps;

	bm->map = &q->map;
	bm->io = &q->mdio;
	bm->alloc = &q->alloc;
	bm->cache = &q->cache;
	bm->health = &q->health;
	return qcow2_bitmaps_init(bm);
}

/* All that is in memory, from the bottom up; no I/O */
static int qcow2_create(struct qcow2_target *q)
{
	const struct qcow2_geometry *geo = &q->config.geo;
	bool writer = !q->config.read_only;
	int r;

	r = qcow2_mdio_init(&q->mdio, q->meta_dev->bdev,
			    dm_table_device_name(q->ti->table),
			    geo->cluster_bits, writer);
	if (r)
		return r;
	qcow2_health_init(&q->health, q->ti, &q->mdio, q->config.read_only);
	q->map.wake = qcow2_io_wake;
	r = qcow2_map_init(&q->map, geo, q->mdio.block_bytes);
	if (r)
		return r;
	r = qcow2_l1_init(&q->l1, &q->mdio, geo);
	if (!r)
		r = qcow2_io_pools(q);
	if (!r && writer)
		r = qcow2_create_writer(q);
	if (r)
		return r;
	q->cache.map = &q->map;
	q->cache.io = &q->mdio;
	q->cache.l1 = &q->l1;
	q->cache.health = &q->health;
	q->cache.wq = q->io_wq;
	q->cache.limit = q->cache_limit;
	r = qcow2_cache_init(&q->cache);
	if (!r && q->passdown)
		r = qcow2_create_trims(q);
	if (!r && writer && (q->bitmaps_arg || q->view))
		r = qcow2_create_bitmaps(q);
	return r;
}

/*
 * <metadata_dev> <data_dev> <cluster_bits> <l1_offset> <l1_entries>
 * <refcount_table_offset> <refcount_table_clusters> <refcount_order>
 * [<#feature args> <feature arg>...]
 *
 * Offsets in bytes.  On a reload this runs while the old table is live, so it
 * keeps nothing of what it reads: see qcow2_preresume().
 */
static int __qcow2_ctr(struct dm_target *ti, unsigned int argc, char **argv)
{
	struct qcow2_args args;
	struct qcow2_target *q;
	bool read_only;
	int r;

	q = kzalloc(sizeof(*q), GFP_KERNEL);
	if (!q) {
		ti->error = "Cannot allocate the target";
		return -ENOMEM;
	}
	ti->private = q;
	q->ti = ti;
	q->process = qcow2_process;
	qcow2_claim_init(&q->claim);
	spin_lock_init(&q->lock);
	INIT_LIST_HEAD(&q->reservations);
	INIT_WORK(&q->reserver, qcow2_reserver);

	r = qcow2_parse_args(&args, ti->begin, ti->len, argc, argv, &ti->error);
	if (r)
		goto bad;
	q->read_only_arg = args.read_only;
	q->no_passdown_arg = args.no_passdown;
	q->bitmaps_arg = args.bitmaps;
	q->cache_limit = args.cache_limit;
	q->zeroed_from = args.zeroed_from;
	q->view_bits_arg = args.view_bits_given;
	q->raw = args.raw;
	q->config.geo = args.geo;
	q->config.raw = args.raw;
	q->config.backing = args.backing_dev;
	read_only = q->read_only_arg ||
		    !(dm_table_get_mode(ti->table) & BLK_OPEN_WRITE);
	q->config.read_only = read_only;
	r = qcow2_get_devices(q, &args);
	if (!r)
		r = qcow2_get_backing(q, &args);
	if (!r)
		r = qcow2_get_view(q, &args);
	if (r)
		goto bad;
	q->passdown = !read_only && !q->no_passdown_arg && !q->raw &&
		      bdev_max_discard_sectors(q->data_bdev);
	r = qcow2_create(q);
	if (r) {
		ti->error = "Cannot allocate the map, work queues and pools";
		goto bad;
	}
	r = qcow2_header_compare(&q->mdio, &q->config, read_only, &ti->error);
	if (!r && !read_only)
		r = qcow2_check_bitmaps(q, &ti->error);
	if (r)
		goto bad;
	if (qcow2_claim_waits(q->mdio.bdev->bd_dev)) {
		ti->error = "Another table has yet to write metadata there: resume it first";
		r = -EBUSY;
		goto bad;
	}

	ti->num_flush_bios = 1;
	if (!read_only) {
		/* with data_file_raw: passed down as they are, if at all */
		ti->num_discard_bios = !q->raw || !q->no_passdown_arg;
		ti->discards_supported = !q->raw;
		/* if the data device does */
		ti->num_write_zeroes_bios = 1;
	}
	/* the metadata device may have a cache where the data device has none */
	ti->flush_supported = true;
	ti->accounts_remapped_io = true;
	ti->per_io_data_size = sizeof(struct qcow2_io);
	return 0;
bad:
	qcow2_dtr(ti);
	return r;
}

/*
 * An image that grows gets its new table while the old one is suspended: memory
 * must not be waited for that only a write to this very device would free.
 */
static int qcow2_ctr(struct dm_target *ti, unsigned int argc, char **argv)
{
	unsigned int noio = memalloc_noio_save();
	int r = __qcow2_ctr(ti, argc, argv);

	memalloc_noio_restore(noio);
	return r;
}

static unsigned int qcow2_nr_features(struct qcow2_target *q)
{
	return q->read_only_arg + q->raw + q->config.geo.ext_l2 +
	       (q->backing_dev ? 2 : 0) + q->no_passdown_arg +
	       (q->cache_limit ? 2 : 0) + (q->zeroed_from ? 2 : 0) +
	       q->bitmaps_arg + (q->cow_dev ? 2 : 0) +
	       (q->view_bits_arg ? 2 : 0);
}

static unsigned int qcow2_emit_features(struct qcow2_target *q, char *result,
					unsigned int maxlen, unsigned int sz)
{
	DMEMIT("%u", qcow2_nr_features(q));
	if (q->read_only_arg)
		DMEMIT(" read_only");
	if (q->raw)
		DMEMIT(" data_file_raw");
	if (q->config.geo.ext_l2)
		DMEMIT(" extended_l2");
	if (q->backing_dev)
		DMEMIT(" backing_dev %s", q->backing_dev->name);
	if (q->no_passdown_arg)
		DMEMIT(" no_discard_passdown");
	if (q->cache_limit)
		DMEMIT(" cache_limit %llu", q->cache_limit);
	if (q->zeroed_from)
		DMEMIT(" zeroed_from %llu", q->zeroed_from);
	if (q->bitmaps_arg)
		DMEMIT(" bitmaps");
	if (q->cow_dev)
		DMEMIT(" view %s", q->cow_dev->name);
	if (q->view_bits_arg)
		DMEMIT(" view_granularity %lu", BIT(q->view_bits));
	return sz;
}

/*
 * Info: <cluster size, sectors> <L2 tables>/<L1 entries> <slices in core>
 * <bytes of states> <dirty slices> <hits> <misses> <first writes> <commits>
 * <drops> <refused> <#feature args> <feature arg>*
 * <#status args> [<key> <value>]* <mode>
 *
 * What is added from now on are keys.
 */
static unsigned int qcow2_status_info(struct qcow2_target *q, char *result,
				      unsigned int maxlen)
{
	struct qcow2_map *map = &q->map;
	const struct qcow2_geometry *geo = &map->geo;
	u64 hits = 0, misses = 0, first_writes = 0;
	struct qcow2_bitmap_counts counts = {};
	unsigned int sz = 0;
	int cpu;

	for_each_possible_cpu(cpu) {
		struct qcow2_stats *stats = per_cpu_ptr(q->stats, cpu);

		hits += READ_ONCE(stats->hits);
		first_writes += READ_ONCE(stats->first_writes);
		misses += READ_ONCE(*per_cpu_ptr(q->cache.misses, cpu));
	}
	DMEMIT("%u %lu/%u %lu %llu %lu %llu %llu %llu %lu %lu %lu ",
	       1U << (geo->cluster_bits - SECTOR_SHIFT), READ_ONCE(q->l1.used),
	       geo->l1_entries, READ_ONCE(map->nr_cached),
	       READ_ONCE(map->state_bytes), READ_ONCE(map->nr_dirty),
	       hits, misses, first_writes, READ_ONCE(q->commit.commits),
	       READ_ONCE(map->drops), READ_ONCE(q->refused));
	sz = qcow2_emit_features(q, result, maxlen, sz);
	if (q->bitmaps.count)
		qcow2_bitmaps_count(&q->bitmaps, &counts);
	DMEMIT(" %u unwritten %lu free_clusters %llu trims %lu",
	       6 + (q->bitmaps.count ? 10 : 0) + (q->view ? 6 : 0),
	       READ_ONCE(map->unwritten) + counts.unwritten,
	       qcow2_alloc_free(&q->alloc), READ_ONCE(map->nr_trims_todo));
	if (q->bitmaps.count) {
		DMEMIT(" bitmaps %u exact_granules %llu durable_granules %llu",
		       q->bitmaps.count, counts.exact, counts.durable);
		DMEMIT(" mark_waits %lu taken_back %lu", counts.waits,
		       counts.taken_back);
	}
	if (q->view)
		DMEMIT(" view %s view_kept %llu view_zero %llu",
		       qcow2_view_status(q->view), READ_ONCE(q->view->kept),
		       READ_ONCE(q->view->zero));
	DMEMIT(" %s", qcow2_mode_name(qcow2_mode(&q->health)));
	return sz;
}

static void qcow2_status(struct dm_target *ti, status_type_t type,
			 unsigned int status_flags, char *result,
			 unsigned int maxlen)
{
	struct qcow2_target *q = ti->private;
	const struct qcow2_geometry *geo = &q->config.geo;
	unsigned int sz = 0;

	switch (type) {
	case STATUSTYPE_INFO:
		sz = qcow2_status_info(q, result, maxlen);
		break;
	case STATUSTYPE_TABLE:
		DMEMIT("%s %s %u %llu %u %llu %u %u", q->meta_dev->name,
		       q->data_dev->name, geo->cluster_bits, geo->l1_offset,
		       geo->l1_entries, geo->reftable_offset,
		       geo->reftable_clusters, geo->refcount_order);
		if (qcow2_nr_features(q)) {
			DMEMIT(" ");
			sz = qcow2_emit_features(q, result, maxlen, sz);
		}
		break;
	case STATUSTYPE_IMA:
		DMEMIT_TARGET_NAME_VERSION(ti->type);
		DMEMIT(",metadata_device=%s,data_device=%s,cluster_bits=%u",
		       q->meta_dev->name, q->data_dev->name, geo->cluster_bits);
		DMEMIT(",read_only=%c,data_file_raw=%c,extended_l2=%c",
		       q->config.read_only ? 'y' : 'n', q->raw ? 'y' : 'n',
		       q->config.geo.ext_l2 ? 'y' : 'n');
		DMEMIT(",backing_device=%s;",
		       q->backing_dev ? q->backing_dev->name : "-");
		break;
	}
}

/* view_skip <sector> <sectors>: nobody will read these granules of the view. */
static int qcow2_message_skip(struct qcow2_target *q, char **argv)
{
	struct qcow2_view *view = q->view;
	u64 sector, nr, granule, end;

	if (kstrtou64(argv[1], 10, &sector) || kstrtou64(argv[2], 10, &nr) ||
	    !nr || sector >= view->size || nr > view->size - sector)
		return -EINVAL;
	/* Whole ones only */
	granule = (sector + (1UL << view->shift) - 1) >> view->shift;
	end = sector + nr == view->size ? view->granules :
					  (sector + nr) >> view->shift;
	while (granule < end) {
		u64 to = min(end, (granule | (BIT(QCOW2_VIEW_PIECE_SHIFT) - 1)) + 1);

		if (!qcow2_view_prepare(view, granule))
			return -ENOMEM;
		qcow2_view_set(view, granule, to - granule,
			       QCOW2_GRANULE_SKIPPED);
		granule = to;
	}
	return 0;
}

/* view_limit <sectors>: no more than this is kept, in whole granules. */
static int qcow2_message_limit(struct qcow2_target *q, char **argv)
{
	u64 nr;

	if (kstrtou64(argv[1], 10, &nr) || !nr)
		return -EINVAL;
	qcow2_view_limit(q->view, nr >> q->view->shift);
	return 0;
}

/*
 * view_map <sector> <sectors>: what becomes of reads of the view, as runs of "<sectors><letter>"
 * from the beginning of the granule that <sector> is in, as far as there is room: l live,
 * k kept, z zeros, s skipped.
 */
static int qcow2_message_map(struct qcow2_target *q, char **argv, char *result,
			     unsigned int maxlen)
{
	struct qcow2_view *view = q->view;
	u64 sector, nr, granule, end;
	unsigned int sz = 0;

	if (kstrtou64(argv[1], 10, &sector) || kstrtou64(argv[2], 10, &nr) ||
	    !nr || sector >= view->size || nr > view->size - sector)
		return -EINVAL;
	granule = sector >> view->shift;
	end = ((sector + nr - 1) >> view->shift) + 1;
	/* A number and more: what is cut off would be taken for another number. */
	while (granule < end && maxlen - sz > 32) {
		enum qcow2_granule state = qcow2_view_look(view, granule);
		u64 first = granule;

		while (++granule < end && qcow2_view_look(view, granule) == state)
			if (!(granule & 1023))
				cond_resched();
		DMEMIT("%llu%c ",
		       min_t(u64, granule << view->shift, view->size) -
		       (first << view->shift), "lkzs"[state]);
	}
	return 1;
}

/*
 * bitmap_sync: have on disk, for each bitmap, what has been changed and no more.  What changes
 * meanwhile may be there or not.
 *
 * view_end: nothing is kept for the view any more, and it cannot be read.
 */
static int qcow2_message(struct dm_target *ti, unsigned int argc, char **argv,
			 char *result, unsigned int maxlen)
{
	struct qcow2_target *q = ti->private;

	if (argc == 1 && !strcasecmp(argv[0], "bitmap_sync"))
		return q->bitmaps.count ? qcow2_bitmaps_sync(&q->bitmaps) : 0;
	if (!q->view)
		return -EINVAL;
	if (argc == 1 && !strcasecmp(argv[0], "view_end")) {
		qcow2_view_end(q->view, "ended");
		return 0;
	}
	if (argc == 2 && !strcasecmp(argv[0], "view_limit"))
		return qcow2_message_limit(q, argv);
	if (argc == 3 && !strcasecmp(argv[0], "view_skip"))
		return qcow2_message_skip(q, argv);
	if (argc == 3 && !strcasecmp(argv[0], "view_map"))
		return qcow2_message_map(q, argv, result, maxlen);
	return -EINVAL;
}

/* The metadata device has neither the size nor the limits of this one. */
static int qcow2_iterate_devices(struct dm_target *ti,
				 iterate_devices_callout_fn fn, void *data)
{
	struct qcow2_target *q = ti->private;

	return fn(ti, q->data_dev, 0, ti->len, data);
}

/* Requests that are remapped to the backing device have to suit it, too. */
static void qcow2_stack_backing(struct qcow2_target *q,
				struct queue_limits *limits)
{
	unsigned int max_write_zeroes = limits->max_write_zeroes_sectors;

	blk_stack_limits(limits, &bdev_get_queue(q->backing_bdev)->limits,
			 get_start_sect(q->backing_bdev));
	/* These never get there. */
	limits->max_write_zeroes_sectors = max_write_zeroes;
}

static void qcow2_io_hints(struct dm_target *ti, struct queue_limits *limits)
{
	struct qcow2_target *q = ti->private;
	unsigned int cluster = 1U << q->config.geo.cluster_bits;
	unsigned int unit = 1U << q->map.unit_shift;	/* sectors */
	unsigned int max = round_down(UINT_MAX >> SECTOR_SHIFT, unit);

	if (q->backing_bdev)
		qcow2_stack_backing(q, limits);

	/* Writes of whole clusters need no fill; keep a stripe's size. */
	if (cluster >= limits->physical_block_size &&
	    (limits->io_opt < cluster || limits->io_opt % cluster))
		limits->io_opt = cluster;

	if (q->raw)
		return;
	qcow2_no_wzeroes_unmap(limits);
	if (q->config.read_only)
		return;
	limits->discard_granularity = unit << SECTOR_SHIFT;
	limits->discard_alignment = 0;
	limits->max_discard_sectors = max;
	limits->max_hw_discard_sectors = max;
	/* At most parts of two units are written, the rest is metadata. */
	if (limits->max_write_zeroes_sectors)
		limits->max_write_zeroes_sectors = max;
}

static struct target_type qcow2_target = {
	.name = "qcow2",
	.version = {1, 4, 0},
	.features = DM_TARGET_NOWAIT,
	.module = THIS_MODULE,
	.ctr = qcow2_ctr,
	.dtr = qcow2_dtr,
	.map = qcow2_map_bio,
	.end_io = qcow2_end_bio,
	.presuspend = qcow2_presuspend,
	.presuspend_undo = qcow2_presuspend_undo,
	.postsuspend = qcow2_postsuspend,
	.preresume = qcow2_preresume,
	.resume = qcow2_resume,
	.status = qcow2_status,
	.message = qcow2_message,
	.iterate_devices = qcow2_iterate_devices,
	.io_hints = qcow2_io_hints,
};

static int __init qcow2_init(void)
{
	int r;

	r = qcow2_zeros_init();
	if (r)
		return r;
	r = dm_register_target(&qcow2_target);
	if (r)
		goto no_target;
	r = dm_register_target(&qcow2_view_target);
	if (!r)
		return 0;
	dm_unregister_target(&qcow2_target);
no_target:
	qcow2_zeros_exit();
	return r;
}

static void __exit qcow2_exit(void)
{
	dm_unregister_target(&qcow2_view_target);
	dm_unregister_target(&qcow2_target);
	qcow2_zeros_exit();
}

module_init(qcow2_init);
module_exit(qcow2_exit);

MODULE_DESCRIPTION(DM_NAME " target for qcow2 images with an external data file");
MODULE_AUTHOR("The dm-qcow2 authors");
MODULE_LICENSE("GPL");
MODULE_VERSION(DM_QCOW2_VERSION);
/* device-mapper asks for "dm-" and the name of a target. */
MODULE_ALIAS("dm-qcow2-view");
