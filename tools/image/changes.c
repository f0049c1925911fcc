// SPDX-License-Identifier: GPL-2.0-or-later
/* Changes of an image, one after the other, and how they are undone. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "image/plan.h"
#include "image/tables.h"
#include "lib/util.h"

#define SECTOR	512

/* One change, or (len 0) a point at which all before was made durable. */
struct undo {
	struct undo *next;
	bool failed;		/* it did not work, or not for certain */
	uint64_t off;
	size_t len;
	uint8_t old[];
};

static int undo_add(struct image *img, uint64_t off, size_t len)
{
	struct undo *u = malloc(sizeof(*u) + len);

	if (!u)
		return fail_nomem();
	u->off = off;
	u->len = len;
	u->failed = false;
	if (len && node_read(&img->node, u->old, len, off)) {
		free(u);
		return fail(EX_WRONG, "%s: cannot read its metadata: %s",
			    esc(img->node.path), strerror(EIO));
	}
	if (img->changing) {
		int ret = img->changing(img, off, u->old, len);

		if (ret) {
			free(u);
			return ret;
		}
	}
	u->next = img->undo;
	img->undo = u;
	return 0;
}

void image_forget_changes(struct image *img)
{
	while (img->undo) {
		struct undo *u = img->undo;

		img->undo = u->next;
		free(u);
	}
}

static int write_failed(const struct image *img, int err)
{
	errno = err;
	return fail_errno("%s: cannot write its metadata", esc(img->node.path));
}

int image_change(struct image *img, const void *buf, size_t len, uint64_t off)
{
	int ret = undo_add(img, off, len);

	if (ret)
		return ret;
	ret = write_at(img->node.fd, buf, len, off);
	if (!ret)
		return 0;
	img->undo->failed = true;
	return write_failed(img, -ret);
}

int image_sync(struct image *img)
{
	int ret = undo_add(img, 0, 0);

	if (ret)
		return ret;
	if (fsync(img->node.fd)) {
		img->undo->failed = true;
		return write_failed(img, errno);
	}
	node_drop_cache(&img->node);
	return 0;
}

void image_undo(struct image *img)
{
	bool failed = false, stuck = false;
	int ret = 0;

	if (img->node.fd < 0)
		return;
	while (img->undo) {
		struct undo *u = img->undo;

		/*
		 * Backwards through the same steps: as crash-safe as forward, if
		 * each comes when the one before it is known to be done.
		 */
		if (stuck)
			;
		else if (u->len)
			ret = write_at(img->node.fd, u->old, u->len, u->off);
		else
			ret = fsync(img->node.fd);
		/* What has failed before may do so again: it was the last step. */
		if (ret) {
			failed = true;
			stuck = !u->failed;
		}
		img->undo = u->next;
		free(u);
	}
	if (!img->node.read_only && fsync(img->node.fd))
		failed = true;
	if (!stuck && img->space.taken) {
		node_drop_cache(&img->node);
		if (space_give_back(&img->space) ||
		    (img->resized && img->resized(img)))
			failed = true;
		if (!img->node.bdev)
			img->node.size = img->space.length;
	}
	if (failed)
		warning("%s: could not be put back as it was: %s; check it with qcow2setup check %s",
			esc(img->node.path), strerror(errno),
			shell_quote(img->node.path));
}

/* All header fields that change lie in the first sector: one atomic write. */
int image_change_header(struct image *img)
{
	int ret;

	memcpy(img->first, &img->h.raw,
	       min_u64(img->h.header_length, sizeof(img->h.raw)));
	ret = image_change(img, img->first, SECTOR, 0);
	return ret ? ret : image_sync(img);
}

/*
 * A block may be counted by one that follows it, so that the last ones come first;
 * a sector is written as a whole.
 */
int image_name_refblocks(struct image *img, uint64_t from, uint64_t to,
			 const __be64 *table)
{
	const uint64_t per_sector = SECTOR / 8;
	uint64_t first;
	int ret = 0;

	while (!ret && to > from) {
		first = max_u64(from, (to - 1) / per_sector * per_sector);
		if (memcmp(table + first - from, img->reftable + first,
			   (to - first) * 8)) {
			memcpy(img->reftable + first, table + first - from,
			       (to - first) * 8);
			ret = image_change(img, img->reftable + first,
					   (to - first) * 8,
					   img->geo.reftable_offset + first * 8);
			if (!ret)
				ret = image_sync(img);
		}
		to = first;
	}
	return ret;
}

/* Take one from the refcounts of @n clusters from cluster @from on. */
int image_put_clusters(struct image *img, uint64_t from, uint64_t n)
{
	uint64_t per_block = refcounts_per_block(&img->geo), c = from;
	unsigned int order = img->geo.refcount_order;
	uint8_t *block = malloc(cluster_size(img));
	int ret = 0;

	if (!block)
		return fail_nomem();
	img->put_end = max_u64(img->put_end, from + n);
	while (!ret && c < from + n) {
		uint64_t i = c / per_block;
		uint64_t to = min_u64(from + n, (i + 1) * per_block);
		uint64_t off = 0;

		if (i < image_reftable_entries(img))
			ret = image_read_refblock(img, img->reftable, i, block, &off);
		if (ret)
			break;
		if (!off) {
			c = to;
			continue;
		}
		for (; c < to; c++) {
			uint64_t v = qcow2_refcount_get(block, c - i * per_block,
							order);

			if (v)
				qcow2_refcount_set(block, c - i * per_block,
						   order, v - 1);
		}
		ret = image_change(img, block, cluster_size(img), off);
	}
	free(block);
	return ret ? ret : image_sync(img);
}

int image_clear_autoclear(struct image *img)
{
	uint64_t keep = QCOW2_AUTOCLEAR_KNOWN;

	if (!img->h.has_bitmaps && img->h.autoclear & QCOW2_AUTOCLEAR_BITMAPS) {
		/* QEMU would corrupt the image later, so do not leave it. */
		warning("%s: header speaks of bitmaps that are not there: its bit is cleared",
			esc(img->node.path));
		keep &= ~QCOW2_AUTOCLEAR_BITMAPS;
	}
	if (!(img->h.autoclear & ~keep))
		return 0;
	img->h.autoclear &= keep;
	img->h.raw.autoclear_features = cpu_to_be64(img->h.autoclear);
	return image_change_header(img);
}
