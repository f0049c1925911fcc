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

# What is kept from one run to the next, and may be removed at any time.
CACHE=${CACHE:-${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/dm-qcow2}

# A kernel is named by its series (6.1). It is this machine's own, or that of
# another root tree, which holds boot/, lib/modules/ and all that it takes to
# build for it: KERNEL_TREE, else the newest one that get-kernel has made.
KERNEL=${KERNEL:-6.1}
KERNEL_TREE=${KERNEL_TREE:-}

# The emulated CPU. 5-level page tables and checks of access to user memory only slow its
# MMU down, and "fast" string instructions are emulated byte by byte: a quarter less
# time altogether.
# shellcheck disable=SC2034
vm_cpu=max,la57=off,smap=off,smep=off,erms=off,fsrm=off

# The arguments that every emulated kernel gets, on one line. A machine that is
# busy gives an emulated CPU no time just when it measures its clock: it would take
# the TSC, which is this machine's, for one of a twentieth of its rate, and live 20
# times as fast. So it is told the rate; the kernel derives bogomips from just that.
kernel_args()
{
	echo "panic=-1 oops=panic tsc=reliable no_timer_check mitigations=off nokaslr" \
		"$(awk -F ': *' '/^bogomips/ { printf "tsc_early_khz=%d\n", $2 * 500; exit }' /proc/cpuinfo)"
}

# Print the newest release of the wanted series, e.g. 6.1.0-9-amd64.
find_kernel()
{
	local f rel

	for f in "$KERNEL_TREE/boot/vmlinuz-$KERNEL"[.-]*; do
		rel=${f##*/vmlinuz-}
		[ -e "$f" ] && [ -e "$KERNEL_TREE/lib/modules/$rel/modules.dep" ] &&
			echo "$rel"
	done | sort -V | tail -n 1 | grep .
}

find_tree()
{
	find_kernel > /dev/null && return
	KERNEL_TREE=$(find "$CACHE/kernels" -mindepth 1 -maxdepth 1 -name "${KERNEL}[.-]*" 2>/dev/null |
		sort -V | tail -n 1)
	[ -n "$KERNEL_TREE" ]
}

# shellcheck disable=SC2034
if [ -n "$KERNEL_TREE" ]; then
	no_kernel="no kernel $KERNEL in $KERNEL_TREE; name another folder with KERNEL_TREE=, or none"
else
	no_kernel="no Debian kernel $KERNEL in this system or $CACHE/kernels; run selftests/vm/deps check"
	find_tree
fi
true
