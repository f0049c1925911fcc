#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Reads: every state of a cluster, cold and warm, and what a read may cost.

QEMU makes the metadata. The data file is then filled with known bytes, so that
what must come from it, and what must not, shows in every sector.
"""
import os
import random
import time

from qcow2image import COPIED, ZERO
from qcow2test import GIB, KIB, MIB, TIB, Dm, Stat, expect, in_parallel, main, same, some, test


def layout(cluster, size, rng):
    """Runs of clusters in one state each: [(first cluster, number, state)]."""
    count = -(-size // cluster)
    runs, at = [], 0
    # Cluster 0 has an entry of its own kind: see to it that it is data.
    state = "data"
    while at < count:
        n = min(rng.choice((1, 1, 2, 3, 5, 9)), count - at)
        runs.append((at, n, state))
        at += n
        state = rng.choice([s for s in ("data", "zero", "zero-alloc", "none") if s != state])
    return runs


def mixed_image(bench, cluster, refcount_bits, size, seed, model):
    """An image with clusters in all states, and the model of what it reads as."""
    rng = random.Random(seed)
    image = bench.image(size, cluster=cluster, refcount_bits=refcount_bits)
    commands, data = [], []
    for first, n, state in layout(cluster, size, rng):
        start = first * cluster
        length = min(n * cluster, size - start)
        if state in ("data", "zero-alloc"):
            commands.append(f"write -q -P 1 {start} {length}")
        if state in ("zero", "zero-alloc"):
            commands.append(f"write -q -z {start} {length}")
        if state == "data":
            data.append((start, length))
    image.qemu_io(*commands)
    # QEMU writes whole clusters, also beyond the end of the image.
    os.truncate(image.data, size)
    image.poison()
    with open(image.data, "rb") as f:
        for start, length in data:
            f.seek(start)
            model.write(start, f.read(length))
    states = {image.state(c * cluster) for c in range(-(-size // cluster))}
    expect(states == {"data", "zero", "unallocated"}, f"a poor mix of states: {states}")
    return image


def read_all(disk, model, chunk=MIB):
    for at in range(0, model.size, chunk):
        n = min(chunk, model.size - at)
        same(disk.read(at, n), model.read(at, n), at)


def read_some(disk, model, rng, count, largest):
    sectors = model.size // 512
    for _ in range(count):
        n = rng.randrange(1, min(largest // 512, sectors) + 1)
        at = rng.randrange(0, sectors - n + 1)
        same(disk.read(at * 512, n * 512), model.read(at * 512, n * 512), at * 512)


def every_state(bench, cluster, refcount_bits, size, readonly):
    seed = cluster + refcount_bits
    rng = random.Random(seed)
    model = bench.model(size)
    image = mixed_image(bench, cluster, refcount_bits, size, seed, model)
    if not readonly:
        image.extend()
    before = image.hash()
    with open(image.data, "rb") as f:
        data_before = f.read()
    dm = image.open(readonly=readonly)
    disk = bench.io(dm, readonly=readonly)
    largest = min(8 * cluster, 2 * MIB)

    read_some(disk, model, rng, 10, largest)
    misses = dm.status().misses
    expect(misses, "no miss was counted in a cold cache")
    read_all(disk, model)
    read_some(disk, model, rng, 60, largest)
    # Warm by now: all tables are in core.
    full = dm.status()
    read_some(disk, model, rng, 20, largest)
    read_all(disk, model)
    status = dm.status()
    expect(status.misses == full.misses, f"misses in a warm cache: {full}, then {status}")
    expect(status.hits > full.hits, f"hits are not counted: {full}, then {status}")
    expect(status.tables == sum(1 for i in range(image.tables) if image.l1(i)),
           f"L2 tables in use: {status}")

    # Cold again, from several sides at once: the misses meet each other.
    dm.cycle()
    in_parallel(read_some, *((disk, model, random.Random(seed + n), 15, largest) for n in range(4)))

    # Through the page cache: other sizes of requests, and readahead.
    dm.cycle()
    cached = bench.io(dm, direct=False, readonly=True)
    read_all(cached, model, chunk=100 * KIB)
    bench.drop(cached)
    bench.drop(disk)
    expect(dm.status().mode == ("ro" if readonly else "rw"), f"{dm.status()}")
    expect(not dm.status().dirty, f"dirty without a write: {dm.status()}")
    bench.drop(dm)
    expect(image.hash() == before, "the metadata was changed")
    with open(image.data, "rb") as f:
        same(f.read(), data_before, 0, "data file")
    image.check()
    image.compare(model)


# Sizes are odd on purpose: the last cluster is cut, and so is the last L2 table.
for n, (_cluster, _bits, _size) in some(enumerate((
        (512, 1, 300 * KIB + 512), (512, 64, 100 * KIB), (KIB, 2, 700 * KIB + 512),
        (4 * KIB, 4, 9 * MIB + 1536), (16 * KIB, 8, 3 * MIB + 512), (64 * KIB, 16, 12 * MIB + 512),
        (64 * KIB, 32, 8 * MIB), (256 * KIB, 64, 12 * MIB + 66048), (2 * MIB, 16, 50 * MIB + 512))), 5):
    test(f"every state: clusters of {_cluster}, refcounts of {_bits} bits, size {_size}"
         f"{', read-only' if n % 2 else ''}", _cluster, _bits, _size, bool(n % 2))(every_state)


def raw_image(bench):
    """data_file_raw: QEMU allocates every cluster."""
    size = 5 * MIB + 512
    image = bench.image(size, raw=True)
    model = bench.model(size)
    image.poison()
    with open(image.data, "rb") as f:
        model.write(0, f.read())
    return image, model


@test("data_file_raw")
def read_raw(bench):
    image, model = raw_image(bench)
    image.extend()
    before = image.hash()
    dm = image.open()
    disk = bench.io(dm)
    read_all(disk, model)
    read_some(disk, model, random.Random(1), 40, MIB)
    bench.drop(disk)
    bench.drop(dm)
    expect(image.hash() == before, "the metadata was changed")
    image.compare(model)


@test("an image without any L2 table reads as zeros")
def read_empty(bench):
    size = 3 * GIB + 512
    image = bench.image(size)
    image.poison((0, MIB), (size - 64 * KIB, 64 * KIB))
    dm = image.open()
    disk = bench.io(dm)
    for at in (0, 512, 64 * KIB - 512, 512 * MIB - 4096, GIB, size - 64 * KIB, size - 512):
        length = min(MIB, size - at)
        same(disk.read(at, length), bytes(length), at)
    bench.drop(disk)
    expect(dm.status().tables == 0, f"{dm.status()}")


@test("entries beyond the virtual size are ignored")
def beyond_the_end(bench):
    size = 640 * KIB + 512
    image = bench.image(size)
    image.qemu_io(f"write -q -P 1 0 {size}")
    os.truncate(image.data, size)
    image.poison()
    model = bench.model(size)
    with open(image.data, "rb") as f:
        model.write(0, f.read())
    # A shrunk image leaves such entries; these would be corrupt within it.
    table = image.l2_table(0)
    for i, entry in enumerate((COPIED | 11 * 64 * KIB, COPIED | 512, 1 << 62, COPIED | 0x1FE)):
        image.set_u64(table + 8 * (11 + i), entry)
    dm = image.open()
    disk = bench.io(dm)
    read_all(disk, model)
    disk.write(size - 512, b"end!" * 128)
    model.write(size - 512, b"end!" * 128)
    disk.fsync()
    read_all(disk, model)
    expect(dm.mode() == "rw", f"{dm.status()}")
    bench.drop(disk)
    bench.drop(dm)
    expect(image.u64(table + 8 * 13) == 1 << 62, "an entry beyond the end was changed")
    image.compare(model)


@test("data clusters whose entry lacks the copied bit are data")
def not_copied(bench):
    size = 4 * MIB
    image = bench.image(size)
    image.qemu_io("write -q -P 1 0 4M")
    image.poison()
    model = bench.model(size)
    with open(image.data, "rb") as f:
        model.write(0, f.read())
    for guest in range(64 * KIB, size, 128 * KIB):
        image.set_u64(image.l2_pos(guest), guest)
    image.extend()
    before = image.hash()
    dm = image.open()
    disk = bench.io(dm)
    read_all(disk, model)
    bench.drop(disk)
    bench.drop(dm)
    expect(image.hash() == before, "the metadata was changed")


@test("a read of 1 MiB of data is one request to the data device")
def one_bio(bench):
    size = 8 * MIB
    image = bench.image(size)
    image.qemu_io("write -q -P 1 0 8M")
    image.poison()
    image.attach()
    below = bench.linear("data", image.data_loop.path)
    dm = image.open(data=below.path)
    disk = bench.io(dm)
    disk.read(0, 512)
    for at in (0, MIB, 3 * MIB + 512, 4 * MIB + 33 * KIB):
        stat = Stat(below.path)
        got = disk.read(at, MIB)
        expect((stat.reads, stat.read_sectors) == (1, 2048),
               f"{stat.reads} reads of {stat.read_sectors} sectors in all")
        with open(image.data, "rb") as f:
            f.seek(at)
            same(got, f.read(MIB), at)
    # An overwrite is no different.
    for at in (0, 3 * MIB + 512):
        stat = Stat(below.path)
        disk.write(at, b"w" * MIB)
        expect((stat.writes, stat.write_sectors) == (1, 2048),
               f"{stat.writes} writes of {stat.write_sectors} sectors in all")
    # Where states change, each run is one request, and zeros are none.
    bench.drop(disk)
    bench.drop(dm)
    image.qemu_io("write -q -z 2M 64k", "write -q -z 2112k 64k", "write -q -z 2560k 64k")
    dm = image.open(data=below.path)
    disk = bench.io(dm)
    disk.read(0, 512)
    stat = Stat(below.path)
    got = disk.read(2 * MIB - 64 * KIB, MIB)
    expect((stat.reads, stat.read_sectors) == (3, 2048 - 3 * 128),
           f"{stat.reads} reads of {stat.read_sectors} sectors in all")
    same(got[64 * KIB:192 * KIB], bytes(128 * KIB), 2 * MIB)


@test("misses on one table share one read")
def shared_miss(bench):
    size = 256 * MIB
    image = bench.image(size)
    image.qemu_io("write -q -P 1 0 64k", "write -q -P 1 200M 64k")
    image.poison((0, 64 * KIB), (200 * MIB, 64 * KIB))
    image.attach()
    below = bench.linear("meta", image.meta_loop.path)
    dm = image.open(meta=below.path)
    disk = bench.io(dm)
    stat = Stat(below.path)
    in_parallel(disk.read, *((n * 16 * MIB, 64 * KIB) for n in range(16)))
    expect(1 <= stat.reads and stat.read_sectors <= 128,
           f"{stat.reads} reads, {stat.read_sectors} sectors, for an L2 table of 128")


@test("opening an image of 16 TiB reads the header and the L1 table; idle, it does nothing")
def huge(bench):
    size = 16 * TIB
    image = bench.image(size)
    os.truncate(image.path, image.file_size() + 64 * KIB)
    image.attach(extend=False)
    # A data device of that size which costs nothing.
    data = bench.add(Dm("zero", f"0 {size // 512} zero"))
    meta = bench.linear("meta", image.meta_loop.path)
    stat = Stat(meta.path)
    dm = image.open(meta=meta.path, data=data.path)
    l1 = 8 * image.get("l1_size")
    expect(l1 // 512 <= stat.read_sectors <= l1 // 512 + 2 * 128,
           f"{stat.read_sectors} sectors read, L1 has {l1 // 512}")
    # What a resume is to believe is flushed before; and nothing more.
    expect((stat.writes, stat.write_sectors) == (1, 0), "opening it wrote")
    disk = bench.io(dm)
    for at in (0, size // 2, size - 4096):
        same(disk.read(at, 4096), bytes(4096), at)
    stat, data_stat = Stat(meta.path), Stat(data.path)
    # Longer than the commit timer, twice.
    time.sleep(2.5)
    counts = (stat.reads, stat.writes, data_stat.reads, data_stat.writes)
    expect(counts == (0, 0, 0, 0), f"an idle device did I/O: {counts}")


@test("an idle device does nothing after writes either")
def idle_after_write(bench):
    image = bench.image(16 * MIB)
    image.attach()
    meta = bench.linear("meta", image.meta_loop.path)
    data = bench.linear("data", image.data_loop.path)
    dm = image.open(meta=meta.path, data=data.path)
    disk = bench.io(dm)
    disk.write(0, b"x" * 4096)
    disk.fsync()
    expect(not dm.status().dirty, f"dirty after a flush: {dm.status()}")
    commits = dm.status().commits
    stat, data_stat = Stat(meta.path), Stat(data.path)
    time.sleep(2.5)
    counts = (stat.reads, stat.writes, data_stat.reads, data_stat.writes)
    expect(counts == (0, 0, 0, 0), f"an idle device did I/O: {counts}")
    expect(dm.status().commits == commits, "an idle device commits")
    disk.fsync()
    expect(stat.writes == 0, "a flush with nothing dirty wrote metadata")


@test("states take at most 4.5 MiB per TiB, and next to nothing where all are equal")
def memory(bench):
    size = 128 * GIB
    # Clusters in one state throughout: one table in two.
    image = bench.image(size, options=",preallocation=metadata")
    count = image.tables
    expect(count == 256, f"{count} L2 tables")
    image.attach()
    dm = image.open()
    disk = bench.io(dm)
    for i in range(count):
        same(disk.read(i * image.cover, 512), bytes(512), i * image.cover)
    status = dm.status()
    expect(status.tables == count, f"{status}")
    uniform = status.state_bytes
    expect(uniform <= size * 0.5 * MIB / TIB, f"{uniform} bytes for tables in one state")
    bench.drop(disk)
    bench.drop(dm)
    for i in range(count):
        image.set_u64(image.l2_pos(i * image.cover + 77 * image.cluster), ZERO)
    dm = image.open()
    disk = bench.io(dm)
    for i in range(count):
        disk.read(i * image.cover, 512)
    status = dm.status()
    expect(status.slices == count, f"slices cached: {status}")
    expect(uniform < status.state_bytes <= size * 4.5 * MIB / TIB,
           f"{status.state_bytes} bytes for {size // GIB} GiB: {status}")


if __name__ == "__main__":
    main()
