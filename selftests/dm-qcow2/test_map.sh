#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# qcow2setup map of devices that are open, and check of images on block devices.
# QEMU's view of the image is what map must show.

. "$(dirname "$0")/common.sh"

name=$prefix-m

# same_map WHAT: of the device or image, and as QEMU sees the image, then: it is the
# map that makes a device write what it has changed. The copy has no holes: else QEMU
# would look for holes in the data file, too.
same_map()
{
	"$tool" map --json "$1" > "$dir/ours"
	cp --sparse=never "$dir/m.qcow2" "$dir/copy.qcow2"
	qemu-img map -U --output=json "$dir/copy.qcow2" > "$dir/theirs"
	python3 - "$dir/theirs" "$dir/ours" <<'PYTHON'
import json, sys
theirs, ours = (json.load(open(f)) for f in sys.argv[1:])
for e in theirs:
    e.pop("compressed", None)
if theirs != ours:
    sys.exit(f"QEMU: {theirs}\nqcow2setup: {ours}")
PYTHON
}

# What was just written is there, though nobody has made the device write it.
live()
{
	image m 48M "${1-}"
	"$tool" open "$dir/m.qcow2" "$name" --data-file "$dir/m.data"
	dev=/dev/mapper/$name
	same_map "$name"
	# without a flush at the end, which QEMU would make
	dd if=/dev/zero of="$dev" bs=64k seek=48 count=32 oflag=direct conv=nocreat status=none
	dd if=/dev/zero of="$dev" bs=1k seek=20480 count=1 oflag=direct conv=nocreat status=none
	"$tool" map --json "$name" > "$dir/ours"
	grep -q '"data": true' "$dir/ours" || fault "what was written is not there"
	same_map "$name"
	qemu-io -n -f raw -c 'write -z 4M 512k' "$dev" > "$dir/log"
	blkdiscard -o $((20 << 20)) -l $((1 << 20)) "$dev"
	same_map "$dev"
	"$tool" map "$name" > "$dir/out"
	grep -q '^ *START *LENGTH *STATE' "$dir/out"
	# a file of that name is in nobody's way
	: > "$dir/$name"
	(cd "$dir" && "$tool" map --json "/dev/mapper/$name") > "$dir/again"
	cmp "$dir/ours" "$dir/again"
	(cd "$dir" && refused 4 'too short|not a qcow2' "$tool" map "$name")
	dmsetup suspend "$name"
	same_map "$name"
	dmsetup resume "$name"
	refused 5 'locked|in use|attached' "$tool" map "$dir/m.qcow2"
	refused 1 'locked|in use|attached' "$tool" check "$dir/m.qcow2"
	refused 1 'locked|in use|attached' "$tool" check --repair all "$dir/m.qcow2"
	"$tool" close "$name"
	same_map "$dir/m.qcow2"
	"$tool" check "$dir/m.qcow2" > "$dir/out"
	"$tool" open "$dir/m.qcow2" "$name" --data-file "$dir/m.data" --readonly
	same_map "$name"
	# Readers do not mind each other.
	same_map "$dir/m.qcow2"
	"$tool" check "$dir/m.qcow2" > "$dir/out"
	"$tool" close "$name"
}

# Entries that are written while they are read: each is the old or the new one.
while_written()
{
	image m 48M cluster_size=4k
	"$tool" open "$dir/m.qcow2" "$name" --data-file "$dir/m.data"
	dev=/dev/mapper/$name
	dd if=/dev/zero of="$dev" bs=64k count=768 oflag=direct status=none &
	for _ in 1 2 3 4 5; do
		"$tool" map --json "$name" > "$dir/ours"
		python3 - "$dir/ours" <<'PYTHON'
import json, sys
at = 0
for e in json.load(open(sys.argv[1])):
    assert e["start"] == at, e
    at += e["length"]
assert at == 48 << 20, at
PYTHON
	done
	wait
	same_map "$name"
	"$tool" close "$name"
}

not_ours()
{
	dmsetup create "$name" --table '0 2048 zero'
	refused 4 'not a qcow2 device' "$tool" map "$name"
	# its name as that of an image
	refused 4 'not a qcow2 image' "$tool" map "/dev/mapper/$name"
	dmsetup remove "$name"
	refused 4 'no such file' "$tool" map "$name"
}

# refcount CLUSTER HEX: of the image on $lower, with 64 KiB clusters
refcount()
{
	printf '%b' "\\x${2:0:2}\\x${2:2:2}" |
		dd of="$lower" bs=1 seek=$((131072 + 2 * $1)) conv=nocreat,fsync status=none
}

check_device()
{
	image m 1G
	qemu-io -c 'write 0 64k' -c 'write 600M 64k' "$dir/m.qcow2" > "$dir/log"
	new_loop "$dir/m.lower" $((8 << 20))
	dd if="$dir/m.qcow2" of="$lower" bs=1M conv=nocreat oflag=direct status=none
	"$tool" check "$lower" > "$dir/out"
	qemu-img check -q -f qcow2 "$lower"
	# leaked, and used but not counted
	refcount 100 0001
	refcount 3 0000
	[ "$("$tool" check --json "$lower" 2> /dev/null | grep -c '"corruptions": 1\|"leaks": 1')" = 2 ]
	"$tool" check --repair all "$lower" > "$dir/out" 2>&1
	qemu-img check -q -f qcow2 "$lower"
	# no refcount blocks at all: new ones find their place behind the rest
	dd if=/dev/zero of="$lower" bs=1 seek=65536 count=8 conv=nocreat,fsync status=none
	"$tool" check --repair all "$lower" > "$dir/out" 2>&1
	qemu-img check -q -f qcow2 "$lower"
	# read only, and in use
	blockdev --setro "$lower"
	refused 1 'read-only' "$tool" check --repair all "$lower"
	"$tool" check "$lower" > "$dir/out"
	blockdev --setrw "$lower"
	dmsetup create "$name" --table "0 128 linear $lower 0"
	refused 1 'in use by' "$tool" check "$lower"
	dmsetup remove "$name"
}

# A device that is full: told, and nothing is changed.
check_full_device()
{
	local before

	image m 1G
	qemu-io -c 'write 0 64k' -c 'write 600M 64k' "$dir/m.qcow2" > "$dir/log"
	truncate -s %64k "$dir/m.qcow2"
	new_loop "$dir/m.lower" "$(stat -c %s "$dir/m.qcow2")"
	dd if="$dir/m.qcow2" of="$lower" bs=64k conv=nocreat oflag=direct status=none
	dd if=/dev/zero of="$lower" bs=1 seek=65536 count=8 conv=nocreat,fsync status=none
	before=$(sha256sum < "$lower")
	not "$tool" check --repair all "$lower" > "$dir/out" 2>&1
	grep -q 'no room' "$dir/out"
	[ "$before" = "$(sha256sum < "$lower")" ] || fault "it was changed"
}

need_tool
start blkdiscard
for options in '' cluster_size=512 data_file_raw=on extended_l2=on,cluster_size=16k; do
	check "map of an open device: ${options:-64k clusters}" live $options
done
check "map while it is written" while_written
check "map of other devices" not_ours
check "check of an image on a device" check_device
check "check of an image that fills its device" check_full_device
finish
