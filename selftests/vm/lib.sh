# SPDX-License-Identifier: GPL-2.0-or-later
# shellcheck shell=bash
#
# What the scripts of the VM harness share. To be sourced by bash.

# Set by the scripts that source this file: their name in messages.
me=${me:-vm}

# Every refusal is one line: the cause, then what to do about it.
die()
{
	echo "$me: $*" >&2
	exit 125
}

vm_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd) || exit 125
# shellcheck disable=SC2034 # used by those who source this
top=$(cd "$vm_dir/../.." && pwd) || exit 125

# A kernel is named by its series (6.1). It is looked for in /boot, or below
# another root tree that holds boot/ and lib/modules/ (for kernels whose
# packages do not fit this Debian release).
KERNEL=${KERNEL:-6.1}
KERNEL_TREE=${KERNEL_TREE:-}

# Print the newest installed release of the wanted series, e.g. 6.1.0-9-amd64.
find_kernel()
{
	local f rel

	for f in "$KERNEL_TREE/boot/vmlinuz-$KERNEL"[.-]*; do
		rel=${f##*/vmlinuz-}
		[ -e "$f" ] && [ -e "$KERNEL_TREE/lib/modules/$rel/modules.dep" ] &&
			echo "$rel"
	done | sort -V | tail -n 1 | grep .
}
