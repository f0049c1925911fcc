# SPDX-License-Identifier: GPL-2.0-or-later
# shellcheck shell=bash disable=SC2034
#
# What the shell tests of this folder share. To be sourced; then
#
#	start fio losetup		# commands that are needed
#	check "name" function [arg...]	# one result each
#	finish
#
# The arguments of the test are words: only those checks are run whose names have all of
# them, in any case. --list before them prints the names. A check runs in a subshell under "set -e": the first command that fails fails
# the check. What it leaves behind is taken down after it: all devices whose
# names begin with $prefix, and all loop devices on files in $dir.

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=../kselftest/ktap_helpers.sh
. "$here/../kselftest/ktap_helpers.sh"
export LC_ALL=C
# Without udevd nobody would answer libdevmapper's cookies.
[ -e /run/udev/control ] || export DM_DISABLE_UDEV=1

# Array devices are made by mdadm itself then, too.
[ -e /run/udev/control ] || export MDADM_NO_UDEV=1

# Seconds: nothing that is waited for is taken for hung before that. No test is about how
# long a thing takes.
patience=120

prefix=qcow2test$$
dir=''
checks=()
undo=()

only=("$@") list=''
[ "${only[0]-}" != --list ] || { list=1; only=("${only[@]:1}"); }

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
	# Their names have checks that cannot be run, too.
	[ -z "$list" ] || return 0
	ktap_skip_all "$*"
	exit "$KSFT_SKIP"
}

# start COMMAND...
start()
{
	local c

	[ -z "$list" ] || return 0
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

our_devices()
{
	dmsetup ls | awk -v p="$prefix" 'index($1, p) == 1 { print $1 }'
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
		# Those that others lie on are still in use the first time.
		for d in $(our_devices); do
			dmsetup remove "$d"
		done
		for d in $(our_devices); do
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
		trap 'set +eE; trap - ERR; unwind > /dev/null 2>&1' EXIT
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

# matching: drop the checks whose names have not all the words of the arguments
matching()
{
	local c name w
	local -a all=("${checks[@]}")

	checks=()
	for c in "${all[@]}"; do
		eval "name=(${c%" "})"
		for w in "${only[@]}"; do
			[[ ${name[0],,} == *"${w,,}"* ]] || continue 2
		done
		[ -z "$list" ] || printf '%s\n' "${name[0]}"
		checks+=("$c")
	done
	[ ${#checks[@]} -gt 0 ] && return
	echo "Bail out! no result of ${0##*/} has '${only[*]}' in its description; its argument --list shows what there is"
	exit "$KSFT_FAIL"
}

finish()
{
	local c

	matching
	[ -z "$list" ] || exit "$KSFT_PASS"
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
	local end=$((SECONDS + ($1 > patience ? $1 : patience)))

	shift
	until "$@"; do
		[ $SECONDS -lt $end ] || fault "not in time: $*"
		sleep 0.1
	done
}

# later COMMAND...: to be done by unwind, which goes backwards; at the latest
# when the check ends, whatever its end
later()
{
	undo+=("$(printf '%q ' "$@")")
}

# unwind [N]: until N are left
unwind()
{
	local c

	while [ ${#undo[@]} -gt "${1:-0}" ]; do
		c=${undo[-1]}
		unset 'undo[-1]'
		eval "$c"
	done
}

# lower KIND NAME BYTES: make a device of just that size, for an image or its data
# to lie on; its path is in $lower
lower()
{
	local name=$prefix-$2 size=$3 file=$dir/$2.lower

	case $1 in
	loop)	new_loop "$file" "$size" ;;
	loop4k)	new_loop "$file" "$size" --sector-size 4096 ;;
	linear)	new_loop "$file" $((size + (4 << 20)))
		dmsetup create "$name" --table "0 $((size / 512)) linear $lower 2056"
		later dmsetup remove --retry "$name"
		lower=/dev/mapper/$name ;;
	thin)	# A pool with little more than is needed: discards must be good for something.
		new_loop "$file" $(((size + (1 << 20) - 1 >> 20 << 20) + (4 << 20)))
		local pool_data=$lower pool_size
		new_loop "$file-meta" $((4 << 20))
		pool_size=$(blockdev --getsz "$pool_data")
		dmsetup create "$name-pool" --table "0 $pool_size thin-pool $lower $pool_data 128 0"
		later dmsetup remove --retry "$name-pool"
		dmsetup message "$name-pool" 0 "create_thin 0"
		dmsetup create "$name" --table "0 $((size / 512)) thin /dev/mapper/$name-pool 0"
		later dmsetup remove --retry "$name"
		lower=/dev/mapper/$name ;;
	lv)	new_loop "$file" $((size + (8 << 20)))
		volume "$2" "$size" "$lower" ;;
	nvme)	[ -n "$nvme" ] || fault "no scratch NVMe disk"
		blkdiscard -f "$nvme" 2> /dev/null
		dmsetup create "$name" --table "0 $((size / 512)) linear $nvme 0"
		later dmsetup remove --retry "$name"
		lower=/dev/mapper/$name ;;
	*)	fault "lower $1?" ;;
	esac
}

