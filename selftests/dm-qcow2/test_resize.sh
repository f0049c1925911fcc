#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# qcow2setup resize: of images, and of devices that are in use. Nothing may be
# lost, and whatever is refused must leave everything as it was.

# shellcheck source=common.sh
. "$(dirname "$0")/common.sh"
# shellcheck source=resized.sh
. "$here/resized.sh"

# Step by step larger, and written in between.
grows()
{
	local size n=1

	image i 1049088 "$1"
	truncate -s 1049088 "$dir/model"
	open_it
	put old 7168 0
	put end 512 1
	for size in 3146240 $((40 << 20)); do
		"$tool" resize "$name" --size "$size"
		truncate -s "$size" "$dir/model"
		[ "$(bytes)" = "$size" ] || fault "the device has $(bytes) bytes"
		cmp "/dev/mapper/$name" "$dir/model"
		n=$((n + 1))
		put "after $n" 66048 $((n - 1))
	done
	put last 1048576 39
	[ "$(stat -c %s "$dir/i.data")" = $((40 << 20)) ]
	judge
}

# With content of the data that must not show, since nobody wrote it there.
over_old_data()
{
	image i 1049088 "$1"
	cp "$dir/i.data" "$dir/head"
	pattern JUNK $((8 << 20)) > "$dir/i.data"
	dd if="$dir/head" of="$dir/i.data" conv=notrunc status=none
	truncate -s 1049088 "$dir/model"
	open_it
	# The rest of the last cluster is behind the end so far.
	put end 512 1
	"$tool" resize "$name" --size auto
	[ "$(bytes)" = $((8 << 20)) ]
	truncate -s 8M "$dir/model"
	put more 5120 2
	judge
}

raw()
{
	pattern RAW $((8 << 20)) > "$dir/i.data"
	"$tool" create "$dir/i.qcow2" --data-file "$dir/i.data" --size 1049088 --data-file-raw "$@"
	cp "$dir/i.data" "$dir/model"
	open_it
	"$tool" resize "$name" --size +1M
	[ "$(bytes)" = 2097664 ]
	"$tool" resize "$name" --size 8M
	put more 5120 2
	judge
	qemu-img check --output=json "$dir/i.qcow2" |
		jq -e '."allocated-clusters" == ."total-clusters"' > "$dir/out"
}

# The data file ends within a sector, where the loop device does not go.
within_a_sector()
{
	pattern RAW 8388609 > "$dir/i.data"
	"$tool" create "$dir/i.qcow2" --data-file "$dir/i.data" --size 1M --data-file-raw
	cp "$dir/i.data" "$dir/model"
	open_it
	"$tool" resize "$name" --size auto
	[ "$(bytes)" = 8389120 ] || fault "$(bytes) bytes"
	[ "$(stat -c %s "$dir/i.data")" = 8389120 ]
	truncate -s 8389120 "$dir/model"
	put more 512 8
	judge
}

# The backing file goes on behind the old end, and must not come to be seen.
over_backing()
{
	pattern base $((6 << 20)) > "$dir/base"
	qemu-img create -q -f qcow2 -b "$dir/base" -F raw -o "data_file=$dir/i.data${1:+,$1}" \
		"$dir/i.qcow2" $((2 * 1048576 + 3072))
	truncate -s $((2 * 1048576 + 3072)) "$dir/i.data"
	head -c $((2 * 1048576 + 3072)) "$dir/base" > "$dir/model"
	open_it --backing-file "$dir/base"
	put old 512 1
	"$tool" resize "$name" --size 5M
	truncate -s 5M "$dir/model"
	cmp "/dev/mapper/$name" "$dir/model"
	"$tool" resize "$name" --size 8M
	truncate -s 8M "$dir/model"
	put new 1024 7
	judge
}

