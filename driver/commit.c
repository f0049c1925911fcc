// SPDX-License-Identifier: GPL-2.0-only
/*
 * The commit.  Its order is explained in commit.h; qcow2_round() is the place
 * where it can be read.
 */
#include <linux/delay.h>
#include <linux/device-mapper.h>
#include <linux/list_sort.h>
#include <linux/slab.h>

#include "commit.h"
#include "compat.h"
#include "l2.h"
#include "trace.h"

#define DM_MSG_PREFIX "qcow2"

/* Entries that are kept in reserve: enough for a slice */
#define QCOW2_ENTRY_RESERVE	(2 * QCOW2_MAX_BLOCKS)

/*
 * What entries of a round use at most, more or less; bytes.  That is 1 TiB of the
 * guest at 64 KiB clusters.
 */
#define QCOW2_ENTRY_MEMORY	(8U << 20)

/* Contents of blocks that could not be written, see struct qcow2_kept */
#define QCOW2_MAX_KEPT		64

/* Commits that are tried at suspend, and the pause between them */
#define QCOW2_LAST_TRIES	3
#define QCOW2_LAST_PAUSE	250	/* ms */

/* A block that was taken */
struct qcow2_entry {
	struct list_head node;		/* c->entries */
	struct qcow2_slice *slice;
	unsigned int block;		/* of the slice */
	u64 offset;			/* on the metadata device */
	void *buf;			/* while it is in a wave */
	bool exact;			/* need not be read: slice->exact */
	struct qcow2_error error;

	/* The first entry of the same table, if that is not linked; or NULL */
	struct qcow2_entry *table;
	/* In that one: */
	struct list_head table_node;	/* c->tables */
	u64 cluster;			/* of the table */
	bool tried;			/* the link may be on disk already */
	struct qcow2_error held;	/* what has held back the link */
	int parts[2];			/* of c->parts, -1 = none */

	/* The states of its units when it was taken */
	unsigned long words[];
};

/*
 * What should have been written to a block of an L2 table or of refcounts, and
 * was not: a sector that a failed write has made unreadable can still be written.
 */
struct qcow2_kept {
	struct list_head node;		/* c->kept */
	u64 offset;
	__be64 buf[];
};

static unsigned long qcow2_entry_l1(struct qcow2_commit *c,
				    const struct qcow2_entry *e)
{
	return e->slice->index >> c->map->slices_per_l2_shift;
}

static size_t qcow2_entry_bytes(const struct qcow2_commit *c)
{
	return struct_size_t(struct qcow2_entry, words,
			     BIT(c->map->block_shift) / QCOW2_UNITS_PER_WORD);
}

/* Is an entry not to be written (any more)? */
static bool qcow2_entry_failed(const struct qcow2_entry *e)
{
	return qcow2_error_get(&e->error) ||
	       (e->table && qcow2_error_get(&e->table->held));
}

/* Is its table one whose link cannot be on disk? */
static bool qcow2_entry_new(const struct qcow2_entry *e)
{
	return e->table && !e->table->tried;
}

/*----------------------------------------------------------------
 * Taking entries
 *----------------------------------------------------------------
 */

static struct qcow2_entry *qcow2_entry_alloc(struct qcow2_commit *c, bool wait)
{
	struct qcow2_entry *e;

	e = mempool_alloc(&c->entry_pool,
			  wait ? GFP_NOIO : GFP_NOWAIT | __GFP_NOWARN);
	if (e) {
		e->error = (struct qcow2_error){};
		e->table = NULL;
		e->buf = NULL;
	}
	return e;
}

/* Blocks of a slice that can be taken; the bucket lock is held. */
static u32 qcow2_to_take(const struct qcow2_slice *slice)
{
	return slice->dirty & ~(slice->dirty >> QCOW2_MAX_BLOCKS) &
	       (BIT(QCOW2_MAX_BLOCKS) - 1);
}

/*
 * All dirty blocks of a slice have been taken.  What has become dirty again since
 * is for the next commit: nothing is to be twice in a round.  The bucket lock is held.
 */
static void qcow2_slice_taken(struct qcow2_map *map, struct qcow2_slice *slice)
{
	spin_lock(&map->lock);
	if (slice->dirty & (BIT(QCOW2_MAX_BLOCKS) - 1)) {
		list_move_tail(&slice->dirty_node, &map->dirty);
	} else {
		list_del_init(&slice->dirty_node);
		map->nr_dirty--;
	}
	spin_unlock(&map->lock);
}

/*
 * Take the dirty blocks of a slice.  Returns false if there is no memory for all
 * of them; of the first slice of a round there always is.
 */
