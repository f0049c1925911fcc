#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Views: what target qcow2-view reads is the disk as it was when the table with the view was
resumed, whatever is written since.

Environment: SEED (printed, to repeat a run), ROUNDS (of readers that race with writers).
"""
import contextlib
import errno
import fcntl
import mmap
import os
import random
import re
import struct
import threading
import time

from bitmaps import covers, record
from qcow2test import (DM_NOFLUSH_FLAG, DM_READONLY_FLAG, DM_TABLE_CLEAR, DM_TABLE_LOAD, DM_TABLE_STATUS, KIB, MIB, Dm,
                       Ext4, Failure, Io, KernelLog, Loop, Lower, Task, dm_ioctl, expect, fails_with, main, note,
                       queue_limit, same, some, test, wait_for)

RWF_NOWAIT = 8
BLKROSET = 0x125D
SEED = int(os.environ.get("SEED", time.time_ns() // 1000 % 1000000))
ROUNDS = int(os.environ.get("ROUNDS", 3))
note(f"SEED={SEED}")

# Cluster size, size, granularity of the view (None: the default), and other options
KINDS = [
    (64 * KIB, 9 * MIB + 512, None, {}),
    (4 * KIB, 5 * MIB + 1536, 4 * KIB, {}),
    (512, 2 * MIB, 16 * KIB, {}),
    (64 * KIB, 9 * MIB + 512, None, {"raw": True}),
    (16 * KIB, 7 * MIB + 3 * KIB, 32 * KIB, {"extended": True}),
    (64 * KIB, 6 * MIB + 512, 4 * KIB, {"backing": True}),
    (4 * KIB, 6 * MIB + 512, None, {"backing": True}),
    (2 * MIB, 13 * MIB, 1 * MIB, {"bitmaps": (64 * KIB, 4 * KIB)}),
    (64 * KIB, 9 * MIB, None, {"bitmaps": (512,), "raw": True}),
]


KINDS_OF_CHANGE = ("write", "write", "write", "zero_range", "zero_out", "punch_hole", "discard", "fua")


def words(kind):
    cluster, size, granularity, options = kind
    return f"clusters of {cluster}, {size} bytes, granularity {granularity or 'as it comes'}" + "".join(
        f", {name}" for name in options)


class Viewed:
    """A device, some of which is data, and a view of it."""

    def __init__(self, bench, size, granularity=None, cow=None, begin=True, **options):
        """cow: path of the device for what is kept, or a function that makes it of a size"""
        self.bench, self.size, self.raw = bench, size, options.get("raw", False)
        self.rng = random.Random(SEED)
        granularities = options.pop("bitmaps", ())
        late_reads, late_kept = options.pop("late_reads", 0), options.pop("late_kept", 0)
        # dm-delay has no write zeroes that unmap.
        self.kinds = [k for k in KINDS_OF_CHANGE if not late_reads or k != "punch_hole"]
        if late_reads:
            below = Lower(bench, "below", bench.add(Loop(bench.file("below", size))).path)
            below.slow(reads=late_reads)
            options["data"] = below.path
        if late_kept:
            cow = lower(bench, "late")
        if options.pop("backing", False):
            options["backing"] = bench.file("backing", size - MIB)
            with open(options["backing"], "wb") as f:
                f.write(self.rng.randbytes(size - MIB))
        self.image = image = bench.image(size, **options)
        self.names = record(image, granularities) if granularities else []
        image.attach()
        if callable(cow):
            self.kept = cow(size)
            self.cow = self.kept.path
            if late_kept:
                self.kept.slow(writes=late_kept)
        else:
            self.cow = cow or bench.add(Loop(bench.file("cow", size))).path
        self.features = ["bitmaps"] if self.names else []
        if image.backing_loop:
            self.features += ["backing_dev", image.backing_loop.path]
        self.plain = self.line()
        self.dm = bench.add(Dm("live", self.plain))
        self.disk = bench.io(self.dm)
        for _ in range(12):
            at = self.rng.randrange(size // 512) * 512
            self.disk.write(at, self.rng.randbytes(min(self.rng.choice((512, 8 * KIB, 200 * KIB)), size - at)))
        self.granularity = granularity or 64 * KIB
        self.features += ["view", self.cow] + (["view_granularity", str(granularity)] if granularity else [])
        self.viewed = self.line()
        if begin:
            self.begin()

    def line(self):
        image = self.image
        return image.line(image.meta_loop.path, image.data_loop.path, *self.features)

    def begin(self):
        """The view, and what it has to show"""
        self.disk.fsync()
        self.was = self.disk.read(0, self.size)
        self.dm.load(self.viewed)
        self.view = self.bench.add(Dm("view", f"0 {self.size // 512} qcow2-view {self.dm.path} {self.cow}",
                                      readonly=True))
        self.reader = self.bench.add(Io(self.view.path, readonly=True))

    def check(self, when):
        same(self.reader.read(0, self.size), self.was, what=f"{when}: view")

    def state(self):
        return self.dm.status().view

    def over(self, why):
        """The view is over: nothing of it is read any more, and all else goes on."""
        wait_for(f"the view is over: {why}", 60, lambda: self.state() == why)
        self.gone(why)
        for at in (0, 64 * KIB, self.size // 1024 * 512, self.size - 512):
            self.disk.write(at, b"w" * 512)
            same(self.disk.read(at, 512), b"w" * 512, at)
        self.disk.discard(0, self.size)
        self.disk.fsync()
        expect(self.dm.mode() == "rw", f"{self.dm.status()}")
        self.gone(why)

    def gone(self, why):
        (target, line), = dm_ioctl(DM_TABLE_STATUS, self.view.name).targets
        expect(target == "qcow2-view" and line.split()[-1] == why, f"{target} {line}")
        for at in (0, self.size // 1024 * 512, self.size - 512):
            with fails_with(errno.EIO):
                self.reader.read(at, 512)

    def change(self, rng, disk):
        """One request that changes something; its range"""
        size = self.size
        length = rng.choice((512, 4096, 64 * KIB, rng.randrange(1, 300) * 512))
        at = rng.randrange(size // 512) * 512
        if rng.random() < 0.5:
            at -= at % 4096
        length = min(length, size - at)
        kind = rng.choice(self.kinds)
        if kind in ("write", "fua"):
            disk.write(at, rng.randbytes(length))
            if kind == "fua":
                disk.fsync()
        else:
            try:
                getattr(disk, kind)(at, length)
            except OSError as e:
                # Newer kernels' loop devices on tmpfs withdraw write zeroes; of a raw image nobody else has them.
                if kind != "punch_hole" or not self.raw or e.errno != errno.EOPNOTSUPP:
                    raise
                self.kinds = [k for k in self.kinds if k != "punch_hole"]
                disk.zero_out(at, length)
        return at, length


def shown(bench, cluster, size, granularity, options):
    v = Viewed(bench, size, granularity, cluster=cluster, **options)
    v.check("at once")
    ranges = []
    for n in range(60):
        ranges.append(v.change(v.rng, v.disk))
        if n % 6 == 0:
            at = v.rng.randrange(size // 512) * 512
            length = min(size - at, v.rng.choice((512, 8 * KIB, 700 * KIB)))
            same(v.reader.read(at, length), v.was[at:at + length], at, "view")
        if n % 20 == 10:
            v.dm.cycle()
    v.check("at the end")
    status = v.dm.status()
    expect(status.view == "valid" and status.view_kept, f"{status}")
    now = v.disk.read(0, size)
    v.disk.discard(0, size)
    v.disk.zero_out(0, size)
    v.check("all is discarded")
    status = v.dm.status()
    granules = -(-size // v.granularity)
    expect(status.view_kept + status.view_zero == granules, f"{granules} granules: {status}")
    expect(now != v.was, "nothing has changed")
    if v.names:
        covers(v.image, v.names, ranges, "beside a view")


for _kind in some(KINDS, 4):
    test(f"a view shows what was: {words(_kind)}", *_kind)(shown)


def raced(bench, cluster, size, granularity, options):
    v = Viewed(bench, size, granularity, begin=False, cluster=cluster, **options)
    for n in range(ROUNDS):
        if n:
            # The device for what is kept has old content now, and that is in nobody's way.
            bench.drop(v.reader)
            bench.drop(v.view)
            v.dm.load(v.plain)
        v.begin()
        stop = threading.Event()
        count = [0, 0]

        def write(seed):
            rng = random.Random(seed)
            with contextlib.closing(Io(v.dm.path)) as disk:
                while not stop.is_set():
                    v.change(rng, disk)
                    count[0] += 1

        def read(seed):
            rng = random.Random(seed)
            with contextlib.closing(Io(v.view.path, readonly=True)) as disk:
                while not stop.is_set():
                    at = rng.randrange(size // 512) * 512
                    length = min(size - at, rng.choice((512, 4 * KIB, 64 * KIB, 300 * KIB)))
                    same(disk.read(at, length), v.was[at:at + length], at, f"view in round {n}")
                    count[1] += 1

        tasks = [Task(write, v.rng.random()) for _ in range(3)] + [Task(read, v.rng.random()) for _ in range(2)]
        try:
            wait_for("requests", 60, lambda: min(count) > 60 or any(t.fault for t in tasks))
            v.dm.cycle()
            before = list(count)
            wait_for("requests", 60, lambda: min(a - b for a, b in zip(count, before)) > 30 or
                     any(t.fault for t in tasks))
        finally:
            stop.set()
            for task in tasks:
                task.join()
        for task in tasks:
            task.finish()
        v.check(f"round {n}")
        expect(v.state() == "valid", f"{v.dm.status()}")
    bench.drop(v.reader)
    bench.drop(v.view)
    bench.drop(v.disk)
    bench.drop(v.dm)
    v.image.check()


for _kind in some(KINDS, 4):
    test(f"readers of a view race with writers: {words(_kind)}", *_kind, all_cpus=True)(raced)


SIZE = 8 * MIB
ANY = 64 * KIB


def lower(bench, name="lower"):
    """Makes a device that can fail, and stand still."""
    return lambda size: Lower(bench, name, bench.add(Loop(bench.file(name, size))).path)


@test("a table with the same view goes on with it, suspended or reloaded")
def goes_on(bench):
    v = Viewed(bench, SIZE, bitmaps=(ANY,))
    v.change(v.rng, v.disk)
    kept = v.dm.status().view_kept
    for line in (v.viewed, v.viewed.replace(" 3 bitmaps", " 5 cache_limit 100000 bitmaps")):
        v.dm.load(line)
        expect(v.state() == "valid" and v.dm.status().view_kept == kept, f"{v.dm.status()}")
        v.change(v.rng, v.disk)
        v.check("another table")
        kept = v.dm.status().view_kept
    v.dm.suspend()
    reader = Task(v.check, "suspended and resumed")
    time.sleep(0.3)
    v.dm.resume()
    reader.finish()
    v.dm.suspend(DM_NOFLUSH_FLAG)
    reader = Task(v.check, "suspended without a flush")
    writer = Task(v.disk.write, 0, b"x" * 4096)
    time.sleep(0.3)
    v.dm.resume()
    reader.finish()
    writer.finish()
    v.check("resumed")


@test("a view ends: a table without it, a message, another device, another granularity")
def ends(bench):
    v = Viewed(bench, SIZE)
    cow = bench.add(Loop(bench.file("cow2", SIZE))).path
    for n, (what, end) in enumerate((
            ("a table without it", lambda: v.dm.load(v.plain)),
            ("a message", lambda: v.dm.message("view_end")),
            ("another device", lambda: v.dm.load(v.viewed.replace(v.cow, cow))),
            ("another granularity", lambda: v.dm.load(
                v.viewed.replace(" 2 view", " 4 view_granularity 4096 view"))))):
        if n:
            bench.drop(v.reader)
            bench.drop(v.view)
            v.dm.load(v.plain)
            v.begin()
        v.change(v.rng, v.disk)
        v.check(what)
        events = v.view.events()
        end()
        v.gone("ended")
        v.disk.write(0, b"e" * 4096)
        v.gone("ended")
        expect(v.view.events() > events, f"{what}: no event")


@test("another target in the place of the device: its content is not shown")
def replaced(bench):
    v = Viewed(bench, SIZE)
    v.change(v.rng, v.disk)
    zero = f"0 {SIZE // 512} zero"
    v.dm.suspend()
    stop = threading.Event()

    def read():
        with contextlib.closing(Io(v.view.path, readonly=True)) as disk:
            while not stop.is_set():
                for at in range(0, SIZE, 512 * KIB):
                    try:
                        same(disk.read(at, 4096), v.was[at:at + 4096], at, "view")
                    except OSError as e:
                        expect(e.errno == errno.EIO, f"{e}")

    reader = Task(read)
    time.sleep(0.2)
    v.dm.load(zero)
    time.sleep(0.2)
    stop.set()
    reader.finish()
    v.gone("ended")
    # Nor is it when the image comes back.
    v.dm.load(v.viewed)
    v.gone("ended")
    expect(v.state() == "valid", f"{v.dm.status()}")


def changed_everywhere(v):
    """Something of every granule"""
    for at in range(0, v.size, v.granularity):
        v.disk.write(at, b"c" * 512)


@test("the device for what is kept fails: the view is over, and nothing else")
def cow_fails(bench):
    for what in ("writes", "all", "later"):
        v = Viewed(bench, SIZE, cow=lower(bench, what), bitmaps=(ANY,) if what == "all" else ())
        if what == "later":
            changed_everywhere(v)
            v.check(what)
            v.kept.bad()
            with fails_with(errno.EIO):
                v.reader.read(0, SIZE)
            # That is no reason to end it.
            expect(v.state() == "valid", f"{v.dm.status()}")
            v.kept.good()
            v.check(what)
        else:
            events = v.dm.events()
            (v.kept.no_writes if what == "writes" else v.kept.bad)()
            changed_everywhere(v)
            v.over("cow_device")
            expect(v.dm.events() > events, f"{what}: no event")
            v.kept.good()
            v.gone("cow_device")
        while bench.things:
            bench.drop(bench.things[-1])


@test("no room for what is kept: the view is over, and nothing else")
def cow_full(bench):
    fs = bench.add(Ext4(bench, 16 * MIB, "-O", "^has_journal"))

    def make(size):
        path = f"{fs.path}/cow"
        with open(path, "wb") as f:
            f.truncate(size)
        return bench.add(Loop(path, direct=True))

    v = Viewed(bench, SIZE, cow=make)
    v.disk.write(0, b"f" * 4096)
    v.check("there is room")
    fs.fill()
    changed_everywhere(v)
    v.over("no_space")


@test("what is to be kept cannot be read: the view is over, and the request goes on")
def cannot_read(bench):
    data = Lower(bench, "data", bench.add(Loop(bench.file("below", SIZE))).path)
    v = Viewed(bench, SIZE, begin=False, data=data.path)
    v.disk.write(MIB, b"d" * MIB)
    v.begin()
    data.bad(MIB, 4096)
    v.disk.write(MIB + 4096, b"n" * 4096)
    wait_for("the view is over", 60, lambda: v.state() == "device")
    same(v.disk.read(MIB + 4096, 4096), b"n" * 4096)
    data.good()
    v.over("device")


@test("a slow device for what is kept holds up what has to be kept, and nothing else")
def cow_slow(bench):
    v = Viewed(bench, SIZE, cow=lower(bench), begin=False)
    for at in (0, MIB):
        v.disk.write(at, b"0" * ANY)
    v.begin()
    v.disk.write(0, b"1" * 4096)
    v.kept.stop()
    waits = Task(v.disk.write, MIB, b"2" * 4096)
    # What is kept, what was zeros, and reads go on.
    v.disk.write(8 * KIB, b"3" * 4096)
    same(v.disk.read(MIB, 4096), v.was[MIB:MIB + 4096])
    time.sleep(0.5)
    expect(waits.is_alive(), "a write did not wait")
    same(v.disk.read(MIB, 4096), v.was[MIB:MIB + 4096])
    v.kept.go()
    waits.finish()
    v.check("slow")


@test("a request to many granules is not held up by the view's end, nor by a suspend")
def many(bench):
    v = Viewed(bench, SIZE, 4 * KIB, cow=lower(bench), begin=False, cluster=4 * KIB)
    for at in range(0, SIZE, MIB):
        v.disk.write(at, v.rng.randbytes(MIB))
    v.begin()
    v.kept.slow(writes=20)
    discard = Task(v.disk.discard, 0, SIZE)
    wait_for("something is kept", 60, lambda: v.dm.status().view_kept > 4)
    v.dm.cycle()
    v.check("suspended in a discard")
    discard.finish()
    v.check("all is discarded")
    bench.drop(v.reader)
    bench.drop(v.view)
    v.kept.good()
    v.dm.load(v.plain)
    for at in range(0, SIZE, MIB):
        v.disk.write(at, v.rng.randbytes(MIB))
    v.begin()
    v.kept.slow(writes=20)
    discard = Task(v.disk.discard, 0, SIZE)
    wait_for("something is kept", 60, lambda: v.dm.status().view_kept > 4)
    v.dm.message("view_end")
    discard.finish()
    expect(v.dm.status().view_kept < SIZE // (8 * KIB), f"all of it has been kept: {v.dm.status()}")
    v.over("ended")


@test("granules that nobody wants are not kept, and cannot be read")
def skipped(bench):
    v = Viewed(bench, 9 * MIB + 512)
    granules = range(-(-v.size // ANY))
    # Whole granules only
    for start, length in ((ANY - 512, 2 * ANY), (MIB, MIB), (v.size - ANY - 512, ANY + 512)):
        v.dm.message(f"view_skip {start // 512} {length // 512}")
    skip = {1} | set(range(16, 32)) | {granules[-1], granules[-2]}
    for n in granules:
        at, length = n * ANY, min(ANY, v.size - n * ANY)
        if n in skip:
            with fails_with(errno.EIO):
                v.reader.read(at, 512)
        else:
            same(v.reader.read(at, length), v.was[at:at + length], at)
    changed_everywhere(v)
    for n in granules:
        at, length = n * ANY, min(ANY, v.size - n * ANY)
        if n in skip:
            with fails_with(errno.EIO):
                v.reader.read(at, 512)
        else:
            same(v.reader.read(at, length), v.was[at:at + length], at)
    status = v.dm.status()
    expect(status.view_kept + status.view_zero == len(granules) - len(skip), f"{status}")
    for text in ("view_skip", "view_skip 0", "view_skip 0 0", "view_skip x 1", f"view_skip 0 {v.size // 512 + 1}",
                 f"view_skip {v.size // 512} 1", "view_end now", "view"):
        with fails_with(errno.EINVAL):
            v.dm.message(text)
    v.dm.load(v.plain)
    for text in ("view_skip 0 1", "view_end"):
        with fails_with(errno.EINVAL):
            v.dm.message(text)


@test("tables that are refused")
def refused(bench):
    v = Viewed(bench, SIZE, begin=False)
    small = bench.add(Loop(bench.file("small", SIZE - 512))).path
    readonly = bench.add(Loop(bench.file("ro", SIZE), readonly=True)).path
    good = v.viewed
    image = v.image
    for change, text in (
            (lambda t: t.replace(v.cow, small), "smaller than the target"),
            (lambda t: t.replace(v.cow, readonly), "Cannot open the view's device|read-only"),
            (lambda t: t.replace(v.cow, image.data_loop.path), "one of the image"),
            (lambda t: t.replace(v.cow, image.meta_loop.path), "one of the image"),
            (lambda t: t.replace(v.cow, "/dev/nothing"), "Cannot open the view's device"),
            (lambda t: t.replace(" 2 view", " 3 read_only view"), "needs a table that may write"),
            (lambda t: t.replace(" 2 view", " 1 view").replace(" " + v.cow, ""), "lacks its value"),
            (lambda t: t.replace(" 2 view", f" 4 view {v.cow} view"), "given twice"),
            (lambda t: t.replace(" 2 view", " 4 view_granularity 2048 view"), "no power of 2"),
            (lambda t: t.replace(" 2 view", " 4 view_granularity 2097152 view"), "no power of 2"),
            (lambda t: t.replace(" 2 view", " 4 view_granularity 65537 view"), "no power of 2"),
            (lambda t: t.split(" 2 view")[0] + " 2 view_granularity 65536", "view_granularity needs view")):
        line = change(good)
        expect(line != good, f"{text}: the line is as it was")
        try:
            Dm("refused", line).close()
        except Failure as e:
            expect(any(t in str(e) for t in text.split("|")), f"{line}: {e}")
        else:
            expect(False, f"{line}: it is taken")
    v.begin()
    n = SIZE // 512
    for line, options, text in (
            (f"0 {n} qcow2-view {v.dm.path}", {}, "Wrong number of arguments"),
            (f"0 {n} qcow2-view {v.dm.path} {v.cow} 1", {}, "Wrong number of arguments"),
            (f"0 {n} qcow2-view {v.dm.path} {v.cow}", {"readonly": False}, "read-only"),
            (f"0 {n} qcow2-view {v.dm.path} {small}", {}, "no view there"),
            (f"0 {n} qcow2-view {v.view.path} {v.cow}", {}, "no view there"),
            (f"0 {n - 1} qcow2-view {v.dm.path} {v.cow}", {}, "not as long as the device"),
            (f"0 8 linear {v.dm.path} 0\n8 {n - 8} qcow2-view {v.dm.path} {v.cow}", {}, "not as long as the device")):
        try:
            Dm("refused", line, **{"readonly": True, **options}).close()
        except Failure as e:
            expect(text in str(e), f"{line}: {e}")
        else:
            expect(False, f"{line}: it is taken")
    with fails_with(errno.EBUSY):
        v.dm.remove()
    with contextlib.closing(Io(v.view.path)) as disk, fails_with(errno.EPERM):
        disk.write(0, bytes(4096))
    v.check("at the end")


class Refusals:
    """Tables of target qcow2-view that are not taken, each with its reason in the kernel's log"""

    def __init__(self, bench):
        self.log = bench.add(KernelLog())
        self.dm = bench.add(Dm("refused"))

    def load(self, table, flags):
        """None, or the errno and what the kernel says to it"""
        try:
            dm_ioctl(DM_TABLE_LOAD, self.dm.name, table, flags)
            dm_ioctl(DM_TABLE_CLEAR, self.dm.name)
            return None
        except OSError as e:
            lines = [re.sub(r".*: qcow2-view: ", "", text) for text in self.log.lines(r"table: .*qcow2-view: ")]
            return e.errno, lines

    def refused(self, text, table, flags=DM_READONLY_FLAG):
        got = self.load(table, flags)
        expect(got, f"{table}: it is taken")
        expect(len(got[1]) == 1 and text in got[1][0], f"{table}: no '{text}': {got}")

    def taken(self, table):
        got = self.load(table, DM_READONLY_FLAG)
        expect(not got, f"{table}: {got}")


