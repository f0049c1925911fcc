#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# qcow2setup resize of a device that is in use: what is done while requests wait is
# little, whatever the sizes; what is done before it can be interrupted, and does not
# meet what the kernel does; and whoever kills the tool does not leave a device
# suspended.

# shellcheck source=common.sh
. "$(dirname "$0")/common.sh"
# shellcheck source=resized.sh
. "$here/resized.sh"

inject=$here/../../tools/tests/inject-lib

# A call of the tool that can be made to go wrong: ENVIRONMENT... -- ARGUMENTS...
injected()
{
	local set=()

	while [ "$1" != -- ]; do
		set+=("$1")
		shift
	done
	shift
	# The shell would tell of each death.
	{ env "${set[@]}" LD_PRELOAD="$inject" "$tool" "$@" > "$dir/said" 2>&1; } 2> "$dir/shell"
}

no_helper()
{
	! pgrep -x qcow2setup-keep > "$dir/pids"
}

# Whatever the tool has to write for a size is not written while requests wait.
waits_for_little()
{
	local cluster=$1 size written
	shift

	for size in 64M 1G "$1"; do
		truncate -s 1M "$dir/i.data"
		rm -f "$dir/i.qcow2"
		"$tool" create "$dir/i.qcow2" --data-file "$dir/i.data" --cluster-size "$cluster" "${@:2}"
		open_it
		INJECT_SUSPENDED=$dir/written LD_PRELOAD=$inject "$tool" resize "$name" --size "$size"
		written=$(cat "$dir/written")
		note "$size: $written bytes"
		# The header is written in any case.
		[[ $written -ge 512 && $written -le $((16 * cluster)) ]] ||
			fault "to $size: $written bytes are written while it is suspended"
		[ "$(bytes)" = "$(numfmt --from=iec "$size")" ]
		"$tool" close "$name"
		qemu-img check -q -f qcow2 "$dir/i.qcow2" || fault "qemu-img check: $?"
		"$tool" check "$dir/i.qcow2" > "$dir/out"
	done
	poll 30 loops_gone
	nothing_left
}

# From call to call, the steps grow by one part of so many.
nearer=12
[ -z "${SAMPLE-}" ] || nearer=4

# small_raw CLUSTER: an image with all tables, of 1 MiB
small_raw()
{
	pattern RAW $((1 << 20)) > "$dir/i.data"
	rm -f "$dir/i.qcow2"
	"$tool" create "$dir/i.qcow2" --data-file "$dir/i.data" --cluster-size "$1" --data-file-raw
	cp "$dir/i.qcow2" "$dir/i.first"
}

# As it was made
again()
{
	cp "$dir/i.first" "$dir/i.qcow2"
	truncate -s 1M "$dir/i.data"
	open_it
}

# SIGINT at each call: until the switch all is as before, and then it is done.
interrupted()
{
	local k calls rc last=0

	small_raw 512
	open_it
	injected INJECT_COUNT="$dir/calls" -- resize "$name" --size 256M
	calls=$(cat "$dir/calls")
	"$tool" close "$name"
	for ((k = 1; k <= calls; k += 1 + k / nearer)); do
		again
		before=$(state)
		rc=0
		injected INJECT_AT="$k" INJECT_SIGNAL=2 -- resize "$name" --size 256M || rc=$?
		case $rc in
		0)	[ "$(bytes)" = $((256 << 20)) ] || fault "call $k: $(bytes) bytes" ;;
		130)	last=$k
			[ "$before" = "$(state)" ] || fault "call $k: not as before: $(state)"
			[ ! -s "$dir/said" ] || fault "call $k: $(cat "$dir/said")" ;;
		*)	fault "call $k: status $rc: $(cat "$dir/said")" ;;
		esac
		no_helper || fault "call $k: a helper is left"
		"$tool" close "$name"
		qemu-img check -q -f qcow2 "$dir/i.qcow2" || fault "call $k: qemu-img check: $?"
	done
	# Tables are what most calls write.
	note "taken back up to call $last of $calls"
	[ "$last" -ge $((calls / 2)) ]
}

# What must not change: the device, its image, the length of files
state()
{
	dmsetup table "$name"
	dmsetup info -c --noheadings -o suspended "$name"
	stat -c '%n %s' "$dir"/i.*
	od -An -tx1 -N 112 "$dir/i.qcow2"
}