static bool qcow2_take_slice(struct qcow2_commit *c, struct qcow2_slice *slice)
{
	struct qcow2_bucket *bucket = qcow2_bucket(c->map, slice->index);
	struct qcow2_map *map = c->map;
	bool more = true;

	while (more) {
		/* Waits for what the last round has given back, if at all. */
		struct qcow2_entry *e = qcow2_entry_alloc(c, list_empty(&c->entries));
		u32 blocks;

		if (!e)
			return false;
		spin_lock_irq(&bucket->lock);
		blocks = qcow2_to_take(slice);
		if (blocks) {
			e->slice = slice;
			e->block = __ffs(blocks);
			e->exact = slice->exact & BIT(e->block);
			qcow2_block_take(map, slice, e->block, e->words);
			list_add_tail(&e->node, &c->entries);
			c->nr_entries++;
			e = NULL;
		}
		more = qcow2_to_take(slice);
		if (!more)
			qcow2_slice_taken(map, slice);
		spin_unlock_irq(&bucket->lock);
		if (e)
			mempool_free(e, &c->entry_pool);
	}
	return true;
}

static int qcow2_entry_cmp(void *priv, const struct list_head *a,
			   const struct list_head *b)
{
	const struct qcow2_entry *x = list_entry(a, struct qcow2_entry, node);
	const struct qcow2_entry *y = list_entry(b, struct qcow2_entry, node);

	if (x->slice->index != y->slice->index)
		return x->slice->index > y->slice->index ? 1 : -1;
	return x->block > y->block ? 1 : -1;
}

static int qcow2_table_cmp(void *priv, const struct list_head *a,
			   const struct list_head *b)
{
	const struct qcow2_entry *x = list_entry(a, struct qcow2_entry, table_node);
	const struct qcow2_entry *y = list_entry(b, struct qcow2_entry, table_node);

	return x->cluster > y->cluster ? 1 : -1;
}

/* Take what is dirty, as far as memory goes. */
static void qcow2_take_entries(struct qcow2_commit *c)
{
	c->nr_entries = 0;
	while (!list_empty(&c->committing) &&
	       c->nr_entries * qcow2_entry_bytes(c) < QCOW2_ENTRY_MEMORY) {
		struct qcow2_slice *slice;

		slice = list_first_entry(&c->committing, struct qcow2_slice,
					 dirty_node);
		if (!qcow2_take_slice(c, slice))
			break;
	}
	list_sort(NULL, &c->entries, qcow2_entry_cmp);
}

/* Find the place of each block; tables that are not linked come on c->tables. */
static void qcow2_find_places(struct qcow2_commit *c)
{
	unsigned long sub_mask = BIT(c->map->slices_per_l2_shift) - 1;
	struct qcow2_entry *e, *first = NULL;
	bool copied;

	c->nr_tables = 0;
	list_for_each_entry(e, &c->entries, node) {
		unsigned long i = qcow2_entry_l1(c, e);

		if (qcow2_l1_table(c->l1, i, &e->offset, &copied)) {
			qcow2_error_note(&e->error, BLK_STS_IOERR);
			c->corrupt = true;
			continue;
		}
		if (!e->offset) {
			if (!first || qcow2_entry_l1(c, first) != i) {
				first = e;
				e->cluster = qcow2_alloc_reserved(c->alloc, i,
								  &e->tried);
				e->held = (struct qcow2_error){};
				/* Nothing gets dirty that has no place. */
				if (WARN_ON_ONCE(!e->cluster))
					qcow2_error_note(&e->held, BLK_STS_IOERR);
				list_add_tail(&e->table_node, &c->tables);
				c->nr_tables++;
			}
			e->table = first;
			e->offset = first->cluster << c->map->geo.cluster_bits;
		}
		e->offset += (u64)(e->slice->index & sub_mask) * c->map->slice_bytes +
			     e->block * c->map->block_bytes;
		cond_resched();
	}
	list_sort(NULL, &c->tables, qcow2_table_cmp);
}

/* Of what has happened to the metadata, a guest need know only one thing. */
static void qcow2_commit_error(struct qcow2_commit *c,
			       const struct qcow2_error *error)
{
	blk_status_t status = qcow2_error_get(error);

	if (status && status != BLK_STS_NOSPC)
		status = BLK_STS_IOERR;
	qcow2_error_note(&c->error, status);
}

