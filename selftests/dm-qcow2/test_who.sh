#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# What a name stands for: links below /dev in an image, who has an image open, devices
# that dmsetup has made, files that are out of reach.

# shellcheck source=common.sh
. "$(dirname "$0")/common.sh"

name=$prefix-i

# record IMAGE NAME: of the data file
record()
{
	python3 - "$1" "$2" <<-'END'
		import struct, sys
		with open(sys.argv[1], "r+b") as f:
		    name = sys.argv[2].encode()
		    ext = struct.pack(">II", 0x44415441, len(name)) + name + bytes(-len(name) % 8)
		    f.seek(112)
		    f.write((ext + bytes(8)).ljust(4096 - 112, b"\0"))
	END
}

# The device that the open image has its data on
data_number()
{
	dmsetup table "$name" | cut -d ' ' -f 5
}

# number DEVICE: "MAJOR:MINOR"
number()
{
	lsblk -dno MAJ:MIN "$1" | tr -d ' '
}

# trusted LINK: as the name of the data in the image, it is followed
trusted()
{
	record "$dir/i.qcow2" "$1"
	"$tool" open "$dir/i.qcow2" "$name" --trust-image-paths
	[ "$(data_number)" = "$(number "$lower")" ] || fault "$1: $(data_number)"
	"$tool" close "$name"
}

