#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Documentation/troubleshooting.rst: each trouble is brought about, what the page shows is typed, what is printed is
compared, and then the disk is there again (documents.py says how a page is read).
"""
import contextlib
import os
import signal
import subprocess

import qcow2test
from documents import SIZE, Machine, blocks_of, compare, fails, page
from qcow2image import Qcow2
from qcow2test import MIB, Ext4, Failure, Io, Lower, drop_caches, expect, load_module, main, run, same, test, wait_for

OPEN = "qcow2setup open /srv/vm.qcow2 vm --data-file /dev/vg/vm"
DIRTY, CORRUPT = 1, 2


def blocks(title):
    """What is to be typed of a section"""
    found = [block for block in page("troubleshooting") if block.section == title and block.run]
    expect(found, f"no section {title}")
    return found


class Trouble(Machine):
    """A machine with a disk that is closed, and what is on it"""

    def __init__(self, bench):
        super().__init__(bench, "vm")
        self.there = self.read(self.path("vm"))
        self.sh("qcow2setup close vm")
        self.image = Qcow2(self.here("/srv/vm.qcow2"))

    def type_all(self, title):
        for block in blocks(title):
            self.type(block)

    def is_open(self, name="vm"):
        """It is, with all that was on it, and is written to."""
        same(self.read(self.path(name)), self.there, what=name)
        self.change(name)

    def marked(self, bit):
        self.image.set("incompatible_features", self.image.get("incompatible_features") | bit)


class Server:
    """qemu-nbd, which has the image open until it is killed"""

    def __init__(self, m):
        self.socket = m.bench.path("nbd")
        # pylint: disable-next=consider-using-with # close() ends it
        self.process = subprocess.Popen(["qemu-nbd", "-t", "-f", "qcow2", "-k", self.socket, m.image.path])
        m.bench.add(self)
        m.process = self.process.pid
        wait_for("qemu-nbd", 60, lambda: os.path.exists(self.socket))

    def ended(self):
        wait_for("end of qemu-nbd", 60, lambda: self.process.poll() is not None)

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def close(self):
        self.kill()


# It does not open

def first_look(m, title):
    m.open("vm")
    m.type_all(title)
    m.is_open()


def no_module(m, title):
    run("rmmod", "dm_qcow2")
    try:
        m.type_all(title)
    finally:
        missing = load_module()
        expect(not missing, missing)
    m.sh(OPEN)
    m.is_open()


def locked(m, title):
    server = Server(m)
    seen, stop = blocks(title)
    m.type(seen)
    m.type(stop)
    server.ended()
    m.sh(OPEN)
    m.is_open()


def name_in_use(m, title):
    m.open("vm")
    m.type_all(title)
    m.sh(OPEN)
    m.is_open()


def opens(m, title):
    """What is typed opens it in the end."""
    m.type_all(title)
    m.is_open()


def too_small(m, title):
    m.sh(f"head -c {SIZE} /dev/vg/vm > /srv/vm.raw; truncate -s 8M /srv/vm.raw")
    opens(m, title)


def ordinary(m, title):
    """The guest's content in an image of another kind"""
    m.sh("mv /srv/vm.qcow2 /srv/old.qcow2")
    with open(m.here("/srv/content"), "wb") as f:
        f.write(m.there)
    m.sh("qemu-img convert -f raw -O qcow2 /srv/content /srv/vm.qcow2")
    m.type_all(title)
    m.is_open("vm2")


def dirty(m, title):
    m.marked(DIRTY)
    opens(m, title)


def corrupt(m, title):
    m.marked(CORRUPT)
    opens(m, title)


def malformed(m, title):
    m.sh("qcow2setup bitmap add /srv/vm.qcow2 monday")
    with open(m.image.path, "r+b") as f:
        # The type of the first one in the directory, whose place is in the header's extension
        head = f.read(4096)
        place = head.index(b"\x23\x85\x28\x75") + 24
        f.seek(int.from_bytes(head[place:place + 8], "big") + 16)
        f.write(b"\x07")
    opens(m, title)


