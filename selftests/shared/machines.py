# SPDX-License-Identifier: GPL-2.0-or-later
"""Virtual machines on one network, which are told what to do through a virtio port.

Each is a run of selftests/vm/run. The network is made of sockets in the work folder: nothing of this
machine is set up for it. The storage has a cable to each host of its own.
"""
import base64
import contextlib
import os
import re
import signal
import socket
import subprocess
import time

HERE = os.path.dirname(os.path.realpath(__file__))
TOP = os.path.realpath(f"{HERE}/../..")
PATIENCE = int(os.environ.get("VM_PATIENCE", "1"))
# Of what never ends; nothing is judged by it
LIMIT = 400 * PATIENCE


class Failure(Exception):
    """A test has failed, and why."""


def expect(condition, message):
    if not condition:
        raise Failure(message)


class Machine:
    """A machine that has begun to boot. nics: (socket, whether it is this one that listens, address)"""

    def __init__(self, work, name, nics, disks=(), load=True):
        self.name, self.work = name, work
        self.nics = nics
        self.answers = b""
        self.boots = 0
        self.disks, self.load = disks, load
        self.process = self.port = None

    def path(self, what):
        return f"{self.work}/{self.name}.{self.boots}.{what}"

    def boot(self):
        self.boots += 1
        self.answers = b""
        args = ["-pidfile", self.path("pid"),
                "-chardev", f"socket,id=orders,path={self.path('orders')},server=on,wait=off",
                "-device", "virtserialport,chardev=orders,name=orders",
                "-chardev", f"file,id=record,path={self.path('record')}",
                "-device", "virtserialport,chardev=record,name=record"]
        setup = []
        for n, (path, listens, address) in enumerate(self.nics):
            args += ["-netdev", f"stream,id=net{n},server={'on' if listens else 'off'},addr.type=unix,addr.path={path}",
                     "-device", f"virtio-net-pci,netdev=net{n},mac=52:54:00:00:{ord(self.name[0]):02x}:{n:02x}"]
            setup.append(f"ip addr add {address}/24 dev eth{n} && ip link set eth{n} up")
        env = dict(os.environ, VM_QEMU_ARGS=" ".join(args), VM_DISKS=str(len(self.disks)), VM_CPUS="1", VM_MEM="768",
                   VM_DISK_SIZE=" ".join(self.disks) or "1M", VM_AGAIN="1")
        run = [f"{TOP}/selftests/vm/run", *(["--load"] if self.load else []), "--timeout", str(3600 * PATIENCE),
               "--log", self.path("log"), "--cmd",
               " && ".join(["modprobe virtio_net", *setup, f"exec {HERE}/agent orders"])]
        # Its own group: what ends this test is told it here, and takes them with it.
        with open(self.path("out"), "wb") as out:
            self.process = subprocess.Popen(["setpriv", "--pdeathsig", "TERM", *run], env=env, stdin=subprocess.DEVNULL,
                                            stdout=out, stderr=out, start_new_session=True)
        self.port = socket.socket(socket.AF_UNIX)
        self.port.settimeout(LIMIT)
        self.wait("its QEMU", lambda: self._connect() or self._ended())

    def _connect(self):
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
            self.port.connect(self.path("orders"))
            return True
        return False

    def _ended(self):
        if self.process.poll() is not None:
            with open(self.path("out"), encoding="utf-8", errors="replace") as out:
                raise Failure(f"{self.name} has ended: {out.read()[-3000:]}")

    @staticmethod
    def wait(what, done):
        end = time.monotonic() + LIMIT
        while not done():
            expect(time.monotonic() < end, f"{what}: not in {LIMIT} s")
            time.sleep(0.05)

    def ready(self):
        """It has booted."""
        expect(self._answer() == "- 0", "no greeting")
        return self

    def _answer(self):
        while b"\n" not in self.answers:
            try:
                more = self.port.recv(1 << 20)
            except TimeoutError as e:
                raise Failure(f"{self.name}: no answer") from e
            if not more:
                self.process.wait()
                self._ended()
            self.answers += more
        line, self.answers = self.answers.split(b"\n", 1)
        return line.decode()

    def order(self, command):
        """What it is to do; finish() has what came of it."""
        self.port.sendall(base64.b64encode(f"export PATH={TOP}/tools:$PATH\n{command}".encode()) + b"\n")

    def finish(self):
        text, status = self._answer().split()
        return int(status), base64.b64decode(text[1:]).decode(errors="replace")

    def try_sh(self, command):
        self.order(command)
        return self.finish()

    def sh(self, command):
        status, out = self.try_sh(command)
        if os.environ.get("SHARED_VERBOSE"):
            print(f"# {self.name}: {command}: {status}: {out.strip()}", flush=True)
        expect(status == 0, f"{self.name}: {command}: status {status}: {out.strip()}")
        return out

    def records(self):
        """The lines that have come through its other port, whole ones, also of former lives"""
        lines = []
        for n in range(1, self.boots + 1):
            with contextlib.suppress(FileNotFoundError), \
                 open(f"{self.work}/{self.name}.{n}.record", encoding="ascii") as f:
                lines += f.read().split("\n")[:-1]
        return [line.split() for line in lines]

    def share(self):
        """The folder that it sees as /run/vm"""
        with open(f"/proc/{self._pid()}/cmdline", encoding="utf-8") as f:
            return re.search(r"id=share,path=([^,]*),", f.read())[1]

    def _pid(self):
        with open(self.path("pid"), encoding="ascii") as f:
            return int(f.read())

    def die(self):
        """At once, as by a power cut"""
        os.kill(self._pid(), signal.SIGKILL)
        self.process.wait()
        self.port.close()
        self.process = None

    def end(self):
        """In order; its kernel's log must be clean then."""
        if self.process:
            self.port.close()
            self.process.terminate()
            self.process.wait()
            self.process = None
