#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""qcow2setup import to devices, and from images that are in use. What needs no device is in tools/tests/import.sh."""
import os
import random

from qcow2test import KIB, MIB, Io, Loop, expect, main, run, same, test
from setup_tool import refused, tool

SIZE = 8 * MIB
NAME = f"qcow2test{os.getpid()}-import"


class Source:
    """An image of QEMU's with data, zeros and holes, and devices for it"""

    def __init__(self, bench):
        self.bench = bench
        self.content = random.Random(5).randbytes(MIB) + bytes(2 * MIB) + b"x" * (64 * KIB) + bytes(SIZE - 3 * MIB - 64 * KIB)
        self.raw, self.image = bench.path("content.raw"), bench.path("source.qcow2")
        with open(self.raw, "wb") as f:
            f.write(self.content)
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", self.raw, self.image)

    def device(self, size, name="target"):
        """What was on it must not show through where the image has zeros."""
        with open(self.bench.path(name), "wb") as f:
            f.write(b"\xee" * size)
        return self.bench.add(Loop(self.bench.path(name))).path


def content(path, length):
    disk = Io(path, readonly=True)
    try:
        return disk.read(0, length)
    finally:
        disk.close()


@test("to a device of the same size, and to a larger one: what is behind the disk stays")
def devices(bench):
    s = Source(bench)
    for n, more in enumerate((0, 4 * MIB)):
        device = s.device(SIZE + more, f"target{n}")
        refused(5, "--overwrite-device", "import", s.image, device)
        same(content(device, SIZE), b"\xee" * SIZE, what="a device that was refused")
        tool("import", s.image, device, "--overwrite-device", "--verify")
        same(content(device, SIZE + more), s.content + b"\xee" * more, what="device")


@test("refused: a device that is too small, mounted, or below another device")
def refused_devices(bench):
    s = Source(bench)
    small = s.device(SIZE - 512, "small")
    refused(4, "smaller.*enlarge", "import", s.image, small, "--overwrite-device")
    device = s.device(2 * SIZE, "busy")
    run("dmsetup", "create", NAME, "--table", f"0 8 linear {device} 0")
    try:
        refused(5, NAME, "import", s.image, device, "--overwrite-device")
    finally:
        run("dmsetup", "remove", "--retry", NAME)
    run("mkfs.ext4", "-q", "-F", device)
    os.mkdir(bench.path("mnt"))
    run("mount", device, bench.path("mnt"))
    try:
        refused(5, "mounted", "import", s.image, device, "--overwrite-device")
    finally:
        run("umount", bench.path("mnt"))
    tool("import", s.image, device, "--overwrite-device", "--verify")


@test("what was imported is opened with --data-file-raw, and is the disk")
def opened(bench):
    s = Source(bench)
    device = s.device(SIZE)
    tool("import", s.image, device, "--overwrite-device")
    tool("create", bench.path("i.qcow2"), "--data-file", device, "--data-file-raw")
    tool("open", bench.path("i.qcow2"), NAME, "--data-file", device)
    try:
        same(content(f"/dev/mapper/{NAME}", SIZE), s.content)
        # It is in use now, and is neither written nor read as an image.
        refused(5, "", "import", s.image, device, "--overwrite-device")
        refused(4, "who has it open", "import", bench.path("i.qcow2"), bench.path("x.raw"), "--trust-image-paths")
        expect(not os.path.exists(bench.path("x.raw")), "left")
    finally:
        tool("close", NAME)
    tool("import", bench.path("i.qcow2"), bench.path("x.raw"), "--trust-image-paths", "--verify")
    with open(bench.path("x.raw"), "rb") as f:
        same(f.read(), s.content)


@test("from a device")
def from_device(bench):
    s = Source(bench)
    source = bench.add(Loop(s.raw)).path
    tool("import", source, bench.path("x.raw"), "--format", "raw", "--verify")
    with open(bench.path("x.raw"), "rb") as f:
        same(f.read(), s.content)


if __name__ == "__main__":
    main()
