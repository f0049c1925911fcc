#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# File systems under load, on a device over each of loop, LVM and dm-thin: with
# discards, fstrim, and suspend and resume in between. Then fsck, the files once
# more from a read-only table, and QEMU's view of the image.
#
# Environment: SEED (printed, to repeat a run), SECONDS_EACH (length of the load on
# each device).

. "$(dirname "$0")/common.sh"

seed=${SEED:-$RANDOM}
seconds=${SECONDS_EACH:-4}
mnt=''

fsck()
{
	case $1 in
	ext4)	e2fsck -f -n "$dev" > "$dir/log" 2>&1 ;;
	xfs)	xfs_repair -n "$dev" > "$dir/log" 2>&1 ;;
	esac || fault "fsck: $(tail -n 20 "$dir/log")"
}

# Files come and go, in parallel: names, contents, sizes, holes.
begin()
{
	local n

	mkdir "$mnt/stress"
	timeout 1200 stress-ng --temp-path "$mnt/stress" --timeout "$seconds" --seed "$seed" --verify \
		--hdd 1 --hdd-bytes 8m --hdd-opts wr-rnd,rd-rnd,fsync --dentry 1 --dentries 200 \
		--rename 1 --fallocate 1 --fallocate-bytes 16m --iomix 1 --iomix-bytes 8m --link 1 \
		> "$dir/stress.log" 2>&1 &
	load=($!)
	for n in 1 2; do
		(
			for ((i = 0; SECONDS < end; i++)); do
				"$here/fsx.py" "$mnt/fsx$n" $((seed + 1000 * n + i)) 150
			done
		) >> "$dir/fsx.log" 2>&1 &
		load+=($!)
	done
	# Copies of one tree, most of which go again
	(
		mkdir "$mnt/tree" "$mnt/copies"
		for n in 1 2 3 4 5 6 7 8; do
			head -c $((n * 70000)) /dev/urandom > "$mnt/tree/$n"
		done
		for ((i = 0; i < 4 || SECONDS < end; i++)); do
			cp -r "$mnt/tree" "$mnt/copies/$i"
			[ "$i" -lt 3 ] || rm -r "$mnt/copies/$((i - 2))"
		done
	) > "$dir/tree.log" 2>&1 &
	load+=($!)
}

# Whatever the load does meanwhile
disturb()
{
	local n

	for ((n = 0; n < 3 || SECONDS < end; n++)); do
		sleep 0.5
		fstrim "$mnt"
		dmsetup suspend "$prefix-s"
		dmsetup resume "$prefix-s"
		echo 2 > /proc/sys/vm/drop_caches
	done
}

# content FILE: names and sums of all that is there
content()
{
	( cd "$mnt" && find . -type f -print0 | sort -z | xargs -0 sha256sum ) > "$1"
}

# file_system KIND FS CLUSTER [OPTION,...]
file_system()
{
	local kind=$1 fs=$2 p rc end copy

	note "SEED=$seed"
	mnt=$dir/mnt
	stack s "$kind" "$kind" $((320 << 20)) "cluster_size=$3${4:+,$4}"
	# Discards the whole device first
	"mkfs.$fs" -q "$dev"
	mkdir "$mnt"
	mount -t "$fs" -o discard "$dev" "$mnt"
	end=$((SECONDS + seconds))
	begin
	disturb
	for p in "${load[@]}"; do
		rc=0
		wait "$p" || rc=$?
		[ "$rc" = 0 ] || fault "load: status $rc: $(tail -n 5 "$dir"/{stress,fsx,tree}.log)"
	done
	for copy in "$mnt"/copies/*; do
		diff -r "$mnt/tree" "$copy" || fault "$copy differs"
	done
	rm -r "$mnt/stress"
	content "$dir/before"
	umount "$mnt"
	fsck "$fs"
	[ "$(mode s)" = rw ] || fault "mode $(mode s)"
	unwind "$below"
	good_image s
	restack s read_only
	fsck "$fs"
	mount -t "$fs" -o ro "$dev" "$mnt"
	content "$dir/after"
	cmp "$dir/before" "$dir/after"
	[ "$(grep -c . "$dir/after")" -gt 10 ]
	umount "$mnt"
	unwind
}

start stress-ng mkfs.ext4 e2fsck mkfs.xfs xfs_repair fstrim vgcreate blockdev
modprobe -a ext4 xfs dm-thin-pool || skip_all "no ext4, xfs or dm-thin-pool"
check "ext4 over loop devices" file_system loop ext4 64k
check "xfs over loop devices" file_system loop xfs 4k
check "ext4 over LVM volumes" file_system lv ext4 4k
check "xfs over LVM volumes, extended L2 entries" file_system lv xfs 64k extended_l2=on
check "ext4 over dm-thin" file_system thin ext4 32k
check "xfs over dm-thin" file_system thin xfs 64k
finish
