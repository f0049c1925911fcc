/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What differs between the kernels that this module builds for.  The code is
 * written to the newest interface; this is the only file that looks at
 * versions or at features of the kernel's headers.
 */
#ifndef DM_QCOW2_COMPAT_H
#define DM_QCOW2_COMPAT_H

#include <linux/blkdev.h>
#include <linux/device-mapper.h>
#include <linux/falloc.h>
#include <linux/overflow.h>
#include <linux/shrinker.h>
#include <linux/slab.h>
#include <linux/version.h>

/* 6.5 has it, and late ones of 6.1 */
#ifndef struct_size_t
#define struct_size_t(type, member, count) \
	struct_size((type *)NULL, member, count)
#endif

/* 6.5 renamed the open modes of block devices */
#ifndef BLK_OPEN_READ
#define blk_mode_t	fmode_t
#define BLK_OPEN_READ	FMODE_READ
#define BLK_OPEN_WRITE	FMODE_WRITE
#endif

/* 6.7 allocates shrinkers, and lets them have private data */
#ifdef SHRINKER_ALLOCATED
static inline void *qcow2_shrinker_private(struct shrinker *shrinker)
{
	return shrinker->private_data;
}

static inline void qcow2_shrinker_free(struct shrinker *shrinker)
{
	shrinker_free(shrinker);
}

static inline struct shrinker *
qcow2_shrinker_alloc(void *private_data,
		     unsigned long (*count)(struct shrinker *, struct shrink_control *),
		     unsigned long (*scan)(struct shrinker *, struct shrink_control *),
		     const char *name)
{
	struct shrinker *s = shrinker_alloc(0, "dm-qcow2:%s", name);

	if (!s)
		return NULL;
	s->private_data = private_data;
	s->count_objects = count;
	s->scan_objects = scan;
	shrinker_register(s);
	return s;
}
#else
struct qcow2_shrinker {
	struct shrinker shrinker;
	void *private_data;
};

static inline void *qcow2_shrinker_private(struct shrinker *shrinker)
{
	return container_of(shrinker, struct qcow2_shrinker,
			    shrinker)->private_data;
}

static inline void qcow2_shrinker_free(struct shrinker *shrinker)
{
	unregister_shrinker(shrinker);
	kfree(container_of(shrinker, struct qcow2_shrinker, shrinker));
}

static inline struct shrinker *
qcow2_shrinker_alloc(void *private_data,
		     unsigned long (*count)(struct shrinker *, struct shrink_control *),
		     unsigned long (*scan)(struct shrinker *, struct shrink_control *),
		     const char *name)
{
	struct qcow2_shrinker *s = kzalloc(sizeof(*s), GFP_KERNEL);

	if (!s)
		return NULL;
	s->private_data = private_data;
	s->shrinker.count_objects = count;
	s->shrinker.scan_objects = scan;
	s->shrinker.seeks = DEFAULT_SEEKS;
	if (register_shrinker(&s->shrinker, "dm-qcow2:%s", name)) {
		kfree(s);
		return NULL;
	}
	return &s->shrinker;
}
#endif

#define QCOW2_SINCE_6(MINOR) \
	(LINUX_VERSION_MAJOR > 6 || LINUX_VERSION_PATCHLEVEL >= (MINOR))

/*
 * Open a device for reading, whoever has claimed it, and whoever will: dm_get_device() claims.
 * 6.5 took the mode from those who close, 6.7 gave them a handle, 6.9 a file.
 */
static inline int qcow2_open_shared(dev_t dev, struct dm_dev *d)
{
#if QCOW2_SINCE_6(9)
	d->bdev_file = bdev_file_open_by_dev(dev, BLK_OPEN_READ, NULL, NULL);
	if (IS_ERR(d->bdev_file))
		return PTR_ERR(d->bdev_file);
	d->bdev = file_bdev(d->bdev_file);
#elif QCOW2_SINCE_6(7)
	d->bdev_handle = bdev_open_by_dev(dev, BLK_OPEN_READ, NULL, NULL);
	if (IS_ERR(d->bdev_handle))
		return PTR_ERR(d->bdev_handle);
	d->bdev = d->bdev_handle->bdev;
#else
#if QCOW2_SINCE_6(5)
	d->bdev = blkdev_get_by_dev(dev, BLK_OPEN_READ, NULL, NULL);
#else
	d->bdev = blkdev_get_by_dev(dev, BLK_OPEN_READ, NULL);
#endif
	if (IS_ERR(d->bdev))
		return PTR_ERR(d->bdev);
#endif
	d->mode = BLK_OPEN_READ;
	return 0;
}

static inline void qcow2_close_shared(struct dm_dev *d)
{
#if QCOW2_SINCE_6(9)
	bdev_fput(d->bdev_file);
#elif QCOW2_SINCE_6(7)
	bdev_release(d->bdev_handle);
#elif QCOW2_SINCE_6(5)
	blkdev_put(d->bdev, NULL);
#else
	blkdev_put(d->bdev, BLK_OPEN_READ);
#endif
}

/*
 * 6.17 knows devices whose write zeroes unmap, so that later writes to the range
 * are cheap.  Ours need metadata, whatever those below do.
 */
static inline void qcow2_no_wzeroes_unmap(struct queue_limits *limits)
{
#ifdef FALLOC_FL_WRITE_ZEROES
	limits->max_hw_wzeroes_unmap_sectors = 0;
#endif
}

#endif /* DM_QCOW2_COMPAT_H */
