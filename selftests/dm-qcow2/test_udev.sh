#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# With Debian's own udevd, LVM and mdadm: what is on a guest's disk is left alone by the
# host, but for open --host; and a udevd that does not answer holds nobody up.
#
# For each kind of content an ordinary device shows first that the host would act on it.

# shellcheck source=common.sh
. "$(dirname "$0")/common.sh"

udevd=/lib/systemd/systemd-udevd
rules=$here/../../tools/udev
name=$prefix-i
vg=${prefix}vg
label=$prefix
kinds=(pv thin md ext4)

#
# udevd, for this test only
#

start_udevd()
{
	mkdir -p /run/udev/rules.d
	cp "$rules"/*.rules /run/udev/rules.d/
	# As 69-bcache.rules do: probe what nobody else has recognised.
	cat > /run/udev/rules.d/69-test-probe.rules <<RULES
SUBSYSTEM!="block", GOTO="probe_end"
ACTION=="remove", GOTO="probe_end"
ENV{DM_UDEV_DISABLE_OTHER_RULES_FLAG}=="1", GOTO="probe_end"
ENV{ID_FS_TYPE}=="?*", GOTO="probe_end"
RUN+="/bin/sh -c 'echo %k >> $keep/probed'"
LABEL="probe_end"
RULES
	if [ -n "$booted" ]; then
		systemctl start systemd-udevd.service
		udevd_pid=$(systemctl show --property=MainPID --value systemd-udevd.service)
	else
		$udevd > "$keep/udevd.log" 2>&1 &
		udevd_pid=$!
	fi
	poll 60 test -S /run/udev/control
	unset DM_DISABLE_UDEV MDADM_NO_UDEV
	udevadm trigger --subsystem-match=block --action=add
	settle
}

stop_udevd()
{
	if [ -n "$booted" ]; then
		systemctl stop systemd-udevd-control.socket systemd-udevd-kernel.socket \
			systemd-udevd.service
	elif [ -n "$udevd_pid" ]; then
		kill -CONT "$udevd_pid"
		kill "$udevd_pid"
		wait "$udevd_pid"
		rm -rf /run/udev
	fi
	rm -rf /run/udev/rules.d /run/qcow2setup
	export DM_DISABLE_UDEV=1 MDADM_NO_UDEV=1
}

# All that udev has begun, with the programs that its rules run
settle()
{
	udevadm settle --timeout=300 || fault "udev does not come to rest"
	# What the rules of LVM start is a unit then, which makes events of its own.
	[ -z "$booted" ] || while systemctl list-units --all --no-legend "lvm-activate-*" |
		grep -qE ' (activating|active|deactivating) '; do
		sleep 0.2
		udevadm settle --timeout=300
	done
}

# shellcheck disable=SC2317 # called by the trap
end()
{
	unwind
	tidy
	stop_udevd
	rm -rf "$keep"
} 2> /dev/null

#
# Disks of guests, made before udevd runs
#

templates()
{
	local k

	for k in "${kinds[@]}"; do
		new_loop "$keep/$k" $((48 << 20))
		"template_$k" "$lower"
		unwind
	done
}

template_pv()
{
	volume vg $((4 << 20)) "$1"
}

template_thin()
{
	lvm_do "$1" vgcreate -s 1m "$vg" "$1"
	later lvm_do "$1" vgchange -a n "$vg"
	lvm_do "$1" lvcreate -y --type thin-pool -L 8m --poolmetadatasize 2m -n pool "$vg"
	lvm_do "$1" lvcreate -y -W n -V 4m --thinpool pool -n v "$vg"
}

template_md()
{
	mdadm --create "/dev/md/$prefix" --run --level=1 --raid-devices=1 --force --metadata=1.2 \
		"$1" > "$keep/md.log" 2>&1 || fault "$(< "$keep/md.log")"
	mdadm --stop --scan > /dev/null 2>&1
}

template_ext4()
{
	mkfs.ext4 -q -F -L "$label" "$1" 16m
}

# What the host has done with the content, one word each; empty: nothing
acted()
{
	dmsetup ls | awk -v p="$vg-" 'index($1, p) == 1 { print $1 }'
	awk '/^md/ { print "/dev/" $1 }' /proc/mdstat
	find /dev/disk -name "$label" -o -name 'lvm-pv-uuid-*' -o -name 'md-*'
}

quiet()
{
	local did

	settle
	did=$(acted)
	[ -z "$did" ] || fault "$1: the host has acted: ${did//$'\n'/ }"
}

# busy KIND: the host uses what is on it
busy()
{
	settle
	case $1 in
	pv|thin) acted | grep -q "^$vg-v$" ;;
	md)	acted | grep -q '^/dev/md' ;;
	ext4)	acted | grep -q "^/dev/disk/by-label/$label$" ;;
	esac || fault "$1: the host has not acted on it"
}

# The host lets go of it again
release()
{
	case $1 in
	pv|thin) vgchange -qq -an "$vg" > /dev/null 2>&1 ;;
	md)	mdadm --stop --scan 2> /dev/null ;;
	esac
	settle
	# LVM takes the next device for a copy of this one, if it has not seen it go.
	rm -f /run/lvm/pvs_online/* /run/lvm/vgs_online/*
}

# Property $2 of device $1, as udev knows it
property()
{
	udevadm info --query=property --property="$2" --value "$1"
}

disk()
{
	cp --sparse=always "$keep/$1" "$dir/i.data"
	"$tool" create "$dir/i.qcow2" --data-file "$dir/i.data" --data-file-raw
}

# Each event that there is, caused by others than the tool
events()
{
	udevadm trigger --subsystem-match=block --action=add
	settle
	udevadm trigger --subsystem-match=block --action=change
	settle
	dmsetup suspend "$name"
	dmsetup resume "$name"
	: > "/dev/mapper/$name"
	settle
}

#
# The checks
#

ordinary()
{
	lower=$(losetup -f --show "$keep/$1")
	later losetup -d "$lower"
	later release "$1"
	busy "$1"
}

# ordinary_dm KIND [OPTION...]: of which the loop device below shows nothing
ordinary_dm()
{
	behind "$@"
	busy "$1"
}

# dmsetup, with a uuid that the rules know
by_uuid()
{
	behind ext4 --uuid "QCOW2-$name"
	quiet "a uuid of ours"
	by_id
	events
	quiet "a uuid of ours, after other events"
	by_id
}

behind()
{
	{ head -c 1M /dev/zero; cat "$keep/$1"; } > "$dir/file"
	lower=$(losetup -f --show "$dir/file")
	later losetup -d "$lower"
	quiet "$1"
	dmsetup create "$name" "${@:2}" --table "0 $((48 << 11)) linear $lower 2048"
	later dmsetup remove --retry "$name"
	later release "$1"
}

guest()
{
	disk "$1"
	later release "$1"
	: > "$keep/probed"
	"$tool" open "$dir/i.qcow2" "$name" --data-file "$dir/i.data"
	quiet "$1"
	by_id
	events
	quiet "$1, after other events"
	by_id
	"$tool" resize "$name" --size 64M
	quiet "$1, resized"
	events
	quiet "$1, resized, after other events"
	for d in "$name" $(loops_here); do
		d=$(basename "$(realpath "${d/#$prefix//dev/mapper/$prefix}")")
		! grep -qx "$d" "$keep/probed" || fault "$d has been probed"
	done
	"$tool" close "$name"
	nothing_left
	[ -z "$(ls /run/qcow2setup)" ] || fault "marks: $(ls /run/qcow2setup)"
}

# backed_up KIND: a backup's view of a guest's disk is no more the host's than the disk is
backed_up()
{
	local d

	disk "$1"
	later release "$1"
	: > "$keep/probed"
	mkdir "$dir/cow"
	"$tool" open "$dir/i.qcow2" "$name" --data-file "$dir/i.data"
	"$tool" backup begin "$name" --cow "$dir/cow"
	quiet "$1, with a view"
	view_hidden
	by_id
	events
	dmsetup suspend "$name-backup"
	dmsetup resume "$name-backup"
	quiet "$1, with a view, after other events"
	view_hidden
	by_id
	for d in "$name" "$name-backup" $(loops_here); do
		d=$(basename "$(realpath "${d/#$prefix//dev/mapper/$prefix}")")
		! grep -qx "$d" "$keep/probed" || fault "$d has been probed"
	done
	# It has what the host would act on.
	cmp "/dev/mapper/$name-backup" "$dir/i.data"
	"$tool" backup end "$name"
	quiet "$1, when the view is gone"
	by_id
	"$tool" close "$name"
	nothing_left
	[ -z "$(ls /run/qcow2setup)" ] || fault "marks: $(ls /run/qcow2setup)"
}

# Nothing but its name in /dev/mapper leads to the view, and udev knows nothing of its content.
view_hidden()
{
	local kernel links

	kernel=$(basename "$(realpath "/dev/mapper/$name-backup")")
	[[ $kernel = dm-* ]] || fault "no /dev/mapper/$name-backup"
	links=$(find /dev/disk -lname "*/$kernel")
	[ -z "$links" ] || fault "links to the view: ${links//$'\n'/ }"
	[ -z "$(property "/dev/mapper/$name-backup" ID_FS_TYPE)" ]
	[ -z "$(property "/dev/mapper/$name-backup" ID_FS_LABEL)" ]
}

