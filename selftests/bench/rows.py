# SPDX-License-Identifier: GPL-2.0-or-later
"""What is done with a device, and what that costs: kinds of rows."""
import json
import os
import shutil
import subprocess
import time

from peers import DIR, GIB, KIB, MIB, PEERS, SECTORS, TIB, TOOL, UNIT, WARM, Missing, Setup, put, run


def fio(device, rw, bs, requests=0, size=WARM, depth=32, fsync=0, seconds=0, jobs=1, offset=0):
    """The time that requests take, in milliseconds, and how many there were."""
    length = [f"--number_ios={requests}", "--io_size=1T"] if requests else []
    if seconds:
        length = ["--time_based", f"--runtime={seconds}"]
    out = run("fio", "--name=x", f"--filename={device}", "--direct=1", "--ioengine=io_uring", f"--iodepth={depth}",
              f"--rw={rw}", f"--bs={bs}", f"--size={size}", f"--offset={offset}", "--randrepeat=1", "--fallocate=none", f"--fsync={fsync}",
              "--allow_mounted_write=1", f"--numjobs={jobs}", "--group_reporting", "--thread",
              "--output-format=json", *length)
    job, = json.loads(out[out.index("{"):])["jobs"]
    if job["error"]:
        raise Missing(f"fio: {os.strerror(job['error'])}")
    part = job["read" if "read" in rw else "write"]
    return part["runtime"], part["total_ios"]


def warm(device, size=WARM):
    """Whatever it allocates is there, is on disk, and is in core."""
    fio(device, "write", "1M", size=size)
    os.sync()
    fio(device, "read", "1M", size=size)


CHEAP = ("raw device", "dm-linear", "dm-qcow2", "dm-qcow2 (raw)", "dm-qcow2 (bitmap)", "dm-linear (cache)", "dm-qcow2 (cache)")


class Row:
    """One kind of work."""
    unit = "instructions per request"
    clock = False

    def __init__(self, name, title, rw, bs, requests, subjects, cold=False, device=WARM, **options):
        self.name, self.title = name, title
        self.rw, self.bs, self.requests, self.subjects = rw, bs, requests, subjects
        self.cold, self.device, self.options = cold, device, options

    def figures(self, subjects):
        """What is found, one by one; or why it is not."""
        for subject in subjects:
            try:
                yield {"subject": subject, **self.figure(subject)}
            except (Missing, OSError, subprocess.TimeoutExpired) as e:
                yield {"subject": subject, "missing": str(e)}

    def figure(self, subject):
        # fio counts milliseconds: of what costs little there must be more.
        requests = self.requests if self.cold or subject in CHEAP else self.requests // 8
        with Setup() as s:
            device = PEERS[subject](s, self.device)
            if not self.cold:
                warm(device)
            ms, done = fio(device, self.rw, self.bs, requests, **self.options)
        # With flushes fio's count is not exact.
        if done < 0.99 * requests:
            raise Missing(f"only {done} of {requests} requests")
        return {"value": round(ms * 1e6 / done)}


class Marks(Row):
    """Writes to granules of which nothing is known yet, or that have changed already: all units are
    data, and their tables are in core."""
    PEERS = {"dm-qcow2 (dirty granules)": "dm-qcow2", "dm-qcow2 (clean granules)": "dm-qcow2",
             "dm-era (new era)": "dm-era", "qemu-nbd (bitmap)": "qemu-nbd (bitmap)"}

    def figure(self, subject):
        with Setup() as s:
            peer = self.PEERS[subject]
            device = PEERS[peer](s, self.device)
            warm(device, self.device)
            name = os.path.basename(device)
            if peer == "dm-era":
                run("dmsetup", "message", name, "0", "checkpoint")
            elif peer == "dm-qcow2":
                run(TOOL, "bitmap", "add", name, "b", "--granularity", str(UNIT))
                fio(device, "read", "1M", size=self.device)
            if "dirty" in subject:
                fio(device, "write", "1M", size=self.device)
            before = waits(name) if peer == "dm-qcow2" else 0
            ms, done = fio(device, self.rw, self.bs, self.requests if peer == "dm-qcow2" else self.requests // 4,
                           **self.options)
            more = {"mark waits": waits(name) - before} if peer == "dm-qcow2" else {}
        return {"value": round(ms * 1e6 / done), **more}


