#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# qcow2setup create: what it makes, and what it leaves alone; and what info says of it.

# shellcheck source=common.sh
. "$(dirname "$0")/common.sh"

name=$prefix-i

# What is created must be what qemu-img takes, for any cluster size and width.
create_sizes()
{
	local c b bits

	pattern PATTERN $((5 << 20)) > "$dir/data"
	truncate -s $((5000000 / 512 * 512)) "$dir/data"
	bits=(1 16 64 8 32 2 4)
	for c in 512 1K 4K 16K 64K 256K 2M; do
		b=${bits[0]} bits=("${bits[@]:1}")
		"$tool" create "$dir/c.qcow2" --data-file "$dir/data" --cluster-size "$c" \
			--refcount-bits "$b"
		qemu-img check -q "$dir/c.qcow2" || fault "$c, $b bits: qemu-img check: $?"
		qemu-img info "$dir/c.qcow2" > "$dir/out"
		grep -q '(4999680 bytes)' "$dir/out"
		grep -q "refcount bits: $b\$" "$dir/out"
		grep -q "data file: $dir/data\$" "$dir/out"
		rm "$dir/c.qcow2"
		"$tool" create "$dir/c.qcow2" --data-file "$dir/data" --cluster-size "$c" --data-file-raw
		qemu-img check -q "$dir/c.qcow2" || fault "$c, raw: qemu-img check: $?"
		qemu-img compare -q -f qcow2 -F raw "$dir/c.qcow2" "$dir/data"
		rm "$dir/c.qcow2"
	done
}

# The data file is only looked at. Raw: its content shows; else: it does not.
create_over_a_disk()
{
	local before

	pattern PATTERN $((8 << 20)) > "$dir/data"
	before=$(sha256sum < "$dir/data")
	"$tool" create "$dir/raw.qcow2" --data-file "$dir/data" --data-file-raw
	"$tool" create "$dir/new.qcow2" --data-file "$dir/data"
	"$tool" create "$dir/pre.qcow2" --data-file "$dir/data" --size 6M --preallocation metadata
	[ "$before" = "$(sha256sum < "$dir/data")" ] || fault "the data was changed"
	"$tool" open "$dir/raw.qcow2" "$name" --data-file "$dir/data"
	cmp "/dev/mapper/$name" "$dir/data"
	"$tool" close "$name"
	truncate -s 8M "$dir/zeros"
	"$tool" open "$dir/new.qcow2" "$name" --data-file "$dir/data"
	cmp "/dev/mapper/$name" "$dir/zeros"
	"$tool" close "$name"
	[ "$before" = "$(sha256sum < "$dir/data")" ] || fault "the data was changed"
	qemu-img check -q "$dir/pre.qcow2"
	[ "$(qemu-img info --output=json "$dir/pre.qcow2" | jq '."virtual-size"')" = $((6 << 20)) ]

	before=$(sha256sum "$dir/raw.qcow2")
	refused 5 'exists' "$tool" create "$dir/raw.qcow2" --data-file "$dir/data"
	refused 5 'exists' "$tool" create "$dir/raw.qcow2" --data-file "$dir/data" --overwrite-device
	refused 5 'exists' "$tool" create "$dir/data" --data-file "$dir/data"
	[ "$before" = "$(sha256sum "$dir/raw.qcow2")" ]
	refused 4 'no such|folder' "$tool" create "$dir/no/x.qcow2" --data-file "$dir/data"
	refused 4 'no such' "$tool" create "$dir/x.qcow2" --data-file "$dir/no"
	refused 4 'enlarge|smaller' "$tool" create "$dir/x.qcow2" --data-file "$dir/data" --size 9M
	[ ! -e "$dir/x.qcow2" ]
	# A name that is a link is taken, whatever it points at.
	ln -s "$dir/target" "$dir/link"
	refused 5 'exists' "$tool" create "$dir/link" --data-file "$dir/data"
	[ ! -e "$dir/target" ]
}

# No space in the middle of it: nothing must remain.
create_no_space()
{
	local size

	mkdir "$dir/small"
	mount -t tmpfs -o size=128k tmpfs "$dir/small"
	truncate -s 64G "$dir/data"
	refused 4 'space|write' "$tool" create "$dir/small/x.qcow2" --data-file "$dir/data" --data-file-raw
	[ ! -e "$dir/small/x.qcow2" ] || fault "an unfinished file was left"
	umount "$dir/small"
	# The file may not grow: open cannot extend it, and must put it back.
	image i $((64 << 20)) ''
	size=$(stat -c %s "$dir/i.qcow2")
	before=$(sha256sum < "$dir/i.qcow2")
	(
		ulimit -f $((size / 1024 + 1))
		refused 4 'large|extend|limit' "$tool" open "$dir/i.qcow2" "$name" --data-file "$dir/i.data"
	)
	nothing_left
	[ "$before" = "$(sha256sum < "$dir/i.qcow2")" ] || fault "the image was changed"
}

info_json()
{
	local k

	image i $((16 << 20)) cluster_size=4k,refcount_bits=32
	qemu-img info --output=json "$dir/i.qcow2" > "$dir/theirs"
	"$tool" info --json "$dir/i.qcow2" > "$dir/json"
	# What qemu-img says too, must be the same.
	python3 - "$dir/theirs" "$dir/json" <<-'END'
		import json, sys
		theirs, ours = (json.load(open(p, encoding="utf-8")) for p in sys.argv[1:])
		def compare(a, b, path):
		    for key, value in a.items():
		        if isinstance(value, dict):
		            compare(value, b[key], path + key + "/")
		        elif b.get(key) != value:
		            sys.exit(f"{path}{key}: {b.get(key)!r}, qemu-img: {value!r}")
		compare(theirs, ours, "")
	END
	json "$dir/json" "j['dm-qcow2']['mappable'] == 'read-write' and not j['dm-qcow2']['reasons']"
	for k in 'virtual size' 'cluster size' 'data file' 'can be opened: read-write'; do
		"$tool" info "$dir/i.qcow2" | grep -q "$k" || fault "info does not tell: $k"
	done
	"$tool" status --json > "$dir/json"
	json "$dir/json" "j == []"
	refused 4 'not a qcow2' "$tool" info "$dir/i.data"
}

start jq
need_tool
check "create: any cluster size and refcount width" create_sizes
check "create: never touches the data, never overwrites an image" create_over_a_disk
check "no space: nothing is left, nothing is changed" create_no_space
check "info --json agrees with qemu-img" info_json
finish
