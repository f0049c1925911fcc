/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the files of dirty bitmaps share, and nobody else needs.  Calls go down this list:
 *
 *	bitmap-start.c	beginning, end, numbers for status
 *	bitmap.c	what requests ask: may they go on, or what do they wait for?
 *	bitmap-take.c	taking back
 *	bitmap-mark.c	writing marks
 *	bitmap-core.c	what is in core: the gate, and blocks with their bits
 */
#ifndef DM_QCOW2_BITMAP_INTERNAL_H
#define DM_QCOW2_BITMAP_INTERNAL_H

#include <linux/device-mapper.h>
#include <linux/log2.h>

#include "bitmap.h"
#include "compat.h"

/* A block of a bitmap */
struct qcow2_bits {
	/* Constant */
	struct qcow2_record *rec;
	unsigned long index;

	/* All of the rest: bm->lock */
	struct list_head lru;
	struct list_head todo;		/* on bm->todo, or empty */
	unsigned int users;		/* who work with it: it cannot go */
	unsigned int rounds;		/* marks of it that are on their way */
	bool writing;			/* by a marker, or by who takes back */
	bool loose;			/* more may be durable than is exact */
	bool unsure;			/* a write has failed: it has to be written */
	/* Bits to be marked ahead; the same: none.  While @rounds is not 0 they stay. */
	u32 ahead_first, ahead_end;
	/*
	 * What is exact and not durable is in these words (longs); the same: nothing is.
	 * They stay while @rounds is not 0.
	 */
	u32 new_first, new_end;
	unsigned long tried;		/* the last round that has written it */
	blk_status_t status;		/* what came of that */
	/* As on disk: byte by byte, the lowest bit first ("Bitmap") */
	u8 *exact, *durable;
};

static inline unsigned int qcow2_bits_bytes(const struct qcow2_bitmaps *bm)
{
	return bm->io->block_bytes;
}

static inline unsigned int qcow2_bits_shift(const struct qcow2_bitmaps *bm)
{
	return ilog2(bm->io->block_bytes) + 3;
}

static inline struct qcow2_bits *qcow2_find_bits(struct qcow2_record *rec, u64 index)
{
	return xa_load(&rec->blocks, index);
}

/* The bits of a range in the only block that has them, see qcow2_bitmaps_piece(). */
static inline void qcow2_bits_range(struct qcow2_bitmaps *bm, struct qcow2_record *rec,
				    sector_t sector, sector_t nr, unsigned int *first,
				    unsigned int *n)
{
	u64 from = sector >> rec->shift, to = (sector + nr - 1) >> rec->shift;

	*first = from & (BIT(qcow2_bits_shift(bm)) - 1);
	*n = to - from + 1;
}

static inline struct qcow2_bits *qcow2_range_bits(struct qcow2_bitmaps *bm,
						  struct qcow2_record *rec,
						  sector_t sector)
{
	return qcow2_find_bits(rec, sector >> rec->shift >>
				    qcow2_bits_shift(bm));
}

/* Have all words in a range of them, which is empty if both are the same, that have these bits. */
static inline void qcow2_widen(u32 *first, u32 *end, u32 bit, u32 bit_end)
{
	u32 from = bit / BITS_PER_LONG, to = (bit_end - 1) / BITS_PER_LONG + 1;
	bool empty = *first == *end;

	*first = empty ? from : min(*first, from);
	*end = empty ? to : max(*end, to);
}

/*
 * bitmap-core.c; the lock is held, unless something else is said
 */

/* Are @n bits set, from @first on?  No lock is needed. */
bool qcow2_bits_all(const u8 *bits, unsigned int first, unsigned int n);

/* Set them.  Likewise. */
void qcow2_bits_set(u8 *bits, unsigned int first, unsigned int n);

/* Where a block is on the metadata device, in bytes.  No lock is needed. */
u64 qcow2_bits_offset(struct qcow2_bitmaps *bm, const struct qcow2_bits *b);

/*
 * Open what may be open of a range, which is exact and durable in all bitmaps.  A
 * granule of theirs that is smaller than one of the gate's may be neither; and a view may
 * have to keep it yet.
 */
void qcow2_open_gate(struct qcow2_bitmaps *bm, sector_t sector, sector_t nr);

/* Close all of it, and give its memory back. */
void qcow2_empty_gate(struct qcow2_bitmaps *bm);

/*
 * As large as the image, the bitmaps and the view want it, all closed.  Returns 0, or -ENOMEM and
 * sets @error.  Process context, device suspended, without the lock.
 */
int qcow2_start_gate(struct qcow2_bitmaps *bm,
		     const struct qcow2_geometry *geo, char **error);

/* Get @bm->blocks ready.  0 or -ENOMEM. */
int qcow2_bits_pool_init(struct qcow2_bitmaps *bm);

/*
 * Row 1, if need be.  Sets @bits to the block, pinned: who has it lowers @users in the end.
 * 0 or a negative errno.  Process context, without the lock.
 */
int qcow2_load_bits(struct qcow2_bitmaps *bm, struct qcow2_record *rec,
		    u64 index, struct qcow2_bits **bits);

/* Blocks that nobody finds any more, by @lru.  Without the lock. */
void qcow2_free_blocks(struct qcow2_bitmaps *bm, struct list_head *gone);

/*
 * bitmap-mark.c
 */

/*
 * Most of those who waited lately do so again, or half of them, for there are two
 * rounds.  Any context.
 */
bool qcow2_crowd_is_back(struct qcow2_bitmaps *bm);

/* Have marks written of what is on @bm->todo.  Any context. */
static inline void qcow2_kick_markers(struct qcow2_bitmaps *bm)
{
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(bm->markers); i++)
		queue_work(bm->wq, &bm->markers[i].work);
}

/* A round of marks; work of each marker. */
void qcow2_marker_worker(struct work_struct *work);

/*
 * What who writes marks and who takes them back have in common.  Process context, without the lock.
 */

/*
 * Buffers for the blocks of @m.  There is memory for one block at least; others have to come later,
 * by @bm->todo if they are @marks.
 */
void qcow2_get_buffers(struct qcow2_bitmaps *bm, struct qcow2_marker *m,
		       bool marks);

/* Write what is in the buffers; each mark has its error then. */
void qcow2_write_marks(struct qcow2_bitmaps *bm, struct qcow2_marker *m);

/* 0, or a negative errno, and nothing is certain any more: the mode is fail. */
int qcow2_flush_marks(struct qcow2_bitmaps *bm);

/* Does what is on disk of a block have to be written again?  The lock is held. */
void qcow2_set_unsure(struct qcow2_bitmaps *bm, struct qcow2_bits *b,
		      bool unsure);

/*
 * bitmap-take.c
 */

/* Takes back what is not used, and comes again if it is; work of @bm->idle. */
void qcow2_idle_worker(struct work_struct *work);

#endif /* DM_QCOW2_BITMAP_INTERNAL_H */
