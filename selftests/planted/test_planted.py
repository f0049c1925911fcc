#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Would the power cut test find a bug? A module is loaded that has some; its
parameter tells which one is to be had. Each must be found, and for what it does;
with none the same loads must pass.
"""
from planted import plant

# pylint: disable=wrong-import-order
import qcow2test
from qcow2test import KIB, MIB, Failure, note, test
from powercut import Recording

# Images, and options of qcow2load
PLAIN = {"size": 2 * MIB, "cluster": 4 * KIB}, ()
TABLES = {"size": 2 * MIB, "cluster": KIB}, ("-w", "70,0,0,10,10")
DISCARDS = {"size": 512 * KIB, "cluster": 4 * KIB}, ("-w", "40,0,0,50,10")
REFTABLE = {"size": 16 * MIB, "cluster": 512, "refcount_bits": 64}, ("-w", "70,0,0,10,10")
# Small requests in large units, few of which make others durable: many that meet
# units which are not
FUA = {"size": 4 * MIB, "cluster": 64 * KIB}, ("-w", "90,10,0,0,1", "-u", 4)
BITMAPS = {"size": 4 * MIB, "cluster": 4 * KIB, "bitmaps": (4 * KIB,)}, ()
# What is discarded reads as something else afterwards.
COVERED = {"size": 4 * MIB, "cluster": 4 * KIB, "backing": 4 * MIB, "bitmaps": (4 * KIB,)}, ("-w", "20,0,0,70,10")
# How many requests are what a bug may need on a slow machine, where the timer of the
# commit makes most units durable before they are met again
REQUESTS = (200, 400, 800)

# Number of the bug, what it is, the load that shows it, what is to be found
BUGS = (
    (0, "no bug, plain load", PLAIN, ()),
    (0, "no bug, many L2 tables", TABLES, ()),
    (0, "no bug, discards", DISCARDS, ()),
    (0, "no bug, FUA writes", FUA, ()),
    (0, "no bug, new refcount blocks", REFTABLE, ()),
    (0, "no bug, bitmaps", BITMAPS, ()),
    (0, "no bug, bitmaps and discards", COVERED, ()),
    (1, "a commit does not flush the data device", PLAIN, ("poison", "old", "zeros")),
    (2, "a commit flushes the metadata device instead of the data device", PLAIN, ("poison", "old", "zeros")),
    (3, "refcounts are written after the L1 table", TABLES, ("refcount",)),
    (4, "the L1 table is written before new L2 tables are flushed", TABLES, ("corrupt", "refcount")),
    (5, "a commit does not flush L2 tables", PLAIN, ("old", "zeros")),
    (6, "a discard is passed down before it is committed", DISCARDS, ("discarded",)),
    (7, "a FUA write to what is not durable is acknowledged early", FUA, ("old", "zeros")),
    (8, "the rest of a unit is not filled at its first write", PLAIN, ("poison",)),
    (9, "a flush does not commit", PLAIN, ("old", "zeros")),
    (20, "the L1 table is written before the refcount table is flushed", REFTABLE, ("refcount",)),
    (22, "data is sent before its mark is durable", BITMAPS, ("unmarked",)),
    (23, "a mark is not flushed", BITMAPS, ("unmarked",)),
    (24, "a discard is not marked", COVERED, ("unmarked",)),
)


def found(_, bug, load, reasons):
    """Record a load with a bug. The judge must object, and for a reason that fits."""
    plant(bug)
    image, options = load
    for n, requests in enumerate(REQUESTS if reasons else REQUESTS[:1]):
        bench = qcow2test.Bench()
        try:
            recording = Recording(bench, f"planted{n}", export=False, **image)
            recording.load(requests, *options)
            recording.close()
            status, out = recording.replay("-n", 4, "-k", 0, "-m", 0)
        finally:
            bench.close()
        note(out)
        got = {words[2] for words in (line.split(": ") for line in out.splitlines()) if len(words) > 3}
        if status:
            break
    if status != bool(reasons) or (reasons and not got & set(reasons)):
        raise Failure(f"status {status}, {got or 'nothing'} found, {reasons or 'nothing'} expected")


for number, name, *rest in BUGS:
    # That one is seen while one request is in flight and another one ends.
    test(f"found: {name}" if number else name, number, *rest, all_cpus=number == 7)(found)


if __name__ == "__main__":
    qcow2test.main()
