#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Failing devices: what fails with them, and what must not.

Both devices lie on linear targets that are replaced, while in use, by dm-flakey
or dm-error.
"""
import errno
import os
import subprocess
import threading

from qcow2test import KIB, MIB, Dm, Failure, KernelLog, expect, fails_with, main, same, test, wait_for
from failing import CLUSTER, LOST, Failing


@test("data write errors: the write fails, its units stay as they were")
def data_writes(bench):
    s = Failing(bench)
    s.data.no_writes()
    s.fails(4 * CLUSTER)
    s.fails(6 * CLUSTER + 512, 512)
    s.fails(8 * CLUSTER + 512, 3 * CLUSTER)
    s.fails(520 * MIB + 512, 512)
    s.fails(0, 4096)
    s.same(0, 4 * CLUSTER, 6 * CLUSTER, 8 * CLUSTER, 9 * CLUSTER, 520 * MIB)
    expect(s.dm.mode() == "rw", f"{s.dm.status()}")
    expect(not s.dm.status().dirty, f"failed writes made something dirty: {s.dm.status()}")
    s.data.good()
    s.same(0, 4 * CLUSTER, 6 * CLUSTER, 8 * CLUSTER, 9 * CLUSTER, 520 * MIB)
    s.disk.fsync()
    s.dm.cycle()
    s.same(4 * CLUSTER, 6 * CLUSTER, 8 * CLUSTER, 9 * CLUSTER, 520 * MIB)
    s.write(4 * CLUSTER + 512, 1024)
    s.write(6 * CLUSTER, CLUSTER)
    s.same(4 * CLUSTER, 6 * CLUSTER)
    s.finish()


@test("data write errors: a fill that fails takes the write with it")
def fill_errors(bench):
    s = Failing(bench)
    # The end of cluster 4 and the start of cluster 6 cannot be written.
    for bad, offset in ((4 * CLUSTER + 32 * KIB, 4 * CLUSTER), (6 * CLUSTER, 6 * CLUSTER + 48 * KIB)):
        s.data.bad(bad, 4 * KIB)
        s.fails(offset, 4096)
        s.data.good()
        # Nothing of the write, and nothing of what the device held before.
        s.same(offset // CLUSTER * CLUSTER)
        s.dm.cycle()
        s.same(offset // CLUSTER * CLUSTER)
        s.write(offset, 4096)
        s.same(offset // CLUSTER * CLUSTER)
    expect(s.dm.mode() == "rw", f"{s.dm.status()}")
    s.finish()


@test("data write errors: a busy unit's waiters go on")
def busy_waiters(bench):
    s = Failing(bench)
    s.data.no_writes()
    results = []

    def writer(n):
        try:
            s.disk.write(20 * CLUSTER + n * 4096, b"w" * 4096)
            results.append(0)
        except OSError as e:
            results.append(e.errno)
    threads = [threading.Thread(target=writer, args=(n,)) for n in range(16)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    expect(results == [errno.EIO] * 16, f"{results}")
    s.data.good()
    s.same(20 * CLUSTER)
    s.finish()


@test("data read errors are passed on")
def data_reads(bench):
    s = Failing(bench)
    s.data.bad()
    with fails_with(errno.EIO):
        s.disk.read(0, 4096)
    s.same(4 * CLUSTER)
    expect(s.dm.mode() == "rw", f"{s.dm.status()}")
    s.data.good()
    s.same(0)


@test("a flush that the data device fails is not acknowledged")
def data_flush(bench):
    s = Failing(bench)
    s.data.no_writes()
    with fails_with(errno.EIO):
        s.disk.fsync()
    expect(s.dm.mode() == "rw", f"nothing was dirty: {s.dm.status()}")
    s.data.good()
    s.disk.fsync()
    events = s.dm.events()
    s.data.no_flush()
    s.write(4 * CLUSTER, CLUSTER)
    with fails_with(errno.EIO):
        s.disk.fsync()
    # The data is not durable, so nothing may say that it is.
    expect(s.image.state(4 * CLUSTER) == "unallocated", "the entry was written all the same")
    s.data.good()
    s.failed(events)
    s.same(0, 4 * CLUSTER)
    s.finish(leaks=True, compare=False)


def meta_flush(bench, how):
    s = Failing(bench)
    log = bench.add(KernelLog())
    getattr(s.meta, how)()
    events = s.dm.events()
    waiting = subprocess.Popen(["dmsetup", "wait", s.dm.name, str(events)],
                               stdout=subprocess.DEVNULL)
    try:
        s.write(4 * CLUSTER + 512, 512)
        s.same(4 * CLUSTER)
        s.no_sync()
        s.failed(events)
        try:
            waiting.wait(60)
        except subprocess.TimeoutExpired as e:
            raise Failure("dmsetup wait does not return") from e
    finally:
        waiting.kill()
        waiting.wait()
    # In core only, but it can be read.
    s.same(4 * CLUSTER)
    expect(log.lines("qcow2.*fail"), "the log does not tell of mode fail")
    # A device that has failed stays failed.
    s.meta.good()
    s.no_sync()
    s.dm.cycle()
    expect(s.dm.mode() == "fail", f"after suspend and resume: {s.dm.status()}")
    s.same(0, CLUSTER, 50 * CLUSTER)
    s.recover()
    # It was never acknowledged by a flush: there, or not at all.
    got = s.disk.read(4 * CLUSTER, CLUSTER)
    if got != bytes(CLUSTER):
        same(got, s.model.read(4 * CLUSTER, CLUSTER), 4 * CLUSTER)
    s.model.write(4 * CLUSTER, got)
    s.finish(leaks=True)


def timer_flush(bench, how):
    s = Failing(bench)
    getattr(s.meta, how)()
    events = s.dm.events()
    s.disk.write(4 * CLUSTER, b"t" * 512)
    s.failed(events)
    s.recover()
    s.finish(leaks=True, compare=False)


def fua_and_suspend_flush(bench, how):
    s = Failing(bench)
    getattr(s.meta, how)()
    events = s.dm.events()
    s.sync = bench.io(s.dm, flags=os.O_DSYNC)
    s.fails(4 * CLUSTER, 4096, s.sync)
    s.failed(events)
    s.recover()
    getattr(s.meta, how)()
    s.disk.write(90 * CLUSTER, b"t" * 512)
    s.dm.suspend()
    s.meta.good()
    s.dm.resume()
    expect(s.dm.mode() == "fail", f"the commit failed, but: {s.dm.status()}")
    s.finish(leaks=True, compare=False)


for _kind, _how in LOST:
    test(f"metadata {_kind} errors: fail at the next flush; reads and overwrites go on", _how)(meta_flush)
    test(f"metadata {_kind} errors: the timer's commit notices, too", _how)(timer_flush)
    test(f"metadata {_kind} errors: a FUA write fails, and so does suspend's commit", _how)(fua_and_suspend_flush)


@test("a metadata device that is dead for a while: flushes fail, all else goes on, nothing is lost")
def meta_dead(bench):
    s = Failing(bench)
    log = bench.add(KernelLog())
    events = s.dm.events()
    waiting = subprocess.Popen(["dmsetup", "wait", s.dm.name, str(events)],
                               stdout=subprocess.DEVNULL)
    try:
        # It cannot be read, and so it is neither written nor flushed.
        s.meta.bad()
        s.write(4 * CLUSTER + 512, 512)
        s.no_sync()
        s.holds(events, 1)
        try:
            waiting.wait(60)
        except subprocess.TimeoutExpired as e:
            raise Failure("dmsetup wait does not return") from e
    finally:
        waiting.kill()
        waiting.wait()
    expect(log.lines("qcow2"), "the log does not tell of it")
    # First writes, overwrites, reads, and the units that wait
    s.write(40 * CLUSTER, CLUSTER, b"b")
    s.write(4 * CLUSTER + 4096, 512, b"c")
    s.write(0, CLUSTER, b"o")
    s.fails(600 * MIB, 512)
    s.same(0, CLUSTER, 4 * CLUSTER, 40 * CLUSTER, 50 * CLUSTER, 600 * MIB)
    s.sync = bench.io(s.dm, flags=os.O_DSYNC)
    s.fails(41 * CLUSTER, 4096, s.sync)
    s.model.write(41 * CLUSTER, b"f" * 4096)
    s.same(41 * CLUSTER)
    for _ in range(2):
        s.no_sync()
    s.holds(events, 1)
    s.good(events)
    for at in (4, 40, 41):
        expect(s.image.state(at * CLUSTER) == "data", f"a flush succeeded, but the entry of cluster {at} is not there")
    s.write(600 * MIB, 512)
    s.sync.write(42 * CLUSTER, b"y" * 4096)
    s.model.write(42 * CLUSTER, b"y" * 4096)
    s.disk.fsync()
    s.same(0, 4 * CLUSTER, 40 * CLUSTER, 41 * CLUSTER, 42 * CLUSTER, 600 * MIB)
    s.finish()


@test("a metadata device that is dead for a while: the timer's commit notices, and tries again until it can")
def timer(bench):
    s = Failing(bench)
    s.meta.bad()
    events = s.dm.events()
    s.write(4 * CLUSTER, 512, b"t")
    wait_for("an event", 60, lambda: s.dm.events() > events)
    s.holds(events, 1)
    s.meta.good()
    wait_for("all is written", 60, lambda: not s.dm.status().unwritten)
    expect(s.image.state(4 * CLUSTER) == "data", "nothing is unwritten, but the entry is not there")
    expect(s.dm.events() == events + 1, f"{s.dm.events() - events} events")
    s.finish()


@test("a metadata device that is dead for a while: suspend and resume go on with what is not written")
def suspend(bench):
    s = Failing(bench)
    s.meta.bad()
    events = s.dm.events()
    s.write(90 * CLUSTER, 512, b"t")
    for _ in range(2):
        s.dm.suspend()
        s.holds(events, 1)
        # It does not look at the disk.
        s.dm.resume()
        s.holds(events, 1)
        s.same(90 * CLUSTER)
    s.write(91 * CLUSTER, 512, b"u")
    s.dm.suspend()
    s.meta.good()
    s.dm.resume()
    s.good(events)
    s.same(0, 90 * CLUSTER, 91 * CLUSTER)
    s.finish()


@test("L2 read errors: EIO, and tried again the next time")
def l2_reads(bench):
    s = Failing(bench)
    s.write(520 * MIB, 4096)
    s.disk.fsync()
    s.dm.cycle()
    s.same(0)
    events = s.dm.events()
    table = s.image.l2_table(520 * MIB)
    s.meta.bad(table, CLUSTER)
    faults = []

    def reader():
        try:
            s.disk.read(520 * MIB, 4096)
            faults.append("a read succeeded")
        except OSError as e:
            if e.errno != errno.EIO:
                faults.append(f"errno {e.errno}")
    threads = [threading.Thread(target=reader) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    expect(not faults, f"{faults}")
    s.fails(520 * MIB, 4096)
    s.fails(521 * MIB + 512, 512)
    with fails_with(errno.EIO):
        s.disk.read(512 * MIB - 4096, 8192)
    # Another table, in core or not.
    s.same(0, 4 * CLUSTER, 1100 * MIB)
    s.write(4 * CLUSTER, 512)
    expect(s.dm.mode() == "rw", f"{s.dm.status()}")
    expect(s.dm.events() == events, "an event was raised, but the mode has not changed")
    s.meta.good()
    s.same(520 * MIB, 521 * MIB)
    s.write(521 * MIB + 512, 512)
    s.disk.fsync()
    s.finish()


@test("refcount read errors: EIO for what needs a new L2 table, and tried again the next time")
def refcount_reads(bench):
    s = Failing(bench)
    s.dm.cycle()
    s.meta.bad(s.image.u64(s.image.reftable_pos(0)), CLUSTER)
    s.fails(600 * MIB, 512)
    s.write(4 * CLUSTER, 512)
    s.same(0, 4 * CLUSTER, 600 * MIB)
    s.disk.fsync()
    expect(s.dm.mode() == "rw", f"{s.dm.status()}")
    s.meta.good()
    s.write(600 * MIB, 512)
    s.disk.fsync()
    s.finish()


@test("header or L1 unreadable: no constructor, no resume; then it works again")
def l1_reads(bench):
    s = Failing(bench)
    line = s.dm.table()
    s.dm.suspend()
    s.meta.bad(s.image.get("l1_table_offset"), CLUSTER)
    with fails_with(errno.EIO):
        s.dm.resume()
    s.meta.good()
    s.dm.resume()
    s.same(0, CLUSTER, 4 * CLUSTER)
    s.write(4 * CLUSTER, 512)
    s.close()
    s.meta.bad(0, 4096)
    log = bench.add(KernelLog())
    try:
        bench.add(Dm("second", line))
    except Failure:
        pass
    else:
        raise Failure("a table was accepted whose header cannot be read")
    expect(log.lines("qcow2: .*header"), "the log does not tell of the header")
    s.meta.good()
    s.image.check()
    s.image.compare(s.model)


@test("backing read errors: what needs the backing device fails, all else goes on")
def backing_reads(bench):
    path = bench.file("backing", 64 * CLUSTER)
    with open(path, "wb") as f:
        f.write(os.urandom(64 * CLUSTER))
    s = Failing(bench, size=128 * CLUSTER, backing=path)
    with open(path, "rb") as f:
        s.model.write(2 * CLUSTER, f.read()[2 * CLUSTER:])
    s.same(2 * CLUSTER, 70 * CLUSTER)
    s.backing.bad()
    for at in (4 * CLUSTER, 63 * CLUSTER):
        with fails_with(errno.EIO):
            s.disk.read(at, 512)
        # What it does not cover cannot be copied.
        s.fails(at + 512, 512)
        s.fails(at - 512, 1024)
    s.same(0, CLUSTER, 64 * CLUSTER, 100 * CLUSTER)
    s.write(10 * CLUSTER, 2 * CLUSTER, b"w")
    s.write(90 * CLUSTER + 512, 512, b"p")
    s.write(CLUSTER + 512, 512, b"o")
    s.disk.discard(20 * CLUSTER, CLUSTER)
    s.model.write(20 * CLUSTER, bytes(CLUSTER))
    s.disk.fsync()
    s.same(0, CLUSTER, 10 * CLUSTER, 11 * CLUSTER, 20 * CLUSTER, 90 * CLUSTER)
    expect(s.dm.mode() == "rw", f"{s.dm.status()}")
    s.backing.good()
    s.same(*(i * CLUSTER for i in range(128)))
    s.write(4 * CLUSTER + 512, 512, b"p")
    s.write(63 * CLUSTER + 512, CLUSTER, b"q")
    s.same(3 * CLUSTER, 4 * CLUSTER, 62 * CLUSTER, 63 * CLUSTER, 64 * CLUSTER)
    s.finish()


def remove_failed(bench, how):
    s = Failing(bench)
    s.write(600 * MIB, 512)
    s.disk.fsync()
    getattr(s.meta, how)()
    places = [i * CLUSTER + 512 for i in range(4, 40)] + [600 * MIB + CLUSTER]
    s.disk.write(places[0], b"l" * 512)
    for at in places[1:]:
        # The commit of a timer may have failed by now, and then there are no more of these.
        try:
            s.disk.write(at, b"l" * 512)
        except OSError as e:
            expect(e.errno == errno.EIO and s.dm.mode() == "fail", f"{e}: {s.dm.status()}")
            break
    s.close()
    s.meta.good()
    s.image.check(leaks=True)
    dm = s.image.open(meta=s.meta.path, data=s.data.path)
    disk = bench.io(dm)
    same(disk.read(0, 2 * CLUSTER), b"a" * 2 * CLUSTER)
    for i in range(4, 40):
        got = disk.read(i * CLUSTER, 2048)
        expect(got in (bytes(2048), bytes(512) + b"l" * 512 + bytes(1024)),
               f"cluster {i}: neither the old content nor the new one")


for _kind, _how in (*LOST, ("all", "bad")):
    test(f"a failed device can be removed, with changes in core that are lost ({_kind} errors)", _how)(remove_failed)


if __name__ == "__main__":
    main()
