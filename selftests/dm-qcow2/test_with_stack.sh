#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# The device between others: what may lie below it, what may lie on it, and what
# it tells of itself. Each time a load that verifies what it reads, and at the end
# QEMU's view of the image.

. "$(dirname "$0")/common.sh"

size=$((32 << 20))

# load DEVICE [OPTION]: the first 16 MiB of it
load()
{
	local out rc=0 ss

	ss=$(blockdev --getss "$1")
	out=$(timeout 1200 fio "${@:2}" --filename="$1" --direct=1 --randseed=7 --verify=crc32c \
		--verify_fatal=1 --allow_file_create=0 --thread --group_reporting --ioengine=io_uring \
		--name=small --rw=randrw --bs="$ss" --size=$((256 * ss)) --iodepth=4 \
		--name=page --rw=randrw --rwmixwrite=60 --bs=4k --offset=2m --size=1m --iodepth=8 --fsync=64 \
		--name=odd --rw=randwrite --bs=20k --offset=4m --size=1m --iodepth=8 \
		--name=stream --rw=write --bs=1m --offset=12m --size=4m --iodepth=2 2>&1) || rc=$?
	[ "$rc" = 0 ] || fault "fio: status $rc: $(tail -n 12 <<< "$out")"
}

# judge NAME: close it; it must contain then what it shows now
judge()
{
	[ "$(mode "$1")" = rw ] || fault "mode $(mode "$1")"
	dd if="$dev" of="$dir/seen" bs=1M iflag=direct conv=sparse status=none
	unwind "$below"
	good_image "$1" "$dir/seen"
}

# limits SECTOR CLUSTER
limits()
{
	local ss pb io min

	ss=$(blockdev --getss "$dev")
	pb=$(blockdev --getpbsz "$dev")
	io=$(blockdev --getioopt "$dev")
	min=$(blockdev --getiomin "$dev")
	[ "$ss" = "$1" ] || fault "logical block size $ss, not $1"
	((io > 0 && io % $2 == 0)) || fault "optimal I/O size $io, the cluster size is $2"
	((pb >= ss && min >= pb && min <= io)) || fault "physical block size $pb, minimum I/O size $min"
	# Direct I/O in its sectors, and in no smaller ones
	dd if="$dev" of=/dev/null bs="$ss" skip=3 count=5 iflag=direct status=none
	# (where load does not go)
	dd if=/dev/zero of="$dev" bs="$ss" seek=$(((1 << 20) / ss + 3)) count=1 oflag=direct conv=notrunc,nocreat status=none
	[ "$ss" = 512 ] || not dd if="$dev" of=/dev/null bs=512 skip=1 count=1 iflag=direct 2> /dev/null
}

# below META_KIND DATA_KIND SECTOR CLUSTER
below()
{
	stack b "$1" "$2" "$size" "cluster_size=$4"
	limits "$3" "$4"
	load "$dev"
	dmsetup load --table "$line" "$prefix-b"
	dmsetup resume "$prefix-b"
	limits "$3" "$4"
	load "$dev" --verify_only
	judge b
	unwind
}

# The sectors of the data device are those of a file system.
make_fs()
{
	local fs=$1

	stack f loop4k loop4k $((320 << 20)) cluster_size=32k
	limits 4096 32768
	"mkfs.$fs" -q "$dev"
	mkdir "$dir/mnt"
	mount -t "$fs" "$dev" "$dir/mnt"
	head -c 3000000 /dev/urandom > "$dir/mnt/a"
	cp "$dir/mnt/a" "$dir/mnt/b"
	umount "$dir/mnt"
	mount -t "$fs" "$dev" "$dir/mnt"
	cmp "$dir/mnt/a" "$dir/mnt/b"
	umount "$dir/mnt"
	judge f
	unwind
}

crypt()
{
	stack c loop loop "$size" cluster_size=64k
	head -c 64 /dev/urandom > "$dir/key"
	if [ "$1" = luks ]; then
		cryptsetup luksFormat -q --type luks2 --pbkdf pbkdf2 --pbkdf-force-iterations 1000 \
			--sector-size "$2" "$dev" "$dir/key"
		cryptsetup open --type luks2 --allow-discards --key-file "$dir/key" "$dev" "$prefix-crypt"
		later cryptsetup close "$prefix-crypt"
		[ "$(blockdev --getss "/dev/mapper/$prefix-crypt")" = "$2" ]
		# Most of the rest is the header's.
		mkfs.ext4 -q "/dev/mapper/$prefix-crypt"
		e2fsck -f -n "/dev/mapper/$prefix-crypt" > "$dir/log" 2>&1 || fault "$(cat "$dir/log")"
	else
		cryptsetup open --type plain --cipher aes-xts-plain64 --key-size 512 \
			--key-file "$dir/key" "$dev" "$prefix-crypt"
		later cryptsetup close "$prefix-crypt"
		load "/dev/mapper/$prefix-crypt"
	fi
	unwind $((below + 1))
	judge c
	unwind
}

