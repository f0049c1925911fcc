#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Extended L2 entries: a state for each of a cluster's 32 subclusters.

What the device writes is compared, bit by bit, with what is expected and with
what QEMU writes into a twin of the image. Entries that cannot be true must do no
harm: EIO, mode ro, the corrupt bit, a line in the log, and no other byte changed.
"""
import errno
import itertools
import os
import random
import struct
import time

from qcow2image import COMPRESSED, COPIED, CORRUPT
from qcow2test import KIB, MIB, KernelLog, Units, expect, fails_with, main, note, same, some, test, wait_for

SEED = int(os.environ.get("SEED", time.time_ns() // 1000 % 1000000))
ALL = 0xffffffff


def image_of(bench, cluster, size, **options):
    """With an L2 table for each part of the disk, and no unit that is not unallocated."""
    image = bench.image(size, cluster=cluster, extended=True, **options)
    image.qemu_io(*(f"write -q {at} 512" for at in range(0, size, image.cover)))
    image.trim()
    for at in range(0, size, image.cover):
        image.patch(image.l2_table(at), bytes(cluster))
    image.poison()
    return image


def entries(image):
    """Every L2 table as it is in the file, as a list of words."""
    found = []
    for i in range(image.tables):
        table = image.l2_table(i * image.cover)
        found.append(list(struct.unpack(f">{image.cluster // 8}Q", image.read(table, image.cluster))))
    return found


def place(image, guest):
    """Where entries() has the entry for a guest offset: table and word."""
    return guest // image.cover, guest % image.cover // image.cluster * 2


def random_words(rng, guest):
    """An entry as it may be: any mixture of states, allocated or not."""
    alloc, zero = rng.getrandbits(32), rng.getrandbits(32)
    alloc, zero = rng.choice(((alloc & ~zero, zero), (alloc, 0), (0, zero), (ALL, 0), (0, ALL), (0, 0),
                              (alloc & ~zero, zero & ~alloc)))
    # Word 0 may name the cluster while no subcluster is allocated (preallocation).
    normal = alloc or rng.random() < 0.3
    return guest | COPIED if normal else 0, zero << 32 | alloc


def mixture(image, rng):
    size, cluster, cover = image.size, image.cluster, image.cover
    tables = [image.l2_table(at) for at in range(0, size, cover)]
    for guest in range(0, size, cluster):
        word, bitmap = random_words(rng, guest)
        if guest == 0 and not bitmap & ALL:
            word = rng.choice((0, COPIED))
        image.patch(tables[guest // cover] + 16 * (guest % cover // cluster), struct.pack(">QQ", word, bitmap))


def writes(bench, cluster, backed):
    """Any mixture of states, and random writes: which bits change is known."""
    rng = random.Random(SEED + cluster)
    note(f"SEED={SEED}")
    size = 3 * MIB + 5 * (cluster // 32) + 512
    options = {}
    if backed:
        options["backing"] = bench.path("backing")
        with open(options["backing"], "wb") as f:
            f.write(rng.randbytes(size - cluster - 512))
    image = image_of(bench, cluster, size, **options)
    mixture(image, rng)
    # Beyond the end anything may stand: in the rest of the last cluster's bits
    # (legal ones), and in entries that no guest offset belongs to.
    words = image.cluster // 8
    first = place(image, size - 1)[1] + 2
    table = image.l2_table(size - 1)
    image.patch(table + 8 * first, rng.randbytes((words - first) * 8))
    want = entries(image)
    model = Units(image)
    unit = image.unit
    dm = image.open()
    disk = bench.io(dm)
    model.check(disk)
    for _ in range(60):
        n = rng.choice((512, unit, unit // 2, 3 * unit, cluster, rng.randrange(1, 2 * cluster // 512) * 512))
        n = min(max(512, n & ~511), size)
        at = rng.randrange((size - n) // 512 + 1) * 512
        if rng.random() < 0.5:
            at -= at % unit
        data = rng.randbytes(n)
        disk.write(at, data)
        model.write(at, data)
        for number in range(at // unit, (at + n - 1) // unit + 1):
            guest = number * unit // cluster * cluster
            t, k = place(image, guest)
            bit = 1 << number % 32
            want[t][k] = guest | COPIED
            want[t][k + 1] = want[t][k + 1] & ~(bit << 32) | bit
        same(disk.read(at, n), data, at)
    compare_all(bench, image, model, want, dm, disk)
    model.check_states(image)
    # QEMU's check looks at entries beyond the end, too.
    image.patch(table + 8 * first, bytes((words - first) * 8))
    image.check()
    image.compare(model.save(bench.path("model")))


def compare_entries(image, want):
    got = entries(image)
    for t, (a, b) in enumerate(zip(got, want)):
        if a == b:
            continue
        for k, (x, y) in enumerate(zip(a, b)):
            expect(x == y, f"L2 table {t}, entry {k // 2}, word {k % 2}: {x:#x}, not {y:#x}")


def compare_all(bench, image, model, want, dm, disk):
    """What is read and what is on disk, with warm and cold cache and when all is closed."""
    model.check(disk)
    disk.fsync()
    compare_entries(image, want)
    dm.cycle()
    model.check(disk)
    bench.drop(disk)
    bench.drop(dm)
    compare_entries(image, want)


for _cluster, _backed in some(itertools.product((16 * KIB, 64 * KIB, 2 * MIB), (False, True)), 3):
    test(f"bits after writes: clusters of {_cluster}{', backing' if _backed else ''}", _cluster, _backed)(writes)


def discards(bench, cluster, backed):
    """The same for discards and write zeroes."""
    rng = random.Random(SEED + cluster + 1)
    note(f"SEED={SEED}")
    size = 40 * cluster + 3 * (cluster // 32) + 512
    length = 0
    options = {}
    if backed:
        length = size - cluster
        options["backing"] = bench.path("backing")
        with open(options["backing"], "wb") as f:
            f.write(rng.randbytes(length))
    image = image_of(bench, cluster, size, **options)
    mixture(image, rng)
    want = entries(image)
    model = Units(image)
    unit = image.unit
    dm = image.open()
    disk = bench.io(dm)
    for _ in range(60):
        n = rng.choice((unit, 2 * unit, cluster, 3 * cluster, rng.randrange(1, 3 * cluster // 512) * 512))
        at = rng.randrange((size - n) // 512 + 1) * 512
        if rng.random() < 0.5:
            at -= at % unit
        if rng.random() < 0.05:
            at = size - n
        name = rng.choice(("discard", "punch_hole", "zero_range"))
        getattr(disk, name)(at, n)
        getattr(model, name)(at, n)
        for number in model.touched(at, n):
            guest = number * unit // cluster * cluster
            t, k = place(image, guest)
            bit = 1 << number % 32
            alloc = want[t][k + 1] & bit
            nothing = not want[t][k + 1] & (bit << 32 | bit)
            if number in model.whole(at, n):
                if alloc or (nothing and number * unit < length):
                    want[t][k + 1] = want[t][k + 1] & ~bit | bit << 32
                    if not want[t][k + 1] & ALL:
                        want[t][k] = 0
            elif name != "discard" and nothing and max(at, number * unit) < length:
                # As a write, unless the backing file ends before it
                want[t][k] = guest | COPIED
                want[t][k + 1] |= bit
    compare_all(bench, image, model, want, dm, disk)
    image.check()
    image.compare(model.save(bench.path("model")))


for _cluster, _backed in some(itertools.product((16 * KIB, 64 * KIB), (False, True)), 2):
    test(f"bits after discards and zeroes: clusters of {_cluster}{', backing' if _backed else ''}",
         _cluster, _backed)(discards)


def twin(bench, cluster, backed):
    """The same writes by QEMU and by the device: the same entries."""
    rng = random.Random(SEED + cluster + 2)
    note(f"SEED={SEED}")
    size = 24 * cluster + 3 * (cluster // 32) + 512
    options = {}
    if backed:
        options["backing"] = bench.path("backing")
        with open(options["backing"], "wb") as f:
            f.write(rng.randbytes(size))
    ours, theirs = (bench.image(size, name=name, cluster=cluster, extended=True, **options)
                    for name in ("ours", "theirs"))
    unit = ours.unit
    # First something of every state, all by QEMU, then writes over it.
    setup, requests = [], []
    for n in range(30):
        length = rng.choice((unit, 2 * unit, cluster, 512 * rng.randrange(1, 80)))
        at = rng.randrange((size - length) // 512) * 512
        if n % 3:
            at -= at % unit
        setup.append(f"{('write -q -P 5', 'write -q -z', 'write -q -z -u', 'discard -q')[n % 4]} {at} {length}")
    for n in range(40):
        length = rng.choice((512, unit, 2 * unit, cluster, 512 * rng.randrange(1, 200)))
        at = rng.randrange((size - length) // 512 + 1) * 512
        if rng.random() < 0.4:
            at -= at % unit
        requests.append((at, length, n + 1))
    for image in (ours, theirs):
        image.qemu_io(*setup)
        image.trim()
    ours.poison_unused(SEED)
    theirs.qemu_io(*(f"write -q -P {p} {at} {length}" for at, length, p in requests))
    theirs.trim()
    model = Units(ours)
    dm = ours.open()
    disk = bench.io(dm)
    model.check(disk)
    for at, length, p in requests:
        disk.write(at, bytes([p]) * length)
        model.write(at, bytes([p]) * length)
    model.check(disk)
    bench.drop(disk)
    bench.drop(dm)
    expect(ours.states() == theirs.states(), "QEMU's states are others")
    compare_entries(ours, entries(theirs))
    ours.check()
    ours.compare(model.save(bench.path("model")))
    theirs.compare(model)


for _cluster, _backed in some(((16 * KIB, False), (64 * KIB, False), (64 * KIB, True), (2 * MIB, False)), 2):
    test(f"the same entries as QEMU writes: clusters of {_cluster}{', backing' if _backed else ''}",
         _cluster, _backed)(twin)


@test("data_file_raw: a first write sets the bits, and needs no fill")
def raw(bench):
    size = 2 * MIB
    image = bench.image(size, extended=True, raw=True)
    # As QEMU makes it: clusters allocated, subclusters not. The data file reads as
    # zeros there, as it must.
    expect(image.l2(0) and not image.bitmap(0), "QEMU has learnt to set the bits; change this test")
    dm = image.open()
    disk = bench.io(dm)
    disk.write(4096, b"r" * 512)
    disk.write(64 * KIB, b"r" * 64 * KIB)
    disk.fsync()
    expect(image.bitmap(0) == 1 << 2, f"{image.bitmap(0):#x}")
    expect(image.bitmap(64 * KIB) == ALL, f"{image.bitmap(64 * KIB):#x}")
    expect(image.l2(0) == COPIED and image.l2(64 * KIB) == 64 * KIB | COPIED, f"{image.l2(64 * KIB):#x}")
    same(disk.read(0, 8192), bytes(4096) + b"r" * 512 + bytes(3584))
    bench.drop(disk)
    bench.drop(dm)
    image.check()


# Entries that cannot be true

C = 64 * KIB
U = C // 32


def corrupt(bench, name, log, word, bitmap, data_first):
    """One entry of cluster 20; the clusters around it are fine."""
    size = 64 * C
    image = image_of(bench, C, size)
    rng = random.Random(5)
    mixture(image, rng)
    at = 20 * C
    for guest in (at - C, at, at + C):
        image.set_u64(image.l2_pos(guest), guest | COPIED)
        image.set_bitmap(guest, 0x0000ff00000000ff)
    model = Units(image)
    image.set_u64(image.l2_pos(at), word)
    image.set_bitmap(at, bitmap)
    image.extend()
    with open(image.data, "rb") as f:
        data = f.read()
    metadata = image.read(0, image.file_size())
    log_now = bench.add(KernelLog(room=True))
    dm = image.open()
    disk = bench.io(dm)
    events = dm.events()
    expect(dm.mode() == "rw", "not rw at first")
    # One request finds it: a read, or a write.
    with fails_with(errno.EIO):
        if data_first:
            disk.write(at + 20 * U + 512, b"x" * 512)
        else:
            disk.read(at + 20 * U, 512)
    wait_for("mode ro", 10, lambda: dm.mode() == "ro")
    expect(dm.events() > events, "no event was raised")
    lines = log_now.lines("corrupt")
    expect(any(log in line for line in lines), f"no line of the log says '{log}': {lines}")
    for offset in (at, at + 9 * U, at + C - 512):
        with fails_with(errno.EIO):
            disk.read(offset, 512)
    with fails_with(errno.EIO):
        disk.read(at - 512, 1024)
    # Everything around it can be read, and nothing written or discarded.
    model.check(disk, 0, at)
    model.check(disk, at + C)
    for offset in (0, at - C, at, at + C):
        with fails_with(errno.EIO):
            disk.write(offset, b"x" * 4096)
        with fails_with(errno.EIO):
            disk.discard(offset, C)
    bench.drop(disk)
    bench.drop(dm)
    now = image.read(0, image.file_size())
    want = bytearray(metadata)
    expect(now[79] & CORRUPT, "the corrupt bit was not set")
    want[79] |= CORRUPT
    same(now, bytes(want), 0, "metadata")
    with open(image.data, "rb") as f:
        same(f.read(), data, 0, "data file")
    # With read_only the same, without a bit changed.
    image.patch(0, metadata)
    dm = image.open(readonly=True)
    disk = bench.io(dm, readonly=True)
    with fails_with(errno.EIO):
        disk.read(at, 512)
    model.check(disk, 0, at)
    bench.drop(disk)
    bench.drop(dm)
    same(image.read(0, image.file_size()), metadata, 0, "metadata")


AT = 20 * C
for _name, _log, _word, _bitmap in some((
        ("a subcluster both allocated and zero", "both", AT | COPIED, 1 << 32 | 1),
        ("the last subcluster both allocated and zero", "both", AT | COPIED, 1 << 63 | 1 << 31),
        ("a subcluster allocated in a cluster that is not", "alloc", 0, 1 << 5),
        ("bit 0 of the first word", "reserved", AT | COPIED | 1, 0xff),
        ("bit 0 of the first word of a cluster that is not allocated", "reserved", 1, 0xff << 32),
        ("reserved bits", "reserved", AT | COPIED | 1 << 58, 0xff),
        ("a compressed cluster", "compressed", AT | COMPRESSED, 0),
        ("another guest offset", "offset", AT + C | COPIED, 0xff),
        ("an offset of 0 with bit 63", "offset", COPIED, 0xff),
        ("an unaligned offset", "offset", AT + 512 | COPIED, 0xff)), 5):
    test(f"corrupt: {_name}, met by a read", _name, _log, _word, _bitmap, False)(corrupt)
    test(f"corrupt: {_name}, met by a write", _name, _log, _word, _bitmap, True)(corrupt)


@test("what is not understood beyond the end does no harm")
def beyond(bench):
    size = 10 * C + 3 * U + 512
    image = image_of(bench, C, size)
    image.set_u64(image.l2_pos(size), size // C * C | COPIED)
    image.set_bitmap(size, 0b111)
    table = image.l2_table(0)
    image.patch(table + 8 * 22, b"\xde\xad" * (4 * (C // 8 - 22)))
    # The last cluster's subclusters beyond the end say nothing either.
    image.set_bitmap(size, image.bitmap(size) | 1 << 20 | 1 << 60)
    model = Units(image)
    before = entries(image)
    dm = image.open()
    disk = bench.io(dm)
    model.check(disk)
    disk.write(size - 512, b"e" * 512)
    model.write(size - 512, b"e" * 512)
    disk.discard(9 * C, size - 9 * C)
    model.discard(9 * C, size - 9 * C)
    model.check(disk)
    disk.write(size - 512, b"e" * 512)
    model.write(size - 512, b"e" * 512)
    bench.drop(disk)
    bench.drop(dm)
    model.check_states(image)
    before[0][20] = 10 * C | COPIED
    before[0][21] = 1 << 60 | 1 << 20 | 7 << 32 | 1 << 3
    compare_entries(image, before)


if __name__ == "__main__":
    main()
