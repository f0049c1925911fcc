#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""qcow2setup backup: disks as they were at one instant, while they are used.

Environment: SEED (printed, to repeat a run), ROUNDS (of chains of backups).
"""
import contextlib
import errno
import json
import os
import random
import subprocess
import time

import qcow2test
from qcow2test import (GIB, KIB, MIB, Ext4, Failure, Io, Loop, Task, expect, fails_with, fewer, main, note, run, same,
                       some, test, wait_for)
from test_checkpoint import KINDS, TOOL, Opened, Writers, calls_of, injected, joined, no_helper, setup, words

# Those of test_checkpoint
qcow2test.forget_tests()

CALLS = int(os.environ.get("CALLS", fewer(12, 6)))
SEED = int(os.environ.get("SEED", time.time_ns() // 1000 % 1000000))
ROUNDS = int(os.environ.get("ROUNDS", 4))
# Calls that are made at most as a device is held: a small one, and one of 256 GiB; a bitmap that begins has more clusters
# there
HELD_MOST = {(): (15, 15), ("--bitmap", "b0", "--checkpoint", "b1"): (99, 109)}
note(f"SEED={SEED}")


class Backup:
    """Of one device or more, begun"""

    def __init__(self, bench, devices, *options):
        self.bench, self.devices = bench, devices
        self.dir = bench.path("cow")
        os.makedirs(self.dir, exist_ok=True)
        run(TOOL, "backup", "begin", *(d.name for d in devices), "--cow", self.dir, *options)
        bench.add(self)

    def status(self, device):
        (found,) = json.loads(run(TOOL, "backup", "status", device.name, "--json"))
        return found

    def view(self, device):
        with contextlib.closing(Io(f"/dev/mapper/{device.name}-backup", readonly=True)) as disk:
            return disk.read(0, device.image.size)

    def end(self, *options):
        run(TOOL, "backup", "end", *(d.name for d in self.devices), *options)
        self.bench.things.remove(self)

    def close(self):
        run(TOOL, "backup", "end", *(d.name for d in self.devices))


def nothing_left(device):
    names = run("dmsetup", "ls")
    expect(f"{device.name}-backup" not in names, names)
    expect(" view " not in run("dmsetup", "table", device.name), "there is a view")
    left = [f for f in os.listdir("/run/qcow2setup") if device.name in f] if os.path.isdir("/run/qcow2setup") else []
    expect(not left, f"/run/qcow2setup has {left}")


def read_all(device):
    with contextlib.closing(Io(device.path, readonly=True)) as disk:
        return disk.read(0, device.image.size)


def shown(bench, cluster, size, granularity, options):
    """Stopped writers, so that it is known what has to be shown"""
    image, dm, _ = setup(bench, cluster, size, granularity, options)
    rng = random.Random(SEED)
    writers = Writers(bench, dm, image.size, rng)
    writers.some()
    bench.drop(writers)
    was = read_all(dm)
    b = Backup(bench, [dm])
    same(b.view(dm), was, what="view")
    writers = Writers(bench, dm, image.size, rng)
    writers.some()
    status = b.status(dm)
    expect(status["valid"] and status["name"] == dm.name, f"{status}")
    same(b.view(dm), was, what="view while it is written")
    # Other people's programs, which read the image over the view
    raw = bench.path("copy")
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", status["image"], raw)
    with open(raw, "rb") as f:
        same(f.read(image.size), was, what="what qemu-img has copied")
    run("qemu-img", "check", "-q", status["image"])
    writers.some()
    bench.drop(writers)
    b.end()
    nothing_left(dm)
    bench.drop(dm)
    run("qemu-img", "check", "-q", image.path)


for _kind in some(KINDS, 3):
    test(f"a backup shows what was: {words(_kind)}", *_kind)(shown)


def dirty(path, bitmap):
    """Its extents in an image: (start, length)"""
    extents = json.loads(run(TOOL, "map", path, "--bitmap", bitmap, "--json"))
    return [(e["start"], e["length"]) for e in extents if not e["data"]]


class Kept:
    """A copy that is brought up to date by what is dirty, as a backup program has it"""

    def __init__(self, size):
        self.data = bytearray(size)

    def take(self, view, extents):
        for start, length in extents:
            self.data[start:start + length] = view[start:start + length]


def chain(bench, kind):
    """A full backup, then what has changed, of a disk that is never at rest"""
    rng = random.Random(SEED)
    image, dm, granularity = setup(bench, *kind)
    writers = Writers(bench, dm, image.size, rng)
    writers.some()
    copy = Kept(image.size)
    b = Backup(bench, [dm], "--checkpoint", f"c0{granularity}")
    copy.take(b.view(dm), [(0, image.size)])
    same(b.view(dm), bytes(copy.data), what="full backup")
    b.end()
    now, since = 0, ["c0"]
    for n in range(ROUNDS):
        writers.some()
        options = [w for name in since for w in ("--bitmap", name)]
        if rng.random() < 0.3:
            options.append("--dirty-only")
        b = Backup(bench, [dm], *options, "--checkpoint", f"c{n + 1}{granularity}")
        path = b.status(dm)["image"]
        extents = [e for name in since for e in dirty(path, name)]
        writers.some()
        if n % 4 == 3:
            # It is lost: the next one has it.
            b.end("--failed")
            found = dm.list()
            expect(found[f"c{n + 1}"]["recording"], f"{found}")
            since = [f"c{n + 1}"]
        else:
            if "--dirty-only" in options:
                with contextlib.closing(Io(f"/dev/mapper/{dm.name}-backup", readonly=True)) as disk:
                    for start, length in extents:
                        copy.data[start:start + length] = disk.read(start, length)
            else:
                view = b.view(dm)
                copy.take(view, extents)
                same(bytes(copy.data), view, what=f"round {n}: what is dirty since {since}")
            b.end()
            if rng.random() < 0.5:
                # Two of them are one history then.
                for name in since:
                    dm.tool("bitmap remove", name)
                since = []
            since.append(f"c{n + 1}")
            since = since[-1:] if rng.random() < 0.5 or len(since) > 3 else since
        now = n + 1
    bench.drop(writers)
    b = Backup(bench, [dm], *(w for name in since for w in ("--bitmap", name)), "--checkpoint", "last")
    copy.take(b.view(dm), [e for name in since for e in dirty(b.status(dm)["image"], name)])
    b.end()
    same(bytes(copy.data), read_all(dm), what=f"at rest, after {now} rounds")
    nothing_left(dm)
    bench.drop(dm)
    run("qemu-img", "check", "-q", image.path)


for _kind in some(KINDS, 3):
    test(f"a full backup and what has changed since: {words(_kind)}", _kind, all_cpus=True)(chain)


class Sequence:
    """Writes to disks in turns, one after the other: what they have got at one instant is what
    came before some moment."""

    def __init__(self, devices):
        self.devices, self.done = devices, 0
        self.stop = False
        self.task = Task(self.write)

    def write(self):
        with contextlib.ExitStack() as stack:
            disks = [stack.enter_context(contextlib.closing(Io(d.path))) for d in self.devices]
            blocks = self.devices[0].image.size // 4096
            while not self.stop:
                n = self.done + 1
                disk = disks[n % len(disks)]
                disk.write(n // len(disks) % blocks * 4096, n.to_bytes(8, "little") * 512)
                self.done = n

    def some(self):
        before = self.done
        wait_for("writes", 60, lambda: self.done > before + 50 or self.task.fault)

    def close(self):
        self.stop = True
        self.task.finish()

    def check(self, views, before, after):
        """All writes up to one, and none behind it; between @before and @after of them"""
        last = []
        for view in views:
            numbers = [int.from_bytes(view[at:at + 8], "little") for at in range(0, len(view), 4096)]
            for at, n in enumerate(numbers):
                expect(view[at * 4096:(at + 1) * 4096] == n.to_bytes(8, "little") * 512, f"block {at} is torn")
            last.append(numbers)
        most = max(map(max, last))
        expect(before <= most <= after, f"write {most}, not from {before} to {after}")
        for d, numbers in enumerate(last):
            for at, n in enumerate(numbers):
                # The latest write to this place that is not behind the last one
                want = at * len(views) + d
                step = len(numbers) * len(views)
                while want + step <= most:
                    want += step
                expect(n == (want if 0 < want <= most else 0), f"disk {d}, block {at} has write {n}, not {want}, of {most}")


def held(bench, size, count, *options):
    """How many calls are made from the suspend of the first device to the resume of the last one"""
    devices = []
    for n in range(count):
        image = bench.image(size, name=f"held{size}-{n}", cluster=64 * KIB, raw=True)
        dm = bench.add(Opened(image, name=f"held{n}"))
        devices.append(dm)
        if options:
            dm.tool("bitmap add", "b0")
    path, cow = bench.path("held"), bench.path("kept")
    os.makedirs(cow, exist_ok=True)
    status, out = injected(devices[0], {"INJECT_HELD": path}, "backup begin", *(d.name for d in devices[1:]), "--cow", cow,
                           *options)
    expect(status == 0, out)
    for dm in devices:
        run(TOOL, "backup", "end", dm.name)
        bench.drop(dm)
    with open(path, encoding="ascii") as f:
        return int(f.read())


@test("devices are held for few calls, whatever their size")
def few_calls(bench):
    for options, most in HELD_MOST.items():
        found = [held(bench, size, 1, *options) for size in (16 * MIB, 256 * GIB)]
        four = held(bench, 16 * MIB, 4, *options)
        note(f"{options}: {found} calls, {four} of four devices")
        for calls, limit in zip(found, most):
            expect(0 < calls <= limit, f"{found} calls, at most {most}")
        # The suspends of all but the first one are among them.
        expect(four <= 4 * found[0] + 3, f"{four} calls of four devices, {found[0]} of one")


@test("several disks are of one instant", all_cpus=True)
def one_instant(bench):
    devices = []
    for n in range(3):
        image = bench.image(2 * MIB, name=f"disk{n}", cluster=64 * KIB, raw=n == 1)
        dm = bench.add(Opened(image, name=f"disk{n}"))
        devices.append(dm)
    for n in range(ROUNDS):
        s = Sequence(devices)
        bench.add(s)
        s.some()
        before = s.done
        b = Backup(bench, devices)
        after = s.done + 1
        s.some()
        s.check([b.view(d) for d in devices], before, after)
        s.some()
        s.check([b.view(d) for d in devices], before, after)
        b.end()
        bench.drop(s)
        for d in devices:
            with contextlib.closing(Io(d.path)) as disk:
                disk.zero_out(0, d.image.size)
    for d in devices:
        nothing_left(d)


@test("other people's clients read from backup serve what was, and what has changed: nbdinfo, nbdcopy, qemu-img",
      all_cpus=True)
def served(bench):
    image, dm, _ = setup(bench, 64 * KIB, 24 * MIB + 512, None, {})
    rng = random.Random(SEED)
    dm.tool("bitmap add", "b0", "--granularity", "32K")
    disk = bench.add(Io(dm.path))
    for _ in range(30):
        disk.write(rng.randrange(image.size // 512) * 512, b"w" * 512)
    # What is dirty, and reads as zeros
    disk.zero_out(8 * MIB, 4 * MIB)
    was = disk.read(0, image.size)
    b = Backup(bench, [dm], "--bitmap", "b0", "--checkpoint", "b1")
    writers = Writers(bench, dm, image.size, rng)
    socket = bench.path("socket")
    # pylint: disable=consider-using-with # it is ended below
    server = subprocess.Popen([TOOL, "backup", "serve", dm.name, "--socket", socket])
    uri = f"nbd+unix:///?socket={socket}"
    try:
        wait_for("the server", 30, lambda: os.path.exists(socket))
        writers.some()
        nbd = json.loads(run("nbdinfo", "--json", "--map=qemu:dirty-bitmap:b0", uri))
        qemu = json.loads(run("qemu-img", "map", "--output=json", "--image-opts", "driver=nbd,server.type=unix,"
                              f"server.path={socket},x-dirty-bitmap=qemu:dirty-bitmap:b0"))
        for n, command in enumerate((("nbdcopy", uri), ("qemu-img", "convert", "-f", "raw", "-O", "raw", uri))):
            path = bench.path(f"copy{n}")
            run(*command, path)
            with open(path, "rb") as f:
                same(f.read(image.size), was, what=command[0])
        run("qemu-img", "compare", "-f", "raw", "-F", "raw", uri, bench.path("copy0"))
        got, out = run(TOOL, "backup", "end", dm.name, ok=False)
        expect(got == 5 and "qemu-nbd" in out, f"{got}: {out}")
    finally:
        server.terminate()
        server.wait()
    found = json.loads(run(TOOL, "backup", "extents", dm.name, "--bitmap", "b0", "--json"))
    ours = joined((e["start"], e["length"], e["dirty"]) for e in found)
    expect(joined((e["offset"], e["length"], e["type"] == 1) for e in nbd) == ours, f"nbdinfo: {nbd}, extents: {found}")
    expect(joined((e["start"], e["length"], not e["data"]) for e in qemu) == ours, f"qemu-img: {qemu}, extents: {found}")
    zeros = [e for e in found if e["zero"]]
    expect(any(e["dirty"] for e in zeros), f"nothing that is dirty is said to be zeros: {found}")
    expect(not any(any(was[e["start"]:e["start"] + e["length"]]) for e in zeros), f"no zeros: {zeros}")
    every = json.loads(run(TOOL, "backup", "extents", dm.name, "--json"))
    expect(all(e["dirty"] for e in every), f"{every}")
    expect(sum(e["length"] for e in every) == image.size == sum(e["length"] for e in found), f"{every}")
    bench.drop(writers)
    b.end()
    nothing_left(dm)
    for action in (("extents",), ("serve", "--socket", socket)):
        got, out = run(TOOL, "backup", action[0], dm.name, *action[1:], ok=False)
        expect(got == 4 and "backup begin" in out, f"{action}: {got}: {out}")


def content(path, size):
    with open(path, "rb") as f:
        return f.read(size + 1)


def copies(bench, cluster, size, granularity, options):
    """The tool's own: all, what has changed, to a file and to a device, stopped, compared"""
    image, dm, _ = setup(bench, cluster, size, granularity, options)
    rng = random.Random(SEED)
    writers = Writers(bench, dm, image.size, rng)
    target, device = bench.path("target"), bench.add(Loop(bench.file("device", image.size + MIB))).path
    last = None
    for n in range(4):
        writers.some()
        changed = ("--bitmap", f"c{n - 1}") if n else ()
        b = Backup(bench, [dm], *changed, "--checkpoint", f"c{n}{granularity and f',granularity={granularity}' or ''}")
        view = b.view(dm)
        out = run(TOOL, "backup", "copy", dm.name, target, *changed, "--verify", "--json")
        lines = [json.loads(line) for line in out.splitlines()]
        expect(lines and lines[-1]["done"] == lines[-1]["total"], out)
        expect(not n or lines[-1]["total"] < image.size or view != last, out)
        writers.some()
        run(TOOL, "backup", "copy", dm.name, device, *(changed or ("--overwrite-device",)))
        same(content(target, image.size), view, what=f"copy {n}")
        same(content(device, image.size)[:image.size], view, what=f"copy {n} to a device")
        expect(not os.path.exists(target + ".qcow2setup-copy"), "its notes are left")
        last = view
        b.end()
    bench.drop(writers)
    nothing_left(dm)


