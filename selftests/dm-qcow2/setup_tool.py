# SPDX-License-Identifier: GPL-2.0-or-later
"""qcow2setup, as tests call it."""
import os
import re

import qcow2test
from qcow2test import expect, run

TOOL = os.path.realpath(os.path.join(qcow2test.HERE, "../../tools/qcow2setup"))


def tool(*argv):
    return run(TOOL, *argv)


def refused(code, text, *argv):
    """It must say why, in one line, and what to do."""
    status, out = run(TOOL, *argv, ok=False)
    expect(status == code and re.search(text, out) and out.count("\n") == 1 and ";" in out,
           f"{argv}: status {status}: {out}")
