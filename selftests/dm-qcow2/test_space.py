#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Metadata on a device that does not grow: where the space ends, and afterwards.

Space is reserved by the first write that needs a new L2 table. It is that write
that fails with ENOSPC, and nothing else; what was acknowledged can always be
committed. The metadata device is a linear one over a part of the file.
"""
import errno
import os
import random
import subprocess
import threading

from qcow2test import (KIB, MIB, Dm, Failure, KernelLog, expect, fails_with, main, note, same, test,
                       wait_for)
from written import Written

CLUSTER = 4 * KIB
COVER = CLUSTER * CLUSTER // 8
TABLES = 40


class Space(Written):
    """An image whose metadata device has room for just a few more clusters.
    room: their number, or a function that is told how many there are already."""
    ERROR, PART = errno.ENOSPC, 4 * KIB

    def __init__(self, bench, room, tables=TABLES, **options):
        self.bench = bench
        options.setdefault("cluster", CLUSTER)
        image = self.image = bench.image(tables * (options["cluster"] ** 2 // 8), **options)
        self.cover = image.cover
        image.poison((0, MIB), (20 * COVER, MIB))
        self.base = -(-image.file_size() // image.cluster)
        self.room = room(self.base) if callable(room) else room
        # The file itself is large enough for all that a device may show of it.
        os.truncate(image.path, (self.base + 2 * tables + 64) * image.cluster)
        self.model = bench.model(image.size)
        image.attach(extend=False)
        self.meta = bench.add(Dm("meta", self.lower(self.room)))
        self.dm = image.open(meta=self.meta.path)
        self.disk = bench.io(self.dm)

    def lower(self, room):
        sectors = (self.base + room) * self.image.cluster // 512
        return f"0 {sectors} linear {self.image.meta_loop.path} 0"

    def grow(self, room):
        """A larger device, and the table once more."""
        self.meta.load(self.lower(room))
        self.dm.load(self.dm.table())

    def healthy(self):
        expect(self.dm.mode() == "rw", f"{self.dm.status()}")

    def done(self):
        self.healthy()
        self.finish()


@test("a first write that needs a table that has no room fails; all else goes on")
def out_of_space(bench):
    s = Space(bench, 3)
    for i in (0, 5, 39):
        s.write(i * COVER + 512)
    log = bench.add(KernelLog())
    events = s.dm.events()
    expect(s.dm.status().refused == 0, f"{s.dm.status()}")
    s.fails(10 * COVER)
    expect(s.dm.status().refused == 1, f"{s.dm.status()}")
    expect(log.lines("qcow2.*no free metadata"), "the log does not tell of it")
    wait_for("an event", 10, lambda: s.dm.events() > events)

    # More of them: counted, but the event has been told.
    sync = bench.io(s.dm, flags=os.O_DSYNC)
    s.fails(10 * COVER, 4 * CLUSTER)
    s.fails(11 * COVER + 512, CLUSTER)
    s.fails(30 * COVER, disk=sync)
    expect(s.dm.status().refused == 4, f"{s.dm.status()}")
    expect(s.dm.events() == events + 1, f"{s.dm.events() - events} events")

    # Reads, overwrites, first writes in tables that exist, flush, FUA.
    s.same(0, 5 * COVER, 10 * COVER, 11 * COVER, 20 * COVER, 39 * COVER)
    for i in (0, 5, 39):
        s.write(i * COVER + 1024, 1024)
        s.write(i * COVER + 20 * CLUSTER + 512, 3 * CLUSTER)
        s.write(i * COVER + 40 * CLUSTER, CLUSTER, sync)
    s.disk.fsync()
    s.healthy()
    # A write that begins in a table and ends where there is none
    with fails_with(errno.ENOSPC):
        s.disk.write(6 * COVER - CLUSTER, b"h" * 2 * CLUSTER)
    # The half of it that had room may be there or not.
    got = s.disk.read(6 * COVER - CLUSTER, CLUSTER)
    expect(got in (bytes(CLUSTER), b"h" * CLUSTER), "neither the old content nor the new one")
    s.model.write(6 * COVER - CLUSTER, got)
    s.same(6 * COVER)
    s.disk.fsync()
    bench.drop(sync)

    # Not cured by suspend and resume; nor does it get worse.
    s.dm.cycle()
    s.fails(12 * COVER)
    s.same(0, 5 * COVER, 10 * COVER, 12 * COVER, 39 * COVER)
    s.done()


@test("dmsetup wait returns at the first write that is refused")
def waits(bench):
    s = Space(bench, 0)
    waiting = subprocess.Popen(["dmsetup", "wait", s.dm.name, str(s.dm.events())],
                               stdout=subprocess.DEVNULL)
    try:
        with fails_with(errno.ENOSPC):
            s.disk.write(0, bytes(4096))
        waiting.wait(60)
    except subprocess.TimeoutExpired as e:
        raise Failure("dmsetup wait does not return") from e
    finally:
        waiting.kill()
        waiting.wait()
    s.same(0)
    s.disk.fsync()
    s.done()


@test("metadata space gets low: told once, before anything is refused")
def low(bench):
    s = Space(bench, 20)
    events = s.dm.events()
    told = None
    for i in range(20):
        s.write(i * COVER)
        if told is None and s.dm.events() > events:
            told = i
    expect(told is not None, "nothing was told before the space ends")
    expect(s.dm.events() == events + 1, f"{s.dm.events() - events} events")
    s.fails(30 * COVER)
    s.dm.cycle()
    s.done()


@test("metadata space for just all tables: nothing to be told, also if none has been committed yet")
def enough(bench):
    s = Space(bench, TABLES)
    events = s.dm.events()
    expect(s.dm.status().free_clusters >= TABLES, f"{s.dm.status()}")
    for i in range(TABLES):
        s.write(i * COVER)
    expect(s.dm.events() == events, f"{s.dm.events() - events} events: {s.dm.status()}")
    s.disk.fsync()
    expect(s.dm.events() == events, f"{s.dm.events() - events} events: {s.dm.status()}")
    s.done()


@test("over a backing device: a discard that has no room for its table is dropped, write zeroes fail")
def hints(bench):
    path = bench.file("backing", TABLES * COVER)
    with open(path, "wb") as f:
        for i in range(TABLES):
            f.seek(i * COVER)
            f.write(random.randbytes(8 * CLUSTER))
        f.truncate(TABLES * COVER)
    s = Space(bench, 2, backing=path)
    with open(path, "rb") as f:
        for i in range(TABLES):
            f.seek(i * COVER)
            s.model.write(i * COVER, f.read(8 * CLUSTER))
    for i in (0, 1):
        s.write(i * COVER + 512)
    # Of one table, over the border to another one without room, of many
    for at, length in ((10 * COVER, CLUSTER), (3 * COVER - CLUSTER, 2 * CLUSTER), (20 * COVER, 10 * COVER)):
        s.disk.discard(at, length)
        s.same(at, at + CLUSTER)
    s.healthy()
    # One that has a table in part: that part is done.
    s.disk.discard(2 * COVER - 2 * CLUSTER, 3 * CLUSTER)
    s.model.write(2 * COVER - 2 * CLUSTER, bytes(2 * CLUSTER))
    s.disk.discard(2 * CLUSTER, CLUSTER)
    s.model.write(2 * CLUSTER, bytes(CLUSTER))
    s.same(CLUSTER, 2 * CLUSTER, 2 * COVER - 2 * CLUSTER, 2 * COVER - CLUSTER, 2 * COVER)
    # Write zeroes are no hint.
    for zero in (s.disk.zero_range, s.disk.zero_out):
        for at, length in ((10 * COVER, CLUSTER), (11 * COVER + 512, 512)):
            with fails_with(errno.ENOSPC):
                zero(at, length)
            s.same(at)
    s.disk.fsync()
    s.same(*(i * COVER for i in range(TABLES)))
    s.dm.cycle()
    s.same(*(i * COVER for i in range(TABLES)), 2 * CLUSTER)
    s.done()


@test("a larger device and a reload: writes go on")
def recovery(bench):
    s = Space(bench, 2)
    s.write(0)
    s.write(COVER)
    s.fails(2 * COVER)
    s.fails(3 * COVER)
    # A reload without more room changes nothing.
    s.dm.load(s.dm.table())
    expect(s.dm.status().refused == 0, f"counted since the table was loaded: {s.dm.status()}")
    events = s.dm.events()
    s.fails(2 * COVER)
    expect(s.dm.events() == events + 1, "no new event for the new table")
    for room in (3, 6):
        s.grow(room)
        expect(s.dm.status().refused == 0, f"{s.dm.status()}")
        for i in range(s.dm.status().tables, room):
            s.write(i * COVER + 512)
        s.fails(room * COVER)
        s.disk.fsync()
        s.same(*(i * COVER for i in range(room + 2)))
    # And one that leaves no wish open; written to while it happens.
    stop, faults = threading.Event(), []

    def writer():
        try:
            while not stop.is_set():
                s.write(COVER + 64 * CLUSTER)
        except OSError as e:
            faults.append(e)
    thread = threading.Thread(target=writer)
    thread.start()
    s.grow(TABLES)
    stop.set()
    thread.join()
    expect(not faults, f"{faults}")
    for i in range(TABLES):
        s.write(i * COVER + 10 * CLUSTER, CLUSTER)
    s.disk.fsync()
    s.done()


@test("many writers at the end of the space: as many succeed as there is room")
def many(bench):
    room = 7
    s = Space(bench, room)
    results = {}

    def writer(i):
        data = bytes([i + 1]) * 1536
        try:
            s.disk.write(i * COVER + 512, data)
            s.model.write(i * COVER + 512, data)
            results[i] = 0
        except OSError as e:
            results[i] = e.errno
    threads = [threading.Thread(target=writer, args=(i,)) for i in range(TABLES)]
    for t in threads:
        t.start()
    s.disk.fsync()
    for t in threads:
        t.join()
    good = [i for i in results if not results[i]]
    expect(set(results.values()) == {0, errno.ENOSPC}, f"{results}")
    expect(len(good) == room, f"{len(good)} succeeded, not {room}")
    expect(s.dm.status().refused == TABLES - room, f"{s.dm.status()}")
    s.disk.fsync()
    expect(s.dm.status().tables == room, f"{s.dm.status()}")
    s.same(*(i * COVER for i in range(TABLES)))
    s.done()


def device_ends(bench, bits):
    """The end of the device near a place where a refcount block is due: what
    was acknowledged is committed, wherever the end is."""
    cluster, per_block = 512, 512 * 8 // bits
    for ahead in (-2, -1, 0, 1, 2, 3):
        s = Space(bench, lambda base, a=ahead: -base % per_block + a + per_block,
                  cluster=cluster, refcount_bits=bits, tables=3 * per_block)
        count = 0
        for i in range(3 * per_block):
            try:
                s.write(i * s.cover)
                count += 1
            except OSError as e:
                expect(e.errno == errno.ENOSPC, f"errno {e.errno}")
                break
            if i % 7 == ahead:
                s.disk.fsync()
        s.disk.fsync()
        s.healthy()
        # One cluster at most goes to each refcount block that is new.
        blocks = -(-(s.base + s.room) // per_block) - -(-s.base // per_block)
        expect(s.room - blocks <= count <= s.room, f"{count} tables in {s.room} clusters")
        s.same(*(i * s.cover for i in range(count + 2)))
        s.done()
        bench.drop(s.meta)
        bench.drop(s.model)
        s.image.detach()


for _bits in (32, 64):
    test(f"the device ends where a block of {_bits}-bit refcounts is due", _bits)(device_ends)


def small_clusters(bench, bits, tables, options=""):
    """Clusters of 512 bytes, until many refcount blocks have been made, over
    several lives of the table."""
    cluster = 512
    image = bench.image(tables * cluster * cluster // 8, cluster=cluster, refcount_bits=bits,
                        options=options)
    image.poison((0, MIB))
    model = bench.model(image.size)
    limit = image.reftable_entries() * image.per_block()
    cover = image.cover
    os.truncate(image.path, image.file_size() // cluster * cluster + 3 * tables * cluster // 2)
    image.attach(extend=False)
    rng = random.Random(bits)
    order = list(range(tables))
    rng.shuffle(order)
    written, refused = [], 0
    for part in range(4):
        dm = image.open()
        disk = bench.io(dm)
        for n, i in enumerate(order[part::4]):
            at = i * cover + rng.randrange(64) * cluster
            data = i.to_bytes(8, "little") * 64
            try:
                disk.write(at, data)
                model.write(at, data)
                written.append(at)
            except OSError as e:
                expect(e.errno == errno.ENOSPC, f"errno {e.errno}")
                refused += 1
                if refused > 20:
                    break
            if n % 500 == 499:
                disk.fsync()
        disk.fsync()
        for at in rng.sample(written, 100):
            same(disk.read(at, 1024), model.read(at, 1024), at)
        expect(dm.mode() == "rw", f"{dm.status()}")
        bench.drop(disk)
        bench.drop(dm)
    blocks = sum(bool(image.u64(image.reftable_pos(i))) for i in range(image.reftable_entries()))
    note(f"{len(written)} tables, {blocks} refcount blocks")
    if refused:
        # The refcount table can name no more: all of it must have been used.
        expect(blocks == image.reftable_entries(), f"{blocks} refcount blocks")
        expect(len(written) > limit - limit // image.per_block() - 200,
               f"{len(written)} tables, {limit} clusters")
    else:
        expect(len(written) == tables, f"{len(written)} tables")
        expect(blocks > tables // image.per_block(), f"{blocks} refcount blocks")
    image.check()
    image.compare(model)


test("clusters of 512 bytes, refcounts of 1 bit: more than one refcount block", 1, 4500)(small_clusters)
test("clusters of 512 bytes, refcounts of 16 bits: many refcount blocks", 16, 2500)(small_clusters)
test("clusters of 512 bytes, refcounts of 64 bits: until the refcount table is full",
     64, 4300)(small_clusters)


if __name__ == "__main__":
    main()
