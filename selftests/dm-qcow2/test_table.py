#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""The table line: what the constructor refuses, and what it accepts.

Each bad line must be refused with a message that names its cause, no two causes
may share a message, and nothing may be written. All cases run against one
image, which is put right again after each.
"""
import errno
import os
import re

from qcow2image import COMPRESSION, CORRUPT, DATA_FILE, DIRTY, EXT_L2, RAW
from qcow2test import (DM_TABLE_CLEAR, DM_TABLE_LOAD, KIB, MIB, Dm, KernelLog, Loop, dm_ioctl,
                       expect, fails_with, main, note, run, test)

SIZE = 40 * MIB + 512
META, DATA, CLUSTER_BITS, L1_OFFSET, L1_ENTRIES, RT_OFFSET, RT_CLUSTERS, ORDER = range(8)
MESSAGE = re.compile(r"table: \S+ qcow2: (.*) \(-?\w+\)$")


class Fixture:
    """An image, a device without a table, and what the kernel said so far."""

    def __init__(self, bench, **options):
        self.bench = bench
        self.image = bench.image(SIZE, cluster=4 * KIB, **options)
        self.image.poison((0, 64 * KIB))
        os.truncate(self.image.data, SIZE + MIB)
        self.image.extend()
        os.truncate(self.image.path, 128 * 4 * KIB)
        self.image.attach(extend=False)
        self.meta, self.data = self.image.meta_loop.path, self.image.data_loop.path
        self.words = self.image.args(self.meta, self.data)
        self.header = self.image.read(0, 4096)
        self.log = bench.add(KernelLog())
        self.dm = bench.add(Dm("table"))
        self.causes = {}
        self.faults = []
        self.before = self.digest()
        # The line as it is must be good, or no refusal would prove anything.
        self.accepted("the unchanged line")

    def digest(self):
        with open(self.image.data, "rb") as f:
            return self.image.hash(), f.read(64 * KIB)

    def line(self, words=None, start=0, length=SIZE // 512):
        line = f"{start} {length} qcow2 {' '.join(map(str, words or self.words))}"
        return f"0 {start} zero\n{line}" if start else line

    def args(self, *changes):
        """The good line's words with some replaced: position, value, ..."""
        words = list(self.words)
        for position, value in zip(changes[::2], changes[1::2]):
            words[position] = str(value)
        return words

    def load(self, line):
        try:
            dm_ioctl(DM_TABLE_LOAD, self.dm.name, line)
            dm_ioctl(DM_TABLE_CLEAR, self.dm.name)
            fault = None
        except OSError as e:
            fault = e
        messages = [MESSAGE.search(text) for text in self.log.lines("qcow2: ")]
        return fault, [m.group(1) for m in messages if m]

    def refused(self, cause, pattern, line):
        """pattern: what the message must speak of. Cases of one cause may share
        a message."""
        fault, messages = self.load(line)
        if not fault:
            self.fault(f"{cause}: accepted: {line}")
        elif len(messages) != 1:
            self.fault(f"{cause}: {len(messages)} messages in the kernel log, not 1: {messages}")
        elif not re.search(pattern, messages[0], re.I):
            self.fault(f"{cause}: the message does not say so: {messages[0]}")
        elif self.causes.setdefault(messages[0], cause) != cause:
            self.fault(f"{cause}: same message as for {self.causes[messages[0]]}: {messages[0]}")

    def accepted(self, what, line=None):
        fault, messages = self.load(line or self.line())
        if fault:
            self.fault(f"{what}: refused: {messages or fault}")

    def header_field(self, cause, pattern, *changes, features=(), good=False):
        """Load while header fields are changed: name, value, ..."""
        for name, value in zip(changes[::2], changes[1::2]):
            self.image.set(name, value)
        line = self.line(self.words + ([str(len(features)), *features] if features else []))
        before = self.image.hash()
        if good:
            self.accepted(cause, line)
        else:
            self.refused(cause, pattern, line)
        if self.image.hash() != before:
            self.fault(f"{cause}: the image was changed")
        self.image.patch(0, self.header)

    def fault(self, text):
        note(text)
        self.faults.append(text)

    def done(self):
        if self.digest() != self.before:
            self.fault("the image or its data was changed")
        self.accepted("the unchanged line, at the end")
        expect(not self.faults, f"{len(self.faults)} faults, see above")