# fio writes and verifies all the time, at the beginning of the device.
under_load()
{
	local size

	image i $((4 << 20)) "$1"
	open_it
	(
		exec timeout 1000 fio --filename="/dev/mapper/$name" --allow_file_create=0 --direct=1 --verify=crc32c \
			--verify_fatal=1 --verify_backlog=64 --ioengine=libaio --thread --group_reporting \
			--randseed=7 --time_based --runtime=1d \
			--name=a --rw=randrw --bs=4k --size=2m --iodepth=8 \
			--name=b --rw=randwrite --bs=12k --offset=2m --size=2m --iodepth=4 --fsync=16 \
			> "$dir/fio.log" 2>&1
	) &
	load=$!
	later end_load
	poll 60 in_use
	sleep 2
	for size in 5 9 30; do
		"$tool" resize "$name" --size "${size}M"
		[ "$(bytes)" = $((size << 20)) ]
		kill -0 "$load" || fault "fio has ended: $(tail -n 12 "$dir/fio.log")"
	done
	# It ends what it has begun; any error would be added to 128.
	kill "$load"
	rc=0
	wait "$load" || rc=$?
	[ "$rc" = 128 ] || fault "fio: status $rc: $(tail -n 12 "$dir/fio.log")"
	cp "/dev/mapper/$name" "$dir/model"
	judge
}

file_system()
{
	image i $((24 << 20)) ''
	open_it
	mkfs.ext4 -q -F "/dev/mapper/$name"
	mkdir "$dir/mnt"
	mount -t ext4 "/dev/mapper/$name" "$dir/mnt"
	head -c 5000000 /dev/urandom > "$dir/mnt/file"
	sum=$(sha256sum < "$dir/mnt/file")
	"$tool" resize "/dev/mapper/$name" --size 64M
	resize2fs "/dev/mapper/$name" > "$dir/log" 2>&1 || fault "resize2fs: $(cat "$dir/log")"
	head -c 30000000 /dev/urandom > "$dir/mnt/large"
	umount "$dir/mnt"
	e2fsck -f -n "/dev/mapper/$name" > "$dir/log" 2>&1 || fault "e2fsck: $(cat "$dir/log")"
	mount -t ext4 "/dev/mapper/$name" "$dir/mnt"
	[ "$sum" = "$(sha256sum < "$dir/mnt/file")" ]
	umount "$dir/mnt"
	cp "/dev/mapper/$name" "$dir/model"
	judge
}

