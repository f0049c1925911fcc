#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# Images that mean harm: which files are opened for them, what is printed of them,
# and how much memory they get; and what the tool says to those who may not.
#
#	hostile.sh [WRAPPER...] TOOL
#
# WRAPPER is, for example, valgrind with its options.

# shellcheck source=tools/tests/lib.sh
. "$(dirname "$0")/lib.sh"

for need in strace readelf setpriv; do
	if ! command -v $need >/dev/null; then
		echo "${0##*/}: $need is missing; install strace, binutils and util-linux" >&2
		exit 1
	fi
done

# opened COMMAND...: the names of all files that it opens, or asks for, one a line
opened() {
	strace -f -qq -e trace=%file -o trace "${tool[-1]}" "$@" >out 2>err
	sed -n 's/.*(\(AT_FDCWD, \|[0-9]*, \)\?"\([^"]*\)".*/\2/p' trace
}

# Names that an image records lead nowhere, unless the user says so.
truncate -s 4M secret.data secret.base named.data base
python3 - "$work/" <<'PYTHON'
import struct, sys
def ext(kind, data):
    return struct.pack(">II", kind, len(data)) + data + bytes(-len(data) % 8)
base = sys.argv[1].encode() + b"secret.base"
body = ext(0xE2792ACA, b"raw") + ext(0x44415441, sys.argv[1].encode() + b"secret.data") + bytes(8)
h = struct.pack(">4sIQIIQIIQQIIQQQQII", b"QFI\xfb", 3, 104 + len(body), len(base), 16, 4 << 20, 0, 1,
                3 << 16, 1 << 16, 1, 0, 0, 4, 0, 0, 4, 104) + body + base
blocks = h, struct.pack(">Q", 2 << 16), struct.pack(">4H", 1, 1, 1, 1), b""
with open("t.qcow2", "wb") as f:
    f.write(b"".join(b.ljust(1 << 16, b"\0") for b in blocks))
PYTHON
run info t.qcow2 && grep -q "data file: $work/secret.data" out && grep -q "backing file: $work/secret.base" out
ok "names are shown"
cp t.qcow2 before.qcow2
while read -r what args; do
	cp before.qcow2 t.qcow2
	# shellcheck disable=SC2086 # words are wanted
	opened $args >names
	! grep secret names && grep -qx t.qcow2 names
	ok "$what: no name that the image records is opened"
	[ "$(grep -c '^t.qcow2$' <(grep openat trace | sed -n 's/.*"\(t.qcow2\)".*/\1/p'))" -eq 1 ]
	ok "$what: the image is opened once"
done <<'TABLE'
info info t.qcow2
json info --json t.qcow2
check check t.qcow2
repair check --repair all t.qcow2
map map t.qcow2
resize resize t.qcow2 --size 8M
resize+data resize t.qcow2 --size 9M --data-file named.data --backing-file base
table table t.qcow2 --data-file named.data
TABLE
# That open is as good, and what it does with names that are trusted, is looked at
# by failures.sh, since it needs the kernel module.
rm -f secret.*

# Names of all bytes that a name can have; all that is printed is harmless.
python3 - <<'PYTHON'
import struct
name = bytes(range(1, 256)) + b"\xc2\x9b31m\xe2\x80\xae\x1b]0;title\x07"
def ext(kind, data):
    return struct.pack(">II", kind, len(data)) + data + bytes(-len(data) % 8)
features = b"".join(struct.pack("BB", 0, bit) + (b"\x1b[2J\xff" + name[bit:bit + 41]) for bit in (60, 63))
body = ext(0xE2792ACA, b"\x1b[1mraw\x07") + ext(0x44415441, name) + ext(0x6803F857, features)
h = struct.pack(">4sIQIIQIIQQIIQQQQII", b"QFI\xfb", 3, 104 + len(body) + 8, len(name), 16, 1 << 30, 0, 2,
                3 << 16, 1 << 16, 1, 0, 0, 4 | 1 << 60 | 1 << 63, 0, 0, 4, 104)
with open("evil.qcow2", "wb") as f:
    f.write((h + body + bytes(8) + name).ljust(1 << 18, b"\0"))
