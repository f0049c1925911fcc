#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# usage: tab.sh [WRAPPER...] TOOL
#
# /etc/qcow2tab without a kernel: what the generator writes, as systemd reads it, and
# what attach says of a line.

# shellcheck source=tools/tests/lib.sh
. "$(dirname "$0")/lib.sh"

source=$(dirname "${tool[-1]}")
generator=("${tool[@]:0:${#tool[@]}-1}" "$source/qcow2setup-generator")
export QCOW2TAB=$work/tab
units=/usr/lib/systemd/system

# generate LINE...: into the folder gen
generate() {
	rm -rf gen
	mkdir gen
	printf '%s\n' "$@" >tab
	"${generator[@]}" gen gen gen >out 2>err
}

# links UNIT HOW TARGET: there is such a link
links() {
	[ "$(readlink "gen/$1.$2/$3")" = "$units/${3/@*/@.service}" ]
}

silent() {
	[ ! -s out ] && [ ! -s err ]
}

# A unit path like that of a machine where all is installed
installed() {
	local u

	mkdir -p lib
	for u in "$source"/systemd/*; do
		sed 's,@SBINDIR@/qcow2setup,/bin/true,' "$u" >"lib/$(basename "${u%.in}")"
	done
}

# verified UNIT...: systemd finds nothing wrong
verified() {
	SYSTEMD_UNIT_PATH=$work/gen:$work/lib:$units:/lib/systemd/system \
		systemd-analyze verify --man=no "$@" >out 2>err && ! grep -q "$work\|qcow2setup" out err
}

# set_to UNIT LINE: it is in the template, or in what was written
set_to() {
	cat "lib/${1/@*/@.service}" "gen/$1.d/50-qcow2tab.conf" | grep -qxF "$2"
}

all_options() {
	local o words=nofail,read-only

	# Each option that open takes is known, but for what has a field of its own.
	for o in $("${tool[-1]}" help open | sed -n 's/^  --\([a-z-]*\).*/\1/p'); do
		case $o in
		data-file) ;;
		backing-file) words+=",$o=/c,data-file=/d" ;;
		cache-limit) words+=",$o=1M" ;;
		*) words+=",$o" ;;
		esac
	done
	[[ $words = *,backing-file=*,host* && $words = *,trust-image-paths,* ]] || return
	generate "vm /a /b $words" && silent && [ -d gen/qcow2setup@vm.service.d ]
}

mistakes() {
	local lines=() n

	lines=("a /a" "b /b /b cache-limit=x" "c /c /c bogus" "d /d /d sparse=1" "e /e /e cache-limit"
		"f f /f" "g/h /g /g" "good /x /y" "good /x /z" "i /i -" "j /j /j noauto=1" "k /k /k a b"
		"l /l /l x-systemd.device-timeout=never" "m /m /m data-file=/x")
	generate "${lines[@]}" || return
	# One line for each, with file, line, cause and remedy; and the rest is as if they were not there.
	[ "$(wc -l <err)" = 13 ] || return
	for n in 1 2 3 4 5 6 7 9 10 11 12 13 14; do
		grep -q "^qcow2setup: $work/tab:$n: .*; .*" err || { echo "line $n" >>err; return 1; }
	done
	[ "$(ls -d gen/*.service.d)" = gen/qcow2setup@good.service.d ]
}

mkdir gen
"${generator[@]}" gen gen gen >out 2>err && silent && [ -z "$(ls gen)" ]
ok "no file: nothing is made"

generate "# vm /a /b" "" && silent && [ -z "$(ls gen)" ]
ok "nothing but comments: nothing is made"

installed
generate "vm /srv/vm.qcow2 /dev/vg/vm host" && silent && links qcow2setup.target requires qcow2setup@vm.service &&
	links sysinit.target wants qcow2setup.target &&
	links dev-mapper-vm.device requires qcow2setup@vm.service
ok "a line is a service that boot and device require"

verified qcow2setup@vm.service qcow2setup.target
ok "systemd finds nothing wrong with it"

