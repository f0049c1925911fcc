# SPDX-License-Identifier: GPL-2.0-or-later
"""What is measured: devices of dm-qcow2, of its peers, and what is below them."""
import contextlib
import os
import subprocess
import time

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
TOP = os.environ["VM_TOP"]
TOOL = os.environ.get("BENCH_TOOL", f"{TOP}/tools/qcow2setup")
MODULE = os.environ.get("DM_QCOW2_KO", f"{TOP}/driver/dm-qcow2.ko")
# Where metadata lies, and whatever a peer must have in a file: loop devices on tmpfs.
DIR = "/dev/shm/bench"
NULLB = "/sys/kernel/config/nullb"
# Units of 64 KiB: the default of qcow2, and what the peers are given, too.
UNIT = 64 * KIB
SECTORS = UNIT // 512
# What is random is so in this range, all of which has been written.
WARM = 256 * MIB
OURS = "dm-qcow2"


class Missing(Exception):
    """A subject is not to be had here."""


def run(*argv):
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        raise Missing(f"{argv[0]}: {(done.stderr or done.stdout).strip()[-300:] or done.returncode}")
    return done.stdout.strip()


def put(path, value):
    with open(path, "w", encoding="ascii") as f:
        f.write(str(value))


def wait_for(path):
    for _ in range(1000):
        if os.path.exists(path):
            return path
        time.sleep(0.01)
    raise Missing(f"{path} does not come")