for _kind in some(KINDS, 3):
    test(f"copies of all, and of what has changed: {words(_kind)}", *_kind, all_cpus=True)(copies)


@test("a copy that is stopped, goes on, meets a view that is over, or what is no copy")
def stopped(bench):
    image, dm, _ = setup(bench, 64 * KIB, 64 * MIB, None, {})
    disk = bench.add(Io(dm.path))
    for at in range(0, image.size, MIB):
        disk.write(at, os.urandom(MIB))
    b = Backup(bench, [dm], "--checkpoint", "c0")
    view = b.view(dm)
    target = bench.path("target")
    calls = calls_of(bench, dm, "backup copy", target + "0")
    note(f"{calls} calls")

    def refused(status, text, *argv):
        got, out = run(TOOL, "backup", "copy", *argv, ok=False)
        expect(got == status and text in out, f"{argv}: status {got}, not {status}, or no '{text}': {out}")

    for part in (3, 2):
        status, out = injected(dm, {"INJECT_AT": calls * (part - 1) // part, "INJECT_SIGNAL": 15}, "backup copy", target)
        expect(status, f"it was not stopped: {out}")
        refused(5, "--resume", dm.name, target)
        disk.write(0, os.urandom(4096))
        run(TOOL, "backup", "copy", dm.name, target, "--resume", "--verify")
        same(content(target, image.size), view, what="stopped, and gone on with")
        os.unlink(target)
    status, out = injected(dm, {"INJECT_AT": calls // 2, "INJECT_SIGNAL": 15}, "backup copy", target)
    expect(status, out)
    b.end()
    refused(4, "no backup", dm.name, target, "--resume")
    b = Backup(bench, [dm], "--bitmap", "c0", "--checkpoint", "c1")
    # That is another one.
    refused(4, "leave --resume out", dm.name, target, "--resume")
    refused(4, "no such copy", dm.name, bench.path("nothing"), "--bitmap", "c0")
    refused(4, "no bitmap", dm.name, target + "0", "--bitmap", "c7")
    big, small = bench.file("big", image.size + 512), bench.add(Loop(bench.file("small", MIB))).path
    refused(4, "larger", dm.name, big, "--bitmap", "c0")
    refused(5, "--overwrite-device", dm.name, small)
    refused(4, "smaller", dm.name, small, "--overwrite-device")
    refused(1, "usage", dm.name)
    run("dmsetup", "message", dm.name, "0", "view_end")
    refused(4, "--failed", dm.name, target + "0", "--bitmap", "c0")
    b.end("--failed")
    b = Backup(bench, [dm], "--bitmap", "c1", "--checkpoint", "c2")
    run(TOOL, "backup", "copy", dm.name, target + "0", "--bitmap", "c1", "--verify")
    same(content(target + "0", image.size), b.view(dm), what="after a failure")
    b.end()


@test("what else is done with the device while a backup is under way")
def meanwhile(bench):
    image, dm, _ = setup(bench, 64 * KIB, 8 * MIB, None, {})
    disk = Io(dm.path)
    disk.write(MIB, os.urandom(MIB))
    was = disk.read(0, image.size)
    b = Backup(bench, [dm], "--checkpoint", "c0")
    disk.write(0, b"n" * 4096)

    def refused(status, text, *argv):
        got, out = run(TOOL, *argv, ok=False)
        expect(got == status and text in out, f"{' '.join(map(str, argv))}: status {got}, not {status}: {out}")

    remedy = f"qcow2setup backup end {dm.name}"
    refused(5, remedy, "backup", "begin", dm.name, "--cow", b.dir)
    refused(5, remedy, "resize", dm.name, "--size", 16 * MIB)
    disk.close()
    refused(5, remedy, "close", dm.name)
    disk = bench.add(Io(dm.path))
    # What goes on
    dm.tool("checkpoint", "--stop", "c0", "--start", "c1")
    dm.tool("bitmap add", "more")
    dm.tool("bitmap remove", "more")
    json.loads(dm.tool("map", "--json"))
    expect("valid" in run(TOOL, "backup", "status"), "status")
    run(TOOL, "status", dm.name)
    disk.discard(0, image.size)
    same(b.view(dm), was, what="view")
    expect(b.status(dm)["valid"], f"{b.status(dm)}")
    with contextlib.closing(Io(f"/dev/mapper/{dm.name}-backup", readonly=True)):
        refused(5, "in use", "backup", "end", dm.name)
    same(b.view(dm), was, what="view")
    b.end()
    nothing_left(dm)
    # Again: there is nothing of it.
    run(TOOL, "backup", "end", dm.name)
    refused(4, "no backup", "backup", "status", dm.name)
    refused(4, "no such device", "backup", "end", "nothing-of-that-name")


@test("what cannot be is refused, and nothing has changed")
def refused_begin(bench):
    image, dm, _ = setup(bench, 64 * KIB, 8 * MIB, None, {})
    dm.tool("bitmap add", "b0")
    dm.tool("bitmap add", "old", "--disabled")
    small = bench.add(Loop(bench.file("small", MIB))).path
    folder = bench.path("folder")
    os.makedirs(folder)
    file = bench.file("file", 16 * MIB)
    table = run("dmsetup", "table", dm.name)
    for status, text, *argv in (
            (1, "--cow", dm.name),
            (1, "begin", "--cow", folder),
            (1, "--checkpoint", dm.name, "--cow", folder, "--bitmap", "b0"),
            (1, "--bitmap", dm.name, "--cow", folder, "--dirty-only"),
            (1, "twice", dm.name, dm.name, "--cow", folder),
            (1, "no option", dm.name, "--cow", folder, "--failed"),
            (4, "no such", "nothing-of-that-name", "--cow", folder),
            (4, "smaller", dm.name, "--cow", small),
            (4, "folder", dm.name, "--cow", file),
            (4, "no such file", dm.name, "--cow", folder + "/nothing"),
            (4, "no bitmap", dm.name, "--cow", folder, "--bitmap", "nothing", "--checkpoint", "c"),
            (5, "already", dm.name, "--cow", folder, "--bitmap", "b0", "--checkpoint", "old"),
            (5, "exists", dm.name, "--cow", folder, "--image", file)):
        got, out = run(TOOL, "backup", "begin", *argv, ok=False)
        expect(got == status and text in out, f"{argv}: status {got}, not {status}, or no '{text}': {out}")
        expect(len(out.splitlines()) == 1, f"{argv}: {out}")
        expect(run("dmsetup", "table", dm.name) == table, f"{argv}: another table")
        nothing_left(dm)
    expect(not os.listdir(folder), f"{os.listdir(folder)}")
    # A file system on the very device
    run("mkfs.ext4", "-q", "-F", dm.path)
    mount = bench.path("mnt")
    os.makedirs(mount)
    run("mount", "-t", "ext4", dm.path, mount)
    try:
        got, out = run(TOOL, "backup", "begin", dm.name, "--cow", mount, ok=False)
        expect(got == 4 and "wait for itself" in out, f"{got}: {out}")
    finally:
        run("umount", mount)
    nothing_left(dm)


@test("no room for what is kept: the backup has failed, nothing of its history is lost, and the disk goes on")
def full(bench):
    fs = bench.add(Ext4(bench, 16 * MIB, "-O", "^has_journal"))
    image, dm, _ = setup(bench, 64 * KIB, 12 * MIB, None, {})
    disk = bench.add(Io(dm.path))
    dm.tool("checkpoint", "--start", "c0")
    for at in range(0, image.size, MIB):
        disk.write(at, os.urandom(MIB))
    run(TOOL, "backup", "begin", dm.name, "--cow", fs.path, "--bitmap", "c0", "--checkpoint", "c1")
    fs.fill()
    for at in range(0, image.size, 64 * KIB):
        disk.write(at, b"f" * 4096)
    (status,) = json.loads(run(TOOL, "backup", "status", dm.name, "--json"))
    expect(not status["valid"] and status["view"] == "no_space", f"{status}")
    expect("no space" in run(TOOL, "backup", "status"), run(TOOL, "backup", "status"))
    with contextlib.closing(Io(f"/dev/mapper/{dm.name}-backup", readonly=True)) as view, fails_with(errno.EIO):
        view.read(0, 4096)
    run(TOOL, "backup", "end", dm.name, "--failed")
    found = dm.list()
    expect(found["c1"]["count"] == image.size and found["c1"]["recording"], f"{found}")
    nothing_left(dm)


def full_backup(dm, folder, copy):
    """From which on bitmaps count"""
    run(TOOL, "backup", "begin", dm.name, "--cow", folder)
    with contextlib.closing(Io(f"/dev/mapper/{dm.name}-backup", readonly=True)) as disk:
        copy.take(disk.read(0, dm.image.size), [(0, dm.image.size)])
    run(TOOL, "backup", "end", dm.name)


@test("a backup that is killed as it begins, or as it ends: the disk goes on, and no history is lost", all_cpus=True)
def killed(bench):
    image, dm, _ = setup(bench, 64 * KIB, 4 * MIB, None, {})
    rng = random.Random(SEED)
    writers = Writers(bench, dm, image.size, rng)
    folder = bench.path("folder")
    os.makedirs(folder)
    dm.tool("checkpoint", "--start", "c0")
    copy, last, count = Kept(image.size), 0, {"begun": 0, "not begun": 0, "ended": 0}

    def begin_words():
        return "--cow", folder, "--bitmap", f"c{last}", "--checkpoint", f"c{last + 1}"

    calls = {}
    for action in ("begin", "end"):
        if action == "begin":
            calls[action] = calls_of(bench, dm, "backup begin", *begin_words())
        else:
            calls[action] = calls_of(bench, dm, "backup end")
    last = 1
    full_backup(dm, folder, copy)
    for action in ("begin", "end"):
        for k in range(1, calls[action] + 3, max(1, calls[action] // CALLS)):
            if action == "end":
                run(TOOL, "backup", "begin", dm.name, *begin_words())
            words_ = begin_words() if action == "begin" else ("--failed",)
            status, out = injected(dm, {"INJECT_SENDS": 1, "INJECT_AT": k, "INJECT_SIGNAL": 9}, f"backup {action}",
                                   *words_)
            wait_for("the helper's end", 60, no_helper)
            expect(dm.info("suspended") == "Active", f"{action}, call {k}: suspended: {out}")
            # Whatever is left of it goes.
            run(TOOL, "backup", "end", dm.name, "--failed")
            nothing_left(dm)
            found = dm.list()
            expect(not any(b["inconsistent"] for b in found.values()), f"{action}, call {k}: {found}")
            recording = [name for name, b in found.items() if b["recording"]]
            if recording == [f"c{last + 1}"]:
                # All of the old one is in the new one.
                dm.tool("bitmap remove", f"c{last}")
                last += 1
                count["begun"] += 1
            else:
                expect(recording == [f"c{last}"], f"{action}, call {k}, status {status}: {recording}: {out}")
                count["not begun"] += 1
    note(f"{calls} calls, {count}")
    expect(count["begun"] and count["not begun"], f"{count}")
    bench.drop(writers)
    run(TOOL, "backup", "begin", dm.name, *begin_words())
    path = json.loads(run(TOOL, "backup", "status", dm.name, "--json"))[0]["image"]
    with contextlib.closing(Io(f"/dev/mapper/{dm.name}-backup", readonly=True)) as disk:
        copy.take(disk.read(0, image.size), dirty(path, f"c{last}"))
    run(TOOL, "backup", "end", dm.name)
    same(bytes(copy.data), read_all(dm), what="after all that was killed")
    nothing_left(dm)
    bench.drop(dm)
    run("qemu-img", "check", "-q", image.path)


if __name__ == "__main__":
    main()
