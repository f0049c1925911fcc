// SPDX-License-Identifier: GPL-2.0-or-later
#include "image/bitmaps.h"
#include "stack/change.h"

int live_prepare_bitmaps(struct live *l, bool quiet, bitmaps_fn *fn, void *arg)
{
	struct image *img = &l->before;
	struct room room = { .quiet = quiet };
	uint64_t at, reftable;
	struct bitmaps s;
	int ret;

	img->node.path = l->name;
	ret = bitmaps_load(&s, img);
	if (!ret)
		ret = fn(&s, arg);
	room.size = img->geo.size;
	room.more = bitmaps_need(&s);
	bitmaps_free(&s);
	return ret ? ret : image_take_room(img, &room, &at, &reftable);
}

int live_apply_bitmaps(struct live *l, bitmaps_fn *fn, void *arg)
{
	struct bitmaps s;
	int ret;

	l->img.node.path = l->name;
	ret = bitmaps_load(&s, &l->img);
	if (!ret)
		ret = fn(&s, arg);
	if (!ret)
		ret = bitmaps_write(&s);
	bitmaps_free(&s);
	return ret;
}
