// SPDX-License-Identifier: GPL-2.0-only
/*
 * The image's bitmap directory.
 */
#include <linux/sched.h>
#include <linux/slab.h>

#include "compat.h"
#include "directory.h"

/* What is read of the metadata, in blocks, one of which is here. */
struct qcow2_reader {
	struct qcow2_mdio *io;
	u64 offset;			/* of the block; bytes */
	u8 *block;
	bool valid;
};

/* 0 or a negative errno; -EINVAL if that is behind the end. */
static int qcow2_get_bytes(struct qcow2_reader *rd, u64 offset, void *to,
			   size_t len)
{
	unsigned int size = rd->io->block_bytes;
	u8 *p = to;

	if (offset > rd->io->size || len > rd->io->size - offset)
		return -EINVAL;
	while (len) {
		u64 start = round_down(offset, size);
		size_t n = min_t(u64, len, start + size - offset);
		int r;

		if (!rd->valid || rd->offset != start) {
			/* The device may end inside the last one. */
			size_t here = min_t(u64, size, rd->io->size - start);

			rd->valid = false;
			r = qcow2_mdio_rw(rd->io, REQ_OP_READ, start, rd->block,
					  here);
			if (r)
				return r;
			rd->offset = start;
			rd->valid = true;
		}
		memcpy(p, rd->block + (offset - start), n);
		p += n;
		offset += n;
		len -= n;
	}
	return 0;
}

/*
 * Look for the bitmaps extension.  0 with @dir->count set, which is 0 if there is none;
 * -EINVAL with @fault set; or another negative errno.
 */
static int qcow2_find_directory(struct qcow2_reader *rd,
				const struct qcow2_geometry *geo,
				struct qcow2_bitmap_dir *dir,
				enum qcow2_fault *fault)
{
	u64 pos, end = 1ULL << geo->cluster_bits, backing;
	struct qcow2_bitmaps_ext ext;
	struct qcow2_extension e;
	struct qcow2_header h;
	int r;

	dir->count = 0;
	r = qcow2_get_bytes(rd, 0, &h, sizeof(h));
	if (r)
		return r;
	if (!(be64_to_cpu(h.autoclear_features) & QCOW2_AUTOCLEAR_BITMAPS))
		return 0;
	pos = be32_to_cpu(h.header_length);
	backing = be64_to_cpu(h.backing_file_offset);
	if (backing && backing < end)
		end = backing;
	while (pos < end && end - pos >= sizeof(e)) {
		u32 type, len;

		r = qcow2_get_bytes(rd, pos, &e, sizeof(e));
		if (r)
			return r;
		type = be32_to_cpu(e.type);
		len = be32_to_cpu(e.len);
		if (type == QCOW2_EXT_END)
			break;
		pos += sizeof(e);
		if (len > end - pos) {
			*fault = QCOW2_FAULT_EXT_LEN;
			return -EINVAL;
		}
		if (type == QCOW2_EXT_BITMAPS) {
			if (dir->count) {
				*fault = QCOW2_FAULT_EXT_TWICE;
				return -EINVAL;
			}
			r = qcow2_get_bytes(rd, pos, &ext,
					    min_t(u32, len, sizeof(ext)));
			if (r)
				return r;
			*fault = qcow2_bitmaps_ext_check(&ext, len,
							 geo->cluster_bits, dir);
			if (*fault)
				return -EINVAL;
		}
		pos += round_up((u64)len, 8);
		cond_resched();
	}
	return 0;
}

/* Results as qcow2_find_directory() */
static int qcow2_walk_directory(struct qcow2_reader *rd,
				const struct qcow2_geometry *geo,
				const struct qcow2_bitmap_dir *dir,
				struct qcow2_recording *rec,
				enum qcow2_fault *fault)
{
	u64 pos = dir->offset, left = dir->size;
	struct qcow2_bitmap_head head;
	struct qcow2_bitmap b;
	u32 i;
	int r;

	for (i = 0; i < dir->count; i++) {
		*fault = QCOW2_FAULT_BITMAP_CUT;
		if (left < sizeof(head))
			return -EINVAL;
		r = qcow2_get_bytes(rd, pos, &head, sizeof(head));
		if (r)
			return r;
		*fault = qcow2_bitmap_decode(&head, left, geo->cluster_bits, &b);
		if (*fault)
			return -EINVAL;
		pos += qcow2_bitmap_bytes(&b);
		left -= qcow2_bitmap_bytes(&b);
		if (!qcow2_bitmap_records(&b))
			continue;
		*fault = qcow2_bitmap_record_check(&b, geo->size,
						   geo->cluster_bits,
						   rd->io->size);
		if (!*fault && rec->count == QCOW2_MAX_RECORDING)
			*fault = QCOW2_FAULT_BITMAP_MANY;
		if (*fault)
			return -EINVAL;
		rec->bitmaps[rec->count++] = b;
		cond_resched();
	}
	return 0;
}

int qcow2_directory_read(struct qcow2_mdio *io, const struct qcow2_geometry *geo,
			 struct qcow2_recording *rec, char **error)
{
	struct qcow2_reader rd = { .io = io };
	enum qcow2_fault fault = QCOW2_OK;
	int r;

	rec->count = 0;
	rd.block = kmalloc(io->block_bytes, GFP_NOIO);
	if (!rd.block) {
		*error = "Cannot allocate memory for the bitmap directory";
		return -ENOMEM;
	}
	r = qcow2_find_directory(&rd, geo, &rec->dir, &fault);
	if (!r && rec->dir.count)
		r = qcow2_walk_directory(&rd, geo, &rec->dir, rec, &fault);
	kfree(rd.block);
	if (fault)
		*error = (char *)qcow2_fault_str(fault);
	else if (r == -EINVAL)
		*error = "bitmap directory lies beyond the end of the metadata";
	else if (r)
		*error = "Cannot read the bitmap directory";
	return r;
}

int qcow2_bitmap_read_table(struct qcow2_mdio *io,
			    const struct qcow2_geometry *geo,
			    const struct qcow2_bitmap *b, u32 *clusters,
			    char **error)
{
	unsigned int per_block = io->block_bytes / 8, i, n;
	enum qcow2_fault fault = QCOW2_OK;
	__be64 *buf;
	u32 at;
	int r = 0;

	buf = kmalloc(io->block_bytes, GFP_NOIO);
	if (!buf) {
		*error = "Cannot allocate memory for a bitmap table";
		return -ENOMEM;
	}
	for (at = 0; at < b->table_size && !r; at += n) {
		u64 offset = b->table_offset + (u64)at * 8;

		n = min(per_block, b->table_size - at);
		r = qcow2_mdio_rw(io, REQ_OP_READ, offset, buf,
				  min_t(u64, io->block_bytes, io->size - offset));
		if (r)
			*error = "Cannot read a bitmap table";
		for (i = 0; i < n && !r; i++) {
			u64 cluster;

			fault = qcow2_bitmap_entry_check(be64_to_cpu(buf[i]),
							 geo->cluster_bits,
							 io->size, &cluster);
			if (!fault && !cluster)
				fault = QCOW2_FAULT_BITMAP_NONE;
			/* Beyond that the allocator cannot account for anything. */
			if (!fault && cluster >> geo->cluster_bits > U32_MAX)
				fault = QCOW2_FAULT_ENTRY_BEYOND;
			if (fault) {
				*error = (char *)qcow2_fault_str(fault);
				r = -EINVAL;
			} else {
				clusters[at + i] = cluster >> geo->cluster_bits;
			}
		}
		cond_resched();
	}
	kfree(buf);
	return r;
}
