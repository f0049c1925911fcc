// SPDX-License-Identifier: GPL-2.0-only
/*
 * Views: which granules are kept, and whose they are.
 */
#include <linux/blkdev.h>
#include <linux/device-mapper.h>
#include <linux/mm.h>
#include <linux/slab.h>

#include "view.h"

#define DM_MSG_PREFIX "qcow2"

/* Pieces of a view: 1 PiB of 64 KiB granules */
#define QCOW2_VIEW_MAX_PIECES	BIT(20)

static DEFINE_MUTEX(qcow2_views_lock);
static LIST_HEAD(qcow2_views);

int qcow2_view_device(const char *path, dev_t *dev)
{
	unsigned int major, minor;
	char more;

	if (sscanf(path, "%u:%u%c", &major, &minor, &more) != 2)
		return lookup_bdev(path, dev);
	*dev = MKDEV(major, minor);
	return MAJOR(*dev) == major && MINOR(*dev) == minor ? 0 : -EOVERFLOW;
}

struct qcow2_view *qcow2_view_create(dev_t dev, dev_t cow, sector_t size,
				     unsigned int bits, char **error)
{
	unsigned int shift = bits - SECTOR_SHIFT;
	u64 granules = ((size - 1) >> shift) + 1;
	u64 pieces = ((granules - 1) >> QCOW2_VIEW_PIECE_SHIFT) + 1;
	struct qcow2_view *view = NULL;

	if (pieces > QCOW2_VIEW_MAX_PIECES) {
		*error = "View's granules are too small for the target";
		return NULL;
	}
	*error = "Cannot allocate memory for the view";
	view = kzalloc(sizeof(*view), GFP_KERNEL);
	if (!view)
		return NULL;
	view->pieces = kvcalloc(pieces, sizeof(*view->pieces),
				GFP_KERNEL | __GFP_NOWARN);
	if (!view->pieces) {
		kfree(view);
		return NULL;
	}
	view->dev = dev;
	view->cow = cow;
	view->shift = shift;
	view->size = size;
	view->granules = granules;
	view->limit = granules;
	refcount_set(&view->refs, 1);
	INIT_LIST_HEAD(&view->node);
	INIT_LIST_HEAD(&view->readers);
	spin_lock_init(&view->lock);
	return view;
}

void qcow2_view_put(struct qcow2_view *view)
{
	u64 p;

	if (!view || !refcount_dec_and_test(&view->refs))
		return;
	for (p = 0; p <= (view->granules - 1) >> QCOW2_VIEW_PIECE_SHIFT; p++)
		free_page((unsigned long)view->pieces[p]);
	kvfree(view->pieces);
	kfree(view);
}

/* The mutex is held.  False if it was over already. */
static bool qcow2_view_over(struct qcow2_view *view, const char *why)
{
	bool was;

	lockdep_assert_held(&qcow2_views_lock);
	spin_lock_irq(&view->lock);
	was = view->state == QCOW2_VIEW_OVER;
	if (!was) {
		view->why = why;
		/* Pairs with qcow2_view_state(): what changes from now on is not kept. */
		smp_store_release(&view->state, QCOW2_VIEW_OVER);
	}
	spin_unlock_irq(&view->lock);
	list_del_init(&view->node);
	return !was;
}

static void qcow2_view_tell(struct qcow2_view *view)
{
	struct qcow2_view_reader *reader;

	lockdep_assert_held(&qcow2_views_lock);
	list_for_each_entry(reader, &view->readers, node)
		dm_table_event(reader->ti->table);
}

static void qcow2_view_set_state(struct qcow2_view *view,
				 enum qcow2_view_state state)
{
	spin_lock_irq(&view->lock);
	if (view->state != QCOW2_VIEW_OVER) {
		/* Pairs with qcow2_view_state(). */
		smp_store_release(&view->state, state);
	}
	spin_unlock_irq(&view->lock);
}

void qcow2_view_end(struct qcow2_view *view, const char *why)
{
	mutex_lock(&qcow2_views_lock);
	if (qcow2_view_over(view, why)) {
		if (view->owner)
			dm_table_event(view->owner->table);
		qcow2_view_tell(view);
	}
	mutex_unlock(&qcow2_views_lock);
}

struct qcow2_view *qcow2_view_adopt(struct qcow2_view *view)
{
	struct qcow2_view *other;

	mutex_lock(&qcow2_views_lock);
	list_for_each_entry(other, &qcow2_views, node) {
		if (other == view || other->dev != view->dev ||
		    other->cow != view->cow || other->shift != view->shift ||
		    other->size != view->size)
			continue;
		refcount_inc(&other->refs);
		qcow2_view_put(view);
		view = other;
		break;
	}
	mutex_unlock(&qcow2_views_lock);
	return view;
}

void qcow2_view_resume(struct qcow2_view *view, dev_t dev,
		       struct dm_target *owner)
{
	struct qcow2_view *other, *next;

