#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Memory of the kernel that a table takes: by what the device needs, not by what a
header claims, and less for one that is only read.
"""
import contextlib
import errno
import glob
import os
import re
import struct
import time

from qcow2test import (DM_READONLY_FLAG, DM_TABLE_LOAD, KIB, MIB, Dm, dm_ioctl, drop_caches, expect, fails_with, main,
                       note, run, same, test)
from qcow2image import COPIED, CORRUPT

CLUSTER = 64 * KIB
# Entries of the largest L1 table, and clusters of the largest refcount table
MOST_L1, MOST_REFTABLE = 32 * MIB // 8, 8 * MIB // CLUSTER


def used():
    """Bytes of the kernel's own: slabs, with what is too large for them; vmalloc, with
    stacks; what there is for each CPU. Callbacks may have to free some yet."""
    least, same_again = None, 0
    for _ in range(100):
        drop_caches(3)
        for name in glob.glob("/sys/kernel/slab/*/shrink"):
            with contextlib.suppress(OSError), open(name, "w", encoding="ascii") as f:
                f.write("1")
        with open("/proc/meminfo", encoding="ascii") as f:
            sizes = {name: int(value) * KIB for name, value in re.findall(r"^(\w+): *(\d+)", f.read(), re.M)}
        now = sum(sizes[n] for n in ("SUnreclaim", "VmallocUsed", "Percpu"))
        # A busy machine is late with them.
        same_again = same_again + 1 if least and now >= least else 0
        least = min(now, least or now)
        if same_again == 2:
            break
        time.sleep(0.3)
    return least


def measured(bench, line, count, readonly=True):
    """What a table takes on the average beyond what one of dm-linear does."""
    data = line.split(" ")[4]
    devices = [bench.add(Dm(f"m{n}", f"0 {line.split(' ')[1]} linear {data} 0")) for n in range(count)]
    before = used()
    for dm in devices:
        dm_ioctl(DM_TABLE_LOAD, dm.name, line, DM_READONLY_FLAG if readonly else 0)
        dm.resume()
    grown = used() - before
    modes = {dm.status().mode for dm in devices}
    expect(modes == {"ro" if readonly else "rw"}, f"{modes}")
    for dm in devices:
        bench.drop(dm)
    note(f"{grown // count // KIB} KiB for each of {count} tables; {line}")
    return grown / count


def ordinary(bench, **options):
    image = bench.image(options.pop("size", 8 * MIB), **options)
    image.qemu_io("write -q -P 97 0 64k")
    image.trim()
    return image


def claims(bench, l1=None, reftable=None):
    """1 MiB, and an L1 table and a refcount table that are as large as they may be. The
    image is valid: the tables are there, and counted."""
    image = ordinary(bench, size=MIB)
    end = -(-image.file_size() // CLUSTER) * CLUSTER
    if l1:
        entry = image.l1(0)
        image.set_u64(end, entry)
        image.set("l1_table_offset", end)
        image.set("l1_size", l1)
        end += -(-l1 * 8 // CLUSTER) * CLUSTER
        os.truncate(image.path, end)
    if reftable:
        image.set_u64(end, image.u64(image.reftable_pos(0)))
        image.set("refcount_table_offset", end)
        image.set("refcount_table_clusters", reftable)
        end += reftable * CLUSTER
        os.truncate(image.path, end)
    # What is not in use any more is counted as well, as a leak.
    image.patch(image.u64(image.reftable_pos(0)), struct.pack(">H", 1) * (end // CLUSTER))
    return image


# What reads need: buffers and states of slices in reserve, bios for parts, a work queue
# with its rescuer; with clusters of 64 KiB less than 250 KiB. Pools that only writers use
# were 464 KiB on top of it, whatever the clusters are. The limits lie far from either;
# with a hundred tables the noise is less than 10 KiB for each.
def readers(bench, limit, options):
    image = ordinary(bench, **options)
    image.attach()
    line = image.line(image.meta_loop.path, image.data_loop.path, "read_only")
    got = measured(bench, line, 100)
    expect(got <= limit, f"{got / KIB:.0f} KiB for a table that is read-only, at most {limit // KIB} expected")


for _title, _limit, _options in (("clusters of 64 KiB", 320 * KIB, {}),
                                 ("clusters of 4 KiB", 200 * KIB, {"cluster": 4 * KIB}),
                                 ("extended L2 entries", 200 * KIB, {"extended": True})):
    test(f"a read-only table has nothing that only writers need: {_title}", _limit, _options)(readers)


def claimed(bench, fields, limit):
    """Another table of the same size, whose header claims no more than it has, is what to
    compare with."""
    plain = ordinary(bench, size=MIB)
    plain.attach()
    fair = measured(bench, plain.line(plain.meta_loop.path, plain.data_loop.path, "read_only"), 20)
    plain.detach()
    os.unlink(plain.path)
    os.unlink(plain.data)
    image = claims(bench, **fields)
    image.attach()
    got = measured(bench, image.line(image.meta_loop.path, image.data_loop.path, "read_only"), 20)
    expect(got - fair <= limit, f"{(got - fair) / KIB:.0f} KiB more than for an image of this size")


# One of them would be 32 MiB, the other one 8 MiB.
test("an L1 table of 32 MiB on an image of 1 MiB takes no memory", {"l1": MOST_L1}, 256 * KIB)(claimed)
test("nor does a refcount table of 8 MiB, if it is only read", {"reftable": MOST_REFTABLE}, 256 * KIB)(claimed)


@test("an L1 table of 32 MiB takes no memory of a writer, which knows all of its entries nevertheless")
def writer(bench):
    image = claims(bench, l1=MOST_L1)
    image.check(leaks=True)
    # The cluster that would be taken next, by its count; and the last entry names it.
    image.extend()
    os.truncate(image.path, image.file_size() + 8 * CLUSTER)
    free = next(n for n in range(image.file_size() // CLUSTER) if not image.refcount(n))
    image.attach(extend=False)
    line = image.line(image.meta_loop.path, image.data_loop.path)
    got = measured(bench, line, 1, readonly=False)
    expect(got <= 4 * MIB, f"{got / KIB:.0f} KiB for the table of a writer")
    dm = image.open()
    disk = bench.io(dm)
    same(disk.read(0, 128 * KIB), b"a" * 64 * KIB + bytes(64 * KIB))
    disk.write(128 * KIB, b"w" * 512)
    disk.fsync()
    bench.drop(disk)
    bench.drop(dm)
    for index in (MOST_L1 - 1, MOST_L1 // 2, image.tables):
        expect(image.l1(index) == 0, "an entry behind the end was changed")
        image.set_u64(image.l1_pos(index), free * CLUSTER | COPIED)
        # So that the device has to ask for a table
        entry = image.l1(0)
        image.set_u64(image.l1_pos(0), 0)
        dm = image.open()
        disk = bench.io(dm)
        with fails_with(errno.EIO):
            disk.write(128 * KIB, b"w" * 512)
        expect(dm.status().mode == "ro", f"a cluster was given away that entry {index} names: {dm.status()}")
        bench.drop(disk)
        bench.drop(dm)
        expect(image.l1(index) == free * CLUSTER | COPIED, "the entry was changed")
        image.set_u64(image.l1_pos(index), 0)
        image.set_u64(image.l1_pos(0), entry)
        image.set("incompatible_features", image.get("incompatible_features") & ~CORRUPT)
    dm = image.open()
    disk = bench.io(dm)
    disk.write(192 * KIB, b"v" * 512)
    disk.fsync()
    bench.drop(disk)
    bench.drop(dm)
    image.check(leaks=True)


if __name__ == "__main__":
    run("modprobe", "-q", "dm-mod", ok=False)
    main()
