// SPDX-License-Identifier: GPL-2.0-only
/*
 * L2 tables: from entries to states, and back.
 */
#include <linux/device-mapper.h>

#include "compat.h"
#include "l2.h"

#define DM_MSG_PREFIX "qcow2"

/* An L2 entry of either kind; @i counts from @buf. */
static struct qcow2_ext_entry qcow2_get_entry(struct qcow2_map *map,
					      const __be64 *buf, unsigned int i)
{
	if (map->geo.ext_l2)
		return qcow2_ext_entry(be64_to_cpu(buf[2 * i]),
				       be64_to_cpu(buf[2 * i + 1]));
	return qcow2_ext_entry(be64_to_cpu(buf[i]), 0);
}

/* Check an entry, and set @state to what a standard one says. */
static enum qcow2_fault qcow2_check_entry(struct qcow2_map *map,
					  const char *name,
					  const struct qcow2_ext_entry *e,
					  u64 guest, enum qcow2_state *state)
{
	enum qcow2_fault fault;

	if (map->geo.ext_l2)
		fault = qcow2_l2_ext_check(e, guest, map->geo.cluster_bits);
	else
		fault = qcow2_l2_decode(e->entry, guest, map->geo.cluster_bits,
					state);
	if (fault)
		DMERR_LIMIT("%s: L2 entry of guest offset %#llx is corrupt (%#llx): %s",
			    name, (unsigned long long)guest,
			    (unsigned long long)e->entry, qcow2_fault_str(fault));
	return fault;
}

/* Is an entry what qcow2_l2_encode_block() would make of its units' states? */
static bool qcow2_entry_exact(struct qcow2_map *map,
			      const struct qcow2_ext_entry *e, u64 guest,
			      enum qcow2_state state)
{
	if (map->geo.ext_l2)
		return e->entry == (e->alloc ? qcow2_l2_data_entry(guest) : 0);
	if (state == QCOW2_DATA)
		return e->entry == qcow2_l2_data_entry(guest);
	return e->entry == (state == QCOW2_ZERO ? QCOW2_OFLAG_ZERO : 0);
}

/*
 * How many standard entries from @i on, up to @end, are what is made of units in that
 * state?  Most tables are long runs of these.
 */
static unsigned int qcow2_exact_run(struct qcow2_map *map, const __be64 *buf,
				    unsigned int i, unsigned int end, u64 guest,
				    enum qcow2_state state)
{
	u64 want = 0, step = 0;
	unsigned int n = i;

	if (state == QCOW2_DATA) {
		want = qcow2_l2_data_entry(guest);
		step = 1ULL << map->geo.cluster_bits;
	} else if (state == QCOW2_ZERO) {
		want = QCOW2_OFLAG_ZERO;
	}
	for (; n < end && be64_to_cpu(buf[n]) == want; n++)
		want += step;
	return n - i;
}

bool qcow2_l2_decode_slice(struct qcow2_map *map, const char *name,
			   struct qcow2_slice *slice, const __be64 *buf,
			   enum qcow2_state *state)
{
	unsigned int unit_bits = map->unit_shift + SECTOR_SHIFT;
	u64 start = (u64)slice->index << (map->slice_shift + unit_bits);
	unsigned int n = 1U << map->slice_shift, begin = 0, i, len;
	/*
	 * Entries beyond the virtual size are not ours; giving them the first one's
	 * state lets the slice be a tag.
	 */
	unsigned int end = min_t(u64, n, ((map->geo.size - 1 - start) >> unit_bits) + 1);
	unsigned int sub_mask = (1U << map->entry_shift) - 1;
	enum qcow2_state seen = QCOW2_UNALLOCATED, run = seen, first = seen;
	enum qcow2_fault fault = QCOW2_OK;
	struct qcow2_ext_entry e;

