// SPDX-License-Identifier: GPL-2.0-only
/*
 * Memory for what is read from one device and written to another one.
 */
#include "pages.h"

/* Pages that are got at once, if there are such: those that CPUs keep lists of */
#define QCOW2_PAGES_ORDER	PAGE_ALLOC_COSTLY_ORDER

void qcow2_pages_put(struct qcow2_pages *p, mempool_t *pool)
{
	while (p->nr) {
		struct page *page = p->pages[--p->nr];

		if (p->order)
			__free_pages(page, p->order);
		else
			mempool_free(page, pool);
	}
}

void qcow2_pages_add(const struct qcow2_pages *p, struct bio *bio,
		     unsigned int from, unsigned int to)
{
	unsigned int shift = PAGE_SHIFT + p->order;

	while (from < to) {
		unsigned int off = from & ((1U << shift) - 1);
		unsigned int n = min(to - from, (1U << shift) - off);

		__bio_add_page(bio, p->pages[from >> shift], n, off);
		from += n;
	}
}

unsigned int qcow2_pages_get(struct qcow2_pages *p, mempool_t *pool,
			     unsigned int len, gfp_t gfp)
{
	const gfp_t nowait = GFP_NOWAIT | __GFP_NOWARN;
	unsigned int size, got;
	struct page *page;

	p->order = min_t(unsigned int, get_order(len), QCOW2_PAGES_ORDER);
	for (;;) {
		size = PAGE_SIZE << p->order;
		p->nr = 0;
		for (got = 0; got < len; got += size) {
			/* Whoever waits for one has none that others wait for. */
			if (p->order || got)
				page = alloc_pages(nowait, p->order);
			else
				page = mempool_alloc(pool, gfp);
			if (!page)
				break;
			p->pages[p->nr++] = page;
		}
		if (got >= len || !p->order)
			return min(got, len);
		qcow2_pages_put(p, pool);
		p->order = 0;
	}
}
