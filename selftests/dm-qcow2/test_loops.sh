#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# Loop devices that the user has made: what is given as a device is a device, and
# not the file behind it. It is never made longer or shorter, and where its file
# ends too early, that is told and not taken for zeros.

# shellcheck source=common.sh
. "$(dirname "$0")/common.sh"

name=$prefix-i

# put: where both are, at 1 MiB
put()
{
	yes written | head -c 7168 > "$dir/piece"
	dd if="$dir/piece" of="/dev/mapper/$name" bs=4096 seek=256 conv=notrunc,nocreat status=none
}

# Is it there, in the image on device $1 with the data $2?
there()
{
	"$tool" open "$1" "$name" --data-file "$2" --readonly
	dd if="/dev/mapper/$name" of="$dir/got" bs=4096 skip=256 count=2 status=none
	cmp -n 7168 "$dir/got" "$dir/piece"
	"$tool" close "$name"
}

# attach FILE [OPTION...]: $lower
attach()
{
	local file=$1

	shift
	lower=$(losetup -f --show "$@" "$file")
	later losetup -d "$lower"
}

length()
{
	stat -c %s "$1"
}

# What it was before, that is as long as it was, is at the start of the file.
behind_another()
{
	local meta data

	truncate -s 4M "$dir/i.data"
	truncate -s 40M "$dir/disk"
	qemu-img create -q -f qcow2 -o "data_file=$dir/i.data" "$dir/old" 4M
	dd if="$dir/old" of="$dir/disk" conv=notrunc status=none
	attach "$dir/disk" -o 1M "$@"
	meta=$lower
	attach "$dir/i.data"
	data=$lower
	"$tool" create "$meta" --data-file "$data" --overwrite-device
	"$tool" open "$meta" "$name" --data-file "$data"
	put
	"$tool" close "$name"
	[ "$(length "$dir/disk")" = $((40 << 20)) ] || fault "$(length "$dir/disk") bytes are left"
	cmp -n "$(length "$dir/old")" "$dir/old" "$dir/disk"
	there "$meta" "$data"
}

# All of a file, as open does it, but somebody else's
whole_file()
{
	local meta

	truncate -s 4M "$dir/i.data"
	truncate -s 2M "$dir/disk"
	attach "$dir/disk" "$@"
	meta=$lower
	"$tool" create "$meta" --data-file "$dir/i.data" --overwrite-device
	"$tool" open "$meta" "$name" --data-file "$dir/i.data"
	put
	"$tool" close "$name"
	[ "$(length "$dir/disk")" = $((2 << 20)) ] || fault "$(length "$dir/disk") bytes are left"
	there "$meta" "$dir/i.data"
}

