#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""qcow2setup monitor: room for metadata is made before a write fails for want of it.

What is written goes by steps: nothing is written between the event and the line that
says that there is room again, so that no pace of the machine decides.
"""
import errno
import os
import shlex
import signal
import subprocess

import qcow2test
from qcow2test import KIB, MIB, Dm, Ext4, Failure, Io, Loop, expect, fails_with, main, run, test, wait_for

TOOL = os.path.join(qcow2test.HERE, "../../tools/qcow2setup")
CLUSTER = 4 * KIB
COVER = CLUSTER * CLUSTER // 8
TABLES = 40
SIZE = TABLES * COVER


class Monitor:
    """The process; what it says is in a file."""

    def __init__(self, bench, command=""):
        self.log = bench.path("monitor.log")
        with open(self.log, "wb") as f:
            self.process = subprocess.Popen([TOOL, "monitor", "--extend-command", command],  # pylint: disable=R1732
                                            stdin=subprocess.DEVNULL, stdout=f, stderr=f)

    def said(self, text):
        with open(self.log, encoding="utf-8") as f:
            return [line for line in f.read().splitlines() if text in line]

    def waits_for(self, text, times=1):
        try:
            wait_for(f"'{text}' of the monitor", 120, lambda: len(self.said(text)) >= times)
        except Failure as e:
            raise Failure(f"{e}; it said {self.said('')}") from e

    def close(self):
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(timeout=120)
        expect(status == 0, f"the monitor ended with {status}: {self.said('')}")


class Opened:
    def __init__(self, meta, data, *options):
        self.name = f"qcow2test{os.getpid()}-monitor"
        self.path = f"/dev/mapper/{self.name}"
        run(TOOL, "open", meta, self.name, "--data-file", data, *options)

    def status(self):
        return Dm.status(self)

    def write(self, table):
        """The first write into this part of the disk"""
        disk = Io(self.path)
        try:
            disk.write(table * COVER, b"w" * CLUSTER)
            disk.fsync()
        finally:
            disk.close()

    def close(self):
        run(TOOL, "close", self.name)


class Small:
    """A metadata device with room for some tables, but not for all."""

    def __init__(self, bench, tables):
        self.loop = bench.add(Loop(bench.file("meta", 4 * MIB)))
        self.data = bench.file("data", SIZE)
        self.meta = bench.add(Dm("meta", f"0 8192 linear {self.loop.path} 0"))
        run(TOOL, "create", self.meta.path, "--data-file", self.data, "--size", SIZE, "--cluster-size", "4k",
            "--overwrite-device")
        # Header, refcount table and block, L1: what there is at the beginning
        self.meta.load(self.table((4 + tables) * CLUSTER))
        # There may be no udev, which gives it its name.
        self.meta.setup("mknodes")
        self.dm = bench.add(Opened(self.meta.path, self.data))
        self.tables = 0

    def table(self, size):
        return f"0 {size // 512} linear {self.loop.path} 0"

    def longer(self):
        """A shell command, as there are for volumes"""
        name, table = shlex.quote(self.meta.name), shlex.quote(self.table(4 * MIB))
        return f"dmsetup reload {name} --table {table} && dmsetup resume {name}"

    def until_low(self):
        """Write into one part after another, until the target says that clusters get rare."""
        while self.dm.status().free_clusters > 16:
            self.dm.write(self.tables)
            self.tables += 1
        expect(self.tables < TABLES - 16, f"all has room: {self.dm.status()}")

    def the_rest(self):
        while self.tables < TABLES:
            self.dm.write(self.tables)
            self.tables += 1
        status = self.dm.status()
        expect(status.mode == "rw" and status.refused == 0, f"{status}")


@test("a metadata device gets longer when its clusters get rare, and no write fails")
def device(bench):
    s = Small(bench, 22)
    seen = bench.path("seen")
    monitor = bench.add(Monitor(
        bench, f'echo "$QCOW2_NAME $QCOW2_DEVICE <$QCOW2_FILE> $QCOW2_MORE" >> {seen}; {s.longer()}'))
    expect(not monitor.said(""), f"{monitor.said('')}")
    s.until_low()
    monitor.waits_for("has room for metadata again")
    expect(s.dm.status().free_clusters > TABLES - s.tables, f"{s.dm.status()}")
    s.the_rest()
    with open(seen, encoding="utf-8") as f:
        lines = f.read().splitlines()
    expect(len(lines) == 1, f"the command ran {len(lines)} times: {lines}")
    name, path, file, more = lines[0].split()
    expect(name == s.dm.name and os.stat(path).st_rdev == os.stat(s.meta.path).st_rdev and file == "<>", lines[0])
    expect((TABLES - s.tables) * CLUSTER <= int(more) <= 4 * MIB, lines[0])
    expect(len(monitor.said("room for metadata is low")) == 1, f"{monitor.said('')}")


@test("one that was low before the monitor began is found at once")
def before(bench):
    s = Small(bench, 22)
    s.until_low()
    monitor = bench.add(Monitor(bench, s.longer()))
    monitor.waits_for("has room for metadata again")
    s.the_rest()


@test("without a command it says what to do, once, and that helps")
def by_hand(bench):
    s = Small(bench, 22)
    s.until_low()
    monitor = bench.add(Monitor(bench))
    monitor.waits_for("is still missing; enlarge")
    (line,) = monitor.said("is still missing; enlarge")
    s.meta.load(s.table(4 * MIB))
    command = line.split("then run ", 1)[1].split()
    expect(command[0] == "qcow2setup", line)
    run(TOOL, *command[1:])
    s.the_rest()
    expect(len(monitor.said("is still missing")) == 1, f"{monitor.said('')}")


@test("a command that fails is told, and the device goes on")
def failing(bench):
    s = Small(bench, 22)
    s.until_low()
    monitor = bench.add(Monitor(bench, "exit 3"))
    monitor.waits_for("the extend command has failed (status 3); run it by hand")
    monitor.waits_for("is still missing; enlarge")
    with fails_with(errno.ENOSPC):
        s.the_rest()
    monitor.waits_for("is still missing", 2)


@test("a sparse image file gets its space while there is some")
def sparse(bench):
    fs = bench.add(Ext4(bench, 24 * MIB, "-b", "4096"))
    image, data = f"{fs.path}/image", bench.file("data", 16 * 1024 * MIB)
    run(TOOL, "create", image, "--data-file", data, "--cluster-size", "16k")
    dm = bench.add(Opened(image, data, "--sparse"))
    length = os.stat(image).st_size
    missing = length - os.stat(image).st_blocks * 512
    expect(missing > 4 * MIB, f"{image} is not sparse: {os.stat(image)}")
    monitor = bench.add(Monitor(bench))
    # Somebody else takes space; there is enough for the image yet.
    free = os.statvfs(fs.path)
    with open(f"{fs.path}/other", "wb") as f:
        os.posix_fallocate(f.fileno(), 0, free.f_bavail * free.f_frsize - missing * 3 // 2)
    monitor.waits_for("has room for metadata again")
    expect(os.stat(image).st_blocks * 512 >= length, f"{os.stat(image)}")
    fs.fill()
    disk = bench.io(dm)
    for at in range(0, 16 * 1024 * MIB, 1024 * MIB):
        disk.write(at, b"w" * CLUSTER)
    disk.fsync()
    expect(dm.status().mode == "rw" and dm.status().refused == 0, f"{dm.status()}")
    disk.close()


@test("SIGTERM ends it")
def ends(bench):
    monitor = Monitor(bench)
    wait_for("the monitor to poll", 120, lambda: "poll" in wchan(monitor.process.pid))
    monitor.close()


def wchan(pid):
    try:
        with open(f"/proc/{pid}/wchan", encoding="ascii") as f:
            return f.read()
    except OSError as e:
        raise Failure(f"the monitor is gone: {e}") from e


if __name__ == "__main__":
    main()
