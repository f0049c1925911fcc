#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# Backing files: chains that qcow2setup stacks, shares and takes down again. What
# a device reads, and what is in the images afterwards, must be what QEMU says.

# shellcheck source=common.sh
. "$(dirname "$0")/common.sh"

name=$prefix-i

# No device of a chain, no helper, no loop device may be left.
all_gone()
{
	! dmsetup ls | grep -q -e qcow2-backing -e "^$prefix" -e tail && loops_gone &&
		! losetup -n -O BACK-FILE | grep -q memfd &&
		[ -z "$(find /dev/mapper -name 'qcow2-backing*' -o -name "$prefix*")" ]
}

# Right after a close there is nothing to wait for.
nothing()
{
	all_gone || fault "left behind: $(dmsetup ls; losetup -l; ls /dev/mapper)"
}

backing_devices()
{
	dmsetup ls | grep -c '^qcow2-backing-[0-9a-f]*[[:space:]]' || true
}

# qemu COMMAND... IMAGE
qemu()
{
	local args=()

	while [ $# -gt 1 ]; do
		args+=(-c "$1")
		shift
	done
	qemu-io -f qcow2 "${args[@]}" "$1" > "$dir/qemu.log" 2>&1 || fault "qemu-io: $(cat "$dir/qemu.log")"
}

# overlay NAME SIZE BACKING FORMAT [OPTION,...]
overlay()
{
	qemu-img create -q -f qcow2 -b "$3" -F "$4" -o "data_file=$dir/$1.data${5:+,$5}" \
		"$dir/$1.qcow2" "$2"
	pattern POISON 500000 | dd of="$dir/$1.data" conv=notrunc status=none
	truncate -s "$2" "$dir/$1.data"
}

# three OPTIONS_OF_EACH...: base <- mid <- top and top2, each with data of its own
three()
{
	image base $((6 << 20)) "$1"
	qemu 'write -q -P 1 0 2M' 'write -q -P 2 5M 1000K' 'write -q -z 1M 96K' "$dir/base.qcow2"
	truncate -s 6M "$dir/base.data"
	overlay mid $((5 * 1048576 + 512)) "$dir/base.qcow2" qcow2 "$2"
	qemu 'write -q -P 3 100K 70K' 'write -q -P 4 1000K 48K' 'write -q -P 5 5M 512' \
		'write -q -z 700K 100K' "$dir/mid.qcow2"
	truncate -s $((5 * 1048576 + 512)) "$dir/mid.data"
	overlay top $((7 << 20)) "$dir/mid.qcow2" qcow2 "$3"
	overlay top2 $((4 << 20)) "$dir/mid.qcow2" qcow2 "$3"
	qemu 'write -q -P 6 120K 10K' 'write -q -z 1500K 300K' "$dir/top.qcow2"
	truncate -s 7M "$dir/top.data"
	chain=(--backing-file "$dir/mid.qcow2,data-file=$dir/mid.data"
		--backing-file "$dir/base.qcow2,data-file=$dir/base.data")
}

# open_top TOP NAME [OPTION...]
open_top()
{
	local top=$1 as=$2

	shift 2
	"$tool" open "$dir/$top.qcow2" "$as" --data-file "$dir/$top.data" "${chain[@]}" "$@"
}

# Write the same to a device and to a model: whole clusters and parts of them.
scribble()
{
	local off end

	end=$(($(stat -c %s "$2") / 1024 - 8))
	for off in 3 70 333 1000 1490 2100 3063 3700; do
		[ "$off" -le "$end" ] || continue
		pattern "at $off" 7168 > "$dir/piece"
		dd if="$dir/piece" of="$1" bs=512 seek=$((off * 2 + 1)) oflag=direct conv=notrunc status=none
		dd if="$dir/piece" of="$2" bs=512 seek=$((off * 2 + 1)) conv=notrunc status=none
	done
}

chain_of_three()
{
	local sums t

	three "$@"
	for t in top top2; do
		qemu-img convert -f qcow2 -O raw "$dir/$t.qcow2" "$dir/$t.want"
	done
	sums=$(sha256sum "$dir"/base.* "$dir"/mid.*)
	open_top top "$name"
	open_top top2 "$name-2"
	[ "$(backing_devices)" = 2 ] || fault "not shared: $(dmsetup ls)"
	cmp "/dev/mapper/$name" "$dir/top.want"
	cmp "/dev/mapper/$name-2" "$dir/top2.want"
	"$tool" status "$name" > "$dir/out"
	grep -q "backing: *$dir/mid.qcow2 .*$dir/mid.data" "$dir/out"
	grep -q "backing: *$dir/base.qcow2 .*$dir/base.data" "$dir/out"
	"$tool" status "$name" --json | jq -e ".backing.filename == \"$dir/mid.qcow2\" and
		.backing.backing.filename == \"$dir/base.qcow2\" and
		(.backing.backing | has(\"backing\") | not) and .filename == \"$dir/top.qcow2\"" > "$dir/out" ||
		fault "status: $("$tool" status "$name" --json)"

	scribble "/dev/mapper/$name" "$dir/top.want"
	scribble "/dev/mapper/$name-2" "$dir/top2.want"
	# What is discarded is hidden, whatever is below it.
	blkdiscard -o $((4 << 20)) -l $((1 << 20)) "/dev/mapper/$name"
	dd if=/dev/zero of="$dir/top.want" bs=1M seek=4 count=1 conv=notrunc status=none
	cmp "/dev/mapper/$name" "$dir/top.want"
	cmp "/dev/mapper/$name-2" "$dir/top2.want"
	"$tool" close "$name"
	[ "$(backing_devices)" = 2 ] || fault "those below went too early"
	cmp "/dev/mapper/$name-2" "$dir/top2.want"
	"$tool" close "$name-2"
	nothing
	[ "$sums" = "$(sha256sum "$dir"/base.* "$dir"/mid.*)" ] || fault "something below has changed"
	for t in top top2; do
		qemu-img check -q -f qcow2 "$dir/$t.qcow2" || fault "$t: qemu-img check: $?"
		qemu-img compare -q -f qcow2 -F raw "$dir/$t.qcow2" "$dir/$t.want"
	done
	# Once more, from what is on disk.
	open_top top "$name" --readonly
	cmp "/dev/mapper/$name" "$dir/top.want"
	"$tool" close "$name"
	nothing
}

# raw_backing SIZE [LOSETUP_OPTION...]: as a file, and as a device
raw_backing()
{
	local size=$1 loop

	pattern "raw of $size" "$size" > "$dir/raw"
	overlay top $((3 << 20)) "$dir/raw" raw
	qemu-img convert -f qcow2 -O raw "$dir/top.qcow2" "$dir/want"
	"$tool" open "$dir/top.qcow2" "$name" --data-file "$dir/top.data" --backing-file "$dir/raw"
	cmp "/dev/mapper/$name" "$dir/want"
	scribble "/dev/mapper/$name" "$dir/want"
	cmp "/dev/mapper/$name" "$dir/want"
	"$tool" close "$name"
	nothing
	qemu-img compare -q -f qcow2 -F raw "$dir/top.qcow2" "$dir/want"
	[ $((size % 512)) = 0 ] && [ "$size" != 0 ] || return 0
	loop=$(losetup -f --show -r "$dir/raw")
	"$tool" open "$dir/top.qcow2" "$name" --data-file "$dir/top.data" --backing-file "$loop"
	# The device can be shared by readers, but not be written.
	overlay top2 $((3 << 20)) "$dir/raw" raw
	"$tool" open "$dir/top2.qcow2" "$name-2" --data-file "$dir/top2.data" --backing-file "$loop"
	cmp "/dev/mapper/$name" "$dir/want"
	"$tool" close "$name"
	"$tool" close "$name-2"
	losetup -d "$loop"
	nothing
}

raw_sizes()
{
	local size

	for size in 0 1 512 1000001 3145728 5000001; do
		raw_backing "$size"
		rm -f "$dir"/*
	done
}

# A data device with blocks of 4096 bytes, and sizes that are no multiples.
large_blocks()
{
	local loop

	pattern raw $((1048576 + 512)) > "$dir/raw"
	overlay top $((3 << 20)) "$dir/raw" raw
	qemu-img convert -f qcow2 -O raw "$dir/top.qcow2" "$dir/want"
	loop=$(losetup -f --show -b 4096 "$dir/top.data")
	# A file is completed ...
	"$tool" open "$dir/top.qcow2" "$name" --data-file "$loop" --backing-file "$dir/raw"
	cmp "/dev/mapper/$name" "$dir/want"
	"$tool" close "$name"
	# ... a device is not.
	disk=$(losetup -f --show -r "$dir/raw")
	refused 4 '1049088.*4096' "$tool" open "$dir/top.qcow2" "$name" --data-file "$loop" --backing-file "$disk"
	losetup -d "$disk"
	disk=$(losetup -f --show -r -b 4096 "$dir/want")
	overlay small $((3 << 20)) "$dir/raw" raw cluster_size=2k
	refused 4 'blocks of 4096.*2048' "$tool" open "$dir/small.qcow2" "$name" --data-file "$dir/small.data" \
		--backing-file "$disk"
	losetup -d "$disk"
	image odd $((3 * 1048576 + 512)) ''
	truncate -s 4M "$dir/top.data"
	losetup -c "$loop"
	refused 4 '3146240.*4096.*3149824' "$tool" open "$dir/odd.qcow2" "$name" --data-file "$loop"
	refused 4 'subclusters of 512' sub "$loop"
	overlay mid $((1048576 + 512)) "$dir/raw" raw
	overlay top2 $((3 << 20)) "$dir/mid.qcow2" qcow2
	refused 4 'mid.qcow2.*1049088.*resize' "$tool" open "$dir/top2.qcow2" "$name" --data-file "$loop" \
		--backing-file "$dir/mid.qcow2,data-file=$dir/mid.data" --backing-file "$dir/raw"
	losetup -d "$loop"
	nothing
}

sub()
{
	qemu-img create -q -f qcow2 -o "data_file=$dir/sub.data,extended_l2=on,cluster_size=16k" \
		"$dir/sub.qcow2" 3M
	"$tool" open "$dir/sub.qcow2" "$name" --data-file "$1"
}

# An image that the user has opened is used, and stays.
opened_before()
{
	three '' '' ''
	qemu-img convert -f qcow2 -O raw "$dir/top.qcow2" "$dir/want"
	"$tool" open "$dir/mid.qcow2" "$name-mid" --readonly --data-file "$dir/mid.data" "${chain[@]:2}"
	[ "$(backing_devices)" = 1 ]
	open_top top "$name"
	[ "$(backing_devices)" = 1 ] || fault "not used: $(dmsetup ls)"
	cmp "/dev/mapper/$name" "$dir/want"
	refused 5 "$name" "$tool" close "$name-mid"
	"$tool" close "$name"
	[ "$(dmsetup status "$name-mid" | sed 's/.* //')" = ro ]
	# The same by its name, as the device that it is.
	"$tool" open "$dir/top.qcow2" "$name" --data-file "$dir/top.data" --backing-file "/dev/mapper/$name-mid"
	cmp "/dev/mapper/$name" "$dir/want"
	refused 1 'no data file' "$tool" open "$dir/top2.qcow2" "$name-2" --data-file "$dir/top2.data" \
		--backing-file "/dev/mapper/$name-mid,data-file=$dir/mid.data"
	"$tool" close "$name"
	# With other data it would not be what is meant.
	cp "$dir/mid.data" "$dir/other.data"
	refused 5 "is open as $name-mid with another" "$tool" open "$dir/top.qcow2" "$name" \
		--data-file "$dir/top.data" \
		--backing-file "$dir/mid.qcow2,data-file=$dir/other.data" "${chain[@]:2}"
	"$tool" close "$name-mid"
	nothing
	# One that can be written is none to be below.
	"$tool" open "$dir/mid.qcow2" "$name-mid" --data-file "$dir/mid.data" "${chain[@]:2}"
	refused 5 'lock|use' open_top top "$name"
	refused 5 'readonly' "$tool" open "$dir/top.qcow2" "$name" --data-file "$dir/top.data" \
		--backing-file "/dev/mapper/$name-mid"
	"$tool" close "$name-mid"
	nothing
	qemu-img compare -q -f qcow2 -F raw "$dir/top.qcow2" "$dir/want"
}

# Images below are locked as QEMU locks them: it may read, too, and not write.
locks()
{
	three '' '' ''
	open_top top "$name"
	for f in mid.qcow2 base.qcow2; do
		not qemu-io -f qcow2 -c 'write 0 64k' "$dir/$f" > "$dir/out" 2>&1
		grep -qi lock "$dir/out" || fault "$f: $(cat "$dir/out")"
	done
	for f in mid.data base.data; do
		not qemu-io -f raw -c 'write 0 64k' "$dir/$f" > "$dir/out" 2>&1
		grep -qi lock "$dir/out" || fault "$f: $(cat "$dir/out")"
	done
	qemu-io -r -f qcow2 -c 'read -q -P 3 100k 4k' "$dir/mid.qcow2"
	qemu-io -f qcow2 -c 'read -q -P 3 100k 4k' "$dir/top2.qcow2"
	refused 5 'lock|use' "$tool" open "$dir/mid.qcow2" "$name-2" --data-file "$dir/mid.data" "${chain[@]:2}"
	"$tool" close "$name"
	nothing
	# Whoever may read them can have this lock, for any time.
	flock "$dir/base.qcow2" sleep 300 &
	other=$!
	open_top top "$name"
	kill "$other"
	"$tool" close "$name"
	nothing
	qemu-io -f qcow2 -c 'write -q 0 64k' "$dir/mid.qcow2"
}

trusted()
{
	three '' '' ''
	qemu-img convert -f qcow2 -O raw "$dir/top.qcow2" "$dir/want"
	refused 1 "the image says $dir/mid.qcow2" "$tool" open "$dir/top.qcow2" "$name" --data-file "$dir/top.data"
	( cd / && "$tool" open "$dir/top.qcow2" "$name" --trust-image-paths )
	cmp "/dev/mapper/$name" "$dir/want"
	"$tool" close "$name"
	nothing
	# Relative names start in the folder of the image that has them.
	mkdir -p "$dir/a/b"
	pattern base $((1 << 20)) > "$dir/a/b/base"
	( cd "$dir/a/b" && qemu-img create -q -f qcow2 -b base -F raw -o data_file=m.data m.qcow2 1M &&
		truncate -s 1M m.data )
	( cd "$dir/a" && cp b/m.data . &&
		qemu-img create -q -f qcow2 -b b/m.qcow2 -F qcow2 -o data_file=t.data t.qcow2 1M &&
		truncate -s 1M t.data )
	rm "$dir/a/m.data"
	( cd / && "$tool" open "$dir/a/t.qcow2" "$name" --trust-image-paths )
	cmp "/dev/mapper/$name" "$dir/a/b/base"
	"$tool" close "$name"
	# Links, and what is no path, are not followed.
	mv "$dir/a/b/base" "$dir/a/base"
	ln -s ../base "$dir/a/b/base"
	refused 4 'link' "$tool" open "$dir/a/t.qcow2" "$name" --trust-image-paths
	nothing
	for f in 'json:{"driver":"null-co"}' 'nbd://localhost/x'; do
		( cd "$dir/a/b" && qemu-img rebase -u -F raw -b "$f" m.qcow2 )
		refused 4 'path|protocol' "$tool" open "$dir/a/t.qcow2" "$name" --trust-image-paths
	done
	nothing
}

# Interrupted when some of it is there already; failures.sh does this call by call.
interrupted()
{
	local t rc

	three '' '' ''
	for t in 0.03 0.06 0.1 0.15 0.2 0.3; do
		rc=0
		timeout -s INT "$t" "$tool" open "$dir/top.qcow2" "$name" --data-file "$dir/top.data" \
			"${chain[@]}" > /dev/null 2>&1 || rc=$?
		[ ! -e "/dev/mapper/$name" ] || "$tool" close "$name"
		poll 10 all_gone || fault "after $t s (status $rc): $(dmsetup ls; losetup -l)"
	done
	qemu-img check -q "$dir/top.qcow2"
}

plain_removal()
{
	three '' '' ''
	open_top top "$name"
	open_top top2 "$name-2"
	dmsetup remove --retry "$name"
	dmsetup remove --retry "$name-2"
	poll 30 loops_gone
	[ "$(backing_devices)" = 0 ]
	dmsetup ls | not grep -q "$prefix"
	qemu-io -f qcow2 -c 'write -q 0 64k' "$dir/mid.qcow2"
}

# Openers and closers of one chain at the same moment.
race()
{
	local n i

	three '' '' ''
	for n in 3 4; do
		overlay "top$n" $((4 << 20)) "$dir/mid.qcow2" qcow2
	done
	for i in 1 2 3; do
		for n in 2 3 4; do
			( open_top "top$n" "$name-$n"; cmp -n 1000000 "/dev/mapper/$name-$n" "$dir/want" 2> /dev/null ||
				true; "$tool" close "$name-$n" ) > "$dir/log$n" 2>&1 &
		done
		wait
		for n in 2 3 4; do
			[ ! -s "$dir/log$n" ] || fault "round $i: $(cat "$dir"/log?)"
		done
		poll 10 all_gone
	done
}

# What the device itself is told is not for those below.
options()
{
	three '' '' extended_l2=on
	open_top top "$name" --no-discard-passdown --cache-limit 8M
	dmsetup table "$name" | grep -q 'extended_l2 backing_dev [0-9:]* no_discard_passdown cache_limit 8388608 zeroed_from [0-9]*$'
	dmsetup table | grep qcow2-backing | not grep -q cache_limit
	"$tool" status "$name" --json | jq -e '."cache-limit" == 8388608 and ."no-discard-passdown" and
		."extended-l2" and (.features | index("backing_dev"))' > "$dir/out"
	"$tool" close "$name"
	# The line for dmsetup, which names devices only.
	refused 4 'qcow2setup open' "$tool" table "$dir/top.qcow2" --data-file "$dir/top.data" "${chain[@]}"
}

start jq
need_tool
check "chain of three, clusters of 64 KiB" chain_of_three '' '' ''
check "chain of three, extended L2 over small clusters" chain_of_three cluster_size=2M cluster_size=512 extended_l2=on
check "chain of three, small clusters over extended L2" chain_of_three extended_l2=on \
	extended_l2=on,cluster_size=16k cluster_size=1k
check "raw backing files and devices of any size" raw_sizes
check "data devices with blocks of 4096 bytes" large_blocks
check "images that are open already" opened_before
check "locks" locks
check "names that images record" trusted
check "interrupted" interrupted
check "removal by dmsetup takes the chain down" plain_removal
check "several at once" race
check "options of the device" options
finish
