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
                       expect, fails_with, main, note, test)

SIZE = 40 * MIB + 512
META, DATA, CLUSTER_BITS, L1_OFFSET, L1_ENTRIES, RT_OFFSET, RT_CLUSTERS, ORDER = range(8)
MESSAGE = re.compile(r"table: \S+ qcow2: (.*) \(-?\w+\)$")


class Fixture:
    """An image, a device without a table, and what the kernel said so far."""

    def __init__(self, bench, cluster=4 * KIB, **options):
        self.bench = bench
        self.image = bench.image(SIZE, cluster=cluster, **options)
        self.image.poison((0, 64 * KIB))
        os.truncate(self.image.data, SIZE + MIB)
        self.image.extend()
        os.truncate(self.image.path, 128 * cluster)
        self.image.attach(extend=False)
        self.meta, self.data = self.image.meta_loop.path, self.image.data_loop.path
        backing = self.image.backing_loop
        # A good line, if no feature is asked for
        self.words = self.image.args(self.meta, self.data,
                                     *(("backing_dev", backing.path) if backing else ()))
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

    def with_features(self, *words):
        """The good line with just these feature words."""
        return self.line(self.words[:ORDER + 1] + ([str(len(words)), *words] if words else []))

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
        line = self.with_features(*features) if features else self.line()
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
    for bad in ("nonsense", "readonly", "read_onlyx", "read_onl", "cache_limit=1", "backing"):
        f.refused("unknown feature", "unknown|unrecogni", f.with_features(bad))
    for twice in (["read_only"], ["data_file_raw"], ["extended_l2"], ["no_discard_passdown"],
                  ["backing_dev", f.data], ["cache_limit", "1000000"]):
        f.refused("duplicate feature", "twice|duplicate|repeat", f.with_features(*twice, *twice))
    f.refused("duplicate feature", "twice|duplicate|repeat",
              f.with_features("cache_limit", "1", "read_only", "cache_limit", "2"))
    for words in (["cache_limit"], ["backing_dev"], ["read_only", "cache_limit"],
                  ["cache_limit", "1000000", "backing_dev"]):
        f.refused("no value", "value", f.with_features(*words))
    # The value is there, but not counted.
    f.refused("no value", "value", f.line(f.words + ["1", "cache_limit", "1000000"]))
    for bad in ("0", "x", "-1", "1x", "1M", "0x100000", "1.5", "18446744073709551616"):
        f.refused("cache_limit", "cache.limit", f.with_features("cache_limit", bad))
    for good in ("1", "1000000", "67108864", "18446744073709551615"):
        f.accepted(f"cache_limit {good}", f.with_features("cache_limit", good))
    f.refused("raw, but not in the header", "raw", f.with_features("data_file_raw"))
    f.accepted("read_only", f.with_features("read_only"))
    f.accepted("no_discard_passdown", f.with_features("no_discard_passdown"))
    f.accepted("three of them", f.with_features("cache_limit", "1000000", "no_discard_passdown", "read_only"))
    f.image.set("autoclear_features", RAW)
    f.refused("raw, but not in the table", "raw", f.line())
    f.accepted("raw", f.with_features("data_file_raw"))
    f.accepted("raw, read_only", f.with_features("data_file_raw", "read_only"))
    f.image.patch(0, f.header)
    f.done()


@test("feature arguments: backing_dev")
def backing_argument(bench):
    f = Fixture(bench, backing=bench.file("backing", 10 * MIB))
    good = f.image.backing_loop.path
    f.refused("backing file, but no backing_dev", "backing", f.with_features())
    f.refused("backing file, but no backing_dev", "backing", f.with_features("read_only"))
    f.refused("no backing device", "open.*backing", f.with_features("backing_dev", "/dev/does-not-exist"))
    for device in (f.meta, f.data):
        f.refused("backing is one of the others", "backing.*(metadata|data)",
                  f.with_features("backing_dev", device))
    f.refused("raw and backing", "exclude",
              f.with_features("backing_dev", good, "data_file_raw"))
    f.refused("raw and backing", "exclude",
              f.with_features("data_file_raw", "backing_dev", good))
    f.header_field("raw and backing in the header", "raw.*backing", "autoclear_features", RAW)
    f.header_field("no backing file in the header", "backing", "backing_file_offset", 0,
                   "backing_file_size", 0)
    for name, size in (("short", 512), ("equal", SIZE), ("long", SIZE + 4 * MIB)):
        device = bench.add(Loop(bench.file(name, size)))
        f.accepted(f"a {name} backing device", f.with_features("backing_dev", device.path))
    readonly = bench.add(Loop(bench.file("readonly", MIB), readonly=True))
    f.accepted("a read-only backing device", f.with_features("backing_dev", readonly.path))
    f.done()


