# SPDX-License-Identifier: GPL-2.0-or-later
# shellcheck shell=bash disable=SC2154
#
# What the tests of the tool that need no kernel have in common.  To be sourced
# with "tool" set to the command line of the tool; goes to an empty folder.

# Thousands of syncs take minutes on a disk.
room=$(df --output=avail /dev/shm 2>/dev/null | tail -n 1)
[ "${room:-0}" -lt $((1 << 20)) ] || export TMPDIR=/dev/shm
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
cd "$work" || exit 1

for need in qemu-img qemu-io python3 jq; do
	if ! command -v $need >/dev/null; then
		echo "${0##*/}: $need is missing; install qemu-utils, python3 and jq" >&2
		exit 1
	fi
done

count=0 failed=0

# ok NAME: the result of the last command decides
ok() {
	local status=$?
	count=$((count + 1))
	if [ $status -eq 0 ]; then
		echo "ok $count - $1"
	else
		failed=$((failed + 1))
		echo "not ok $count - $1"
		sed 's/^/# /' out err 2>/dev/null | head -n 40
	fi
}

# finish NAME: the sum, and the exit code
finish() {
	echo "1..$count"
	echo "# $1: $((count - failed)) passed, $failed failed"
	[ $failed -eq 0 ]
}

run() {
	"${tool[@]}" "$@" >out 2>err
}

# exits CODE ARGUMENTS...
exits() {
	local code=$1 got
	shift
	run "$@"
	got=$?
	[ $got -eq "$code" ] || { echo "exit code $got, not $code" >>err; return 1; }
}

# refuse CODE PATTERN ARGUMENTS...: exit code, and one line that says it with
# cause and remedy
refuse() {
	local code=$1 pattern=$2
	shift 2
	exits "$code" "$@" && [ "$(wc -l <err)" -eq 1 ] && [ ! -s out ] &&
		grep -q '^qcow2setup: .*;\|^qcow2setup: .*: .*(.*)' err &&
		grep -qe "$pattern" err
}

# image SIZE [,OPTION...]: a fresh t.qcow2 by qemu-img, its data in t.raw
image() {
	local size=$1
	shift
	rm -f t.qcow2 t.raw
	qemu-img create -q -f qcow2 -o "data_file=t.raw$*" t.qcow2 "$size"
}

same() {
	qemu-img compare -q -U "$@" >out 2>err
}
