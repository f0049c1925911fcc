# SPDX-License-Identifier: GPL-2.0-or-later
"""Dirty bitmaps of an image, as they are on disk."""
import random
import struct

from qcow2image import OFFSET_MASK
from qcow2test import expect, run

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


def record(image, granularities):
    """Give an image bitmaps b0, b1 ..., whose entries all have clusters; their names"""
    names = [f"b{n}" for n in range(len(granularities))]
    for name, granularity in zip(names, granularities):
        run("qemu-img", "bitmap", "--add", "-g", granularity, image.path, name)
    image.trim()
    allocate(image, *names)
    return names


def setup(bench, cluster, size, granularities, options, seed=1):
    """An image with bitmaps that record, and with another one that does not. seed: of what backs
    it. Option written: so many bytes have been."""
    options = dict(options)
    written = options.pop("written", 0)
    if options.pop("backing", False):
        options["backing"] = bench.file("backing", size)
        with open(options["backing"], "wb") as f:
            f.write(random.Random(seed).randbytes(size))
    image = bench.image(size, cluster=cluster, **options)
    if written:
        # QEMU would make bitmaps of it that have no cluster for ones.
        image.qemu_io(f"write -q -P 1 0 {written}")
    run("qemu-img", "bitmap", "--add", "--disable", image.path, "other")
    return image, record(image, granularities)


def dirty(image, names):
    found = bitmaps(image)
    return {name: found[name].content() for name in names}


def wanted(image, names, ranges):
    found = bitmaps(image)
    return {name: found[name].granules(ranges) for name in names}


def covers(image, names, ranges, when):
    have, want = dirty(image, names), wanted(image, names, ranges)
    for name in names:
        expect(not want[name] & ~have[name],
               f"{when}: {name} lacks {(want[name] & ~have[name]).bit_count()} granules of {want[name].bit_count()}")


def exact(image, names, ranges, when):
    have, want = dirty(image, names), wanted(image, names, ranges)
    for name in names:
        expect(want[name] == have[name],
               f"{when}: {name}: {(want[name] & ~have[name]).bit_count()} granules lack, "
               f"{(have[name] & ~want[name]).bit_count()} are too many")


def qemu_takes(image, names):
    """They are there, recording, and not inconsistent; the image is sound."""
    image.check(leaks=True)
    for name in names:
        expect(bitmaps(image)[name].flags == AUTO, f"{name}: flags {bitmaps(image)[name].flags}")
    out = run("qemu-img", "info", "-U", "--output=json", image.path)
    expect("in-use" not in out and out.count('"auto"') == len(names), out)
