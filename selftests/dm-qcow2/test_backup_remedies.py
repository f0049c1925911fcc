#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""The remedies that qcow2setup backup prints: each is provoked, done as it is printed, and then
what was refused works. Which there are, and who tests them, is in tools/tests/remedies.list.
"""
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys

import qcow2test
from qcow2test import KIB, MIB, Dm, Failure, Io, Loop, Lower, expect, load_module, main, note, run, same, test, wait_for
from test_backup import content, nothing_left
from test_checkpoint import TOOL, TOOLS, Opened, calls_of, injected

# Those of test_backup
qcow2test.forget_tests()

TESTS = os.path.join(TOOLS, "tests")
sys.path.insert(0, TESTS)
# pylint: disable=wrong-import-position # it is there now
import remedies     # noqa: E402

SIZE = 4 * MIB
RUN = "/run/qcow2setup"
SEEN = []


class Device(Opened):
    """One with some data, two bitmaps that record, and whose backup ends with it"""

    def __init__(self, bench, number=0):
        super().__init__(bench.image(SIZE, name=f"disk{number}"), name=f"remedy{number}")
        self.backup = f"{self.name}-backup"
        with contextlib.closing(Io(self.path)) as disk:
            disk.write(0, os.urandom(MIB))
        self.tool("bitmap add", "b0")
        self.tool("bitmap add", "b1")
        bench.add(self)

    def write(self, at=0):
        with contextlib.closing(Io(self.path)) as disk:
            disk.write(at, os.urandom(64 * KIB))

    def view(self):
        with contextlib.closing(Io(f"/dev/mapper/{self.backup}", readonly=True)) as disk:
            return disk.read(0, SIZE)

    def end(self, *options):
        run(TOOL, "backup", "end", self.name, *options)
        nothing_left(self)

    def close(self):
        run(TOOL, "backup", "end", self.name, ok=False)
        super().close()


class Disk:
    """A block device that can become larger"""

    def __init__(self, bench, name, size):
        self.file = bench.file(name, size)
        self.loop = bench.add(Loop(self.file))
        self.path = self.loop.path

    def enlarge(self, size):
        os.truncate(self.file, size)
        self.loop.resize()


def message(got, out, status, text, what):
    """The one line that is said"""
    expect(got == status and text in out, f"{what}: status {got}, not {status}, or no '{text}': {out}")
    expect(len(out.splitlines()) == 1, f"{what}: {out}")
    return out.strip()


def refused(status, text, *argv):
    got, out = run(TOOL, *argv, ok=False)
    return message(got, out, status, text, argv)


def tested(said):
    SEEN.append(said)


def works(said, *argv):
    """What was refused, with what was said to be done: that counts."""
    out = run(TOOL, *argv)
    tested(said)
    return out


def shell(command, ok=True):
    return run("bash", "-ec", f'qcow2setup() {{ {shlex.quote(TOOL)} "$@"; }}\n{command}', ok=ok)


def printed(said, words=None, ok=True):
    """Do the last command in what is said, with words for what stands for them."""
    (*_, command) = remedies.commands(said)
    for word, value in (words or {}).items():
        expect(word in command, f"no {word}: {command}")
        command = command.replace(word, shlex.quote(value))
    return shell(command, ok)


def usage(said, words, more=""):
    """The same with the usage, without what may be left out, and with more behind it"""
    command = re.sub(r" \[[^]]*\](\.\.\.)?", "", said.split("; usage: ")[1]).replace("...", "")
    for word, value in words.items():
        expect(word in command, f"no {word}: {command}")
        command = command.replace(word, value)
    tested(said)
    return shell(f"{command} {more}")


def option(said, number=0):
    """That the remedy names"""
    return re.findall(r"--[a-z-]+", said.split("; ", 1)[1])[number]


def folder_of(bench, name="folder"):
    os.makedirs(bench.path(name), exist_ok=True)
    return bench.path(name)


def gone(path):
    if os.path.exists(path):
        os.unlink(path)
    return path


class Served:
    """What backup serve has been told to do: it is served, and ends."""

    def __init__(self, bench):
        self.pid = bench.path("pid")
        self.options = ("--", "--fork", "--pid-file", self.pid)

    def see(self, uri):
        size = json.loads(run("nbdinfo", "--json", uri))["exports"][0]["export-size"]
        with open(self.pid, encoding="ascii") as f:
            pid = int(f.read())
        os.kill(pid, signal.SIGTERM)
        wait_for("the server's end", 60, lambda: not os.path.exists(f"/proc/{pid}"))
        expect(size == SIZE, f"{size} bytes are served")


@test("what has to be said of a backup that begins")
def words_of_begin(bench):
    dm, other = Device(bench), Device(bench, 1)
    folder, disk = folder_of(bench), Disk(bench, "cow", SIZE)
    begin = ("backup", "begin", dm.name)
    cow = ("--cow", folder)
    usage(refused(1, "of what", "backup", "begin", *cow), {"NAME": dm.name, "DEV|DIR": folder})
    dm.end()
    for place in (folder, disk.path):
        said = refused(1, "keeps what changes", *begin)
        works(said, *begin, option(said), place)
        dm.end()
    said = refused(1, "another one has to begin", *begin, *cow, "--bitmap", "b0")
    works(said, *begin, *cow, "--bitmap", "b0", option(said), "c0")
    dm.end()
    said = refused(1, "is about bitmaps", *begin, *cow, "--dirty-only", "--checkpoint", "c1")
    works(said, *begin, *cow, "--dirty-only", "--checkpoint", "c1", option(said), "b1")
    dm.end()
    said = refused(1, "leave it out for more", *begin, other.name, *cow, "--image", bench.path("image"))
    works(said, *begin, other.name, *cow)
    other.end()
    dm.end()
    said = refused(1, "name it once", *begin, dm.path, *cow)
    works(said, *begin, *cow)
    dm.end()


@test("what has to be said of a backup that is under way")
def words_of_others(bench):
    dm, folder, socket = Device(bench), folder_of(bench), bench.path("socket")
    said = refused(1, "is not known", "backup", "undo", dm.name)
    actions = re.findall(r"[a-z]+", re.sub(r"\b(backup|or)\b", "", said.split("; use ")[1]))
    expect({"begin", "end"} <= set(actions), said)
    for action in actions:
        _, out = run(TOOL, "backup", action, ok=False)
        expect("is not known" not in out, out)
    works(said, "backup", "begin", dm.name, "--cow", folder)
    was = dm.view()
    serve = ("backup", "serve", dm.name)
    server = Served(bench)
    unix, net = f"nbd+unix:///?socket={socket}", "nbd://localhost:10809"
    usage(refused(1, "of what", "backup", "serve"),
          {"NAME": dm.name, "--socket PATH|--listen HOST:PORT": f"--socket {socket}"}, " ".join(server.options))
    server.see(unix)
    for argv in ((), ("--socket", socket, "--listen", "localhost:10809")):
        said = refused(1, "have to find it", *serve, *argv)
        expect("HOST:PORT" in said and "PATH" in said, said)
        works(said, *serve, option(said), gone(socket), *server.options)
        server.see(unix)
        works(said, *serve, option(said, 1), "localhost:10809", *server.options)
        server.see(net)
    for bad in ("10809", "localhost", "localhost:", ":10809"):
        said = refused(1, "no HOST:PORT", *serve, "--listen", bad)
        works(said, *serve, "--listen", said.split(" such as ")[1], *server.options)
        server.see(net)
    more = ["--verbose"] * 16
    said = refused(1, "leave some out", *serve, "--socket", socket, "--", *more)
    most = int(re.search(r"more than (\d+)", said).group(1))
    more = (*server.options[1:], *more)[:most]
    works(said, *serve, "--socket", gone(socket), "--", *more)
    server.see(unix)
    target = bench.path("copy")
    for argv in ((), (target, target)):
        usage(refused(1, "usage", "backup", "copy", dm.name, *argv), {"NAME": dm.name, "TARGET": gone(target)})
        same(content(target, SIZE), was, what="copy")
    for argv in ((), (dm.name, "extra")):
        usage(refused(1, "usage", "backup", "extents", *argv), {"NAME": dm.name})
    usage(refused(1, "usage", "backup", "status", dm.name, "extra"), {})
    # Each action with an option of another one
    for action, wrong in (("status", ("--failed",)), ("extents", ("--cow", folder)), ("end", ("--json",))):
        said = refused(1, "takes no option", "backup", action, dm.name, *wrong)
        expect(wrong[0] in printed(said), said)
        works(said, "backup", action, dm.name)
    usage(refused(1, "of what", "backup", "end"), {"NAME": dm.name})
    nothing_left(dm)


@test("where what is kept cannot be")
def places(bench):
    dm, folder = Device(bench), folder_of(bench)
    begin = ("backup", "begin", dm.name, "--cow")
    elsewhere = bench.add(Loop(bench.file("elsewhere", SIZE))).path
    file = bench.file("file", SIZE)
    said = refused(4, "is a file", *begin, file)
    least = int(re.search(r"of at least (\d+)[.0]* MiB$", said).group(1)) * MIB
    expect(least == SIZE, said)
    for place in (folder, bench.add(Loop(bench.file("least", least))).path):
        works(said, *begin, place)
        dm.end()
    small = Disk(bench, "small", SIZE - 512)
    said = refused(4, "is smaller", *begin, small.path)
    works(said, *begin, elsewhere)
    dm.end()
    small.enlarge(SIZE)
    works(said, *begin, small.path)
    dm.end()
    above = bench.add(Dm("above", f"0 {SIZE // 512} linear {dm.path} 0"))
    said = refused(4, "would wait for itself", *begin, above.path)
    for place in (folder, elsewhere):
        works(said, *begin, place)
        dm.end()
    bench.drop(above)
    run("mkfs.ext4", "-q", "-F", dm.path)
    mount = folder_of(bench, "mnt")
    run("mount", "-t", "ext4", dm.path, mount)
    try:
        said = refused(4, "is on a file system", *begin, mount)
        for place in (folder, elsewhere):
            works(said, *begin, place)
            dm.end()
    finally:
        run("umount", mount)


@test("what is there already")
def there(bench):
    dm, folder = Device(bench), folder_of(bench)
    begin = ("backup", "begin", dm.name, "--cow", folder)
    plain = run("dmsetup", "table", dm.name)
    end = f"qcow2setup backup end {dm.name}"

    def taken(status, text, *argv):
        said = refused(status, text, *argv)
        expect(f"({end})" in said, said)
        return said

    # A backup
    run(TOOL, *begin)
    said = taken(5, "is under way", *begin)
    printed(said)
    works(said, *begin)
    said = taken(5, "is under way", "resize", dm.name, "--size", 2 * SIZE)
    printed(said)
    os.truncate(dm.image.data, 2 * SIZE)
    works(said, "resize", dm.name, "--size", 2 * SIZE)
    plain = run("dmsetup", "table", dm.name)
    run(TOOL, *begin)
    said = taken(5, "in use: a backup", "close", dm.name)
    printed(said)
    works(said, "close", dm.name)
    dm.open()
    # What is left of one, as the table has been changed by hand
    run(TOOL, *begin)
    run("dmsetup", "load", dm.name, "--table", plain)
    run("dmsetup", "suspend", dm.name)
    run("dmsetup", "resume", dm.name)
    said = taken(5, "a device of that name exists", *begin)
    printed(said)
    works(said, *begin)
    dm.end()
    # A device of somebody else's, which has to be removed, or renamed
    foreign = ("dmsetup", "create", dm.backup, "--table", "0 8 zero")
    run(*foreign)
    try:
        said = taken(5, "a device of that name exists", *begin)
        not_ours = message(*printed(said, ok=False), 4, "not made by", said)
        run("dmsetup", "remove", dm.backup)
        works(said, *begin)
        dm.end()
        run(*foreign)
        printed(not_ours, {"NEW": f"{dm.name}-mine"})
        works(not_ours, "backup", "end", dm.name)
        works(said, *begin)
        dm.end()
    finally:
        for name in (dm.backup, f"{dm.name}-mine"):
            run("dmsetup", "remove", name, ok=False)
    # An image, and what a tool that is killed as it ends leaves with it; or a file of somebody else's
    run(TOOL, *begin)
    left = [os.path.join(RUN, f) for f in os.listdir(RUN) if dm.name in f]
    expect(f"{RUN}/{dm.backup}.qcow2" in left and len(left) == 2, f"{left}")
    for path in left:
        shutil.copy(path, bench.path(os.path.basename(path)))
    dm.end()
    for path in left:
        shutil.copy(bench.path(os.path.basename(path)), path)
    said = taken(5, f"{dm.backup}.qcow2: exists", *begin)
    printed(said)
    works(said, *begin)
    dm.end()
    with open(f"{RUN}/{dm.backup}.qcow2", "wb"):
        pass
    said = taken(5, f"{dm.backup}.qcow2: exists", *begin)
    os.unlink(f"{RUN}/{dm.backup}.qcow2")
    works(said, *begin)
    dm.end()
    file = bench.file("file", 512)
    said = refused(5, "exists; remove it", *begin, "--image", file)
    works(said, *begin, option(said), bench.path("another"))
    dm.end()
    os.unlink(file)
    works(said, *begin, "--image", file)
    dm.end()


@test("what is no backup, or is over")
def none(bench):
    dm, folder, socket = Device(bench), folder_of(bench), bench.path("socket")
    server = Served(bench)
    actions = (("status", dm.name), ("extents", dm.name), ("copy", dm.name, bench.path("copy")),
               ("serve", dm.name, "--socket", socket, *server.options))

    def begun(action, said):
        works(said, "backup", *action)
        if action[0] == "serve":
            server.see(f"nbd+unix:///?socket={socket}")

    for action in actions:
        said = refused(4, "no backup of it", "backup", *action)
        printed(said, {"DEV|DIR": folder})
        begun(action, said)
        dm.end()
    os.unlink(bench.path("copy"))
    gone(socket)
    run(TOOL, "backup", "begin", dm.name, "--cow", folder, "--checkpoint", "c0")
    last = 0
    for action in actions[1:]:
        run("dmsetup", "message", dm.name, "0", "view_end")
        said = refused(4, "its view is over", "backup", *action)
        printed(said)
        nothing_left(dm)
        dm.write()
        run(TOOL, "backup", "begin", dm.name, "--cow", folder, "--bitmap", f"c{last}", "--checkpoint", f"c{last + 1}")
        last += 1
        begun(action, said)
    # Nothing of that history was lost.
    found = json.loads(run(TOOL, "backup", "extents", dm.name, "--bitmap", f"c{last - 1}", "--json"))
    expect(found[0]["start"] == 0 and found[0]["dirty"], f"{found}")
    dm.end()
    # What is no device of these
    linear = bench.add(Dm("linear", f"0 8 linear {bench.add(Loop(bench.file('linear', MIB))).path} 0"))
    for text, action, more in (("its target is linear", "begin", ("--cow", folder)), ("not a qcow2 device; ", "extents", ())):
        if action == "extents":
            run(TOOL, "backup", "begin", dm.name, "--cow", folder)
        said = refused(4, text, "backup", action, linear.name, *more)
        names = re.findall(r"^(\S+?):? ", printed(said), re.M)
        expect(dm.name in names and linear.name not in names, f"{said}: {names}")
        works(said, "backup", action, dm.name, *more)
        dm.end()


@test("what a copy meets")
def copies(bench):
    dm, folder, target = Device(bench), folder_of(bench), bench.path("target")
    copy = ("backup", "copy", dm.name)
    run(TOOL, "backup", "begin", dm.name, "--cow", folder, "--bitmap", "b0", "--checkpoint", "c0")
    was = dm.view()
    calls = calls_of(bench, dm, "backup copy", bench.path("counted"))

    def good(path=target):
        same(content(path, SIZE)[:SIZE], was, what=path)

    # One that was stopped: go on, remove it, or another name
    for way in range(3):
        status, out = injected(dm, {"INJECT_AT": calls - 1, "INJECT_SIGNAL": signal.SIGTERM}, "backup copy", target)
        expect(status and os.path.exists(f"{target}.qcow2setup-copy"), f"it was not stopped: {status}: {out}")
        said = refused(5, "exists; go on", *copy, target)
        if way == 1:
            os.unlink(target)
        path = bench.path("another-name") if way == 2 else target
        works(said, *copy, path, *((option(said),) if way == 0 else ()))
        good(path)
        gone(target)
    os.unlink(f"{target}.qcow2setup-copy")
    # A file that is no copy, or one that is complete
    for way in range(2):
        if not way:
            bench.file("target", SIZE)
        said = refused(5, "exists; remove it", *copy, target)
        if way:
            os.unlink(target)
        path = target if way else bench.path("one-more")
        works(said, *copy, path)
        good(path)
    # Nothing was stopped there, whatever is there
    notes = f"{target}.qcow2setup-copy"
    for what in (None, "", "garbage", f"{'1' * 32} {'2' * 16} 0\n", f"{'1' * 64} {'2' * 64} 0\n"):
        if what is not None:
            with open(notes, "w", encoding="ascii") as f:
                f.write(what)
        said = refused(4, "no copy of this backup was stopped", *copy, target, "--resume")
        if what:
            more = refused(5, "exists; remove it", *copy, target)
        os.unlink(target)
        works(said, *copy, target)
        if what:
            tested(more)
        good()
    # Nothing that could be brought up to date
    os.unlink(target)
    said = refused(4, "no such copy", *copy, target, "--bitmap", "b0")
    works(said, *copy, target)
    works(said, *copy, target, "--bitmap", "b0")
    good()
    # What is no copy of it
    large = bench.file("large", SIZE + 512)
    said = refused(4, "is larger", *copy, large, "--bitmap", "b0")
    works(said, *copy, target, "--bitmap", "b0")
    good()
    disk, another = Disk(bench, "small", SIZE - 512), Disk(bench, "another", SIZE)
    said = refused(4, "is smaller", *copy, disk.path, "--overwrite-device")
    works(said, *copy, another.path, "--overwrite-device")
    good(another.path)
    disk.enlarge(SIZE)
    works(said, *copy, disk.path, "--overwrite-device")
    good(disk.path)
    # One that somebody uses: a guest, for example
    # pylint: disable=consider-using-with # it is ended below
    process = subprocess.Popen(["bash", "-c", f"exec sleep 1000 < {another.path}"])
    try:
        wait_for("a user", 60, lambda: content(f"/proc/{process.pid}/comm", 99) == b"sleep\n")
        said = refused(5, "is in use: ", *copy, another.path, "--overwrite-device")
        os.kill(int(re.search(r"process (\d+) \(sleep\)", said).group(1)), signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    works(said, *copy, another.path, "--overwrite-device")
    # A disk that writes something else
    lower = Lower(bench, "bad", disk.path)
    n = SIZE // 512
    lower.dm.load(f"0 {n} flakey {disk.path} 0 0 3600 5 corrupt_bio_byte 100 w {was[99] ^ 1} 0")
    said = refused(4, "do not trust it", *copy, lower.path, "--overwrite-device", "--verify")
    works(said, *copy, bench.path("to-another-place"), "--verify")
    good(bench.path("to-another-place"))
    lower.good()
    dm.end()


@test("increments, and the way back")
def increments(bench):
    dm, folder = Device(bench), folder_of(bench)
    full, increment, target = (bench.path(name) for name in ("full", "increment", "target"))
    run(TOOL, "backup", "begin", dm.name, "--cow", folder, "--bitmap", "b0", "--checkpoint", "c0")
    was = dm.view()
    copy = ("backup", "copy", dm.name)
    run(TOOL, *copy, full)

    def good(path=target):
        same(content(path, SIZE)[:SIZE], was, what=path)
        if path == target:
            os.unlink(path)

    def none():
        for path in (increment, f"{increment}.data", f"{increment}.data.qcow2setup-copy"):
            gone(path)

    usage(refused(1, "usage", *copy, increment, full, "--increment-of", full),
          {"NAME": dm.name, "TARGET": increment}, f"--bitmap b0 --increment-of {full}")
    none()
    said = refused(1, "is of what has changed", *copy, increment, "--increment-of", full)
    works(said, *copy, increment, "--increment-of", full, option(said), "b0")
    said = refused(5, "exists; remove it", *copy, increment, "--increment-of", full, "--bitmap", "b0")
    works(said, *copy, bench.path("another-one"), "--increment-of", full, "--bitmap", "b0")
    none()
    works(said, *copy, increment, "--increment-of", full, "--bitmap", "b0")
    # Names that leave no room
    long = bench.dir + "/." * ((4092 - len(bench.dir) - 2) // 2) + "/x"
    said = refused(4, "name is too long; choose", *copy, long, "--increment-of", full, "--bitmap", "b0")
    none()
    works(said, *copy, increment, "--increment-of", full, "--bitmap", "b0")
    said = refused(4, "name is too long; use", "backup", "restore", f"{bench.dir}/{'./' * 2048}full", target)
    works(said, "backup", "restore", full, target)
    good()
    deep = bench.dir
    for _ in range(10):
        deep += "/" + "d" * 240
        os.makedirs(deep)
    shutil.copy(full, f"{deep}/full")
    dm.tool("bitmap add", "fine", "--granularity", "4K", "--disabled")
    dm.end()
    dm.tool("bitmap enable", "fine")
    dm.write()
    run(TOOL, "backup", "begin", dm.name, "--cow", folder, "--bitmap", "fine", "--checkpoint", "c1")
    was = dm.view()
    said = refused(4, "are too long", *copy, f"{deep}/increment", "--increment-of", f"{deep}/full", "--bitmap", "fine")
    none()
    works(said, *copy, increment, "--increment-of", full, "--bitmap", "fine")
    # Back
    restore = ("backup", "restore")
    usage(refused(1, "usage", *restore, increment), {"COPY": increment, "TARGET": target})
    good()
    apart = folder_of(bench, "apart")
    for name in ("increment", "increment.data"):
        shutil.move(bench.path(name), f"{apart}/{name}")
    said = refused(4, "not in the same folder", *restore, f"{apart}/increment", target)
    works(said, *restore, f"{apart}/increment", target, option(said))
    good()
    shutil.copy(full, f"{apart}/full")
    works(said, *restore, f"{apart}/increment", target)
    good()
    # One of no copy: it is a disk by itself.
    alone = bench.path("alone")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={alone}.data", alone, str(SIZE))
    run("qemu-io", "-f", "qcow2", "-c", f"write -P 7 0 {MIB}", alone)
    said = refused(4, "names no copy before it", *restore, alone, target)
    expect("use qemu-img convert" in said, said)
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", alone, target)
    tested(said)
    same(content(target, SIZE), b"\7" * MIB + bytes(SIZE - MIB), what="by qemu-img")
    os.unlink(target)
    # More than can be open at a time
    names = [bench.path(f"many{n:03}") for n in range(258)]
    shutil.copy(full, names[0])
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={names[2]}.data", "-u", "-b", names[1], "-F", "qcow2",
        names[2], str(SIZE))
    model = content(names[2], MIB)
    for n, path in enumerate(names[2:], 2):
        with open(path, "wb") as f:
            f.write(model.replace(b"many001", b"MANY").replace(b"many002", b"many%03d" % n).replace(
                b"MANY", b"many%03d" % (n - 1)))
        bench.file(f"many{n:03}.data", SIZE)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={names[1]}.data", "-u", "-b", names[0], "-F", "raw",
        names[1], str(SIZE))
    said = refused(4, "are one of the other", *restore, names[-1], target)
    expect("merge some with qemu-img commit" in said, said)
    run("qemu-img", "commit", "-q", "-f", "qcow2", "-b", names[-4], names[-1])
    run("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", names[-4], "-F", "qcow2", names[-1])
    works(said, *restore, names[-1], target)
    same(content(target, SIZE), content(full, SIZE), what="through very many")
    dm.end()


@test("how much is kept, and what is frozen")
def frozen(bench):
    dm, folder = Device(bench), folder_of(bench)
    begin = ("backup", "begin", dm.name, "--cow", folder)
    said = refused(1, "is too little", *begin, "--size", "4K")
    for size in re.search(r"such as (\S+), from (\S+) on", said).groups():
        works(said, *begin, "--size", size)
        dm.end()
    # An image on a file system of the other one
    large = bench.add(Opened(bench.image(32 * MIB, name="large"), name="large"))
    run("mkfs.ext4", "-q", "-F", large.path)
    mount = folder_of(bench, "mnt")
    run("mount", large.path, mount)
    try:
        above = Opened(bench.image(SIZE, name=f"{mount}/above"), name="above")
        try:
            both = ("backup", "begin", large.name, above.name, "--cow", folder)
            said = refused(4, "would wait for that when it is frozen", *both, "--freeze")
            works(said, *both)
            run(TOOL, "backup", "end", large.name, above.name)
            for name in (large.name, above.name):
                works(said, "backup", "begin", name, "--cow", folder, "--freeze")
                run(TOOL, "backup", "end", name)
        finally:
            run(TOOL, "close", above.name)
        # What is said goes to what is frozen
        command = f"qcow2setup backup begin {large.name} --cow {folder} --freeze"
        said = message(*shell(f"{command} > {mount}/log", ok=False), 4, "put that elsewhere", command)
        shell(f"{command} > {folder}/log")
        tested(said)
        run(TOOL, "backup", "end", large.name)
    finally:
        run("umount", mount)
    # One that another one is mounted over
    run("mkfs.ext4", "-q", "-F", dm.path)
    run("mount", dm.path, mount)
    run("mount", "-t", "tmpfs", "none", mount)
    try:
        said = refused(4, "mounted over the one to be frozen", *begin, "--freeze")
        works(said, *begin)
        dm.end()
        run("umount", mount)
        works(said, *begin, "--freeze")
        dm.end()
    finally:
        run("umount", mount)
    # One that cannot be frozen
    run("mkfs.minix", dm.path)
    run("mount", "-t", "minix", dm.path, mount)
    try:
        said = refused(4, "cannot be frozen", *begin, "--freeze")
        works(said, *begin)
        dm.end()
    finally:
        run("umount", mount)
    works(said, *begin, "--freeze")
    dm.end()


@test("a backup that cannot be ended")
def ends(bench):
    dm, folder = Device(bench), folder_of(bench)
    begin = ("backup", "begin", dm.name, "--cow", folder)
    view = f"/dev/mapper/{dm.backup}"
    run(TOOL, *begin)
    # pylint: disable=consider-using-with # it is ended below
    process = subprocess.Popen(["bash", "-c", f"exec sleep 1000 < {view}"])
    try:
        wait_for("a user", 60, lambda: content(f"/proc/{process.pid}/comm", 99) == b"sleep\n")
        said = refused(5, "is in use: ", "backup", "end", dm.name)
        os.kill(int(re.search(r"process (\d+) \(sleep\)", said).group(1)), signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    works(said, "backup", "end", dm.name)
    nothing_left(dm)
    run("mkfs.ext4", "-q", "-F", dm.path)
    run(TOOL, *begin)
    mount = folder_of(bench, "mnt")
    run("mount", "-t", "ext4", "-o", "ro,noload", view, mount)
    try:
        said = refused(5, f"mounted on {mount}", "backup", "end", dm.name)
    finally:
        run("umount", mount)
    works(said, "backup", "end", dm.name)
    nothing_left(dm)


@test("a backup that has failed, of a device that is closed")
def closed(bench):
    dm, folder = Device(bench), folder_of(bench)
    for way, bitmaps in ((0, ["b0", "b1"]), (1, ["a b;c", "d"])):
        if way:
            for name in bitmaps:
                dm.tool("bitmap add", name)
        dm.write(way * MIB)
        new = f"it's c{way}"
        run(TOOL, "backup", "begin", dm.name, "--cow", folder, "--checkpoint", new,
            *(w for name in bitmaps for w in ("--bitmap", name)))
        dm.write(2 * MIB)
        run("dmsetup", "remove", dm.backup)
        run(TOOL, "close", dm.name)
        said = refused(4, "is closed", "backup", "end", dm.name, "--failed")
        if way:
            printed(said, {"IMAGE": dm.image.path})
            works(said, "backup", "end", dm.name)
            dm.open()
            # Its table has no view, which was there as long as it was open.
        else:
            dm.open()
            works(said, "backup", "end", dm.name, "--failed")
        nothing_left(dm)
        found = [(e["start"], e["length"]) for e in dm.map(new) if not e["data"]]
        expect(found == [(way * MIB, 64 * KIB), (2 * MIB, 64 * KIB)], f"{new}: {found}")


@test("an image of a backup that is damaged")
def damaged(bench):
    dm, folder = Device(bench), folder_of(bench)
    begin = ("backup", "begin", dm.name, "--cow", folder)
    run(TOOL, *begin)
    path = f"{RUN}/{dm.backup}.qcow2"
    with open(path, "r+b", buffering=0) as f:
        # Where the L1 table is
        f.seek(40)
        f.write((1 << 40).to_bytes(8, "big"))
    said = refused(4, "see what qcow2setup check", "backup", "extents", dm.name)
    status, out = printed(said, ok=False)
    expect(status and "L1 table" in out, f"{status}: {out}")
    dm.end()
    run(TOOL, *begin)
    works(said, "backup", "extents", dm.name)
    dm.end()


class Meddler:
    """Somebody who replaces the table of a device by one without a view, at a call of the tool"""

    def __init__(self, bench, dm, *argv):
        self.dm, self.argv = dm, argv
        self.seen, self.script = bench.path("seen"), bench.path("change")
        table = run("dmsetup", "table", dm.name).strip()
        with open(self.script, "w", encoding="ascii") as f:
            f.write(f"""export DM_DISABLE_UDEV=1
                dmsetup load {dm.name} --table '{table}'
                dmsetup suspend {dm.name}
                dmsetup resume {dm.name}""")
        self.calls = calls_of(bench, dm, "backup begin", *argv)
        self.end()

    def begin(self, k, command):
        status, out = injected(self.dm, {"INJECT_AT": k, "INJECT_SENDS": 1, "INJECT_COMMAND": command}, "backup begin",
                               *self.argv)
        if status:
            nothing_left(self.dm)
        return status, out

    def end(self):
        """As it was"""
        self.dm.end()
        for name in self.dm.list():
            if name.startswith("c"):
                self.dm.tool("bitmap remove", name)

    def has_view(self, k):
        """Is there the view's device at that call?"""
        self.begin(k, f"dmsetup status {self.dm.backup} > {self.seen} 2>&1; :")
        self.end()
        with open(self.seen, encoding="ascii") as f:
            return "qcow2-view" in f.read()

    def meet(self, text):
        """What is said, as soon as that is there"""
        low, high = 0, self.calls
        while high - low > 1:
            k = (low + high) // 2
            low, high = (low, k) if self.has_view(k) else (k, high)
        for k in range(high - 1, high + 12):
            status, out = self.begin(k, f"sh {self.script}")
            if text in out:
                note(f"call {k} of {self.calls}")
                expect(status == 4, f"{status}: {out}")
                return out.splitlines()
            self.end()
        raise Failure(f"no '{text}' at the calls around {high} of {self.calls}")


