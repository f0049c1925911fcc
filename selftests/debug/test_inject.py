#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Allocations that fail, and requests that fail on the devices below.

Needs a kernel with failslab, fail_page_alloc and fail_make_request, whose filter
by call stack keeps the faults to what the module itself asks for.

Environment: SEED (printed, to repeat a run), LOOPS (images for each kind of fault).
"""
import collections
import contextlib
import errno
import fcntl
import os
import random
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "../dm-qcow2"))

# pylint: disable=wrong-import-position
import qcow2test                                                              # noqa: E402
from qcow2test import KIB, MIB, Dm, Failure, expect, main, note, run, some, test  # noqa: E402
from test_race import IMAGES, race                                           # noqa: E402

SEED = int(os.environ.get("SEED", time.time_ns() // 1000 % 1000000))
LOOPS = int(os.environ.get("LOOPS", 12))
DEBUG = "/sys/kernel/debug"
FAULTS = ("failslab", "fail_page_alloc", "fail_make_request")
MANY = 1000000
# Faults of each kind, of all images together
UNDER_LOAD = collections.Counter()


def put(path, value):
    with open(path, "w", encoding="ascii") as f:
        f.write(str(value))


def get(path):
    with open(path, encoding="ascii") as f:
        return f.read().strip()


def quiet():
    """No backtrace for each fault; and no allocation is too small or may wait too
    long to fail."""
    for fault in FAULTS:
        put(f"{DEBUG}/{fault}/verbose", 0)
        put(f"{DEBUG}/{fault}/probability", 0)
    for fault in FAULTS[:2]:
        put(f"{DEBUG}/{fault}/ignore-gfp-wait", "N")
    put(f"{DEBUG}/fail_page_alloc/min-order", 0)


def module_range():
    """Where the module's code is in memory."""
    with open("/proc/modules", encoding="ascii") as f:
        words = next(line.split() for line in f if line.startswith("dm_qcow2 "))
    start = int(words[5], 16)
    expect(start, "the kernel hides addresses")
    return start, start + int(words[1])


@contextlib.contextmanager
def faults(kind, probability, module=True, seen=None):
    """While the body runs. Fails if there was not a single one; but with seen, a
    counter, only adds to that."""
    base = f"{DEBUG}/{kind}"
    start, end = module_range() if module else (0, (1 << 64) - 1)
    put(f"{base}/require-start", start)
    put(f"{base}/require-end", end)
    put(f"{base}/stacktrace-depth", 32)
    put(f"{base}/times", MANY)
    put(f"{base}/probability", probability)
    try:
        yield
    finally:
        put(f"{base}/probability", 0)
        done = MANY - int(get(f"{base}/times"))
        note(f"{kind}: {done} faults")
    if seen is None:
        expect(done, f"{kind}: nothing has failed")
    else:
        seen[kind] += done


class Nth:
    """The n-th thing that can fail on behalf of this thread does."""

    def __init__(self):
        self.fd = os.open("/proc/thread-self/fail-nth", os.O_RDWR | os.O_CLOEXEC)

    def set(self, n):
        os.pwrite(self.fd, b"%d" % n, 0)

    def fired(self):
        """Has it? Also disarms it."""
        left = int(os.pread(self.fd, 16, 0))
        self.set(0)
        return not left

    def close(self):
        os.close(self.fd)


def each_allocation(nth, action, undo):
    """Let the allocations and requests of a system call fail, one after the other,
    until there are no more. The call fails cleanly or succeeds, and can be repeated."""
    failed = tried = n = 0
    while n < 5000:
        # The many at the end fill the reserves of pools.
        n += 1 + n // 30
        tried += 1
        nth.set(n)
        error = None
        try:
            action()
        except OSError as e:
            error = e.errno
        fired = nth.fired()
        if error:
            expect(fired, f"fails without a fault: {errno.errorcode[error]}")
            expect(error in (errno.ENOMEM, errno.EIO, errno.EAGAIN, errno.ENXIO),
                   f"fault {n}: {errno.errorcode[error]}")
            failed += 1
            action()
        undo()
        if not fired:
            return n, tried, failed
    raise Failure("no end of it")


class Control:
    """One command for a device, with everything but the system call done before."""

    def __init__(self, name, command, table="", flags=0):
        self.fd = os.open("/dev/mapper/control", os.O_RDWR | os.O_CLOEXEC)
        self.number = 3 << 30 | qcow2test.DM_IOCTL.size << 16 | 0xFD << 8 | command
        self.request = bytes(qcow2test.dm_request(name, table, flags))

    def __call__(self):
        fcntl.ioctl(self.fd, self.number, bytearray(self.request))

    def close(self):
        os.close(self.fd)