def small_folder(m):
    """/srv on a file system of its own; the image there is new, so that a first write needs a table"""
    m.fs = Ext4(m.bench, 8 * MIB)
    run("mount", "--bind", m.fs.path, m.here("/srv"))
    m.sh("qcow2setup create /srv/vm.qcow2 --data-file /dev/vg/vm")
    m.there = bytes(SIZE)


def fill(m):
    m.fs.fill()
    os.rename(f"{m.fs.path}/filler", f"{m.fs.path}/old.iso")


def no_space(m, title):
    small_folder(m)
    fill(m)
    opens(m, title)


# It is open, and does not work

def writes_fail(m, title):
    small_folder(m)
    m.open("vm", "--sparse")
    fill(m)
    m.type_all(title)
    m.change("vm")


def mode_ro(m, title):
    m.open("vm")
    with open(m.image.path, "r+b") as f:
        f.seek(m.image.l2_pos(0))
        f.write(bytes.fromhex("8000000000000200"))
        os.fsync(f.fileno())
    drop_caches(3)
    seen, save = blocks(title)
    m.type(seen)
    m.type(save)
    with open(m.here("/backup/saved.raw"), "rb") as f:
        got = f.read()
    same(got[:65536], bytes(65536), what="what cannot be read")
    same(got[65536:], m.there[65536:], what="what can be read")


def mode_fail(m, title):
    lower = Lower(m.bench, "lower", m.device["vm"])
    m.device["vm"] = lower.path
    m.open("vm")
    with contextlib.closing(Io(m.path("vm"))) as disk:
        lower.no_flush()
        disk.write(4 * MIB, bytes(range(256)) * 256)
        with qcow2test.fails_with(qcow2test.errno.EIO):
            disk.fsync()
    m.there = m.there[:4 * MIB] + bytes(range(256)) * 256 + m.there[4 * MIB + 65536:]
    save, again = blocks(title)
    m.type(save)
    with open(m.here("/backup/saved.raw"), "rb") as f:
        same(f.read(), m.there, what="what was saved")
    lower.good()
    m.type(again)
    # What was not flushed may be lost.
    same(m.read(m.path("vm"))[:4 * MIB], m.there[:4 * MIB], what="vm")
    m.change("vm")
    m.sh("qcow2setup close vm")
    m.bench.drop(lower)
    m.bench.drop(lower.dm)


def suspended(m, title):
    m.open("vm")
    m.sh("dmsetup suspend vm")
    m.type_all(title)
    m.is_open()


# It does not close

def in_use(m, title):
    mounted, partitions = blocks(title)
    m.open("vm")
    m.sh("mkfs.ext4 -q -F /dev/mapper/vm && mount /dev/mapper/vm /srv/db")
    try:
        m.type(mounted)
    finally:
        if os.path.ismount(m.here("/srv/db")):
            run("umount", m.here("/srv/db"))
    m.open("vm")
    m.sh("echo 'start=2048' | sfdisk --quiet --no-reread /dev/mapper/vm && kpartx -as /dev/mapper/vm")
    m.type(partitions)
    expect(m.here("vm") not in run("dmsetup", "ls"), "it is open")


def closed(m, title):
    """It is open as the section begins, if that closes it, and closed at its end."""
    m.type_all(title)
    expect(m.here("vm") not in run("dmsetup", "ls"), "it is open")


# After a crash or a power cut

def crash(m, title):
    """What a power cut leaves is what is on stable storage at some instant."""
    m.sh("qcow2setup bitmap add /srv/vm.qcow2 monday")
    m.open("vm")
    m.change("vm")
    m.sh("qcow2setup backup begin vm --cow /var/tmp")
    m.change("vm")
    with contextlib.closing(Io(m.path("vm"))) as disk:
        disk.fsync()
    m.there = m.read(m.path("vm"))
    m.sh("cp --sparse=always /srv/vm.qcow2 /srv/crashed && sync")
    for name in ("vm-backup", "vm"):
        run("dmsetup", "remove", m.here(name))
    for name in m.notes():
        os.unlink(f"/run/qcow2setup/{name}")
    m.sh("mv /srv/crashed /srv/vm.qcow2")
    m.type_all(title)
    m.is_open()


