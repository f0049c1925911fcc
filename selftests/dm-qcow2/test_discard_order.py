#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Discards on devices that can stand still, or fail: nothing is passed down before its entry
is zero on disk, what is written again meanwhile keeps its data, and races.
"""
import errno
import itertools
import threading
import time

from qcow2test import KIB, MIB, Lower, Stat, Task, Units, blocks, expect, fails_with, main, same, some, test, wait_for

CLUSTER = 64 * KIB
# Longer than the timer of the commit, and than a pass-down after it
LATER = 3


class Setup:
    def __init__(self, bench, size=16 * MIB, **options):
        self.bench = bench
        image = self.image = bench.image(size, **options)
        image.arrange(lambda n: ("data", "data", "zero", "unallocated")[n % 4])
        self.model = Units(image)
        image.attach()
        self.meta = Lower(bench, "meta", image.meta_loop.path)
        self.data = Lower(bench, "data", image.data_loop.path)
        self.dm = image.open(meta=self.meta.path, data=self.data.path)
        self.disk = bench.io(self.dm)
        self.unit = image.unit
        # Into the cache: the states, and what the first change has to read.
        self.model.check(self.disk)
        last = self.model.size // self.unit - 4
        self.disk.discard(last * self.unit, self.unit)
        self.model.discard(last * self.unit, self.unit)
        self.disk.fsync()
        wait_for("the pass-down", 30, lambda: not self.poison_there(last))
        self.tasks = []

    def start(self, function, *args):
        """In a thread of its own: it will wait for a device."""
        self.tasks.append(Task(function, *args))
        return self.tasks[-1]

    def join(self):
        for task in self.tasks:
            task.finish(60)
        self.tasks = []

    def durable(self, offset, length, old=None):
        """What is read now must be so for good. old: it may also be the one or the
        other of these in each sector."""
        first = self.disk.read(offset, length)
        if old:
            for at in range(0, length, 512):
                expect(first[at:at + 512] in [o[at:at + 512] for o in old],
                       f"neither old nor new content at {offset + at:#x}: {first[at:at + 8].hex()}")
        self.disk.fsync()
        time.sleep(0.5)
        same(self.disk.read(offset, length), first, offset, "after a flush and a pause: content")
        self.dm.cycle()
        same(self.disk.read(offset, length), first, offset, "after suspend and resume: content")
        self.model.data[offset:offset + length] = first
        return first

    def finish(self):
        self.model.check(self.disk)
        self.bench.judge(self.disk, self.dm, self.image, self.model)

    def poison_there(self, *units):
        """The data file still has the old bytes of these."""
        with open(self.image.data, "rb") as f:
            for n in units:
                f.seek(n * self.unit)
                if f.read(self.unit) == bytes(self.unit):
                    return False
        return True


@test("order: nothing is passed down before the entry is zero on disk")
def order(bench):
    s = Setup(bench)
    used = blocks(s.image.data)
    stat = Stat(s.data.path)
    s.meta.stop()
    s.disk.discard(0, 8 * MIB)
    s.model.discard(0, 8 * MIB)
    s.model.check(s.disk)
    # The timer's commit, and a flush, try.
    flush = s.start(s.disk.fsync)
    time.sleep(LATER)
    expect(flush.is_alive(), "a flush was acknowledged without the metadata device")
    expect(s.image.state(0) == "data", "the metadata device does not stand still")
    expect(not stat.discards, "a discard reached the data device before the metadata device")
    expect(blocks(s.image.data) == used, "the data file has lost blocks already")
    s.model.check(s.disk)
    s.meta.go()
    s.join()
    wait_for("the discard is passed down", 30, lambda: stat.discards)
    expect(s.image.state(0) == s.image.state(s.unit) == "zero", "not on disk, but discarded")
    s.finish()


@test("order: a metadata device that fails, and nothing is passed down")
def order_fail(bench):
    s = Setup(bench)
    used = blocks(s.image.data)
    stat = Stat(s.data.path)
    s.meta.no_writes()
    s.disk.discard(0, 8 * MIB)
    with fails_with(errno.EIO):
        s.disk.fsync()
    expect(s.dm.mode() == "fail", f"{s.dm.status()}")
    same(s.disk.read(0, MIB), bytes(MIB))
    s.meta.good()
    bench.drop(s.disk)
    bench.drop(s.dm)
    expect(not stat.discards and blocks(s.image.data) == used, "data was discarded that the image still names")
    # As after a power cut: the discard is undone, which it may be.
    s.dm = s.image.open(meta=s.meta.path, data=s.data.path)
    s.disk = bench.io(s.dm)
    s.finish()


@test("a pass-down that fails is no fault of the device's")
def passdown_error(bench):
    s = Setup(bench)
    s.data.bad(4 * s.unit, s.unit)
    s.disk.discard(0, 8 * MIB)
    s.model.discard(0, 8 * MIB)
    s.disk.fsync()
    time.sleep(1)
    expect(s.dm.mode() == "rw", f"{s.dm.status()}")
    s.model.check(s.disk)
    s.data.good()
    s.disk.write(4 * s.unit + 512, b"n" * 512)
    s.model.write(4 * s.unit + 512, b"n" * 512)
    s.finish()


def cancel(bench, how, part):
    """Discarded, and written again before the commit (or while it is under way)."""
    s = Setup(bench)
    unit = s.unit
    for n in (0, 1, 5):
        s.disk.discard(n * unit, unit)
        s.model.discard(n * unit, unit)
    if how == "in the commit":
        s.meta.stop()
        flush = s.start(s.disk.fsync)
        time.sleep(0.5)
        expect(flush.is_alive(), "the commit is over already")
    elif how == "after a hung commit":
        # The timer's, which may have begun before the discards.
        s.meta.stop()
        time.sleep(LATER)
    for n in (0, 1):
        offset, length = (n * unit + 1024, 4096) if part else (n * unit, unit)
        s.disk.write(offset, b"c" * length)
        s.model.write(offset, b"c" * length)
    s.model.check(s.disk, 0, 6 * unit)
    if how != "at once":
        s.meta.go()
    s.join()
    s.disk.fsync()
    s.model.check(s.disk, 0, 6 * unit)
    wait_for("the other discard is passed down", 30, lambda: not s.poison_there(5))
    time.sleep(0.5)
    s.model.check(s.disk, 0, 6 * unit)
    s.dm.cycle()
    s.finish()


for _how, _part in some(itertools.product(("at once", "in the commit", "after a hung commit"), (True, False)), 4):
    test(f"a {'partial' if _part else 'whole'} write after the discard, {_how}, keeps its data", _how, _part)(cancel)


def first_write_race(bench, state, part, operation):
    """A discard, or write zeroes, of a unit whose first write is in flight."""
    s = Setup(bench)
    unit = s.unit
    n = {"zero": 2, "unallocated": 3}[state]
    offset, length = (n * unit + 1024, 4096) if part else (n * unit, unit)
    s.data.stop()
    s.start(s.disk.write, offset, b"r" * length)
    time.sleep(0.3)
    # Across it, with others around that are not busy
    s.start(getattr(s.disk, operation), (n - 2) * unit + 512, 4 * unit)
    time.sleep(0.3)
    # A read of the busy unit is answered.
    same(s.disk.read(n * unit, unit), bytes(unit), n * unit, "busy unit")
    s.data.go()
    s.join()
    getattr(s.model, operation)((n - 2) * unit + 512, 4 * unit)
    new = bytearray(unit)
    new[offset % unit:offset % unit + length] = b"r" * length
    s.durable(n * unit, unit, (bytes(unit), bytes(new)))
    # What is left of it can be written again.
    s.disk.write(n * unit + 8192, b"s" * 512)
    s.model.write(n * unit + 8192, b"s" * 512)
    s.durable((n - 2) * unit, 6 * unit)
    s.finish()


for _operation, (_state, _part) in some(itertools.product(("discard", "punch_hole", "zero_out"), (
        ("zero", True), ("unallocated", False), ("unallocated", True))), 5):
    test(f"race: {_operation} of a {_state} unit while it is first written {'in part' if _part else 'as a whole'}",
         _state, _part, _operation, all_cpus=True)(first_write_race)


@test("race: discard of data while it is overwritten and read", all_cpus=True)
def overwrite_race(bench):
    s = Setup(bench)
    unit = s.unit
    old = s.model.read(0, 2 * unit)
    s.data.stop()
    s.start(s.disk.write, 4096, b"o" * 4096)
    s.start(s.disk.read, 0, 2 * unit)
    time.sleep(0.3)
    s.start(s.disk.discard, 0, 2 * unit)
    time.sleep(0.3)
    s.data.go()
    s.join()
    new = bytearray(old)
    new[4096:8192] = b"o" * 4096
    # The discard is over: old content must not be there any more.
    s.model.discard(0, 2 * unit)
    mixed = bytearray(2 * unit)
    mixed[4096:8192] = b"o" * 4096
    s.durable(0, 2 * unit, (bytes(2 * unit), bytes(mixed)))
    s.disk.write(8192, b"q" * 512)
    s.model.write(8192, b"q" * 512)
    s.model.states[0] = "data"
    s.durable(0, 2 * unit)
    s.finish()


@test("race: reads of what is discarded, again and again", all_cpus=True)
def read_race(bench):
    s = Setup(bench)
    unit = s.unit
    stop = threading.Event()

    def reader():
        while not stop.is_set():
            got = s.disk.read(0, 2 * unit)
            for at in range(0, 2 * unit, 4096):
                expect(got[at:at + 4096] in (bytes(4096), b"R" * 4096), f"old content at {at:#x}")

    s.disk.write(0, b"R" * 2 * unit)
    for _ in range(2):
        s.start(reader)
    for n in range(60):
        s.disk.discard(0, 2 * unit)
        if n % 4 == 0:
            s.disk.fsync()
        if n % 8 == 5:
            s.dm.cycle()
        same(s.disk.read(0, 2 * unit), bytes(2 * unit), 0, "after the discard: content")
        s.disk.write(0, b"R" * 2 * unit)
        same(s.disk.read(0, 2 * unit), b"R" * 2 * unit, 0, "after the write: content")
    stop.set()
    s.join()
    s.model.write(0, b"R" * 2 * unit)
    s.finish()


@test("race: a discard while a commit is under way", all_cpus=True)
def commit_race(bench):
    s = Setup(bench)
    unit = s.unit
    # Something for the commit, in the same table
    s.disk.write(2 * unit, b"k" * unit)
    s.model.write(2 * unit, b"k" * unit)
    s.meta.stop()
    flush = s.start(s.disk.fsync)
    time.sleep(0.5)
    # A unit of that commit, and one that is not.
    for n in (2, 4):
        s.disk.discard(n * unit, unit)
        s.model.discard(n * unit, unit)
    s.model.check(s.disk)
    expect(flush.is_alive(), "the commit is over already")
    expect(s.poison_there(4), "passed down before it is on disk")
    s.meta.go()
    s.join()
    s.disk.fsync()
    s.model.check_states(s.image)
    wait_for("the discards are passed down", 30, lambda: not s.poison_there(2) and not s.poison_there(4))
    s.finish()


@test("a failed device takes no discards")
def refused(bench):
    s = Setup(bench)
    s.meta.no_writes()
    s.disk.discard(0, s.unit)
    with fails_with(errno.EIO):
        s.disk.fsync()
    # The others would be made overwrites by the kernel, and these still work.
    for name in ("discard", "punch_hole"):
        with fails_with(errno.EIO):
            getattr(s.disk, name)(4 * s.unit, s.unit)
    same(s.disk.read(4 * s.unit, s.unit), s.model.read(4 * s.unit, s.unit), 4 * s.unit)
    s.meta.good()


if __name__ == "__main__":
    main()
