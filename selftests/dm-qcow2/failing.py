# SPDX-License-Identifier: GPL-2.0-or-later
"""An image on devices that fail: both lie on linear targets that are replaced, while in use, by
dm-flakey or dm-error.
"""
import errno
import os

from qcow2test import KIB, MIB, Lower, expect, fails_with, wait_for
from written import Written

SIZE = 1536 * MIB       # three L2 tables
COVER = 512 * MIB
CLUSTER = 64 * KIB


class Failing(Written):
    """An image on two devices that work, or fail, and its model."""

    def __init__(self, bench, size=SIZE, **options):
        self.bench = bench
        image = self.image = bench.image(size, **options)
        image.poison((0, 4 * MIB), (512 * MIB, MIB))
        self.model = bench.model(size)
        image.attach()
        self.meta = Lower(bench, "meta", image.meta_loop.path)
        self.data = Lower(bench, "data", image.data_loop.path)
        self.backing = None
        if image.backing_loop:
            self.backing = Lower(bench, "backing", image.backing_loop.path)
        self.dm = image.open(meta=self.meta.path, data=self.data.path,
                             backing=self.backing and self.backing.path)
        self.disk = bench.io(self.dm)
        # Something that is durable.
        self.write(0, 2 * CLUSTER)
        self.disk.fsync()

    def write(self, offset, length, byte=b"a"):
        super().write(offset, length, byte=byte)

    def fails(self, offset, length=CLUSTER, disk=None):
        super().fails(offset, length, disk)

    def holds(self, events, unwritten=None):
        """Some entries, or so many, are not written yet: mode rw, one event."""
        status = self.dm.status()
        expect(status.mode == "rw", f"{status}")
        expect(status.unwritten == unwritten if unwritten else status.unwritten > 0, f"{status}")
        expect(self.dm.events() == events + 1, f"{self.dm.events() - events} events: {status}")

    def good(self, events):
        """The metadata device works again: all is written, and nobody needs to know."""
        self.meta.good()
        self.disk.fsync()
        status = self.dm.status()
        expect(status.mode == "rw" and status.unwritten == 0, f"{status}")
        expect(self.dm.events() == events + 1, f"{self.dm.events() - events} events: {status}")

    def failed(self, events):
        """The device is in mode fail, with all that follows from it."""
        wait_for("mode fail", 60, lambda: self.dm.mode() == "fail")
        expect(self.dm.events() > events, "no event was raised")
        with fails_with(errno.EIO):
            self.disk.fsync()
        self.fails(40 * CLUSTER)
        self.fails(600 * MIB)
        self.sync = self.sync or self.bench.io(self.dm, flags=os.O_DSYNC)
        self.fails(0, 4096, self.sync)
        # That one must not have gone half the way: whether the bytes are there
        # is open, so they are put right.
        self.write(0, CLUSTER, b"o")
        self.same(0, CLUSTER)
        # What was never written still reads as zeros.
        self.same(50 * CLUSTER, 52 * CLUSTER)

    def recover(self):
        """A new table, once the device works again."""
        self.meta.good()
        self.data.good()
        self.dm.load(self.dm.table())
        expect(self.dm.mode() == "rw", f"after a reload: {self.dm.status()}")
        self.same(0, CLUSTER, 50 * CLUSTER)
        self.write(80 * CLUSTER + 512, 1024, b"r")
        self.write(700 * MIB, 512, b"r")
        self.disk.fsync()
        self.same(80 * CLUSTER, 700 * MIB)


# A device that takes no writes takes no flushes, either.
LOST = (("flush", "no_flush"), ("write", "no_writes"))
