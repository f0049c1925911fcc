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
                       HERE, KIB, MIB, Failure, Io, Loop, Lower, NullBlk, Task, dm_ioctl, drop_caches, expect,
                       fails_with, main, note, run, same, sysfs, test, wait_for)

CLUSTER = 64 * KIB
CYCLES = int(os.environ.get("LIFECYCLE_CYCLES", "1000"))
HANG = 120
# What a device that is gone may answer
GONE = (errno.EIO, errno.ENODEV, errno.ENXIO, errno.EOPNOTSUPP)


def make(bench, size=8 * MIB, **options):
    """An image with some data in it, on loop devices."""
    image = bench.image(size, **options)
    image.poison()
    image.qemu_io("write -q -P 97 0 128k")
    image.trim()
    image.attach()
    return image


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
    leaks = "/sys/kernel/debug/kmemleak"
    if os.path.exists(leaks):
        with open(leaks, "w", encoding="ascii") as f:
            f.write("clear")
    before = Held()
    yield
    # Callbacks may still be under way.
    for patience in range(4, -1, -1):
        try:
            before.compare(cycles, what)
            break
        except Failure:
            if not patience:
                raise
            time.sleep(1)
    if os.path.exists(leaks):
        for _ in range(2):
            time.sleep(1)
            with open(leaks, "w", encoding="ascii") as f:
                f.write("scan")
        with open(leaks, encoding="ascii") as f:
            found = f.read()
        expect(not found, f"kmemleak: {found[:2000]}")


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
    image = make(bench)
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
    image = make(bench)
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
    image = make(bench)
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
    run("modprobe", "dm-delay")
    image = make(bench)
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
    image = make(bench)
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


# Devices that vanish

class Scsi:
    """A SCSI disk in memory that can be pulled out; what it holds is there again
    when it is put in."""

    def __init__(self, bench, size):
        run("modprobe", "scsi_debug", f"dev_size_mb={size // MIB}", "lbpu=1", "delay=1")
        run("modprobe", "sd_mod")
        self.find()

    def find(self):
        def disks():
            return glob.glob("/sys/bus/pseudo/drivers/scsi_debug/adapter*/host*/target*/*:*/block/sd*")
        wait_for("a SCSI disk", 60, disks)
        self.path = "/dev/" + os.path.basename(disks()[0])
        self.device = os.path.dirname(os.path.dirname(disks()[0]))
        wait_for(self.path, 10, lambda: os.path.exists(self.path))

    def vanish(self):
        with open(f"{self.device}/delete", "w", encoding="ascii") as f:
            f.write("1")

    def back(self):
        host = re.search(r"/host(\d+)/", self.device)[1]
        with open(f"/sys/class/scsi_host/host{host}/scan", "w", encoding="ascii") as f:
            f.write("- - -")
        self.find()
        return self.path

    def close(self):
        run("modprobe", "-r", "scsi_debug")


class Null(NullBlk):
    """A disk that can be switched off, with all that it holds."""

    def __init__(self, bench, size):
        super().__init__(size)

    def vanish(self):
        self.set("power", 0)

    back = None


class Forced:
    """A device-mapper device whose table is replaced by one that fails."""

    def __init__(self, bench, size):
        self.lower = Lower(bench, "vanishing", bench.add(Loop(bench.file("vanishing", size))).path)
        self.path = self.lower.path

    def vanish(self):
        # It is in use and stays, but there is nothing behind it any more.
        run("dmsetup", "remove", "--force", self.lower.dm.name, ok=False)

    def back(self):
        self.lower.good()
        return self.path

    def close(self):
        pass


