# SPDX-License-Identifier: GPL-2.0-or-later
"""An image on block devices that can hold requests back, for as long as a test wants:
so what gets on meanwhile, and what does not, is no question of the machine's pace.
"""
import contextlib
import errno
import struct

from qcow2test import DM_SUSPEND_FLAG, DM_TABLE_STATUS, Dm, Io, Task, dm_ioctl, run, wait_for
from qcow2image import COPIED, OFFSET_MASK, SUBCLUSTERS, ZERO
from served import Script, Served

# Bits of all subclusters
ALL = (1 << SUBCLUSTERS) - 1


def state_of(dm):
    """live, suspended, or removed: what device-mapper itself says, also while the target
    is still being asked to stop."""
    try:
        flags = dm_ioctl(DM_TABLE_STATUS, dm.name).flags
    except OSError as e:
        if e.errno != errno.ENXIO:
            raise
        return "removed"
    return "suspended" if flags & DM_SUSPEND_FLAG else "live"


def lay(image, state, tables=None):
    """Give each cluster the state that a function of its number names; of the first tables
    only, if a number is given. As a whole table at a time, so that it is quick; for an
    image without any table."""
    per = image.cover // image.cluster
    if tables is None:
        tables = image.tables
    image.qemu_io(*(f"write -q -P 1 {t * image.cover} 512" for t in range(tables)))
    image.trim()
    for t, entry in enumerate(image.l1_entries()[:tables]):
        content = b""
        for n in range(t * per, min((t + 1) * per, -(-image.size // image.cluster))):
            what = state(n)
            first = n * image.cluster | COPIED if what == "data" else 0
            if image.extended:
                content += struct.pack(">QQ", first, {"data": ALL, "zero": ALL << 32, "unallocated": 0}[what])
            else:
                content += struct.pack(">Q", first | (ZERO if what == "zero" else 0))
        image.patch(entry & OFFSET_MASK, content)


class Disk(Served):
    """It also knows where FUA writes went."""

    def __init__(self, *arguments):
        self.fua_writes = []
        self.released = 0
        super().__init__(*arguments)

    def receive(self, sock, length):
        data = super().receive(sock, length)
        # Nothing but the head of a request is so short.
        if length == 28:
            kind, _, offset = struct.unpack_from(">I8sQ", data, 4)
            if kind >> 16 & 1:
                self.fua_writes.append(offset)
        return data

    def release(self, fail=False, most=None):
        """Let the oldest ones go, or all; not those that come in their place."""
        for _ in range(len(self.held) if most is None else most):
            self.answer(*self.held.pop(0), errno.EIO if fail else 0)
            self.released += 1


class Patient(Io):
    """An open device whose requests are not waited for for ever: what holds them back would
    not be taken away else."""
    HANG = 240      # seconds; more than anything that a test holds back on purpose

    def do(self, function, *arguments):
        result = []
        Task(lambda: result.append(function(*arguments))).finish(self.HANG)
        return result[0]

    def read(self, offset, length):
        return self.do(super().read, offset, length)

    def write(self, offset, data):
        self.do(super().write, offset, data)

    def fsync(self):
        self.do(super().fsync)

    def discard(self, offset, length):
        self.do(super().discard, offset, length)


class Setup:
    """An image on two served devices."""

    def __init__(self, bench, size, state, *features, tables=None, fill=None, **options):
        """state, tables: see lay(); state None: the image stays as it was made. fill: byte
        that the data device is full of"""
        self.bench = bench
        run("modprobe", "nbd", "nbds_max=4", "max_part=0")
        self.image = image = bench.image(size, **options)
        if state:
            lay(image, state, tables)
        end = image.file_size()
        image.extend()
        self.size, self.unit = size, image.unit
        self.script = Script()
        self.script.name = lambda request: f"{request.op} {request.device}"
        self.meta = bench.add(Disk("metadata", 0, -(-image.file_size() // 4096) * 4096, self.script))
        self.data = bench.add(Disk("data", 1, size, self.script))
        with open(image.path, "rb") as f:
            content = f.read()
        self.meta.store[:len(content)] = content
        # Nobody may take that for a table.
        self.meta.store[end:] = b"J" * (len(self.meta.store) - end)
        if fill:
            self.data.store[:] = fill * size
        self.line = image.line(self.meta.path, self.data.path, *features)
        self.open()

    def open(self, *features):
        line = self.image.line(self.meta.path, self.data.path, *features) if features else self.line
        self.dm = self.bench.add(Dm("q", line))
        self.disk = self.bench.add(Patient(self.dm.path))

    @contextlib.contextmanager
    def holding(self, hold=None):
        """Note all requests, and hold those back of which a function says so. In the end
        all goes on, whatever has happened: nothing below may hang."""
        def decide(request):
            if not hold(request):
                return False
            self.decided += 1
            return True
        self.decided = self.meta.released = self.data.released = 0
        self.script.begin(None, None)
        self.script.hold = decide if hold else None
        try:
            yield
        finally:
            self.go()

    def go(self):
        """Hold nothing back any more; requests are still noted."""
        with self.script.lock:
            self.script.hold = None
        # The last one may not be in the list yet.
        wait_for("what is held back is there", 60, lambda: self.decided == sum(
            d.released + len(d.held) for d in (self.meta, self.data)))
        for served in (self.meta, self.data):
            served.release()

    def seen(self, op, device="data"):
        """The requests of a kind that were noted."""
        with self.script.lock:
            return [r for r in self.script.trace if (r.op, r.device) == (op, device)]

    def shut(self, leaks=False):
        """Close the device, and have QEMU look at the image."""
        self.bench.drop(self.disk)
        self.bench.drop(self.dm)
        self.save()
        self.image.check(leaks)

    def save(self):
        """The metadata as it is now, for QEMU and the image's functions."""
        with open(self.image.path, "wb") as f:
            f.write(self.meta.store)

    def status(self):
        return self.dm.status()