# new_loop FILE BYTES [OPTION...]: $lower
new_loop()
{
	local file=$1

	truncate -s "$2" "$file"
	shift 2
	lower=$(losetup -f --show "$@" "$file")
	later losetup -d "$lower"
}

# lvm_do DEVICE COMMAND [ARG...]: no other device is looked at (those below it have
# the same content), and nothing is kept
lvm_do()
{
	local device=$1 command=$2 sync=1

	shift 2
	[ -e /run/udev/control ] || sync=0
	LVM_SYSTEM_DIR=$dir "$command" -qq --config "
		devices { use_devicesfile=0 obtain_device_list_from_udev=0
			external_device_info_source=none hints=none
			global_filter=[ \"a|^$device\$|\", \"r|.*|\" ] }
		activation { udev_sync=$sync udev_rules=$sync monitoring=0 }
		backup { backup=0 archive=0 }
		global { event_activation=0 use_lvmpolld=0 locking_dir=\"$dir\" }" "$@" 2>> "$dir/lvm.log" ||
		fault "$command: $(tail -n 3 "$dir/lvm.log")"
}

# volume NAME BYTES DEVICE: a volume group on the device, and a volume in it; $lower
volume()
{
	local group=$prefix${1//-/}

	lvm_do "$3" vgcreate -s 1m "$group" "$3"
	later lvm_do "$3" vgchange -a n "$group"
	lvm_do "$3" lvcreate -y -W n -Z n -n v -L "$2b" "$group"
	lower=/dev/mapper/$group-v
}

# The VM's NVMe disk, which may be overwritten; $nvme, empty if there is none
find_nvme()
{
	local c i

	nvme=''
	[ -z "$list" ] || return 0
	modprobe -q nvme
	# In the test VM there is one, at some time.
	for ((i = ${VM_DISKS:+600} + 10; i && !${#nvme}; i--)); do
		sleep 0.1
		for c in /sys/class/nvme/nvme*; do
			[[ -e $c && $(< "$c/serial") =~ ^dm-qcow2-scratch\ *$ ]] && nvme=/dev/${c##*/}n1
		done
	done
	[ -z "$nvme" ] || poll 10 test -b "$nvme"
}

# stack NAME META_KIND DATA_KIND BYTES [OPTION,...]: as image and map, on devices that
# lower makes. $dev; unwind takes all down again, unwind $below only the image
stack()
{
	local name=$1 size

	image "$name" "$4" "${5-}"
	python3 "$here/qcow2image.py" extend "$dir/$name.qcow2"
	size=$((($(stat -c %s "$dir/$name.qcow2") + (1 << 20) - 1) >> 20 << 20))
	truncate -s "$size" "$dir/$name.qcow2"
	lower "$2" "$name-meta" "$size"
	meta=$lower
	dd if="$dir/$name.qcow2" of="$meta" bs=1M conv=nocreat,sparse oflag=direct status=none
	lower "$3" "$name-data" "$4"
	data=$lower
	dd if="$dir/$name.data" of="$data" bs=1M count=4 conv=nocreat oflag=direct status=none
	# QEMU finds the image, and by the name in it its data.
	ln -sf "$meta" "$dir/$name.qcow2"
	ln -sf "$data" "$dir/$name.data"
	below=${#undo[@]}
	dev=/dev/mapper/$prefix-$name
	restack "$name"
}

# restack NAME [FEATURE...]
restack()
{
	local name=$1 ro=''

	shift
	line=$(python3 "$here/qcow2image.py" line "$dir/$name.qcow2" "$meta" "$data" "$@")
	# File systems that know it do not try to write.
	[[ $line != *" read_only"* ]] || ro=--readonly
	# shellcheck disable=SC2086 # nothing, or one word
	dmsetup create $ro "$prefix-$name" --table "$line"
	later dmsetup remove --retry "$prefix-$name"
}

# good_image NAME [RAW_FILE]: QEMU finds no fault, and reads what RAW_FILE has
good_image()
{
	qemu-img check -q -U -f qcow2 "$dir/$1.qcow2" || fault "qemu-img check: status $?"
	[ -z "${2-}" ] || qemu-img compare -q -U -f qcow2 -F raw "$dir/$1.qcow2" "$2" ||
		fault "qemu-img compare: status $?"
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
	local want=$1 pattern=$2 rc=0

	shift 2
	# Left for the caller, who may want to tell several refusals apart
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

	left=$(loops_here)$(our_devices)
	[ -z "$left" ] || fault "left behind: $left"
}

loops_gone()
{
	[ -z "$(loops_here)" ]
}

# json FILE EXPRESSION: of the parsed text j, which must be true
json()
{
	python3 -c '
import json, sys
j = json.load(open(sys.argv[1], encoding="utf-8"))
sys.exit(0 if eval(sys.argv[2]) else f"{sys.argv[2]}: {j}")' "$1" "$2"
}

# Header fields: offset and digits
declare -A fields=(
	[magic]="0 8" [version]="4 8" [cluster_bits]="20 8" [size]="24 16" [crypt_method]="32 8"
	[l1_size]="36 8" [l1_table_offset]="40 16" [refcount_table_offset]="48 16"
	[refcount_table_clusters]="56 8" [nb_snapshots]="60 8" [incompatible_features]="72 16"
	[compatible_features]="80 16" [autoclear_features]="88 16" [refcount_order]="96 8"
	[header_length]="100 8"
)

# poke FILE OFFSET HEX_DIGITS
poke()
{
	local i bytes=''

	for ((i = 0; i < ${#3}; i += 2)); do
		bytes+="\\x${3:i:2}"
	done
	printf '%b' "$bytes" | dd of="$1" bs=1 seek="$2" conv=notrunc,nocreat status=none
}

# field IMAGE FIELD VALUE
field()
{
	local at digits

	read -r at digits <<< "${fields[$2]}"
	poke "$1" "$at" "$(printf "%0${digits}x" "$3")"
}

# pattern TEXT LENGTH: what QEMU can check, too
pattern()
{
	yes "$1" | head -c "$2"
}

# small_fs BYTES: a file system in $dir/mnt, from which all can be taken
small_fs()
{
	truncate -s "$1" "$dir/fs"
	mkfs.ext4 -q -F -m 0 "$dir/fs"
	mkdir "$dir/mnt"
	mount -o loop "$dir/fs" "$dir/mnt"
}

# Nothing is left in it.
fill()
{
	not dd if=/dev/zero of="$dir/mnt/fill" bs=64k status=none 2> "$dir/err"
	not dd if=/dev/zero of="$dir/mnt/fill" bs=1k oflag=append conv=notrunc status=none 2> "$dir/err"
	sync "$dir/mnt/fill"
}