# Killed at each call, or each $2nd, and when it speaks to its helper: nobody is left
# waiting, and the old size or the new one is there.
killed()
{
	local k calls size undone=0 done=0 new=$3

	small_raw "$1"
	open_it
	injected INJECT_SENDS=1 INJECT_COUNT="$dir/calls" -- resize "$name" --size "$new"
	calls=$(cat "$dir/calls")
	"$tool" close "$name"
	for ((k = calls; k > 0; k -= $2)); do
		again
		injected INJECT_SENDS=1 INJECT_AT="$k" INJECT_SIGNAL=9 -- resize "$name" --size "$new" &&
			fault "call $k: not killed"
		poll 60 no_helper
		[ "$(dmsetup info -c --noheadings -o suspended "$name")" = Active ] ||
			fault "call $k: suspended"
		cp "$dir/i.data" "$dir/model"
		size=$(bytes)
		truncate -s "$size" "$dir/model"
		case $size in
		1048576)
			undone=$((undone + 1))
			[ "$(stat -c %s "$dir/i.data")" = 1048576 ] || fault "call $k: the data file is longer" ;;
		"$(numfmt --from=iec "$new")")
			done=$((done + 1)) ;;
		*)	fault "call $k: $size bytes" ;;
		esac
		put "call $k" 1536 0
		judge
	done
	note "$undone times the old size, $done times the new one"
	# The last of the calls tells the helper that all is done.
	[[ $undone -gt 10 && $done -gt 0 ]] || fault "$undone times the old size, $done times the new one"
}

# The helper alone is killed: the tool ends as if a step had failed.
helper_killed()
{
	local k calls rc

	small_raw 512
	open_it
	injected INJECT_COUNT="$dir/calls" -- resize "$name" --size 16M
	calls=$(cat "$dir/calls")
	"$tool" close "$name"
	for ((k = 1; k <= calls; k += 1 + k / nearer)); do
		again
		before=$(state)
		rc=0
		injected INJECT_AT="$k" INJECT_COMMAND="pkill -9 -x qcow2setup-keep; :" -- \
			resize "$name" --size 16M || rc=$?
		if [ "$rc" = 4 ]; then
			[ "$before" = "$(state)" ] || fault "call $k: not as before: $(state)"
			grep -q 'helper process was killed; try again' "$dir/said" ||
				fault "call $k: $(cat "$dir/said")"
		else
			[ "$rc" = 0 ] || fault "call $k: status $rc: $(cat "$dir/said")"
			[ "$(bytes)" = $((16 << 20)) ]
		fi
		"$tool" close "$name"
		qemu-img check -q -f qcow2 "$dir/i.qcow2" || fault "call $k: qemu-img check: $?"
	done
}

# At each call, until it is suspended, the guest writes where no table is yet. Of the
# old area, whose tables the kernel makes, and of its end, which the tool looks after.
guest_writes()
{
	local k calls options=$1

	cat > "$dir/guest" <<-'SCRIPT'
	[ "$(dmsetup info -c --noheadings -o suspended "$1")" = Active ] || exit 0
	for at in 0 100 3000 2048 8193 4100; do
		head -c 1024 < "$2" |
			dd of="/dev/mapper/$1" bs=512 seek=$at oflag=direct conv=notrunc,fdatasync status=none
		head -c 1024 < "$2" | dd of="$3" bs=512 seek=$at conv=notrunc status=none
	done
	SCRIPT
	pattern guest 1024 > "$dir/piece"
	pattern base $((24 << 20)) > "$dir/base"
	truncate -s 4199936 "$dir/i.data"
	qemu-img create -q -f qcow2 -b "$dir/base" -F raw -o "data_file=$dir/i.data,$options" "$dir/i.qcow2" 4199936
	cp "$dir/i.qcow2" "$dir/i.first"
	head -c 4199936 "$dir/base" > "$dir/first"
	calls=12
	for ((k = 1; k <= calls; k += 1 + k / nearer)); do
		cp "$dir/i.first" "$dir/i.qcow2"
		truncate -s 4199936 "$dir/i.data"
		cp "$dir/first" "$dir/model"
		open_it --backing-file "$dir/base"
		injected INJECT_AT="$k" INJECT_COUNT="$dir/calls" \
			INJECT_COMMAND="sh $dir/guest $name $dir/piece $dir/model" -- resize "$name" --size 20M ||
			fault "call $k: $(cat "$dir/said")"
		calls=$(cat "$dir/calls")
		truncate -s 20M "$dir/model"
		put new 1024 19
		judge
	done
	note "$calls calls"
}

