#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# qcow2setup: a device from its image and back, and what is changed of the image.

# shellcheck source=common.sh
. "$(dirname "$0")/common.sh"

name=$prefix-i

whole_cycle()
{
	local size

	truncate -s 32M "$dir/data"
	"$tool" create "$dir/a.qcow2" --data-file "$dir/data"
	qemu-img check -q "$dir/a.qcow2"
	size=$(stat -c %s "$dir/a.qcow2")
	"$tool" open "$dir/a.qcow2" "$name" --data-file "$dir/data"
	[ "$(blockdev --getsize64 "/dev/mapper/$name")" = $((32 << 20)) ]
	[ "$(stat -c %s "$dir/a.qcow2")" -gt "$size" ] || fault "the metadata was not extended"
	truncate -s 32M "$dir/model"
	pattern PATTERN 1000000 | dd of="/dev/mapper/$name" bs=1M seek=3 oflag=direct iflag=fullblock \
		conv=notrunc status=none
	pattern PATTERN 1000000 | dd of="$dir/model" bs=1M seek=3 conv=notrunc status=none
	"$tool" status "$name" > "$dir/out"
	grep -q 'mode: *rw' "$dir/out"
	grep -q "$dir/a.qcow2" "$dir/out"
	"$tool" status "$name" --json > "$dir/json"
	json "$dir/json" "j['mode'] == 'rw' and j['virtual-size'] == 32 << 20"
	json "$dir/json" "j['filename'] == '$dir/a.qcow2' and j['data-file'] == '$dir/data'"
	json "$dir/json" "j['cluster-size'] == 65536 and j['statistics']['first-writes'] > 0"
	"$tool" status > "$dir/out"
	grep -q "^$name .*rw" "$dir/out"
	"$tool" status --json > "$dir/json"
	json "$dir/json" "any(d['name'] == '$name' for d in j)"
	"$tool" close "$name"
	poll 30 loops_gone
	nothing_left
	qemu-img check -q "$dir/a.qcow2"
	qemu-img compare -q -f qcow2 -F raw "$dir/a.qcow2" "$dir/model"
	# One L2 table more than before, and not a byte beyond it.
	[ "$(stat -c %s "$dir/a.qcow2")" -le $((size + 2 * 65536)) ] || fault "not trimmed"
	[ "$(stat -c %s "$dir/data")" = $((32 << 20)) ]
	# Once more with nothing written: not a bit of difference in the end.
	before=$(sha256sum < "$dir/a.qcow2")
	"$tool" open "$dir/a.qcow2" "$name" --data-file "$dir/data"
	"$tool" close "$name"
	[ "$before" = "$(sha256sum < "$dir/a.qcow2")" ] || fault "open and close changed the image"
}

# The name of the image leads nowhere any more.
close_without_name()
{
	image i "$((1 << 20))"
	"$tool" open "$dir/i.qcow2" "$name" --data-file "$dir/i.data"
	rm "$dir/i.qcow2"
	"$tool" close --verbose "$name" > "$dir/out" 2>&1
	grep -q 'not trimmed' "$dir/out" || fault "$(cat "$dir/out")"
	not grep -q 'check the name' "$dir/out"
	poll 30 loops_gone
	nothing_left
}

block_devices()
{
	local meta data

	truncate -s 16M "$dir/meta.disk"
	pattern PATTERN $((8 << 20)) > "$dir/data.disk"
	meta=$(losetup -f --show "$dir/meta.disk")
	data=$(losetup -f --show "$dir/data.disk")
	refused 5 'overwrite-device' "$tool" create "$meta" --data-file "$data"
	refused 4 'same' "$tool" create "$data" --data-file "$data" --overwrite-device
	"$tool" create "$meta" --data-file "$data" --data-file-raw --overwrite-device
	"$tool" table "$meta" --data-file "$data" > "$dir/line"
	[ "$(cat "$dir/line")" = "$(python3 "$here/qcow2image.py" line "$dir/meta.disk" "$meta" "$data")" ] ||
		fault "table: $(cat "$dir/line")"
	dmsetup create "$name" "$dir/line"
	cmp "/dev/mapper/$name" "$dir/data.disk"
	refused 4 'not opened by|dmsetup remove' "$tool" close "$name"
	dmsetup remove --retry "$name"
	"$tool" open "$meta" "$name" --data-file "$data"
	cmp "/dev/mapper/$name" "$dir/data.disk"
	refused 5 'use' "$tool" open "$meta" "$name-2" --data-file "$data"
	refused 5 'use' "$tool" create "$meta" --data-file "$dir/data.disk" --overwrite-device
	"$tool" close "$name"
	losetup -d "$meta" "$data"
	qemu-img check -q "$dir/meta.disk"
	# For files it says how to get devices.
	refused 4 'losetup|loop' "$tool" table "$dir/meta.disk" --data-file "$dir/data.disk"
}