KINDS = {
    "plain": {},
    "backing device": {"backing": True},
    "extended L2": {"extended": True},
}


def make(bench, kind, name="image"):
    """An image with something in it, not mapped yet, and the line for it."""
    size = 4 * MIB
    backing = bench.file("backing", size) if kind.get("backing") else None
    image = bench.image(size, name, cluster=16 * KIB, extended=kind.get("extended", False), backing=backing)
    image.qemu_io("write -q -P 1 0 64k")
    image.trim()
    image.attach()
    features = ("backing_dev", image.backing_loop.path) if backing else ()
    return image, image.line(image.meta_loop.path, image.data_loop.path, *features)


def setting_up(bench, kind):
    # The kernel prints a backtrace if it cannot make a slab cache. Those of bio sets
    # are there as long as another device has one of the same kind.
    make(bench, {}, "other")[0].open(name="other")
    image, line = make(bench, kind)
    dm = bench.add(Dm("q"))
    nth = bench.add(Nth())

    def command(number, table="", flags=0):
        return bench.add(Control(dm.name, number, table, flags))

    load, clear = command(qcow2test.DM_TABLE_LOAD, line), command(qcow2test.DM_TABLE_CLEAR)
    resume = command(qcow2test.DM_DEV_SUSPEND)
    suspend = command(qcow2test.DM_DEV_SUSPEND, flags=qcow2test.DM_SUSPEND_FLAG)

    note("load: about {} places, {} tried, {} fatal".format(*each_allocation(nth, load, clear)))
    load()
    resume()
    disk = bench.io(dm)
    for _ in range(2):
        disk.write(0, b"x" * 65536)
        disk.write(MIB, b"y" * 512)
        note("suspend: about {} places, {} tried, {} fatal".format(*each_allocation(nth, suspend, resume)))
        suspend()
        note("resume: about {} places, {} tried, {} fatal".format(*each_allocation(nth, resume, suspend)))
        resume()
        expect(dm.mode() == "rw", f"{dm.status()}")
        expect(disk.read(0, 65536) == b"x" * 65536 and disk.read(MIB, 1024) == b"y" * 512 + bytes(512), "content")
        disk.discard(MIB, 64 * KIB)
        disk.fsync()
    bench.drop(disk)
    bench.drop(dm)
    image.check(leaks=True)


def io_without_memory(bench, kind, fault, seed):
    # What a new table allocates may fail, and has a test of its own.
    race(bench, kind, seed, ("drop", "status"), faults(fault, 30, seen=UNDER_LOAD))


def enough_without_memory(_bench, fault):
    # Not each image has one: a short run of one that is slow, or raw, may need nothing.
    expect(UNDER_LOAD[fault] >= len(IMAGES), f"{fault}: {UNDER_LOAD[fault]} faults in all")