# distrusted LINK: it is not, and the remedy is as it is printed
distrusted()
{
	record "$dir/i.qcow2" "$1"
	refused 4 'symbolic link.*--data-file' "$tool" open "$dir/i.qcow2" "$name" --trust-image-paths
	option=${err##*; give }
	# shellcheck disable=SC2086 # words are wanted
	"$tool" open "$dir/i.qcow2" "$name" ${option/DEV|FILE/$lower}
	"$tool" close "$name"
}

links_of_roots()
{
	local dm links=/dev/$prefix

	image i $((4 << 20)) ''
	lower lv i-data $((4 << 20))
	dm=$(readlink -f "$lower")
	[[ $dm == /dev/dm-* ]] || dm=/dev/dm-$(stat -c %T "$lower" | { read -r n; echo $((0x$n)); })
	[ -b "$dm" ] || fault "no $dm"
	mkdir -p "$links/by-id"
	later rm -rf "$links"
	# as udev makes them, as LVM does, and a link to one
	ln -s "../../${dm#/dev/}" "$links/by-id/disk"
	trusted "$links/by-id/disk"
	ln -s "$lower" "$links/v"
	trusted "$links/v"
	ln -s by-id/disk "$links/again"
	trusted "$links/again"
	ln -s "by-id" "$links/folder"
	trusted "$links/folder/disk"
	# not for a file, nor for what is elsewhere
	truncate -s 4M "$links/file"
	ln -s file "$links/to-a-file"
	distrusted "$links/to-a-file"
	ln -s "$dm" "$dir/elsewhere"
	distrusted "$dir/elsewhere"
	ln -s "$dir/elsewhere" "$links/out"
	distrusted "$links/out"
	ln -s /dev/shm/../"$prefix/by-id/disk" "$links/through-shm"
	distrusted "$links/through-shm"
	ln -s loop "$links/loop"
	distrusted "$links/loop"
	# nor if others could have made it
	ln -s "$dm" "$links/user"
	chown -h 1000 "$links/user"
	distrusted "$links/user"
	chmod g+w "$links/by-id"
	distrusted "$links/by-id/disk"
	chmod g-w "$links/by-id"
	chown 1000 "$links/by-id"
	distrusted "$links/by-id/disk"
	chown 0 "$links/by-id"
	trusted "$links/by-id/disk"
	# An open descriptor is no name.
	exec 7< "$dm"
	record "$dir/i.qcow2" /dev/fd/7
	refused 4 'symbolic link' "$tool" open "$dir/i.qcow2" "$name" --trust-image-paths
	exec 7<&-
	# So for what is behind.
	qemu-img create -q -f qcow2 -u -b "$links/v" -F raw -o "data_file=$dir/i.data" "$dir/top.qcow2" 4M
	"$tool" open "$dir/top.qcow2" "$name" --trust-image-paths
	dmsetup table "$name" | grep -q " backing_dev $(number "$lower") zeroed_from [0-9]*\$"
	"$tool" close "$name"
}

# Where it was looked for is told.
relative_names()
{
	image i $((4 << 20)) ''
	mkdir "$dir/sub"
	mv "$dir/i.qcow2" "$dir/sub"
	record "$dir/sub/i.qcow2" i.data
	cd "$dir"
	refused 4 "i.data: no such file or device in $dir/sub, .*; give --data-file" \
		"$tool" open "sub/i.qcow2" "$name" --trust-image-paths
	option=${err##*; give }
	# shellcheck disable=SC2086 # words are wanted
	"$tool" open "sub/i.qcow2" "$name" ${option/DEV|FILE/i.data}
	"$tool" close "$name"
	qemu-img create -q -f qcow2 -u -b base.qcow2 -F qcow2 -o "data_file=$dir/i.data" "$dir/sub/top.qcow2" 4M
	refused 4 "base.qcow2: no such file or device in $dir/sub, .*; give --backing-file" \
		"$tool" open "sub/top.qcow2" "$name" --trust-image-paths
	cd /
}

# now IMAGE VALUE: what info says can be done; $dir/json, and $dir/text
now()
{
	"$tool" info "$1" > "$dir/text"
	"$tool" info "$1" --json > "$dir/json"
	jq -e --arg v "$2" '."dm-qcow2" | .mappable == "read-write" and ."mappable-now" == $v' \
		"$dir/json" > /dev/null || fault "not $2: $(cat "$dir/text" "$dir/json")"
}

# users EXPRESSION: of the list in $dir/json
users()
{
	jq -e ".\"dm-qcow2\".users | $1" "$dir/json" > /dev/null ||
		fault "$1: $(jq '."dm-qcow2".users' "$dir/json")"
}

# The command that the text names for who has it
end_use()
{
	local command

	command=$(sed -n 's/^  in use: .*(\(.*\))$/\1/p' "$dir/text")
	[ -n "$command" ] || fault "$(cat "$dir/text")"
	[[ $command != *dmsetup* ]] || command=dmsetup${command#*dmsetup}
	eval "${command/#qcow2setup/"$tool"}"
}

who_has_it()
{
	local i=$dir/i.qcow2

	image i $((4 << 20)) ''
	now "$i" read-write
	users 'length == 0'
	"$tool" open "$i" "$name" --data-file "$dir/i.data"
	now "$i" no
	users "length == 1 and .[0].kind == \"qcow2\" and .[0].name == \"$name\" and (.[0].\"reads-only\" | not)"
	grep -q 'can be opened: read-write, but not now' "$dir/text"
	grep -q "in use: device $name can write" "$dir/text"
	# It is seen without privileges.
	chmod 755 "$dir"
	setpriv --reuid 65534 --clear-groups "$tool" info "$i" --json > "$dir/json" 2> "$dir/err"
	users ".[0].name == \"$name\""
	[ ! -s "$dir/err" ] || fault "$(cat "$dir/err")"
	end_use
	poll 30 loops_gone
	now "$i" read-write
	# Readers
	"$tool" open "$i" "$name" --data-file "$dir/i.data" --readonly
	now "$i" read-only
	users ".[0].name == \"$name\" and .[0].\"reads-only\""
	"$tool" open "$i" "$name-2" --data-file "$dir/i.data" --readonly
	now "$i" read-only
	users 'length == 2'
	"$tool" close "$name-2"
	now "$i" read-only
	end_use
	poll 30 loops_gone
	now "$i" read-write
	# The user of a hidden base is what is above it.
	qemu-img create -q -f qcow2 -b "$i" -F qcow2 -o "data_file=$dir/top.data" "$dir/top.qcow2" 4M
	truncate -s 4M "$dir/top.data"
	"$tool" open "$dir/top.qcow2" "$name" --data-file "$dir/top.data" \
		--backing-file "$i,data-file=$dir/i.data"
	now "$i" read-only
	users "length == 1 and .[0].name == \"$name\" and .[0].\"reads-only\""
	end_use
	poll 30 loops_gone
	now "$i" read-write
	# A block device
	lower loop m $((1 << 20))
	qemu-img convert -O raw "$i" "$dir/copy"
	dd if="$i" of="$lower" conv=notrunc status=none
	"$tool" open "$lower" "$name" --data-file "$dir/i.data"
	now "$lower" no
	users "length == 1 and .[0].name == \"$name\""
	end_use
	now "$lower" read-write
}

qemu_has_it()
{
	local i=$dir/i.qcow2

	image i $((4 << 20)) ''
	mkfifo "$dir/fifo"
	qemu-io -f qcow2 "$i" < "$dir/fifo" > "$dir/log" 2>&1 &
	qemu=$!
	exec 8> "$dir/fifo"
	poll 60 grep -q "OFDLCK.*:$(stat -c %i "$i") " /proc/locks
	now "$i" no
	users "length == 1 and .[0].kind == \"process\" and .[0].name == \"qemu-io\" and .[0].pid == $qemu"
	grep -q "in use: process $qemu (qemu-io) can write" "$dir/text"
	jq -e '."dm-qcow2".locked' "$dir/json" > /dev/null
	# open says where to look.
	refused 5 'locked.*qcow2setup info' "$tool" open "$i" "$name" --data-file "$dir/i.data"
	command=${err#*(} command=${command%% tells*}
	eval "${command/#qcow2setup/"$tool"}" > "$dir/text"
	grep -q "process $qemu" "$dir/text"
	# Not by one who may not look into processes: it is locked nevertheless.
	chmod 755 "$dir"
	setpriv --reuid 65534 --clear-groups "$tool" info "$i" > "$dir/text"
	grep -q 'but not now' "$dir/text"
	grep -q "in use: QEMU's locks.*not seen from here; run as root" "$dir/text"
	exec 8>&-
	wait "$qemu"
	now "$i" read-write
}

# Without qcow2setup: in all lists, as what they are
by_dmsetup()
{
	image i $((4 << 20)) ''
	map i
	now "$dir/i.qcow2" no
	users "length == 1 and .[0].kind == \"device\" and .[0].name == \"$name\""
	grep -q "$name.*which qcow2setup has not made" "$dir/text"
	"$tool" status > "$dir/out"
	grep -q "^$name .*rw.*$dir/i.qcow2 .*dmsetup\$" "$dir/out" || fault "$(cat "$dir/out")"
	"$tool" status --json > "$dir/json"
	jq -e --arg n "$name" '.[] | select(.name == $n) | ."made-by" == "dmsetup" and .mode == "rw"' \
		"$dir/json" > /dev/null
	"$tool" status "$name" > "$dir/out"
	grep -q 'made by: *dmsetup' "$dir/out"
	# It can be written, so nothing is put on it.
	qemu-img create -q -f qcow2 -u -b "$dev" -F raw -o "data_file=$dir/x" "$dir/top.qcow2" 4M
	refused 5 'qcow2 device that can be written' "$tool" open "$dir/top.qcow2" "$name-top" \
		--data-file "$dir/x" --backing-file "$dev"
	"$tool" map "$name" > "$dir/out"
	"$tool" map "/dev/mapper/$name" > "$dir/out2"
	cmp "$dir/out" "$dir/out2"
	refused 5 "$name.*made with dmsetup; remove it \(dmsetup remove $name\)" \
		"$tool" open "$dir/i.qcow2" "$name" --data-file "$dir/i.data"
	for arg in "$name" "/dev/mapper/$name"; do
		refused 4 "$name: not opened by qcow2setup.*\(dmsetup remove $name\)" \
			"$tool" resize "$arg" --size 8M
	done
	refused 4 "$name: not opened by qcow2setup, but made with dmsetup; remove it: dmsetup remove $name" \
		"$tool" close "$name"
	eval "${err##*remove it: }"
	losetup -d "$meta" "$data"
	poll 30 loops_gone
	now "$dir/i.qcow2" read-write
	"$tool" status --json > "$dir/json"
	jq -e --arg n "$name" 'all(.name != $n)' "$dir/json" > /dev/null
	# Below another: the chain is shown.
	map i read_only
	qemu-img create -q -f qcow2 -b "$dev" -F raw -o "data_file=$dir/top.data" "$dir/top.qcow2" 4M
	truncate -s 4M "$dir/top.data"
	"$tool" open "$dir/top.qcow2" "$name-top" --data-file "$dir/top.data" --backing-file "$dev"
	"$tool" status "$name-top" > "$dir/out"
	grep -q "backing: *$dir/i.qcow2 ($dev), data $dir/i.data" "$dir/out" || fault "$(cat "$dir/out")"
	now "$dir/i.qcow2" read-only
	users ".[0].name == \"$name\" and .[0].\"reads-only\""
	"$tool" close "$name-top"
	unmap i
	# Another target is none of ours, and is left alone.
	dmsetup create "$name" --table '0 2048 zero'
	for action in status close map "resize --size 1M"; do
		# shellcheck disable=SC2086 # words are wanted
		refused 4 "$name: not a qcow2 device \(its target is zero\)" "$tool" $action "$name"
	done
	refused 5 "$name.*target is zero.*choose another" \
		"$tool" open "$dir/i.qcow2" "$name" --data-file "$dir/i.data"
	"$tool" status > "$dir/out"
	not grep -q "^$name " "$dir/out"
	dmsetup remove "$name"
}

# A loop device over $dir/disk, whose file has been cut off at $1 where its name does
# not lead to it; $lower
cut_away()
{
	local at=$1 where=$2

	cp "$dir/i.qcow2" "$dir/disk"
	case $where in
	namespace)
		mkdir -p "$dir/mnt"
		rm -f "$dir/lower"
		# shellcheck disable=SC2016 # for the shell in there
		unshare -m bash -ec '
			mount -t tmpfs none "$1/mnt"
			cp "$1/disk" "$1/mnt/disk"
			losetup -f --show "$1/mnt/disk" > "$1/lower.new"
			truncate -s "$2" "$1/mnt/disk"
			mv "$1/lower.new" "$1/lower"
			exec sleep 1000' - "$dir" "$at" &
		holder=$!
		poll 60 test -s "$dir/lower"
		lower=$(< "$dir/lower") ;;
	process)
		lower=$(losetup -f --show "$dir/disk")
		exec 9<> "$dir/disk"
		truncate -s "$at" "$dir/disk" ;;
	nowhere)
		lower=$(losetup -f --show "$dir/disk")
		truncate -s "$at" "$dir/disk" ;;
	esac
	rm "$dir/disk"
	echo 3 > /proc/sys/vm/drop_caches
}

uncut()
{
	losetup -d "$lower"
	if [ -n "${holder-}" ]; then
		kill "$holder"
		wait "$holder" || true
		holder=''
	fi
	exec 9>&-
}

out_of_reach()
{
	local l1 where

	truncate -s 64M "$dir/i.data"
	qemu-img create -q -f qcow2 -o "data_file=$dir/i.data,cluster_size=4k" "$dir/i.qcow2" 64M
	qemu-io -f qcow2 -c 'write -q 0 64M' "$dir/i.qcow2"
	truncate -s 256K "$dir/i.qcow2"
	l1=$(python3 "$here/qcow2image.py" get "$dir/i.qcow2" l1_table_offset)
	l1=$((l1))
	for where in namespace process; do
		for at in $l1 $((l1 + 512)) $((l1 + 32768)); do
			cut_away "$at" "$where"
			refused 4 "$lower.* $at bytes.* 262144.*losetup --set-capacity $lower" "$tool" info "$lower"
			eval "$(grep -o 'losetup --set-capacity /dev/[a-z0-9]*' <<< "$err")"
			[ "$(blockdev --getsize64 "$lower")" = "$at" ]
			uncut
		done
	done
	# Only the loop device has it: what is before its end in a page shows it.
	cut_away $((l1 + 512)) nowhere
	# What info does not read, it does not miss.
	for action in "resize --size 128M" map; do
		# shellcheck disable=SC2086 # words are wanted
		refused '[14]' "the file of $lower, which is out of reach.* behind byte $l1 .*--set-capacity $lower" \
			"$tool" $action "$lower"
	done
	eval "$(grep -o 'losetup --set-capacity /dev/[a-z0-9]*' <<< "$err")"
	[ "$(blockdev --getsize64 "$lower")" = $((l1 + 512)) ]
	uncut
	# All is there: nothing is said.
	cut_away 262144 nowhere
	"$tool" info "$lower" > "$dir/out"
	"$tool" check "$lower" > "$dir/out"
	uncut
}

start jq setpriv lvm vgcreate lsblk
need_tool
check "links that root has made below /dev" links_of_roots
check "relative names in an image" relative_names
check "who has an image open: devices" who_has_it
check "who has an image open: QEMU" qemu_has_it
check "devices that dmsetup has made" by_dmsetup
check "loop devices whose file is out of reach" out_of_reach
finish
