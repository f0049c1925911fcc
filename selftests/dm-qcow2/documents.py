# SPDX-License-Identifier: GPL-2.0-or-later
"""Pages of Documentation as tests: what they show is typed, and what they say comes of it is compared.

What a page has in literal blocks: see pages.py.

Names are those of a scratch folder and of scratch devices: /srv/vm.qcow2, /dev/vg/vm, vm and so on, the same
ones everywhere, and process 4711 is whichever a test says.

Environment: SEED (printed, to repeat a run).
"""
import contextlib
import os
import random
import re
import subprocess
import time

import qcow2test
from pages import blocks_of
from qcow2test import MIB, Failure, Io, Loop, expect, note, run

SEED = int(os.environ.get("SEED", time.time_ns() // 1000 % 1000000))
note(f"SEED={SEED}")
TOP = os.path.realpath(os.path.join(qcow2test.HERE, "../.."))
TOOL = f"{TOP}/tools/qcow2setup"
SIZE = 16 * MIB
# Of the pages: folders, which become some of the scratch folder, devices, and names
FOLDERS = ("/srv", "/backup", "/var/tmp", "/usr/local/sbin", "/etc/systemd/system", "/etc/libvirt/hooks")
DISKS = ("vm", "vm2", "db")
WORD = re.compile(rf"/dev/vg/(?P<device>\w+)|(?P<folder>{'|'.join(FOLDERS)})(?![\w-])|/run/(?P<socket>vm\.\w+)|"
                  rf"(?P<process>\b4711\b)|\b(?P<name>{'|'.join(DISKS)})\b")



def page(name):
    """The blocks of Documentation/NAME.rst"""
    with open(f"{TOP}/Documentation/{name}.rst", encoding="utf-8") as f:
        text = f.read()
    found = blocks_of(text)
    # Nothing is left out: all that is indented by a tab is in one of them.
    lines = sum(bool(line) for block in found for line in block.lines)
    expect(lines == sum(line.startswith("\t") and line != "\t" for line in text.splitlines()), "lines outside of all blocks")
    return found


def fails(command, shown, following):
    """Does a page say that a command fails?"""
    program = next(word for word in command.split() if "=" not in word)
    return following == "echo $?" or bool(shown) and shown[-1].startswith(f"{program}: ")


def compare(command, shown, out):
    """What a page shows of a command's output, and what it is"""
    lines = out.splitlines()
    at, skip = 0, False
    for want in shown:
        if want.strip() == "...":
            skip = True
            continue
        pattern = re.compile(".*".join(map(re.escape, want.rstrip().split("..."))))
        while skip and at < len(lines) and not pattern.fullmatch(lines[at].rstrip()):
            at += 1
        expect(at < len(lines) and pattern.fullmatch(lines[at].rstrip()),
               f"{command}: the page has {want!r}, which is not there or not at its place in:\n{out}")
        at, skip = at + 1, False
    expect(skip or at == len(lines), f"{command}: the page shows not all of:\n{out}")


class Machine:
    """What the pages speak of: disks, folders; and what is known of them"""

    def __init__(self, bench, *disks):
        self.bench, self.rng = bench, random.Random(SEED)
        self.device, self.known, self.was, self.counts = {}, {}, {}, {}
        self.process, self.status = None, 0
        self.bin = bench.path("bin")
        for folder in [self.here(f) for f in FOLDERS] + [self.bin, self.here("/srv/db")]:
            os.makedirs(folder)
        os.symlink(TOOL, f"{self.bin}/qcow2setup")
        for name in DISKS:
            self.device[name] = bench.add(Loop(bench.file(f"{name}.data", SIZE))).path
        self.env = dict(os.environ, PATH=f"{self.bin}:{os.environ['PATH']}")
        bench.add(self)
        for name in disks:
            self.sh(f"qcow2setup create /srv/{name}.qcow2 --data-file /dev/vg/{name}")
            self.open(name)
            self.change(name)

    def open(self, name, options=""):
        self.sh(f"qcow2setup open /srv/{name}.qcow2 {name} --data-file /dev/vg/{name} {options}")

    def here(self, text):
        """With what the names stand for"""
        def one(m):
            if m["device"]:
                return self.device[m["device"]]
            if m["folder"]:
                return self.bench.path("root" + m["folder"])
            if m["socket"]:
                return self.bench.path(m["socket"])
            if m["process"]:
                return str(self.process)
            return f"qcow2test{os.getpid()}-{m['name']}"
        return WORD.sub(one, text)

    def try_sh(self, command, timeout=qcow2test.COMMAND_TIMEOUT):
        """A line, as a shell takes it. Its output does not have to end before it does: there are servers."""
        with open(self.bench.path("output"), "w+b") as out:
            try:
                # What "$?" is of, at its beginning
                line = f"(exit {self.status}); {self.here(command)}"
                status = subprocess.run(["bash", "-c", line], env=self.env, cwd=self.bench.dir, check=False,
                                        stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                                        timeout=timeout).returncode
            except subprocess.TimeoutExpired as e:
                raise Failure(f"{command}: no end") from e
            out.seek(0)
            self.status = status
            return status, out.read().decode(errors="replace")

    def sh(self, command, **options):
        status, out = self.try_sh(command, **options)
        expect(status == 0, f"{command}: status {status}: {out.strip()}")
        return out

    def type(self, block):
        """All of a block, as it stands there; the outputs"""
        commands = block.commands()
        outputs = []
        for (command, shown), (following, _) in zip(commands, commands[1:] + [("", None)]):
            status, out = self.try_sh(command)
            failed = fails(command, shown, following)
            expect(bool(status) == failed, f"{command}: status {status}: {out.strip()}")
            if shown is not None:
                compare(command, [self.here(line) for line in shown], out)
            outputs.append(out)
        return outputs

    def path(self, name):
        return self.here(f"/dev/mapper/{name}")

    def read(self, path):
        with contextlib.closing(Io(path, readonly=True)) as disk:
            return disk.read(0, SIZE)

    def change(self, name, most=2 * MIB):
        """Data here and there, zeros in the place of some"""
        with contextlib.closing(Io(self.path(name))) as disk:
            for _ in range(12):
                at = self.rng.randrange(most // 4096) * 4096
                disk.write(at, self.rng.randbytes(4096 * self.rng.randrange(1, 8)))
            disk.zero_out(self.rng.randrange(most // 4096) * 4096, 8192)

    def content(self, copy):
        return self.content_of(self.here(copy))

    def content_of(self, path):
        """What a copy says, by QEMU's opinion if it is an image"""
        if path.endswith(".qcow2"):
            raw = self.bench.path("raw")
            run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, raw)
            path = raw
        with open(path, "rb") as f:
            return f.read(SIZE + 1)

    def notes(self):
        return [f for f in os.listdir("/run/qcow2setup") if self.here("vm") in f or self.here("db") in f]

    def close(self):
        names = run("dmsetup", "ls").split()
        for name in DISKS:
            if self.here(name) in names:
                self.sh(f"qcow2setup backup end {name} --failed; qcow2setup close {name}")
