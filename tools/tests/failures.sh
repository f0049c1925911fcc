#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# open and resize take back everything they did, whichever step fails or is
# interrupted.
# Needs root, the kernel module, "make -C tools unit" before, and a folder to
# work in (TMPDIR) that loop devices can use.  Prints KTAP.
#
# SAMPLE=	a number: a third of the calls, which it chooses, in place of all

here=$(realpath "$(dirname "$0")")
tool=$here/../qcow2setup
inject=$here/inject-lib
name=qcow2setup-failures.$$

work=$(mktemp -d) || exit 1
cd "$work" || exit 1
cleanup() {
	"$tool" close $name 2>/dev/null
	cd / && rm -rf "$work"
}
trap cleanup EXIT

# Which calls
first=1 step=1
[ -z "${SAMPLE-}" ] || step=3 first=$((1 + SAMPLE % 3))

count=0 failed=0
report() {
	count=$((count + 1))
	if [ -z "$2" ]; then
		echo "ok $count $1"
	else
		echo "not ok $count $1"
		echo "# $2"
		sed 's/^/# /' said
		failed=$((failed + 1))
	fi
}

# What is there now. Called hundreds of times: not one process more than it takes.
seen() {
	local f what

	for f in /sys/block/loop*/loop/backing_file; do
		{ read -r what < "$f"; } 2>/dev/null || continue
		case $what in
		"$work"*|*memfd*) echo "loop device: $what" ;;
		esac
	done
	for f in /sys/block/dm-*/dm/name; do
		{ read -r what < "$f"; } 2>/dev/null || continue
		case $what in
		"$name"*|qcow2-backing-*) echo "device: $what" ;;
		esac
	done
	for f in /dev/mapper/"$name"* /dev/mapper/qcow2-backing-*; do
		[ ! -e "$f" ] || echo "node: $f"
	done
	cmp image original || echo "a changed image"
}

# What a run left behind, or nothing.  Loop devices go a moment after their users.
left() {
	local what

	for _ in 1 2 3; do
		what=$(seen)
		[ -n "$what" ] || return
		sleep 0.3
	done
	echo "$what"
}

# with_injection ENVIRONMENT... -- OPEN OPTIONS...
with_injection() {
	local set=()

	while [ "$1" != -- ]; do
		set+=("$1")
		shift
	done
	shift
	env "${set[@]}" LD_PRELOAD="$inject" "$tool" open image $name \
		--data-file data "$@" >said 2>&1
}

# each_step WHAT OPEN OPTIONS...
each_step() {
	local what=$1 calls k sig status wrong extent
	shift

	cp image original
	with_injection INJECT_COUNT=calls -- "$@"
	status=$?
	"$tool" close $name
	cp original image
	extent=$(stat -c '%s %b' image)
	calls=$(cat calls)
	if [ $status -eq 0 ] && [ "$calls" -gt 10 ]; then
		report "$what: opens, with $calls calls"
	else
		report "$what: opens, with $calls calls" "exit code $status"
		return
	fi
	for sig in "" INJECT_SIGNAL=15; do
		wrong=
		for ((k = first; k <= calls; k += step)); do
			# the shell would tell of each death
			with_injection INJECT_AT=$k ${sig:+"$sig"} -- "$@" \
				2>/dev/null
			status=$?
			# The last steps cannot fail any more: then it is open.
			if [ $status -eq 0 ]; then
				[ -b /dev/mapper/$name ] ||
					wrong="call $k: said to be open, but is not"
				"$tool" close $name ||
					wrong="call $k: cannot be closed"
				cp original image
			elif [ -z "$sig" ] && [ "$(grep -vc warning: said)" -ne 1 ]; then
				wrong="call $k: not one line is said"
			# Holes that were filled, and what was behind the end
			elif [ "$extent" != "$(stat -c '%s %b' image)" ]; then
				wrong="call $k: length and blocks: $(stat -c '%s %b' image), before: $extent"
			fi
			status=$(left)
			[ -z "$status" ] || wrong="call $k: left: $status"
			[ -z "$wrong" ] || break
		done
		if [ -n "$sig" ]; then
			report "$what: nothing is left if it is interrupted" "$wrong"
		else
			report "$what: nothing is left if a call fails" "$wrong"
		fi
	done
}

