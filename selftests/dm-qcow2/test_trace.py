#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Trace points: what each of them says of what is done."""
import os
import re

from qcow2test import KIB, MIB, NullBlk, expect, main, run, same, test, wait_for

TRACEFS = "/sys/kernel/tracing"
EVENTS = f"{TRACEFS}/events/dm_qcow2"
NAMES = ["commit_begin", "commit_end", "first_write", "load", "mode", "reserve", "trim"]


class Trace:
    """The events while it is open; what has been seen is not seen again."""

    def __init__(self):
        self.mounted = not os.path.isdir(f"{TRACEFS}/events")
        if self.mounted:
            run("mount", "-t", "tracefs", "none", TRACEFS)
        self.put("trace", "")
        self.on(1)

    @staticmethod
    def put(name, value):
        with open(f"{TRACEFS}/{name}", "w", encoding="ascii") as f:
            f.write(str(value))

    def on(self, value):
        self.put("events/dm_qcow2/enable", value)

    def take(self):
        """As (name, what it says without the device)."""
        with open(f"{TRACEFS}/trace", encoding="ascii") as f:
            lines = f.read().splitlines()
        self.put("trace", "")
        found = [re.search(r"qcow2_(\w+): (\d+:\d+) (.*)$", line).groups() for line in lines if ": qcow2_" in line]
        self.devices = {f[1] for f in found}
        return [(f[0], f[2]) for f in found]

    def close(self):
        self.on(0)
        if self.mounted:
            run("umount", TRACEFS)


def said(events, name):
    return [text for n, text in events if n == name]


@test("what is loaded, written first, committed; and nothing when they are off")
def events(bench):
    cluster, size = 64 * KIB, 1536 * MIB
    image = bench.image(size, data=bench.add(NullBlk(size, discard=False)).path)
    image.qemu_io("write -q -P 1 0 64k")
    image.trim()
    dm = image.open()
    disk = bench.io(dm)
    trace = bench.add(Trace())
    expect(sorted(d[6:] for d in os.listdir(EVENTS) if d.startswith("qcow2_")) == NAMES, f"{os.listdir(EVENTS)}")

    table = image.l2_pos(0) // cluster * cluster
    same(disk.read(0, 4096), b"\1" * 4096)
    found = trace.take()
    expect(found == [("load", f"slice 0 table {table:#x} error 0")], f"{found}")
    with open(f"/sys/class/block/{os.path.basename(os.path.realpath(dm.path))}/dev", encoding="ascii") as f:
        expect(trace.devices == {f.read().strip()}, f"{trace.devices}")
    same(disk.read(4096, 4096), b"\1" * 4096)
    disk.write(4096, b"x" * 4096)
    expect(trace.take() == [], "a hit")

    # A whole unit, and a part of one
    disk.write(cluster, b"a" * cluster)
    disk.write(2 * cluster + 4096, b"b" * 4096)
    disk.fsync()
    found = trace.take()
    expect(said(found, "first_write") == ["128 + 128, 0 zeroed", "264 + 8, 120 zeroed"], f"{found}")
    # The timer's commit may have come between them.
    blocks = [re.fullmatch(r"(\d+) blocks 0 new tables 0 unwritten error 0", t) for t in said(found, "commit_end")]
    expect(all(blocks) and 1 <= sum(int(b[1]) for b in blocks) <= 2, f"{found}")
    expect(said(found, "commit_begin") == ["1 dirty slices"] * len(blocks), f"{found}")
    expect({n for n, _ in found} == {"first_write", "commit_begin", "commit_end"}, f"{found}")

    # A new table
    disk.write(700 * MIB, b"c" * cluster)
    disk.fsync()
    found = trace.take()
    expect(said(found, "load") == ["slice 1 table 0x0 error 0"], f"{found}")
    reserved = [re.fullmatch(r"L1 entry 1 cluster (\d+) error 0", t) for t in said(found, "reserve")]
    expect(len(reserved) == 1 and reserved[0], f"{found}")
    expect(sum(" 1 new tables" in t for t in said(found, "commit_end")) == 1, f"{found}")
    expect(int(reserved[0][1]) * cluster == image.l2_pos(512 * MIB) // cluster * cluster, f"{found}")

    trace.on(0)
    disk.write(513 * MIB, b"d" * cluster)
    disk.fsync()
    expect(trace.take() == [], "off")
    trace.on(1)


@test("discards that are passed down, and copies")
def trims(bench):
    cluster, size = 64 * KIB, 64 * MIB
    path = bench.file("backing", size)
    image = bench.image(size, data=bench.add(NullBlk(size)).path, backing=path)
    dm = image.open()
    disk = bench.io(dm)
    trace = bench.add(Trace())
    disk.write(cluster, b"a" * 512)
    disk.write(3 * cluster, b"a" * cluster)
    disk.fsync()
    expect(said(trace.take(), "first_write") == ["128 + 1, 127 copied", "384 + 128, 0 copied"], "copied")
    disk.discard(3 * cluster, cluster)
    disk.fsync()
    found = []

    def seen():
        found.extend(trace.take())
        return said(found, "trim")
    wait_for("the discard", 60, seen)
    expect(said(found, "trim") == ["384 + 128"], f"{found}")


@test("modes")
def modes(bench):
    image = bench.image(8 * MIB)
    image.set_u64(image.l1_pos(0), 0x123)
    trace = bench.add(Trace())
    dm = image.open()
    disk = bench.io(dm)
    try:
        disk.read(0, 4096)
    except OSError:
        pass
    wait_for("mode ro", 30, lambda: dm.mode() == "ro")
    found = trace.take()
    expect(said(found, "mode") == ["ro"], f"{found}")


if __name__ == "__main__":
    main()