/* Everything has been tried: what has failed is dirty again. */
static void qcow2_release_entries(struct qcow2_commit *c)
{
	struct qcow2_entry *e, *next;

	list_for_each_entry(e, &c->entries, node) {
		struct qcow2_bucket *bucket = qcow2_bucket(c->map, e->slice->index);
		bool failed = qcow2_entry_failed(e);

		if (failed) {
			qcow2_commit_error(c, &e->error);
			if (e->table)
				qcow2_commit_error(c, &e->table->held);
		}
		spin_lock_irq(&bucket->lock);
		qcow2_block_done(c->map, e->slice, e->block, failed);
		spin_unlock_irq(&bucket->lock);
		cond_resched();
	}
	list_for_each_entry_safe(e, next, &c->entries, node) {
		mempool_free(e, &c->entry_pool);
		cond_resched();
	}
	INIT_LIST_HEAD(&c->entries);
	INIT_LIST_HEAD(&c->tables);
}

/*----------------------------------------------------------------
 * Waves: as many blocks as there is memory for are read or written together
 *----------------------------------------------------------------
 */

static struct qcow2_kept *qcow2_find_kept(struct qcow2_commit *c, u64 offset)
{
	struct qcow2_kept *k;

	list_for_each_entry(k, &c->kept, node)
		if (k->offset == offset)
			return k;
	return NULL;
}

static void qcow2_drop_kept(struct qcow2_commit *c, struct qcow2_kept *k)
{
	list_del(&k->node);
	kfree(k);
	c->nr_kept--;
}

/*
 * A block that had been there before was tried to be written.  Keep what it should
 * be if that has failed.  Returns true if it was kept before, so that all of this
 * is nothing new.
 */
static bool qcow2_keep(struct qcow2_commit *c, u64 offset, const void *buf,
		       bool failed)
{
	struct qcow2_kept *k = qcow2_find_kept(c, offset);
	bool before = k;

	if (!failed) {
		if (k)
			qcow2_drop_kept(c, k);
		return before;
	}
	if (!k && c->nr_kept < QCOW2_MAX_KEPT) {
		k = kmalloc(struct_size(k, buf, c->io->block_bytes / 8),
			    GFP_NOWAIT | __GFP_NOWARN);
		if (k) {
			k->offset = offset;
			list_add(&k->node, &c->kept);
			c->nr_kept++;
		}
	}
	if (k)
		memcpy(k->buf, buf, c->io->block_bytes);
	return before;
}

/* Start to read a block, if it has to be read. */
static void qcow2_read_block(struct qcow2_commit *c, struct qcow2_ios *ios,
			     struct qcow2_error *error, u64 offset, void *buf)
{
	struct qcow2_kept *k = qcow2_find_kept(c, offset);

	if (k)
		memcpy(buf, k->buf, c->io->block_bytes);
	else
		qcow2_mdio_start(c->io, ios, error, REQ_OP_READ, offset, buf,
				 c->io->block_bytes);
}

/*
 * Fill the wave with entries from @e on, of new tables or of others, that have not
 * failed.  Returns where to go on.
 */
static struct qcow2_entry *qcow2_fill_wave(struct qcow2_commit *c,
					   struct qcow2_entry *e, bool new)
{
	c->nr_wave = 0;
	list_for_each_entry_from(e, &c->entries, node) {
		if (qcow2_entry_new(e) != new || qcow2_entry_failed(e))
			continue;
		if (c->nr_wave == QCOW2_WAVE)
			break;
		e->buf = qcow2_mdio_get_block(c->io, !c->nr_wave);
		if (!e->buf)
			break;
		c->wave[c->nr_wave++] = e;
	}
	return e;
}

/* Start to read the blocks of a wave. */
static void qcow2_read_wave(struct qcow2_commit *c, struct qcow2_ios *ios)
{
	struct blk_plug plug;
	unsigned int i;

	qcow2_ios_init(ios);
	blk_start_plug(&plug);
	for (i = 0; i < c->nr_wave; i++) {
		struct qcow2_entry *e = c->wave[i];

		if (!e->exact)
			qcow2_read_block(c, ios, &e->error, e->offset, e->buf);
	}
	blk_finish_plug(&plug);
}

/*
 * Bring the blocks of a wave up to date, and write them.  Returns true if a flush is
 * needed, because a write was tried: one that has failed may be on the disk, too.
 */
