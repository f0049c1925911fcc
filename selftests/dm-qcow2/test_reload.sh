#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# Suspend, resume, reload and removal, most of it under a load that verifies what
# it reads; at last the module must go, and with it all that it holds.

. "$(dirname "$0")/common.sh"

# Begin a load in the background. It ends when its work is done: there is no
# time in it, so that a slow machine does the same.
begin()
{
	timeout 300 fio --filename="$dev" --direct=1 --randseed=5 --verify=crc32c --verify_fatal=1 \
		--ioengine=io_uring --thread --group_reporting --loops="${1:-3}" --verify_backlog=64 \
		--name=a --rw=randrw --bs=4k --size=6m --iodepth=8 \
		--name=b --rw=randwrite --bs=20k --offset=6145k --size=10m --iodepth=4 --fsync=16 \
		> "$dir/fio.log" 2>&1 &
	load=$!
}

running()
{
	kill -0 "$load" 2> /dev/null
}

end()
{
	local rc=0

	wait "$load" || rc=$?
	[ $rc = 0 ] || fault "fio: status $rc: $(tail -n 12 "$dir/fio.log")"
}

judge()
{
	[ "$(mode i)" = rw ] || fault "mode $(mode i)"
	unmap i
	qemu-img check -q "$dir/i.qcow2" || fault "qemu-img check: status $?"
}

# under_load COMMAND...: again and again while the load runs
under_load()
{
	local n=0

	image i $((24 << 20)) "$options"
	map i
	begin "${loops:-3}"
	while running; do
		"$@"
		n=$((n + 1))
	done
	end
	[ $n -ge 3 ] || fault "only $n rounds; the load is too short"
	judge
}

cycle()
{
	dmsetup suspend "$@" "$prefix-i"
	sleep 0.1
	dmsetup resume "$prefix-i"
	sleep 0.2
}

reload()
{
	dmsetup load --table "$line" "$prefix-i"
	dmsetup resume "$prefix-i"
	sleep 0.2
}

wrong_reload()
{
	not dmsetup load --table "${line% *} 9" "$prefix-i" 2> /dev/null
	[ "$(dmsetup info -c --noheadings -o tables_loaded "$prefix-i")" = Live ]
	sleep 0.2
}

# A table that is loaded, and dropped again.
dropped()
{
	dmsetup load --table "$line" "$prefix-i"
	dmsetup clear "$prefix-i"
	sleep 0.2
}

# The constructor of a new table runs while the old one is at work: what that
# changes meanwhile, the new one must see.
late_resume()
{
	dmsetup load --table "$line" "$prefix-i"
	sleep 1.2
	dmsetup resume "$prefix-i"
}

# read_only and back
to_read_only()
{
	image i $((24 << 20)) ''
	map i
	begin 1
	end
	before=$(sha256sum < "$dir/i.data")
	dmsetup load --table "$line 1 read_only" "$prefix-i"
	dmsetup resume "$prefix-i"
	[ "$(mode i)" = ro ]
	meta_before=$(sha256sum < "$dir/i.qcow2")
	not dd if=/dev/zero of="$dev" bs=4k count=1 oflag=direct conv=notrunc status=none 2> /dev/null
	[ "$meta_before" = "$(sha256sum < "$dir/i.qcow2")" ]
	[ "$before" = "$(sha256sum < "$dir/i.data")" ]
	reload
	[ "$(mode i)" = rw ]
	dd if=/dev/zero of="$dev" bs=4k count=1 seek=5000 oflag=direct conv=notrunc status=none
	judge
}

busy_removal()
{
	image i $((24 << 20)) ''
	map i
	begin 2
	for _ in 1 2 3; do
		not dmsetup remove "$prefix-i" 2> /dev/null
	done
	running || fault "the load is too short"
	end
	judge
}

gone()
{
	! dmsetup info "$prefix-i" > /dev/null 2>&1
}

deferred_removal()
{
	image i $((24 << 20)) ''
	map i
	begin 2
	dmsetup remove --deferred "$prefix-i"
	not gone
	end
	poll 30 gone
	losetup -d "$meta" "$data"
	qemu-img check -q "$dir/i.qcow2"
}

# The table is replaced by one that fails all I/O; the image must be left whole.
forced_removal()
{
	image i $((24 << 20)) ''
	map i
	begin 50
	sleep 2
	running || fault "the load is too short"
	not dmsetup remove --force "$prefix-i" > /dev/null 2>&1
	# The load gets errors now, and ends by itself.
	not wait "$load"
	poll 30 dmsetup remove --retry "$prefix-i"
	losetup -d "$meta" "$data"
	qemu-img check -q "$dir/i.qcow2" || fault "qemu-img check: status $?"
}

unload()
{
	local users

	image i $((24 << 20)) ''
	map i
	begin 1
	not rmmod dm_qcow2 2> /dev/null
	end
	judge
	users=$(cat /sys/module/dm_qcow2/refcnt)
	[ "$users" = 0 ] || fault "the module has $users users, but no device"
	rmmod dm_qcow2
	[ ! -e /sys/module/dm_qcow2 ]
	load_module
	map i
	dd if="$dev" of=/dev/null bs=1M iflag=direct status=none
	unmap i
}

many_devices()
{
	image i $((24 << 20)) ''
	for _ in {1..15}; do
		map i
		dd if=/dev/urandom of="$dev" bs=64k count=3 seek=$((RANDOM % 100)) oflag=direct \
			conv=notrunc status=none
		unmap i
	done
	qemu-img check -q "$dir/i.qcow2"
}

start fio
options=''
check "suspend and resume under load" under_load cycle
check "suspend without flush under load" under_load cycle --noflush
check "suspend without lockfs under load" under_load cycle --nolockfs
check "reload under load" under_load reload
check "a wrong reload under load" under_load wrong_reload
check "a table that is loaded and cleared under load" under_load dropped
check "a table that is loaded long before it is resumed" under_load late_resume
check "read_only and back" to_read_only
check "no removal while in use" busy_removal
check "deferred removal" deferred_removal
check "forced removal under load" forced_removal
check "create and remove many times" many_devices
check "the module can be unloaded, and loaded again" unload
finish
