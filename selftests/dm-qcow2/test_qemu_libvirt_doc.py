#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Documentation/qemu-libvirt.rst: each command line boots a guest from the device, libvirt's XML is what libvirt takes,
and makes of it what the page says, and images as KubeVirt and Incus make them are opened and given back
(documents.py says how a page is read).

The guest is bootsector.s.
"""
import contextlib
import json
import os
import subprocess

from documents import SIZE, Machine, page
from qcow2test import HERE, KIB, Io, expect, main, run, same, test

# A guest in an emulated machine has all the time that it needs.
LONG = 1800


def blocks(title):
    found = [block for block in page("qemu-libvirt") if block.section == title and block.run]
    expect(found, f"no section {title}")
    return found


def write_file(m, block):
    with open(m.here(block.file), "w", encoding="utf-8") as f:
        f.write(m.here("\n".join(block.lines) + "\n"))


class Booting(Machine):
    """With a disk that a guest boots from"""

    def __init__(self, bench):
        super().__init__(bench, "vm")
        self.boots = 0
        source, code = bench.path("guest.o"), bench.path("guest")
        run("as", "--32", "-o", source, os.path.join(HERE, "bootsector.s"))
        run("ld", "-m", "elf_i386", "--oformat", "binary", "-Ttext", "0x7c00", "-o", code, source)
        with open(code, "rb") as f, contextlib.closing(Io(self.path("vm"))) as disk:
            disk.write(0, f.read().ljust(4 * KIB, b"\0"))

    def mark(self):
        """What is written by a host: other words each time. In whole sectors of the device."""
        self.boots += 1
        text = f"boot{self.boots:4}".encode()
        with contextlib.closing(Io(self.path("vm"))) as disk:
            sectors = disk.read(0, 4 * KIB)
            disk.write(0, sectors[:512] + text.ljust(512, b"\0") + bytes(512) + sectors[3 * 512:])
        return text

    def boot(self, line):
        out = self.sh(line, timeout=LONG)
        expect("guest: done" in out and "guest: error" not in out, f"{line}: {out}")

    def wrote(self, text):
        got = self.read(self.path("vm"))[2 * 512:2 * 512 + 16]
        same(got, text + b"by guest", what="what the guest has written")


@test("Documentation/qemu-libvirt.rst: guests boot by each command line, from the device and from the image", all_cpus=True)
def guests(bench):
    m = Booting(bench)
    booted = 0
    for block in blocks("A guest of QEMU"):
        for line, _ in block.commands():
            if not line.startswith("qemu-system-x86_64"):
                m.sh(line)
                continue
            closed = "driver=qcow2" in line
            if closed:
                m.open("vm")
            text = m.mark()
            if closed:
                # Refused as long as the device is open
                status, out = m.try_sh(line)
                expect(status and "lock" in out, f"{line}: {out}")
                m.sh("qcow2setup close vm")
            m.boot(line)
            if closed:
                m.open("vm")
            m.wrote(text)
            booted += 1
    expect(booted == 4, f"{booted} guests")


class Libvirt:
    """A machine's virsh: libvirt's driver for QEMU in the program itself. It wants Debian's user for that, whom only the
    daemon's package makes."""

    def __init__(self, m):
        root = m.bench.path("libvirt")
        os.makedirs(f"{root}/etc")
        with open(f"{root}/etc/qemu.conf", "w", encoding="ascii") as f:
            f.write('user = "root"\ngroup = "root"\nsecurity_driver = "none"\n')
        m.env["LIBVIRT_DEFAULT_URI"] = f"qemu:///embed?root={root}"
        with open("/etc/passwd", encoding="utf-8") as f, open(f"{root}/passwd", "w", encoding="utf-8") as to:
            to.write(f.read() + "libvirt-qemu:x:64055:65534::/:/usr/sbin/nologin\n")
        with open("/etc/group", encoding="utf-8") as f, open(f"{root}/group", "w", encoding="utf-8") as to:
            to.write(f.read() + "libvirt-qemu:x:64055:\nkvm:x:64056:\n")
        with open(f"{m.bin}/virsh", "w", encoding="ascii") as f:
            f.write(f"#!/bin/sh\nexec unshare -m sh -c 'mount --bind {root}/passwd /etc/passwd && "
                    f"mount --bind {root}/group /etc/group && exec /usr/bin/virsh -q \"$@\"' - \"$@\" 2> {root}/log || "
                    f"{{ cat {root}/log; exit 1; }}\n")
        os.chmod(f"{m.bin}/virsh", 0o755)


@test("Documentation/qemu-libvirt.rst: libvirt takes the XML, and makes the command line of it")
def libvirt(bench):
    m = Machine(bench)
    Libvirt(m)
    xml, *sessions = blocks("A guest of libvirt")
    write_file(m, xml)
    expect([b.lines[0].split()[1] for b in sessions] == ["virt-xml-validate", "sed"], "sessions")
    for block in sessions:
        m.type(block)
    # Would it see a mistake?
    m.sh("sed -i 's/discard=/discords=/' /srv/vm.xml")
    status, out = m.try_sh("virt-xml-validate /srv/vm.xml domain")
    expect(status, f"wrong XML is taken: {out}")