static bool qcow2_write_wave(struct qcow2_commit *c, bool new)
{
	struct qcow2_map *map = c->map;
	struct blk_plug plug;
	struct qcow2_ios ios;
	bool tried = false;
	unsigned int i;

	qcow2_ios_init(&ios);
	blk_start_plug(&plug);
	for (i = 0; i < c->nr_wave; i++) {
		struct qcow2_entry *e = c->wave[i];

		if (new || e->exact)
			memset(e->buf, 0, map->block_bytes);
		else if (qcow2_entry_failed(e))
			goto cannot_read;
		if (qcow2_l2_encode_block(map, c->io->name, e->slice->index,
					  e->block, e->words, e->buf)) {
			qcow2_error_note(&e->error, BLK_STS_IOERR);
			if (new)
				qcow2_error_note(&e->table->held, BLK_STS_IOERR);
			c->corrupt = true;
			goto free;
		}
		qcow2_mdio_start(c->io, &ios, &e->error, REQ_OP_WRITE, e->offset,
				 e->buf, map->block_bytes);
		continue;
cannot_read:
		DMERR_LIMIT("%s: cannot read the L2 table at %#llx",
			    c->io->name, (unsigned long long)e->offset);
free:
		qcow2_mdio_put_block(c->io, e->buf);
		c->wave[i] = NULL;
	}
	blk_finish_plug(&plug);
	qcow2_ios_wait(&ios);

	for (i = 0; i < c->nr_wave; i++) {
		struct qcow2_entry *e = c->wave[i];
		bool failed, before = false;

		if (!e)
			continue;
		failed = qcow2_error_get(&e->error);
		/* Nothing may be linked that is not initialised. */
		if (new)
			qcow2_error_note(&e->table->held,
					 qcow2_error_get(&e->error));
		else
			before = qcow2_keep(c, e->offset, e->buf, failed);
		/* What was tried before had its flush. */
		if (!failed || !before)
			tried = true;
		if (failed)
			DMERR_LIMIT("%s: cannot write the L2 table at %#llx",
				    c->io->name, (unsigned long long)e->offset);
		qcow2_mdio_put_block(c->io, e->buf);
	}
	return tried;
}

/*----------------------------------------------------------------
 * Stage "tables"
 *----------------------------------------------------------------
 */

/* The part of c->parts for the refcount of a cluster, -1 if there is no room */
static int qcow2_get_part(struct qcow2_commit *c, u64 cluster)
{
	unsigned int i;
	u64 offset = qcow2_alloc_refcount(c->alloc, cluster, &i);
	struct qcow2_refpart *p;

	for (i = 0; i < c->nr_parts; i++)
		if (c->parts[i].offset == offset)
			return i;
	if (c->nr_parts == QCOW2_REFPARTS)
		return -1;
	p = c->parts + c->nr_parts;
	/* A table needs up to two. */
	p->buf = qcow2_mdio_get_block(c->io, c->nr_parts < 2);
	if (!p->buf)
		return -1;
	p->offset = offset;
	p->error = (struct qcow2_error){};
	return c->nr_parts++;
}

/*
 * The parts that a table needs: that of its own refcount, and that of the
 * refcount block if it is new.  False if there is no room for both.
 */
static bool qcow2_get_parts(struct qcow2_commit *c, struct qcow2_entry *t)
{
	unsigned int shift = qcow2_alloc_region_shift(c->alloc);
	unsigned long region = t->cluster >> shift;

	t->parts[1] = -1;
	t->parts[0] = qcow2_get_part(c, t->cluster);
	if (t->parts[0] >= 0 && region != c->counted &&
	    qcow2_alloc_fresh(c->alloc, region)) {
		t->parts[1] = qcow2_get_part(c, (u64)region << shift);
		if (t->parts[1] < 0)
			return false;
	}
	return t->parts[0] >= 0;
}

static void qcow2_count_one(struct qcow2_commit *c, u64 cluster, int part)
{
	unsigned int i;

	qcow2_alloc_refcount(c->alloc, cluster, &i);
	qcow2_refcount_set(c->parts[part].buf, i, c->alloc->geo.refcount_order, 1);
}

static void qcow2_read_parts(struct qcow2_commit *c)
{
	struct qcow2_ios ios;
	unsigned int i;

	qcow2_ios_init(&ios);
	for (i = 0; i < c->nr_parts; i++)
		qcow2_read_block(c, &ios, &c->parts[i].error, c->parts[i].offset,
				 c->parts[i].buf);
	qcow2_ios_wait(&ios);
	for (i = 0; i < c->nr_parts; i++)
		c->parts[i].unread = qcow2_error_get(&c->parts[i].error);
}