	slice->exact = qcow2_exact_blocks(map, slice->index);
	for (i = 0; i < end; i += len) {
		u64 guest = start + ((u64)i << unit_bits);
		bool exact = false;

		if (!(i & sub_mask)) {
			e = qcow2_get_entry(map, buf, i >> map->entry_shift);
			fault = qcow2_check_entry(map, name, &e, guest, &seen);
			exact = !fault && qcow2_entry_exact(map, &e, guest, seen);
			if (!exact)
				slice->exact &= ~BIT(i >> map->block_shift);
		}
		len = 1;
		if (fault) {
			seen = QCOW2_BUSY;
			slice->bad = true;
		} else if (map->geo.ext_l2) {
			seen = qcow2_ext_state(&e, i & sub_mask);
		} else if (exact) {
			len = qcow2_exact_run(map, buf, i, end, guest, seen);
		}
		if (!i) {
			first = seen;
			run = seen;
		}
		if (seen != run) {
			qcow2_set_states(slice, begin, i - 1, run);
			begin = i;
			run = seen;
		}
	}
	*state = first;
	/* A tag of unallocated units is exact: qcow2_cache_expand(). */
	if (!begin && !slice->bad &&
	    (first != QCOW2_UNALLOCATED ||
	     slice->exact == qcow2_exact_blocks(map, slice->index)))
		return true;
	qcow2_set_states(slice, begin, end - 1, run);
	if (end < n)
		qcow2_set_states(slice, end, n - 1, first);
	return false;
}

/*
 * Give one standard entry the state that its unit had when the block was taken,
 * unless the disk says so already.
 */
static void qcow2_patch_std(__be64 *entry, u64 guest, enum qcow2_state disk,
			    enum qcow2_state state)
{
	if (state == QCOW2_DATA && disk != QCOW2_DATA)
		*entry = cpu_to_be64(qcow2_l2_data_entry(guest));
	else if (state == QCOW2_ZERO && disk != QCOW2_ZERO)
		*entry = cpu_to_be64(QCOW2_OFLAG_ZERO);
}

/* The same for an extended entry, whose @n first units are on the device. */
static void qcow2_patch_ext(__be64 *entry, u64 guest, struct qcow2_ext_entry e,
			    const unsigned long *words, unsigned int unit,
			    unsigned int n)
{
	u32 data = 0, zero = 0, alloc;
	unsigned int i;

	for (i = 0; i < n; i++) {
		enum qcow2_state state = qcow2_get_state(words, unit + i);

		if (state == QCOW2_DATA)
			data |= BIT(i);
		else if (state == QCOW2_ZERO)
			zero |= BIT(i);
	}
	alloc = (e.alloc & ~zero) | data;
	zero = (e.zero & ~data) | zero;
	if (alloc == e.alloc && zero == e.zero)
		return;
	/* A cluster that has nothing left in the data file is let go. */
	if (!alloc)
		e.entry = 0;
	else if (data & ~e.alloc)
		e.entry = qcow2_l2_data_entry(guest);
	entry[0] = cpu_to_be64(e.entry);
	entry[1] = cpu_to_be64((u64)zero << 32 | alloc);
}

int qcow2_l2_encode_block(struct qcow2_map *map, const char *name,
			  unsigned long index, unsigned int block,
			  const unsigned long *words, __be64 *buf)
{
	unsigned int unit_bits = map->unit_shift + SECTOR_SHIFT;
	unsigned int per_entry = 1U << map->entry_shift;
	u64 begin = (((u64)index << map->slice_shift) +
		     ((u64)block << map->block_shift)) << unit_bits;
	unsigned int n = BIT(map->block_shift), unit, step;

	for (unit = 0; unit < n; unit += step) {
		u64 guest = begin + ((u64)unit << unit_bits);
		__be64 *entry = buf + (unit >> map->entry_shift <<
				       map->geo.ext_l2);
		enum qcow2_state disk = QCOW2_UNALLOCATED, state;
		struct qcow2_ext_entry old;
		unsigned int run;

		if (guest >= map->geo.size)
			break;
		step = per_entry;
		run = qcow2_words_run(words, unit, unit + per_entry - 1, &state);
		if (run == per_entry && state != QCOW2_DATA && state != QCOW2_ZERO) {
			/* The disk is right about all that are like it. */
			run = qcow2_words_run(words, unit, n - 1, &state);
			step = round_down(run, per_entry);
			continue;
		}
		old = qcow2_get_entry(map, entry, 0);
		/* it was sane when it was loaded */
		if (qcow2_check_entry(map, name, &old, guest, &disk))
			return -EUCLEAN;
		if (map->geo.ext_l2)
			qcow2_patch_ext(entry, guest, old, words, unit,
					min_t(u64, per_entry,
					      ((map->geo.size - guest - 1) >> unit_bits) + 1));
		else
			qcow2_patch_std(entry, guest, disk, state);
	}
	return 0;
}
