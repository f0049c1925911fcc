// SPDX-License-Identifier: GPL-2.0-or-later
#include <stddef.h>

#include "image/bitmaps.h"
#include "image/prepare.h"
#include "lib/util.h"

static int mark_bitmap(const struct bitmap *b, void *arg)
{
	struct image *img = arg;
	__be32 flags = cpu_to_be32(b->head.flags | QCOW2_BITMAP_IN_USE);

	if (!(b->head.flags & QCOW2_BITMAP_AUTO) || b->head.flags & QCOW2_BITMAP_IN_USE)
		return 0;
	warning("%s: bitmap %s does not record what is written now: it is marked as in use (invalid)",
		esc(img->node.path), escn(b->name.s, b->name.len));
	return image_change(img, &flags, sizeof(flags),
			    img->h.bitmap_dir_offset + b->at +
			    offsetof(struct qcow2_bitmap_head, flags));
}

/*
 * Bitmaps that record writes by themselves become stale with the first write.
 * To mark them keeps them and their clusters; others stay valid.
 */
static int mark_bitmaps(struct image *img)
{
	const char *why;
	int ret;

	if (!image_has_bitmaps(img))
		return 0;
	ret = bitmaps_parse(img->bitmap_dir, img->h.bitmap_dir_size,
			    img->h.bitmap_count, img->h.cluster_bits,
			    mark_bitmap, img, &why);
	return ret ? ret : image_sync(img);
}

int image_prepare(struct image *img)
{
	const struct room room = { .size = img->geo.size };
	int ret = 0;

	/* They may take clusters that the kernel could take for tables. */
	if (img->keep_bitmaps)
		ret = image_bitmaps_ready(img, &img->recording);
	if (!ret)
		ret = image_make_room(img, &room);
	if (!ret && !img->keep_bitmaps)
		ret = mark_bitmaps(img);
	if (!ret)
		ret = image_clear_autoclear(img);
	return ret;
}