	mutex_lock(&qcow2_views_lock);
	list_for_each_entry_safe(other, next, &qcow2_views, node) {
		if (other == view || other->dev != dev)
			continue;
		if (qcow2_view_over(other, "ended"))
			qcow2_view_tell(other);
		other->owner = NULL;
	}
	if (view) {
		view->owner = owner;
		if (list_empty(&view->node) && view->state == QCOW2_VIEW_NEW)
			list_add(&view->node, &qcow2_views);
		qcow2_view_set_state(view, QCOW2_VIEW_LIVE);
	}
	mutex_unlock(&qcow2_views_lock);
}

void qcow2_view_hold(struct qcow2_view *view, struct dm_target *owner)
{
	mutex_lock(&qcow2_views_lock);
	if (view->owner == owner)
		qcow2_view_set_state(view, QCOW2_VIEW_HELD);
	mutex_unlock(&qcow2_views_lock);
}

void qcow2_view_leave(struct qcow2_view *view, struct dm_target *owner)
{
	mutex_lock(&qcow2_views_lock);
	if (view->owner == owner) {
		view->owner = NULL;
		if (qcow2_view_over(view, "ended"))
			qcow2_view_tell(view);
	}
	mutex_unlock(&qcow2_views_lock);
}

struct qcow2_view *qcow2_view_find(dev_t dev, dev_t cow,
				   struct qcow2_view_reader *reader)
{
	struct qcow2_view *view, *found = NULL;

	mutex_lock(&qcow2_views_lock);
	list_for_each_entry(view, &qcow2_views, node) {
		if (view->dev != dev || view->cow != cow)
			continue;
		refcount_inc(&view->refs);
		list_add(&reader->node, &view->readers);
		found = view;
		break;
	}
	mutex_unlock(&qcow2_views_lock);
	return found;
}

void qcow2_view_lose(struct qcow2_view *view, struct qcow2_view_reader *reader)
{
	mutex_lock(&qcow2_views_lock);
	list_del(&reader->node);
	mutex_unlock(&qcow2_views_lock);
	qcow2_view_put(view);
}

const char *qcow2_view_status(const struct qcow2_view *view)
{
	return qcow2_view_state(view) == QCOW2_VIEW_OVER ? view->why : "valid";
}

void qcow2_view_limit(struct qcow2_view *view, u64 granules)
{
	spin_lock_irq(&view->lock);
	view->limit = granules;
	spin_unlock_irq(&view->lock);
}

bool qcow2_view_take(struct qcow2_view *view)
{
	bool good;

	spin_lock_irq(&view->lock);
	good = view->begun < view->limit;
	view->begun += good;
	spin_unlock_irq(&view->lock);
	return good;
}

bool qcow2_view_passes(const struct qcow2_view *view, sector_t sector,
		       sector_t nr)
{
	u64 granule = sector >> view->shift;
	u64 last = (sector + nr - 1) >> view->shift;

	if (qcow2_view_state(view) == QCOW2_VIEW_OVER)
		return true;
	for (; granule <= last; granule++)
		if (qcow2_view_look(view, granule) == QCOW2_GRANULE_LIVE)
			return false;
	return true;
}

bool qcow2_view_prepare(struct qcow2_view *view, u64 granule)
{
	unsigned long **place = view->pieces + (granule >> QCOW2_VIEW_PIECE_SHIFT);
	unsigned long page;

	/* It stays, once it is there. */
	if (READ_ONCE(*place))
		return true;
	page = get_zeroed_page(GFP_NOIO | __GFP_NOWARN);
	if (!page)
		return false;
	spin_lock_irq(&view->lock);
	if (!*place) {
		/* Pairs with qcow2_view_look(). */
		smp_store_release(place, (unsigned long *)page);
		page = 0;
	}
	spin_unlock_irq(&view->lock);
	free_page(page);
	return true;
}

void qcow2_view_set(struct qcow2_view *view, u64 granule, u64 nr,
		    enum qcow2_granule state)
{
	u64 *count = state == QCOW2_GRANULE_KEPT ? &view->kept :
		     state == QCOW2_GRANULE_ZERO ? &view->zero : &view->skipped;
	unsigned long flags;

	spin_lock_irqsave(&view->lock, flags);
	for (; nr; nr--, granule++) {
		unsigned int i = granule & (BIT(QCOW2_VIEW_PIECE_SHIFT) - 1);
		unsigned long *piece = view->pieces[granule >> QCOW2_VIEW_PIECE_SHIFT];
		unsigned long *word = piece + i / (BITS_PER_LONG / 2);
		unsigned int at = 2 * i % BITS_PER_LONG;

		if (*word >> at & 3)
			continue;
		WRITE_ONCE(*count, *count + 1);
		/* Then it may change: see qcow2_view_look(). */
		smp_store_release(word, *word | (unsigned long)state << at);
	}
	spin_unlock_irqrestore(&view->lock, flags);
}
