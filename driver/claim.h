/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Who uses a metadata device: one live writer, or any number of live readers.
 */
#ifndef DM_QCOW2_CLAIM_H
#define DM_QCOW2_CLAIM_H

#include <linux/list.h>
#include <linux/types.h>

/* Protected by a mutex of claim.c's, which keeps them all on a list. */
struct qcow2_claim {
	struct list_head node;		/* empty: nothing is claimed */
	dev_t dev;
	bool writer;
	bool waiting;			/* has metadata that waits to be written */
	bool parked;			/* is in nobody's way */
	bool stale;			/* parked, and somebody else has written */
};

static inline void qcow2_claim_init(struct qcow2_claim *claim)
{
	INIT_LIST_HEAD(&claim->node);
}

/*
 * Claim a metadata device for a table that is about to be live.  Does no harm if
 * the claim is there already.  Returns 0; -EBUSY if another table's is in the way;
 * -ESTALE if it was parked, and another table has been live as a writer since.
 * Process context.
 */
int qcow2_claim_take(struct qcow2_claim *claim, dev_t dev, bool writer);

/* The table is suspended, and keeps the claim only for what it has yet to write. */
void qcow2_claim_wait(struct qcow2_claim *claim);

/* The table is suspended, and knows more than is on disk, but cannot write it. */
void qcow2_claim_park(struct qcow2_claim *claim);

/* Any claim is over.  Process context. */
void qcow2_claim_drop(struct qcow2_claim *claim);

/*
 * Is there a table with metadata that waits to be written to a device?  To load
 * another table in its place would lose that.  Process context.
 */
bool qcow2_claim_waits(dev_t dev);

#endif /* DM_QCOW2_CLAIM_H */
