# SPDX-License-Identifier: GPL-2.0-or-later
"""The module that has bugs, for tests of tests. Import this before qcow2test."""
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "../dm-qcow2"))
os.environ["DM_QCOW2_KO"] = os.path.join(HERE, "../../.build/planted/dm-qcow2.ko")


def plant(bug):
    """From now on the module has the bug of this number in planted.patch; 0: none."""
    with open("/sys/module/dm_qcow2/parameters/planted", "w", encoding="ascii") as f:
        f.write(str(bug))
