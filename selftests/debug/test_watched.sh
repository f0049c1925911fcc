#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# KCSAN has looked at what the tests before this one did, and has found nothing.

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=../dm-qcow2/common.sh
. "$here/../dm-qcow2/common.sh"

kcsan=/sys/kernel/debug/kcsan

number()
{
	sed -n "s/^$1: //p" "$kcsan"
}

watched()
{
	[ "$(number enabled)" = 1 ]
	note "watchpoints: $(number setup_watchpoints)"
	[ "$(number setup_watchpoints)" -gt 1000 ]
}

no_races()
{
	[ "$(number data_races)" = 0 ]
	[ "$(number races_unknown_origin)" = 0 ]
}

start dmsetup
[ -e "$kcsan" ] || skip_all "the kernel has no KCSAN"
check "accesses were watched" watched
check "there were no data races" no_races
finish