class Setup(contextlib.ExitStack):
    """What one subject consists of; taken down in reverse order."""
    count = 0

    @classmethod
    def number(cls):
        cls.count += 1
        return cls.count

    def null(self, size, **options):
        """A null_blk device, which does nothing, at once."""
        if not os.path.isdir(NULLB):
            run("modprobe", "null_blk", "nr_devices=0")
            if not os.path.isdir(NULLB):
                run("mount", "-t", "configfs", "none", "/sys/kernel/config")
        folder = f"{NULLB}/bench{self.number()}"
        os.mkdir(folder)
        self.callback(os.rmdir, folder)
        options = {"irqmode": 0, "queue_mode": 2, "submit_queues": len(os.sched_getaffinity(0)), **options}
        for name, value in {"size": -(-size // MIB), **options, "power": 1}.items():
            put(f"{folder}/{name}", value)
        # Named by its folder or by its number, depending on the kernel.
        with open(f"{folder}/index", encoding="ascii") as f:
            names = [f"/dev/{os.path.basename(folder)}", f"/dev/nullb{f.read().strip()}"]
        for _ in range(1000):
            for name in names:
                if os.path.exists(name):
                    return name
            time.sleep(0.01)
        raise Missing(f"{names} do not come")

    def file(self, size):
        path = f"{DIR}/file{self.number()}"
        with open(path, "wb") as f:
            f.truncate(size)
        self.callback(os.unlink, path)
        return path

    def loop(self, size=0, path=None, options=()):
        """A loop device; over a file of tmpfs, if there is none yet."""
        path = path or self.file(size)
        loop = run("losetup", "-f", "--show", *options, path)
        self.callback(run, "losetup", "-d", loop)
        return loop

    def dm(self, size, target, *modules):
        """A device-mapper device; size in bytes."""
        for module in modules:
            run("modprobe", module)
        return self.table(f"0 {size // 512} {target}")

    def table(self, table):
        name = f"bench{self.number()}"
        run("dmsetup", "create", name, "--table", table)
        self.callback(run, "dmsetup", "remove", "--retry", name)
        return wait_for(f"/dev/mapper/{name}")

    def image(self, size, data, *options):
        path = f"{DIR}/image{self.number()}.qcow2"
        run(TOOL, "create", path, "--data-file", data, "--size", str(size), *options)
        self.callback(os.unlink, path)
        return path

    def open(self, image, data, *options):
        name = f"bench{self.number()}"
        run(TOOL, "open", image, name, "--data-file", data, *options)
        self.callback(run, TOOL, "close", name)
        return wait_for(f"/dev/mapper/{name}")

    def qcow2(self, size, data, backing=None, raw=False, cluster=UNIT, bitmap=None):
        """A new image, opened as users do it. bitmap: the granularity of one that records."""
        recorded = ["--bitmap", f"b,granularity={bitmap}"] if bitmap else []
        below = ["--backing-file", backing] if backing else []
        image = self.image(size, data, "--cluster-size", str(cluster), *(["--backing-format", "raw"] if backing else []),
                           *below, *(["--data-file-raw"] if raw else []), *recorded)
        return self.open(image, data, *below)

    def view(self, device, cow, granularity=UNIT):
        """A view of an open dm-qcow2 device begins; the device that shows it."""
        name = os.path.basename(device)
        words = run("dmsetup", "table", name).split()
        features = words[12:] + ["view", cow, "view_granularity", str(granularity)]
        self.switch(name, " ".join([*words[:11], str(len(features)), *features]))
        view = f"bench{self.number()}"
        run("dmsetup", "create", view, "--readonly", "--table", f"0 {words[1]} qcow2-view {device} {cow}")
        self.callback(run, "dmsetup", "remove", "--retry", view)
        return wait_for(f"/dev/mapper/{view}")

    @staticmethod
    def switch(name, table):
        """Another table, as nothing is under way"""
        run("dmsetup", "suspend", name)
        run("dmsetup", "load", name, "--table", table)
        run("dmsetup", "resume", name)

    def backup(self, *devices, options=()):
        """As users begin it; what is kept goes to a device for each, or to a folder."""
        names = [os.path.basename(d) for d in devices]
        run(TOOL, "backup", "begin", *names, *options)
        self.callback(run, TOOL, "backup", "end", *names)
        return [wait_for(f"/dev/mapper/{name}-backup") for name in names]

    def daemon(self, ready, *argv):
        """Something that serves until it is told to end; ready: what is there then."""
        # pylint: disable=consider-using-with # it is ended by the stack
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

        def end():
            process.terminate()
            process.wait()
        self.callback(end)
        for _ in range(3000):
            if process.poll() is not None:
                raise Missing(f"{argv[0]}: {process.stderr.read().decode()[-300:]}")
            if ready():
                return
            time.sleep(0.01)
        raise Missing(f"{argv[0]} is not ready")


#
# Subjects: each gives the path of a block device. Those that allocate are as new; warm()
# writes all of what is used, where that is wanted.
#

def raw(s, size):
    return s.null(size)


def linear(s, size):
    return s.dm(size, f"linear {s.null(size)} 0")


def qcow2(s, size):
    return s.qcow2(size, s.null(size))


def qcow2_raw(s, size):
    return s.qcow2(size, s.null(size), raw=True)


def qcow2_bitmap(s, size):
    return s.qcow2(size, s.null(size), bitmap=UNIT)


def zero(s, size):
    return s.dm(size, "zero", "dm-zero")


def thin(s, size):
    pool_size = min(size, TIB)
    meta, data = s.loop(256 * MIB), s.null(pool_size)
    pool = s.dm(pool_size, f"thin-pool {meta} {data} {SECTORS} 0 1 skip_block_zeroing", "dm-thin-pool")
    run("dmsetup", "message", pool, "0", "create_thin 0")
    return s.dm(size, f"thin {pool} 0")


def thin_zeroing(s, size):
    meta, data = s.loop(256 * MIB), s.null(size)
    pool = s.dm(size, f"thin-pool {meta} {data} {SECTORS} 0", "dm-thin-pool")
    run("dmsetup", "message", pool, "0", "create_thin 0")
    return s.dm(size, f"thin {pool} 0")


def snapshot(s, size):
    # A header of zeros makes it a new one; reads of null_blk do not change the memory. What
    # it keeps comes with the chunks: a little more than these.
    head, n = MIB // 512, (size + size // 16) // 512
    cow = s.table(f"0 {head} linear {s.loop(MIB)} 0\n{head} {n - head} linear {s.null(n * 512)} {head}")
    return s.dm(size, f"snapshot {s.null(size)} {cow} P {SECTORS}", "dm-snapshot")


def qcow2_backing(s, size):
    return s.qcow2(size, s.null(size), backing=s.null(size))


def clone(s, size):
    return s.dm(size, f"clone {s.loop(64 * MIB)} {s.null(size)} {s.null(size)} {SECTORS} 1 no_hydration", "dm-clone")


def era(s, size):
    return s.dm(size, f"era {s.loop(64 * MIB)} {s.null(size)} {SECTORS}", "dm-era")


def loop_raw(s, size):
    return s.loop(size)


def image_for_qemu(s, size):
    image, data = f"{DIR}/image{s.number()}.qcow2", s.null(size)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={data},preallocation=metadata", image, str(size))
    s.callback(os.unlink, image)
    return image, data


def served_by_nbd(s, size, image, data):
    run("modprobe", "nbd")
    run("qemu-nbd", "-c", "/dev/nbd0", "--fork", "--aio=io_uring", "--image-opts",
        f"driver=qcow2,file.driver=file,file.filename={image},file.cache.direct=off,"
        f"data-file.driver=host_device,data-file.filename={data},data-file.cache.direct=on,data-file.aio=io_uring")
    s.callback(run, "qemu-nbd", "-d", "/dev/nbd0")
    for _ in range(1000):
        with open("/sys/block/nbd0/size", encoding="ascii") as f:
            if int(f.read()) == size // 512:
                return "/dev/nbd0"
        time.sleep(0.01)
    raise Missing("/dev/nbd0 does not get its size")


def qemu_nbd(s, size):
    return served_by_nbd(s, size, *image_for_qemu(s, size))


def qemu_nbd_bitmap(s, size):
    image, data = image_for_qemu(s, size)
    run("qemu-img", "bitmap", "--add", "-g", str(UNIT), image, "b")
    return served_by_nbd(s, size, image, data)


def fuse(s, size):
    run("modprobe", "fuse")
    image, data = image_for_qemu(s, size)
    export = s.file(0)
    s.daemon(lambda: os.path.ismount(export) or os.stat(export).st_size == size, "qemu-storage-daemon",
             "--blockdev", f"file,node-name=f,filename={image}",
             "--blockdev", f"host_device,node-name=d,filename={data},cache.direct=on,aio=io_uring",
             "--blockdev", "qcow2,node-name=q,file=f,data-file=d",
             "--export", f"fuse,id=e,node-name=q,mountpoint={export},writable=on")
    return s.loop(path=export, options=["--direct-io=on"])


def linear_cache(s, size):
    return s.dm(size, f"linear {s.null(size, memory_backed=1, cache_size=1)} 0")


def qcow2_cache(s, size):
    return s.qcow2(size, s.null(size, memory_backed=1, cache_size=1))


PEERS = {
    "dm-linear (cache)": linear_cache, "dm-qcow2 (cache)": qcow2_cache,
    "raw device": raw, "dm-linear": linear, "dm-qcow2": qcow2, "dm-qcow2 (raw)": qcow2_raw, "dm-zero": zero,
    "dm-qcow2 (bitmap)": qcow2_bitmap, "qemu-nbd (bitmap)": qemu_nbd_bitmap,
    "dm-thin": thin, "dm-thin (zeroing)": thin_zeroing, "dm-snapshot": snapshot, "dm-qcow2 (backing)": qcow2_backing,
    "dm-clone": clone, "dm-era": era, "loop": loop_raw, "qemu-nbd": qemu_nbd, "FUSE export": fuse,
}
