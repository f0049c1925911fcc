#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Makes the inputs that the fuzzers begin with, and those with which they found faults.

usage: seeds.py FOLDER        fills FOLDER/header, entries, target, args and image
"""
import os
import struct
import sys

COPIED, ZERO = 1 << 63, 1
BACKING_FORMAT, FEATURE_NAMES, BITMAPS, LUKS, DATA_FILE = 0xE2792ACA, 0x6803F857, 0x23852875, 0x0537BE77, 0x44415441

# What fuzz-image.c takes for these cluster_bits
SPREAD = {9: 0, 12: 9, 14: 11, 16: 13, 21: 15}


def u64(*values):
    return struct.pack(f">{len(values)}Q", *values)


def extension(kind, data):
    return struct.pack(">II", kind, len(data)) + data + bytes(-len(data) % 8)


def header(bits=9, size=1 << 20, l1=(3, 1), reftable=(1, 1), order=4, version=3, incompatible=4, autoclear=0,
           compatible=0, length=104, crypt=0, snapshots=0, backing=b"", extensions=None, compression=0):
    """The header cluster. l1: cluster, entries; reftable: cluster, clusters."""
    if extensions is None:
        extensions = [extension(DATA_FILE, b"data.raw")]
    if backing:
        extensions = [extension(BACKING_FORMAT, b"raw"), *extensions]
    body = b"".join(extensions) + bytes(8)
    end = (length if version == 3 else 72) + len(body)
    fixed = struct.pack(">4sIQIIQIIQQIIQ", b"QFI\xfb", version, end if backing else 0, len(backing), bits, size, crypt,
                        l1[1], l1[0] << bits, reftable[0] << bits, reftable[1], snapshots, 0)
    if version == 3:
        fixed += struct.pack(">QQQII", incompatible, compatible, autoclear, order, length)
        fixed += bytes([compression]).ljust(length - 104, b"\0")[:length - 104]
    return (fixed + body + backing).ljust(512, b"\0")


def refcounts(used, order):
    """A refcount block that says so of the first clusters."""
    width = 1 << order
    value = sum(1 << n * width for n in range(used))
    if width <= 8:
        return value.to_bytes(512, "little")
    return b"".join((n < used).to_bytes(width // 8, "big") for n in range(4096 // width))


def image(bits=9, order=4, extended=False, tables=1, end=0, how=0, more=(), entries=None, **options):
    """Header, refcount table, refcount block, L1 table, L2 tables, more clusters."""
    cover = 1 << (2 * bits - (4 if extended else 3))
    options.setdefault("size", cover * (tables + 1))
    clusters = 4 + tables + len(more)
    pieces = [header(bits, l1=(3, tables + 1), order=order, incompatible=4 | (16 if extended else 0), **options),
              u64(2 << bits), refcounts(clusters, order), u64(*((4 + n) << bits | COPIED for n in range(tables)))]
    for n in range(tables):
        places = [n * cover + (i << bits) for i in range(8)]
        kinds = entries or [COPIED, 0, ZERO, COPIED | ZERO, COPIED, COPIED, ZERO, 0]
        table = b""
        for place, kind in zip(places, kinds):
            entry = kind | (place if kind & COPIED else 0)
            if extended:
                # some subclusters allocated, some zero
                table += u64(entry & ~ZERO, 0x00FF00FFFF00FF00 if kind & COPIED else 0x0F0F0F0F00000000)
            else:
                table += u64(entry)
        pieces.append(table)
    pieces += more
    return bytes([how, SPREAD[bits], end]) + b"".join(p.ljust(512, b"\0") for p in pieces)


def bitmap(table, name=b"bitmap", flags=2, kind=1, granularity=16, extra=b"", size=1):
    entry = struct.pack(">QIIBBHI", table, size, flags, kind, granularity, len(name), len(extra)) + extra + name
    return entry + bytes(-len(entry) % 8)


def bitmaps(count, length, offset):
    return extension(BITMAPS, struct.pack(">IIQQ", count, 0, length, offset))


def with_bitmaps(how=0):
    directory = bitmap(6 << 9) + bitmap(7 << 9, b"two\x1b[31m\xff", 1)
    data = [extension(DATA_FILE, b"d\n\x1b]0;x\x07\xc2\x9b\xff"), bitmaps(2, len(directory), 5 << 9)]
    return image(how=how, extensions=data, autoclear=1, more=[directory, u64(8 << 9), u64(1), b"\xff" * 512])


def features(*names):
    table = b"".join(struct.pack("BB", kind, bit) + name.ljust(46, b"\0") for kind, bit, name in names)
    return extension(FEATURE_NAMES, table)


def headers():
    names = features((0, 63, b"evil\x1b[2J"), (1, 0, b"lazy"), (2, 1, b"x" * 46))
    yield header()
    yield header(version=2, extensions=[])
    yield header(backing=b"base\x1b.raw", size=(1 << 56) - 512)
    yield header(extensions=[names, extension(DATA_FILE, b"x"), extension(0x12345678, b"mine")], length=112)
    yield header(extensions=[bitmaps(1, 32, 5 << 9), extension(LUKS, u64(5 << 9, 1024))], crypt=2)
    yield header(incompatible=1 << 63 | 31, compression=1, length=112, autoclear=1 << 40 | 3, snapshots=2)
    yield header(size=1 << 63, l1=(1 << 45, 0xFFFFFFFF), reftable=(1 << 50, 0xFFFFFFFF), order=7)
    yield bytes([2]) + bitmap(9 << 21) + bitmap(3 << 21, b"n" * 100, extra=b"extra")


def entries():
    for bits in (9, 14, 16, 21):
        data = u64(COPIED, 0, ZERO, 1 << bits | COPIED, 2 << bits | COPIED | ZERO, 3 << bits | COPIED, 1 << 62, 1 << 56)
        for order in range(7):
            yield bytes([bits - 9, order, 255]) + data
        pairs = u64(COPIED, 0xFFFF0000FFFF, 0, 0xFFFFFFFF << 32, 2 << bits | COPIED, 0xFFFFFFFF)
        yield bytes([bits - 9, 0x84, 40]) + pairs


TABLES = (
    "7:0 7:1 16 196608 2 65536 1 4",
    "/dev/loop0 /dev/sdb 9 1024 4194304 512 16384 0 1 read_only",
    "7:0 7:1 21 18446744073709551615 4294967295 18446744073709551104 4294967295 6 "
    "8 backing_dev 7:2 cache_limit 18446744073709551615 extended_l2 no_discard_passdown read_only data_file_raw",
    "7:0 7:1 16 196608 2 65536 1 4 0",
    "a b +16 196608\n 2 65536 1 4 3 Backing_Dev x EXTENDED_L2",
    "a b 16 196608 2 65536 1 4 3 read_only read_only cache_limit",
    "7:0 7:1 16 196608 2 65536 1 4 2 view 7:2",
    "7:0 7:1 16 196608 2 65536 1 4 5 bitmaps view 7:2 view_granularity 4096",
    "7:0 7:1 9 1024 8 512 1 4 4 View_Granularity 1048576 VIEW view",
    "7:0 7:1 16 196608 2 65536 1 4 14 read_only extended_l2 backing_dev 7:3 no_discard_passdown cache_limit 65536 "
    "zeroed_from 1048576 bitmaps view 7:2 view_granularity 65536",
    "a b 16 196608 2 65536 1 4 4 view c view_granularity 3000",
)
STATUSES = (
    "128 3/16 3 12288 1 1000 3 40 5 0 0 1 read_only ro",
    "1 0/4194304 0 0 0 0 0 0 0 0 0 0 rw",
    "4096 18446744073709551615/1 1 2 3 4 5 6 7 8 9 4 backing_dev 7:3 cache_limit 65536 fail",
    "128 3/16 3 12288 1 1000 3 40 5 0 0 1 unknown_feature rw",
    "128 3/16 3 12288 1 1000 3 40 5 0 0 1 read_only 6 unwritten 0 free_clusters 0 trims 0 ro",
    "128 3/16 3 12288 1 1000 3 40 5 0 0 0 6 unwritten 3 free_clusters 4096 trims 18446744073709551615 nospc",
    "1 0/1 0 0 0 0 0 0 0 0 0 2 backing_dev 2 4 trims 1 new key rw",
    "1 0/1 0 0 0 0 0 0 0 0 0 0 0 fail",
    "1 0/1 0 0 0 0 0 0 0 0 0 0 4 unwritten 1 unwritten 1 rw",
    "1 0/1 0 0 0 0 0 0 0 0 0 0 3 unwritten 1 rw",
    "128 3/16 3 12288 1 1000 3 40 5 0 0 5 bitmaps view 7:2 view_granularity 4096 "
    "12 unwritten 0 free_clusters 0 trims 0 view valid view_kept 18446744073709551615 view_zero 7 rw",
    "1 0/1 0 0 0 0 0 0 0 0 0 2 view 7:2 6 view_zero 0 view_kept 1 view no_space nospc",
    "1 0/1 0 0 0 0 0 0 0 0 0 2 view 7:2 4 view valid view ended rw",
)


def images():
    yield image()
    yield image(how=64 | 20)
    yield image(how=128)
    for order in (0, 3, 6):
        yield image(order=order, how=3, tables=2)
    yield image(bits=12, how=2)
    yield image(bits=16, how=1)
    yield image(bits=14, extended=True, how=2)
    yield image(bits=21, extended=True, size=1 << 30)
    yield image(end=3, how=2)
    yield image(end=140, how=64 | 30)
    yield image(autoclear=2, how=64 | 12)
    yield image(backing=b"base.raw", how=64 | 8)
    yield image(size=12345 * 512, tables=3)
    yield with_bitmaps()
    yield with_bitmaps(how=64 | 22)
    # a refcount table that must grow, tables used twice, refcounts that are wrong
    yield image(order=6, size=32768 * 100, how=0)
    one = bytearray(image(tables=2, how=2))
    one[3 + 3 * 512 + 8:3 + 3 * 512 + 16] = u64(4 << 9 | COPIED)
    yield bytes(one)
    one = bytearray(image(how=2, more=[b"leak"]))
    one[3 + 2 * 512 + 1] = 0
    yield bytes(one)
    yield bytes([2, 0, 0]) + header(crypt=2, extensions=[extension(LUKS, u64(4 << 9, 1000)),
                                                         extension(DATA_FILE, b"x")]) + bytes(2048)
    yield bytes([0, 0, 0]) + next(headers())
    for head in headers():
        yield bytes([2, 0, 4]) + head + image()[515:]


def found():
    """Headers with which faults were found, by fuzzer and variant."""
    # a backing file name that is longer than the cluster that it must be in
    one = bytearray(header())
    struct.pack_into(">QI", one, 8, 1 << 24, 583)
    yield bytes(one) + bytes(71)


def main(folder):
    kinds = {
        "header": [*headers(), *found()],
        "entries": entries(),
        "target": [t.encode() for t in TABLES + STATUSES],
        "args": [bytes([0, 0x2B]) + t.encode() for t in TABLES],
        "image": [*images(), *(bytes(3) + one for one in found())],
    }
    for kind, inputs in kinds.items():
        os.makedirs(os.path.join(folder, kind), exist_ok=True)
        for n, data in enumerate(inputs):
            with open(os.path.join(folder, kind, f"{n:03}"), "wb") as f:
                f.write(data)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
