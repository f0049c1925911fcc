#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Metadata behind cluster 2^27, where the target cannot tell whose a cluster is.

Such an image is valid, if odd: 64 GiB of metadata at clusters of 512 bytes, 8 TiB at
64 KiB; all but a little of it is a hole here. It is read, and what it has is
overwritten. First writes could give away what is in use, so they are refused; but
"cannot tell" is no corruption, and is never written into the image as such.
"""
import errno
import os

from qcow2image import COPIED, CORRUPT
from qcow2test import KIB, KernelLog, expect, fails_with, main, same, test

FAR = 1 << 27


def far_image(bench, cluster, which):
    """Four L2 tables are needed, three are there; the last one of them, or a refcount
    block, is moved behind cluster 2^27."""
    cover = cluster * cluster // 8
    image = bench.image(4 * cover, cluster=cluster, refcount_bits=1)
    image.qemu_io(*(f"write -q -P {97 + t} {t * cover} {2 * cluster}" for t in range(3)))
    image.trim()
    # A refcount table that reaches so far
    entries = (FAR >> 12) + 1 if cluster == 512 else FAR // image.per_block() + 1
    need = -(-8 * entries // cluster)
    end = -(-image.file_size() // cluster)
    if need > image.get("refcount_table_clusters"):
        old = image.get("refcount_table_offset"), image.get("refcount_table_clusters")
        image.patch(end * cluster, image.read(old[0], old[1] * cluster))
        os.truncate(image.path, (end + need) * cluster)
        for n in range(end, end + need):
            image.set_refcount(n, 1)
        image.set("refcount_table_offset", end * cluster)
        image.set("refcount_table_clusters", need)
        for n in range(old[1]):
            image.set_refcount(old[0] // cluster + n, 0)
        end += need
    # The refcount block of that region: in the region itself, or before it
    region = FAR // image.per_block()
    place = FAR if which == "refcount block" else end
    os.truncate(image.path, (FAR + image.per_block()) * cluster)
    image.patch(place * cluster, bytes(cluster))
    image.set_u64(image.reftable_pos(region), place * cluster)
    image.set_refcount(place, 1)
    if which == "L2 table":
        old, new = image.l2_table(2 * cover), FAR + 5
        image.patch(new * cluster, image.read(old, cluster))
        image.set_refcount(new, 1)
        image.set_u64(image.l1_pos(2), new * cluster | COPIED)
        image.set_refcount(old // cluster, 0)
    image.has_room = True
    image.poison((2 * cluster, cluster))
    return image, cover


def far(bench, cluster, which):
    image, cover = far_image(bench, cluster, which)
    model = bench.model(image.size)
    for t in range(3):
        model.write(t * cover, b"%c" % (97 + t) * 2 * cluster)
    # QEMU takes it for what it is.
    image.compare(model)
    before = image.read(0, 8 * cluster)
    dm = image.open(readonly=True)
    disk = bench.io(dm, readonly=True)
    for t in range(4):
        same(disk.read(t * cover, 4 * cluster), model.read(t * cover, 4 * cluster), t * cover)
    for thing in (disk, dm):
        bench.drop(thing)
    image.detach()
    log = bench.add(KernelLog(room=True))
    dm = image.open()
    events = dm.events()
    disk = bench.io(dm)
    for turn in range(2):
        for t in range(4):
            same(disk.read(t * cover, 4 * cluster), model.read(t * cover, 4 * cluster), t * cover)
        expect(dm.status().mode == "rw", f"{dm.status()}")
        # What needs a table, and what has one that is far away; the former twice
        for at in (3 * cover, 2 * cover + 5 * cluster, 3 * cover + cluster) if which == "L2 table" else \
                (3 * cover, 3 * cover + cluster):
            with fails_with(errno.EIO):
                disk.write(at, b"n" * cluster)
        disk.fsync()
        expect(log.lines("qcow2: "), "no line in the kernel's log tells why")
        for t in range(3):
            disk.write(t * cover + cluster // 2 // 512 * 512, b"%c" % (65 + t) * cluster)
            model.write(t * cover + cluster // 2 // 512 * 512, b"%c" % (65 + t) * cluster)
        disk.fsync()
        expect(dm.status().mode == "rw" and dm.events() == events, f"{dm.status()}, {dm.events() - events} events")
        if not turn:
            dm.cycle()
    # Under a table that is where others are, it may be either; and then it is done.
    try:
        disk.write(5 * cluster, b"m" * cluster)
        disk.fsync()
        model.write(5 * cluster, b"m" * cluster)
    except OSError as e:
        expect(e.errno == errno.EIO, f"{errno.errorcode[e.errno]} instead of EIO")
    for t in range(4):
        same(disk.read(t * cover, 8 * cluster), model.read(t * cover, 8 * cluster), t * cover)
    expect(dm.status().mode == "rw", f"{dm.status()}")
    for thing in (disk, dm):
        bench.drop(thing)
    expect(not image.get("incompatible_features") & CORRUPT, "the corrupt bit was set")
    expect(image.read(0, cluster) == before[:cluster], "the header was changed")
    expect(image.l1(3) == 0, "there is a table all the same")
    if cluster == 512:
        # At the other size it is the same, and takes as long.
        image.check()
    image.compare(model)


for _cluster, _size in ((512, "64 GiB"), (64 * KIB, "8 TiB")):
    for _which in ("L2 table", "refcount block"):
        test(f"{'an' if _which[0] == 'L' else 'a'} {_which} behind {_size} of metadata, clusters of {_cluster}: "
             "it is read and overwritten, and never marked", _cluster, _which)(far)


if __name__ == "__main__":
    main()
