# SPDX-License-Identifier: GPL-2.0-or-later
"""Recordings of what reaches the disks, for power cuts: see test_powercut.py."""
import os
import random
import re
import shutil

import qcow2test
from bitmaps import bitmaps as found, record
from qcow2image import RAW
from qcow2test import MIB, Dm, Loop, expect, note, run

EXPORT = "/run/vm/export"
SEED = int(os.environ.get("POWERCUT_SEED", "1"))
LOG_SIZE = 256 * MIB
TOOL = os.path.join(qcow2test.HERE, "../../tools/qcow2setup")
LOAD, REPLAY = (os.path.join(qcow2test.HERE, n) for n in ("qcow2load", "qcow2replay"))
EVENTS = ("block_bio_queue", "block_bio_complete")
# Event and device of a flush
FLUSH = re.compile(r" (block_bio_\w+): (\d+),(\d+) F\w* \d+ \+ 0 ")
# When dm-log-writes gets a bio, when it has taken what a flush makes durable, and when it
# puts it into its log
PROBES = {"log_map": ("p", "log_writes_map bio=$arg2:x64"), "log_mapped": ("r64", "log_writes_map"),
          "log_end": ("p", "normal_end_io bio=$arg2:x64")}


def device_number(path):
    number = os.stat(path).st_rdev
    return os.major(number), os.minor(number)


class FlushTrace:
    """Which flush was whose: dm-log-writes does not tell. From the kernel's trace."""

    def __init__(self, bench, devices, logged=False):
        """devices: dict of letter: path; logged: they are on a dm-log-writes device"""
        self.devices = {device_number(p): letter for letter, p in devices.items()}
        self.mount = bench.path("tracefs")
        os.makedirs(self.mount, exist_ok=True)
        run("mount", "-t", "tracefs", "tracefs", self.mount)
        self.group = f"qcow2test{os.getpid()}"
        self.dir = f"{self.mount}/instances/{self.group}"
        self.enabled, self.probes = [], []
        try:
            os.mkdir(self.dir)
            self._put("buffer_size_kb", "8192")
            which = " || ".join(f"dev == {ma << 20 | mi}" for ma, mi in self.devices)
            for event in EVENTS:
                self._put(f"events/block/{event}/filter", f"({which}) && nr_sector == 0")
                self._enable(f"block/{event}")
            if logged:
                for name, (kind, where) in PROBES.items():
                    self._probe(f"{kind}:{self.group}/{name} dm_log_writes:{where}")
                    self.probes.append(name)
                    self._enable(f"{self.group}/{name}")
        except OSError:
            self.close()
            raise

    def _put(self, file, text):
        with open(f"{self.dir}/{file}", "w", encoding="ascii") as f:
            f.write(text)

    def _enable(self, event):
        self._put(f"events/{event}/enable", "1")
        self.enabled.append(event)

    def _probe(self, text):
        # An "a" file of Python's seeks, which this one cannot.
        fd = os.open(f"{self.mount}/kprobe_events", os.O_WRONLY | os.O_APPEND)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)

    def lines(self):
        with open(f"{self.dir}/trace", encoding="ascii", errors="replace") as f:
            lines = f.read().splitlines()
        expect(not any("LOST" in line for line in lines), "the kernel's trace has lost events")
        return lines

    def _letters(self, event):
        """Of the flushes, in the order of these events"""
        return "".join(self.devices[int(m.group(2)), int(m.group(3))]
                       for m in map(FLUSH.search, self.lines()) if m and m.group(1) == event)

    def sent(self, letter):
        """How many were sent to a device so far"""
        return self._letters(EVENTS[0]).count(letter)

    def ended(self):
        """The letters of the flushes, in the order of their ends"""
        return self._letters(EVENTS[1])

    def flushes(self):
        """Of devices that are on a dm-log-writes device, in the order of its log: letter
        ("?" if another device's ended in the same moment, so that the log may have the two
        the other way round), and how many had got there before."""
        return order_of_log(self.lines(), self.devices)

    def close(self):
        for event in self.enabled:
            self._put(f"events/{event}/enable", "0")
        os.rmdir(self.dir)
        for name in self.probes:
            self._probe(f"-:{self.group}/{name}")
        run("umount", self.mount)


