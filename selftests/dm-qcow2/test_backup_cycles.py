#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""qcow2setup backup, again and again: nothing is left of those that are over, and fio below
which they begin and end finds what it has written.

Environment: SEED (printed, to repeat a run), CYCLES (that may leave nothing), RUNS (of fio).
"""
import contextlib
import glob
import hashlib
import json
import os
import random
import re
import subprocess
import time

import qcow2test
from qcow2test import GIB, KIB, MIB, Failure, Io, drop_caches, expect, main, no_kmemleaks, note, run, test
from test_backup import Backup, nothing_left
from test_checkpoint import TOOL, Opened
from test_lifecycle import Held

qcow2test.forget_tests()

SEED = int(os.environ.get("SEED", time.time_ns() // 1000 % 1000000))
CYCLES = int(os.environ.get("CYCLES", 100))
RUNS = int(os.environ.get("RUNS", 3))
note(f"SEED={SEED}")


def disks(bench, size, **options):
    """Two of them, of different kinds"""
    devices = []
    for n in range(2):
        image = bench.image(size, name=f"disk{n}", cluster=64 * KIB, raw=n == 1, **options)
        devices.append(bench.add(Opened(image, name=f"disk{n}")))
    return devices


class Memory:
    """Objects of each slab cache for memory of any kind, and pages that nobody can have back.

    Slabs that are shrunk count their objects exactly: those that a CPU allocates from are
    given back. So do pages, if those on the CPUs' lists of free ones are counted as free, and
    if processes' own ones are left out."""
    KINDS = re.compile(r"^(kmalloc|bio|radix_tree|dm_|kernfs)")
    NOT_KERNEL = ("MemFree", "Buffers", "Cached", "SReclaimable", "AnonPages", "PageTables")

    def __init__(self):
        drop_caches(3)
        for name in glob.glob("/sys/kernel/slab/*/shrink"):
            with contextlib.suppress(OSError), open(name, "w", encoding="ascii") as f:
                f.write("1")
        with open("/proc/slabinfo", encoding="ascii") as f:
            slabs = [line.split() for line in f.readlines()[2:]]
        self.objects = {words[0]: int(words[1]) for words in slabs if self.KINDS.match(words[0])}
        with open("/proc/meminfo", encoding="ascii") as f:
            sizes = {name: int(value) for name, value in re.findall(r"^(\w+): *(\d+)", f.read(), re.M)}
        with open("/proc/zoneinfo", encoding="ascii") as f:
            # Of a CPU's list; what is there of the whole zone has other names.
            on_lists = sum(map(int, re.findall(r"^ +count: +(\d+)$", f.read(), re.M)))
        page = os.sysconf("SC_PAGE_SIZE") // KIB
        self.pages = (sizes["MemTotal"] - sum(sizes[n] for n in self.NOT_KERNEL)) // page - on_lists
        self.held = Held().counts

    def compare(self, views, pages_of_view):
        """Nothing has grown with the number of views. One object, or all pages, of each would
        be more than the half that is let pass for what else goes on in the kernel."""
        now = Memory()
        grown = {n: c - self.objects.get(n, 0) for n, c in now.objects.items()}
        most = max(grown, key=grown.get)
        text = f"{views} views: {now.pages - self.pages} pages, {grown[most]} objects of {most}"
        expect(grown[most] <= views // 2, f"{text}; all: { {n: c for n, c in grown.items() if c > 20} }")
        expect(now.pages - self.pages <= views * pages_of_view // 2, text)
        for name in Held.EXACT:
            expect(now.held[name] <= self.held[name], f"{views} views: {name}: {self.held[name]}, now {now.held[name]}")
        return text


def things():
    """What there is of devices, files and names in the system. Marks of loop devices have
    their sequence numbers, and may stay until the next ones are made: they are counted."""
    files = os.listdir("/run/qcow2setup")
    marks = [f for f in files if re.match(r"loop\d+\.\d+$", f)]
    return {"dm": sorted(run("dmsetup", "ls").splitlines()),
            "run": sorted(set(files) - set(marks)), "marks": len(marks),
            "loops": sorted(run("losetup", "-n", "-l", "-O", "NAME,BACK-FILE").splitlines()),
            "semaphores": run("ipcs", "-s").splitlines()}


@test(f"{CYCLES} backups of two disks begin and end: no memory, device, file or bitmap is left", all_cpus=True)
def cycles(bench):
    # Of the states of granules there is a page for each GiB.
    size, places = 4 * GIB, [n * GIB for n in range(4)]
    devices = disks(bench, size)
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(contextlib.closing(Io(dm.path))) for dm in devices]
        for disk in opened:
            for at in places:
                disk.write(at, b"a" * 4096)

        def cycle(n):
            was = [bytes([n % 251 + 1]) * 4096, bytes([(n + 1) % 251 + 1]) * 4096]
            for disk in opened:
                disk.write(0, was[0])
            options = ["--bitmap", f"c{n}", "--checkpoint", f"c{n + 1}"]
            if n % 3 == 1:
                options.append("--dirty-only")
            b = Backup(bench, devices, *options)
            for dm, disk in zip(devices, opened):
                for at in places:
                    disk.write(at, was[1])
                with contextlib.closing(Io(f"/dev/mapper/{dm.name}-backup", readonly=True)) as view:
                    expect(view.read(0, 4096) == was[0], f"cycle {n}: the view shows something else")
            if n % 4 == 2:
                b.end("--failed")
            else:
                b.end()
            for dm in devices:
                dm.tool("bitmap remove", f"c{n}")

        for dm in devices:
            dm.tool("checkpoint", "--start", "c0")
        for n in range(8):
            cycle(n)
        before, there = Memory(), things()
        for n in range(8, 8 + CYCLES):
            cycle(n)
        for patience in range(59, -1, -1):
            try:
                note(before.compare(2 * CYCLES, len(places)))
                break
            except Failure:
                # Callbacks may still be under way.
                if not patience:
                    raise
                time.sleep(1)
        now = things()
        expect(now.pop("marks") <= there.pop("marks"), f"marks: {os.listdir('/run/qcow2setup')}")
        expect(now == there, f"before: {there}, now: {now}")
        expect(not os.listdir(bench.path("cow")), f"left in the folder: {os.listdir(bench.path('cow'))}")
        for dm in devices:
            expect(list(dm.list()) == [f"c{8 + CYCLES}"], f"bitmaps {list(dm.list())}")
    if not no_kmemleaks(6):
        note("the kernel has no kmemleak; test_leaks.sh is for one that has")
    for dm in devices:
        nothing_left(dm)
        dm.tool("bitmap remove", f"c{8 + CYCLES}")
        bench.drop(dm)
        info = json.loads(run("qemu-img", "info", "--output=json", dm.image.path))
        expect(not info["format-specific"]["data"].get("bitmaps"), f"{info}")
        run("qemu-img", "check", "-q", dm.image.path)


class Fio:
    """Several jobs, each with sizes and a part of the disk of its own, as test_with_fio.sh has
    them; each verifies what it has written."""
    JOBS = ("--name=small --rw=randrw --rwmixwrite=70 --bs=4k --offset=0 --size=4M --iodepth=16 "
            "--name=sector --rw=randwrite --bs=512 --offset=4105k --size=256k --iodepth=8 "
            "--name=odd --rw=randwrite --bs=17k --offset=11777k --size=6494k --iodepth=8 "
            "--name=large --rw=randwrite --bs=256k --offset=20m --size=12m --iodepth=4 "
            "--name=stream --rw=write --bs=1000k --offset=35m --size=10000k --iodepth=2").split()
    SIZE = 48 * MIB + 512

    def __init__(self, bench, path, seed, *options):
        self.log = bench.path("fio")
        with open(self.log, "wb") as log:
            # pylint: disable-next=consider-using-with # close() ends it
            self.process = subprocess.Popen(
                ["fio", f"--filename={path}", f"--randseed={seed}", "--direct=1", "--verify=crc32c", "--verify_fatal=1",
                 "--allow_file_create=0", "--thread", "--group_reporting", "--ioengine=libaio", *options, *self.JOBS],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        bench.add(self)

    def runs(self):
        return self.process.poll() is None

    def close(self):
        if self.runs():
            self.process.kill()
        self.process.wait()

    def finish(self, bench):
        try:
            self.process.wait(qcow2test.COMMAND_TIMEOUT * 4)
        except subprocess.TimeoutExpired as e:
            raise Failure("fio does not end") from e
        with open(self.log, encoding="utf-8", errors="replace") as f:
            out = f.read()
        expect(self.process.returncode == 0, f"fio: status {self.process.returncode}: {out[-2000:]}")
        bench.drop(self)


def digest(path):
    h = hashlib.blake2b()
    with open(path, "rb") as f:
        while data := f.read(MIB):
            h.update(data)
    return h.hexdigest()


def fio(bench, **options):
    rng = random.Random(SEED)
    dm = bench.add(Opened(bench.image(Fio.SIZE, **options)))
    copy, count, during = bench.path("copy"), 0, 0

    def backup(n):
        """Of all, or brought up to date, and compared with another copy of all"""
        changed = ("--bitmap", f"c{n - 1}") if n else ()
        running = load and load.runs()
        b = Backup(bench, [dm], *changed, "--checkpoint", f"c{n}")
        run(TOOL, "backup", "copy", dm.name, copy, *changed)
        other = digest(f"/dev/mapper/{dm.name}-backup")
        expect(digest(copy) == other, f"backup {n}: two copies of one view differ")
        b.end()
        if n:
            dm.tool("bitmap remove", f"c{n - 1}")
        return bool(running)

    for _ in range(RUNS):
        seed = rng.randrange(1, 1 << 30)
        load = Fio(bench, dm.path, seed, rng.choice(("--fdatasync=32", "--fsync=16", "--sync=dsync")))
        while True:
            during += backup(count)
            count += 1
            if not load.runs():
                break
        load.finish(bench)
    note(f"{count} backups, {during} of them began while fio was running")
    expect(during >= RUNS, f"only {during} backups began while fio was running")
    load = None
    backup(count)
    # What fio had written last is in the copy, too; the folder may be on tmpfs.
    for path, more in (dm.path, ()), (copy, ("--direct=0", "--ioengine=sync")):
        Fio(bench, path, seed, "--verify_only", *more).finish(bench)
    expect(digest(copy) == digest(dm.path), "the copy is not what the device holds at rest")
    nothing_left(dm)
    bench.drop(dm)
    run("qemu-img", "check", "-q", dm.image.path)


for _name, _options in (("clusters of 64 KiB", {"cluster": 64 * KIB}),
                        ("data_file_raw", {"cluster": 64 * KIB, "raw": True}),
                        ("clusters of 16 KiB, extended L2", {"cluster": 16 * KIB, "extended": True})):
    test(f"fio verifies, while backups begin, are copied and end below it: {_name}", all_cpus=True)(
        lambda bench, options=_options: fio(bench, **options))


if __name__ == "__main__":
    main()