def waits(name):
    words = run("dmsetup", "status", name).split()
    return int(words[words.index("mark_waits") + 1])


def flushes(device):
    """That have got to a device"""
    with open(f"/sys/block/{os.path.basename(device)}/stat", encoding="ascii") as f:
        return int(f.read().split()[15])


class SlowMarks(Row):
    """Random writes to clean granules: each one, or all that wait together, cost a write and a flush
    of a metadata device that takes half a millisecond for each."""
    unit = "nanoseconds per request"
    HALF = 500000
    SUBJECTS = ["a write and a flush", "dm-qcow2 (1 at a time)", "dm-qcow2 (32 at a time)", "dm-qcow2 (beside fsync)"]

    def __init__(self, name, title):
        super().__init__(name, title, "randwrite", "4k", 512, self.SUBJECTS, device=16 * GIB)

    def figure(self, subject):
        with Setup() as s:
            meta = s.null(64 * MIB, memory_backed=1, cache_size=1, irqmode=2, completion_nsec=self.HALF)
            if subject == self.SUBJECTS[0]:
                ms, done = fio(meta, self.rw, self.bs, self.requests, depth=1, fsync=1, size=MIB)
                return {"value": round(ms * 1e6 / done)}
            data = s.null(self.device)
            run(TOOL, "create", meta, "--data-file", data, "--size", str(self.device), "--data-file-raw",
                "--overwrite-device", "--bitmap", f"b,granularity={UNIT}")
            device = s.open(meta, data)
            # Blocks of the bitmap are read; a granule of each is dirty then.
            fio(device, "write:1g", self.bs, 16, size=self.device, depth=1)
            many = "32" in subject
            if "fsync" in subject:
                s.daemon(lambda: True, "fio", "--name=y", f"--filename={device}", "--direct=1", "--rw=write", "--bs=4k",
                         "--size=4k", "--fsync=1", "--time_based", "--runtime=1h", "--allow_mounted_write=1")
            before = flushes(meta)
            ms, done = fio(device, self.rw, self.bs, self.requests * (16 if many else 1), size=self.device,
                           depth=32 if many else 1)
            return {"value": round(ms * 1e6 / done), "mark waits": waits(os.path.basename(device)),
                    "flushes": flushes(meta) - before}


class Cold(Row):
    """As long as slices have to be read, from a device that takes its time for it: each read the
    time of a request to a good SATA SSD, and its length at 500 MB/s."""
    unit = "nanoseconds per request"
    LATENCY, PER_BYTE, SLICE = 100000, 2, 64 * KIB

    def figure(self, subject):
        size = self.device
        with Setup() as s:
            data = s.null(size)
            if subject == "raw device":
                device = data
            else:
                cluster = self.options["cluster"]
                meta = s.null(size // cluster * 10 + 64 * MIB, memory_backed=1, irqmode=2,
                              completion_nsec=self.LATENCY + min(cluster, self.SLICE) * self.PER_BYTE)
                run(TOOL, "create", meta, "--data-file", data, "--size", str(size), "--cluster-size", str(cluster),
                    "--overwrite-device")
                device = s.open(meta, data)
                fio(device, "write", "1M", size=size)
                name = os.path.basename(device)
                # What is in core goes.
                run("dmsetup", "suspend", name)
                run("dmsetup", "resume", name)
            ms, done = fio(device, self.rw, self.bs, self.requests, size=size, depth=self.options["depth"])
        return {"value": round(ms * 1e6 / done)}


class Sizes(Row):
    """Images from small to as large as they come"""
    SIZES = {f"{n} {name}": n * unit for name, unit in (("GiB", GIB), ("TiB", TIB))
             for n in ((1, 8, 64, 512) if unit == GIB else (4, 64))}

    def __init__(self, name, title):
        super().__init__(name, title, "randread", "4k", 262144, list(self.SIZES))

    def measure(self, s, size, image, data):
        raise NotImplementedError

    def figure(self, subject):
        size = self.SIZES[subject]
        with Setup() as s:
            data = s.null(size)
            image = s.image(size, data)
            return self.measure(s, size, image, data)


