#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Little memory: writeback of a dirty file system, and swap, on the device.

What writes memory back must not need memory to get on. Both devices below are
disks of the test VM, for files would need memory themselves.
"""
import contextlib
import glob
import hashlib
import os
import re
import subprocess
import sys
import time

from qcow2test import KIB, MIB, Dm, Failure, Image, Node, drop_caches, expect, main, note, run, test, wait_for

SEED = int(os.environ.get("PRESSURE_SEED", "1"))
HANG = 300
CGROUP = "/run/qcow2test.cgroup"
# Writers to ext4, with its larger folios, are killed in 24 MiB by 7.3, on any disk.
SMALL = 24 * MIB if int(os.uname().release.split(".")[0]) < 7 else 48 * MIB


def scratch_disks():
    """The VM's disks, which may be overwritten."""
    found = {}
    for path in glob.glob("/sys/block/vd*/serial"):
        with open(path, encoding="ascii") as f:
            serial = f.read().strip()
        if serial.startswith("scratch"):
            found[serial] = "/dev/" + path.split("/")[3]
    return [found[s] for s in sorted(found)]


class Setup:
    """An image on two disks."""

    def __init__(self, bench, size, features=(), **options):
        disks = scratch_disks()
        expect(len(disks) >= 2, "two scratch disks are needed; see selftests/vm/README")
        self.bench = bench
        image = self.image = Image(bench, "image", size, **options)
        image.extend()
        room = -(-image.file_size() // MIB) * MIB
        os.truncate(image.path, room)
        self.meta = bench.add(Dm("meta", f"0 {room // 512} linear {disks[0]} 0"))
        self.data = bench.add(Dm("data", f"0 {size // 512} linear {disks[1]} 0"))
        run("dd", f"if={image.path}", f"of={self.meta.path}", "bs=1M", "oflag=direct", "conv=nocreat", "status=none")
        # What is there from before must not show.
        run("sh", "-c", f"yes POISON | dd of={self.data.path} bs=1M count=16 iflag=fullblock oflag=direct "
                        "conv=nocreat status=none")
        os.unlink(image.data)
        image.meta_loop, image.data_loop = Node(self.meta.path), Node(self.data.path)
        self.dm = image.open(*features)

    def finish(self):
        """Close it, and have QEMU look at it."""
        expect(self.dm.mode() == "rw", f"{self.dm.status()}")
        self.bench.drop(self.dm)
        os.unlink(self.image.path)
        os.symlink(self.meta.path, self.image.path)
        os.symlink(self.data.path, self.image.data)
        self.image.check()


class Cgroup:
    """A group of processes that get little memory."""

    def __init__(self, limit, swap=False):
        self.mounted = not os.path.ismount(CGROUP)
        if self.mounted:
            os.makedirs(CGROUP, exist_ok=True)
            run("mount", "-t", "cgroup2", "cgroup2", CGROUP)
        with open(f"{CGROUP}/cgroup.subtree_control", "w", encoding="ascii") as f:
            f.write("+memory")
        self.path = f"{CGROUP}/small"
        os.mkdir(self.path)
        self.set("memory.max", limit)
        self.set("memory.swap.max", "max" if swap else 0)

    def set(self, name, value):
        with contextlib.suppress(FileNotFoundError), open(f"{self.path}/{name}", "w", encoding="ascii") as f:
            f.write(str(value))

    def stat(self, name):
        with open(f"{self.path}/memory.stat", encoding="ascii") as f:
            return int(re.search(rf"^{name} (\d+)", f.read(), re.M)[1])

    def events(self, name):
        with open(f"{self.path}/memory.events", encoding="ascii") as f:
            return int(re.search(rf"^{name} (\d+)", f.read(), re.M)[1])

    def run(self, *argv):
        """A process in the group."""
        def enter():
            with open(f"{self.path}/cgroup.procs", "w", encoding="ascii") as f:
                f.write(str(os.getpid()))
        # pylint: disable=subprocess-popen-preexec-fn # no threads here
        return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=enter)

    def close(self):
        wait_for("the group is empty", HANG, self.gone)
        if self.mounted:
            run("umount", CGROUP)
            os.rmdir(CGROUP)

    def gone(self):
        try:
            os.rmdir(self.path)
        except OSError:
            return False
        return True


