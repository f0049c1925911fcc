#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""No space below: image and data files in a file system that is full, and a thin
volume whose pool is.

Want of space for new metadata shows at the first write that needs it, as ENOSPC. Where
a commit meets it all the same it is held: nothing that was acknowledged is lost, and
all becomes durable once there is space. Want of space for data stays ENOSPC, too.
"""
import errno
import os
import random

from qcow2test import (GIB, KIB, MIB, Dm, Ext4, KernelLog, Loop, Lower, expect, fails_with, main, run, same, test,
                       wait_for)
from served import HANG
from written import Written

CLUSTER = 64 * KIB
COVER = 512 * MIB
SIZE = 4 * GIB          # eight L2 tables


class Full(Written):
    """An image in a small file system, its data file elsewhere. Tables 0 and 4 exist;
    table 4 is nothing but zeros, and a hole in the file, as a copy with holes has it."""
    ERROR = errno.ENOSPC
    HOLE = 4 * COVER

    def __init__(self, bench, fill=True):
        self.bench = bench
        self.fs = bench.add(Ext4(bench, 24 * MIB, "-b", "4096"))
        image = self.image = bench.image(SIZE, name="ext4.mnt/image", data=bench.path("data"))
        image.qemu_io(f"write -q -P 0x61 0 {4 * CLUSTER}", f"write -q -P 0x61 {self.HOLE} {CLUSTER}")
        image.put(self.HOLE, "unallocated")
        image.extend()
        with open(image.path, "r+b") as f:
            run("fallocate", "-p", "-o", image.l2_table(self.HOLE), "-l", CLUSTER, image.path)
            os.fsync(f.fileno())
        image.trim()
        image.poison((self.HOLE, MIB))
        self.model = bench.model(SIZE)
        self.model.write(0, b"a" * 4 * CLUSTER)
        image.meta_loop = bench.add(Loop(image.path, direct=True))
        image.data_loop = bench.add(Loop(image.data))
        self.lower = Lower(bench, "meta", image.meta_loop.path)
        self.dm = image.open(meta=self.lower.path)
        self.disk = bench.io(self.dm)
        self.sync = bench.io(self.dm, flags=os.O_DSYNC)
        self.events = self.dm.events()
        if fill:
            self.fs.fill()

    def look(self, mode, unwritten):
        status = self.dm.status()
        expect(status.mode == mode and (status.unwritten > 0) == unwritten, f"{mode} expected: {status}")

    def event(self):
        """There was one since the last look (more can come of one cause)."""
        events = self.dm.events()
        expect(events > self.events, "no event was raised")
        self.events = events


@test("the file system of a sparse image is full: ENOSPC at the first write that needs a table")
def first_write(bench):
    s = Full(bench)
    log = bench.add(KernelLog())
    for at in (2 * GIB + COVER, COVER):
        s.fails(at)
        s.fails(at + CLUSTER, 3 * CLUSTER)
        s.fails(at, disk=s.sync)
        s.same(at)
    expect(log.lines("qcow2"), "the log does not tell of it")
    s.look("rw", False)
    s.disk.fsync()
    # What needs no new table goes on, and is durable.
    s.write(20 * CLUSTER + 512, 1024)
    s.write(30 * CLUSTER, CLUSTER, s.sync)
    s.disk.fsync()
    s.dm.cycle()
    s.fails(COVER)
    s.same(0, 20 * CLUSTER, 30 * CLUSTER, COVER)
    s.look("rw", False)
    # With space the same write succeeds, and what was refused before has left nothing.
    s.fs.make_room()
    s.write(2 * GIB + COVER)
    s.write(COVER)
    s.disk.fsync()
    s.same(COVER, 2 * GIB + COVER)
    s.look("rw", False)
    s.finish()


@test("a commit meets a full file system: it is held, and goes on when there is space")
def held(bench):
    s = Full(bench)
    log = bench.add(KernelLog())
    # Its table exists, so that nothing has to be reserved.
    s.write(s.HOLE + 2 * CLUSTER + 512)
    s.no_sync()
    s.look("nospc", True)
    s.event()
    expect(log.lines("qcow2.*nospc"), "the log does not tell of mode nospc")
    for _ in range(2):
        s.no_sync()
    expect(s.dm.events() == s.events, "an event for each try")
    # What is in core can be read, and be written again.
    s.write(s.HOLE + 2 * CLUSTER + 1024)
    s.write(s.HOLE + 9 * CLUSTER, CLUSTER)
    s.fails(s.HOLE + 10 * CLUSTER, disk=s.sync)
    s.model.write(s.HOLE + 10 * CLUSTER, b"f" * 512)
    s.same(s.HOLE, *(s.HOLE + n * CLUSTER for n in (2, 9, 10)))
    s.fails(COVER)
    # The first one that is refused is told.
    s.events = s.dm.events()
    # Other tables: their entries become durable.
    s.write(20 * CLUSTER, CLUSTER)
    s.write(0, CLUSTER)
    s.no_sync()
    expect(s.image.state(20 * CLUSTER) == "data", "not durable, although there is room for it")
    s.look("nospc", True)
    # It survives a suspend.
    s.dm.suspend()
    s.look("nospc", True)
    s.dm.resume()
    s.look("nospc", True)
    s.same(0, 20 * CLUSTER, *(s.HOLE + n * CLUSTER for n in (2, 9, 10)))
    expect(s.dm.events() == s.events, "an event, but nothing has changed")
    s.fs.make_room()
    s.disk.fsync()
    s.look("rw", False)
    s.event()
    for n in (2, 9, 10):
        expect(s.image.state(s.HOLE + n * CLUSTER) == "data", "a flush succeeded, but the entry is not there")
    s.write(COVER)
    s.write(s.HOLE + 11 * CLUSTER, 512, s.sync)
    s.same(0, 20 * CLUSTER, COVER, *(s.HOLE + n * CLUSTER for n in (2, 9, 10, 11)))
    s.finish()


@test("a held commit goes on by itself, without a flush")
def by_itself(bench):
    s = Full(bench)
    s.write(s.HOLE + 2 * CLUSTER, CLUSTER)
    wait_for("mode nospc", HANG, lambda: s.dm.mode() == "nospc")
    s.event()
    s.fs.make_room()
    wait_for("mode rw", HANG, lambda: s.dm.mode() == "rw")
    s.event()
    s.look("rw", False)
    expect(s.image.state(s.HOLE + 2 * CLUSTER) == "data", "all is written, but the entry is not there")
    s.finish()


@test("mode nospc: no first write that needs a table, even where the device would take it")
def no_new_tables(bench):
    s = Full(bench)
    s.write(s.HOLE + 2 * CLUSTER)
    s.no_sync()
    s.look("nospc", True)
    # The device is not asked.
    s.lower.stop()
    s.fails(COVER)
    s.fails(3 * COVER, disk=s.sync)
    s.lower.go()
    s.same(COVER)
    s.fs.make_room()
    wait_for("mode rw", HANG, lambda: s.dm.mode() == "rw")
    s.write(COVER)
    s.disk.fsync()
    s.finish()


@test("removal in mode nospc: what was never written is lost, and nothing else")
def removal(bench):
    s = Full(bench)
    s.disk.write(s.HOLE + 2 * CLUSTER, b"l" * CLUSTER)
    s.no_sync()
    s.look("nospc", True)
    s.write(20 * CLUSTER, CLUSTER)
    s.finish()


@test("a commit meets a bad sector and want of space: a flush says that there is no space")
def both(bench):
    s = Full(bench, fill=False)
    s.write(6 * COVER)
    s.disk.fsync()
    s.same(0, 6 * COVER)
    s.lower.bad(s.image.l2_table(6 * COVER), 4096)
    s.write(6 * COVER + 2 * CLUSTER)
    with fails_with(errno.EIO):
        s.disk.fsync()
    s.look("rw", True)
    s.fs.fill()
    s.write(s.HOLE + 2 * CLUSTER)
    s.no_sync()
    s.look("nospc", True)
    # One of the two ends, then the other.
    s.fs.make_room()
    with fails_with(errno.EIO):
        s.disk.fsync()
    expect(s.image.state(s.HOLE + 2 * CLUSTER) == "data", "not durable, although there is room for it")
    # Only a commit that succeeds as a whole ends the mode.
    s.look("nospc", True)
    s.lower.good()
    s.disk.fsync()
    s.look("rw", False)
    s.write(COVER)
    s.disk.fsync()
    s.same(COVER, s.HOLE + 2 * CLUSTER, 6 * COVER, 6 * COVER + 2 * CLUSTER)
    s.finish()


class Pool:
    """A pool of thin volumes that fails what it has no space for."""
    BLOCK = 64 * KIB

    def __init__(self, bench, blocks):
        self.bench = bench
        run("modprobe", "dm-thin-pool")
        meta = bench.add(Loop(bench.file("pool.meta", 4 * MIB)))
        data = bench.add(Loop(bench.file("pool.data", blocks * self.BLOCK)))
        self.dm = bench.add(Dm("pool", f"0 {blocks * self.BLOCK // 512} thin-pool {meta.path} {data.path} "
                                       f"{self.BLOCK // 512} 0 1 error_if_no_space"))

    def message(self, *words):
        run("dmsetup", "message", self.dm.name, 0, " ".join(map(str, words)))

    def volume(self, name, number, size):
        return self.bench.add(Dm(name, f"0 {size // 512} thin {self.dm.path} {number}"))


@test("a thin volume with a snapshot, whose pool is full: the commit is held until there is space")
def thin(bench):
    image = bench.image(SIZE)
    image.qemu_io(f"write -q -P 0x61 0 {4 * CLUSTER}", f"write -q -P 0x61 {COVER} {CLUSTER}")
    image.extend()
    image.trim()
    size = -(-image.file_size() // CLUSTER) * CLUSTER
    pool = Pool(bench, 4 * size // CLUSTER)
    pool.message("create_thin", 0)
    volume = pool.volume("volume", 0, size)
    with open(image.path, "rb") as f, open(volume.path, "r+b") as v:
        content = f.read()
        for at in range(0, len(content), CLUSTER):
            if any(content[at:at + CLUSTER]):
                v.seek(at)
                v.write(content[at:at + CLUSTER])
        v.flush()
        os.fsync(v.fileno())
    volume.suspend()
    pool.message("create_snap", 1, 0)
    volume.resume()
    model = bench.model(SIZE)
    for at, length in ((0, 4 * CLUSTER), (COVER, CLUSTER)):
        model.write(at, b"a" * length)
    dm = image.open(meta=volume.path)
    disk = bench.io(dm)
    events = dm.events()

    # Another volume takes what is left.
    pool.message("create_thin", 2)
    filler = pool.volume("filler", 2, 8 * size)
    eater = bench.io(filler)
    with fails_with(errno.ENOSPC):
        for at in range(0, 8 * size, CLUSTER):
            eater.write(at, b"e" * CLUSTER)

    def write(at, length=512):
        data = random.randbytes(length)
        disk.write(at, data)
        model.write(at, data)
    write(20 * CLUSTER)
    with fails_with(errno.ENOSPC):
        disk.fsync()
    status = dm.status()
    expect(status.mode == "nospc" and status.unwritten == 1 and dm.events() > events, f"{status}")
    with fails_with(errno.ENOSPC):
        disk.write(2 * COVER, bytes(512))
    write(COVER + 20 * CLUSTER, CLUSTER)
    for at in (0, 20 * CLUSTER, COVER + 20 * CLUSTER, 2 * COVER):
        same(disk.read(at, CLUSTER), model.read(at, CLUSTER), at)
    dm.cycle()
    expect(dm.mode() == "nospc", f"{dm.status()}")

    bench.drop(eater)
    bench.drop(filler)
    pool.message("delete", 2)
    wait_for("mode rw", HANG, lambda: dm.mode() == "rw")
    disk.fsync()
    write(2 * COVER)
    disk.fsync()
    expect(dm.status().unwritten == 0, f"{dm.status()}")
    for at in (0, 20 * CLUSTER, COVER + 20 * CLUSTER, 2 * COVER):
        same(disk.read(at, CLUSTER), model.read(at, CLUSTER), at)
    bench.drop(disk)
    bench.drop(dm)
    with open(volume.path, "rb") as v:
        content = v.read()
    with open(image.path, "wb") as f:
        f.write(content)
    image.check()
    image.compare(model)


@test("a full file system below the data: ENOSPC, with and without a copy from a backing device")
def data(bench):
    unit, count = 64 * KIB, 16
    path = bench.path("backing")
    with open(path, "wb") as f:
        f.write(random.randbytes(count * unit))
    fs = bench.add(Ext4(bench, 24 * MIB, "-b", "4096"))
    image = bench.image(2 * count * unit, backing=path, data=fs.path + "/data")
    image.extend()
    image.qemu_io(f"write -q -P 0x61 0 {unit}")
    image.trim()
    model = bench.model(image.size)
    with open(path, "rb") as f:
        model.write(0, f.read())
    model.write(0, b"a" * unit)
    image.meta_loop = bench.add(Loop(image.path))
    image.data_loop = bench.add(Loop(image.data, direct=True))
    image.backing_loop = bench.add(Loop(path, readonly=True))
    below = Lower(bench, "backing", image.backing_loop.path)
    dm = image.open(backing=below.path)
    disk = bench.io(dm)
    fs.fill()

    def full(at, length):
        with fails_with(errno.ENOSPC):
            disk.write(at, b"f" * length)
    # Whole units; parts, with a copy around, before or behind it; likewise with zeros
    for at, length in ((2 * unit, unit), (3 * unit + 4096, 4096), (4 * unit, 4096), (6 * unit - 512, 512),
                       (20 * unit, unit), (21 * unit + 4096, 4096)):
        full(at, length)
        same(disk.read(at // unit * unit, unit), model.read(at // unit * unit, unit), at)
    with fails_with(errno.ENOSPC):
        disk.zero_range(7 * unit + 4096, 4096)
    # What cannot be read is not written, so that nothing is known of the space for it.
    below.bad(8 * unit, 4096)
    with fails_with(errno.EIO):
        disk.write(8 * unit + 32 * KIB, b"f" * 512)
    with fails_with(errno.EIO):
        disk.read(8 * unit, 4096)
    below.good()
    full(8 * unit + 32 * KIB, 512)
    same(disk.read(8 * unit, unit), model.read(8 * unit, unit), 8 * unit)
    expect(dm.mode() == "rw" and not dm.status().dirty, f"{dm.status()}")
    fs.make_room()
    for at in (2 * unit, 3 * unit + 4096, 6 * unit - 512, 8 * unit + 32 * KIB, 21 * unit + 4096):
        disk.write(at, b"n" * 512)
        model.write(at, b"n" * 512)
    disk.fsync()
    for n in range(2 * count):
        same(disk.read(n * unit, unit), model.read(n * unit, unit), n * unit)
    bench.drop(disk)
    bench.drop(dm)
    image.check()
    image.compare(model)


if __name__ == "__main__":
    main()