# Never one request that fails, and nothing lost, with sizes that need many tables
under_load()
{
	local size

	small_raw 4k
	open_it
	(
		exec timeout 1000 fio --filename="/dev/mapper/$name" --allow_file_create=0 --direct=1 --verify=crc32c \
			--verify_fatal=1 --verify_backlog=64 --ioengine=libaio --thread --group_reporting \
			--randseed=7 --time_based --runtime=1d --name=a --rw=randrw --bs=4k --size=1m --iodepth=8 \
			> "$dir/fio.log" 2>&1
	) &
	load=$!
	later end_load
	poll 60 in_use
	for size in 1 3 8; do
		"$tool" resize "$name" --size "${size}G"
		[ "$(bytes)" = $((size << 30)) ]
		kill -0 "$load" || fault "fio has ended: $(tail -n 12 "$dir/fio.log")"
	done
	# It ends what it has begun; any error would be added to 128.
	kill "$load"
	rc=0
	wait "$load" || rc=$?
	[ "$rc" = 128 ] || fault "fio: status $rc: $(tail -n 12 "$dir/fio.log")"
	[ "$(mode i)" = rw ]
	"$tool" close "$name"
	poll 30 loops_gone
	nothing_left
	qemu-img check -q -f qcow2 "$dir/i.qcow2" || fault "qemu-img check: $?"
}

# A file whose middle the kernel has used is made longer again and again: it takes no
# more than such an image needs.
again_and_again()
{
	local size

	image i $((16 << 20)) cluster_size=512
	truncate -s 16M "$dir/model"
	open_it
	for size in 32 64 96 128; do
		"$tool" resize "$name" --size "${size}M"
		truncate -s "${size}M" "$dir/model"
		put "up to $size" 7168 $((size - 1))
	done
	# 2 MiB of tables, and what counts them
	[ "$(stat -c %s "$dir/i.qcow2")" -lt 2500000 ] || fault "$(stat -c '%s bytes' "$dir/i.qcow2")"
	judge
	open_it
	[ "$(stat -c %s "$dir/i.qcow2")" -lt 2500000 ] || fault "$(stat -c '%s bytes' "$dir/i.qcow2")"
	pattern all $((128 << 20)) > "$dir/model"
	dd if="$dir/model" of="/dev/mapper/$name" bs=1M oflag=direct status=none
	judge
}

# A metadata device that has just the room that is needed: there is no place that the
# kernel could not come to take, so that tables are written when it is at rest.
just_enough()
{
	local meta sectors rc

	truncate -s 1M "$dir/meta.disk"
	meta=$(losetup -f --show "$dir/meta.disk")
	later losetup -d "$meta"
	pattern RAW $((16 << 20)) > "$dir/i.data"
	cp "$dir/i.data" "$dir/model"
	for ((sectors = 498; ; sectors += 8)); do
		[ "$sectors" -lt 700 ] || fault "even $sectors sectors are not enough"
		dmsetup create "$prefix-meta" --table "0 $sectors linear $meta 0"
		"$tool" create "/dev/mapper/$prefix-meta" --data-file "$dir/i.data" --size 1M --cluster-size 512 \
			--data-file-raw --overwrite-device
		"$tool" open "/dev/mapper/$prefix-meta" "$name" --data-file "$dir/i.data"
		rc=0
		injected INJECT_SUSPENDED="$dir/written" -- resize "$name" --size 16M || rc=$?
		[ "$rc" != 0 ] || break
		grep -q 'enlarge the device' "$dir/said" || fault "$sectors sectors: $(cat "$dir/said")"
		"$tool" close "$name"
		dmsetup remove --retry "$prefix-meta"
	done
	note "$sectors sectors, $(cat "$dir/written") bytes"
	# 480 tables
	[ "$(cat "$dir/written")" -ge $((480 * 512)) ]
	put new 1536 15
	cmp "/dev/mapper/$name" "$dir/model"
	"$tool" close "$name"
	qemu-img check -q -f qcow2 "/dev/mapper/$prefix-meta" || fault "qemu-img check: $?"
	dmsetup remove --retry "$prefix-meta"
}

start jq fio pgrep
need_tool
[ -e "$inject" ] || skip_all "tools/tests/inject-lib is not built (make -C tools tests/inject-lib)"
check "little is written while requests wait: raw" waits_for_little 4096 16G --data-file-raw
check "little is written while requests wait: raw, clusters of 512" waits_for_little 512 2G --data-file-raw
check "little is written while requests wait: L1 and refcount table" waits_for_little 512 4G
check "little is written while requests wait: raw, clusters of 64 KiB" waits_for_little 65536 256G --data-file-raw
check "interrupted" interrupted
check "killed at each call" killed 512 3 16M
check "killed at each call, a few clusters are new" killed 4096 1 3M
check "the helper is killed" helper_killed
check "the guest writes meanwhile" guest_writes cluster_size=512
check "the guest writes meanwhile, many refcount blocks" guest_writes cluster_size=512,refcount_bits=64
check "the guest writes meanwhile, extended L2" guest_writes cluster_size=16k,extended_l2=on
check "under load, many tables" under_load
check "again and again" again_and_again
check "a device with just the room that is needed" just_enough
finish
