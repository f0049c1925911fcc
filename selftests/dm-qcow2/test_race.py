#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Many threads on few units, while all that can happen to a device does happen to it.

qcow2race (see there) makes the requests and knows what each sector must read as.
Meanwhile the device is suspended and resumed, with and without flushing, its
table is loaded anew with other features, caches are dropped, its status is read and
its events are waited for. The units are the first ones, those on both sides of
the border of two L2 tables, and the last ones, which the image's end cuts. Of bitmaps what is
not needed is taken back, too, or they start again, while one more thread writes on and on.

Environment: SEED (printed, to repeat a run), ROUNDS (for each image), REQUESTS (of
each thread in a round), THREADS.
"""
import contextlib
import os
import random
import struct
import subprocess
import time

from bitmaps import bitmaps, qemu_takes, record
from qcow2image import RAW
from qcow2test import (DM_NOFLUSH_FLAG, DM_TABLE_LOAD, HERE, KIB, MIB, Failure, Io, Lower, Task, dm_ioctl, drop_caches,
                       expect, main, note, run, some, test)

SEED = int(os.environ.get("SEED", time.time_ns() // 1000 % 1000000))
ROUNDS = int(os.environ.get("ROUNDS", 10))
REQUESTS = int(os.environ.get("REQUESTS", 25))
THREADS = int(os.environ.get("THREADS", 16))
RACE = os.path.join(HERE, "qcow2race")

IMAGES = {
    "clusters of 64 KiB": {"cluster": 64 * KIB},
    "clusters of 512 bytes": {"cluster": 512, "units": 24},
    "backing device": {"cluster": 4 * KIB, "backing": True, "units": 12},
    "extended L2 and backing device": {"cluster": 64 * KIB, "extended": True, "backing": True, "units": 24},
    "extended L2": {"cluster": 16 * KIB, "extended": True, "units": 40},
    "data_file_raw": {"cluster": 64 * KIB, "raw": True},
    # Fills and discards take a while, so that others meet them under way.
    "data device with late writes": {"cluster": 4 * KIB, "late": 4},
    "bitmaps": {"cluster": 4 * KIB, "units": 12, "bitmaps": (512, 64 * KIB)},
    "bitmaps and data_file_raw": {"cluster": 64 * KIB, "raw": True, "bitmaps": (4 * KIB, 32 * KIB)},
}


class Along:
    """Writes a range from beginning to end, again and again, until it is stopped: much of it is
    marked ahead."""
    STEP = 4 * KIB

    def __init__(self, dm, start, end):
        self.start, self.end, self.passes = start, end, 0
        self.disk = Io(dm.path)
        self.ended = False
        self.task = Task(self.go_along)

    def content(self, at, number):
        return struct.pack("QQ", at, number) * (self.STEP // 16)

    def go_along(self):
        while not self.ended:
            self.passes += 1
            for at in range(self.start, self.end, self.STEP):
                self.disk.write(at, self.content(at, self.passes))

    def stop(self, model):
        self.ended = True
        try:
            self.task.finish(120)
        finally:
            self.disk.close()
        with open(model, "r+b") as f:
            for at in range(self.start, self.end, self.STEP):
                f.seek(at)
                f.write(self.content(at, self.passes))


class Keeper:
    """Knows what an image was when its bitmaps began to record, and what they must say of it. It
    looks while the device is suspended, or gone."""

    def __init__(self, bench, image, names, ranges):
        self.bench, self.image, self.names, self.ranges = bench, image, names, ranges
        content = self.content()
        self.before = {name: content for name in names}
        self.looks = self.cleared = 0

    def content(self):
        """What the guest has in the ranges"""
        path = self.image.data
        if not self.image.get("autoclear_features") & RAW:
            path = self.bench.path("content")
            run("qemu-img", "convert", "-U", "-f", "qcow2", "-O", "raw", self.image.path, path)
        found = []
        with open(path, "rb") as f:
            for start, end in self.ranges:
                f.seek(start)
                found.append(f.read(end - start))
        return found

    def differ(self, name, content):
        """The sectors that do"""
        for (start, end), old, new in zip(self.ranges, self.before[name], content):
            if old != new:
                for at in range(0, end - start, 512):
                    if old[at:at + 512] != new[at:at + 512]:
                        yield start + at, 512

    def look(self, when):
        content, found = self.content(), bitmaps(self.image)
        self.looks += 1
        for name in self.names:
            b = found[name]
            have = b.content()
            lack = b.granules(list(self.differ(name, content))) & ~have
            more = have & ~b.granules([(start, end - start) for start, end in self.ranges])
            expect(not lack and not more,
                   f"{when}: {name} lacks {lack.bit_count()} granules, the first {(lack & -lack).bit_length() - 1}, "
                   f"and has {more.bit_count()} that nobody has written")
        return content

    def clear(self, rng):
        """For some of them another backup begins."""
        content = self.look("suspended")
        for name in self.names:
            if rng.randrange(2):
                bitmaps(self.image)[name].put(0)
                self.before[name] = content
                self.cleared += 1


class Disturber:
    """Does things to a device until it is stopped."""
    WAYS = ("cycle", "noflush", "load", "drop", "status")
    # of an image with bitmaps, too
    BITMAPS = ("sync", "sync", "clear")

    def __init__(self, dm, rng, ways, keeper=None):
        self.dm, self.line, self.rng, self.keeper = dm, dm.line, rng, keeper
        # Who does not suspend it has a reason.
        self.ways = ways + (self.BITMAPS if keeper and "cycle" in ways else ())
        self.times = dict.fromkeys(self.ways, 0)
        self.ended = False
        # It ends with the device.
        self.waiter = subprocess.Popen(["dmsetup", "wait", dm.name], stdin=subprocess.DEVNULL,
                                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.task = Task(self.disturb)

    def other_line(self):
        """The same table, but for the features that may change."""
        words = self.line.split(" ")
        fixed, features = words[:11], words[12:]
        if self.rng.randrange(2):
            features += ["cache_limit", "1"]
        # With it a raw image takes no discards.
        if "data_file_raw" not in features and self.rng.randrange(2):
            features += ["no_discard_passdown"]
        return " ".join(fixed + ([str(len(features)), *features] if features else []))

    def disturb(self):
        while not self.ended:
            what = self.rng.choice(self.ways)
            if what == "cycle":
                self.dm.cycle()
            elif what == "noflush":
                self.dm.suspend(DM_NOFLUSH_FLAG)
                self.dm.resume()
            elif what == "load":
                self.dm.load(self.other_line())
            elif what == "drop":
                drop_caches()
            elif what == "sync":
                self.dm.message("bitmap_sync")
            elif what == "clear":
                self.dm.suspend()
                self.keeper.clear(self.rng)
                if self.rng.randrange(2):
                    dm_ioctl(DM_TABLE_LOAD, self.dm.name, self.other_line())
                self.dm.resume()
            else:
                expect(self.dm.mode() == "rw", f"{self.dm.status()}")
            self.times[what] += 1
            time.sleep(self.rng.choice((0, 0.005, 0.03)))

    def stop(self):
        self.ended = True
        try:
            self.task.finish(120)
        finally:
            self.waiter.kill()
            self.waiter.wait()


def race(bench, kind, seed, ways=Disturber.WAYS, meanwhile=contextlib.nullcontext()):
    """One image. ways: to disturb it; meanwhile: what is to be the case all the time."""
    rng = random.Random(seed)
    cluster, units = kind["cluster"], kind.get("units", 6)
    unit = cluster // 32 if kind.get("extended") else cluster
    cover = cluster * cluster // (16 if kind.get("extended") else 8)
    size = cover + max(MIB, 4 * units * unit) + unit // 2 // 512 * 512
    end = -(-size // unit) * unit
    third = units // 3 * unit
    ranges = [(0, third), (cover - third // 2 // unit * unit, cover + third), (end - third, size)]
    backing = None
    if kind.get("backing"):
        # Its end is in the last unit but one.
        backing = bench.file("backing", end - 2 * unit + 512)
    places = [f"{a}+{b - a}" for a, b in ranges]
    model = bench.file("model", size)
    if backing:
        there = [f"{a}+{min(b, end - 2 * unit + 512) - a}" for a, b in ranges]
        run(RACE, "-f", 0, backing, *there)
        run(RACE, "-f", 0, model, *there)
    image = bench.image(size, cluster=cluster, raw=kind.get("raw", False),
                        extended=kind.get("extended", False), backing=backing)
    if not image.get("autoclear_features") & 2:
        # Other than what backs it, and what anybody writes
        run(RACE, "-f", 0xee << 56, image.data, *places)
    features, keeper, lane = (), None, None
    if kind.get("bitmaps"):
        features = ("bitmaps",)
        # Between the ranges of the others
        first = -(-(cover + third + unit) // (4 * KIB)) * 4 * KIB
        lane = (first, first + 256 * KIB)
        expect(lane[1] + unit < end - third, "there is no room beside the ranges")
        keeper = Keeper(bench, image, record(image, kind["bitmaps"]), ranges + [lane])
    lower = None
    if kind.get("late"):
        image.attach()
        lower = Lower(bench, "data", image.data_loop.path)
        lower.slow(writes=kind["late"])
    dm = image.open(*features, data=lower and lower.path)

    argv = [RACE, "-s", seed, "-r", ROUNDS, "-n", REQUESTS, "-t", THREADS, "-u", unit]
    argv += ["-b", os.stat(backing).st_size] if backing else []
    argv += ["-x"] if kind.get("raw") else []
    # dm-delay does no others.
    argv += ["-p"] if lower else []
    argv += [dm.path, model, *places]
    with meanwhile:
        along = keeper and Along(dm, *lane)
        disturber = Disturber(dm, rng, ways, keeper)
        try:
            status, out = run(*argv, ok=False, timeout=1800)
        finally:
            try:
                disturber.stop()
            finally:
                if along:
                    along.stop(model)
    if status:
        note("failed:", *argv)
        raise Failure(f"seed {seed}: {out.strip()}")
    note(out.strip())
    note(", ".join(f"{k} {v}" for k, v in disturber.times.items()))

    expect(dm.mode() == "rw", f"{dm.status()}")
    bench.drop(dm)
    if lower:
        bench.drop(lower.dm)
    image.check(leaks=True)
    if keeper:
        keeper.look("at the end")
        qemu_takes(image, keeper.names)
        note(f"{along.passes} times along a range, {keeper.looks} looks at bitmaps, {keeper.cleared} cleared")
    image.detach()
    status, out = run("qemu-img", "compare", "-U", "-f", "qcow2", "-F", "raw", image.path, model, ok=False)
    expect(status == 0, f"seed {seed}: qemu-img compare: {out.strip()}")


if __name__ == "__main__":
    for _n, (_name, _kind) in some(enumerate(IMAGES.items()), 5):
        test(f"race: {_name}", _kind, SEED + 1000 * _n)(race)
    note(f"SEED={SEED} ROUNDS={ROUNDS} REQUESTS={REQUESTS} THREADS={THREADS}")
    main()
