#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Many threads on few units, while all that can happen to a device does happen to it.

qcow2race (see there) makes the requests and knows what each sector must read as.
Meanwhile the device is suspended and resumed, with and without flushing, its
table is loaded anew with other features, caches are dropped, its status is read and
its events are waited for. The units are the first ones, those on both sides of
the border of two L2 tables, and the last ones, which the image's end cuts.

Environment: SEED (printed, to repeat a run), ROUNDS (for each image), REQUESTS (of
each thread in a round), THREADS.
"""
import contextlib
import os
import random
import subprocess
import time

from qcow2test import (DM_NOFLUSH_FLAG, HERE, KIB, MIB, Failure, Lower, Task, drop_caches, expect, main,
                       note, run, test)

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
}


class Disturber:
    """Does things to a device until it is stopped."""
    WAYS = ("cycle", "noflush", "load", "drop", "status")

    def __init__(self, dm, rng, ways):
        self.dm, self.line, self.rng = dm, dm.line, rng
        self.times = dict.fromkeys(ways, 0)
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
            what = self.rng.choice(list(self.times))
            if what == "cycle":
                self.dm.cycle()
            elif what == "noflush":
                self.dm.suspend(DM_NOFLUSH_FLAG)
                self.dm.resume()
            elif what == "load":
                self.dm.load(self.other_line())
            elif what == "drop":
                drop_caches()
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
    lower = None
    if kind.get("late"):
        image.attach()
        lower = Lower(bench, "data", image.data_loop.path)
        lower.slow(writes=kind["late"])
    dm = image.open(data=lower and lower.path)

    argv = [RACE, "-s", seed, "-r", ROUNDS, "-n", REQUESTS, "-t", THREADS, "-u", unit]
    argv += ["-b", os.stat(backing).st_size] if backing else []
    argv += ["-x"] if kind.get("raw") else []
    # dm-delay does no others.
    argv += ["-p"] if lower else []
    argv += [dm.path, model, *places]
    with meanwhile:
        disturber = Disturber(dm, rng, ways)
        try:
            status, out = run(*argv, ok=False, timeout=1800)
        finally:
            disturber.stop()
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
    image.detach()
    status, out = run("qemu-img", "compare", "-U", "-f", "qcow2", "-F", "raw", image.path, model, ok=False)
    expect(status == 0, f"seed {seed}: qemu-img compare: {out.strip()}")


if __name__ == "__main__":
    for _n, (_name, _kind) in enumerate(IMAGES.items()):
        test(f"race: {_name}", _kind, SEED + 1000 * _n)(race)
    note(f"SEED={SEED} ROUNDS={ROUNDS} REQUESTS={REQUESTS} THREADS={THREADS}")
    main()
