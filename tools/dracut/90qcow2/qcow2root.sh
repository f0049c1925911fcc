#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
#
# dracut calls it whenever udev has nothing more to do, until the root is there: opens
# the device that the root file system is on, as the kernel's command line has it:
#
#	qcow2root=NAME,IMAGE,DATA[,OPTION...] root=/dev/mapper/NAME
#
# as for initramfs-tools, see tools/initramfs/README.

# shellcheck source=/dev/null
command -v getargs > /dev/null || . /lib/dracut-lib.sh

# open_root NAME IMAGE DATA [OPTION...]: if its devices are there
open_root()
{
	name=$1
	image=$(label_uuid_to_dev "$2")
	data=$(label_uuid_to_dev "$3")
	[ ! -e "/dev/mapper/$name" ] && [ -b "$image" ] && [ -b "$data" ] || return 0
	shift 3
	# The rest of them become options.
	for word in "$@"; do
		set -- "$@" "--$word"
		shift
	done
	# The root file system is no guest's. It is said once what is wrong, and tried again.
	if said=$(qcow2setup open "$image" "$name" --data-file "$data" --host "$@" 2>&1); then
		info "dm-qcow2: $name is open"
	elif [ ! -e "/run/qcow2root.$name" ]; then
		: > "/run/qcow2root.$name"
		warn "dm-qcow2: $image cannot be opened: $said"
	fi
}

for word in $(getargs qcow2root=); do
	modprobe -q -a loop dm_qcow2
	IFS=,
	# shellcheck disable=SC2086 # words are wanted
	set -- $word
	unset IFS
	open_root "$@"
done
