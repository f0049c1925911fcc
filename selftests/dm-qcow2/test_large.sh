#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# The largest image that the smallest clusters can have: 128 GiB in clusters of 512
# bytes, four million L2 tables. The tool makes room for all of them, and a refcount
# table that can name it; the load makes tables all over the device.

. "$(dirname "$0")/common.sh"

size=$((128 << 30))
limit=$((40 << 20))

# load [OPTION...]: 2000 tables, each with data in one cluster
load()
{
	local out rc=0

	out=$(timeout 1200 fio --name=spread --filename="$dev" --ioengine=io_uring --direct=1 \
		--rw=randwrite --bs=512 --size="$size" --io_size=1000k --randseed=5 --iodepth=16 \
		--random_generator=tausworthe64 --norandommap=1 --allow_file_create=0 \
		--verify=crc32c --verify_fatal=1 "$@" 2>&1) || rc=$?
	[ "$rc" = 0 ] || fault "fio: status $rc: $(tail -n 12 <<< "$out")"
}

states()
{
	dmsetup status "$prefix-l" | awk '{ print $7 }'
}

largest()
{
	local refcount_bits=$1

	truncate -s "$size" "$dir/l.data"
	"$tool" create "$dir/l.qcow2" --data-file "$dir/l.data" --cluster-size 512 \
		--refcount-bits "$refcount_bits"
	# Room for all of them is more than a small file system has space.
	"$tool" open "$dir/l.qcow2" "$prefix-l" --data-file "$dir/l.data" --cache-limit "$limit" --sparse
	later "$tool" close "$prefix-l"
	dev=/dev/mapper/$prefix-l
	# One more could not be opened by QEMU.
	[ "$(dmsetup status "$prefix-l" | awk '{ print $5 }')" = "0/$((4 << 20))" ]
	load
	[ "$(mode l)" = rw ] || fault "mode $(mode l)"
	[ "$(states)" -le "$limit" ] || fault "$(states) bytes of states"
	dmsetup suspend "$prefix-l"
	dmsetup resume "$prefix-l"
	load --verify_only
	[ "$(states)" -le "$limit" ] || fault "$(states) bytes of states"
	[ "$(dmsetup status "$prefix-l" | awk '{ sub("/.*", "", $5); print $5 }')" -gt 1500 ]
	unwind 0
	nothing_left
	qemu-img check -q "$dir/l.qcow2" || fault "qemu-img check: status $?"
	"$tool" check "$dir/l.qcow2" > "$dir/log" || fault "status $?: $(cat "$dir/log")"
	# The tail that was only room is gone.
	[ "$(stat -c %s "$dir/l.qcow2")" -lt $((80 << 20)) ] || fault "$(stat -c %s "$dir/l.qcow2") bytes long"
}

start fio
need_tool
check "128 GiB at clusters of 512 bytes, refcounts of 16 bits" largest 16
check "128 GiB at clusters of 512 bytes, refcounts of 64 bits" largest 64
finish
