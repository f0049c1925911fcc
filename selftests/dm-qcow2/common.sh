# SPDX-License-Identifier: GPL-2.0-or-later
# shellcheck shell=bash disable=SC2034
#
# What the shell tests of this folder share. To be sourced; then
#
#	start fio losetup		# commands that are needed
#	check "name" function [arg...]	# one result each
#	finish
#
# A check runs in a subshell under "set -e": the first command that fails fails
# the check. What it leaves behind is taken down after it: all devices whose
# names begin with $prefix, and all loop devices on files in $dir.

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=../kselftest/ktap_helpers.sh
. "$here/../kselftest/ktap_helpers.sh"
export LC_ALL=C
# Without udevd nobody would answer libdevmapper's cookies.
[ -e /run/udev/control ] || export DM_DISABLE_UDEV=1

prefix=qcow2test$$
dir=''
checks=()

note()
{
	ktap_print_msg "$@"
}

# fault TEXT: the check has failed
fault()
{
	note "$*"
	exit 1
}

load_module()
{
	local ko=${DM_QCOW2_KO:-$here/../../driver/dm-qcow2.ko} needs

	[ -d /sys/module/dm_qcow2 ] && return
	if [ -e "$ko" ]; then
		needs=$(modinfo -F depends "$ko" | tr , ' ')
		# shellcheck disable=SC2086 # words are wanted
		modprobe -a loop dm-mod $needs && insmod "$ko"
	else
		modprobe -a loop dm-mod dm-qcow2
	fi
}

skip_all()
{
	ktap_skip_all "$*"
	exit "$KSFT_SKIP"
}

# start COMMAND...
start()
{
	local c

	ktap_print_header
	[ "$(id -u)" = 0 ] || skip_all "root is needed"
	for c in dmsetup losetup qemu-img qemu-io python3 "$@"; do
		command -v "$c" > /dev/null || skip_all "$c is not installed"
	done
	load_module || skip_all "module dm_qcow2 cannot be loaded"
	dmsetup targets | grep -q '^qcow2 ' || skip_all "target qcow2 is not available"
	dir=$(mktemp -d "${TMPDIR:-/tmp}/qcow2test.XXXXXX") || ktap_exit_fail_msg "no scratch folder"
	trap tidy EXIT
	trap 'exit 1' INT TERM HUP
}

loops_here()
{
	losetup -n -l -O NAME,BACK-FILE | awk -v d="$dir/" 'index($2, d) == 1 { print $1 }'
}

