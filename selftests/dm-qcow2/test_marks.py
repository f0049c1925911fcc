#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Marks of bitmaps, and taking them back, request by request: each fails once, or stands
still while others come. The devices below are served by this process (served.py), which looks
at each request: nothing may change whose bits are not durable, and no write may take away a bit
of what has changed since its bitmap began to record.
"""
import errno
import hashlib
import itertools
import os
import random
import time

from bitmaps import bitmaps, qemu_takes, setup
from qcow2image import OFFSET_MASK
from qcow2test import KIB, MIB, Dm, Failure, Io, Task, expect, main, note, run, same, some, test, wait_for
from served import HANG, Script, Served

SEED = int(os.environ.get("FAULTS_SEED", "1"))
# What nobody has asked for is taken back after two seconds without a mark.
PERIOD = 1.8
BLOCK = 4096
# Seconds for what must not happen
PAUSE = 1


class Marks:
    """An image with bitmaps on served devices, and what must be marked in it."""

    def __init__(self, bench, size, granularities, before=(), **options):
        """before: bitmaps in which some bits have been set since before the table is there"""
        self.bench = bench
        run("modprobe", "nbd", "nbds_max=4", "max_part=0")
        cluster = options.pop("cluster")
        self.raw = "raw" in options
        self.all_data = self.raw or "written" in options
        image, self.names = setup(bench, cluster, size, granularities, options)
        self.image, self.size = image, image.size
        rng = random.Random(SEED)
        for name in self.names:
            b = bitmaps(image)[name]
            b.put(rng.getrandbits(b.count) if name in before else 0)
        image.extend()
        self.bitmaps = [bitmaps(image)[name] for name in self.names]
        self.before = [b.content() for b in self.bitmaps]
        self.places = [(entry & OFFSET_MASK, n, i * 8 * cluster) for n, b in enumerate(self.bitmaps)
                       for i, entry in enumerate(b.clusters())]
        self.cluster = cluster
        with open(image.path, "rb") as f:
            self.start = [f.read()]
        with open(image.data, "rb") as f:
            self.start.append(f.read())
        self.script = Script()
        self.meta = bench.add(Served("metadata", 0, -(-len(self.start[0]) // 4096) * 4096, self.script))
        self.data = bench.add(Served("data", 1, -(-self.size // 512) * 512, self.script))
        self.line = image.line(self.meta.path, self.data.path, "bitmaps")
        self.sound = set()
        self.reset()

    def reset(self):
        self.script.rest()
        for served, content in zip((self.meta, self.data), self.start):
            served.load(content)
        # Ranges that requests have asked to change, and what is marked for those that are done
        self.asked, self.must, self.faults = [], list(self.before), []
        self.awaited = None     # what is to stand still next
        self.script.name = self.what

    def begin(self, nth=None, how=None):
        self.script.begin(nth, how)
        self.script.hold, self.script.watch = self.look, self.written

    def where(self, offset):
        """The bitmap and its bit that is first there"""
        return next(((n, bit + (offset - start) * 8) for start, n, bit in self.places
                     if start <= offset < start + self.cluster), None)

    def what(self, request):
        what = "bitmap" if request.device == "metadata" and request.op != "flush" and self.where(request.offset) \
            else request.device
        return f"{request.op} {what}"

    def granules(self, ranges):
        return [b.granules(ranges) if ranges else 0 for b in self.bitmaps]

    def content(self, store):
        """The bits of all bitmaps in a content of the metadata device"""
        found = [0] * len(self.bitmaps)
        for start, n, bit in self.places:
            found[n] |= int.from_bytes(store[start:start + self.cluster], "little") << bit
        return found

    def lacks(self, store, want):
        return [f"{b.name} lacks {(w & ~have).bit_count()} granules"
                for b, have, w in zip(self.bitmaps, self.content(store), want) if w & ~have]

    def look(self, request):
        """Requests come by here before they are done. True: it is to stand still."""
        if request.device == "data" and request.op in ("write", "discard"):
            end = request.offset + request.length
            hit = [(max(at, request.offset), min(at + length, end) - max(at, request.offset))
                   for at, length in self.asked if at < end and request.offset < at + length]
            self.faults += [f"{request.op} of data at {request.offset:#x}, but {text}"
                            for text in self.lacks(self.meta.durable, self.granules(hit))]
        if self.awaited == self.what(request):
            self.awaited = None
            return True
        return False

    def written(self, request, data):
        """Metadata has been written."""
        place = self.where(request.offset) if request.device == "metadata" else None
        if not place:
            return
        n, bit = place
        want = self.must[n] >> bit & ((1 << 8 * len(data)) - 1)
        gone = want & ~int.from_bytes(data, "little")
        if gone:
            self.faults.append(f"a write at {request.offset:#x} takes {gone.bit_count()} granules from "
                               f"{self.bitmaps[n].name}")

    def ask(self, *ranges):
        """Requests are to be sent."""
        self.asked += ranges

    def done(self, *ranges):
        """They have changed what they asked for."""
        self.must = [a | b for a, b in zip(self.must, self.granules(ranges))]
        self.sound_marks("a request has ended")

    def sound_marks(self, when):
        self.faults += [f"{when}, but {text}" for text in self.lacks(self.meta.durable, self.must)]
        if self.faults:
            raise Failure(f"{'; '.join(self.faults[:3])}")

    def exact(self, when):
        """Nothing is marked without need."""
        want = [a | b for a, b in zip(self.before, self.granules(self.asked))]
        for b, have, w in zip(self.bitmaps, self.content(self.meta.store), want):
            expect(have == w, f"{when}: {b.name}: {(w & ~have).bit_count()} granules lack, "
                              f"{(have & ~w).bit_count()} are too many")

    def valid(self):
        """QEMU has nothing to say against what is left."""
        digest = hashlib.sha256(self.meta.store).digest()
        if digest in self.sound:
            return
        with open(self.image.path, "wb") as f:
            f.write(self.meta.store)
        qemu_takes(self.image, self.names)
        self.sound.add(digest)

    def stop(self, what):
        """The next request of this kind stands still."""
        self.awaited = what

    def stopped(self, what):
        wait_for(f"{what} is made", HANG, lambda: not self.awaited)

    def go(self):
        self.meta.release()


def sync(dm):
    """Take back what is not needed; an errno."""
    try:
        dm.message("bitmap_sync")
    except OSError as e:
        return e.errno
    return 0


# What is done: kinds of requests, and where
STEPS = (
    ("write", 0, 4096),
    ("write", MIB + 512, 1024),
    ("write", 2 * MIB - 8 * KIB, 16 * KIB),
    ("discard", 3 * MIB, 64 * KIB),
    *(("write", 2 * MIB + n * 16 * KIB, 16 * KIB) for n in range(1, 7)),
    ("sync",),
    ("write", 2 * MIB + 7 * 16 * KIB, 16 * KIB),
    ("fsync",),
    *(("write", 2 * MIB + n * 16 * KIB, 16 * KIB) for n in range(8, 11)),
    ("cycle",),
    ("write", MIB + 512, 1024),
    ("write", 2 * MIB + 512 * KIB, 4096),
    *(("write", 2 * MIB + 512 * KIB + n * 4096, 4096) for n in range(1, 4)),
    ("sync",),
)
# Requests for marks, and for taking back
OURS = ("read bitmap", "write bitmap", "flush metadata")


class Attempt:
    """All steps, and a request for marks that fails."""

    def __init__(self, rig, nth=None, how=None, half=False, retry=0):
        self.rig, self.script = rig, rig.script
        self.retry, self.how = retry, how
        rig.reset()
        self.dm = Dm("q", rig.line)
        try:
            self.disk = Io(self.dm.path)
            try:
                rig.begin(nth, how)
                if half:
                    self.script.done = self.script.half
                self.mode, self.pardoned = "rw", 0
                self.again = []
                self.stream, self.end = False, None
                self.marked = time.monotonic()
                for number, step in enumerate(STEPS):
                    self.script.step = number
                    self.do(number, *step)
                self.failed, self.trace = list(self.script.failed), list(self.script.trace)
                self.recover()
            finally:
                self.script.rest()
                self.disk.close()
        finally:
            self.dm.close()
        rig.sound_marks("closed")
        if self.mode == "rw":
            rig.exact("closed")
        rig.valid()

    def act(self, kind, at=0, length=0, byte=b"x"):
        """An errno"""
        try:
            if kind == "write":
                self.disk.write(at, byte * length)
            elif kind == "discard":
                self.disk.discard(at, length)
            elif kind == "fsync":
                self.disk.fsync()
            elif kind == "sync":
                return sync(self.dm)
            else:
                self.dm.cycle()
        except OSError as e:
            return e.errno
        return 0

    def lost(self):
        """Have flushes failed, but for those of a resume?"""
        return [self.rig.what(r) for r, _ in self.script.failed].count("flush metadata") > self.pardoned

    def check_mode(self, text):
        """It is fail since a flush has failed, whoever it was for."""
        lost = self.lost()
        if lost:
            wait_for("mode fail", HANG, lambda: self.dm.mode() == "fail")
        else:
            mode = self.dm.mode()
            lost = self.lost()
            expect(mode == "rw" or lost, f"{text}: {self.dm.status()}")
        self.mode = "fail" if lost else "rw"

    def do(self, number, kind, at=0, length=0):
        rig = self.rig
        before = bytes(rig.data.store[at:at + length])
        # Marks ahead of a stream are nobody's: who writes there later fails if he has to wait for one.
        if length:
            self.stream, self.end = at == self.end, at + length
            rig.ask((at, length))
        own = length and not self.stream and rig.lacks(rig.meta.durable, rig.granules([(at, length)]))
        error = self.act(kind, at, length, bytes([0x41 + number]))
        failed = [rig.what(r) for r, step in self.script.failed if step == number]
        # Other writes and flushes may be of commits.
        mark = any("bitmap" in what or (what == "flush metadata" and rig.raw) for what in failed)
        # On a slow machine that was nobody's: what is not needed was just taken back.
        late = time.monotonic() - self.marked > PERIOD
        text = f"{self.how}, {', '.join(failed) or 'nothing'} failed: {kind} at {at:#x}: errno {error}"
        if kind == "cycle" and error and failed == ["flush metadata"]:
            # That is of the resume, which has changed nothing so far.
            self.pardoned += 1
            self.dm.resume()
        elif length and error:
            expect(error == errno.EIO and self.script.failed, text)
            expect(rig.data.store[at:at + length] == before, f"{text}, and the data has changed")
            expect(not rig.all_data or self.disk.read(at, length) == before, f"{text}, and it reads as something else")
            self.again.append((kind, at, length))
        elif length:
            expect(not mark or late or not own, text)
            rig.done((at, length))
        elif kind == "sync":
            expect(mark or late or not error or self.lost() or self.how == "protected", text)
            expect(error or late or not mark or self.stream, text)
        elif kind == "fsync":
            # Nor can commits be made then.
            expect(not error or self.lost() or self.how == "protected", text)
        else:
            # At suspend it is tried again.
            expect(not error, text)
        if "write bitmap" in [rig.what(r) for r in self.script.steps.get(number, ())]:
            self.marked = time.monotonic()
        self.check_mode(text)
        rig.sound_marks(text)

    def recover(self):
        """The metadata device works again."""
        rig = self.rig
        self.check_mode("the last step")
        self.script.nth = self.script.dead = self.script.how = None
        if self.mode == "fail":
            # What is marked may change, what is not must not; until there is a new table.
            for at, length, want in ((0, 4096, None), (3 * MIB + 512 * KIB, 4096, errno.EIO)):
                before = rig.data.store[at:at + length]
                error = self.act("write", at, length)
                expect(error in (0, errno.EIO) if want is None else error == want, f"mode fail: write at {at:#x}: {error}")
                expect(not error or rig.data.store[at:at + length] == before, "mode fail: the data has changed")
            self.dm.cycle()
            expect(self.dm.mode() == "fail", f"{self.dm.status()}")
            rig.sound_marks("mode fail")
            return
        if self.retry == 0:
            # By itself, in its own time
            want = rig.granules([self.piece(at, length) for _, at, length in self.again if self.noted()])
            wait_for("marks are written again", HANG, lambda: not rig.lacks(rig.meta.durable, want))
        elif self.retry == 1:
            expect(not sync(self.dm), "bitmap_sync fails again")
        elif self.retry == 2:
            self.dm.cycle()
        for kind, at, length in self.again:
            expect(not self.act(kind, at, length, b"r"), f"{kind} at {at:#x} fails again")
            rig.done((at, length))
            if kind == "write":
                same(self.disk.read(at, length), b"r" * length, at)
        expect(self.dm.mode() == "rw", f"{self.dm.status()}")
        expect(not sync(self.dm), "bitmap_sync")
        rig.exact("bitmap_sync")

    def noted(self):
        """Have requests that have failed been taken note of? Not if bits could not be read."""
        return not any(self.rig.what(r) == "read bitmap" for r, _ in self.failed)

    def piece(self, at, length):
        """What of a request is marked first: what is in one block"""
        most = min(b.granularity for b in self.rig.bitmaps) * 8 * min(BLOCK, self.rig.cluster)
        return at, min(length, most - at % most)


KINDS = (
    ("clusters of 64 KiB, data_file_raw", 4 * MIB + 512, (64 * KIB, 4 * KIB), {"cluster": 64 * KIB, "raw": True}),
    ("clusters of 512 bytes", 4 * MIB + 1536, (512,), {"cluster": 512, "written": 4 * MIB}),
    ("extended L2, not written", 4 * MIB, (4 * KIB, 512, 1 * MIB),
     {"cluster": 16 * KIB, "extended": True, "before": ("b1",)}),
)


def sweep(bench, size, granularities, options):
    """Each request for marks, or for taking back, fails: once, also with a half of it done; or from
    then on there are no writes of metadata."""
    rig = Marks(bench, size, granularities, **options)
    first = Attempt(rig)
    kinds = [k for k in rig.script.kinds(first.trace) if k[0] in OURS]
    count = {}
    retries = itertools.cycle(range(4))
    writes = [k for k in kinds if k[0].startswith("write")]
    for how, half, which in (("once", False, kinds), ("once", True, writes[::3]), ("protected", False, writes[1::3])):
        for nth in which:
            a = Attempt(rig, nth, how, half, next(retries))
            key = f"{how}{' with a half' * half}: {nth[0]}"
            count[key] = count.get(key, 0) + bool(a.failed)
    missing = {"read bitmap", "write bitmap", "flush metadata"} - {k[0] for k in kinds}
    expect(not missing, f"the steps make no {missing}")
    note("; ".join(f"{key} {n}" for key, n in count.items()))
    expect(all(count.values()), "nothing has failed of a kind")


@test("requests of all kinds change something when that is marked")
def marked_first(bench):
    for _, *what, options in KINDS:
        Attempt(Marks(bench, *what, **options))
        while bench.things:
            bench.drop(bench.things[-1])


for _name, *_what in some(KINDS, 2):
    test(f"each request of marks fails: {_name}", *_what)(sweep)


def ahead(rig, dm, disk, at=MIB, step=16 * KIB):
    """Write on and on, until what comes next is marked ahead in all bitmaps; where that is."""
    for _ in range(64):
        rig.ask((at, step))
        disk.write(at, b"s" * step)
        rig.done((at, step))
        at += step
        want = rig.granules([(at, BLOCK)])
        if any(w & ~must for w, must in zip(want, rig.must)) and not rig.lacks(rig.meta.durable, want):
            return at
    raise Failure(f"nothing is marked ahead: {dm.status()}")


class Late:
    """A write that may have to wait. It is among what has changed as soon as it has ended."""

    def __init__(self, rig, disk, at):
        self.rig, self.at = rig, at
        rig.ask((at, BLOCK))
        self.task = Task(self.write, disk)

    def write(self, disk):
        disk.write(self.at, b"l" * BLOCK)
        self.rig.must = [a | b for a, b in zip(self.rig.must, self.rig.granules([(self.at, BLOCK)]))]

    def ends(self):
        """Give it time to do what it must not."""
        self.task.join(PAUSE)
        return not self.task.is_alive()


@test("what is marked ahead and is written while it is taken back, is marked")
def write_taken(bench):
    rig = Marks(bench, 4 * MIB, (64 * KIB, 4 * KIB), cluster=64 * KIB, raw=True)
    dm = bench.add(Dm("q", rig.line))
    disk = bench.io(dm)
    rig.begin()
    at = ahead(rig, dm, disk)
    rig.stop("write bitmap")
    task = Task(sync, dm)
    rig.stopped("write bitmap")
    late = Late(rig, disk, at)
    ended = late.ends()
    rig.go()
    task.finish(HANG)
    late.task.finish(HANG)
    rig.sound_marks("taken back")
    expect(not ended, "a request did not wait")
    sync(dm)
    rig.exact("bitmap_sync")


@test("marks wait while bits are taken back")
def mark_taken(bench):
    rig = Marks(bench, 4 * MIB, (4 * KIB,), cluster=64 * KIB, raw=True)
    dm = bench.add(Dm("q", rig.line))
    disk = bench.io(dm)
    rig.begin()
    ahead(rig, dm, disk)
    rig.stop("write bitmap")
    task = Task(sync, dm)
    rig.stopped("write bitmap")
    late = Late(rig, disk, 8 * KIB)
    ended = late.ends()
    rig.go()
    task.finish(HANG)
    late.task.finish(HANG)
    rig.sound_marks("taken back")
    expect(not ended, "a request did not wait")
    sync(dm)
    rig.exact("bitmap_sync")


@test("nothing is taken back while a mark is on its way")
def taken_mark(bench):
    rig = Marks(bench, 4 * MIB, (4 * KIB,), cluster=64 * KIB, raw=True)
    dm = bench.add(Dm("q", rig.line))
    disk = bench.io(dm)
    rig.begin()
    ahead(rig, dm, disk)
    rig.stop("write bitmap")
    first = Late(rig, disk, 8 * KIB)
    rig.stopped("write bitmap")
    # Its mark is not in what is held.
    second = Late(rig, disk, 64 * KIB)
    task = Task(sync, dm)
    ended = second.ends()
    rig.go()
    for thing in (first.task, second.task, task):
        thing.finish(HANG)
    rig.sound_marks("taken back")
    expect(not ended, "a request did not wait")
    sync(dm)
    rig.exact("bitmap_sync")


@test("a mark keeps what the one before marks ahead")
def two_marks(bench):
    rig = Marks(bench, 4 * MIB, (4 * KIB,), cluster=64 * KIB, raw=True)
    dm = bench.add(Dm("q", rig.line))
    disk = bench.io(dm)
    rig.begin()
    step = 16 * KIB
    at = ahead(rig, dm, disk, step=step) - step
    # More is marked by itself before that has been used up.
    rig.stop("flush metadata")
    while rig.awaited:
        at += step
        rig.ask((at, step))
        first = Task(disk.write, at, b"s" * step)
        wait_for("a write, or the next mark", HANG, lambda: not first.is_alive() or not rig.awaited)
        if not first.is_alive():
            rig.done((at, step))
    # It is written, not flushed; here comes another one.
    before = len(rig.script.trace)
    second = Late(rig, disk, 8 * KIB)
    wait_for("there is another mark", HANG, lambda: "write bitmap" in map(rig.what, rig.script.trace[before:]))
    rig.go()
    first.finish(HANG)
    second.task.finish(HANG)
    rig.done((at, step))
    # It was marked ahead by the first one.
    for at in range(at + step, at + 9 * step, step):
        rig.ask((at, step))
        disk.write(at, b"s" * step)
        rig.done((at, step))
    sync(dm)
    rig.exact("bitmap_sync")


@test("bits that one bitmap has had, and another one has not, since before the table: they stay")
def before_table(bench):
    rig = Marks(bench, 4 * MIB, (4 * KIB, 4 * KIB, 64 * KIB), cluster=4 * KIB, before=("b1", "b2"))
    dm = bench.add(Dm("q", rig.line))
    disk = bench.io(dm)
    rig.begin()
    ahead(rig, dm, disk)
    expect(not sync(dm), "bitmap_sync")
    rig.sound_marks("bitmap_sync")
    rig.exact("bitmap_sync")
    ahead(rig, dm, disk, at=2 * MIB)
    dm.cycle()
    rig.sound_marks("suspended")
    rig.exact("suspended")
    bench.drop(disk)
    bench.drop(dm)
    rig.script.rest()
    rig.valid()


if __name__ == "__main__":
    main()
