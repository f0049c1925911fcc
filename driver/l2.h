/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * L2 tables: from entries to states, and back.  No I/O.
 */
#ifndef DM_QCOW2_L2_H
#define DM_QCOW2_L2_H

#include "map.h"

/**
 * qcow2_l2_decode_slice() - read the entries of a slice
 * @map: the map
 * @name: for messages
 * @slice: its states, and which blocks are exact, are set; impossible entries become
 *	busy units, and are logged, and the slice is marked bad
 * @buf: the slice as it is on disk
 * @state: set to the state of all units if the result is true
 *
 * Returns true if all units are in one state, and none is bad; if they are
 * unallocated, only if all blocks are exact that can be.  Any context.
 */
bool qcow2_l2_decode_slice(struct qcow2_map *map, const char *name,
			   struct qcow2_slice *slice, const __be64 *buf,
			   enum qcow2_state *state);

/**
 * qcow2_l2_encode_block() - bring a block up to date
 * @map: the map
 * @name: for messages
 * @index: of the slice
 * @block: of the slice
 * @words: states of the block's units
 * @buf: the block as it is on disk, or zeros if it is exact; changed
 *
 * Changes the entries of those units that are data or zero and are not so on
 * disk.  All other entries, and all other bits, stay as they are.  Returns 0, or
 * -EUCLEAN if an entry is impossible, which is logged.  Any context.
 */
int qcow2_l2_encode_block(struct qcow2_map *map, const char *name,
			  unsigned long index, unsigned int block,
			  const unsigned long *words, __be64 *buf);

#endif /* DM_QCOW2_L2_H */