class Maybe:
    """What sectors of an image can hold, while some requests fail."""

    def __init__(self, size, backing):
        # Of each sector: what it reads as now; what may be there after a reopen
        self.now = [{backing} for _ in range(size // 512)]
        self.later = [{backing} for _ in range(size // 512)]

    def written(self, first, values, ok):
        for n, value in enumerate(values, first):
            self.now[n] = {value} if ok else self.now[n] | {value}
            self.later[n] = self.later[n] | {value}

    def flushed(self):
        self.later = [set(values) for values in self.now]

    @staticmethod
    def check(disk, allowed, what):
        data = disk.read(0, len(allowed) * 512)
        for n, values in enumerate(allowed):
            got = data[n * 512:(n + 1) * 512]
            expect(got == got[:8] * 64, f"{what}: sector {n} is torn")
            got = int.from_bytes(got[:8], "little")
            expect(got in values, f"{what}: sector {n} is {got:#x}, may be {[hex(v) for v in values]}")


def content(value, sectors=1):
    return value.to_bytes(8, "little") * 64 * sectors


BACKING = 0xbb


def failing_requests(bench, kind, where, seed):
    rng = random.Random(seed)
    size = 2 * MIB
    backing = None
    if kind.get("backing"):
        backing = bench.path("backing")
        with open(backing, "wb") as f:
            f.write(content(BACKING, size // 512))
    image = bench.image(size, cluster=rng.choice((4, 16, 64)) * KIB if not kind.get("extended") else 16 * KIB,
                        extended=kind.get("extended", False), backing=backing)
    image.poison(seed=seed)
    dm = image.open()
    disk, sync = bench.io(dm), bench.io(dm, flags=os.O_DSYNC)
    maybe = Maybe(size, BACKING if backing else 0)
    loop = {"data": image.data_loop, "metadata": image.meta_loop, "backing": image.backing_loop}[where]
    switch = f"{qcow2test.sysfs(loop.path)}/make-it-fail"
    bad = good = 0

    def attempt(function, *args):
        nonlocal bad, good
        try:
            function(*args)
        except OSError as e:
            expect(e.errno in (errno.EIO, errno.ENOSPC), f"{errno.errorcode[e.errno]}")
            bad += 1
            return False
        good += 1
        return True

    put(switch, 1)
    try:
        with faults("fail_make_request", rng.choice((2, 10, 30)), module=False,
                    seen=collections.Counter()):
            for n in range(1, 120):
                way = rng.randrange(20)
                length = rng.choice((1, 1, 3, 8, 32, 40, 128))
                first = rng.randrange(size // 512 - length)
                if way < 3:
                    if attempt(disk.fsync):
                        maybe.flushed()
                    continue
                if way < 6:
                    attempt(disk.read, first * 512, length * 512)
                    continue
                if way < 8:
                    # Whole units become zero, or nothing does.
                    per = image.unit // 512
                    a, b = -(-first // per) * per, (first + length) // per * per
                    ok = attempt(disk.discard, first * 512, length * 512)
                    if b > a:
                        maybe.written(a, [0] * (b - a), ok)
                    continue
                fua = way < 11
                ok = attempt((sync if fua else disk).write, first * 512,
                             content(n, length))
                maybe.written(first, [n] * length, ok)
                if ok and fua:
                    for s in range(first, first + length):
                        maybe.later[s] = set(maybe.now[s])
            # Slow changes are written now, or not at all.
            attempt(disk.fsync)
    finally:
        put(switch, 0)
    mode = dm.mode()
    expect(mode in ("rw", "fail"), f"{dm.status()}")
    Maybe.check(disk, maybe.now, "in core")
    if mode == "rw":
        disk.fsync()
        maybe.flushed()
    else:
        expect(not attempt(disk.fsync), "a flush succeeds in mode fail")
    bench.drop(disk)
    bench.drop(sync)
    bench.drop(dm)
    image.check(leaks=True)
    dm = image.open()
    expect(dm.mode() == "rw", f"{dm.status()}")
    disk = bench.io(dm)
    Maybe.check(disk, maybe.later, f"after mode {mode}")
    bench.drop(disk)
    bench.drop(dm)
    image.detach()
    return mode, good, bad


def failing_device(bench, kind, where, seed):
    modes, good, bad = [], 0, 0
    for n in range(LOOPS):
        try:
            mode, g, b = failing_requests(bench, kind, where, seed + n)
        except Failure as e:
            raise Failure(f"seed {seed + n}: {e}") from e
        modes.append(mode)
        good += g
        bad += b
    # There are few metadata requests: not each image has one that fails.
    expect(bad, "no request has failed")
    note(f"{good} requests succeeded, {bad} failed; modes at the end: rw {modes.count('rw')}, "
         f"fail {modes.count('fail')}")


def register():
    for name, kind in KINDS.items():
        test(f"setting up: {name}", kind)(setting_up)
    for n, (name, kind) in some(enumerate(IMAGES.items()), 5):
        for fault in FAULTS[:2]:
            test(f"{fault} under load: {name}", kind, fault, SEED + n)(io_without_memory)
    for fault in FAULTS[:2]:
        test(f"{fault} under load: has failed often enough", fault)(enough_without_memory)
    for n, (name, kind) in enumerate(KINDS.items()):
        for where in ("data", "metadata") + (("backing",) if kind.get("backing") else ()):
            test(f"failing requests to the {where} device: {name}", kind, where,
                 SEED + 100000 * n)(failing_device)


if __name__ == "__main__":
    if not os.path.isdir(f"{DEBUG}/{FAULTS[0]}"):
        print("TAP version 13\n1..0 # SKIP no fault injection in this kernel")
        sys.exit(qcow2test.KSFT_SKIP)
    note(f"SEED={SEED} LOOPS={LOOPS}")
    quiet()
    register()
    main()
