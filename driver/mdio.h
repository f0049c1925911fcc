/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * I/O on the metadata device, and the kinds of errors that come of I/O.
 * Uses no other room of the driver.
 */
#ifndef DM_QCOW2_MDIO_H
#define DM_QCOW2_MDIO_H

#include <linux/bio.h>
#include <linux/blkdev.h>
#include <linux/completion.h>
#include <linux/mempool.h>

/* The unit of L2, L1 and refcount I/O, unless clusters are smaller. */
#define QCOW2_BLOCK_BYTES	4096U

/* 64 KiB of zeros, to be written; there while the module is */
#define QCOW2_ZERO_BYTES	65536U
extern struct page *qcow2_zeros;

int qcow2_zeros_init(void);
void qcow2_zeros_exit(void);

/*
 * What has gone wrong with something that has several parts: the kind of the first
 * error, but want of space wins, for that is what can be mended.  Any number of
 * parts may note theirs at the same time, from any context (WRITE_ONCE); read
 * with READ_ONCE, as a rule when all of them have ended.
 */
struct qcow2_error {
	blk_status_t status;
	bool nospc;
};

static inline void qcow2_error_note(struct qcow2_error *error,
				    blk_status_t status)
{
	if (status == BLK_STS_NOSPC)
		WRITE_ONCE(error->nospc, true);
	if (!READ_ONCE(error->status))
		WRITE_ONCE(error->status, status);
}

static inline blk_status_t qcow2_error_get(const struct qcow2_error *error)
{
	return READ_ONCE(error->nospc) ? BLK_STS_NOSPC :
					 READ_ONCE(error->status);
}

struct qcow2_mdio {
	/* Constant after qcow2_mdio_init() */
	struct block_device *bdev;
	const char *name;		/* of the target, for messages */
	u64 size;			/* of the device, bytes */
	unsigned int block_bytes;	/* 4 KiB, or a cluster if that is smaller */

	struct bio_set bs;
	mempool_t blocks;		/* buffers of @block_bytes */
};

/* A number of requests, and someone who waits for all of them; on the stack. */
struct qcow2_ios {
	atomic_t pending;
	struct qcow2_error error;	/* of any of them */
	struct completion done;
};

/**
 * qcow2_mdio_init() - prepare for I/O on a metadata device
 * @io: all zeros
 * @bdev: the device
 * @name: for messages; lives as long as @io
 * @cluster_bits: of the image
 * @writer: the image will be written
 *
 * Returns 0 or a negative errno; qcow2_mdio_exit() is right after both.
 * Process context.
 */
int qcow2_mdio_init(struct qcow2_mdio *io, struct block_device *bdev,
		    const char *name, unsigned int cluster_bits, bool writer);
void qcow2_mdio_exit(struct qcow2_mdio *io);

void qcow2_ios_init(struct qcow2_ios *ios);

/*
 * Wait for all that was started with @ios.  Returns 0, or a negative errno if
 * any of it has failed.  Process context.
 */
int qcow2_ios_wait(struct qcow2_ios *ios);

/**
 * qcow2_mdio_start() - start to read or write
 * @io: the device
 * @ios: who will wait
 * @error: notes an error of these bytes; may be NULL
 * @opf: REQ_OP_READ or REQ_OP_WRITE, and flags
 * @offset: on the device, bytes
 * @buf: kmalloc() or vmalloc() memory; not changed until the end
 * @len: bytes, a multiple of the device's logical block
 *
 * Process context; sleeps for a bio, so that a plug of the caller's is no obstacle.
 */
void qcow2_mdio_start(struct qcow2_mdio *io, struct qcow2_ios *ios,
		      struct qcow2_error *error, blk_opf_t opf, u64 offset,
		      void *buf, size_t len);

/* Start to write @len bytes of zeros; otherwise as above. */
void qcow2_mdio_start_zero(struct qcow2_mdio *io, struct qcow2_ios *ios,
			   u64 offset, u64 len);

/* Read or write, and wait.  0 or a negative errno; process context. */
int qcow2_mdio_rw(struct qcow2_mdio *io, blk_opf_t opf, u64 offset, void *buf,
		  size_t len);

/* Flush the device's cache.  0 or a negative errno; process context. */
int qcow2_mdio_flush(struct qcow2_mdio *io);

/*
 * A buffer of a block.  Without @wait it can be NULL; with it, buffers that the
 * caller holds already must be fewer than the pool's reserve, or be given back by
 * somebody else.  GFP_NOIO; process context.
 */
void *qcow2_mdio_get_block(struct qcow2_mdio *io, bool wait);
void qcow2_mdio_put_block(struct qcow2_mdio *io, void *buf);

#endif /* DM_QCOW2_MDIO_H */
