#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# qcow2setup open, on file systems that are full.

# shellcheck source=common.sh
. "$(dirname "$0")/common.sh"

name=$prefix-i

# small_image [OPTION...]: 512 L2 tables of 4 KiB, in the small file system, sparse
small_image()
{
	truncate -s 1G "$dir/i.data" "$dir/model"
	yes POISON | head -c 8M | dd of="$dir/i.data" conv=notrunc status=none
	"$tool" create "$dir/i.qcow2" --data-file "$dir/i.data" --cluster-size 4k "$@"
	cp --sparse=always "$dir/i.qcow2" "$dir/mnt/i.qcow2"
	rm "$dir/i.qcow2"
}

# write_all: something under each L2 table, to the device and to the model
write_all()
{
	python3 - "/dev/mapper/$name" "$dir/model" <<-'END'
		import mmap, os, sys
		buf = mmap.mmap(-1, 4096)
		for path, flags in (sys.argv[1], os.O_DIRECT), (sys.argv[2], 0):
		    fd = os.open(path, os.O_WRONLY | flags)
		    for at in range(4096, 1 << 30, 2 << 20):
		        buf[:16] = b"%016d" % at
		        os.pwrite(fd, buf, at)
		    os.fsync(fd)
	END
}

# All is there, and QEMU finds nothing wrong.
closed_right()
{
	"$tool" close "$name"
	rm "$dir/mnt/fill"
	qemu-img check -q -f qcow2 "$dir/mnt/i.qcow2" || fault "qemu-img check: $?"
	qemu-img compare -q -f qcow2 -F raw "$dir/mnt/i.qcow2" "$dir/model"
}

# The file system is full when the device is used: all that was promised is there.
full_later()
{
	small_fs 24M
	small_image "$@"
	"$tool" open "$dir/mnt/i.qcow2" "$name" --data-file "$dir/i.data" 2> "$dir/log"
	[ ! -s "$dir/log" ] || fault "$(cat "$dir/log")"
	fill
	write_all
	[ "$(mode i)" = rw ] || fault "mode $(mode i)"
	closed_right
}

# It is full before: what is needed is told, and nothing is taken.
full_before()
{
	local before
	local open=("$tool" open "$dir/mnt/i.qcow2" "$name" --data-file "$dir/i.data")

	small_fs 24M
	small_image
	head -c 1M /dev/zero > "$dir/mnt/some"
	fill
	rm "$dir/mnt/some"
	sync -f "$dir/mnt"
	before=$(stat -c '%s %b' "$dir/mnt/i.qcow2"; df --output=avail "$dir/mnt"; sha256sum < "$dir/mnt/i.qcow2")
	refused 4 "$dir/mnt/i.qcow2: .*can need 2.* MiB, 2.* MiB more.*only (1 MiB|[0-9]* KiB) left; free some space there, or use --sparse" \
		"${open[@]}"
	nothing_left_but_fs
	[ "$before" = "$(stat -c '%s %b' "$dir/mnt/i.qcow2"; df --output=avail "$dir/mnt"
		sha256sum < "$dir/mnt/i.qcow2")" ] || fault "something was changed"
	# Reading needs none.
	"${open[@]}" --readonly
	"$tool" close "$name"
	"${open[@]}" --sparse 2> "$dir/err"
	[ "$(wc -l < "$dir/err")" = 1 ]
	grep -q 'warning: .*sparse.*full.*writes that need more metadata fail' "$dir/err"
	dd if=/dev/zero of="/dev/mapper/$name" bs=4k count=1 oflag=direct status=none
	# With some space it becomes real while it is open.
	refused 4 'can need.*use --sparse' "$tool" resize "$name" --size 1G
	[ "$(mode i)" = rw ]
	rm "$dir/mnt/fill"
	"$tool" resize "$name" --size 1G
	fill
	write_all
	closed_right
}

nothing_left_but_fs()
{
	local left

	left=$(losetup -n -l -O BACK-FILE | awk -v d="$dir/" 'index($1, d) == 1 && $1 != d "fs"'; our_devices)
	[ -z "$left" ] || fault "left behind: $left"
}

start mkfs.ext4
need_tool
check "a full file system: what was taken at open is there" full_later
check "a full file system: tables that are holes" full_later --preallocation metadata
check "a full file system when the image is opened" full_before
finish
