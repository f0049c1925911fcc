#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""What a commit costs, and whom it holds up.

The devices below hold flushes back, so that a commit stands for as long as a test
wants: who gets on meanwhile does not need it. Flushes are counted in the kernel's
trace.
"""
import os
import time

from powercut import FlushTrace
from qcow2image import COPIED, ZERO
from qcow2test import GIB, KIB, MIB, Dm, Io, Lower, Stat, Task, expect, main, run, same, test, wait_for
from heldimage import Setup

HANG = 60       # seconds; far more than anything here can take

CLUSTER = 16 * KIB
# Units whose entries are in one block of an L2 table
BLOCK = 512


# FUA writes

class Fua:
    """A range of a device to which FUA writes can be sent, and nothing else: an fsync
    comes after those to a block device. A file system has no need of one where it only
    overwrites."""

    def __init__(self, bench, dm, offset, size):
        self.range = bench.add(Dm("fua", f"0 {size // 512} linear {dm.path} {offset // 512}"))
        self.mount = bench.path("fua")
        os.mkdir(self.mount)
        run("mkfs.ext4", "-q", "-F", "-b", 4096, "-O", "^has_journal", "-E", "nodiscard,lazy_itable_init=0",
            self.range.path)
        run("mount", "-t", "ext4", "-o", "noatime", self.range.path, self.mount)
        bench.add(self)
        with open(f"{self.mount}/file", "wb") as f:
            f.write(b"f" * 64 * KIB)
        os.sync()
        self.file = bench.add(Io(f"{self.mount}/file", os.O_DSYNC))

    def write(self, byte):
        self.file.write(8 * KIB, byte * 4096)

    def close(self):
        run("umount", self.mount)


@test("a FUA overwrite of durable data is passed down as such while other blocks of its L2 table are dirty")
def fua(bench):
    # Block 0: data, and what is first-written; block 1: data
    new, border = BLOCK // 2 * CLUSTER, BLOCK * CLUSTER
    s = Setup(bench, 32 * MIB, lambda n: "unallocated" if n == BLOCK // 2 else "data", cluster=CLUSTER, fill=b"d")
    place = Fua(bench, s.dm, border, 8 * MIB)
    place.write(b"1")
    s.disk.fsync()
    raw = bench.io(s.dm, flags=os.O_DSYNC)
    with s.holding(lambda r: (r.op, r.device) == ("flush", "data")):
        # Something is dirty, and stays so: its commit cannot end.
        s.disk.write(new, b"n" * CLUSTER)
        sync = Task(s.disk.fsync)
        wait_for("a commit stands in its flush", 60, lambda: s.data.held)
        before = s.status()
        s.data.fua_writes.clear()
        Task(place.write, b"2").finish(HANG)
        expect(s.status().commits == before.commits, f"it was committed: {before}, then {s.status()}")
        expect(s.data.fua_writes and min(s.data.fua_writes) >= border,
               f"not passed down as FUA; those were: {s.data.fua_writes}")
        # Where it is dirty, a FUA write has to wait for a commit; also if a part of it is
        # elsewhere (ext4 does not use the first sectors).
        s.data.fua_writes.clear()
        tasks = [Task(raw.write, at, byte * length) for at, byte, length in
                 ((4096, b"3", 4096), (new, b"4", 4096), (border - 4096, b"5", 4096 + 512))]
        time.sleep(0.5)
        expect(all(t.is_alive() for t in tasks), "a FUA write to a dirty block was acknowledged before its commit")
        expect(not s.data.fua_writes, f"FUA writes to a dirty block were passed down as such: {s.data.fua_writes}")
    for task in (sync, *tasks):
        task.finish(HANG)
    expect(s.status().commits > before.commits, f"not committed: {s.status()}")
    same(s.disk.read(0, 3 * 4096), b"d" * 4096 + b"3" * 4096 + b"d" * 4096)
    same(s.disk.read(new, 8192), b"4" * 4096 + b"n" * 4096)
    same(s.disk.read(border - 8192, 8192 + 512), b"d" * 4096 + b"5" * (4096 + 512))
    s.save()
    expect(s.image.state(new) == "data", "acknowledged, and not on disk")
    for thing in (raw, place.file, place, place.range):
        bench.drop(thing)
    s.shut()


# Discards that need all of the map

class Large:
    """64 GiB over a backing file; all of it is unallocated, and there is no L2 table."""
    SIZE = 64 * GIB

    def __init__(self, bench):
        backing = bench.file("backing", self.SIZE)
        with open(backing, "r+b") as f:
            f.write(b"b" * MIB)
            f.seek(self.SIZE - MIB)
            f.write(b"b" * MIB)
        image = self.image = bench.image(self.SIZE, backing=backing)
        image.attach()
        self.bench, self.tables = bench, image.tables
        self.meta, self.data = (Lower(bench, n, loop.path)
                                for n, loop in (("m", image.meta_loop), ("d", image.data_loop)))
        self.dm = image.open(meta=self.meta.path, data=self.data.path)
        self.disk = bench.io(self.dm)
        same(self.disk.read(0, 4096), b"b" * 4096)
        self.trace = bench.add(FlushTrace(bench, {"m": self.meta.path, "d": self.data.path}))

    def finish(self):
        """The letters of the flushes that there were."""
        flushes = self.trace.ended()
        for at in (0, self.SIZE // 2, self.SIZE - 4096):
            same(self.disk.read(at, 4096), bytes(4096), at)
        expect(self.dm.status().tables == self.tables, f"{self.tables} tables expected: {self.dm.status()}")
        expect(self.dm.status().mode == "rw", f"{self.dm.status()}")
        for thing in (self.trace, self.disk, self.dm):
            self.bench.drop(thing)
        expect(self.image.state(0) == self.image.state(self.SIZE - 512) == "zero", "not zero on disk")
        self.image.check()
        return flushes


@test("a discard of 64 GiB over a backing file: a commit flushes once for each of its stages")
def large_discard(bench):
    s = Large(bench)
    s.disk.discard(0, s.SIZE)
    s.disk.fsync()
    commits = s.dm.status().commits
    flushes = s.finish()
    # How many commits the timer makes of it is a question of time. One more of the data
    # device if all is on disk when the fsync comes, and one at the end.
    expect(flushes.count("d") <= commits + 2 and flushes.count("m") <= 2 * commits,
           f"{flushes.count('d')} flushes of the data device, {flushes.count('m')} of the metadata device "
           f"in {commits} commits: {flushes}")


@test("a discard of 64 GiB over a backing file does not wait for a commit, and one commit takes it all")
def large_discard_held(bench):
    s = Large(bench)
    s.data.stop()
    # No data is written for it, so that its commit comes as far as the flush.
    s.disk.discard(s.SIZE // 2, MIB)
    first = Task(s.disk.fsync)
    wait_for("a commit stands in its flush", 60, lambda: s.trace.sent("d"))
    discard = Task(s.disk.discard, 0, s.SIZE)
    try:
        discard.finish(HANG)
        expect(first.is_alive(), "an fsync was acknowledged without the data device")
        second = Task(s.disk.fsync)
    finally:
        s.data.go()
    for task in (first, second):
        task.finish(HANG)
    flushes = s.finish()
    # The first commit, and all the rest; then those that find nothing to do, if the timer
    # was there before the second fsync.
    expect(flushes.rstrip("d") == "dmmdmm" and len(flushes) <= 8, f"flushes: {flushes}")


class Tables(Setup):
    """64 entries in a table, and in a refcount block; only table 0 is there."""

    def __init__(self, bench, tables):
        super().__init__(bench, tables * 64 * 512, lambda n: "data" if n < 8 else "unallocated", tables=1, fill=b"d",
                         cluster=512, refcount_bits=64)
        image = self.image
        self.places = [(image.get("l1_table_offset"), 8 * image.get("l1_size"), "L1 table"),
                       (image.get("refcount_table_offset"), image.get("refcount_table_clusters") * 512,
                        "refcount table"),
                       (image.l2_table(0), 512, "L2 table")]
        self.places += [(offset, 512, "refcount block")
                        for offset in map(image.u64, map(image.reftable_pos, range(image.reftable_entries()))) if offset]
        same(self.disk.read(0, 8 * 512), b"d" * 8 * 512)

    def what(self, request):
        return next((name for start, length, name in self.places if start <= request.offset < start + length),
                    "new cluster")


@test("hundreds of new L2 tables, and refcount blocks for them: one commit, and a flush after each of its stages")
def many_tables(bench):
    tables = 400
    s = Tables(bench, tables)
    with s.holding(lambda r: (r.op, r.device) == ("flush", "data") and not s.decided):
        # A commit that stands until all the rest is there
        s.disk.write(20 * 512, b"o" * 512)
        first = Task(s.disk.fsync)
        wait_for("a commit stands in its flush", 60, lambda: s.data.held)
        work = Task(lambda: [s.disk.write(t * s.image.cover, b"t" * 512) for t in range(1, tables)])
        work.finish(HANG)
        s.disk.write(21 * 512, b"p" * 512)
        rest = Task(s.disk.fsync)
        s.go()
        for task in (first, rest):
            task.finish(HANG)
        # What is written between one flush and the next one
        stages = [["", set()]]
        for r in s.script.trace:
            if r.op == "flush":
                stages[-1][0] = r.device[0]
                stages.append(["", set()])
            elif (r.op, r.device) == ("write", "metadata"):
                stages[-1][1].add(s.what(r))
    expect(s.status().tables == tables, f"{s.status()}")
    s.shut()
    flushes = "".join(letter for letter, _ in stages)
    # Those that find nothing to do come last, if the timer was there before the fsync.
    expect(flushes.rstrip("d") == "dmdmmm" and len(flushes) <= 8, f"flushes: {flushes}")
    what = [names for _, names in stages]
    # Reservations have written clusters while the first commit stood.
    expect(what[1] - {"new cluster"} == {"L2 table"} and what[3] == {"new cluster", "refcount block"} and
           what[4] == {"refcount table"} and what[5] == {"L1 table", "L2 table"} and not set().union(*what[6:]),
           f"written between flushes: {list(zip(flushes, what))}")
    expect({s.image.state(t * s.image.cover) for t in range(tables)} == {"data"}, "not on disk")


# Reservations

def reservation(bench, device, block):
    """A first write that needs an L2 table, while a commit stands in a flush."""
    # With clusters of 512 bytes a table has 64 entries, and so has a refcount block.
    options = {"cluster": 512, "refcount_bits": 64} if block else {"cluster": CLUSTER}
    tables = 1
    if block:
        # Nearly as many as the first one has room for
        probe = bench.image(64 * 64 * 512, name="probe", **options)
        tables = probe.per_block() - probe.file_size() // 512 - 1
    s = Setup(bench, 64 * 64 * 512 if block else 4 * 2048 * CLUSTER, lambda n: "data" if n < 8 else "unallocated",
              tables=tables, fill=b"d", **options)
    image, unit = s.image, s.unit
    same(s.disk.read(0, 8 * unit), b"d" * 8 * unit)
    served = s.data if device == "data" else s.meta
    # Not only in a table that is the next one
    wanted = [(image.tables - 1 - n) * image.cover + 3 * unit for n in range(3)]
    with s.holding(lambda r: (r.op, r.device) == ("flush", device)):
        # From here on no commit can end, so that the first flush that comes is one's.
        s.disk.write(20 * unit, b"o" * unit)
        sync = Task(s.disk.fsync)
        wait_for("a commit stands in its flush", 60, lambda: served.held)
        for at in wanted:
            Task(s.disk.write, at, b"n" * unit).finish(HANG)
            same(s.disk.read(at - unit, 3 * unit), bytes(unit) + b"n" * unit + bytes(unit), at)
        expect(sync.is_alive() and served.held, "the commit is over already")
    sync.finish(HANG)
    s.disk.fsync()
    expect(s.status().tables == tables + 3, f"{s.status()}")
    s.shut()
    expect({image.state(at) for at in wanted} == {"data"}, "acknowledged, and not on disk")


@test("a first write that needs an L2 table, or a refcount block, is acknowledged when their clusters are written")
def promised(bench):
    s = Tables(bench, 200)
    image = s.image
    # Of this table it is known that it can be written.
    s.disk.write(8 * 512, b"o" * 512)
    for t in range(1, 150, 5):
        with s.holding(lambda r: (r.op, r.device) == ("write", "metadata") and s.what(r) == "new cluster"):
            write = Task(s.disk.write, t * image.cover, b"n" * 512)
            wait_for("its cluster is written", 60, lambda: s.meta.held or not write.is_alive())
            # What has its table does not wait.
            Task(s.disk.write, (9 + t % 50) * 512, b"o" * 512).finish(HANG)
            expect(write.is_alive() and s.meta.held, "acknowledged before it had a place for its table")
        write.finish(HANG)
        s.disk.fsync()
    s.shut()
    expect({image.state(t * image.cover) for t in range(1, 150, 5)} == {"data"}, "not on disk")


@test("what the table line says is zeros is not zeroed again, and all else is")
def zeroed(bench):
    size = 64 * 8 * 64 * KIB
    s = Setup(bench, size, None, cluster=512, refcount_bits=64, fill=b"d")
    bench.drop(s.disk)
    bench.drop(s.dm)
    image = s.image
    # Not at the border of a cluster: what begins before it is not known to be zeros.
    border = image.file_size() // 12 // 512 * 512 + 100
    s.meta.store[border:] = bytes(len(s.meta.store) - border)
    s.open("zeroed_from", str(border))
    for line in (s.dm.table(), str(s.status())):
        expect("zeroed_from" in line and str(border) in line, line)
    tables = list(range(0, image.tables, 8))
    with s.holding(lambda r: (r.op, r.device) == ("flush", "data")):
        # No commit can write anything.
        for t in tables:
            Task(s.disk.write, t * image.cover, b"n" * 512).finish(HANG)
        written = {r.offset for r in s.seen("write", "metadata")}
    s.disk.fsync()
    s.shut()
    places = {image.l2_table(t * image.cover) for t in tables}
    expect(any(p > border for p in places) and any(p < border for p in places), "none on one side")
    expect({p for p in places if p < border} <= written, "something was not zeroed")
    expect(not any(at >= border for at in written), f"zeroed behind {border}: {sorted(written)}")
    s.open()
    for t in range(image.tables):
        want = b"n" * 512 + bytes(image.cover - 512) if t in tables else bytes(image.cover)
        same(s.disk.read(t * image.cover, image.cover), want, t * image.cover)
    s.shut()


def place(image, guest, first, second=None):
    """Put the words of an entry where they are."""
    image.set_u64(image.l2_pos(guest), first)
    if second is not None:
        image.set_u64(image.l2_pos(guest) + 8, second)


@test("an L2 block is read before it is changed if it has entries that would not be made like that", False)
@test("an L2 block is read before it is changed if it has entries that would not be made like that: extended", True)
def exact(bench, extended):
    # One block of 4 KiB in each table, or several of them; the last one is cut by the end.
    cluster = 16 * KIB if extended else 4 * KIB
    per = cluster // (16 if extended else 8)
    cover = per * cluster
    image = bench.image(5 * cover + (per // 2 + 3) * cluster, "exact", cluster=cluster, extended=extended)
    image.qemu_io(*(f"write -q -P 97 {at} {cluster}" for at in range(0, 5 * cover + 1, cover)))
    image.trim()
    strange = {}

    def odd(t, n, *words):
        guest = t * cover + n * cluster
        place(image, guest, *words)
        strange[t] = guest
    at = cover + 5 * cluster
    if extended:
        odd(1, 5, at | COPIED, 0)                           # a place, and nothing in it
        odd(2, 5, (2 * cover + 5 * cluster) | COPIED, 1 << 32)      # likewise, and a zero
        odd(3, 5, (3 * cover + 5 * cluster), 1)             # without the copied bit
    else:
        odd(1, 5, at | COPIED | ZERO)                       # a place, and zeros
        odd(2, 5, (2 * cover + 5 * cluster) | ZERO)
        odd(3, 5, 3 * cover + 5 * cluster)                  # without the copied bit
    # Behind the end anything may be.
    last = 5 * cover + (per // 2 + 5) * cluster
    with open(image.path, "r+b") as f:
        f.seek(image.l2_pos(5 * cover) + (per // 2 + 5) * image.entry_size)
        f.write(bytes([0xA5]) * image.entry_size)
    strange[5] = last
    before = {t: image.read(image.l2_pos(t * cover) + (guest - t * cover) // cluster * image.entry_size,
                            image.entry_size) for t, guest in strange.items()}
    image.attach()
    dm = image.open()
    disk = bench.io(dm)
    places = [t * cover + 9 * cluster for t in range(5)] + [5 * cover + (per // 2 + 1) * cluster]
    for at in places:
        disk.read(at, 512)
    # The first one of all has the refcounts read.
    disk.write(4 * cover + 10 * cluster, b"n" * cluster)
    disk.fsync()
    reads = {}
    for t, at in enumerate(places):
        stat = Stat(image.meta_loop.path)
        disk.write(at, b"n" * cluster)
        disk.fsync()
        reads[t] = stat.read_sectors * 512
    # What has been written by us is known as well as before.
    stat = Stat(image.meta_loop.path)
    disk.write(10 * cluster, b"n" * cluster)
    disk.fsync()
    expect(not stat.reads, "the block was read after it had been written")
    expect(reads == {t: 4 * KIB if t in strange else 0 for t in range(6)}, f"bytes read for each table: {reads}")
    bench.drop(disk)
    bench.drop(dm)
    image.detach()
    for t, guest in strange.items():
        same(image.read(image.l2_pos(t * cover) + (guest - t * cover) // cluster * image.entry_size,
                        image.entry_size), before[t], 0, f"the entry in table {t}")
    for t, at in enumerate(places):
        expect(image.state(t * cover) == image.state(at) == "data", f"table {t}: not on disk")


for _device in ("data", "metadata"):
    test(f"a first write that needs an L2 table gets on while a commit stands in a flush of the {_device} device",
         _device, False)(reservation)
test("a first write that needs a refcount block gets on while a commit stands in a flush of the data device",
     "data", True)(reservation)


if __name__ == "__main__":
    main()
