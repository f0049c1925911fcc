#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# qcow2setup open --partitions: partitions of a disk as devices, named as kpartx does it.

# shellcheck source=selftests/dm-qcow2/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

tool=$here/../../tools/qcow2setup
size=$((64 << 20))

# disk NAME SFDISK_LINE...: a raw disk with that table, under dm-qcow2
disk()
{
	local name=$1

	shift
	truncate -s "$size" "$dir/$name.data"
	printf '%s\n' "$@" | sfdisk -q "$dir/$name.data"
	"$tool" create "$dir/$name.qcow2" --data-file "$dir/$name.data" --data-file-raw
}

# open NAME DEVICE [OPTION...]
open()
{
	"$tool" open "$dir/$1.qcow2" "$2" --data-file "$dir/$1.data" --partitions "${@:3}"
}

parts()
{
	dmsetup ls | awk -v p="$prefix" 'index($1, p) == 1 { print $1 }' | sort | tr '\n' ' '
}

no_parts()
{
	[ -z "$(parts)" ]
}

# refused CODE TEXT ARGUMENT...: one line that has TEXT
refused()
{
	local code=$1 text=$2 rc=0

	shift 2
	"$tool" "$@" > "$dir/said" 2>&1 || rc=$?
	if [ "$rc" != "$code" ] || [ "$(wc -l < "$dir/said")" != 1 ] || ! grep -q "$text" "$dir/said"; then
		fault "$*: $rc: $(cat "$dir/said")"
	fi
}

# table DEVICE: start and length on the disk
table()
{
	dmsetup table "$1" | awk '{ print $5, $2 }'
}

gpt()
{
	disk a 'label: gpt' 'start=2048, size=8192' 'start=16384, size=32768' 'start=65536'
	open a "${prefix}x"
	[ "$(parts)" = "${prefix}x ${prefix}x1 ${prefix}x2 ${prefix}x3 " ]
	[ "$(table "${prefix}x1")" = '2048 8192' ] && [ "$(table "${prefix}x2")" = '16384 32768' ]
	mkfs.ext4 -q "/dev/mapper/${prefix}x2"
	mkdir "$dir/mnt"
	mount "/dev/mapper/${prefix}x2" "$dir/mnt"
	echo content > "$dir/mnt/file"
	# One is in use: all stay.
	refused 5 "${prefix}x2: partition is in use: mounted" close "${prefix}x"
	[ "$(parts)" = "${prefix}x ${prefix}x1 ${prefix}x2 ${prefix}x3 " ]
	umount "$dir/mnt"
	"$tool" close "${prefix}x"
	[ -z "$(parts)" ] && [ -z "$(loops_here)" ]
	# It is where it belongs.
	debugfs -R 'cat /file' "$dir/a.data?offset=$((16384 * 512))" | grep -q content
}

digits()
{
	disk a 'label: dos' 'start=2048, size=8192' 'start=16384, size=32768, type=5' 'start=18432, size=2048' \
		'start=22528, size=4096'
	open a "${prefix}7"
	# What an extended one holds, not it; with a p behind a digit
	[ "$(parts)" = "${prefix}7 ${prefix}7p1 ${prefix}7p5 ${prefix}7p6 " ] || fault "$(parts)"
	[ "$(table "${prefix}7p6")" = '22528 4096' ]
	"$tool" close "${prefix}7"
	[ -z "$(parts)" ]
}

# described: names, uuids, tables without numbers of devices
described()
{
	local p

	for p in $(parts); do
		echo "$p $(dmsetup info -c --noheadings -o uuid "$p") $(dmsetup table "$p")"
	done | sed 's/ [0-9]*:[0-9]* / /g'
}

as_kpartx()
{
	local kind=$1 name=$2

	disk a "label: $kind" 'start=2048, size=8192' 'start=16384'
	open a "$name"
	described > "$dir/ours"
	"$tool" close "$name"
	"$tool" open "$dir/a.qcow2" "$name" --data-file "$dir/a.data"
	kpartx -a "/dev/mapper/$name"
	described | diff "$dir/ours" -
	# What it has made, close takes away.
	"$tool" close "$name"
	[ -z "$(parts)" ]
	# And the other way round
	open a "$name"
	kpartx -d "/dev/mapper/$name"
	[ "$(parts)" = "$name " ]
	"$tool" close "$name"
}

