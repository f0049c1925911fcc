#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""rules.py [CASES]: is the model of the tests exact?

What discard and write zeroes make of the states of units is written down here once more,
in the way of the target, which goes along a request: run by run of equal states, whole units
and the parts at its ends. The model (Units in qcow2test.py) looks at each unit by itself.
A random test is worth something only if both come to the same. Needs no device.
"""
import random
import sys

from qcow2test import Units


class Case(Units):
    """A model without an image. end: where the backing device ends; 0: there is none"""

    def __init__(self, rng):  # pylint: disable=super-init-not-called
        self.raw, self.unit = False, rng.choice((512, 1024, 2048, 4096))
        self.size = max(self.unit, rng.randrange(2, 14) * self.unit - rng.choice((0, 0, 512, 1024)))
        self.backing = rng.choice((0, self.size // 1024 * 512, self.size, self.size - 512, self.size + self.unit,
                                   rng.randrange(self.size // 512 + 1) * 512))
        self.data = bytearray(self.size)
        self.states = [rng.choice(("data", "zero", "unallocated", "unallocated"))
                       for _ in range(-(-self.size // self.unit))]


def after(case, offset, length, discard):
    """The states after a request"""
    states, unit, at, end = list(case.states), case.unit, offset, offset + length
    while at < end:
        first = last = at // unit
        state = states[first]
        while last < len(states) and states[last] == state:
            last += 1
        stop = min(end, last * unit, case.size)
        if state == "zero" or (state == "unallocated" and at >= case.backing):
            # It reads as zeros.
            at = stop
            continue
        if state == "unallocated":
            # Only as far as there is something to hide
            stop = min(stop, -(-case.backing // unit) * unit)
        whole = stop if at % unit or stop == case.size else stop // unit * unit
        if at % unit or whole == at:
            # A part of a unit: left alone by a discard, and written by write zeroes
            if not discard:
                states[first] = "data"
            at = min(stop, (first + 1) * unit)
            continue
        for n in range(first, -(-whole // unit)):
            states[n] = "zero"
        at = whole
    return states


def main():
    bad = 0
    cases = int(sys.argv[1]) if len(sys.argv) > 1 else 20000
    for seed in range(cases):
        rng = random.Random(seed)
        case = Case(rng)
        for _ in range(4):
            offset = rng.randrange(case.size // 512) * 512
            length = case.size - offset
            if rng.random() < 0.8:
                length = rng.randrange(1, length // 512 + 1) * 512
            discard = rng.random() < 0.5
            before, want = list(case.states), after(case, offset, length, discard)
            (case.discard if discard else case.zero)(offset, length)
            if case.states != want:
                bad += 1
                print(f"case {seed}: units of {case.unit}, size {case.size}, backing {case.backing}: "
                      f"{'discard' if discard else 'write zeroes'} {offset}+{length} of {before}: {case.states}, not {want}")
                break
    print(f"{cases} cases, {bad} bad")
    return 1 if bad or not cases else 0


if __name__ == "__main__":
    sys.exit(main())
