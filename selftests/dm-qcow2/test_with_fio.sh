#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# Random load by fio, several jobs at once, each with sizes and a part of the
# device of its own. fio verifies what it wrote; afterwards once more from a cold
# cache, and once more in a raw file that QEMU made from the image.

. "$(dirname "$0")/common.sh"

# fio_job TARGET LOADS OPTION...: the same jobs each time, so that a later call
# with --verify_only knows what must be there
fio_job()
{
	local target=$1 out rc=0

	shift
	out=$(timeout 1200 fio --filename="$target" --direct=1 --randseed=12 --verify=crc32c \
		--verify_fatal=1 --allow_file_create=0 --thread --group_reporting "$@" 2>&1) || rc=$?
	[ "$rc" = 0 ] || fault "fio: status $rc: $(tail -n 12 <<< "$out")"
}

# load NAME OPTIONS ENGINE [FIO_OPTION...]
load()
{
	local name=$1 options=$2 engine=$3 size=$((96 << 20)) jobs

	shift 3
	image "$name" $((size + 512)) "$options"
	map "$name"
	# Jobs meet inside clusters at the borders of their parts: 23 MiB and
	# 17 KiB is no multiple of any cluster size.
	jobs=(--ioengine="$engine" "$@"
		--name=small --rw=randrw --rwmixwrite=70 --bs=4k --offset=0 --size=8M --iodepth=16
		--name=sector --rw=randwrite --bs=512 --offset=8209k --size=512k --iodepth=8
		--name=odd --rw=randwrite --bs=17k --offset=23569k --size=12988k --iodepth=8
		--name=large --rw=randwrite --bs=256k --offset=40m --size=24m --iodepth=4
		--name=stream --rw=write --bs=1000k --offset=70m --size=20000k --iodepth=2)
	fio_job "$dev" "${jobs[@]}"
	[ "$(mode "$name")" = rw ]
	dmsetup suspend "$prefix-$name"
	dmsetup resume "$prefix-$name"
	fio_job "$dev" --verify_only "${jobs[@]}"
	unmap "$name"
	qemu-img check -q "$dir/$name.qcow2" || fault "qemu-img check: status $?"
	qemu-img convert -f qcow2 -O raw "$dir/$name.qcow2" "$dir/raw"
	# The scratch folder may be on tmpfs, which has no O_DIRECT.
	fio_job "$dir/raw" --direct=0 --verify_only "${jobs[@]}" --ioengine=sync
}

# A file system, as a guest or a host would use it.
file_system()
{
	local mnt=$dir/mnt

	image fs $((128 << 20)) cluster_size="$1"
	map fs
	mkfs.ext4 -q -F "$dev"
	mkdir "$mnt"
	mount -t ext4 "$dev" "$mnt"
	mkdir "$mnt/a"
	for i in 1 2 3 4 5 6 7 8; do
		head -c $((i * 700000)) /dev/urandom > "$mnt/a/$i" &
	done
	wait
	cp -r "$mnt/a" "$mnt/b"
	rm "$mnt/a/3" "$mnt/b/4"
	sync
	( cd "$mnt" && sha256sum a/* b/* ) > "$dir/sums"
	dmsetup suspend "$prefix-fs"
	dmsetup resume "$prefix-fs"
	cp -r "$mnt/b" "$mnt/c"
	umount "$mnt"
	unmap fs
	qemu-img check -q "$dir/fs.qcow2" || fault "qemu-img check: status $?"
	map fs read_only
	e2fsck -f -n "$dev" > "$dir/log" 2>&1 || fault "e2fsck: $(cat "$dir/log")"
	mount -t ext4 -o ro "$dev" "$mnt"
	( cd "$mnt" && sha256sum --quiet -c "$dir/sums" )
	( cd "$mnt/c" && sed -n 's|  b/|  |p' "$dir/sums" | sha256sum --quiet -c )
	umount "$mnt"
	unmap fs
	# QEMU must see the same file system.
	qemu-img convert -f qcow2 -O raw "$dir/fs.qcow2" "$dir/raw"
	e2fsck -f -n "$dir/raw" > "$dir/log" 2>&1 || fault "e2fsck: $(cat "$dir/log")"
}

start fio mkfs.ext4 e2fsck
check "io_uring, clusters of 64 KiB" load i '' io_uring
check "libaio with fsync, clusters of 4 KiB" load i cluster_size=4k libaio --fsync=16
check "io_uring, FUA writes, clusters of 64 KiB" load i refcount_bits=1 io_uring --sync=dsync
check "libaio, data_file_raw" load i data_file_raw=on libaio --fdatasync=32
check "io_uring, clusters of 512" load i cluster_size=512,refcount_bits=64 io_uring
check "io_uring, clusters of 2 MiB" load i cluster_size=2M io_uring --fsync=64
check "ext4, clusters of 64 KiB" file_system 64k
check "ext4, clusters of 1 KiB" file_system 1k
finish
