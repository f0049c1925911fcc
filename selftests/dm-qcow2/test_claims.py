#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Two tables over one metadata device: one live writer, or any number of live readers.

Who writes has states in core that nobody else sees: of two writers each would undo
what the other one has flushed, and a reader beside a writer would show what was. So a
table claims its metadata device when it is resumed, and gives it back when it is
suspended. A table that is loaded, or suspended, holds nothing.
"""
import errno

from qcow2test import (DM_READONLY_FLAG, DM_TABLE_CLEAR, DM_TABLE_LOAD, KIB, MIB, Dm, Io, Loop, Lower, dm_ioctl,
                       expect, fails_with, in_parallel, main, run, same, test, wait_for)
from heldimage import state_of

CLUSTER = 64 * KIB
SIZE = 16 * MIB


class Setup:
    """An image, its table lines, and devices without a table."""

    def __init__(self, bench):
        self.bench = bench
        self.image = image = bench.some_image(SIZE, CLUSTER)
        self.lines = {"writer": image.line(image.meta_loop.path, image.data_loop.path),
                      "reader": image.line(image.meta_loop.path, image.data_loop.path, "read_only")}
        self.model = bench.model(SIZE)
        self.model.write(0, b"a" * CLUSTER)

    def loaded(self, name, kind):
        """A device with a table that is not live yet."""
        dm = self.bench.add(Dm(name))
        dm_ioctl(DM_TABLE_LOAD, dm.name, self.lines[kind])
        return dm

    def live(self, name, kind):
        dm = self.loaded(name, kind)
        dm.resume()
        return dm

    def write(self, dm, unit, byte, flush=True):
        """A first write, or an overwrite, and what was there before."""
        disk = Io(dm.path)
        try:
            same(disk.read(0, SIZE), self.model.read(0, SIZE))
            disk.write(unit * CLUSTER + 512, byte * 1024)
            self.model.write(unit * CLUSTER + 512, byte * 1024)
            if flush:
                disk.fsync()
        finally:
            disk.close()

    def works(self, dm, kind, unit):
        """A device does what its kind can."""
        expect(state_of(dm) == "live", "it is suspended")
        if kind == "writer":
            self.write(dm, unit, b"%c" % (65 + unit))
            return
        disk = Io(dm.path, readonly=True)
        try:
            same(disk.read(0, SIZE), self.model.read(0, SIZE))
        finally:
            disk.close()

    def refused(self, dm):
        """It stays suspended, and nothing is written."""
        before = self.image.hash()
        with fails_with(errno.EBUSY):
            dm.resume()
        expect(state_of(dm) == "suspended", "the resume has failed, but the device is not suspended")
        expect(self.image.hash() == before, "metadata was written by a table that was refused")

    def finish(self):
        for dm in [t for t in reversed(self.bench.things) if isinstance(t, Dm)]:
            self.bench.drop(dm)
        self.image.check()
        self.image.compare(self.model)


def beside(bench, first, second):
    s = Setup(bench)
    a = s.live("a", first)
    s.works(a, first, 3)
    # The line as such is in order, and loading it is, too.
    b = s.loaded("b", second)
    for unit in (4, 5):
        s.refused(b)
        s.works(a, first, unit)
    bench.drop(a)
    b.resume()
    s.works(b, second, 6)
    s.finish()


for _first, _second in (("writer", "writer"), ("reader", "writer"), ("writer", "reader")):
    test(f"a {_second} beside a live {_first}: EBUSY, and it can be resumed when that is gone",
         _first, _second)(beside)


@test("readers beside readers; a writer when the last one has gone")
def readers(bench):
    s = Setup(bench)
    devices = [s.live(f"r{n}", "reader") for n in range(4)]
    # Read-only by the mode of the table, not by its arguments
    dm = bench.add(Dm("ro"))
    dm_ioctl(DM_TABLE_LOAD, dm.name, s.lines["writer"], DM_READONLY_FLAG)
    dm.resume()
    devices.append(dm)
    for dm in devices:
        s.works(dm, "reader", 0)
    writer = s.loaded("w", "writer")
    for dm in devices:
        s.refused(writer)
        bench.drop(dm)
    writer.resume()
    s.works(writer, "writer", 3)
    s.refused(s.loaded("late", "reader"))
    s.finish()


@test("tables that are loaded, and not resumed, hold no claim")
def inactive(bench):
    s = Setup(bench)
    idle = [s.loaded(f"i{n}", kind) for n, kind in enumerate(("writer", "reader", "writer"))]
    a = s.live("a", "writer")
    s.works(a, "writer", 3)
    # Nor does one behind a live table
    dm_ioctl(DM_TABLE_LOAD, a.name, s.lines["reader"])
    s.works(a, "writer", 4)
    for dm in idle:
        s.refused(dm)
    dm_ioctl(DM_TABLE_CLEAR, a.name)
    s.works(a, "writer", 5)
    bench.drop(a)
    idle[2].resume()
    s.works(idle[2], "writer", 6)
    s.finish()


@test("a suspended table holds no claim: an image is handed over from one device to another, and back")
def hand_over(bench):
    s = Setup(bench)
    a = s.live("a", "writer")
    s.write(a, 3, b"A", flush=False)
    a.suspend()
    b = s.live("b", "writer")
    # What the first one has written, and not flushed
    s.works(b, "writer", 4)
    s.refused(a)
    s.works(b, "writer", 5)
    b.suspend()
    a.resume()
    # It knows what the other one has allocated.
    s.works(a, "writer", 6)
    s.refused(b)
    a.suspend()
    readers_ = [s.live(f"r{n}", "reader") for n in range(2)]
    for dm in readers_:
        s.works(dm, "reader", 0)
    s.refused(a)
    s.refused(b)
    for dm in readers_:
        dm.suspend()
    b.resume()
    s.works(b, "writer", 7)
    s.finish()


@test("the removal of a suspended table takes no claim from another one")
def removed(bench):
    s = Setup(bench)
    a, c = s.live("a", "writer"), s.loaded("c", "writer")
    a.suspend()
    b = s.live("b", "writer")
    bench.drop(a)
    s.refused(c)
    s.works(b, "writer", 3)
    # Nor does one that was refused, or never resumed
    bench.drop(c)
    bench.drop(s.loaded("d", "reader"))
    c = s.loaded("c", "writer")
    s.refused(c)
    bench.drop(b)
    c.resume()
    s.works(c, "writer", 4)
    s.finish()


@test("a device gets new tables over the same metadata device; not beside others")
def reloads(bench):
    s = Setup(bench)
    dm = s.live("a", "writer")
    for unit, kind in enumerate(("writer", "reader", "reader", "writer", "writer"), 3):
        dm.load(s.lines[kind])
        s.works(dm, kind, unit)
        # The claim is what the table is.
        other = s.loaded("b", "reader")
        if kind == "reader":
            other.resume()
        else:
            s.refused(other)
        bench.drop(other)
    dm.load(s.lines["reader"])
    other = s.live("b", "reader")
    with fails_with(errno.EBUSY):
        dm.load(s.lines["writer"])
    # It has the table that it was given, and waits; so another one is to be had.
    expect(state_of(dm) == "suspended", "it is not suspended")
    s.works(other, "reader", 0)
    dm.load(s.lines["reader"])
    s.works(dm, "reader", 0)
    with fails_with(errno.EBUSY):
        dm.load(s.lines["writer"])
    bench.drop(other)
    dm.resume()
    s.works(dm, "writer", 9)
    s.finish()


@test("a table that was replaced, also by force, holds no claim")
def wiped(bench):
    s = Setup(bench)
    a, b = s.live("a", "writer"), s.loaded("b", "writer")
    s.refused(b)
    a.load(f"0 {SIZE // 512} zero")
    b.resume()
    s.works(b, "writer", 3)
    disk = Io(b.path)
    try:
        # In use, so that only its table goes
        run("dmsetup", "remove", "--force", b.name, ok=False)
        c = s.live("c", "writer")
        s.works(c, "writer", 4)
    finally:
        disk.close()
    bench.drop(c)
    s.finish()


@test("a resume that fails for another reason leaves no claim behind")
def failed(bench):
    s = Setup(bench)
    a, b, c = s.loaded("a", "writer"), s.loaded("b", "writer"), s.loaded("c", "reader")
    magic = s.image.read(0, 4)
    s.image.patch(0, b"none")
    for dm in (a, c):
        with fails_with(errno.EINVAL):
            dm.resume()
    s.image.patch(0, magic)
    b.resume()
    s.works(b, "writer", 3)
    s.refused(a)
    s.refused(c)
    b.suspend()
    c.resume()
    s.works(c, "reader", 0)
    s.finish()


@test("images on different metadata devices have nothing to do with each other")
def others(bench):
    s = Setup(bench)
    a = s.live("a", "writer")
    image = bench.image(SIZE, name="other")
    image.attach()
    b = bench.add(Dm("b", image.line(image.meta_loop.path, image.data_loop.path)))
    s.works(a, "writer", 3)
    disk = bench.io(b)
    disk.write(0, b"o" * 4096)
    disk.fsync()
    bench.drop(disk)
    # One that is data for the one and metadata for nobody
    c = bench.add(Dm("c", image.line(bench.add(Loop(image.path)).path, image.data_loop.path, "read_only")))
    expect(state_of(c) == "live", "not resumed")
    s.works(a, "writer", 4)
    s.finish()
    image.check()


@test("many resumes at the same time: one writer, or all of the readers", all_cpus=True)
def at_once(bench):
    s = Setup(bench)
    writers = [s.loaded(f"w{n}", "writer") for n in range(4)]
    readers_ = [s.loaded(f"r{n}", "reader") for n in range(4)]
    won = []

    def resume(dm):
        try:
            dm.resume()
            won.append(dm)
        except OSError as e:
            expect(e.errno == errno.EBUSY, f"{errno.errorcode[e.errno]} instead of EBUSY")
    for unit in range(12):
        won.clear()
        in_parallel(resume, *((dm,) for pair in zip(writers, readers_) for dm in pair))
        kinds = {"writer" if dm in writers else "reader" for dm in won}
        expect(len(kinds) == 1, f"{len(won)} were resumed: {[dm.name for dm in won]}")
        expect(kinds == {"reader"} or len(won) == 1, f"{len(won)} writers at the same time")
        for dm in won:
            s.works(dm, kinds.copy().pop(), 3 + unit)
        for dm in won:
            dm.suspend()
    s.finish()


@test("what a suspend could not write keeps the claim")
def unwritten(bench):
    s = Setup(bench)
    lower = Lower(bench, "meta", s.image.meta_loop.path)
    for kind, line in s.lines.items():
        s.lines[kind] = line.replace(f" {s.image.meta_loop.path} ", f" {lower.path} ")
    a, b, c = s.live("a", "writer"), s.loaded("b", "writer"), s.loaded("c", "reader")
    s.works(a, "writer", 3)
    # The table of all units can be neither read nor written; a flush is no matter.
    bad = s.image.l2_table(0), CLUSTER
    lower.bad(*bad)
    s.write(a, 4, b"U", flush=False)
    a.suspend()
    expect(a.status().unwritten, f"nothing is left to be written: {a.status()}")
    lower.good()
    for dm in (b, c):
        s.refused(dm)
    a.resume()
    s.works(a, "writer", 5)
    wait_for("all is written", 30, lambda: not a.status().unwritten)
    a.suspend()
    b.resume()
    s.works(b, "writer", 6)
    # What was never written goes with its table.
    lower.bad(*bad)
    s.write(b, 7, b"L", flush=False)
    s.model.write(7 * CLUSTER + 512, bytes(1024))
    b.suspend()
    lower.good()
    s.refused(c)
    bench.drop(b)
    c.resume()
    s.works(c, "reader", 0)
    bench.drop(c)
    s.finish()


if __name__ == "__main__":
    run("modprobe", "-q", "-a", "dm-zero", ok=False)
    main()