# The check finds something when there is something.
sed -i 's/^Before=blockdev.*/&\nAfter=nonsense nothing/' gen/qcow2setup@vm.service.d/50-qcow2tab.conf
! verified qcow2setup@vm.service
ok "it would, if there were"

generate 'my-vm UUID=1-2 LABEL=x\040y nofail,x-systemd.device-timeout=5s' && silent &&
	links qcow2setup.target wants 'qcow2setup@my\x2dvm.service' &&
	[ ! -e gen/qcow2setup.target.requires ] &&
	grep -qx JobRunningTimeoutSec=5s 'gen/dev-disk-by\x2duuid-1\x2d2.device.d/50-qcow2tab-timeout.conf' &&
	[ -e 'gen/dev-disk-by\x2dlabel-x\x5cx20y.device.d/50-qcow2tab-timeout.conf' ] &&
	[ "$(systemd-escape -p --suffix=device '/dev/disk/by-label/x\x20y')" = 'dev-disk-by\x2dlabel-x\x5cx20y.device' ] &&
	verified 'qcow2setup@my\x2dvm.service'
ok "names are escaped as systemd does it; nofail, device-timeout"

generate 'late /a /b noauto' && silent && [ ! -e gen/sysinit.target.wants ] && [ ! -e gen/qcow2setup.target.requires ] &&
	links dev-mapper-late.device requires qcow2setup@late.service
ok "noauto: nothing but the device asks for it"

timeouts=0
for o in - noauto nofail _netdev; do
	generate "vm /a /b $o" && grep -qx JobTimeoutSec=infinity gen/dev-mapper-vm.device.d/50-qcow2tab-timeout.conf &&
		((++timeouts))
done
[ $timeouts = 4 ]
ok "the device is waited for as long as its service takes"

generate 'far /a /dev/sdx _netdev' && silent && links multi-user.target wants remote-qcow2setup.target &&
	links remote-qcow2setup.target requires qcow2setup@far.service && [ ! -e gen/sysinit.target.wants ] &&
	verified qcow2setup@far.service remote-qcow2setup.target
ok "_netdev: with the network"

generate 'vm /a\040%b"c /srv/d backing-file=/dev/e' && set_to qcow2setup@vm.service 'RequiresMountsFor="/a %%b\"c"' &&
	set_to qcow2setup@vm.service BindsTo=dev-e.device && verified qcow2setup@vm.service
ok "files wait for their mounts, devices for themselves"

for u in virtqemud.service libvirtd.service libvirt-guests.service machine.slice; do
	grep -q "^Before=.*\<$u\>" lib/qcow2setup@.service || break
done
[ "$u" = machine.slice ] && grep -q "^Before=.*\<$u\>" lib/qcow2setup@.service
ok "libvirt and all guests come later"

all_options
ok "every option of open is known"

mistakes
ok "each mistake is one line, and stops nothing else"

generate "vm /a /b" && ! "${generator[@]}" gen/qcow2setup@vm.service.d/50-qcow2tab.conf x x >out 2>err && [ "$(wc -l <err)" = 1 ]
ok "what cannot be written is said"

long=$(printf '/dev/%0250d' 0)
generate "$(printf '%0100d' 0 | tr 0 -) /a /b" "vm /a $long" && [ -z "$(ls gen)" ] && [ "$(wc -l <err)" = 2 ] &&
	! grep -v "^qcow2setup: $work/tab:[12]: .* is too long for the name of a unit; use a shorter name" err
ok "names that are too long for units are told, and nothing is made of them"

"${generator[@]}" gen >out 2>err
[ $? = 1 ] && grep -q "give it three folders$" err
ok "the generator without its folders"

printf '%s\n' 'vm /a' 'vn /a /b bogus' 'vo /a /b cache-limit=0' >tab
refuse 1 "tab:1: .*give all three" attach vm && refuse 1 "xx: is not in $work/tab; add a line" attach xx
ok "attach: a line with a mistake, and one that is not there"

refuse 1 "tab:2: option bogus is not known; see qcow2tab(5)" attach vn &&
	refuse 1 "tab:3: cache-limit=0 is too little; use a number such as 64M" attach vo
ok "attach: an option with a mistake"

finish tab.sh
