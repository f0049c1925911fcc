#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Random requests on images of every kind, on the device and on a model.

Each image is one row of a table that covers every pair of properties: cluster
size, refcount width, raw, extended L2, preallocation, backing, a size that is no
multiple of the cluster, what the data device is, pass-down. QCOW2_TEST_FULL=1
does every combination that there is of the first six.

qcow2stress sends the requests (see there), several at a time, and compares what
it reads with the model. Meanwhile the device is suspended and resumed, its table
is loaded anew, or clean caches are dropped; between two runs it is removed and
made again. In the end the states on disk, and what QEMU sees in the image, must
be the model's.

Environment: SEED (printed, to repeat a run), REQUESTS (for each image).
"""
import itertools
import os
import random
import threading
import time

from qcow2test import (HERE, KIB, MIB, Ext4, Failure, NullBlk, drop_caches, expect, main, note, queue_limit, run, some,
                       test)

SEED = int(os.environ.get("SEED", time.time_ns() // 1000 % 1000000))
REQUESTS = int(os.environ.get("REQUESTS", 2000))
STRESS = os.path.join(HERE, "qcow2stress")
LETTERS = {"unallocated": b"u", "zero": b"z", "data": b"d"}

SIZES = {512: MIB, 2 * KIB: 3 * MIB, 4 * KIB: 5 * MIB, 16 * KIB: 6 * MIB, 64 * KIB: 8 * MIB,
         256 * KIB: 12 * MIB, 2 * MIB: 24 * MIB}
PROPERTIES = {
    "cluster": tuple(SIZES),
    "bits": (16, 1, 2, 4, 8, 32, 64),
    "raw": (False, True),
    "extended": (False, True),
    "prealloc": ("off", "metadata", "falloc", "full"),
    "backing": ("none", "shorter", "equal", "longer"),
    "tail": ("whole", "sector", "cut"),
    # What the data is on: the RAM disk can neither discard nor write zeroes.
    "data": ("tmpfs", "ext4", "ram"),
    "passdown": (True, False),
}


def possible(row):
    """Is there such an image? Only properties that the row has are looked at."""
    def has(name, *values):
        return row.get(name) in values
    if has("extended", True) and has("cluster", 512, 2 * KIB, 4 * KIB):
        return False
    if has("raw", True) and has("backing", "shorter", "equal", "longer"):
        return False
    # QEMU preallocates over a backing file only with extended entries, and raw
    # images always.
    if has("prealloc", "metadata", "falloc", "full") and has("backing", "shorter", "equal", "longer") and \
            has("extended", False):
        return False
    if has("raw", True) and has("prealloc", "off"):
        return False
    # A device cannot be preallocated.
    return not (has("data", "ram") and has("prealloc", "falloc", "full"))


def pairwise():
    """Rows that have every possible pair of values between them. Greedy."""
    names = list(PROPERTIES)
    todo = {frozenset(((a, x), (b, y))) for a, b in itertools.combinations(names, 2)
            for x in PROPERTIES[a] for y in PROPERTIES[b] if possible({a: x, b: y})}
    rng = random.Random(1)
    rows = []
    while todo:
        best, gain = None, 0
        # Sorted: the order of a set is not the same in each run.
        first = sorted(todo, key=lambda p: sorted(map(str, p)))[:40]
        for _ in range(60):
            row = dict(rng.choice(first))
            if not fill_in(row, names, todo, rng):
                continue
            got = sum(p <= set(row.items()) for p in todo)
            if got > gain:
                best, gain = row, got
        if not best:
            # A pair that is possible by itself but in no whole row.
            break
        todo -= {p for p in todo if p <= set(best.items())}
        rows.append({n: best[n] for n in names})
    return rows


def fill_in(row, names, todo, rng):
    """Give the other properties values, each the one that covers most."""
    left = [n for n in names if n not in row]
    rng.shuffle(left)
    for name in left:
        values = [v for v in PROPERTIES[name] if possible({**row, name: v})]
        if not values:
            return False
        rng.shuffle(values)
        row[name] = max(values, key=lambda v: sum(frozenset(((name, v), item)) in todo for item in row.items()))
    return possible(row)


def every():
    """All combinations; what else there is goes round."""
    names = list(PROPERTIES)[:6]
    for n, values in enumerate(itertools.product(*(PROPERTIES[p] for p in names))):
        row = dict(zip(names, values))
        row["tail"] = PROPERTIES["tail"][n % 3]
        row["data"] = "ext4" if n % 7 == 3 else "tmpfs"
        row["passdown"] = n % 5 != 2
        if possible(row):
            yield row


class Background(threading.Thread):
    """Something done again and again while requests are under way."""

    def __init__(self, function, pause):
        super().__init__()
        self.function, self.pause, self.end, self.fault = function, pause, threading.Event(), None
        self.times = 0

    def run(self):
        try:
            while not self.end.wait(self.pause):
                self.function()
                self.times += 1
        except Exception as e:  # pylint: disable=broad-except # raised by stop()
            self.fault = e

    def stop(self):
        self.end.set()
        self.join()
        if self.fault:
            raise self.fault


class Matrix:
    """One image of the table, its device and its model."""

    def __init__(self, bench, row, seed):
        self.bench, self.row, self.seed = bench, row, seed
        self.rng = random.Random(seed)
        cluster = row["cluster"]
        self.size = SIZES[cluster] + {"whole": 0, "sector": 512, "cut": (cluster // 2 & ~511) + 512}[row["tail"]]
        self.image = image = self.make()
        if row["raw"]:
            if row["extended"]:
                # QEMU leaves the allocation bits clear, and takes its own raw
                # image for one of zeros.
                for guest in range(0, self.size, cluster):
                    image.set_bitmap(guest, 0xffffffff)
        else:
            self.mixed()
        if row["raw"]:
            with open(image.data, "r+b") as f:
                f.write(self.rng.randbytes(self.size))
        else:
            image.poison_unused(seed)
        self.model, self.states = bench.path("model"), bench.path("states")
        with open(self.model, "wb") as f:
            f.write(image.content())
        with open(self.states, "wb") as f:
            f.write(b"".join(LETTERS[s] for s in image.states()))
        self.features = () if row["passdown"] else ("no_discard_passdown",)
        self.dm = image.open(*self.features)
        self.limits()

    def make(self):
        row, bench = self.row, self.bench
        data = backing = None
        if row["data"] == "ext4":
            data = bench.add(Ext4(bench, 128 * MIB)).path + "/data"
        elif row["data"] == "ram":
            data = bench.add(NullBlk(64 * MIB, discard=False)).path
        if row["backing"] != "none":
            length = {"shorter": self.size // 2 & ~511, "equal": self.size,
                      "longer": self.size + 3 * row["cluster"] + 512}[row["backing"]]
            backing = bench.path("backing")
            with open(backing, "wb") as f:
                f.write(self.rng.randbytes(length))
        return bench.image(self.size, cluster=row["cluster"], refcount_bits=row["bits"], raw=row["raw"],
                           extended=row["extended"], backing=backing, data=data,
                           options=f",preallocation={row['prealloc']}")

    def mixed(self):
        """Something of every state to begin with, made by QEMU."""
        rng, size, commands = self.rng, self.size, []
        unit = self.image.unit
        for n in range(16):
            at = rng.randrange(size // unit) * unit
            length = min(unit * rng.choice((1, 2, 5)), size - at)
            if n % 4 == 3:
                at += rng.randrange(unit // 512) * 512
                length = min(512 * rng.randrange(1, 40), size - at)
            commands.append((f"write -q -P {n + 1} {at} {length}", f"write -q -z {at} {length}",
                             f"write -q -z -u {at} {length}", f"discard -q {at} {length}")[rng.randrange(4)])
        self.image.qemu_io(*commands)
        self.image.trim()

    def limits(self):
        """What the device offers; see also test_discard.py."""
        loop = self.row["data"] != "ram"
        self.discards = queue_limit(self.dm.path, "discard_max_bytes") > 0
        self.zeroes = queue_limit(self.dm.path, "write_zeroes_max_bytes") > 0
        # With raw the data device must do it, and be allowed to.
        expect(self.discards == (not self.row["raw"] or (loop and self.row["passdown"])),
               f"discards: {self.discards}")
        expect(self.zeroes == loop, f"write zeroes: {self.zeroes}")

    def stress(self, count, threads, seed, *options):
        image = self.image
        argv = [STRESS, "-s", seed, "-n", count, "-t", threads, "-u", image.unit, "-c", image.cluster]
        argv += ["-b", os.stat(image.backing).st_size] if image.backing else []
        argv += ["-r"] if self.row["raw"] else []
        # A loop device makes a hole of exactly what is discarded.
        argv += ["-d", "none" if not self.discards else "exact" if self.row["raw"] else "units"]
        argv += ["-z", "native" if self.zeroes else "fallback", *options]
        argv += [self.dm.path, self.model, self.states]
        status, out = run(*argv, ok=False)
        if status:
            note("failed:", *argv)
            raise Failure(f"seed {self.seed}: {out.strip()}")

    def reopen(self):
        self.bench.drop(self.dm)
        self.dm = self.image.open(*self.features)

    def on_disk(self):
        """The states on disk must be the model's."""
        if self.row["raw"]:
            return
        got = b"".join(LETTERS[s] for s in self.image.states())
        with open(self.states, "rb") as f:
            want = f.read()
        bad = [n for n, (a, b) in enumerate(zip(got, want)) if a != b]
        expect(not bad and len(got) == len(want),
               f"seed {self.seed}: states on disk differ in {len(bad)} units, the first is {bad[:1]}: "
               f"{got[bad[0]:bad[0] + 1] if bad else len(got)}, not {want[bad[0]:bad[0] + 1] if bad else len(want)}")

    def round(self, number, count):
        rng = self.rng
        line = self.dm.line
        meanwhile = rng.choice((None, drop_caches, self.dm.cycle, lambda: self.dm.load(line)))
        task = Background(meanwhile, rng.choice((0.02, 0.1))) if meanwhile else None
        if task:
            task.start()
        try:
            self.stress(count, rng.choice((1, 2, 4, 8, 16)), self.seed + number)
        finally:
            if task:
                task.stop()
        after = rng.randrange(5)
        if after == 0:
            self.dm.cycle()
        elif after == 1:
            self.reopen()
        elif after == 2:
            disk = self.bench.io(self.dm)
            disk.fsync()
            self.on_disk()
            self.bench.drop(disk)
        elif after == 3:
            drop_caches()

    def mapped(self):
        """qemu-img map knows no more, and no less, than the model."""
        if self.row["raw"]:
            return
        unit = self.image.unit
        with open(self.states, "rb") as f:
            states = f.read()
        seen = bytearray(len(states))
        for extent in self.image.map():
            # present: in this image or in a backing one; depth tells in which.
            here = extent["present"] and extent["depth"] == 0
            start, end = extent["start"], extent["start"] + extent["length"]
            for n in range(start // unit, -(-end // unit)):
                state = states[n:n + 1]
                if state == b"d":
                    fits = here and extent.get("offset") == start
                elif state == b"z":
                    fits = here and extent["zero"] and not extent["data"]
                else:
                    fits = not here
                expect(fits, f"seed {self.seed}: unit {n} ({n * unit:#x}) is {state} in the model, but {extent}")
                seen[n] = 1
        expect(all(seen), "qemu-img map leaves units out")

    def finish(self):
        self.stress(0, 1, 0, "-v")
        self.dm.cycle()
        self.stress(0, 1, 0, "-v")
        expect(self.dm.mode() == "rw", f"{self.dm.status()}")
        self.bench.drop(self.dm)
        self.on_disk()
        self.image.check()
        status, out = run("qemu-img", "compare", "-U", "-f", "qcow2", "-F", "raw", self.image.path, self.model, ok=False)
        expect(status == 0, f"seed {self.seed}: qemu-img compare: {out.strip()}")
        self.mapped()


def title(row):
    words = [f"clusters of {row['cluster']}", f"refcounts of {row['bits']} bits"]
    words += ["data_file_raw"] if row["raw"] else []
    words += ["extended L2"] if row["extended"] else []
    words += [f"preallocation {row['prealloc']}"] if row["prealloc"] != "off" else []
    words += [f"{row['backing']} backing"] if row["backing"] != "none" else []
    words += [f"size {row['tail']}"] if row["tail"] != "whole" else []
    words += [f"data on {row['data']}"]
    words += ["no pass-down"] if not row["passdown"] else []
    return ", ".join(words)


def matrix(bench, row, number):
    expect(os.access(STRESS, os.X_OK), "qcow2stress is not built; run make in this folder")
    m = Matrix(bench, row, SEED + 1000 * number)
    done = n = 0
    while done < REQUESTS:
        count = min(REQUESTS - done, max(50, REQUESTS // m.rng.choice((3, 4, 6))))
        m.round(n, count)
        done += count
        n += 1
    m.finish()


ROWS = list(every()) if os.environ.get("QCOW2_TEST_FULL") else pairwise()
for _n, _row in some(enumerate(ROWS), 20):
    test(f"matrix: {title(_row)}", _row, _n)(matrix)


if __name__ == "__main__":
    note(f"SEED={SEED} REQUESTS={REQUESTS}, {len(ROWS)} images")
    main()