# Killed anywhere on the way: all is there, or nothing.
interrupted()
{
	local t rc size

	image i $((256 << 20)) cluster_size=4k
	size=$(stat -c %s "$dir/i.qcow2")
	for t in 0.02 0.05 0.1 0.15 0.2 0.25 0.3 0.4; do
		rc=0
		timeout -s TERM "$t" "$tool" open "$dir/i.qcow2" "$name" --data-file "$dir/i.data" \
			> /dev/null 2>&1 || rc=$?
		if dmsetup info "$name" > /dev/null 2>&1; then
			[ "$(mode i)" = rw ]
			"$tool" close "$name"
			# It ends with a whole cluster now.
			size=$(((size + 4095) / 4096 * 4096))
		fi
		poll 30 loops_gone
		nothing_left
		[ "$(stat -c %s "$dir/i.qcow2")" = "$size" ] ||
			fault "after $t s (status $rc): the file has $(stat -c %s "$dir/i.qcow2") bytes, not $size"
		qemu-img check -q "$dir/i.qcow2"
	done
}

autoclear()
{
	local before

	image i $((4 << 20)) data_file_raw=on
	field "$dir/i.qcow2" autoclear_features 0x8000000000000006
	field "$dir/i.qcow2" compatible_features 0x4000000000000002
	before=$(sha256sum < "$dir/i.qcow2")
	"$tool" open "$dir/i.qcow2" "$name" --data-file "$dir/i.data" --readonly
	[ "$(blockdev --getro "/dev/mapper/$name")" = 1 ]
	"$tool" close "$name"
	[ "$before" = "$(sha256sum < "$dir/i.qcow2")" ] || fault "--readonly changed the image"
	"$tool" open "$dir/i.qcow2" "$name" --data-file "$dir/i.data"
	[ "$(python3 "$here/qcow2image.py" get "$dir/i.qcow2" autoclear_features)" = 2 ] ||
		fault "autoclear bits while open"
	dmsetup status "$name" | grep -q data_file_raw
	"$tool" close "$name"
	[ "$(python3 "$here/qcow2image.py" get "$dir/i.qcow2" autoclear_features)" = 2 ]
	[ "$(python3 "$here/qcow2image.py" get "$dir/i.qcow2" compatible_features)" = $((0x4000000000000002)) ]
}

# Bitmaps that are to be kept up to date, which nobody does yet, must say so.
bitmaps()
{
	local before

	image i $((16 << 20)) ''
	qemu-img bitmap --add -f qcow2 "$dir/i.qcow2" live
	qemu-img bitmap --add --disable -f qcow2 "$dir/i.qcow2" frozen
	before=$(sha256sum < "$dir/i.qcow2")
	"$tool" open "$dir/i.qcow2" "$name" --data-file "$dir/i.data" --readonly 2> "$dir/err"
	"$tool" close "$name"
	[ "$before" = "$(sha256sum < "$dir/i.qcow2")" ] || fault "--readonly changed the image"
	"$tool" open "$dir/i.qcow2" "$name" --data-file "$dir/i.data" 2> "$dir/err"
	grep -q 'recorded in 1 bitmap$' "$dir/err" || fault "it does not say what it keeps: $(cat "$dir/err")"
	"$tool" close "$name"
	"$tool" bitmap list "$dir/i.qcow2" --json > "$dir/json"
	json "$dir/json" "{b['name']: (b['inconsistent'], b['count']) for b in j} \
		== {'live': (False, 0), 'frozen': (False, 0)}"
	"$tool" open "$dir/i.qcow2" "$name" --data-file "$dir/i.data" --drop-bitmaps 2> "$dir/err"
	grep -q 'live' "$dir/err" || fault "no warning names the bitmap: $(cat "$dir/err")"
	not grep -q 'frozen' "$dir/err"
	pattern PATTERN 100000 | dd of="/dev/mapper/$name" bs=64k oflag=direct iflag=fullblock conv=notrunc status=none
	"$tool" close "$name"
	qemu-img info --output=json "$dir/i.qcow2" > "$dir/json"
	json "$dir/json" "{b['name']: 'in-use' in b['flags'] for b in j['format-specific']['data']['bitmaps']} \
		== {'live': True, 'frozen': False}"
	"$tool" info --json "$dir/i.qcow2" > "$dir/json"
	json "$dir/json" "{b['name']: 'in-use' in b['flags'] for b in j['format-specific']['data']['bitmaps']} \
		== {'live': True, 'frozen': False}"
	qemu-img check -q "$dir/i.qcow2" || fault "qemu-img check: $?"

	# The header says that there are bitmaps, but there are none: QEMU would
	# damage the image at its first write.
	image j $((4 << 20)) ''
	field "$dir/j.qcow2" autoclear_features 1
	"$tool" open "$dir/j.qcow2" "$name" --data-file "$dir/j.data" 2> "$dir/err"
	grep -q 'bitmap' "$dir/err"
	"$tool" close "$name"
	[ "$(python3 "$here/qcow2image.py" get "$dir/j.qcow2" autoclear_features)" = 0 ]
}