# It is there with the names that tell nothing of the content, and for systemd ready
by_id()
{
	local uuid link

	uuid=$(dmsetup info -c --noheadings -o uuid "$name")
	for link in "mapper/$name" "disk/by-id/dm-name-$name" "disk/by-id/dm-uuid-$uuid"; do
		[ "$(realpath "/dev/$link")" = "$(realpath "/dev/mapper/$name")" ] || fault "no /dev/$link"
	done
	[ "$(property "/dev/mapper/$name" SYSTEMD_READY)" = 1 ] || fault "it is not ready"
	[ -z "$(property "/dev/mapper/$name" DM_UDEV_DISABLE_OTHER_RULES_FLAG)" ]
	[ -z "$(property "/dev/mapper/$name" ID_FS_TYPE)" ]
}

own()
{
	disk "$1"
	later "$tool" close "$name"
	later release "$1"
	"$tool" open "$dir/i.qcow2" "$name" --data-file "$dir/i.data" --host
	busy "$1"
	by_name "$1"
	events
	"$tool" resize "$name" --size 64M
	events
	busy "$1"
	by_name "$1"
	release "$1"
}

# It is the device that is used, not what is below it
by_name()
{
	case $1 in
	pv|thin) [ "$(pvs --noheadings -o pv_name -S "vg_name=$vg" 2> /dev/null | tr -d ' ')" = "/dev/mapper/$name" ] ;;
	md)	ls -d /sys/block/md*/slaves/"$(basename "$(realpath "/dev/mapper/$name")")" ;;
	ext4)	[ "$(realpath "/dev/disk/by-label/$label")" = "$(realpath "/dev/mapper/$name")" ] ;;
	esac > /dev/null || fault "$1: something else than the device is used"
}

