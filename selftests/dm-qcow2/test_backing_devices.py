#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Backing devices of all kinds: which ones are taken, and what becomes of requests when they
stand still, or fail.
"""
import errno
import glob
import mmap
import os
import random
import time

from qcow2test import (KIB, MIB, Dm, Failure, KernelLog, Loop, Task, Units, expect, fails_with, main, queue_limit,
                       run, same, sysfs, test, wait_for)
from backed import CLUSTER, Backed, backing_file


# Table lines

def refused(bench, line, log, why):
    try:
        dm = Dm("refused", line)
    except Failure as e:
        expect(log.lines("qcow2") or "qcow2" in str(e), f"{why}: refused without a word")
        return
    dm.close()
    raise Failure(f"accepted: {why}: {line}")


@test("table lines that do not fit the image are refused")
def table(bench):
    path = backing_file(bench, 8 * MIB)
    over = bench.image(8 * MIB, name="over", backing=path)
    plain = bench.image(8 * MIB, name="plain")
    raw = bench.image(8 * MIB, name="raw", raw=True)
    for image in (over, plain, raw):
        image.attach()
    back = over.backing_loop.path
    log = bench.add(KernelLog())

    def line(image, *features):
        return image.line(image.meta_loop.path, image.data_loop.path, *features)

    # These are all right, so that it is not for another reason that others are not.
    bench.drop(bench.add(Dm("fine", line(over, "backing_dev", back))))
    bench.drop(bench.add(Dm("fine", line(plain))))
    bench.drop(bench.add(Dm("fine", line(raw))))
    refused(bench, line(over), log, "a backing file, but no backing_dev")
    refused(bench, line(plain, "backing_dev", back), log, "backing_dev, but no backing file")
    refused(bench, line(raw, "backing_dev", back), log, "backing_dev with data_file_raw")
    refused(bench, line(over, "backing_dev", back, "data_file_raw"), log, "data_file_raw with backing_dev")
    refused(bench, line(over, "backing_dev"), log, "no device behind backing_dev")
    refused(bench, line(over, "backing_dev", "/dev/qcow2-is-not-there"), log, "a device that is not there")
    refused(bench, line(over, "backing_dev", back, "backing_dev", back), log, "two backing devices")
    refused(bench, line(over, "backing_dev", back).replace(" 2 backing_dev", " 1 backing_dev"), log, "a wrong count")
    dm = bench.add(Dm("fine", line(over, "no_discard_passdown", "backing_dev", back, "read_only")))
    words = dm.table().split()
    expect(words[12:14] == ["read_only", "backing_dev"] and words[15:] == ["no_discard_passdown"], f"{words}")
    expect(dm.status().features == words[12:], f"{dm.status()}")


def block_sizes(bench, cluster, data_size, back_size, length, fine):
    """Backing and data devices with logical blocks of other sizes."""
    size = 64 * cluster
    path = backing_file(bench, length)
    image = bench.image(size, cluster=cluster, backing=path)
    image.extend()
    meta = bench.add(Loop(image.path))
    data = bench.add(Loop(image.data, block_size=data_size))
    back = bench.add(Loop(path, readonly=True, block_size=back_size))
    line = image.line(meta.path, data.path, "backing_dev", back.path)
    log = bench.add(KernelLog())
    if not fine:
        return refused(bench, line, log, "block sizes")
    model = Units(image)
    dm = bench.add(Dm("q", line))
    disk = bench.io(dm)
    model.check(disk)
    block = max(data_size, back_size)
    for at in (0, 5 * cluster + block, 6 * cluster + 3 * block):
        disk.write(at, b"b" * block)
        model.write(at, b"b" * block)
    model.check(disk)
    bench.drop(disk)
    bench.drop(dm)
    image.compare(model.save(bench.path("model")))
    return None


for _title, _args in (
        ("4096 on both sides", (64 * KIB, 4096, 4096, MIB, True)),
        ("4096 below, 512 for the data", (64 * KIB, 512, 4096, MIB, True)),
        ("4096 for the data, 512 below", (64 * KIB, 4096, 512, MIB, True)),
        ("4096 below clusters of 512", (512, 512, 4096, 16384, False)),
        ("an odd end below, 4096 for the data", (64 * KIB, 4096, 512, MIB + 512, False))):
    test(f"logical blocks: {_title} {'works' if _args[-1] else 'is refused'}", *_args)(block_sizes)


# NOWAIT

class NowaitRead:
    """preadv2 with RWF_NOWAIT; None if it would have to wait."""

    def __init__(self, disk):
        self.disk = disk

    def __call__(self, offset, length):
        buffer = mmap.mmap(-1, length)
        with memoryview(buffer) as view:
            try:
                n = os.preadv(self.disk.fd, [view], offset, os.RWF_NOWAIT)
            except BlockingIOError:
                return None
            finally:
                data = bytes(view)
        buffer.close()
        return data[:n]


class Partition:
    """A partition that begins at a sector of a disk with physical blocks of 4 KiB."""

    def __init__(self, start, size):
        run("modprobe", "scsi_debug", f"dev_size_mb={size // MIB + 1}", "sector_size=512", "physblk_exp=3", "delay=1")
        run("modprobe", "sd_mod")

        def disks():
            return glob.glob("/sys/bus/pseudo/drivers/scsi_debug/adapter*/host*/target*/*:*/block/sd*")
        wait_for("a SCSI disk", 60, disks)
        self.disk = "/dev/" + os.path.basename(disks()[0])
        self.path = self.disk + "1"
        wait_for(self.disk, 10, lambda: os.path.exists(self.disk))
        run("addpart", self.disk, 1, start, size // 512)
        wait_for(self.path, 10, lambda: os.path.exists(self.path))

    def close(self):
        run("modprobe", "-r", "scsi_debug")


def partition(bench, start):
    """The limits of a device whose backing device is a partition."""
    def limits(path):
        with open(f"{sysfs(path)}/alignment_offset", encoding="ascii") as f:
            return {"alignment_offset": int(f.read()), "physical_block_size": queue_limit(path, "physical_block_size")}
    size = 4 * MIB
    part = bench.add(Partition(start, size))
    linear = bench.linear("linear", part.path)
    wanted = limits(linear.path)
    expect(wanted == {"alignment_offset": -start * 512 % 4096, "physical_block_size": 4096}, f"dm-linear: {wanted}")
    with open(backing_file(bench, size), "rb") as f:
        content = f.read()
    disk = bench.io(part)
    disk.write(0, content)
    bench.drop(disk)
    image = bench.image(size, backing=bench.path("backing"))
    image.attach()
    dm = image.open(backing=part.path)
    got = limits(dm.path)
    expect(got == wanted, f"{got}, that of dm-linear over the partition: {wanted}")
    disk = bench.io(dm)
    same(disk.read(0, size), content)
    bench.drop(disk)
    bench.drop(dm)


for _start in (35, 40, 63):
    test(f"the backing device is a partition at sector {_start} of a disk with physical blocks of 4 KiB",
         _start)(partition)


@test("reads with RWF_NOWAIT: right, or EAGAIN; those of one unit are served")
def nowait(bench):
    unit = CLUSTER
    s = Backed(bench, 40 * unit, 30 * unit + 512)
    read = NowaitRead(s.disk)
    rng = random.Random(4)
    for cold in (True, False):
        served = 0
        if not cold:
            s.model.check(s.disk)
        for _ in range(200):
            at = rng.randrange(s.model.size // 512 - 300) * 512
            length = rng.randrange(1, 300) * 512
            got = read(at, length)
            if got is not None:
                served += 1
                same(got, s.model.read(at, len(got)), at)
        expect(cold or served, "each read was refused")
    for n in range(40):
        results = []
        wait_for(f"a read of unit {n} alone does not have to wait", 60,
                 lambda: results.append(read(n * unit, 4096)) or results[-1] is not None)  # pylint: disable=cell-var-from-loop
        got = results[-1]
        same(got, s.model.read(n * unit, 4096), n * unit)
    s.finish()


# Devices that stand still, or fail

@test("a read of a busy unit gives the backing's content")
def busy(bench):
    unit = CLUSTER
    s = Backed(bench, 24 * unit, 24 * unit)
    # Into the cache, and what a first write needs.
    s.model.check(s.disk)
    s.write(8 * unit, 512)
    s.disk.fsync()
    s.data.stop()
    writes = [Task(s.disk.write, 4 * unit, b"b" * unit), Task(s.disk.write, 10 * unit + 512, b"b" * 512),
              Task(s.disk.write, 12 * unit + 512, b"b" * 2 * unit)]
    time.sleep(0.5)
    for n, length in ((4, unit), (10, unit), (10, 2 * unit), (12, unit), (13, unit)):
        same(s.disk.read(n * unit, length), s.model.read(n * unit, length), n * unit, "busy unit")
    expect(all(w.is_alive() for w in writes), "a write ended that cannot have ended")
    s.data.go()
    for w in writes:
        w.finish(60)
    s.model.write(4 * unit, b"b" * unit)
    s.model.write(10 * unit + 512, b"b" * 512)
    s.model.write(12 * unit + 512, b"b" * 2 * unit)
    s.finish()


@test("a backing device that is slow holds up nothing else")
def slow(bench):
    unit = CLUSTER
    s = Backed(bench, 24 * unit, 24 * unit)
    s.model.check(s.disk)
    s.write(8 * unit, 512)
    s.back.stop()
    waiting = [Task(s.disk.write, 4 * unit + 512, b"s" * 512), Task(s.disk.read, 0, 512)]
    # Data, zero, and a whole first write do not need it; nor do flushes.
    same(s.disk.read(unit, unit), s.model.read(unit, unit), unit)
    same(s.disk.read(3 * unit, unit), bytes(unit), 3 * unit)
    s.write(12 * unit, unit)
    s.write(unit + 4096, 4096)
    s.disk.fsync()
    expect(all(w.is_alive() for w in waiting), "the backing device does not stand still")
    s.back.go()
    for w in waiting:
        w.finish(60)
    s.model.write(4 * unit + 512, b"s" * 512)
    s.finish()


def broken(bench, extended):
    """A part of the backing device cannot be read."""
    unit = CLUSTER // 32 if extended else CLUSTER
    s = Backed(bench, 64 * unit, 64 * unit, extended=extended)
    model, disk = s.model, s.disk
    s.back.bad(8 * unit, 4096 if unit > 4096 else 512)
    for at, length in ((8 * unit, 512), (7 * unit, 2 * unit), (8 * unit, unit)):
        with fails_with(errno.EIO):
            disk.read(at, length)
    # Its other half is copied, the bad one is not.
    with fails_with(errno.EIO):
        disk.write(8 * unit + unit // 2, b"e" * 512)
    with fails_with(errno.EIO):
        disk.write(8 * unit + unit - 512, b"e" * 512)
    expect(s.dm.mode() == "rw", f"{s.dm.status()}")
    disk.fsync()
    expect(s.image.state(8 * unit) == "unallocated", "the unit is not what it was")
    s.back.good()
    model.check(disk)
    s.dm.cycle()
    model.check(disk)
    # What covers the unit does not need the copy, nor does what covers the bad part.
    s.back.bad(8 * unit, 4096 if unit > 4096 else 512)
    s.write(8 * unit, 4096 if unit > 4096 else 512)
    model.check(disk, 8 * unit, unit)
    s.back.bad(12 * unit, unit)
    s.write(12 * unit, unit)
    s.back.good()
    s.finish()


test("errors of the backing device fail the first write, and the unit stays as it was", False)(broken)
test("errors of the backing device: extended L2", True)(broken)


@test("errors of the data device while copying: the unit stays as it was")
def copy_errors(bench):
    unit = CLUSTER
    s = Backed(bench, 24 * unit, 24 * unit)
    for bad, at in ((4 * unit + 32 * KIB, 4 * unit), (8 * unit, 8 * unit + 48 * KIB)):
        s.data.bad(bad, 4 * KIB)
        with fails_with(errno.EIO):
            s.disk.write(at, b"e" * 4096)
        s.data.good()
        s.model.check(s.disk, at // unit * unit, unit)
        s.dm.cycle()
        s.model.check(s.disk, at // unit * unit, unit)
        s.write(at, 4096)
        s.model.check(s.disk, at // unit * unit, unit)
    expect(s.dm.mode() == "rw", f"{s.dm.status()}")
    s.finish()


if __name__ == "__main__":
    main()