def order_of_log(lines, devices):
    """See FlushTrace.flushes. lines: of the trace; devices: dict of (major, minor): letter"""
    probe = re.compile(rf" ({'|'.join(PROBES)}): \([^)]*\)(?: bio=(0x[0-9a-f]+))?")
    queued, mapping, logged, ending = {}, {}, {}, []
    # A probe is not seen that hits while another one is at work, in an interrupt: that of an end.
    unseen, unknown = [], []
    sent, done = 0, []
    for now, line in enumerate(lines, 1):
        who = re.match(r"\s*.+-(\d+)\s+\[", line)
        if m := probe.search(line):
            event, bio = m.groups()
            if event == "log_map":
                # What was sent to a device of ours comes here before its sender does anything else.
                if bio in logged:
                    unseen.append(logged.pop(bio))
                if letter := queued.pop(who.group(1), None):
                    mapping[who.group(1)] = logged[bio] = [letter, None]
            elif event == "log_mapped":
                if what := mapping.pop(who.group(1), None):
                    what[1] = sent
                    sent += 1
            elif bio in logged:
                ending.append((now, logged.pop(bio), who.group(1)))
        elif m := FLUSH.search(line):
            letter = devices[int(m.group(2)), int(m.group(3))]
            if m.group(1) == EVENTS[0]:
                expect(who.group(1) not in queued, "a flush has not got to the log")
                queued[who.group(1)] = letter
                continue
            # Its place in the log is one of those between these two moments. Who has sent it may
            # be the one who ends it, if it is quicker than he: then it is the oldest one.
            mine = next((e for e in reversed(ending) if e[2] == who.group(1) and e[1][0] == letter),
                        next((e for e in ending if e[1][0] == letter), None))
            if mine:
                ending.remove(mine)
                done.append((mine[0], now, mine[1]))
            else:
                unknown.append((now, letter))
    if unknown:
        note(f"{len(unknown)} flushes whose place in the log has not been seen")
    # They are those of which nothing was seen.
    unseen = sorted(unseen + list(logged.values()), key=lambda f: f[1])
    for when, letter in unknown:
        mine = next((f for f in unseen if f[0] == letter), None)
        expect(mine, "a flush has ended that has not got to the log")
        unseen.remove(mine)
        done.append((when, when, mine))
    expect(not queued and not mapping and not unseen and not ending, "a flush has not ended")

    done.sort()
    result, group, until = [], [], 0

    def end_group():
        letters = {letter for letter, _ in group}
        # Whatever their order: what one of them has made durable was so when the first one ended.
        result.extend(("?" if len(letters) > 1 else letter, rank)
                      for letter, rank in sorted(group, key=lambda f: -f[1]))
        group.clear()

    for began, ended, what in done:
        if began > until:
            end_group()
        group.append(what)
        until = max(until, ended)
    end_group()
    return result