# An image i over another one, base, with an ext4 that has the label
disk_with_base()
{
	disk ext4
	mv "$dir/i.qcow2" "$dir/base.qcow2"
	mv "$dir/i.data" "$dir/base.data"
	truncate -s 48M "$dir/i.data"
	"$tool" create "$dir/i.qcow2" --data-file "$dir/i.data" \
		--backing-file "$dir/base.qcow2" --backing-format qcow2
}

# overlay [OPTION]: over an image whose disk has the same label
overlay()
{
	rm -f "$dir"/*.qcow2
	disk_with_base
	"$tool" open "$dir/i.qcow2" "$name" --data-file "$dir/i.data" \
		--backing-file "$dir/base.qcow2,data-file=$dir/base.data" "$@"
	later "$tool" close "$name"
	settle
}

overlay_and_base()
{
	local base

	overlay
	quiet "overlay and base"
	events
	quiet "overlay and base, after other events"
	base=$(dmsetup ls | awk '/^qcow2-backing-/ { print $1 }')
	[ "$(property "/dev/mapper/$base" DM_UDEV_DISABLE_OTHER_RULES_FLAG)" = 1 ]
	by_id
	unwind
	overlay --host
	by_name ext4
	events
	by_name ext4
	[ "$(find /dev/disk/by-uuid -lname "*/$(basename "$(realpath "/dev/mapper/$base")")")" = "" ]
}

# Its last sector is completed by a helper.
raw_base()
{
	cp --sparse=always "$keep/ext4" "$dir/base"
	truncate -s +100 "$dir/base"
	truncate -s 64M "$dir/i.data"
	"$tool" create "$dir/i.qcow2" --size 64M --data-file "$dir/i.data" \
		--backing-file "$dir/base" --backing-format raw
	"$tool" open "$dir/i.qcow2" "$name" --data-file "$dir/i.data" --backing-file "$dir/base"
	later "$tool" close "$name"
	dmsetup info "$name-backing-tail" > /dev/null
	quiet "a raw base, and its helper"
	events
	quiet "a raw base, and its helper, after other events"
}

