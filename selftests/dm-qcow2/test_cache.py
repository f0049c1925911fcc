#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""The limit of the cache: what is clean is dropped, and read again when needed.

The images are so large, or their clusters so small, that what is touched does
not fit; the limit has to hold at every instant, and what is read has to be right
whatever has been dropped meanwhile.

Environment: SEED (printed, to repeat a run), FACTOR (that many times the requests).
"""
import errno
import os
import random
import threading
import time

from qcow2image import OFFSET_MASK
from qcow2test import (GIB, KIB, MIB, TIB, Failure, drop_caches, expect, fails_with, main, note, same, test,
                       wait_for)

SEED = int(os.environ.get("SEED", time.time_ns() // 1000 % 1000000))
FACTOR = int(os.environ.get("FACTOR", 1))
# What the limit must leave beyond the directory.
ROOM = 256 * KIB


class Watch:
    """Looks at the status all the time, while requests run."""

    def __init__(self, dm, limit):
        self.dm, self.limit = dm, limit
        self.most = self.looks = 0
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self.look)
        self.thread.start()

    def look(self):
        while not self.stopped.wait(0.005):
            self.most = max(self.most, self.dm.status().state_bytes)
            self.looks += 1

    def __enter__(self):
        return self

    def __exit__(self, fault, *_):
        self.stopped.set()
        self.thread.join()
        if fault:
            return
        expect(self.looks > 10, "nobody looked")
        expect(self.most <= self.limit, f"{self.most} bytes of states, the limit is {self.limit}")


class Places:
    """Blocks of 1 KiB all over a device, never two in one slice, and what each
    must contain. Block n belongs to thread n % the number of threads."""

    def __init__(self, size, count, rng):
        step = size // count // 1024
        self.at = [(i * step + rng.randrange(step)) * 1024 for i in range(count)]
        rng.shuffle(self.at)
        self.stamp = [0] * count

    def data(self, n):
        if not self.stamp[n]:
            return bytes(1024)
        return (self.at[n].to_bytes(8, "little") + self.stamp[n].to_bytes(8, "little")) * 64

    def write(self, disk, n):
        self.stamp[n] += 1
        disk.write(self.at[n], self.data(n))

    def check(self, disk, n):
        same(disk.read(self.at[n], 1024), self.data(n), self.at[n])


def work(disk, places, mine, seed, count, faults):
    rng = random.Random(seed)
    try:
        for _ in range(count):
            n = rng.choice(mine)
            kind = rng.random()
            if kind < 0.6:
                places.check(disk, n)
            elif kind < 0.995:
                places.write(disk, n)
            else:
                disk.fsync()
    except (Failure, OSError) as e:
        faults.append(e)


def spread(bench, size, count, requests, options):
    """Random reads and writes all over a device that has far more slices."""
    note(f"SEED={SEED}")
    rng = random.Random(SEED)
    image = bench.image(size, **options)
    image.attach()
    # The least that is allowed: the status of a fresh device tells the
    # directory's size.
    dm = image.open()
    limit = dm.status().state_bytes + ROOM
    bench.drop(dm)
    dm = image.open("cache_limit", str(limit))
    disk = bench.io(dm)
    places = Places(size, count, rng)
    with Watch(dm, limit) as watch:
        # First writes only, with no flush: they have to commit to stay within.
        for n in range(count):
            if n % 4:
                places.write(disk, n)
        faults = []
        threads = [threading.Thread(target=work, args=(disk, places, range(t, count, 4),
                                                       rng.random(), requests * FACTOR // 4, faults))
                   for t in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        expect(not faults, f"{faults}")
    status = dm.status()
    note(f"most {watch.most - limit + ROOM} of {ROOM} bytes, {status}")
    expect(status.drops > count // 8, f"hardly any drops: {status}")
    expect(status.misses > count, f"too few misses: {status}")
    disk.fsync()
    for n in range(count):
        places.check(disk, n)
    expect(dm.mode() == "rw", f"{dm.status()}")
    bench.drop(disk)
    bench.drop(dm)
    image.check()
    dm = image.open("read_only", "cache_limit", str(limit))
    disk = bench.io(dm, readonly=True)
    with Watch(dm, limit):
        for n in range(count):
            places.check(disk, n)
    with open(image.data, "rb") as f:
        for n in range(0, count, 2):
            same(os.pread(f.fileno(), 1024, places.at[n]), places.data(n), places.at[n], "data file")


# 1 MiB of directory; a slice takes about 2 KiB.
test("64 TiB at clusters of 64 KiB, spread", 64 * TIB, 600, 1500, {})(spread)
# Slices of 64 clusters, less than 100 bytes each.
test("2 GiB at clusters of 512 bytes, spread", 2 * GIB, 5000, 4000,
     {"cluster": 512, "refcount_bits": 1})(spread)


def settled(dm):
    """The status, when all that was changed is on disk."""
    wait_for("all slices are clean", 20, lambda: not dm.status().dirty)
    return dm.status()


@test("counters: a second look is a hit; after a drop it is a miss again")
def counters(bench):
    image = bench.image(8 * GIB)        # 16 slices
    # In the middle of each, where nobody comes from the one before
    places = [i * 512 * MIB + 256 * MIB for i in range(16)]
    image.qemu_io(*(f"write -q -P 1 {at} 64k" for at in places))
    data = b"\1" * 4096
    dm = image.open()
    disk = bench.io(dm)
    empty = dm.status()
    expect((empty.slices, empty.hits, empty.misses, empty.drops) == (0, 0, 0, 0), f"{empty}")
    for i, at in enumerate(places):
        same(disk.read(at, 4096), data)
        expect(dm.status().misses == i + 1, f"read {i}: {dm.status()}")
    first = dm.status()
    expect(first.slices == 16 and first.state_bytes > empty.state_bytes, f"{first}")
    for at in places:
        same(disk.read(at, 4096), data)
    second = dm.status()
    expect(second.misses == 16 and second.hits == first.hits + 16, f"{first}, then {second}")
    disk.write(places[0], data)
    expect(dm.status().hits == second.hits + 1, f"an overwrite is no hit: {dm.status()}")

    drop_caches()
    wait_for("all slices are dropped", 20, lambda: dm.status().slices == 0)
    dropped = dm.status()
    expect(dropped.state_bytes == empty.state_bytes, f"{dropped}")
    expect(dropped.drops == 16, f"{dropped}")
    for at in places:
        same(disk.read(at, 4096), data)
    last = dm.status()
    expect(last.misses == 32 and last.slices == 16, f"{last}")
    expect(last.state_bytes == first.state_bytes, f"{last}")


def slab_bytes():
    """What kmalloc() has given out, as /proc/slabinfo has it"""
    with open("/proc/slabinfo", encoding="ascii") as f:
        words = [line.split() for line in f if line.startswith("kmalloc-")]
    return sum(int(w[1]) * int(w[3]) for w in words)


@test("memory: 4.5 MiB for a TiB of mixed states, which slabinfo confirms; eight bytes for a table of one")
def memory(bench):
    image = bench.image(TIB)
    cover = 512 * MIB
    dm = image.open()
    disk = bench.io(dm)
    empty, slabs = dm.status().state_bytes, slab_bytes()
    for at in range(0, TIB, cover):
        disk.write(at + 64 * KIB, b"m" * 4096)
    disk.fsync()
    status = dm.status()
    said, found = status.state_bytes - empty, slab_bytes() - slabs
    note(f"{said / MIB:.2f} MiB in {status.slices} slices; slabinfo: {found / MIB:.2f} MiB")
    expect(status.slices == TIB // cover and said <= 4.5 * MIB, f"{status}")
    expect(abs(found - said) < 0.06 * said, f"{said} bytes by status, {found} by slabinfo")
    bench.drop(disk)
    bench.drop(dm)

    # As many slots, and nothing but these
    image = bench.image(TIB)
    dm = image.open()
    disk = bench.io(dm)
    before = slab_bytes()
    for at in range(0, TIB, cover):
        same(disk.read(at, 4096), bytes(4096))
    status = dm.status()
    expect(status.slices == TIB // cover and status.state_bytes == empty == 8 * (TIB // cover), f"{status}")
    expect(slab_bytes() - before < MIB, f"{slab_bytes() - before} bytes")


@test("who comes from one slice into the next has the one after it loaded")
def ahead(bench):
    image = bench.image(8 * GIB)
    image.qemu_io(*(f"write -q -P 1 {i * 512 * MIB} 64k" for i in range(12)))
    dm = image.open()
    disk = bench.io(dm)

    def look(at, slices, misses):
        same(disk.read(at, 4096), b"\1" * 4096, at)
        wait_for(f"{slices} slices", 30, lambda: dm.status().slices >= slices)
        time.sleep(0.3)
        status = dm.status()
        expect((status.slices, status.misses) == (slices, misses), f"{at // MIB} MiB: {slices}, {misses}: {status}")
    # The first one is nobody's next. From the second on somebody else loads them.
    look(0, 1, 1)
    look(512 * MIB, 3, 2)
    for i in range(2, 10):
        look(i * 512 * MIB, i + 2, 2)
        look(i * 512 * MIB + 4096, i + 2, 2)
    # Behind the last one there is no table: that is known, too, and nobody's next.
    look(10 * 512 * MIB, 12, 2)
    look(11 * 512 * MIB, 13, 2)
    same(disk.read(12 * 512 * MIB, 4096), bytes(4096))
    time.sleep(0.3)
    expect((dm.status().slices, dm.status().misses) == (13, 2), f"{dm.status()}")
    bench.drop(disk)
    bench.drop(dm)

    # Nobody's next: not from the one before, or not at its beginning
    dm = image.open()
    disk = bench.io(dm)
    for n, at in enumerate((5, 0, 9, 3, 7)):
        look(at * 512 * MIB, n + 1, n + 1)
    same(disk.read(1 * 512 * MIB + 256 * MIB, 4096), bytes(4096))
    time.sleep(0.3)
    expect((dm.status().slices, dm.status().misses) == (6, 6), f"{dm.status()}")
    bench.drop(disk)
    bench.drop(dm)

    # A table that is corrupt is that of who uses it, not of who uses the one before it.
    image.set_u64(image.l2_pos(2 * 512 * MIB), 0x1234 << 16)
    dm = image.open()
    disk = bench.io(dm)
    same(disk.read(0, 4096), b"\1" * 4096)
    same(disk.read(512 * MIB, 4096), b"\1" * 4096)
    time.sleep(0.3)
    expect(dm.mode() == "rw" and dm.status().slices == 2, f"{dm.status()}")
    disk.write(512 * MIB + 8 * MIB, b"w" * 4096)
    disk.fsync()
    with fails_with(errno.EIO):
        disk.read(2 * 512 * MIB, 4096)
    wait_for("mode ro", 30, lambda: dm.mode() == "ro")


@test("dirty slices stay until they are on disk")
def dirty(bench):
    image = bench.image(8 * GIB)
    image.attach()
    dm = image.open()
    disk = bench.io(dm)
    model = bench.model(8 * GIB)
    empty = dm.status().state_bytes
    for turn in range(4):
        for i in range(16):
            at = i * 512 * MIB + turn * 128 * KIB + 512
            disk.write(at, bytes([turn + 1]) * 1024)
            model.write(at, bytes([turn + 1]) * 1024)
        status = dm.status()
        drop_caches()
        # The timer may just have committed it all.
        if status.dirty and dm.status().commits == status.commits:
            expect(dm.status().slices >= status.dirty, f"{status}, then {dm.status()}")
        for i in range(16):
            at = i * 512 * MIB + turn * 128 * KIB
            same(disk.read(at, 4096), model.read(at, 4096), at)
        settled(dm)
        # The commit may not have let go of the last of them yet.
        wait_for("clean slices are dropped", 20,
                 lambda: drop_caches() or dm.status().state_bytes == empty)
        for i in range(16):
            same(disk.read(i * 512 * MIB, 512 * KIB), model.read(i * 512 * MIB, 512 * KIB))
    bench.drop(disk)
    bench.drop(dm)
    image.check()
    image.compare(model)


@test("slices are dropped under readers and writers")
def under_load(bench):
    note(f"SEED={SEED}")
    rng = random.Random(SEED)
    size = 256 * MIB
    image = bench.image(size, cluster=4 * KIB)          # 128 slices
    image.poison((0, 16 * MIB))
    dm = image.open()
    disk = bench.io(dm)
    places = Places(size, 128, rng)
    faults = []
    rounds = loads = drops = 0
    # Until they have met often enough
    while not faults and loads < 50 and (rounds <= 10 or drops <= 100):
        threads = [threading.Thread(target=work, args=(disk, places, range(t, 128, 4), rng.random(),
                                                       700 * FACTOR, faults)) for t in range(4)]
        for t in threads:
            t.start()
        loads += 1
        while any(t.is_alive() for t in threads):
            drop_caches()
            rounds += 1
            if rounds % 10 == 5:
                dm.cycle()
            time.sleep(0.01)
        drops = dm.status().drops
    expect(not faults, f"{faults}")
    note(f"{loads} loads, {rounds} rounds, {dm.status()}")
    expect(rounds > 10 and drops > 100, f"{rounds} rounds, {dm.status()}")
    disk.fsync()
    drop_caches()
    for n in range(128):
        places.check(disk, n)
    expect(dm.mode() == "rw", f"{dm.status()}")
    bench.drop(disk)
    bench.drop(dm)
    image.check()


@test("a smaller limit by a reload, and a larger one again")
def reload_limit(bench):
    size = 4 * TIB
    image = bench.image(size)
    image.attach()
    dm = image.open()
    small = dm.status().state_bytes + ROOM
    disk = bench.io(dm)
    places = Places(size, 400, random.Random(1))
    for n in range(400):
        places.write(disk, n)
    default = settled(dm)
    expect(default.state_bytes > small and not default.drops, f"{default}")
    line = dm.table()
    dm.load(f"{line} 2 cache_limit {small}")
    expect(dm.table() == f"{line} 2 cache_limit {small}", dm.table())
    for n in range(400):
        places.check(disk, n)
        expect(dm.status().state_bytes <= small, f"{dm.status()}")
    expect(dm.status().drops, f"{dm.status()}")
    dm.load(line)
    for n in range(400):
        places.check(disk, n)
    expect(not dm.status().drops, f"{dm.status()}")
    bench.drop(disk)
    bench.drop(dm)
    image.check()


class TotalLimit:
    """The limit for all devices together."""
    path = "/sys/module/dm_qcow2/parameters/cache_limit"

    def __init__(self):
        self.before = self.get()

    def get(self):
        with open(self.path, encoding="ascii") as f:
            return int(f.read())

    def set(self, value):
        with open(self.path, "w", encoding="ascii") as f:
            f.write(str(value))

    def close(self):
        self.set(self.before)


@test("all devices together: some lose what they do not use to those that do")
def total_limit(bench):
    size, count = 16 * GIB, 128
    limit = bench.add(TotalLimit())
    expect(limit.get() == 0, f"{limit.get()} instead of the default")
    devices = []
    for n in range(4):
        image = bench.image(size, f"image{n}", cluster=16 * KIB, extended=True)
        image.attach()
        dm = image.open(name=f"q{n}")
        disk = bench.io(dm)
        devices.append((image, dm, disk, dm.status().state_bytes, Places(size, count, random.Random(n))))

    def slices():
        """What the limit is about: without the directories."""
        return [dm.status().state_bytes - directory for _, dm, _, directory, _ in devices]
    for _, _, disk, _, places in devices[:-1]:
        for n in range(count):
            places.write(disk, n)
        disk.fsync()
    full = slices()
    expect(min(full[:-1]) > 0 and not full[-1], f"{full}")
    most = sum(full) * 2 // 3
    limit.set(most)
    # Only the last one is used: it gets what it needs, from all others.
    _, _, disk, _, places = devices[-1]
    for n in range(count):
        places.write(disk, n)
        # A batch of them goes at a time, and one more slice comes.
        expect(sum(slices()) <= most + full[0] // count * 2, f"{slices()} of {most}")
    disk.fsync()
    now = slices()
    expect(now[-1] >= full[0] // 2, f"the one that is used has {now} of {most}")
    expect(all(a < b for a, b in zip(now[:-1], full)), f"{now} of {full}: one has lost nothing")
    # One that has nothing clean does not hang the others, nor itself.
    limit.set(1)
    for _, dm, disk, _, places in devices:
        for n in range(count):
            places.check(disk, n)
            places.write(disk, n)
        disk.fsync()
        expect(dm.status().drops, f"{dm.status()}")
    limit.set(0)
    for image, dm, disk, _, places in devices:
        for n in range(count):
            places.check(disk, n)
        bench.drop(disk)
        bench.drop(dm)
        image.check()


@test("the smallest limit, and more first writers than slices: all get on")
def crowd(bench):
    # 62 slices of 4 KiB; each write needs another one, and most a new L2 table.
    size, threads, each = 64 * GIB, 80, 25 * FACTOR
    note(f"SEED={SEED}")
    image = bench.image(size, cluster=16 * KIB, extended=True)
    image.attach()
    dm = image.open("cache_limit", "1")
    disk = bench.io(dm)
    places = Places(size, threads * each, random.Random(SEED))
    faults = []

    def writer(first):
        try:
            for n in range(first, first + each):
                places.write(disk, n)
        except OSError as e:
            faults.append(e)
    workers = [threading.Thread(target=writer, args=(t * each,), daemon=True) for t in range(threads)]
    for w in workers:
        w.start()
    wait_for("all writes", 900 * FACTOR, lambda: not any(w.is_alive() for w in workers))
    expect(not faults, f"{faults}")
    status = dm.status()
    note(status)
    expect(status.drops > threads * each // 4, f"hardly any drops: {status}")
    expect(status.misses < 20 * threads * each, f"slices are dropped before they are used: {status}")
    disk.fsync()
    for n in range(0, threads * each, 7):
        places.check(disk, n)
    bench.drop(disk)
    bench.drop(dm)
    image.check()


@test("corrupt slices do not take more than the limit")
def corrupt_slices(bench):
    size = 112 * MIB
    image = bench.image(size, cluster=512, refcount_bits=1, options=",preallocation=metadata")
    image.trim()
    # One bad entry in each table: none of them can be told by a single state.
    cover, tables = image.cover, image.l1_entries()
    with open(image.path, "r+b") as f:
        for entry in tables:
            f.seek((entry & OFFSET_MASK) + 32 * 8)
            f.write(bytes([0x80, 0, 0, 0, 0, 0, 0, 2]))
    image.attach()
    dm = image.open()
    limit = dm.status().state_bytes + ROOM
    bench.drop(dm)
    dm = image.open("cache_limit", str(limit))
    disk = bench.io(dm)
    with Watch(dm, limit):
        for guest in range(0, size, cover):
            same(disk.read(guest, 512), bytes(512), guest)
    expect(dm.mode() == "ro", f"{dm.status()}")
    for guest in range(0, size, cover * 50):
        with fails_with(errno.EIO):
            disk.read(guest + 16 * KIB, 512)


if __name__ == "__main__":
    main()
