#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""qcow2setup list and status: what is said of a device is true, in each state that it can be
in; and what is said that can be done about it helps.
"""
import contextlib
import errno
import json
import os
import re
import subprocess

import promtext
import qcow2test
from qcow2test import KIB, MIB, Ext4, Io, Loop, Lower, expect, fails_with, main, run, test, wait_for

TOOL = os.environ.get("QCOW2SETUP", os.path.join(qcow2test.HERE, "../../tools/qcow2setup"))
REMEDIES = os.path.join(os.path.dirname(TOOL), "tests/remedies.py")
CLUSTER = 64 * KIB
SIZE = 1024 * MIB       # two L2 tables


class Opened:
    """A device that qcow2setup has made, of files unless told otherwise"""

    def __init__(self, bench, image, *options, name="status", path=None, data=None):
        self.image = image
        self.name = f"qcow2test{os.getpid()}-{name}"
        self.path = f"/dev/mapper/{self.name}"
        self.line = (TOOL, "open", path or image.path, self.name, "--data-file", data or image.data)
        self.options = options
        self.open()
        bench.add(self)

    def open(self, options=None):
        run(*self.line, *(self.options if options is None else options))

    @contextlib.contextmanager
    def disk(self, readonly=False):
        with contextlib.closing(Io(self.path, readonly=readonly)) as disk:
            yield disk

    def close(self):
        if os.path.exists(self.path):
            run("dmsetup", "remove", "--retry", self.name)


def said(name):
    """status, for people"""
    return run(TOOL, "status", name)


def told(name, *options):
    """status, for programs"""
    return json.loads(run(TOOL, "status", name, "--json", *options))


def listed(name):
    """line of list, and its object"""
    lines = [line for line in run(TOOL, "list").splitlines() if line.split()[0] == name]
    objects = [d for d in json.loads(run(TOOL, "list", "--json")) if d["name"] == name]
    expect(len(lines) == 1 and len(objects) == 1, f"{name} in list: {lines}, {objects}")
    return lines[0], objects[0]


def state(name, health, mode, text, *others):
    """It is in a state, in all kinds of output; returns the object and the lines of advice."""
    words, got, (line, item) = said(name), told(name), listed(name)
    expect(got["health"] == health and got["mode"] == mode, f"{got['health']}, {got['mode']}")
    expect(item["health"] == health, f"list: {item}")
    expect(re.search(rf" {re.escape(health)}(,[a-z]+)* ", line), f"list: {line}")
    for pattern in (rf"mode: +{text}", *others):
        expect(re.search(pattern, words), f"{pattern}: not in {words}")
    # What it is, and what to do, come first.
    lines = words.splitlines()
    expect(lines[0].startswith(f"/dev/mapper/{name} is active") and lines[1].startswith("  mode:"), words)
    for n, advice in enumerate(got["advice"]):
        flat = re.sub(r"\s+", " ", words.replace("what to do:", ""))
        expect(re.sub(r"\s+", " ", advice) in flat, f"{advice}: not in {words}")
        expect("what to do:" in lines[2], f"{n}: {words}")
    expect(bool(got["advice"]) == ("what to do:" in words), words)
    expect(("all is well" in words) == (health == "rw" and not got["advice"]), words)
    return got, got["advice"]


def do(advice, *replace):
    """What is said, as a user would type it: the commands in one line of advice."""
    done = []
    for n in range(1, 5):
        made = subprocess.run(["python3", REMEDIES, "command", f"@{n}"], input=advice, text=True, check=False,
                              stdout=subprocess.PIPE)
        if made.returncode:
            break
        line = made.stdout.strip()
        for a, b in replace:
            line = line.replace(a, b)
        done.append(line)
    expect(done, f"no command in: {advice}")
    folder = os.path.dirname(os.path.realpath(TOOL))
    for line in done:
        status, out = run("bash", "-c", f"PATH={folder}:$PATH; {line}", ok=False)
        # check ends with 3 if clusters are leaked
        expect(status == 0 or (status == 3 and " check " in line), f"{line}: status {status}: {out}")
    return done


def mapped(name):
    """bytes of data and of zeros that map tells of"""
    extents = json.loads(run(TOOL, "map", name, "--json"))
    return (sum(e["length"] for e in extents if e["data"]),
            sum(e["length"] for e in extents if e["zero"] and e["present"]))


def agrees(name):
    """Allocated is what map says, which makes the kernel write it."""
    data, zeros = mapped(name)
    got = told(name)
    expect((got["allocated"], got["zeros"]) == (data, zeros), f"{got['allocated']}, {got['zeros']}: map: {data}, {zeros}")
    return got


@test("rw: what is allocated is what map says, and room for metadata goes with each L2 table")
def allocated(bench):
    image = bench.image(SIZE)
    dm = Opened(bench, image)
    got, _ = state(dm.name, "rw", "rw", "rw, all is well", r"allocated: +0 B, 0%", r"held by: +nobody")
    expect(got["allocated"] == 0 and got["zeros"] == 0, f"{got}")
    before = got["metadata"]
    expect(before["enough"] and before["needed"] == 2 * CLUSTER and before["free"] >= before["needed"], f"{before}")
    expect(not before["sparse"] and before["file-system-free"] > 0, f"{before}")
    with dm.disk() as disk:
        disk.write(0, b"a" * 3 * CLUSTER)
        disk.write(600 * MIB + 512, b"b" * 512)
        disk.zero_out(8 * CLUSTER, 2 * CLUSTER)
        disk.fsync()
    got = agrees(dm.name)
    expect(got["allocated"] == 4 * CLUSTER, f"{got['allocated']}")
    expect(got["metadata"]["needed"] == 0 and got["metadata"]["free"] <= before["free"] - 2 * CLUSTER, f"{got}")
    expect(re.search(r"allocated: +256 KiB, <0.1%", said(dm.name)), said(dm.name))
    expect("none is needed" in said(dm.name), said(dm.name))
    line, item = listed(dm.name)
    expect("256 KiB (<0.1%)" in line and item["allocated"] == 4 * CLUSTER, line)
    # Without a look at the image it is not known, and is not said to be 0.
    got = told(dm.name, "--quick")
    expect("allocated" not in got and got["metadata"]["needed"] == 0, f"{got}")
    expect("not known" in run(TOOL, "status", dm.name, "--quick"), "--quick tells what is allocated")


def kinds(bench, **options):
    image = bench.image(64 * MIB, **options)
    dm = Opened(bench, image)
    with dm.disk() as disk:
        for n in range(0, 40, 3):
            disk.write(n * 100 * KIB, b"x" * 24 * KIB)
        if not options.get("raw"):
            disk.discard(2 * MIB, MIB)
    agrees(dm.name)
    run("dmsetup", "suspend", dm.name)
    try:
        expect(told(dm.name)["allocated"] == mapped(dm.name)[0], "suspended: not what map says")
    finally:
        run("dmsetup", "resume", dm.name)


@test("allocated: clusters of 4K")
def small_clusters(bench):
    kinds(bench, cluster=4 * KIB)


@test("allocated: extended L2 entries")
def extended(bench):
    kinds(bench, extended=True)


@test("allocated: raw data")
def raw(bench):
    kinds(bench, raw=True)


@test("read-only: by --readonly, and how to write to it")
def read_only(bench):
    image = bench.image(64 * MIB)
    image.qemu_io("write -q -P 1 0 128k")
    image.trim()
    dm = Opened(bench, image, "--readonly")
    got, (advice,) = state(dm.name, "read-only", "ro", "ro, it was opened read-only")
    expect("free" not in got["metadata"] and got["allocated"] == 2 * CLUSTER, f"{got}")
    do(advice)
    dm.open(())
    state(dm.name, "rw", "rw", "rw, all is well")


def damaged(bench, image):
    """An image that is open, and whose refcounts were damaged then"""
    dm = Opened(bench, image)
    image.set_refcount(0, 0)
    with dm.disk() as disk, fails_with(errno.EIO):
        disk.write(0, b"x" * 512)
        disk.fsync()
    wait_for("corrupt", 10, lambda: told(dm.name)["health"] == "corrupt")
    # The worker that sets the mark in the header comes after that.
    wait_for("the mark", 10, lambda: told(dm.name)["marked-corrupt"])
    return dm


@test("corrupt metadata: not taken for --readonly; it is repaired as status says")
def corrupt(bench):
    dm = damaged(bench, bench.image(64 * MIB))
    got, (advice,) = state(dm.name, "corrupt", "ro", "ro, the metadata is corrupt")
    do(advice)
    expect(not os.path.exists(dm.path), "it is open still")
    dm.open()
    state(dm.name, "rw", "rw", "rw, all is well")
    with dm.disk() as disk:
        disk.write(0, b"n" * 512)
        disk.fsync()
    agrees(dm.name)


@test("corrupt metadata: what cannot be repaired is restored from a backup")
def not_repairable(bench):
    image = bench.image(64 * MIB)
    image.qemu_io("write -q -P 1 0 192k")
    image.trim()
    saved = image.read(0, image.file_size())
    # An entry with the place of another cluster: nobody knows which one is right.
    image.set_u64(image.l2_pos(CLUSTER), image.l2(CLUSTER) + MIB)
    dm = Opened(bench, image)
    with dm.disk() as disk, fails_with(errno.EIO):
        disk.read(CLUSTER, 512)
    wait_for("the mark", 10, lambda: told(dm.name)["marked-corrupt"])
    got, (advice,) = state(dm.name, "corrupt", "ro", "ro, the metadata is corrupt", "allocated: +not known .*offset")
    expect("allocated" not in got, f"{got}")
    expect(" ? " in listed(dm.name)[0], "list says what is allocated")
    run(TOOL, "close", dm.name)
    status, out = run(TOOL, "check", "--repair", "all", image.path, ok=False)
    expect(status == 2 and "restore from a backup what that cannot repair" in advice, f"{status}: {out}")
    image.patch(0, saved)
    dm.open()
    state(dm.name, "rw", "rw", "rw, all is well")
    expect(agrees(dm.name)["allocated"] == 3 * CLUSTER, "not what was saved")


@test("an image that is marked corrupt, opened with --readonly")
def marked(bench):
    image = bench.image(64 * MIB)
    dm = damaged(bench, image)
    run(TOOL, "close", dm.name)
    dm.open(("--readonly",))
    got, (advice,) = state(dm.name, "read-only", "ro", "ro, it was opened read-only", "marked corrupt")
    expect(got["marked-corrupt"], f"{got}")
    do(advice)
    dm.open(())
    state(dm.name, "rw", "rw", "rw, all is well")


@test("fail: what was written last is given up, and the image can be used")
def failed(bench):
    image = bench.image(64 * MIB)
    # open takes the space of a file, and a device as it is.
    image.extend()
    meta = Lower(bench, "meta", bench.add(Loop(image.path)).path)
    dm = Opened(bench, image, path=meta.path)
    with dm.disk() as disk:
        disk.write(0, b"k" * CLUSTER)
        disk.fsync()
        meta.no_flush()
        disk.write(8 * CLUSTER, b"l" * CLUSTER)
        with fails_with(errno.EIO):
            disk.fsync()
        wait_for("fail", 60, lambda: told(dm.name)["health"] == "fail")
    got, (advice, *_) = state(dm.name, "fail", "fail", "fail, a flush failed")
    meta.good()
    # What the kernel was asked for without libdevmapper has no name below /dev.
    do(advice, (f"/dev/mapper/{meta.dm.name}", meta.path))
    dm.open()
    state(dm.name, "rw", "rw", "rw, all is well")
    with dm.disk() as disk:
        expect(disk.read(0, CLUSTER) == b"k" * CLUSTER, "what was flushed is lost")


@test("suspended, and resumed as status says; status does not wait")
def suspended(bench):
    dm = Opened(bench, bench.image(64 * MIB))
    run("dmsetup", "suspend", dm.name)
    got, (advice,) = state(dm.name, "rw", "rw", "rw", "but suspended")
    expect(got["suspended"] and ",suspended" in listed(dm.name)[0], f"{got}")
    found = promtext.families(metrics(dm.name))
    expect(promtext.value(found, "dm_qcow2_suspended", device=dm.name) == 1, "metrics")
    do(advice)
    state(dm.name, "rw", "rw", "rw, all is well")
    expect("suspended" not in said(dm.name), said(dm.name))


@test("close --deferred while it is held: who holds it, and how it is kept")
def deferred(bench):
    dm = Opened(bench, bench.image(64 * MIB))
    with dm.disk(readonly=True):
        run(TOOL, "close", dm.name, "--deferred")
        got, (advice,) = state(dm.name, "rw", "rw", "rw", "and goes with its last user",
                               rf"held by: +process {os.getpid()} ")
        expect(got["deferred-remove"] and ",deferred" in listed(dm.name)[0], f"{got}")
        do(advice)
        got, _ = state(dm.name, "rw", "rw", "rw, all is well")
        expect(not got["deferred-remove"], f"{got}")
    # Where there is no udev, its node went when it was to be removed.
    run("dmsetup", "mknodes", dm.name)
    with dm.disk(readonly=True):
        run(TOOL, "close", dm.name, "--deferred")
    wait_for("its end", 30, lambda: run("dmsetup", "info", dm.name, ok=False)[0] != 0)


def small(bench, name):
    """A device for metadata that has room for all but a few of many L2 tables"""
    image = bench.image(4 * MIB, name=name, cluster=512)
    file = bench.file(name + ".meta", 40 * KIB)
    with open(file, "r+b") as f:
        f.write(image.read(0, image.file_size()))
    loop = bench.add(Loop(file))
    return image, file, loop


def fill(dm):
    with dm.disk() as disk, fails_with(errno.ENOSPC):
        for at in range(0, 4 * MIB, 32 * KIB):
            disk.write(at, b"f" * 512)


@test("metadata full: known before the first write fails, and enlarged as status says")
def full(bench):
    image, file, loop = small(bench, "full")
    dm = Opened(bench, image, path=loop.path)
    got, (advice,) = state(dm.name, "rw", "rw", "rw", "not enough for all of the disk")
    expect(not got["metadata"]["enough"] and got["metadata"]["size"] == 40 * KIB, f"{got}")
    fill(dm)
    got, (advice,) = state(dm.name, "rw", "rw", "rw", "used up, and writes were refused", "room for 0 more clusters",
                           "100% of it taken")
    expect(got["metadata"]["free"] == 0 and got["metadata"]["needed"] > 0, f"{got}")
    os.truncate(file, MIB)
    loop.resize()
    do(advice)
    got, _ = state(dm.name, "rw", "rw", "rw, all is well")
    expect(got["metadata"]["enough"] and got["metadata"]["size"] == MIB, f"{got}")
    with dm.disk() as disk:
        disk.write(0, b"g" * 4 * MIB)
        disk.fsync()
    expect(agrees(dm.name)["allocated"] == 4 * MIB, "not all is allocated")


@test("nospc: the file system of the image is full")
def nospc(bench):
    fs = bench.add(Ext4(bench, 64 * MIB))
    image = bench.image(64 * MIB)
    moved = os.path.join(fs.path, "i.qcow2")
    run("cp", image.path, moved)
    dm = Opened(bench, image, "--sparse", path=moved)
    got, _ = state(dm.name, "rw", "rw", "rw", "has holes")
    expect(got["metadata"]["sparse"], f"{got}")
    fs.fill()
    with dm.disk() as disk:
        with fails_with(errno.ENOSPC):
            disk.write(0, b"x" * 512)
            disk.fsync()
    got = told(dm.name)
    expect(got["metadata"]["file-system-free"] < MIB, f"{got}")
    fs.make_room()
    with dm.disk() as disk:
        disk.write(0, b"x" * 512)
        disk.fsync()
    wait_for("rw", 60, lambda: told(dm.name)["health"] == "rw")


@test("made with dmsetup: in the list, and its remedies are dmsetup's")
def foreign(bench):
    image = bench.image(64 * MIB)
    dm = image.open(name="foreign")
    got, _ = state(dm.name, "rw", "rw", "rw, all is well", "made by: +dmsetup")
    expect(got["made-by"] == "dmsetup", f"{got}")
    image.set_refcount(0, 0)
    disk = bench.io(dm)
    with fails_with(errno.EIO):
        disk.write(0, b"x" * 512)
        disk.fsync()
    bench.drop(disk)
    wait_for("the mark", 10, lambda: told(dm.name)["marked-corrupt"])
    _, (advice,) = state(dm.name, "corrupt", "ro", "ro, the metadata is corrupt")
    do(advice)
    bench.things.remove(dm)
    image.check(leaks=True)
    dm = image.open(readonly=True, name="foreign-ro")
    _, (advice,) = state(dm.name, "read-only", "ro", "ro, it was opened read-only")
    # How to open it is not told in full: see below.
    do(advice, ("qcow2setup open", "true"))
    bench.things.remove(dm)
    image.detach()
    again = Opened(bench, image)
    state(again.name, "rw", "rw", "rw, all is well")


@test("made with dmsetup: metadata full, and its table loaded again")
def foreign_full(bench):
    image, file, loop = small(bench, "foreign-full")
    data = bench.add(Loop(image.data))
    dm = bench.add(qcow2test.Dm("foreign-full", image.line(loop.path, data.path)))
    with contextlib.closing(Io(dm.path)) as disk, fails_with(errno.ENOSPC):
        for at in range(0, 4 * MIB, 32 * KIB):
            disk.write(at, b"f" * 512)
    _, (advice,) = state(dm.name, "rw", "rw", "rw", "used up, and writes were refused")
    os.truncate(file, MIB)
    loop.resize()
    do(advice)
    state(dm.name, "rw", "rw", "rw, all is well")
    with contextlib.closing(Io(dm.path)) as disk:
        disk.write(0, b"g" * 4 * MIB)
        disk.fsync()


@test("list: several devices, their users, bitmaps and backups; those below others, too")
def several(bench):
    image = bench.image(64 * MIB, name="a")
    for name in ("one", "two"):
        run("qemu-img", "bitmap", "--add", image.path, name)
    run("qemu-img", "bitmap", "--add", "--disable", image.path, "still")
    a = Opened(bench, image, name="a")
    b = Opened(bench, bench.image(64 * MIB, name="b"), name="b")
    top = bench.add(qcow2test.Dm("top", f"0 {64 * MIB // 512} linear {b.path} 0"))
    mount = bench.path("mount")
    os.mkdir(mount)
    run("mkfs.ext4", "-q", a.path)
    run("mount", a.path, mount)
    try:
        line, item = listed(a.name)
        expect(" 2/3 " in line and line.endswith(mount), line)
        expect(item["bitmap-count"] == 3 and item["bitmaps-recording"] == 2, f"{item}")
        expect([u["on"] for u in item["users"] if u["kind"] == "mount"] == [mount], f"{item}")
        expect(re.search(rf"held by: +mounted on {mount}", said(a.name)), said(a.name))
        line, item = listed(b.name)
        expect(line.endswith(top.name) and [u["name"] for u in item["users"]] == [top.name], line)
        run(TOOL, "backup", "begin", a.name, "--cow", bench.dir)
        line, item = listed(a.name)
        expect(" valid " in line and item["backup"]["valid"], line)
        expect(re.search("backup: +under way", said(a.name)), said(a.name))
        run(TOOL, "backup", "end", a.name)
        expect("backup" not in listed(a.name)[1], "a backup that has ended")
    finally:
        run("umount", mount)
    names = [line.split()[0] for line in run(TOOL, "list").splitlines()]
    expect(names[0] == "NAME" and names[1:] == sorted(names[1:]) and {a.name, b.name} <= set(names), f"{names}")
    bench.drop(top)


def metrics(*names):
    done = subprocess.run([TOOL, "status", "--prometheus", *names], stdout=subprocess.PIPE, check=False)
    expect(done.returncode == 0, f"status {done.returncode}")
    return done.stdout


@test("--prometheus: a strict reader takes it, counters grow only, and it is what status says")
def prometheus(bench):
    found = promtext.families(metrics())
    expect(promtext.value(found, "dm_qcow2_devices") == 0 and len(found) == 1, f"{found}")
    a = Opened(bench, bench.image(64 * MIB, name="a"), name="a")
    b = Opened(bench, bench.image(64 * MIB, name="b"), "--readonly", name="b")
    before = promtext.families(metrics())
    expect(promtext.value(before, "dm_qcow2_devices") == 2, f"{before}")
    for dm, mode in ((a, "rw"), (b, "read-only")):
        modes = {dict(k)["mode"]: v for k, v in before["dm_qcow2_mode"][1].items() if dict(k)["device"] == dm.name}
        expect([m for m, v in modes.items() if v] == [mode] and len(modes) == 6, f"{modes}")
    with a.disk() as disk:
        for n in range(20):
            disk.write(n * MIB, b"p" * 4 * KIB)
            disk.read(n * MIB, 4 * KIB)
        disk.fsync()
    after = promtext.families(metrics())
    expect(before.keys() == after.keys(), "metrics come and go")
    for name, (kind, samples) in after.items():
        for key, value in samples.items():
            expect(kind != "counter" or value >= before[name][1][key], f"{name} {key} goes back")
    one = {"device": a.name}
    expect(promtext.value(after, "dm_qcow2_first_writes_total", **one) ==
           promtext.value(before, "dm_qcow2_first_writes_total", **one) + 20, f"{after}")
    expect(promtext.value(after, "dm_qcow2_commits_total", **one) >
           promtext.value(before, "dm_qcow2_commits_total", **one), "no commit is counted")
    got = agrees(a.name)
    for name, value in (("virtual_size_bytes", 64 * MIB), ("allocated_bytes", got["allocated"]),
                        ("metadata_size_bytes", got["metadata"]["size"]),
                        ("metadata_free_bytes", got["metadata"]["free"])):
        expect(promtext.value(after, f"dm_qcow2_{name}", **one) == value, f"{name}: {after[f'dm_qcow2_{name}']}, {value}")
    # Of one only: the same, but for what is of all
    alone = promtext.families(metrics(a.name))
    expect("dm_qcow2_devices" not in alone, f"{alone}")
    expect(all(dict(k)["device"] == a.name for _, s in alone.values() for k in s), f"{alone}")


@test("--interval: what happened in that time, and no more")
def interval(bench):
    dm = Opened(bench, bench.image(64 * MIB))
    with dm.disk() as disk:
        disk.write(0, b"i" * 4 * KIB)
        disk.fsync()
        got = told(dm.name, "--interval", "1")["interval"]
        expect(got["milliseconds"] >= 1000 and got["first-writes"] == 0 and got["hits"] == 0, f"{got}")
        expect(re.search(r"last [0-9.e+]+ s: +hits 0/s, misses 0/s, first writes 0/s", run(TOOL, "status", dm.name,
                                                                                          "--interval", "1")), "text")
        # Until it has seen one: it can begin to look late.
        child = subprocess.Popen([TOOL, "status", dm.name, "--json", "--interval", "3"], stdout=subprocess.PIPE)
        try:
            n = 0
            while child.poll() is None:
                n += 1
                disk.write(n % 512 * CLUSTER, b"i" * 4 * KIB)
        finally:
            out = child.communicate()[0]
        got = json.loads(out)["interval"]
        expect(got["hits"] + got["first-writes"] > 0, f"{got}, of {n}")
    expect(run(TOOL, "status", dm.name).count("last ") == 0, "a rate without an interval")


@test("counters are for -v only, and in JSON always")
def counters(bench):
    dm = Opened(bench, bench.image(64 * MIB))
    expect("slices cached" not in said(dm.name), said(dm.name))
    expect(re.search("slices cached: +[0-9]", run(TOOL, "-v", "status", dm.name)), "-v")
    expect("slices-cached" in told(dm.name)["statistics"], "JSON")


if __name__ == "__main__":
    main()
