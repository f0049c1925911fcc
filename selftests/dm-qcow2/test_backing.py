#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Backing devices: shorter, equal, longer, odd; reads, copies, sharing.

What is unallocated is read from the backing device, and zeros past its end. The
first write to a unit copies what it does not cover. The backing content must
never change, and never show where a unit has become data or zero.
"""
import random

from qcow2test import KIB, MIB, Loop, Stat, Units, expect, in_parallel, main, same, some, test
from backed import CLUSTER, PATTERN, Backed, backing_file, sha


def lengths(size, unit):
    """Of backing files: name, bytes"""
    yield "a sector", 512
    yield "shorter, whole units", (size // unit // 2 + 1) * unit
    yield "shorter, odd", (size // unit // 2) * unit + max(512, unit // 2 & ~511) + (512 if unit > 1024 else 0)
    yield "shorter by a sector", size - 512
    yield "equal", size
    yield "longer, odd", size + unit + 512


def everything(bench, cluster, extended, which):
    """Reads across every border, then first writes of every alignment."""
    unit = cluster // 32 if extended else cluster
    size = 41 * unit + max(512, unit // 4 & ~511)
    s = Backed(bench, size, dict(lengths(size, unit))[which], cluster, extended=extended)
    model, disk = s.model, s.disk
    # Cold, then warm: all, and around every border of units and of the backing.
    borders = set(range(0, size, unit)) | {min(model.backing, size), size}
    for _ in range(2):
        model.check(disk)
        for at in sorted(borders):
            for before, after in ((512, 512), (unit, 512), (512, unit), (unit + 512, 2 * unit)):
                start, end = max(0, at - before), min(size, at + after)
                same(disk.read(start, end - start), model.read(start, end - start), start)
    s.dm.cycle()
    part = max(512, unit // 4 & ~511)
    n = 0
    # Unit by unit: as a whole, its start, its end, inside it, across its end.
    shapes = ((0, unit), (0, part), (unit - part, part), (unit // 2 & ~511, 512), (unit - part, 2 * part),
              (part, 2 * unit), (0, 512))
    for at in range(0, size, unit):
        offset, length = shapes[n % len(shapes)]
        n += 1
        if at + offset >= size:
            continue
        s.write(at + offset, length, bytes([65 + n % 26]))
        near = max(0, at - unit)
        model.check(disk, near, min(size, at + 3 * unit) - near)
        if n % 9 == 0:
            disk.fsync()
            s.dm.cycle()
    s.finish()


for _cluster, _extended, _which in some(((c, e, which) for c, e in ((64 * KIB, False), (512, False), (64 * KIB, True))
                                         for which, _ in lengths(MIB, c)), 7):
    test(f"reads and first writes: {_which} backing, {'extended L2, ' if _extended else ''}"
         f"clusters of {_cluster}", _cluster, _extended, _which)(everything)


def at_the_end(bench, cut, shape):
    """A first write to the unit in which the backing ends."""
    unit = CLUSTER
    s = Backed(bench, 12 * unit, 4 * unit + cut)
    offset, length = {"before it": (512, 1024), "across it": (cut - 512, 1024), "after it": (cut + 512, 1024),
                      "up to it": (cut - 1024, 1024), "from it": (cut, 1024)}[shape]
    s.write(4 * unit + offset, length)
    s.model.check(s.disk, 3 * unit, 3 * unit)
    # Beyond it nothing is read.
    stat = Stat(s.back.path)
    s.write(10 * unit + 512, 512)
    expect(not stat.reads, "the backing device was read beyond its end")
    s.finish()


for _shape in ("before it", "across it", "after it", "up to it", "from it"):
    test(f"first write where the backing ends: {_shape}", 5 * 4096 + 512, _shape)(at_the_end)


@test("a first write copies what it does not cover, and no more")
def copies(bench):
    unit = CLUSTER
    s = Backed(bench, 64 * unit, 64 * unit)
    stat = Stat(s.back.path)
    s.write(0, unit)
    s.write(4 * unit, 2 * unit)
    expect(not stat.reads, f"{stat.read_sectors} sectors read for whole units")
    # The start of unit 8 and the end of unit 12; data and zeros lie between.
    s.write(8 * unit + 4096, 4 * unit + 4096)
    expect(stat.read_sectors == 8 + (unit - 8192) // 512,
           f"{stat.read_sectors} sectors read, not {8 + (unit - 8192) // 512}")
    s.finish()


@test("discard and write zeroes hide the backing, and a write into the unit does not bring it back")
def hide(bench):
    unit = CLUSTER
    s = Backed(bench, 24 * unit, 24 * unit)
    s.disk.discard(unit + 512, 6 * unit)
    s.model.discard(unit + 512, 6 * unit)
    s.disk.zero_out(8 * unit - 512, 5 * unit)
    s.model.zero_out(8 * unit - 512, 5 * unit)
    s.model.check(s.disk)
    s.dm.cycle()
    s.model.check(s.disk)
    for n in (2, 4, 8, 10, 12):
        s.write(n * unit + 4096, 512)
    s.finish()


@test("several overlays share one backing device")
def shared(bench):
    size = 32 * CLUSTER
    path = backing_file(bench, size)
    before = sha(path)
    below = bench.add(Loop(path, readonly=True))
    overlays = []
    for n in range(3):
        image = bench.image(size, name=f"overlay{n}", backing=path, extended=n == 2)
        image.arrange(lambda i, n=n: PATTERN[(i + n) % len(PATTERN)])
        model = Units(image)
        dm = image.open(backing=below.path, name=f"q{n}")
        overlays.append((image, model, dm, bench.io(dm)))

    def work(n):
        rng = random.Random(n)
        _, model, _, disk = overlays[n]
        for _ in range(150):
            at = rng.randrange(size // 512 - 300) * 512
            length = rng.randrange(1, 300) * 512
            if rng.random() < 0.5:
                data = rng.randbytes(length)
                disk.write(at, data)
                model.write(at, data)
            elif rng.random() < 0.3:
                disk.discard(at, length)
                model.discard(at, length)
            same(disk.read(at, length), model.read(at, length), at, f"overlay {n}")

    in_parallel(work, *((n,) for n in range(3)))
    for n, (image, model, dm, disk) in enumerate(overlays):
        model.check(disk)
        bench.judge(disk, dm, image, model, f"model{n}")
    expect(sha(path) == before, "the backing file was changed")


@test("the backing device is another such image, opened read-only")
def chain(bench):
    size = 24 * CLUSTER + 512
    base = bench.image(size - 5 * CLUSTER, name="base")
    base.arrange(lambda n: ("data", "zero", "unallocated")[n % 3])
    with open(bench.path("base.raw"), "wb") as f:
        f.write(base.content())
    image = bench.image(size, backing=bench.path("base.raw"), backing_image=base)
    image.arrange(lambda n: PATTERN[n % len(PATTERN)])
    model = Units(image)
    before = base.hash(), sha(base.data)
    lower = base.open(readonly=True, name="base")
    dm = image.open(backing=lower.path)
    disk = bench.io(dm)
    model.check(disk)
    rng = random.Random(11)
    for _ in range(60):
        at = rng.randrange(size // 512 - 200) * 512
        length = rng.randrange(1, 200) * 512
        if rng.random() < 0.3:
            disk.discard(at, length)
            model.discard(at, length)
        else:
            disk.write(at, b"c" * length)
            model.write(at, b"c" * length)
    model.check(disk)
    dm.cycle()
    model.check(disk)
    bench.judge(disk, dm, image, model)
    bench.drop(lower)
    expect((base.hash(), sha(base.data)) == before, "the image below was changed")


@test("read-only: backing content shows, nothing is changed by a bit")
def readonly(bench):
    path = backing_file(bench, 20 * CLUSTER + 512)
    image = bench.image(32 * CLUSTER, backing=path)
    image.arrange(lambda n: PATTERN[n % len(PATTERN)])
    model = Units(image)
    before = image.hash(), sha(path), sha(image.data)
    dm = image.open(readonly=True)
    disk = bench.io(dm, readonly=True)
    model.check(disk)
    model.check(disk)
    bench.drop(disk)
    bench.drop(dm)
    expect((image.hash(), sha(path), sha(image.data)) == before, "something was changed")
    image.compare(model.save(bench.path("model")))


if __name__ == "__main__":
    main()
