#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Entries of a commit fail one by one: those that could be written are durable, the
others stay dirty, and become durable when their place can be written again.

The devices are those of test_faults.py: this process serves them, so it can look at
what they hold at any instant.

Environment: SEED (printed, to repeat a run).
"""
import errno
import os
import random
import threading
import time

from qcow2test import KIB, Dm, Failure, Io, expect, fails_with, main, note, same, some, test, wait_for
from served import HANG
from faultrig import SMALL, Aio, Rig

SEED = int(os.environ.get("SEED", time.time_ns() // 1000 % 1000000))


class Fua:
    """Writes with FUA and nothing else: the file layer lets a flush follow those of
    O_DSYNC."""

    def __init__(self, disk):
        self.aio = Aio(disk.fd, 1, 64 * KIB)

    def write(self, offset, data):
        n, = self.aio.submit([(Aio.WRITE, offset, len(data), Aio.DSYNC)], data)
        result, = self.aio.all([n])
        if result < 0:
            raise OSError(-result, os.strerror(-result))

    def close(self):
        self.aio.close()


class Disk:
    """The device under test on a rig."""

    def __init__(self, bench, rig):
        self.bench = bench
        self.dm = bench.add(Dm("q", rig.line))
        self.io = bench.add(Io(self.dm.path))
        self.fua = bench.add(Fua(self.io))
        self.events = self.dm.events()

    def look(self, unwritten, events):
        """Mode rw, some entries or none are unwritten, so many events."""
        status, told = self.dm.status(), self.dm.events() - self.events
        expect(status.mode == "rw", f"{status}")
        expect((status.unwritten > 0) == unwritten, f"{'none' if unwritten else 'some'} are unwritten: {status}")
        expect(told == events, f"{told} events, {events} expected: {status}")

    def close(self):
        for thing in (self.fua, self.io, self.dm):
            self.bench.drop(thing)


def dump(rig, meta, data):
    """Put what the devices hold where the image's files are."""
    for path, content in ((rig.image.path, meta), (rig.image.data, data)):
        with open(path, "wb") as f:
            f.write(content)


# Writes that refer to what has to be durable before
LINKS = ("write L1 table", "write L2 table", "write refcount table")


def alone(rig, request, data):
    """Metadata and data after a power cut of which nothing is left that was not flushed,
    but this write."""
    meta = bytearray(rig.meta.durable)
    meta[request.offset:request.offset + len(data)] = data
    return meta, rig.data.durable


