#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""qcow2setup backup of the disk of a virtual machine that is running, and that sees nothing of
it: no error, and its discards reach the disk as before. (QEMU stops discarding for good
after one refusal.)

The guest is the kernel of this machine with busybox, in QEMU without hardware virtualisation.

Environment: VM_KERNEL (the kernel's file, if it is not in /boot).
"""
import contextlib
import lzma
import os
import platform
import re
import shutil
import subprocess

import qcow2test
from qcow2test import KIB, MIB, Io, Stat, expect, main, note, run, same, test, wait_for
from test_backup import Backup, nothing_left
from test_checkpoint import TOOL, Opened

qcow2test.forget_tests()

SIZE = 8 * MIB
# A guest in an emulated machine has all the time that it needs.
LONG = 1800

WRONG = re.compile(r"guest: error|I/O error|Kernel panic|Oops")

# What it does in each round: data that it reads again, numbers on two blocks, the second one
# after the first one is on the disk, a discard, and zeros.
INIT = r"""#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t devtmpfs devtmpfs /dev
while read -r m; do
	$b insmod "$m" || echo "guest: error: insmod $m"
done < /modules/list
until [ -b /dev/vda ] && [ -b /dev/vdb ]; do
	$b usleep 100000
done
echo "guest: up"
$b dd if=/dev/urandom of=/data bs=64k count=1 2> /dev/null
n=0
until [ "$($b dd if=/dev/vdb bs=512 count=1 iflag=direct 2> /dev/null | $b cut -c 1-4)" = stop ]; do
	n=$((n + 1))
	at=$((n * 7 % 60 + 4))
	{ echo "round $n"; $b tail -c +100 /data; } > /new
	$b dd if=/new bs=64k of=/dev/vda seek=$at conv=notrunc,sync oflag=direct 2> /dev/null || echo "guest: error: write"
	$b dd if=/dev/vda bs=64k count=1 skip=$at iflag=direct 2> /dev/null | $b head -c 60000 > /read
	$b head -c 60000 /new | $b cmp - /read || echo "guest: error: it reads something else"
	for block in 0 1; do
		echo "number $n" | $b dd bs=4k of=/dev/vda seek=$block conv=notrunc,sync,fsync oflag=direct 2> /dev/null ||
			echo "guest: error: write"
	done
	$b blkdiscard -o $(((at * 3 % 60 + 4) * 65536)) -l 65536 /dev/vda || echo "guest: error: discard"
	$b dd if=/dev/zero bs=64k count=1 of=/dev/vda seek=$((at * 5 % 60 + 4)) conv=notrunc oflag=direct 2> /dev/null ||
		echo "guest: error: zeros"
	echo "guest: round $n"
done
echo "guest: sum $($b md5sum < /dev/vda)"
$b dmesg | $b grep -E "vda.*(error|fail)|(error|fail).*vda" | while read -r m; do
	echo "guest: error: $m"
done
echo "guest: the end"
$b poweroff -f
"""


def kernel():
    path = os.environ.get("VM_KERNEL") or f"/boot/vmlinuz-{platform.release()}"
    expect(os.path.exists(path), f"there is no {path}; name the guest's kernel with VM_KERNEL=")
    return path


def initramfs(bench):
    """Its path: busybox, the modules for a disk, and what is above"""
    root = bench.path("initramfs")
    for folder in ("bin", "dev", "proc", "modules"):
        os.makedirs(f"{root}/{folder}")
    shutil.copy(shutil.which("busybox"), f"{root}/bin/busybox")
    with open(f"{root}/init", "w", encoding="ascii") as f:
        f.write(INIT)
    os.chmod(f"{root}/init", 0o755)
    names = []
    for module in ("virtio_pci", "virtio_blk"):
        for line in run("modprobe", "-S", platform.release(), "--show-depends", module).splitlines():
            kind, path = line.split()[:2]
            name = os.path.basename(path).removesuffix(".xz")
            if kind != "insmod" or name in names:
                continue
            with (lzma.open if path.endswith(".xz") else open)(path, "rb") as f, \
                    open(f"{root}/modules/{name}", "wb") as to:
                shutil.copyfileobj(f, to)
            names.append(name)
    with open(f"{root}/modules/list", "w", encoding="ascii") as f:
        f.writelines(f"/modules/{name}\n" for name in names)
    path = bench.path("initrd")
    run("sh", "-c", f"cd {root} && find . | cpio -o -H newc --quiet > {path}")
    return path


class Guest:
    """A machine that has the device for a disk, and another disk by which it is told to stop"""

    def __init__(self, bench, dm):
        self.log, self.control = bench.path("console"), bench.file("control", 64 * KIB)
        with open("/proc/cpuinfo", encoding="ascii") as f:
            bogomips = re.search(r"^bogomips\s*: ([0-9.]+)", f.read(), re.M).group(1)
        # As the machines of the tests: it cannot measure its clock if it has no time for it.
        append = ("console=ttyS0 loglevel=4 edd=off panic=-1 tsc=reliable no_timer_check mitigations=off nokaslr "
                  f"tsc_early_khz={round(float(bogomips) * 500)}")
        disk = "if=virtio,format=raw,cache=none,discard=unmap,detect-zeroes=unmap"
        # pylint: disable-next=consider-using-with # close() ends it
        self.qemu = subprocess.Popen(
            ["qemu-system-x86_64", "-machine", "pc,usb=off,graphics=off,vmport=off", "-accel", "tcg,thread=single",
             "-cpu", "qemu64", "-smp", "1", "-m", "160", "-nodefaults", "-no-user-config", "-display", "none",
             "-nic", "none", "-no-reboot", "-kernel", kernel(), "-initrd", initramfs(bench), "-append", append,
             "-serial", f"file:{self.log}", "-drive", f"file={dm.path},{disk}",
             "-drive", f"file={self.control},if=virtio,format=raw"],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        bench.add(self)

    def said(self):
        try:
            with open(self.log, encoding="utf-8", errors="replace") as f:
                return f.read()
        except FileNotFoundError:
            return ""

    def round(self):
        return max(map(int, re.findall(r"guest: round (\d+)\s", self.said())), default=0)

    def look(self):
        """It runs, and has seen no error."""
        text = self.said()
        expect(not WRONG.search(text), f"the guest: {text[-2000:]}")
        if self.qemu.poll() is not None:
            out = self.qemu.communicate()[0].decode(errors="replace")
            expect(False, f"QEMU ended with status {self.qemu.returncode}: {out}; the guest: {text[-2000:]}")

    def some(self, rounds=3):
        """Until it has begun and ended so many"""
        until = self.round() + rounds + 1

        def done():
            self.look()
            return self.round() >= until
        wait_for(f"round {until} of the guest", LONG, done)

    def stop(self):
        """Its sum of the disk"""
        with open(self.control, "r+b") as f:
            f.write(b"stop")
        wait_for("the guest's end", LONG, lambda: self.qemu.poll() is not None)
        text = self.said()
        expect(not WRONG.search(text) and "guest: the end" in text, f"the guest: {text[-2000:]}")
        expect(self.qemu.returncode == 0, f"QEMU ended with status {self.qemu.returncode}")
        return re.search(r"guest: sum ([0-9a-f]{32})", text).group(1)

    def close(self):
        if self.qemu.poll() is None:
            self.qemu.kill()
        self.qemu.wait()
        self.qemu.stdout.close()


def number(data, block):
    """What a round has written there"""
    found = re.match(rb"number (\d+)\n", data[block * 4096:(block + 1) * 4096])
    return int(found.group(1)) if found else 0


def numbers_of(path):
    with contextlib.closing(Io(path, readonly=True)) as disk:
        data = disk.read(0, 8192)
    return number(data, 0), number(data, 1)


@test("a machine that runs sees nothing of backups of its disk, and goes on with its discards", all_cpus=True)
def backed_up(bench):
    image = bench.image(SIZE, cluster=64 * KIB)
    dm = bench.add(Opened(image))
    stat = Stat(dm.path)
    guest = Guest(bench, dm)
    guest.some()
    target = bench.path("target")
    counts = [stat.discards]
    expect(counts[0], "the guest's discards do not reach the device")
    for n in range(3):
        changed = ("--bitmap", f"c{n - 1}") if n else ()
        _, before = numbers_of(dm.path)
        b = Backup(bench, [dm], *changed, "--checkpoint", f"c{n}")
        after, _ = numbers_of(dm.path)
        guest.some()
        counts.append(stat.discards)
        run(TOOL, "backup", "copy", dm.name, target, *changed)
        guest.some(1)
        view = b.view(dm)
        with open(target, "rb") as f:
            same(f.read(), view, what=f"copy {n}")
        # Of one instant: the second number is written when the first one is on the disk.
        first, second = number(view, 0), number(view, 1)
        expect(before <= second <= first <= second + 1 and first <= after,
               f"numbers {first} and {second}, of a time between rounds {before} and {after}")
        b.end()
        guest.some()
        counts.append(stat.discards)
    note(f"{guest.round()} rounds; discards before, during and after three backups: {counts}")
    expect(all(a < b for a, b in zip(counts, counts[1:])), f"there are no more discards: {counts}")
    want = guest.stop()
    bench.drop(guest)
    b = Backup(bench, [dm], "--bitmap", "c2", "--checkpoint", "last")
    run(TOOL, "backup", "copy", dm.name, target, "--bitmap", "c2")
    b.end()
    for path in target, dm.path:
        got = run("md5sum", path).split()[0]
        expect(got == want, f"{path}: {got}, the guest had {want}")
    with contextlib.closing(Io(dm.path, readonly=True)) as disk, open(target, "rb") as f:
        same(f.read(), disk.read(0, SIZE), what="copy, at rest")
    nothing_left(dm)
    bench.drop(dm)
    run("qemu-img", "check", "-q", image.path)


if __name__ == "__main__":
    main()
