#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""A device that has lost what was in its cache tells so once: with an error of a flush, or
of a FUA write, and maybe to somebody else than the commit. No commit after that may call
anything durable. What only looks like it has lost nothing.
"""
import errno
import mmap
import os
import time

from qcow2test import Failure, Task, expect, fails_with, main, same, test, wait_for
from served import HANG
from faultrig import Aio, Lost


def fail_fua(s, place, error, same_unit=False):
    """A FUA write fails while a first write waits for its commit: one of that unit, or
    one of another table, which is on stable storage."""
    for _ in range(100):
        s.first_write()
        s.fail(place, error)
        with fails_with(error):
            s.sync.write(s.NEW * s.unit if same_unit else s.rig.cover, b"b" * s.unit)
        s.script.rest()
        status = s.dm.status()
        if status.dirty or status.mode == "fail":
            return
        # The timer's commit has been here before.
        s.NEW += 1
    raise Failure("the timer's commit was always there first")


def lost_with_fua(bench, place, error, options):
    s = Lost(bench, **options)
    fail_fua(s, place, error)
    s.finish()


def kept_with_fua(bench, place, error, options, same_unit):
    s = Lost(bench, **options)
    fail_fua(s, place, error, same_unit)
    expect(s.dm.mode() == "rw", f"{s.dm.status()}")
    s.disk.fsync()
    expect(s.dm.mode() == "rw" and not s.dm.status().unwritten, f"{s.dm.status()}")
    with open(s.rig.image.path, "wb") as f:
        f.write(s.rig.meta.store)
    expect(s.rig.image.state(s.NEW * s.unit) == "data", "a flush has succeeded, but the entry is not there")
    same(s.disk.read(s.NEW * s.unit, s.unit), b"a" * s.unit)
    s.close(leaks=False)


def nothing_lost(bench):
    s = Lost(bench, fua=False)
    held, aio = s.rig.data.held, bench.add(Aio(s.disk.fd, 1200))
    buffer = mmap.mmap(-1, 512)
    for n in range(50):
        s.first_write()
        s.script.begin(None, None)
        s.script.hold = lambda request: s.script.name(request) == "write data"
        # More than the device and its scheduler take at a time
        rest = Task(aio.submit, [(aio.WRITE, s.rig.cover, 512, 0)] * 400)
        wait_for("the device is busy", 60, lambda: len(held) > 100)
        time.sleep(0.3)
        with fails_with(errno.EAGAIN):
            os.pwritev(s.disk.fd, [buffer], s.rig.cover + 512, os.RWF_DSYNC | 8)   # RWF_NOWAIT
        dirty = s.dm.status().dirty
        s.script.hold = None
        s.rig.data.release()
        rest.finish(HANG)
        aio.all(range(400 * n, 400 * (n + 1)))
        s.script.rest()
        s.disk.fsync()
        expect(s.dm.mode() == "rw", f"{s.dm.status()}")
        if dirty:
            break
        s.NEW += 1
    expect(dirty, "the timer's commit was always there first")


# What fails of a FUA write that the block layer makes of a write and a flush, as the
# device has none; and the error
NO_FUA, KINDS = {"fua": False}, {"fused": True}
LOST = (("write data", errno.EIO, NO_FUA, "the write"),
        ("flush data", errno.EIO, NO_FUA, "the flush"),
        ("write data", errno.ETIMEDOUT, KINDS, "it took too long"),
        ("write data", errno.ENOLINK, KINDS, "no path to the device"))
KEPT = ((errno.EIO, {}, False, "the device has FUA writes"),
        (errno.EIO, NO_FUA, True, "nor was it passed on as one"),
        (errno.ENODATA, KINDS, False, "medium error"),
        (errno.ENOSPC, KINDS, False, "no space"),
        (errno.EILSEQ, KINDS, False, "protection error"),
        (errno.EOPNOTSUPP, KINDS, False, "not supported"),
        (errno.EAGAIN, KINDS, False, "it would have had to wait"))


def lost_in_commit(bench):
    s = Lost(bench)
    s.hold("flush data")
    first = Task(s.disk.fsync)
    wait_for("a flush is held", 60, lambda: s.rig.data.held)
    s.script.hold = None
    s.first_write()
    second = Task(s.disk.fsync)
    # The flush of the commit has to wait until the first one has ended.
    time.sleep(0.5)
    s.rig.data.release(fail=True)
    for task in (first, second):
        with fails_with(errno.EIO):
            task.finish(HANG)
    s.finish()


def lost_in_first_write(bench):
    s = Lost(bench)
    s.hold("write data")
    write = Task(s.first_write)
    wait_for("a first write is held", 60, lambda: s.rig.data.held)
    s.script.hold = None
    s.fail("flush data")
    with fails_with(errno.EIO):
        s.disk.fsync()
    s.rig.data.release()
    write.finish(HANG)
    s.finish()


for _place, _error, _options, _text in LOST:
    test(f"a FUA write that fails may have been a flush that failed, no commit after it: {_text}",
         _place, _error, _options)(lost_with_fua)
for _error, _options, _same, _text in KEPT:
    test(f"a FUA write that fails has lost nothing: {_text}", "write data", _error, _options, _same)(kept_with_fua)
test("a FUA write that must not wait, and would have to, has lost nothing")(nothing_lost)
test("a flush that fails while a commit waits for its own: the commit fails")(lost_in_commit)
test("a flush that fails while a first write is under way: no commit after it")(lost_in_first_write)


if __name__ == "__main__":
    main()
