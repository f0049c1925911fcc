#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""qcow2setup backup: disks as they were at one instant, while they are used.

Environment: SEED (printed, to repeat a run), ROUNDS (of chains of backups).
"""
import contextlib
import json
import os
import random
import time

from qcow2test import KIB, MIB, Io, Loop, Task, dm_ioctl, expect, fails_with, main, note, run, same, test, wait_for, DM_TABLE_STATUS
from test_checkpoint import KINDS, TOOL, Copy, Opened, Writers, setup, words

import errno
import qcow2test

# Those of test_checkpoint
qcow2test.forget_tests()

SEED = int(os.environ.get("SEED", time.time_ns() // 1000 % 1000000))
ROUNDS = int(os.environ.get("ROUNDS", 4))
note(f"SEED={SEED}")


class Backup:
    """Of one device or more, begun"""

    def __init__(self, bench, devices, *options):
        self.devices = devices
        self.dir = bench.path("cow")
        os.makedirs(self.dir, exist_ok=True)
        run(TOOL, "backup", "begin", *(d.name for d in devices), "--cow", self.dir, *options)

    def status(self, device):
        (found,) = json.loads(run(TOOL, "backup", "status", device.name, "--json"))
        return found

    def view(self, device):
        with contextlib.closing(Io(f"/dev/mapper/{device.name}-backup", readonly=True)) as disk:
            return disk.read(0, device.image.size)

    def end(self, *options):
        run(TOOL, "backup", "end", *(d.name for d in self.devices), *options)


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


for _kind in KINDS:
    test(f"a backup shows what was: {words(_kind)}", *_kind)(shown)


if __name__ == "__main__":
    main()
