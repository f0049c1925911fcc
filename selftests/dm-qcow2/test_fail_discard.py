#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Discards and write zeroes on devices that fail: what is passed down, and when.
"""
import errno

from qcow2test import expect, fails_with, main, same, test, wait_for
from failing import CLUSTER, LOST, Failing


def fill(s, count=8):
    """Some clusters of data, of which later ones are discarded."""
    s.write(20 * CLUSTER, count * CLUSTER, b"d")
    s.disk.fsync()


def discard(s, first, count):
    s.disk.discard(first * CLUSTER, count * CLUSTER)
    s.model.write(first * CLUSTER, bytes(count * CLUSTER))


def not_passed_down(s):
    with open(s.image.data, "rb") as f:
        f.seek(21 * CLUSTER)
        same(f.read(3 * CLUSTER), b"d" * 3 * CLUSTER, 21 * CLUSTER, "data file")


def discard_commit(bench, how):
    s = Failing(bench)
    fill(s)
    getattr(s.meta, how)()
    events = s.dm.events()
    discard(s, 21, 3)
    s.same(*(i * CLUSTER for i in range(20, 28)))
    with fails_with(errno.EIO):
        s.disk.fsync()
    s.failed(events)
    not_passed_down(s)
    s.recover()
    # It was never acknowledged by a flush: zeros, or what was there before.
    for i in range(21, 24):
        got = s.disk.read(i * CLUSTER, CLUSTER)
        expect(got in (bytes(CLUSTER), b"d" * CLUSTER), "neither the old content nor the new one")
        s.model.write(i * CLUSTER, got)
    s.finish(leaks=True)


for _kind, _how in LOST:
    test(f"discards: not passed down if the commit fails ({_kind} errors)", _how)(discard_commit)


@test("discards: not passed down before their entries can be written")
def discard_later(bench):
    s = Failing(bench)
    fill(s)
    s.meta.bad()
    events = s.dm.events()
    discard(s, 21, 3)
    s.no_sync()
    s.holds(events, 1)
    not_passed_down(s)
    # Written anew, one of them is not to be discarded any more.
    s.write(22 * CLUSTER, CLUSTER, b"n")
    s.no_sync()
    s.same(*(i * CLUSTER for i in range(20, 28)))
    s.good(events)
    with open(s.image.data, "rb") as f:
        def hole(at):
            return f.seek(at), f.read(CLUSTER) == bytes(CLUSTER)
        wait_for("they are discarded", 60, lambda: hole(21 * CLUSTER)[1] and hole(23 * CLUSTER)[1])
    s.same(*(i * CLUSTER for i in range(20, 28)))
    s.finish()


@test("discards: one that the data device fails is of no consequence")
def discard_passdown(bench):
    s = Failing(bench)
    fill(s)
    # All but flushes fails there.
    s.data.bad(21 * CLUSTER, 3 * CLUSTER)
    events = s.dm.events()
    discard(s, 20, 6)
    s.disk.fsync()
    s.dm.cycle()
    s.same(*(i * CLUSTER for i in range(20, 28)))
    expect(s.dm.mode() == "rw" and s.dm.events() == events, f"{s.dm.status()}")
    s.data.good()
    s.same(*(i * CLUSTER for i in range(20, 28)))
    s.write(22 * CLUSTER + 512, 512, b"n")
    s.disk.fsync()
    s.same(*(i * CLUSTER for i in range(20, 28)))
    s.finish()


@test("write zeroes: the part of a unit that the data device cannot write")
def zeroes_in_part(bench):
    s = Failing(bench)
    fill(s)
    s.data.no_writes()
    with fails_with(errno.EIO):
        s.disk.punch_hole(20 * CLUSTER + 512, 1024)
    expect(s.dm.mode() == "rw", f"{s.dm.status()}")
    s.data.good()
    s.same(20 * CLUSTER)
    s.disk.punch_hole(20 * CLUSTER + 512, 1024)
    s.model.write(20 * CLUSTER + 512, bytes(1024))
    s.same(20 * CLUSTER)
    s.finish()


if __name__ == "__main__":
    main()
