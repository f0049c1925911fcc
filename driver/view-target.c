// SPDX-License-Identifier: GPL-2.0-only
/*
 * Device-mapper target "qcow2-view": the disk of another device as it was when its table
 * began to have a view.  See view.h for how reads and changes get along.
 */
#include <linux/device-mapper.h>
#include <linux/module.h>
#include <linux/slab.h>

#include "compat.h"
#include "view.h"
#include "view-target.h"

#define DM_MSG_PREFIX "qcow2-view"

struct qcow2_view_target {
	/* Constant */
	struct dm_dev live;		/* open, but not claimed: see qcow2_view_open() */
	bool opened;
	struct dm_dev *cow;
	struct qcow2_view *view;
	struct qcow2_view_reader reader;
	struct workqueue_struct *wq;	/* reads again */
};

/* Owned by map(), then by whoever ends the bio, then by the work. */
struct qcow2_view_io {
	bool live;			/* it is read from the live device */
	struct bvec_iter iter;		/* as it was */
	struct work_struct work;
	struct dm_target *ti;
};

static struct bio *qcow2_view_bio(struct qcow2_view_io *io)
{
	return dm_bio_from_per_bio_data(io, sizeof(*io));
}

static enum qcow2_granule qcow2_view_bio_state(struct qcow2_view_target *v,
					       sector_t sector)
{
	if (qcow2_view_state(v->view) == QCOW2_VIEW_OVER)
		return QCOW2_GRANULE_SKIPPED;
	return qcow2_view_look(v->view, sector >> v->view->shift);
}

static int qcow2_view_map(struct dm_target *ti, struct bio *bio)
{
	struct qcow2_view_io *io = dm_per_bio_data(bio, sizeof(*io));
	struct qcow2_view_target *v = ti->private;

	if (bio_op(bio) != REQ_OP_READ)
		return DM_MAPIO_KILL;
	io->live = false;
	io->ti = ti;
	io->iter = bio->bi_iter;
	switch (qcow2_view_bio_state(v, bio->bi_iter.bi_sector)) {
	case QCOW2_GRANULE_LIVE:
		io->live = true;
		bio_set_dev(bio, v->live.bdev);
		return DM_MAPIO_REMAPPED;
	case QCOW2_GRANULE_KEPT:
		bio_set_dev(bio, v->cow->bdev);
		return DM_MAPIO_REMAPPED;
	case QCOW2_GRANULE_ZERO:
		zero_fill_bio(bio);
		bio_endio(bio);
		return DM_MAPIO_SUBMITTED;
	case QCOW2_GRANULE_SKIPPED:
		break;
	}
	return DM_MAPIO_KILL;
}

/* It has changed while it was read. */
static void qcow2_view_again(struct work_struct *work)
{
	struct qcow2_view_io *io = container_of(work, struct qcow2_view_io, work);
	struct bio *bio = qcow2_view_bio(io);
	struct dm_target *ti = io->ti;

	/* Whoever must not wait has been answered if the first read would have. */
	bio->bi_opf &= ~REQ_NOWAIT;
	bio->bi_status = BLK_STS_OK;
	bio->bi_iter = io->iter;
	switch (qcow2_view_map(ti, bio)) {
	case DM_MAPIO_REMAPPED:
		submit_bio_noacct(bio);
		break;
	case DM_MAPIO_KILL:
		bio_io_error(bio);
		break;
	}
}

static int qcow2_view_end_io(struct dm_target *ti, struct bio *bio,
			     blk_status_t *error)
{
	struct qcow2_view_io *io = dm_per_bio_data(bio, sizeof(*io));
	struct qcow2_view_target *v = ti->private;
	enum qcow2_granule state;

	if (bio_op(bio) != REQ_OP_READ)
		return DM_ENDIO_DONE;
	state = qcow2_view_bio_state(v, io->iter.bi_sector);
	if (state == QCOW2_GRANULE_SKIPPED) {
		*error = BLK_STS_IOERR;
		return DM_ENDIO_DONE;
	}
	/* While the view is held, another table than its own one may have been read. */
	if (!io->live || (state == QCOW2_GRANULE_LIVE &&
			  qcow2_view_state(v->view) == QCOW2_VIEW_LIVE))
		return DM_ENDIO_DONE;
	INIT_WORK(&io->work, qcow2_view_again);
	queue_work(v->wq, &io->work);
	return DM_ENDIO_INCOMPLETE;
}