# From /etc/fstab, by its name
mounted()
{
	disk ext4
	"$tool" open "$dir/i.qcow2" "$name" --data-file "$dir/i.data"
	later "$tool" close "$name"
	settle
	mkdir "$dir/mnt"
	echo "/dev/mapper/$name $dir/mnt ext4 defaults 0 0" > "$dir/fstab"
	mount --fstab "$dir/fstab" "$dir/mnt"
	later umount "$dir/mnt"
	echo text > "$dir/mnt/file"
	events_mounted
	by_id
	[ "$(< "$dir/mnt/file")" = text ]
	mountpoint -q "$dir/mnt"
}

# A unit from /etc/fstab lives as long as its device is ready.
mount_unit()
{
	local unit

	cp /etc/fstab "$dir/fstab"
	later systemctl daemon-reload
	later cp "$dir/fstab" /etc/fstab
	disk ext4
	mkdir "$dir/mnt"
	unit=$(systemd-escape -p --suffix=mount "$dir/mnt")
	echo "/dev/mapper/$name $dir/mnt ext4 defaults,nofail 0 0" >> /etc/fstab
	systemctl daemon-reload
	"$tool" open "$dir/i.qcow2" "$name" --data-file "$dir/i.data"
	later "$tool" close "$name"
	later systemctl stop "$unit"
	systemctl start "$unit"
	mountpoint -q "$dir/mnt"
	events_mounted
	# It has heard of the events by the time that it answers for this one.
	not systemctl start no-such.service 2> /dev/null
	sleep 2
	systemctl is-active -q "$unit"
	mountpoint -q "$dir/mnt"
	# The test would see it if the device were not ready at such an event.
	echo "KERNEL==\"dm-*\", ENV{DM_NAME}==\"$name\", ENV{SYSTEMD_READY}=\"0\"" > /run/udev/rules.d/99-test-unready.rules
	later udevadm control --reload
	later rm /run/udev/rules.d/99-test-unready.rules
	udevadm control --reload
	udevadm trigger --subsystem-match=block --action=add
	settle
	poll 120 not mountpoint -q "$dir/mnt"
}

events_mounted()
{
	udevadm trigger --subsystem-match=block --action=add
	settle
	by_id
	udevadm trigger --subsystem-match=block --action=change
	settle
}

# Without the rules the flags of the cookie keep blkid away from the device.
flags_alone()
{
	rm /run/udev/rules.d/*-dm-qcow2.rules
	later cp "$rules/10-dm-qcow2.rules" "$rules/90-dm-qcow2.rules" /run/udev/rules.d/
	later udevadm control --reload
	udevadm control --reload
	disk ext4
	"$tool" open "$dir/i.qcow2" "$name" --data-file "$dir/i.data"
	later "$tool" close "$name"
	settle
	"$tool" resize "$name" --size 64M
	settle
	udevadm trigger --subsystem-match=block --action=add
	settle
	[ "$(property "/dev/mapper/$name" DM_UDEV_DISABLE_DISK_RULES_FLAG)" = 1 ]
	[ -z "$(property "/dev/mapper/$name" ID_FS_TYPE)" ]
	[ "$(property "/dev/mapper/$name" SYSTEMD_READY)" = 1 ]
	# The test would see it: nobody has marked the loop device for those who look for that.
	busy ext4
}

# Partitions of a guest's disk are its own, whoever has made devices of them.
partitions()
{
	local part=/dev/mapper/${name}1 label=qcow2part$$ how

	truncate -s 64M "$dir/p.data"
	echo 'start=2048' | sfdisk -q "$dir/p.data"
	"$tool" create "$dir/p.qcow2" --data-file "$dir/p.data" --data-file-raw
	for how in --partitions kpartx --host; do
		case $how in
		--partitions)
			"$tool" open "$dir/p.qcow2" "$name" --data-file "$dir/p.data" --partitions
			mkfs.ext4 -q -F -L "$label" "$part" ;;
		kpartx)	"$tool" open "$dir/p.qcow2" "$name" --data-file "$dir/p.data"
			kpartx -s -a "/dev/mapper/$name" ;;
		--host)	"$tool" open "$dir/p.qcow2" "$name" --data-file "$dir/p.data" --partitions --host ;;
		esac
		settle
		udevadm trigger --subsystem-match=block --action=add
		settle
		if [ "$how" = --host ]; then
			[ "$(property "$part" ID_FS_LABEL)" = "$label" ] && [ -e "/dev/disk/by-label/$label" ]
		else
			[ -z "$(property "$part" ID_FS_LABEL)" ] && [ ! -e "/dev/disk/by-label/$label" ]
			[ "$(property "$part" DM_UDEV_DISABLE_DISK_RULES_FLAG)" = 1 ]
			[ -e "/dev/disk/by-id/dm-name-${name}1" ]
		fi
		"$tool" close "$name"
		[ ! -e "$part" ]
	done
}

# What a device of the tool leaves does not hide somebody else's.
stale()
{
	local loop seq

	disk ext4
	"$tool" open "$dir/i.qcow2" "$name" --data-file "$dir/i.data"
	settle
	loop=$(losetup -n -O NAME -j "$dir/i.data")
	seq=$(< "/sys/block/${loop##*/}/diskseq")
	[ -e "/run/qcow2setup/${loop##*/}.$seq" ] || fault "no mark: $(ls /run/qcow2setup)"
	# Without the tool: marks stay.
	dmsetup remove "$name"
	poll 60 loops_gone
	ln -s /proc/999999999 "/run/qcow2setup/${loop##*/}"
	later rm -f "/run/qcow2setup/${loop##*/}"
	losetup "$loop" "$keep/ext4"
	later losetup -d "$loop"
	[ -e "/run/qcow2setup/${loop##*/}.$seq" ]
	busy ext4
	# Those that mean nothing go with the next device.
	"$tool" open "$dir/i.qcow2" "$name" --data-file "$dir/i.data"
	[ ! -e "/run/qcow2setup/${loop##*/}.$seq" ]
	"$tool" close "$name"
	busy ext4
}

