# SPDX-License-Identifier: GPL-2.0-or-later
"""Block devices that fail on demand: this process serves them from memory, so it
knows every request, and can fail any of them, once or from then on, hold it back, or
hang up.

Served is a network block device: requests come as they were made, and as many at a
time as there are, but each error is EIO to who made it. Fused is a loop device on a
file of a file system that this process serves, too: errors keep their kind.
"""
import collections
import ctypes
import errno
import fcntl
import functools
import os
import socket
import stat
import struct
import threading

from qcow2test import LIBC, Loop, Task, queue_limit, run, sysfs, wait_for

HANG = 120              # seconds; far more than anything here can take

Request = collections.namedtuple("Request", "device op offset length")


class Script:
    """What happens to requests. One for all devices of a rig."""
    # Ways to fail from then on: what the device still does, and the error of the rest
    WAYS = {"dead": ((), errno.EIO), "protected": (("read", "flush"), errno.EIO),
            "full": (("read", "flush"), errno.ENOSPC)}

    def __init__(self):
        self.lock = threading.Lock()
        self.gate = threading.RLock()   # who has it sees no change of what the devices hold
        self.name = None        # of a request: a function
        self.rest()

    def rest(self):
        """Serve everything, note nothing."""
        self.begin(None, None)
        self.noting = False

    def begin(self, nth, how, error=errno.EIO):
        """Note all requests. One of them fails, the nth = (name, number) of its kind, for
        some are made at the same time, and come in any order: once; or the device is
        dead from then on, takes no writes any more (protected; full), or is gone.
        refuse: a function that makes requests fail, too."""
        self.noting, self.nth, self.how, self.error = True, nth, how, error
        self.trace, self.failed, self.steps = [], [], {}
        self.step = self.dead = self.hold = self.refuse = None
        self.watch = None       # a function that is told of each write when it has been done
        # What a write that fails has done nevertheless: bytes of so many
        self.done = self.half if how == "dead" else self.none

    @staticmethod
    def none(_):
        return 0

    @staticmethod
    def half(length):
        return length // 1024 * 512

    @staticmethod
    def all(length):
        return length

    def kinds(self, requests):
        """What requests are, and how many like it came before."""
        count = collections.Counter()
        kinds = []
        for name in map(self.name, requests):
            kinds.append((name, count[name]))
            count[name] += 1
        return kinds

    def verdict(self, request):
        """"serve", "hold", "gone", or an errno"""
        with self.lock:
            if not self.noting:
                return "serve"
            self.trace.append(request)
            self.steps.setdefault(self.step, []).append(request)
            if self.hold and self.hold(request):
                return "hold"
            works, error = self.WAYS.get(self.how, ((), self.error))
            if self.nth and self.kinds(self.trace)[-1] == self.nth:
                self.dead = request.device if self.how != "once" else None
            elif self.refuse and self.refuse(request):
                error = self.error
            elif request.device != self.dead or self.dead is None or request.op in works:
                return "serve"
            self.failed.append((request, self.step))
            return "gone" if self.how == "gone" else error


