#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""qcow2setup bitmap, checkpoint and map --bitmap of a device that is in use: what a chain of
checkpoints says has changed is all that has, whatever goes on meanwhile.

Environment: SEED (printed, to repeat a run), ROUNDS (checkpoints of each image), CALLS (of the
tool at which it is killed, or which fail; about).
"""
import contextlib
import json
import os
import random
import signal
import subprocess
import threading
import time

import qcow2test
from bitmaps import bitmaps
from qcow2test import KIB, MIB, Failure, Io, Task, expect, fewer, main, note, run, same, some, test, wait_for

SEED = int(os.environ.get("SEED", time.time_ns() // 1000 % 1000000))
ROUNDS = int(os.environ.get("ROUNDS", 6))
CALLS = int(os.environ.get("CALLS", fewer(24, 12)))
TOOLS = os.path.join(qcow2test.HERE, "../../tools")
TOOL = f"{TOOLS}/qcow2setup"
INJECT = f"{TOOLS}/tests/inject-lib"

# Cluster size, size, granularity of the bitmaps (None: the default), and other options
KINDS = [
    (64 * KIB, 9 * MIB + 512, None, {}),
    (4 * KIB, 5 * MIB + 1536, 512, {}),
    (512, 2 * MIB, 4 * KIB, {}),
    (64 * KIB, 9 * MIB + 512, 64 * KIB, {"raw": True}),
    (16 * KIB, 7 * MIB + 3 * KIB, 32 * KIB, {"extended": True}),
    (64 * KIB, 6 * MIB + 512, 4 * KIB, {"backing": True}),
    (2 * MIB, 13 * MIB, 1 * MIB, {}),
]


def words(kind):
    cluster, size, granularity, options = kind
    return f"clusters of {cluster}, {size} bytes, granularity {granularity or 'as it comes'}" + "".join(
        f", {name}" for name in options)


class Opened:
    """A device that qcow2setup has made."""

    def __init__(self, image, *options, name="checkpoint"):
        self.image = image
        self.name = f"qcow2test{os.getpid()}-{name}"
        self.path = f"/dev/mapper/{self.name}"
        self.options = options
        self.open()

    def open(self):
        run(TOOL, "open", self.image.path, self.name, "--data-file", self.image.data, *self.options)

    def tool(self, action, *argv, **options):
        return run(TOOL, *action.split(), self.name, *argv, **options)

    def list(self):
        return {b["name"]: b for b in json.loads(self.tool("bitmap list", "--json"))}

    def map(self, bitmap):
        return json.loads(self.tool("map", "--bitmap", bitmap, "--json"))

    def info(self, field):
        return run("dmsetup", "info", "-c", "--noheadings", "-o", field, self.name).strip()

    def close(self):
        run(TOOL, "close", self.name)


def setup(bench, cluster, size, granularity, options):
    options = dict(options)
    more = []
    if options.pop("backing", False):
        options["backing"] = bench.file("backing", size)
        with open(options["backing"], "wb") as f:
            f.write(random.Random(SEED).randbytes(size))
        more = ["--backing-file", options["backing"]]
    image = bench.image(size, cluster=cluster, **options)
    dm = bench.add(Opened(image, *more))
    return image, dm, f",granularity={granularity}" if granularity else ""


class Writers:
    """Threads that write, until they are stopped."""

    def __init__(self, bench, dm, size, rng, threads=3):
        self.path, self.size = dm.path, size
        self.stopped = threading.Event()
        self.done = 0
        self.tasks = [Task(self._write, random.Random(rng.random())) for _ in range(threads)]
        bench.add(self)

    def _write(self, rng):
        with contextlib.closing(Io(self.path)) as disk:
            self._write_to(disk, rng)

    def _write_to(self, disk, rng):
        while not self.stopped.is_set():
            length = rng.choice((512, 4096, 4096, 64 * KIB, rng.randrange(1, 300) * 512))
            at = rng.randrange(self.size // 512) * 512
            if rng.random() < 0.5:
                at -= at % 4096
            length = min(length, self.size - at)
            kind = rng.choice(("write", "write", "write", "zero_range", "zero_out", "discard", "sync"))
            if kind in ("write", "sync"):
                disk.write(at, rng.randbytes(length))
                if kind == "sync":
                    disk.fsync()
            else:
                getattr(disk, kind)(at, length)
            self.done += 1

    def some(self):
        """Let them do something."""
        before = self.done
        wait_for("requests", 60, lambda: self.done > before + 5 or any(t.fault for t in self.tasks))

    def close(self):
        self.stopped.set()
        for task in self.tasks:
            task.join()
        for task in self.tasks:
            task.finish()


class Copy:
    """Of a device, brought up to date by what its bitmaps say"""

    def __init__(self, dm, size):
        self.dm, self.size = dm, size
        self.data = bytearray(size)
        self._copy([(0, size)])

    def _copy(self, extents):
        with contextlib.closing(Io(self.dm.path, readonly=True)) as disk:
            for start, length in extents:
                for at in range(start, start + length, MIB):
                    n = min(MIB, start + length - at)
                    self.data[at:at + n] = disk.read(at, n)

    def update(self, bitmap):
        extents = self.dm.map(bitmap)
        at = 0
        for e in extents:
            expect(e["start"] == at and e["length"] > 0, f"extent {e} after {at}")
            at += e["length"]
        expect(at == self.size, f"extents up to {at}")
        self._copy((e["start"], e["length"]) for e in extents if not e["data"])
        return extents

    def grown(self, size):
        self.data += bytes(size - self.size)
        self.size = size

    def compare(self, what):
        with contextlib.closing(Io(self.dm.path, readonly=True)) as disk:
            for at in range(0, self.size, MIB):
                n = min(MIB, self.size - at)
                same(disk.read(at, n), bytes(self.data[at:at + n]), at, what)


def zeros_are_zeros(dm, extents):
    with contextlib.closing(Io(dm.path, readonly=True)) as disk:
        for e in extents:
            if e["zero"]:
                expect(not any(disk.read(e["start"], min(e["length"], MIB))), f"{e} does not read as zeros")


def finish(bench, image, dm, names):
    """QEMU is content, and has these bitmaps."""
    bench.drop(dm)
    # QEMU's own data file is as long as whole clusters
    run("qemu-img", "check", "-q", image.path)
    info = json.loads(run("qemu-img", "info", "--output=json", image.path))
    found = info["format-specific"]["data"].get("bitmaps", [])
    expect(sorted(b["name"] for b in found) == sorted(names), f"QEMU finds {found}")
    expect(not any("in-use" in b["flags"] for b in found), f"QEMU finds {found}")


def chain(bench, kind):
    """A backup by checkpoints alone, of a disk that is never at rest, and grows"""
    note(f"SEED={SEED}")
    rng = random.Random(SEED)
    image, dm, granularity = setup(bench, *kind)
    size = image.size
    dm.tool("checkpoint", "--start", f"c0{granularity}")
    writers = Writers(bench, dm, size, rng)
    copy = Copy(dm, size)
    grow = rng.randrange(ROUNDS)
    for n in range(ROUNDS):
        writers.some()
        if n == grow:
            more = rng.choice((64 * KIB, 3 * MIB, 40 * MIB))
            size = (size + more) // 4096 * 4096
            dm.tool("resize", "--size", size)
            copy.grown(size)
            bench.drop(writers)
            writers = Writers(bench, dm, size, rng)
        dm.tool("checkpoint", "--stop", f"c{n}", "--start", f"c{n + 1}{granularity}")
        copy.update(f"c{n}")
        if rng.random() < 0.7:
            dm.tool("bitmap remove", f"c{n}")
    bench.drop(writers)
    dm.tool("checkpoint", "--stop", f"c{ROUNDS}", "--start", "last")
    zeros_are_zeros(dm, copy.update(f"c{ROUNDS}"))
    copy.compare("copy by checkpoints")
    expect(dm.list()["last"]["count"] == 0, "something is dirty, and nobody writes")
    finish(bench, image, dm, bitmaps_left(dm))


def bitmaps_left(dm):
    return list(dm.list())


for _kind in some(KINDS, 3):
    test(f"a chain of checkpoints: {words(_kind)}", _kind, all_cpus=True)(chain)


def injected(dm, variables, action, *argv):
    """Its status, and what it says"""
    env = dict(os.environ, LD_PRELOAD=INJECT, **{k: str(v) for k, v in variables.items()})
    done = subprocess.run([TOOL, *action.split(), dm.name, *argv], env=env, check=False, text=True, timeout=300,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return done.returncode, done.stdout


def no_helper():
    return subprocess.run(["pgrep", "-x", "qcow2setup-keep"], check=False, stdout=subprocess.DEVNULL).returncode


def calls_of(bench, dm, action, *argv):
    path = bench.path("calls")
    status, out = injected(dm, {"INJECT_SENDS": 1, "INJECT_COUNT": path}, action, *argv)
    expect(status == 0, out)
    with open(path, encoding="ascii") as f:
        return int(f.read())


@test("a checkpoint in two steps would lose what is written between them: the copy shows it")
def two_steps(bench):
    image, dm, _ = setup(bench, 64 * KIB, 4 * MIB, None, {})
    dm.tool("checkpoint", "--start", "c0")
    copy = Copy(dm, image.size)
    disk = bench.add(Io(dm.path))
    disk.write(0, b"1" * 4096)
    dm.tool("bitmap disable", "c0")
    disk.write(MIB, b"2" * 4096)
    dm.tool("bitmap add", "c1")
    disk.write(2 * MIB, b"3" * 4096)
    copy.update("c0")
    dm.tool("checkpoint", "--stop", "c1", "--start", "c2")
    copy.update("c1")
    try:
        copy.compare("copy by checkpoints")
    except Failure as e:
        expect("at 0x100000" in str(e), f"another difference: {e}")
    else:
        raise Failure("the copy has what no bitmap has")


class Chain:
    """Checkpoints, one after the other, of a device that is written, and a copy by them"""

    def __init__(self, dm, size):
        self.dm, self.now, self.done, self.undone = dm, 0, 0, 0
        dm.tool("checkpoint", "--start", "c0")
        self.copy = Copy(dm, size)

    def words(self):
        return "--stop", f"c{self.now}", "--start", f"c{self.now + 1}"

    def ended(self):
        """The bitmap that was stopped has done its work."""
        self.copy.update(f"c{self.now}")
        self.dm.tool("bitmap remove", f"c{self.now}")
        self.now += 1

    def calls(self, bench):
        """How many a checkpoint has, which is made"""
        calls = calls_of(bench, self.dm, "checkpoint", *self.words())
        self.ended()
        return calls

    def kill(self, k):
        """One that is killed at a call."""
        status, out = injected(self.dm, {"INJECT_SENDS": 1, "INJECT_AT": k, "INJECT_SIGNAL": 9}, "checkpoint",
                               *self.words())
        wait_for("the helper's end", 60, no_helper)
        expect(self.dm.info("suspended") == "Active", f"call {k}: suspended: {out}")
        found = self.dm.list()
        expect(not any(b["inconsistent"] for b in found.values()), f"call {k}: {found}")
        recording = [name for name, b in found.items() if b["recording"]]
        if recording == [f"c{self.now + 1}"]:
            self.done += status != 0
            self.ended()
        else:
            expect(status and recording == [f"c{self.now}"], f"call {k}, status {status}: {recording} record: {out}")
            self.undone += 1


@test("checkpoints that are killed at each call: before or after, and no history is lost", all_cpus=True)
def killed(bench):
    note(f"SEED={SEED}")
    image, dm, _ = setup(bench, 4 * KIB, 4 * MIB, None, {})
    writers = Writers(bench, dm, image.size, random.Random(SEED))
    chain = Chain(dm, image.size)
    calls = chain.calls(bench)
    for k in range(calls - 2, 0, -max(1, calls // CALLS)):
        chain.kill(k)
    # How many calls there are depends on which clusters are free; the last one is when all is done.
    for _ in range(10):
        calls = chain.calls(bench)
        for k in (calls, calls - 1):
            if not chain.done:
                chain.kill(k)
    note(f"{calls} calls, {chain.undone} times the old bitmap, {chain.done} times the new one")
    expect(chain.undone > CALLS // 4 and chain.done, f"{chain.undone} times the old bitmap, {chain.done} times the new one")
    bench.drop(writers)
    dm.tool("checkpoint", *chain.words())
    chain.copy.update(f"c{chain.now}")
    chain.copy.compare("copy by checkpoints")
    finish(bench, image, dm, bitmaps_left(dm))


@test("a checkpoint that is interrupted, or whose calls fail: all is as it was, or it is done")
def fails(bench):
    image, dm, _ = setup(bench, 4 * KIB, 4 * MIB, None, {})
    dm.tool("checkpoint", "--start", "c0")
    disk = Io(dm.path)
    disk.write(0, bytes(4096))
    disk.close()
    calls = calls_of(bench, dm, "checkpoint", "--stop", "c0", "--start", "c1")
    now = 1
    for k in range(1, calls + 1, max(1, 2 * calls // CALLS)):
        for variables in ({"INJECT_SIGNAL": signal.SIGINT}, {"INJECT_ERRNO": 5}):
            old, new = f"c{now}", f"c{now + 1}"
            table = run("dmsetup", "table", dm.name)
            status, out = injected(dm, {"INJECT_AT": k, **variables}, "checkpoint", "--stop", old, "--start", new)
            expect(dm.info("suspended") == "Active", f"call {k}: suspended: {out}")
            found = dm.list()
            recording = [name for name, b in found.items() if b["recording"]]
            if status == 0:
                expect(recording == [new], f"call {k}: {recording}")
                dm.tool("bitmap remove", old)
                now += 1
            else:
                expect(recording == [old], f"call {k}, status {status}: {recording} record: {out}")
                expect("INJECT_SIGNAL" in variables or "c0" in out or len(out) > 10, f"call {k}: no message: {out}")
                before, after = (t.split() for t in (table, run("dmsetup", "table", dm.name)))
                expect(before[:11] == after[:11], f"call {k}: another table")
    note(f"{calls} calls, {now} checkpoints")
    expect(no_helper(), "a helper is left")
    finish(bench, image, dm, bitmaps_left(dm))


@test("each command of a live device does what it does to a closed image")
def commands(bench):
    image, dm, _ = setup(bench, 64 * KIB, 64 * MIB, None, {})
    disk = bench.add(Io(dm.path))
    expect(bitmaps_left(dm) == [], "it has bitmaps")
    expect("bitmaps" not in run("dmsetup", "table", dm.name).split(), "a table with bitmaps")
    dm.tool("bitmap add", "a")
    expect("bitmaps" in run("dmsetup", "table", dm.name).split(), "a table without bitmaps")
    disk.write(MIB, bytes(64 * KIB))
    dm.tool("bitmap add", "fine", "--granularity", "4K")
    dm.tool("bitmap add", "still", "--disabled", "--granularity", "1M")
    disk.write(5 * MIB, bytes(4 * KIB))
    found = dm.list()
    expect({n: b["count"] for n, b in found.items()} == {"a": 128 * KIB, "fine": 4 * KIB, "still": 0}, f"{found}")
    dm.tool("bitmap merge", "still", "a", "fine")
    expect(dm.list()["still"]["count"] == 2 * MIB, f"{dm.list()}")
    dm.tool("bitmap disable", "a")
    disk.write(9 * MIB, bytes(4 * KIB))
    dm.tool("bitmap enable", "still")
    disk.write(11 * MIB, bytes(4 * KIB))
    dm.tool("bitmap clear", "fine")
    disk.write(13 * MIB, bytes(4 * KIB))
    found = dm.list()
    expect({n: b["count"] for n, b in found.items()} == {"a": 128 * KIB, "fine": 4 * KIB, "still": 4 * MIB}, f"{found}")
    dm.tool("bitmap merge", "a", "fine")
    expect(dm.list()["a"]["count"] == 192 * KIB, f"{dm.list()}")
    bench.drop(disk)
    dm.tool("bitmap remove", "a")
    bench.drop(dm)
    found = bitmaps(image)
    expect(sorted(found) == ["fine", "still"], f"{sorted(found)}")
    expect(found["still"].content() == 1 << 1 | 1 << 5 | 1 << 11 | 1 << 13, f"{found['still'].content():b}")
    run("qemu-img", "check", "-q", image.path)
    # What is live shows the same as what is closed.
    closed = json.loads(run(TOOL, "map", image.path, "--bitmap", "still", "--json"))
    dm = bench.add(Opened(image))
    expect(dm.map("still") == closed, "live and closed are not the same")
    for name in ("fine", "still"):
        dm.tool("bitmap remove", name)
    expect("bitmaps" not in run("dmsetup", "table", dm.name).split(), "a table with bitmaps")
    finish(bench, image, dm, [])


@test("the section of README.md about what has changed: each command as it stands there")
def readme(bench):
    path = os.path.join(qcow2test.HERE, "../../README.md")
    with open(path, encoding="utf-8") as f:
        section = f.read().split("### What has changed since the last backup\n", 1)[1].split("\n### ", 1)[0]
    commands = [line.split("#")[0].split() for line in section.splitlines() if line.startswith("    ")]
    expect(len(commands) == 5 and all(c[0] == "qcow2setup" for c in commands), f"{commands}")
    data = bench.file("vm.raw", 8 * MIB)
    name = f"qcow2test{os.getpid()}-vm"
    here = {"vm.qcow2": bench.path("vm.qcow2"), "/dev/vg/vm": bench.add(qcow2test.Loop(data)).path, "vm": name}

    class Closed:
        """By the tool, at the end"""
        @staticmethod
        def close():
            run(TOOL, "close", name)
    for command in commands:
        done = run(TOOL, *(here.get(word, word) for word in command[1:]))
        if command[1] == "open":
            opened = bench.add(Closed())
        if command[1] in ("open", "checkpoint"):
            disk = Io(f"/dev/mapper/{name}")
            disk.write(MIB if command[1] == "open" else 4 * MIB, b"x" * 65536)
            disk.close()
        if command[1] == "map":
            dirty = [(e["start"], e["length"]) for e in json.loads(done) if not e["data"]]
            expect(dirty == [(MIB, 64 * KIB)], f"{dirty}")
    bench.drop(opened)
    found = json.loads(run(TOOL, "bitmap", "list", here["vm.qcow2"], "--json"))
    expect([(b["name"], b["count"], b["recording"]) for b in found] == [("tuesday", 64 * KIB, True)], f"{found}")


@test("other people's clients read from qemu-nbd what map says: nbdinfo, qemu-img")
def clients(bench):
    image, dm, _ = setup(bench, 64 * KIB, 40 * MIB + 512, None, {})
    dm.tool("bitmap add", "b", "--granularity", "32K")
    rng = random.Random(SEED)
    disk = Io(dm.path)
    for _ in range(40):
        disk.write(rng.randrange(image.size // 512) * 512, b"w" * 512)
    disk.discard(3 * MIB, MIB)
    disk.close()
    live = dm.map("b")
    bench.drop(dm)
    socket = bench.path("socket")
    # pylint: disable=consider-using-with # it is ended below
    server = subprocess.Popen(["qemu-nbd", "-r", "-t", "-k", socket, "-B", "b", "-f", "qcow2", image.path])
    try:
        wait_for("the server", 30, lambda: os.path.exists(socket))
        nbd = json.loads(run("nbdinfo", "--json", "--map=qemu:dirty-bitmap:b", f"nbd+unix:///?socket={socket}"))
        qemu = json.loads(run("qemu-img", "map", "--output=json", "--image-opts", "driver=nbd,server.type=unix,"
                              f"server.path={socket},x-dirty-bitmap=qemu:dirty-bitmap:b"))
    finally:
        server.terminate()
        server.wait()
    closed = json.loads(run(TOOL, "map", image.path, "--bitmap", "b", "--json"))
    expect(closed == live, "live and closed are not the same")
    ours = joined((e["start"], e["length"], not e["data"]) for e in closed)
    expect(joined((e["offset"], e["length"], e["type"] == 1) for e in nbd) == ours, f"nbdinfo: {nbd}, map: {closed}")
    expect(joined((e["start"], e["length"], not e["data"]) for e in qemu) == ours, f"qemu-img: {qemu}, map: {closed}")
    # What is not split by zeros has QEMU's keys and values, one by one.
    for e in qemu:
        mine = next(m for m in closed if m["start"] <= e["start"] < m["start"] + m["length"])
        expect(all(mine[k] == e[k] for k in ("depth", "present", "data")), f"{mine} is not {e}")


def joined(extents):
    """Those of the same kind that follow each other are one."""
    out = []
    for start, length, dirty in extents:
        if out and out[-1][2] == dirty:
            out[-1] = (out[-1][0], out[-1][1] + length, dirty)
        else:
            out.append((start, length, dirty))
    return out


@test("what cannot be is refused, and nothing has changed")
def refused(bench):
    image, dm, _ = setup(bench, 64 * KIB, 8 * MIB, None, {})

    def no(message, action, *argv):
        table = run("dmsetup", "table", dm.name)
        status, out = dm.tool(action, *argv, ok=False)
        expect(status and message in out, f"{action} {argv}: status {status}: {out}")
        expect(run("dmsetup", "table", dm.name) == table and dm.info("suspended") == "Active", f"{action}: {out}")
    no("has no bitmaps", "bitmap remove", "x")
    no("has no bitmaps", "map", "--bitmap", "x")
    no("give --start", "checkpoint", "--stop", "x")
    dm.tool("bitmap add", "x")
    no("has a bitmap x already", "bitmap add", "x")
    no("has no bitmap y", "checkpoint", "--stop", "y", "--start", "z")
    no("has a bitmap x already", "checkpoint", "--stop", "x", "--start", "x")
    no("granularity is not possible", "checkpoint", "--stop", "x", "--start", "z,granularity=5")
    for n in range(15):
        dm.tool("bitmap add", f"b{n}")
    no("one too many", "bitmap add", "more")
    # One goes when the other comes.
    dm.tool("checkpoint", "--stop", "x", "--start", "y")
    no("does not record", "checkpoint", "--stop", "x", "--start", "z")
    # By somebody else: it cannot be told what has changed since.
    run("dmsetup", "suspend", dm.name)
    status, out = dm.tool("bitmap add", "z", ok=False)
    expect(status and "is suspended" in out, f"status {status}: {out}")
    run("dmsetup", "resume", dm.name)
    bench.drop(dm)
    dm = bench.add(Opened(image, "--readonly"))
    no("is open read-only", "bitmap add", "z")
    no("is open read-only", "checkpoint", "--start", "z")
    expect(len(dm.list()) == 17, f"{dm.list()}")
    bench.drop(dm)
    dm = bench.add(Opened(image, "--drop-bitmaps"))
    found = dm.list()
    expect(all(b["inconsistent"] for n, b in found.items() if n != "x"), f"{found}")
    no("inconsistent", "checkpoint", "--stop", "y", "--start", "z")
    no("inconsistent", "map", "--bitmap", "y", "--json")
    dm.tool("checkpoint", "--start", "z")
    dm.tool("bitmap remove", "y")
    expect("count" not in dm.list()["b0"] and dm.list()["z"]["count"] == 0, f"{dm.list()}")


if __name__ == "__main__":
    main()