# qemu-img ends a file in the middle of a sector; it must not be changed for that.
readonly_odd()
{
	local before s

	for s in 64k 512 2M; do
		image i $((5 << 20)) cluster_size="$s"
		[ $(($(stat -c %s "$dir/i.qcow2") % 512)) != 0 ] || fault "not an odd size: this tests nothing"
		before=$(sha256sum < "$dir/i.qcow2")
		"$tool" open "$dir/i.qcow2" "$name" --data-file "$dir/i.data" --readonly
		truncate -s 5M "$dir/zeros"
		cmp "/dev/mapper/$name" "$dir/zeros"
		not dd if=/dev/zero of="/dev/mapper/$name" count=1 oflag=direct status=none 2> /dev/null
		"$tool" close "$name"
		poll 30 loops_gone
		nothing_left
		[ "$before" = "$(sha256sum < "$dir/i.qcow2")" ] || fault "--readonly changed the image"
		rm -f "$dir"/i.*
	done
	# From where nothing can be written at all.
	image i $((4 << 20)) ''
	mkdir "$dir/ro"
	mount --bind "$dir" "$dir/ro"
	mount -o remount,bind,ro "$dir/ro"
	"$tool" open "$dir/ro/i.qcow2" "$name" --data-file "$dir/ro/i.data" --readonly
	"$tool" close "$name"
	poll 30 loops_gone
	refused '[24]' 'read-only|readonly' "$tool" open "$dir/ro/i.qcow2" "$name" --data-file "$dir/ro/i.data"
	umount "$dir/ro"
	nothing_left
}

# A refcount table that is too small for all L2 tables is replaced by a larger one.
refcount_table_grows()
{
	image i $((136 << 20)) cluster_size=512,refcount_bits=64
	before=$(python3 "$here/qcow2image.py" get "$dir/i.qcow2" refcount_table_clusters)
	"$tool" open "$dir/i.qcow2" "$name" --data-file "$dir/i.data"
	[ "$(python3 "$here/qcow2image.py" get "$dir/i.qcow2" refcount_table_clusters)" -gt "$before" ] ||
		fault "it did not grow: this tests nothing"
	truncate -s 136M "$dir/model"
	python3 - "/dev/mapper/$name" "$dir/model" <<-'END'
		import os, sys
		fds = [os.open(p, os.O_RDWR) for p in sys.argv[1:]]
		for i in range(0, 136 << 20, 32768):
		    for fd in fds:
		        os.pwrite(fd, b"%d" % i * 64, i)
		os.fsync(fds[0])
	END
	"$tool" close "$name"
	qemu-img check -q "$dir/i.qcow2" || fault "qemu-img check: $?"
	qemu-img compare -q -f qcow2 -F raw "$dir/i.qcow2" "$dir/model"
}

