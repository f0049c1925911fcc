// SPDX-License-Identifier: GPL-2.0-only
/*
 * I/O on the metadata device.
 */
#include <linux/highmem.h>
#include <linux/mm.h>
#include <linux/vmalloc.h>

#include "compat.h"
#include "mdio.h"

/*
 * Bios, each with a page of vectors, and buffers that are kept in reserve, for a
 * writer and for a reader.  A device that does nothing has them, too, so they are
 * few: who waits for a bio has none, and of buffers the commit worker, who waits
 * with one at most, and the header need three.
 */
#define QCOW2_MDIO_RESERVE	4
#define QCOW2_MDIO_READ_RESERVE	2

struct page *qcow2_zeros;

struct qcow2_mdio_bio {
	struct qcow2_ios *ios;
	struct qcow2_error *error;
	struct bio bio;		/* last: the bio set's front pad ends here */
};

int qcow2_zeros_init(void)
{
	qcow2_zeros = alloc_pages(GFP_KERNEL | __GFP_ZERO | __GFP_COMP,
				  get_order(QCOW2_ZERO_BYTES));
	return qcow2_zeros ? 0 : -ENOMEM;
}

void qcow2_zeros_exit(void)
{
	__free_pages(qcow2_zeros, get_order(QCOW2_ZERO_BYTES));
}

int qcow2_mdio_init(struct qcow2_mdio *io, struct block_device *bdev,
		    const char *name, unsigned int cluster_bits, bool writer)
{
	unsigned int reserve = writer ? QCOW2_MDIO_RESERVE :
					QCOW2_MDIO_READ_RESERVE;
	int r;

	io->bdev = bdev;
	io->name = name;
	io->size = bdev_nr_bytes(bdev);
	io->block_bytes = min(QCOW2_BLOCK_BYTES, 1U << cluster_bits);
	r = bioset_init(&io->bs, reserve, offsetof(struct qcow2_mdio_bio, bio),
			BIOSET_NEED_BVECS);
	if (r || !writer)
		return r;
	return mempool_init_kmalloc_pool(&io->blocks, reserve, io->block_bytes);
}

void qcow2_mdio_exit(struct qcow2_mdio *io)
{
	mempool_exit(&io->blocks);
	bioset_exit(&io->bs);
}

void qcow2_ios_init(struct qcow2_ios *ios)
{
	atomic_set(&ios->pending, 1);
	ios->error = (struct qcow2_error){};
	init_completion(&ios->done);
}

static void qcow2_mdio_endio(struct bio *bio)
{
	struct qcow2_mdio_bio *mb = container_of(bio, struct qcow2_mdio_bio, bio);
	struct qcow2_ios *ios = mb->ios;

	if (bio->bi_status) {
		qcow2_error_note(&ios->error, bio->bi_status);
		if (mb->error)
			qcow2_error_note(mb->error, bio->bi_status);
	}
	bio_put(bio);
	if (atomic_dec_and_test(&ios->pending))
		complete(&ios->done);
}

int qcow2_ios_wait(struct qcow2_ios *ios)
{
	if (!atomic_dec_and_test(&ios->pending))
		wait_for_completion_io(&ios->done);
	return blk_status_to_errno(qcow2_error_get(&ios->error));
}

static struct bio *qcow2_mdio_bio(struct qcow2_mdio *io, struct qcow2_ios *ios,
				  struct qcow2_error *error, blk_opf_t opf,
				  u64 offset, unsigned int nr_vecs)
{
	struct qcow2_mdio_bio *mb;
	struct bio *bio;

	bio = bio_alloc_bioset(io->bdev, nr_vecs, opf | REQ_META | REQ_SYNC,
			       GFP_NOIO, &io->bs);
	mb = container_of(bio, struct qcow2_mdio_bio, bio);
	mb->ios = ios;
	mb->error = error;
	bio->bi_iter.bi_sector = offset >> SECTOR_SHIFT;
	bio->bi_end_io = qcow2_mdio_endio;
	atomic_inc(&ios->pending);
	return bio;
}

/*
 * Each bio is submitted before the next one is allocated, so that the bio set's
 * reserve suffices.
 */
void qcow2_mdio_start(struct qcow2_mdio *io, struct qcow2_ios *ios,
		      struct qcow2_error *error, blk_opf_t opf, u64 offset,
		      void *buf, size_t len)
{
	if (op_is_write(opf) && is_vmalloc_addr(buf))
		flush_kernel_vmap_range(buf, len);
	while (len) {
		struct bio *bio;
		unsigned int vecs = DIV_ROUND_UP(offset_in_page(buf) + len,
						 PAGE_SIZE);

		vecs = bio_max_segs(vecs);
		bio = qcow2_mdio_bio(io, ios, error, opf, offset, vecs);
		while (len && vecs--) {
			struct page *page = is_vmalloc_addr(buf) ?
				vmalloc_to_page(buf) : virt_to_page(buf);
			unsigned int n = min_t(size_t, len,
					       PAGE_SIZE - offset_in_page(buf));

			__bio_add_page(bio, page, n, offset_in_page(buf));
			buf += n;
			offset += n;
			len -= n;
		}
		submit_bio(bio);
	}
}

void qcow2_mdio_start_zero(struct qcow2_mdio *io, struct qcow2_ios *ios,
			   u64 offset, u64 len)
{
	while (len) {
		struct bio *bio;
		unsigned int vecs = DIV_ROUND_UP_ULL(len, QCOW2_ZERO_BYTES);

		vecs = bio_max_segs(vecs);
		bio = qcow2_mdio_bio(io, ios, NULL, REQ_OP_WRITE, offset, vecs);
		while (len && vecs--) {
			unsigned int n = min_t(u64, len, QCOW2_ZERO_BYTES);

			__bio_add_page(bio, qcow2_zeros, n, 0);
			offset += n;
			len -= n;
		}
		submit_bio(bio);
	}
}

int qcow2_mdio_rw(struct qcow2_mdio *io, blk_opf_t opf, u64 offset, void *buf,
		  size_t len)
{
	struct qcow2_ios ios;
	int r;

	qcow2_ios_init(&ios);
	qcow2_mdio_start(io, &ios, NULL, opf, offset, buf, len);
	r = qcow2_ios_wait(&ios);
	if (!op_is_write(opf) && is_vmalloc_addr(buf))
		invalidate_kernel_vmap_range(buf, len);
	return r;
}

int qcow2_mdio_flush(struct qcow2_mdio *io)
{
	return blkdev_issue_flush(io->bdev);
}

void *qcow2_mdio_get_block(struct qcow2_mdio *io, bool wait)
{
	return mempool_alloc(&io->blocks, wait ? GFP_NOIO :
						 GFP_NOWAIT | __GFP_NOWARN);
}

void qcow2_mdio_put_block(struct qcow2_mdio *io, void *buf)
{
	mempool_free(buf, &io->blocks);
}