class ClassicLru:
    """Without the multi-generational LRU. The one of 6.12 kills writers in a small group
    because of dirty pages that it does not wait for, also on a disk of its own."""
    path = "/sys/kernel/mm/lru_gen/enabled"

    def __init__(self):
        self.before = None
        with contextlib.suppress(FileNotFoundError), open(self.path, "r+", encoding="ascii") as f:
            self.before = f.read().strip()
            f.write("n")

    def close(self):
        if self.before:
            with open(self.path, "w", encoding="ascii") as f:
                f.write(self.before)


def finished(process, what):
    """Wait for a process; its output."""
    try:
        out, _ = process.communicate(timeout=HANG)
    except subprocess.TimeoutExpired as e:
        process.kill()
        raise Failure(f"{what}: no end within {HANG} s") from e
    text = out.decode(errors="replace")
    expect(process.returncode == 0, f"{what}: status {process.returncode}: {text[-2000:]}")
    return text


class Hog:
    """All memory but some, locked."""
    CODE = ("import ctypes, mmap, sys, time\n"
            "size = int(sys.argv[1])\n"
            "m = mmap.mmap(-1, size)\n"
            "libc = ctypes.CDLL(None, use_errno=True)\n"
            "a = ctypes.addressof(ctypes.c_char.from_buffer(m))\n"
            "assert not libc.mlock(ctypes.c_void_p(a), ctypes.c_size_t(size))\n"
            "print('locked', flush=True)\n"
            "time.sleep(100000)\n")

    def __init__(self, leave):
        size = meminfo("MemAvailable") - leave
        expect(size > 0, "there is not that much memory")
        self.process = subprocess.Popen([sys.executable, "-c", self.CODE, str(size)], stdout=subprocess.PIPE)
        expect(self.process.stdout.readline() == b"locked\n", "memory cannot be locked")
        note(f"{size // MIB} MiB locked, {meminfo('MemAvailable') // MIB} MiB available")

    def close(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


def meminfo(name):
    with open("/proc/meminfo", encoding="ascii") as f:
        return int(re.search(rf"^{name}: *(\d+)", f.read(), re.M)[1]) * KIB


class Mount:
    def __init__(self, bench, device, kind="ext4"):
        self.path = bench.path("mnt")
        os.mkdir(self.path)
        run(f"mkfs.{kind}", "-q", device)
        run("mount", "-t", kind, device, self.path)

    def close(self):
        run("umount", self.path)


# Writes files at the same time with content that can be told, in pieces of any size;
# prints their checksums. Dirty pages come to far more than the memory that there is.
# Threads of one process: four interpreters alone would fill a group of 24 MiB with
# memory that no writeback gives back.
WRITER = r'''
import hashlib, os, random, sys, threading
size = int(sys.argv[1])
sums = {}
def write(path, seed):
    rng = random.Random(seed)
    block = rng.randbytes(1 << 20)
    digest = hashlib.sha256()
    with open(path, "wb", buffering=0) as f:
        done = 0
        while done < size:
            n = min(size - done, rng.choice((1000, 4096, 70000, 500000)))
            at = rng.randrange((1 << 20) - n)
            put = f.write(block[at:at + n])
            assert put == n, f"{put} of {n} bytes written"
            digest.update(block[at:at + n])
            done += n
        if seed % 2:
            os.fsync(f.fileno())
    sums[path] = digest.hexdigest()
files = [(path, int(seed)) for path, seed in zip(sys.argv[2::2], sys.argv[3::2])]
threads = [threading.Thread(target=write, args=file) for file in files]
for t in threads:
    t.start()
for t in threads:
    t.join()
for path, seed in files:
    print(sums[path])
'''


@test(f"writeback of a dirty file system in a group with {SMALL // MIB} MiB", SMALL, True, {"cluster": 4 * KIB})
@test("writeback of a dirty file system, all memory but 64 MiB is locked", 64 * MIB, False,
      {"cluster": 64 * KIB, "extended": True})
def writeback(bench, memory, small, options):
    s = Setup(bench, 256 * MIB, **options)
    mount = bench.add(Mount(bench, s.dm.path))
    size = 24 * MIB
    files = [(f"{mount.path}/f{n}", SEED * 100 + n) for n in range(4)]
    if small:
        bench.add(ClassicLru())
    group = bench.add(Cgroup(memory if small else "max"))
    hog = None if small else bench.add(Hog(memory))
    begun = time.monotonic()
    writer = group.run(sys.executable, "-c", WRITER, str(size),
                       *(str(word) for path, seed in files for word in (path, seed)))
    sums = finished(writer, "the writer").split()
    expect(len(sums) == len(files), f"{sums}")
    run("sync", timeout=HANG)
    took = time.monotonic() - begun
    if small:
        expect(group.events("max"), "the group never met its limit")
    if hog:
        bench.drop(hog)
    status = s.dm.status()
    expect(status.first_writes > 100, f"{status}")
    drop_caches(3)
    for (path, _), want in zip(files, sums):
        with open(path, "rb") as f:
            expect(hashlib.sha256(f.read()).hexdigest() == want, f"{path} is not what was written")
    note(f"{len(files) * size // MIB} MiB in {took:.1f} s; {status.first_writes} first writes, "
         f"{status.commits} commits, {status.drops} slices dropped")
    bench.drop(group)
    bench.drop(mount)
    s.finish()


# Fills far more memory than there is, changes parts of it, and looks at it again.
SWAPPER = r'''
import mmap, random, struct, sys
pages, seed = int(sys.argv[1]) // 4096, int(sys.argv[2])
rng = random.Random(seed)
filler = rng.randbytes(4080)
m = mmap.mmap(-1, pages * 4096)
version = [0] * pages
def put(n):
    m[n * 4096:n * 4096 + 4096] = struct.pack("<QQ", n ^ seed, version[n]) + filler
for n in range(pages):
    put(n)
for turn in range(2):
    for n in rng.sample(range(pages), pages // 4):
        version[n] += 1
        put(n)
    for n in range(pages):
        if m[n * 4096:n * 4096 + 4096] != struct.pack("<QQ", n ^ seed, version[n]) + filler:
            sys.exit(f"page {n} is wrong in turn {turn}")
print("right")
'''


class Swap:
    def __init__(self, device):
        self.device = device
        run("mkswap", device)
        run("swapon", "--discard", device)

    def close(self):
        run("swapoff", self.device, timeout=HANG)


@test("swap on the device", {"cluster": 4 * KIB})
@test("swap on the device, extended L2 entries, few slices in core",
      {"cluster": 64 * KIB, "extended": True, "features": ("cache_limit", "1")})
def swapping(bench, options):
    options = dict(options)
    s = Setup(bench, 256 * MIB, **options)
    swap = bench.add(Swap(s.dm.path))
    group = bench.add(Cgroup(24 * MIB, swap=True))
    begun = time.monotonic()
    processes = [group.run(sys.executable, "-c", SWAPPER, str(28 * MIB), str(SEED + n)) for n in range(2)]
    for process in processes:
        expect(finished(process, "a process that is swapped") == "right\n", "it did not say so")
    status = s.dm.status()
    note(f"56 MiB in 24 MiB of memory, {time.monotonic() - begun:.1f} s; {status.first_writes} first writes, "
         f"{status.commits} commits, {status.drops} slices dropped")
    expect(status.first_writes > 100, f"nothing was swapped: {status}")
    bench.drop(group)
    bench.drop(swap)
    s.finish()


if __name__ == "__main__":
    main()
