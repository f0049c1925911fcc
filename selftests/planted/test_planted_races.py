#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Would test_race.py find a bug? The module of test_planted.py is loaded, and has
those of its bugs that need no power cut: each must be found, as content that is not
what it should be.
"""
from planted import plant

# pylint: disable=wrong-import-order
import qcow2test
from qcow2test import KIB, Failure, note, test
from test_race import SEED, race

PLAIN = {"cluster": 64 * KIB}
# Fills have to take a while, on a machine that does other things as well
LATE = {"cluster": 64 * KIB, "late": 4}
BACKING = {"cluster": 4 * KIB, "backing": True, "units": 12, "late": 4}

# Number of the bug, what it is, the image, what disturbs it
BUGS = (
    (0, "no bug", PLAIN, ("load", "cycle")),
    (10, "a unit is data before its first write has filled it", LATE, ("status",)),
    (10, "a unit is data before the backing device was copied", BACKING, ("status",)),
    (11, "a suspend does not commit", PLAIN, ("load",)),
)
# A race may need more than one try, on a busy machine many.
TRIES = 20


def found(_, bug, kind, ways):
    """Many threads on an image, with a bug. What they read must tell."""
    plant(bug)
    for n in range(TRIES if bug else 1):
        bench = qcow2test.Bench()
        try:
            race(bench, kind, SEED + n, ways)
        except Failure as e:
            if not bug:
                raise
            note(e)
            if "should be" in str(e) or "qemu-img compare" in str(e):
                return
            raise
        finally:
            bench.close()
    if bug:
        raise Failure(f"not found in {TRIES} runs")


for number, name, *rest in BUGS:
    test(f"found: {name}" if number else name, number, *rest)(found)


if __name__ == "__main__":
    note(f"SEED={SEED}")
    qcow2test.main()
