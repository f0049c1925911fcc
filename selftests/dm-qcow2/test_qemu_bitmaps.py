#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Dirty bitmaps that the device and QEMU keep by turns: what they say at the end is what
both have changed. All of it with the QEMU that is installed, and with that of Debian 13,
which selftests/vm/get-qemu fetches.

Environment: SEED (printed, to repeat a run), REQUESTS (each time), CACHE (where get-qemu
puts it).
"""
import errno
import glob
import json
import os
import random
import shutil
import signal
import subprocess
import threading
import time

import qcow2test
from bitmaps import AUTO, IN_USE, bitmaps
from qcow2image import OFFSET_MASK, Qcow2
from qcow2test import KIB, MIB, Failure, Io, Lower, Task, expect, fails_with, main, note, run, some, test, wait_for
from test_bitmaps import Backup, Requests, covers, everything, exact
from test_bitmaps import setup as allocated
from test_checkpoint import TOOL, Opened

qcow2test.forget_tests()

SEED = int(os.environ.get("SEED", time.time_ns() // 1000 % 1000000))
REQUESTS = int(os.environ.get("REQUESTS", 12))
CACHE = os.environ.get("CACHE") or os.path.join(
    os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "dm-qcow2")

# Cluster size, size, granularities of the bitmaps, and other options
KINDS = [
    (64 * KIB, 9 * MIB + 512, (64 * KIB, 4 * KIB), {}),
    (4 * KIB, 5 * MIB + 1536, (512, 1 << 31), {}),
    (64 * KIB, 9 * MIB + 512, (4 * KIB, 64 * KIB), {"raw": True}),
    (16 * KIB, 7 * MIB + 3 * KIB, (32 * KIB,), {"extended": True}),
    (2 * MIB, 13 * MIB, (1 * MIB,), {"backing": True}),
    (512, 2 * MIB, (4 * KIB,), {}),
]


def words(kind):
    cluster, size, granularities, options = kind
    return f"clusters of {cluster}, {size} bytes, granularities {', '.join(map(str, granularities))}" + "".join(
        f", {name}" for name in options)


class Qemu:
    """The programs of one version"""

    def __init__(self, name, pattern=None):
        self.name, self.pattern = name, pattern

    def prefix(self):
        if not self.pattern:
            return []
        found = sorted(glob.glob(f"{CACHE}/{self.pattern}"))
        if not found:
            raise Failure(f"there is no {CACHE}/{self.pattern}; run selftests/vm/get-qemu "
                          "(CACHE= must not be in /tmp, /run or /dev, which the test VM has its own of)")
        return [found[-1]]

    def run(self, program, *argv, **options):
        return run(*self.prefix(), program, *argv, **options)

    def img(self, command, *argv, **options):
        return self.run("qemu-img", command, *argv, **options)

    def io(self, commands, *where):
        self.run("qemu-io", "-d", "unmap", *(word for c in commands for word in ("-c", c)), *where)

    def check(self, path, leaks=False):
        status, out = self.img("check", "-f", "qcow2", path, ok=False)
        expect(status == 0 or leaks and status == 3, f"qemu-img check: status {status}: {out}")

    def bitmaps(self, path):
        """As qemu-img info has them, by name"""
        info = json.loads(self.img("info", "--output=json", path))
        return {b["name"]: b for b in info["format-specific"]["data"].get("bitmaps", [])}


class Served:
    """An image that qemu-nbd has open. opened: a driver's options, for what is not to be
    found by the image's own."""

    def __init__(self, bench, qemu, path, *names, readonly=True, opened=None):
        self.qemu, self.socket, pid = qemu, bench.path("nbd"), bench.path("nbd.pid")
        mode = ["-r"] if readonly else ["--discard=unmap"]
        what = ["--image-opts", opened] if opened else ["-f", "qcow2", path]
        argv = [*qemu.prefix(), "qemu-nbd", "-t", "-k", self.socket, "--pid-file", pid, *mode,
                *(word for name in names for word in ("-B", name)), *what]
        self.log = bench.path("nbd.log")
        with open(self.log, "wb") as log:
            # pylint: disable-next=consider-using-with # close() ends it
            self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        bench.add(self)
        wait_for("qemu-nbd serves", 60, lambda: os.path.exists(pid) or self.process.poll() is not None)
        expect(self.process.poll() is None, f"qemu-nbd: {self.said()}")
        os.unlink(pid)

    def said(self):
        with open(self.log, encoding="utf-8", errors="replace") as f:
            return f.read().strip()

    def dirty(self, name):
        """Extents of a bitmap, (offset, length)"""
        out = self.qemu.img("map", "--output=json", "--image-opts",
                            f"driver=nbd,server.type=unix,server.path={self.socket},"
                            f"x-dirty-bitmap=qemu:dirty-bitmap:{name}")
        return dirty_extents(out)

    def io(self, commands):
        self.qemu.io(commands, "-f", "raw", f"nbd+unix:///?socket={self.socket}")

    def kill(self):
        self.process.kill()
        self.process.wait()

    def close(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(qcow2test.COMMAND_TIMEOUT)
        expect(status in (0, -signal.SIGKILL), f"qemu-nbd: status {status}: {self.said()}")


OLD = Qemu("QEMU that is installed")
NEW = Qemu("QEMU 10", "qemu/10.*/run")


def each(name, *args, all_cpus=False):
    """Decorator: a result for each QEMU"""
    def add(function):
        for qemu in (OLD, NEW):
            test(f"{qemu.name}: {name}", qemu, *args, all_cpus=all_cpus)(function)
        return function
    return add


def dirty_extents(text):
    """Of a map in JSON; neighbours are one, for qcow2setup tells those that read as zeros from
    those that do not."""
    found, at = [], 0
    for e in json.loads(text):
        expect(e["start"] == at and e["length"] > 0, f"extent {e} after {at}")
        at += e["length"]
        if e["data"]:
            continue
        if found and sum(found[-1]) == e["start"]:
            found[-1] = (found[-1][0], found[-1][1] + e["length"])
        else:
            found.append((e["start"], e["length"]))
    return found


def extents_of(bitmap):
    """The same, from what is on disk"""
    found, bits, size, n = [], bitmap.content(), bitmap.image.size, 0
    while bits >> n:
        n += (bits >> n & -(bits >> n)).bit_length() - 1
        rest = bits >> n
        length = (~rest & rest + 1).bit_length() - 1
        start = n * bitmap.granularity
        found.append((start, min(length * bitmap.granularity, size - start)))
        n += length
    return found


def tools_map(path, name):
    return dirty_extents(run(TOOL, "map", path, "--bitmap", name, "--json"))


def told(path, found, names):
    """What qcow2setup tells, and what is on disk"""
    return {name: (tools_map(path, name), extents_of(found[name])) for name in names}


def agree(served, expected):
    for name, (tools, want) in expected.items():
        qemus = served.dirty(name)
        expect(qemus == tools == want, f"{name}: QEMU says {qemus}, qcow2setup {tools}, and there is {want}")


def all_agree(bench, qemu, image, names):
    """QEMU likes the image, and tells of its bitmaps what they say. It does not serve what is not valid."""
    qemu.check(image.path)
    served = Served(bench, qemu, image.path, *names)
    agree(served, told(image.path, bitmaps(image), names))
    bench.drop(served)


def written(bench, image, *ranges):
    """By the device, which is open only for that"""
    dm = bench.add(Opened(image))
    disk = bench.io(dm)
    for at, length in ranges:
        disk.write(at, b"w" * length)
    bench.drop(disk)
    bench.drop(dm)


def some_requests(bench, image, dm, rng):
    """To a device, of all kinds. Returns the ranges."""
    disk = bench.io(dm)
    requests = Requests(image, disk, rng)
    for _ in range(REQUESTS):
        requests.one()
    bench.drop(disk)
    return requests.ranges


def made(bench, qemu, cluster, size, granularities, options):
    """An image with bitmaps b0, b1 ..., which this QEMU has added; and how to open it"""
    options, more = dict(options), []
    if options.pop("backing", False):
        options["backing"] = bench.file("backing", size)
        with open(options["backing"], "wb") as f:
            f.write(random.Random(SEED).randbytes(size))
        more = ["--backing-file", options["backing"]]
    image = bench.image(size, cluster=cluster, **options)
    names = [f"b{n}" for n in range(len(granularities))]
    for name, granularity in zip(names, granularities):
        qemu.img("bitmap", "--add", "-g", granularity, image.path, name)
    return image, names, more


def qemus_requests(image, rng, ranges, count=REQUESTS):
    """Commands of qemu-io; they are noted."""
    commands = []
    for _ in range(count):
        length = rng.choice((512, 4096, 4096, 64 * KIB, rng.randrange(1, 400) * 512))
        at = rng.randrange(image.size // 512) * 512
        length = min(length, image.size - at)
        ranges.append((at, length))
        kind = rng.choice((f"write -q -P {rng.randrange(256)}", f"write -q -P {rng.randrange(256)}",
                           "write -q -z", "write -q -z -u", "discard -q"))
        commands.append(f"{kind} {at} {length}")
    return commands


def in_turns(bench, qemu, kind):
    note(f"SEED={SEED}, {qemu.img('--version').splitlines()[0]}")
    rng = random.Random(SEED)
    image, names, more = made(bench, qemu, *kind)
    dm = bench.add(Opened(image, *more))
    disk = bench.io(dm)
    copies = [Backup(name, everything(disk, image.size)) for name in names]
    bench.drop(disk)
    ranges = some_requests(bench, image, dm, rng)
    bench.drop(dm)
    exact(image, names, ranges, "the device has been closed")
    qemu.io(qemus_requests(image, rng, ranges), "-f", "qcow2", image.path)
    exact(image, names, ranges, "QEMU has written")
    expected = told(image.path, bitmaps(image), names)
    served = Served(bench, qemu, image.path, *names, readonly=False)
    agree(served, expected)
    served.io(qemus_requests(image, rng, ranges))
    bench.drop(served)
    exact(image, names, ranges, "qemu-nbd has written")
    qemu.check(image.path)
    dm = bench.add(Opened(image, *more))
    ranges += some_requests(bench, image, dm, rng)
    run("dmsetup", "message", dm.name, 0, "bitmap_sync")
    disk = bench.io(dm)
    for copy in copies:
        copy.update(bitmaps(image)[copy.name], everything(disk, image.size), "at the end")
    bench.drop(disk)
    bench.drop(dm)
    exact(image, names, ranges, "at the end")
    qemu.check(image.path)


for _kind in some(KINDS, 3):
    each(f"in turns with the device: {words(_kind)}", _kind)(in_turns)


@each("bitmaps that qemu-img adds, merges, disables, clears and removes, and a disk that it resizes")
def commands(bench, qemu):
    image, _, _ = made(bench, qemu, 64 * KIB, 8 * MIB, (64 * KIB, 4 * KIB), {})
    fixed = [(0, 4096), (3 * MIB - 512, 1024)]
    written(bench, image, *fixed)
    qemu.img("bitmap", "--add", "--disable", "-g", "1M", "--merge", "b1", image.path, "all")
    qemu.img("bitmap", "--disable", image.path, "b0")
    qemu.img("bitmap", "--clear", image.path, "b1")
    qemu.img("bitmap", "--add", image.path, "new")
    written(bench, image, (5 * MIB, 512))
    exact(image, ["all", "b0"], fixed, "disabled")
    exact(image, ["b1", "new"], [(5 * MIB, 512)], "recording")
    qemu.img("resize", "-q", image.path, 80 * MIB)
    image.trim()
    written(bench, image, (79 * MIB, 4096))
    recent = [(5 * MIB, 512), (79 * MIB, 4096)]
    exact(image, ["all", "b0"], fixed, "disabled")
    exact(image, ["b1", "new"], recent, "recording")
    qemu.img("bitmap", "--enable", "--merge", "new", image.path, "b0")
    qemu.img("bitmap", "--remove", image.path, "new")
    written(bench, image, (20 * MIB, 1 * MIB))
    exact(image, ["all"], fixed, "disabled")
    exact(image, ["b1"], [*recent, (20 * MIB, 1 * MIB)], "recording")
    exact(image, ["b0"], [*fixed, *recent, (20 * MIB, 1 * MIB)], "enabled again")
    all_agree(bench, qemu, image, ["b0", "b1"])
    # The other way round: what qcow2setup does QEMU finds.
    ranges = extents_of(bitmaps(image)["b0"])
    for argv in (("add", "one", "--granularity", "32K"), ("disable", "b0"), ("merge", "one", "b0"), ("enable", "all"),
                 ("remove", "b0"), ("clear", "b1")):
        run(TOOL, "bitmap", argv[0], image.path, *argv[1:])
    qemu.check(image.path)
    flags = {name: b["flags"] for name, b in qemu.bitmaps(image.path).items()}
    expect(flags == {name: ["auto"] for name in ("all", "b1", "one")}, f"{flags}")
    qemu.io(["write -q 40M 512"], "-f", "qcow2", image.path)
    exact(image, ["all"], [*fixed, (40 * MIB, 512)], "QEMU has written")
    exact(image, ["one"], [*ranges, (40 * MIB, 512)], "QEMU has written")
    exact(image, ["b1"], [(40 * MIB, 512)], "QEMU has written")
    all_agree(bench, qemu, image, ["all", "b1", "one"])


@each("bitmaps whose parts have no cluster, for they are all clean or all dirty")
def no_clusters(bench, qemu):
    # b0 has three clusters of 16 MiB each.
    image, names, _ = made(bench, qemu, 4 * KIB, 48 * MIB, (512, 4 * KIB), {})

    def absent():
        return [not e & OFFSET_MASK for e in bitmaps(image)["b0"].clusters()]
    ranges = [(17 * MIB, 512)]
    qemu.io(["write -q 17M 512"], "-f", "qcow2", image.path)
    expect(absent() == [True, False, True], f"QEMU has stored {bitmaps(image)['b0'].clusters()}")
    for at in (40 * MIB, 1 * MIB):
        written(bench, image, (at, 512))
        ranges.append((at, 512))
        exact(image, names, ranges, "the device has been closed")
        expect(not any(absent()), "a part that has no cluster")
        # When it has been open for writing, QEMU stores all again.
        qemu.io(["write -q 17M 512"], "-f", "qcow2", image.path)
        expect(absent() == [at == 40 * MIB, False, False], f"QEMU has stored {bitmaps(image)['b0'].clusters()}")
        exact(image, names, ranges, "QEMU has closed it")
    # QEMU does not store this itself, but takes it.
    b = bitmaps(image)["b0"]
    image.set_refcount((b.clusters()[1] & OFFSET_MASK) // image.cluster, 0)
    image.set_u64(b.table + 8, 1)
    ranges.append((16 * MIB, 16 * MIB))
    exact(image, ["b0"], ranges, "the test is wrong")
    all_agree(bench, qemu, image, ["b0"])
    written(bench, image, (5 * MIB, 512))
    ranges.append((5 * MIB, 512))
    exact(image, ["b0"], ranges, "the device has been closed")
    expect(not any(absent()), "a part that has no cluster")
    all_agree(bench, qemu, image, names)


@each("QEMU is killed: its bitmaps are named, never used, and can be removed")
def killed(bench, qemu):
    image, _, _ = made(bench, qemu, 64 * KIB, 8 * MIB, (64 * KIB, 4 * KIB), {})
    qemu.img("bitmap", "--add", "--disable", image.path, "old")
    written(bench, image, (MIB, 4096))
    exact(image, ["b0", "b1"], [(MIB, 4096)], "the device has been closed")
    served = Served(bench, qemu, image.path, readonly=False)
    served.io(["write -q -P 1 2M 64k", "flush"])
    served.kill()
    bench.drop(served)
    names = {"b0", "b1", "old"}

    def lost(what, *more):
        found = {b["name"]: b for b in json.loads(run(TOOL, "bitmap", "list", what, "--json"))}
        expect({n for n, b in found.items() if b["inconsistent"] and not b["recording"] and "count" not in b} == names,
               f"{found}")
        for argv in (("map", what, "--bitmap", "b0", "--json"), *more):
            status, out = run(TOOL, *argv, ok=False)
            expect(status and "b0" in out and "inconsistent" in out, f"{argv}: status {status}: {out}")
        expect(all(bitmaps(image)[n].flags & IN_USE for n in names), "somebody says that they are valid")
    lost(image.path, ("bitmap", "clear", image.path, "b0"), ("bitmap", "enable", image.path, "b0"),
         ("bitmap", "merge", image.path, "b0", "old"),
         ("checkpoint", image.path, "--stop", "b0", "--start", "new"))
    # The device leaves them alone.
    before = {name: bitmaps(image)[name].content() for name in names}
    dm = bench.add(Opened(image))
    disk = bench.io(dm)
    disk.write(5 * MIB, bytes(4096))
    lost(dm.name)
    # One is removed live, the others later.
    dm.tool("bitmap remove", "b0")
    dm.tool("checkpoint", "--start", "b0")
    disk.write(6 * MIB, bytes(4096))
    bench.drop(disk)
    bench.drop(dm)
    exact(image, ["b0"], [(6 * MIB, 4096)], "the device has been closed")
    for name in ("b1", "old"):
        expect(bitmaps(image)[name].content() == before[name], f"{name} is not valid, and has changed")
        run(TOOL, "bitmap", "remove", image.path, name)
    # What QEMU could not give back any more
    run(TOOL, "check", image.path, "--repair", "leaks", ok=False)
    all_agree(bench, qemu, image, ["b0"])
    qemu.io(["write -q 7M 512"], "-f", "qcow2", image.path)
    exact(image, ["b0"], [(6 * MIB, 4096), (7 * MIB, 512)], "QEMU has written")


class Writers:
    """Threads that write to a device; what they have written is known at any time."""

    def __init__(self, bench, image, dm, rng):
        self.lock, self.done = threading.Lock(), []
        self.stopped, self.going = threading.Event(), threading.Event()
        self.going.set()
        self.tasks = [Task(self._write, image, dm, random.Random(rng.random())) for _ in range(2)]
        bench.add(self)

    def _write(self, image, dm, rng):
        disk = Io(dm.path)
        requests = Requests(image, disk, rng)
        while not self.stopped.is_set():
            self.going.wait()
            requests.one()
            with self.lock:
                self.done.append(requests.ranges[-1])
        disk.close()

    def now(self):
        with self.lock:
            return list(self.done)

    def some(self):
        before = len(self.now())
        wait_for("requests", 60, lambda: len(self.now()) > before + 5 or any(t.fault for t in self.tasks))

    def close(self):
        self.stopped.set()
        self.going.set()
        for task in self.tasks:
            task.join()
        for task in self.tasks:
            task.finish()


def copied(bench, image, number):
    return Qcow2(shutil.copyfile(image.path, bench.path(f"copy{number}")))


def taken(bench, qemu, copy, names, data):
    """QEMU takes the bitmaps of a copy as they are, and goes on recording in them."""
    opened = f"driver=qcow2,file.filename={copy.path},data-file.filename={data}"
    served = Served(bench, qemu, copy.path, *names, opened=f"{opened},read-only=on")
    agree(served, told(copy.path, bitmaps(copy), names))
    bench.drop(served)
    before = {name: bitmaps(copy)[name].content() for name in names}
    qemu.io(["write -q -P 1 64k 4k", "write -q -z 2M 100k"], "--image-opts", opened)
    for name in names:
        b = bitmaps(copy)[name]
        expect(b.flags == AUTO, f"{name}: flags {b.flags}")
        expect(b.content() == before[name] | b.granules([(64 * KIB, 4 * KIB), (2 * MIB, 100 * KIB)]),
               f"{name} is not what it was and what QEMU has written")
    qemu.check(copy.path)


@each("copies of the metadata of a live device whose data is raw, made while it writes", all_cpus=True)
def live_copies(bench, qemu):
    note(f"SEED={SEED}")
    image, names = allocated(bench, 64 * KIB, 32 * MIB, (64 * KIB, 512), {"raw": True})
    dm = image.open("bitmaps")
    writers = Writers(bench, image, dm, random.Random(SEED))
    for n in range(5):
        writers.some()
        ranges = writers.now()
        copy = copied(bench, image, n)
        covers(copy, names, ranges, f"copy {n}")
    writers.going.clear()
    taken(bench, qemu, copy, names, bench.file("other", image.size))
    bench.drop(writers)
    bench.drop(dm)


@each("the metadata as a power cut leaves it", all_cpus=True)
def power_cut(bench, qemu):
    note(f"SEED={SEED}")
    image, names = allocated(bench, 4 * KIB, 7 * MIB + 512, (64 * KIB, 512), {})
    image.attach()
    lower = Lower(bench, "meta", image.meta_loop.path)
    dm = image.open("bitmaps", meta=lower.path)
    writers = Writers(bench, image, dm, random.Random(SEED))
    for n in range(5):
        writers.some()
        lower.stop()
        ranges = writers.now()
        copy = copied(bench, image, n)
        lower.go()
        covers(copy, names, ranges, f"power cut {n}")
    writers.going.clear()
    qemu.check(copy.path, leaks=True)
    run(TOOL, "check", copy.path, "--repair", "leaks", ok=False)
    taken(bench, qemu, copy, names, bench.file("other", image.size))
    bench.drop(writers)
    bench.drop(dm)


@each("a device that is removed by force while it is in use")
def forced(bench, qemu):
    image, names, _ = made(bench, qemu, 64 * KIB, 9 * MIB + 512, (64 * KIB, 4 * KIB), {})
    dm = bench.add(Opened(image))
    disk = bench.io(dm)
    ranges = [(0, 8 * KIB), (3 * MIB, 512), (9 * MIB, 512)]
    for at, length in ranges:
        disk.write(at, b"f" * length)
    # It is in use: it gets another table, and stays.
    status, out = run("dmsetup", "remove", "--force", dm.name, ok=False)
    expect(status and "error" in run("dmsetup", "table", dm.name), f"status {status}: {out}")
    with fails_with(errno.EIO):
        disk.write(5 * MIB, b"f" * 512)
    bench.drop(disk)
    run("dmsetup", "remove", dm.name)
    bench.things.remove(dm)
    wait_for("the loop devices go", 60, lambda: image.path not in run("losetup", "-n", "-O", "BACK-FILE", "-l"))
    covers(image, names, ranges, "removed by force")
    qemu.check(image.path, leaks=True)
    qemu.io(["write -q 6M 512"], "-f", "qcow2", image.path)
    ranges.append((6 * MIB, 512))
    covers(image, names, ranges, "QEMU has written")
    written(bench, image, (7 * MIB, 512))
    covers(image, names, [*ranges, (7 * MIB, 512)], "the device has been closed")
    run(TOOL, "check", image.path, "--repair", "leaks", ok=False)
    all_agree(bench, qemu, image, names)


if __name__ == "__main__":
    main()
