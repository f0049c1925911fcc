#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Reads and patches the metadata of a qcow2 image that has a data file.

This is the tests' own view of the format: it shares no code with the driver or
with qcow2setup, so that a misreading there is not repeated here.

As a command, for the shell tests:
  qcow2image.py line IMAGE META_DEV DATA_DEV [FEATURE...]   table line for dmsetup
  qcow2image.py extend IMAGE                                room for all L2 tables
  qcow2image.py get IMAGE FIELD
  qcow2image.py set IMAGE FIELD NUMBER
"""
import os
import struct
import sys

# Name: offset in the header, and how it is stored.
FIELDS = {
    "magic": (0, ">I"),
    "version": (4, ">I"),
    "backing_file_offset": (8, ">Q"),
    "backing_file_size": (16, ">I"),
    "cluster_bits": (20, ">I"),
    "size": (24, ">Q"),
    "crypt_method": (32, ">I"),
    "l1_size": (36, ">I"),
    "l1_table_offset": (40, ">Q"),
    "refcount_table_offset": (48, ">Q"),
    "refcount_table_clusters": (56, ">I"),
    "nb_snapshots": (60, ">I"),
    "snapshots_offset": (64, ">Q"),
    "incompatible_features": (72, ">Q"),
    "compatible_features": (80, ">Q"),
    "autoclear_features": (88, ">Q"),
    "refcount_order": (96, ">I"),
    "header_length": (100, ">I"),
    "compression_type": (104, ">B"),
}

SUBCLUSTERS = 32
DIRTY, CORRUPT, DATA_FILE, COMPRESSION, EXT_L2 = (1 << n for n in range(5))
RAW = 1 << 1
COPIED = 1 << 63
COMPRESSED = 1 << 62
ZERO = 1
OFFSET_MASK = 0x00FFFFFFFFFFFE00


class Qcow2:
    """The metadata file at a path. Nothing is kept: each call looks at the file."""

    def __init__(self, path):
        self.path = path

    # Bytes

    def read(self, offset, length):
        with open(self.path, "rb") as f:
            f.seek(offset)
            return f.read(length)

    def patch(self, offset, data):
        with open(self.path, "r+b") as f:
            f.seek(offset)
            f.write(data)

    def get(self, field):
        offset, form = FIELDS[field]
        return struct.unpack(form, self.read(offset, struct.calcsize(form)))[0]

    def set(self, field, value):
        offset, form = FIELDS[field]
        self.patch(offset, struct.pack(form, value))

    def u64(self, offset):
        return struct.unpack(">Q", self.read(offset, 8).ljust(8, b"\0"))[0]

    def set_u64(self, offset, value):
        self.patch(offset, struct.pack(">Q", value))

    def file_size(self):
        return os.stat(self.path).st_size

    # Geometry

    @property
    def cluster(self):
        """Cluster size in bytes."""
        return 1 << self.get("cluster_bits")

    @property
    def size(self):
        """Virtual size in bytes, whole sectors."""
        return self.get("size") & ~511

    @property
    def extended(self):
        """Are the L2 entries extended ones, with subclusters?"""
        return bool(self.get("incompatible_features") & EXT_L2)

    @property
    def entry_size(self):
        """Of an L2 entry in bytes."""
        return 16 if self.extended else 8

    @property
    def unit(self):
        """Bytes that have a state of their own: a cluster, or a subcluster."""
        return self.cluster // SUBCLUSTERS if self.extended else self.cluster

    @property
    def cover(self):
        """Guest bytes that one L2 table maps."""
        return self.cluster * self.cluster // self.entry_size

    @property
    def tables(self):
        """L2 tables, and so L1 entries, that the virtual size needs."""
        return -(-self.size // self.cover)

    # L1 and L2

    def l1_pos(self, index):
        """Where an L1 entry is in the file."""
        return self.get("l1_table_offset") + 8 * index

    def l1(self, index):
        return self.u64(self.l1_pos(index))

    def l1_entries(self):
        """All that the virtual size needs. At once: one by one takes its time."""
        return struct.unpack(f">{self.tables}Q", self.read(self.l1_pos(0), 8 * self.tables))

    def l2_table(self, guest):
        """Where the L2 table for a guest offset is in the file; 0 if there is none."""
        return self.l1(guest // self.cover) & OFFSET_MASK

    def l2_pos(self, guest):
        """Where the L2 entry for a guest offset is in the file."""
        table = self.l2_table(guest)
        if not table:
            raise ValueError(f"no L2 table for guest offset {guest:#x}")
        return table + self.entry_size * (guest % self.cover // self.cluster)

    def l2(self, guest):
        return self.u64(self.l2_pos(guest)) if self.l2_table(guest) else 0

    def bitmap(self, guest):
        """Second word of an extended L2 entry: zero bits, then allocation bits."""
        return self.u64(self.l2_pos(guest) + 8) if self.l2_table(guest) else 0

    def set_bitmap(self, guest, value):
        self.set_u64(self.l2_pos(guest) + 8, value)

    @staticmethod
    def _state(entry, first):
        if entry & ZERO:
            return "zero"
        if entry & OFFSET_MASK or (entry & COPIED and first):
            return "data"
        return "unallocated"

    @staticmethod
    def _substate(bitmap, sub):
        if bitmap >> sub & 1:
            return "data"
        return "zero" if bitmap >> (32 + sub) & 1 else "unallocated"

    def state(self, guest):
        """What the unit at a guest offset is: unallocated, zero or data."""
        if self.extended:
            return self._substate(self.bitmap(guest), guest % self.cluster // self.unit)
        return self._state(self.l2(guest), guest < self.cluster)

    def states(self):
        """The state of every unit, in order; reads each L2 table once."""
        cluster, unit, cover, size = self.cluster, self.unit, self.cover, self.size
        words = self.entry_size // 8
        per = cover // cluster
        found = []
        for i in range(self.tables):
            n = min(per, -(-(size - i * cover) // cluster))
            table = self.l1(i) & OFFSET_MASK
            data = self.read(table, n * words * 8) if table else b""
            entries = struct.unpack(f">{n * words}Q", data.ljust(n * words * 8, b"\0"))
            if words == 1:
                found += [self._state(e, not i and not k) for k, e in enumerate(entries)]
            else:
                found += [self._substate(b, sub) for b in entries[1::2] for sub in range(SUBCLUSTERS)]
        return found[:-(-size // unit)]

    def put(self, guest, state):
        """Set the state of the unit at a guest offset, whose L2 table is there.
        zero+: a zero cluster that keeps its offset."""
        start = guest // self.cluster * self.cluster
        if not self.extended:
            self.set_u64(self.l2_pos(guest), {"data": start | COPIED, "zero": ZERO, "unallocated": 0,
                                              "zero+": start | COPIED | ZERO}[state])
            return
        bit = 1 << guest % self.cluster // self.unit
        bitmap = self.bitmap(guest) & ~(bit << 32 | bit)
        bitmap |= {"data": bit, "zero": bit << 32, "unallocated": 0, "zero+": bit << 32}[state]
        self.set_bitmap(guest, bitmap)
        if state in ("data", "zero+"):
            self.set_u64(self.l2_pos(guest), start | COPIED)

    # Refcounts

    def per_block(self):
        """Entries in one refcount block."""
        return self.cluster * 8 >> self.get("refcount_order")

    def reftable_entries(self):
        return self.get("refcount_table_clusters") * self.cluster // 8

    def reftable_pos(self, index):
        return self.get("refcount_table_offset") + 8 * index

    def _refcount_place(self, number):
        block = self.u64(self.reftable_pos(number // self.per_block()))
        if not block:
            raise ValueError(f"no refcount block for cluster {number}")
        bits = 1 << self.get("refcount_order")
        bit = number % self.per_block() * bits
        return block + bit // 8, bit % 8, bits

    def refcount_pos(self, number):
        """Where the refcount of a cluster is in the file."""
        return self._refcount_place(number)[0]

    def refcount(self, number):
        """Refcount of a cluster of the metadata file."""
        pos, shift, bits = self._refcount_place(number)
        data = self.read(pos, max(bits // 8, 1))
        return int.from_bytes(data, "big") >> shift & ((1 << bits) - 1)

    def set_refcount(self, number, value):
        pos, shift, bits = self._refcount_place(number)
        data = self.read(pos, max(bits // 8, 1))
        old = int.from_bytes(data, "big")
        new = old & ~(((1 << bits) - 1) << shift) | value << shift
        self.patch(pos, new.to_bytes(len(data), "big"))

    # What user space does before a table is live

    def worst_case(self):
        """A file size at which every L2 table that is missing finds room."""
        cluster = self.cluster
        present = sum(1 for entry in self.l1_entries() if entry & OFFSET_MASK)
        clusters = -(-self.file_size() // cluster) + self.tables - present
        blocks = clusters // (self.per_block() - 1) + 1
        clusters += blocks
        if clusters > self.reftable_entries() * self.per_block():
            raise ValueError("the refcount table is too small for this image")
        return clusters * cluster

    def extend(self):
        os.truncate(self.path, self.worst_case())

    def args(self, meta, data, *features):
        """The words of a table line behind the name of the target. The features that
        the image has are added, but for backing_dev, which needs a device."""
        words = [meta, data]
        words += [str(self.get(f)) for f in
                  ("cluster_bits", "l1_table_offset", "l1_size", "refcount_table_offset",
                   "refcount_table_clusters", "refcount_order")]
        features = list(features)
        if self.get("autoclear_features") & RAW and "data_file_raw" not in features:
            features.append("data_file_raw")
        if self.extended and "extended_l2" not in features:
            features.append("extended_l2")
        if features:
            words += [str(len(features))] + features
        return words

    def line(self, meta, data, *features):
        return " ".join(["0", str(self.size // 512), "qcow2", *self.args(meta, data, *features)])


def main(argv):
    if len(argv) < 3:
        sys.exit(__doc__)
    image = Qcow2(argv[2])
    if argv[1] == "line":
        print(image.line(*argv[3:]))
    elif argv[1] == "extend":
        image.extend()
    elif argv[1] == "get":
        print(image.get(argv[3]))
    elif argv[1] == "set":
        image.set(argv[3], int(argv[4], 0))
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv)
