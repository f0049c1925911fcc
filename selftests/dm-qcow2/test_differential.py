#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Random requests, on the device and on a model; both must stay equal.

The requests come in rounds. In a serial round one thread uses the whole device;
in a parallel round several threads own stripes that are smaller than a cluster,
so that they never touch the same bytes but always the same clusters. After a
round the table may be suspended and resumed, removed and made again, or QEMU
looks at a copy of the metadata that was taken after a flush.

Environment: SEED (printed, to repeat a run), REQUESTS (for each image).
"""
import os
import random
import shutil
import threading
import time

from qcow2test import KIB, MIB, Io, expect, main, note, same, test

SEED = int(os.environ.get("SEED", time.time_ns() // 1000 % 1000000))
REQUESTS = int(os.environ.get("REQUESTS", 600))
THREADS = 4


class Differential:
    """An image under random load."""

    def __init__(self, bench, rng, image, model):
        self.bench, self.rng, self.image, self.model = bench, rng, image, model
        self.size = model.size
        self.dm = image.open()
        self.cluster = image.cluster
        self.disks = []
        self.faults = []
        self.use()

    def use(self):
        """Open the device in one of the ways there are."""
        self.direct = self.rng.random() < 0.75
        self.disks = [self.bench.io(self.dm, direct=self.direct)]
        if self.direct:
            self.disks.append(self.bench.io(self.dm, flags=os.O_DSYNC))

    def leave(self):
        for disk in self.disks:
            self.bench.drop(disk)

    def pick(self, rng):
        """Where, and how much: borders of clusters are more likely than not."""
        sectors = self.size // 512
        per = self.cluster // 512
        kind = rng.random()
        if kind < 0.25:
            n = per * rng.choice((1, 1, 2, 3))
        elif kind < 0.5:
            n = rng.randrange(1, per + 1)
        elif kind < 0.9:
            n = rng.randrange(1, min(64, 3 * per) + 1)
        else:
            n = rng.randrange(1, max(2, min(2 * MIB // 512, 6 * per)))
        n = max(1, min(n, sectors, 4 * MIB // 512))
        at = rng.randrange(sectors - n + 1)
        if rng.random() < 0.5:
            at -= at % per
        # Some places are hot, so that there are overwrites; the end is one.
        if rng.random() < 0.3:
            at = at % (4 * per)
        elif rng.random() < 0.05:
            at = sectors - n
        return min(at, sectors - n) * 512, n * 512

    def request(self, rng, disk, offset, length):
        kind = rng.random()
        if kind < 0.35:
            same(disk.read(offset, length), self.model.read(offset, length), offset)
            return
        if kind > 0.97:
            disk.fsync()
            return
        # Zeros are data, too.
        data = bytes(length) if kind > 0.93 else rng.randbytes(length)
        disk.write(offset, data)
        self.model.write(offset, data)
        if kind > 0.85:
            same(disk.read(offset, length), data, offset, "what was just written")

    def pick_disk(self, rng):
        return self.disks[-1] if rng.random() < 0.1 else self.disks[0]

    def serial(self, count):
        for _ in range(count):
            self.request(self.rng, self.pick_disk(self.rng), *self.pick(self.rng))

    def parallel(self, count):
        # Stripes need not divide a cluster. Through the page cache they are
        # pages, as writes to one page from two sides would mix there.
        unit = 512 if self.direct else 4096
        stripe = max(unit, self.cluster // self.rng.choice((3, 4, 7)) // unit * unit)
        first = self.rng.randrange(max(1, self.size // stripe - 40)) * stripe
        seeds = [self.rng.random() for _ in range(THREADS)]

        def work(n):
            rng = random.Random(seeds[n])
            try:
                for _ in range(count // THREADS):
                    start = first + (rng.randrange(10) * THREADS + n) * stripe
                    a, b = sorted((rng.randrange(stripe // 512 + 1), rng.randrange(stripe // 512 + 1)))
                    offset, length = start + a * 512, max(512, (b - a) * 512)
                    if a * 512 + length > stripe or offset + length > self.size:
                        continue
                    self.request(rng, self.pick_disk(rng), offset, length)
            except Exception as e:  # pylint: disable=broad-except # raised by round()
                self.faults.append(e)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(THREADS)]
        if self.rng.random() < 0.3:
            threads.append(threading.Thread(target=self.dm.cycle))
        for t in threads:
            t.start()
        for t in threads:
            t.join()

    def round(self, count):
        if self.rng.random() < 0.5:
            self.serial(count)
        else:
            self.parallel(count)
        if self.faults:
            raise self.faults[0]
        after = self.rng.random()
        if after < 0.25:
            self.dm.cycle()
        elif after < 0.45:
            self.leave()
            self.bench.drop(self.dm)
            self.dm = self.image.open()
            self.use()
        elif after < 0.55:
            self.leave()
            self.use()
        elif after < 0.65:
            for disk in self.disks:
                disk.fsync()
            copy = self.bench.path("copy")
            shutil.copy(self.image.path, copy)
            self.image.check(path=copy)
            self.image.compare(self.model, path=copy)

    def verify(self):
        disk = self.bench.add(Io(self.dm.path, readonly=True))
        for at in range(0, self.size, MIB):
            n = min(MIB, self.size - at)
            same(disk.read(at, n), self.model.read(at, n), at)
        self.bench.drop(disk)


def differential(bench, cluster, bits, size, raw):
    seed = SEED + cluster + bits
    rng = random.Random(seed)
    image = bench.image(size, cluster=cluster, refcount_bits=bits, raw=raw)
    model = bench.model(size)
    if not raw:
        # Something of every state to begin with.
        per = size // cluster
        spots = [rng.randrange(per) * cluster for _ in range(12)]
        image.qemu_io(*(f"write -q -z {at} {min(cluster * 2, size - at)}" for at in spots))
        os.truncate(image.data, size)
    image.poison(seed=seed)
    if raw:
        with open(image.data, "rb") as f:
            model.write(0, f.read())
    note(f"SEED={SEED} REQUESTS={REQUESTS}")
    d = Differential(bench, rng, image, model)
    done = 0
    while done < (REQUESTS if cluster < MIB else REQUESTS // 3):
        count = rng.choice((10, 20, 40, 80))
        d.round(count)
        done += count
    d.leave()
    d.verify()
    d.dm.cycle()
    d.verify()
    expect(d.dm.mode() == "rw", f"{d.dm.status()}")
    bench.drop(d.dm)
    image.check()
    image.compare(model)
    if raw:
        with open(image.data, "rb") as f:
            same(f.read(), model.read(0, size), 0, "data file")


for _cluster, _bits, _size, _raw in (
        (512, 64, 3 * MIB + 512, False), (512, 1, MIB + 1536, True), (4 * KIB, 16, 12 * MIB + 1024, False),
        (4 * KIB, 2, 5 * MIB + 512, True), (64 * KIB, 16, 24 * MIB + 33280, False),
        (64 * KIB, 16, 8 * MIB + 512, True), (256 * KIB, 32, 24 * MIB + 512, False),
        (2 * MIB, 16, 40 * MIB + 512, False)):
    test(f"differential: clusters of {_cluster}, refcounts of {_bits} bits, size {_size}"
         f"{', data_file_raw' if _raw else ''}", _cluster, _bits, _size, _raw)(differential)


if __name__ == "__main__":
    main()