echo "TAP version 13"
if [ ! -x "$tool" ] || [ ! -e "$inject" ]; then
	echo "Bail out! build with make -C tools unit first"
	exit 1
fi

truncate -s 1G data
qemu-img create -q -f qcow2 -o data_file=data,cluster_size=512,refcount_bits=64 \
	image 1G || exit 1
qemu-img bitmap --add image bitmap || exit 1
# an autoclear bit that nobody knows
printf '\200' | dd of=image bs=1 seek=88 conv=notrunc status=none
each_step "read-write, everything has to be changed"
rm image
qemu-img create -q -f qcow2 -o data_file=data image 1G || exit 1
each_step "read-only, with half a sector" --readonly

rm image
truncate -s 1000001 base
qemu-img create -q -f qcow2 -b base -F raw -o data_file=mid.data mid 1000448 || exit 1
truncate -s 1000448 mid.data
qemu-img create -q -f qcow2 -b mid -F qcow2 -o data_file=data image 1G || exit 1
each_step "chain" --backing-file mid,data-file=mid.data --backing-file base

# resize_step ENVIRONMENT...: of the open device, to 2 GiB
resize_step() {
	env "$@" LD_PRELOAD="$inject" "$tool" resize $name --size 2G >said 2>&1
}

# What must be as before after a failure, and never suspended.
device_state() {
	dmsetup table $name
	dmsetup info -c --noheadings -o suspended $name
	od -An -tx1 -N 112 image
	stat -c '%s %b' image
	stat -c %s data
}