# An open that fails at its last step leaves neither devices nor marks.
marks_of_failure()
{
	local uuid

	disk ext4
	"$tool" open "$dir/i.qcow2" "$name" --data-file "$dir/i.data"
	uuid=$(dmsetup info -c --noheadings -o uuid "$name")
	"$tool" close "$name"
	# Its uuid is taken.
	dmsetup create "$prefix-other" --notable --uuid "$uuid"
	not "$tool" open "$dir/i.qcow2" "$name" --data-file "$dir/i.data" 2> "$dir/said"
	grep -q "cannot create the device\|exists" "$dir/said" || fault "$(< "$dir/said")"
	nothing_left_but "$prefix-other"
	[ -z "$(ls /run/qcow2setup 2> /dev/null)" ] || fault "marks: $(ls /run/qcow2setup)"
}

nothing_left_but()
{
	[ "$(our_devices)$(loops_here)" = "$1" ] || fault "left behind: $(our_devices)$(loops_here)"
}

# /run cannot be written: no marks, and nothing fails.
no_marks()
{
	disk ext4
	rm -rf /run/qcow2setup
	: > /run/qcow2setup
	later rm -f /run/qcow2setup
	"$tool" open "$dir/i.qcow2" "$name" --data-file "$dir/i.data"
	"$tool" close "$name"
	nothing_left
}

# As the manual has it: what is done by hand asks no udev.
lvm_by_hand()
{
	local filter

	# shellcheck disable=SC2016 # as it is there
	filter=$(sed -n 's/^\(global_filter = .*\)$/\1/p' "$here/../../Documentation/qcow2setup-open.8")
	[ -n "$filter" ] || fault "the manual has no filter"
	disk pv
	later release pv
	"$tool" open "$dir/i.qcow2" "$name" --data-file "$dir/i.data"
	later "$tool" close "$name"
	settle
	vgchange -qq --config "devices { $filter }" -ay > /dev/null
	quiet "vgchange with the filter"
	# It sees the same group on the loop device, and wants it only once.
	vgchange -qq --config 'devices { global_filter = [ "r|^/dev/loop|" ] }' -ay > /dev/null
	busy pv
	release pv
	unwind 1
	"$tool" open "$dir/i.qcow2" "$name" --data-file "$dir/i.data" --host
	later "$tool" close "$name"
	settle
	release pv
	vgchange -qq --config "devices { $filter }" -ay > /dev/null
	busy pv
	by_name pv
	release pv
}

#
# udev does not answer
#

patient=240

# Idle, so that nothing speaks for its being at work; till the check ends, or CONT
halt_udevd()
{
	settle
	kill -STOP "$udevd_pid"
	later settle
	later kill -CONT "$udevd_pid"
}

