#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# The remedies that qcow2setup prints, and that need a device: each is provoked, done as
# it is printed, and then what was refused works. Which there are, and who tests them,
# is in tools/tests/remedies.list; those that need no device are in remedies.sh there.

# shellcheck source=common.sh
. "$(dirname "$0")/common.sh"

name=$prefix-i
tests=$here/../../tools/tests

# provoked STATUS PATTERN ARG...: of the tool's
provoked()
{
	refused "$1" "$2" "$tool" "${@:3}"
}

# printed [@N] [PLACEHOLDER=VALUE...]: do what $err says, in this shell
printed()
{
	local command

	command=$(python3 "$tests/remedies.py" command "$@" <<< "$err") || fault "no command: $err"
	command=${command/#qcow2setup/"$tool"}
	eval "$command" > "$dir/printed" || fault "$command"
}

# option [VALUE]: the option that the remedy names, with a value for what stands for one
option()
{
	python3 - "$err" "$@" <<-'END'
		import re, sys
		text = sys.argv[1].rsplit("; ", 1)[1]
		found = re.search(r"\bgive (--[a-z-]+)((?: [^ ()]+)?)", text) or \
			re.search(r"(--[a-z-]+)((?: [^ ()]+)?)$", text)
		name, value = found.groups()
		value = value.replace("DEV|FILE", *sys.argv[2:3] or ["DEV|FILE"])
		print(name + (value if "/" in value else ""))
	END
}

# works ARG...: it does now, and that counts
works()
{
	"$tool" "$@" 2> "$dir/warned" || fault "$(cat "$dir/warned")"
	tested
}

# opens ARG...: so does this; closed again
opens()
{
	works open "$@"
	"$tool" close "$2"
}

tested()
{
	echo "$err" >> "$seen"
}

names()
{
	local bad

	image i $((4 << 20)) ''
	for bad in a/b '' "$(printf 'a%.0s' {1..200})"; do
		provoked 1 ';' open "$dir/i.qcow2" "$bad" --data-file "$dir/i.data"
		opens "$dir/i.qcow2" "$name" --data-file "$dir/i.data"
	done
	# those that the remedy allows
	provoked 1 'use letters' open "$dir/i.qcow2" 'a b' --data-file "$dir/i.data"
	opens "$dir/i.qcow2" "$name${err##* and }" --data-file "$dir/i.data"
	provoked 4 'open it first' status "$name"
	"$tool" open "$dir/i.qcow2" "$name" --data-file "$dir/i.data"
	works status "$name" > "$dir/out"
	provoked 5 'choose another name' open "$dir/i.qcow2" "$name" --data-file "$dir/i.data" --readonly
	printed
	opens "$dir/i.qcow2" "$name" --data-file "$dir/i.data" --readonly
	"$tool" open "$dir/i.qcow2" "$name" --data-file "$dir/i.data"
	provoked 4 'qcow2setup status lists' close "$name-2"
	printed
	grep -q "^$name " "$dir/printed"
	works close "$name"
}

# What is in use, and by whom
in_use()
{
	image i $((4 << 20)) ''
	losetup -f "$dir/i.qcow2"
	provoked 5 'detach it' open "$dir/i.qcow2" "$name" --data-file "$dir/i.data"
	printed
	opens "$dir/i.qcow2" "$name" --data-file "$dir/i.data"
	# a mounted device as the data
	new_loop "$dir/disk" $((4 << 20))
	mkfs.ext4 -q -F "$lower"
	mkdir "$dir/mnt"
	mount "$lower" "$dir/mnt"
	provoked 5 'unmount' open "$dir/i.qcow2" "$name" --data-file "$lower"
	umount "$dir/mnt"
	opens "$dir/i.qcow2" "$name" --data-file "$lower"
	# below another device
	dmsetup create "$prefix-l" --table "0 8192 linear $lower 0"
	provoked 5 'close that' open "$dir/i.qcow2" "$name" --data-file "$lower"
	[[ $err == *"$prefix-l"* ]]
	dmsetup remove "$prefix-l"
	opens "$dir/i.qcow2" "$name" --data-file "$lower"
	"$tool" open "$dir/i.qcow2" "$name" --data-file "$lower"
	image j $((4 << 20)) ''
	provoked 5 'close that first .qcow2setup' open "$dir/j.qcow2" "$name-j" --data-file "$lower"
	printed
	opens "$dir/j.qcow2" "$name-j" --data-file "$lower"
	# Ours, by processes that are seen, and by one that is not
	"$tool" open "$dir/i.qcow2" "$name" --data-file "$lower"
	hold &
	later kill $!
	poll 30 held_open
	provoked 5 'process.*use --deferred' close "$name"
	kill $!
	wait $! || true
	works close "$name"
	"$tool" open "$dir/i.qcow2" "$name" --data-file "$lower"
	hold &
	later kill $!
	poll 30 held_open
	refused 5 'opened 1 times.*use --deferred' unshare -p -f --mount-proc "$tool" close "$name"
	works close "$name" "$(option)"
	kill $!
	wait $! || true
	poll 30 gone
	# two of one name: a base that is open with other data
	truncate -s 4M "$dir/top.data" "$dir/other"
	"$tool" create "$dir/top.qcow2" --data-file "$dir/top.data" --backing-file "$dir/j.qcow2" --backing-format qcow2
	"$tool" open "$dir/j.qcow2" "$name-j" --data-file "$dir/other" --readonly
	provoked 5 'name the same' open "$dir/top.qcow2" "$name" --data-file "$dir/top.data" \
		--backing-file "$dir/j.qcow2,data-file=$dir/j.data"
	opens "$dir/top.qcow2" "$name" --data-file "$dir/top.data" --backing-file "$dir/j.qcow2,data-file=$dir/other"
	"$tool" close "$name-j"
	opens "$dir/top.qcow2" "$name" --data-file "$dir/top.data" --backing-file "$dir/j.qcow2,data-file=$dir/j.data"
}

gone()
{
	[ -z "$(our_devices)" ] && loops_gone_but "$lower"
}

loops_gone_but()
{
	[ "$(loops_here)" = "$1" ]
}

# A process that has the device open
hold()
{
	exec 7< "/dev/mapper/$name"
	exec sleep 1000
}

held_open()
{
	[ "$(dmsetup info -c --noheadings -o open "$name")" -gt 0 ]
}

# Who has the image is told by info, with the way to end it.
told_by_info()
{
	local image

	image i $((4 << 20)) ''
	new_loop "$dir/disk" $((8 << 20))
	image=$lower
	mkfs.ext4 -q -F "$image"
	mkdir "$dir/mnt"
	mount "$image" "$dir/mnt"
	# Behind the super block's place an image would be: the header is in front of it.
	dd if="$dir/i.qcow2" of="$dir/disk" bs=1k count=1 conv=notrunc status=none
	echo 3 > /proc/sys/vm/drop_caches
	"$tool" info "$image" > "$dir/out" 2> "$dir/warned" || true
	err=$(grep 'in use: it is mounted' "$dir/out")
	printed
	"$tool" info "$image" > "$dir/out" 2> "$dir/warned" || true
	not grep -q 'in use' "$dir/out"
	tested
	dd if=/dev/zero of="$image" bs=1M count=8 status=none
	mkswap "$image" > "$dir/out"
	swapon "$image"
	dd if="$dir/i.qcow2" of="$dir/disk" bs=1k count=1 conv=notrunc status=none
	"$tool" info "$image" > "$dir/out" 2> "$dir/warned" || true
	err=$(grep 'in use: it is used as swap' "$dir/out")
	printed
	tested
	# A process that is not seen from here
	mkfifo "$dir/fifo"
	qemu-io -f qcow2 "$dir/i.qcow2" < "$dir/fifo" > "$dir/log" 2>&1 &
	exec 8> "$dir/fifo"
	poll 60 grep -q "OFDLCK.*:$(stat -c %i "$dir/i.qcow2") " /proc/locks
	unshare -p -f --mount-proc "$tool" info "$dir/i.qcow2" > "$dir/out"
	err=$(grep 'in use: QEMU.*containers that share the file' "$dir/out")
	exec 8>&-
	wait $!
	"$tool" info "$dir/i.qcow2" > "$dir/out"
	not grep -q 'in use' "$dir/out"
	tested
	new_loop "$dir/i.qcow2" "$(stat -c %s "$dir/i.qcow2")"
	"$tool" info "$dir/i.qcow2" > "$dir/out"
	err=$(grep 'in use: loop' "$dir/out")
	printed
	"$tool" info "$dir/i.qcow2" > "$dir/out"
	not grep -q 'in use' "$dir/out"
	tested
}

# Devices of a fixed size, and with large blocks
devices()
{
	local data meta

	image i $((8 << 20)) ''
	new_loop "$dir/small" $((4 << 20))
	data=$lower
	provoked 4 'enlarge the device' open "$dir/i.qcow2" "$name" --data-file "$data"
	truncate -s 8M "$dir/small"
	losetup -c "$data"
	opens "$dir/i.qcow2" "$name" --data-file "$data"
	provoked 4 'enlarge the device' resize "$dir/i.qcow2" --size 12M --data-file "$data"
	truncate -s 12M "$dir/small"
	losetup -c "$data"
	works resize "$dir/i.qcow2" --size 12M --data-file "$data"
	"$tool" open "$dir/i.qcow2" "$name" --data-file "$data"
	provoked 4 'enlarge the device' resize "$name" --size 16M
	truncate -s 16M "$dir/small"
	losetup -c "$data"
	works resize "$name" --size 16M
	provoked 1 'leave --data-file' resize "$name" --size 17M --data-file "$data"
	truncate -s 17M "$dir/small"
	losetup -c "$data"
	works resize "$name" --size 17M
	dmsetup suspend "$name"
	provoked 5 'resume it first' resize "$name" --size 17M
	printed
	works resize "$name" --size 17M
	meta=$(readlink "/sys/dev/block/$(dmsetup table "$name" | cut -d ' ' -f 4)")
	meta=/dev/${meta##*/}
	lock "$meta" &
	later kill $!
	poll 60 not flock -n "$meta" true
	provoked 5 'try again' resize "$name" --size 17M
	kill $!
	wait $! || true
	works resize "$name" --size 17M
	"$tool" close "$name"
	"$tool" open "$dir/i.qcow2" "$name" --data-file "$data" --readonly
	provoked 4 'open read-only' resize "$name" --size 17M
	printed
	works resize "$dir/i.qcow2" --size 17M

	# The metadata on a device
	new_loop "$dir/meta" $((64 << 10))
	meta=$lower
	provoked 5 'overwrite-device' create "$meta" --data-file "$data"
	keep=$err
	provoked 4 'enlarge it' create "$meta" --data-file "$data" --overwrite-device
	truncate -s 1M "$dir/meta"
	losetup -c "$meta"
	works create "$meta" --data-file "$data" --overwrite-device
	err=$keep
	works create "$meta" --data-file "$data" "$(option)"
	provoked 4 'name two devices' create "$meta" --data-file "$meta" --overwrite-device
	works create "$meta" --data-file "$data" --overwrite-device
	provoked 4 'name two devices' create "$meta" --data-file "$data" --overwrite-device --backing-file "$meta" \
		--backing-format raw
	works create "$meta" --data-file "$data" --overwrite-device --backing-file "$dir/i.data" --backing-format raw
	provoked 4 'enlarge the device' resize "$meta" --size 64G
	truncate -s 20M "$dir/meta"
	losetup -c "$meta"
	works resize "$meta" --size 64G
	truncate -s 256K "$dir/meta"
	losetup -c "$meta"
	"$tool" create "$meta" --data-file "$data" --overwrite-device --cluster-size 4k --size 4M
	truncate -s 20K "$dir/meta"
	losetup -c "$meta"
	"$tool" open "$meta" "$name" --data-file "$data" 2> "$dir/warned"
	err=$(grep 'warning: .*may become too small' "$dir/warned")
	"$tool" close "$name"
	truncate -s 256K "$dir/meta"
	losetup -c "$meta"
	opens "$meta" "$name" --data-file "$data"
	[ ! -s "$dir/warned" ]
	# Its refcounts are lost, and there is no room for new ones.
	"$tool" create "$meta" --data-file "$data" --overwrite-device --cluster-size 4k --size 4M
	printf '\0\0\0\0' | dd of="$meta" bs=1 seek=56 conv=notrunc status=none
	truncate -s 16K "$dir/meta"
	losetup -c "$meta"
	not "$tool" check "$meta" --repair all > "$dir/out" 2> "$dir/err"
	err=$(grep 'no room for new refcounts' "$dir/err")
	truncate -s 256K "$dir/meta"
	losetup -c "$meta"
	works check "$meta" --repair all
}

# A remedy of the kernel's, which the tool passes on
kernels_own()
{
	truncate -s 4M "$dir/i.data"
	new_loop "$dir/meta" $((1 << 20))
	"$tool" create "$lower" --data-file "$dir/i.data" --overwrite-device
	# The table is there, but not the block that it is in.
	truncate -s $((3 * 65536 + 512)) "$dir/meta"
	losetup -c "$lower"
	not "$tool" open "$lower" "$name" --data-file "$dir/i.data" 2> "$dir/err"
	grep -q 'the kernel refused the image: qcow2: .*: extend it' "$dir/err" || fault "$(cat "$dir/err")"
	truncate -s 1M "$dir/meta"
	losetup -c "$lower"
	"$tool" open "$lower" "$name" --data-file "$dir/i.data"
	"$tool" close "$name"
}

lock()
{
	exec 7< "$1"
	flock 7
	exec sleep 1000
}

blocks_of_4k()
{
	local big

	qemu-img create -q -f qcow2 -o "data_file=$dir/i.data,cluster_size=512" "$dir/i.qcow2" 4M
	truncate -s 4M "$dir/i.data"
	new_loop "$dir/big" $((8 << 20)) --sector-size 4096
	big=$lower
	provoked 4 'put the data' open "$dir/i.qcow2" "$name" --data-file "$big"
	dd if="$big" of="$dir/file" bs=1M count=4 status=none
	opens "$dir/i.qcow2" "$name" --data-file "$dir/file"
	provoked 4 'give at least that' create "$big" --data-file "$dir/i.data" --cluster-size 512 --overwrite-device
	works create "$big" --data-file "$dir/i.data" "$(option)" "$(grep -o 'blocks of [0-9]*' <<< "$err" | grep -o '[0-9]*')" \
		--overwrite-device
	dd if="$dir/i.qcow2" of="$big" conv=notrunc,sync bs=4k status=none
	err=$("$tool" info "$big" | grep 'blocks of 4096')
	printed FILE="$dir/copy"
	opens "$dir/copy" "$name" --data-file "$dir/i.data"
	qemu-img create -q -f qcow2 -u -b "$big" -F raw -o "data_file=$dir/i.data,cluster_size=512" "$dir/top.qcow2" 4M
	provoked 4 'copy it' open "$dir/top.qcow2" "$name" --data-file "$dir/i.data" --backing-file "$big"
	dd if="$big" of="$dir/base" bs=1M status=none
	opens "$dir/top.qcow2" "$name" --data-file "$dir/i.data" --backing-file "$dir/base"
	# Sizes that end within a block
	qemu-img create -q -f qcow2 -o "data_file=$dir/i.data" "$dir/odd.qcow2" $((4194304 + 512))
	provoked 4 'resize the image' open "$dir/odd.qcow2" "$name" --data-file "$big"
	printed
	opens "$dir/odd.qcow2" "$name" --data-file "$big"
	head -c $((4194304 - 512)) /dev/urandom > "$dir/base"
	qemu-img create -q -f qcow2 -u -b "$dir/base" -F raw -o "data_file=$dir/x" "$dir/top.qcow2" 8M
	new_loop "$dir/odd-base" $((4194304 - 512))
	provoked 4 'give it another size' open "$dir/top.qcow2" "$name" --data-file "$big" --backing-file "$lower"
	truncate -s 4M "$dir/odd-base"
	losetup -c "$lower"
	opens "$dir/top.qcow2" "$name" --data-file "$big" --backing-file "$lower"
	qemu-img create -q -f qcow2 -o "data_file=$dir/b.data" "$dir/b.qcow2" $((4194304 - 512))
	truncate -s 4M "$dir/b.data"
	qemu-img create -q -f qcow2 -u -b "$dir/b.qcow2" -F qcow2 -o "data_file=$dir/x" "$dir/top.qcow2" 8M
	provoked 4 'resize it' open "$dir/top.qcow2" "$name" --data-file "$big" \
		--backing-file "$dir/b.qcow2,data-file=$dir/b.data"
	works resize "$dir/b.qcow2" --size 4M
	opens "$dir/top.qcow2" "$name" --data-file "$big" --backing-file "$dir/b.qcow2,data-file=$dir/b.data"
}

read_only()
{
	image i $((4 << 20)) ''
	lower=$(losetup -r -f --show "$dir/i.data")
	later losetup -d "$lower"
	provoked 2 'read-only; make it writable, or use --readonly' open "$dir/i.qcow2" "$name" --data-file "$lower"
	opens "$dir/i.qcow2" "$name" --data-file "$lower" "$(option)"
	losetup -d "$lower"
	losetup "$lower" "$dir/i.data"
	opens "$dir/i.qcow2" "$name" --data-file "$lower"
	losetup -d "$lower"
	# As somebody who may not
	chmod 755 "$dir"
	chmod 666 "$dir"/i.*
	cp "$tool" "$dir/tool"
	refused 2 'run as root' setpriv --reuid 65534 --clear-groups "$dir/tool" open "$dir/i.qcow2" "$name" --data-file "$dir/i.data"
	opens "$dir/i.qcow2" "$name" --data-file "$dir/i.data"
}

backing()
{
	local top=("$dir/top.qcow2" "$name" --data-file "$dir/top.data")

	image i $((4 << 20)) ''
	truncate -s 4M "$dir/top.data"
	qemu-img create -q -f qcow2 -b "$dir/i.qcow2" -F qcow2 -o "data_file=$dir/top.data" "$dir/top.qcow2" 4M
	# An image on a device
	new_loop "$dir/base" $((1 << 20))
	dd if="$dir/i.qcow2" of="$lower" conv=notrunc status=none
	provoked 1 'data file is not named' open "${top[@]}" --backing-file "$lower"
	# shellcheck disable=SC2046 # words are wanted
	opens "${top[@]}" $(option "$dir/i.data")
	# One that could be written below it
	"$tool" open "$dir/i.qcow2" "$name-base" --data-file "$dir/i.data"
	provoked 5 'close it, and open it with --readonly' open "${top[@]}" --backing-file "/dev/mapper/$name-base"
	"$tool" close "$name-base"
	"$tool" open "$dir/i.qcow2" "$name-base" --data-file "$dir/i.data" --readonly
	opens "${top[@]}" --backing-file "/dev/mapper/$name-base"
	"$tool" close "$name-base"
	# Its end shows the backing file in a part of a cluster.
	qemu-img create -q -f qcow2 -o "data_file=$dir/b.data" "$dir/b.qcow2" 8M
	truncate -s 8M "$dir/b.data" "$dir/odd.data"
	qemu-img create -q -f qcow2 -b "$dir/b.qcow2" -F qcow2 -o "data_file=$dir/odd.data" "$dir/odd.qcow2" 5000192
	provoked 4 'resize the open device' resize "$dir/odd.qcow2" --size 6M --data-file "$dir/odd.data" \
		--backing-file "$dir/b.qcow2,data-file=$dir/b.data"
	"$tool" open "$dir/odd.qcow2" "$name" --data-file "$dir/odd.data" --backing-file "$dir/b.qcow2,data-file=$dir/b.data"
	works resize "$name" --size 6M
	"$tool" close "$name"
}

# What a table line names are devices.
tables()
{
	image i $((4 << 20)) ''
	qemu-img create -q -f qcow2 -b "$dir/i.qcow2" -F qcow2 -o "data_file=$dir/top.data" "$dir/top.qcow2" 4M
	# Both are files, then devices
	for size in $(stat -c %s "$dir/i.qcow2") 262144; do
		truncate -s "$size" "$dir/i.qcow2"
		provoked 4 'losetup' table "$dir/i.qcow2" --data-file "$dir/i.data"
		printed @2
		meta=$(< "$dir/printed")
		keep=$err
		provoked 4 'losetup' table "$meta" --data-file "$dir/i.data"
		printed @2
		data=$(< "$dir/printed")
		works table "$meta" --data-file "$data" > "$dir/line"
		err=$keep
		tested
		losetup -d "$meta" "$data"
	done
	new_loop "$dir/top-meta" $((1 << 20))
	meta=$lower
	dd if="$dir/top.qcow2" of="$meta" conv=notrunc status=none
	new_loop "$dir/top.data" $((4 << 20))
	provoked 4 'open it first' table "$meta" --data-file "$lower" --backing-file "$dir/i.qcow2,data-file=$dir/i.data"
	# The dots stand for the rest of its options.
	eval "$(python3 "$tests/remedies.py" command IMAGE="$dir/i.qcow2" NAME="$name-base" <<< "$err" |
		sed "s|^qcow2setup|\"\$tool\"|; s|\\.\\.\\.|--data-file $dir/i.data|")"
	works table "$meta" --data-file "$lower" --backing-file "/dev/mapper/$name-base" > "$dir/line"
	grep -q "backing_dev /dev/mapper/$name-base" "$dir/line"
	# bits that table may not clear
	printf '\200' | dd of="$meta" bs=1 seek=88 conv=notrunc status=none
	provoked 4 'use qcow2setup open, or --readonly' table "$meta" --data-file "$lower" \
		--backing-file "/dev/mapper/$name-base"
	works table "$meta" --data-file "$lower" --backing-file "/dev/mapper/$name-base" --readonly > "$dir/line"
	opens "$meta" "$name" --data-file "$lower" --backing-file "/dev/mapper/$name-base"
	"$tool" close "$name-base"
}

# QEMU makes an ordinary image a device.
nbd()
{
	modprobe nbd max_part=0 || fault "no nbd module"
	image i $((4 << 20)) ''
	yes base | head -c 4M > "$dir/raw"
	qemu-img convert -f raw -O qcow2 "$dir/raw" "$dir/plain.qcow2"
	qemu-img create -q -f qcow2 -b "$dir/plain.qcow2" -F qcow2 -o "data_file=$dir/top.data" "$dir/top.qcow2" 4M
	truncate -s 4M "$dir/top.data"
	provoked 4 'qemu-nbd' open "$dir/top.qcow2" "$name" --data-file "$dir/top.data" --backing-file "$dir/plain.qcow2"
	keep=$err
	later qemu-nbd -d /dev/nbd0
	printed
	poll 30 nbd_ready
	err=$keep
	# shellcheck disable=SC2046 # words are wanted
	works open "$dir/top.qcow2" "$name" --data-file "$dir/top.data" $(option)
	cmp "/dev/mapper/$name" "$dir/raw"
	"$tool" close "$name"
}

nbd_ready()
{
	[ "$(< /sys/block/nbd0/size)" -gt 0 ]
}

# Names in images, and chains
recorded()
{
	local open=(open "$dir/i.qcow2" "$name") n

	image i $((4 << 20)) ''
	provoked 1 'or --trust-image-paths' "${open[@]}"
	opens "${open[@]:1}" --trust-image-paths
	mv "$dir/i.data" "$dir/elsewhere"
	provoked 4 'which the image names; give' "${open[@]}" --trust-image-paths
	# shellcheck disable=SC2046 # words are wanted
	opens "${open[@]:1}" $(option "$dir/elsewhere")
	qemu-img create -q -f qcow2 -o "data_file=$dir/i.data" "$dir/i.qcow2" 4M
	rm "$dir/i.data"
	python3 - "$dir/i.qcow2" <<-'END'
		import struct, sys
		with open(sys.argv[1], "r+b") as f:
		    f.seek(112)
		    f.write((struct.pack(">II", 0x44415441, 15) + b"nbd://localhost" + bytes(9)).ljust(400, b"\0"))
	END
	provoked 4 'is a protocol.*; give' "${open[@]}" --trust-image-paths
	# shellcheck disable=SC2046 # words are wanted
	opens "${open[@]:1}" $(option "$dir/elsewhere")
	# 34 images, by the names that are recorded
	truncate -s 1M "$dir"/c{0..33}.data
	"$tool" create "$dir/c0.qcow2" --data-file "$dir/c0.data"
	for n in {1..33}; do
		"$tool" create "$dir/c$n.qcow2" --data-file "$dir/c$n.data" \
			--backing-file "$dir/c$((n - 1)).qcow2" --backing-format qcow2
	done
	provoked 4 'chain has more than 32' open "$dir/c33.qcow2" "$name" --trust-image-paths
	printed BASE="$dir/c31.qcow2" IMAGE="$dir/c33.qcow2"
	opens "$dir/c33.qcow2" "$name" --trust-image-paths
}

# Modules that are missing: the kernel would load them by itself.
modules()
{
	local ko=${DM_QCOW2_KO:-$here/../../driver/dm-qcow2.ko} kept m

	image i $((4 << 20)) ''
	# Installed, if it is not: only then can it be loaded by its name. Nothing of that
	# stays, and a folder that cannot be written is no hindrance.
	kept=/lib/modules/$(uname -r)
	if ! modinfo dm-qcow2 > "$dir/out" 2>&1; then
		# Some are enough, and soon told from each other.
		mkdir "$dir/modules"
		cp "$ko" "$dir/modules/dm-qcow2.ko"
		for m in loop dm-mod $(modinfo -F depends "$ko" | tr , ' '); do
			m=$(modinfo -n "$m")
			[ ! -e "$m" ] || cp "$m" "$dir/modules"
		done
		mount -t tmpfs none "$kept"
		later umount "$kept"
		cp "$dir"/modules/* "$kept"
		depmod 2> "$dir/warned"
	fi
	rmmod dm_qcow2
	later load_module
	printf 'install dm-qcow2 /bin/false\ninstall dm_qcow2 /bin/false\n' > /run/modprobe.d/qcow2test.conf
	later rm -f /run/modprobe.d/qcow2test.conf
	provoked 4 'modprobe dm-qcow2' open "$dir/i.qcow2" "$name" --data-file "$dir/i.data"
	rm /run/modprobe.d/qcow2test.conf
	printed
	opens "$dir/i.qcow2" "$name" --data-file "$dir/i.data"
	# The node for loop devices is there only with the module.
	mkdir "$dir/dev"
	# shellcheck disable=SC2016 # for the shell in there
	refused 4 'modprobe loop' unshare -m bash -c '
		mount -t tmpfs none "$1/dev"
		mkdir "$1/dev/mapper"
		cp -a /dev/null /dev/kmsg "$1/dev"
		cp -a /dev/mapper/control "$1/dev/mapper"
		mount --bind "$1/dev" /dev
		shift
		exec "$@"' - "$dir" "$tool" open "$dir/i.qcow2" "$name" --data-file "$dir/i.data"
	printed
	opens "$dir/i.qcow2" "$name" --data-file "$dir/i.data"
	# No table, but a name and a uuid of ours
	dmsetup create "$name" --notable -u "QCOW2-0000000000000000-$name"
	provoked 4 'has no table.*close it' status "$name"
	printed
	opens "$dir/i.qcow2" "$name" --data-file "$dir/i.data"
}

# A flush that fails, with metadata that cannot be written
flush_fails()
{
	local meta

	truncate -s 4M "$dir/i.data"
	truncate -s 1M "$dir/disk"
	meta=$(losetup -f --show "$dir/disk")
	later losetup -d "$meta"
	dmsetup create "$prefix-meta" --table "0 2048 linear $meta 0"
	"$tool" create "/dev/mapper/$prefix-meta" --data-file "$dir/i.data" --overwrite-device
	"$tool" open "/dev/mapper/$prefix-meta" "$name" --data-file "$dir/i.data"
	dd if=/dev/urandom of="/dev/mapper/$name" bs=4k count=1 oflag=direct conv=fsync status=none
	bad_meta bad
	dd if=/dev/urandom of="/dev/mapper/$name" bs=64k seek=4 count=1 oflag=direct status=none
	provoked 4 'cannot flush.*; repair what is below it' close "$name"
	keep=$err
	provoked 4 'see what qcow2setup status says' map "$name"
	printed
	grep -q "^$name " "$dir/printed"
	bad_meta good
	works map "$name" > "$dir/out"
	err=$keep
	works close "$name"
	# Given up
	"$tool" open "/dev/mapper/$prefix-meta" "$name" --data-file "$dir/i.data"
	# What the table says can be read no more then.
	dd if="/dev/mapper/$name" of="$dir/out" bs=64k count=1 iflag=direct status=none
	bad_meta bad
	dd if=/dev/urandom of="/dev/mapper/$name" bs=64k seek=8 count=1 oflag=direct status=none
	provoked 4 'give up.*dmsetup remove' close "$name"
	printed
	bad_meta good
	opens "/dev/mapper/$prefix-meta" "$name" --data-file "$dir/i.data"
	dmsetup remove --retry "$prefix-meta"
}

# bad_meta good|bad: can the cluster behind the L1 table, that of the L2 table, be written?
bad_meta()
{
	local table="0 2048 linear $meta 0"

	[ "$1" = good ] || table="0 512 linear $meta 0
		512 128 error
		640 1408 linear $meta 640"
	dmsetup load "$prefix-meta" --table "$table"
	dmsetup suspend --noflush "$prefix-meta"
	dmsetup resume "$prefix-meta"
}

# The kernel has found a fault, and does not write any more.
mode_ro()
{
	local l2

	image i $((1 << 30)) ''
	qemu-io -f qcow2 -c 'write -q 0 64k' -c 'write -q 768M 64k' "$dir/i.qcow2"
	cp "$dir/i.qcow2" "$dir/backup"
	"$tool" open "$dir/i.qcow2" "$name" --data-file "$dir/i.data"
	# of the first table, which nobody has read yet
	l2=$((0x$(od -An -v -tx1 -j 196608 -N 8 "$dir/i.qcow2" | tr -d ' ') & (1 << 56) - 512))
	printf '\200\0\0\0\0\0\2\0' | dd of="$dir/i.qcow2" bs=1 seek="$l2" conv=notrunc status=none
	sync "$dir/i.qcow2"
	echo 3 > /proc/sys/vm/drop_caches
	not dd if="/dev/mapper/$name" of="$dir/out" bs=64k count=1 iflag=direct status=none 2> "$dir/err"
	[ "$(mode i)" = ro ] || fault "mode $(mode i)"
	provoked 4 'is in mode ro; close it' resize "$name" --size 2G
	printed
	not "$tool" check "$dir/i.qcow2" > "$dir/out" 2> "$dir/err"
	cp "$dir/backup" "$dir/i.qcow2"
	"$tool" open "$dir/i.qcow2" "$name" --data-file "$dir/i.data"
	works resize "$name" --size 2G
	"$tool" close "$name"
}

every_one()
{
	python3 "$tests/remedies.py" tested "$tests/remedies.list" device "$seen" > "$dir/missing" ||
		fault "$(cat "$dir/missing")"
}

start jq setpriv lsblk qemu-nbd mkfs.ext4 mkswap flock depmod unshare
need_tool
[ -e "$tests/remedies.list" ] || skip_all "$tests/remedies.list is missing"
mkdir -p /run/modprobe.d
seen=$(mktemp) || ktap_exit_fail_msg "no scratch file"
trap 'tidy; rm -f "$seen"' EXIT
check "names of devices" names
check "files and devices in use" in_use
check "what info tells of who has it" told_by_info
check "devices of fixed size" devices
check "a remedy of the kernel's" kernels_own
check "devices with blocks of 4 KiB" blocks_of_4k
check "read-only devices, and no privileges" read_only
check "backing files" backing
check "tables" tables
check "an ordinary backing image by qemu-nbd" nbd
check "names in images, and a long chain" recorded
check "modules that are missing" modules
check "a flush that fails" flush_fails
check "a device in mode ro" mode_ro
check "every remedy that needs a device was tested" every_one
finish