class Served:
    """A network block device, and its server."""
    SET_SOCK, SET_BLKSIZE, DO_IT, CLEAR_SOCK, CLEAR_QUE, SET_BLOCKS, DISCONNECT, SET_FLAGS = (
        0xAB00, 0xAB01, 0xAB03, 0xAB04, 0xAB05, 0xAB07, 0xAB08, 0xAB0A)
    FLAGS, FUA = 1 | 4 | 32, 8      # flags are there; flush, trim
    OPS = ("read", "write", "disconnect", "flush", "discard")

    def __init__(self, name, number, size, script, fua=True):
        """fua: the device has FUA writes; else the block layer makes them of a flush"""
        self.name, self.script, self.size, self.fua = name, script, size, fua
        self.path = f"/dev/nbd{number}"
        self.load(b"")
        self.held = []
        self.fd = -1
        self.connect()

    def load(self, content):
        """Start with a content. A power cut would leave what is durable, and of the writes
        that are pending none, some or all."""
        self.store = bytearray(content) + bytes(self.size - len(content))
        self.durable, self.pending = bytearray(self.store), []

    def connect(self):
        ours, theirs = socket.socketpair()
        self.socket = ours
        self.gone = False
        self.fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        for request, value in ((self.SET_BLKSIZE, 512), (self.SET_BLOCKS, self.size // 512),
                               (self.SET_FLAGS, self.FLAGS | (self.FUA if self.fua else 0)),
                               (self.SET_SOCK, theirs.fileno())):
            fcntl.ioctl(self.fd, request, value)
        theirs.close()
        self.tasks = [Task(self.serve, ours), Task(self.attend, self.fd)]
        wait_for(f"{self.path} is connected", 20, lambda: queue_limit(self.path, "../size") == self.size // 512)
        # Each request is to be seen as it was made.
        with open(f"{sysfs(self.path)}/queue/nomerges", "w", encoding="ascii") as f:
            f.write("2")

    def attend(self, fd):
        """The driver wants a process that waits."""
        try:
            fcntl.ioctl(fd, self.DO_IT)
        except OSError:
            pass        # hung up
        # Requests that nobody will answer any more
        fcntl.ioctl(fd, self.CLEAR_SOCK)

    def receive(self, sock, length):
        data = bytearray()
        while len(data) < length:
            part = sock.recv(length - len(data))
            if not part:
                raise EOFError
            data += part
        return data

    def serve(self, sock):
        def reply(cookie, error, data):
            # Whatever the error is, the client takes it for EIO.
            sock.sendall(struct.pack(">II8s", 0x67446698, error, cookie) + data)
        try:
            while True:
                _, kind, cookie, offset, length = struct.unpack(">II8sQI", self.receive(sock, 28))
                op, fua = self.OPS[kind & 0xFFFF], bool(kind >> 16)
                if op == "disconnect":
                    return
                data = self.receive(sock, length) if op == "write" else b""
                if self.handle(op, offset, length, data, functools.partial(reply, cookie), fua) == "gone":
                    self.gone = True
                    sock.shutdown(socket.SHUT_RDWR)
                    return
        except (EOFError, OSError):
            pass

    def handle(self, op, offset, length, data, reply, fua=False):
        """Do what the script says of a request. reply(errno, data) answers it."""
        with self.script.gate:
            verdict = self.script.verdict(Request(self.name, op, offset, length))
            if verdict == "hold":
                self.held.append((op, offset, length, data, reply, fua))
            elif verdict != "gone":
                self.answer(op, offset, length, data, reply, fua, 0 if verdict == "serve" else verdict)
        return verdict

    def answer(self, op, offset, length, data, reply, fua, error=0):
        result = b""
        if op == "discard":
            data = b"\xdd" * length
        if error and op == "write":
            data = data[:self.script.done(length)]
        if op == "write" or (op == "discard" and not error):
            self.store[offset:offset + len(data)] = data
            if fua and not error:
                self.durable[offset:offset + len(data)] = data
                # Older writes have been there before, or will never be.
                for start, part in self.pending:
                    first, end = max(start, offset), min(start + len(part), offset + len(data))
                    if first < end:
                        part[first - start:end - start] = data[first - offset:end - offset]
            else:
                self.pending.append((offset, bytearray(data)))
            watch = self.script.watch
            if watch and op == "write":
                watch(Request(self.name, op, offset, length), data)
        elif op == "flush" and not error:
            for start, part in self.pending:
                self.durable[start:start + len(part)] = part
            self.pending.clear()
        elif op == "read" and not error:
            result = self.store[offset:offset + length]
        reply(error, result)

    def release(self, fail=False):
        """Let the requests go on that were held back."""
        while self.held:
            self.answer(*self.held.pop(0), errno.EIO if fail else 0)

    def close(self):
        if self.fd < 0:
            return
        if not self.gone:
            fcntl.ioctl(self.fd, self.DISCONNECT)
            self.socket.shutdown(socket.SHUT_RDWR)
        for task in self.tasks:
            task.finish(HANG)
        self.socket.close()
        os.close(self.fd)
        self.fd = -1
        self.held.clear()

    def again(self):
        """Plug it in again after it was gone."""
        self.close()
        self.connect()


class Fused(Served):
    """A loop device on the only file of a file system, and its server."""
    MAX_WRITE = 1 << 20
    INIT_FLAGS = 1 << 0 | 1 << 5 | 1 << 15 | 1 << 22    # async reads, big writes, async direct I/O, max_pages
    DIRECT_IO = 1
    PUNCH_HOLE = 2
    ROOT, FILE = 1, 2
    # Requests without an answer: forget, interrupt, batch forget
    SILENT = (2, 36, 42)

    def __init__(self, name, number, size, script, folder):
        self.folder = os.path.join(folder, f"fuse{number}")
        os.mkdir(self.folder)
        super().__init__(name, number, size, script, fua=False)

    def connect(self):
        self.gone = False
        self.fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        options = f"fd={self.fd},rootmode=40000,user_id=0,group_id=0"
        if LIBC.mount(b"qcow2test", self.folder.encode(), b"fuse", 0, options.encode()):
            raise OSError(ctypes.get_errno(), "mount")
        self.tasks = [Task(self.serve, self.fd)]
        self.loop = Loop(f"{self.folder}/disk", direct=True)
        self.path = self.loop.path
        with open(f"{sysfs(self.path)}/queue/nomerges", "w", encoding="ascii") as f:
            f.write("2")

    def serve(self, fd):
        while True:
            try:
                request = os.read(fd, self.MAX_WRITE + 4096)
            except OSError as e:
                if e.errno in (errno.EINTR, errno.ENOENT, errno.EAGAIN):
                    continue
                return      # ENODEV: it is unmounted
            _, op, unique, node = struct.unpack_from("<IIQQ", request)
            if op not in self.SILENT:
                self.operate(op, node, request[40:], functools.partial(self.respond, fd, unique))

    @staticmethod
    def respond(fd, unique, error, data):
        data = b"" if error else bytes(data)
        try:
            os.write(fd, struct.pack("<IiQ", 16 + len(data), -error, unique) + data)
        except OSError:
            pass        # nobody waits for it any more

    def attributes(self, node):
        mode = stat.S_IFDIR | 0o755 if node == self.ROOT else stat.S_IFREG | 0o600
        return struct.pack("<6Q10I", node, self.size if node == self.FILE else 0, 0, 0, 0, 0,
                           0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)

    def operate(self, op, node, body, reply):
        """Do a request of the kernel's, by linux/fuse.h."""
        if op in (15, 16):                              # read, write
            _, offset, length = struct.unpack_from("<QQI", body)
            if op == 15:
                self.handle("read", offset, length, b"", reply)
            else:
                self.handle("write", offset, length, body[40:40 + length],
                            lambda error, _: reply(error, struct.pack("<II", length, 0)))
        elif op == 20:                                  # fsync
            self.handle("flush", 0, 0, b"", reply)
        elif op == 43:                                  # fallocate
            _, offset, length, mode = struct.unpack_from("<QQQI", body)
            if mode & self.PUNCH_HOLE:
                self.handle("discard", offset, length, b"", reply)
            else:
                self.handle("write", offset, length, bytes(length), lambda error, _: reply(error, b""))
        elif op == 26:                                  # init
            major, _, readahead, flags = struct.unpack_from("<4I", body)
            reply(0, struct.pack("<4I2H2I2HI7I", major, 31, readahead, flags & self.INIT_FLAGS, 64, 48,
                                 self.MAX_WRITE, 1, self.MAX_WRITE // 4096, 0, 0, *[0] * 7))
        elif op == 1:                                   # lookup
            reply(0 if body == b"disk\0" else errno.ENOENT,
                  struct.pack("<4Q2I", self.FILE, 0, 3600, 3600, 0, 0) + self.attributes(self.FILE))
        elif op in (3, 4):                              # getattr, setattr
            reply(0, struct.pack("<Q2I", 3600, 0, 0) + self.attributes(node))
        elif op in (14, 27):                            # open, opendir
            reply(0, struct.pack("<Q2I", 0, self.DIRECT_IO, 0))
        elif op == 17:                                  # statfs
            reply(0, struct.pack("<5Q10I", 0, 0, 0, 0, 0, 512, 255, 512, *[0] * 7))
        elif op in (18, 25, 29, 38):                    # release, flush, releasedir, destroy
            reply(0, b"")
        else:
            reply(errno.ENOSYS, b"")

    def close(self):
        if self.fd < 0:
            return
        self.loop.close()
        # The loop device goes when its last user is gone.
        wait_for(f"{self.path} is free", HANG, lambda: not os.path.exists(f"{sysfs(self.path)}/loop"))
        run("umount", self.folder)
        for task in self.tasks:
            task.finish(HANG)
        os.close(self.fd)
        self.fd = -1
        self.held.clear()