# The loop device is told to go with its last user, which may be ours.
goes_with_it()
{
	truncate -s 4M "$dir/i.data"
	truncate -s 2M "$dir/disk"
	lower=$(losetup -f --show "$dir/disk")
	"$tool" create "$lower" --data-file "$dir/i.data" --overwrite-device
	"$tool" open "$lower" "$name" --data-file "$dir/i.data"
	losetup -d "$lower"
	[ "$(< "/sys/block/${lower##*/}/loop/autoclear")" = 1 ]
	put
	"$tool" close "$name"
	poll 30 loops_gone
	[ "$(length "$dir/disk")" = $((2 << 20)) ] || fault "$(length "$dir/disk") bytes are left"
	there "$dir/disk" "$dir/i.data"
}

# What open has made longer is cut off again.
given_as_file()
{
	local before

	truncate -s 4G "$dir/i.data"
	"$tool" create "$dir/i.qcow2" --data-file "$dir/i.data" --cluster-size 4K
	before=$(length "$dir/i.qcow2")
	"$tool" open "$dir/i.qcow2" "$name" --data-file "$dir/i.data"
	[ "$(length "$dir/i.qcow2")" -gt $((before + (8 << 20))) ]
	put
	"$tool" close "$name"
	[ "$(length "$dir/i.qcow2")" -lt $((before + (1 << 20))) ]
}

# What is not ours must not change.
state()
{
	dmsetup table "$name"
	length "$dir/disk"
	blockdev --getsize64 "$data"
}

data_is_a_part()
{
	truncate -s 40M "$dir/disk"
	attach "$dir/disk" -o 1M --sizelimit 4M
	data=$lower
	"$tool" create "$dir/i.qcow2" --data-file "$data"
	"$tool" open "$dir/i.qcow2" "$name" --data-file "$data"
	before=$(state)
	"$tool" resize "$name" --size auto
	[ "$before" = "$(state)" ] || fault "changed: $(state)"
	refused 4 "$data.*4194304 bytes.*8388608.*enlarge" "$tool" resize "$name" --size 8M
	[ "$before" = "$(state)" ] || fault "changed: $(state)"
	"$tool" status "$name" --json > "$dir/json"
	jq -e --arg d "$data" '."data-file" == $d' "$dir/json" > "$dir/out"
	"$tool" close "$name"
}

# The file is longer than its device shows, and that is for its owner to change.
data_file_grows()
{
	truncate -s 4M "$dir/disk"
	attach "$dir/disk"
	data=$lower
	"$tool" create "$dir/i.qcow2" --data-file "$data"
	"$tool" open "$dir/i.qcow2" "$name" --data-file "$data"
	truncate -s 8M "$dir/disk"
	before=$(state)
	"$tool" resize "$name" --size auto
	[ "$before" = "$(state)" ] || fault "changed: $(state)"
	refused 4 "$data.*4194304 bytes.*16777216.*enlarge" "$tool" resize "$name" --size 16M
	[ "$before" = "$(state)" ] || fault "changed: $(state)"
	losetup -c "$data"
	"$tool" resize "$name" --size auto
	[ "$(blockdev --getsize64 "/dev/mapper/$name")" = $((8 << 20)) ]
	"$tool" close "$name"
}

# The metadata's device has got too small for a larger image.
metadata_is_not_grown()
{
	truncate -s 1M "$dir/i.data"
	truncate -s 64K "$dir/disk"
	attach "$dir/disk"
	data=$lower
	"$tool" create "$data" --data-file "$dir/i.data" --cluster-size 512 --overwrite-device
	"$tool" open "$data" "$name" --data-file "$dir/i.data"
	before=$(state)
	refused 4 "$data.*65536 bytes.*enlarge" "$tool" resize "$name" --size 64M
	[ "$before" = "$(state)" ] || fault "changed: $(state)"
	[ "$(length "$dir/i.data")" = $((1 << 20)) ]
	"$tool" close "$name"
	[ "$(length "$dir/disk")" = 65536 ]
}

# Two devices show the same bytes of a file, or others.
two_of_a_file()
{
	local meta data

	truncate -s 8M "$dir/disk"
	attach "$dir/disk" -o 1M --sizelimit 2M
	meta=$lower
	attach "$dir/disk" -o 2M --sizelimit 4M
	refused 4 'same' "$tool" create "$meta" --data-file "$lower" --overwrite-device
	attach "$dir/disk" -o 3M --sizelimit 4M
	data=$lower
	"$tool" create "$meta" --data-file "$data" --overwrite-device
	"$tool" open "$meta" "$name" --data-file "$data"
	put
	"$tool" close "$name"
	attach "$dir/disk" -o 1M
	refused 4 'same' "$tool" open "$meta" "$name" --data-file "$lower"
	refused 4 'same' "$tool" open "$meta" "$name" --data-file "$dir/disk"
	there "$meta" "$data"
}

only_lower()
{
	[ "$(loops_here)" = "$lower" ]
}

# An image has been opened with a part of its data file: not what is asked for.
chain_over_a_part()
{
	yes base | head -c 5M > "$dir/base.data"
	"$tool" create "$dir/base.qcow2" --data-file "$dir/base.data" --data-file-raw --size 4M
	truncate -s 4M "$dir/i.data"
	qemu-img create -q -f qcow2 -b "$dir/base.qcow2" -F qcow2 -o "data_file=$dir/i.data" "$dir/i.qcow2" 4M
	attach "$dir/base.data" -r -o 512
	"$tool" open "$dir/base.qcow2" "$name-base" --data-file "$lower" --readonly
	refused 5 'another data' "$tool" open "$dir/i.qcow2" "$name" --data-file "$dir/i.data" \
		--backing-file "$dir/base.qcow2,data-file=$dir/base.data"
	"$tool" close "$name-base"
	"$tool" open "$dir/i.qcow2" "$name" --data-file "$dir/i.data" \
		--backing-file "$dir/base.qcow2,data-file=$dir/base.data"
	cmp -n $((4 << 20)) "/dev/mapper/$name" "$dir/base.data"
	"$tool" close "$name"
	poll 30 only_lower
}

# The file of a device has been cut off.
ends_early()
{
	local meta data

	truncate -s 4M "$dir/i.data"
	truncate -s 2M "$dir/disk"
	attach "$dir/disk"
	meta=$lower
	attach "$dir/i.data"
	data=$lower
	"$tool" create "$meta" --data-file "$data" --overwrite-device
	dmsetup create "$prefix-meta" --table "0 4096 linear $meta 0"
	later dmsetup remove --retry "$prefix-meta"
	truncate -s 192K "$dir/disk"
	early="$dir/disk.*$meta.*196608 bytes.*2097152.*losetup --set-capacity $meta"
	for image in "$meta" "/dev/mapper/$prefix-meta"; do
		refused 4 "$early" "$tool" info "$image"
		refused 4 "$early" "$tool" open "$image" "$name" --data-file "$data"
		refused 4 "$early" "$tool" table "$image" --data-file "$data"
		refused 4 "$early" "$tool" map "$image"
		refused '[^0]*' "$early" "$tool" check "$image"
		refused 4 "$early" "$tool" resize "$image" --size 8M
		refused 4 "$early" "$tool" create "$image" --data-file "$data" --overwrite-device
	done
	unwind 2
	# The remedy, as it is printed
	remedy=$(grep -o 'losetup --set-capacity /dev/[a-z0-9]*' <<< "$err")
	eval "$remedy"
	[ "$(blockdev --getsize64 "$meta")" = 196608 ]
	refused 4 'truncated|beyond' "$tool" open "$meta" "$name" --data-file "$data"
	# So for data, and for what is behind.
	qemu-img create -q -f qcow2 -o "data_file=$dir/i.data" "$dir/i.qcow2" 4M
	qemu-img create -q -f qcow2 -b "$data" -F raw -o "data_file=$dir/top.data" "$dir/top.qcow2" 4M
	truncate -s 4M "$dir/top.data"
	truncate -s 3M "$dir/i.data"
	refused 4 "$data.*losetup" "$tool" open "$dir/i.qcow2" "$name" --data-file "$data"
	refused 4 "$data.*losetup" "$tool" open "$dir/top.qcow2" "$name" --data-file "$dir/top.data" \
		--backing-file "$data"
	truncate -s 4M "$dir/i.data"
	"$tool" open "$dir/i.qcow2" "$name" --data-file "$data"
	"$tool" close "$name"
}

# Nobody can say how long the file is: what is there must be read all the same.
out_of_reach()
{
	local meta

	truncate -s 4M "$dir/i.data"
	truncate -s 2M "$dir/disk"
	attach "$dir/disk"
	meta=$lower
	"$tool" create "$meta" --data-file "$dir/i.data" --overwrite-device
	exec 9<> "$dir/disk"
	rm "$dir/disk"
	truncate -s 512K /proc/self/fd/9
	exec 9>&-
	echo 3 > /proc/sys/vm/drop_caches
	"$tool" info "$meta" --json > "$dir/json"
	jq -e '."virtual-size" == 4194304' "$dir/json" > "$dir/out"
	"$tool" open "$meta" "$name" --data-file "$dir/i.data" --readonly
	"$tool" close "$name"
}

# A /dev of its own, where nobody makes nodes: run COMMAND there
in_bare_dev()
{
	mkdir -p "$dir/dev"
	# shellcheck disable=SC2016 # for the shell in there
	unshare -m bash -ec '
		mount -t tmpfs none "$1/dev"
		cp -a /dev/null /dev/loop-control "$1/dev"
		mkdir "$1/dev/mapper"
		cp -a /dev/mapper/control "$1/dev/mapper"
		mount --bind "$1/dev" /dev
		shift
		"$@"' - "$dir" "$@"
}

in_a_container()
{
	"$tool" open "$dir/i.qcow2" "$name" --data-file "$dir/i.data"
	put
	"$tool" close "$name"
	ls /dev/loop[0-9]* > "$dir/nodes"
	# Another one may not make nodes: somebody else has to.
	rm /dev/loop[0-9]*
	refused 2 "missing.*mknod /dev/loop[0-9]* b 7 [0-9]*" setpriv --bounding-set -mknod \
		"$tool" open "$dir/i.qcow2" "$name" --data-file "$dir/i.data" --readonly
	eval "${err#*allowed: }"
	refused 2 "missing.*mknod /dev/loop[0-9]* b 7 [0-9]*" setpriv --bounding-set -mknod \
		"$tool" open "$dir/i.qcow2" "$name" --data-file "$dir/i.data" --readonly
	eval "${err#*allowed: }"
	there "$dir/i.qcow2" "$dir/i.data"
}

no_node()
{
	local f

	truncate -s 4M "$dir/i.data"
	"$tool" create "$dir/i.qcow2" --data-file "$dir/i.data"
	export dir name tool
	for f in put there refused fault note in_a_container ktap_print_msg; do
		export -f "${f?}"
	done
	in_bare_dev bash -ec in_a_container
}

start jq setpriv
need_tool
check "close: an image behind another one in a file" behind_another
check "close: the same with sectors of 4 KiB" behind_another --sector-size 4096
check "close: all of a file" whole_file
check "close: all of a file, with direct I/O and sectors of 4 KiB" whole_file --sector-size 4096
check "close: a loop device that goes with it" goes_with_it
check "close: a file is cut off again" given_as_file
check "resize: the data is a part of a file" data_is_a_part
check "resize: the data's file is longer" data_file_grows
check "resize: the metadata" metadata_is_not_grown
check "two devices of one file" two_of_a_file
check "a chain over a part of a file" chain_over_a_part
check "a file that has been cut off" ends_early
check "a file that is out of reach" out_of_reach
check "loop devices that have no node" no_node
finish