@test("a view's own table: what is refused, each with its reason")
def view_table(bench):
    v = Viewed(bench, SIZE)
    r = Refusals(bench)
    n = SIZE // 512
    good = f"{v.dm.path} {v.cow}"
    r.taken(f"0 {n} qcow2-view {good}")
    for words in ("", v.dm.path, f"{good} 0", f"{good} {v.cow}"):
        r.refused("Wrong number of arguments", f"0 {n} qcow2-view {words}")
    r.refused("A view is read-only", f"0 {n} qcow2-view {good}", 0)
    for device in ("/dev/nothing", "0:0", "nonsense"):
        r.refused("Cannot open the device", f"0 {n} qcow2-view {device} {v.cow}")
        r.refused("Cannot open the view's device", f"0 {n} qcow2-view {v.dm.path} {device}")
    for device, cow in ((v.cow, v.dm.path), (v.dm.path, v.image.data_loop.path), (v.image.data_loop.path, v.cow),
                        (v.cow, v.cow), (v.dm.path, v.dm.path), (v.view.path, v.cow)):
        r.refused("no view there", f"0 {n} qcow2-view {device} {cow}")
    for length in (1, 8, n - 1, n + 1, 2 * n):
        r.refused("not as long as the device", f"0 {length} qcow2-view {good}")
    r.refused("not as long as the device", f"0 8 zero\n8 {n} qcow2-view {good}")
    v.check("refused")
    # It has had one, and has it no more, or not yet.
    v.dm.message("view_end")
    r.refused("no view there", f"0 {n} qcow2-view {good}")
    v.dm.load(v.plain)
    r.refused("no view there", f"0 {n} qcow2-view {good}")
    dm_ioctl(DM_TABLE_LOAD, v.dm.name, v.viewed)
    r.refused("no view there", f"0 {n} qcow2-view {good}")
    v.dm.cycle()
    r.taken(f"0 {n} qcow2-view {good}")