PYTHON
plain() {
	LC_ALL=C grep -qP '[^\x20-\x7e\n]' out err && return 1
	return 0
}
for args in info "table --data-file named.data" check map "resize --size 2G"; do
	# shellcheck disable=SC2086 # words are wanted
	set -- $args
	action=$1
	shift
	for file in evil.qcow2 $'e\x1b[2J\n.qcow2'; do
		[ "$file" = evil.qcow2 ] || cp evil.qcow2 "$file"
		run "$action" "$file" "$@"
		[ -s out ] || [ "$(wc -l <err)" -eq 1 ] && plain
		ok "$args: nothing that a terminal obeys, $(printf %q "$file")"
	done
done
run info --json evil.qcow2 && python3 -c '
import json
text = open("out", encoding="utf-8").read()
json.loads(text)
bad = [c for c in text if c != "\n" and (c < " " or "\x7f" <= c < "\xa0")]
assert not bad, bad'
ok "info --json: valid, and nothing that a terminal obeys"

# Numbers at their limits, and tables as large as can be, in little memory.
# limited COMMAND...: with 256 MiB of address space, and an end to it
limited() {
	(ulimit -v $((256 << 10)); exec timeout 300 "${tool[-1]}" "$@") >out 2>err
}
truncate -s 1M named.data
for field in 24:8 36:4 40:8 48:8 56:4 60:4 64:8 8:8 16:4 20:4 100:4 96:4; do
	for value in 7fffffffffffffff 8000000000000000 ffffffffffffffff 00ffffffffffff00 00ffffffffff0000 \
		0000000100000000; do
		rm -f t.raw
		image 1M
		digits=${value:16-2*${field#*:}}
		poke t.qcow2 "${field%:*}" "$digits"
		bad=
		for args in "info t.qcow2" "info --json t.qcow2" "map t.qcow2" "check t.qcow2" "check --repair all t.qcow2" \
			"table t.qcow2 --data-file named.data" "resize t.qcow2 --size 1P"; do
			# shellcheck disable=SC2086 # words are wanted
			limited $args
			status=$?
			[ $status -le 4 ] && [ $status -ne 3 ] && plain && ! grep -q memory err || bad+=" $args: $status;"
		done
		[ -z "$bad" ]
		ok "header field at ${field%:*} is $digits${bad:+:$bad}"
	done
done
# 32 MiB of L1 and 8 MiB of refcount table, all entries in use
python3 - <<'PYTHON'
import struct
bits, l1, reft = 9, 1 << 22, 1 << 14
end = 1 + (32 << 20 >> bits) + reft
h = struct.pack(">4sIQIIQIIQQIIQQQQII", b"QFI\xfb", 3, 0, 0, bits, l1 << 15, 0, l1, 1 << bits,
                (1 << bits) + (32 << 20), reft, 0, 0, 4, 0, 0, 4, 104)
with open("huge.qcow2", "wb") as f:
    f.write(h + struct.pack(">II5sxxx", 0x44415441, 5, b"t.raw"))
    f.seek(1 << bits)
    for i in range(0, l1, 4096):
        f.write(struct.pack(">4096Q", *((end + k) << bits | 1 << 63 for k in range(i, i + 4096))))
    for i in range(0, reft * 64, 4096):
        f.write(struct.pack(">4096Q", *((end + l1 + k) << bits for k in range(i, i + 4096))))
    f.truncate((end + l1 + reft * 64) << bits)
PYTHON
for args in info map check "table --data-file named.data"; do
	# shellcheck disable=SC2086 # words are wanted
	set -- $args
	(ulimit -v $((512 << 10)); exec timeout 600 "${tool[-1]}" "$1" huge.qcow2 "${@:2}") >out 2>err
	status=$?
	[ $status -le 4 ] && [ $status -ne 3 ] && ! grep -q memory err
	ok "tables as large as can be, in 512 MiB: $1"
done
rm -f huge.qcow2

# Two at once: one wins, if the other does not come after it.
image 1M
cp t.qcow2 before.qcow2
won=0 busy=0 other=0
for _ in {1..20}; do
	cp before.qcow2 t.qcow2
	for i in 1 2; do
		"${tool[-1]}" resize t.qcow2 --size $((i + 1))G 2>err$i &
		pid[i]=$!
	done
	ends=
	for i in 1 2; do
		wait "${pid[i]}"
		case $?:$(grep -c locked err$i) in
		0:0) ends+=w ;;
		5:1) ends+=b ;;
		# the other one had it first, and was ready with it
		4:0) ends+=s ;;
		*) ends+=x ;;
		esac
	done
	case $ends in
	ww | ws | sw) won=$((won + 1)) ;;
	wb | bw) won=$((won + 1)) busy=$((busy + 1)) ;;
	# none: each has seen the other
	*) other=$((other + 1)) ;;
	esac
	check t.qcow2 || other=$((other + 1))
