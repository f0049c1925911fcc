#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Dirty bitmaps that the device keeps: never less than what has changed, and no more once it
is suspended.

Environment: SEED (printed, to repeat a run), REQUESTS (of each image), ROUNDS (of the backups
of each image).
"""
import errno
import mmap
import os
import random
import re
import time

from bitmaps import AUTO, IN_USE, bitmaps, covers, exact, qemu_takes, setup
from qcow2image import OFFSET_MASK
from qcow2test import (DM_TABLE_LOAD, KIB, MIB, Failure, Lower, NullBlk, Stat, dm_ioctl, drop_caches, expect, fails_with,
                       in_parallel, main, note, same, some, test, wait_for)

SEED = int(os.environ.get("SEED", time.time_ns() // 1000 % 1000000))
REQUESTS = int(os.environ.get("REQUESTS", 120))

# Cluster size, virtual size, granularities, and other options
KINDS = [
    (64 * KIB, 9 * MIB + 512, (64 * KIB,), {}),
    (4 * KIB, 5 * MIB + 1536, (512, 64 * KIB, 1 << 31), {}),
    (512, 2 * MIB, (4 * KIB, 1 * MIB), {}),
    (2 * MIB, 13 * MIB, (32 * KIB,), {}),
    (64 * KIB, 9 * MIB + 512, (64 * KIB, 4 * KIB), {"raw": True}),
    (16 * KIB, 7 * MIB + 3 * KIB, (512, 4 * MIB), {"extended": True}),
    (64 * KIB, 6 * MIB + 512, (4 * KIB,), {"backing": True}),
    (4 * KIB, 3 * MIB, tuple(512 << n for n in range(16)), {}),
]


def words(kind):
    cluster, size, granularities, options = kind
    more = "".join(f", {name}" for name in options)
    return f"clusters of {cluster}, {size} bytes, granularities {', '.join(str(g) for g in granularities)}{more}"


class Requests:
    """Random ones, of all kinds; they are noted before they are sent."""

    def __init__(self, image, disk, rng):
        self.image, self.disk, self.rng = image, disk, rng
        self.ranges = []

    def place(self):
        rng, size = self.rng, self.image.size
        if rng.random() < 0.2 and self.ranges:
            # On from where the last one has ended
            at = sum(self.ranges[-1]) % size
        else:
            at = rng.randrange(size // 512) * 512
        length = rng.choice((512, 1024, 4096, 4096, 64 * KIB, rng.randrange(1, 400) * 512))
        if rng.random() < 0.5:
            at -= at % 4096
        return at, min(length, size - at)

    def one(self):
        at, length = self.place()
        kind = self.rng.choice(("write", "write", "write", "zero_range", "zero_out", "discard", "sync"))
        self.ranges.append((at, length))
        if kind == "write":
            self.disk.write(at, self.rng.randbytes(length))
        elif kind == "sync":
            self.disk.write(at, self.rng.randbytes(length))
            self.disk.fsync()
        else:
            getattr(self.disk, kind)(at, length)

    def along(self):
        """One after the other, so that more is marked than they need"""
        length = self.rng.choice((4096, 16 * KIB, 64 * KIB))
        most = self.image.size // length
        first = self.rng.randrange(most)
        for n in range(first, min(first + self.rng.randrange(4, 25), most)):
            self.ranges.append((n * length, length))
            self.disk.write(n * length, self.rng.randbytes(length))


def matrix(bench, kind):
    note(f"SEED={SEED}")
    rng = random.Random(SEED)
    image, names = setup(bench, *kind)
    dm = image.open("bitmaps")
    disk = bench.io(dm)
    requests = Requests(image, disk, rng)
    exact(image, names, [], "at the beginning")
    for n in range(REQUESTS):
        requests.one()
        covers(image, names, requests.ranges, f"after request {n}")
        if n % 40 == 20:
            dm.message("bitmap_sync")
            exact(image, names, requests.ranges, f"bitmap_sync after request {n}")
        if n % 40 == 35:
            dm.suspend()
            exact(image, names, requests.ranges, f"suspend after request {n}")
            qemu_takes(image, names)
            dm.resume()
        if n % 60 == 50:
            drop_caches()
    bench.drop(disk)
    bench.drop(dm)
    exact(image, names, requests.ranges, "at the end")
    qemu_takes(image, names)
    expect(bitmaps(image)["other"].content() == 0, "one that does not record has changed")


for _kind in some(KINDS, 4):
    test(f"all kinds of requests: {words(_kind)}", _kind)(matrix)


def runs(bits, count):
    """Of bits that are set: (first, number)"""
    text = f"{bits:0{count}b}"[::-1]
    return [(m.start(), m.end() - m.start()) for m in re.finditer("1+", text)]


class Backup:
    """A copy that is brought up to date by what a bitmap says has changed since it was made."""

    def __init__(self, name, content):
        self.name, self.data = name, bytearray(content)
        self.asked = []         # what requests may have changed since the bitmap was cleared

    def update(self, bitmap, content, when):
        """Take over what is dirty; that has to be all of it."""
        for first, n in runs(bitmap.content(), bitmap.count):
            at, end = first * bitmap.granularity, (first + n) * bitmap.granularity
            self.data[at:end] = content[at:end]
        same(bytes(self.data), content, 0, f"{when}: copy by {self.name}")


def everything(disk, size):
    return b"".join(disk.read(at, min(MIB, size - at)) for at in range(0, size, MIB))


class Consumer:
    """An image with bitmaps, and who makes backups of it by them alone."""
    # What comes between two rounds
    WAYS = ("sync", "suspend", "reload", "close", "drop", "nothing")

    def __init__(self, bench, kind, rng):
        self.bench, self.rng = bench, rng
        self.image, self.names = setup(bench, *kind, seed=SEED)
        self.open()
        self.line = self.dm.table()
        content = everything(self.disk, self.image.size)
        self.copies = [Backup(name, content) for name in self.names]
        self.times = dict.fromkeys((*self.WAYS, "cleared"), 0)

    def open(self):
        self.dm = self.image.open("bitmaps")
        self.disk = self.bench.io(self.dm)

    def close(self):
        self.bench.drop(self.disk)
        self.bench.drop(self.dm)

    def sync(self):
        self.dm.message("bitmap_sync")

    def requests(self):
        """Several threads of them, one of which may go on and on; and what happens meanwhile."""
        several = [Requests(self.image, self.disk, random.Random(self.rng.random())) for _ in range(4)]

        def some(requests, along):
            for _ in range(requests.rng.randrange(1, 12)):
                requests.one()
            if along:
                requests.along()

        def meanwhile(what):
            if what == "drop":
                drop_caches()
            elif what:
                self.sync()
        along = self.rng.random() < 0.4
        what = self.rng.choice(("drop", "sync", "", ""))
        in_parallel(lambda f, *a: f(*a), (meanwhile, what), *((some, r, along and n == 0) for n, r in enumerate(several)))
        for requests in several:
            for copy in self.copies:
                copy.asked += requests.ranges

    def clear(self):
        """A new backup begins for some: their bitmaps start again. The device is suspended, or closed."""
        for copy in self.copies:
            exact(self.image, [copy.name], copy.asked, "suspended")
            if self.rng.random() < 0.4:
                bitmaps(self.image)[copy.name].put(0)
                copy.asked = []
                self.times["cleared"] += 1

    def between(self, what):
        dm = self.dm
        if what == "sync":
            self.sync()
            for copy in self.copies:
                exact(self.image, [copy.name], copy.asked, "bitmap_sync")
        elif what in ("suspend", "reload"):
            dm.suspend()
            self.clear()
            if what == "reload":
                dm_ioctl(DM_TABLE_LOAD, dm.name, self.line)
            dm.resume()
        elif what == "close":
            self.close()
            qemu_takes(self.image, self.names)
            self.clear()
            self.open()
        elif what == "drop":
            drop_caches()

    def round(self, n):
        self.requests()
        content = everything(self.disk, self.image.size)
        found = bitmaps(self.image)
        for copy in self.copies:
            covers(self.image, [copy.name], copy.asked, f"round {n}")
            copy.update(found[copy.name], content, f"round {n}")
        what = self.rng.choice(self.WAYS)
        self.times[what] += 1
        self.between(what)


def consumer(bench, kind, seed, rounds):
    """What a backup has is copied by the bitmaps alone, and has to be all of the disk."""
    note(f"SEED={SEED}")
    c = Consumer(bench, kind, random.Random(seed))
    for n in range(rounds):
        c.round(n)
    c.close()
    for copy in c.copies:
        exact(c.image, [copy.name], copy.asked, "at the end")
    qemu_takes(c.image, c.names)
    note(f"{rounds} rounds: {', '.join(f'{what} {n}' for what, n in c.times.items())}")


def on_linear(bench, image):
    """A metadata device whose behaviour can change"""
    image.attach()
    return Lower(bench, "meta", image.meta_loop.path)


def waits(dm):
    return dm.status().keys["mark_waits"]


@test("a part of a bitmap that cannot be read: requests that need it fail, until it can be")
def cannot_read(bench):
    image, names = setup(bench, 64 * KIB, 8 * MIB, (64 * KIB, 4 * KIB), {})
    image.qemu_io("write -q -P 1 0 8M")
    for name in names:
        bitmaps(image)[name].fill(0)
    image.trim()
    lower = on_linear(bench, image)
    dm = image.open("bitmaps", meta=lower.path)
    disk = bench.io(dm)
    lower.bad(bitmaps(image)[names[1]].clusters()[0] & OFFSET_MASK, 64 * KIB)
    for at in (2 * MIB, 2 * MIB + 64 * KIB, 2 * MIB):
        with fails_with(errno.EIO):
            disk.write(at, b"f" * 4096)
        same(disk.read(at, 4096), b"\1" * 4096, at)
    expect(dm.mode() == "rw", f"{dm.status()}")
    lower.good()
    disk.write(2 * MIB, b"c" * 4096)
    covers(image, names, [(2 * MIB, 4096)], "after the error")
    bench.drop(disk)
    bench.drop(dm)
    exact(image, names, [(2 * MIB, 4096)], "at the end")
    qemu_takes(image, names)


@test("a mark whose flush fails: nothing is certain any more, and the mode is fail")
def cannot_flush(bench):
    image, names = setup(bench, 64 * KIB, 8 * MIB, (64 * KIB,), {})
    image.qemu_io("write -q -P 1 0 8M")
    for name in names:
        bitmaps(image)[name].fill(0)
    image.trim()
    lower = on_linear(bench, image)
    dm = image.open("bitmaps", meta=lower.path)
    disk = bench.io(dm)
    disk.write(MIB, b"a" * 4096)
    lower.no_flush()
    with fails_with(errno.EIO):
        disk.write(3 * MIB, b"f" * 4096)
    same(disk.read(3 * MIB, 4096), b"\1" * 4096)
    expect(dm.mode() == "fail", f"{dm.status()}")
    disk.write(MIB, b"b" * 4096)
    lower.good()
    with fails_with(errno.EIO):
        disk.write(4 * MIB, b"f" * 4096)
    bench.drop(disk)
    bench.drop(dm)
    covers(image, names, [(MIB, 4096)], "at the end")
    image.check(leaks=True)


@test("a mark that cannot be written: it is among what is unwritten, also when the device is suspended, until it can be")
def cannot_write(bench):
    image, names = setup(bench, 64 * KIB, 8 * MIB, (64 * KIB, 4 * KIB), {"raw": True})
    lower = on_linear(bench, image)
    dm = image.open("bitmaps", meta=lower.path)
    disk = bench.io(dm)
    disk.write(MIB, b"a" * 4096)
    lower.bad(bitmaps(image)[names[1]].clusters()[0] & OFFSET_MASK, 64 * KIB)
    events = dm.events()
    with fails_with(errno.EIO):
        disk.write(3 * MIB, b"f" * 4096)
    same(disk.read(3 * MIB, 4096), bytes(4096))
    expect(dm.status().unwritten == 1, f"{dm.status()}")
    # It is told when it begins.
    wait_for("an event", 60, lambda: dm.events() > events)
    with fails_with(errno.EIO):
        disk.write(5 * MIB, b"f" * 4096)
    expect(dm.events() == events + 1, f"{dm.events() - events} events")
    dm.suspend()
    expect(dm.status().unwritten == 1, f"suspended: {dm.status()}")
    dm.resume()
    disk.write(MIB, b"b" * 4096)
    with fails_with(errno.EIO):
        disk.write(3 * MIB, b"f" * 4096)
    status = dm.status()
    expect(status.mode == "rw" and status.unwritten == 1, f"resumed: {status}")
    covers(image, names, [(MIB, 4096)], "as long as it cannot be written")
    lower.good()
    wait_for("the mark is written", 60, lambda: not dm.status().unwritten)
    ranges = [(MIB, 4096), (3 * MIB, 4096), (5 * MIB, 4096)]
    covers(image, names, ranges, "it can be written")
    disk.write(3 * MIB, b"c" * 4096)
    bench.drop(disk)
    bench.drop(dm)
    exact(image, names, ranges, "at the end")
    qemu_takes(image, names)


@test("those who wait for marks share them; who must not wait is told", all_cpus=True)
def shared(bench):
    image, names = setup(bench, 64 * KIB, 64 * MIB, (64 * KIB,), {"raw": True})
    lower = on_linear(bench, image)
    dm = image.open("bitmaps", meta=lower.path)
    disk = bench.io(dm)
    disk.write(0, b"a" * 4096)
    lower.slow(writes=1500)
    count = Stat(image.meta_loop.path)
    before = count.writes
    places = random.Random(SEED).sample(range(2, 1000, 3), 40)
    begun = time.monotonic()
    in_parallel(lambda n: disk.write(n * 64 * KIB, b"b" * 4096), *((n,) for n in places))
    took = time.monotonic() - begun
    # The first one's mark, one beside it, and one for all others; and flushes.
    expect(count.writes - before <= 12, f"{count.writes - before} writes for {len(places)} requests")
    note(f"{len(places)} requests: {count.writes - before} writes of metadata, {took:.1f} s")
    view = memoryview(mmap.mmap(-1, 4096))
    try:
        os.pwritev(disk.fd, [view], 1001 * 64 * KIB, 8)                      # RWF_NOWAIT
        raise Failure("a request that must not wait has done something")
    except BlockingIOError:
        pass
    os.pwritev(disk.fd, [view], places[0] * 64 * KIB, 8)
    lower.good()
    covers(image, names, [(n * 64 * KIB, 4096) for n in [0, *places]], "after it")
    expect(not bitmaps(image)[names[0]].content() >> 1001 & 1, "marked for a request that was not made")


@test("sequential writers wait once for 4 MiB at most, and what they do not need is taken back")
def sequential(bench):
    size = 256 * MIB
    image, names = setup(bench, 64 * KIB, size, (64 * KIB,),
                         {"raw": True, "data": bench.add(NullBlk(size, discard=False, memory=False)).path})
    dm = image.open("bitmaps")
    disk = bench.io(dm)
    block = bytes(256 * KIB)
    end = 200 * MIB
    for at in range(0, end, len(block)):
        disk.write(at, block)
    note(f"{waits(dm)} waits for {end // MIB} MiB")
    expect(waits(dm) <= end // (4 * MIB), f"{dm.status()}")
    have = bitmaps(image)[names[0]].content()
    expect(have > (1 << end // (64 * KIB)) - 1, "nothing is marked ahead")
    wait_for("what is not needed is taken back", 60, lambda: dm.status().keys["taken_back"])
    time.sleep(1)
    exact(image, names, [(0, end)], "when it is idle")
    disk.write(end, block)
    exact_from = [(0, end + len(block))]
    bench.drop(disk)
    bench.drop(dm)
    exact(image, names, exact_from, "at the end")


@test("a sequential writer that is slow waits no more often")
def slow_sequential(bench):
    image, _ = setup(bench, 64 * KIB, 64 * MIB, (64 * KIB,),
                     {"raw": True, "data": bench.add(NullBlk(64 * MIB, discard=False, memory=False)).path})
    dm = image.open("bitmaps")
    disk = bench.io(dm)
    # Once it is marked 16 MiB ahead, the next mark comes after more than it takes to be idle.
    for at in range(0, 60 * MIB, 4 * MIB):
        for n in range(16):
            disk.write(at + n * 256 * KIB, bytes(256 * KIB))
        time.sleep(1.2)
    note(f"{waits(dm)} waits for 60 MiB")
    expect(waits(dm) <= 15, f"{dm.status()}")
    wait_for("what is not needed is taken back", 60, lambda: dm.status().keys["taken_back"])


@test("tables that are refused: bitmaps that nobody would keep, or that cannot be kept")
def refused(bench):
    image, names = setup(bench, 64 * KIB, 8 * MIB, (64 * KIB, 4 * KIB), {})
    before = image.hash()

    def none(*features):
        image.attach(extend=False)
        try:
            image.open(*features)
        except Failure:
            image.detach()
            return
        raise Failure(f"{features} is taken")
    image.extend()
    before = image.hash()
    none()
    b = bitmaps(image)[names[1]]
    entry = b.clusters()[0]
    for what, change, back in (
            ("no cluster", lambda: image.set_u64(b.table, 0), lambda: image.set_u64(b.table, entry)),
            ("ones", lambda: image.set_u64(b.table, 1), lambda: image.set_u64(b.table, entry)),
            ("unaligned", lambda: image.set_u64(b.table, entry + 512), lambda: image.set_u64(b.table, entry)),
            ("beyond the end", lambda: image.set_u64(b.table, 1 << 40), lambda: image.set_u64(b.table, entry)),
            ("the other one's", lambda: image.set_u64(b.table, bitmaps(image)[names[0]].clusters()[0]),
             lambda: image.set_u64(b.table, entry)),
            ("the L1 table's", lambda: image.set_u64(b.table, image.get("l1_table_offset")),
             lambda: image.set_u64(b.table, entry)),
            ("an unknown flag", lambda: b.set_flags(AUTO | 8), lambda: b.set_flags(AUTO)),
            ("an unknown type", lambda: image.patch(b.place + 16, b"\2"), lambda: image.patch(b.place + 16, b"\1")),
            ("a table of another size", lambda: image.patch(b.place + 8, b"\0\0\0\2"),
             lambda: image.patch(b.place + 8, b"\0\0\0\1")),
            ("granules of 256", lambda: image.patch(b.place + 17, b"\x08"), lambda: image.patch(b.place + 17, b"\x0c"))):
        change()
        changed = image.hash()
        none("bitmaps")
        expect(image.hash() == changed, f"{what}: the image has been changed")
        back()
    expect(image.hash() == before, "the test is wrong")
    # What does not ask to be kept is nobody's concern.
    b.set_flags(AUTO | IN_USE | 8)
    image.patch(b.place + 16, b"\2")
    dm = image.open("bitmaps")
    bench.drop(dm)
    bitmaps(image)[names[0]].set_flags(0)
    dm = image.open()
    bench.drop(dm)


ROUNDS = int(os.environ.get("ROUNDS", 15))
for _n, _kind in enumerate(KINDS[:7]):
    test(f"a backup by bitmaps is the disk: {words(_kind)}", _kind, SEED + 1000 * _n, ROUNDS, all_cpus=True)(consumer)


if __name__ == "__main__":
    main()