@test("nothing writes to a view")
def read_only(bench):
    v = Viewed(bench, SIZE)
    v.change(v.rng, v.disk)
    with open(v.view.path, "rb") as f:
        # What stays so is the mapped device's own.
        fcntl.ioctl(f, BLKROSET, struct.pack("i", 0))
    with contextlib.closing(Io(v.view.path)) as disk:
        for at in (0, MIB, SIZE - 4096):
            with fails_with(errno.EPERM):
                disk.write(at, b"x" * 4096)
            for kind in ("discard", "zero_out", "zero_range", "punch_hole"):
                with fails_with(errno.EPERM, errno.EOPNOTSUPP):
                    getattr(disk, kind)(at, 4096)
    with fails_with(errno.EINVAL):
        dm_ioctl(DM_TABLE_LOAD, v.view.name, v.view.line)
    v.view.cycle()
    v.check("at the end")


@test("with a view the device has the limits that it had, and its discards go on")
def limits(bench):
    v = Viewed(bench, SIZE, begin=False)
    names = ("logical_block_size", "physical_block_size", "minimum_io_size", "optimal_io_size", "discard_granularity",
             "discard_max_bytes", "write_zeroes_max_bytes", "max_segments", "max_sectors_kb", "dma_alignment",
             "write_cache")

    def get():
        found = []
        for name in names:
            try:
                found.append(queue_limit(v.dm.path, name))
            except (OSError, ValueError):
                found.append(None)
        return found

    before = get()
    v.begin()
    expect(get() == before, f"{dict(zip(names, before))}, now {get()}")
    v.disk.discard(0, SIZE)
    same(v.disk.read(0, SIZE), bytes(SIZE))
    v.check("discarded")
    # Who is not to wait: what is kept can be written, what is not cannot.
    page = mmap.mmap(-1, 4096)
    v.disk.write(0, b"d" * ANY)
    with memoryview(page) as m:
        expect(os.pwritev(v.disk.fd, [m], 0, RWF_NOWAIT) == 4096, "a write to what is kept has waited")
        bench.drop(v.reader)
        bench.drop(v.view)
        v.dm.load(v.plain)
        v.disk.write(0, b"a" * 2 * ANY)
        v.begin()
        with fails_with(errno.EAGAIN):
            os.pwritev(v.disk.fd, [m], 0, RWF_NOWAIT)
        # The view makes nobody wait who would not have to below it.
        v.reader.read(0, 4096)
        expect(os.preadv(v.reader.fd, [m], 0, RWF_NOWAIT) == 4096, "a read of the view has waited")
        # What can be kept without waiting for anything need not have been kept: if bitmaps do not come first.
        v.disk.write(0, b"b" * 4096)
        kept = v.dm.status().view_kept
        for at in (ANY, ANY + 4096):
            expect(os.pwritev(v.disk.fd, [m], at, RWF_NOWAIT) == 4096, "a write to what is not kept has waited")
        expect(v.dm.status().view_kept == kept + 1, f"{v.dm.status()}, {kept} were kept")
    page.close()
    v.check("at the end")


@test("devices go in any order, and often")
def any_order(bench):
    v = Viewed(bench, SIZE, bitmaps=(ANY,))
    for n in range(20):
        v.change(v.rng, v.disk)
        v.check(f"round {n}")
        bench.drop(v.reader)
        if n % 2:
            v.dm.load(v.plain)
        bench.drop(v.view)
        if not n % 2:
            if n % 4:
                v.dm.message("view_end")
            v.dm.load(v.plain)
        v.begin()
    expect(v.state() == "valid", f"{v.dm.status()}")


if __name__ == "__main__":
    main()
