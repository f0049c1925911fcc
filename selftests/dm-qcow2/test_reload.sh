#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# Suspend, resume, reload and removal, most of it under a load that verifies what
# it reads; at last the module must go, and with it all that it holds.

. "$(dirname "$0")/common.sh"

# Begin a load in the background: the same jobs again and again until "end".
begin()
{
	(
		until [ -e "$dir/stop" ]; do
			timeout 1200 fio --filename="$dev" --allow_file_create=0 --direct=1 \
				--randseed="$RANDOM" \
				--verify=crc32c --verify_fatal=1 --verify_backlog=64 \
				--ioengine=io_uring --thread --group_reporting \
				--name=a --rw=randrw --bs=4k --size=3m --iodepth=8 --loops=3 \
				--name=b --rw=randwrite --bs=20k --offset=3073k --size=6m \
				--iodepth=4 --fsync=16 --loops=3 \
				> "$dir/fio.log" 2>&1 || exit
		done
	) &
	load=$!
	poll 60 is_open
}

is_open()
{
	[ "$(dmsetup info -c --noheadings -o open "$prefix-i")" -gt 0 ]
}

end()
{
	local rc=0

	: > "$dir/stop"
	wait "$load" || rc=$?
	[ "$rc" = 0 ] || fault "fio: status $rc: $(tail -n 12 "$dir/fio.log")"
	rm "$dir/stop"
}

judge()
{
	[ "$(mode i)" = rw ] || fault "mode $(mode i)"
	unmap i
	qemu-img check -q "$dir/i.qcow2" || fault "qemu-img check: status $?"
}

# under_load OPTIONS ROUNDS COMMAND...: ROUNDS times while the load runs
under_load()
{
	local n=$2

	image i $((24 << 20)) "$1"
	shift 2
	map i
	begin
	for ((; n; n--)); do
		"$@"
		sleep 0.2
		kill -0 "$load" || break
	done
	end
	judge
}

suspend_resume()
{
	local how

	for how in '' --noflush --nolockfs; do
		# shellcheck disable=SC2086 # nothing, or one word
		dmsetup suspend $how "$prefix-i"
		sleep 0.1
		dmsetup resume "$prefix-i"
	done
}

reload()
{
	dmsetup load --table "$line" "$prefix-i"
	dmsetup resume "$prefix-i"
}

# Neither a line that is refused nor one that is dropped again changes anything.
no_reload()
{
	not dmsetup load --table "${line% *} 9" "$prefix-i" 2> /dev/null
	[ "$(dmsetup info -c --noheadings -o tables_loaded "$prefix-i")" = Live ]
	dmsetup load --table "$line" "$prefix-i"
	dmsetup clear "$prefix-i"
}

# The constructor of a new table runs while the old one is at work: what that
# changes meanwhile, the new one must see.
late_resume()
{
	dmsetup load --table "$line" "$prefix-i"
	sleep 1.2
	dmsetup resume "$prefix-i"
}

to_read_only()
{
	local data_before meta_before

	image i $((24 << 20)) ''
	map i
	begin
	end
	dmsetup load --table "$line 1 read_only" "$prefix-i"
	dmsetup resume "$prefix-i"
	[ "$(mode i)" = ro ]
	data_before=$(sha256sum < "$dir/i.data")
	meta_before=$(sha256sum < "$dir/i.qcow2")
	not dd if=/dev/zero of="$dev" bs=4k count=1 oflag=direct conv=notrunc status=none 2> /dev/null
	[ "$meta_before" = "$(sha256sum < "$dir/i.qcow2")" ]
	[ "$data_before" = "$(sha256sum < "$dir/i.data")" ]
	reload
	[ "$(mode i)" = rw ]
	dd if=/dev/zero of="$dev" bs=4k count=1 seek=5000 oflag=direct conv=notrunc status=none
	judge
}

gone()
{
	! dmsetup info "$prefix-i" > /dev/null 2>&1
}

# Plain removal must be refused; deferred removal waits for the last close.
removal_in_use()
{
	image i $((24 << 20)) ''
	map i
	exec 7<> "$dev"
	not dmsetup remove "$prefix-i" 2> /dev/null
	dd if=/dev/urandom of="$dev" bs=64k count=9 oflag=direct conv=notrunc status=none
	dmsetup remove --deferred "$prefix-i"
	not gone
	head -c 4096 <&7 > /dev/null
	exec 7>&-
	poll 30 gone
	losetup -d "$meta" "$data"
	qemu-img check -q "$dir/i.qcow2" || fault "qemu-img check: status $?"
}

# The table is replaced by one that fails all I/O; the image must be left whole.
forced_removal()
{
	image i $((24 << 20)) ''
	map i
	begin
	# It is open, and so stays as a rule; but its table is replaced by one
	# that fails everything.
	dmsetup remove --force "$prefix-i" > /dev/null 2>&1 || true
	# The load gets errors now, and ends by itself.
	not wait "$load"
	gone || dmsetup remove --retry "$prefix-i"
	losetup -d "$meta" "$data"
	qemu-img check -q "$dir/i.qcow2" || fault "qemu-img check: status $?"
}

unload()
{
	local users

	image i $((24 << 20)) ''
	for _ in 1 2 3; do
		map i
		dd if=/dev/urandom of="$dev" bs=64k count=9 seek=$((RANDOM % 100)) oflag=direct \
			conv=notrunc status=none
		not rmmod dm_qcow2 2> /dev/null
		unmap i
	done
	users=$(cat /sys/module/dm_qcow2/refcnt)
	[ "$users" = 0 ] || fault "the module has $users users, but no device"
	rmmod dm_qcow2
	[ ! -e /sys/module/dm_qcow2 ]
	load_module
	map i
	dd if="$dev" of=/dev/null bs=1M iflag=direct status=none
	judge
}

start fio
check "suspend and resume under load" under_load '' 6 suspend_resume
check "reload under load" under_load cluster_size=4k 8 reload
check "a reload that is refused or dropped, under load" under_load data_file_raw=on 4 no_reload
check "a table that is loaded long before it is resumed, under load" under_load '' 3 late_resume
check "read_only and back" to_read_only
check "removal while in use: refused, or deferred" removal_in_use
check "forced removal under load" forced_removal
check "the module can be unloaded, and loaded again" unload
finish