/* Returns true if a flush is needed, as qcow2_write_wave(). */
static bool qcow2_write_parts(struct qcow2_commit *c)
{
	struct qcow2_ios ios;
	bool tried = false;
	unsigned int i;

	qcow2_ios_init(&ios);
	for (i = 0; i < c->nr_parts; i++) {
		struct qcow2_refpart *p = c->parts + i;

		if (!p->unread)
			qcow2_mdio_start(c->io, &ios, &p->error, REQ_OP_WRITE,
					 p->offset, p->buf, c->io->block_bytes);
	}
	qcow2_ios_wait(&ios);
	for (i = 0; i < c->nr_parts; i++) {
		struct qcow2_refpart *p = c->parts + i;
		bool failed = qcow2_error_get(&p->error);

		if (!p->unread &&
		    (!qcow2_keep(c, p->offset, p->buf, failed) || !failed))
			tried = true;
		if (failed)
			DMERR_LIMIT("%s: cannot update the refcounts at %#llx",
				    c->io->name, (unsigned long long)p->offset);
	}
	return tried;
}

/*
 * Write the refcounts of tables from @t on, up to the end or as many as fit.
 * Returns where to go on.
 */
static struct qcow2_entry *qcow2_refcounts(struct qcow2_commit *c,
					   struct qcow2_entry *t, bool *tried)
{
	unsigned int shift = qcow2_alloc_region_shift(c->alloc), i;
	struct qcow2_entry *end = t, *next;

	c->nr_parts = 0;
	list_for_each_entry_from(end, &c->tables, table_node)
		if (!end->tried && !qcow2_get_parts(c, end))
			break;
	next = end;

	qcow2_read_parts(c);
	for (end = t; end != next; end = list_next_entry(end, table_node)) {
		if (end->tried)
			continue;
		qcow2_count_one(c, end->cluster, end->parts[0]);
		if (end->parts[1] >= 0)
			qcow2_count_one(c, end->cluster >> shift << shift,
					end->parts[1]);
	}
	if (qcow2_write_parts(c))
		*tried = true;
	for (end = t; end != next; end = list_next_entry(end, table_node)) {
		for (i = 0; !end->tried && i < 2; i++) {
			struct qcow2_refpart *p = c->parts + end->parts[i];

			if (end->parts[i] < 0)
				continue;
			qcow2_error_note(&end->held, qcow2_error_get(&p->error));
			/* The block's own count: once is enough. */
			if (i && !qcow2_error_get(&p->error))
				c->counted = end->cluster >> shift;
		}
	}
	for (i = 0; i < c->nr_parts; i++)
		qcow2_mdio_put_block(c->io, c->parts[i].buf);
	return next;
}

/* 0, or the error of the flush */
static int qcow2_stage_tables(struct qcow2_commit *c)
{
	struct qcow2_entry *e;
	bool tried = false;

	c->counted = ULONG_MAX;
	e = list_first_entry(&c->tables, struct qcow2_entry, table_node);
	while (!list_entry_is_head(e, &c->tables, table_node))
		e = qcow2_refcounts(c, e, &tried);
	e = list_first_entry(&c->entries, struct qcow2_entry, node);
	for (;;) {
		e = qcow2_fill_wave(c, e, true);
		if (!c->nr_wave)
			break;
		if (qcow2_write_wave(c, true))
			tried = true;
	}
	return tried ? qcow2_mdio_flush(c->io) : 0;
}

/*----------------------------------------------------------------
 * Stage "reftable"
 *----------------------------------------------------------------
 */

/* 0, or the error of the flush */
static int qcow2_stage_reftable(struct qcow2_commit *c)
{
	unsigned int shift = qcow2_alloc_region_shift(c->alloc);
	struct qcow2_alloc *a = c->alloc;
	bool tried = false;
	struct qcow2_entry *t, *from, *to;
	unsigned int per_block = c->io->block_bytes / 8;
	__be64 *buf = NULL;
	int r = 0;

	/* By cluster, so those of a block of the table follow each other. */
	for (from = list_first_entry(&c->tables, struct qcow2_entry, table_node);
	     !list_entry_is_head(from, &c->tables, table_node); from = to) {
		unsigned long block = (from->cluster >> shift) / per_block;
		bool any = false;

		if (!buf)
			buf = qcow2_mdio_get_block(c->io, true);
		qcow2_alloc_copy_reftable(a, block, buf);
		to = from;
		list_for_each_entry_from(to, &c->tables, table_node) {
			unsigned long region = to->cluster >> shift;

			if (region / per_block != block)
				break;
			if (to->tried || qcow2_error_get(&to->held) ||
			    !qcow2_alloc_fresh(a, region))
				continue;
			qcow2_alloc_add_region(a, region, buf);
			any = true;
		}
		if (!any)
			continue;
		r = qcow2_mdio_rw(c->io, REQ_OP_WRITE, a->geo.reftable_offset +
				  (u64)block * c->io->block_bytes, buf,
				  c->io->block_bytes);
		if (r)
			DMERR_LIMIT("%s: cannot write the refcount table: %d",
				    c->io->name, r);
		tried = true;
		for (t = from; r && t != to; t = list_next_entry(t, table_node))
			if (qcow2_alloc_fresh(a, t->cluster >> shift))
				qcow2_error_note(&t->held, errno_to_blk_status(r));
	}
	if (buf)
		qcow2_mdio_put_block(c->io, buf);
	if (!tried)
		return 0;
	r = qcow2_mdio_flush(c->io);
	if (r)
		return r;
	list_for_each_entry(t, &c->tables, table_node)
		if (!t->tried && !qcow2_error_get(&t->held))
			qcow2_alloc_region_done(a, t->cluster >> shift);
	return 0;
}

