#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# Module for dracut: puts dm-qcow2 and qcow2setup into the initramfs, for a root file
# system on such a device. See tools/initramfs/README.

# called by dracut, of each device below the root file system
is_qcow2()
{
	local uuid

	read -r uuid 2> /dev/null < "/sys/dev/block/$1/dm/uuid" && [[ $uuid == QCOW2-* ]]
}

# called by dracut
check()
{
	require_binaries qcow2setup || return 1
	# shellcheck disable=SC2154 # dracut's
	if [[ $hostonly ]] || [[ $mount_needs ]]; then
		for_each_host_dev_and_slaves is_qcow2 || return 255
		return 0
	fi
	return 255
}

# called by dracut
depends()
{
	echo dm
}

# called by dracut
installkernel()
{
	# Also those that this machine does not use now
	hostonly='' instmods dm_mod loop
	# shellcheck disable=SC2154 # dracut's
	if modinfo -k "$kernel" dm_qcow2 > /dev/null 2>&1; then
		hostonly='' instmods dm_qcow2
	else
		dwarn "dm-qcow2: no module for kernel $kernel: it cannot boot from a dm-qcow2 device; install the module for it (dkms install), then run dracut again"
	fi
}

# called by dracut
install()
{
	inst_multiple qcow2setup
	# shellcheck disable=SC2154 # dracut's
	inst_hook initqueue/settled 70 "$moddir/qcow2root.sh"
	dracut_need_initqueue
}
