#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Each single request that the target makes fails, and what must come of it.

The devices below are served by this process (served.py): so it knows every request,
and can fail any of them, once or from then on, hold it back, or hang up. A scenario
is run once to count its requests, then once for each of them; what must happen
follows from what failed, by the rules of Documentation/dm-qcow2.rst, which are in
Attempt.rules() of faultrig.py.
"""
from qcow2test import KIB, main, some, test
from faultrig import SMALL, sweep


COMMIT = "flush data, read L2 table, write L2 table, flush metadata"
FIRST = f"read refcount table, write data, {COMMIT}"
# What fills the unit has the data of the request in it.
PART = f"read refcount table, write fill, {COMMIT}"
NEW = "read refcount table, read refcount block, flush data, write new cluster, flush metadata, write L1 table"
RESUME = "read header, flush metadata, read L1 table"
EXTENDED = {"cluster": 64 * KIB, "extended": True, "tables": 1}
FUSED = {"fused": True}
ONE_PART = ("write", (0, 9, 1024), 512)
NEW_PART = ("write", (2, 9, 1024), 512), ("fsync",)
NEW_WHOLE = ("write", (100, 9, 0), 1024), ("fsync",)

# Name, ways to fail, options of the image, steps, requests that have to be among those made
SCENARIOS = (
    ("a read", "once, dead", {},
     (("read", 0, "2"),), "read L2 table, read data"),
    ("a read from the backing device", "once", {"backing": True},
     (("read", (0, 9, 0), "2"),), "read L2 table, read backing"),
    ("an overwrite and a flush", "once, dead", {},
     (("write", (0, 1, 512), 1024), ("fsync",)), "read L2 table, write data, flush data"),
    ("a first write of whole units and a flush", "once, protected", {},
     (("write", (0, 9, 0), "2"), ("fsync",)), FIRST),
    ("a first write of a part", "once, dead", {}, (ONE_PART, ("fsync",)), PART),
    ("a first write with a copy", "once", {"backing": True}, (ONE_PART, ("fsync",)), f"{PART}, read backing"),
    ("a first write of a part, extended L2 entries", "once", EXTENDED, (ONE_PART, ("fsync",)), PART),
    ("a first write, data_file_raw", "once", {"raw": True, "covers": 2}, (ONE_PART, ("fsync",)), FIRST),
    ("a first write that needs an L2 table", "once, dead, protected, gone", {}, NEW_PART,
     f"{NEW}, write refcount block, write fill"),
    ("a first write that needs an L2 table, out of space", "full, refused", FUSED, NEW_PART,
     f"{NEW}, write refcount block, write fill"),
    ("a first write that needs a refcount block", "once, dead, protected", SMALL, NEW_WHOLE,
     f"{NEW}, write data, write refcount table"),
    ("a first write that needs a refcount block, out of space", "full, refused", {**SMALL, **FUSED}, NEW_WHOLE,
     f"{NEW}, write data, write refcount table"),
    ("a first write with a copy, out of space", "full, refused", {"backing": True, **FUSED},
     (ONE_PART, ("fsync",)), f"{PART}, read backing"),
    ("a FUA first write", "once, dead, protected", {}, (("fua", (0, 9, 1024), 512),), PART),
    ("a FUA first write, out of space", "full, refused", FUSED, (("fua", (0, 9, 1024), 512),), PART),
    ("a discard, and its pass-down", "once, gone", {},
     (("discard", (0, 1, 0), "2"), ("fsync",), ("cycle",)), f"{COMMIT}, discard data, {RESUME}"),
    ("suspend and resume", "once, dead, protected, gone", {}, (ONE_PART, ("cycle",)), f"{PART}, {RESUME}"),
    ("suspend and resume, out of space", "full, refused", FUSED, (ONE_PART, ("cycle",)), f"{PART}, {RESUME}"),
    ("removal", "once, dead, gone", {}, (ONE_PART, ("remove",)), PART),
    ("removal, out of space", "full, refused", FUSED, (ONE_PART, ("remove",)), PART),
    ("a new table", "once, protected", {}, (ONE_PART, ("reload",)), f"{PART}, {RESUME}"),
    ("an entry that cannot be true", "once", {"corrupt": True},
     (("corrupt", (1, 0, 0), 512),), "read L2 table, read header, write header")
)


def register():
    for name, hows, *scenario in some(SCENARIOS, 12):
        test(f"each request fails: {name} ({hows})", *scenario, hows)(sweep)


if __name__ == "__main__":
    register()
    main()