# Take down what a check has left.
sweep()
{
	local d

	for _ in 1 2; do
		awk -v d="$dir" 'index($2, d) == 1 { print $2 }' /proc/mounts |
			while read -r d; do umount "$d"; done
		for d in $(dmsetup ls | awk -v p="$prefix" 'index($1, p) == 1 { print $1 }'); do
			dmsetup remove --retry "$d" || dmsetup remove --force "$d"
		done
	done > /dev/null 2>&1
	for d in $(loops_here); do
		losetup -d "$d"
	done
	rm -rf "${dir:?}"/*
}

tidy()
{
	# Also what a check has started and not waited for.
	local p

	for p in $(jobs -p); do
		kill "$p" 2> /dev/null
	done
	[ -n "$dir" ] && sweep && rmdir "$dir"
}

# check NAME FUNCTION [ARG...]: noted now, run by finish, which knows the plan
check()
{
	checks+=("$(printf '%q ' "$@")")
}

# run_check NAME FUNCTION [ARG...]
run_check()
{
	# Names that no test uses: the check sees them.
	local __name=$1 __begun=$SECONDS __rc

	shift
	# Not as a condition: "set -e" would have no effect in it.
	(
		set -eE
		trap 'note "$__name: line $LINENO: $BASH_COMMAND"' ERR
		"$@"
	) < /dev/null 2>&1
	__rc=$?
	sweep
	[ $((SECONDS - __begun)) -lt 6 ] || note "$((SECONDS - __begun)) s"
	if [ $__rc = 0 ]; then
		ktap_test_pass "$__name"
	else
		ktap_test_fail "$__name"
	fi
}

finish()
{
	local c

	ktap_set_plan ${#checks[@]}
	for c in "${checks[@]}"; do
		eval "run_check $c"
	done
	ktap_finished
}

# image NAME SIZE [OPTION,...]: $dir/NAME.qcow2 with the data file $dir/NAME.data
# of just SIZE bytes, full of what must never show (unless the image is raw)
image()
{
	qemu-img create -q -f qcow2 -o "data_file=$dir/$1.data${3:+,$3}" "$dir/$1.qcow2" "$2"
	truncate -s "$2" "$dir/$1.data"
	case ${3-} in
	*data_file_raw=on*) ;;
	*)	yes POISON | head -c $((4 << 20)) | dd of="$dir/$1.data" conv=notrunc,nocreat status=none ;;
	esac
	truncate -s "$2" "$dir/$1.data"
}

# map NAME [FEATURE...]: image NAME as /dev/mapper/$prefix-NAME, whose path is in $dev
map()
{
	local name=$1

	shift
	case " $* " in
	*" read_only "*) ;;
	*)	python3 "$here/qcow2image.py" extend "$dir/$name.qcow2" ;;
	esac
	meta=$(losetup -f --show "$dir/$name.qcow2")
	data=$(losetup -f --show "$dir/$name.data")
	line=$(python3 "$here/qcow2image.py" line "$dir/$name.qcow2" "$meta" "$data" "$@")
	dmsetup create "$prefix-$name" --table "$line"
	dev=/dev/mapper/$prefix-$name
}

# unmap NAME
unmap()
{
	dmsetup remove --retry "$prefix-$1"
	losetup -d "$meta"
	losetup -d "$data"
}

# mode NAME: rw, ro or fail
mode()
{
	dmsetup status "$prefix-$1" | sed 's/.* //'
}

# not COMMAND...: it must fail, and not by a signal
not()
{
	local rc=0

	"$@" || rc=$?
	[ $rc -gt 0 ] && [ $rc -lt 125 ]
}

# poll SECONDS COMMAND...: until it succeeds
poll()
{
	local end=$((SECONDS + $1))

	shift
	until "$@"; do
		[ $SECONDS -lt $end ] || fault "not in time: $*"
		sleep 0.1
	done
}

# The tool, for the tests that need it; $tool
need_tool()
{
	tool=${QCOW2SETUP:-$here/../../tools/qcow2setup}
	[ -x "$tool" ] || tool=$(command -v qcow2setup) ||
		skip_all "qcow2setup is neither built nor installed"
}

# refused STATUS PATTERN COMMAND...: it must fail with that status and say why in
# one line, which matches
refused()
{
	local want=$1 pattern=$2 rc=0 err

	shift 2
	err=$("$@" 2>&1 > "$dir/stdout") || rc=$?
	[[ $rc =~ ^$want$ ]] || fault "status $rc, not $want: $*: $err"
	# Nothing that a terminal would take for a command, a newline included.
	[[ ! $err =~ [[:cntrl:]] ]] || fault "not one line: $*: $err"
	[[ $err == "qcow2setup: "* ]] || fault "who says so? $err"
	shopt -s nocasematch
	[[ $err =~ $pattern ]] || fault "'$pattern' is not in: $err"
	shopt -u nocasematch
	[ ! -s "$dir/stdout" ] || fault "output of a failed command: $(< "$dir/stdout")"
}

# Nothing of the tool's must be left: devices, loop devices on files in $dir
nothing_left()
{
	local left

	left=$(loops_here)$(dmsetup ls | awk -v p="$prefix" 'index($1, p) == 1 { print $1 }')
	[ -z "$left" ] || fault "left behind: $left"
}

loops_gone()
{
	[ -z "$(loops_here)" ]
}
