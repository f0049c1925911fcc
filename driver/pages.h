/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Memory for what is read from one device and written to another one.
 */
#ifndef DM_QCOW2_PAGES_H
#define DM_QCOW2_PAGES_H

#include <linux/bio.h>
#include <linux/mempool.h>

/* What is copied at a time, if there is memory for it */
#define QCOW2_PAGES_MOST	16

/* Owned by whoever copies. */
struct qcow2_pages {
	/* Each is the first of 1 << @order; single ones may be of the reserve. */
	unsigned int order;
	unsigned int nr;
	struct page *pages[QCOW2_PAGES_MOST];
};

/**
 * qcow2_pages_get() - get memory
 * @p: is set up
 * @pool: of pages; the reserve, of which one is taken
 * @len: bytes, at most QCOW2_PAGES_MOST pages
 * @gfp: for the first one: GFP_NOIO, or a kind that does not wait
 *
 * Returns for how many bytes there is memory: with GFP_NOIO at least a page, or @len.
 * Any context that @gfp allows.
 */
unsigned int qcow2_pages_get(struct qcow2_pages *p, mempool_t *pool,
			     unsigned int len, gfp_t gfp);

/* Give it back.  Any context. */
void qcow2_pages_put(struct qcow2_pages *p, mempool_t *pool);

/* Add the bytes from @from up to @to to a bio that has room for QCOW2_PAGES_MOST more. */
void qcow2_pages_add(const struct qcow2_pages *p, struct bio *bio,
		     unsigned int from, unsigned int to);

#endif /* DM_QCOW2_PAGES_H */
