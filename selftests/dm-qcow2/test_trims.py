#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Discards that wait to be passed down.

They are hints, and there can be very many of them: so few are under way at a time,
nobody waits for those that are not, they take no more memory than there is for the
map, and what is forgotten can be said again. The data device below holds discards back
for as long as a test wants.
"""
import collections
import os
import threading
import time

from qcow2test import (DM_NOFLUSH_FLAG, DM_TABLE_STATUS, KIB, MIB, PATIENCE, Dm, Failure, Loop, Task, device_sectors,
                       dm_ioctl, drop_caches, expect, main, note, run, same, test, wait_for)
from heldimage import Setup, state_of

HANG = 60       # seconds; far more than anything here can take
CLUSTER = 16 * KIB
# Units whose entries are in one block of an L2 table, of which there are four
BLOCK = 512
# Discards that may be under way at a time
MOST = 16
# What the limit of the cache leaves beyond the directory
ROOM = 256 * KIB


def every_other(n):
    return "unallocated" if n % 2 else "data"


class Trims(Setup):
    """32 MiB, one L2 table."""

    def __init__(self, bench, state=every_other, size=32 * MIB, fill=b"d", **options):
        super().__init__(bench, size, state, fill=fill, **{"cluster": CLUSTER, **options})
        self.most, self.holds = 0, []
        for at in range(0, self.size, self.image.cover):
            self.disk.read(at, 4 * KIB)

    def hold(self, request):
        """Every discard; how many are under way at the most."""
        if request.op != "discard":
            return False
        self.most = max(self.most, len(self.data.held) + 1)
        self.holds.append(request)
        return True

    def discards(self):
        return self.seen("discard")

    def under_way(self):
        """Until discards are held, and no more come."""
        wait_for("discards are passed down", 60, lambda: self.data.held)
        count = -1
        while count != len(self.data.held):
            count = len(self.data.held)
            time.sleep(0.5)
        return count

    def units(self, requests=None):
        """How often each unit was discarded."""
        count = collections.Counter()
        for r in self.discards() if requests is None else requests:
            expect(r.offset % self.unit == r.length % self.unit == 0, f"not whole units: {r}")
            count.update(range(r.offset // self.unit, (r.offset + r.length) // self.unit))
        return count

    def all_down(self, wanted=()):
        """Until nothing waits any more, and these units have been discarded: the last ones
        may be on their way to the device."""
        wait_for("all discards are passed down", HANG, lambda: not self.data.held and
                 not self.status().trims)
        for _ in range(PATIENCE):
            missing = set(wanted) - set(self.units())
            if not missing:
                return
            time.sleep(1)
        raise Failure(f"{len(missing)} units were forgotten: {sorted(missing)[:20]}")


def data_units(s, state=every_other):
    return {n for n in range(s.size // s.unit) if state(n) == "data"}


@test(f"one discard of many pieces: at most {MOST} are under way, and all are passed down once")
def few(bench):
    s = Trims(bench)
    with s.holding(s.hold):
        s.disk.discard(0, s.size)
        s.disk.fsync()
        s.under_way()
        for _ in range(100):
            s.data.release(most=1)
            wait_for("another one comes", 60, lambda: s.data.held)
        for _ in range(10):
            s.data.release()
            wait_for("others come", 60, lambda: s.data.held)
    s.all_down(data_units(s))
    # Nor does anything come after them.
    s.dm.cycle()
    expect(s.most <= MOST, f"{s.most} discards were under way at the same time")
    count = s.units()
    expect(max(count.values()) == 1, f"a unit was discarded {max(count.values())} times")
    same(s.disk.read(0, s.size), bytes(s.size))
    s.shut()


@test("a discard across the border between two blocks of an L2 table is one on the data device")
def merged(bench):
    s = Trims(bench, lambda n: "data")
    with s.holding():
        for first, count in ((BLOCK - 3, 7), (2 * BLOCK - 1, BLOCK + 2)):
            s.disk.discard(first * s.unit, count * s.unit)
            s.disk.fsync()
            wait_for("it is passed down", 60, lambda: sum(s.units().values()) >= count)
            got = [(r.offset // s.unit, r.length // s.unit) for r in s.discards()]
            expect(got == [(first, count)], f"units {first}+{count}: {got}")
            s.script.begin(None, None)
    s.shut()


# Suspend, and all that begins with it

def begun(s, task):
    """Until device-mapper has waited for all requests, and asks the target to stop."""
    wait_for("it has begun", 60, lambda: state_of(s.dm) != "live" or not task.is_alive())
    # It must not be over while discards are under way.
    time.sleep(0.5)
    expect(task.is_alive(), "it did not wait for what is under way")


def stopped(s, task):
    """Let what is under way end; the number of discards that were passed down until the
    task was over."""
    before = len(s.discards())
    end = time.monotonic() + HANG
    while task.is_alive():
        expect(time.monotonic() < end, "it does not end")
        s.data.release()
        task.join(0.2)
    task.finish()
    return len(s.discards()) - before


def many(s):
    """Hundreds that are pending; some are under way."""
    s.disk.discard(0, s.size)
    s.disk.fsync()
    s.under_way()
    expect(len(data_units(s)) > 20 * MOST, "they are not that many")


def few_more(more):
    # Some more may have begun just before it took notice.
    expect(more <= 2 * MOST, f"it waited for {more} more discards, which had not begun")


def suspend(bench, flags):
    s = Trims(bench)
    with s.holding(s.hold):
        many(s)
        for _ in range(2):
            task = Task(s.dm.suspend, flags)
            begun(s, task)
            few_more(stopped(s, task))
            expect(s.status().trims, f"nothing waits any more: {s.status()}")
            quiet = len(s.discards())
            time.sleep(0.5)
            expect(len(s.discards()) == quiet and not s.data.held, "discards of a device that is suspended")
            # The same table goes on where it was.
            s.dm.resume()
            s.under_way()
    s.all_down(data_units(s))
    count = s.units()
    expect(max(count.values()) == 1, f"a unit was discarded {max(count.values())} times")
    same(s.disk.read(0, s.size), bytes(s.size))
    s.shut()


test("suspend waits for the discards that are under way, and for no others; the rest goes on at resume", 0)(suspend)
test("suspend --noflush does so, too", DM_NOFLUSH_FLAG)(suspend)


@test("what was written after a suspend, while its discard was still waiting, stays")
def written_after(bench):
    s = Trims(bench)
    with s.holding(s.hold):
        many(s)
        task = Task(s.dm.suspend)
        begun(s, task)
        few_more(stopped(s, task))
        done = set(s.units())
        # One table later, all of it read again
        s.dm.resume()
        s.under_way()
        waiting = sorted(data_units(s) - set(s.units()))
        expect(len(waiting) > 10 * MOST, f"only {len(waiting)} wait")
        wanted = waiting[1::7][:40]
        for n in wanted[:20]:
            s.disk.write(n * s.unit + 512, b"w" * 512)
        for n in wanted[20:]:
            s.disk.write(n * s.unit, b"w" * s.unit)
        expect(not set(s.units()) & set(wanted), "a write has waited for a discard")
    s.disk.fsync()
    s.all_down(data_units(s) - set(wanted))
    expect(not set(s.units()) & set(wanted), "what was written is discarded")
    expect(done, "none before the suspend")
    for turn in range(2):
        for n in wanted[:20]:
            same(s.disk.read(n * s.unit, s.unit), bytes(512) + b"w" * 512 + bytes(s.unit - 1024), n * s.unit)
        for n in wanted[20:]:
            same(s.disk.read(n * s.unit, s.unit), b"w" * s.unit, n * s.unit)
        if not turn:
            s.dm.cycle()
    s.shut()


@test("what another table over the same devices has written meanwhile stays, too")
def written_elsewhere(bench):
    s = Trims(bench)
    with s.holding(s.hold):
        many(s)
        task = Task(s.dm.suspend)
        begun(s, task)
        few_more(stopped(s, task))
        waiting = sorted(data_units(s) - set(s.units()))
        expect(len(waiting) > 10 * MOST, f"only {len(waiting)} wait")
        wanted = waiting[3::11][:40]
        other = bench.add(Dm("other", s.line))
        disk = bench.io(other)
        for n in wanted:
            disk.write(n * s.unit, b"o" * s.unit)
        bench.drop(disk)
        bench.drop(other)
        s.dm.resume()
    s.all_down(data_units(s) - set(wanted))
    expect(not set(s.units()) & set(wanted), "what another table has written is discarded")
    for n in wanted:
        same(s.disk.read((n - 1) * s.unit, 3 * s.unit), bytes(s.unit) + b"o" * s.unit + bytes(s.unit), n * s.unit)
    s.shut()


def forgotten(bench, how):
    """A table that goes does not wait for what is pending; the next one can be told."""
    s = Trims(bench)
    with s.holding(s.hold):
        many(s)
        if how == "close":
            bench.drop(s.disk)
            task = Task(s.dm.remove)
        else:
            task = Task(s.dm.load, s.line)
        begun(s, task)
        few_more(stopped(s, task))
        if how == "close":
            bench.things.remove(s.dm)
    done = set(s.units())
    left = data_units(s) - done
    expect(len(left) > 10 * MOST, f"{len(left)} are left to be discarded")
    if how == "close":
        s.open()
    with s.holding(s.hold):
        # Nobody knows of them.
        same(s.disk.read(0, s.size), bytes(s.size))
        s.disk.fsync()
        time.sleep(2)
        expect(not s.discards(), f"{len(s.discards())} discards of a new table")
        s.go()
        s.disk.discard(0, s.size)
        s.disk.fsync()
        wait_for("what was forgotten is discarded", 60, lambda: set(s.units()) >= left)
        s.all_down()
        expect(max(s.units().values()) == 1, "some twice")
        # And now the device has been told.
        s.script.begin(None, None)
        for at, length in ((0, s.size), (s.unit, 4 * s.unit), (0, s.size)):
            s.disk.discard(at, length)
            s.disk.fsync()
        time.sleep(2)
        s.all_down()
        expect(not s.discards(), f"{len(s.discards())} discards, which the data device had seen before")
    same(s.disk.read(0, s.size), bytes(s.size))
    s.shut()


test("close waits for what is under way only; what it has forgotten is freed by a later discard of zeros, once",
     "close")(forgotten)
test("so does a new table", "reload")(forgotten)


# Discards of what is zero

def zero_or_data(n):
    """Of each eight: four zero, two data, two unallocated"""
    return ("zero", "zero", "data", "data", "unallocated", "unallocated", "zero", "zero")[n % 8]


@test("a discard of zeros is passed down once, that of what was never written is not")
def zeros(bench):
    s = Trims(bench, zero_or_data)
    before = bytes(s.meta.store)
    with s.holding():
        # A part of a unit is none.
        s.disk.discard(512, s.unit)
        s.disk.discard(s.unit + 512, s.unit - 512)
        s.disk.discard(0, 2 * s.unit)
        wait_for("it is passed down", 60, lambda: set(s.units()) == {0, 1})
        s.disk.discard(0, s.unit)
        s.disk.discard(s.unit, s.unit)
        s.disk.discard(4 * s.unit, 2 * s.unit)
        # Half of it is known
        s.disk.discard(0, 2 * s.unit)
        s.disk.discard(8 * s.unit, s.unit)
        wait_for("the next one is passed down", 60, lambda: 8 in s.units())
        s.all_down({0, 1, 8})
        expect(s.units() == {0: 1, 1: 1, 8: 1}, f"{s.units()}")
        s.disk.discard(8 * s.unit, 2 * s.unit)
        wait_for("the rest of it is passed down", 60, lambda: 9 in s.units())
        s.disk.fsync()
        s.all_down({0, 1, 8, 9})
        expect(s.units() == {0: 1, 1: 1, 8: 1, 9: 1}, f"{s.units()}")
        expect(not s.seen("write") and not s.seen("write", "metadata"), "something was written")
    expect(s.meta.store == before, "metadata was changed")
    # A new table is a new load.
    s.dm.load(s.line)
    with s.holding():
        s.disk.discard(0, 2 * s.unit)
        wait_for("it is passed down", 60, lambda: set(s.units()) == {0, 1})
    s.shut()


@test("a discard of zeros that are not on disk yet waits for them, and is one with the first")
def early(bench):
    s = Trims(bench, zero_or_data)
    with s.holding(lambda r: r.op == "write" and r.device == "metadata"):
        for _ in range(3):
            s.disk.discard(0, 8 * s.unit)
        flush = Task(s.disk.fsync)
        wait_for("the commit has to wait", 60, lambda: s.meta.held)
        s.disk.discard(0, 8 * s.unit)
        time.sleep(1)
        expect(not set(s.units()) & {2, 3}, "discarded before the entry says zero on disk")
        s.go()
        flush.finish(HANG)
        wait_for("all of it is passed down", 60, lambda: set(s.units()) >= {0, 1, 2, 3, 6, 7})
        s.all_down()
        expect(max(s.units().values()) <= 1, f"more than once: {s.units()}")
    same(s.disk.read(0, 8 * s.unit), bytes(8 * s.unit))
    s.shut()


def write_meanwhile(bench, part):
    """A first write to zeros whose discard is under way."""
    s = Trims(bench, zero_or_data)
    at, length = (512, 1024) if part else (0, s.unit)
    with s.holding(s.hold):
        s.disk.discard(0, s.unit)
        s.under_way()
        write = Task(s.disk.write, at, b"w" * length)
        time.sleep(0.5)
        expect(write.is_alive() and not s.seen("write"), "a write did not wait for a discard of its unit")
        same(s.disk.read(0, 2 * s.unit), bytes(2 * s.unit))
        # Others do not wait.
        s.disk.write(s.unit, b"o" * s.unit)
    write.finish(HANG)
    s.disk.fsync()
    s.all_down()
    want = bytes(at) + b"w" * length + bytes(s.unit - at - length) + b"o" * s.unit
    same(s.disk.read(0, 2 * s.unit), want)
    s.dm.cycle()
    same(s.disk.read(0, 2 * s.unit), want)
    # It is data now, and zero again by another discard.
    with s.holding():
        s.disk.discard(0, 2 * s.unit)
        s.disk.fsync()
        wait_for("both are passed down", 60, lambda: set(s.units()) == {0, 1})
    same(s.disk.read(0, 2 * s.unit), bytes(2 * s.unit))
    s.shut()


test("a partial first write to zeros whose discard is under way waits for it", True)(write_meanwhile)
test("a whole first write to zeros whose discard is under way waits for it", False)(write_meanwhile)


def write_into_passdown(bench, part):
    """A first write to a unit whose discard is under way on the data device."""
    s = Trims(bench, lambda n: "data")
    unit = s.unit
    at, length = (4 * unit + 1024, 4096) if part else (4 * unit, unit)
    with s.holding(s.hold):
        s.disk.discard(4 * unit, 2 * unit)
        flush = Task(s.disk.fsync)
        s.under_way()
        write = Task(s.disk.write, at, b"p" * length)
        time.sleep(0.5)
        expect(write.is_alive() and not s.seen("write"), "the write was not kept back")
        same(s.disk.read(4 * unit, 2 * unit), bytes(2 * unit), 4 * unit)
    for task in (flush, write):
        task.finish(HANG)
    want = bytearray(b"d" * unit + bytes(2 * unit) + b"d" * unit)
    want[at - 3 * unit:at - 3 * unit + length] = b"p" * length
    same(s.disk.read(3 * unit, 4 * unit), bytes(want), 3 * unit)
    s.disk.fsync()
    s.all_down()
    s.dm.cycle()
    same(s.disk.read(3 * unit, 4 * unit), bytes(want), 3 * unit)
    s.shut()


test("a partial first write waits for a pass-down that is under way", True)(write_into_passdown)
test("a whole first write waits for a pass-down that is under way", False)(write_into_passdown)


@test("no_discard_passdown: zeros are not discarded either")
def no_passdown(bench):
    s = Trims(bench, zero_or_data)
    bench.drop(s.disk)
    bench.drop(s.dm)
    s.open("no_discard_passdown")
    with s.holding():
        s.disk.discard(0, s.size)
        s.disk.fsync()
        s.disk.discard(0, s.size)
        s.disk.fsync()
        time.sleep(2)
        expect(not s.discards() and not s.status().trims, f"{len(s.discards())} discards, {s.status()}")
    s.shut()


# Memory

@test("discards that wait count as states, and go when memory is needed")
def counted(bench):
    s = Trims(bench, cluster=4 * KIB)       # 16 slices
    before = s.status()
    expect(before.slices == 16, f"{before}")
    with s.holding(s.hold):
        s.disk.discard(0, s.size)
        s.disk.fsync()
        s.under_way()
        full = s.status()
        # A bit for each unit at least; which of them are under way is not known.
        expect(full.slices == before.slices and full.state_bytes - before.state_bytes >= s.size // s.unit // 8 // 2,
               f"they are not counted: {before}, then {full}")
        expect(full.trims > 8, f"{full}")
        same(s.disk.read(0, s.size), bytes(s.size))
        # What is under way is in use, the rest are hints.
        busy = {r.offset // (BLOCK * s.unit) for r in s.holds[-len(s.data.held):]}
        wait_for("hints are given up for memory", 60, lambda: drop_caches() or s.status().slices <= len(busy) + 1)
        least = s.status()
        expect(least.state_bytes < before.state_bytes and least.trims <= len(busy) + 1, f"{least}")
        same(s.disk.read(0, s.size), bytes(s.size))
    s.all_down()
    seen = set(s.units())
    # The device can be told again.
    s.dm.load(s.line)
    s.disk.discard(0, s.size)
    s.disk.fsync()
    wait_for("what was given up is discarded", 60, lambda: set(s.units()) >= data_units(s))
    note(f"{before.state_bytes} bytes, {full.state_bytes} with hints, {least.state_bytes} at the least; "
         f"{len(data_units(s) - seen)} units were given up")
    expect(len(seen) < len(data_units(s)), "nothing was given up")
    s.shut()


@test("discards that wait take no more than cache_limit allows, and nobody waits for them")
def limited(bench):
    # 2048 slices; they fit in, but not with two bits more for each unit. One discard each.
    s = Trims(bench, None, size=64 * MIB, fill=None, cluster=512, refcount_bits=1, options=",preallocation=metadata")
    step = s.image.cover
    bench.drop(s.disk)
    bench.drop(s.dm)
    s.open("cache_limit", "1")
    limit = s.status().state_bytes + ROOM
    with s.holding(s.hold):
        looks, stop = [], threading.Event()

        def watch():
            while not stop.wait(0.005):
                looks.append(s.status().state_bytes)
        watcher = Task(watch)
        try:
            Task(s.disk.discard, 0, s.size).finish(HANG)
            Task(s.disk.fsync).finish(HANG)
            s.under_way()
            # All of it is read and written, though every slice has hints.
            for at in range(0, s.size, step):
                same(s.disk.read(at, 4 * KIB), bytes(4 * KIB), at)
            done = set(s.units())
            free = [n for n in range(0, s.size // s.unit, step // s.unit) if n not in done][::20]
            expect(len(free) > MOST, f"only {len(free)} wait")
            Task(lambda: [s.disk.write(n * s.unit, b"w" * s.unit) for n in free]).finish(HANG)
        finally:
            stop.set()
            watcher.finish()
        note(f"{max(looks) - limit + ROOM} of {ROOM} bytes at the most, {s.status()}")
        expect(max(looks) <= limit, f"{max(looks)} bytes of states, the limit is {limit}")
    s.disk.fsync()
    s.all_down()
    expect(not set(s.units()) & set(free), "what was written is discarded")
    for n in free:
        same(s.disk.read(n * s.unit, 2 * s.unit), b"w" * s.unit + bytes(s.unit), n * s.unit)
    for at in range(0, s.size, step):
        same(s.disk.read(at + s.unit, step - s.unit), bytes(step - s.unit), at)
    expect(s.status().mode == "rw", f"{s.status()}")
    s.shut()


# A thin volume

class Thin:
    """A volume of dm-thin, whose space is counted."""

    def __init__(self, bench, size):
        data, meta = (bench.add(Loop(bench.file(name, length))).path
                      for name, length in (("pool", size + 8 * MIB), ("pool-meta", 4 * MIB)))
        pool = bench.add(Dm("pool", f"0 {device_sectors(data)} thin-pool {meta} {data} 128 0"))
        run("dmsetup", "message", pool.name, 0, "create_thin 0")
        self.dm = bench.add(Dm("thin", f"0 {size // 512} thin {pool.path} 0"))
        self.path = self.dm.path

    def mapped(self):
        """Bytes that it occupies."""
        (_, line), = dm_ioctl(DM_TABLE_STATUS, self.dm.name).targets
        return int(line.split()[0]) * 512


class Mounted:
    def __init__(self, dm, where):
        self.where = where
        os.makedirs(where, exist_ok=True)
        run("mount", "-t", "ext4", "-o", "noatime", dm.path, where)

    def close(self):
        run("umount", self.where)


@test("dm-thin and ext4: fstrim frees what an earlier table has not passed down")
def thin(bench):
    size, lost = 96 * MIB, 40 * MIB
    volume = Thin(bench, size)
    image = bench.image(size, data=volume.path)
    image.attach()
    # This one passes nothing down: all that it discards is forgotten.
    dm = image.open("no_discard_passdown")
    run("mkfs.ext4", "-q", "-F", "-b", 4096, "-O", "^has_journal", "-E", "nodiscard,lazy_itable_init=0", dm.path)
    where = bench.path("mnt")
    mounted = bench.add(Mounted(dm, where))
    for name, length in (("keep", 8 * MIB), ("lose", lost)):
        with open(f"{where}/{name}", "wb") as f:
            f.write(name.encode() * (length // 4))
    os.sync()
    os.unlink(f"{where}/lose")
    os.sync()
    run("fstrim", where)
    bench.drop(mounted)
    bench.drop(dm)
    full = volume.mapped()
    expect(full >= lost, f"only {full} bytes are mapped")
    zero = image.states().count("zero") * image.unit
    expect(zero >= lost - 4 * MIB, f"only {zero} bytes are zero")
    dm = image.open()
    mounted = bench.add(Mounted(dm, where))
    run("fstrim", where)
    os.sync()
    wait_for(f"the volume has {volume.mapped()} bytes, and had {full}", 60,
             lambda: volume.mapped() <= full - lost + 4 * MIB)
    note(f"{full // MIB} MiB, then {volume.mapped() // MIB} MiB")
    with open(f"{where}/keep", "rb") as f:
        same(f.read(), b"keep" * (2 * MIB), 0, "file")
    bench.drop(mounted)
    run("e2fsck", "-f", "-n", dm.path)
    bench.drop(dm)
    image.check()


if __name__ == "__main__":
    run("modprobe", "-q", "-a", "dm-thin-pool", "ext4", ok=False)
    main()
