# SPDX-License-Identifier: GPL-2.0-or-later
"""Rows about backups: beside a view, copies of it, and how long its beginning holds writes back."""
import mmap
import os
import threading
import time

from peers import DIR, GIB, MIB, OURS, TIB, TOOL, UNIT, Missing, Setup, run
from rows import Row, fio


class Views(Row):
    """Beside a view, or dm-snapshot's snapshot, of the live device or of what shows it as it was.

    Random writes of what is not kept yet go to one of 16 granules, so that few meet one again.
    """
    def __init__(self, name, title, rw, bs, requests, subjects, granularity=UNIT, kept=False, shows=False, **options):
        super().__init__(name, title, rw, bs, requests, subjects, **options)
        self.granularity, self.kept, self.shows = granularity, kept, shows

    def live_and_view(self, s, subject):
        """The live device, and what shows it as it was; None: there is no view."""
        size = self.device
        if subject.startswith("dm-snapshot"):
            store = "P" if "persistent" in subject else "N"
            head, n = MIB // 512, (size + size // 16) // 512
            # As snapshot() in peers.py
            cow = s.table(f"0 {head} linear {s.loop(MIB)} 0\n{head} {n - head} linear {s.null(n * 512)} {head}")
            origin = s.null(size)
            run("modprobe", "dm-snapshot")
            shown = s.dm(size, f"snapshot {origin} {cow} {store} {self.granularity // 512}")
            return s.dm(size, f"snapshot-origin {origin}"), shown
        device = s.qcow2(size, s.null(size))
        fio(device, "write", "1M", size=size)
        os.sync()
        if "view" not in subject and not self.shows:
            return device, None
        shown = s.view(device, s.null(size), self.granularity)
        # The table is another one, and what is known of units comes with the first requests.
        fio(device, "randread", "4k", 1024, size=size)
        return device, shown

    def figure(self, subject):
        with Setup() as s:
            device, shown = self.live_and_view(s, subject)
            if self.kept or "kept" in subject:
                fio(device, "write", "1M", size=self.device)
            requests = self.requests if subject.startswith(OURS) or self.kept or self.shows else self.requests // 2
            ms, done = fio(shown if self.shows else device, self.rw, self.bs, requests, size=self.device)
            more = {}
            if shown and subject.startswith(OURS):
                words = run("dmsetup", "status", os.path.basename(device)).split()
                kept = words.index("view_kept")
                if words[kept - 1] != "valid":
                    raise Missing(f"the view is over: {words[kept - 1]}")
                more["kept"] = int(words[kept + 1])
        return {"value": round(ms * 1e6 / done), **more}


def executed():
    """Nanoseconds that CPUs have run tasks: in an emulator that counts instructions, these. What a
    process waits for, its program from the host for one, is not among them."""
    with open("/proc/schedstat", encoding="ascii") as f:
        return sum(int(line.split()[7]) for line in f if line.startswith("cpu"))


class Copies(Row):
    """All of a view, to a device; by instructions for each MiB, or by the clock"""
    SUBJECTS = [OURS, "dd", "qemu-img convert"]
    TURNS = 9

    def __init__(self, name, title, clock, device):
        super().__init__(name, title, None, None, None, self.SUBJECTS, device=device)
        self.clock, self.unit = clock, "MiB a second" if clock else "instructions per MiB"

    @staticmethod
    def argv(subject, name, view, target):
        if subject == OURS:
            return TOOL, "backup", "copy", name, target, "--overwrite-device"
        if subject == "dd":
            return "dd", f"if={view}", f"of={target}", "bs=1M", "iflag=direct", "oflag=direct", "conv=fsync"
        return "qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", "-T", "none", "-t", "none", view, target

    def figures(self, subjects):
        memory = {"memory_backed": 1} if self.clock else {}
        now = time.monotonic_ns if self.clock else executed
        with Setup() as s:
            try:
                device = s.qcow2(self.device, s.null(self.device, **memory))
                fio(device, "write", "1M", size=self.device)
                view, = s.backup(device, options=("--cow", s.null(self.device)))
                target = s.null(self.device, **memory)
            except (Missing, OSError) as e:
                yield from ({"subject": subject, "missing": str(e)} for subject in subjects)
                return
            for turn in range(self.TURNS if self.clock else 1):
                for subject in subjects:
                    try:
                        # Memory for what is written is not to be got in some turn.
                        for _ in range(1 if turn or not self.clock else 2):
                            begun = now()
                            run(*self.argv(subject, os.path.basename(device), view, target))
                            took = now() - begun
                    except (Missing, OSError) as e:
                        yield {"subject": subject, "missing": str(e)}
                        continue
                    if self.clock:
                        yield {"subject": subject, "turn": turn, "value": round(self.device / MIB / took * 1e9)}
                    else:
                        yield {"subject": subject, "value": round(took * MIB / self.device)}


class Writer(threading.Thread):
    """Small writes, one after the other, and how long they took: (begun, took), nanoseconds"""
    def __init__(self, device):
        super().__init__(daemon=True)
        self.device, self.ends, self.took = device, False, []

    def run(self):
        fd = os.open(self.device, os.O_WRONLY | os.O_DIRECT)
        with mmap.mmap(-1, 4096) as block:
            while not self.ends:
                begun = time.monotonic_ns()
                os.pwrite(fd, block, 0)
                self.took.append((begun, time.monotonic_ns() - begun))
        os.close(fd)

    def longest(self, since):
        """Of those that have ended since then"""
        found = max((took for begun, took in self.took if begun + took >= since), default=0)
        self.took.clear()
        return found

    def end(self):
        self.ends = True
        self.join()


class Suspends(Row):
    """How long a write to a device, of which a backup begins, takes at most: that is how long
    requests are held back; of several devices, by the one that is held longest."""
    unit = "microseconds (p50)"
    clock = True
    TIMES = 60
    SUBJECTS = {"dm-qcow2": (1, GIB, False), "dm-qcow2 (4 devices)": (4, GIB, False),
                "dm-qcow2 (1 TiB, bitmap and checkpoint)": (1, TIB, True), "dmsetup suspend and resume": (1, GIB, False)}

    def __init__(self, name, title):
        super().__init__(name, title, None, None, None, list(self.SUBJECTS))

    def figure(self, subject):
        count, size, bitmaps = self.SUBJECTS[subject]
        ours = subject.startswith(OURS)
        taken = []
        with Setup() as s:
            data = [s.null(size) for _ in range(count)]
            devices = [s.open(s.image(size, d, "--data-file-raw", *(["--bitmap", "b0"] if bitmaps else [])), d)
                       for d in data]
            names = [os.path.basename(d) for d in devices]
            for n in range(self.TIMES):
                with Setup() as turn:
                    writers = [Writer(d) for d in devices]
                    for w in writers:
                        w.start()
                        turn.callback(w.end)
                    for w in writers:
                        while len(w.took) < 8:
                            time.sleep(0.001)
                    since = time.monotonic_ns()
                    if ours:
                        options = ["--bitmap", f"b{n}", "--checkpoint", f"b{n + 1}"] if bitmaps else []
                        turn.backup(*devices, options=("--cow", DIR, *options))
                    else:
                        run("dmsetup", "suspend", names[0])
                        run("dmsetup", "resume", names[0])
                    taken.append(max(w.longest(since) for w in writers) // 1000)
                if bitmaps:
                    run(TOOL, "bitmap", "remove", names[0], f"b{n}")
        taken.sort()
        return {"value": taken[len(taken) // 2], "p95": taken[len(taken) * 95 // 100], "most": taken[-1]}
