#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Requests that others wait for: one is held back that hundreds depend on, then it goes on,
or fails. The devices below are served by this process (faultrig.py).
"""
import collections
import errno
import time

from qcow2test import Dm, Task, expect, main, same, test, wait_for
from served import HANG
from faultrig import Aio, Lost, Rig


def waiting(bench, what, fail):
    """Hold one request back that hundreds depend on; then let it go on, or fail."""
    rig = Rig(bench)
    unit, script = rig.unit, rig.script
    rig.reset()
    dm = bench.add(Dm("q", rig.line))
    disk = bench.io(dm)
    aio = bench.add(Aio(disk.fd, 512))
    place = {"miss": "read L2 table", "busy": "write data", "commit": "write L2 table",
             "flush": "flush metadata"}[what]
    if what != "miss":
        disk.read(0, unit)
    held = []

    def hold(request):
        if rig.what(request, [(0, rig.size)]) != place or held:
            return False
        held.append(request)
        return True
    script.begin(None, None)
    script.hold = hold
    write, read, dsync = aio.WRITE, aio.READ, aio.DSYNC
    first = aio.submit([(write, 20 * unit + 512, 512, dsync if what in ("commit", "flush") else 0)])
    wait_for(f"{place} is held", 60, lambda: held)
    commits, events = dm.status().commits, dm.events()
    if what == "miss":
        rest = [(read, n % 8 * unit, unit, 0) for n in range(200)] + \
               [(write, (21 + n) * unit + 512, 512, 0) for n in range(200)]
    elif what == "busy":
        rest = [(write, 20 * unit + n % 4 * 512, 512, 0) for n in range(400)]
    else:
        rest = [(write, (21 + n % 200) * unit + 512 * (n // 200), 512, dsync) for n in range(400)]
    rest = aio.submit(rest)
    # A read of a unit that is busy does not wait, nor does one while a commit is under way.
    if what != "miss":
        same(disk.read(19 * unit, 512), bytes(512))
        same(disk.read(20 * unit, 512), bytes(512))
    if what in ("commit", "flush"):
        # 401 of them, of which 201 fill the rest of their units: all wait for a commit then.
        wait_for("all is written", HANG, lambda: [r.device + r.op for r in script.trace].count("datawrite") >= 401)
    time.sleep(0.3)
    early = [n for n in [*first, *rest] if n in aio.reap()]
    expect(not early, f"{len(early)} requests did not wait")
    reads = [r for r in script.trace if rig.what(r, ()) == "read L2 table"]
    # A commit need not read a block of which all is known.
    expect(len(reads) == (what == "miss"), f"{len(reads)} reads of the L2 table while they wait")
    rig.meta.release(fail)
    rig.data.release(fail)
    results = aio.all([*first, *rest])
    bad = [r for r in results if r < 0]
    if not fail:
        expect(not bad, f"{len(bad)} failed: {bad[:3]}")
    elif what in ("busy", "commit"):
        # In a commit it is the one whose entry was not written: that of the others is.
        expect(results[0] == -errno.EIO and len(bad) == 1, f"{len(bad)} failed, the first: {results[0]}")
    else:
        expect(set(results) == {-errno.EIO}, f"{len(bad)} of {len(results)} failed: {collections.Counter(results)}")
    if what == "miss":
        # And one for each commit, but for those that find nothing to do
        disk.fsync()
        commits = dm.status().commits - commits
        reads = [r for r in script.trace if rig.what(r, ()) == "read L2 table" and r.offset == held[0].offset]
        expect(len(reads) <= 1 + commits, f"{len(reads)} reads of the L2 table for all of them, and {commits} commits")
    if what in ("commit", "flush") and not fail:
        # The next one serves all that wait when it begins. How many of them do is a question
        # of the machine's pace: some may have to be given to the target yet, and come late.
        commits = dm.status().commits - commits
        expect(commits <= len(rest) // 10, f"{commits} commits for {len(rest)} requests")
    mode = "fail" if what == "flush" and fail else "rw"
    expect(dm.mode() == mode, f"{dm.status()}")
    expect(dm.events() - events == (fail and what in ("commit", "flush")), f"{dm.events() - events} events")
    script.rest()
    if mode == "rw":
        disk.fsync()
        expect(not dm.status().unwritten, f"{dm.status()}")
    # In the busy unit whoever came last is not known, but that it is one of them.
    got = disk.read(20 * unit, unit)
    if what == "busy":
        expect(all(len(set(got[i:i + 512])) == 1 and got[i] for i in range(0, unit, 512)), "a mix of two writes")
    elif results[0] > 0 or what == "commit":
        same(got, bytes(512) + b"\1" * 512 + bytes(unit - 1024), 20 * unit)
    else:
        same(got[:512], bytes(512), 20 * unit)
    bench.drop(aio)
    bench.drop(disk)
    bench.drop(dm)
    rig.check(leaks=mode == "fail")


def slow_last_tries(bench):
    """Suspend tries a commit again, and the second read takes longer than the timer."""
    s = Lost(bench, odd=True)
    rig, script, unit, dm, disk = s.rig, s.script, s.unit, s.dm, s.disk
    reads = []

    def hold(request):
        if script.name(request) != "read L2 table":
            return False
        reads.append(request)
        return len(reads) == 2
    for at in range(20 * unit, 120 * unit, unit):
        reads.clear()
        script.begin(("read L2 table", 0), "once")
        script.hold = hold
        disk.write(at, b"a" * unit)
        suspend = Task(dm.suspend)
        wait_for("a second try is made", 60, lambda: rig.meta.held or not suspend.is_alive())
        if rig.meta.held:
            break
        # The timer's commits were there before.
        suspend.finish()
        script.rest()
        dm.resume()
        disk.read(0, unit)
    # More than the timer's second
    time.sleep(1.5)
    rig.meta.release()
    suspend.finish(HANG)
    script.rest()
    dm.resume()
    expect(len(reads) > 1 and dm.mode() == "rw", f"{len(reads)} reads, {dm.status()}")
    same(disk.read(at, unit), b"a" * unit, at)
    s.close(leaks=False)


for _what, _text in (("miss", "a miss"), ("busy", "a busy unit"), ("commit", "a commit"), ("flush", "a commit's flush")):
    for _fail in (False, True):
        test(f"hundreds wait for {_text} that {'fails' if _fail else 'is slow'}", _what, _fail)(waiting)
test("suspend tries a commit again, and the second read takes longer than the timer")(slow_last_tries)


if __name__ == "__main__":
    main()
