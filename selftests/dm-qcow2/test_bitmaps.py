#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Dirty bitmaps that the device keeps: never less than what has changed, and no more once it
is suspended.

Environment: SEED (printed, to repeat a run), REQUESTS (of each image).
"""
import os
import random
import threading
import time

from bitmaps import AUTO, IN_USE, allocate, bitmaps
from qcow2test import (KIB, MIB, Dm, Io, expect, fails_with, in_parallel, main, note, run, same, test, wait_for)

SEED = int(os.environ.get("SEED", time.time_ns() // 1000 % 1000000))
REQUESTS = int(os.environ.get("REQUESTS", 120))

# Cluster size, virtual size, granularities, and other options
KINDS = [
    (64 * KIB, 9 * MIB + 512, (64 * KIB,), {}),
    (4 * KIB, 5 * MIB + 1536, (512, 64 * KIB, 1 << 31), {}),
    (512, 2 * MIB, (4 * KIB, 1 * MIB), {}),
    (2 * MIB, 13 * MIB, (32 * KIB,), {}),
    (64 * KIB, 9 * MIB + 512, (64 * KIB, 4 * KIB), {"raw": True}),
    (16 * KIB, 7 * MIB + 3 * KIB, (512, 4 * MIB), {"extended": True}),
    (64 * KIB, 6 * MIB + 512, (4 * KIB,), {"backing": True}),
    (4 * KIB, 3 * MIB, tuple(512 << n for n in range(16)), {}),
]


def words(kind):
    cluster, size, granularities, options = kind
    more = "".join(f", {name}" for name in options)
    return f"clusters of {cluster}, {size} bytes, granularities {', '.join(str(g) for g in granularities)}{more}"


def setup(bench, cluster, size, granularities, options):
    """An image with bitmaps b0, b1 ..., whose entries all have clusters, and with another one
    that does not record."""
    options = dict(options)
    if options.pop("backing", False):
        options["backing"] = bench.file("backing", size)
        with open(options["backing"], "wb") as f:
            f.write(random.Random(SEED).randbytes(size))
    image = bench.image(size, cluster=cluster, **options)
    for n, granularity in enumerate(granularities):
        run("qemu-img", "bitmap", "--add", "-g", granularity, image.path, f"b{n}")
    run("qemu-img", "bitmap", "--add", "--disable", image.path, "other")
    names = [f"b{n}" for n in range(len(granularities))]
    image.trim()
    allocate(image, *names)
    return image, names


def dirty(image, names):
    found = bitmaps(image)
    return {name: found[name].content() for name in names}


def wanted(image, names, ranges):
    found = bitmaps(image)
    return {name: found[name].granules(ranges) for name in names}


def covers(image, names, ranges, when):
    have, want = dirty(image, names), wanted(image, names, ranges)
    for name in names:
        expect(not want[name] & ~have[name],
               f"{when}: {name} lacks {(want[name] & ~have[name]).bit_count()} granules of {want[name].bit_count()}")


def exact(image, names, ranges, when):
    have, want = dirty(image, names), wanted(image, names, ranges)
    for name in names:
        expect(want[name] == have[name],
               f"{when}: {name}: {(want[name] & ~have[name]).bit_count()} granules lack, "
               f"{(have[name] & ~want[name]).bit_count()} are too many")


def qemu_takes(image, names):
    """They are there, recording, and not inconsistent; the image is sound."""
    image.check(leaks=True)
    for name in names:
        expect(bitmaps(image)[name].flags == AUTO, f"{name}: flags {bitmaps(image)[name].flags}")
    out = run("qemu-img", "info", "-U", "--output=json", image.path)
    expect("in-use" not in out and out.count('"auto"') == len(names), out)


class Requests:
    """Random ones, of all kinds; they are noted before they are sent."""

    def __init__(self, image, disk, rng):
        self.image, self.disk, self.rng = image, disk, rng
        self.ranges = []

    def place(self):
        rng, size = self.rng, self.image.size
        if rng.random() < 0.2 and self.ranges:
            # On from where the last one has ended
            at = sum(self.ranges[-1]) % size
        else:
            at = rng.randrange(size // 512) * 512
        length = rng.choice((512, 1024, 4096, 4096, 64 * KIB, rng.randrange(1, 400) * 512))
        if rng.random() < 0.5:
            at -= at % 4096
        return at, min(length, size - at)

    def one(self):
        at, length = self.place()
        kind = self.rng.choice(("write", "write", "write", "zero_range", "zero_out", "discard", "sync"))
        self.ranges.append((at, length))
        if kind == "write":
            self.disk.write(at, os.urandom(length))
        elif kind == "sync":
            self.disk.write(at, os.urandom(length))
            self.disk.fsync()
        else:
            getattr(self.disk, kind)(at, length)


def matrix(bench, kind):
    note(f"SEED={SEED}")
    rng = random.Random(SEED)
    image, names = setup(bench, *kind)
    dm = image.open("bitmaps")
    disk = bench.io(dm)
    requests = Requests(image, disk, rng)
    exact(image, names, [], "at the beginning")
    for n in range(REQUESTS):
        requests.one()
        covers(image, names, requests.ranges, f"after request {n}")
        if n % 40 == 20:
            run("dmsetup", "message", dm.name, 0, "bitmap_sync")
            exact(image, names, requests.ranges, f"bitmap_sync after request {n}")
        if n % 40 == 35:
            dm.suspend()
            exact(image, names, requests.ranges, f"suspend after request {n}")
            qemu_takes(image, names)
            dm.resume()
        if n % 60 == 50:
            with open("/proc/sys/vm/drop_caches", "w", encoding="ascii") as f:
                f.write("2")
    bench.drop(disk)
    bench.drop(dm)
    exact(image, names, requests.ranges, "at the end")
    qemu_takes(image, names)
    expect(bitmaps(image)["other"].content() == 0, "one that does not record has changed")


for _kind in KINDS:
    test(f"all kinds of requests: {words(_kind)}", _kind)(matrix)


class Backup:
    """A copy that is brought up to date by what a bitmap says has changed since it was made."""

    def __init__(self, bench, dm, size):
        self.size = size
        disk = Io(dm.path)
        self.data = bytearray(b"".join(disk.read(at, min(MIB, size - at)) for at in range(0, size, MIB)))
        disk.close()

    def update(self, disk, bitmap):
        bits, copied = bitmap.content(), 0
        for n in range(bitmap.count):
            if bits >> n & 1:
                at = n * bitmap.granularity
                length = min(bitmap.granularity, self.size - at)
                self.data[at:at + length] = disk.read(at, length)
                copied += 1
        return copied

    def compare(self, disk, what):
        for at in range(0, self.size, MIB):
            length = min(MIB, self.size - at)
            same(disk.read(at, length), bytes(self.data[at:at + length]), at, what)


def consumer(bench, kind, rounds):
    """What a backup has is copied by the bitmaps alone, and has to be all of the disk."""
    note(f"SEED={SEED}")
    rng = random.Random(SEED)
    image, names = setup(bench, *kind)
    dm = image.open("bitmaps")
    line = dm.table()
    disk = bench.io(dm)
    first = {name: Backup(bench, dm, image.size) for name in names}
    everything = []
    for n in range(rounds):
        several = [Requests(image, disk, random.Random(rng.random())) for _ in range(4)]

        def some(requests):
            for _ in range(rng.randrange(1, 12)):
                requests.one()
        in_parallel(some, *((r,) for r in several))
        for requests in several:
            everything += requests.ranges
        what = rng.choice(("sync", "suspend", "reload", "close", "drop"))
        if what == "sync":
            run("dmsetup", "message", dm.name, 0, "bitmap_sync")
        elif what == "suspend":
            dm.cycle()
        elif what == "reload":
            dm.suspend()
            dm.load(line)
            dm.resume()
        elif what == "close":
            bench.drop(disk)
            bench.drop(dm)
            qemu_takes(image, names)
            dm = image.open("bitmaps")
            disk = bench.io(dm)
        else:
            with open("/proc/sys/vm/drop_caches", "w", encoding="ascii") as f:
                f.write("2")
        covers(image, names, everything, f"round {n}, {what}")
        for name in names:
            first[name].update(disk, bitmaps(image)[name])
            first[name].compare(disk, f"round {n}, {what}: copy by {name}")
    bench.drop(disk)
    bench.drop(dm)
    exact(image, names, everything, "at the end")
    qemu_takes(image, names)


ROUNDS = int(os.environ.get("ROUNDS", 15))
for _kind in KINDS[:7]:
    test(f"a backup by bitmaps is the disk: {words(_kind)}", _kind, ROUNDS, all_cpus=True)(consumer)


if __name__ == "__main__":
    main()