def inconsistent(m, title):
    m.sh("qcow2setup bitmap add /srv/vm.qcow2 monday")
    m.try_sh("qemu-io -f qcow2 -c 'sigraise 9' /srv/vm.qcow2")
    m.type_all(title)
    m.sh(OPEN)
    m.is_open()
    expect("tuesday" in m.sh("qcow2setup bitmap list vm"), "no new bitmap")


def view_over(m, title):
    m.sh("qcow2setup bitmap add /srv/vm.qcow2 monday")
    m.open("vm")
    # What is not allocated takes no room.
    with contextlib.closing(Io(m.path("vm"))) as disk:
        disk.write(0, m.rng.randbytes(4 * MIB))
    m.sh("qcow2setup backup begin vm --cow /var/tmp --size 1M --bitmap monday --checkpoint tuesday")
    with contextlib.closing(Io(m.path("vm"))) as disk:
        disk.write(0, m.rng.randbytes(4 * MIB))
    m.there = m.read(m.path("vm"))
    m.type_all(title)
    with open(m.here("/backup/vm.raw"), "rb") as f:
        same(f.read(), m.there, what="copy")
    m.is_open()


SECTIONS = {
    "Troubleshooting": first_look,
    "The module is not there": no_module,
    "Somebody else has the image": locked,
    "The name is in use": name_in_use,
    "The data is not named, or not there": opens,
    "The data is too small": too_small,
    "The image has no external data file": ordinary,
    "The image is marked dirty": dirty,
    "The image is marked corrupt": corrupt,
    "Bitmaps are malformed": malformed,
    "There is no space for metadata": no_space,
    "Writes fail: no space": writes_fail,
    "Reads fail, and the mode is ro": mode_ro,
    "Flushes fail, and the mode is fail": mode_fail,
    "Everything hangs": suspended,
    "It is slow": first_look,
    "It cannot be mounted by its UUID": first_look,
    "It is in use": in_use,
    "Opening or closing takes half a minute": closed,
    "Is the image whole?": crash,
    "A bitmap is inconsistent": inconsistent,
    "A backup's view is over": view_over,
}


def section(bench, title):
    m = Trouble(bench)
    try:
        SECTIONS[title](m, title)
    finally:
        m.close()
        if os.path.ismount(m.here("/srv")):
            run("umount", m.here("/srv"))
            m.fs.close()


for _title in SECTIONS:
    test(f"Documentation/troubleshooting.rst: {_title}", _title)(section)


@test("Documentation/troubleshooting.rst: each section is tested, and what is not run is little, and marked")
def all_of_it(_):
    found = page("troubleshooting")
    expect(list(dict.fromkeys(b.section for b in found if b.run)) == list(SECTIONS), "sections with commands")
    expect([b.section for b in found if not b.run] == ["The module is not there", "Secure Boot does not want the module",
                                                        "Opening or closing takes half a minute"], "not run")


@test("how pages are compared: what is not as it is shown is found")
def comparison(_):
    for shown, out, good in ((["a", "b"], "a\nb\n", True), (["a"], "a\nb\n", False), (["a", "b"], "a\n", False),
                             (["a", "..."], "a\nb\n", True), (["...", "b"], "a\na\nb\n", True), (["..."], "", True),
                             (["...", "a"], "b\n", False), (["a...c"], "abc\n", True), (["a...c"], "abd\n", False),
                             (["a", "...", "b"], "a\nb\n", True), ([], "a\n", False), ([], "", True),
                             (["a.c"], "abc\n", False)):
        try:
            compare("command", shown, out)
        except Failure:
            expect(not good, f"{shown} is not found in {out!r}")
        else:
            expect(good, f"{shown} is found in {out!r}")
    session = blocks_of("T\n=\n\nx::\n\n\t# a \\\n\t  b\n\tout\n\t# c\n\ny (not run: z)::\n\n\td \\\n\t\te\n")
    expect([b.commands() for b in session] == [[["a b", ["out"]], ["c", []]], [["d e", None]]] and
           [b.run for b in session] == [True, False], f"{[b.commands() for b in session]}")
    expect(fails("X=1 a b", ["a: no"], "") and not fails("a b", ["b: no"], "") and fails("a", [], "echo $?"), "what fails")


if __name__ == "__main__":
    main()
