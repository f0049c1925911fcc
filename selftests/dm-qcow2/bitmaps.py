# SPDX-License-Identifier: GPL-2.0-or-later
"""Dirty bitmaps of an image, as they are on disk."""
import struct

from qcow2image import OFFSET_MASK

EXTENSION = 0x23852875
AUTOCLEAR = 1
IN_USE, AUTO = 1, 2


class Bitmap:
    """One of them. Where it is does not change while a device is live."""

    def __init__(self, image, place, words, name):
        self.image, self.place, self.name = image, place, name
        self.table, self.entries, self.flags, self.type, self.bits, _, self.extra = words

    @property
    def granularity(self):
        return 1 << self.bits

    @property
    def count(self):
        """Granules of the disk"""
        return -(-self.image.size // self.granularity)

    def clusters(self):
        return struct.unpack(f">{self.entries}Q", self.image.read(self.table, 8 * self.entries))

    def content(self):
        """One number, with a bit for each granule"""
        data = bytearray()
        for entry in self.clusters():
            where = entry & OFFSET_MASK
            data += self.image.read(where, self.image.cluster) if where else bytes([0xff * (entry & 1)]) * self.image.cluster
        return int.from_bytes(data, "little") & ((1 << self.count) - 1)

    def fill(self, value):
        """All bytes of its clusters; bits behind the end stay clear."""
        bits = int.from_bytes(bytes([value]) * -(-self.count // 8), "little") & ((1 << self.count) - 1)
        self.put(bits)

    def put(self, bits):
        data = bits.to_bytes(self.entries * self.image.cluster, "little")
        for i, entry in enumerate(self.clusters()):
            self.image.patch(entry & OFFSET_MASK, data[i * self.image.cluster:(i + 1) * self.image.cluster])

    def set_flags(self, flags):
        self.image.patch(self.place + 12, struct.pack(">I", flags))
        self.flags = flags

    def granules(self, ranges):
        """The bits of ranges of bytes, (offset, length)"""
        bits = 0
        for offset, length in ranges:
            first, last = offset >> self.bits, (offset + length - 1) >> self.bits
            bits |= ((1 << (last - first + 1)) - 1) << first
        return bits


def bitmaps(image):
    """All, by name; those that the header does not vouch for, too."""
    pos, end = image.get("header_length"), image.cluster
    found = {}
    while pos + 8 <= end:
        kind, length = struct.unpack(">II", image.read(pos, 8))
        if not kind:
            break
        if kind == EXTENSION:
            count, _, _, offset = struct.unpack(">IIQQ", image.read(pos + 8, 24))
            for _ in range(count):
                words = struct.unpack(">QIIBBHI", image.read(offset, 24))
                name = image.read(offset + 24 + words[6], words[5]).decode()
                found[name] = Bitmap(image, offset, words, name)
                offset += (24 + words[5] + words[6] + 7) // 8 * 8
        pos += 8 + (length + 7) // 8 * 8
    return found


def allocate(image, *names):
    """Give each entry of bitmaps' tables a cluster of zeros at the end of the file, as qcow2setup open
    does it; those of ones are not there in new bitmaps."""
    for name in names:
        b = bitmaps(image)[name]
        for i, entry in enumerate(b.clusters()):
            if entry & OFFSET_MASK:
                continue
            number = -(-image.file_size() // image.cluster)
            # One that has a refcount block
            image.patch(number * image.cluster, bytes(image.cluster))
            image.set_refcount(number, 1)
            image.set_u64(b.table + 8 * i, number * image.cluster)
