#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Would test_faults.py, test_entries.py, test_marks.py, test_nospc.py and test_fuzz.py find a bug? The
module of test_planted.py is loaded, and has some: in what it does when a request fails,
and with images that are not as they should be.
"""
from planted import plant

# pylint: disable=wrong-import-order
import qcow2test
from qcow2test import Failure, forget_tests, note, test
from test_commit import exact
from test_entries import COMMITS, one_by_one
from test_faults import SCENARIOS
from faultrig import sweep
from test_fuzz import KINDS, SEED, fuzz
import test_marks
from test_marks import before_table, marked_first, taken_mark, two_marks, write_taken
from test_nospc import first_write

forget_tests()
# Time for what a bug lets happen, on a slow machine
test_marks.PAUSE = 60

# Number of the bug, what it is, the scenario of test_faults
FAULTS = (
    (12, "an error of a copy is forgotten", "a first write with a copy"),
    (13, "an error of a fill is forgotten", "a first write of a part"),
    (14, "an error of an L2 table's write is forgotten", "a first write of whole units and a flush"),
)
# Likewise, the kind of image of test_fuzz
HOSTILE = (
    (15, "clusters with refcount 2 and more are taken for free", "clusters of 512 bytes, refcounts of 64 bits"),
    (16, "a fill goes past the end of the disk", "clusters of 64 KiB, odd size"),
    (17, "a read-only image is marked corrupt", "standard clusters of 4 KiB"),
)
# What has failed must stay dirty, and space must be real when it is promised.
LATER = (
    (18, "an entry that has failed is taken for durable", one_by_one, *COMMITS[0][1:3], "all"),
    (19, "a reservation does not reach the disk", first_write),
    (21, "a block is not read that has what would not be made like that", exact, False),
    (21, "likewise, extended L2 entries", exact, True),
)
# No request of the guest's may be there before its mark, nor may a mark be taken away.
MARKS = (
    (22, "data is sent before its mark is durable", marked_first),
    (23, "a mark is not flushed", marked_first),
    (24, "a discard is not marked", marked_first),
    (25, "a mark takes away what the one before has marked ahead", two_marks),
    (26, "bits are taken back without a look at who has come meanwhile", write_taken),
    (27, "bits are taken back while a mark of the same block is on its way", taken_mark),
    (28, "bits of one bitmap are taken back as it is right for another one", before_table),
)
# Damage is random: some of it needs to be of the kind that a bug is about.
IMAGES = 300


def found(bench, bug, function, *args):
    """The test must object, for what it sees."""
    plant(bug)
    try:
        function(bench, *args)
    except Failure as e:
        note(e)
    else:
        raise Failure("not found")
    finally:
        plant(0)


def register():
    scenarios = {name: rest for name, *rest in SCENARIOS}
    for bug, name, scenario in FAULTS:
        _, *what = scenarios[scenario]
        test(f"found: {name}", bug, sweep, *what, "once")(found)
    for bug, name, *what in LATER + MARKS:
        test(f"found: {name}", bug, *what)(found)
    kinds = {name: what for name, *what in KINDS}
    for bug, name, kind in HOSTILE:
        test(f"found: {name}", bug, fuzz, *kinds[kind], IMAGES)(found)


if __name__ == "__main__":
    register()
    note(f"SEED={SEED}")
    qcow2test.main()
