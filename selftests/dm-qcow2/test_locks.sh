#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# Who may open an image when: qcow2setup against QEMU, and against itself. The
# locks are on the files, held by the loop devices: no process has to stay.

. "$(dirname "$0")/common.sh"

name=$prefix-i

setup()
{
	image i $((8 << 20)) ''
	image_file=$dir/i.qcow2
	data_file=$dir/i.data
	open=("$tool" open "$image_file" "$name" --data-file "$data_file")
}

# QEMU keeps FILE open until qemu_stop
qemu_start()
{
	mkfifo "$dir/fifo"
	qemu-io "$@" < "$dir/fifo" > "$dir/qemu-io.log" 2>&1 &
	qemu=$!
	exec 8> "$dir/fifo"
	poll 60 locked "${*: -1}"
}

locked()
{
	grep -q "OFDLCK.*:$(stat -c %i "$1") " /proc/locks
}

qemu_stop()
{
	exec 8>&-
	wait "$qemu"
	rm "$dir/fifo"
}

# QEMU is refused, by the lock and nothing else
qemu_refused()
{
	not "$@" > "$dir/out" 2>&1
	grep -qi 'lock' "$dir/out" || fault "$*: $(cat "$dir/out")"
}

open_writable()
{
	setup
	"${open[@]}"
	qemu_refused qemu-io -f qcow2 -c 'write 0 64k' "$image_file"
	qemu_refused qemu-io -r -f qcow2 -c 'read 0 64k' "$image_file"
	qemu_refused qemu-img check -f qcow2 "$image_file"
	qemu_refused qemu-img convert -f qcow2 -O raw "$image_file" "$dir/copy"
	qemu_refused qemu-img resize -f qcow2 "$image_file" +1M
	qemu_refused qemu-io -f raw -c 'write 0 64k' "$data_file"
	# Who says that it may change under him is let in.
	qemu-img info -U "$image_file" > /dev/null
	"$tool" info "$image_file" > /dev/null

	refused 5 'use|lock' "$tool" open "$image_file" "$name-2" --data-file "$data_file"
	refused 5 'use|lock' "$tool" open "$image_file" "$name-2" --readonly --data-file "$data_file"
	# Another image on the same data would be as bad.
	image j $((8 << 20)) ''
	refused 5 'use|lock' "$tool" open "$dir/j.qcow2" "$name-2" --data-file "$data_file"

	"$tool" close "$name"
	poll 30 loops_gone
	qemu-io -f qcow2 -c 'write -q 0 64k' "$image_file"
	qemu-img check -q -f qcow2 "$image_file"
}

open_readonly()
{
	local before

	setup
	qemu-io -f qcow2 -c 'write -q -P 7 64k 64k' "$image_file"
	truncate -s 8M "$data_file"
	before=$(sha256sum "$image_file" "$data_file")
	"${open[@]}" --readonly
	"$tool" open "$image_file" "$name-2" --readonly --data-file "$data_file"
	# Two readers, and QEMU a third one.
	qemu-io -r -f qcow2 -c 'read -q -P 7 64k 64k' "$image_file"
	cmp "/dev/mapper/$name" "/dev/mapper/$name-2"
	qemu_refused qemu-io -f qcow2 -c 'write 0 64k' "$image_file"
	qemu_refused qemu-io -f raw -c 'write 0 64k' "$data_file"
	refused 5 'use|lock' "$tool" open "$image_file" "$name-3" --data-file "$data_file"
	"$tool" close "$name"
	qemu_refused qemu-io -f qcow2 -c 'write 0 64k' "$image_file"
	"$tool" close "$name-2"
	poll 30 loops_gone
	[ "$before" = "$(sha256sum "$image_file" "$data_file")" ]
	qemu-io -f qcow2 -c 'write -q 0 64k' "$image_file"
}

qemu_writes()
{
	setup
	qemu_start -f qcow2 "$image_file"
	refused 5 'lock|use' "${open[@]}"
	refused 5 'lock|use' "${open[@]}" --readonly
	nothing_left
	"$tool" info "$image_file" > /dev/null
	qemu_stop
	"${open[@]}"
	"$tool" close "$name"
}

qemu_reads()
{
	setup
	qemu_start -r -f qcow2 "$image_file"
	refused 5 'lock|use' "${open[@]}"
	nothing_left
	"${open[@]}" --readonly
	"$tool" close "$name"
	qemu_stop
}

qemu_has_data()
{
	setup
	qemu_start -f raw "$data_file"
	refused 5 'lock|use' "${open[@]}"
	refused 5 'lock|use' "${open[@]}" --readonly
	nothing_left
	qemu_stop
	"${open[@]}"
	"$tool" close "$name"
}

# A plain dmsetup remove must let go of everything, too.
plain_removal()
{
	setup
	"${open[@]}"
	dmsetup remove --retry "$name"
	poll 30 loops_gone
	qemu-io -f qcow2 -c 'write -q 0 64k' "$image_file"
}

# Two at the same moment: one wins.
race()
{
	local won n

	setup
	for _ in 1 2; do
		for n in 1 2 3; do
			( rc=0; "$tool" open "$image_file" "$name-$n" --data-file "$data_file" \
				2> /dev/null || rc=$?; echo "$rc" > "$dir/rc$n" ) &
		done
		wait
		won=$(cat "$dir"/rc? | grep -c '^0$') || true
		[ "$won" -le 1 ] || fault "$won of 3 have opened it"
		[ "$(cat "$dir"/rc? | grep -vc '^[05]$')" = 0 ] || fault "$(cat "$dir"/rc?)"
		for n in 1 2 3; do
			[ "$(cat "$dir/rc$n")" != 0 ] || "$tool" close "$name-$n"
		done
		poll 30 loops_gone
	done
	nothing_left
}

start setpriv
need_tool
check "open: QEMU and other openers are refused, until it is closed" open_writable
check "open --readonly: readers are let in, writers are not" open_readonly
check "QEMU writes: refused" qemu_writes
check "QEMU reads: only --readonly" qemu_reads
check "QEMU has the data file: refused" qemu_has_data
check "removal by dmsetup releases the locks" plain_removal
check "several at once: one at most gets it" race
finish
