#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""qcow2setup clone, reset, close --delete: disks over a golden image that are thrown away.

The base must never change. What is not what clone has made must never be removed. A kill in
any moment leaves a device that works, with the old content or the base's, or none.
"""
import hashlib
import os
import random
import signal

import qcow2test
from qcow2test import KIB, MIB, Io, Loop, blocks, expect, main, note, run, same, test, wait_for
from setup_tool import TOOL, refused, tool

SIZE = 8 * MIB
NAME = f"qcow2test{os.getpid()}"


def devices():
    return [line.split()[0] for line in run("dmsetup", "ls").splitlines() if line.startswith(NAME)]


def loops():
    return sorted(run("losetup", "-n", "-l", "-O", "BACK-FILE").split())


def digest(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else \
            hashlib.sha256(f.read()).hexdigest()


class Golden:
    """A base with content of its own, a folder for clones; all of it goes"""

    def __init__(self, bench, size=SIZE):
        self.bench, self.size = bench, size
        self.content = random.Random(7).randbytes(MIB) + bytes(size - MIB)
        self.base = bench.path("golden.raw")
        with open(self.base, "wb") as f:
            f.write(self.content)
        self.was = digest(self.base)
        self.dir = bench.path("clones")
        os.mkdir(self.dir)
        bench.add(self)

    def clone(self, n=1, *options, base=None):
        tool("clone", base or self.base, self.name(n), "--dir", self.dir, *options)
        return f"/dev/mapper/{self.name(n)}"

    @staticmethod
    def name(n=1):
        return f"{NAME}-{n}"

    def file(self, n=1, end="qcow2"):
        return f"{self.dir}/{self.name(n)}.{end}"

    def read(self, n=1, length=0):
        disk = Io(f"/dev/mapper/{self.name(n)}", readonly=True)
        try:
            return disk.read(0, length or self.size)
        finally:
            disk.close()

    def write(self, n=1, at=256 * KIB, data=b"w" * 64 * KIB):
        disk = Io(f"/dev/mapper/{self.name(n)}")
        try:
            disk.write(at, data)
            disk.fsync()
        finally:
            disk.close()
        return self.content[:at] + data + self.content[at + len(data):]

    def fresh(self, n=1):
        same(self.read(n), self.content, what=f"clone {n}")

    def unchanged(self):
        expect(digest(self.base) == self.was, "the base has changed")

    def close(self):
        for name in sorted(devices()):
            run("umount", "-q", f"/dev/mapper/{name}", ok=False)
            # Helpers go with the device that they are for.
            if name in devices():
                run("dmsetup", "remove", "--retry", name)
        self.unchanged()


@test("clones of a file: each begins as the base is, keeps its own, and the base stays")
def several(bench):
    g = Golden(bench)
    for n in range(3):
        g.clone(n)
    for n in range(3):
        g.fresh(n)
        expect(blocks(g.file(n, "data")) == 0, "a clone that has data")
    want = {n: g.write(n, at=n * 64 * KIB, data=bytes([n + 1]) * 4096) for n in range(3)}
    for n, content in want.items():
        same(g.read(n), content, what=f"clone {n}")
    g.unchanged()
    status, out = run("qemu-io", "-r", "-f", "qcow2", "-c", "read 0 1", g.file(0), ok=False)
    expect(status and "lock" in out, f"QEMU may have the image: {out}")
    for n in range(3):
        tool("close", g.name(n))
        run("qemu-img", "check", g.file(n))
        with open(bench.path("copy"), "wb"):
            pass
        run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", g.file(n), bench.path("copy"))
        with open(bench.path("copy"), "rb") as f:
            same(f.read(), want[n], what=f"clone {n} by QEMU")


@test("open takes a closed clone up again; it is a clone as before")
def again(bench):
    g = Golden(bench)
    g.clone()
    want = g.write()
    tool("close", g.name())
    refused(5, "exists", "clone", g.base, g.name(), "--dir", g.dir)
    tool("open", g.file(), g.name(), "--data-file", g.file(end="data"), "--backing-file", g.base)
    same(g.read(), want)
    tool("reset", g.name())
    g.fresh()
    tool("close", g.name(), "--delete")
    expect(not os.listdir(g.dir) and not devices(), f"left: {os.listdir(g.dir)}")


@test("bases: a device, an image with its data elsewhere and what is below it; a larger clone")
def bases(bench):
    g = Golden(bench)
    device = bench.add(Loop(g.base, readonly=True)).path
    g.clone(1, base=device)
    g.fresh(1)
    image, data = bench.path("mid.qcow2"), bench.file("mid.data", SIZE)
    tool("create", image, "--data-file", data, "--backing-file", g.base, "--backing-format", "raw")
    g.clone(2, "--backing-file", g.base, base=f"{image},data-file={data}")
    g.fresh(2)
    want = g.write(2)
    same(g.read(2), want)
    tool("reset", g.name(2))
    g.fresh(2)
    g.clone(3, "--size", "1T")
    expect(qcow2test.device_sectors(f"/dev/mapper/{g.name(3)}") == 2 ** 31, "size")
    g.fresh(3)
    for n in (1, 2, 3):
        tool("close", g.name(n), "--delete")
    expect(not os.listdir(g.dir), f"left: {os.listdir(g.dir)}")
    # A base whose end is no sector's
    with open(bench.path("odd.raw"), "wb") as f:
        f.write(b"odd" * 1001)
    g.clone(4, base=bench.path("odd.raw"))
    same(g.read(4, 3072), b"odd" * 1001 + bytes(69))


@test("partitions of a clone with a name that is too long for them")
def long_name(bench):
    g = Golden(bench)
    name = NAME + "-" + "n" * (99 - len(NAME))
    with open(g.base, "r+b") as f:
        f.seek(0)
        f.write(bytes(512))
    run("sh", "-c", f"echo 'start=2048, size=2048' | sfdisk -q {g.base}")
    g.was = digest(g.base)
    refused(1, "too long for a device with partitions", "clone", g.base, name, "--dir", g.dir, "--partitions", "--host")
    expect(not os.listdir(g.dir) and not devices(), f"left: {os.listdir(g.dir)}")


@test("refused bases: an image that is not named as one, one with its data inside; nothing is left")
def wrong_bases(bench):
    g = Golden(bench)
    inside, image, data = bench.path("inside.qcow2"), bench.path("i.qcow2"), bench.file("i.data", SIZE)
    run("qemu-img", "create", "-q", "-f", "qcow2", inside, "8M")
    tool("create", image, "--data-file", data)
    where = ("--dir", g.dir)
    refused(4, "import", "clone", inside, g.name(), *where)
    refused(1, "data-file=", "clone", image, g.name(), *where)
    refused(4, "larger --size", "clone", g.base, g.name(), "--size", "4M", *where)
    refused(1, "leave ,data-file=", "clone", f"{image},data-file={data}", g.name(), "--backing-format", "raw", *where)
    refused(4, "give --size", "clone", bench.file("empty", 0), g.name(), *where)
    refused(4, "smaller --size", "clone", g.base, g.name(), "--size", "16383P", *where)
    refused(4, "longer than 1023", "clone", f"{bench.dir}/{'./' * 512}golden.raw", g.name(), *where)
    refused(4, "no such folder", "clone", g.base, g.name(), "--dir", f"{g.dir}/none")
    # What others write is no base.
    loop = bench.add(Loop(g.base)).path
    refused(5, "", "clone", g.base, g.name(), *where)
    expect(loop and not os.listdir(g.dir) and not devices(), f"left: {os.listdir(g.dir)}")
    # It is a disk if the user says so.
    g.clone(2, "--backing-format", "raw", base=inside)
    same(g.read(2, 512)[:4], b"QFI\xfb")


@test("reset: the base's content again, on the same device, and the space is free; again and again")
def resets(bench):
    g = Golden(bench)
    path = g.clone()
    number, held = os.stat(path).st_rdev, loops()
    for n in range(8):
        want = g.write(at=n * 64 * KIB, data=random.randbytes(2 * MIB))
        same(g.read(), want)
        expect(blocks(g.file(end="data")) >= 2 * MIB, "nothing was written")
        tool("reset", g.name())
        expect(os.stat(path).st_rdev == number, "another device")
        g.fresh()
        expect(blocks(g.file(end="data")) == 0, "the space is not free")
        wait_for("loop devices to go", 60, lambda: loops() == held)
        expect(len(os.listdir(g.dir)) == 2, f"{os.listdir(g.dir)}")
    want = g.write()
    tool("close", g.name())
    run("qemu-img", "check", g.file())
    tool("open", g.file(), g.name(), "--data-file", g.file(end="data"), "--backing-file", g.base)
    same(g.read(), want)


@test("reset keeps the size of a device that was resized, and what it was opened with")
def reset_keeps(bench):
    g = Golden(bench)
    g.clone(1, "--cache-limit", "8M", "--no-discard-passdown")
    tool("resize", g.name(), "--size", "16M")
    g.write()
    tool("reset", g.name())
    expect(qcow2test.device_sectors(f"/dev/mapper/{g.name()}") == 16 * MIB // 512, "size")
    table = run("dmsetup", "table", g.name())
    expect("no_discard_passdown" in table and "cache_limit 8388608" in table, table)
    g.fresh()


@test("reset: not under a mount, nor with --force; not under a program, but with --force")
def reset_in_use(bench):
    g = Golden(bench)
    run("mkfs.ext4", "-q", "-F", g.base)
    with open(g.base, "rb") as f:
        g.content = f.read()
    g.was = digest(g.base)
    path = g.clone()
    os.mkdir(bench.path("mnt"))
    run("mount", path, bench.path("mnt"))
    for options in ((), ("--force",)):
        refused(5, "in use.*mnt", "reset", g.name(), *options)
    run("umount", path)
    run("dmsetup", "create", f"{NAME}-above", "--table", f"0 8 linear {path} 0")
    refused(5, f"in use.*{NAME}-above", "reset", g.name(), "--force")
    run("dmsetup", "remove", "--retry", f"{NAME}-above")
    g.write()
    disk = Io(path, direct=False)
    try:
        disk.read(0, SIZE)
        refused(5, "in use.*--force", "reset", g.name())
        expect(g.read() != g.content, "it was reset")
        tool("reset", g.name(), "--force")
        # Not what was in the page cache
        same(disk.read(0, SIZE), g.content)
    finally:
        disk.close()


@test("reset: not what is no clone, what has bitmaps, or is being backed up")
def reset_refused(bench):
    g = Golden(bench)
    image, data = bench.path("i.qcow2"), bench.file("i.data", SIZE)
    tool("create", image, "--data-file", data)
    tool("open", image, g.name(1), "--data-file", data)
    refused(4, "is no clone", "reset", g.name(1))
    refused(4, "is no clone", "close", g.name(1), "--delete")
    expect(g.name(1) in devices() and os.path.exists(image), "closed")
    g.clone(2)
    want = g.write(2)
    tool("bitmap", "add", g.name(2), "b")
    refused(5, "bitmap remove", "reset", g.name(2))
    tool("bitmap", "remove", g.name(2), "b")
    tool("backup", "begin", g.name(2), "--cow", bench.dir)
    refused(5, "backup end", "reset", g.name(2))
    tool("backup", "end", g.name(2))
    same(g.read(2), want)
    tool("reset", g.name(2))
    g.fresh(2)


@test("close --delete: only what clone has made, and not a copy of it")
def deletes(bench):
    g = Golden(bench)
    g.clone(1)
    refused(1, "--deferred", "close", g.name(1), "--delete", "--deferred")
    g.write(1)
    tool("close", g.name(1))
    for end in ("qcow2", "data"):
        run("cp", "--sparse=always", g.file(1, end), g.file(2, end))
    tool("open", g.file(2), g.name(2), "--data-file", g.file(2, "data"), "--backing-file", g.base)
    refused(4, "is no clone", "close", g.name(2), "--delete")
    refused(4, "is no clone", "reset", g.name(2))
    tool("close", g.name(2))
    # The right image with the data of another one
    tool("open", g.file(1), g.name(1), "--data-file", g.file(2, "data"), "--backing-file", g.base)
    refused(4, "is no clone", "close", g.name(1), "--delete")
    tool("close", g.name(1))
    tool("open", g.file(1), g.name(1), "--data-file", g.file(1, "data"), "--backing-file", g.base)
    tool("close", g.name(1), "--delete")
    expect(sorted(os.listdir(g.dir)) == [os.path.basename(g.file(2, e)) for e in ("data", "qcow2")],
           f"{os.listdir(g.dir)}")


def calls(*argv):
    """System calls that read or write, or make a device, of a command"""
    log = f"/tmp/{NAME}.trace"
    run("strace", "-f", "-qq", "-o", log, "-e", "trace=read,write,pread64,pwrite64,ioctl,ftruncate,fallocate,fsync",
        TOOL, *argv)
    with open(log, encoding="utf-8", errors="replace") as f:
        count = len(f.readlines())
    os.unlink(log)
    return count


@test("the work does not grow with the disk: 8 MiB and 1 TiB")
def instant(bench):
    g = Golden(bench)
    for what in ("clone", "reset"):
        counts = []
        for n, size in ((1, "8M"), (2, "1T")):
            argv = ("clone", g.base, g.name(n), "--dir", g.dir, "--size", size) if what == "clone" else ("reset", g.name(n))
            counts.append(calls(*argv))
        note(f"{what}: {counts[0]} and {counts[1]} system calls")
        # Waiting for udev and others differs a little, tables of 1 TiB have some blocks more.
        expect(counts[1] < counts[0] + 200, f"{what}: {counts}")


def killed(at, *argv):
    """Kill it in the system call AT (name:number). True if it came that far"""
    call, when = at
    status, out = run("strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={call}",
                      "-e", f"inject={call}:signal=KILL:when={when}", TOOL, *argv, ok=False)
    expect(status in (0, -signal.SIGKILL, 128 + signal.SIGKILL), f"{argv} killed in {at}: {status}: {out}")
    return status != 0


def not_suspended(name):
    info = run("dmsetup", "info", "-c", "--noheadings", "-o", "suspended", name)
    expect("Suspended" not in info, info)


STEPS = ("openat", "ftruncate", "pwrite64", "fsync", "ioctl", "rename", "unlink")


@test("reset that is killed: the old content or the base's; the next one goes on; nothing is left")
def killed_resets(bench):
    g = Golden(bench)
    g.clone()
    held, came = loops(), 0
    for call in STEPS:
        when, step = 1, 1 if call in ("rename", "ftruncate", "fsync", "unlink") else 7
        want = g.write()
        while killed((call, when), "reset", g.name()):
            came += 1
            not_suspended(g.name())
            expect(g.read() in (want, g.content), f"killed in {call} {when}: other content")
            tool("reset", g.name())
            g.fresh()
            expect(len(os.listdir(g.dir)) == 2, f"killed in {call} {when}: {os.listdir(g.dir)}")
            want = g.write()
            when += step
    note(f"killed {came} times")
    expect(came >= 12, f"only {came} times")
    wait_for("loop devices to go", 60, lambda: loops() == held)
    # What was killed last goes on in close, too.
    killed(("rename", 2), "reset", g.name())
    tool("close", g.name(), "--delete")
    expect(not os.listdir(g.dir), f"left: {os.listdir(g.dir)}")


@test("clone that is killed: a device that works, or none; the files that are there are named")
def killed_clones(bench):
    g = Golden(bench)
    held, came = loops(), 0
    for call in ("openat", "ftruncate", "pwrite64", "fsync", "ioctl"):
        when = 1
        while killed((call, when), "clone", g.base, g.name(), "--dir", g.dir):
            came += 1
            if devices() and "ACTIVE" in run("dmsetup", "info", g.name()) and run("dmsetup", "table", g.name()):
                g.fresh()
                tool("close", g.name(), "--delete")
            else:
                # Its name is taken until it is closed: as for open.
                if devices():
                    tool("close", g.name())
                status, out = run(TOOL, "clone", g.base, g.name(), "--dir", g.dir, ok=False)
                if os.listdir(g.dir) and status:
                    expect(status == 5 and "exists;" in out, f"killed in {call} {when}: {status}: {out}")
                    for name in os.listdir(g.dir):
                        os.unlink(f"{g.dir}/{name}")
                    tool("clone", g.base, g.name(), "--dir", g.dir)
                g.fresh()
                tool("close", g.name(), "--delete")
            expect(not os.listdir(g.dir) and not devices(), f"killed in {call} {when}: {os.listdir(g.dir)}")
            when += 1 if call in ("ftruncate", "fsync") else 17
        if devices():
            tool("close", g.name(), "--delete")
    note(f"killed {came} times")
    expect(came >= 12, f"only {came} times")
    wait_for("loop devices to go", 60, lambda: loops() == held)


@test("clone that is interrupted: nothing is left")
def interrupted(bench):
    g = Golden(bench)
    for when in (1, 4, 9):
        run("strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=pwrite64,fsync",
            "-e", f"inject=pwrite64,fsync:signal=TERM:when={when}", TOOL, "clone", g.base, g.name(), "--dir", g.dir, ok=False)
        if devices():
            tool("close", g.name(), "--delete")
        expect(not os.listdir(g.dir) and not devices(), f"left: {os.listdir(g.dir)}")


if __name__ == "__main__":
    main()