@test("feature arguments: view")
def view_argument(bench):
    f = Fixture(bench, backing=bench.file("backing", 10 * MIB))
    backing = ("backing_dev", f.image.backing_loop.path)

    def view(*words):
        return f.with_features(*backing, *words)

    cow = bench.add(Loop(bench.file("cow", SIZE))).path
    f.accepted("view", view("view", cow))
    f.accepted("VIEW", view("VIEW", cow))
    # How many words there are
    for words in (["view"], ["view_granularity"], ["view", cow, "view_granularity"], ["view_granularity", "4096", "view"]):
        f.refused("no value", "value", view(*words))
    f.refused("no value", "value", f.line(f.words[:ORDER + 1] + ["3", *backing, "view", cow]))
    f.refused("feature count", "feature|argument", f.line(f.words[:ORDER + 1] + ["5", *backing, "view", cow]))
    f.refused("arguments left over", "too many", f.line(f.words[:ORDER + 1] + ["4", *backing, "view", cow, cow]))
    for words in (["view", cow, "view", cow], ["view", cow, "view", "/dev/does-not-exist"],
                  ["view_granularity", "4096", "view", cow, "view_granularity", "8192"]):
        f.refused("duplicate feature", "twice", view(*words))
    for name in ("views", "view_", "view_granularities"):
        f.refused("unknown feature", "unknown", view(name, cow))
    # Granules
    for bits in range(12, 21):
        f.accepted(f"granules of {1 << bits}", view("view", cow, "view_granularity", str(1 << bits)))
        f.accepted(f"granules of {1 << bits}", view("view_granularity", str(1 << bits), "view", cow))
    for bad in ("0", "1", "512", "2048", "4095", "4097", "12288", "65537", "2097152", "4294967296", "4294971392", "-4096",
                "x", "4K", "4096x", "0x1000", "4096.0", "18446744073709551616", "18446744073709555712"):
        f.refused("granularity", "granularity.*power of 2 from 4096 to 1048576",
                  view("view", cow, "view_granularity", bad))
    f.refused("a granularity of nothing", "view_granularity needs view", view("view_granularity", "65536"))
    # The device
    for device in ("/dev/does-not-exist", "0:0", "nonsense", "/dev/null"):
        f.refused("no such device", "open the view's device", view("view", device))
    for device in (f.meta, f.data, backing[1], f.dm.path):
        f.refused("one of the others", "view's device is one of", view("view", device))
    f.refused("too small", "view's device is smaller", view("view", bench.add(Loop(bench.file("short", SIZE - 512))).path))
    for name, size in (("exact", SIZE), ("long", SIZE + MIB)):
        f.accepted(f"one that is {name}", view("view", bench.add(Loop(bench.file(name, size))).path))
    blocks = bench.add(Loop(bench.file("blocks", SIZE + 4096 - 512), block_size=4096)).path
    f.refused("blocks that the end is in the middle of", "logical block of the view's", view("view", blocks))
    readonly = bench.add(Loop(bench.file("readonly", SIZE), readonly=True)).path
    # Where it may be opened for writing, it is looked at.
    says = re.compile("Cannot open the view's device|View's device is read-only")
    fault, messages = f.load(view("view", readonly))
    if not fault or len(messages) != 1 or not says.search(messages[0]):
        f.fault(f"a device that cannot be written: {fault or 'accepted'}, {messages}")
    f.refused("a table that does not write", "view needs a table that may write", view("read_only", "view", cow))
    f.refused("a table that does not write", "view needs a table that may write", view("view", cow, "read_only"))
    f.done()


@test("feature arguments: extended_l2")
def extended_argument(bench):
    f = Fixture(bench, cluster=16 * KIB, extended=True)
    f.refused("extended, but not in the table", "extended", f.with_features())
    f.refused("extended, but not in the table", "extended", f.with_features("read_only"))
    f.header_field("extended, but not in the header", "extended", "incompatible_features", DATA_FILE)
    # In the interface's own terms: these cannot be, whatever the header says.
    for bits in (9, 12, 13):
        words = f.args(CLUSTER_BITS, bits)
        f.refused("extended_l2 with small clusters", "extended.*cluster_bits", f.line(words))
    f.refused("L1 too small", "L1.*small", f.line(f.args(L1_ENTRIES, f.image.tables - 1)))
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


