# SPDX-License-Identifier: GPL-2.0-or-later
"""An image over a backing device, on devices that can stand still, or fail.
"""
import hashlib
import random

from qcow2test import KIB, Lower, Units, expect

CLUSTER = 64 * KIB
PATTERN = "unallocated data unallocated zero unallocated unallocated zero+ data".split()


def sha(path):
    with open(path, "rb") as f:
        return hashlib.sha256(f.read()).hexdigest()


def backing_file(bench, size, name="backing", seed=3):
    with open(bench.path(name), "wb") as f:
        f.write(random.Random(seed).randbytes(size))
    return bench.path(name)


class Backed:
    """An image over a backing file; the pattern of states over and over."""

    def __init__(self, bench, size, length, cluster=CLUSTER, **options):
        self.bench = bench
        self.path = backing_file(bench, length)
        self.hash = sha(self.path)
        image = self.image = bench.image(size, cluster=cluster, backing=self.path, **options)
        image.arrange(lambda n: PATTERN[n % len(PATTERN)])
        self.model = Units(image)
        self.unit = image.unit
        image.attach()
        self.data = Lower(bench, "data", image.data_loop.path)
        self.back = Lower(bench, "back", image.backing_loop.path)
        self.open()

    def open(self):
        self.dm = self.image.open(data=self.data.path, backing=self.back.path)
        self.disk = self.bench.io(self.dm)

    def write(self, offset, length, byte=b"w"):
        length = min(length, self.model.size - offset)
        self.disk.write(offset, byte * length)
        self.model.write(offset, byte * length)

    def finish(self):
        self.model.check(self.disk)
        self.disk.fsync()
        self.dm.cycle()
        self.model.check(self.disk)
        self.bench.judge(self.disk, self.dm, self.image, self.model)
        expect(sha(self.path) == self.hash, "the backing file was changed")
