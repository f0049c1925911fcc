#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Devices that go while the target has them: pulled out, switched off, removed by force.
"""
import errno
import glob
import os
import re
import threading
import time

from qcow2test import KIB, MIB, Failure, Loop, Lower, NullBlk, Task, expect, main, note, run, same, test, wait_for

CLUSTER = 64 * KIB
HANG = 120
# What a device that is gone may answer
GONE = (errno.EIO, errno.ENODEV, errno.ENXIO, errno.EOPNOTSUPP)


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
        wait_for(self.path, 60, self.can_be_opened)

    def can_be_opened(self):
        """The node may be there before the disk is, or still be that of the one before."""
        try:
            with open(self.path, "rb", buffering=0) as f:
                return f.seek(0, os.SEEK_END) > 0
        except OSError:
            return False

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
    image = bench.some_image()
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