@test("Documentation/qemu-libvirt.rst: the local volume of Kubernetes names the device")
def kubernetes(bench):
    m = Machine(bench)
    (block,) = blocks("Kubernetes")
    write_file(m, block)
    volume = json.loads(run("/usr/bin/python3", "-c", "import json, sys, yaml; "
                            "print(json.dumps(yaml.safe_load(open(sys.argv[1]))))", m.here(block.file)))
    spec = volume["spec"]
    expect(volume["kind"] == "PersistentVolume" and spec["volumeMode"] == "Block" and
           spec["local"]["path"] == m.here("/dev/mapper/vm") and spec["capacity"]["storage"] == f"{SIZE >> 20}Mi",
           f"{volume}")


def given_back(m, title, content):
    """The section's commands; the device is the disk, is written to, and QEMU takes the image as it is then."""
    first, *others = [b for b in blocks(title)]
    commands = [(b, c) for b in (first, *others) for c in b.commands()]
    for block in (first, *others):
        if any("close" in line for line, _ in block.commands()):
            (opening,) = [n for n, (line, _) in enumerate(block.commands()) if "close" in line]
            for line, _ in block.commands()[:opening]:
                m.sh(line)
            same(m.read(m.path("vm")), content, what="vm")
            m.change("vm")
            content = m.read(m.path("vm"))
            for line, _ in block.commands()[opening:]:
                m.sh(line)
        else:
            m.type(block)
    expect(any("check" in line for _, (line, _) in commands), "nobody has checked the image")
    raw = m.bench.path("raw")
    run("qemu-img", "convert", "-O", "raw", "--image-opts",
        m.here("driver=qcow2,file.filename=/srv/vm.qcow2,data-file.filename=/dev/vg/vm"), raw)
    with open(raw, "rb") as f:
        same(f.read(), content, what="the image by QEMU")
    same(m.read(m.device["vm"]), content, what="the raw disk")


def disk(m):
    """What is on it before"""
    content = m.rng.randbytes(SIZE)
    with contextlib.closing(Io(m.device["vm"])) as io:
        io.write(0, content)
    return content


@test("Documentation/qemu-libvirt.rst: an image as KubeVirt makes it is opened, and given back with its bitmap")
def kubevirt(bench):
    m = Machine(bench)
    content = disk(m)
    m.sh("truncate -s 1M /srv/vm.qcow2")
    talk = [{"execute": "qmp_capabilities"}]
    for node, driver, path in (("file", "file", m.here("/srv/vm.qcow2")), ("data", "host_device", m.device["vm"])):
        talk.append({"execute": "blockdev-add", "arguments": {"node-name": node, "driver": driver, "filename": path}})
    talk += [{"execute": "blockdev-create", "arguments": {"job-id": "create", "options": {
        "driver": "qcow2", "file": "file", "data-file": "data", "data-file-raw": True, "size": SIZE,
        "cluster-size": 256 * KIB}}}]
    with subprocess.Popen(["qemu-storage-daemon", "--chardev", "stdio,id=c", "--monitor", "chardev=c"],
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as daemon:
        for request in talk:
            daemon.stdin.write(json.dumps(request) + "\n")
        daemon.stdin.flush()
        said = ""
        while '"concluded"' not in said:
            said = daemon.stdout.readline()
            expect(said and '"error"' not in said, f"qemu-storage-daemon: {said}")
        for request in ({"execute": "job-dismiss", "arguments": {"id": "create"}}, {"execute": "quit"}):
            daemon.stdin.write(json.dumps(request) + "\n")
        daemon.stdin.close()
        daemon.stdout.read()
    run("qemu-img", "bitmap", "--add", "--image-opts",
        m.here("driver=qcow2,file.filename=/srv/vm.qcow2,data-file.filename=/dev/vg/vm"), "cbt")
    given_back(m, "Images of KubeVirt", content)
    expect("cbt" in m.sh("qcow2setup bitmap list /srv/vm.qcow2"), "the bitmap has gone")


@test("Documentation/qemu-libvirt.rst: an image as Incus makes it is opened, and given back")
def incus(bench):
    m = Machine(bench)
    content = disk(m)
    m.sh(f"truncate -s {SIZE} /srv/temporary && qemu-img create -q -f qcow2 "
         f"-o data_file=/srv/temporary,data_file_raw=on,preallocation=metadata /srv/vm.qcow2 {SIZE} && rm /srv/temporary")
    given_back(m, "Images of Incus", content)


@test("Documentation/qemu-libvirt.rst: what is not run is marked, and little")
def marked(_):
    found = page("qemu-libvirt")
    expect([b.section for b in found if not b.run] == ["A guest of libvirt", "Images that libvirt opens itself", "Kubernetes",
                                                        "Images of Incus"], "not run")
    expect([b.section for b in found if b.file] == ["A guest of libvirt", "Kubernetes"], "files")
    expect(list(dict.fromkeys(b.section for b in found if b.run)) == [
        "QEMU, libvirt, and what is above them", "A guest of QEMU", "A guest of libvirt", "Kubernetes", "Images of KubeVirt",
        "Images of Incus"], "sections with commands")


if __name__ == "__main__":
    main()
