#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Power cuts: whatever the moment, and whatever of the writes since the last
flush has got to the disks, the image is sound and has all that was promised.

Metadata and data device are two ranges of one dm-log-writes device. qcow2load
sends requests; qcow2replay makes of the log the states in which a power cut could
leave the disks, and judges them. Here that are some hundreds per load; where the
folder /run/vm/export exists the recordings are left there, so that
selftests/powercut can judge many more at the speed of a real machine.

Settings from the environment: POWERCUT_SEED, POWERCUT_LOADS (names, default: all).
"""
import os

import powercut_fs
import qcow2test
from powercut import TOOL, FlushTrace, Recording, order_of_log
from qcow2test import KIB, MIB, Failure, Task, expect, run, test

# name: requests, what to add to the load's options, and the image
LOADS = {
    "small": (500, (), {"size": 8 * MIB, "cluster": 4 * KIB}),
    # L2 tables of 64 entries, refcount blocks as well: new ones all the time
    "tiny": (350, (), {"size": 2 * MIB, "cluster": 512, "refcount_bits": 64}),
    "large": (300, (), {"size": 8 * MIB, "cluster": 64 * KIB}),
    "extended": (500, (), {"size": 4 * MIB, "cluster": 16 * KIB, "extended": True}),
    # ends within a cluster, and the backing file within another one
    "backing": (400, (), {"size": 4 * MIB - 1536, "cluster": 8 * KIB, "backing": 3 * MIB - 1536}),
    # No discards: what they leave behind is the data device's affair.
    "raw": (300, ("-w", "66,10,14,0,10"), {"size": 2 * MIB, "cluster": 2 * KIB, "raw": True}),
    # one request after the other
    "serial": (200, ("-t", 1), {"size": 2 * MIB, "cluster": 2 * KIB}),
    # Granules that are smaller and larger than what requests write, and than units
    "bitmaps": (400, (), {"size": 8 * MIB, "cluster": 4 * KIB, "bitmaps": (512, 4 * KIB, 64 * KIB)}),
    "bitmaps_raw": (300, ("-w", "66,10,14,0,10"), {"size": 4 * MIB, "cluster": 512, "raw": True, "bitmaps": (4 * KIB, 32 * KIB)}),
    "bitmaps_extended": (300, (), {"size": 4 * MIB - 1536, "cluster": 16 * KIB, "extended": True, "backing": 3 * MIB - 512,
                                   "bitmaps": (8 * KIB,)}),
    # 64 tables, and room for some of them
    "full": (300, ("-e",), {"size": 8 * MIB, "cluster": KIB, "room": 40 * KIB}),
}


def recorded(name, function):
    """Decorator's work: a test of this name, if it is wanted."""
    wanted = os.environ.get("POWERCUT_LOADS", "").split()
    if not wanted or name in wanted:
        test(f"power cuts: {name}")(function)


def random_load(name):
    requests, options, image = LOADS[name]

    def function(bench):
        r = Recording(bench, name, **image)
        r.load(requests, *options)
        r.close()
        r.judge()
    return function


def bitmaps_along(bench):
    """Sequential writers, for whom more is marked than they need, between random ones. The disk is large
    enough for what is marked ahead of so many requests."""
    options = LOADS["raw"][1]
    r = Recording(bench, "bitmaps_along", 256 * MIB, cluster=64 * KIB, raw=True, bitmaps=(64 * KIB, 4 * KIB))
    r.load(40, *options)
    for _ in range(3):
        r.load(48, "-a", "-t", 1, "-w", "90,2,0,0,8")
        r.load(20, *options)
    r.close()
    r.judge()


