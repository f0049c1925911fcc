#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# What the tests before this one have allocated is free again, or still known to
# somebody: kmemleak finds nothing, with the module loaded and without it.

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=../dm-qcow2/common.sh
. "$here/../dm-qcow2/common.sh"

kmemleak=/sys/kernel/debug/kmemleak

# Objects younger than five seconds are not reported, nor what was seen once only.
no_leaks()
{
	sleep 6
	echo scan > "$kmemleak"
	echo scan > "$kmemleak"
	cat "$kmemleak" > "$dir/leaks"
	if [ -s "$dir/leaks" ]; then
		note "$(head -n 60 "$dir/leaks")"
		fault "kmemleak has found $(grep -c '^unreferenced' "$dir/leaks") objects"
	fi
}

with_module()
{
	no_leaks
	grep -q '^dm_qcow2 ' /proc/modules
}

without_module()
{
	rmmod dm_qcow2
	no_leaks
	load_module
}

start rmmod
[ -e "$kmemleak" ] || skip_all "the kernel has no kmemleak"
check "no leaks after the tests" with_module
check "no leaks once the module is gone" without_module
finish
