#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""qcow2setup backup begin: file systems at rest, devices on top of each other, a limit of what is kept.

Environment: SEED (printed, to repeat a run).
"""
import contextlib
import errno
import json
import os
import random
import tempfile
import time

import qcow2test
from qcow2test import (KIB, MIB, Io, KernelLog, Loop, Task, expect, fails_with, fewer, main, note, run, same, test,
                       wait_for)
from test_backup import Backup, content, nothing_left
from test_checkpoint import TOOL, Opened, calls_of, injected, no_helper, setup

# Those of test_backup
qcow2test.forget_tests()

SEED = int(os.environ.get("SEED", time.time_ns() // 1000 % 1000000))
note(f"SEED={SEED}")
CALLS = int(os.environ.get("CALLS", fewer(12, 6)))


class Mount:
    def __init__(self, bench, kind, device, *options, make=True):
        self.path = tempfile.mkdtemp(prefix="mnt.", dir=bench.dir)
        if make:
            run(f"mkfs.{kind}", "-q", {"ext4": "-F", "xfs": "-f", "btrfs": "-f"}[kind], device)
        run("mount", "-t", kind, *options, device, self.path)
        bench.add(self)

    def close(self):
        run("umount", self.path)


class Files:
    """A program that makes files and writes to them, and never waits for a disk to have them"""

    def __init__(self, bench, *folders):
        self.folders, self.stop, self.done = folders, False, 0
        self.task = Task(self.write)
        bench.add(self)

    def write(self):
        rng = random.Random(SEED)
        while not self.stop:
            for folder in self.folders:
                path = f"{folder}/f{self.done % 40}"
                with open(path, "wb") as f:
                    f.write(rng.randbytes(rng.randrange(1, 40 * KIB)))
                if self.done % 7 == 3:
                    os.rename(path, f"{folder}/g{self.done % 11}")
                if self.done % 5 == 2:
                    os.makedirs(f"{folder}/d{self.done % 9}", exist_ok=True)
                with open(f"{folder}/log", "ab") as f:
                    f.write(b"%7d\n" % self.done)
            self.done += 1

    def some(self):
        before = self.done
        wait_for("files", 60, lambda: self.done > before + 30 or self.task.fault)

    def close(self):
        self.stop = True
        self.task.finish()


def device(bench, name, size, **options):
    image = bench.image(size, name=name, cluster=64 * KIB, **options)
    return bench.add(Opened(image, name=name))


def is_frozen(folder):
    """Whoever tries to freeze it cannot do so again."""
    status, out = run("fsfreeze", "--freeze", folder, ok=False)
    if status:
        expect("busy" in out, out)
        return True
    run("fsfreeze", "--unfreeze", folder)
    return False


def logged(bench, kind, path):
    """How many turns the log in a copy of a file system has, without a look at its journal"""
    loop = bench.add(Loop(path, readonly=True))
    fs = Mount(bench, kind, loop.path, "-o", "ro,noload" if kind == "ext4" else "ro,norecovery,nouuid", make=False)
    with open(f"{fs.path}/log", "rb") as f:
        lines = f.read().split(b"\n")[:-1]
    expect([int(line) for line in lines] == list(range(len(lines))), f"{lines}")
    for name in os.listdir(fs.path):
        if os.path.isfile(f"{fs.path}/{name}"):
            content(f"{fs.path}/{name}", MIB)
    bench.drop(fs)
    bench.drop(loop)
    return len(lines)


def rests(kind):
    def fn(bench):
        dm = device(bench, "rest", 320 * MIB if kind == "xfs" else 128 * MIB)
        fs = Mount(bench, kind, dm.path)
        files = Files(bench, fs.path)
        for n in range(3):
            files.some()
            before = files.done
            b = Backup(bench, [dm], "--freeze")
            expect(not is_frozen(fs.path), "it stays frozen")
            files.some()
            copy = bench.path(f"copy{n}")
            run(TOOL, "backup", "copy", dm.name, copy)
            if kind == "ext4":
                # There is nothing to be recovered, and nothing to be repaired.
                out = run("dumpe2fs", "-h", copy)
                expect("needs_recovery" not in out, out)
                run("e2fsck", "-f", "-n", copy)
            # All that was written, though nobody has waited for it
            found = logged(bench, kind, copy)
            expect(before <= found < files.done, f"{found} turns, not from {before} to {files.done}")
            if kind == "xfs":
                # Only files that were deleted while they are open are left to the log.
                loop = bench.add(Loop(copy))
                bench.drop(Mount(bench, kind, loop.path, "-o", "nouuid", make=False))
                run("xfs_repair", "-n", loop.path)
                bench.drop(loop)
            b.end()
            os.unlink(copy)
        bench.drop(files)
    return fn


for _kind in ("ext4", "xfs"):
    test(f"a file system that is mounted here is at rest: {_kind}", all_cpus=True)(rests(_kind))


@test("without --freeze a file system is not at rest: what the tests above look for is to be seen", all_cpus=True)
def restless(bench):
    dm = device(bench, "rest", 128 * MIB)
    fs = Mount(bench, "ext4", dm.path)
    files = Files(bench, fs.path)
    files.some()
    b = Backup(bench, [dm])
    copy = bench.path("copy")
    run(TOOL, "backup", "copy", dm.name, copy)
    expect("needs_recovery" in run("dumpe2fs", "-h", copy), "it is clean")
    b.end()


@test("file systems of two devices, one of them mounted twice, and above a device on top", all_cpus=True)
def two(bench):
    a, b = device(bench, "a", 96 * MIB), device(bench, "b", 96 * MIB)
    top = bench.linear("top", b.path)
    one, other = Mount(bench, "ext4", a.path), Mount(bench, "ext4", top.path)
    Mount(bench, "ext4", a.path, make=False)
    c = device(bench, "c", 96 * MIB)
    frozen_before = Mount(bench, "ext4", c.path)
    files = Files(bench, one.path, other.path)
    files.some()
    backup = Backup(bench, [a, b], "--freeze")
    files.some()
    for dm in (a, b):
        copy = bench.path("copy")
        run(TOOL, "backup", "copy", dm.name, copy)
        expect("needs_recovery" not in run("dumpe2fs", "-h", copy), f"{dm.name}: not at rest")
        os.unlink(copy)
    backup.end()
    bench.drop(files)
    # What somebody else has frozen stays so.
    run("fsfreeze", "--freeze", frozen_before.path)
    try:
        backup = Backup(bench, [c], "--freeze")
        expect(is_frozen(frozen_before.path), "it was thawed")
        backup.end()
    finally:
        run("fsfreeze", "--unfreeze", frozen_before.path)
    for dm in (a, b):
        nothing_left(dm)


@test("an image that is on a file system on another device of the same backup", all_cpus=True)
def nested(bench):
    low = device(bench, "low", 128 * MIB)
    fs = Mount(bench, "ext4", low.path)
    high = bench.add(Opened(bench.image(8 * MIB, name=f"{fs.path}/high"), name="high"))
    for dm in (low, high):
        dm.tool("bitmap add", "b0")
    with contextlib.closing(Io(high.path)) as disk:
        disk.write(0, os.urandom(MIB))
        was = disk.read(0, 8 * MIB)
        b = Backup(bench, [low, high], "--bitmap", "b0", "--checkpoint", "b1")
        disk.write(0, os.urandom(MIB))
        disk.fsync()
        same(b.view(high), was, what="the one above")
        b.end()
        b = Backup(bench, [high, low], "--bitmap", "b1", "--checkpoint", "b2")
        b.end()
        got, out = run(TOOL, "backup", "begin", low.name, high.name, "--cow", b.dir, "--freeze", ok=False)
        expect(got == 4 and "--freeze" in out and fs.path in out, f"{got}: {out}")
        # That one by itself has no file system.
        b = Backup(bench, [high], "--freeze")
        b.end()
    for dm in (low, high):
        nothing_left(dm)


@test("killed with file systems frozen: they go on", all_cpus=True)
def killed(bench):
    dm = device(bench, "kill", 96 * MIB)
    dm.tool("bitmap add", "b0")
    fs = Mount(bench, "ext4", dm.path)
    files = Files(bench, fs.path)
    files.some()
    folder = bench.path("folder")
    os.makedirs(folder)
    begin = ("--cow", folder, "--freeze", "--bitmap", "b0", "--checkpoint", "b1")
    calls = calls_of(bench, dm, "backup begin", *begin)
    dm.tool("bitmap remove", "b1")
    dm.tool("bitmap enable", "b0")
    thawed = 0
    for k in range(1, calls + 3, max(1, calls // CALLS)):
        run("dmesg", "--clear")
        injected(dm, {"INJECT_SENDS": 1, "INJECT_AT": k, "INJECT_SIGNAL": 9}, "backup begin", *begin)
        wait_for("the helpers' end", 60, no_helper)
        expect(not is_frozen(fs.path), f"call {k}: it stays frozen")
        expect(dm.info("suspended") == "Active", f"call {k}: suspended")
        files.some()
        thawed += "had frozen goes on" in run("dmesg")
        run(TOOL, "backup", "end", dm.name, "--failed")
        nothing_left(dm)
        found = dm.list()
        if "b1" in found:
            dm.tool("bitmap remove", "b1")
        if not found["b0"]["recording"]:
            dm.tool("bitmap enable", "b0")
    note(f"{calls} calls, frozen at {thawed} of them")
    expect(thawed, "it was never frozen")


@test("what is said would have to wait for a file system that is frozen")
def output(bench):
    dm = device(bench, "out", 96 * MIB)
    fs = Mount(bench, "ext4", dm.path)
    folder = bench.path("folder")
    os.makedirs(folder)
    command = f"'{TOOL}' backup begin {dm.name} --cow {folder} --freeze"
    got, out = run("sh", "-c", f"{command} > {fs.path}/log", ok=False)
    expect(got == 4 and "put that elsewhere" in out, f"{got}: {out}")
    run("sh", "-c", f"{command} > {folder}/log")
    run(TOOL, "backup", "end", dm.name)
    nothing_left(dm)


@test("no more is kept than is said: the view is over then, and the disk goes on")
def limit(bench):
    image, dm, _ = setup(bench, 64 * KIB, 32 * MIB, None, {})
    disk = bench.add(Io(dm.path))
    for at in range(0, 24 * MIB, MIB):
        disk.write(at, os.urandom(MIB))
    was = disk.read(0, image.size)
    b = Backup(bench, [dm], "--size", "4M")
    # What reads as zeros takes no place; nor does what is kept already.
    disk.write(24 * MIB, os.urandom(8 * MIB))
    for _ in range(2):
        disk.write(0, os.urandom(4 * MIB))
    status = b.status(dm)
    expect(status["valid"] and status["kept"] == 4 * MIB, f"{status}")
    same(b.view(dm), was, what="what was")
    with contextlib.closing(KernelLog()) as log:
        disk.write(4 * MIB, b"o" * 4096)
        lines = log.lines("the view is over")
        expect(len(lines) == 1 and "its limit is reached at sector 8192" in lines[0], f"{lines}")
    status = b.status(dm)
    expect(not status["valid"] and status["view"] == "limit", f"{status}")
    expect("more has changed than was to be kept" in run(TOOL, "backup", "status"), run(TOOL, "backup", "status"))
    with contextlib.closing(Io(f"/dev/mapper/{dm.name}-backup", readonly=True)) as view, fails_with(errno.EIO):
        view.read(0, 4096)
    got, out = run(TOOL, "backup", "copy", dm.name, bench.path("copy"), ok=False)
    expect(got == 4 and "--failed" in out, f"{got}: {out}")
    b.end()
    for size in ("0", "1K", "x"):
        got, out = run(TOOL, "backup", "begin", dm.name, "--cow", b.dir, "--size", size, ok=False)
        expect(got == 1 and "10G" in out, f"{got}: {out}")
    nothing_left(dm)


if __name__ == "__main__":
    main()
