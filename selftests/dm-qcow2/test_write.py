#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Writes: first writes of every kind, what they cost, and what is on disk after.

Every image is written through the target, read back from a cold cache, and then
judged by QEMU: qemu-img check (leaks count), qemu-img compare with the model.
The data device is filled with other bytes beforehand, which must never show.

All 13 cluster sizes and 7 refcount widths are covered, not all pairs of them;
QCOW2_TEST_FULL=1 does the pairs, too.
"""
import errno
import fcntl
import os
import random
import shutil
import struct

from qcow2image import COPIED, OFFSET_MASK, ZERO, Qcow2
from qcow2test import (GIB, KIB, MIB, Stat, expect, fails_with, in_parallel, main, run, same, some,
                       test, wait_for)

FIBMAP = 1


class Writer:
    """A device and its model, written together."""

    def __init__(self, bench, dm, model, seed):
        self.bench, self.dm, self.model = bench, dm, model
        self.rng = random.Random(seed)
        self.disk = bench.io(dm)
        self.touched = []

    def write(self, offset, length):
        length = min(length, self.model.size - offset)
        data = self.rng.randbytes(length)
        self.disk.write(offset, data)
        self.model.write(offset, data)
        self.touched.append((offset, length))

    def verify(self, margin):
        """All that was written, and what lies around it."""
        for offset, length in self.touched:
            start = max(0, offset - margin)
            end = min(self.model.size, offset + length + margin)
            for at in range(start, end, MIB):
                n = min(MIB, end - at)
                same(self.disk.read(at, n), self.model.read(at, n), at)


def first_writes(w, cluster, cover):
    """One of each kind; offsets in sectors and clusters far enough apart."""
    size = w.model.size
    part = max(512, cluster // 4)
    w.write(3 * cluster, cluster)			# a whole cluster
    w.write(5 * cluster, part)				# its start
    w.write(7 * cluster + cluster - part, part)		# its end
    w.write(9 * cluster + (cluster // 2 & ~511), 512)	# inside it
    w.write(11 * cluster + part, 2 * cluster)		# parts of three
    w.write(14 * cluster, 3 * cluster)			# three whole ones
    w.write(0, 512)					# cluster 0
    w.write(11 * cluster + part, cluster)		# data, both
    w.write(9 * cluster, 2 * cluster)			# data, none, data
    w.write(cover - cluster - part, 2 * cluster + part)	# two L2 tables
    if size > 3 * cover:
        w.write(2 * cover - 512, 1024)			# a table's last and the next one's first
    end = size & ~(cluster - 1)
    end -= cluster if end == size else 0
    w.write(size - 512, 512)				# the last sector, maybe of a cut cluster
    w.write(end, 512)					# the first of that cluster


def matrix(bench, cluster, bits):
    cover = cluster * cluster // 8
    # Two L2 tables and a bit, with a last cluster that is cut where that can be.
    size = 2 * cover + 3 * cluster + 512 + (cluster // 2 & ~511)
    if cluster <= 2 * KIB:
        size += 2 * cover
    image = bench.image(size, cluster=cluster, refcount_bits=bits)
    zero = (20 * cluster, 24 * cluster)
    image.qemu_io(f"write -q -P 1 {22 * cluster} {cluster}", f"write -q -z {zero[0]} {zero[1] - zero[0]}")
    os.truncate(image.data, size)
    image.poison((0, 32 * cluster), (cover - 4 * cluster, 8 * cluster), (2 * cover - 2 * cluster, 4 * cluster),
                 ((size - 2 * cluster) & ~511, 2 * cluster - 512))
    os.truncate(image.data, size)
    model = bench.model(size)
    dm = image.open()
    expect(image.state(20 * cluster) == image.state(22 * cluster) == "zero", "no zero clusters")
    w = Writer(bench, dm, model, cluster + bits)
    first_writes(w, cluster, cover)
    # Zero clusters: without an offset, and with one.
    w.write(20 * cluster + 512, 512 if cluster > 512 else 1024)
    w.write(22 * cluster, cluster)
    w.verify(cluster)
    w.disk.fsync()
    dm.cycle()
    w.verify(cluster)
    # Overwrites, and first writes beside them, now that all is durable.
    w.write(3 * cluster + 512, cluster)
    w.write(14 * cluster, 3 * cluster)
    w.verify(cluster)
    bench.drop(w.disk)
    bench.drop(dm)
    image.check()
    image.compare(model)


CLUSTERS = [512 << n for n in range(13)]
BITS = [1 << n for n in range(7)]
PAIRS = [(c, BITS[n * 3 % 7]) for n, c in enumerate(CLUSTERS)]
PAIRS += [(c, b) for c, b in ((512, 64), (512, 16), (4 * KIB, 64), (4 * KIB, 1), (64 * KIB, 16),
                              (64 * KIB, 1), (2 * MIB, 2)) if (c, b) not in PAIRS]
if os.environ.get("QCOW2_TEST_FULL"):
    PAIRS = [(c, b) for c in CLUSTERS for b in BITS]
for _cluster, _bits in some(PAIRS, 8):
    test(f"first writes: clusters of {_cluster}, refcounts of {_bits} bits", _cluster, _bits)(matrix)


def many_tables(bench, cluster, bits, tables):
    """More L2 tables than one refcount block can account for."""
    cover = cluster * cluster // 8
    size = tables * cover
    image = bench.image(size, cluster=cluster, refcount_bits=bits)
    model = bench.model(size)
    dm = image.open()
    w = Writer(bench, dm, model, bits)
    order = list(range(tables))
    w.rng.shuffle(order)
    for n, i in enumerate(order):
        image_offset = i * cover + w.rng.randrange(cover // 512) * 512
        w.write(image_offset, 512)
        if n % 50 == 49:
            w.disk.fsync()
    w.disk.fsync()
    expect(dm.status().tables == tables, f"{dm.status()}")
    dm.cycle()
    expect(dm.status().tables == tables, f"{dm.status()}")
    w.verify(0)
    bench.drop(w.disk)
    bench.drop(dm)
    blocks = sum(1 for i in range(image.reftable_entries()) if image.u64(image.reftable_pos(i)))
    expect(blocks > 1, "one refcount block was enough, this tests nothing")
    image.check()
    image.compare(model)


test("new refcount blocks: clusters of 512, refcounts of 64 bits", 512, 64, 300)(many_tables)
test("new refcount blocks: clusters of 512, refcounts of 16 bits", 512, 16, 600)(many_tables)
test("new refcount blocks: clusters of 4096, refcounts of 64 bits", 4096, 64, 560)(many_tables)


@test("freed clusters in the middle of the metadata are used again")
def free_in_the_middle(bench):
    size = 40 * MIB
    image = bench.image(size, cluster=4 * KIB)
    # QEMU allocates the tables one after another; then some are dropped.
    image.qemu_io(*(f"write -q -P 1 {i * image.cover} 4k" for i in range(20)))
    image.poison()
    freed = set()
    for i in range(3, 17, 2):
        table = image.l2_table(i * image.cover)
        image.set_u64(image.l1_pos(i), 0)
        image.set_refcount(table // image.cluster, 0)
        freed.add(table)
    model = bench.model(size)
    with open(image.data, "rb") as f:
        for i in range(20):
            if image.l1(i):
                f.seek(i * image.cover)
                model.write(i * image.cover, f.read(4 * KIB))
    image.check()
    os.truncate(image.path, image.file_size() + 4 * KIB)
    dm = image.open()
    w = Writer(bench, dm, model, 1)
    for i in range(3, 17, 2):
        w.write(i * image.cover + 512, 512)
    w.disk.fsync()
    dm.cycle()
    # The old content of a table that is used again must not show.
    for i in range(20):
        same(w.disk.read(i * image.cover, 8 * KIB), model.read(i * image.cover, 8 * KIB), i * image.cover)
    bench.drop(w.disk)
    bench.drop(dm)
    image.check()
    image.compare(model)


def one_write(bench, raw):
    """A whole-cluster first write is one write to the data device."""
    image = bench.image(16 * MIB, raw=raw)
    if raw:
        # Not what QEMU makes, but allowed: not allocated yet. The data file
        # reads as zeros there, as it must.
        for guest in range(0, 16 * MIB, 64 * KIB):
            image.set_u64(image.l2_pos(guest), 0)
    else:
        image.poison()
    model = bench.model(16 * MIB)
    image.attach()
    below = bench.linear("data", image.data_loop.path)
    meta = bench.linear("meta", image.meta_loop.path)
    dm = image.open(meta=meta.path, data=below.path)
    w = Writer(bench, dm, model, 1)
    w.write(0, 512)
    w.disk.fsync()

    def cost(offset, length):
        # The timer's commit adds a flush (an empty write, in these counters)
        # if it happens to fall in between; not three times in a row.
        seen = []
        for n in range(3):
            stat, meta_stat = Stat(below.path), Stat(meta.path)
            w.write(offset + n * MIB, length)
            seen.append((stat.writes, stat.write_sectors, meta_stat.writes))
            if seen[-1][0] == seen[0][0] == 1:
                break
        return min(seen)

    expect(cost(2 * MIB, 64 * KIB) == (1, 128, 0), "a whole cluster costs more than one write")
    expect(cost(5 * MIB, 512 * KIB) == (1, 1024, 0), "eight whole clusters cost more than one write")
    expect(dm.status().first_writes >= 3, f"{dm.status()}")
    if raw:
        expect(cost(8 * MIB + 512, 512) == (1, 1, 0), "raw: a part of a cluster costs more than one write")
    w.disk.fsync()
    dm.cycle()
    w.verify(64 * KIB)
    expect(image.state(2 * MIB) == "data", "the cluster was not marked")
    bench.drop(w.disk)
    bench.drop(dm)
    image.check()
    image.compare(model)


test("a whole-cluster first write is one write to the data device", False)(one_write)
test("data_file_raw: any first write is one write, and marks the cluster", True)(one_write)


@test("data_file_raw: the data file reads as the device does")
def raw_equality(bench):
    size = 6 * MIB + 512
    image = bench.image(size, raw=True)
    image.poison()
    model = bench.model(size)
    with open(image.data, "rb") as f:
        model.write(0, f.read())
    dm = image.open()
    w = Writer(bench, dm, model, 3)
    first_writes(w, 64 * KIB, 4 * MIB)
    w.disk.fsync()
    w.verify(64 * KIB)
    bench.drop(w.disk)
    bench.drop(dm)
    image.check()
    image.compare(model)
    with open(image.data, "rb") as f:
        same(f.read(), model.read(0, size), 0, "data file")


@test("concurrent writes to the parts of one cluster", all_cpus=True)
def same_cluster(bench):
    size = 32 * MIB
    image = bench.image(size)
    image.poison()
    model = bench.model(size)
    dm = image.open()
    disk = bench.io(dm)
    rng = random.Random(5)
    parts = 16
    step = 64 * KIB // parts

    def writer(n, data):
        # Each writes its part of every cluster: all of them meet in each.
        for c, piece in enumerate(data):
            at = c * 64 * KIB + n * step
            disk.write(at, piece)
            same(disk.read(at, step), piece, at, "after its own write")

    work = []
    for n in range(parts):
        data = [rng.randbytes(step) for _ in range(48)]
        for c, piece in enumerate(data):
            model.write(c * 64 * KIB + n * step, piece)
        work.append((n, data))
    in_parallel(writer, *work)
    same(disk.read(0, 3 * MIB), model.read(0, 3 * MIB))
    disk.fsync()
    dm.cycle()
    same(disk.read(0, 3 * MIB), model.read(0, 3 * MIB))
    bench.drop(disk)
    bench.drop(dm)
    image.check()
    image.compare(model)


def snapshot(bench, image, name):
    """The metadata as it is on disk now, while the device is live."""
    shutil.copy(image.path, bench.path(name))
    return bench.path(name)


@test("what was flushed is in the metadata at once")
def flush(bench):
    size = GIB + 512
    image = bench.image(size)
    image.poison((0, MIB))
    model = bench.model(size)
    dm = image.open()
    w = Writer(bench, dm, model, 2)
    w.write(64 * KIB + 512, 3 * 64 * KIB)
    w.write(512 * MIB - 512, 64 * KIB)
    w.disk.fsync()
    copy = snapshot(bench, image, "copy1")
    image.check(path=copy)
    image.compare(model, path=copy)
    commits = dm.status().commits
    expect(commits >= 1, f"{dm.status()}")
    # Nothing new to commit.
    w.write(64 * KIB + 512, 4096)
    w.disk.fsync()
    expect(dm.status().commits == commits, "a flush with nothing dirty made a commit")
    # Once more, into the tables that are there by now.
    w.write(700 * MIB, 4096)
    w.disk.fsync()
    copy = snapshot(bench, image, "copy2")
    image.check(path=copy)
    image.compare(model, path=copy)


@test("a FUA write is in the metadata at once")
def fua(bench):
    size = GIB
    image = bench.image(size)
    image.poison((0, MIB))
    model = bench.model(size)
    dm = image.open()
    w = Writer(bench, dm, model, 3)
    w.disk.close()
    w.disk = bench.io(dm, flags=os.O_DSYNC)
    for n, offset in enumerate((0, 512, 70000 & ~511, 600 * MIB + 4096)):
        w.write(offset, 4096)
        copy = snapshot(bench, image, f"copy{n}")
        image.compare(model, path=copy)
    image.check(path=copy)


class Mount:
    def __init__(self, device, path):
        self.path = path
        os.mkdir(path)
        run("mount", "-t", "ext4", "-o", "noatime", device, path)

    def close(self):
        run("umount", self.path)
        os.rmdir(self.path)


@test("a FUA write without any flush is in the metadata at once")
def pure_fua(bench):
    # After a write with O_DSYNC to a block device comes a flush, which would do
    # as well. ext4 sends nothing but FUA for an overwrite within a file; and it
    # does not know that the clusters of the file have become zero clusters.
    size = 64 * MIB
    image = bench.image(size)
    dm = image.open()
    run("mkfs.ext4", "-q", "-F", "-b", "4096", dm.path)
    mount = bench.add(Mount(dm.path, bench.path("mnt")))
    with open(mount.path + "/file", "wb") as f:
        f.write(b"f" * 4 * MIB)
        os.fsync(f.fileno())
        block = struct.unpack("i", fcntl.ioctl(f.fileno(), FIBMAP, struct.pack("i", 256)))[0]
    where = block * 4096
    bench.drop(mount)
    bench.drop(dm)
    expect(image.state(where) == "data", "the file is somewhere else")
    image.set_u64(image.l2_pos(where), ZERO)

    dm = image.open()
    mount = bench.add(Mount(dm.path, bench.path("mnt")))
    disk = bench.io(mount.path + "/file", flags=os.O_DSYNC)
    os.sync()
    disk.write(256 * 4096, b"F" * 4096)
    copy = snapshot(bench, image, "copy")
    expect(Qcow2(copy).state(where) == "data", "the cluster is not yet data on disk")
    same(disk.read(256 * 4096, 4096), b"F" * 4096)
    bench.drop(disk)
    bench.drop(mount)
    bench.drop(dm)
    image.check()


@test("without a flush, the timer brings it there; suspend and removal too")
def timer(bench):
    size = 64 * MIB
    image = bench.image(size)
    image.poison((0, 8 * MIB))
    model = bench.model(size)
    dm = image.open()
    w = Writer(bench, dm, model, 4)
    w.write(64 * KIB + 512, 4096)
    # Not until nothing is dirty: that is so when the commit begins.
    wait_for("a commit", 60, lambda: dm.status().commits)
    image.compare(model, path=snapshot(bench, image, "copy1"))
    w.write(2 * MIB + 512, 4096)
    dm.suspend()
    image.compare(model, path=snapshot(bench, image, "copy2"))
    dm.resume()
    w.write(4 * MIB + 512, 4096)
    bench.drop(w.disk)
    bench.drop(dm)
    image.check()
    image.compare(model)


@test("no room for another L2 table: ENOSPC, and a larger device recovers")
def no_space(bench):
    size = 64 * MIB
    image = bench.image(size, cluster=4 * KIB)
    image.poison((0, MIB), (4 * MIB, MIB), (20 * MIB, MIB))
    model = bench.model(size)
    # Room for three L2 tables of 2 MiB each.
    clusters = -(-image.file_size() // 4096) + 3
    os.truncate(image.path, clusters * 4096)
    image.attach(extend=False)
    dm = image.open()
    w = Writer(bench, dm, model, 6)
    w.write(0, 4096)
    w.write(512 * 1023, 1024)
    w.write(5 * MIB, 4096)
    w.write(21 * MIB + 512, 512)
    for offset in (40 * MIB, 50 * MIB + 512, 2 * MIB):
        with fails_with(errno.ENOSPC):
            w.disk.write(offset, b"n" * 4096)
    # A request that is partly in a mapped region fails as a whole or not at
    # all, but must not lose what was there.
    expect(dm.mode() == "rw", f"{dm.status()}")
    w.write(MIB, 8192)
    w.write(5 * MIB + 100 * KIB, 8192)
    w.disk.fsync()
    same(w.disk.read(40 * MIB, 4096), bytes(4096), 40 * MIB, "after ENOSPC")
    w.verify(4096)
    dm.cycle()
    with fails_with(errno.ENOSPC):
        w.disk.write(40 * MIB, b"n" * 4096)
    w.verify(4096)
    copy = snapshot(bench, image, "copy")
    image.check(path=copy)
    image.compare(model, path=copy)

    image.extend()
    image.meta_loop.resize()
    dm.load(dm.table())
    w.write(40 * MIB, 4096)
    w.write(50 * MIB + 512, 512)
    w.disk.fsync()
    w.verify(4096)
    bench.drop(w.disk)
    bench.drop(dm)
    image.check()
    image.compare(model)


@test("no room in the refcount table: ENOSPC, and the image stays whole")
def reftable_full(bench):
    # Clusters of 512, 64-bit refcounts, one cluster of refcount table: it
    # accounts for 2 MiB of metadata, too little for 128 MiB of disk.
    size = 136 * MIB
    image = bench.image(size, cluster=512, refcount_bits=64)
    # QEMU sizes the table for L1 only; take what is there as the limit.
    limit = image.reftable_entries() * image.per_block() * 512
    os.truncate(image.path, limit + 64 * KIB)
    image.attach(extend=False)
    model = bench.model(size)
    dm = image.open()
    w = Writer(bench, dm, model, 7)
    full = None
    for i in range(image.tables):
        try:
            w.write(i * image.cover, 512)
        except OSError as e:
            expect(e.errno == errno.ENOSPC, f"errno {e.errno}")
            full = i
            break
    expect(full, "there was room for everything, this tests nothing")
    # All that is accounted for was in use, but for a few clusters.
    expect(limit // 512 - full < image.tables // 8 + 200, f"ENOSPC at L2 table {full} already")
    expect(dm.mode() == "rw", f"{dm.status()}")
    w.write(0, 4096)
    w.disk.fsync()
    bench.drop(w.disk)
    bench.drop(dm)
    image.check()
    image.compare(model)


@test("bits that are not understood, and other entries, survive")
def not_touched(bench):
    size = 64 * MIB
    image = bench.image(size)
    image.qemu_io("write -q -P 1 0 64k", "write -q -z 1M 1M", "write -q -P 2 10M 1M")
    image.set("compatible_features", 1 << 40)
    image.poison()
    header = image.read(0, 64 * KIB)
    table = image.l2_table(0)
    # The L1 table may have more entries than needed, with anything in them.
    entries = {at: image.u64(at) for at in range(table, table + 64 * KIB, 8)}
    dm = image.open()
    disk = bench.io(dm)
    disk.write(5 * MIB, b"x" * 64 * KIB)
    disk.write(MIB + 64 * KIB, b"y" * 512)
    disk.fsync()
    bench.drop(disk)
    bench.drop(dm)
    entries[image.l2_pos(5 * MIB)] = 5 * MIB | COPIED
    entries[image.l2_pos(MIB + 64 * KIB)] = MIB + 64 * KIB | COPIED
    for at, entry in entries.items():
        expect(image.u64(at) == entry, f"L2 entry {(at - table) // 8}: {image.u64(at):#x}, not {entry:#x}")
    same(image.read(0, 64 * KIB), header, 0, "header cluster")
    expect(image.l1(0) == table | COPIED, f"L1 entry: {image.l1(0):#x}")
    expect(not image.l1(0) & ~(OFFSET_MASK | COPIED), "reserved bits of L1 were set")
    image.check()


if __name__ == "__main__":
    main()
