#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Documentation/backup.rst and README.md about backups: each command as it stands there, in the order of
the page, and what comes of it.

What a page has in literal blocks: see pages.py.

Names are those of a scratch folder and of scratch devices: /srv/vm.qcow2, /dev/vg/vm, vm and so on, the same
ones everywhere. Before a command that begins a backup the disks are read, after it they are written to: copies,
and what is restored, are compared with what was.

Environment: SEED (printed, to repeat a run).
"""
import contextlib
import glob
import json
import os
import random
import re
import subprocess
import time

import qcow2test
from pages import blocks_of
from qcow2test import KIB, MIB, Failure, Io, Loop, blocks, expect, main, note, run, same, test

SEED = int(os.environ.get("SEED", time.time_ns() // 1000 % 1000000))
note(f"SEED={SEED}")
TOP = os.path.realpath(os.path.join(qcow2test.HERE, "../.."))
TOOL = f"{TOP}/tools/qcow2setup"
SIZE = 16 * MIB
# Of the pages: folders, which become some of the scratch folder, devices, and names
FOLDERS = ("/srv", "/backup", "/var/tmp", "/usr/local/sbin", "/etc/systemd/system", "/etc/libvirt/hooks")
DISKS = ("vm", "vm2", "db")
WORD = re.compile(rf"/dev/vg/(?P<device>\w+)|(?P<folder>{'|'.join(FOLDERS)})(?![\w-])|/run/(?P<socket>vm\.\w+)|"
                  rf"\b(?P<name>{'|'.join(DISKS)})\b")


def page():
    with open(f"{TOP}/Documentation/backup.rst", encoding="utf-8") as f:
        text = f.read()
    found = blocks_of(text)
    # Nothing is left out: all that is indented by a tab is in one of them.
    lines = sum(bool(line) for block in found for line in block.lines)
    expect(lines == sum(line.startswith("\t") and line != "\t" for line in text.splitlines()), "lines outside of all blocks")
    return found


class Machine:
    """What the pages speak of: disks, folders; and what is known of them"""

    def __init__(self, bench, *disks):
        self.bench, self.rng = bench, random.Random(SEED)
        self.device, self.known, self.was, self.counts = {}, {}, {}, {}
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
            self.sh(f"qcow2setup open /srv/{name}.qcow2 {name} --data-file /dev/vg/{name}")
            self.change(name)

    def here(self, text):
        """With what the names stand for"""
        def one(m):
            if m["device"]:
                return self.device[m["device"]]
            if m["folder"]:
                return self.bench.path("root" + m["folder"])
            if m["socket"]:
                return self.bench.path(m["socket"])
            return f"qcow2test{os.getpid()}-{m['name']}"
        return WORD.sub(one, text)

    def try_sh(self, command):
        """A line, as a shell takes it. Its output does not have to end before it does: there are servers."""
        with open(self.bench.path("output"), "w+b") as out:
            try:
                status = subprocess.run(["bash", "-c", self.here(command)], env=self.env, cwd=self.bench.dir, check=False,
                                        stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                                        timeout=qcow2test.COMMAND_TIMEOUT).returncode
            except subprocess.TimeoutExpired as e:
                raise Failure(f"{command}: no end") from e
            out.seek(0)
            return status, out.read().decode(errors="replace")

    def sh(self, command):
        status, out = self.try_sh(command)
        expect(status == 0, f"{command}: status {status}: {out.strip()}")
        return out

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

    # What is done besides, and what must have come of each command

    def begins(self, names):
        for name in names:
            self.was[name] = self.read(self.path(name))

    def begun(self, names, options):
        for name in names:
            self.change(name)
            if "--dirty-only" not in options:
                same(self.read(self.here(f"/dev/mapper/{name}-backup")), self.was[name], what=f"view of {name}")

    def copied(self, name, target, options):
        content = self.content(target)
        same(content, self.was[name], what=target)
        self.known[target] = content
        if "--increment-of" in options:
            size = blocks(self.here(target) + ".data")
            expect(0 < size < 6 * MIB, f"{target}: {size} bytes are an increment")

    def restored(self, copy, target):
        same(self.read(self.here(target)) if target.startswith("/dev/") else self.content(target), self.known[copy],
             what=f"{target}, from {copy}")

    def command(self, line):
        """One of the page, with all that belongs to it"""
        argv = line.split("#")[0].split()
        what = " ".join(argv[:3])
        self.counts[what] = self.counts.get(what, 0) + 1
        names = argv[3:next((n for n, word in enumerate(argv) if word.startswith("-")), len(argv))]
        if what == "qcow2setup backup begin":
            self.begins(names)
        out = self.sh(line)
        if what == "qcow2setup backup begin":
            self.begun(names, argv)
        elif what == "qcow2setup backup copy":
            self.copied(*names[:2], argv)
        elif what == "qcow2setup backup restore":
            self.restored(*names[:2])
        elif what == "qcow2setup backup end":
            expect(not any(self.here(name) in f for name in names for f in self.notes()), f"left: {self.notes()}")
        return out

    def close(self):
        if os.path.ismount(self.here("/srv/db")):
            run("umount", self.here("/srv/db"))
        names = run("dmsetup", "ls").split()
        for name in DISKS:
            if self.here(name) in names:
                self.sh(f"qcow2setup backup end {name}; qcow2setup close {name}")


# The page, section by section

def plain(m, found):
    for block in found:
        for line in block.lines:
            m.command(line)


def rest(m, found):
    """Restore: each is compared; and what others have written of it."""
    plain(m, found)
    same(m.content("/srv/converted.raw"), m.known["/backup/thursday.qcow2"], what="what qemu-img has restored")
    expect(m.counts["qcow2setup backup restore"] == 4, f"{m.counts}")


def others(m, found):
    """Backups with other programs"""
    out = {line: m.command(line) for block in found for line in block.lines}
    for path in ("/backup/vm-compressed.qcow2", "/backup/vm-saturday.raw"):
        same(m.content(path), m.was["vm"], what=path)
    m.known["/backup/vm-saturday.raw"] = m.was["vm"]

    def said(*words):
        (found,) = [text for line, text in out.items() if all(word in line for word in words)]
        return found
    (status,) = json.loads(said("status", "--json"))
    expect(status["valid"] and status["bitmaps"] == ["friday"] and status["checkpoint"] == "saturday", f"{status}")
    expect(os.path.basename(status["device"]) == m.here("vm-backup"), f"{status}")
    dirty = [(e["start"], e["length"]) for e in json.loads(said("extents")) if e["dirty"]]
    nbd = [[int(word) for word in line.split()[:3]] for line in said("nbdinfo").splitlines()]
    for e in (*((start, length) for start, length, kind in nbd if kind), None):
        expect(not e or any(d[0] <= e[0] and e[0] + e[1] <= d[0] + d[1] for d in joined(dirty)), f"{e}: {dirty}")
    expect(sum(d[1] for d in dirty) == sum(length for _, length, kind in nbd if kind) > 0, f"{dirty}: {nbd}")
    expect(sum(e["length"] for e in json.loads(said("qemu-img", "map"))) == SIZE, "qemu-img map")


def joined(extents):
    """Those that follow each other are one."""
    out = []
    for start, length in extents:
        if out and sum(out[-1]) == start:
            out[-1] = (out[-1][0], out[-1][1] + length)
        else:
            out.append((start, length))
    return out


def frozen(m, found):
    """Guests of QEMU: a file system that is mounted here"""
    run("mkfs.ext4", "-q", "-F", m.path("db"))
    (block,) = found
    begun = False
    for line in block.lines:
        # What "begin" has read of a disk that is mounted is not what it froze.
        m.sh(line)
        if line.startswith(("mount", "qcow2setup backup begin")):
            with open(m.here(f"/srv/db/{'after' if begun else 'before'}"), "w", encoding="ascii") as f:
                f.write("written" * 1000)
        begun = begun or "backup begin" in line
    copy = m.here("/backup/db-clean.raw")
    state = run("dumpe2fs", "-h", copy)
    expect(re.search(r"Filesystem state: *clean$", state, re.M) and "needs_recovery" not in state, state)
    run("e2fsck", "-fn", copy)
    names = run("debugfs", "-R", "ls -p /", copy)
    expect("/before/" in names and "/after/" not in names, names)
    expect(run("debugfs", "-R", "cat /before", copy).endswith("written" * 1000), "a file has no content")


def limited(m, found):
    """How much room is needed: more than there may be"""
    with contextlib.closing(Io(m.path("vm"))) as disk:
        disk.write(0, m.rng.randbytes(4 * MIB))
        plain(m, found)
        disk.write(0, m.rng.randbytes(4 * MIB))


def wrong(m, found):
    """When something goes wrong: the view is over; and later the host crashes"""
    over, again, crash = found
    out = m.command(over.lines[0])
    expect("over" in out, out)
    for name in ("copy", "extents"):
        status, out = m.try_sh(f"qcow2setup backup {name} vm " + "/backup/nothing.raw" * (name == "copy"))
        expect(status == 4 and "--failed" in out, f"{name}: {status}: {out}")
    expect(not os.path.exists(m.here("/backup/nothing.raw")), "a copy of a view that is over")
    for line in over.lines[1:] + again.lines:
        m.command(line)
    # A crash in the midst of a backup: what is in memory goes.
    m.command("qcow2setup backup begin vm --cow /var/tmp --bitmap monday --checkpoint tuesday")
    m.change("vm")
    for name in ("vm-backup", "vm"):
        run("dmsetup", "remove", m.here(name))
    for name in m.notes():
        os.unlink(f"/run/qcow2setup/{name}")
    for line in crash.lines:
        out = m.command(line)
        if "bitmap list" in line:
            expect("monday" in out and "tuesday" in out, out)


def pruned(m, found):
    """Old copies: what is put together is what it was."""
    plain(m, found)
    expect(not glob.glob(m.here("/backup/wednesday*")), f"{os.listdir(m.here('/backup'))}")
    same(m.content("/backup/vm.raw"), m.known["/backup/wednesday.qcow2"], what="wednesday's, which has become the first")
    same(m.content("/backup/thursday.qcow2"), m.known["/backup/thursday.qcow2"], what="thursday's")


SECTIONS = {
    "All of the disk": plain,
    "What has changed since": plain,
    "A chain of increments": plain,
    "Several disks": plain,
    "Restore": rest,
    "Backups with other programs": others,
    "Guests of QEMU": frozen,
    "How much room is needed": limited,
    "When something goes wrong": wrong,
    "Is it right?": plain,
    "Old copies": pruned,
}
# With tests of their own
FILES = ("Guests of libvirt", "Each night")


@test("Documentation/backup.rst: each command as it stands there", all_cpus=True)
def whole_page(bench):
    m = Machine(bench, "vm", "db")
    found = [block for block in page() if block.run and not block.file]
    titles = list(dict.fromkeys(block.section for block in found))
    expect(titles == list(SECTIONS), f"sections with commands: {titles}")
    for title, function in SECTIONS.items():
        m.change("vm")
        note(title)
        function(m, [block for block in found if block.section == title])
    note(f"{m.counts}")
    expect(m.counts["qcow2setup backup copy"] >= 8, f"{m.counts}")


def files(m, section):
    """Those of a section, as files; their paths"""
    found = [block for block in page() if block.section == section and block.file]
    for block in found:
        with open(m.here(block.file), "w", encoding="utf-8") as f:
            f.write(m.here("\n".join(block.lines) + "\n"))
        if block.lines[0].startswith("#!"):
            os.chmod(m.here(block.file), 0o755)
    return [block.file for block in found]


@test("Documentation/backup.rst: what is not run is marked, and little")
def marked(_):
    expect([b.section for b in page() if not b.run] == ["Guests of libvirt", "Each night"], "not run")
    expect({b.section for b in page() if b.file} == set(FILES), "files")


@test("Documentation/backup.rst: the hook for libvirt")
def hook(bench):
    m = Machine(bench, "vm")
    was = m.read(m.path("vm"))
    m.sh("qcow2setup close vm")
    (path,) = files(m, "Guests of libvirt")
    m.sh(f"{path} other prepare begin -; {path} vm start begin -; {path} other release end -")
    expect(m.here("vm") not in run("dmsetup", "ls"), "it is open")
    m.sh(f"{path} vm prepare begin -")
    same(m.read(m.path("vm")), was, what="disk")
    # The guest ends while a backup is under way.
    m.sh("qcow2setup backup begin vm --cow /var/tmp --checkpoint c")
    m.sh(f"{path} vm release end -")
    expect(m.here("vm") not in run("dmsetup", "ls") and not m.notes(), f"it is open, or there is {m.notes()}")


@test("Documentation/backup.rst: each night: a copy of all, what has changed, one that fails, one that is killed")
def nights(bench):
    m = Machine(bench, "vm")
    script, service, timer = files(m, "Each night")
    expect(script in m.sh(f"cat {service}").replace(m.here(script), script), "the service starts another program")
    day = bench.path("day")
    fault = bench.path("fault")
    for name, text in (("date", f'exec /bin/date -u -d "1970-01-04 + $(cat {day}) days" "$@"'),
                       ("qcow2setup", f"[ $2 != copy ] || [ ! -e {fault} ] || . {fault}\nexec {TOOL} \"$@\"")):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{m.bin}/{name}")
        with open(f"{m.bin}/{name}", "w", encoding="ascii") as f:
            f.write(f"#!/bin/sh\n{text}\n")
        os.chmod(f"{m.bin}/{name}", 0o755)
    # Day 0 is a sunday.
    for n, what in ((0, "all"), (1, "exit 4"), (2, "changed"), (3, "kill -9 $PPID; exit 1"), (4, "changed"),
                    (5, "kill $PPID; exit 1"), (7, "all")):
        with open(day, "w", encoding="ascii") as f:
            f.write(str(n))
        m.change("vm")
        was = m.read(m.path("vm"))
        good = what in ("all", "changed")
        if good:
            out = m.sh(f"{script} vm")
        else:
            with open(fault, "w", encoding="ascii") as f:
                f.write(what)
            status, out = m.try_sh(f"{script} vm")
            os.unlink(fault)
            expect(status, f"day {n}, {what}: {out}")
        if "-9" not in what:
            expect(not m.notes(), f"day {n}: a backup is left")
        if not good:
            continue
        bitmaps = json.loads(m.sh("qcow2setup bitmap list vm --json"))
        expect(len(bitmaps) == 1 and bitmaps[0]["recording"] and bitmaps[0]["name"].startswith("night-"), f"{bitmaps}")
        with open(m.here("/backup/nights/vm/last"), encoding="ascii") as f:
            last = f.read().strip()
        expect(last.endswith(".raw" if what == "all" else ".qcow2"), f"day {n}: {last}, not {what}")
        same(m.content_of(last), was, what=f"day {n}: {last}")
    for unit in (service, timer):
        # Instances of their own: a unit is judged by its name.
        path = m.here(unit).replace("@", "@vm")
        os.rename(m.here(unit), path)
        out = run("systemd-analyze", "verify", "--man=no", path)
        expect(not out.strip(), out)


@test("README.md: the backup of a disk that is in use")
def readme(bench):
    with open(f"{TOP}/README.md", encoding="utf-8") as f:
        section = f.read().split("### A backup while it is in use\n", 1)[1].split("\n### ", 1)[0]
    lines = [line.strip() for line in section.splitlines() if line.startswith("    ")]
    expect(lines and all(line.startswith("qcow2setup ") for line in lines), f"{lines}")
    m = Machine(bench, "vm")
    for line in lines:
        if "backup begin" in line:
            m.change("vm")
        m.command(line)
    note(f"{m.counts}")
    expect(set(m.counts) >= {f"qcow2setup backup {action}" for action in ("begin", "copy", "end", "restore")}, f"{m.counts}")


if __name__ == "__main__":
    main()
