#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""What qcow2setup prints of devices with --json is as its schema says.

Without devices: tools/tests/json.sh.
"""
import json
import os
import subprocess
import sys

import qcow2test
from qcow2test import MIB, expect, main, run, test
from test_checkpoint import TOOL, Opened

sys.path.insert(0, os.path.join(os.path.dirname(os.path.realpath(__file__)), "../../tools/tests"))
import schema  # pylint: disable=wrong-import-position

# Those of test_checkpoint
qcow2test.forget_tests()

SIZE = 16 * MIB


def right(name, value):
    wrong = schema.problems(name, value)
    expect(not wrong, "; ".join(wrong))
    return value


def printed(name, *argv):
    return right(name, json.loads(run(TOOL, *argv, "--json")))


def failed(status, text, *argv):
    """one line on stderr, the same as the only object on stdout"""
    done = subprocess.run([TOOL, *argv, "--json"], capture_output=True, text=True, timeout=300, check=False)
    expect(done.returncode == status, f"{argv}: {done.returncode}: {done.stderr}")
    error = right("error", json.loads(done.stdout))["error"]
    expect(error["exit"] == status and text in error["message"] and error["message"].endswith("; " + error["remedy"]) and
           done.stderr == f"qcow2setup: {error['message']}\n", f"{error}, {done.stderr}")


def written(device):
    run("dd", "if=/dev/urandom", f"of={device.path}", "bs=64k", "count=3", "seek=5", "oflag=direct", "status=none")


@test("status, map and bitmap list of devices")
def devices(bench):
    expect(printed("status-list", "status") == [], "there are devices")
    dm = bench.add(Opened(bench.image(SIZE)))
    run(TOOL, "bitmap", "add", dm.name, "b0")
    written(dm)
    one = printed("status", "status", dm.name)
    expect(one["name"] == dm.name and one["mode"] == "rw" and one["made-by"] == "qcow2setup" and
           one["virtual-size"] == SIZE and one["statistics"]["bitmaps"] == 1, f"{one}")
    (item,) = printed("status-list", "status")
    expect(item["name"] == dm.name, f"{item}")
    expect(any(e["data"] for e in printed("map", "map", dm.name)), "there is no data")
    expect(any(not e["data"] for e in printed("map", "map", dm.name, "--bitmap", "b0")), "nothing is dirty")
    (bitmap,) = printed("bitmap-list", "bitmap", "list", dm.name)
    expect(bitmap["name"] == "b0" and bitmap["recording"] and bitmap["count"] >= 3 * 65536, f"{bitmap}")
    info = printed("info", "info", dm.image.path)
    expect([u["kind"] for u in info["dm-qcow2"]["users"]].count("qcow2") == 1, f"{info}")
    run("dmsetup", "suspend", dm.name)
    try:
        expect(printed("status", "status", dm.name)["suspended"], "it is not suspended")
    finally:
        run("dmsetup", "resume", dm.name)


@test("status of a chain")
def chain(bench):
    folder = os.path.dirname(bench.path("x"))
    for name in ("base", "top"):
        run("truncate", "-s", str(SIZE), f"{folder}/{name}.raw")
    run(TOOL, "create", f"{folder}/base.qcow2", "--data-file", f"{folder}/base.raw")
    run(TOOL, "create", f"{folder}/top.qcow2", "--data-file", f"{folder}/top.raw", "--backing-file", f"{folder}/base.qcow2",
        "--backing-format", "qcow2")
    name = f"json-chain-{os.getpid()}"
    run(TOOL, "open", f"{folder}/top.qcow2", name, "--data-file", f"{folder}/top.raw", "--cache-limit", "1M", "--backing-file",
        f"{folder}/base.qcow2,data-file={folder}/base.raw")
    try:
        one = printed("status", "status", name)
        expect(one["backing"]["data-file"] == f"{folder}/base.raw" and one["cache-limit"] == MIB, f"{one}")
        expect(all(e["depth"] == 1 for e in printed("map", "map", name)), "something is in the overlay")
    finally:
        run(TOOL, "close", name)


@test("backups")
def backups(bench):
    dm = bench.add(Opened(bench.image(SIZE)))
    run(TOOL, "bitmap", "add", dm.name, "b0")
    written(dm)
    expect(printed("backup-status", "backup", "status") == [], "there is a backup")
    cow = bench.path("cow")
    os.makedirs(cow, exist_ok=True)
    run(TOOL, "backup", "begin", dm.name, "--cow", cow, "--bitmap", "b0", "--checkpoint", "b1")
    try:
        (status,) = printed("backup-status", "backup", "status", dm.name)
        expect(status["valid"] and status["bitmaps"] == ["b0"] and status["checkpoint"] == "b1", f"{status}")
        expect(any(e["dirty"] for e in printed("backup-extents", "backup", "extents", dm.name, "--bitmap", "b0")),
               "nothing is dirty")
        for argv in (("copy", dm.name, bench.path("copy")), ("restore", bench.path("copy"), bench.path("restored"))):
            lines = run(TOOL, "backup", *argv, "--json").splitlines()
            for line in lines:
                last = right("backup-progress", json.loads(line))
            expect(last["done"] == last["total"], f"{argv}: {last}")
        failed(4, "no bitmap", "backup", "extents", dm.name, "--bitmap", "nothing")
    finally:
        run(TOOL, "backup", "end", dm.name)
    failed(4, "no backup of it is under way", "backup", "status", dm.name)


@test("errors")
def errors(bench):
    dm = bench.add(Opened(bench.image(SIZE)))
    failed(4, "is inactive", "status", dm.name + "-not")
    failed(4, "no bitmap", "map", dm.name, "--bitmap", "nothing")
    failed(1, "", "check", dm.image.path)


main()
