#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Single places of the metadata that cannot be written or read: what does not need them
becomes durable, and the rest later.
"""
import errno

from qcow2test import (DM_TABLE_CLEAR, DM_TABLE_LOAD, MIB, Dm, Failure, Stat, dm_ioctl, expect, fails_with, main,
                       same, test)
from failing import CLUSTER, COVER, Failing


def commit_step(bench, where):
    """One place of the metadata cannot be written, and no flush succeeds, while a new L2
    table is made."""
    s = Failing(bench)
    image = s.image
    pos = {"the L1 table": image.get("l1_table_offset"),
           "the refcount block": image.u64(image.reftable_pos(0)),
           "an L2 table": image.l2_table(0)}[where]
    s.meta.bad(pos, CLUSTER, writes_only=True)
    events = s.dm.events()
    writes = ((4 * CLUSTER, 512),) if where == "an L2 table" else ((1100 * MIB, 512),)
    for offset, length in writes:
        s.disk.write(offset, b"c" * length)
    with fails_with(errno.EIO):
        s.disk.fsync()
    s.failed(events)
    s.close()
    # Nothing on disk refers to what is not there.
    image.check(leaks=True)
    s.meta.good()
    s.dm = image.open(meta=s.meta.path, data=s.data.path)
    s.disk, s.sync = bench.io(s.dm), None
    s.same(0, CLUSTER, 50 * CLUSTER)
    for offset, length in writes:
        got = s.disk.read(offset, CLUSTER)
        expect(got in (bytes(CLUSTER), (b"c" * length).ljust(CLUSTER, b"\0")),
               "neither the old content nor the new one")
    s.disk.write(1200 * MIB, b"d" * 512)
    s.disk.fsync()
    same(s.disk.read(1200 * MIB, 1024), b"d" * 512 + bytes(512), 1200 * MIB)
    s.close()
    image.check(leaks=True)


def bad_place(bench, where):
    """One place of the metadata can neither be written nor read while a new L2 table is
    made and old ones are changed: the other entries become durable, and these later."""
    s = Failing(bench, 12 * COVER)
    image = s.image
    pos = {"the L1 table": image.get("l1_table_offset"),
           "the refcount block": image.u64(image.reftable_pos(0)),
           "an L2 table": image.l2_table(0)}[where]
    s.write(COVER, 512)
    s.disk.fsync()
    for n in range(4, 12):
        new, old, other = n * COVER + 100 * CLUSTER, n * CLUSTER, COVER + n * CLUSTER
        bad = old if where == "an L2 table" else new
        events = s.dm.events()
        for at in (new, old, other):
            s.write(at, 512, b"c")
        s.meta.bad(pos, CLUSTER)
        try:
            s.disk.fsync()
        except OSError:
            break
        # The timer's commit was there before the device was bad.
        s.meta.good()
    else:
        raise Failure("the timer's commit was always there first")
    s.holds(events)
    for at in (new, old, other):
        state = image.state(at)
        expect((state == "data") == (at != bad), f"cluster {at // CLUSTER} is {state}")
    s.same(0, CLUSTER, new, old, other, 50 * CLUSTER)
    image.check(leaks=True)
    s.good(events)
    s.same(0, CLUSTER, new, old, other, 50 * CLUSTER)
    s.finish()


for _where in ("the L1 table", "the refcount block", "an L2 table"):
    test(f"metadata write errors: {_where} cannot be written", _where)(commit_step)
    test(f"a bad place in {_where}: what does not need it becomes durable, and the rest later", _where)(bad_place)


@test("metadata write errors: the new L2 table cannot be written: its first write fails")
def new_table(bench):
    s = Failing(bench, 6 * COVER)
    image = s.image
    pos = max(image.l2_table(0), image.get("l1_table_offset")) + CLUSTER
    # Two places: each is tried once, and the next cluster by the next request.
    s.meta.bad(pos, 2 * CLUSTER)
    events = s.dm.events()
    new = [n * COVER + 76 * CLUSTER for n in range(1, 6)]
    for _ in range(2):
        s.fails(new[0], 512)
        s.same(new[0])
    # Nothing depends on it yet.
    expect(s.dm.mode() == "rw" and not s.dm.status().unwritten, f"{s.dm.status()}")
    expect(s.dm.events() == events, f"{s.dm.events() - events} events")
    s.write(4 * CLUSTER, 512, b"c")
    s.write(new[0], 512, b"c")
    s.disk.fsync()
    expect(image.state(new[0]) == "data", "a flush succeeded, but the entry is not there")
    s.meta.good()
    # There is just enough for all of them, if the bad places are not lost.
    for at in new[1:]:
        s.write(at, 512, b"d")
    s.disk.fsync()
    s.same(0, CLUSTER, 4 * CLUSTER, 50 * CLUSTER, *new)
    s.finish()


@test("L2 read errors in a commit: not acknowledged, and tried again the next time")
def commit_reads(bench):
    s = Failing(bench)
    events = s.dm.events()
    s.meta.bad(s.image.l2_table(0), CLUSTER)
    s.write(4 * CLUSTER + 512, 512)
    s.no_sync()
    s.same(0, 4 * CLUSTER)
    s.holds(events, 1)
    s.good(events)
    expect(s.image.state(4 * CLUSTER) == "data", "a flush succeeded, but the entry is not there")
    s.same(0, 4 * CLUSTER)
    s.finish()


@test("a bad sector in one L2 table: the units of another one become durable, and these later")
def bad_block(bench):
    s = Failing(bench)
    image = s.image
    s.write(COVER, CLUSTER)
    s.disk.fsync()
    s.same(0, COVER)
    events = s.dm.events()
    # Its slice is in core.
    s.meta.bad(image.l2_table(0), 512)
    s.write(4 * CLUSTER, CLUSTER, b"x")
    for n in range(1, 40):
        s.write(COVER + n * CLUSTER, CLUSTER, bytes([n]))
    s.no_sync()
    s.holds(events, 1)
    states = image.states()
    bad = [n for n in range(40) if states[COVER // CLUSTER + n] != "data"]
    expect(not bad, f"not durable, although nothing of theirs has failed: {bad}")
    expect(states[4] == "unallocated", f"{states[4]} on a sector that cannot be written")
    # The rest of its table is in other sectors; and whose entry is durable hears of no error.
    s.write(3000 * CLUSTER, CLUSTER, b"z")
    s.no_sync()
    expect(image.state(3000 * CLUSTER) == "data", "not durable, although its block is good")
    s.holds(events, 1)
    s.same(0, 4 * CLUSTER, COVER, COVER + 39 * CLUSTER, 3000 * CLUSTER)

    # Suspended, it keeps the image for itself; another table gets it when all is written.
    line = s.dm.table()
    second, third = bench.add(Dm("second")), bench.add(Dm("third"))
    dm_ioctl(DM_TABLE_LOAD, second.name, line)
    s.dm.suspend()
    s.holds(events, 1)
    for _ in range(2):
        with fails_with(errno.EBUSY):
            second.resume()
    with fails_with(errno.EBUSY):
        third.load(line)
    for dm in (second, third):
        dm_ioctl(DM_TABLE_CLEAR, dm.name)
        bench.drop(dm)
    stat = Stat(s.meta.path)
    s.dm.resume()
    expect(not stat.reads, f"{stat.reads} reads of the metadata at the resume")
    s.holds(events, 1)
    s.same(0, 4 * CLUSTER, COVER, COVER + 39 * CLUSTER, 3000 * CLUSTER)
    s.no_sync()
    s.good(events)
    expect(image.state(4 * CLUSTER) == "data", "a flush succeeded, but the entry is not there")
    s.dm.suspend()
    second = bench.add(Dm("second", line))
    disk = bench.io(second)
    for at in (0, 4 * CLUSTER, COVER + 39 * CLUSTER):
        same(disk.read(at, CLUSTER), s.model.read(at, CLUSTER), at)
    bench.drop(disk)
    bench.drop(second)
    s.dm.resume()
    s.same(0, 4 * CLUSTER, COVER, COVER + 39 * CLUSTER, 3000 * CLUSTER)
    s.finish()


@test("a bad sector in one L2 table: removal loses what was never written, and nothing else")
def bad_block_removed(bench):
    s = Failing(bench)
    s.write(COVER, CLUSTER)
    s.disk.fsync()
    s.same(0)
    s.meta.bad(s.image.l2_table(0), 512)
    s.disk.write(4 * CLUSTER, b"x" * CLUSTER)
    s.write(COVER + CLUSTER, CLUSTER, b"y")
    s.close()
    s.meta.good()
    s.dm = s.image.open(meta=s.meta.path, data=s.data.path)
    s.disk, s.sync = bench.io(s.dm), None
    s.same(0, 4 * CLUSTER, COVER, COVER + CLUSTER)
    s.write(4 * CLUSTER, CLUSTER, b"z")
    s.finish()


if __name__ == "__main__":
    main()
