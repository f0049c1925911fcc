# SPDX-License-Identifier: GPL-2.0-or-later
# shellcheck shell=bash disable=SC2154
#
# What the tests of "qcow2setup resize" have in common: the device $name, its image i,
# and a model of what it holds. To be sourced after common.sh.

name=$prefix-i

bytes()
{
	blockdev --getsize64 "/dev/mapper/$name"
}

pattern()
{
	yes "$1" | head -c "$2"
}

# put TEXT LENGTH MIB: to the device, and to the model
put()
{
	pattern "$1" "$2" > "$dir/piece"
	dd if="$dir/piece" of="/dev/mapper/$name" bs=512 seek=$(($3 * 2048)) oflag=direct conv=notrunc status=none
	dd if="$dir/piece" of="$dir/model" bs=512 seek=$(($3 * 2048)) conv=notrunc status=none
}

open_it()
{
	"$tool" open "$dir/i.qcow2" "$name" --data-file "$dir/i.data" "$@"
}

judge()
{
	[ "$(mode i)" = rw ] || fault "mode $(mode i)"
	cmp "/dev/mapper/$name" "$dir/model"
	"$tool" close "$name"
	poll 30 loops_gone
	nothing_left
	qemu-img check -q -f qcow2 "$dir/i.qcow2" || fault "qemu-img check: $?"
	qemu-img compare -q -f qcow2 -F raw "$dir/i.qcow2" "$dir/model"
}

# A load in the background, process $load
in_use()
{
	[ "$(dmsetup info -c --noheadings -o open "$name")" -gt 0 ]
}

end_load()
{
	kill "$load"
	wait "$load"
}
