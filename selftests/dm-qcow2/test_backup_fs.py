#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""qcow2setup backup, with file systems as witnesses: what programs had synced when a backup
began is in it, complete, and what they did later is not.

Environment: SEED (printed, to repeat a run), ROUNDS (backups of each image; LONG of one).
"""
import contextlib
import hashlib
import itertools
import os
import random
import shutil
import threading
import time

import qcow2test
from qcow2test import KIB, MIB, Io, Loop, Stat, Task, expect, main, note, run, some, test, wait_for
from test_backup import Backup, nothing_left
from test_checkpoint import TOOL, Opened

# Those of the files above
qcow2test.forget_tests()

SEED = int(os.environ.get("SEED", time.time_ns() // 1000 % 1000000))
ROUNDS = int(os.environ.get("ROUNDS", 2))
LONG = int(os.environ.get("LONG", 11))
note(f"SEED={SEED}")

# Small, for all of it is compared often: mkfs.xfs has to be told that this is for a test.
SIZES = {"ext4": 24 * MIB, "xfs": 40 * MIB}
MAKE = {"ext4": ("mkfs.ext4", "-q", "-F"), "xfs": ("mkfs.xfs", "--unsupported", "-q", "-f")}
# How to mount what is not to be changed, not even by its journal
AS_IT_IS = {"ext4": "ro,noload", "xfs": "ro,norecovery,nouuid"}
RECOVERED = {"ext4": "rw", "xfs": "rw,nouuid"}
KINDS = {
    "data_file_raw": {"cluster": 64 * KIB, "raw": True},
    "extended L2": {"cluster": 16 * KIB, "extended": True},
    "over a backing file": {"cluster": 64 * KIB, "backing": True},
}
ANYTHING = None
GONE = "gone"


def digest(data):
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def sync_folder(path):
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_synced(path, data, flags=os.O_WRONLY):
    fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        with memoryview(data) as left:
            done = 0
            while done < len(data):
                done += os.write(fd, left[done:])
        os.fsync(fd)
    finally:
        os.close(fd)


def read_digest(path):
    try:
        with open(path, "rb") as f:
            return digest(f.read())
    except FileNotFoundError:
        return GONE


@contextlib.contextmanager
def mounted(bench, fs, path, options):
    folder = bench.path("witness")
    os.makedirs(folder, exist_ok=True)
    run("mount", "-t", fs, "-o", options, path, folder)
    try:
        yield folder
    finally:
        run("umount", folder)


class Files:
    """A folder in which a thread writes, changes and removes files, and syncs each of them.
    Their names are numbers, which are given only once."""
    LEAST, MOST = 8, 24

    def __init__(self, folder, rng):
        self.folder, self.rng = folder, rng
        os.mkdir(folder)
        self.lock = threading.Lock()
        self.safe = {}          # digests of what is on the disk for certain
        self.changed = {}       # since mark(): what it may be, or ANYTHING
        self.now = {}           # likewise, by what is being done
        self.resting = set()
        self.made = self.done = self.trims = 0
        self.stopped = False
        self.going = threading.Event()
        self.going.set()
        self.task = Task(self.work)

    def begin(self, name, *more):
        """It may be one of these as well, or with none anything."""
        with self.lock:
            was = self.changed.get(name, {self.safe.get(name, GONE)})
            self.now = {name: was | set(more) if more and was is not ANYTHING else ANYTHING}
            self.changed.update(self.now)

    def end(self, name, what):
        with self.lock:
            self.now = {}
            if what == GONE:
                del self.safe[name]
            else:
                self.safe[name] = what
            self.done += 1

    def mark(self):
        """What is on the disk for certain. Half of it is left alone until look(), however long
        that takes, so that there is something that has to be just as it is now."""
        with self.lock:
            self.changed = dict(self.now)
            self.resting = set(list(self.safe)[::2])
            return dict(self.safe)

    def look(self):
        """What has changed since mark(), and how many names there have been"""
        with self.lock:
            self.resting = set()
            return dict(self.changed), self.made

    def data(self):
        most = self.rng.choice((300, 5000, 5000, 20000, 20000, 400000))
        return self.rng.randbytes(self.rng.randrange(1, most))

    def new(self):
        with self.lock:
            name = str(self.made)
            self.made += 1
        self.begin(name)
        data = self.data()
        write_synced(f"{self.folder}/{name}", data, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        sync_folder(self.folder)
        self.end(name, digest(data))

    def over(self, name, flags):
        self.begin(name)
        data = self.data()
        path = f"{self.folder}/{name}"
        write_synced(path, data, os.O_WRONLY | flags)
        self.end(name, digest(data) if flags & os.O_TRUNC else read_digest(path))

    def replace(self, name):
        data = self.data()
        path = f"{self.folder}/{name}"
        write_synced(f"{path}.new", data, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self.begin(name, digest(data))
        os.rename(f"{path}.new", path)
        sync_folder(self.folder)
        self.end(name, digest(data))

    def remove(self, name):
        self.begin(name, GONE)
        os.unlink(f"{self.folder}/{name}")
        sync_folder(self.folder)
        self.end(name, GONE)

    def work(self):
        while not self.stopped:
            self.going.wait()
            with self.lock:
                there = [name for name in self.safe if name not in self.resting]
            kind = self.rng.choice(("new", "new", "over", "append", "whole", "replace", "remove"))
            if len(there) < self.LEAST:
                kind = "new"
            elif len(there) > self.MOST:
                kind = "remove"
            if kind == "new":
                self.new()
            elif kind == "replace":
                self.replace(self.rng.choice(there))
            elif kind == "remove":
                self.remove(self.rng.choice(there))
            else:
                self.over(self.rng.choice(there), {"over": 0, "append": os.O_APPEND, "whole": os.O_TRUNC}[kind])
            if self.done % 40 == 39:
                run("fstrim", "-m", "16K", os.path.dirname(self.folder))
                self.trims += 1

    def some(self, count=8):
        before = self.done
        wait_for("files", 60, lambda: (self.done >= before + count and len(self.safe) >= self.LEAST) or self.task.fault)

    def close(self):
        self.stopped = True
        self.going.set()
        self.task.finish()

    def check(self, folder, before, after, what):
        """A copy of the folder of the time between mark() and look(): how many were to be
        just one thing"""
        changed, made = after
        strict = 0
        for name, was in before.items():
            may = changed.get(name, {was})
            if may is ANYTHING:
                continue
            got = read_digest(f"{folder}/{name}")
            expect(got in may, f"{what}: file {name} is {got}, not what had been synced: {may}")
            strict += len(may) == 1
        for name in os.listdir(folder):
            number = name.removesuffix(".new")
            expect(int(number) < made, f"{what}: file {name} is from later")
            expect(number in before or number in changed, f"{what}: file {name} is from nowhere")
        return strict


class Witness:
    """A file system on a device, and what its files have to be"""

    def __init__(self, bench, fs, cluster, backing=False, **options):
        self.bench, self.fs, self.rng = bench, fs, random.Random(SEED)
        self.settled = {}
        size, more = SIZES[fs], ()
        if backing:
            options["backing"] = bench.file("backing", size)
            more = ("--backing-file", options["backing"])
            self._make(options["backing"])
            loop = Loop(options["backing"])
            with mounted(bench, fs, loop.path, "rw") as folder:
                os.mkdir(f"{folder}/settled")
                self._settle(folder, 20)
            loop.close()
        self.image = bench.image(size, cluster=cluster, **options)
        self.dm = bench.add(Opened(self.image, *more))
        if not backing:
            self._make(self.dm.path)
        self.path = bench.path("mnt")
        os.mkdir(self.path)
        self.stat = Stat(self.dm.path)
        run("mount", "-t", fs, self.dm.path, self.path)
        bench.add(self)
        os.makedirs(f"{self.path}/settled", exist_ok=True)
        self.files = []

    def _make(self, path):
        run(*MAKE[self.fs], path)

    def _settle(self, folder, count):
        for _ in range(count):
            name, data = f"{len(self.settled)}", self.rng.randbytes(self.rng.randrange(1, 40000))
            write_synced(f"{folder}/settled/{name}", data, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            self.settled[name] = digest(data)

    def begin(self):
        self.files = [self.bench.add(Files(f"{self.path}/{n}", random.Random(self.rng.random()))) for n in "ab"]

    def some(self):
        for f in self.files:
            f.some()

    @contextlib.contextmanager
    def rest(self):
        """Begin no more files: what is done meanwhile needs the CPUs itself."""
        for f in self.files:
            f.going.clear()
        try:
            yield
        finally:
            for f in self.files:
                f.going.set()

    def end(self):
        for f in self.files:
            self.bench.drop(f)
        expect(sum(f.trims for f in self.files) and self.stat.discards, "nothing has been discarded")

    def settle(self):
        """More files that are where they belong, and not only in a journal"""
        self._settle(self.path, 3)
        run("fsfreeze", "-f", self.path)
        run("fsfreeze", "-u", self.path)

    def mark(self):
        return [f.mark() for f in self.files]

    def look(self):
        return [f.look() for f in self.files]

    def check_settled(self, folder, what):
        for name, want in self.settled.items():
            got = read_digest(f"{folder}/settled/{name}")
            expect(got == want, f"{what}: settled file {name} is {got}, not {want}")

    def check_files(self, folder, before, after, what):
        self.check_settled(folder, what)
        strict = sum(f.check(f"{folder}/{os.path.basename(f.folder)}", b, a, what)
                     for f, b, a in zip(self.files, before, after))
        expect(strict >= 5, f"{what}: only {strict} files tell anything")
        return strict

    def check_clean(self, path, what):
        if self.fs == "ext4":
            status, out = run("e2fsck", "-f", "-n", path, ok=False)
        else:
            status, out = run("xfs_repair", "-n", path, ok=False)
        expect(status == 0, f"{what}: fsck: status {status}: {out}")

    def check_copy(self, target, before, after, what):
        """A copy, as after a power cut: the journal is replayed, and all is well then."""
        scratch = self.bench.path("scratch")
        shutil.copyfile(target, scratch)
        loop = self.bench.add(Loop(scratch))
        with mounted(self.bench, self.fs, loop.path, RECOVERED[self.fs]) as folder:
            strict = self.check_files(folder, before, after, what)
        self.check_clean(loop.path, what)
        self.bench.drop(loop)
        os.unlink(scratch)
        return strict

    def close(self):
        run("umount", self.path)


def bitmap_words(*numbers):
    return [word for n in numbers for word in ("--bitmap", f"c{n}")]


def copied(w, target, *numbers):
    """Bring a copy up to date, while the disk goes on changing"""
    run(TOOL, "backup", "copy", w.dm.name, target, *bitmap_words(*numbers))
    run("cmp", target, f"/dev/mapper/{w.dm.name}-backup")


def witnessed(bench, fs, kind, rounds):
    """A full backup, increments, and a second copy that is brought up to date every other
    time, by two bitmaps. Every other time the file system is frozen for the instant."""
    w = Witness(bench, fs, **KINDS[kind])
    w.begin()
    view = f"/dev/mapper/{w.dm.name}-backup"
    one, two = bench.path("one"), bench.path("two")
    strict = 0
    for n in range(rounds + 1):
        what = f"backup {n}"
        w.some()
        w.settle()
        w.some()
        numbers = range(max(n - 2, 0), n)
        before = w.mark()
        frozen = n % 2 == 1
        b = Backup(bench, [w.dm], *bitmap_words(*numbers), "--checkpoint", f"c{n}", *(["--freeze"] if frozen else []))
        after = w.look()
        w.some()
        with mounted(bench, fs, view, AS_IT_IS[fs]) as folder:
            if frozen:
                # Nothing is in a journal only.
                w.check_files(folder, before, after, f"{what}, frozen")
            else:
                w.check_settled(folder, f"{what}, view")
        if frozen and fs == "ext4":
            # xfs leaves its log dirty for files that are removed while they are open; its
            # copy is checked once it has been mounted.
            w.check_clean(view, f"{what}, frozen")
        copied(w, one, *numbers[-1:])
        if n % 2 == 0:
            copied(w, two, *numbers)
        with w.rest():
            strict += w.check_copy(one, before, after, what)
        if n % 2:
            w.some()
            run("cmp", one, view)
        b.end()
        if n > 1:
            w.dm.tool("bitmap remove", f"c{n - 2}")
    note(f"{rounds} increments; {strict} files compared that had been synced, of {sum(f.made for f in w.files)}; "
         f"{w.stat.discards} discards")
    w.end()
    bench.drop(w)
    last = rounds
    b = Backup(bench, [w.dm], *bitmap_words(last - 1, last), "--checkpoint", "last")
    copied(w, one, last)
    # The other one has been left out once, or not.
    copied(w, two, last - 1, last)
    b.end()
    for path in one, two:
        run("cmp", path, w.dm.path)
    w.check_clean(one, "at rest")
    nothing_left(w.dm)
    bench.drop(w.dm)
    run("qemu-img", "check", "-q", w.image.path)


@test("the device may be mounted, or open with O_EXCL")
def claimed(bench):
    image = bench.image(8 * MIB, cluster=64 * KIB)
    dm = bench.add(Opened(image))
    disk = bench.add(Io(dm.path, os.O_EXCL))
    disk.write(0, b"w" * 4096)
    b = Backup(bench, [dm])
    disk.write(0, b"n" * 4096)
    expect(b.view(dm) == b"w" * 4096 + bytes(image.size - 4096), "the view is another one")
    # It is not left alone for that: while there is a view, it stays.
    bench.drop(disk)
    status, out = run("dmsetup", "remove", dm.name, ok=False)
    expect(status and "busy" in out, f"dmsetup remove: status {status}: {out}")
    b.end()
    nothing_left(dm)


for _fs, _kind in some(itertools.product(SIZES, KINDS), 3):
    _rounds = LONG if (_fs, _kind) == ("ext4", "data_file_raw") else ROUNDS
    test(f"{_fs}, {_kind}: what was synced is in a full backup and {_rounds} increments", _fs, _kind, _rounds,
         all_cpus=True)(witnessed)


if __name__ == "__main__":
    main()