@test("a table that somebody changes as a backup begins")
def changed(bench):
    dm, folder = Device(bench), folder_of(bench)
    argv = ("--cow", folder)
    said, = Meddler(bench, dm, *argv).meet("cannot ask what its view keeps")
    works(said, "backup", "begin", dm.name, *argv)
    dm.end()
    dm.write()
    # So that all runs are the same
    dm.tool("bitmap disable", "b0")
    argv = (*argv, "--dirty-only", "--bitmap")
    said, more = Meddler(bench, dm, *argv, "b0", "--checkpoint", "c0,granularity=32K").meet(
        "cannot tell it what is not wanted")
    bitmap = re.search(r"bitmap (\S+) has begun.* as --bitmap the next time$", more).group(1)
    expect(bitmap == "c0", more)
    works(said, "backup", "begin", dm.name, *argv, bitmap, "--checkpoint", "c1")
    found = json.loads(run(TOOL, "backup", "extents", dm.name, "--bitmap", bitmap, "--json"))
    expect([(e["start"], e["length"]) for e in found if e["dirty"]] == [(0, 64 * KIB)], f"{found}")
    tested(more)
    dm.end()


@test("a module without views")
def old_module(bench):
    dm, folder = Device(bench), folder_of(bench)
    argv = ("--cow", folder)
    status, out = injected(dm, {"INJECT_VERSION": "1.3.0"}, "backup begin", *argv)
    said = message(status, out, 4, "has no views", argv)
    nothing_left(dm)
    dm.close()
    where = f"/lib/modules/{os.uname().release}"
    built = os.environ.get("DM_QCOW2_KO", os.path.join(qcow2test.HERE, "../../driver/dm-qcow2.ko"))
    with contextlib.ExitStack() as stack:
        if run("modinfo", "dm-qcow2", ok=False)[0]:
            # Only for as long, and only what is needed: it can be loaded by its name then.
            modules = [run("modinfo", "-n", m).strip() for m in
                       ("loop", "dm-mod", *run("modinfo", "-F", "depends", built).strip().replace(",", " ").split())]
            kept = folder_of(bench, "modules")
            for path in (built, *filter(os.path.exists, modules)):
                shutil.copy(path, kept)
            run("mount", "-t", "tmpfs", "none", where)
            stack.callback(run, "umount", where)
            for name in os.listdir(kept):
                shutil.copy(os.path.join(kept, name), where)
            run("depmod")
        stack.callback(load_module)
        printed(said)
        dm.open()
    works(said, "backup", "begin", dm.name, *argv)
    dm.end()


@test("every remedy was tested")
def every_one(bench):
    seen = bench.path("seen")
    with open(seen, "w", encoding="utf-8") as f:
        f.writelines(f"{line}\n" for line in SEEN)
    status, out = run("python3", f"{TESTS}/remedies.py", "tested", f"{TESTS}/remedies.list", os.path.basename(__file__),
                      seen, ok=False)
    expect(status == 0 and SEEN, out)


if __name__ == "__main__":
    main()
