#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""qcow2setup backup: chains of a full copy and increments, and the way back to a device, or a file.

Environment: SEED (printed, to repeat a run), ROUNDS (increments in a chain).
"""
import contextlib
import json
import os
import random
import shutil
import time
import types

import qcow2test
from qcow2test import KIB, MIB, Io, Loop, expect, main, note, run, same, some, test
from test_backup import Backup, content, nothing_left, read_all
from test_checkpoint import KINDS, TOOL, Opened, setup, words

# Those of test_backup
qcow2test.forget_tests()

SEED = int(os.environ.get("SEED", time.time_ns() // 1000 % 1000000))
ROUNDS = int(os.environ.get("ROUNDS", 10))
note(f"SEED={SEED}")


class Chain:
    """A folder of copies: full, and increments; and what each of them has to be"""

    def __init__(self, bench, dm, granularity):
        self.bench, self.dm, self.granularity = bench, dm, granularity
        self.folder = bench.path("copies")
        os.makedirs(self.folder)
        self.views, self.last = [], None

    def path(self, n):
        return f"{self.folder}/copy{n}"

    def add(self, *options, meanwhile=lambda: None):
        n = len(self.views)
        changed = ("--bitmap", f"c{n - 1}") if n else ()
        b = Backup(self.bench, [self.dm], *changed, "--checkpoint", f"c{n}{self.granularity}",
                   *(("--dirty-only",) if n % 3 == 2 else ()))
        meanwhile()
        if n % 3 != 2:
            view = b.view(self.dm)
        run(TOOL, "backup", "copy", self.dm.name, self.path(n), *changed,
            *(("--increment-of", self.path(n - 1)) if n else ()), *options)
        if n % 3 == 2:
            # It cannot be read as a whole: what has not changed is as before.
            extents = json.loads(run(TOOL, "backup", "extents", self.dm.name, *changed, "--json"))
            view = bytearray(self.views[-1].ljust(self.dm.image.size, b"\0"))
            fd = os.open(f"/dev/mapper/{self.dm.name}-backup", os.O_RDONLY)
            for e in extents:
                if e["dirty"]:
                    view[e["start"]:e["start"] + e["length"]] = os.pread(fd, e["length"], e["start"])
            os.close(fd)
        self.views.append(bytes(view))
        b.end()
        if n:
            self.dm.tool("bitmap remove", f"c{n - 1}")
        expect(not os.path.exists(self.path(n) + ".data.qcow2setup-copy"), "its notes are left")


def change(dm, rng, requests=20):
    """Some of the disk, so that an increment is less than all of it"""
    with contextlib.closing(Io(dm.path)) as disk:
        for _ in range(requests):
            length = rng.choice((512, 4096, rng.randrange(1, 300) * 512))
            at = rng.randrange((dm.image.size - length) // 512 + 1) * 512
            kind = rng.choice(("write", "write", "zero_out", "discard"))
            if kind == "write":
                disk.write(at, rng.randbytes(length))
            else:
                getattr(disk, kind)(at, length)


def chains(bench, rounds, cluster, size, granularity, options):
    image, dm, more = setup(bench, cluster, size, granularity, options)
    rng = random.Random(SEED)
    change(dm, rng, 60)
    chain = Chain(bench, dm, more)
    for n in range(1 + rounds):
        chain.add(*(("--verify",) if n == 1 else ()), meanwhile=lambda: change(dm, rng))
    note(f"increments of {[os.stat(chain.path(n) + '.data').st_blocks * 512 // KIB for n in range(1, 1 + rounds)]} KiB")
    device = bench.add(Loop(bench.file("device", image.size)))
    for n in (0, 1, 2, rounds):
        was = chain.views[n]
        target = bench.path(f"restored{n}")
        run(TOOL, "backup", "restore", chain.path(n), target, "--verify")
        same(content(target, image.size), was, what=f"copy {n}, restored to a file")
        run(TOOL, "backup", "restore", chain.path(n), device.path, "--overwrite-device")
        same(content(device.path, image.size), was, what=f"copy {n}, restored to a device")
        # To the disk that it comes from, which goes on to record what changes
        run(TOOL, "backup", "restore", chain.path(n), dm.path, "--overwrite-device", "--json")
        same(read_all(dm), was, what=f"copy {n}, restored to the disk")
        if n:
            run("qemu-img", "check", "-q", chain.path(n))
            raw = bench.path("qemu")
            run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", chain.path(n), raw)
            same(content(raw, image.size), was, what=f"copy {n}, as QEMU has it")
    # What the bitmap says since the last backup is right for what was restored, too.
    chain.add()
    same(chain.views[-1], read_all(dm), what="after it was restored")
    target = bench.path("last")
    run(TOOL, "backup", "restore", chain.path(rounds + 1), target)
    same(content(target, image.size), chain.views[-1], what="an increment after that")
    nothing_left(dm)
    bench.drop(dm)
    run("qemu-img", "check", "-q", image.path)


for _n, _kind in some(enumerate(KINDS), 3):
    test(f"a full copy and increments, and back: {words(_kind)}", 3 if _n else ROUNDS, *_kind)(chains)


@test("a disk that grows, folders that move, an image that is new")
def moved(bench):
    image, dm, _ = setup(bench, 64 * KIB, 8 * MIB, None, {})
    rng = random.Random(SEED)
    chain = Chain(bench, dm, "")

    change(dm, rng)
    chain.add()
    change(dm, rng)
    chain.add()
    dm.tool("resize", "--size", "12M")
    dm.image = types.SimpleNamespace(size=12 * MIB)
    change(dm, rng)
    chain.add()
    chain.add()
    folder = bench.path("elsewhere")
    shutil.move(chain.folder, folder)
    # A new image, and a new device
    other = bench.add(Opened(bench.image(12 * MIB, name="other", cluster=64 * KIB), name="other"))
    run(TOOL, "backup", "restore", f"{folder}/copy3", other.path, "--overwrite-device", "--verify")
    same(read_all(other), read_all(dm), what="the new disk")
    # Zeros take no space in it.
    extents = json.loads(other.tool("map", "--json"))
    taken = sum(e["length"] for e in extents if e["data"])
    zeros = sum(all(not b for b in chunk) for chunk in
                (chain.views[3][at:at + 64 * KIB] for at in range(0, 12 * MIB, 64 * KIB)))
    note(f"{taken} bytes of 12 MiB are data, {zeros} clusters are zeros")
    expect(zeros and taken < 12 * MIB, f"{taken} bytes, {zeros} clusters of zeros")
    # One that is not in the folder of the others
    apart = bench.path("apart")
    os.makedirs(apart)
    for name in ("copy2", "copy2.data"):
        shutil.move(f"{folder}/{name}", f"{apart}/{name}")
    target = bench.path("target")
    got, out = run(TOOL, "backup", "restore", f"{apart}/copy2", target, ok=False)
    expect(got == 4 and "--trust-image-paths" in out and not os.path.exists(target), f"{got}: {out}")
    os.makedirs(chain.folder)
    for name in ("copy0", "copy1", "copy1.data"):
        shutil.move(f"{folder}/{name}", f"{chain.folder}/{name}")
    run(TOOL, "backup", "restore", f"{apart}/copy2", target, "--trust-image-paths")
    same(content(target, 12 * MIB), chain.views[2], what="from two folders")


@test("increments and restores that cannot be: what is wrong is said, and nothing has changed")
def refused(bench):
    image, dm, _ = setup(bench, 64 * KIB, 4 * MIB, None, {})
    rng = random.Random(SEED)
    chain = Chain(bench, dm, "")
    change(dm, rng)
    chain.add()
    change(dm, rng)
    chain.add()
    b = Backup(bench, [dm], "--bitmap", "c1", "--checkpoint", "c2")

    def fails(status, text, *argv):
        got, out = run(TOOL, "backup", *argv, ok=False)
        expect(got == status and text in out, f"{argv}: status {got}, not {status}, or no '{text}': {out}")
        expect(len(out.splitlines()) == 1, out)

    new, small = bench.path("new"), bench.add(Loop(bench.file("small", MIB))).path
    fails(1, "--bitmap", "copy", dm.name, new, "--increment-of", chain.path(1))
    fails(4, "came before", "copy", dm.name, new, "--bitmap", "c1", "--increment-of", new + "x")
    fails(5, "exists", "copy", dm.name, chain.path(1), "--bitmap", "c1", "--increment-of", chain.path(0))
    fails(1, "no option", "copy", dm.name, new, "--trust-image-paths")
    fails(1, "usage", "restore", chain.path(1))
    fails(1, "no option", "restore", chain.path(1), new, "--resume")
    fails(4, "no such file", "restore", chain.path(7), new)
    fails(5, "--overwrite-device", "restore", chain.path(1), dm.path)
    fails(4, "smaller", "restore", chain.path(1), small, "--overwrite-device")
    fails(5, "exists", "restore", chain.path(1), chain.path(0))
    # A device that is mounted
    run("mkfs.ext4", "-q", "-F", small)
    run("mount", small, b.dir)
    try:
        fails(5, "in use", "restore", bench.file("tiny", MIB), small, "--overwrite-device")
    finally:
        run("umount", b.dir)
    # Images that are none of ours
    shutil.copy(image.path, new)
    bench.file("new.data", 4 * MIB)
    fails(4, "names no copy before it", "restore", new, new + "2")
    run("qemu-img", "create", "-q", "-f", "qcow2", bench.path("plain"), "4M")
    bench.file("plain.data", 4 * MIB)
    fails(4, "data file", "restore", bench.path("plain"), new + "2")
    # Two that are increments of each other
    a, b_ = bench.path("a"), bench.path("b")
    for one, other in ((a, b_), (b_, a)):
        run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={one}.data", "-b", other, "-F", "qcow2", "-u",
            one, "4M")
    fails(4, "qemu-img commit", "restore", a, new + "2")
    b.end()
    expect(not os.path.exists(new + "2"), "there is a file")
    nothing_left(dm)


if __name__ == "__main__":
    main()