/*----------------------------------------------------------------
 * Stage "links"
 *----------------------------------------------------------------
 */

/* May a table be linked? */
static bool qcow2_linkable(const struct qcow2_entry *e)
{
	return e->table == e && !qcow2_error_get(&e->held);
}

/* Write one block of the L1 table: the links of the tables from @from to @to. */
static void qcow2_write_l1(struct qcow2_commit *c, unsigned long block,
			   struct qcow2_entry *from, struct qcow2_entry *to,
			   __be64 *buf)
{
	unsigned int bits = c->map->geo.cluster_bits;
	unsigned int per_block = qcow2_l1_per_block(c->l1);
	struct qcow2_entry *e;
	int r;

	qcow2_l1_copy_block(c->l1, block, buf);
	for (e = from; e != to; e = list_next_entry(e, node)) {
		unsigned long i = qcow2_entry_l1(c, e);

		if (!qcow2_linkable(e))
			continue;
		buf[i % per_block] = qcow2_l1_link(e->cluster << bits);
		qcow2_alloc_link_tried(c->alloc, i);
	}
	r = qcow2_mdio_rw(c->io, REQ_OP_WRITE, c->map->geo.l1_offset +
			  (u64)block * c->io->block_bytes, buf,
			  c->io->block_bytes);
	if (r)
		DMERR_LIMIT("%s: cannot write the L1 table: %d", c->io->name, r);
	for (e = from; e != to; e = list_next_entry(e, node))
		if (r && qcow2_linkable(e))
			qcow2_error_note(&e->held, errno_to_blk_status(r));
}

static bool qcow2_write_links(struct qcow2_commit *c)
{
	unsigned int per_block = qcow2_l1_per_block(c->l1);
	struct qcow2_entry *from, *to;
	bool tried = false;
	__be64 *buf = NULL;

	for (from = list_first_entry(&c->entries, struct qcow2_entry, node);
	     !list_entry_is_head(from, &c->entries, node); from = to) {
		unsigned long block = qcow2_entry_l1(c, from) / per_block;
		bool any = false;

		to = from;
		list_for_each_entry_from(to, &c->entries, node) {
			if (qcow2_entry_l1(c, to) / per_block != block)
				break;
			any = any || qcow2_linkable(to);
		}
		if (!any)
			continue;
		if (!buf)
			buf = qcow2_mdio_get_block(c->io, true);
		qcow2_write_l1(c, block, from, to, buf);
		tried = true;
	}
	if (buf)
		qcow2_mdio_put_block(c->io, buf);
	return tried;
}

/*
 * @e: where to go on after the wave that is there, whose blocks have been read
 * 0, or the error of the flush
 */
static int qcow2_stage_links(struct qcow2_commit *c, struct qcow2_entry *e)
{
	bool tried = false;
	struct qcow2_ios ios;
	int r = 0;

	for (;;) {
		if (c->nr_wave && qcow2_write_wave(c, false))
			tried = true;
		e = qcow2_fill_wave(c, e, false);
		if (!c->nr_wave)
			break;
		qcow2_read_wave(c, &ios);
		qcow2_ios_wait(&ios);
	}
	if (qcow2_write_links(c))
		tried = true;
	if (tried)
		r = qcow2_mdio_flush(c->io);
	if (r)
		return r;
	list_for_each_entry(e, &c->tables, table_node) {
		unsigned long i = qcow2_entry_l1(c, e);

		if (!qcow2_linkable(e))
			continue;
		qcow2_l1_set(c->l1, i, e->cluster << c->map->geo.cluster_bits);
		qcow2_alloc_linked(c->alloc, i);
	}
	return 0;
}

/*----------------------------------------------------------------
 * A commit
 *----------------------------------------------------------------
 */

static int qcow2_flush_data(struct qcow2_commit *c)
{
	int r = blkdev_issue_flush(c->data_bdev);

	/*
	 * What the device has lost of the data it may not report a second
	 * time.  Some other flush may have been told, before or while this one
	 * was waiting for it.
	 */
	if (!r && READ_ONCE(c->lost))
		r = -EIO;
	if (r)
		DMERR("%s: cannot flush the data device: %d", c->io->name, r);
	return r;
}