physical_volume()
{
	stack p loop loop "$size" cluster_size=64k
	volume pv $((24 << 20)) "$dev"
	load "$lower"
	[ "$(blockdev --getioopt "$lower")" = 65536 ] || fault "optimal I/O size of the volume"
	unwind $((below + 1))
	judge p
	unwind
}

array()
{
	local one md n=127

	stack m0 loop loop "$size" cluster_size=64k
	one=$dev
	stack m1 loop loop "$size" cluster_size=4k
	while [ -e /sys/block/md"$n" ]; do n=$((n - 1)); done
	md=/dev/md$n
	mdadm --create "$md" -q --run --level=1 --raid-devices=2 --metadata=1.2 --bitmap=none \
		"$one" "$dev" 2> "$dir/log" || fault "mdadm: $(cat "$dir/log")"
	later mdadm --stop -q "$md"
	load "$md"
	mdadm --wait "$md" 2> /dev/null || true
	# Without one, and with it again
	mdadm -q "$md" --fail "$one"
	load "$md"
	mdadm -q "$md" --remove "$one"
	mdadm -q "$md" --add "$one"
	load "$md"
	mdadm --wait "$md" 2> /dev/null || true
	echo check > "/sys/block/${md#/dev/}/md/sync_action"
	mdadm --wait "$md" 2> /dev/null || true
	[ "$(cat "/sys/block/${md#/dev/}/md/mismatch_cnt")" = 0 ] || fault "the members differ"
	[ "$(cat "/sys/block/${md#/dev/}/md/degraded")" = 0 ] || fault "a member was lost"
	# The array, and the device that was made last
	unwind $((below + 1))
	judge m1
	unwind
	good_image_of_members
}

# Their devices are gone, but their files are there.
good_image_of_members()
{
	local n

	for n in m0 m1; do
		ln -sf "$dir/$n-meta.lower" "$dir/$n.qcow2"
		ln -sf "$dir/$n-data.lower" "$dir/$n.data"
		good_image "$n"
	done
}

partitions()
{
	local n

	stack k loop loop $((40 << 20)) cluster_size=64k
	printf 'label: gpt\nstart=2048, size=%s\nsize=+\n' $((18 << 11)) |
		sfdisk -q --no-reread --no-tell-kernel "$dev" > "$dir/log" 2>&1 || fault "$(cat "$dir/log")"
	kpartx -a -p p "$dev"
	later kpartx -d -p p "$dev"
	for n in 1 2; do
		poll 10 test -b "${dev}p$n"
	done
	load "${dev}p1"
	load "${dev}p2"
	unwind $((below + 1))
	judge k
	unwind
	# QEMU's raw copy has the same partitions.
	sfdisk -q -d "$dir/seen" | grep -c 'start=' | grep -qx 2
}

start fio blockdev blkdiscard cryptsetup mdadm kpartx sfdisk vgcreate mkfs.ext4 mkfs.xfs e2fsck
find_nvme
modprobe -a dm-crypt dm-thin-pool raid1 xfs ext4 || skip_all "no dm-crypt, dm-thin-pool, raid1, xfs or ext4"
check "sectors of 512 bytes below" below loop loop 512 65536
check "sectors of 4096 bytes below the metadata" below loop4k loop 512 65536
check "sectors of 4096 bytes below the data" below loop loop4k 4096 4096
check "on dm-linear and an LVM volume" below linear lv 512 16384
check "on dm-thin" below thin thin 512 65536
# In the test VM there is one.
if [ -n "$nvme" ] || [ -n "${VM_DISKS-}" ]; then
	check "on an LVM volume and NVMe" below lv nvme 4096 65536
fi
check "ext4 on sectors of 4096 bytes" make_fs ext4
check "xfs on sectors of 4096 bytes" make_fs xfs
check "dm-crypt on it" crypt plain
check "dm-crypt on it, LUKS, sectors of 4096 bytes" crypt luks 4096
check "a physical volume of LVM" physical_volume
check "two of them in a RAID 1" array
check "partitions" partitions
finish