@test("wrong number of arguments")
def argument_count(bench):
    f = Fixture(bench)
    w = f.words
    f.refused("few", "argument", f.line(["x"])[:-2])
    for n in range(1, len(w)):
        f.refused("few", "argument", f.line(w[:n]))
    f.refused("feature count", "feature", f.line(w + ["1"]))
    f.refused("feature count", "feature", f.line(w + ["2", "read_only"]))
    f.refused("arguments left over", "argument|feature|extra", f.line(w + ["0", "read_only"]))
    f.refused("arguments left over", "argument|feature|extra",
              f.line(w + ["1", "read_only", "data_file_raw"]))
    for bad in ("read_only", "-1", "1000", "1x"):
        f.refused("feature count", "feature", f.line(w + [bad]))
    f.accepted("zero features", f.line(w + ["0"]))
    f.done()


@test("arguments that are no numbers")
def numbers(bench):
    f = Fixture(bench)
    for position, name in ((CLUSTER_BITS, "cluster_bits|cluster bits"), (L1_OFFSET, "l1.*offset"),
                           (L1_ENTRIES, "l1.*entr"), (RT_OFFSET, "refcount.table.*offset"),
                           (RT_CLUSTERS, "refcount.table.*clusters"), (ORDER, "refcount.*order")):
        good = f.words[position]
        for bad in ("x", "-1", good + "x", "x" + good, "99999999999999999999999"):
            f.refused(f"no number for {name}", name, f.line(f.args(position, bad)))
    # What has 32 bits must not be cut to them.
    for position in (CLUSTER_BITS, L1_ENTRIES, RT_CLUSTERS, ORDER):
        bad = int(f.words[position]) + (1 << 32)
        fault, _ = f.load(f.line(f.args(position, bad)))
        if not fault:
            f.fault(f"argument {position}: {bad} was cut to 32 bits")
    f.done()


