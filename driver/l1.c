// SPDX-License-Identifier: GPL-2.0-only
/*
 * The L1 table in core.
 */
#include <linux/device-mapper.h>
#include <linux/mm.h>
#include <linux/slab.h>

#include "compat.h"
#include "l1.h"

#define DM_MSG_PREFIX "qcow2"

int qcow2_l1_init(struct qcow2_l1 *l1, struct qcow2_mdio *io,
		  const struct qcow2_geometry *geo)
{
	l1->io = io;
	l1->geo = *geo;
	l1->needed = qcow2_l1_entries_needed(geo);
	spin_lock_init(&l1->lock);
	l1->entries = kvzalloc(round_up((size_t)l1->needed * 8, io->block_bytes),
			       GFP_KERNEL);
	return l1->entries ? 0 : -ENOMEM;
}

void qcow2_l1_exit(struct qcow2_l1 *l1)
{
	kvfree(l1->entries);
}

int qcow2_l1_read(struct qcow2_l1 *l1)
{
	const struct qcow2_geometry *geo = &l1->geo;
	/* whole blocks; the constructor has made sure of them for a writer */
	size_t len = min_t(u64, round_up((size_t)l1->needed * 8,
					 l1->io->block_bytes),
			   l1->io->size - geo->l1_offset);
	unsigned long i;
	int r;

	r = qcow2_mdio_rw(l1->io, REQ_OP_READ, geo->l1_offset, l1->entries, len);
	if (r) {
		DMERR("%s: cannot read the L1 table: %d", l1->io->name, r);
		return r;
	}
	l1->used = 0;
	for (i = 0; i < l1->needed; i++)
		if (l1->entries[i])
			l1->used++;
	return 0;
}

u64 qcow2_l1_entry(struct qcow2_l1 *l1, unsigned long i)
{
	unsigned long flags;
	u64 entry;

	spin_lock_irqsave(&l1->lock, flags);
	entry = be64_to_cpu(l1->entries[i]);
	spin_unlock_irqrestore(&l1->lock, flags);
	return entry;
}

int qcow2_l1_bad(struct qcow2_l1 *l1, unsigned long i, u64 entry,
		 enum qcow2_fault fault)
{
	DMERR_LIMIT("%s: L1 entry %lu is corrupt (%#llx): %s", l1->io->name, i,
		    (unsigned long long)entry, qcow2_fault_str(fault));
	return -EUCLEAN;
}

int qcow2_l1_table(struct qcow2_l1 *l1, unsigned long i, u64 *offset,
		   bool *copied)
{
	u64 entry = qcow2_l1_entry(l1, i);
	enum qcow2_fault fault;

	fault = qcow2_l1_check(entry, l1->geo.cluster_bits, l1->io->size);
	*offset = entry & QCOW2_OFFSET_MASK;
	*copied = entry & QCOW2_OFLAG_COPIED;
	if (!fault && *offset && qcow2_in_fixed_area(&l1->geo, *offset))
		fault = QCOW2_FAULT_ENTRY_OVERLAP;
	return fault ? qcow2_l1_bad(l1, i, entry, fault) : 0;
}

void qcow2_l1_spoil(struct qcow2_l1 *l1, unsigned long i)
{
	spin_lock_irq(&l1->lock);
	l1->entries[i] = cpu_to_be64(QCOW2_L1_RESERVED);
	spin_unlock_irq(&l1->lock);
}

void qcow2_l1_copy_block(struct qcow2_l1 *l1, unsigned long block, __be64 *buf)
{
	spin_lock_irq(&l1->lock);
	memcpy(buf, l1->entries + block * qcow2_l1_per_block(l1),
	       l1->io->block_bytes);
	spin_unlock_irq(&l1->lock);
}

void qcow2_l1_set(struct qcow2_l1 *l1, unsigned long i, u64 offset)
{
	spin_lock_irq(&l1->lock);
	l1->entries[i] = qcow2_l1_link(offset);
	l1->used++;
	spin_unlock_irq(&l1->lock);
}
