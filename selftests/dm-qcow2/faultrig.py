# SPDX-License-Identifier: GPL-2.0-or-later
"""What can be tried with devices that are served by this process (served.py), which
fail on demand: images on them, and scenarios in which each single request fails.
"""
import collections
import ctypes
import errno
import hashlib
import mmap
import os
import random
import struct
import time

from qcow2test import (DM_TABLE_LOAD, KIB, LIBC, Dm, Failure, Io, Task, dm_ioctl, expect, fails_with, note, run, same,
                       wait_for)
from qcow2image import COPIED, CORRUPT, RAW, ZERO
from served import HANG, Fused, Request, Script, Served

SEED = int(os.environ.get("FAULTS_SEED", "1"))
# The options of one: a table has 64 entries, and the next new one needs a refcount block.
SMALL = {"cluster": 512, "refcount_bits": 64, "covers": 128, "tables": 0}
PERIOD = 0.9            # seconds; a little less than the target's own timer for commits


class Rig:
    """An image on served devices, and the state that each attempt starts from."""

    def __init__(self, bench, cluster=2 * KIB, covers=2.5, tables=2, corrupt=False, fua=True, fused=False,
                 odd=False, **options):
        """Table 0: 8 units of data, one zero; then one with one unit of data up to
        "tables" (0: as many as one refcount block has room for, less "spare"); the
        others are not there. fused: of the kind whose errors keep their kind, else
        network block devices. fua: these have FUA writes. odd: a commit has to read
        the block of table 0 that it changes, for it has an entry that is not just the unit's state."""
        self.bench = bench
        spare = options.pop("spare", 0)
        if fused:
            run("modprobe", "fuse")
        else:
            run("modprobe", "nbd", "nbds_max=4", "max_part=0")
        entry = 16 if options.get("extended") else 8
        size = int(covers * cluster * cluster // entry) // 512 * 512 if cluster < 64 * KIB else 1280 * KIB + 512
        backing = None
        rng = random.Random(SEED)
        if options.pop("backing", False):
            backing = bench.file("backing", size)
            with open(backing, "wb") as f:
                f.write(rng.randbytes(size))
        self.image = image = bench.image(size, cluster=cluster, backing=backing, **options)
        if not tables:
            # Such that the next one needs a refcount block
            tables = image.per_block() - image.file_size() // cluster - spare
        self.unit, self.cover, self.raw = image.unit, image.cover, bool(image.get("autoclear_features") & RAW)
        image.qemu_io(*(f"write -q -P {0x61 + t} {t * self.cover} {8 * self.unit if not t else self.unit}"
                        for t in range(tables)))
        image.trim()
        if self.raw:
            # QEMU has made all of it data.
            for n in range(8, 64):
                image.put(n * self.unit, "unallocated")
        else:
            image.put(12 * self.unit, "zero")
        if odd:
            image.set_u64(image.l2_pos(12 * self.unit), (12 * self.unit) | COPIED | ZERO)
        if corrupt:
            image.set_u64(image.l2_pos(self.cover), image.l2(self.cover) + cluster)
        if not self.raw:
            image.poison_unused(SEED)
        end = -(-image.file_size() // cluster) * cluster
        image.extend()
        # What nothing refers to yet need not be zeros.
        image.patch(end, b"\xa5" * (image.file_size() - end))
        self.states = image.states()
        self.missing = {i for i in range(image.tables) if not image.l1(i)}
        self.content = image.content() if not corrupt else bytes(size)
        self.size = size
        self.script, self.corrupt = Script(), corrupt

        def serve(name, number, length):
            length = -(-length // 512) * 512
            if fused:
                return Fused(name, number, length, self.script, bench.dir)
            return Served(name, number, length, self.script, fua)
        self.meta = serve("metadata", 0, -(-image.file_size() // 4096) * 4096)
        self.data = serve("data", 1, size)
        self.below = [self.meta, self.data]
        self.features = []
        if backing:
            self.backing = serve("backing", 2, size)
            self.below.append(self.backing)
            self.features = ["backing_dev", self.backing.path]
        for served in self.below:
            bench.add(served)
        self.line = image.line(self.meta.path, self.data.path, *self.features)
        self.start = [self.file(image.path), self.file(image.data)]
        if backing:
            self.start.append(self.file(backing))
        self.places = self.survey()
        self.sound, self.reopened = set(), []

    @staticmethod
    def file(path):
        with open(path, "rb") as f:
            return f.read()

    def survey(self):
        """The structures of the metadata: (start, end, name)."""
        image, cluster = self.image, self.image.cluster
        places = [(0, cluster, "header"),
                  (image.get("l1_table_offset"), image.get("l1_table_offset") + 8 * image.get("l1_size"), "L1 table"),
                  (image.get("refcount_table_offset"), image.get("refcount_table_offset") +
                   image.get("refcount_table_clusters") * cluster, "refcount table")]
        for i in range(image.reftable_entries()):
            block = image.u64(image.reftable_pos(i))
            if block:
                places.append((block, block + cluster, "refcount block"))
        for i in range(image.tables):
            if image.l1(i):
                table = image.l2_table(i * image.cover)
                places.append((table, table + cluster, "L2 table"))
        return places

    def what(self, request, touched):
        """The name of what a request is for."""
        if request.op in ("flush", "discard"):
            return f"{request.op} {request.device}"
        if request.device == "metadata":
            where = next((name for start, end, name in self.places if start <= request.offset < end), "new cluster")
        elif request.device == "data" and request.op == "write" and not any(
                start <= request.offset < start + length for start, length in touched):
            where = "fill"
        else:
            where = request.device
        return f"{request.op} {where}"

    def reset(self):
        self.script.rest()
        for served, content in zip(self.below, self.start):
            if served.gone:
                served.again()
            served.load(content)

    def check(self, leaks, content=None):
        """QEMU finds nothing wrong with the metadata as it is now, or as it could be."""
        content = content or self.meta.store
        digest = hashlib.sha256(content).digest() + bytes([leaks])
        if digest in self.sound:
            return
        with open(self.image.path, "wb") as f:
            f.write(content)
        self.image.check(leaks)
        self.sound.add(digest)


class TooLate(Exception):
    """The timer's commit came in between: it is not clear whose fault it was."""


# Requests for metadata of which a commit needs some
METADATA = {f"{op} {what}" for op in ("read", "write") for what in
            ("L2 table", "new cluster", "refcount block", "refcount table")} | {"write L1 table"}


class Attempt:
    """A scenario with a fault: what was done, what failed, what must be there."""
    SUSPENDS = ("cycle", "remove", "reload")

    def __init__(self, rig, steps, nth=None, how=None, usual=None):
        """usual: what each step requests when nothing fails"""
        self.rig, self.steps, self.how, self.usual = rig, steps, how, usual
        self.script = rig.script
        # What the device reads as; what it reads as at the latest; what is durable
        self.core, self.latest, self.durable = (bytearray(rig.content) for _ in range(3))
        self.states = list(rig.states)
        self.torn = set()       # sectors that are old or new
        self.dirty = False
        self.unwritten = False  # entries that a commit could not write
        self.forgotten = False  # those that never will be
        self.mode = "rw"
        self.error = errno.ENOSPC if how in ("full", "refused") else errno.EIO
        self.told = self.maybe = 0      # events that must, and that may have been raised besides
        self.again = []         # steps that failed
        self.removed = False
        self.failed = []
        self.suspended = None   # the status at a suspend
        self.spoilt = set()     # where metadata could not be written
        self.touched = [s[1:3] for s in steps if len(s) == 3]
        rig.reset()
        self.script.name = lambda request: rig.what(request, self.touched)
        self.dm = Dm("q", rig.line)
        self.disk = Io(self.dm.path)
        self.sync = Io(self.dm.path, os.O_DSYNC)
        try:
            self.events = self.dm.events()
            self.script.begin(nth, "once" if how == "refused" else how, self.error)
            self.begun, self.ended = time.monotonic(), None
            for number, step in enumerate(steps):
                self.script.step = number
                self.do(number, *step)
            # Without a fault it shows what is requested: that must be the steps' doing, too.
            if (self.script.failed or nth is None) and self.late():
                raise TooLate
            self.failed, self.trace = list(self.script.failed), list(self.script.trace)
            self.made = self.script.steps
        except BaseException as e:
            late = isinstance(e, Failure) and self.late()
            self.script.rest()
            self.close()
            if late:
                raise TooLate from e
            raise

    def late(self):
        return (self.ended or time.monotonic()) - self.begun > PERIOD

    def names(self, requests):
        return [self.rig.what(r, self.touched) for r in requests]

    def fault(self, text):
        failed = ", ".join(self.names(r for r, _ in self.failed or self.script.failed)) or "nothing"
        return Failure(f"{self.how}: {failed} failed: {text}")

    def close(self):
        self.disk.close()
        self.sync.close()
        if not self.removed:
            self.dm.close()
            self.removed = True

    # Steps

    def sectors(self, offset, length):
        return range(offset // 512, (offset + length) // 512)

    def units(self, offset, length):
        return range(offset // self.rig.unit, -(-(offset + length) // self.rig.unit))

    def do(self, number, kind, offset=0, length=0, retry=False):
        """Do a step, and take account of its result."""
        pattern = bytes([0x41 + number]) * length
        if kind in ("write", "fua"):
            self.latest[offset:offset + length] = pattern
        elif kind == "discard":
            self.latest[offset:offset + length] = bytes(length)
        fresh = any(self.states[n] != "data" for n in self.units(offset, length)) if length else False
        if kind in self.SUSPENDS:
            # From here on the timer does nothing.
            self.ended = self.ended or time.monotonic()
        error = 0
        try:
            self.act(kind, offset, length, pattern)
        except OSError as e:
            error = e.errno
        failed = [] if retry else self.failures(number, kind)
        wanted = self.rules(number, kind, fresh, failed)
        if error != wanted:
            raise self.fault(f"{kind}: {errno.errorcode.get(error, error)} instead of {errno.errorcode.get(wanted, 0)}")
        if failed and not self.removed and self.events is not None:
            self.look()
        if error:
            self.again.append((number, kind, offset, length))
            # A FUA write can be done, and only its commit fail.
            if kind == "fua" or kind in ("write", "discard") and (not fresh or self.rig.raw):
                self.torn.update(self.sectors(offset, length))
            return
        if kind in ("write", "fua"):
            self.core[offset:offset + length] = pattern
            for n in self.units(offset, length):
                self.states[n] = "data"
            self.dirty = self.dirty or fresh
        elif kind == "discard":
            self.core[offset:offset + length] = bytes(length)
            for n in self.units(offset, length):
                self.states[n] = "zero"
            self.dirty = True
        self.torn -= set(self.sectors(offset, length))
        if kind in ("fsync", "fua") or (kind in self.SUSPENDS and self.mode == "rw" and not self.unwritten and
                                        not self.forgotten and self.events is not None):
            self.durable[:] = self.core
            self.dirty = False

    def look(self):
        """The status line and the events tell of what has failed."""
        status, events = self.dm.status(), self.dm.events() - self.events
        if status.mode != self.mode:
            raise self.fault(f"mode {status.mode} instead of {self.mode}")
        if not self.told <= events <= self.told + self.maybe:
            raise self.fault(f"{events} events, {self.told} expected: {status}")
        if self.mode != "fail" and (status.unwritten > 0) != self.unwritten:
            raise self.fault(f"{'some' if self.unwritten else 'no'} entries are unwritten: {status}")

    def failures(self, number, kind):
        """The requests that have failed in a step."""
        failed = [r for r, step in self.script.failed if step == number]
        if self.how != "gone" or not self.script.failed:
            return failed
        # The server of a device that is gone hears of none.
        rig, dead = self.rig, self.script.dead
        if failed:
            # A write is followed by a flush, also if it has failed.
            if dead == "metadata" and any(r.op == "write" for r in failed) and self.dirty and \
                    kind in ("fsync", *self.SUSPENDS):
                failed.append(Request(dead, "flush", 0, 0))
            return failed
        if kind not in ("fsync", *self.SUSPENDS):
            return [r for r in self.usual.get(number, ()) if r.device == dead]
        if self.dirty:
            # What is left to commit cannot be: nothing can be read, so nothing is written or flushed.
            return [Request(dead, "flush", 0, 0) if dead == "data" else
                    Request(dead, "write", rig.image.get("l1_table_offset"), 0)]
        return [r for r in self.usual.get(number, ()) if r.device == dead and
                rig.what(r, ()) in ("flush data", "read header", "read L1 table")]

    def act(self, kind, offset, length, pattern):
        dm, disk = self.dm, self.disk
        if kind == "read":
            same(disk.read(offset, length), self.core[offset:offset + length], offset)
        elif kind == "write":
            disk.write(offset, pattern)
        elif kind == "fua":
            self.sync.write(offset, pattern)
        elif kind == "discard":
            disk.discard(offset, length)
        elif kind == "fsync":
            disk.fsync()
        elif kind == "cycle":
            dm.suspend()
            self.suspended = dm.status()
            dm.resume()
        elif kind == "reload":
            dm_ioctl(DM_TABLE_LOAD, dm.name, self.rig.line)
            dm.resume()
        elif kind == "remove":
            disk.close()
            self.sync.close()
            dm.remove()
            self.removed = True
        elif kind == "corrupt":
            # The entry cannot be true: EIO, and the header is marked by and by.
            with fails_with(errno.EIO):
                disk.read(offset, length)
            names = self.rig.what
            wait_for("the header is marked", HANG // 2, lambda: self.script.failed or any(
                names(r, ()) == "write header" for r in self.script.trace))

    def part(self, number, kind, requests, resume):
        """Those requests that are made by a resume, from the header on; or the others. A
        new table has looked at the header before, when it was loaded: twice, for that is
        where it finds bitmaps, too."""
        made = list(self.script.steps.get(number, ())) if kind in ("cycle", "reload") else []
        headers = [i for i, n in enumerate(self.names(made)) if n == "read header"][2 * (kind == "reload"):]
        later = {id(r) for r in made[headers[0]:]} if headers else set()
        return [r for r in requests if (id(r) in later or self.rig.what(r, ()) in ("read header", "read L1 table"))
                == resume]

    def stages(self, number, kind):
        """A write of metadata may be on the disk also if it has failed, so a flush follows
        it, but for one that has failed before. One of which nothing was written would only
        be one more that can fail."""
        failed = {id(r) for r, _ in self.script.failed}
        tried = False
        for r in self.part(number, kind, self.script.steps.get(number, ()), False):
            name, = self.names([r])
            if name in METADATA and name.startswith("write"):
                tried = tried or id(r) not in failed or r.offset not in self.spoilt
                if id(r) in failed:
                    self.spoilt.add(r.offset)
            elif name == "flush metadata":
                if not tried:
                    raise self.fault("the metadata device is flushed, but nothing of it was written")
                tried = False
        if tried and kind in ("fsync", *self.SUSPENDS):
            raise self.fault("metadata was written, but not flushed")

    def rules(self, number, kind, fresh, failed):
        """The errno of a step in which requests have failed, by the documentation;
        what becomes of the mode and of the entries."""
        resume = self.names(self.part(number, kind, failed, True))
        names = [n for n in self.names(self.part(number, kind, failed, False)) if n != "discard data"]
        if kind == "corrupt":
            if "read L2 table" not in names:
                self.mode = "ro"
                self.told += 1
            return 0
        if self.how != "gone":
            self.stages(number, kind)
        before = self.mode
        if before == "fail":
            if kind in self.SUSPENDS:
                return self.resumed(number, kind, resume)
            return errno.EIO if names or kind in ("fsync", "fua", "discard") or (kind == "write" and fresh) else 0
        commit = self.dirty and kind in ("fsync", *self.SUSPENDS)
        if kind == "fua" and not failed:
            commit = self.unwritten
        elif kind == "fua" and fresh:
            # Its own commit; the file layer adds a flush when that is over.
            made = self.script.steps[number]
            before_it = self.names(made[:next(i for i, r in enumerate(made) if r is failed[0])])
            data = {"write data", "write fill"}
            commit = bool(data & set(before_it)) and "flush metadata" not in before_it and not data & set(names)
        lost = commit and bool({"flush data", "flush metadata"} & set(names))
        if lost:
            # Whatever else has failed may have been told, too.
            self.mode = "fail"
            self.told += 1
            self.maybe += 1
        elif commit and METADATA & set(names):
            began = not self.unwritten
            # At suspend it is tried three times.
            self.unwritten = kind not in self.SUSPENDS or self.how not in ("once", "refused")
            self.dirty = True
            self.told += began
            if self.error == errno.ENOSPC:
                # The change of the mode may be told, and that entries begin to fail.
                self.maybe += began
                self.mode = "nospc" if self.unwritten else "rw"
                self.told += not self.unwritten
        elif commit and self.unwritten:
            self.unwritten = False
            self.told += self.mode == "nospc"
            self.mode = "rw"
        elif self.error == errno.ENOSPC and kind == "write" and METADATA & set(names):
            # A table that could not be reserved: it is counted, and told the first time.
            self.maybe += 1
        if kind in self.SUSPENDS:
            return self.resumed(number, kind, resume)
        return (errno.EIO if lost else self.error) if names else 0

    def resumed(self, number, kind, failed):
        """The errno of a suspend and what follows it: the header, a flush of the metadata
        device, L1; of which these have failed."""
        rig = self.rig
        # What it could not write, and what has failed, resumes without a look at the disk.
        if kind == "cycle" and (self.unwritten or self.mode == "fail"):
            reads = {"read header", "read L1 table"} & set(self.names(self.script.steps.get(number, ())))
            if reads:
                raise self.fault(f"the resume reads: {reads}")
            if self.unwritten and (self.suspended.mode != self.mode or self.suspended.unwritten <= 0):
                raise self.fault(f"suspended, and: {self.suspended}")
            return 0
        if kind == "cycle" and self.mode == "rw" and self.told and self.suspended.unwritten:
            raise self.fault(f"suspended, and: {self.suspended}")
        left = self.unwritten
        if kind != "cycle" and (left or self.mode == "fail"):
            self.forgotten, self.unwritten = True, False
        if kind == "reload" and self.forgotten:
            # A new table starts afresh, and what was not durable may be lost; but not
            # before the old one, which may have to write it yet, is gone.
            self.mode = "rw"
            self.torn.update(range(rig.size // 512))
            self.events = None
            return errno.EBUSY if left else 0
        return errno.EIO if failed else 0

    # Afterwards

    def compare(self, read, what, *allowed):
        """Each sector must be as in one of the byte strings that are allowed."""
        for at in range(0, self.rig.size, 256 * KIB):
            n = min(256 * KIB, self.rig.size - at)
            got = read(at, n)
            if any(got == a[at:at + n] for a in allowed):
                continue
            for s in range(at, at + n, 512):
                if not any(got[s - at:s - at + 512] == a[s:s + 512] for a in allowed):
                    raise self.fault(f"{what}: sector {s // 512} (unit {s // self.rig.unit}) reads "
                                     f"{got[s - at:s - at + 8].hex()}, not " +
                                     " or ".join(a[s:s + 8].hex() for a in allowed))

    def incore(self):
        """What the device reads as, before it is closed."""
        if self.rig.raw:
            return self.compare(self.disk.read, "before it is closed", self.core, self.latest)
        old = bytearray(self.core)
        new = bytearray(self.core)
        for s in self.torn:
            new[s * 512:s * 512 + 512] = self.latest[s * 512:s * 512 + 512]
            if self.events is None:
                old[s * 512:s * 512 + 512] = self.durable[s * 512:s * 512 + 512]
        return self.compare(self.disk.read, "before it is closed", old, new)

    def failing(self):
        """All that the documentation says of mode fail."""
        unit = self.rig.unit
        with fails_with(errno.EIO):
            self.disk.fsync()
        with fails_with(errno.EIO):
            self.sync.write(7 * unit, b"x" * 512)
        with fails_with(errno.EIO):
            self.disk.write(20 * unit, b"x" * unit)
        if not self.rig.raw:
            with fails_with(errno.EIO):
                self.disk.discard(6 * unit, unit)
        self.disk.write(7 * unit, b"o" * unit)
        for content in (self.core, self.latest, self.durable):
            content[7 * unit:8 * unit] = b"o" * unit
        if self.rig.raw:
            # That one has been through to the data device, in part or as a whole.
            self.core[20 * unit:21 * unit] = self.disk.read(20 * unit, unit)

    def verify(self):
        """Everything that must hold after the steps."""
        rig, unit = self.rig, self.rig.unit
        try:
            if not self.removed:
                if self.how != "gone":
                    self.script.rest()
                    self.live()
                if self.events is not None:
                    self.look()
                elif self.dm.mode() != self.mode:
                    raise self.fault(f"mode {self.dm.mode()} instead of {self.mode}")
                # Removal with a device that is gone
                healthy = self.how != "gone" or not self.failed
                self.forgotten = self.forgotten or self.mode == "fail" or (self.dirty and not healthy)
                self.disk.close()
                self.sync.close()
                self.dm.remove()
                self.removed = True
                if self.mode == "rw" and healthy:
                    self.durable[:] = self.core
        finally:
            self.script.rest()
            self.close()
        for served in rig.below:
            if served.gone:
                served.again()
        if self.mode == "ro":
            # The bit is there unless it could not be set.
            marked = bool(struct.unpack(">Q", rig.meta.store[72:80])[0] & CORRUPT)
            if marked == bool(self.failed):
                raise self.fault(f"the corrupt bit is {'' if marked else 'not '}set")
        elif not rig.corrupt:
            # Leaks come of commits that were cut off, and of nothing else.
            rig.check(leaks=self.forgotten)
            # Many attempts end alike.
            state = [hashlib.sha256(b).digest() for b in (rig.meta.store, rig.data.store, self.durable, self.latest)]
            if state not in rig.reopened:
                self.reopen(unit)
                rig.reopened.append(state)
        return self

    def live(self):
        """The device works again (or has never failed). The target is still there."""
        if self.again and self.again[-1][1] in ("cycle", "reload"):
            # It is suspended, or the old table is still in place.
            self.dm.resume()
        if self.rig.corrupt:
            return
        if self.mode == "fail":
            self.incore()
            self.failing()
            return
        if self.events is not None:
            self.incore()
        else:
            # The new table has what the old one could make durable.
            self.incore()
            self.core[:] = self.disk.read(0, self.rig.size)
            self.torn.clear()
            return
        again, self.again = self.again, []
        for number, kind, offset, length in again:
            if kind not in ("cycle", "reload"):
                self.do(number, kind, offset, length, retry=True)
        self.do(len(self.steps), "fsync", retry=True)
        self.incore()

    def reopen(self, unit):
        """A new table on the same devices has all that was acknowledged, and works."""
        dm = Dm("q", self.rig.line)
        try:
            disk = Io(dm.path)
            try:
                self.compare(disk.read, "opened again", self.durable, self.latest)
                end = self.rig.size // unit * unit - unit
                for at in (24 * unit, end):
                    disk.write(at, b"n" * unit)
                disk.fsync()
                for at in (24 * unit, end):
                    same(disk.read(at, unit), b"n" * unit, at)
                expect(dm.mode() == "rw", f"opened again, written, and: {dm.status()}")
            finally:
                disk.close()
        finally:
            dm.close()


def attempt(rig, steps, nth=None, how=None, usual=None):
    """An attempt from beginning to end; again if the machine was too slow."""
    result = []

    def work():
        try:
            result.append(Attempt(rig, steps, nth, how, usual).verify())
        except TooLate:
            pass
    # As often as it takes on a machine that has much else to do
    for _ in range(100):
        task = Task(work)
        try:
            task.finish(HANG)
        finally:
            if task.is_alive():
                # Whatever hangs below must not keep it from ending.
                rig.script.rest()
                for served in rig.below:
                    served.release(fail=True)
                task.join(HANG)
        if result:
            return result[0]
    raise Failure("the machine is too slow to get anything done within a second")


def sweep(bench, options, steps, wanted, hows):
    """Let each request of a scenario fail, in some ways."""
    rig = Rig(bench, **options)
    unit, cover = rig.unit, rig.cover
    steps = [(s[0], *(eval_place(p, unit, cover) for p in s[1:])) for s in steps]
    first = attempt(rig, steps)
    seen = set(first.names(first.trace))
    missing = set(wanted.split(", ")) - seen
    expect(not missing, f"the scenario makes no such request: {missing}; it makes {seen}")
    count = collections.Counter()
    hit = set()
    for how in hows.split(", "):
        for nth in rig.script.kinds(first.trace):
            if how in ("protected", "full", "refused") and not nth[0].startswith("write"):
                continue
            a = attempt(rig, steps, nth, how, first.made)
            if not a.failed:
                # A slow machine's timer may have made it the first time, and none of the steps.
                expect(nth not in rig.script.kinds(attempt(rig, steps).trace), f"{nth} was not made this time")
                continue
            count[how] += 1
            hit.update(a.names(r for r, _ in a.failed[:1]))
    if "once" in hows:
        expect(seen <= hit, f"did not fail: {seen - hit}")
    note(f"{len(first.trace)} requests: {', '.join(sorted(seen))}; "
         f"{sum(count.values())} faults, {len(rig.sound)} different images checked")


def eval_place(place, unit, cover):
    """("t", table, unit, bytes) or plain bytes, or units as a string"""
    if isinstance(place, tuple):
        table, units, more = place
        return table * cover + units * unit + more
    return place if isinstance(place, int) else int(float(place) * unit)


# Requests that have to wait

class Aio:
    """Many requests at once, without as many threads."""
    SETUP, DESTROY, GETEVENTS, SUBMIT = 206, 207, 208, 209
    READ, WRITE, DSYNC = 0, 1, 2

    def __init__(self, fd, most, slot=4096):
        """most: requests at a time, of at most slot bytes each"""
        self.fd, self.most, self.slot = fd, most, slot
        self.context = ctypes.c_ulong()
        self.call(self.SETUP, most, ctypes.byref(self.context))
        self.buffer = mmap.mmap(-1, slot * most)
        self.start = ctypes.addressof(ctypes.c_char.from_buffer(self.buffer))
        self.blocks = []
        self.results = {}

    @staticmethod
    def call(*arguments):
        done = LIBC.syscall(*(a if not isinstance(a, int) else ctypes.c_long(a) for a in arguments))
        if done < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return done

    def submit(self, requests, data=None):
        """(READ or WRITE, offset, length, flags); their numbers. data: of the only write"""
        first = len(self.blocks)
        for op, offset, length, flags in requests:
            n = len(self.blocks)
            at = n % self.most * self.slot
            if op == self.WRITE:
                self.buffer[at:at + length] = data or bytes([n % 255 + 1]) * length
            self.blocks.append(ctypes.create_string_buffer(struct.pack(
                "<QIIHhIQQqQII", n, 0, flags, op, 0, self.fd, self.start + at, length, offset, 0, 0, 0), 64))
        new = self.blocks[first:]
        pointers = (ctypes.c_void_p * len(new))(*(ctypes.addressof(b) for b in new))
        done = 0
        while done < len(new):
            done += self.call(self.SUBMIT, self.context, len(new) - done,
                              ctypes.byref(pointers, done * ctypes.sizeof(ctypes.c_void_p)))
        return range(first, len(self.blocks))

    def reap(self):
        """Take what has ended; the results of all that has so far."""
        events = (ctypes.c_char * (32 * self.most))()
        now = struct.pack("qq", 0, 0)
        n = self.call(self.GETEVENTS, self.context, 0, self.most, events, now)
        for i in range(n):
            number, _, result, _ = struct.unpack_from("<QQqq", events, 32 * i)
            self.results[number] = result
        return self.results

    def all(self, numbers):
        """Wait for requests; their results."""
        wait_for("requests end", HANG, lambda: set(numbers) <= set(self.reap()))
        return [self.results[n] for n in numbers]

    def close(self):
        self.call(self.DESTROY, self.context)


class Lost:
    """A device that has lost what was in its cache tells so once: with an error of a
    flush, or of a FUA write."""
    NEW = 20        # the unit that is first-written

    def __init__(self, bench, **options):
        self.bench, self.rig = bench, Rig(bench, **options)
        self.script, self.unit = self.rig.script, self.rig.unit
        self.rig.reset()
        self.script.name = lambda request: self.rig.what(request, [(0, self.rig.size)])
        self.dm = bench.add(Dm("q", self.rig.line))
        self.disk, self.sync = bench.io(self.dm), bench.io(self.dm, flags=os.O_DSYNC)
        for at in (0, self.rig.cover):
            self.disk.read(at, self.unit)

    def first_write(self):
        self.disk.write(self.NEW * self.unit, b"a" * self.unit)

    def fail(self, place, error=errno.EIO):
        """Of the requests that are made now the first one of a kind fails."""
        self.script.begin((place, 0), "once", error)

    def hold(self, place):
        held = self.rig.data.held
        self.script.begin(None, None)
        self.script.hold = lambda request: self.script.name(request) == place and not held

    def finish(self):
        """No commit may call the unit data, and it is said."""
        self.script.rest()
        with fails_with(errno.EIO):
            self.disk.fsync()
        expect(self.dm.mode() == "fail", f"{self.dm.status()}")
        with open(self.rig.image.path, "wb") as f:
            f.write(self.rig.meta.store)
        expect(self.rig.image.state(self.NEW * self.unit) == "unallocated", "the entry was written all the same")
        self.close(leaks=True)

    def close(self, leaks):
        for thing in (self.disk, self.sync, self.dm):
            self.bench.drop(thing)
        self.rig.check(leaks)
