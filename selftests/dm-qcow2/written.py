# SPDX-License-Identifier: GPL-2.0-or-later
"""An image that is open, and what must be in it: the base of set-ups."""
import errno
import random

from qcow2test import KIB, fails_with, same


class Written:
    """What is written to the device goes to the model, too."""
    ERROR = errno.EIO       # of what cannot be done
    PART = 64 * KIB         # that is compared

    # To be set up; sync only if it is needed: another file, whose writes are FUA
    bench = image = model = dm = disk = sync = None

    def write(self, offset, length=512, disk=None, byte=None):
        data = byte * length if byte else random.randbytes(length)
        (disk or self.disk).write(offset, data)
        self.model.write(offset, data)

    def fails(self, offset, length=512, disk=None):
        """A write of what must never show"""
        with fails_with(self.ERROR):
            (disk or self.disk).write(offset, b"f" * length)

    def no_sync(self):
        with fails_with(self.ERROR):
            self.disk.fsync()

    def same(self, *offsets, length=None):
        for at in offsets:
            same(self.disk.read(at, length or self.PART), self.model.read(at, length or self.PART), at)

    def close(self):
        for thing in (self.sync, self.disk, self.dm):
            if thing:
                self.bench.drop(thing)

    def finish(self, leaks=False, compare=True):
        """Close it: the image is good, and has what the model has."""
        self.close()
        self.image.check(leaks)
        if compare:
            self.image.compare(self.model)
