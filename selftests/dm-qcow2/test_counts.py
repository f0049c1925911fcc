#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""How many requests the devices below get: what must not depend on any machine."""
import collections
import os

from qcow2test import GIB, KIB, MIB, Io, NullBlk, Stat, expect, main, note, test

BLOCK = 4 * KIB


class Counts:
    """What has been done to the devices since the last look."""

    def __init__(self, dm, meta, data):
        self.dm, self.meta, self.data = dm, Stat(meta), Stat(data)
        self.last = collections.Counter()
        self.look()

    def look(self):
        # The request that asks for a flush counts as a write as well.
        now = collections.Counter(
            writes=self.meta.writes - self.meta.flushes, sectors=self.meta.write_sectors,
            flushes=self.meta.flushes, data_writes=self.data.writes - self.data.flushes,
            data_flushes=self.data.flushes, commits=self.dm.status().commits)
        seen, self.last = now - self.last, now
        return seen


@test("1 GiB of first writes, with a flush every 16 MiB", GIB, False)
@test("96 MiB of first writes to a device with a cache, with a flush every 16 MiB", 96 * MIB, True)
def sequential(bench, size, cache):
    chunk, table = 16 * MIB, 512 * MIB
    if cache:
        image = bench.image(size)
    else:
        image = bench.image(size, data=bench.add(NullBlk(size, discard=False, memory=False)).path)
    image.attach()
    dm = image.open()
    io = bench.add(Io(dm.path))
    block = os.urandom(MIB)
    data = Stat(image.data_loop.path)
    counts, total = Counts(dm, image.meta_loop.path, image.data_loop.path), collections.Counter()
    for start in range(0, size, chunk):
        for at in range(start, start + chunk, MIB):
            io.write(at, block)
        io.fsync()
        seen = counts.look()
        total += seen
        # The timer commits now and then, and so it may be more than one.
        commits, new = seen["commits"], start % table == 0
        expect(commits >= 1, f"{seen}")
        # With a new table there are a refcount block, an L1 block, and the table itself, in
        # pieces of 16 KiB at the least.
        expect(seen["writes"] <= commits + new * (2 + image.cluster // (16 * KIB)), f"{seen}, {int(new)} tables")
        expect(seen["sectors"] * 512 <= commits * BLOCK + new * (image.cluster + 2 * BLOCK),
               f"{seen}, {int(new)} tables")
        # Reservations make their refcounts durable, with one more.
        expect(seen["flushes"] <= 3 * commits + new, f"{seen}")
        # One goes to the data device alone if the timer's commit was all there was to do.
        expect(cache <= seen["data_flushes"] <= commits + 1, f"{seen}")
    expect(data.write_sectors == size // 512, f"{data.write_sectors} sectors of data for {size // 512}")
    expect(data.reads == 0, f"{data.reads} reads of data")
    note(f"{dict(total)}")


if __name__ == "__main__":
    main()