@test("start and length")
def start_length(bench):
    f = Fixture(bench)
    f.refused("start", "start|offset|begin", f.line(start=8))
    for length in (SIZE // 512 - 1, SIZE // 512 + 1, SIZE // 512 - 8, 1):
        f.refused("length", "length|size", f.line(length=length))
    f.done()


@test("offsets and counts that cannot be")
def geometry(bench):
    f = Fixture(bench)
    cluster, l1, rt = (int(f.words[i]) for i in (CLUSTER_BITS, L1_OFFSET, RT_OFFSET))
    cluster = 1 << cluster
    meta = os.stat(f.image.path).st_size
    needed = f.image.tables

    for bad in (0, 8, 22, 63, 64):
        f.refused("cluster_bits range", "cluster", f.line(f.args(CLUSTER_BITS, bad)))
    for bad in (l1 + 512, l1 + 1, l1 - 8):
        f.refused("L1 alignment", "L1", f.line(f.args(L1_OFFSET, bad)))
    f.refused("L1 at the header", "L1.*header", f.line(f.args(L1_OFFSET, 0)))
    for bad in (meta, meta + cluster, 1 << 56, (1 << 64) - cluster, (1 << 63)):
        f.refused("L1 beyond the end", "L1.*(beyond|end)", f.line(f.args(L1_OFFSET, bad)))
    f.refused("L1 over the refcount table", "L1.*refcount", f.line(f.args(L1_OFFSET, rt)))
    for bad in (0, 1, needed - 1):
        f.refused("L1 too small", "L1.*small", f.line(f.args(L1_ENTRIES, bad)))
    for bad in ((32 * MIB) // 8 + 1, (1 << 32) - 1):
        f.refused("L1 too large", "L1.*large", f.line(f.args(L1_ENTRIES, bad)))
    # Within the limit, but more than the device holds.
    f.refused("L1 beyond the end", "L1.*(beyond|end)", f.line(f.args(L1_ENTRIES, meta // 8)))
    for bad in (rt + 512, rt + 1):
        f.refused("refcount table alignment", "refcount table", f.line(f.args(RT_OFFSET, bad)))
    f.refused("refcount table at the header", "refcount table.*header",
              f.line(f.args(RT_OFFSET, 0)))
    for bad in (meta, 1 << 56, (1 << 64) - cluster):
        f.refused("refcount table beyond the end", "refcount table.*(beyond|end)",
                  f.line(f.args(RT_OFFSET, bad)))
    f.refused("L1 over the refcount table", "L1.*refcount", f.line(f.args(RT_OFFSET, l1)))
    f.refused("no refcount table", "refcount table", f.line(f.args(RT_CLUSTERS, 0)))
    for bad in (8 * MIB // cluster + 1, (1 << 32) - 1):
        f.refused("refcount table too large", "refcount table.*large",
                  f.line(f.args(RT_CLUSTERS, bad)))
    f.refused("refcount table beyond the end", "refcount table.*(beyond|end)",
              f.line(f.args(RT_CLUSTERS, meta // cluster)))
    for bad in (7, 64):
        f.refused("refcount_order range", "order", f.line(f.args(ORDER, bad)))
    f.done()


@test("possible values that the header does not have")
def disagree(bench):
    f = Fixture(bench)
    free = 64 * 4 * KIB
    for field, position, name, values in (
            ("cluster_bits", CLUSTER_BITS, "cluster", (9, 11, 13, 21)),
            ("l1_table_offset", L1_OFFSET, "L1", (free,)),
            ("l1_size", L1_ENTRIES, "L1", (22, 512)),
            ("refcount_table_offset", RT_OFFSET, "refcount table", (free,)),
            ("refcount_table_clusters", RT_CLUSTERS, "refcount table", (2,)),
            ("refcount_order", ORDER, "order", (0, 3, 5, 6))):
        cause = f"header disagrees on {field}"
        pattern = f"{name}.*header|header.*{name}"
        for value in values:
            f.header_field(cause, pattern, field, value)
            # The same from the other side, where nothing but the header can object.
            if position not in (CLUSTER_BITS, RT_CLUSTERS):
                f.refused(cause, pattern, f.line(f.args(position, value)))
    f.header_field("length", "length|size", "size", SIZE + 512)
    f.header_field("length", "length|size", "size", SIZE - 512)
    f.header_field("length", "length|size", "size", 0)
    # A size in the middle of a sector is rounded down.
    f.header_field("odd size", "", "size", SIZE + 511, good=True)
    f.done()


@test("feature arguments")
def features(bench):
    f = Fixture(bench)
    w = f.words
    for bad in ("nonsense", "readonly", "read_onlyx", "read_onl"):
        f.refused("unknown feature", "unknown|unrecogni", f.line(w + ["1", bad]))
    f.refused("duplicate feature", "twice|duplicate|repeat", f.line(w + ["2", "read_only", "read_only"]))
    f.refused("raw, but not in the header", "raw", f.line(w + ["1", "data_file_raw"]))
    # Words of the interface that this version does not have.
    for words in (["1", "extended_l2"], ["2", "backing_dev", f.data], ["1", "no_discard_passdown"]):
        f.refused("feature of a later version", "not supported", f.line(w + words))
    f.accepted("read_only", f.line(w + ["1", "read_only"]))
    f.image.set("autoclear_features", RAW)
    f.refused("raw, but not in the table", "raw", f.line(w))
    f.accepted("raw", f.line(w + ["1", "data_file_raw"]))
    f.accepted("raw, read_only", f.line(w + ["2", "data_file_raw", "read_only"]))
    f.image.patch(0, f.header)
    f.done()


@test("headers that cannot be mapped")
def headers(bench):
    f = Fixture(bench)
    for magic in (0, 0x514649FC, 0xFB494651):
        f.header_field("magic", "qcow2", "magic", magic)
    for version in (2, 1, 4, 0):
        f.header_field("version", "version", "version", version)
    for length in (0, 72, 103, 108, 4104, 0xFFFFFFF8):
        f.header_field("header_length", "header.length", "header_length", length)
    for bit in (5, 6, 31, 32, 63):
        f.header_field("unknown incompatible", "incompatible",
                       "incompatible_features", DATA_FILE | 1 << bit)
    f.header_field("no data file", "data file", "incompatible_features", 0)
    for method in (1, 2, 0x80000000):
        f.header_field("encryption", "encrypt", "crypt_method", method)
    f.header_field("snapshots", "snapshot", "nb_snapshots", 1)
    f.header_field("compression type", "compression", "incompatible_features",
                   DATA_FILE | COMPRESSION)
    f.header_field("compression type", "compression", "compression_type", 1)
    f.header_field("extended L2", "extended", "incompatible_features", DATA_FILE | EXT_L2)
    f.header_field("backing file", "backing", "backing_file_offset", 1024, "backing_file_size", 8)
    f.header_field("backing name outside", "backing", "backing_file_offset", 4092,
                   "backing_file_size", 8)
    f.header_field("backing name outside", "backing", "backing_file_offset", (1 << 64) - 4,
                   "backing_file_size", 8)
    f.header_field("backing name too long", "backing", "backing_file_offset", 1024,
                   "backing_file_size", 1024)
    for order in (7, 0xFFFFFFFF):
        f.header_field("header's refcount_order", "order", "refcount_order", order)
    # Both agree, and are both wrong.
    f.image.set("refcount_order", 7)
    f.refused("refcount_order range", "order", f.line(f.args(ORDER, 7)))
    f.image.patch(0, f.header)
    f.done()


@test("headers that can only be read, or be read and written")
def read_only_headers(bench):
    f = Fixture(bench)
    ro = ("read_only",)
    for cause, pattern, value in (("dirty", "dirty", DATA_FILE | DIRTY),
                                  ("corrupt", "corrupt", DATA_FILE | CORRUPT)):
        f.header_field(cause, pattern, "incompatible_features", value)
        f.header_field(cause, "", "incompatible_features", value, features=ro, good=True)
    for bit in (2, 31, 32, 63):
        f.header_field("autoclear", "autoclear", "autoclear_features", 1 << bit)
        f.header_field("autoclear, read-only", "", "autoclear_features", 1 << bit, features=ro,
                       good=True)
    # These are to be ignored.
    f.header_field("compatible features", "", "compatible_features", (1 << 64) - 1, good=True)
    f.header_field("header_length 104", "", "header_length", 104, "compression_type", 0, good=True)
    f.done()


@test("devices")
def devices(bench):
    f = Fixture(bench)
    f.refused("no metadata device", "metadata", f.line(f.args(META, "/dev/does-not-exist")))
    f.refused("no data device", "data", f.line(f.args(DATA, "/dev/does-not-exist")))
    f.refused("one device for both", "same", f.line(f.args(DATA, f.meta)))
    f.refused("one device for both", "same", f.line(f.args(META, f.data)))

    short = bench.add(Loop(bench.file("short", SIZE - 512)))
    f.refused("data device too small", "data.*small", f.line(f.args(DATA, short.path)))
    exact = bench.add(Loop(bench.file("exact", SIZE)))
    f.accepted("data device of just the size", f.line(f.args(DATA, exact.path)))
    large = bench.add(Loop(bench.file("large", SIZE + 512)))
    f.accepted("data device larger than the image", f.line(f.args(DATA, large.path)))

    # The metadata ends in the header, before the L1 table, inside it.
    l1 = int(f.words[L1_OFFSET])
    whole = f.image.read(0, l1 + 512)
    for name, end, pattern in (("sector", 512, "beyond|end|small"),
                               ("cluster", 4096, "beyond|end|small"),
                               ("l1", l1, "L1.*(beyond|end)")):
        path = bench.file("meta-" + name, end)
        with open(path, "r+b") as out:
            out.write(whole[:end])
        part = bench.add(Loop(path))
        fault, messages = f.load(f.line(f.args(META, part.path)))
        if not fault or len(messages) != 1 or not re.search(pattern, messages[0]):
            f.fault(f"metadata of {end} bytes: {fault or 'accepted'}, {messages}")

    zeros = bench.add(Loop(bench.file("zeros", MIB)))
    f.refused("magic", "qcow2", f.line(f.args(META, zeros.path)))

    readonly = bench.add(Loop(f.image.path, readonly=True))
    f.refused("metadata device is read-only", "read.only", f.line(f.args(META, readonly.path)))
    f.accepted("read_only on a read-only device",
               f.line(f.args(META, readonly.path) + ["1", "read_only"]))
    f.done()


def sector_size(bench, meta_sector, data_sector, cause):
    image = bench.image(MIB, cluster=2 * KIB)
    image.extend()
    os.truncate(image.path, (os.stat(image.path).st_size + 4095) & ~4095)
    meta = bench.add(Loop(image.path, block_size=meta_sector))
    data = bench.add(Loop(image.data, block_size=data_sector))
    log = bench.add(KernelLog())
    dm = bench.add(Dm("table"))
    before = image.hash()
    status, _ = dm.setup("load", "--table", image.line(meta.path, data.path), ok=False)
    expect(status, "accepted")
    messages = log.lines("qcow2: ")
    expect(len(messages) == 1 and re.search(cause, messages[0]),
           f"the message does not say so: {messages}")
    expect(image.hash() == before, "the image was changed")


test("clusters smaller than the sectors of the metadata device",
     4096, 512, "Metadata device's logical block")(sector_size)
test("clusters smaller than the sectors of the data device",
     512, 4096, "Data device's logical block")(sector_size)


def round_trip(bench, raw, features):
    image = bench.image(SIZE, raw=raw)
    dm = image.open(*features)
    first = dm.table()
    words = first.split()
    expect(words[:3] == ["0", str(SIZE // 512), "qcow2"], f"table: {first}")
    expect(all(re.fullmatch(r"\d+:\d+", w) for w in words[3:5]), f"devices: {first}")
    want = image.args(*words[3:5], *features)[2:]
    got = words[5:]
    if len(want) == 6 and got[6:] == ["0"]:
        got = got[:6]
    expect(got[:6] == want[:6] and sorted(got[6:]) == sorted(want[6:]),
           f"table: {got}, {want} was loaded")
    dm.load(first)
    expect(dm.table() == first, f"after a reload: {dm.table()}, before: {first}")

    status = dm.status()
    expect(status.cluster_sectors == 128, f"{status}")
    expect(status.entries == image.get("l1_size"), f"{status}")
    expect(sorted(status.features) == sorted(want[7:]), f"features: {status}")
    expect(status.mode == ("ro" if "read_only" in features else "rw"), f"mode: {status}")


@test("a printed table can be loaded back")
def round_trip_plain(bench):
    round_trip(bench, False, ())


@test("a printed table can be loaded back: read_only")
def round_trip_ro(bench):
    round_trip(bench, False, ("read_only",))


@test("a printed table can be loaded back: data_file_raw")
def round_trip_raw(bench):
    round_trip(bench, True, ("data_file_raw",))


@test("a printed table can be loaded back: data_file_raw, read_only")
def round_trip_raw_ro(bench):
    round_trip(bench, True, ("data_file_raw", "read_only"))


@test("a new table whose line is wrong leaves the old one in place")
def wrong_reload(bench):
    image = bench.image(SIZE)
    image.poison()
    dm = image.open()
    before = dm.table()
    disk = bench.io(dm)
    disk.write(SIZE - 4608, b"x" * 4608)
    bad = image.line(image.meta_loop.path, image.data_loop.path).split()
    bad[-1] = "9"
    status, _ = dm.setup("load", "--table", " ".join(bad), ok=False)
    expect(status, "a wrong line was accepted")
    expect(dm.table() == before, "the table has changed")
    expect(disk.read(SIZE - 4608, 4608) == b"x" * 4608, "the device does not work")
    expect(disk.read(0, 4096) == bytes(4096), "the device does not work")


@test("a read_only table refuses writes")
def refuses_writes(bench):
    image = bench.image(SIZE)
    image.poison()
    image.extend()
    before = image.hash()
    dm = image.open("read_only")
    try:
        disk = bench.io(dm)
    except PermissionError:
        return
    with fails_with(errno.EIO, errno.EROFS, errno.EPERM, errno.EACCES):
        disk.write(0, bytes(4096))
    expect(disk.read(0, 4096) == bytes(4096), "reads do not work")
    bench.drop(disk)
    bench.drop(dm)
    expect(image.hash() == before, "the image was changed")


if __name__ == "__main__":
    main()