def sector_size(bench, cause, meta=512, data=512, backing=512, backing_size=None, **options):
    """Devices whose sectors are too large for the image."""
    if backing_size:
        options["backing"] = bench.file("backing", backing_size)
    image = bench.image(MIB, **options)
    image.extend()
    os.truncate(image.path, (os.stat(image.path).st_size + 4095) & ~4095)
    lower = [bench.add(Loop(image.path, block_size=meta)),
             bench.add(Loop(image.data, block_size=data))]
    features = []
    if backing_size:
        lower.append(bench.add(Loop(image.backing, block_size=backing)))
        features = ["backing_dev", lower[2].path]
    log = bench.add(KernelLog())
    dm = bench.add(Dm("table"))
    before = image.hash()
    status, _ = dm.setup("load", "--table", image.line(lower[0].path, lower[1].path, *features), ok=False)
    expect(bool(status) == bool(cause), "refused" if status else "accepted")
    messages = log.lines("qcow2: ")
    expect(len(messages) == bool(cause) and (not cause or re.search(cause, messages[0])),
           f"the message does not say so: {messages}")
    expect(image.hash() == before, "the image was changed")


for _name, _cause, _options in (
        ("clusters smaller than the sectors of the metadata device",
         "Metadata device's logical block", {"meta": 4096, "cluster": 2 * KIB}),
        ("clusters smaller than the sectors of the data device",
         "Data device's logical block", {"data": 4096, "cluster": 2 * KIB}),
        ("clusters smaller than the sectors of the backing device",
         "Backing device's logical block", {"backing": 4096, "backing_size": MIB, "cluster": 2 * KIB}),
        ("subclusters smaller than the sectors of the data device",
         "Data device's logical block", {"data": 4096, "cluster": 64 * KIB, "extended": True}),
        ("subclusters smaller than the sectors of the backing device",
         "Backing device's logical block", {"backing": 4096, "backing_size": MIB, "cluster": 64 * KIB,
                                            "extended": True}),
        ("a backing device that ends inside a sector of the data device",
         "Backing device ends", {"data": 4096, "backing_size": 9 * 512}),
        ("devices with sectors as large as they may be",
         "", {"meta": 4096, "data": 4096, "backing": 4096, "backing_size": 512 * KIB, "cluster": 128 * KIB,
              "extended": True})):
    def _run(bench, cause, options):
        sector_size(bench, cause, **options)
    test(_name, _cause, _options)(_run)


# As dmsetup prints them
FEATURES = ("read_only", "data_file_raw", "extended_l2", "backing_dev", "no_discard_passdown",
            "cache_limit")


def round_trip(bench, wanted, options):
    """wanted: names of features, in any order, which the image has to fit."""
    if "backing_dev" in wanted:
        options["backing"] = bench.file("backing", 10 * MIB)
    image = bench.image(SIZE, **options)
    image.attach()
    values = {"cache_limit": ["7654321"]}
    numbers = {}
    if image.backing_loop:
        device = os.stat(image.backing_loop.path).st_rdev
        values["backing_dev"] = [image.backing_loop.path]
        numbers["backing_dev"] = [f"{os.major(device)}:{os.minor(device)}"]
    words = [w for name in wanted for w in (name, *values.get(name, []))]
    dm = bench.add(Dm("q", image.line(image.meta_loop.path, image.data_loop.path, *words)))

    first = dm.table()
    words = first.split()
    expect(words[:3] == ["0", str(SIZE // 512), "qcow2"], f"table: {first}")
    expect(all(re.fullmatch(r"\d+:\d+", w) for w in words[3:5]), f"devices: {first}")
    expect(words[5:11] == image.args(*words[3:5])[2:8], f"table: {first}")
    features = [w for name in FEATURES if name in wanted
                for w in (name, *(numbers.get(name) or values.get(name, [])))]
    expect(words[11:] in ([str(len(features)), *features], features), f"{wanted} were given, table: {first}")
    dm.load(first)
    expect(dm.table() == first, f"after a reload: {dm.table()}, before: {first}")

    status = dm.status()
    expect(status.cluster_sectors == image.cluster // 512, f"{status}")
    expect(status.entries == image.get("l1_size"), f"{status}")
    expect(status.features == features, f"features: {status}, expected {features}")
    expect(status.mode == ("ro" if "read_only" in wanted else "rw"), f"mode: {status}")


for _wanted, _options in (
        ((), {}),
        (("read_only",), {"cluster": 4 * KIB}),
        (("data_file_raw",), {"raw": True}),
        (("cache_limit",), {}),
        (("no_discard_passdown", "read_only", "data_file_raw"), {"raw": True}),
        (("extended_l2",), {"extended": True}),
        (("backing_dev",), {"refcount_bits": 1}),
        (("cache_limit", "no_discard_passdown", "backing_dev", "extended_l2", "read_only"),
         {"extended": True, "cluster": 2 * MIB})):
    test(f"a printed table can be loaded back: {', '.join(_wanted) or 'plain'}",
         _wanted, _options)(round_trip)


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
