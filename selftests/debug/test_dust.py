#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Sectors that cannot be read until they are written: dm-dust, as on a worn disk.

Needs a kernel with dm-dust, which Debian's does not have.
"""
import errno
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "../dm-qcow2"))

# pylint: disable=wrong-import-position
import qcow2test                                                              # noqa: E402
from qcow2image import COPIED, OFFSET_MASK, ZERO                                            # noqa: E402
from qcow2test import (KIB, MIB, Dm, Failure, device_sectors, expect, fails_with, main,  # noqa: E402
                       run, same, test)

CLUSTER = 16 * KIB
SIZE = 96 * MIB                 # three L2 tables
COVER = CLUSTER * CLUSTER // 8


class Dust(Dm):
    """A device with bad sectors, once they are added."""

    def __init__(self, name, device):
        super().__init__(name, f"0 {device_sectors(device)} dust {device} 0 512")
        self.message("enable")
        self.message("quiet")

    def message(self, *words):
        run("dmsetup", "message", self.name, 0, *words)

    def spoil(self, offset, length=512):
        for sector in range(offset // 512, (offset + length) // 512):
            self.message("addbadblock", sector)

    def mend(self, offset, length=512):
        for sector in range(offset // 512, (offset + length) // 512):
            self.message("removebadblock", sector)

    def left(self):
        """How many there are."""
        words = run("dmsetup", "message", self.name, 0, "countbadblocks").split()
        return int(next(w for w in words if w.isdigit()))


class Setup:
    """Two of three tables exist; all devices can have bad sectors."""

    def __init__(self, bench, backing=False, odd=None):
        self.bench = bench
        path = None
        if backing:
            path = bench.path("backing")
            with open(path, "wb") as f:
                f.write(b"B" * SIZE)
        image = self.image = bench.image(SIZE, cluster=CLUSTER, backing=path)
        image.qemu_io(f"write -q -P 0x61 0 {4 * CLUSTER}", f"write -q -P 0x61 {COVER} {CLUSTER}")
        image.poison_unused()
        image.trim()
        if odd is not None:
            # Zeros that have a place: a block with such an entry is read before it is changed.
            image.set_u64(image.l2_pos(odd), odd | COPIED | ZERO)
        image.attach()
        self.meta = bench.add(Dust("meta", image.meta_loop.path))
        self.data = bench.add(Dust("data", image.data_loop.path))
        self.backing = bench.add(Dust("backing", image.backing_loop.path)) if backing else None
        self.line = image.line(self.meta.path, self.data.path,
                               *(("backing_dev", self.backing.path) if backing else ()))
        self.dm = self.disk = None

    def open(self):
        self.dm = self.bench.add(Dm("q", self.line))
        self.disk = self.bench.io(self.dm)

    def read(self, offset, want, length=CLUSTER):
        same(self.disk.read(offset, length), want * length, offset)

    def bad_read(self, offset, length=CLUSTER):
        with fails_with(errno.EIO):
            self.disk.read(offset, length)

    def bad_write(self, offset, length=CLUSTER):
        with fails_with(errno.EIO):
            self.disk.write(offset, b"f" * length)

    def bad_sync(self):
        with fails_with(errno.EIO):
            self.disk.fsync()

    def mode(self, mode="rw"):
        expect(self.dm.mode() == mode, f"{self.dm.status()}")

    def close(self):
        self.bench.drop(self.disk)
        self.bench.drop(self.dm)
        self.image.check(leaks=True)


@test("bad sectors of the data device: only who reads them sees them, and a write heals them")
def data(bench):
    s = Setup(bench)
    s.open()
    s.data.spoil(CLUSTER + 512)
    s.bad_read(0, 4 * CLUSTER)
    s.bad_read(CLUSTER + 512, 512)
    s.read(CLUSTER, b"a", 512)
    s.read(CLUSTER + 1024, b"a", CLUSTER - 1024)
    s.disk.write(CLUSTER, b"w" * 1024)
    s.read(CLUSTER, b"w", 1024)
    expect(not s.data.left(), "the sector is still bad")
    # A first write reads nothing there, neither for the fill nor for anything else.
    for at in range(8 * CLUSTER, 9 * CLUSTER, 512):
        s.data.spoil(at)
    s.read(8 * CLUSTER, b"\0")
    s.disk.write(8 * CLUSTER + 512, b"w" * 512)
    expect(not s.data.left(), "the fill has left out something")
    s.read(8 * CLUSTER, b"\0", 512)
    s.read(8 * CLUSTER + 512, b"w", 512)
    s.disk.fsync()
    s.mode()
    s.close()


@test("bad sectors in an L2 table: requests that need it fail until it can be read")
def l2_table(bench):
    s = Setup(bench)
    table = s.image.l1_entries()[0] & OFFSET_MASK
    s.meta.spoil(table)
    s.open()
    for _ in range(2):
        s.bad_read(0)
        s.bad_write(0)
        s.bad_write(8 * CLUSTER)
        with fails_with(errno.EIO):
            s.disk.discard(0, CLUSTER)
    s.read(COVER, b"a")
    s.disk.write(COVER + CLUSTER, b"w" * CLUSTER)
    s.disk.write(2 * COVER, b"w" * CLUSTER)
    s.disk.fsync()
    s.dm.cycle()
    s.mode()
    s.bad_read(0)
    s.meta.mend(table)
    s.read(0, b"a", 4 * CLUSTER)
    s.disk.write(8 * CLUSTER, b"w" * CLUSTER)
    s.disk.fsync()
    s.mode()
    for at in (8 * CLUSTER, COVER + CLUSTER, 2 * COVER):
        s.read(at, b"w")
    s.close()


@test("bad sectors in an L2 table that a commit reads: the flush fails, and the next is tried anew")
def commit(bench):
    s = Setup(bench, odd=9 * CLUSTER)
    s.open()
    table = s.image.l1_entries()[0] & OFFSET_MASK
    s.read(8 * CLUSTER, b"\0")
    s.read(COVER + CLUSTER, b"\0")
    before, events = s.dm.status(), s.dm.events()
    # Before the write, for the timer's commit may come at once.
    s.meta.spoil(table, 4096)
    s.disk.write(8 * CLUSTER, b"w" * CLUSTER)
    s.disk.write(COVER + CLUSTER, b"v" * CLUSTER)
    s.bad_sync()
    s.bad_sync()
    s.mode()
    s.read(8 * CLUSTER, b"w")
    status = s.dm.status()
    expect(status.commits == before.commits and status.unwritten == 1, f"{status}")
    expect(s.dm.events() == events + 1, f"{s.dm.events() - events} events")
    # The other table is not held up.
    expect(s.image.state(COVER + CLUSTER) == "data", "not durable, although nothing of its own has failed")
    s.dm.cycle()
    s.mode()
    expect(s.dm.status().unwritten == 1, f"after suspend and resume: {s.dm.status()}")
    s.read(8 * CLUSTER, b"w")
    s.meta.mend(table, 4096)
    s.disk.fsync()
    expect(s.dm.status().unwritten == 0, f"{s.dm.status()}")
    expect(s.image.state(8 * CLUSTER) == "data", "a flush succeeded, but the entry is not there")
    s.dm.cycle()
    s.mode()
    s.read(8 * CLUSTER, b"w")
    s.read(COVER + CLUSTER, b"v")
    s.close()


@test("bad sectors in the refcounts: what is there can be written, new tables are not made")
def refcounts(bench):
    s = Setup(bench)
    block = s.image.u64(s.image.reftable_pos(0))
    s.meta.spoil(block)
    s.open()
    s.disk.write(8 * CLUSTER, b"w" * CLUSTER)
    s.disk.fsync()
    s.mode()
    s.bad_write(2 * COVER)
    s.read(2 * COVER, b"\0")
    s.read(8 * CLUSTER, b"w")
    s.mode()
    s.disk.fsync()
    s.meta.mend(block)
    s.disk.write(2 * COVER, b"w" * CLUSTER)
    s.disk.fsync()
    s.mode()
    s.close()


@test("bad sectors of the backing device: a copy that fails leaves everything as it was")
def backing(bench):
    s = Setup(bench, backing=True)
    s.open()
    s.backing.spoil(9 * CLUSTER + 1024)
    s.bad_read(9 * CLUSTER)
    s.bad_write(9 * CLUSTER, 512)
    s.bad_write(9 * CLUSTER + 2048, 512)
    s.mode()
    expect(not s.dm.status().dirty, f"{s.dm.status()}")
    s.read(9 * CLUSTER, b"B", 1024)
    s.bad_read(9 * CLUSTER)
    # What needs no copy needs nothing of the backing device.
    s.disk.write(9 * CLUSTER, b"w" * CLUSTER)
    s.read(9 * CLUSTER, b"w")
    s.backing.spoil(12 * CLUSTER)
    s.disk.write(12 * CLUSTER, b"w" * 1024)
    s.read(12 * CLUSTER, b"w", 1024)
    s.read(12 * CLUSTER + 1024, b"B", CLUSTER - 1024)
    s.backing.spoil(16 * CLUSTER)
    s.bad_write(16 * CLUSTER + 512, 512)
    s.backing.mend(16 * CLUSTER)
    s.disk.write(16 * CLUSTER + 512, b"w" * 512)
    s.read(16 * CLUSTER, b"B", 512)
    s.disk.fsync()
    s.mode()
    s.close()


@test("bad sectors where a table line looks: it is refused")
def refused(bench):
    s = Setup(bench)
    for what, place in (("the header", 0), ("the L1 table", s.image.l1_pos(0))):
        s.meta.spoil(place)
        try:
            bench.drop(bench.add(Dm("q", s.line)))
        except Failure:
            pass
        else:
            raise Failure(f"{what} cannot be read, yet it is mapped")
        s.meta.mend(place)
    s.open()
    s.read(0, b"a", 4 * CLUSTER)
    s.close()


if __name__ == "__main__":
    if run("modprobe", "-q", "dm-dust", ok=False)[0] and "dust" not in run("dmsetup", "targets"):
        print("TAP version 13\n1..0 # SKIP no dm-dust in this kernel")
        sys.exit(qcow2test.KSFT_SKIP)
    main()
