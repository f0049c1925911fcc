#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Failing devices: what fails with them, and what must not.

Both devices lie on linear targets that are replaced, while in use, by dm-flakey
or dm-error.
"""
import errno
import os
import subprocess
import threading

from qcow2test import (DM_TABLE_CLEAR, DM_TABLE_LOAD, KIB, MIB, Dm, Failure, KernelLog, Lower, Stat, dm_ioctl,
                       expect, fails_with, main, run, same, test, wait_for)

SIZE = 1536 * MIB       # three L2 tables
COVER = 512 * MIB
CLUSTER = 64 * KIB


class Setup:
    def __init__(self, bench, size=SIZE, **options):
        self.bench = bench
        image = self.image = bench.image(size, **options)
        image.poison((0, 4 * MIB), (512 * MIB, MIB))
        self.model = bench.model(size)
        image.attach()
        self.meta = Lower(bench, "meta", image.meta_loop.path)
        self.data = Lower(bench, "data", image.data_loop.path)
        self.backing = None
        if image.backing_loop:
            self.backing = Lower(bench, "backing", image.backing_loop.path)
        self.dm = image.open(meta=self.meta.path, data=self.data.path,
                             backing=self.backing and self.backing.path)
        self.disk = bench.io(self.dm)
        self.sync = None
        # Something that is durable.
        self.write(0, 2 * CLUSTER)
        self.disk.fsync()

    def write(self, offset, length, byte=b"a"):
        self.disk.write(offset, byte * length)
        self.model.write(offset, byte * length)

    def same(self, *offsets, length=CLUSTER):
        for at in offsets:
            same(self.disk.read(at, length), self.model.read(at, length), at)

    def fails(self, offset, length=CLUSTER, disk=None):
        with fails_with(errno.EIO):
            (disk or self.disk).write(offset, b"f" * length)

    def close(self):
        if self.sync:
            self.bench.drop(self.sync)
        self.bench.drop(self.disk)
        self.bench.drop(self.dm)

    def finish(self, leaks=False, compare=True):
        """Close it: the image is good, and has what the model has."""
        self.close()
        self.image.check(leaks)
        if compare:
            self.image.compare(self.model)

    def no_sync(self):
        with fails_with(errno.EIO):
            self.disk.fsync()

    def holds(self, events, unwritten=None):
        """Some entries, or so many, are not written yet: mode rw, one event."""
        status = self.dm.status()
        expect(status.mode == "rw", f"{status}")
        expect(status.unwritten == unwritten if unwritten else status.unwritten > 0, f"{status}")
        expect(self.dm.events() == events + 1, f"{self.dm.events() - events} events: {status}")

    def good(self, events):
        """The metadata device works again: all is written, and nobody needs to know."""
        self.meta.good()
        self.disk.fsync()
        status = self.dm.status()
        expect(status.mode == "rw" and status.unwritten == 0, f"{status}")
        expect(self.dm.events() == events + 1, f"{self.dm.events() - events} events: {status}")

    def failed(self, events):
        """The device is in mode fail, with all that follows from it."""
        wait_for("mode fail", 60, lambda: self.dm.mode() == "fail")
        expect(self.dm.events() > events, "no event was raised")
        with fails_with(errno.EIO):
            self.disk.fsync()
        self.fails(40 * CLUSTER)
        self.fails(600 * MIB)
        self.sync = self.sync or self.bench.io(self.dm, flags=os.O_DSYNC)
        self.fails(0, 4096, self.sync)
        # That one must not have gone half the way: whether the bytes are there
        # is open, so they are put right.
        self.write(0, CLUSTER, b"o")
        self.same(0, CLUSTER)
        # What was never written still reads as zeros.
        self.same(50 * CLUSTER, 52 * CLUSTER)

    def recover(self):
        """A new table, once the device works again."""
        self.meta.good()
        self.data.good()
        self.dm.load(self.dm.table())
        expect(self.dm.mode() == "rw", f"after a reload: {self.dm.status()}")
        self.same(0, CLUSTER, 50 * CLUSTER)
        self.write(80 * CLUSTER + 512, 1024, b"r")
        self.write(700 * MIB, 512, b"r")
        self.disk.fsync()
        self.same(80 * CLUSTER, 700 * MIB)


@test("data write errors: the write fails, its units stay as they were")
def data_writes(bench):
    s = Setup(bench)
    s.data.no_writes()
    s.fails(4 * CLUSTER)
    s.fails(6 * CLUSTER + 512, 512)
    s.fails(8 * CLUSTER + 512, 3 * CLUSTER)
    s.fails(520 * MIB + 512, 512)
    s.fails(0, 4096)
    s.same(0, 4 * CLUSTER, 6 * CLUSTER, 8 * CLUSTER, 9 * CLUSTER, 520 * MIB)
    expect(s.dm.mode() == "rw", f"{s.dm.status()}")
    expect(not s.dm.status().dirty, f"failed writes made something dirty: {s.dm.status()}")
    s.data.good()
    s.same(0, 4 * CLUSTER, 6 * CLUSTER, 8 * CLUSTER, 9 * CLUSTER, 520 * MIB)
    s.disk.fsync()
    s.dm.cycle()
    s.same(4 * CLUSTER, 6 * CLUSTER, 8 * CLUSTER, 9 * CLUSTER, 520 * MIB)
    s.write(4 * CLUSTER + 512, 1024)
    s.write(6 * CLUSTER, CLUSTER)
    s.same(4 * CLUSTER, 6 * CLUSTER)
    s.finish()


@test("data write errors: a fill that fails takes the write with it")
def fill_errors(bench):
    s = Setup(bench)
    # The end of cluster 4 and the start of cluster 6 cannot be written.
    for bad, offset in ((4 * CLUSTER + 32 * KIB, 4 * CLUSTER), (6 * CLUSTER, 6 * CLUSTER + 48 * KIB)):
        s.data.bad(bad, 4 * KIB)
        s.fails(offset, 4096)
        s.data.good()
        # Nothing of the write, and nothing of what the device held before.
        s.same(offset // CLUSTER * CLUSTER)
        s.dm.cycle()
        s.same(offset // CLUSTER * CLUSTER)
        s.write(offset, 4096)
        s.same(offset // CLUSTER * CLUSTER)
    expect(s.dm.mode() == "rw", f"{s.dm.status()}")
    s.finish()


@test("data write errors: a busy unit's waiters go on")
def busy_waiters(bench):
    s = Setup(bench)
    s.data.no_writes()
    results = []

    def writer(n):
        try:
            s.disk.write(20 * CLUSTER + n * 4096, b"w" * 4096)
            results.append(0)
        except OSError as e:
            results.append(e.errno)
    threads = [threading.Thread(target=writer, args=(n,)) for n in range(16)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    expect(results == [errno.EIO] * 16, f"{results}")
    s.data.good()
    s.same(20 * CLUSTER)
    s.finish()


@test("data read errors are passed on")
def data_reads(bench):
    s = Setup(bench)
    s.data.bad()
    with fails_with(errno.EIO):
        s.disk.read(0, 4096)
    s.same(4 * CLUSTER)
    expect(s.dm.mode() == "rw", f"{s.dm.status()}")
    s.data.good()
    s.same(0)


@test("a flush that the data device fails is not acknowledged")
def data_flush(bench):
    s = Setup(bench)
    s.data.no_writes()
    with fails_with(errno.EIO):
        s.disk.fsync()
    expect(s.dm.mode() == "rw", f"nothing was dirty: {s.dm.status()}")
    s.data.good()
    s.disk.fsync()
    events = s.dm.events()
    s.data.no_flush()
    s.write(4 * CLUSTER, CLUSTER)
    with fails_with(errno.EIO):
        s.disk.fsync()
    # The data is not durable, so nothing may say that it is.
    expect(s.image.state(4 * CLUSTER) == "unallocated", "the entry was written all the same")
    s.data.good()
    s.failed(events)
    s.same(0, 4 * CLUSTER)
    s.finish(leaks=True, compare=False)


# A device that takes no writes takes no flushes, either.
LOST = (("flush", "no_flush"), ("write", "no_writes"))


def meta_flush(bench, how):
    s = Setup(bench)
    log = bench.add(KernelLog())
    getattr(s.meta, how)()
    events = s.dm.events()
    waiting = subprocess.Popen(["dmsetup", "wait", s.dm.name, str(events)],
                               stdout=subprocess.DEVNULL)
    try:
        s.write(4 * CLUSTER + 512, 512)
        s.same(4 * CLUSTER)
        s.no_sync()
        s.failed(events)
        try:
            waiting.wait(60)
        except subprocess.TimeoutExpired as e:
            raise Failure("dmsetup wait does not return") from e
    finally:
        waiting.kill()
        waiting.wait()
    # In core only, but it can be read.
    s.same(4 * CLUSTER)
    expect(log.lines("qcow2.*fail"), "the log does not tell of mode fail")
    # A device that has failed stays failed.
    s.meta.good()
    s.no_sync()
    s.dm.cycle()
    expect(s.dm.mode() == "fail", f"after suspend and resume: {s.dm.status()}")
    s.same(0, CLUSTER, 50 * CLUSTER)
    s.recover()
    # It was never acknowledged by a flush: there, or not at all.
    got = s.disk.read(4 * CLUSTER, CLUSTER)
    if got != bytes(CLUSTER):
        same(got, s.model.read(4 * CLUSTER, CLUSTER), 4 * CLUSTER)
    s.model.write(4 * CLUSTER, got)
    s.finish(leaks=True)


def timer_flush(bench, how):
    s = Setup(bench)
    getattr(s.meta, how)()
    events = s.dm.events()
    s.disk.write(4 * CLUSTER, b"t" * 512)
    s.failed(events)
    s.recover()
    s.finish(leaks=True, compare=False)


def fua_and_suspend_flush(bench, how):
    s = Setup(bench)
    getattr(s.meta, how)()
    events = s.dm.events()
    s.sync = bench.io(s.dm, flags=os.O_DSYNC)
    s.fails(4 * CLUSTER, 4096, s.sync)
    s.failed(events)
    s.recover()
    getattr(s.meta, how)()
    s.disk.write(90 * CLUSTER, b"t" * 512)
    s.dm.suspend()
    s.meta.good()
    s.dm.resume()
    expect(s.dm.mode() == "fail", f"the commit failed, but: {s.dm.status()}")
    s.finish(leaks=True, compare=False)


for _kind, _how in LOST:
    test(f"metadata {_kind} errors: fail at the next flush; reads and overwrites go on", _how)(meta_flush)
    test(f"metadata {_kind} errors: the timer's commit notices, too", _how)(timer_flush)
    test(f"metadata {_kind} errors: a FUA write fails, and so does suspend's commit", _how)(fua_and_suspend_flush)


@test("a metadata device that is dead for a while: flushes fail, all else goes on, nothing is lost")
def meta_dead(bench):
    s = Setup(bench)
    log = bench.add(KernelLog())
    events = s.dm.events()
    waiting = subprocess.Popen(["dmsetup", "wait", s.dm.name, str(events)],
                               stdout=subprocess.DEVNULL)
    try:
        # It cannot be read, and so it is neither written nor flushed.
        s.meta.bad()
        s.write(4 * CLUSTER + 512, 512)
        s.no_sync()
        s.holds(events, 1)
        try:
            waiting.wait(60)
        except subprocess.TimeoutExpired as e:
            raise Failure("dmsetup wait does not return") from e
    finally:
        waiting.kill()
        waiting.wait()
    expect(log.lines("qcow2"), "the log does not tell of it")
    # First writes, overwrites, reads, and the units that wait
    s.write(40 * CLUSTER, CLUSTER, b"b")
    s.write(4 * CLUSTER + 4096, 512, b"c")
    s.write(0, CLUSTER, b"o")
    s.fails(600 * MIB, 512)
    s.same(0, CLUSTER, 4 * CLUSTER, 40 * CLUSTER, 50 * CLUSTER, 600 * MIB)
    s.sync = bench.io(s.dm, flags=os.O_DSYNC)
    s.fails(41 * CLUSTER, 4096, s.sync)
    s.model.write(41 * CLUSTER, b"f" * 4096)
    s.same(41 * CLUSTER)
    for _ in range(2):
        s.no_sync()
    s.holds(events, 1)
    s.good(events)
    for at in (4, 40, 41):
        expect(s.image.state(at * CLUSTER) == "data", f"a flush succeeded, but the entry of cluster {at} is not there")
    s.write(600 * MIB, 512)
    s.sync.write(42 * CLUSTER, b"y" * 4096)
    s.model.write(42 * CLUSTER, b"y" * 4096)
    s.disk.fsync()
    s.same(0, 4 * CLUSTER, 40 * CLUSTER, 41 * CLUSTER, 42 * CLUSTER, 600 * MIB)
    s.finish()


@test("a metadata device that is dead for a while: the timer's commit notices, and tries again until it can")
def timer(bench):
    s = Setup(bench)
    s.meta.bad()
    events = s.dm.events()
    s.write(4 * CLUSTER, 512, b"t")
    wait_for("an event", 60, lambda: s.dm.events() > events)
    s.holds(events, 1)
    s.meta.good()
    wait_for("all is written", 60, lambda: not s.dm.status().unwritten)
    expect(s.image.state(4 * CLUSTER) == "data", "nothing is unwritten, but the entry is not there")
    expect(s.dm.events() == events + 1, f"{s.dm.events() - events} events")
    s.finish()


@test("a metadata device that is dead for a while: suspend and resume go on with what is not written")
def suspend(bench):
    s = Setup(bench)
    s.meta.bad()
    events = s.dm.events()
    s.write(90 * CLUSTER, 512, b"t")
    for _ in range(2):
        s.dm.suspend()
        s.holds(events, 1)
        # It does not look at the disk.
        s.dm.resume()
        s.holds(events, 1)
        s.same(90 * CLUSTER)
    s.write(91 * CLUSTER, 512, b"u")
    s.dm.suspend()
    s.meta.good()
    s.dm.resume()
    s.good(events)
    s.same(0, 90 * CLUSTER, 91 * CLUSTER)
    s.finish()


def commit_step(bench, where):
    """One place of the metadata cannot be written, and no flush succeeds, while a new L2
    table is made."""
    s = Setup(bench)
    image = s.image
    pos = {"the L1 table": image.get("l1_table_offset"),
           "the refcount block": image.u64(image.reftable_pos(0)),
           "an L2 table": image.l2_table(0)}[where]
    s.meta.bad(pos, CLUSTER, writes_only=True)
    events = s.dm.events()
    writes = ((4 * CLUSTER, 512),) if where == "an L2 table" else ((1100 * MIB, 512),)
    for offset, length in writes:
        s.disk.write(offset, b"c" * length)
    with fails_with(errno.EIO):
        s.disk.fsync()
    s.failed(events)
    s.close()
    # Nothing on disk refers to what is not there.
    image.check(leaks=True)
    s.meta.good()
    s.dm = image.open(meta=s.meta.path, data=s.data.path)
    s.disk, s.sync = bench.io(s.dm), None
    s.same(0, CLUSTER, 50 * CLUSTER)
    for offset, length in writes:
        got = s.disk.read(offset, CLUSTER)
        expect(got in (bytes(CLUSTER), (b"c" * length).ljust(CLUSTER, b"\0")),
               "neither the old content nor the new one")
    s.disk.write(1200 * MIB, b"d" * 512)
    s.disk.fsync()
    same(s.disk.read(1200 * MIB, 1024), b"d" * 512 + bytes(512), 1200 * MIB)
    s.close()
    image.check(leaks=True)


def bad_place(bench, where):
    """One place of the metadata can neither be written nor read while a new L2 table is
    made and old ones are changed: the other entries become durable, and these later."""
    s = Setup(bench, 12 * COVER)
    image = s.image
    pos = {"the L1 table": image.get("l1_table_offset"),
           "the refcount block": image.u64(image.reftable_pos(0)),
           "an L2 table": image.l2_table(0)}[where]
    s.write(COVER, 512)
    s.disk.fsync()
    for n in range(4, 12):
        new, old, other = n * COVER + 100 * CLUSTER, n * CLUSTER, COVER + n * CLUSTER
        bad = old if where == "an L2 table" else new
        events = s.dm.events()
        for at in (new, old, other):
            s.write(at, 512, b"c")
        s.meta.bad(pos, CLUSTER)
        try:
            s.disk.fsync()
        except OSError:
            break
        # The timer's commit was there before the device was bad.
        s.meta.good()
    else:
        raise Failure("the timer's commit was always there first")
    s.holds(events)
    for at in (new, old, other):
        state = image.state(at)
        expect((state == "data") == (at != bad), f"cluster {at // CLUSTER} is {state}")
    s.same(0, CLUSTER, new, old, other, 50 * CLUSTER)
    image.check(leaks=True)
    s.good(events)
    s.same(0, CLUSTER, new, old, other, 50 * CLUSTER)
    s.finish()


for _where in ("the L1 table", "the refcount block", "an L2 table"):
    test(f"metadata write errors: {_where} cannot be written", _where)(commit_step)
    test(f"a bad place in {_where}: what does not need it becomes durable, and the rest later", _where)(bad_place)


@test("metadata write errors: the new L2 table cannot be written: its first write fails")
def new_table(bench):
    s = Setup(bench, 6 * COVER)
    image = s.image
    pos = max(image.l2_table(0), image.get("l1_table_offset")) + CLUSTER
    # Two places: each is tried once, and the next cluster by the next request.
    s.meta.bad(pos, 2 * CLUSTER)
    events = s.dm.events()
    new = [n * COVER + 76 * CLUSTER for n in range(1, 6)]
    for _ in range(2):
        s.fails(new[0], 512)
        s.same(new[0])
    # Nothing depends on it yet.
    expect(s.dm.mode() == "rw" and not s.dm.status().unwritten, f"{s.dm.status()}")
    expect(s.dm.events() == events, f"{s.dm.events() - events} events")
    s.write(4 * CLUSTER, 512, b"c")
    s.write(new[0], 512, b"c")
    s.disk.fsync()
    expect(image.state(new[0]) == "data", "a flush succeeded, but the entry is not there")
    s.meta.good()
    # There is just enough for all of them, if the bad places are not lost.
    for at in new[1:]:
        s.write(at, 512, b"d")
    s.disk.fsync()
    s.same(0, CLUSTER, 4 * CLUSTER, 50 * CLUSTER, *new)
    s.finish()


@test("L2 read errors in a commit: not acknowledged, and tried again the next time")
def commit_reads(bench):
    s = Setup(bench)
    events = s.dm.events()
    s.meta.bad(s.image.l2_table(0), CLUSTER)
    s.write(4 * CLUSTER + 512, 512)
    s.no_sync()
    s.same(0, 4 * CLUSTER)
    s.holds(events, 1)
    s.good(events)
    expect(s.image.state(4 * CLUSTER) == "data", "a flush succeeded, but the entry is not there")
    s.same(0, 4 * CLUSTER)
    s.finish()


@test("a bad sector in one L2 table: the units of another one become durable, and these later")
def bad_block(bench):
    s = Setup(bench)
    image = s.image
    s.write(COVER, CLUSTER)
    s.disk.fsync()
    s.same(0, COVER)
    events = s.dm.events()
    # Its slice is in core.
    s.meta.bad(image.l2_table(0), 512)
    s.write(4 * CLUSTER, CLUSTER, b"x")
    for n in range(1, 40):
        s.write(COVER + n * CLUSTER, CLUSTER, bytes([n]))
    s.no_sync()
    s.holds(events, 1)
    states = image.states()
    bad = [n for n in range(40) if states[COVER // CLUSTER + n] != "data"]
    expect(not bad, f"not durable, although nothing of theirs has failed: {bad}")
    expect(states[4] == "unallocated", f"{states[4]} on a sector that cannot be written")
    # The rest of its table is in other sectors; and whose entry is durable hears of no error.
    s.write(3000 * CLUSTER, CLUSTER, b"z")
    s.no_sync()
    expect(image.state(3000 * CLUSTER) == "data", "not durable, although its block is good")
    s.holds(events, 1)
    s.same(0, 4 * CLUSTER, COVER, COVER + 39 * CLUSTER, 3000 * CLUSTER)

    # Suspended, it keeps the image for itself; another table gets it when all is written.
    line = s.dm.table()
    second, third = bench.add(Dm("second")), bench.add(Dm("third"))
    dm_ioctl(DM_TABLE_LOAD, second.name, line)
    s.dm.suspend()
    s.holds(events, 1)
    for _ in range(2):
        with fails_with(errno.EBUSY):
            second.resume()
    with fails_with(errno.EBUSY):
        third.load(line)
    for dm in (second, third):
        dm_ioctl(DM_TABLE_CLEAR, dm.name)
        bench.drop(dm)
    stat = Stat(s.meta.path)
    s.dm.resume()
    expect(not stat.reads, f"{stat.reads} reads of the metadata at the resume")
    s.holds(events, 1)
    s.same(0, 4 * CLUSTER, COVER, COVER + 39 * CLUSTER, 3000 * CLUSTER)
    s.no_sync()
    s.good(events)
    expect(image.state(4 * CLUSTER) == "data", "a flush succeeded, but the entry is not there")
    s.dm.suspend()
    second = bench.add(Dm("second", line))
    disk = bench.io(second)
    for at in (0, 4 * CLUSTER, COVER + 39 * CLUSTER):
        same(disk.read(at, CLUSTER), s.model.read(at, CLUSTER), at)
    bench.drop(disk)
    bench.drop(second)
    s.dm.resume()
    s.same(0, 4 * CLUSTER, COVER, COVER + 39 * CLUSTER, 3000 * CLUSTER)
    s.finish()


@test("a bad sector in one L2 table: removal loses what was never written, and nothing else")
def bad_block_removed(bench):
    s = Setup(bench)
    s.write(COVER, CLUSTER)
    s.disk.fsync()
    s.same(0)
    s.meta.bad(s.image.l2_table(0), 512)
    s.disk.write(4 * CLUSTER, b"x" * CLUSTER)
    s.write(COVER + CLUSTER, CLUSTER, b"y")
    s.close()
    s.meta.good()
    s.dm = s.image.open(meta=s.meta.path, data=s.data.path)
    s.disk, s.sync = bench.io(s.dm), None
    s.same(0, 4 * CLUSTER, COVER, COVER + CLUSTER)
    s.write(4 * CLUSTER, CLUSTER, b"z")
    s.finish()


@test("L2 read errors: EIO, and tried again the next time")
def l2_reads(bench):
    s = Setup(bench)
    s.write(520 * MIB, 4096)
    s.disk.fsync()
    s.dm.cycle()
    s.same(0)
    events = s.dm.events()
    table = s.image.l2_table(520 * MIB)
    s.meta.bad(table, CLUSTER)
    faults = []

    def reader():
        try:
            s.disk.read(520 * MIB, 4096)
            faults.append("a read succeeded")
        except OSError as e:
            if e.errno != errno.EIO:
                faults.append(f"errno {e.errno}")
    threads = [threading.Thread(target=reader) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    expect(not faults, f"{faults}")
    s.fails(520 * MIB, 4096)
    s.fails(521 * MIB + 512, 512)
    with fails_with(errno.EIO):
        s.disk.read(512 * MIB - 4096, 8192)
    # Another table, in core or not.
    s.same(0, 4 * CLUSTER, 1100 * MIB)
    s.write(4 * CLUSTER, 512)
    expect(s.dm.mode() == "rw", f"{s.dm.status()}")
    expect(s.dm.events() == events, "an event was raised, but the mode has not changed")
    s.meta.good()
    s.same(520 * MIB, 521 * MIB)
    s.write(521 * MIB + 512, 512)
    s.disk.fsync()
    s.finish()


@test("refcount read errors: EIO for what needs a new L2 table, and tried again the next time")
def refcount_reads(bench):
    s = Setup(bench)
    s.dm.cycle()
    s.meta.bad(s.image.u64(s.image.reftable_pos(0)), CLUSTER)
    s.fails(600 * MIB, 512)
    s.write(4 * CLUSTER, 512)
    s.same(0, 4 * CLUSTER, 600 * MIB)
    s.disk.fsync()
    expect(s.dm.mode() == "rw", f"{s.dm.status()}")
    s.meta.good()
    s.write(600 * MIB, 512)
    s.disk.fsync()
    s.finish()


@test("header or L1 unreadable: no constructor, no resume; then it works again")
def l1_reads(bench):
    s = Setup(bench)
    line = s.dm.table()
    s.dm.suspend()
    s.meta.bad(s.image.get("l1_table_offset"), CLUSTER)
    with fails_with(errno.EIO):
        s.dm.resume()
    s.meta.good()
    s.dm.resume()
    s.same(0, CLUSTER, 4 * CLUSTER)
    s.write(4 * CLUSTER, 512)
    s.close()
    s.meta.bad(0, 4096)
    log = bench.add(KernelLog())
    try:
        bench.add(Dm("second", line))
    except Failure:
        pass
    else:
        raise Failure("a table was accepted whose header cannot be read")
    expect(log.lines("qcow2: .*header"), "the log does not tell of the header")
    s.meta.good()
    s.image.check()
    s.image.compare(s.model)


@test("backing read errors: what needs the backing device fails, all else goes on")
def backing_reads(bench):
    path = bench.file("backing", 64 * CLUSTER)
    with open(path, "wb") as f:
        f.write(os.urandom(64 * CLUSTER))
    s = Setup(bench, size=128 * CLUSTER, backing=path)
    with open(path, "rb") as f:
        s.model.write(2 * CLUSTER, f.read()[2 * CLUSTER:])
    s.same(2 * CLUSTER, 70 * CLUSTER)
    s.backing.bad()
    for at in (4 * CLUSTER, 63 * CLUSTER):
        with fails_with(errno.EIO):
            s.disk.read(at, 512)
        # What it does not cover cannot be copied.
        s.fails(at + 512, 512)
        s.fails(at - 512, 1024)
    s.same(0, CLUSTER, 64 * CLUSTER, 100 * CLUSTER)
    s.write(10 * CLUSTER, 2 * CLUSTER, b"w")
    s.write(90 * CLUSTER + 512, 512, b"p")
    s.write(CLUSTER + 512, 512, b"o")
    s.disk.discard(20 * CLUSTER, CLUSTER)
    s.model.write(20 * CLUSTER, bytes(CLUSTER))
    s.disk.fsync()
    s.same(0, CLUSTER, 10 * CLUSTER, 11 * CLUSTER, 20 * CLUSTER, 90 * CLUSTER)
    expect(s.dm.mode() == "rw", f"{s.dm.status()}")
    s.backing.good()
    s.same(*(i * CLUSTER for i in range(128)))
    s.write(4 * CLUSTER + 512, 512, b"p")
    s.write(63 * CLUSTER + 512, CLUSTER, b"q")
    s.same(3 * CLUSTER, 4 * CLUSTER, 62 * CLUSTER, 63 * CLUSTER, 64 * CLUSTER)
    s.finish()


def fill(s, count=8):
    """Some clusters of data, of which later ones are discarded."""
    s.write(20 * CLUSTER, count * CLUSTER, b"d")
    s.disk.fsync()


def discard(s, first, count):
    s.disk.discard(first * CLUSTER, count * CLUSTER)
    s.model.write(first * CLUSTER, bytes(count * CLUSTER))


def not_passed_down(s):
    with open(s.image.data, "rb") as f:
        f.seek(21 * CLUSTER)
        same(f.read(3 * CLUSTER), b"d" * 3 * CLUSTER, 21 * CLUSTER, "data file")


def discard_commit(bench, how):
    s = Setup(bench)
    fill(s)
    getattr(s.meta, how)()
    events = s.dm.events()
    discard(s, 21, 3)
    s.same(*(i * CLUSTER for i in range(20, 28)))
    with fails_with(errno.EIO):
        s.disk.fsync()
    s.failed(events)
    not_passed_down(s)
    s.recover()
    # It was never acknowledged by a flush: zeros, or what was there before.
    for i in range(21, 24):
        got = s.disk.read(i * CLUSTER, CLUSTER)
        expect(got in (bytes(CLUSTER), b"d" * CLUSTER), "neither the old content nor the new one")
        s.model.write(i * CLUSTER, got)
    s.finish(leaks=True)


for _kind, _how in LOST:
    test(f"discards: not passed down if the commit fails ({_kind} errors)", _how)(discard_commit)


@test("discards: not passed down before their entries can be written")
def discard_later(bench):
    s = Setup(bench)
    fill(s)
    s.meta.bad()
    events = s.dm.events()
    discard(s, 21, 3)
    s.no_sync()
    s.holds(events, 1)
    not_passed_down(s)
    # Written anew, one of them is not to be discarded any more.
    s.write(22 * CLUSTER, CLUSTER, b"n")
    s.no_sync()
    s.same(*(i * CLUSTER for i in range(20, 28)))
    s.good(events)
    with open(s.image.data, "rb") as f:
        def hole(at):
            return f.seek(at), f.read(CLUSTER) == bytes(CLUSTER)
        wait_for("they are discarded", 60, lambda: hole(21 * CLUSTER)[1] and hole(23 * CLUSTER)[1])
    s.same(*(i * CLUSTER for i in range(20, 28)))
    s.finish()


@test("discards: one that the data device fails is of no consequence")
def discard_passdown(bench):
    s = Setup(bench)
    fill(s)
    # All but flushes fails there.
    s.data.bad(21 * CLUSTER, 3 * CLUSTER)
    events = s.dm.events()
    discard(s, 20, 6)
    s.disk.fsync()
    s.dm.cycle()
    s.same(*(i * CLUSTER for i in range(20, 28)))
    expect(s.dm.mode() == "rw" and s.dm.events() == events, f"{s.dm.status()}")
    s.data.good()
    s.same(*(i * CLUSTER for i in range(20, 28)))
    s.write(22 * CLUSTER + 512, 512, b"n")
    s.disk.fsync()
    s.same(*(i * CLUSTER for i in range(20, 28)))
    s.finish()


@test("write zeroes: the part of a unit that the data device cannot write")
def zeroes_in_part(bench):
    s = Setup(bench)
    fill(s)
    s.data.no_writes()
    with fails_with(errno.EIO):
        s.disk.punch_hole(20 * CLUSTER + 512, 1024)
    expect(s.dm.mode() == "rw", f"{s.dm.status()}")
    s.data.good()
    s.same(20 * CLUSTER)
    s.disk.punch_hole(20 * CLUSTER + 512, 1024)
    s.model.write(20 * CLUSTER + 512, bytes(1024))
    s.same(20 * CLUSTER)
    s.finish()


def remove_failed(bench, how):
    s = Setup(bench)
    s.write(600 * MIB, 512)
    s.disk.fsync()
    getattr(s.meta, how)()
    for i in range(4, 40):
        s.disk.write(i * CLUSTER + 512, b"l" * 512)
    s.disk.write(600 * MIB + CLUSTER, b"l" * 512)
    s.close()
    s.meta.good()
    s.image.check(leaks=True)
    dm = s.image.open(meta=s.meta.path, data=s.data.path)
    disk = bench.io(dm)
    same(disk.read(0, 2 * CLUSTER), b"a" * 2 * CLUSTER)
    for i in range(4, 40):
        got = disk.read(i * CLUSTER, 2048)
        expect(got in (bytes(2048), bytes(512) + b"l" * 512 + bytes(1024)),
               f"cluster {i}: neither the old content nor the new one")


for _kind, _how in (*LOST, ("all", "bad")):
    test(f"a failed device can be removed, with changes in core that are lost ({_kind} errors)", _how)(remove_failed)


if __name__ == "__main__":
    run("modprobe", "-q", "dm-flakey", ok=False)
    main()