class Recording:
    """An image on two slices of a device whose writes are logged."""

    def __init__(self, bench, name, size, room=None, data_size=None, backing=0, raw=False, mapped=False,
                 export=True, bitmaps=(), chain=False, **options):
        """room: size of the metadata device, in bytes; without it, that of the worst
        case. data_size: of the data device, if it is to be larger than the image.
        bitmaps: granularities of those that record.
        backing: size of a raw backing file. raw: data_file_raw, but nothing is allocated.
        mapped: let qcow2setup open the image.
        chain: bitmaps will end, and others begin, as backups do: one of them has each change.
        export: leave the recording to the host, if it wants it."""
        self.bench, self.name, self.size = bench, name, size
        self.data_size = data_size or size
        self.dir = os.path.join(EXPORT if export and os.path.isdir(EXPORT) else bench.path("recording"), name)
        os.makedirs(self.dir)
        self.backing = backing
        path = None
        if backing:
            path = bench.file("backing", backing)
            run(LOAD, "--fill", "B", path, 0, backing // 512)
        self.image = bench.image(size, name, backing=path, **options)
        self.raw, self.chain = raw, chain
        if raw:
            # QEMU would allocate everything.
            self.image.set("autoclear_features", RAW)
        for name in record(self.image, bitmaps)[1::2]:
            # Some of them have bits that were set before.
            b = found(self.image)[name]
            b.put(random.Random(SEED).getrandbits(b.count))
        end = -(-self.image.file_size() // self.image.cluster) * self.image.cluster
        self.image.extend()
        self.meta_size = room or -(-self.image.file_size() // 4096) * 4096
        os.truncate(self.image.path, self.meta_size)

        disk = bench.file("disk", self.meta_size + self.data_size)
        run("dd", f"if={self.image.path}", f"of={disk}", f"count={end}", "iflag=count_bytes",
            "bs=64k", "conv=notrunc", "status=none")
        # Free space of the metadata holds what must not be taken for a table.
        run(LOAD, "--fill", "J", disk, end // 512, (self.meta_size - end) // 512)
        # With data_file_raw the data device reads as the guest, from the beginning.
        if not raw:
            run(LOAD, "--fill", "P", disk, self.meta_size // 512, self.data_size // 512)
        run("dd", f"if={disk}", f"of={self.dir}/meta", "bs=64k", f"count={self.meta_size}",
            "iflag=count_bytes", "status=none")

        self.log = bench.file("log", LOG_SIZE)
        sectors = (self.meta_size + self.data_size) // 512
        self.logged = self._dm("log", f"0 {sectors} log-writes {bench.add(Loop(disk)).path} "
                                      f"{bench.add(Loop(self.log)).path}")
        self.meta = self._dm("meta", f"0 {self.meta_size // 512} linear {self.logged.path} 0")
        self.data = self._dm("data", f"0 {self.data_size // 512} linear {self.logged.path} "
                                     f"{self.meta_size // 512}")
        self.trace = bench.add(FlushTrace(bench, {"m": self.meta.path, "d": self.data.path}, logged=True))
        features = ()
        if backing:
            features = ("backing_dev", bench.add(Loop(path, readonly=True)).path)
        if bitmaps:
            features = (*features, "bitmaps")
        if mapped:
            self.dm = bench.add(Mapped(self.meta.path, name, self.data.path))
        else:
            self.dm = self._dm("q", self.image.line(self.meta.path, self.data.path, *features))
        self.number, self.time = 0, 1

    def _dm(self, name, table):
        return self.bench.add(Dm(name, table))

    def load(self, requests, *options):
        """Go on with the load; options are qcow2load's."""
        out = run(LOAD, "-l", self.logged.name, "-s", SEED, "-n", requests, "-f", self.number,
                  "-c", self.time, "-u", self.image.unit // 512, *options,
                  self.dm.path, self.dir + "/journal")
        self.number, self.time = out.split()

    def mark(self, text):
        run("dmsetup", "message", self.logged.name, "0", "mark", text)

    def close(self, seed=SEED):
        """Take all down, and complete the recording."""
        self.bench.drop(self.dm)
        # On its removal dm-log-writes logs what no flush has covered yet, and before what waits to be
        # logged: with a log that is behind, before what came earlier.
        fd = os.open(self.data.path, os.O_RDWR)
        os.fsync(fd)
        os.close(fd)
        self.bench.drop(self.data)
        self.bench.drop(self.meta)
        status = self.logged.setup("status")
        expect("disabled" not in status, f"the log is not complete: {status}")
        self.bench.drop(self.logged)
        flushes = self.trace.flushes()
        with open(self.dir + "/flushes", "w", encoding="ascii") as f:
            f.writelines(f"{letter} {rank}\n" for letter, rank in flushes)
        unclear = sum(letter == "?" for letter, _ in flushes)
        late = sum(any(rank < other for _, other in flushes[:n]) for n, (_, rank) in enumerate(flushes))
        note(f"{self.name}: {self.number} requests, {len(flushes)} flushes, {unclear} of them of either device, "
             f"{late} after one that was sent later")
        with open(self.dir + "/conf", "w", encoding="ascii") as f:
            f.write(f"meta_sectors {self.meta_size // 512}\ndata_sectors {self.data_size // 512}\n"
                    f"backing_sectors {self.backing // 512}\nseed {seed}\nclosed 1\nraw {int(self.raw)}\nchain {int(self.chain)}\n")
        if not os.path.exists(self.dir + "/journal"):
            open(self.dir + "/journal", "w", encoding="ascii").close()
        os.sync()
        end, fd = 0, os.open(self.log, os.O_RDONLY)
        while True:
            try:
                end = os.lseek(fd, os.lseek(fd, end, os.SEEK_DATA), os.SEEK_HOLE)
            except OSError:
                break
        os.close(fd)
        os.truncate(self.log, end)
        shutil.copyfile(self.log, self.dir + "/log")

    def replay(self, *options):
        """Judge states: status and report of qcow2replay."""
        work = self.bench.path("work")
        os.makedirs(work, exist_ok=True)
        status, out = run(REPLAY, "-s", SEED, "-j", os.cpu_count(), *options, self.dir, work, ok=False,
                          timeout=1000)
        return status, re.sub("^# ", "", out, flags=re.M)

    def judge(self, command=None):
        """command: judges the content, in place of qcow2replay"""
        if self.dir.startswith(EXPORT):
            options = ("-n", 1, "-x", 20, "-k", 0, "-m", 0)
        else:
            options = ("-n", 1, "-k", 10, "-m", 500, "-t", TOOL)
            if command:
                options += ("-c", command, "-e", 80)
        status, out = self.replay(*options)
        note(out)
        expect(status == 0, "a state is not allowed")


class Mapped:
    """A device that qcow2setup has made."""

    def __init__(self, image, name, data):
        self.name = f"qcow2test{os.getpid()}-{name}"
        self.path = f"/dev/mapper/{self.name}"
        run(TOOL, "open", image, self.name, "--data-file", data)

    def close(self):
        run(TOOL, "close", self.name)