class Commit:
    """Some first writes and their commit, in which some places cannot be written."""

    def __init__(self, bench, options, places):
        """places: table and unit of first writes, in this order"""
        self.bench, self.rig = bench, Rig(bench, **options)
        rig = self.rig
        self.block = min(4 * KIB, rig.image.cluster)
        self.places = [t * rig.cover + u * rig.unit for t, u in places]
        self.fault = None       # of what was watched
        self.want = bytearray(rig.content)
        for at in self.places:
            self.want[at:at + rig.unit] = b"n" * rig.unit
        self.learn()

    def writes(self, disk):
        for at in self.places:
            disk.io.write(at, b"n" * self.rig.unit)

    def metadata(self, op):
        """Where metadata was written or read so far, in order."""
        return [r.offset for r in self.rig.script.trace if r.device == "metadata" and r.op == op]

    def learn(self):
        """When nothing fails: what the first writes write, what the commit writes and
        reads, and on which of the latter each unit depends."""
        rig, script = self.rig, self.rig.script
        script.name = lambda request: rig.what(request, ())
        for _ in range(100):
            rig.reset()
            disk = Disk(self.bench, rig)
            script.begin(None, None)
            self.writes(disk)
            early = {op: self.metadata(op) for op in ("write", "read")}
            timer = "flush data" in map(script.name, script.trace)
            disk.io.fsync()
            late = {op: self.metadata(op)[len(early[op]):] for op in early}
            disk.close()
            if not timer:
                break
        else:
            raise Failure("the timer's commit was always there first")
        # How often a place is written before the commit, and read
        self.early = {(op, at): early[op].count(at) for op in early for at in late[op]}
        self.written, self.read = sorted(set(late["write"])), sorted(set(late["read"]))
        dump(rig, *(served.store for served in rig.below))
        self.finished()
        self.needs = {at: self.depends(at) for at in self.places}

    def depends(self, at):
        """The blocks without which a unit is not durable."""
        image, cluster = self.rig.image, self.rig.image.cluster

        def block(start, pos):
            return start + (pos - start) // self.block * self.block

        def entry(guest):
            return block(image.l2_table(guest), image.l2_pos(guest))
        i = at // self.rig.cover
        if i not in self.rig.missing:
            return {entry(at)}
        # Of a new table all blocks, and what has to be there before it is linked
        needs = {entry(guest) for guest in self.places if guest // self.rig.cover == i}
        needs.add(block(image.get("l1_table_offset"), image.l1_pos(i)))
        number = image.l2_table(at) // cluster
        region = number // image.per_block()
        refblock = image.u64(image.reftable_pos(region))
        needs.add(block(refblock, image.refcount_pos(number)))
        if (refblock, refblock + cluster, "refcount block") not in self.rig.places:
            needs.add(block(refblock, image.refcount_pos(refblock // cluster)))
            needs.add(block(image.get("refcount_table_offset"), image.reftable_pos(region)))
        return needs

    def finished(self):
        """All is there, nothing is lost, and nothing else has changed."""
        self.rig.check(leaks=False)
        same(self.rig.image.content(), bytes(self.want), 0, "image")

    def run(self, bad, op="write", done=None):
        """bad: the places that cannot be written, or read"""
        rig, script = self.rig, self.rig.script
        rig.reset()
        disk = Disk(self.bench, rig)
        seen = dict.fromkeys(bad, 0)

        def refuse(request):
            if request.device != "metadata" or request.op != op or request.offset not in seen:
                return False
            seen[request.offset] += 1
            return seen[request.offset] > self.early[op, request.offset]
        script.begin(None, None)
        script.refuse, script.done, script.watch = refuse, done or script.none, self.watch
        self.writes(disk)
        for _ in range(2):
            with fails_with(errno.EIO):
                disk.io.fsync()
        disk.look(True, 1)
        if self.fault:
            raise self.fault
        self.instant(bad, op, exact=not done)
        # Whose own entries are durable is not told of those of others.
        for at in self.places:
            if bad & self.needs[at]:
                with fails_with(errno.EIO):
                    disk.fua.write(at, b"n" * rig.unit)
            else:
                disk.fua.write(at, b"n" * rig.unit)
            same(disk.io.read(at, rig.unit), b"n" * rig.unit, at)
        disk.look(True, 1)
        script.rest()
        disk.io.fsync()
        disk.look(False, 1)
        disk.close()
        for kind in ("durable", "store"):
            dump(rig, *(getattr(served, kind) for served in rig.below))
            self.finished()

    def units(self, meta, data):
        """Metadata like this is sound; what units are by it."""
        rig = self.rig
        with open(rig.image.path, "wb") as f:
            f.write(meta)
        rig.check(leaks=True, content=meta)
        states = rig.image.states()
        for at in self.places:
            if states[at // rig.unit] == "data":
                same(data[at:at + rig.unit], b"n" * rig.unit, at)
        return states

    def watch(self, request, data):
        if self.rig.what(request, ()) in LINKS and not self.fault:
            try:
                self.units(*alone(self.rig, request, data))
            except Exception as e:  # pylint: disable=broad-except # run() raises it, the server goes on
                self.fault = Failure(f"{self.rig.what(request, ())}, and nothing else that was not flushed: {e}")

    def instant(self, bad, op, exact):
        """A power cut now would leave an image that is good, and has the units that need
        nothing of what is bad. Unless exact, that can be there all the same."""
        rig = self.rig
        # The timer goes on to try.
        with rig.script.gate:
            states = [self.units(getattr(rig.meta, kind), getattr(rig.data, kind)) for kind in ("store", "durable")]
        for at in self.places:
            where = f"{op} of {bad}: unit {at // rig.unit} of table {at // rig.cover}"
            for state in (s[at // rig.unit] for s in states):
                if not bad & self.needs[at]:
                    expect(state == "data", f"{where} is {state}, although it needs {self.needs[at]}")
                elif exact or op == "read":
                    expect(state != "data", f"{where} is data, although it needs {self.needs[at]}")


# Name, options of the rig, first writes (table and unit), what fails
COMMITS = (
    ("two old tables and three new ones", {"covers": 6.5},
     ((0, 9), (2, 9), (1, 9), (3, 9), (0, 20), (4, 9)), "none, all, some, read"),
    ("several refcount blocks and blocks of L1", {**SMALL, "spare": 2},
     ((0, 9), (60, 9), (70, 9), (61, 9), (1, 9), (71, 9), (100, 9), (70, 20)), "none, half, all, some, read"),
    ("tables of two blocks", {"cluster": 8 * KIB, "covers": 2.5, "tables": 1},
     ((0, 9), (0, 600), (1, 9), (1, 600), (2, 9)), "none, some, read"),
)
FAILS = {"none": "one write fails", "half": "one write is done by half, and fails",
         "all": "one write is done, but fails", "some": "several writes fail", "read": "one read fails"}


def one_by_one(bench, options, places, what):
    c = Commit(bench, options, places)
    done = {"half": c.rig.script.half, "all": c.rig.script.all}.get(what)
    if what == "read":
        expect(c.read, "the commit reads nothing")
        for at in c.read:
            c.run({at}, "read")
        return note(f"{len(c.read)} reads")
    if what == "some":
        rng = random.Random(SEED)
        sets = [set(rng.sample(c.written, rng.randrange(2, len(c.written)))) for _ in range(5)]
        sets.append(set(c.written))
    else:
        sets = [{at} for at in c.written]
    for bad in sets:
        # Some of what is written may be needed by no one of these units.
        if any(bad & needs for needs in c.needs.values()):
            c.run(bad, "write", done)
    needed = set().union(*c.needs.values())
    expect(needed <= set(c.written), f"not written: {needed - set(c.written)}")
    return note(f"{len(c.written)} writes, {len(sets)} times some of them fail")


class Load:
    """Random requests, while metadata can sometimes not be written or read."""
    STEPS = 150
    MOST = 50           # power cuts that are watched besides

    def __init__(self, bench, options):
        self.bench, self.rig = bench, Rig(bench, **options)
        self.rng = random.Random(SEED)
        self.core = bytearray(self.rig.content)
        # Sectors that were changed: all that they may be after a power cut
        self.history = {}
        self.chance = 0
        self.number = self.errors = self.cuts = self.watched = 0
        self.lock = threading.Lock()    # of the history
        self.current = None             # the request that is under way
        self.fault = None

    def refuse(self, request):
        return request.device == "metadata" and request.op in ("read", "write") and self.rng.random() < self.chance

    def done(self, length):
        return self.rng.choice((0, length // 1024 * 512, length))

    def begin(self):
        script = self.rig.script
        script.name = lambda request: self.rig.what(request, ())
        script.begin(None, None)
        script.refuse, script.done, script.watch = self.refuse, self.done, self.watch

    def watch(self, request, data):
        """In the middle of a commit, or even of a request. Not each time: most of it is
        entries that are written again and again."""
        what = self.rig.what(request, ())
        if self.fault or what not in LINKS or self.watched > self.MOST or \
                (what == "write L2 table" and self.rng.random() > 0.1):
            return
        self.watched += 1
        with self.lock:
            try:
                self.judge(*alone(self.rig, request, data), self.current)
            except Exception as e:  # pylint: disable=broad-except # cut() raises it, the server goes on
                self.fault = Failure(f"{what}, and nothing else that was not flushed: {e}")

    def change(self, offset, data):
        """A request has been made."""
        with self.lock:
            self.account(offset, data)

    def account(self, offset, data):
        for at in range(offset, offset + len(data), 512):
            old = bytes(self.core[at:at + 512])
            self.history.setdefault(at, {old}).add(data[at - offset:at - offset + 512])
        self.core[offset:offset + len(data)] = data

    def settle(self, offset, length):
        """These sectors are durable."""
        with self.lock:
            for at in self.history:
                if offset <= at < offset + length:
                    self.history[at] = {bytes(self.core[at:at + 512])}

    def place(self):
        """Some units or sectors of one table, often of few of them"""
        rig, rng = self.rig, self.rng
        tables = -(-rig.size // rig.cover)
        table = rng.choice((0, 0, 1, rng.randrange(tables))) % tables
        start = table * rig.cover + rng.randrange(24) * rig.unit
        length = rng.randrange(1, 4) * rig.unit
        if rig.unit > 512 and rng.random() < 0.4:
            start += rng.randrange(rig.unit // 512) * 512
            length = rng.randrange(1, 2 * rig.unit // 512) * 512
        start = min(start, rig.size - 512)
        return start, min(length, rig.size - start)

    def step(self, disk):
        rig, rng = self.rig, self.rng
        self.number += 1
        kind = rng.choices(("write", "fua", "discard", "fsync", "read", "cycle", "weather"),
                           (40, 8, 0 if rig.raw else 12, 14, 8, 2, 12))[0]
        offset, length = self.place()
        data = bytes([self.number % 251 + 1]) * length
        try:
            if kind == "weather":
                self.chance = rng.choice((0, 0.1, 0.4, 1))
            elif kind == "cycle":
                disk.dm.suspend()
                # A resume that has to read the disk can fail.
                status, self.chance = disk.dm.status(), 0
                expect(status.mode == "rw", f"suspended: {status}")
                disk.dm.resume()
            elif kind == "fsync":
                disk.io.fsync()
                self.settle(0, rig.size)
            elif kind == "read":
                same(disk.io.read(offset, length), self.core[offset:offset + length], offset)
            elif kind == "discard":
                start = -(-offset // rig.unit) * rig.unit
                end = (offset + length) // rig.unit * rig.unit
                if start < end:
                    offset, length, data = start, end - start, bytes(end - start)
                    self.current = offset, data
                    disk.io.discard(offset, length)
                    self.change(offset, data)
            else:
                self.current = offset, data
                (disk.fua if kind == "fua" else disk.io).write(offset, data)
                self.change(offset, data)
                if kind == "fua":
                    self.settle(offset, length)
        except OSError as e:
            expect(e.errno == errno.EIO and self.chance, f"{kind}: {e}")
            self.errors += 1
            if kind in ("write", "fua", "discard"):
                self.half_done(disk, offset, data)
        self.current = None

    def half_done(self, disk, offset, data):
        """Of a request that has failed each sector is old or new; what it is is not known
        before it can be read."""
        before, self.chance = self.chance, 0
        got = disk.io.read(offset, len(data))
        for at in range(0, len(data), 512):
            sector = got[at:at + 512]
            expect(sector in (self.core[offset + at:offset + at + 512], data[at:at + 512]),
                   f"sector {(offset + at) // 512} is neither old nor new after an error")
            if sector == data[at:at + 512]:
                self.change(offset + at, sector)
        self.chance = before

    def cut(self):
        """What a power cut would leave now, or any loss of what was not flushed."""
        rig = self.rig
        with rig.script.gate:
            states = []
            for served in rig.below[:2]:
                content, share = bytearray(served.durable), self.rng.choice((0, 0.5, 1))
                for start, part in served.pending:
                    if self.rng.random() < share:
                        content[start:start + len(part)] = part
                states.append(content)
            with self.lock:
                self.judge(*states)
        self.cuts += 1
        if self.fault:
            raise self.fault

    def judge(self, meta, data, current=None):
        """Such metadata and data are sound, and have what they may have."""
        rig = self.rig
        dump(rig, meta, data)
        rig.check(leaks=True, content=meta)
        got = bytearray(rig.image.content())
        for at, allowed in self.history.items():
            sector = bytes(got[at:at + 512])
            if sector not in allowed and not self.covers(current, at, sector):
                raise Failure(f"after a power cut sector {at // 512} (unit {at // rig.unit}) is {sector[:4].hex()}, "
                              f"not {' or '.join(sorted(a[:4].hex() for a in allowed))}")
            got[at:at + 512] = rig.content[at:at + 512]
        if current:
            for at in range(current[0], current[0] + len(current[1]), 512):
                if self.covers(current, at, bytes(got[at:at + 512])):
                    got[at:at + 512] = rig.content[at:at + 512]
        same(bytes(got), rig.content, 0, "what was never written")

    @staticmethod
    def covers(current, at, sector):
        """Can a request that is under way have written this sector?"""
        if not current or not current[0] <= at < current[0] + len(current[1]):
            return False
        return sector == current[1][at - current[0]:at - current[0] + 512]

    def run(self):
        rig = self.rig
        rig.reset()
        disk = Disk(self.bench, rig)
        self.begin()
        for n in range(10 * self.STEPS):
            if n >= self.STEPS:
                # No luck so far: nothing works until something has failed.
                self.chance = 1
                if self.errors:
                    break
            self.step(disk)
            status = disk.dm.status()
            expect(status.mode == "rw", f"{status}")
            if n % 10 == 9:
                self.cut()
        self.chance = 0
        disk.io.fsync()
        expect(not disk.dm.status().unwritten, f"{disk.dm.status()}")
        self.settle(0, rig.size)
        self.cut()
        same(disk.io.read(0, rig.size), self.core)
        disk.close()
        rig.script.rest()
        self.cut()
        rig.check(leaks=False)
        note(f"{self.errors} requests failed, {self.cuts + self.watched} power cuts")
        expect(self.errors, "no request failed")


def load(bench, options):
    Load(bench, options).run()


LOADS = (
    ("several tables", {"covers": 6.5}),
    ("small clusters, many refcount blocks", SMALL),
    ("extended L2 entries", {"cluster": 64 * KIB, "extended": True, "tables": 1}),
    ("a backing device", {"backing": True, "covers": 3.5}),
    ("data_file_raw", {"raw": True, "covers": 2}),
)


def tries(bench):
    """A suspend tries three times, with a pause, and does not give up what it has."""
    rig = Rig(bench)
    rig.reset()
    disk, script, unit = Disk(bench, rig), rig.script, rig.unit
    script.name = lambda request: rig.what(request, ())
    disk.io.read(0, unit)
    disk.io.read(rig.cover, unit)
    times = []

    def refuse(request):
        if script.name(request) != "write L2 table" or request.offset != table:
            return False
        times.append(time.monotonic())
        return True
    table = rig.image.l2_table(0)
    script.begin(None, None)
    script.refuse = refuse
    disk.io.write(20 * unit, b"n" * unit)
    disk.io.write(rig.cover + 20 * unit, b"n" * unit)
    # The timer's commit has been, so that there is no other one but those of the suspend.
    wait_for("the timer's commit", HANG, lambda: disk.dm.status().unwritten)
    script.trace.clear()
    times.clear()
    begun = time.monotonic()
    disk.dm.suspend()
    # Before it begins with them, the timer may have tried, once in a second.
    most = 4 + int(time.monotonic() - begun)
    count, status = len(times), disk.dm.status()
    expect(3 <= count <= most, f"{count} tries")
    expect(all(b - a >= 0.25 for a, b in zip(times[-3:], times[-2:])), f"tried at {times}")
    expect(status.mode == "rw" and status.unwritten == 1, f"{status}")
    reads = len([r for r in script.trace if r.op == "read"])
    disk.dm.resume()
    expect(len([r for r in script.trace if r.op == "read"]) == reads, "the resume has read the disk")
    same(disk.io.read(20 * unit, unit), b"n" * unit)
    same(disk.io.read(0, unit), b"a" * unit)
    disk.look(True, 1)
    # Again, and once more it is not lost.
    disk.dm.cycle()
    disk.look(True, 1)
    script.rest()
    disk.dm.cycle()
    disk.look(False, 1)
    disk.close()
    rig.check(leaks=False)
    dump(rig, rig.meta.store, rig.data.store)
    expect(rig.image.state(20 * unit) == "data", "the entry is lost")


PASSDOWNS = 16          # at a time


def early(bench, options):
    """What is passed down is durable, also beside what is not."""
    rig = Rig(bench, **options)
    rig.reset()
    disk, script, unit = Disk(bench, rig), rig.script, rig.unit
    script.name = lambda request: rig.what(request, ())

    def discarded():
        with script.lock:
            return [(r.offset // unit, r.length // unit) for r in script.trace if r.op == "discard"]
    script.begin(None, None)
    odd = range(1, 2 * PASSDOWNS, 2)
    zero, data = 2 * PASSDOWNS + 2, 2 * PASSDOWNS + 3
    disk.io.write(0, b"o" * (data + 1) * unit)
    for n in (*odd, zero):
        disk.io.discard(n * unit, unit)
    disk.io.fsync()
    wait_for("all discards", HANG, lambda: sorted(discarded()) == [(n, 1) for n in (*odd, zero)])
    # A discard of units that are being discarded waits; and what has been passed down is
    # remembered until then.
    disk.dm.cycle()
    disk.look(False, 0)

    script.begin(None, None)
    script.hold = lambda request: request.op == "discard"
    script.refuse = lambda request: request.device == "metadata" and request.op == "write"
    # As many as are passed down at a time: the next one is to wait until it has company.
    for n in odd:
        disk.io.discard(n * unit, unit)
    wait_for("as many discards as there can be", HANG, lambda: len(rig.data.held) == PASSDOWNS)
    disk.io.discard(zero * unit, 2 * unit)
    script.hold = None
    rig.data.release()
    wait_for("the last discard", HANG, lambda: len(discarded()) > PASSDOWNS)
    with fails_with(errno.EIO):
        disk.io.fsync()
    expect(discarded()[-1] == (zero, 1), f"{discarded()[-1]} has been passed down, and {(data, 1)} is not durable")
    script.refuse = None
    disk.io.fsync()
    wait_for("the rest", HANG, lambda: discarded()[-1] == (data, 1))
    disk.look(False, 1)
    disk.close()
    script.rest()
    rig.check(leaks=False)


def register():
    test("a discard beside another that is not durable: clusters of 512 bytes", {**SMALL, "covers": 4, "tables": 1})(early)
    test("a discard beside another that is not durable: clusters of 2 KiB", {})(early)
    commits = [(*commit, what) for *commit, fails in COMMITS for what in fails.split(", ")]
    for name, options, places, what in some(commits, 6):
        test(f"{name}: {FAILS[what]}", options, places, what)(one_by_one)
    test("suspend: three tries with a pause, and what is dirty then is kept")(tries)
    for name, options in some(LOADS, 2):
        test(f"random requests, metadata fails now and then: {name}", options)(load)


if __name__ == "__main__":
    register()
    note(f"SEED={SEED}")
    main()
