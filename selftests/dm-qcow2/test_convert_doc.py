#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Documentation/convert.rst: each command as it stands there, in the order of the page, and what comes of it.

The disks are written to while they are open; what is a plain disk afterwards has just that.
"""
import contextlib
import os
import random

from documents import SIZE, Machine, page
from qcow2test import KIB, MIB, Io, blocks, expect, main, note, same, test


def of_file(m, path):
    with open(m.here(path), "rb") as f:
        return f.read(SIZE + 1)


def fill(m, device):
    """A disk as it may have been before"""
    data = m.rng.randbytes(MIB) + bytes(MIB) + m.rng.randbytes(SIZE - 2 * MIB)
    with contextlib.closing(Io(m.here(device))) as disk:
        for at in range(0, SIZE, MIB):
            disk.write(at, data[at:at + MIB])
        disk.fsync()
    return data


def lines(m, found):
    """Each line, and the name of the device that it has opened, or closes"""
    for block in found:
        for line in block.lines:
            words = line.split()
            if words[:2] == ["qcow2setup", "close"]:
                yield "close", words[2]
            m.sh(line)
            if words[:2] in (["qcow2setup", "open"], ["qcow2setup", "clone"], ["qcow2setup", "reset"]):
                yield words[1], words[2 if words[1] == "reset" else 3]
            else:
                yield " ".join(words[:2]), None


def raw(m, found):
    """A disk that stays as it is: in both directions"""
    was = fill(m, "/dev/vg/vm")
    for what, _ in lines(m, found):
        if what == "open":
            same(m.read(m.path("vm")), was, what="the disk under dm-qcow2")
            same(m.read(m.here("/dev/vg/vm")), was, what="the disk itself")
            m.change("vm", SIZE)
            now = m.read(m.path("vm"))
            expect(now != was, "nothing was written")
    same(m.read(m.here("/dev/vg/vm")), now, what="the plain disk again")
    expect(not os.path.exists(m.here("/srv/vm.qcow2")), "the image is there")


def not_raw(m, found):
    """An image that is not raw, back to a disk"""
    fill(m, "/dev/vg/db")
    fill(m, "/dev/vg/vm")
    now = {}
    for what, name in lines(m, found):
        if what == "open":
            same(m.read(m.path(name)), now.get("db", bytes(SIZE)), what=f"{name}, which is new")
            m.change(name, SIZE)
            now[name] = m.read(m.path(name))
        elif what == "qemu-img convert":
            same(of_file(m, "/srv/db.raw"), now["db"], what="the plain disk")
    same(of_file(m, "/srv/db2.raw"), now["db"], what="what was imported")
    same(of_file(m, "/srv/db.raw"), now["vm"], what="the base, with what was committed")


def other(m, found):
    """An image of another format: with something in it"""
    fill(m, "/dev/vg/vm")
    for what, _ in lines(m, found):
        if what == "qemu-img create":
            m.sh("qemu-io -f qcow2 -c 'write -P 65 1M 64k' -c 'write -P 66 7M 1M' /srv/cloud.qcow2")
    want = bytearray(SIZE)
    want[MIB:MIB + 64 * KIB] = b"A" * 64 * KIB
    want[7 * MIB:8 * MIB] = b"B" * MIB
    same(of_file(m, "/srv/golden.raw"), bytes(want), what="what was imported")
    same(m.read(m.here("/dev/vg/vm")), bytes(want), what="the device")
    expect(blocks(m.here("/srv/golden.raw")) < 2 * MIB, "it is not sparse")


def clones(m, found):
    """Many disks of one"""
    base, now = of_file(m, "/srv/golden.raw"), {}
    for what, name in lines(m, found):
        if what in ("clone", "reset"):
            same(m.read(m.path(name)), base, what=f"{name}, which is new")
        elif what == "open":
            same(m.read(m.path(name)), now[name], what=f"{name}, as it was closed")
        if what in ("clone", "reset", "open"):
            m.change(name)
            now[name] = m.read(m.path(name))
    same(of_file(m, "/srv/golden.raw"), base, what="the base")
    expect(not any(m.here("vm") in name for name in os.listdir(m.here("/srv"))), f"left: {os.listdir(m.here('/srv'))}")


SECTIONS = {
    "A disk that stays as it is": raw,
    "An image that is not raw, back to a disk": not_raw,
    "An image of another format": other,
    "Many disks of one": clones,
}


@test("Documentation/convert.rst: each command as it stands there", all_cpus=True)
def whole_page(bench):
    m = Machine(bench)
    m.rng = random.Random(m.rng.random())
    found = page("convert")
    titles = list(dict.fromkeys(block.section for block in found))
    expect(titles == list(SECTIONS), f"sections with commands: {titles}")
    for title, function in SECTIONS.items():
        note(title)
        function(m, [block for block in found if block.section == title])


if __name__ == "__main__":
    main()