semaphores()
{
	ipcs -s | grep -c '^0x0d4d'
}

no_semaphores()
{
	[ "$(semaphores)" = 0 ] || fault "semaphores: $(dmsetup udevcookies | tail -n +2)"
}

# unanswered COMMAND...: it ends by itself, with one warning, and leaves no semaphore
unanswered()
{
	local rc=0

	timeout -s KILL "$patient" "$@" > "$dir/said" 2>&1 || rc=$?
	[ "$rc" = 0 ] || fault "status $rc: $*: $(< "$dir/said")"
	[[ $(wc -l < "$dir/said") = 1 && $(< "$dir/said") = *DM_DISABLE_UDEV=1* ]] ||
		fault "said: $(< "$dir/said")"
}

stopped()
{
	disk ext4
	halt_udevd
	unanswered "$tool" open "$dir/i.qcow2" "$name" --data-file "$dir/i.data"
	[ -b "/dev/mapper/$name" ]
	no_semaphores
	dd if="/dev/mapper/$name" of=/dev/null bs=1M count=1 status=none
	unanswered "$tool" resize "$name" --size 64M
	[ "$(blockdev --getsize64 "/dev/mapper/$name")" = $((64 << 20)) ]
	unanswered "$tool" close "$name"
	no_semaphores
	[ ! -e "/dev/mapper/$name" ]
	nothing_left
}

# It comes back while the device is open.
stopped_for_a_while()
{
	disk ext4
	halt_udevd
	unanswered "$tool" open "$dir/i.qcow2" "$name" --data-file "$dir/i.data"
	kill -CONT "$udevd_pid"
	quiet "when udevd is back"
	[ -b "/dev/mapper/$name" ]
	"$tool" close "$name" > "$dir/said" 2>&1
	[ ! -s "$dir/said" ] || fault "$(< "$dir/said")"
	settle
	[ ! -e "/dev/mapper/$name" ]
	nothing_left
}

# A chain needs many cookies, and is held up once.
stopped_chain()
{
	disk_with_base
	halt_udevd
	unanswered "$tool" open "$dir/i.qcow2" "$name" --data-file "$dir/i.data" \
		--backing-file "$dir/base.qcow2,data-file=$dir/base.data"
	kill -CONT "$udevd_pid"
	"$tool" close "$name"
	nothing_left
	no_semaphores
}

# In an IPC name space of its own, as in a container, udev answers to somebody else.
other_ipc()
{
	disk ext4
	# shellcheck disable=SC2016 # for the inner shell to expand
	unanswered unshare --ipc bash -c '"$@"; [ -z "$(ipcs -s | grep "^0x0d4d")" ] || echo "semaphore left"' bash \
		"$tool" open "$dir/i.qcow2" "$name" --data-file "$dir/i.data"
	[ -b "/dev/mapper/$name" ]
	unanswered unshare --ipc "$tool" close "$name"
	nothing_left
	# The remedy, as it is printed
	[[ "$(< "$dir/said")" =~ (DM_DISABLE_UDEV=1) ]]
	unshare --ipc env "${BASH_REMATCH[1]}" "$tool" open "$dir/i.qcow2" "$name" --data-file "$dir/i.data" > "$dir/said" 2>&1
	unshare --ipc env "${BASH_REMATCH[1]}" "$tool" close "$name" >> "$dir/said" 2>&1
	[ ! -s "$dir/said" ] || fault "$(< "$dir/said")"
	nothing_left
}

waits_for_cookie()
{
	dmsetup info -c --noheadings -o name "$name" > /dev/null 2>&1 && [ "$(semaphores)" -gt 0 ]
}

# interrupted_open SIGNAL
interrupted_open()
{
	local rc=0 begun

	disk ext4
	halt_udevd
	# bash has the background ignore it.
	setsid env --default-signal="$1" timeout -s KILL "$patient" \
		"$tool" open "$dir/i.qcow2" "$name" --data-file "$dir/i.data" 2> "$dir/said" &
	pid=$!
	poll "$patient" waits_for_cookie
	begun=$SECONDS
	pkill "-$1" -P "$pid"
	wait "$pid" || rc=$?
	[ "$rc" = $((128 + $(kill -l "$1"))) ] || fault "status $rc: $(< "$dir/said")"
	[ ! -s "$dir/said" ] || fault "said: $(< "$dir/said")"
	note "$1: $((SECONDS - begun)) s"
	no_semaphores
	[ ! -e "/dev/mapper/$name" ]
	nothing_left
}