/*
 * One round: everything that was taken, from the first stage to the last.  The
 * result is that of the flushes; what else has failed is noted in the entries.
 */
static int qcow2_round(struct qcow2_commit *c)
{
	struct qcow2_entry *next;
	struct qcow2_ios ios;
	int r;

	/*
	 * Reading can go on while the data device is flushed.  Not if the
	 * buffers are needed for something else first.
	 */
	next = list_first_entry(&c->entries, struct qcow2_entry, node);
	c->nr_wave = 0;
	if (list_empty(&c->tables))
		next = qcow2_fill_wave(c, next, false);
	qcow2_read_wave(c, &ios);
	r = qcow2_flush_data(c);
	qcow2_ios_wait(&ios);
	if (r) {
		while (c->nr_wave)
			qcow2_mdio_put_block(c->io, c->wave[--c->nr_wave]->buf);
		return r;
	}
	if (list_empty(&c->entries))
		return 0;
	if (!list_empty(&c->tables)) {
		r = qcow2_stage_tables(c);
		if (!r)
			r = qcow2_stage_reftable(c);
		if (r)
			goto no_flush;
		c->nr_wave = 0;
	}
	r = qcow2_stage_links(c, next);
	if (!r)
		return 0;
no_flush:
	DMERR("%s: cannot flush the metadata device: %d", c->io->name, r);
	return r;
}

/* Bring all changes made so far to stable storage; 0 or a negative errno. */
static int qcow2_commit(struct qcow2_commit *c)
{
	struct qcow2_map *map = c->map;
	unsigned long changed, before = map->unwritten, blocks = 0, tables = 0;
	struct qcow2_entry *e;
	int r = 0, error;

	if (qcow2_mode(c->health) == QCOW2_FAIL)
		return -EIO;
	/*
	 * Slices that get dirty from here on wait for the next commit, so that
	 * this one comes to an end.
	 */
	spin_lock_irq(&map->lock);
	changed = map->changed;
	list_splice_tail_init(&map->dirty, &c->committing);
	spin_unlock_irq(&map->lock);

	trace_qcow2_commit_begin(c->io->name, READ_ONCE(map->nr_dirty));
	c->error = (struct qcow2_error){};
	c->corrupt = false;
	do {
		qcow2_take_entries(c);
		qcow2_find_places(c);
		blocks += c->nr_entries;
		tables += c->nr_tables;
		r = qcow2_round(c);
		if (r)
			list_for_each_entry(e, &c->entries, node)
				qcow2_error_note(&e->error, BLK_STS_IOERR);
		qcow2_release_entries(c);
	} while (!r && !list_empty(&c->committing));

	error = blk_status_to_errno(qcow2_error_get(&c->error));
	trace_qcow2_commit_end(c->io->name, blocks, tables, map->unwritten,
			       r ?: error);
	if (r) {
		spin_lock_irq(&map->lock);
		list_splice_tail_init(&c->committing, &map->dirty);
		spin_unlock_irq(&map->lock);
		qcow2_mode_fail(c->health);
		return r;
	}
	if (c->corrupt)
		qcow2_mode_corrupt(c->health);
	if (!error || error == -ENOSPC)
		qcow2_mode_space(c->health, error == -ENOSPC);
	if (!error) {
		WRITE_ONCE(map->durable, changed);
		WRITE_ONCE(c->commits, c->commits + 1);
		return 0;
	}
	DMERR_LIMIT("%s: %lu blocks of metadata could not be written, they are tried again: %d",
		    c->io->name, map->unwritten, error);
	if (!before)
		qcow2_mode_event(c->health);
	return error;
}

/* Commit, and see to what follows from it. */
static int qcow2_do_commit(struct qcow2_commit *c)
{
	int r = qcow2_commit(c);

	if (qcow2_mode(c->health) != QCOW2_FAIL) {
		if (c->then_wq)
			queue_work(c->then_wq, c->then);
		if (r)
			qcow2_commit_arm(c);
	}
	/* Let those go on who wait for room, whatever came of it. */
	WRITE_ONCE(c->tries, c->tries + 1);
	wake_up_all(&c->tried);
	return r;
}

