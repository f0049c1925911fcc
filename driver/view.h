/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * A view: the disk as it was at one instant, while it goes on changing.
 *
 * The instant is the resume of the first table that names the device for what is kept.  From
 * then on, before a granule of the view changes for the first time, its old content is
 * written to that device, at the same offset; then it is said to be kept; then it may
 * change.  Who reads the view (view-target.c) takes no lock:
 *
 *	writer				reader
 *	write the old content		read the live device
 *	state = kept (release)		...
 *	change the granule		it has been read: look at the state (acquire)
 *
 * If the state is still live then, nothing of the granule had begun to change when that read
 * ended.  If not, the granule is read once more, from what is kept.  Likewise for a view that
 * is over: it is so before anything changes that it does not keep.
 *
 *	granule		is read from			becomes
 *	live		the live device			kept, zero or skipped, once
 *	kept		the device for what is kept	-
 *	zero		nowhere: it read as zeros	-
 *	skipped		nowhere: reads fail		-
 *
 *	view
 *	new	until a table with it is resumed
 *	live	while that table, or one that takes it over, is live; until something fails, a
 *		message ends it, or a table without it is resumed
 *	held	while the table is suspended
 *	over	for good, with the reason
 *
 * Nothing of it is on stable storage.
 */
#ifndef DM_QCOW2_VIEW_H
#define DM_QCOW2_VIEW_H

#include <linux/list.h>
#include <linux/refcount.h>
#include <linux/spinlock.h>
#include <linux/types.h>

struct dm_target;
struct qcow2_view;

enum qcow2_granule {
	QCOW2_GRANULE_LIVE,
	QCOW2_GRANULE_KEPT,
	QCOW2_GRANULE_ZERO,
	QCOW2_GRANULE_SKIPPED,
};

enum qcow2_view_state {
	QCOW2_VIEW_NEW,
	QCOW2_VIEW_LIVE,
	QCOW2_VIEW_HELD,
	QCOW2_VIEW_OVER,
};

/* Granules of the states above that are in one piece, a page */
#define QCOW2_VIEW_PIECE_SHIFT	(PAGE_SHIFT + 2)

struct qcow2_view {
	/* Constant */
	dev_t dev;			/* of the live device */
	dev_t cow;			/* of that for what is kept */
	unsigned int shift;		/* log2 of sectors per granule */
	sector_t size;			/* sectors */
	u64 granules;
	refcount_t refs;

	/* A mutex of view.c's: */
	struct list_head node;		/* on the list of those that are live or held */
	struct dm_target *owner;	/* whose table is live, or will be; NULL: none */
	struct list_head readers;	/* struct qcow2_view_reader */

	spinlock_t lock;		/* of what is written of the rest */
	/* enum qcow2_view_state; read anywhere (smp_load_acquire) */
	unsigned int state;
	const char *why;		/* it is over; before @state */
	u64 kept, zero, skipped;	/* granules; read anywhere (READ_ONCE) */
	u64 begun, limit;		/* that are kept, or will be soon; granules */
	/*
	 * Two bits for each granule, by pieces, NULL: all of them live.  Pieces stay as long as
	 * the view does.  Read anywhere (smp_load_acquire of both).
	 */
	unsigned long **pieces;
};

/* Who reads a view, to be told when it is over */
struct qcow2_view_reader {
	struct list_head node;
	struct dm_target *ti;
};

/* The number of a device that a table names.  0 or a negative errno. */
int qcow2_view_device(const char *path, dev_t *dev);

/**
 * qcow2_view_create() - a view that is not live yet
 * @dev: of the mapped device
 * @cow: of the device for what is kept
 * @size: of the mapped device, sectors
 * @bits: log2 of bytes per granule
 * @error: set if the result is NULL
 *
 * Process context, like all that has no other comment.
 */
struct qcow2_view *qcow2_view_create(dev_t dev, dev_t cow, sector_t size,
				     unsigned int bits, char **error);
void qcow2_view_put(struct qcow2_view *view);

/*
 * A table is about to be resumed: if its view would go on with one that the table before has, take
 * that in its place.  @view is the caller's, and so is what is returned.
 */
struct qcow2_view *qcow2_view_adopt(struct qcow2_view *view);

/*
 * A table is resumed: its view (NULL: none) is live from now on, if it is not over, and any
 * other one of the same mapped device is over.
 */
void qcow2_view_resume(struct qcow2_view *view, dev_t dev,
		       struct dm_target *owner);

/* Its table has been suspended: nothing changes on its behalf. */
void qcow2_view_hold(struct qcow2_view *view, struct dm_target *owner);

/* A table goes away: if it is the owner, its view is over. */
void qcow2_view_leave(struct qcow2_view *view, struct dm_target *owner);

/* It is over, if it is not yet: @why is a constant string.  Tells userspace. */
void qcow2_view_end(struct qcow2_view *view, const char *why);

/* For status: "valid", or why it is over.  Any context. */
const char *qcow2_view_status(const struct qcow2_view *view);

/*
 * The view that is live or held of a device, for a reader, who is told when it is over; NULL if
 * there is none.
 */
struct qcow2_view *qcow2_view_find(dev_t dev, dev_t cow,
				   struct qcow2_view_reader *reader);
void qcow2_view_lose(struct qcow2_view *view, struct qcow2_view_reader *reader);

/* Any context, as what follows */
static inline enum qcow2_view_state qcow2_view_state(const struct qcow2_view *view)
{
	/* Pairs with whoever changes it: see the head of this file. */
	return smp_load_acquire(&view->state);
}

static inline enum qcow2_granule qcow2_view_look(const struct qcow2_view *view,
						 u64 granule)
{
	unsigned int i = granule & (BIT(QCOW2_VIEW_PIECE_SHIFT) - 1);
	unsigned long *piece;

	/* Pairs with qcow2_view_prepare(): it was cleared. */
	piece = smp_load_acquire(&view->pieces[granule >> QCOW2_VIEW_PIECE_SHIFT]);
	if (!piece)
		return QCOW2_GRANULE_LIVE;
	/* Pairs with qcow2_view_set(): see the head of this file. */
	return smp_load_acquire(&piece[i / (BITS_PER_LONG / 2)]) >>
	       (2 * i % BITS_PER_LONG) & 3;
}

/*
 * No more granules than this are kept: a view that would need more is over.  Those that are kept
 * already stay.
 */
void qcow2_view_limit(struct qcow2_view *view, u64 granules);

/* May a granule be kept, within that limit?  It counts from now on.  Process context. */
bool qcow2_view_take(struct qcow2_view *view);

/* Need nothing of a range be kept any more?  @nr is 1 at least. */
bool qcow2_view_passes(const struct qcow2_view *view, sector_t sector,
		       sector_t nr);

/* The end of the granule that a sector is in */
static inline sector_t qcow2_view_granule_end(const struct qcow2_view *view,
					      sector_t sector)
{
	return min(((sector >> view->shift) + 1) << view->shift, view->size);
}

/*
 * Get memory for what is to be known of granules, which are in one piece.  False without
 * it.  Process context; GFP_NOIO.
 */
bool qcow2_view_prepare(struct qcow2_view *view, u64 granule);

static inline bool qcow2_view_is_prepared(const struct qcow2_view *view,
					  u64 granule)
{
	return READ_ONCE(view->pieces[granule >> QCOW2_VIEW_PIECE_SHIFT]);
}

/*
 * Granules that are live get another state, for which memory has been prepared; others stay as
 * they are.
 */
void qcow2_view_set(struct qcow2_view *view, u64 granule, u64 nr,
		    enum qcow2_granule state);

#endif /* DM_QCOW2_VIEW_H */