def backups(bench, name, raw, options):
    """Backups begin and end while requests come in: whenever it happens, what has changed is in one of the
    bitmaps, all of them are valid, and nothing is known of a view."""
    r = Recording(bench, name, 4 * MIB, room=2 * MIB, cluster=4 * KIB, mapped=True, raw=raw, bitmaps=(4 * KIB,), chain=True)
    cow = bench.path("cow")
    os.mkdir(cow)
    last = "b0"
    r.load(60, *options)
    for n in range(3):
        task = Task(r.load, 120, *options)
        run(TOOL, "backup", "begin", r.dm.name, "--cow", cow, "--bitmap", last, "--checkpoint", f"c{n}")
        task.finish()
        task = Task(r.load, 60, *options)
        run(TOOL, "backup", "end", r.dm.name, *(("--failed",) if n == 1 else ()))
        task.finish()
        last = f"c{n}"
    r.load(40, *options)
    r.close()
    r.judge()


def resize(bench):
    """Grow a device while requests come in, twice."""
    sizes = MIB, 3 * MIB, 10 * MIB + 512
    r = Recording(bench, "resize", sizes[0], room=2 * MIB, data_size=sizes[-1], cluster=2 * KIB, mapped=True)
    for size in sizes[1:]:
        task = Task(r.load, 100)
        run(TOOL, "resize", r.dm.name, "--size", size)
        r.mark(f"r{size // 512}")
        task.finish()
        r.load(100)
    r.close()
    r.judge()


def resize_raw(bench):
    """The same with all L2 tables of what is new, which are written beside the requests."""
    sizes = MIB, 8 * MIB, 24 * MIB + 512
    options = LOADS["raw"][1]
    r = Recording(bench, "resize_raw", sizes[0], room=2 * MIB, data_size=sizes[-1], cluster=2 * KIB, mapped=True,
                  raw=True)
    for size in sizes[1:]:
        task = Task(r.load, 100, *options)
        run(TOOL, "resize", r.dm.name, "--size", size)
        r.mark(f"r{size // 512}")
        task.finish()
        r.load(100, *options)
    r.close()
    r.judge()


def file_system(bench):
    """What was synced in a file system has to be there. powercut_fs.py judges."""
    r = Recording(bench, "ext4", 16 * MIB, cluster=4 * KIB)
    run("mkfs.ext4", "-q", "-F", "-b", 1024, "-E", "lazy_itable_init=0,nodiscard", r.dm.path)
    where = bench.path("mnt")
    os.mkdir(where)
    run("mount", "-t", "ext4", "-o", "discard", r.dm.path, where)
    try:
        os.sync()
        r.mark("s0")
        for n in range(1, 25):
            with open(f"{where}/noise{n}", "wb") as f:
                f.write(os.urandom(40 * KIB))
            if n > 3:
                os.unlink(f"{where}/noise{n - 3}")
            with open(f"{where}/file{n}", "wb") as f:
                f.write(powercut_fs.content(n))
                f.flush()
                os.fsync(f.fileno())
                # The entry in the folder is to be durable, too.
                folder = os.open(where, os.O_RDONLY)
                os.fsync(folder)
                os.close(folder)
            r.mark(f"s{n}")
    finally:
        run("umount", where)
    r.close(seed=0)
    r.judge(os.path.join(qcow2test.HERE, "powercut_fs.py"))


for load in LOADS:
    recorded(load, random_load(load))
recorded("bitmaps_along", bitmaps_along)
recorded("backups", lambda bench: backups(bench, "backups", False, ()))
recorded("backups_raw", lambda bench: backups(bench, "backups_raw", True, LOADS["raw"][1]))
recorded("resize", resize)
recorded("resize_raw", resize_raw)
recorded("ext4", file_system)


