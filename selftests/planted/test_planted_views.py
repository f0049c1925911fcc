#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Would test_view.py find a bug? The module of test_planted.py is loaded, and has those of its
bugs that are about views.
"""
from planted import plant

# pylint: disable=wrong-import-order
import qcow2test
from qcow2test import KIB, MIB, Failure, note, test
from test_view import SEED, raced, shown

# Tests of its own come from test_view, too.
qcow2test.forget_tests()

IMAGE = (64 * KIB, 4 * MIB, None, {})
# Reads of the data device, or writes of what is kept, are late (ms): others come between.
READS = (64 * KIB, 4 * MIB, None, {"late_reads": 20})
KEPT = (64 * KIB, 4 * MIB, None, {"late_kept": 20})

# Number of the bug, what it is, what is to find it, and with which image
BUGS = (
    (0, "no bug", raced, READS),
    (0, "no bug, either", raced, KEPT),
    (29, "a request is sent before what it changes is kept", raced, READS),
    (30, "what has been read is not looked at again", raced, READS),
    (31, "a discard keeps nothing", shown, IMAGE),
    (32, "a granule is called kept before it is written", raced, KEPT),
)
# A race may need more than one try, on a busy machine many.
TRIES = 20


def found(_, bug, function, image):
    plant(bug)
    for _ in range(TRIES if bug else 1):
        bench = qcow2test.Bench()
        try:
            function(bench, *image)
        except Failure as e:
            if not bug:
                raise
            note(e)
            if "view" in str(e) and "differs" in str(e):
                return
            raise
        finally:
            plant(0)
            bench.close()
            plant(bug)
    if bug:
        raise Failure(f"not found in {TRIES} runs")


for number, name, *rest in BUGS:
    test(f"found: {name}" if number else name, number, *rest)(found)


if __name__ == "__main__":
    note(f"SEED={SEED}")
    qcow2test.main()