def make_room(image):
    """Room for all metadata, in whole MiB, as a device has it."""
    image.extend()
    os.truncate(image.path, -(-image.file_size() // MIB) * MIB)


def fill_device(path, file):
    """Copy a file onto a device."""
    run("dd", f"if={file}", f"of={path}", "bs=1M", "oflag=direct", "conv=nocreat", "status=none")


def read_device(path, file, *options):
    """Copy what a device holds back into a file."""
    run("dd", f"if={path}", f"of={file}", "bs=1M", "iflag=direct", "conv=notrunc", "status=none", *options)


def vanish(bench, kind, role, moment):
    """A device below goes away under a load, or in the middle of suspend or removal."""
    unit = 4 * KIB
    image = bench.image(8 * MIB, cluster=unit)
    image.qemu_io("write -q -P 97 0 128k")
    image.trim()
    make_room(image)
    device = bench.add(kind(bench, 8 * MIB))
    fill_device(device.path, image.path if role == "meta" else image.data)
    image.attach()
    dm = image.open(**{role: device.path})
    disk = bench.io(dm)
    acknowledged = {}
    stop = threading.Event()
    errors = []

    def load(first):
        """First-write, flush, and note what was acknowledged, until something fails.
        There are more places than can be written until then: only first writes need
        both devices."""
        for n in range(560):
            if stop.is_set():
                return
            at = (64 + 3 * n + first) * unit
            byte = bytes([n % 250 + 1])
            try:
                disk.write(at + 512, byte * 512)
                disk.fsync()
            except OSError as e:
                errors.append(e.errno)
                return
            acknowledged[at + 512] = byte
    tasks = [Task(load, first) for first in range(3)]
    try:
        wait_for("some writes", 60, lambda: len(acknowledged) > 12)
        if moment == "suspend":
            task = Task(dm.suspend)
            device.vanish()
            task.finish(HANG)
        elif moment == "suspended":
            dm.suspend()
            device.vanish()
        else:
            device.vanish()
        resumed = moment == "load" or resumes(dm)
        if moment == "suspended":
            expect(not resumed, "resumed without the header")
            expect(all(t.is_alive() for t in tasks), f"a request of a suspended device has ended: {errors}")
        if not resumed:
            # The load waits: for the device, or for an end to it all.
            dm.setup("wipe_table")
        wait_for("the load ends", HANG, lambda: not any(t.is_alive() for t in tasks))
    finally:
        stop.set()
        if any(t.is_alive() for t in tasks):
            dm.setup("wipe_table", ok=False)
        for task in tasks:
            task.finish(HANG)
    expect(errors and set(errors) <= set(GONE), f"errnos {[errno.errorcode[e] for e in errors]}")
    # Both devices are needed to make a first write durable, so nothing more is.
    try:
        disk.write(7 * MIB, b"x" * 512)
        disk.fsync()
    except OSError as e:
        expect(e.errno in GONE, f"errno {errno.errorcode[e.errno]}")
    else:
        raise Failure("a first write without its device was acknowledged")
    bench.drop(disk)
    task = Task(bench.drop, dm)
    task.finish(HANG)
    return image, device, acknowledged


def resumes(dm):
    """A device below is gone: resume may fail, but not hang. It does where the suspend
    has left nothing to do and the header cannot be read: nothing is lost yet."""
    try:
        dm.resume()
    except OSError as e:
        expect(e.errno in (*GONE, errno.EINVAL), f"resume: {errno.errorcode[e.errno]}")
        return False
    return True


@test("vanish: a SCSI disk under the metadata", Scsi, "meta", "load")
@test("vanish: a SCSI disk under the data", Scsi, "data", "load")
@test("vanish: a SCSI disk under the metadata, while it is suspended", Scsi, "meta", "suspend")
@test("vanish: a SCSI disk under the data, while it is suspended", Scsi, "data", "suspend")
@test("vanish: a SCSI disk under the metadata of a suspended device", Scsi, "meta", "suspended")
@test("vanish: forced removal below the metadata", Forced, "meta", "load")
@test("vanish: forced removal below the data", Forced, "data", "suspend")
@test("vanish: null_blk under the metadata is switched off", Null, "meta", "load")
@test("vanish: null_blk under the data is switched off", Null, "data", "suspend")
def vanishing(bench, kind, role, moment):
    image, device, acknowledged = vanish(bench, kind, role, moment)
    if not device.back:
        if role == "data":
            image.check(leaks=True)
        return
    # Plugged in again: what was acknowledged is there.
    path = device.back()
    if role == "meta":
        read_device(path, image.path)
    else:
        read_device(path, image.data, f"count={image.size // MIB}")
    image.check(leaks=True)
    content = image.content()
    same(content[:2 * CLUSTER], b"a" * 2 * CLUSTER)
    lost = [at for at, byte in acknowledged.items()
            if content[at:at + 512] == bytes(512) or content[at - 512:at] != bytes(512)]
    expect(not lost, f"acknowledged, but lost: {[hex(at) for at in lost[:5]]} of {len(acknowledged)}")
    note(f"{len(acknowledged)} places acknowledged")


@test("vanish: a SCSI disk under the metadata of a suspended device, plugged in again")
def comes_back(bench):
    """What cannot resume keeps its requests; a table with the disk's new name ends the wait."""
    image = make(bench)
    make_room(image)
    device = bench.add(Scsi(bench, 8 * MIB))
    fill_device(device.path, image.path)
    dm = image.open(meta=device.path)
    disk = bench.io(dm)
    disk.write(3 * CLUSTER, b"3" * CLUSTER)
    dm.suspend()
    device.vanish()
    expect(not resumes(dm), "resumed without the header")
    tasks = [Task(disk.write, at * CLUSTER + 512, bytes([at]) * 512) for at in range(10, 20)]
    read = Task(lambda: same(disk.read(3 * CLUSTER, CLUSTER), b"3" * CLUSTER))
    time.sleep(1)
    expect(all(t.is_alive() for t in (*tasks, read)), "a request of a suspended device has ended")
    path = device.back()
    dm.load(image.line(path, image.data_loop.path))
    for task in (*tasks, read):
        task.finish(HANG)
    disk.fsync()
    bench.drop(disk)
    bench.drop(dm)
    read_device(path, image.path)
    image.check()
    model = bench.model(image.size)
    model.write(0, b"a" * 2 * CLUSTER)
    model.write(3 * CLUSTER, b"3" * CLUSTER)
    for at in range(10, 20):
        model.write(at * CLUSTER + 512, bytes([at]) * 512)
    image.compare(model)


if __name__ == "__main__":
    main()