done
[ $other -eq 0 ] && [ $won -gt 0 ]
ok "two resizes at once: one wins and the image is good; $busy times the other was refused"

# Bitmaps whose tables are as long as can be, in a file that is not there
image 1G
for n in {1..8}; do
	qemu-img bitmap --add t.qcow2 "b$n"
done
truncate -s 9G t.qcow2
python3 - t.qcow2 <<'PYTHON'
import struct, sys
with open(sys.argv[1], "r+b") as f:
    header = f.read(1 << 16)
    extension = header.find(bytes.fromhex("2385287500000018"))
    at, = struct.unpack(">Q", header[extension + 24:extension + 32])
    for n in range(8):
        f.seek(at)
        name, extra = struct.unpack(">HI", f.read(24)[18:])
        f.seek(at)
        f.write(struct.pack(">QI", (n + 1) << 30, 1 << 27))
        at += 24 + extra + name + 7 & ~7
PYTHON
cp --sparse=always t.qcow2 before.qcow2
timeout 300 "${tool[@]}" check t.qcow2 >out 2>err
[ $? -eq 2 ] && grep -q 'more than 64 MiB' err
ok "large bitmap tables: check"
timeout 300 "${tool[@]}" resize t.qcow2 --size 2G >out 2>err
[ $? -eq 4 ] && grep -q 'more than 64 MiB; remove the bitmaps' err && cmp t.qcow2 before.qcow2
ok "large bitmap tables: resize"
poke t.qcow2 88 0000000000000000
timeout 300 "${tool[@]}" check t.qcow2 >out 2>err
[ $? -eq 3 ] && timeout 300 "${tool[@]}" resize t.qcow2 --size 2G >out 2>err
ok "large bitmap tables that the header does not vouch for"

# What a user without rights is told
if [ "$(id -u)" -eq 0 ]; then
	image 1M
	chmod 755 "$work"
	chmod 600 t.qcow2 t.raw
	cp "${tool[-1]}" qcow2setup
	nobody() {
		setpriv --reuid=65534 --regid=65534 --clear-groups ./qcow2setup "$@" >out 2>err
	}
	while read -r what args; do
		# shellcheck disable=SC2086 # words are wanted
		nobody $args
		status=$?
		if [ "$what" = check ]; then
			[ $status -eq 1 ]
		else
			[ $status -eq 2 ]
		fi && [ "$(wc -l <err)" -eq 1 ] && [ ! -s out ] && grep -q '^qcow2setup: .*: .*; .*' err
		ok "unprivileged: $args"
	done <<-'TABLE'
		info info t.qcow2
		map map t.qcow2
		check check t.qcow2
		table table t.qcow2 --data-file t.raw
		resize resize t.qcow2 --size 2M
		create create new.qcow2 --data-file t.raw
	TABLE
	chmod 644 t.qcow2 t.raw
	nobody resize t.qcow2 --size 2M
	[ $? -eq 2 ] && grep -q 'for writing.*; get write access' err
	ok "unprivileged: may read, but not write"
	nobody info t.qcow2
	ok "unprivileged: reading is enough for info"
fi

# How it is built
elf=${tool[-1]}
readelf -hW "$elf" | grep -q 'Type: *DYN'
ok "built: position-independent"
readelf -lW "$elf" >out && grep -q GNU_RELRO out && readelf -dW "$elf" | grep -q BIND_NOW
ok "built: read-only relocations, bound at the start"
grep GNU_STACK out | grep -qv RWE
ok "built: no executable stack"
readelf -sW --dyn-syms "$elf" >out && grep -q __stack_chk_fail out
ok "built: stack protector"
grep -q '__[a-z]*printf_chk' out
ok "built: fortified"

finish hostile
