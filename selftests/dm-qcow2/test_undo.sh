#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# "qcow2setup open" takes back everything it did, whichever of its system calls
# fails or is interrupted. The test is the tool's own.

# shellcheck source=common.sh
. "$(dirname "$0")/common.sh"

tests=$here/../../tools/tests
# Its results come of one long run.
[ -z "$list" ] || { echo "open and resize take back everything"; exit; }
[ ${#only[@]} = 0 ] || { echo "Bail out! no result of test_undo.sh can be had alone; run all of it"; exit "$KSFT_FAIL"; }
[ "$(id -u)" = 0 ] || skip_all "root is needed"
[ -e "$tests/inject-lib" ] || skip_all "tools/tests/inject-lib is not built (make -C tools tests/inject-lib)"
load_module || skip_all "module dm_qcow2 cannot be loaded"
exec "$tests/failures.sh"
