#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Corrupt metadata: EIO for what needs it, the rest goes on, nothing gets worse.

Each case patches one entry of an image. Requests that need the entry must fail
with EIO, others must not; the device must go ro, with an event and a line in the
log that names the entry; the header's corrupt bit must be set, and no other byte
of the metadata may change, nor any of the data. With read_only not even that one.
"""
import errno
import os
import random
import re
import time

from qcow2image import COMPRESSED, COPIED, CORRUPT, ZERO
from qcow2test import (KIB, Failure, KernelLog, Lower, Task, expect, fails_with, main, note, same, test, wait_for)

CLUSTER = 4 * KIB
COVER = CLUSTER * CLUSTER // 8
SIZE = 8 * COVER
# Each of the first four L2 tables: 8 data clusters, 4 zero ones, then none.
DATA = 8 * CLUSTER
SEED = int(os.environ.get("SEED", time.time_ns() // 1000 % 1000000))

# Kinds of lines in the log, and when there were any, in this whole run.
LINES = {"L1": [], "L2": [], "refcount table": [], "refcount of": []}


class Fixture:
    """One image that is damaged, looked at, and put right again, many times."""

    def __init__(self, bench, refcount_bits=16, cluster=CLUSTER, **options):
        self.bench = bench
        cover = cluster * cluster // (16 if options.get("extended") else 8)
        image = self.image = bench.image(8 * cover, cluster=cluster, refcount_bits=refcount_bits, **options)
        commands = []
        for i in range(4):
            commands += [f"write -q -P 1 {i * cover} {8 * cluster}",
                         f"write -q -z {i * cover + 8 * cluster} {4 * cluster}"]
        image.qemu_io(*commands)
        image.trim()
        image.poison(*((i * cover, 16 * cluster) for i in range(8)))
        self.model = bench.model(image.size)
        self.data = self.read_data()
        for i in range(4):
            self.model.write(i * cover, self.data[i * cover:i * cover + 8 * cluster])
        image.attach()
        self.clean = image.read(0, image.file_size())
        self.log = bench.add(KernelLog())
        self.dm = self.disk = None
        self.faults = []

    def read_data(self):
        with open(self.image.data, "rb") as f:
            return f.read()

    def restore(self):
        self.image.patch(0, self.clean)

    def open(self, *features):
        self.logged()
        self.dm = self.image.open(*features)
        self.disk = self.bench.io(self.dm, readonly=bool(features))

    def close(self):
        self.bench.drop(self.disk)
        self.bench.drop(self.dm)

    def good(self, *offsets):
        for at in offsets:
            same(self.disk.read(at, CLUSTER), self.model.read(at, CLUSTER), at)

    def bad(self, at, how="read"):
        unit = at - at % CLUSTER
        with fails_with(errno.EIO):
            if how == "read":
                self.disk.read(at, 512)
            elif how == "write":
                self.disk.write(at, b"b" * 512)
            elif how == "discard":
                self.disk.discard(unit, CLUSTER)
            elif how == "zero":
                self.disk.zero_range(unit, CLUSTER)
            else:
                self.disk.punch_hole(unit + 512, 1024)

    def logged(self, pattern="."):
        """Is there a new line that matches? The kernel drops what is beyond ten
        lines of one kind in five seconds: after that, there need not be one."""
        now = time.monotonic()
        kind = next((k for k in LINES if re.match(k, pattern)), "L1")
        lines = self.log.lines("corrupt")
        for k, times in LINES.items():
            times[:] = [t for t in times if t > now - 6]
            times += [now] * sum(bool(re.search(rf": {k}", line)) for line in lines)
        return any(re.search(pattern, line) for line in lines) or len(LINES[kind]) >= 10

    def went_ro(self, before, log):
        """mode, event and log of a device that has met a corrupt entry"""
        wait_for("mode ro", 10, lambda: self.dm.mode() == "ro")
        expect(self.dm.events() > before, "no event was raised")
        expect(self.logged(log), f"no line of the log matches '{log}'")

    def unchanged(self, patched, corrupt):
        """What was patched must be on disk as it was, but for the corrupt bit."""
        now = self.image.read(0, len(patched) + 1)
        want = bytearray(patched)
        if corrupt:
            want[79] |= CORRUPT
        expect(bool(now[79] & CORRUPT) == corrupt,
               "the corrupt bit was " + ("not set" if corrupt else "set"))
        same(now, bytes(want), 0, "metadata")
        same(self.read_data(), self.data, 0, "data file")

    def case(self, name, log, patch, bad, good):
        """bad, good: guest offsets whose clusters cannot, and can, be read."""
        self.cases += 1
        try:
            for first in ("read", ("write", "discard", "zero", "punch")[self.cases % 4]):
                self.restore()
                patch()
                patched = self.image.read(0, self.image.file_size())
                self.open()
                before = self.dm.events()
                if not self.log_at_resume:
                    expect(self.dm.mode() == "rw", "not rw at first")
                    self.good(*good)
                for at in bad:
                    self.bad(at, first)
                    self.bad(at)
                self.bad(min(bad) - 512 if min(bad) % COVER else min(bad), "write")
                self.went_ro(0 if self.log_at_resume else before, log)
                self.good(*good)
                # It is ro now: nothing can be written, wherever it is.
                for how in ("write", "discard", "zero", "punch"):
                    self.bad(good[0], how)
                    self.bad(6 * COVER, how)
                # Not cured by reading it again, either.
                self.dm.cycle()
                self.bad(bad[0])
                self.good(*good)
                self.close()
                self.unchanged(patched, corrupt=True)

            self.restore()
            patch()
            patched = self.image.read(0, self.image.file_size())
            self.open("read_only")
            for at in bad:
                self.bad(at)
            self.good(*good)
            expect(self.dm.mode() == "ro", "mode")
            expect(self.logged(log), f"read_only: no line of the log matches '{log}'")
            self.close()
            self.unchanged(patched, corrupt=False)
        except Exception as e:  # pylint: disable=broad-except # told by done()
            self.fault(f"{name}: {e}")

    log_at_resume = False
    cases = 0

    def fault(self, text):
        note(text)
        self.faults.append(text)
        for thing in (self.disk, self.dm):
            if thing in self.bench.things:
                self.bench.drop(thing)

    def done(self):
        # The fixture itself must be sound.
        self.restore()
        self.open()
        self.good(*range(0, SIZE, COVER))
        self.disk.write(6 * COVER, b"x" * 512)
        self.close()
        self.image.check()
        expect(not self.faults, f"{len(self.faults)} faults, see above")


@test("L2 entries")
def l2_entries(bench):
    f = Fixture(bench)
    image = f.image
    # Data, zero and unallocated entries of table 1 in turn; and cluster 0.
    spots = [COVER + 3 * CLUSTER, COVER + DATA + CLUSTER, COVER + 20 * CLUSTER]
    cases = [
        ("unaligned offset", lambda g: COPIED | g + 512),
        ("offset of the next cluster", lambda g: COPIED | g + CLUSTER),
        ("offset of another table's cluster", lambda g: COPIED | g + COVER),
        ("offset beyond the data device", lambda g: COPIED | 1 << 50),
        ("zero, with a wrong offset", lambda g: COPIED | g + CLUSTER | ZERO),
        ("copied, without an offset", lambda g: COPIED),
        ("compressed", lambda g: COMPRESSED | g),
        ("compressed and copied", lambda g: COMPRESSED | COPIED | g),
    ]
    cases += [(f"reserved bit {n}", lambda g, n=n: COPIED | g | 1 << n) for n in (1, 8, 56, 61)]
    for n, (name, entry) in enumerate(cases):
        guest = spots[n % 3]
        f.case(name, rf"L2 .*{guest:#x}\b", lambda: image.set_u64(image.l2_pos(guest), entry(guest)),
               [guest], [guest - CLUSTER, guest + CLUSTER, 0, 2 * COVER, 5 * COVER])
    f.case("cluster 0", r"L2 .*\b(0x)?0\b", lambda: image.set_u64(image.l2_pos(0), COPIED | CLUSTER),
           [0], [CLUSTER, COVER, 5 * COVER])
    f.done()


@test("L2 entries: a request that spans a bad cluster fails, its neighbours do not")
def spanning(bench):
    f = Fixture(bench)
    guest = COVER + 3 * CLUSTER
    f.image.set_u64(f.image.l2_pos(guest), COPIED | guest + CLUSTER)
    f.open()
    with fails_with(errno.EIO):
        f.disk.read(guest - CLUSTER, 3 * CLUSTER)
    with fails_with(errno.EIO):
        f.disk.read(COVER - CLUSTER, 8 * CLUSTER)
    f.good(guest - CLUSTER, guest + CLUSTER)
    same(f.disk.read(COVER, 3 * CLUSTER), f.model.read(COVER, 3 * CLUSTER), COVER)
    f.close()
    f.done()


@test("L2 entries: what was written before a bad one was met is not lost")
def written_before(bench):
    f = Fixture(bench)
    guest = COVER + 3 * CLUSTER
    f.image.set_u64(f.image.l2_pos(guest), COPIED | guest + CLUSTER)
    f.open()
    f.disk.write(2 * COVER + 20 * CLUSTER + 512, b"w" * 1024)
    f.disk.write(6 * COVER, b"n" * CLUSTER)
    f.model.write(2 * COVER + 20 * CLUSTER + 512, b"w" * 1024)
    f.model.write(6 * COVER, b"n" * CLUSTER)
    f.bad(guest)
    wait_for("mode ro", 10, lambda: f.dm.mode() == "ro")
    f.good(2 * COVER + 20 * CLUSTER, 6 * COVER)
    f.disk.fsync()
    f.close()
    expect(f.image.get("incompatible_features") & CORRUPT, "the corrupt bit was not set")
    f.open("read_only")
    f.good(2 * COVER + 20 * CLUSTER, 6 * COVER, 0, 3 * COVER)
    f.bad(guest)
    f.close()
    f.restore()
    f.model.write(2 * COVER + 20 * CLUSTER, bytes(CLUSTER))
    f.model.write(6 * COVER, bytes(CLUSTER))
    f.done()


@test("L1 entries")
def l1_entries(bench):
    f = Fixture(bench)
    # The whole L1 table is in core from resume on: it may be judged there.
    f.log_at_resume = True
    image = f.image
    entry = image.l1(1)
    end = image.file_size()
    cases = [
        ("unaligned", entry + 512),
        ("beyond the device", COPIED | -(-end // CLUSTER) * CLUSTER),
        ("far beyond the device", COPIED | 1 << 55),
        ("at the L1 table", COPIED | image.get("l1_table_offset")),
        ("at the refcount table", COPIED | image.get("refcount_table_offset")),
    ]
    cases += [(f"reserved bit {n}", entry | 1 << n) for n in (0, 8, 56, 62)]
    for name, value in cases:
        f.case(name, r"L1 entry 1\b", lambda: image.set_u64(image.l1_pos(1), value),
               [COVER, COVER + 20 * CLUSTER], [0, 2 * COVER, 3 * COVER, 5 * COVER])
    f.done()


def l1_aliases(bench, bits):
    f = Fixture(bench, bits)
    image = f.image
    block = image.u64(image.reftable_pos(0))
    for name, index, value in (("two share a table", 2, image.l1(1)),
                               ("at a refcount block", 5, COPIED | block)):
        f.restore()
        image.set_u64(image.l1_pos(index), value)
        patched = image.read(0, image.file_size())
        f.open()
        f.good(0, 3 * COVER, 6 * COVER)
        # A first write would put an entry where it must not be.
        for at in (index * COVER + 100 * CLUSTER, index * COVER + 400 * CLUSTER):
            try:
                f.disk.write(at, b"x" * 512)
                f.disk.fsync()
                note(f"{name}: a first write succeeded")
                f.faults.append(name)
            except OSError as e:
                expect(e.errno == errno.EIO, f"errno {e.errno}")
        mode = f.dm.mode()
        f.close()
        try:
            expect(mode == "ro", f"mode {mode}")
            f.unchanged(patched, corrupt=True)
        except Failure as e:
            f.fault(f"{name}: {e}")
    f.done()


# Refcounts of 64 bits look like sane entries of an L2 table: zero clusters.
for _bits in (16, 64):
    test(f"L1 entries: two that share a table, or one that points at a refcount block of {_bits} bits",
         _bits)(l1_aliases)


@test("an L1 entry without the copied bit: reads work, first writes do not touch the table")
def l1_shared(bench):
    f = Fixture(bench)
    image = f.image
    image.set_u64(image.l1_pos(1), image.l1(1) & ~COPIED)
    patched = image.read(0, image.file_size())
    f.open()
    f.good(0, COVER, COVER + DATA, COVER + 20 * CLUSTER)
    expect(f.dm.mode() == "rw", "not rw")
    f.bad(COVER + 20 * CLUSTER, "write")
    f.bad(COVER, "discard")
    f.bad(COVER + DATA, "write")
    # The format allows such an entry: nothing is wrong with the image itself.
    expect(f.logged(r"L1 entry 1\b"), "no line of the log names the entry")
    expect(f.dm.mode() == "rw", "not rw any more")
    f.good(0, COVER, COVER + DATA, COVER + 20 * CLUSTER)
    f.close()
    f.unchanged(patched, corrupt=False)
    f.done()


def allocation(f, name, log, patch):
    """Reads do not need what is patched; the next L2 table would."""
    f.restore()
    patch()
    patched = f.image.read(0, f.image.file_size())
    f.open()
    before = f.dm.events()
    f.good(*range(0, SIZE, COVER))
    expect(f.dm.mode() == "rw", "not rw at first")
    try:
        with fails_with(errno.EIO):
            f.disk.write(5 * COVER, b"x" * CLUSTER)
            f.disk.fsync()
        f.went_ro(before, log)
        f.good(*range(0, SIZE, COVER))
        f.close()
        f.unchanged(patched, corrupt=True)
    except Exception as e:  # pylint: disable=broad-except # told by done()
        f.fault(f"{name}: {e}")


def refcount_zero(bench, bits):
    f = Fixture(bench, bits)
    image = f.image
    for name, offset in (("the header", 0), ("the refcount table", image.get("refcount_table_offset")),
                         ("the L1 table", image.get("l1_table_offset")),
                         ("the refcount block", image.u64(image.reftable_pos(0))),
                         ("an L2 table", image.l2_table(3 * COVER))):
        allocation(f, name, rf"refcount of.*\b(0x)?{offset:x}\b",
                   lambda: image.set_refcount(offset // CLUSTER, 0))
    f.done()


for _bits in (1, 16, 64):
    test(f"refcount 0 of {_bits} bits for clusters that are in use", _bits)(refcount_zero)


@test("refcount table entries")
def reftable_entries(bench):
    f = Fixture(bench)
    image = f.image
    entry = image.u64(image.reftable_pos(0))
    end = -(-image.file_size() // CLUSTER) * CLUSTER
    last = image.reftable_entries() - 1
    for name, index, value in (
            ("unaligned", 0, entry + 512), ("beyond the device", 0, end),
            ("far beyond the device", 0, 1 << 55), ("reserved bit 0", 0, entry | 1),
            ("reserved bit 8", 0, entry | 1 << 8), ("at the L1 table", 0, image.get("l1_table_offset")),
            ("at an L2 table", 0, image.l2_table(COVER)),
            ("at the refcount table", 0, image.get("refcount_table_offset")),
            ("two share a block", 1, entry), ("the last one at the L1 table", last, image.get("l1_table_offset")),
            ("the last one at an L2 table", last, image.l2_table(COVER)),
            ("the last one at the refcount table", last, image.get("refcount_table_offset"))):
        allocation(f, name, rf"refcount table entry {index}\b",
                   lambda: image.set_u64(image.reftable_pos(index), value))
    f.done()


@test("truncated metadata: tables beyond the end")
def truncated(bench):
    f = Fixture(bench)
    image = f.image
    tables = sorted(image.l2_table(i * COVER) for i in range(4))
    lost = next(i for i in range(4) if image.l2_table(i * COVER) == tables[-1])
    os.truncate(image.path, tables[-1] + CLUSTER // 2)
    image.meta_loop.resize()
    patched = image.read(0, image.file_size())
    f.open()
    f.good(*(i * COVER for i in range(8) if i != lost))
    f.bad(lost * COVER)
    f.went_ro(0, rf"L1 entry {lost}\b")
    f.good(*(i * COVER for i in range(8) if i != lost))
    f.close()
    f.unchanged(patched, corrupt=True)


@test("a corrupt unit behind one that is busy is not taken for zeros")
def behind_busy(bench):
    f = Fixture(bench, cluster=512)
    image = f.image
    cover = image.cover
    # Both are in core and one is bad, before the write that is under way.
    image.set_u64(image.l2_pos(cover), image.l2(cover) | 2)
    data = bench.add(Lower(bench, "data", image.data_loop.path))
    f.dm = image.open(data=data.path)
    f.disk = bench.io(f.dm)
    f.disk.write(cover - 1024, b"b" * 512)
    data.stop()
    writer = Task(f.disk.write, cover - 512, b"b" * 512)
    wait_for("the first write", 30, lambda: f.dm.status().first_writes == 2)
    f.bad(cover)
    with fails_with(errno.EIO):
        f.disk.read(cover - 512, 1024)
    same(f.disk.read(cover - 512, 512), bytes(512), cover - 512)
    data.go()
    writer.finish(60)
    same(f.disk.read(cover - 512, 512), b"b" * 512, cover - 512)


@test("no writes to a corrupt image, also when the device fails later")
def ro_then_fail(bench):
    f = Fixture(bench)
    image = f.image
    image.set_u64(image.l2_pos(COVER), image.l2(COVER) | 2)
    meta = bench.add(Lower(bench, "meta", image.meta_loop.path))
    f.dm = image.open(meta=meta.path)
    f.disk = bench.io(f.dm)
    f.good(0)
    meta.no_writes()
    f.disk.write(20 * CLUSTER, b"f" * CLUSTER)
    f.bad(COVER)
    wait_for("mode fail", 30, lambda: f.dm.mode() == "fail")
    for at in (0, 20 * CLUSTER, 21 * CLUSTER):
        f.bad(at, "write")
        f.bad(at, "discard")
    f.good(0)


def fuzz(bench, rounds, options):
    """Random bytes anywhere behind the header. Whatever a request gives, the
    device must end it, stay within the files, change no data that nobody has
    asked it to change, and no entry of L1 and refcount table that is in use."""
    note(f"SEED={SEED}")
    f = Fixture(bench, **options)
    image = f.image
    size, cover, cluster = image.size, image.cover, image.cluster
    rng = random.Random(SEED)
    tables = [(image.get("l1_table_offset"), 64), (image.get("refcount_table_offset"), 64)]
    places = tables + [(image.u64(image.reftable_pos(0)), 128)]
    places += [(image.l2_table(i * cover), 16 * image.entry_size) for i in range(4)] * 2
    places += [(image.l2_table(i * cover), cluster) for i in range(4)]
    want = bytearray(f.data)
    for _ in range(rounds):
        f.restore()
        for _ in range(rng.choice((1, 1, 2, 5, 50))):
            start, length = rng.choice(places)
            at = start + rng.randrange(length)
            image.patch(at, bytes([image.read(at, 1)[0] ^ 1 << rng.randrange(8)]))
        patched = image.read(0, image.file_size())
        touched = set()
        f.dm = image.open()
        f.disk = bench.io(f.dm)
        for _ in range(60):
            at = rng.randrange(size // 512) * 512
            if rng.random() < 0.5:
                at = rng.randrange(8) * cover + rng.randrange(32) * cluster
            length = min(rng.choice((512, cluster, 5 * cluster, 64 * KIB)), size - at)
            kind = rng.choice(("read", "write", "discard", "zero_out", "punch_hole", "fsync"))
            if kind not in ("read", "fsync"):
                touched.update(range(at // cluster, (at + length - 1) // cluster + 1))
            try:
                if kind == "write":
                    f.disk.write(at, b"f" * length)
                elif kind == "fsync":
                    f.disk.fsync()
                else:
                    getattr(f.disk, kind)(at, length)
            except OSError as e:
                expect(e.errno in (errno.EIO, errno.ENOSPC), f"errno {e.errno}")
        f.close()
        expect(image.file_size() == len(patched), "the metadata file has another size")
        got = f.read_data()
        expect(len(got) == size, "the data file has another size")
        for n in touched:
            want[n * cluster:(n + 1) * cluster] = got[n * cluster:(n + 1) * cluster]
        same(got, bytes(want), 0, "data file")
        header = bytearray(image.read(0, 512))
        header[79] &= ~CORRUPT
        same(bytes(header), f.clean[:512], 0, "header")
        # In L1, "exclusively owned" without an offset is no table, either.
        unused = ((bytes(8), b"\x80" + bytes(7)), (bytes(8),))
        for (start, length), none in zip(tables, unused):
            for at in range(start, start + length, 8):
                old = patched[at:at + 8]
                expect(old in none or image.read(at, 8) == old,
                       f"the entry at {at:#x} was {old.hex()} and is {image.read(at, 8).hex()}")


test("random damage", 20, {})(fuzz)
test("random damage, extended L2 entries", 10, {"cluster": 16 * KIB, "extended": True})(fuzz)


if __name__ == "__main__":
    main()
