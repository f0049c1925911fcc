#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""usage: powercut_fs.py FILE NUMBER

Judges an ext4 file system after a power cut, for qcow2replay: its journal can be
replayed, it is consistent then, and the files up to NUMBER, which had been
synced, are there with their content. Changes FILE.
"""
import os
import random
import subprocess
import sys


def content(number):
    """Of file number NUMBER."""
    rng = random.Random(number)
    return rng.randbytes(rng.randrange(1, 40 << 10))


def command(*argv, text=None):
    return subprocess.run(argv, input=text, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)


def main(path, last):
    done = command("e2fsck", "-E", "journal_only", "-y", path)
    if done.returncode > 1:
        sys.exit(f"journal: e2fsck: status {done.returncode}: {done.stdout.decode(errors='replace')}")
    done = command("e2fsck", "-fn", path)
    if done.returncode:
        sys.exit(f"file system: e2fsck: status {done.returncode}: {done.stdout.decode(errors='replace')}")
    copies = [f"{path}.{n}" for n in range(1, last + 1)]
    command("debugfs", "-f", "-", path,
            text="".join(f"dump /file{n} {c}\n" for n, c in enumerate(copies, 1)).encode())
    for n, copy in enumerate(copies, 1):
        try:
            with open(copy, "rb") as f:
                got = f.read()
            os.unlink(copy)
        except FileNotFoundError:
            got = None
        if got != content(n):
            sys.exit(f"content: file {n} of {last} is {'not there' if got is None else 'not what was synced'}")


if __name__ == "__main__":
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    main(sys.argv[1], int(sys.argv[2]))
