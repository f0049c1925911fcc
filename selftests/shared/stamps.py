#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""usage: stamps.py DEVICE SEED RECORD [COUNT]

Writes to a block device, from several threads, and tells in the file RECORD what has been flushed: a
line "SEED THREAD NUMBER" says that all requests of that thread up to that one were completed before a flush that
has succeeded. The next request is sent when that has been written. "SEED THREAD error NAME" is the end of a thread
that met an error. COUNT: so many requests of each thread, and no end without it.

All is known from the seed: Model says what the device can have, from the records alone.
"""
import errno
import fcntl
import mmap
import os
import random
import struct
import sys
import threading

SECTOR = 512
SLOT = 32               # sectors: where one thread writes, and no other
THREADS = 4
SLOTS = 12              # of a thread, anywhere
BATCH = 5               # requests between two flushes
BLKZEROOUT = 0x127f


def requests(seed, thread, sectors):
    """What a thread does, without an end: number, whether it writes data (or zeros), sector, sectors"""
    order = random.Random(seed)
    slots = order.sample(range(sectors // SLOT), SLOTS * THREADS)[thread::THREADS]
    rng = random.Random(seed * THREADS + thread)
    n = 0
    while True:
        n += 1
        first = rng.randrange(SLOT)
        yield n, rng.randrange(8) != 0, rng.choice(slots) * SLOT + first, rng.randint(1, SLOT - first)


def stamp(seed, thread, n, sector):
    """Content of a sector, which is that of no other request"""
    return struct.pack("<IIII", sector, n, seed, thread) * (SECTOR // 16)


class Model:
    """What is on a disk"""

    def __init__(self, sectors):
        self.sectors = sectors
        self.known = [bytes(SECTOR)] * sectors
        self.base = list(self.known)    # when the bitmap began

    def checkpoint(self):
        self.base = list(self.known)

    def _content(self, seed, thread, request):
        n, data, first, count = request
        for sector in range(first, first + count):
            yield sector, stamp(seed, thread, n, sector) if data else bytes(SECTOR)

    def wrote(self, seed, acknowledged):
        """What may be there, beside what is acknowledged, after a load. acknowledged: the number, by thread"""
        may = {}
        for thread in range(THREADS):
            last = acknowledged.get(thread, 0)
            for request in requests(seed, thread, self.sectors):
                if request[0] > last + BATCH:
                    break
                for sector, content in self._content(seed, thread, request):
                    if request[0] <= last:
                        self.known[sector] = content
                    else:
                        may.setdefault(sector, set()).add(content)
        return may

    def judge(self, content, may=()):
        """Sectors that are not what they must be; from now on what is there is known."""
        found = [content[at:at + SECTOR] for at in range(0, self.sectors * SECTOR, SECTOR)]
        bad = [n for n, (is_, known) in enumerate(zip(found, self.known))
               if is_ != known and (n not in may or is_ not in may[n])]
        self.known = found
        return bad

    def changed(self):
        """Sectors that are not as they were when the bitmap began"""
        return [n for n, (now, then) in enumerate(zip(self.known, self.base)) if now != then]


def acknowledged(records, seed):
    """By thread, of the lines of a record"""
    return {int(r[1]): int(r[2]) for r in records if r[0] == str(seed) and r[2] != "error"}


def load(fd, size, seed, thread, record, count):
    """One thread"""
    buffer = mmap.mmap(-1, SLOT * SECTOR)
    try:
        for n, data, first, sectors in requests(seed, thread, size):
            if data:
                buffer[:sectors * SECTOR] = b"".join(stamp(seed, thread, n, first + i) for i in range(sectors))
                os.pwrite(fd, memoryview(buffer)[:sectors * SECTOR], first * SECTOR)
            else:
                fcntl.ioctl(fd, BLKZEROOUT, struct.pack("QQ", first * SECTOR, sectors * SECTOR))
            if n % BATCH == 0:
                os.fsync(fd)
                os.write(record, f"{seed} {thread} {n}\n".encode())
            if n == count:
                break
    except OSError as e:
        os.write(record, f"{seed} {thread} error {errno.errorcode[e.errno]}\n".encode())
    except Exception as e:
        os.write(record, f"{seed} {thread} error {type(e).__name__}\n".encode())
        raise


def main():
    device, seed, record = sys.argv[1], int(sys.argv[2]), os.open(sys.argv[3], os.O_WRONLY)
    count = int(sys.argv[4]) if len(sys.argv) > 4 else None
    fd = os.open(device, os.O_RDWR | os.O_DIRECT)
    size = os.lseek(fd, 0, os.SEEK_END) // SECTOR
    threads = [threading.Thread(target=load, args=(fd, size, seed, n, record, count)) for n in range(THREADS)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()


if __name__ == "__main__":
    try:
        main()
    except Exception as e:
        # Nobody sees its stderr; this line says that nothing will come.
        with open(sys.argv[3], "w", encoding="ascii") as told:
            print(sys.argv[2], "-", "error", type(e).__name__, str(e).replace(" ", "_"), file=told)
        raise