# The image file: as long as it must be, and its space taken or not
space()
{
	local real sparse=("$@")

	image i $((64 << 20)) cluster_size=512
	truncate -s 64M "$dir/model"
	open_it "${sparse[@]}" 2> "$dir/err"
	put old 7168 1
	"$tool" resize "$name" --size 512M "${sparse[@]}" 2>> "$dir/err"
	[ "$(grep -c 'warning: .*i.qcow2: stays sparse' "$dir/err" || true)" = $((2 * $#)) ]
	[ "$(wc -l < "$dir/err")" = $((2 * $#)) ] || fault "$(cat "$dir/err")"
	[ "$(stat -c %s "$dir/i.qcow2")" -gt $((8 << 20)) ]
	real=$(($(stat -c '%b * 512 >= %s' "$dir/i.qcow2")))
	[ $((real + $#)) = 1 ] || fault "$(stat -c '%s bytes, %b blocks' "$dir/i.qcow2")"
	truncate -s 512M "$dir/model"
	put new 7168 500
	# It can be had later, too.
	"$tool" resize "$name" --size 512M
	[ $(($(stat -c '%b * 512 >= %s' "$dir/i.qcow2"))) = 1 ]
	judge
}

# QEMU cannot change the length of the device of a raw disk: the tool need not.
smaller_over_device()
{
	local data

	pattern RAW $((8 << 20)) > "$dir/i.data"
	data=$(losetup -f --show "$dir/i.data")
	later losetup -d "$data"
	"$tool" create "$dir/i.qcow2" --data-file "$data" --data-file-raw
	refused 4 'has 8388608 bytes, and what is behind .* would be lost; use --shrink if' \
		"$tool" resize "$dir/i.qcow2" --size 4M
	"$tool" resize "$dir/i.qcow2" --size 4M --shrink --data-file "$data"
	[ "$(blockdev --getsize64 "$data")" = $((8 << 20)) ] || fault "the device was cut"
	head -c 4M "$dir/i.data" > "$dir/model"
	"$tool" open "$dir/i.qcow2" "$name" --data-file "$data"
	cmp "/dev/mapper/$name" "$dir/model"
	"$tool" close "$name"
	"$tool" check "$dir/i.qcow2" > "$dir/out"
}

# Not while it is open; what is said then is what can be done.
smaller_when_open()
{
	image i $((8 << 20)) ''
	truncate -s 8M "$dir/model"
	open_it
	put kept 7168 1
	put lost 7168 6
	before=$(state)
	refused 4 'not made smaller while it is open; close it, and use qcow2setup resize' \
		"$tool" resize "$name" --size 4M --shrink
	[ "$before" = "$(state)" ] || fault "changed: $(state)"
	"$tool" close "$name"
	[[ $err =~ 'use qcow2setup '(.*)$ ]]
	read -ra remedy <<< "${BASH_REMATCH[1]}"
	"$tool" "${remedy[@]}" --data-file "$dir/i.data"
	[ "$(stat -c %s "$dir/i.data")" = $((4 << 20)) ]
	truncate -s 4M "$dir/model"
	open_it
	"$tool" resize "$name" --size 8M
	truncate -s 8M "$dir/model"
	judge
}

# What is the state of everything that must not change?
state()
{
	dmsetup table "$name"
	dmsetup info -c --noheadings -o suspended "$name"
	stat -c '%n %s' "$dir"/i.*
	python3 "$here/qcow2image.py" get "$dir/i.qcow2" size
	python3 "$here/qcow2image.py" get "$dir/i.qcow2" l1_table_offset
}

refusals()
{
	image i $((4 << 20)) cluster_size=512
	open_it
	before=$(state)
	refused 4 'shrink' "$tool" resize "$name" --size 3M
	refused 1 'multiple of 512' "$tool" resize "$name" --size $((5 * 1048576 + 1))
	refused 1 'size' "$tool" resize "$name"
	refused 1 'out' "$tool" resize "$name" --size 5M --data-file "$dir/i.data"
	refused 4 'at most' "$tool" resize "$name" --size 1P
	refused 5 'lock|use' "$tool" resize "$dir/i.qcow2" --size 5M
	[ "$before" = "$(state)" ] || fault "changed: $(state)"
	dmsetup suspend "$name"
	refused 5 'resume' "$tool" resize "$name" --size 5M
	dmsetup resume "$name"
	"$tool" resize "$name" --size 4M
	"$tool" close "$name"
	open_it --readonly
	refused 4 'read-only' "$tool" resize "$name" --size 5M
	"$tool" close "$name"
	refused 4 'no such' "$tool" resize "$name" --size 5M
	# A bitmap has to grow, too, and its table with it.
	image k $((4 << 20)) ''
	qemu-img bitmap --add --disable -f qcow2 "$dir/k.qcow2" frozen
	"$tool" open "$dir/k.qcow2" "$name" --data-file "$dir/k.data"
	"$tool" resize "$name" --size 80G
	[ "$(bytes)" = $((80 << 30)) ]
	"$tool" close "$name"
	qemu-img check -q "$dir/k.qcow2"
	"$tool" bitmap list "$dir/k.qcow2" --json > "$dir/json"
	json "$dir/json" "[(b['name'], b['inconsistent'], b['count']) for b in j] == [('frozen', False, 0)]"
}

# The metadata device of fixed size, a part of loop device $1, gets 600 sectors.
enlarge_meta()
{
	truncate -s 300K "$dir/meta.disk"
	losetup -c "$1"
	dmsetup suspend "$name"
	dmsetup suspend "$prefix-meta"
	dmsetup load "$prefix-meta" --table "0 600 linear $1 0"
	dmsetup resume "$prefix-meta"
	dmsetup resume "$name"
}

# Devices cannot be made larger by the tool.
devices()
{
	local meta data

	truncate -s 100K "$dir/meta.disk"
	truncate -s 4M "$dir/data.disk"
	meta=$(losetup -f --show "$dir/meta.disk")
	data=$(losetup -f --show "$dir/data.disk")
	# They stand for devices whose files are out of reach.
	dmsetup create "$prefix-meta" --table "0 200 linear $meta 0"
	dmsetup create "$prefix-data" --table "0 8192 linear $data 0"
	"$tool" create "/dev/mapper/$prefix-meta" --data-file "/dev/mapper/$prefix-data" --cluster-size 512 \
		--overwrite-device
	"$tool" open "/dev/mapper/$prefix-meta" "$name" --data-file "/dev/mapper/$prefix-data" 2> "$dir/err"
	truncate -s 4M "$dir/model"
	put old 7168 1
	table=$(dmsetup table "$name")
	sync "/dev/mapper/$name"
	before=$(sha256sum < "$dir/meta.disk")
	refused 4 "$prefix-data.*4194304 bytes.*8388608.*enlarge" "$tool" resize "$name" --size 8M
	truncate -s 8M "$dir/data.disk"
	losetup -c "$data"
	dmsetup suspend "$name"
	dmsetup suspend "$prefix-data"
	dmsetup load "$prefix-data" --table "0 16384 linear $data 0"
	dmsetup resume "$prefix-data"
	dmsetup resume "$name"
	# 256 L2 tables of 512 bytes, and what counts them
	refused 4 "$prefix-meta.*102400 bytes.*enlarge" "$tool" resize "$name" --size auto
	[ "$table" = "$(dmsetup table "$name")" ]
	[ "$before" = "$(sha256sum < "$dir/meta.disk")" ] || fault "the metadata was changed"
	put still 7168 2
	enlarge_meta "$meta"
	"$tool" resize "$name" --size auto
	[ "$(bytes)" = $((8 << 20)) ]
	truncate -s 8M "$dir/model"
	put new 1048576 7
	cmp "/dev/mapper/$name" "$dir/model"
	"$tool" close "$name"
	qemu-img check -q -f qcow2 "/dev/mapper/$prefix-meta" || fault "qemu-img check: $?"
	dmsetup remove --retry "$prefix-meta"
	dmsetup remove --retry "$prefix-data"
	losetup -d "$meta" "$data"
	poll 30 loops_gone
	nothing_left
}

# More than the metadata of a device can hold: the writer is told, then helped.
space_used_up()
{
	local meta

	truncate -s 25600 "$dir/meta.disk"
	truncate -s 4M "$dir/i.data"
	meta=$(losetup -f --show "$dir/meta.disk")
	dmsetup create "$prefix-meta" --table "0 50 linear $meta 0"
	"$tool" create "/dev/mapper/$prefix-meta" --data-file "$dir/i.data" --cluster-size 512 --overwrite-device \
		2> "$dir/err"
	"$tool" open "/dev/mapper/$prefix-meta" "$name" --data-file "$dir/i.data" 2> "$dir/err"
	grep -q 'may become too small' "$dir/err"
	truncate -s 4M "$dir/model"
	pattern full $((4 << 20)) > "$dir/piece"
	not dd if="$dir/piece" of="/dev/mapper/$name" bs=32k oflag=direct conv=notrunc status=none 2> "$dir/err"
	grep -qi 'space' "$dir/err"
	"$tool" status "$name" > "$dir/out"
	grep -q "used up.*enlarge .*$prefix-meta" "$dir/out"
	grep -q "resize $name --size 4194304" "$dir/out"
	"$tool" status "$name" --json | jq -e '.statistics.refused > 0' > "$dir/json"
	enlarge_meta "$meta"
	"$tool" resize "$name" --size 4194304
	dd if="$dir/piece" of="/dev/mapper/$name" bs=32k oflag=direct conv=notrunc status=none
	"$tool" status "$name" --json | jq -e '.statistics.refused == 0' > "$dir/json"
	cmp "/dev/mapper/$name" "$dir/piece"
	"$tool" close "$name"
	dmsetup remove --retry "$prefix-meta"
	losetup -d "$meta"
	qemu-img check -q -f qcow2 "$dir/meta.disk" || fault "qemu-img check: $?"
}

# A signal at any time: the old size or the new one, and never suspended.
interrupted()
{
	local t sizes=0

	image i $((4 << 20)) cluster_size=512
	truncate -s 4M "$dir/model"
	open_it
	put old 7168 1
	for t in 0.01 0.03 0.05 0.08 0.1 0.15 0.2 0.3; do
		sizes=$((sizes + 1))
		timeout -s INT "$t" "$tool" resize "$name" --size $(((4 + sizes) << 20)) > "$dir/log" 2>&1 || true
		[ "$(dmsetup info -c --noheadings -o suspended "$name")" = Active ] ||
			fault "after $t s: suspended: $(cat "$dir/log")"
		[ $(($(bytes) % 1048576)) = 0 ]
		truncate -s "$(bytes)" "$dir/model"
		cmp "/dev/mapper/$name" "$dir/model"
	done
	judge
}

twice_at_once()
{
	local n

	image i $((4 << 20)) ''
	truncate -s 4M "$dir/model"
	open_it
	for n in 5 6 7; do
		( "$tool" resize "$name" --size "${n}M" 2>&1 || echo "status $?" ) > "$dir/log$n" &
	done
	wait
	[ "$(bytes)" = $((7 << 20)) ] || fault "$(bytes): $(cat "$dir"/log?)"
	[ "$(dmsetup info -c --noheadings -o suspended "$name")" = Active ]
	truncate -s 7M "$dir/model"
	judge
}

# Closed: the same by another way.
closed()
{
	image i 1049088 "$1"
	truncate -s 1049088 "$dir/model"
	open_it
	put end 512 1
	"$tool" close "$name"
	poll 30 loops_gone
	"$tool" resize "$dir/i.qcow2" --size 40M --data-file "$dir/i.data"
	truncate -s 40M "$dir/model"
	open_it
	put new 5120 39
	judge
}

# Its backing file is on a block device: a raw disk, or an image with data of its own.
closed_over_device()
{
	local backing size=$((2 * 1048576 + 3072)) format=raw base=$dir/base

	pattern base $((6 << 20)) > "$dir/base"
	if [ "$1" = image ]; then
		qemu-img create -q -f qcow2 -o "data_file=$dir/base.data,cluster_size=512" "$dir/base.qcow2" 6M
		qemu-img convert -n -O qcow2 -f raw "$dir/base" "$dir/base.qcow2"
		truncate -s %512 "$dir/base.qcow2"
		# What it shows in a part of a cluster would have to be read.
		format=qcow2 base=$dir/base.qcow2 size=$((2 << 20))
	fi
	backing=$(losetup -f --show "$base")
	qemu-img create -q -f qcow2 -b "$base" -F "$format" -o "data_file=$dir/i.data,cluster_size=4k" \
		"$dir/i.qcow2" "$size"
	truncate -s "$size" "$dir/i.data"
	head -c "$size" "$dir/base" > "$dir/model"
	if [ "$1" = image ]; then
		# Its metadata is not what it shows.
		refused 1 'holds a qcow2 image.*,data-file=' "$tool" resize "$dir/i.qcow2" --size 5M \
			--data-file "$dir/i.data" --backing-file "$backing"
		backing+=,data-file=$dir/base.data
	fi
	"$tool" resize "$dir/i.qcow2" --size 5M --data-file "$dir/i.data" --backing-file "$backing"
	"$tool" resize "$dir/i.qcow2" --size 8M --data-file "$dir/i.data" --backing-file "$backing"
	truncate -s 8M "$dir/model"
	open_it --backing-file "$backing"
	put new 1024 7
	cmp "/dev/mapper/$name" "$dir/model"
	"$tool" close "$name"
	losetup -d "${backing%%,*}"
	poll 30 loops_gone
	nothing_left
	qemu-img check -q -f qcow2 "$dir/i.qcow2" || fault "qemu-img check: $?"
	qemu-img compare -q -f qcow2 -F raw "$dir/i.qcow2" "$dir/model"
}

# key NAME: of the status line
key()
{
	dmsetup status "$name" | grep -oP " $1 \K[0-9]+"
}

# What must not change when it is refused: the table, that it runs, the metadata on $1,
# the length of the data file.
refused_state()
{
	dmsetup table "$name"
	dmsetup info -c --noheadings -o suspended,tables_loaded "$name"
	sha256sum < "$1"
	stat -c %s "$dir/i.data"
}

# field FILE OFFSET: a number of 64 bits in an image
field()
{
	echo $((0x$(od -An -v -tx1 -j "$2" -N 8 "$1" | tr -d ' ')))
}

# lower_meta TABLE: what the metadata device is from now on
lower_meta()
{
	dmsetup load "$prefix-meta" --table "$1"
	dmsetup suspend --noflush "$prefix-meta"
	dmsetup resume "$prefix-meta"
}

# What the guest has written cannot be committed when the device is suspended: it
# is in the live table only, which therefore stays, until it can be written.
commit_fails()
{
	local meta l2

	truncate -s 200K "$dir/meta.disk"
	truncate -s 4M "$dir/i.data" "$dir/model"
	meta=$(losetup -f --show "$dir/meta.disk")
	dmsetup create "$prefix-meta" --table "0 400 linear $meta 0"
	"$tool" create "/dev/mapper/$prefix-meta" --data-file "$dir/i.data" --cluster-size 512 --overwrite-device
	"$tool" open "/dev/mapper/$prefix-meta" "$name" --data-file "$dir/i.data" 2> "$dir/err"
	put old 4096 1
	sync "/dev/mapper/$name"
	# The L2 table of sector 2060 is a bad sector; each has 64 clusters.
	l2=$(field "$dir/meta.disk" 40)
	l2=$(($(field "$dir/meta.disk" $((l2 + 8 * (2060 >> 6)))) >> 9 & (1 << 47) - 1))
	[ "$l2" != 0 ]
	lower_meta "0 $l2 linear $meta 0
		$l2 1 error
		$((l2 + 1)) $((399 - l2)) linear $meta $((l2 + 1))"
	before=$(refused_state "$dir/meta.disk")
	# In an L2 table that is there: nothing has to be reserved for it.
	pattern unsaved 7168 > "$dir/piece"
	dd if="$dir/piece" of="/dev/mapper/$name" bs=512 seek=2060 oflag=direct conv=notrunc status=none
	dd if="$dir/piece" of="$dir/model" bs=512 seek=2060 conv=notrunc status=none
	for _ in 1 2; do
		refused 5 "$name: metadata could not be written, and waits.*see dmesg.*$prefix-meta.*try again" \
			"$tool" resize "$name" --size 8M
		[ "$before" = "$(refused_state "$dir/meta.disk")" ] || fault "changed: $(refused_state "$dir/meta.disk")"
		[ "$(mode i)" = rw ] || fault "mode $(mode i)"
	done
	"$tool" status "$name" --json | jq -e '.statistics.unwritten > 0' > "$dir/json"
	"$tool" status "$name" | grep -q 'could not be written.*see dmesg'
	# A suspended device is not closed, nor shown as it is not.
	dmsetup suspend "$name"
	[ "$(key unwritten)" -gt 0 ]
	refused 4 'could not be written.*resume' "$tool" close "$name"
	refused 4 'could not be written.*resume' "$tool" map "$name"
	dmsetup resume "$name"
	refused 4 'cannot flush' "$tool" close "$name"
	cmp "/dev/mapper/$name" "$dir/model"
	lower_meta "0 400 linear $meta 0"
	sync "/dev/mapper/$name"
	[ "$(key unwritten)" = 0 ] || fault "$(dmsetup status "$name")"
	truncate -s 1024K "$dir/meta.disk"
	losetup -c "$meta"
	dmsetup suspend "$name"
	dmsetup load "$prefix-meta" --table "0 2048 linear $meta 0"
	dmsetup resume "$prefix-meta"
	dmsetup resume "$name"
	"$tool" resize "$name" --size 8M
	truncate -s 8M "$dir/model"
	put new 512 7
	cmp "/dev/mapper/$name" "$dir/model"
	"$tool" close "$name"
	dmsetup remove --retry "$prefix-meta"
	qemu-img check -q -f qcow2 "$meta" || fault "qemu-img check: $?"
	qemu-img compare -q -f qcow2 -F raw "$dir/meta.disk" "$dir/model"
	losetup -d "$meta"
	poll 30 loops_gone
	nothing_left
}

# The same for want of space, which ends by itself.
no_space_for_commit()
{
	truncate -s 24M "$dir/fs"
	mkfs.ext4 -q -F -m 0 "$dir/fs"
	mkdir "$dir/mnt"
	mount -o loop "$dir/fs" "$dir/mnt"
	truncate -s 64M "$dir/i.data" "$dir/model"
	# All L2 tables are there, but as holes.
	"$tool" create "$dir/dense.qcow2" --data-file "$dir/i.data" --cluster-size 64k --preallocation metadata
	cp --sparse=always "$dir/dense.qcow2" "$dir/mnt/i.qcow2"
	"$tool" open "$dir/mnt/i.qcow2" "$name" --data-file "$dir/i.data" --sparse 2> "$dir/err"
	not dd if=/dev/zero of="$dir/mnt/fill" bs=64k status=none 2> "$dir/err"
	not dd if=/dev/zero of="$dir/mnt/fill" bs=1k oflag=append conv=notrunc status=none 2> "$dir/err"
	sync "$dir/mnt/fill"
	before=$(refused_state "$dir/mnt/i.qcow2")
	put waits 4096 1
	not sync "/dev/mapper/$name" 2> "$dir/err"
	grep -qi 'no space' "$dir/err" || fault "$(cat "$dir/err")"
	[ "$(mode i)" = nospc ] || fault "$(dmsetup status "$name")"
	"$tool" status "$name" | grep -q "no space for metadata.*free some where $dir/mnt/i.qcow2 is"
	"$tool" status | grep -q "^$name .*nospc"
	refused 5 "no space for metadata.*free some where $dir/mnt/i.qcow2 is" "$tool" resize "$name" --size 8G
	[ "$before" = "$(refused_state "$dir/mnt/i.qcow2")" ] ||
		fault "changed: $(refused_state "$dir/mnt/i.qcow2")"
	[ "$(mode i)" = nospc ] || fault "$(dmsetup status "$name")"
	refused 4 'cannot flush.*free some space' "$tool" close "$name"
	rm "$dir/mnt/fill"
	sync "/dev/mapper/$name"
	[ "$(mode i)" = rw ] || fault "$(dmsetup status "$name")"
	[ "$(key unwritten)" = 0 ]
	"$tool" resize "$name" --size 8G
	truncate -s 8G "$dir/model"
	"$tool" close "$name"
	qemu-img check -q -f qcow2 "$dir/mnt/i.qcow2" || fault "qemu-img check: $?"
	qemu-img compare -q -f qcow2 -F raw "$dir/mnt/i.qcow2" "$dir/model"
}

# Another device over the same metadata becomes live while ours is suspended.
taken_meanwhile()
{
	local rc=0 inject=$here/../../tools/tests/inject-lib other=$prefix-other

	image i $((4 << 20)) ''
	truncate -s 4M "$dir/model"
	open_it
	put old 7168 1
	dmsetup create "$other" --notable
	dmsetup load "$other" --table "$(dmsetup table "$name")"
	not dmsetup resume "$other" 2> "$dir/err"
	# The first one may have more to do.
	"$tool" resize "$name" --size 4M
	INJECT_COUNT=$dir/calls LD_PRELOAD=$inject "$tool" resize "$name" --size 4M
	# The last call is that which makes it live again.
	INJECT_AT=$(cat "$dir/calls") INJECT_COMMAND="dmsetup resume $other" LD_PRELOAD=$inject \
		"$tool" resize "$name" --size 4M 2> "$dir/err" || rc=$?
	[ "$rc" = 5 ] || fault "status $rc: $(cat "$dir/err")"
	[ "$(grep -vc 'warning: ' "$dir/err")" = 2 ]
	[ "$(grep -c "$name: the image is in use by another device; close that first" "$dir/err")" = 2 ]
	grep -q "$name: device stays suspended.*dmsetup resume $name" "$dir/err"
	dmsetup remove --retry "$other"
	dmsetup resume "$name"
	put new 7168 2
	"$tool" resize "$name" --size 5M
	truncate -s 5M "$dir/model"
	judge
}

start jq fio mkfs.ext4 resize2fs e2fsck
need_tool
check "grows, clusters of 64 KiB" grows ''
check "grows, clusters of 512, L1 and refcount table move" grows cluster_size=512,refcount_bits=64
check "grows, extended L2" grows extended_l2=on,cluster_size=16k
check "grows over old content" over_old_data ''
check "grows over old content, extended L2" over_old_data extended_l2=on
check "grows, raw" raw --cluster-size 512
check "grows, raw, extended L2" raw --extended-l2
check "grows, raw data that ends within a sector" within_a_sector
check "grows over a backing file" over_backing ''
check "grows over a backing file, extended L2" over_backing extended_l2=on
check "grows over a backing file, small clusters" over_backing cluster_size=512
check "under load, clusters of 512" under_load cluster_size=512
check "under load, clusters of 64 KiB" under_load ''
check "file system that is mounted" file_system
check "the space of the image file" space
check "the space of the image file, sparse" space --sparse
check "smaller, over a device" smaller_over_device
check "smaller, not while it is open" smaller_when_open
check "refusals" refusals
check "devices of fixed size" devices
check "space for metadata is used up, and enlarged" space_used_up
check "interrupted" interrupted
check "several at once" twice_at_once
check "image that is closed" closed ''
check "image that is closed, clusters of 512" closed cluster_size=512
check "image that is closed, its backing file is a disk" closed_over_device disk
check "image that is closed, its backing file is an image on a disk" closed_over_device image
check "a commit that fails in the suspend" commit_fails
check "no space for the commit in the suspend" no_space_for_commit
check "another device takes the image meanwhile" taken_meanwhile
finish