class SizeHits(Sizes):
    def measure(self, s, size, image, data):
        device = s.open(image, data, "--sparse")
        for rw, bs in (("write", "1M"), ("read", "1M")):
            fio(device, rw, bs, size=WARM, offset=size - WARM)
        ms, done = fio(device, self.rw, self.bs, self.requests, offset=size - WARM)
        return {"value": round(ms * 1e6 / done)}


class SizeOpens(Sizes):
    """What the kernel does of it: reads of the metadata device, and the time."""
    unit = "nanoseconds"
    clock = True

    def measure(self, s, size, image, data):
        device = s.open(image, data, "--sparse")
        name = os.path.basename(device)
        line = run("dmsetup", "table", name)
        run("dmsetup", "suspend", name)
        major, minor = line.split()[3].split(":")
        stat = f"/sys/dev/block/{major}:{minor}/stat"

        def reads():
            with open(stat, encoding="ascii") as f:
                words = f.read().split()
            return int(words[0]), int(words[2]) * 512
        before, begun = reads(), time.monotonic_ns()
        run("dmsetup", "resume", name)
        took = time.monotonic_ns() - begun
        after = reads()
        return {"value": took, "reads": after[0] - before[0], "bytes": after[1] - before[1]}


class Idle(Row):
    """What the memory of the system lacks for each device that does nothing"""
    unit = "bytes per device"
    clock = True
    COUNT = 1000
    # Processes are dear in User Mode Linux: each makes or removes as many.
    AT_ONCE = 100
    # Each device has some threads, and kernels for few CPUs stop at 4,096 in all.
    THREADS = 32768

    def __init__(self, name, title):
        super().__init__(name, title, None, None, None,
                         ["dm-linear", "dm-snapshot", "dm-qcow2", "dm-qcow2 (read only)"])

    def below(self, s):
        """For all subjects: a data device, an image for each device, and what the table line says of it"""
        run("modprobe", "loop")
        with open("/proc/sys/kernel/pid_max", encoding="ascii") as f:
            threads = int(f.read())
        put("/proc/sys/kernel/pid_max", max(threads, self.THREADS))
        data = s.null(64 * GIB)
        first = s.image(64 * GIB, data)
        metas = []
        for _ in range(self.COUNT):
            path = f"{DIR}/image{s.number()}.qcow2"
            shutil.copyfile(first, path)
            s.callback(os.unlink, path)
            metas.append(s.loop(path=path))
        # Without feature arguments
        return data, metas, run(TOOL, "table", metas[0], "--data-file", data).split()[4:11]

    @staticmethod
    def memory():
        """What is gone, what the kernel's objects have of that, and what its stacks have; bytes"""
        put("/proc/sys/vm/drop_caches", 3)
        # What has been removed last goes a little later.
        time.sleep(5)
        with open("/proc/meminfo", encoding="ascii") as f:
            found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in f}
        return -found["MemAvailable"], found["SUnreclaim"], found["KernelStack"]

    @staticmethod
    def table(subject, meta, data, args):
        if subject == "dm-linear":
            return f"0 128 linear {meta} 0"
        if subject == "dm-snapshot":
            return f"0 {64 * GIB // 512} snapshot {data} {meta} N {SECTORS}"
        options = ["1", "read_only"] if subject == "dm-qcow2 (read only)" else []
        return " ".join([f"0 {64 * GIB // 512} qcow2 {meta}", *args, *options])

    @staticmethod
    def remove(names):
        there = [name for name in names if os.path.exists(f"/dev/mapper/{name}")]
        if there:
            run("dmsetup", "remove", "--retry", *there)

    def taken(self, subject, data, metas, args):
        if subject == "dm-snapshot":
            run("modprobe", "dm-snapshot")
        with Setup() as s:
            before = self.memory()
            for i in range(0, self.COUNT, self.AT_ONCE):
                names = {f"bench{s.number()}": meta for meta in metas[i:i + self.AT_ONCE]}
                s.callback(self.remove, names)
                run("dmsetup", "create", "--concise", ";".join(
                    f"{name},,,rw,{self.table(subject, meta, data, args)}" for name, meta in names.items()))
            total, slab, stacks = ((now - was) // self.COUNT for was, now in zip(before, self.memory()))
            return {"value": total, "slab": slab, "stacks": stacks, "devices": self.COUNT}

    def figures(self, subjects):
        with Setup() as s:
            try:
                below = self.below(s)
            except (Missing, OSError, subprocess.TimeoutExpired) as e:
                yield from ({"subject": subject, "missing": str(e)} for subject in subjects)
                return
            for subject in subjects:
                try:
                    yield {"subject": subject, **self.taken(subject, *below)}
                except (Missing, OSError, subprocess.TimeoutExpired) as e:
                    yield {"subject": subject, "missing": str(e)}


class Attach(Row):
    """What it takes to get a device, or to get rid of it, as a user does that; in turns"""
    unit = "microseconds (p50)"
    clock = True
    TIMES = 100
    WAYS = ("qcow2setup", "dmsetup and losetup")

    def __init__(self, name, title, devices):
        super().__init__(name, title, None, None, None,
                         [f"{way} {step}" for step in ("open", "close") for way in self.WAYS])
        self.devices = devices

    def figures(self, subjects):
        try:
            with Setup() as s:
                taken = self.taken(s)
        except (Missing, OSError) as e:
            yield from ({"subject": subject, "missing": str(e)} for subject in subjects)
            return
        for subject in subjects:
            found = sorted(taken[subject])
            yield {"subject": subject, "value": found[len(found) // 2], "p95": found[len(found) * 95 // 100]}

    def taken(self, s):
        """Microseconds of each time, by subject"""
        data = s.null(GIB)
        image = s.image(GIB, data)
        with Setup() as short:
            line = run(TOOL, "table", short.loop(path=image), "--data-file", data).split()
        if self.devices:
            image = s.loop(path=image)
        name = f"bench{s.number()}"
        taken = {subject: [] for subject in self.subjects}
        # Nobody is to search for his program.
        dmsetup, losetup = shutil.which("dmsetup"), shutil.which("losetup")

        def timed(subject, *commands):
            begun = time.monotonic_ns()
            said = [run(*c) for c in commands]
            taken[subject].append((time.monotonic_ns() - begun) // 1000)
            return said

        for _ in range(self.TIMES):
            ours, theirs = self.WAYS
            timed(f"{ours} open", (TOOL, "open", image, name, "--data-file", data))
            timed(f"{ours} close", (TOOL, "close", name))
            # The device's name is not known before: as a script does it
            begun = time.monotonic_ns()
            meta = image if self.devices else run(losetup, "-f", "--show", image)
            run(dmsetup, "create", name, "--table", " ".join([*line[:3], meta, *line[4:]]))
            taken[f"{theirs} open"].append((time.monotonic_ns() - begun) // 1000)
            timed(f"{theirs} close", (dmsetup, "remove", name), *([] if self.devices else [(losetup, "-d", meta)]))
        return taken


class Pairs(Row):
    """Warm devices, one after the other and again, so that all see the same machine"""
    unit = "requests a second"
    clock = True
    TURNS = 9

    def figures(self, subjects):
        jobs = len(os.sched_getaffinity(0))
        with Setup() as s:
            devices = {}
            for subject in subjects:
                try:
                    devices[subject] = PEERS[subject](s, WARM)
                    warm(devices[subject])
                except (Missing, OSError, subprocess.TimeoutExpired) as e:
                    devices.pop(subject, None)
                    yield {"subject": subject, "missing": str(e)}
            for turn in range(self.TURNS):
                for subject, device in devices.items():
                    ms, done = fio(device, self.rw, self.bs, depth=self.options["depth"], seconds=1, jobs=jobs)
                    yield {"subject": subject, "turn": turn, "cpus": jobs, "value": round(done * 1000 / ms)}
