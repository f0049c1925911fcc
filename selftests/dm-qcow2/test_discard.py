#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Discard and write zeroes: limits, each state's transition, what is freed below.

A discard makes whole units zero in core at once, and on disk with the next
commit; only then is it passed down to the data device. test_discard_order.py observes
the order.
"""
import errno
import os
import random
import time

from qcow2test import (GIB, KIB, MIB, TIB, Ext4, NullBlk, Stat, Units, blocks, expect, fails_with, main, queue_limit,
                       run, same, some, sysfs, test, wait_for)

CLUSTER = 64 * KIB
# Longer than the timer of the commit, and than a pass-down after it
LATER = 3


# Limits

def limits(path):
    return {name: queue_limit(path, name) for name in
            ("discard_granularity", "discard_max_bytes", "discard_max_hw_bytes", "write_zeroes_max_bytes")}


def check_limits(dm, unit, discards, zeroes):
    got = limits(dm.path)
    with open(f"{sysfs(dm.path)}/discard_alignment", encoding="ascii") as f:
        expect(int(f.read()) == 0, "units do not start at the device's start")
    if discards:
        expect(got["discard_granularity"] == unit, f"granularity is not the unit: {got}")
        # Not limited to a few units: a discard of all must not take for ever.
        expect(got["discard_max_bytes"] >= GIB, f"small maximum: {got}")
        expect(got["discard_max_hw_bytes"] >= got["discard_max_bytes"], f"{got}")
    else:
        expect(not got["discard_max_bytes"], f"discards are offered: {got}")
    if zeroes:
        expect(got["write_zeroes_max_bytes"] >= GIB, f"no, or few, write zeroes: {got}")
    else:
        expect(not got["write_zeroes_max_bytes"], f"write zeroes are offered: {got}")


def limits_of(bench, cluster, extended, *features):
    image = bench.image(8 * MIB + 512, cluster=cluster, extended=extended)
    dm = image.open(*features)
    check_limits(dm, image.unit, True, True)
    bench.drop(dm)
    dm = image.open(*features, readonly=True)
    check_limits(dm, image.unit, False, False)


for _cluster, _extended in ((512, False), (64 * KIB, False), (2 * MIB, False), (16 * KIB, True), (64 * KIB, True)):
    test(f"limits: clusters of {_cluster}{', extended L2' if _extended else ''}", _cluster, _extended)(limits_of)
test("limits: no_discard_passdown", 64 * KIB, False, "no_discard_passdown")(limits_of)


@test("limits: a data device without discard and write zeroes")
def limits_ram(bench):
    disk = bench.add(NullBlk(16 * MIB, discard=False))
    below = limits(disk.path)
    expect(not below["discard_max_bytes"] and not below["write_zeroes_max_bytes"], f"null_blk: {below}")
    image = bench.image(16 * MIB, data=disk.path)
    dm = image.open()
    check_limits(dm, CLUSTER, True, False)
    bench.drop(dm)
    image.detach()
    # Here the data device would have to do it.
    image = bench.image(16 * MIB, name="raw", data=disk.path, raw=True)
    dm = image.open()
    check_limits(dm, CLUSTER, False, False)
    io = bench.io(dm)
    with fails_with(errno.EOPNOTSUPP):
        io.discard(0, MIB)
    with fails_with(errno.EOPNOTSUPP):
        io.punch_hole(0, MIB)
    bench.drop(io)
    bench.drop(dm)


@test("limits: a data device with discard, but without write zeroes")
def limits_null(bench):
    disk = bench.add(NullBlk(16 * MIB))
    below = limits(disk.path)
    expect(below["discard_max_bytes"] and not below["write_zeroes_max_bytes"], f"null_blk: {below}")
    image = bench.image(16 * MIB, data=disk.path)
    dm = image.open()
    check_limits(dm, CLUSTER, True, False)
    bench.drop(dm)
    image.detach()
    image = bench.image(16 * MIB, name="raw", data=disk.path, raw=True)
    dm = image.open()
    got = limits(dm.path)
    expect(got["discard_granularity"] == below["discard_granularity"] and
           got["discard_max_bytes"] == below["discard_max_bytes"] and not got["write_zeroes_max_bytes"],
           f"not those of the data device: {got}, {below}")
    bench.drop(dm)


@test("limits: data_file_raw has those of the data device")
def limits_raw(bench):
    image = bench.image(8 * MIB, raw=True)
    dm = image.open()
    below, got = limits(image.data_loop.path), limits(dm.path)
    expect(got["discard_granularity"] == below["discard_granularity"], f"{got}, {below}")
    expect(0 < got["discard_max_bytes"] <= below["discard_max_bytes"], f"{got}, {below}")
    expect(got["write_zeroes_max_bytes"], f"{got}")
    bench.drop(dm)
    dm = image.open("no_discard_passdown")
    check_limits(dm, CLUSTER, False, True)
    bench.drop(dm)
    dm = image.open(readonly=True)
    check_limits(dm, CLUSTER, False, False)


# Each cell of the table of transitions

# Each state beside each other one, each in the middle of two equal ones
PATTERN = ("data zero unallocated data unallocated zero+ data data zero zero unallocated unallocated "
           "zero data data data unallocated zero unallocated data zero+ zero+ data unallocated").split()
# In this order: tmpfs cannot write zeroes without making a hole, whereupon the loop
# device of newer kernels offers no write zeroes at all any more.
OPERATIONS = ("discard", "punch_hole", "zero_out", "zero_range")


def ranges(unit, first, sector):
    """What is done to the pattern that begins with unit FIRST."""
    at = first * unit
    half = max(unit // 2, 512)
    yield at + 0 * unit, unit			# one whole unit of each state
    yield at + 1 * unit, unit
    yield at + 2 * unit, unit
    if unit > 512:
        for n in (3, 4, 5):			# inside a unit; its start; its end
            yield at + n * unit + sector, half
        for n in (6, 8, 10):
            yield at + n * unit, half
            yield at + (n + 1) * unit - half, half
    yield at + 9 * unit + half, 2 * unit	# across borders, a whole one between
    yield at + 12 * unit + half, 3 * unit
    yield at + 15 * unit - sector, 7 * unit + 2 * sector	# many, ragged


def cells(bench, warm, cluster, options):
    unit = cluster // 32 if options.get("extended") else cluster
    n = len(PATTERN)
    size = (4 * n + 3) * unit + max(512, unit // 2 & ~511)
    if options.get("extended"):
        size = -(-size // cluster) * cluster + 9 * unit + 512
    if options.pop("backed", False):
        path = bench.path("backing")
        with open(path, "wb") as f:
            f.write(random.Random(size).randbytes(size - 20 * unit - 512))
        options["backing"] = path
    image = bench.image(size, cluster=cluster, **options)
    image.arrange(lambda i: PATTERN[i % n])
    model = Units(image)
    dm = image.open()
    disk = bench.io(dm)
    if warm:
        model.check(disk)
    for k, name in enumerate(OPERATIONS):
        for offset, length in ranges(unit, k * n, 512):
            if not warm:
                dm.cycle()
            getattr(disk, name)(offset, length)
            getattr(model, name)(offset, length)
            near = max(0, offset - unit)
            model.check(disk, near, min(size, offset + length + unit) - near)
    # The last unit, which is cut: its start only, then all that there is of it.
    last = (size - 1) // unit * unit
    if size - last > 512:
        disk.discard(last, 512)
        model.discard(last, 512)
        model.check(disk, last)
        disk.punch_hole(last, 512)
        model.punch_hole(last, 512)
        model.check(disk, last)
    disk.write(last, b"L" * (size - last))
    model.write(last, b"L" * (size - last))
    disk.discard(last - unit - 512, size - last + unit + 512)
    model.discard(last - unit - 512, size - last + unit + 512)
    model.check(disk)
    disk.fsync()
    model.check_states(image)
    time.sleep(0.5)
    model.check(disk)
    dm.cycle()
    model.check(disk)
    # Zero units are written again.
    for i in range(0, size // unit, 3):
        disk.write(i * unit + (512 if unit > 512 else 0), b"W" * 512)
        model.write(i * unit + (512 if unit > 512 else 0), b"W" * 512)
    model.check(disk)
    bench.judge(disk, dm, image, model)


for _title, _cluster, _options in some((
        ("clusters of 64 KiB", 64 * KIB, {}), ("clusters of 512", 512, {}),
        ("extended L2", 64 * KIB, {"extended": True}), ("extended L2, subclusters of 512", 16 * KIB, {"extended": True}),
        ("backing", 64 * KIB, {"backed": True}), ("backing, clusters of 512", 512, {"backed": True}),
        ("backing, extended L2", 64 * KIB, {"backed": True, "extended": True})), 4):
    test(f"every state, warm cache: {_title}", True, _cluster, dict(_options))(cells)
    test(f"every state, cold cache: {_title}", False, _cluster, dict(_options))(cells)


@test("data_file_raw: they go to the data device at once, and clusters stay allocated")
def raw(bench):
    size = 4 * MIB + 512
    image = bench.image(size, raw=True)
    image.poison()
    model = Units(image)
    dm = image.open()
    disk = bench.io(dm)
    before = image.hash()
    full = blocks(image.data)
    for name in OPERATIONS:
        for offset, length in ranges(CLUSTER, 6 * OPERATIONS.index(name), 4096):
            getattr(disk, name)(offset, length)
            getattr(model, name)(offset, length)
    model.check(disk)
    with open(image.data, "rb") as f:
        same(f.read(), model.read(0, size), 0, "data file")
    expect(blocks(image.data) < full, "the data file has no holes")
    # All but the last sector was data already, and still is.
    disk.fsync()
    expect(set(image.states()) == {"data"}, "clusters are not allocated any more")
    disk.write(10 * CLUSTER + 512, b"w" * 512)
    model.write(10 * CLUSTER + 512, b"w" * 512)
    bench.drop(disk)
    bench.drop(dm)
    expect(image.hash() == before, "metadata was changed")
    image.check()
    image.compare(model.save(bench.path("model")))


@test("nothing to do: metadata is not touched, nor is data; zeros are discarded below, once")
def nothing(bench):
    size = 256 * MIB
    image = bench.image(size)
    image.qemu_io("write -q -z 1M 4M")
    image.poison((0, MIB))
    image.attach()
    data = bench.linear("data", image.data_loop.path)
    meta = bench.linear("meta", image.meta_loop.path)
    before = image.hash()
    dm = image.open(data=data.path, meta=meta.path)
    below, metadata = Stat(data.path), Stat(meta.path)
    disk = bench.io(dm)
    disk.punch_hole(512, size - 1024)
    disk.zero_out(0, 64 * MIB)
    for _ in range(3):
        disk.discard(0, size)
        wait_for("zeros are discarded", 30, lambda: below.discard_sectors * 512 >= 4 * MIB)
    same(disk.read(0, 8 * MIB), bytes(8 * MIB))
    expect(not dm.status().dirty, f"something is dirty: {dm.status()}")
    disk.fsync()
    dm.cycle()
    expect(below.discard_sectors * 512 == 4 * MIB, f"{below.discard_sectors * 512} bytes were discarded")
    expect(not metadata.discards and not metadata.write_sectors and not below.write_sectors, "something was written")
    bench.drop(disk)
    bench.drop(dm)
    expect(image.hash() == before, "metadata was changed")


@test("a sparse disk of 16 TiB is discarded and zeroed as a whole in no time")
def huge(bench):
    size = 16 * TIB
    image = bench.image(size)
    image.attach()
    meta = bench.linear("meta", image.meta_loop.path)
    dm = image.open(meta=meta.path)
    disk = bench.io(dm)
    for offset in (0, TIB - 4096, 5 * TIB + 512, size - 512):
        disk.write(offset, b"h" * 512)
    disk.fsync()
    below, tables = Stat(meta.path), dm.status().tables
    run("blkdiscard", "-f", dm.path)
    run("blkdiscard", "-f", "-z", dm.path)
    # No look at what has no L2 table, of which there are 32,768
    expect(dm.status().tables == tables and below.reads + below.writes < 1000,
           f"{below.reads} reads, {below.writes} writes: {dm.status()}")
    for offset in (0, TIB - 4096, 5 * TIB + 512, size - 4096):
        same(disk.read(offset, 4096), bytes(4096), offset)
    disk.fsync()
    expect(image.state(TIB - 4096) == image.state(size - 512) == "zero", "not on disk")
    bench.drop(disk)
    bench.drop(dm)
    image.check()


# Space

def filled(bench, size=32 * MIB, **options):
    image = bench.image(size, **options)
    dm = image.open()
    disk = bench.io(dm)
    for at in range(0, size, MIB):
        disk.write(at, b"f" * MIB)
    disk.fsync()
    expect(blocks(image.data) >= size, "the data file has holes")
    return image, dm, disk


def freed(image, limit):
    wait_for(f"{image.data} has {blocks(image.data)} bytes, not at most {limit}", 30,
             lambda: blocks(image.data) <= limit)


def frees(bench, where, command):
    options = {}
    if where == "ext4":
        options["data"] = bench.add(Ext4(bench, 128 * MIB)).path + "/data"
    image, dm, disk = filled(bench, **options)
    run(*command, "-o", 4 * MIB, "-l", 24 * MIB, dm.path)
    disk.fsync()
    freed(image, 8 * MIB + 64 * KIB)
    expect(blocks(image.data) >= 8 * MIB, "too much was freed")
    same(disk.read(4 * MIB - 4096, 8192), b"f" * 4096 + bytes(4096))
    same(disk.read(28 * MIB - 4096, 8192), bytes(4096) + b"f" * 4096)
    run(*command, "-o", 0, "-l", 32 * MIB, dm.path)
    # By the timer
    freed(image, 64 * KIB)
    bench.drop(disk)
    bench.drop(dm)
    image.check()


for _where in ("tmpfs", "ext4"):
    test(f"blkdiscard frees space of a data file on {_where}", _where, ("blkdiscard", "-f"))(frees)
test("fallocate --punch-hole frees space", "tmpfs", ("fallocate", "-p"))(frees)


@test("blkdiscard -z makes zeros, and keeps the space")
def zeroout(bench):
    image, dm, disk = filled(bench)
    run("blkdiscard", "-f", "-z", "-o", 4 * MIB, "-l", 24 * MIB, dm.path)
    same(disk.read(4 * MIB - 4096, 8192), b"f" * 4096 + bytes(4096))
    disk.fsync()
    time.sleep(LATER)
    expect(blocks(image.data) >= 32 * MIB, "space was freed that was to be kept")
    dm.cycle()
    same(disk.read(28 * MIB - 4096, 8192), bytes(4096) + b"f" * 4096)
    expect(image.state(5 * MIB) == "zero", "not zero on disk")
    bench.drop(disk)
    bench.drop(dm)
    image.check()


@test("no_discard_passdown: zero, but the data device hears nothing")
def no_passdown(bench):
    image = bench.image(32 * MIB)
    image.attach()
    data = bench.linear("data", image.data_loop.path)
    dm = image.open("no_discard_passdown", data=data.path)
    disk = bench.io(dm)
    for at in range(0, 32 * MIB, MIB):
        disk.write(at, b"f" * MIB)
    disk.fsync()
    stat = Stat(data.path)
    disk.discard(MIB, 30 * MIB)
    disk.fsync()
    disk.punch_hole(0, 64 * KIB)
    time.sleep(LATER)
    dm.cycle()
    expect(not stat.discards, f"{stat.discards} discards reached the data device")
    expect(blocks(image.data) >= 32 * MIB, "space was freed")
    same(disk.read(MIB - 4096, 8192), b"f" * 4096 + bytes(4096))
    expect("no_discard_passdown" in dm.table().split(), dm.table())
    bench.drop(disk)
    bench.drop(dm)
    image.check()


def by_suspend(bench, remove):
    image, dm, disk = filled(bench)
    disk.discard(0, 32 * MIB)
    if remove:
        bench.drop(disk)
        bench.drop(dm)
    else:
        dm.suspend()
    expect(blocks(image.data) <= 64 * KIB, f"{blocks(image.data)} bytes are still there")
    expect(image.state(0) == image.state(31 * MIB) == "zero", "not zero on disk")
    if not remove:
        dm.resume()
        same(disk.read(0, MIB), bytes(MIB))


test("suspend commits and passes down", False)(by_suspend)
test("removal commits and passes down", True)(by_suspend)


@test("mkfs, fstrim and mount -o discard on ext4")
def ext4(bench):
    size = 160 * MIB + 512
    image = bench.image(size)
    image.poison()
    dm = image.open()
    disk = bench.io(dm)
    for at in range(0, 96 * MIB, MIB):
        disk.write(at, b"f" * MIB)
    bench.drop(disk)
    os.sync()
    expect(blocks(image.data) >= 96 * MIB, "the data file has holes")
    run("mkfs.ext4", "-q", "-F", "-b", 4096, "-O", "^has_journal", "-E", "discard,lazy_itable_init=0", dm.path)
    run("sync")
    # What was data is free now; what never was is poison still, and does not show.
    freed(image, 160 * MIB - 80 * MIB)
    mount = bench.path("mnt")
    os.mkdir(mount)

    class Mounted:
        def __init__(self, options):
            run("mount", "-t", "ext4", "-o", options, dm.path, mount)

        @staticmethod
        def close():
            run("umount", mount)

    mounted = bench.add(Mounted("noatime"))
    for name in ("keep", "lose"):
        with open(f"{mount}/{name}", "wb") as f:
            f.write(name.encode() * (6 * MIB))
    run("sync")
    full = blocks(image.data)
    os.unlink(f"{mount}/lose")
    run("sync")
    out = run("fstrim", "-v", mount)
    run("sync")
    wait_for(f"fstrim ({out.strip()}) has freed nothing", 30, lambda: blocks(image.data) <= full - 20 * MIB)
    bench.drop(mounted)
    mounted = bench.add(Mounted("noatime,discard"))
    full = blocks(image.data)
    os.rename(f"{mount}/keep", f"{mount}/kept")
    with open(f"{mount}/lose", "wb") as f:
        f.write(b"lose" * (5 * MIB))
    run("sync")
    os.unlink(f"{mount}/lose")
    run("sync")
    wait_for("-o discard has freed nothing", 30, lambda: blocks(image.data) <= full + 4 * MIB)
    dm.cycle()
    with open(f"{mount}/kept", "rb") as f:
        same(f.read(), b"keep" * (6 * MIB), 0, "file")
    bench.drop(mounted)
    run("e2fsck", "-f", "-n", dm.path)
    bench.drop(dm)
    image.check()


def mirror(bench, operation):
    """On a RAM disk: discards change metadata only, zeroes are written."""
    disk = bench.add(NullBlk(16 * MIB, discard=False))
    image = bench.image(16 * MIB, data=disk.path)
    image.arrange(lambda n: ("data", "data", "zero", "unallocated")[n % 4])
    model = Units(image)
    dm = image.open()
    io = bench.io(dm)
    if operation == "zero_out":
        # The kernel's fallback: these are writes.
        io.zero_out(512, 8 * CLUSTER)
        model.write(512, bytes(8 * CLUSTER))
    else:
        io.discard(512, 8 * CLUSTER)
        model.discard(512, 8 * CLUSTER)
        with fails_with(errno.EOPNOTSUPP):
            io.punch_hole(0, CLUSTER)
    model.check(io)
    io.fsync()
    model.check_states(image)
    dm.cycle()
    model.check(io)
    bench.drop(io)
    bench.drop(dm)
    image.check()
    image.compare(model.save(bench.path("model")))


test("a data device that can do neither: discard", "discard")(mirror)
test("a data device that can do neither: BLKZEROOUT", "zero_out")(mirror)


if __name__ == "__main__":
    main()