@test("which flush has made what durable, and whose it was, whatever the order in which they end")
def flush_order(_bench):
    def trace(text):
        """Words: who (a CPU, or a task), what he does (queue, enter, leave, log, end), and with which flush"""
        formats = {
            "queue": "block_bio_queue: 253,{dev} FF 0 + 0 [x]",
            "enter": "log_map: (log_writes_map+0x0/0x3c0 [dm_log_writes]) bio=0xffff88{bio}",
            "leave": "log_mapped: (__map_bio+0x1/0x2 <- log_writes_map [dm_log_writes])",
            "log": "log_end: (normal_end_io+0x0/0x1 [dm_log_writes]) bio=0xffff88{bio}",
            "end": "block_bio_complete: 253,{dev} FF 0 + 0 [0]",
        }
        for n, (who, what, which) in enumerate(zip(*[iter(text.split())] * 3)):
            yield f"  a task-{who}   [000] d..1. {n}.5: " + formats[what].format(dev=which[0], bio=which)

    def order(text):
        return order_of_log(["# tracer: nop", *trace(text)], {(253, 0): "m", (253, 1): "d"})

    # Devices 0 (m) and 1 (d): flush 11 is one of d. A write, bio 99, is none of them.
    one, other = "1 queue 11 1 enter 11 1 leave 11", "2 queue 12 2 enter 12 2 leave 12"
    for what, text, want in (
            ("in order", f"{one} 9 log 11 9 end 11 {other} 9 log 12 9 end 12", [("d", 0), ("d", 1)]),
            ("overtaken", f"{one} {other} 9 log 12 9 end 12 9 log 11 9 end 11", [("d", 1), ("d", 0)]),
            ("who was sent first has taken less",
             "1 queue 11 2 queue 12 1 enter 11 2 enter 12 2 leave 12 3 enter 99 3 leave 99 9 log 99 1 leave 11 "
             "9 log 12 9 end 12 9 log 11 9 end 11", [("d", 0), ("d", 1)]),
            ("of both devices, one after the other",
             f"1 queue 01 1 enter 01 1 leave 01 {other} 9 log 12 9 end 12 9 log 01 9 end 01", [("d", 1), ("m", 0)]),
            ("of both devices, and who knows",
             f"1 queue 01 1 enter 01 1 leave 01 {other} 9 log 12 8 log 01 9 end 12 8 end 01", [("?", 1), ("?", 0)]),
            ("ended by who has sent it", f"{one} {other} 9 log 11 1 end 11 9 log 12 9 end 12", [("d", 0), ("d", 1)]),
            ("an end that is not seen", f"{one} {other} 9 log 12 9 end 12 9 end 11", [("d", 1), ("d", 0)]),
            ("nor is it when the bio comes again",
             f"{one} {other} 9 end 11 3 enter 11 3 leave 11 9 log 11 9 log 12 9 end 12", [("d", 0), ("d", 1)]),
            ("a bio that comes again",
             f"{one} 9 log 11 9 end 11 3 enter 11 3 leave 11 9 log 11 {other} 9 log 12 9 end 12",
             [("d", 0), ("d", 1)])):
        expect(order(text) == want, f"{what}: {order(text)}")
    for text in (one, "1 queue 11", f"{one} 9 log 11", "9 end 11", f"{one} 9 end 01"):
        try:
            got = order(text)
        except Failure:
            continue
        expect(False, f"{text}: {got}")


@test("a commit flushes the data device, then the metadata, and no more than it has to")
def commit_flushes(bench):
    image = bench.image(8 * MIB, cluster=4 * KIB)
    image.attach()
    meta, data = (bench.linear(n, loop.path) for n, loop in (("m", image.meta_loop), ("d", image.data_loop)))
    dm = image.open(meta=meta.path, data=data.path)
    disk = bench.io(dm)
    for what, action, want in (
            ("of a new L2 table", lambda: disk.write(0, b"1" * 4096), "dmm"),
            ("of entries of a table that is there", lambda: disk.write(8192, b"2" * 4096), "dm"),
            ("of both", lambda: (disk.write(16384, b"3" * 4096), disk.write(4 * MIB, b"4" * 512)), "dmm"),
            ("of nothing", lambda: None, "d"),
            ("of an overwrite", lambda: disk.write(0, b"5" * 4096), "d"),
            ("of a discard", lambda: disk.discard(8192, 4096), "dm")):
        trace = bench.add(FlushTrace(bench, {"m": meta.path, "d": data.path}))
        action()
        disk.fsync()
        got = trace.ended()
        bench.drop(trace)
        # The timer may have made two commits of it, both of them whole.
        expect(got == want or (got.startswith("d") and got.endswith("d") and want in got),
               f"a commit {what} flushes {got}, expected: {want}")


if __name__ == "__main__":
    qcow2test.main()
