#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""usage: ktap.py COUNTS_FILE < OUTPUT

Passes the output of a kselftest run through, line by line, and judges it: the
plans, the numbering, every result, and that a test's exit status agrees with
the results that it printed. Writes "PASSED FAILED SKIPPED" to COUNTS_FILE.
Exit status 0 if something passed and nothing failed.
"""
import re
import sys

PLAN = re.compile(r"1\.\.(\d+)\s*(?:#\s*SKIP\b.*)?$")
RESULT = re.compile(r"(not )?ok (\d+)\b[ -]*([^#]*)(?:#\s*(.*))?$")


class Level:
    """The results of one test, or those of the run as a whole."""

    def __init__(self):
        self.plan = None
        self.skip_all = False
        self.results = 0
        self.passed = self.failed = self.skipped = 0
        self.skip_names = []
        self.problems = []

    def line(self, text):
        """Take one line; return the match if it is a result."""
        plan = PLAN.match(text)
        if plan:
            if self.plan is not None:
                self.problems.append("a second plan")
            self.plan = int(plan.group(1))
            self.skip_all = self.plan == 0 and "SKIP" in text
            return None
        if text.startswith("Bail out!"):
            self.problems.append(text)
            return None
        result = RESULT.match(text)
        if not result:
            return None
        self.results += 1
        if int(result.group(2)) != self.results:
            self.problems.append(f"result {result.group(2)} where {self.results} was due")
        directive = result.group(4) or ""
        if result.group(1):
            self.failed += 1
        elif re.match(r"(SKIP|XFAIL)\b", directive):
            self.skipped += 1
            self.skip_names.append(f"{result.group(3).strip()} ({directive})")
        else:
            self.passed += 1
        return result

    def close(self):
        if self.skip_all and not self.results:
            return
        if self.plan is None:
            self.problems.append("no plan")
        elif self.plan != self.results:
            self.problems.append(f"{self.plan} results planned, {self.results} seen")
        elif self.plan == 0:
            self.problems.append("nothing planned")


def main():
    passed = failed = skipped = 0
    top, test = Level(), None
    notes = []
    stream = open(0, encoding="utf-8", errors="replace", newline="\n")
    for raw in stream:
        sys.stdout.write(raw)
        sys.stdout.flush()
        line = raw.rstrip("\r\n")
        if line.startswith("# selftests: "):
            if test is not None:
                notes.append("a test without a result of its own")
                failed += 1
            test = Level()
            continue
        if line.startswith("# "):
            if test is not None:
                test.line(line[2:])
            continue
        result = top.line(line)
        if not result:
            continue
        name = result.group(3).strip()
        if test is None:
            notes.append(f"{name}: did not run")
            failed += 1
            continue
        bad = bool(result.group(1))
        test.close()
        if bad and not test.failed and not test.problems:
            test.problems.append("every result is fine, but: " + (result.group(4) or "failure"))
        elif bad and result.group(4):
            notes.append(f"{name}: {result.group(4)}")
        if not bad and test.failed:
            notes.append(f"{name}: its exit status hides its failed results")
        passed += test.passed
        failed += test.failed + bool(test.problems)
        skipped += test.skipped
        if test.skip_all and not test.results:
            skipped += 1
            notes.append(f"{name}: skipped as a whole")
        notes += [f"{name}: {p}" for p in test.problems]
        notes += [f"{name}: skipped: {s}" for s in test.skip_names]
        test = None
    if test is not None:
        test.close()
        passed += test.passed
        skipped += test.skipped
        failed += test.failed + 1
        notes.append("the last test did not come to its end")
    top.close()
    if top.problems:
        failed += 1
        notes += top.problems
    for note in notes:
        print(f"# note: {note}")
    print(f"# {passed} passed, {failed} failed, {skipped} skipped in the VM", flush=True)
    with open(sys.argv[1], "w", encoding="ascii") as out:
        print(passed, failed, skipped, file=out)
    return 0 if passed and not failed else 1


if __name__ == "__main__":
    sys.exit(main())