# What a guest has on its disk is never looked at: here an image that names a file of the
# host's, which no later step may open, or take for what is in the data file.
guest_image()
{
	local raw before size

	qemu-img create -q -f qcow2 -o "data_file=$dir/secret,data_file_raw=on" "$dir/evil" 64M
	pattern SECRET 65536 > "$dir/secret"
	before=$(sha256sum < "$dir/secret")
	size=$(stat -c %s "$dir/evil")
	for raw in '' --data-file-raw; do
		truncate -s 8M "$dir/d"
		# shellcheck disable=SC2086 # nothing, or one word
		"$tool" create "$dir/g.qcow2" --data-file "$dir/d" $raw
		"$tool" open "$dir/g.qcow2" "$name" --data-file "$dir/d"
		dd if="$dir/evil" of="/dev/mapper/$name" bs=64k oflag=direct iflag=fullblock conv=notrunc,sync status=none
		truncate -s 16M "$dir/d"
		"$tool" resize "$name" --size 16M
		"$tool" close "$name"
		poll 30 loops_gone
		"$tool" info "$dir/g.qcow2" > /dev/null
		"$tool" check "$dir/g.qcow2" > /dev/null
		"$tool" resize "$dir/g.qcow2" --size 32M --data-file "$dir/d"
		"$tool" open "$dir/g.qcow2" "$name" --data-file "$dir/d" --readonly
		[ "$(blockdev --getsize64 "/dev/mapper/$name")" = $((32 << 20)) ]
		cmp -n "$size" "/dev/mapper/$name" "$dir/evil"
		"$tool" close "$name"
		poll 30 loops_gone
		[ "$before" = "$(sha256sum < "$dir/secret")" ] || fault "a file that the guest has named was changed"
		rm "$dir/g.qcow2" "$dir/d"
	done
}

# zeroed_from: where the table line says that zeros begin, or nothing
zeroed_from()
{
	dmsetup table "$name" | sed -n 's/.* zeroed_from \([0-9]*\).*/\1/p'
}

# New tables are not zeroed where open has made the file longer, and only there: what
# was behind the metadata before need not be zeros.
zeros_known()
{
	local size

	image i $((64 << 20)) cluster_size=4096
	truncate -s 64M "$dir/model"
	pattern POISON 100000 >> "$dir/i.qcow2"
	size=$(stat -c %s "$dir/i.qcow2")
	"$tool" open "$dir/i.qcow2" "$name" --data-file "$dir/i.data"
	[ "$(zeroed_from)" = $(((size + 4095) / 4096 * 4096)) ] || fault "$(dmsetup table "$name")"
	# Under each table, so that some are on each side
	python3 - "/dev/mapper/$name" "$dir/model" <<-'END'
		import os, sys
		for path in sys.argv[1:]:
		    fd = os.open(path, os.O_WRONLY)
		    for at in range(8192, 64 << 20, 2 << 20):
		        os.pwrite(fd, b"%4096d" % at, at)
		    os.fsync(fd)
	END
	cmp "/dev/mapper/$name" "$dir/model"
	"$tool" resize "$name" --size 96M
	[ "$(zeroed_from)" -gt "$size" ] || fault "$(dmsetup table "$name")"
	"$tool" close "$name"
	truncate -s 96M "$dir/model"
	qemu-img check -q "$dir/i.qcow2" || fault "qemu-img check: $?"
	qemu-img compare -q -f qcow2 -F raw "$dir/i.qcow2" "$dir/model"

	"$tool" open "$dir/i.qcow2" "$name" --data-file "$dir/i.data" --sparse 2> "$dir/err"
	[ -z "$(zeroed_from)" ] || fault "sparse, and: $(dmsetup table "$name")"
	"$tool" close "$name"
	"$tool" open "$dir/i.qcow2" "$name" --data-file "$dir/i.data" --readonly
	[ -z "$(zeroed_from)" ] || fault "read-only, and: $(dmsetup table "$name")"
	"$tool" close "$name"
}

start cmp
need_tool
check "create, open, status, close" whole_cycle
check "close when the image has been removed" close_without_name
check "block devices, and the table line" block_devices
check "interrupted" interrupted
check "autoclear bits" autoclear
check "bitmaps" bitmaps
check "--readonly changes nothing" readonly_odd
check "the refcount table grows" refcount_table_grows
check "where zeros are known" zeros_known
check "a guest that has a qcow2 image on its disk" guest_image
finish
