#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""The life of a device, again and again, and its end in the wrong order.

What test_reload.sh has under load is not repeated here.
"""
import contextlib
import errno
import glob
import os
import re
import shutil
import threading
import time

from qcow2test import (DM_DEV_CREATE, DM_DEV_REMOVE, DM_DEV_SUSPEND, DM_NOFLUSH_FLAG, DM_TABLE_CLEAR, DM_TABLE_LOAD,
                       HERE, KIB, KMEMLEAK, MIB, Failure, Io, Lower, Task, dm_ioctl, drop_caches, expect, fails_with,
                       main, no_kmemleaks, note, run, same, sysfs, test, wait_for)

CLUSTER = 64 * KIB
CYCLES = int(os.environ.get("LIFECYCLE_CYCLES", "1000"))
HANG = 120


# Leaks

class Held:
    """What the kernel holds: objects of all slab caches, pages, threads, devices."""

    def __init__(self):
        # What can be freed is no leak: the names below /proc that are looked at here, too.
        drop_caches()
        for name in glob.glob("/sys/kernel/slab/*/shrink"):
            with contextlib.suppress(OSError), open(name, "w", encoding="ascii") as f:
                f.write("1")
        self.counts, self.noise = {}, {}
        with open("/proc/slabinfo", encoding="ascii") as f:
            for line in f.readlines()[2:]:
                name, active, _, size, per_slab, *_ = line.split()
                # Freed by and by; VmallocUsed tells.
                if name == "vmap_area":
                    continue
                name += f" ({size} bytes)"
                self.counts[name] = int(active)
                # A CPU's slab counts as full.
                self.noise[name] = 2 * os.cpu_count() * int(per_slab)
        with open("/proc/meminfo", encoding="ascii") as f:
            for line in f:
                name, value, *_ = line.replace(":", " ").split()
                if name in ("Percpu", "VmallocUsed", "KernelStack", "PageTables"):
                    self.counts[name + " (KiB)"] = int(value)
        self.counts["processes and threads"] = len(glob.glob("/proc/[0-9]*"))
        self.counts["block devices"] = len(os.listdir("/sys/block"))
        self.counts["loop devices in use"] = len(glob.glob("/sys/block/loop*/loop"))
        self.counts["descriptors"] = len(os.listdir("/proc/self/fd"))
        self.counts["rescuers of work queues"] = sum(map(self.rescuer, glob.glob("/proc/[0-9]*/comm")))
        # Pages that are neither free nor in a cache (files on tmpfs are in one)
        with open("/proc/meminfo", encoding="ascii") as f:
            pages = {name: int(value) // 4 for name, value in re.findall(r"^(\w+): *(\d+)", f.read(), re.M)}
        self.counts[self.MEMORY] = pages["MemTotal"] - sum(pages[n] for n in self.CACHES)

    @staticmethod
    def rescuer(path):
        with contextlib.suppress(OSError), open(path, encoding="ascii", errors="replace") as f:
            return f.read().startswith(("dm-qcow2", "kdmflush"))
        return False

    # There are as many as before, or there is a leak; all else has some noise.
    EXACT = ("loop devices in use", "descriptors", "block devices", "rescuers of work queues")
    NOISE = 100
    MEMORY = "pages in use"
    CACHES = ("MemFree", "Buffers", "Cached", "SReclaimable")

    def compare(self, cycles, what):
        """Nothing may have grown with the number of cycles. Where they are few, all but
        what is exact would be noise, most of it from the processes that they need."""
        now = Held().counts
        grown = {}
        for name, count in now.items():
            more = count - self.counts.get(name, 0)
            if name not in self.EXACT and cycles < self.NOISE:
                continue
            noise = max(cycles // 2, self.NOISE, self.noise.get(name, 0))
            if name == self.MEMORY:
                # Free pages on the CPUs' lists count as in use, and there are thousands of
                # them. What slabs do not have is larger: it is at least 4 pages, mostly 16.
                noise = 8 * max(cycles, 1000)
            if more > (0 if name in self.EXACT else noise):
                grown[name] = more
        expect(not grown, f"after {cycles} {what}: more {grown}")
        most = sorted(((now[n] - self.counts.get(n, 0), n) for n in now), reverse=True)[:3]
        note(f"{cycles} {what}; most growth: {', '.join(f'{n} {m}' for m, n in most)}")


@contextlib.contextmanager
def no_leaks(cycles, what):
    """What the body does must not leave anything in the kernel."""
    if os.path.exists(KMEMLEAK):
        with open(KMEMLEAK, "w", encoding="ascii") as f:
            f.write("clear")
    before = Held()
    yield
    # Callbacks may still be under way.
    for patience in range(59, -1, -1):
        try:
            before.compare(cycles, what)
            break
        except Failure:
            if not patience:
                raise
            time.sleep(1)
    no_kmemleaks(1)


class Cycler:
    """Makes tables and removes them again, with as little as possible around it; every
    tenth time the whole device. What the target does for it is the same."""

    def __init__(self, line):
        self.name, self.line, self.path = f"qcow2test{os.getpid()}-c", line, None

    def close(self):
        if self.path:
            dm_ioctl(DM_DEV_REMOVE, self.name)
        self.path = None

    def cycle(self, number):
        if number % 10 == 0:
            self.close()
            device = dm_ioctl(DM_DEV_CREATE, self.name).device
            self.path = f"/dev/dm-{device & 0xff | device >> 12 & 0xfff00}"
        dm_ioctl(DM_TABLE_LOAD, self.name, self.line)
        dm_ioctl(DM_DEV_SUSPEND, self.name)
        if number % 8 == 0:
            self.work(number)

    def work(self, number):
        disk = Io(self.path)
        try:
            at = number % 97 * CLUSTER
            disk.write(at + 512, b"w" * 512)
            if number % 16:
                disk.fsync()
            disk.discard(at, CLUSTER)
            disk.read(0, 2 * CLUSTER)
        finally:
            disk.close()


@test(f"{CYCLES} times a table is made, used and removed: nothing is leaked")
def cycles_of_devices(bench):
    image = bench.some_image()
    cycler = bench.add(Cycler(image.line(image.meta_loop.path, image.data_loop.path)))
    for number in range(40):
        cycler.cycle(number)
    cycler.close()
    with no_leaks(CYCLES, "cycles"):
        for number in range(CYCLES):
            cycler.cycle(number)
        cycler.close()
    image.check()


def wrong_lines(image, line):
    """Lines that the constructor refuses, each at another point."""
    words = line.split(" ")

    def with_word(number, value):
        return " ".join(words[:number] + [str(value)] + words[number + 1:])
    return {
        "no metadata device": with_word(3, "/dev/none"),
        "no data device": with_word(4, "/dev/none"),
        "the same device twice": with_word(4, words[3]),
        "cluster_bits": with_word(5, 17),
        "l1_offset": with_word(6, image.get("l1_table_offset") + image.cluster),
        "l1_entries": with_word(7, image.get("l1_size") + 1),
        "refcount_table_offset": with_word(8, image.get("refcount_table_offset") + image.cluster),
        "refcount_table_clusters": with_word(9, 2),
        "refcount_order": with_word(10, 5),
        "a length that is not the image's": with_word(1, int(words[1]) - 8),
        "longer than the data device": with_word(1, int(words[1]) + 8),
        "not a number": with_word(5, "sixteen"),
        "too few words": " ".join(words[:-1]),
        "an unknown feature": line + " 1 fast",
        "a feature without its value": line + " 1 cache_limit",
        "a backing device that the image has not": line + f" 2 backing_dev {image.spare}",
        "data_file_raw": line + " 1 data_file_raw",
        "extended_l2": line + " 1 extended_l2",
    }


@test("wrong lines on a device in use: refused, the old table stays and works, nothing is leaked")
def wrong_reloads(bench):
    image = bench.some_image()
    image.spare = bench.add(Lower(bench, "spare", image.data_loop.path)).path
    dm = image.open()
    disk = bench.io(dm)
    line, table = dm.line, dm.table()
    lines = wrong_lines(image, line)
    for n, (what, wrong) in enumerate(lines.items()):
        with contextlib.suppress(OSError):
            dm_ioctl(DM_TABLE_LOAD, dm.name, wrong)
            raise Failure(f"{what}: accepted: {wrong}")
        # A resume finds no new table.
        dm.resume()
        expect(dm.table() == table and dm.mode() == "rw", f"{what}: {dm.table()} {dm.status()}")
        disk.write((8 + n) * CLUSTER + 512, bytes([n + 1]) * 512)
        same(disk.read((8 + n) * CLUSTER, 1536), bytes(512) + bytes([n + 1]) * 512 + bytes(512))
    disk.fsync()
    rounds = 20
    with no_leaks(rounds * len(lines), "refused lines"):
        for _ in range(rounds):
            for wrong in lines.values():
                with contextlib.suppress(OSError):
                    dm_ioctl(DM_TABLE_LOAD, dm.name, wrong)
        for _ in range(20):
            dm_ioctl(DM_TABLE_LOAD, dm.name, line)
        dm_ioctl(DM_TABLE_CLEAR, dm.name)
    bench.drop(disk)
    bench.drop(dm)
    image.check()


@test("the tool opens and closes: no loop devices, nothing is leaked")
def cycles_of_the_tool(bench):
    tool = os.environ.get("QCOW2SETUP", os.path.join(HERE, "../../tools/qcow2setup"))
    if not os.access(tool, os.X_OK):
        tool = shutil.which("qcow2setup")
    expect(tool, "qcow2setup is neither built nor installed")
    image = bench.image(8 * MIB)
    name = f"qcow2test{os.getpid()}-t"
    rounds = 24

    def once(number):
        run(tool, "open", image.path, name, "--data-file", image.data)
        try:
            if number % 4 == 0:
                disk = Io(f"/dev/mapper/{name}")
                disk.write(number * CLUSTER, b"t" * 512)
                disk.close()
        finally:
            run(tool, "close", name, *(("--deferred",) if number % 2 else ()))
    once(0)
    with no_leaks(rounds, "cycles of the tool"):
        for number in range(rounds):
            once(number)
        wait_for("loop devices are gone", 30, lambda: not glob.glob("/sys/block/loop*/loop"))
    image.check()


# The end

@test("deferred removal under I/O: the device goes when the last one closes it")
def deferred(bench):
    image = bench.some_image()
    dm = image.open()
    disk = bench.io(dm)
    model = bench.model(image.size)
    model.write(0, b"a" * 2 * CLUSTER)
    stop = threading.Event()

    def load(first):
        n = 0
        while not stop.is_set():
            at = (4 + (n * 3 + first) % 100) * CLUSTER + first * 4096
            disk.write(at, bytes([n % 255 + 1]) * 4096)
            model.write(at, bytes([n % 255 + 1]) * 4096)
            n += 1
            if n % 8 == 0:
                disk.fsync()
    tasks = [Task(load, first) for first in range(3)]
    try:
        time.sleep(0.3)
        run("dmsetup", "remove", "--deferred", dm.name)
        with fails_with(errno.EBUSY):
            dm.remove()
        time.sleep(0.3)
        expect(dm.mode() == "rw", f"{dm.status()}")
    finally:
        stop.set()
        for task in tasks:
            task.finish(HANG)
    expect(os.path.exists(sysfs(dm.path)), "gone while it was open")
    path = sysfs(dm.path)
    bench.drop(disk)
    wait_for("it is gone", 60, lambda: not os.path.exists(path))
    bench.things.remove(dm)
    image.check()
    image.compare(model)


@test("suspend --noflush with I/O in flight, and another table")
def noflush(bench):
    image = bench.some_image()
    meta, data = Lower(bench, "meta", image.meta_loop.path), Lower(bench, "data", image.data_loop.path)
    dm = image.open(meta=meta.path, data=data.path)
    disk = bench.io(dm)
    model = bench.model(image.size)
    model.write(0, b"a" * 2 * CLUSTER)
    data.slow(reads=300, writes=300)

    def write(n):
        at = (4 + n) * CLUSTER + 512
        disk.write(at, bytes([n + 1]) * 1024)
        model.write(at, bytes([n + 1]) * 1024)
    for after in (lambda: None, lambda: dm_ioctl(DM_TABLE_LOAD, dm.name, dm.line)):
        tasks = [Task(write, n) for n in range(24)] + [Task(disk.fsync)]
        time.sleep(0.1)
        dm.suspend(DM_NOFLUSH_FLAG)
        # These have to wait.
        tasks += [Task(write, n) for n in range(30, 36)]
        time.sleep(0.2)
        expect(all(t.is_alive() for t in tasks[-6:]), "a write went through a device that is suspended")
        after()
        dm.resume()
        for task in tasks:
            task.finish(HANG)
        expect(dm.mode() == "rw", f"{dm.status()}")
    data.good()
    bench.drop(disk)
    bench.drop(dm)
    image.check()
    image.compare(model)


@test("torn down in the wrong order: what is below stays until the target goes")
def wrong_order(bench):
    image = bench.some_image()
    lower = Lower(bench, "data", image.data_loop.path)
    dm = image.open(data=lower.path)
    disk = bench.io(dm)
    content = b"a" * 2 * CLUSTER
    with fails_with(errno.EBUSY):
        lower.dm.remove()
    # Both are in use: they are only detached when the last user goes.
    for loop in (image.meta_loop, image.data_loop):
        run("losetup", "-d", loop.path)
        bench.things.remove(loop)
    for module in ("dm_qcow2", "loop"):
        status, out = run("rmmod", module, ok=False)
        expect(status and "in use" in out, f"rmmod {module}: {status} {out}")
    # The names of the files go, too.
    kept = bench.path("kept")
    os.link(image.path, kept)
    os.link(image.data, kept + ".data")
    os.unlink(image.path)
    os.unlink(image.data)
    disk.write(40 * CLUSTER + 512, b"w" * 512)
    disk.fsync()
    same(disk.read(0, 2 * CLUSTER), content)
    expect(dm.mode() == "rw", f"{dm.status()}")
    bench.drop(disk)
    bench.drop(dm)
    bench.drop(lower)
    bench.drop(lower.dm)
    wait_for("the loop devices are gone", 30, lambda: not glob.glob("/sys/block/loop*/loop"))
    os.link(kept, image.path)
    os.link(kept + ".data", image.data)
    image.check()
    model = bench.model(image.size)
    model.write(0, content)
    model.write(40 * CLUSTER + 512, b"w" * 512)
    image.compare(model)


if __name__ == "__main__":
    main()