each_resize_step() {
	local what=$1 calls k sig status wrong before

	"$tool" open image $name --data-file data
	resize_step INJECT_COUNT=calls
	status=$?
	"$tool" close $name
	cp original image
	truncate -s 1G data
	calls=$(cat calls)
	if [ $status -eq 0 ] && [ "$calls" -gt 15 ]; then
		report "$what: with $calls calls"
	else
		report "$what: with $calls calls" "exit code $status"
		return
	fi
	for sig in "" INJECT_SIGNAL=15; do
		wrong=
		for ((k = first; k <= calls && !${#wrong}; k += step)); do
			"$tool" open image $name --data-file data
			before=$(device_state)
			resize_step INJECT_AT=$k ${sig:+"$sig"} 2>/dev/null
			status=$?
			if [ $status -eq 0 ]; then
				[ "$(blockdev --getsize64 /dev/mapper/$name)" -eq $((2 << 30)) ] ||
					wrong="call $k: said to be done, but is not"
			elif [ "$before" != "$(device_state)" ]; then
				wrong="call $k: not as before: $(device_state)"
			elif [ -z "$sig" ] && [ "$(grep -vc warning: said)" -ne 1 ]; then
				wrong="call $k: not one line is said"
			fi
			dmsetup resume $name
			"$tool" close $name || wrong="call $k: cannot be closed"
			qemu-img check -q image || wrong="call $k: image is damaged"
			cp original image
			truncate -s 1G data
			status=$(left)
			[ -z "$status" ] || wrong="call $k: left: $status"
		done
		if [ -n "$sig" ]; then
			report "$what: all is as before if it is interrupted" "$wrong"
		else
			report "$what: all is as before if a call fails" "$wrong"
		fi
	done
}

# Killed at each call, and its helper with it: what it leaves is an image without damage,
# and a device that the same resize, or dmsetup resume if it says so, makes as it shall be.
each_resize_kill() {
	local what=$1 calls k status wrong='' left=0 ended=0

	calls=$(cat calls)
	for ((k = first; k <= calls && !${#wrong}; k += step)); do
		"$tool" open image $name --data-file data
		resize_step INJECT_AT=$k \
			"INJECT_COMMAND=kill -9 \$(pgrep -x -P \$PPID qcow2setup-keep) \$PPID" 2>/dev/null
		if [ "$(dmsetup info -c --noheadings -o suspended $name)" = Suspended ]; then
			left=$((left + 1))
			"$tool" resize $name --size 2G >said 2>&1
			status=$?
			if [ $status -eq 5 ] && grep -q 'dmsetup resume' said; then
				dmsetup resume $name || wrong="call $k: cannot be resumed"
			elif [ $status -eq 0 ]; then
				ended=$((ended + 1))
			else
				wrong="call $k: exit code $status"
			fi
		fi
		"$tool" resize $name --size 2G >said 2>&1 || wrong="call $k: cannot be resized"
		[ "$(blockdev --getsize64 /dev/mapper/$name)" -eq $((2 << 30)) ] || wrong="call $k: size"
		dd if=/dev/mapper/$name bs=1M count=1 iflag=direct status=none |
			cmp -s - before || wrong="call $k: other content"
		"$tool" close $name || wrong="call $k: cannot be closed"
		qemu-img check -q image
		status=$?
		# leaks are what a crash may leave
		[ $status -eq 0 ] || [ $status -eq 3 ] || wrong="call $k: image is damaged"
		cp original image
		truncate -s 1G data
		status=$(left)
		[ -z "$status" ] || wrong="call $k: left: $status"
	done
	[ $left -gt $((5 / step)) ] && [ $ended -gt $((3 / (2 * step - 1))) ] ||
		wrong=${wrong:-"left suspended $left times, ended by resize $ended times"}
	report "$what: all can be ended if it is killed ($left times suspended)" "$wrong"
}

rm image
qemu-img create -q -f qcow2 -o data_file=data,cluster_size=4k image 1G || exit 1
qemu-io -c 'write -q 0 1M' image
truncate -s 1G data
# open and close leave a whole last cluster
"$tool" open image $name --data-file data && "$tool" close $name
cp image original
dd if=data of=before bs=1M count=1 status=none
each_resize_step "resize"
each_resize_kill "resize"

# What a kernel says that has status lines with keys: version, end of the line.
says() {
	local version=$1 end=$2
	shift 2
	env INJECT_VERSION="$version" INJECT_STATUS="$end" LD_PRELOAD="$inject" "$tool" "$@" >out 2>said
}

# says_no EXIT_CODE PATTERN VERSION END ACTION...: refused in one line, all is as before
says_no() {
	local code=$1 pattern=$2 before status
	shift 2
	before=$(device_state; dmsetup info -c --noheadings -o tables_loaded $name)
	says "$@"
	status=$?
	[ $status -eq "$code" ] || wrong+="$3, $2: exit code $status; "
	grep -q "^qcow2setup: .*$pattern" said && [ "$(wc -l <said)" -eq 1 ] && [ ! -s out ] ||
		wrong+="$3, $2: $(cat said); "
	[ "$before" = "$(device_state; dmsetup info -c --noheadings -o tables_loaded $name)" ] ||
		wrong+="$3, $2: not as before; "
}

keys() {
	echo "6 unwritten $1 free_clusters 12 trims 7"
}

# What is not on disk is in the live table only.
"$tool" open image $name --data-file data
wrong=
says_no 5 "$name: metadata could not be written.*see dmesg.*$work/image.*try again" \
	1.2.0 "$(keys 3) rw" resize $name --size 2G
says_no 5 "$name: there is no space for metadata.*free some where $work/image is" \
	1.2.0 "$(keys 3) nospc" resize $name --size 2G
says_no 4 'is in mode fail' 1.2.0 "$(keys 0) fail" resize $name --size 2G
says_no 4 'is in mode ro' 1.2.0 "$(keys 0) ro" resize $name --size 2G
says_no 4 'does not tell whether all metadata is written; use the qcow2setup that' \
	1.2.0 "2 trims 0 rw" resize $name --size 2G
# What is left of it is not known here: no room for a guess.
for end in "rw" "0" "5 unwritten 0 trims 0 rw" "2 unwritten x rw" "2 unwritten 0 xy"; do
	says_no 4 'version 1.2.0, is not understood' 1.2.0 "$end" resize $name --size 2G
	says_no 4 'version 1.2.0, is not understood' 1.2.0 "$end" status $name
done
for action in "resize $name --size 2G" "status $name"; do
	# shellcheck disable=SC2086 # words are wanted
	says_no 4 '2.0.0, which is not known; use a newer qcow2setup' 2.0.0 "$(keys 0) rw" $action
	# shellcheck disable=SC2086 # words are wanted
	says_no 4 '0.9.0, which is too old; reload the module' 0.9.0 rw $action
done
dmsetup suspend $name
for action in close map; do
	says_no 4 'is suspended, and.*could not be written.*dmsetup resume' 1.2.0 "$(keys 1) rw" $action $name
done
dmsetup resume $name
report "status with keys: refusals" "$wrong"

wrong=
says 1.2.0 "10 shiny new unwritten 4 free_clusters 12 more than trims 7 nospc" status $name --json || wrong="exit code $?"
jq -e '.mode == "nospc" and (.statistics | .unwritten == 4 and ."free-clusters" == 12 and .trims == 7)' out >said ||
	wrong="$(cat out)"
says 1.2.0 "$(keys 4) nospc" status $name || wrong="exit code $?"
grep -q '^  mode:  *nospc, there is no space for more metadata$' out &&
	grep -q "^  what to do:  *There is no space.*free some where $work/image is" out &&
	grep -q '^  metadata: .*; room for 12 more clusters,' out &&
	grep -q '^  commits: .*; some could not be written$' out || wrong="$(cat out)"
says 1.2.0 "$(keys 4) rw" status $name || wrong="exit code $?"
grep -q "could not be written.*see dmesg" out || wrong="$(cat out)"
says 1.2.0 "$(keys 0) rw" status $name || wrong="exit code $?"
! grep -q "could not be written\|no space" out || wrong="$(cat out)"
# In a list it keeps none from being shown.
says 1.2.0 "nonsense" status
[ $? -eq 4 ] && grep -q "^$name .*unknown" out && grep -q 'not understood' said || wrong="$(cat out said)"
says 1.2.0 "$(keys 0) rw" resize $name --size 2G || wrong="$(cat said)"
[ "$(blockdev --getsize64 /dev/mapper/$name)" -eq $((2 << 30)) ] || wrong="not resized"
"$tool" close $name
cp original image
truncate -s 1G data
report "status with keys: shown, and resize" "${wrong:-$(left)}"

# Another device has the image when a table is to become live: just one of the calls
# that can be busy is that.
wrong='' hits=0
with_injection INJECT_COUNT=calls -- || wrong="open: exit code $?"
"$tool" close $name
for ((k = 1; k <= $(cat calls); k++)); do
	cp original image
	with_injection INJECT_AT=$k INJECT_ERRNO=16 --
	status=$?
	if grep -q 'in use by another device; close that first' said; then
		[ $status -eq 5 ] || wrong="open, call $k: exit code $status"
		hits=$((hits + 1))
	fi
	# For a loop device it is tried again.
	[ $status -ne 0 ] || "$tool" close $name
done
[ $hits -eq 1 ] || wrong="open: $hits of $k"
"$tool" open image $name --data-file data
resize_step INJECT_COUNT=calls || wrong="resize: exit code $?"
"$tool" close $name
hits=0
for ((k = 1; k <= $(cat calls); k++)); do
	cp original image
	truncate -s 1G data
	"$tool" open image $name --data-file data
	resize_step INJECT_AT=$k INJECT_ERRNO=16
	status=$?
	if grep -q 'in use by another device; close that first' said; then
		[ $status -eq 5 ] || wrong="resize, call $k: exit code $status"
		hits=$((hits + 1))
	fi
	dmsetup resume $name
	"$tool" close $name
done
[ $hits -eq 1 ] || wrong="resize: $hits of $k"
cp original image
truncate -s 1G data
report "the image is in use by another device" "${wrong:-$(left)}"

# A suspension that is not ours is not ended.
"$tool" open image $name --data-file data
dmsetup suspend $name
"$tool" resize $name --size 2G >said 2>&1
status=$?
wrong=
[ $status -eq 5 ] && grep -q "dmsetup resume $name" said || wrong="exit code $status"
[ "$(dmsetup info -c --noheadings -o suspended $name)" = Suspended ] || wrong="it was resumed"
dmsetup resume $name
"$tool" close $name
cp original image
report "resize: refused if somebody else has suspended the device" "${wrong:-$(left)}"

rm image
qemu-img create -q -f qcow2 -o data_file=data image 1G || exit 1
# What the image records is opened only if the user says so, and then once.
cp image original
mv data recorded
truncate -s 1G named
strace -f -qq -e trace=%file -o trace "$tool" open image $name --data-file named
status=$?
"$tool" close $name
wrong=
[ $status -eq 0 ] || wrong="exit code $status"
! grep -q '"[^"]*\<data"' trace || wrong="$(grep '"[^"]*\<data"' trace | head -n 1)"
[ "$(grep -c 'openat(.*"image"' trace)" -eq 1 ] || wrong="the image is not opened once"
[ "$(grep -c 'openat(.*"named"' trace)" -eq 1 ] || wrong="the data are not opened once"
cp original image
report "open: the recorded name is not opened" "${wrong:-$(left)}"
mv recorded data
strace -f -qq -e trace=%file -o trace "$tool" open image $name --trust-image-paths
status=$?
"$tool" close $name
wrong=
[ $status -eq 0 ] || wrong="exit code $status"
[ "$(grep -c 'openat(.*"data"' trace)" -eq 1 ] || wrong="the data are not opened once"
cp original image
report "open: a trusted name is opened, once" "${wrong:-$(left)}"

# Of two at the same time exactly one wins.
wrong=
for _ in {1..5}; do
	for i in 1 2; do
		"$tool" open image $name.$i --data-file data 2>said$i &
		pid[i]=$!
	done
	wins=0
	for i in 1 2; do
		wait "${pid[i]}"
		status=$?
		case $status in
		0) wins=$((wins + 1)) ;;
		5) [ "$(wc -l <said$i)" -eq 1 ] || wrong="not one line is said" ;;
		*) wrong="exit code $status: $(cat said$i)" ;;
		esac
	done
	[ $wins -le 1 ] || wrong="both have it"
	[ $wins -eq 1 ] || wrong=${wrong:-"nobody has it"}
	for i in 1 2; do
		[ ! -e /dev/mapper/$name.$i ] || "$tool" close $name.$i
	done
	cp original image
done
report "open: of two at the same time one wins" "${wrong:-$(left)}"

# What was looked at is what is used: the folder on the way to both files is swapped
# for one with others, which would have been refused, before each single call.
mkdir A B
cp image A/image
truncate -s 1G A/data
head -c 1M /dev/zero | tr '\0' B > B/image
truncate -s 4096 B/data
cp B/image B.image
wrong='' swaps=0 refusals=0 k=0
while [ -z "$wrong" ]; do
	k=$((k + 1))
	ln -sfn A current
	env INJECT_READS=1 INJECT_AT=$k "INJECT_COMMAND=ln -sfn B current" LD_PRELOAD="$inject" \
		"$tool" open current/image $name --data-file current/data > said 2>&1
	status=$?
	if [ $status -eq 0 ]; then
		for n in 1 2; do
			f=$(dmsetup table $name | cut -d ' ' -f $((n + 3)))
			f=$(cat "/sys/dev/block/$f/loop/backing_file")
			case $n$f in
			"1$work/A/image"|"2$work/A/data") ;;
			*) wrong="call $k: device $n is $f" ;;
			esac
		done
		"$tool" close $name || wrong="call $k: cannot be closed"
		[ "$(readlink current)" = B ] || break
		swaps=$((swaps + 1))
	else
		refusals=$((refusals + 1))
		[ "$(wc -l <said)" -eq 1 ] || wrong="call $k: not one line is said"
	fi
	[ ! -e /dev/mapper/$name ] || wrong="call $k: is open"
	cmp B/image B.image && [ "$(stat -c %s B/data)" = 4096 ] || wrong="call $k: what was never looked at was changed"
	cp image A/image
done
[ $refusals -gt 0 ] && [ $swaps -gt 5 ] || wrong=${wrong:-"$refusals refused, $swaps opened"}
report "open: a swap of links, at each of $((k - 1)) calls" "${wrong:-$(left)}"

# Each command that needs rights says so.
wrong=
chmod 755 "$work"
chmod 666 image data
cp "$tool" unprivileged
"$tool" open image $name --data-file data
for args in "open image x --data-file data" "close $name" "resize $name --size 2G" "map $name" "status $name"; do
	# shellcheck disable=SC2086 # words are wanted
	setpriv --reuid=65534 --regid=65534 --clear-groups ./unprivileged $args >out 2>said
	status=$?
	[ $status -eq 2 ] && [ "$(wc -l <said)" -eq 1 ] && [ ! -s out ] &&
		grep -q '^qcow2setup: .*; ' said || wrong+="${args%% *}: $status, $(cat said); "
done
"$tool" close $name
cp original image
report "unprivileged: what is missing is said" "${wrong:-$(left)}"

# Devices that go while status looks are not in its list.
wrong=
"$tool" open image $name --data-file data --readonly
cp original image2
open_second() {
	[ -e /dev/mapper/$name-2 ] || "$tool" open image2 $name-2 --data-file data --readonly
}
open_second
INJECT_COUNT=calls LD_PRELOAD="$inject" "$tool" status --json >out 2>said
calls=$(cat calls)
for format in --json ''; do
	for ((k = first; k <= calls; k += step)); do
		open_second
		# shellcheck disable=SC2086 # a word, or none
		env INJECT_AT=$k "INJECT_COMMAND=dmsetup remove $name-2" LD_PRELOAD="$inject" \
			"$tool" status $format >out 2>said
		status=$?
		[ $status -eq 0 ] && [ ! -s said ] && grep -q "$name\>" out &&
			! grep -q 'unknown\|"virtual-size": 0\| 0 B' out ||
			wrong+="call $k of $calls: $status, $(cat out said); "
	done
done
[ "$calls" -gt 3 ] || wrong+="only $calls calls"
"$tool" close $name
[ ! -e /dev/mapper/$name-2 ] || "$tool" close $name-2
rm image2
report "status: a device goes while it looks" "${wrong:-$(left)}"

# The kernel's own reason is quoted.
cp image original
with_injection INJECT_COUNT=calls --
"$tool" close $name
cp original image
with_injection INJECT_AT=$(($(cat calls) - 1)) \
	"INJECT_COMMAND=printf '\001' | dd of=image bs=1 seek=76 conv=notrunc status=none; sync image" --
status=$?
printf '\000' | dd of=image bs=1 seek=76 conv=notrunc status=none
if [ $status -eq 4 ] && [ "$(wc -l <said)" -eq 1 ] &&
	grep -q 'the kernel refused the image: qcow2: ' said; then
	report "the kernel's reason is quoted" "$(left)"
else
	report "the kernel's reason is quoted" "exit code $status"
fi
echo "1..$count"
[ $failed -eq 0 ]