static void qcow2_view_dtr(struct dm_target *ti)
{
	struct qcow2_view_target *v = ti->private;

	if (v->wq)
		destroy_workqueue(v->wq);
	if (v->view)
		qcow2_view_lose(v->view, &v->reader);
	if (v->cow)
		dm_put_device(ti, v->cow);
	if (v->opened)
		qcow2_close_shared(&v->live);
	kfree(v);
}

/*
 * A file system may be on the live device, or a volume group; both have claimed it then, or may
 * want to: this reader must not.
 */
static int qcow2_view_open(struct qcow2_view_target *v, const char *path)
{
	dev_t dev;
	int r;

	r = qcow2_view_device(path, &dev);
	if (!r)
		r = qcow2_open_shared(dev, &v->live);
	if (r)
		return r;
	v->opened = true;
	/* As dm_get_device() does, for who prints it */
	format_dev_t(v->live.name, dev);
	return 0;
}

/*
 * <device> <cow_dev>
 *
 * The device's table has the view on <cow_dev>.
 */
static int qcow2_view_ctr(struct dm_target *ti, unsigned int argc, char **argv)
{
	struct qcow2_view_target *v;
	int r;

	if (argc != 2) {
		ti->error = "Wrong number of arguments";
		return -EINVAL;
	}
	if (dm_table_get_mode(ti->table) & BLK_OPEN_WRITE) {
		ti->error = "A view is read-only, its table has to be loaded so";
		return -EINVAL;
	}
	v = kzalloc(sizeof(*v), GFP_KERNEL);
	if (!v) {
		ti->error = "Cannot allocate the target";
		return -ENOMEM;
	}
	ti->private = v;
	v->reader.ti = ti;
	r = qcow2_view_open(v, argv[0]);
	if (r) {
		ti->error = "Cannot open the device";
		goto bad;
	}
	r = dm_get_device(ti, argv[1], BLK_OPEN_READ, &v->cow);
	if (r) {
		ti->error = "Cannot open the view's device";
		goto bad;
	}
	v->view = qcow2_view_find(v->live.bdev->bd_dev, v->cow->bdev->bd_dev,
				  &v->reader);
	if (!v->view) {
		ti->error = "The device's live table has no view there";
		r = -ENOENT;
		goto bad;
	}
	r = -EINVAL;
	if (ti->begin || ti->len != v->view->size) {
		ti->error = "Target is not as long as the device";
		goto bad;
	}
	r = dm_set_target_max_io_len(ti, 1UL << v->view->shift);
	if (r)
		goto bad;
	v->wq = alloc_workqueue("dm-qcow2-reader", WQ_UNBOUND | WQ_MEM_RECLAIM,
				0);
	if (!v->wq) {
		ti->error = "Cannot allocate a work queue";
		r = -ENOMEM;
		goto bad;
	}
	ti->per_io_data_size = sizeof(struct qcow2_view_io);
	return 0;
bad:
	qcow2_view_dtr(ti);
	return r;
}

/* Info: <sectors per granule> <granules kept> <granules that were zeros> <valid, or why not> */
static void qcow2_view_status_of(struct dm_target *ti, status_type_t type,
				 unsigned int status_flags, char *result,
				 unsigned int maxlen)
{
	struct qcow2_view_target *v = ti->private;
	unsigned int sz = 0;

	switch (type) {
	case STATUSTYPE_INFO:
		DMEMIT("%lu %llu %llu %s", 1UL << v->view->shift,
		       READ_ONCE(v->view->kept), READ_ONCE(v->view->zero),
		       qcow2_view_status(v->view));
		break;
	case STATUSTYPE_TABLE:
		DMEMIT("%s %s", v->live.name, v->cow->name);
		break;
	case STATUSTYPE_IMA:
		DMEMIT_TARGET_NAME_VERSION(ti->type);
		DMEMIT(",device=%s,cow_device=%s;", v->live.name, v->cow->name);
		break;
	}
}

static int qcow2_view_iterate_devices(struct dm_target *ti,
				      iterate_devices_callout_fn fn, void *data)
{
	struct qcow2_view_target *v = ti->private;
	int r;

	r = fn(ti, &v->live, 0, ti->len, data);
	return r ? r : fn(ti, v->cow, 0, ti->len, data);
}

struct target_type qcow2_view_target = {
	.name = "qcow2-view",
	.version = {1, 0, 0},
	.features = DM_TARGET_NOWAIT,
	.module = THIS_MODULE,
	.ctr = qcow2_view_ctr,
	.dtr = qcow2_view_dtr,
	.map = qcow2_view_map,
	.end_io = qcow2_view_end_io,
	.status = qcow2_view_status_of,
	.iterate_devices = qcow2_view_iterate_devices,
};