readonly_parts()
{
	disk a 'label: gpt' 'start=2048, size=8192'
	open a "${prefix}x" --readonly
	[ "$(blockdev --getro "/dev/mapper/${prefix}x1")" = 1 ]
	"$tool" close "${prefix}x"
	[ -z "$(parts)" ]
}

none()
{
	truncate -s "$size" "$dir/a.data"
	"$tool" create "$dir/a.qcow2" --data-file "$dir/a.data" --data-file-raw
	open a "${prefix}x" 2> "$dir/said"
	grep -q 'no partitions are found' "$dir/said"
	[ "$(parts)" = "${prefix}x " ]
	"$tool" close "${prefix}x"
}

# A guest can write any numbers there.
hostile()
{
	disk a 'label: dos' 'start=2048, size=8192' 'start=16384, size=8192'
	# The second one's size: beyond the end
	printf '\377\377\377\177' | dd of="$dir/a.data" bs=1 seek=$((446 + 16 + 12)) conv=notrunc status=none
	open a "${prefix}x" 2> "$dir/said"
	for p in $(parts | tr ' ' '\n' | grep "x[0-9]"); do
		read -r start length < <(table "$p")
		[ $((start + length)) -le $((size / 512)) ] || fault "$p: $start $length"
	done
	"$tool" close "${prefix}x"
}

# The name of one is taken: nothing is left, and the image is as it was.
taken()
{
	local was

	disk a 'label: gpt' 'start=2048, size=8192' 'start=16384, size=8192'
	was=$(sha256sum "$dir/a.qcow2")
	dmsetup create "${prefix}x2" --table '0 8 zero'
	refused 5 "${prefix}x2: a device of that name exists" open "$dir/a.qcow2" "${prefix}x" --data-file "$dir/a.data" --partitions
	[ "$(parts)" = "${prefix}x2 " ] && [ -z "$(loops_here)" ] && [ "$was" = "$(sha256sum "$dir/a.qcow2")" ]
	dmsetup remove "${prefix}x2"
}

# The disk itself is in use, too: its partitions come back.
disk_in_use()
{
	disk a 'label: gpt' 'start=2048, size=8192' 'start=16384, size=8192'
	open a "${prefix}x"
	exec 7< "/dev/mapper/${prefix}x"
	refused 5 "${prefix}x: in use" close "${prefix}x"
	[ "$(parts)" = "${prefix}x ${prefix}x1 ${prefix}x2 " ]
	exec 7<&-
	# With --deferred all go with the last user.
	exec 7< "/dev/mapper/${prefix}x2"
	"$tool" close "${prefix}x" --deferred
	exec 7<&-
	poll 30 no_parts
}

# Partitions of a clone are those of its base again after a reset.
clones()
{
	disk a 'label: gpt' 'start=2048, size=8192' 'start=16384, size=8192'
	"$tool" clone "$dir/a.data" "${prefix}x" --dir "$dir" --partitions
	[ "$(parts)" = "${prefix}x ${prefix}x1 ${prefix}x2 " ]
	exec 7< "/dev/mapper/${prefix}x2"
	refused 5 "${prefix}x2: partition is in use" reset "${prefix}x"
	exec 7<&-
	echo 'label: gpt' | sfdisk -q --no-tell-kernel --force "/dev/mapper/${prefix}x" 2> "$dir/said"
	"$tool" reset "${prefix}x"
	[ "$(parts)" = "${prefix}x ${prefix}x1 ${prefix}x2 " ]
	"$tool" close "${prefix}x" --delete
	[ -z "$(parts)" ]
}

start sfdisk kpartx mkfs.ext4 debugfs
check "a GPT: names, places, content; close takes them away, or none" gpt
check "logical partitions, and a name that ends in a digit" digits
check "named and marked as by kpartx: each takes away what the other has made" as_kpartx gpt "${prefix}x"
check "the same with a name that ends in a digit" as_kpartx dos "${prefix}7"
check "of a device that is open read-only" readonly_parts
check "a disk without partitions is opened, and it is said" none
check "a table with numbers that are not on the disk" hostile
check "a name that is taken: nothing is left" taken
check "close: the disk is in use: partitions come back; --deferred" disk_in_use
check "clone and reset" clones
finish
