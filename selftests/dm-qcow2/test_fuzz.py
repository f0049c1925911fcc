#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Hostile images: valid ones with metadata bytes changed at random, mapped and used.

Each image is mapped by its table line, or by qcow2setup, and if that is not
refused, read, written, discarded, flushed, suspended and resumed. Whatever the
metadata says: no request hangs or fails in a way that is not documented (the
kernel log is the runner's to judge); what is read is zeros or what data or backing
device hold at that place; what was written is read back; nothing behind the end
of the disk changes on the data device; and of the metadata only what the tables
of the image say to be theirs, or to be free. A read-only device changes nothing.

SEED=N repeats a run, FUZZ_IMAGES=N is the number of images of each kind, for long
runs. A fault names the image: FUZZ_ONLY=N with the same SEED runs that one only.
"""
import errno
import os
import random
import shutil
import struct
import subprocess
import time

from qcow2image import OFFSET_MASK, RAW
from qcow2test import HERE, KIB, MIB, Dm, Failure, dm_ioctl, expect, main, note, some, sysfs, test
from qcow2test import DM_DEV_REMOVE

SEED = int(os.environ.get("SEED", time.time_ns() // 1000 % 1000000))
IMAGES = int(os.environ.get("FUZZ_IMAGES", 14))
ONLY = os.environ.get("FUZZ_ONLY")
GUARD = 64 * KIB
TOOL = os.environ.get("QCOW2SETUP", os.path.join(HERE, "../../tools/qcow2setup"))

# What a request may fail with: corrupt metadata, no room for it, read-only.
ERRNOS = (errno.EIO, errno.ENOSPC, errno.EROFS, errno.EREMOTEIO, errno.EOPNOTSUPP)
# A write that was answered with an error may have been done, or not.
UNKNOWN = None

NUMBERS = (0, 1, 2, 7, 0x1FF, 0x200, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 55, 1 << 56, 1 << 62, 1 << 63,
           (1 << 63) - 1, (1 << 64) - 1, (1 << 64) - 512)

# Numbers in the header: offset and bytes
FIELDS = ((4, 4), (8, 8), (16, 4), (20, 4), (24, 8), (32, 4), (36, 4), (40, 8), (48, 8), (56, 4), (60, 4),
          (64, 8), (72, 8), (80, 8), (88, 8), (96, 4), (100, 4))


class Target:
    """A valid image, to be damaged again and again."""

    def __init__(self, bench, size, **options):
        backing = options.get("backing")
        if backing:
            options["backing"] = bench.file("backing", backing)
            with open(options["backing"], "r+b") as f:
                f.write(random.Random(SEED).randbytes(backing))
        self.bench = bench
        image = self.image = bench.image(size, **options)
        self.size, self.unit, self.cluster = image.size, image.unit, image.cluster
        cluster = self.cluster
        rng = random.Random(SEED)
        # In some tables some units of each state; the last table, if there are several,
        # is not there yet.
        commands = []
        end = min(self.size - cluster, max((self.size - 1) // image.cover * image.cover, image.cover))
        for at in range(0, end, max(image.cover, self.size // 8)):
            commands += [f"write -q -P 1 {at} {min(3 * cluster, self.size - at)}",
                         f"write -q -z {at + 3 * cluster} {cluster}"] if at + 5 * cluster < self.size else []
        if commands and not options.get("options"):
            image.qemu_io(*commands)
        image.trim()
        image.extend()
        # Clusters that are counted, though nothing uses them: nobody may write there. So
        # there have to be others.
        os.truncate(image.path, image.file_size() + 4 * cluster)
        end = image.file_size() // cluster
        for count, number in enumerate(self.free_clusters(end)[:2], 1):
            image.set_refcount(number, min(count, (1 << options.get("refcount_bits", 16)) - 1))
            image.patch(number * cluster, rng.randbytes(cluster))
        self.meta = image.read(0, image.file_size())
        self.data = rng.randbytes(self.size) + b"\xa5" * GUARD
        self.below = b""
        if backing:
            with open(image.backing, "rb") as f:
                self.below = f.read()
        self.below = self.below.ljust(self.size, b"\0")[:self.size]
        with open(image.data, "wb") as f:
            f.write(self.data)
        self.areas = self.find_areas()
        image.attach(extend=False)

    def free_clusters(self, end):
        free = []
        for number in range(end):
            try:
                if not self.image.refcount(number):
                    free.append(number)
            except ValueError:
                break
        return free

    def find_areas(self):
        """Where there is something to damage: (offset, length), by its kind."""
        image, cluster = self.image, self.image.cluster
        blocks = [image.u64(image.reftable_pos(i)) for i in range(min(image.reftable_entries(), 64))]
        areas = {
            "header": [(0, 112)],
            "extensions": [(104, min(cluster, 512) - 104)],
            "L1": [(image.l1_pos(0), 8 * image.get("l1_size"))],
            "L2": [(e & OFFSET_MASK, min(cluster, 512)) for e in image.l1_entries() if e & OFFSET_MASK],
            "refcount table": [(image.reftable_pos(0), 32)],
            "refcount block": [(b, min(cluster, 128)) for b in blocks if b],
        }
        return {kind: places for kind, places in areas.items() if places}

    def damage(self, rng):
        """Metadata with something wrong in it, and what that is."""
        meta = bytearray(self.meta)
        done = []
        for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
            kind = rng.choice(list(self.areas))
            offset, length = rng.choice(self.areas[kind])
            at = offset + rng.randrange(length)
            how = rng.randrange(5)
            if kind == "header" and rng.randrange(2):
                # a number that is nearly right
                at, size = rng.choice(FIELDS)
                old = int.from_bytes(meta[at:at + size], "big")
                new = rng.choice((old + 1, old - 1, old * 2, old // 2, old + self.cluster, old - self.cluster, 0))
                new = (new & (1 << 8 * size) - 1).to_bytes(size, "big")
            elif how == 0:
                new = bytes([meta[at] ^ 1 << rng.randrange(8)])
            elif how == 1:
                new = rng.randbytes(rng.choice((1, 1, 2, 8, 32)))
            elif how == 2:
                at -= at % 8
                new = struct.pack(">Q", rng.choice(NUMBERS))
            elif how == 3:
                # the place of something else in the image, or of nothing
                at -= at % 8
                place = rng.randrange(len(meta) // self.cluster + 2) * self.cluster
                new = struct.pack(">Q", place | rng.choice((0, 1 << 63, 1 << 63, 1, 512)))
            else:
                # another entry of the same kind
                at -= at % 8
                other, size = rng.choice(self.areas[kind])
                other += rng.randrange(size) & ~7
                new = bytes(meta[other:other + 8])
            new = new[:len(meta) - at]
            meta[at:at + len(new)] = new
            done.append(f"{kind} {at:#x}={new.hex()}")
        return bytes(meta), ", ".join(done)

    def restore(self, meta):
        with open(self.image.path, "r+b") as f:
            f.write(meta)
            f.truncate(len(meta))
        with open(self.image.data, "r+b") as f:
            f.write(self.data)

    def read_files(self):
        with open(self.image.path, "rb") as f, open(self.image.data, "rb") as g:
            return f.read(), g.read()


def field(meta, offset, form):
    return struct.unpack_from(form, meta, offset)[0]


def table_line(meta, read_only, meta_dev, data_dev, backing_dev):
    """The line for what the header says, however wrong; None if dm could not take it."""
    size = field(meta, 24, ">Q") // 512
    if not 0 < size < 1 << 63:
        return None
    words = [meta_dev, data_dev, field(meta, 20, ">I"), field(meta, 40, ">Q"), field(meta, 36, ">I"),
             field(meta, 48, ">Q"), field(meta, 56, ">I"), field(meta, 96, ">I")]
    features = ["read_only"] * read_only
    if field(meta, 88, ">Q") & RAW:
        features.append("data_file_raw")
    if field(meta, 72, ">Q") & 16:
        features.append("extended_l2")
    if backing_dev:
        features += ["backing_dev", backing_dev]
    words += [len(features), *features]
    return f"0 {size} qcow2 " + " ".join(map(str, words))


def writable(meta):
    """Ranges of the metadata that may change once this image has been mapped: the
    tables that it names, and whatever it does not count."""
    bits, order = field(meta, 20, ">I"), field(meta, 96, ">I")
    cluster = 1 << bits
    l1, entries = field(meta, 40, ">Q"), field(meta, 36, ">I")
    reft, clusters = field(meta, 48, ">Q"), field(meta, 56, ">I")
    allowed = [(l1, l1 + 8 * entries), (reft, reft + (clusters << bits))]
    end = len(meta)

    def table(offset, count):
        return struct.unpack_from(f">{count}Q", meta, offset) if offset + 8 * count <= end else ()

    tables = [e & OFFSET_MASK for e in table(l1, entries)]
    blocks = [e & ~511 for e in table(reft, clusters * cluster // 8)]
    allowed += [(at, at + cluster) for at in tables + blocks if at and not at % cluster]
    width = 1 << order
    per = cluster * 8 >> order
    for number in range(-(-end // cluster)):
        index = number // per
        block = blocks[index] if index < len(blocks) else 0
        count = 0
        if block and not block % cluster and block + cluster <= end:
            bit = number % per * width
            value = int.from_bytes(meta[block + bit // 8:block + bit // 8 + max(width // 8, 1)], "big")
            count = value >> bit % 8 & ((1 << width) - 1)
        if not count:
            allowed.append((number * cluster, (number + 1) * cluster))
    return allowed


def differences(a, b, step=512):
    """Offsets of the bytes that differ."""
    for at in range(0, len(a), step):
        if a[at:at + step] != b[at:at + step]:
            yield from (at + i for i, (x, y) in enumerate(zip(a[at:at + step], b[at:at + step])) if x != y)


class Use:
    """Requests to a device, and what they must answer."""

    def __init__(self, target, io, rng, size):
        self.target, self.io, self.rng = target, io, rng
        self.size = min(size, target.size)
        self.unit = target.unit
        # Sector: what was written there, or UNKNOWN
        self.written = {}
        self.done = self.failed = 0

    def attempt(self, function, *args):
        self.done += 1
        try:
            return True, function(*args)
        except OSError as e:
            expect(e.errno in ERRNOS, f"{function.__name__}{args[:1]}: {errno.errorcode.get(e.errno, e.errno)}")
            self.failed += 1
            return False, None

    def check(self, at, data):
        for i in range(0, len(data), 4096):
            self.check_piece(at + i, data[i:i + 4096])

    def check_piece(self, at, data):
        target = self.target
        sectors = range(at // 512, (at + len(data)) // 512)
        # Most are as they were: a look at each sector takes its time.
        if self.written.keys().isdisjoint(sectors) and data in (
                target.data[at:at + len(data)], target.below[at:at + len(data)], bytes(len(data))):
            return
        for i in range(0, len(data), 512):
            sector, got = (at + i) // 512, data[i:i + 512]
            if sector in self.written:
                want = self.written[sector]
                expect(want is UNKNOWN or got == want, f"what was written at {at + i:#x} is not read back")
            elif got.strip(b"\0"):
                expect(got in (target.data[at + i:at + i + 512], target.below[at + i:at + i + 512]),
                       f"{at + i:#x} reads {got[:8].hex()}, which is of another place")

    def read(self, at, length):
        good, data = self.attempt(self.io.read, at, length)
        if good:
            self.check(at, data)
        return good

    def read_all(self):
        piece = max(self.unit, 64 * KIB)
        for at in range(0, self.size, piece):
            length = min(piece, self.size - at)
            # Where a part fails, others must not read wrong; not each of thousands.
            if not self.read(at, length):
                for _ in range(4):
                    unit = at + self.rng.randrange(-(-length // self.unit)) * self.unit
                    self.read(unit, min(self.unit, self.size - unit))

    def place(self):
        at = self.rng.randrange(self.size // 512) * 512
        length = self.rng.choice((512, 1536, self.unit, 2 * self.unit, 5 * self.unit))
        if self.rng.randrange(2):
            at -= at % self.unit
        return at, max(min(length // 512 * 512, self.size - at, MIB), 512)

    def change(self):
        at, length = self.place()
        how = self.rng.choice(("write", "write", "write", "discard", "zero_range", "punch_hole"))
        if how == "write":
            data = self.rng.randbytes(length)
            good, _ = self.attempt(self.io.write, at, data)
        else:
            data = bytes(length)
            good, _ = self.attempt(getattr(self.io, how), at, length)
            if how == "discard":
                # may be ignored
                good = False
        for i in range(0, length, 512):
            self.written[(at + i) // 512] = data[i:i + 512] if good else UNKNOWN

    def everything(self, dm):
        self.read_all()
        for _ in range(12):
            self.change()
            if not self.rng.randrange(4):
                self.attempt(self.io.fsync)
            self.read(*self.place())
        if dm:
            dm.suspend()
            dm.resume()
        else:
            self.attempt(self.io.fsync)
        # What a commit did not make durable is gone with a resume, if it failed.
        if self.failed:
            self.written = {sector: UNKNOWN for sector in self.written}
        for _ in range(4):
            self.read(*self.place())
            self.change()
        self.read_all()
        self.attempt(self.io.fsync)


class Counts:
    def __init__(self):
        self.refused = self.opened = self.requests = self.failed = 0

    def add(self, use):
        self.opened += 1
        self.requests += use.done
        self.failed += use.failed


def by_line(target, meta, rng, counts):
    image, bench = target.image, target.bench
    read_only = rng.randrange(5) == 0
    backing = image.backing_loop.path if image.backing_loop else None
    line = table_line(meta, read_only, image.meta_loop.path, image.data_loop.path, backing)
    if not line:
        counts.refused += 1
        return
    before = target.data
    try:
        dm = bench.add(Dm("f", line, readonly=read_only))
    except Failure:
        counts.refused += 1
        expect(target.read_files() == (meta, before), "a refused image was changed")
        return
    io = bench.io(dm, readonly=read_only)
    use = Use(target, io, rng, field(meta, 24, ">Q") & ~511)
    if read_only:
        use.read_all()
        dm.cycle()
        use.read_all()
    else:
        use.everything(dm)
    mode = dm.mode()
    expect(mode in ("rw", "ro") and not (read_only and mode != "ro"), f"mode {mode}")
    bench.drop(io)
    bench.drop(dm)
    counts.add(use)
    after, data = target.read_files()
    if read_only:
        expect(after == meta and data == before, "a read-only device was changed")
        return
    end = field(meta, 24, ">Q") & ~511
    expect(data[end:] == before[end:], "the data device was written behind the end of the target")
    allowed = writable(meta)
    for at in differences(meta, after):
        # the corrupt bit
        if at == 79 and after[at] == meta[at] | 2:
            continue
        expect(any(a <= at < b for a, b in allowed) and at >= 1 << field(meta, 20, ">I"),
               f"metadata at {at:#x} was changed from {meta[at]:#x} to {after[at]:#x}")


def by_tool(target, rng, counts):
    """With loop devices of its own, on copies."""
    image, bench = target.image, target.bench
    path, data = bench.path("tool.qcow2"), bench.path("tool.data")
    shutil.copyfile(image.path, path)
    with open(data, "wb") as f:
        f.write(target.data)
    name = f"qcow2test{os.getpid()}-tool"
    argv = [TOOL, "open", path, name, "--data-file", data]
    if image.backing:
        argv += ["--backing-file", image.backing]
    read_only = rng.randrange(4) == 0
    if read_only:
        argv.append("--readonly")
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=600, check=False)
    err = done.stderr
    expect(done.returncode in (0, 1, 4), f"qcow2setup open: exit code {done.returncode}: {err!r}")
    expect(all(32 <= c < 127 or c == 10 for c in err), f"qcow2setup open: not plain: {err!r}")
    expect(all(e.startswith(b"qcow2setup: ") for e in err.splitlines()), f"qcow2setup open: {err!r}")
    if done.returncode:
        expect(err, "qcow2setup open: no message")
        counts.refused += 1
        return
    number = os.stat(f"/dev/mapper/{name}").st_rdev
    node = f"/dev/dm-{os.minor(number)}"
    with open(sysfs(node) + "/size", encoding="ascii") as f:
        size = 512 * int(f.read())
    try:
        io = bench.io(node, readonly=read_only)
        use = Use(target, io, rng, size)
        if read_only:
            use.read_all()
        else:
            use.everything(None)
        bench.drop(io)
        counts.add(use)
        done = subprocess.run([TOOL, "close", name], stdin=subprocess.DEVNULL, capture_output=True, timeout=600,
                              check=False)
        expect(done.returncode == 0, f"qcow2setup close: exit code {done.returncode}: {done.stderr!r}")
    except Failure:
        dm_ioctl(DM_DEV_REMOVE, name)
        raise
    with open(data, "rb") as f:
        after = f.read()
    # Damage may have made it longer.
    expect(after[size:] == target.data[size:], "the data were written behind the end of the disk")
    if read_only:
        expect(after == target.data, "a read-only device was changed")


def fuzz(bench, size, options, images=IMAGES):
    """Use many images of one kind, each with other damage."""
    target = Target(bench, size, **options)
    counts = Counts()
    for n in range(images):
        if ONLY and n != int(ONLY):
            continue
        rng = random.Random(f"{SEED} {n} {size} {sorted(options.items())}")
        meta, what = target.damage(rng)
        target.restore(meta)
        try:
            if n % 7 == 6 and os.access(TOOL, os.X_OK):
                by_tool(target, rng, counts)
            else:
                by_line(target, meta, rng, counts)
        except Failure as e:
            raise Failure(f"SEED={SEED} FUZZ_ONLY={n}: {what}: {e}") from e
    note(f"SEED={SEED}: {counts.opened} images mapped, {counts.refused} refused,",
         f"{counts.requests} requests, of which {counts.failed} failed")
    # The fixture itself must be sound: undamaged, it can be used.
    target.restore(target.meta)
    sound = Counts()
    by_line(target, target.meta, random.Random(1), sound)
    expect(ONLY or (sound.opened and not sound.failed), "the undamaged image cannot be used")


# Name, size, options of the image
KINDS = (
    ("standard clusters of 4 KiB", 2 * MIB + 512 * KIB, {"cluster": 4 * KIB}),
    ("clusters of 512 bytes, refcounts of 64 bits", 160 * KIB, {"cluster": 512, "refcount_bits": 64}),
    ("clusters of 512 bytes, refcounts of 1 bit, odd size", 150 * KIB + 512, {"cluster": 512, "refcount_bits": 1}),
    ("clusters of 64 KiB, odd size", 2 * MIB - 1536, {}),
    ("extended L2 entries", 2 * MIB, {"cluster": 16 * KIB, "extended": True}),
    ("raw", MIB, {"cluster": 4 * KIB, "raw": True}),
    ("backing file", MIB, {"cluster": 4 * KIB, "backing": MIB // 2 + 512}),
    ("backing file, extended L2 entries", 2 * MIB,
     {"cluster": 16 * KIB, "extended": True, "backing": MIB}),
    ("preallocated", MIB, {"cluster": 4 * KIB, "options": ",preallocation=metadata"})
)


if __name__ == "__main__":
    for NAME, *WHAT in some(KINDS, 5):
        test(f"damaged images: {NAME}", *WHAT)(fuzz)
    main()
