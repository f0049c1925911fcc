#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""fsx.py FILE SEED REQUESTS

Random requests to one file of a file system, in the manner of the kernel's fsx:
each is made to a model in memory, too, and whatever is read must be equal to it.
"""
import ctypes
import mmap
import os
import random
import sys

MAX = 1 << 20
KEEP_SIZE, PUNCH_HOLE, COLLAPSE, ZERO_RANGE, INSERT = 1, 2, 8, 16, 32
LIBC = ctypes.CDLL(None, use_errno=True)


class Fsx:
    def __init__(self, path, seed):
        self.path = path
        self.rng = random.Random(seed)
        self.model = bytearray()
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        self.log = []

    def fault(self, text):
        for line in self.log[-12:]:
            print(line, file=sys.stderr)
        sys.exit(f"fsx: {self.path}: {text}")

    def same(self, offset, got):
        want = bytes(self.model[offset:offset + len(got)])
        if got != want:
            bad = next(i for i, pair in enumerate(zip(got, want)) if pair[0] != pair[1])
            self.fault(f"at {offset + bad:#x}: {got[bad:bad + 8].hex()} read, "
                       f"{want[bad:bad + 8].hex()} expected")

    def grow(self, size):
        if size > len(self.model):
            self.model += bytes(size - len(self.model))

    def place(self, most=MAX):
        offset = self.rng.randrange(most)
        return offset, self.rng.randrange(1, min(most - offset, 100000) + 1)

    def inside(self):
        """A range of the file as it is; None if it is empty."""
        return self.place(len(self.model)) if self.model else None

    # Requests

    def write(self):
        offset, length = self.place()
        data = self.rng.randbytes(length)
        self.grow(offset + length)
        self.model[offset:offset + length] = data
        if os.pwrite(self.fd, data, offset) != length:
            self.fault("short write")
        return offset, length

    def read(self):
        where = self.inside()
        if where:
            got = os.pread(self.fd, where[1], where[0])
            if len(got) != where[1]:
                self.fault(f"short read at {where}")
            self.same(where[0], got)
        return where

    def map_read(self):
        where = self.inside()
        if where:
            with mmap.mmap(self.fd, len(self.model), mmap.MAP_SHARED, mmap.PROT_READ) as m:
                self.same(where[0], m[where[0]:sum(where)])
        return where

    def map_write(self):
        where = self.inside()
        if where:
            data = self.rng.randbytes(where[1])
            with mmap.mmap(self.fd, len(self.model)) as m:
                m[where[0]:sum(where)] = data
                if self.rng.random() < 0.3:
                    m.flush()
            self.model[where[0]:sum(where)] = data
        return where

    def truncate(self):
        size = self.rng.randrange(MAX)
        os.ftruncate(self.fd, size)
        del self.model[size:]
        self.grow(size)
        return size

    def fallocate(self, mode, offset, length):
        if LIBC.fallocate(self.fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)):
            self.fault(f"fallocate {mode} {offset}+{length}: {os.strerror(ctypes.get_errno())}")

    def allocate(self):
        where = self.place()
        self.fallocate(0, *where)
        self.grow(sum(where))
        return where

    def zero(self, mode):
        where = self.inside()
        if where:
            self.fallocate(mode | KEEP_SIZE, *where)
            self.model[where[0]:sum(where)] = bytes(where[1])
        return where

    def punch(self):
        return self.zero(PUNCH_HOLE)

    def zero_range(self):
        return self.zero(ZERO_RANGE)

    def collapse(self):
        blocks = len(self.model) // 4096 - 1
        if blocks < 2:
            return None
        offset, length = self.rng.randrange(blocks - 1) * 4096, 4096
        self.fallocate(COLLAPSE, offset, length)
        del self.model[offset:offset + length]
        return offset, length

    def insert(self):
        blocks = len(self.model) // 4096 - 1
        if blocks < 2 or len(self.model) > MAX - 4096:
            return None
        offset, length = self.rng.randrange(1, blocks) * 4096, 4096
        self.fallocate(INSERT, offset, length)
        self.model[offset:offset] = bytes(length)
        return offset, length

    def sync(self):
        os.fsync(self.fd)

    def forget(self):
        """The next read comes from the device."""
        os.fdatasync(self.fd)
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def reopen(self):
        os.close(self.fd)
        self.fd = os.open(self.path, os.O_RDWR)

    def whole(self):
        with open(self.path, "rb") as f:
            got = f.read()
        if len(got) != len(self.model):
            self.fault(f"{len(got)} bytes long, {len(self.model)} expected")
        self.same(0, got)

    def run(self, count):
        requests = ([self.write] * 8 + [self.read] * 8 + [self.map_read] * 2 + [self.map_write] * 3 +
                    [self.punch] * 3 + [self.zero_range] * 2 + [self.forget] * 4 +
                    [self.truncate, self.allocate, self.collapse, self.insert, self.sync, self.reopen])
        for n in range(count):
            request = self.rng.choice(requests)
            self.log.append(f"{n} {request.__name__} of {len(self.model)}")
            self.log.append(f"{n} done {request()}")
            del self.log[:-24]
        self.forget()
        self.whole()


if __name__ == "__main__":
    Fsx(sys.argv[1], int(sys.argv[2])).run(int(sys.argv[3]))