static void qcow2_commit_worker(struct work_struct *work)
{
	struct qcow2_commit *c = container_of(work, struct qcow2_commit, worker);
	struct qcow2_waiter *w, *next;
	blk_status_t status;
	LIST_HEAD(waiters);

	/*
	 * Waiters first, the dirty set later (in the commit): so all that they
	 * wait for is in that set.
	 */
	spin_lock_irq(&c->lock);
	list_splice_init(&c->waiters, &waiters);
	spin_unlock_irq(&c->lock);
	if (list_empty(&waiters))
		return;

	status = errno_to_blk_status(qcow2_do_commit(c));
	list_for_each_entry_safe(w, next, &waiters, node) {
		/* Nothing is durable in mode fail; else it is each its own. */
		bool own = status && w->nr &&
			   qcow2_mode(c->health) != QCOW2_FAIL &&
			   !qcow2_range_failed(c->map, w->sector, w->nr);

		c->done(w, own ? BLK_STS_OK : status);
	}
}

static void qcow2_commit_waker(struct work_struct *work)
{
	struct qcow2_commit *c = container_of(to_delayed_work(work),
					      struct qcow2_commit, waker);

	if (!qcow2_map_clean(c->map)) {
		qcow2_do_commit(c);
		return;
	}
	/* Who asked for it may have seen an older state of affairs. */
	WRITE_ONCE(c->tries, c->tries + 1);
	wake_up_all(&c->tried);
}

void qcow2_commit_wait(struct qcow2_commit *c, struct qcow2_waiter *w)
{
	unsigned long flags;

	spin_lock_irqsave(&c->lock, flags);
	list_add_tail(&w->node, &c->waiters);
	/*
	 * Under the lock: as soon as the worker, running for someone else,
	 * takes the list, the waiter may end, and the target with it.
	 */
	queue_work(c->wq, &c->worker);
	spin_unlock_irqrestore(&c->lock, flags);
}

void qcow2_commit_arm(struct qcow2_commit *c)
{
	queue_delayed_work(c->wq, &c->waker, QCOW2_COMMIT_PERIOD);
}

void qcow2_commit_now(struct qcow2_commit *c)
{
	unsigned long tries = READ_ONCE(c->tries);

	if (qcow2_mode(c->health) == QCOW2_FAIL || qcow2_map_clean(c->map))
		return;
	/* What fails is tried by the timer, and not for each slice that is needed. */
	if (READ_ONCE(c->map->unwritten))
		return;
	mod_delayed_work(c->wq, &c->waker, 0);
	wait_event(c->tried, READ_ONCE(c->tries) != tries);
}

void qcow2_commit_suspend(struct qcow2_commit *c)
{
	unsigned int tries;

	cancel_delayed_work_sync(&c->waker);
	flush_workqueue(c->wq);
	/*
	 * The last commits are the worker's, too: of two at the same time each
	 * would take what is the other's.
	 */
	for (tries = 0; tries < QCOW2_LAST_TRIES; tries++) {
		if (qcow2_map_clean(c->map) ||
		    qcow2_mode(c->health) == QCOW2_FAIL)
			break;
		if (tries)
			msleep(QCOW2_LAST_PAUSE);
		mod_delayed_work(c->wq, &c->waker, 0);
		flush_delayed_work(&c->waker);
	}
	/* What has failed has set the timer. */
	qcow2_commit_stop(c);
}

void qcow2_commit_stop(struct qcow2_commit *c)
{
	if (c->wq) {
		cancel_delayed_work_sync(&c->waker);
		flush_workqueue(c->wq);
	}
}

void qcow2_commit_reset(struct qcow2_commit *c)
{
	struct qcow2_kept *k, *next;

	WRITE_ONCE(c->lost, false);
	list_for_each_entry_safe(k, next, &c->kept, node)
		qcow2_drop_kept(c, k);
}

int qcow2_commit_init(struct qcow2_commit *c)
{
	INIT_WORK(&c->worker, qcow2_commit_worker);
	INIT_DELAYED_WORK(&c->waker, qcow2_commit_waker);
	spin_lock_init(&c->lock);
	INIT_LIST_HEAD(&c->waiters);
	init_waitqueue_head(&c->tried);
	INIT_LIST_HEAD(&c->committing);
	INIT_LIST_HEAD(&c->entries);
	INIT_LIST_HEAD(&c->tables);
	INIT_LIST_HEAD(&c->kept);
	c->wq = alloc_ordered_workqueue("dm-qcow2-commit", WQ_MEM_RECLAIM);
	if (!c->wq)
		return -ENOMEM;
	return mempool_init_kmalloc_pool(&c->entry_pool, QCOW2_ENTRY_RESERVE,
					 qcow2_entry_bytes(c));
}

void qcow2_commit_exit(struct qcow2_commit *c)
{
	if (c->wq) {
		destroy_workqueue(c->wq);
		qcow2_commit_reset(c);
	}
	mempool_exit(&c->entry_pool);
}