# The device goes, and the image is trimmed, but nobody is waited for.
interrupted_close()
{
	disk ext4
	"$tool" open "$dir/i.qcow2" "$name" --data-file "$dir/i.data"
	settle
	halt_udevd
	setsid env --default-signal=INT timeout -s KILL "$patient" "$tool" close "$name" 2> "$dir/said" &
	pid=$!
	poll "$patient" waits_without_device
	pkill -INT -P "$pid"
	wait "$pid" || fault "status $?: $(< "$dir/said")"
	[ ! -s "$dir/said" ] || fault "said: $(< "$dir/said")"
	no_semaphores
	[ ! -e "/dev/mapper/$name" ]
	poll 60 loops_gone
	nothing_left
}

waits_without_device()
{
	! dmsetup info "$name" > /dev/null 2>&1 && [ "$(semaphores)" -gt 0 ]
}

# One that is slow, but at work, is waited for longer than one that says nothing.
slow()
{
	cat > /run/udev/rules.d/99-test-slow.rules <<RULES
KERNEL=="dm-*", ENV{DM_NAME}=="$name", ACTION=="change", RUN+="/bin/sleep 45"
RULES
	later udevadm control --reload
	later rm /run/udev/rules.d/99-test-slow.rules
	udevadm control --reload
	disk ext4
	"$tool" open "$dir/i.qcow2" "$name" --data-file "$dir/i.data" > "$dir/said" 2>&1
	[ ! -s "$dir/said" ] || fault "$(< "$dir/said")"
	unwind
	"$tool" close "$name"
	nothing_left
}

start udevadm lvm mdadm mkfs.ext4 ipcs unshare sfdisk kpartx
need_tool
[ -x $udevd ] || skip_all "systemd-udevd is not installed"
[ -e "$rules/10-dm-qcow2.rules" ] || skip_all "the rules of qcow2setup are not here"
# A systemd that has been booted for this, or no udevd
booted=''
[ ! -d /run/systemd/system ] || booted=1
[ -n "$booted" ] || [ ! -e /run/udev/control ] || skip_all "a udevd runs that is not systemd's unit"
keep=$(mktemp -d "${TMPDIR:-/tmp}/qcow2keep.XXXXXX") || ktap_exit_fail_msg "no scratch folder"
udevd_pid=''
trap end EXIT
modprobe -aq dm-thin-pool raid1 md_mod
if [ -n "$booted" ]; then
	stop_udevd
	# A thin pool has dmeventd started, which would keep the unit that activates it.
	kinds=(pv md ext4)
fi
templates || ktap_exit_fail_msg "no disks of guests"
start_udevd

for k in "${kinds[@]}"; do
	check "$k: on an ordinary loop device the host acts on it" ordinary "$k"
	check "$k: on an ordinary device of device-mapper the host acts on it" ordinary_dm "$k"
	check "$k: on a guest's disk it is left alone" guest "$k"
	check "$k: with --host it is used, and only there" own "$k"
	check "$k: the view of a backup is left alone, too" backed_up "$k"
done
check "a label on overlay and base" overlay_and_base
check "a raw base, and its helper" raw_base
check "mounted by its name: it stays ready" mounted
[ -z "$booted" ] || check "mounted by a unit of systemd, from fstab" mount_unit
check "without the rules the flags are enough for the device" flags_alone
check "partitions of a guest's disk, by the tool and by kpartx; those of the host's own" partitions
check "marks that are left over hide nobody's loop device" stale
check "a failed open leaves no mark" marks_of_failure
check "no place for marks" no_marks
check "dmsetup alone: a uuid that begins as ours" by_uuid
check "LVM by hand: the filter of the manual" lvm_by_hand
if [ -z "$booted" ]; then
	check "udevd is stopped: open, resize and close end by themselves" stopped
	check "udevd is stopped while a device is opened" stopped_for_a_while
	check "udevd is stopped: a chain is held up once" stopped_chain
	check "an IPC name space of its own" other_ipc
	check "SIGINT while open waits for udev" interrupted_open INT
	check "SIGTERM while open waits for udev" interrupted_open TERM
	check "SIGINT while close waits for udev" interrupted_close
	check "a udev that is slow, but at work" slow
fi
finish
