#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""qcow2setup backup serve, and other people's clients of what it serves: what each of them
reads is the disk as it was, and what each says has changed is what has.

nbdinfo, nbdcopy and qemu-img are programs; virtnbdbackup, by libnbd for Python, is followed
call by call: it reads meta contexts and data in this way and needs no libvirt for that.

Environment: SEED (printed, to repeat a run).
"""
import contextlib
import json
import os
import random
import subprocess
import sys
import time

import qcow2test
from qcow2test import KIB, MIB, Failure, Io, expect, main, note, run, same, some, test, wait_for
from test_backup import Backup, nothing_left
from test_checkpoint import TOOL, Opened, Writers, joined, setup

qcow2test.forget_tests()

# Debian's own Python has it; another one that comes first in PATH may not.
try:
    import nbd
except ImportError:
    sys.path.append("/usr/lib/python3/dist-packages")
    try:
        import nbd
    except ImportError:
        nbd = None

SEED = int(os.environ.get("SEED", time.time_ns() // 1000 % 1000000))
note(f"SEED={SEED}")
HOLE = 1
# The longest request for extents, and the longest read, of virtnbdbackup
MOST_EXTENTS, MOST_READ = (1 << 32) - 1, 32 * MIB


class Server:
    """backup serve, of one device"""

    def __init__(self, bench, dm, *options, listen=None):
        self.socket = bench.path("socket")
        where = ("--listen", listen) if listen else ("--socket", self.socket)
        self.log = bench.path("serve.log")
        with open(self.log, "wb") as log:
            # pylint: disable-next=consider-using-with # close() ends it
            self.process = subprocess.Popen([TOOL, "backup", "serve", dm.name, *where, *options],
                                            stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.uri = f"nbd://{listen}" if listen else f"nbd+unix:///?socket={self.socket}"
        bench.add(self)
        wait_for("the server", 60, self.answers)

    def answers(self):
        if self.process.poll() is not None:
            with open(self.log, encoding="utf-8", errors="replace") as f:
                raise Failure(f"the server ended: {f.read()}")
        return run("nbdinfo", "--size", self.uri, ok=False)[0] == 0

    def close(self):
        self.process.terminate()
        self.process.wait()


class Reader:
    """What virtnbdbackup does: a connection for one meta context, extents in as few requests as
    possible, of which those of one kind are put together, and reads of no more than the
    server takes."""

    def __init__(self, uri, context=None):
        self.context = context or nbd.CONTEXT_BASE_ALLOCATION
        self.nbd = nbd.NBD()
        self.nbd.add_meta_context(self.context)
        self.nbd.set_export_name("")
        self.nbd.connect_uri(uri)
        expect(self.nbd.can_meta_context(self.context), f"the server has no {self.context}")
        self.size = self.nbd.get_size()
        self.most = self.nbd.get_block_size(nbd.SIZE_MAXIMUM) or MOST_READ

    def extents(self):
        entries = []

        def found(context, _offset, some, _error):
            expect(context == self.context, f"extents of {context}")
            entries.extend(some)
        align = self.nbd.get_block_size(nbd.SIZE_MINIMUM) or 512
        at = 0
        while at < self.size:
            before = len(entries)
            self.nbd.block_status(min(self.size - at, MOST_EXTENTS - align + 1), at, found)
            expect(len(entries) > before, f"no extents from {at} on")
            at += sum(entries[before::2])
        at = 0
        for length, kind in zip(entries[::2], entries[1::2]):
            yield at, length, kind
            at += length

    def read(self, start, length):
        for at in range(start, start + length, self.most):
            n = min(self.most, start + length - at)
            yield at, self.nbd.pread(n, at)

    def close(self):
        self.nbd.shutdown()


def full_by_reader(uri):
    """A full backup: holes that read as zeros are not read"""
    with contextlib.closing(Reader(uri)) as r:
        copy = bytearray(r.size)
        extents = joined((at, length, kind) for at, length, kind in r.extents())
        for at, length, kind in extents:
            if not kind & HOLE:
                for start, data in r.read(at, length):
                    copy[start:start + len(data)] = data
        return bytes(copy), extents


def increment_by_reader(uri, bitmap, copy):
    with contextlib.closing(Reader(uri, f"qemu:dirty-bitmap:{bitmap}")) as r:
        expect(r.size == len(copy), f"size {r.size}, not {len(copy)}")
        extents = joined((at, length, kind == 1) for at, length, kind in r.extents())
        for at, length, is_dirty in extents:
            if is_dirty:
                for start, data in r.read(at, length):
                    copy[start:start + len(data)] = data
        return extents


def content(path, size):
    with open(path, "rb") as f:
        return f.read(size + 1)


def ours(dm, *bitmaps):
    found = json.loads(run(TOOL, "backup", "extents", dm.name, "--json",
                           *(word for b in bitmaps for word in ("--bitmap", b))))
    return joined((e["start"], e["length"], e["dirty"]) for e in found)


def qemu_extents(socket, bitmap):
    found = json.loads(run("qemu-img", "map", "--output=json", "--image-opts", "driver=nbd,server.type=unix,"
                           f"server.path={socket},x-dirty-bitmap=qemu:dirty-bitmap:{bitmap}"))
    return joined((e["start"], e["length"], not e["data"]) for e in found)


def info_extents(uri, bitmap):
    found = json.loads(run("nbdinfo", "--json", f"--map=qemu:dirty-bitmap:{bitmap}", uri))
    return joined((e["offset"], e["length"], e["type"] == 1) for e in found)


# Copies by programs: without and with all that they can do at a time
PLAIN = (("nbdcopy",), ("qemu-img", "convert", "-f", "raw", "-O", "raw"))
WILD = (("nbdcopy", "--connections=4", "--requests=8"),
        ("qemu-img", "convert", "-f", "raw", "-O", "raw", "-S", "0", "-W"))


def copies_by_programs(bench, server, was, commands):
    size = len(was)
    for n, command in enumerate(commands):
        path = bench.path(f"copy{n}")
        run(*command, server.uri, path)
        same(content(path, size), was, what=" ".join(command))
        run("qemu-img", "compare", "-f", "raw", "-F", "raw", server.uri, path)
        # It would say so.
        with open(path, "r+b") as f:
            f.seek(size // 2)
            f.write(bytes([was[size // 2] ^ 1]))
        status, out = run("qemu-img", "compare", "-f", "raw", "-F", "raw", server.uri, path, ok=False)
        expect(status == 1, f"qemu-img compare finds no difference: {status}: {out}")
        os.unlink(path)
    # Into a qcow2 image, compressed: zeros are found, and the sum is the same.
    path = bench.path("copy.qcow2")
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", server.uri, path)
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", server.uri, path)


def chain(bench, kind, listen=None):
    """A full backup and increments of a disk that is written all the time, by each of them"""
    image, dm, granularity = setup(bench, *kind)
    rng = random.Random(SEED)
    # Not all of it, so that there is something that has not changed
    writers = Writers(bench, dm, image.size // 3 // 512 * 512, rng)
    kept = None
    for n in range(3):
        writers.some()
        ended = [f"c{m}" for m in range(max(n - 2, 0), n)]
        words = [word for c in ended for word in ("--bitmap", c)]
        b = Backup(bench, [dm], *words, "--checkpoint", f"c{n}{granularity}")
        was = b.view(dm)
        server = Server(bench, dm, listen=listen)
        writers.some()
        if not n:
            copies_by_programs(bench, server, was, WILD if listen else PLAIN)
            whole, extents = full_by_reader(server.uri)
            same(whole, was, what="full backup by a reader")
            kept = bytearray(whole)
            found = json.loads(run("nbdinfo", "--json", "--map", server.uri))
            expect(joined((e["offset"], e["length"], e["type"]) for e in found) == extents,
                   f"nbdinfo: {found}, reader: {extents}")
        else:
            for c in ended:
                want = ours(dm, c)
                expect(info_extents(server.uri, c) == want, f"nbdinfo, {c}: {info_extents(server.uri, c)}, not {want}")
                if not listen:
                    got = qemu_extents(server.socket, c)
                    expect(got == want, f"qemu-img, {c}: {got}, not {want}")
            got = increment_by_reader(server.uri, ended[-1], kept)
            expect(got == ours(dm, ended[-1]), f"reader: {got}, not {ours(dm, ended[-1])}")
            expect({dirty for _, _, dirty in got} == {True, False}, f"all, or nothing, is dirty: {got}")
            same(bytes(kept), was, what=f"increment {n} by a reader")
        status, out = run(TOOL, "backup", "end", dm.name, ok=False)
        expect(status == 5 and "qemu-nbd" in out, f"end while it is served: {status}: {out}")
        bench.drop(server)
        b.end()
    bench.drop(writers)
    nothing_left(dm)


KINDS = (
    ("clusters of 64 KiB", (64 * KIB, 9 * MIB + 512, None, {})),
    ("data_file_raw", (64 * KIB, 9 * MIB + 512, 64 * KIB, {"raw": True})),
    ("extended L2", (16 * KIB, 7 * MIB + 3 * KIB, 32 * KIB, {"extended": True})),
    ("over a backing file", (64 * KIB, 6 * MIB + 512, 4 * KIB, {"backing": True})),
)


def served(bench, kind):
    expect(nbd, "there is no libnbd for Python (package python3-libnbd)")
    chain(bench, kind)


for _name, _kind in some(KINDS, 2):
    test(f"nbdinfo, nbdcopy, qemu-img and a reader as virtnbdbackup's agree: {_name}", _kind, all_cpus=True)(served)


@test("the same by TCP", all_cpus=True)
def by_tcp(bench):
    expect(nbd, "there is no libnbd for Python (package python3-libnbd)")
    chain(bench, KINDS[0][1], listen=f"127.0.0.1:{10000 + os.getpid() % 20000}")


@test("a raw disk that has never been written through the device: all that its file has is served", all_cpus=True)
def never_written(bench):
    expect(nbd, "there is no libnbd for Python (package python3-libnbd)")
    image = bench.image(20 * MIB + 512, cluster=64 * KIB, raw=True)
    size, rng = image.size, random.Random(SEED)
    with open(image.data, "r+b") as f:
        for at in (0, 3 * MIB + 512, 11 * MIB, size // 2 // 512 * 512, size - 512):
            f.seek(at)
            f.write(rng.randbytes(512))
    was = content(image.data, size)
    dm = bench.add(Opened(image))
    b = Backup(bench, [dm])
    server = Server(bench, dm)
    for changed in False, True:
        if changed:
            with contextlib.closing(Io(dm.path)) as disk:
                disk.write(11 * MIB, b"n" * 4096)
                disk.discard(3 * MIB, MIB)
        copies_by_programs(bench, server, was, WILD if changed else PLAIN)
        whole, _ = full_by_reader(server.uri)
        same(whole, was, what="full backup by a reader")
    bench.drop(server)
    b.end()
    nothing_left(dm)


if __name__ == "__main__":
    main()
