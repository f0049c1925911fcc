# SPDX-License-Identifier: GPL-2.0-or-later
# shellcheck shell=bash disable=SC2154
#
# What the tests of the tool that need no kernel have in common.  To be sourced
# with their own arguments:
#
#	[WRAPPER...] TOOL
#
# WRAPPER is, for example, valgrind with its options.  Goes to an empty folder.

tool=("$@")
steps=("${@:1:$#-1}" "$(dirname "$0")/image-steps")
tool[-1]=$(realpath "${tool[-1]}")
steps[-1]=$(realpath "${steps[-1]}")

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

# The wrapper is slow.  Of the calls that one line makes with the same options, in
# a loop, it gets to see the first.
declare -A wrapped
run() {
	local call="${BASH_LINENO[*]} $1 ${*//[^ a-z-]/}"

	if [ -n "${wrapped[$call]-}" ]; then
		"${tool[-1]}" "$@" >out 2>err
	else
		wrapped[$call]=1
		"${tool[@]}" "$@" >out 2>err
	fi
}

prepare_steps() {
	"${steps[@]}" "$@" >out 2>err
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
	exits "$code" "$@" && [ "$(wc -l <err)" -eq 1 ] && nothing_but_error "$@" &&
		grep -q '^qcow2setup: .*;\|^qcow2setup: .*: .*(.*)' err &&
		grep -qe "$pattern" err
}

# nothing_but_error ARGUMENTS...: nothing is printed; or with --json an error alone
nothing_but_error() {
	[ ! -s out ] || { [[ " $* " = *" --json "* ]] && [ "$(wc -l <out)" -eq 1 ] && jq -e .error.message out >out.error; }
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

check() {
	qemu-img check -q "$1" >out 2>err
}

# hex [-j OFFSET] [-N LENGTH] [FILE]
hex() {
	od -An -v -tx1 "$@" | tr -d ' \n'
}

# poke FILE OFFSET HEX
poke() {
	python3 - "$@" <<'PYTHON'
import sys
with open(sys.argv[1], "r+b") as f:
    f.seek(int(sys.argv[2], 0))
    f.write(bytes.fromhex(sys.argv[3]))
PYTHON
}

# overlay FORMAT [OPTIONS]: b.qcow2 or b.raw below t.qcow2
overlay() {
	rm -f t.qcow2 t.raw b.qcow2 b.raw b.data
	if [ "$1" = raw ]; then
		yes base | head -c 3M >b.raw
	else
		qemu-img create -q -f qcow2 -o data_file=b.data b.qcow2 3M &&
			qemu-io -c 'write -q -P 1 0 3M' b.qcow2
	fi
	qemu-img create -q -f qcow2 -b "b.$1" -F "$1" -o "data_file=t.raw${2-}" t.qcow2 4M &&
		truncate -s 4M t.raw
}

# held FILE COMMAND...: run a command while QEMU has FILE open
held() {
	local file=$1 status
	shift
	coproc qemu-io "$file" >/dev/null 2>&1
	for _ in {1..100}; do
		grep -q "^[0-9]*: OFDLCK.*:$(stat -c %i "$file") " /proc/locks && break
		sleep 0.05
	done
	"$@"
	status=$?
	kill "$COPROC_PID"
	wait "$COPROC_PID" 2>/dev/null
	return $status
}

# 3: leaked clusters, which is all that a power cut may do
good_or_leaks() {
	local status

	qemu-img check -q "$1" >out 2>err
	status=$?
	[ $status -eq 0 ] || [ $status -eq 3 ]
}

# dirty FILE BITMAP: as a server tells it
dirty() {
	rm -f sock
	qemu-nbd -r -t -k "$PWD/sock" -B "$2" -f qcow2 "$1" >/dev/null 2>&1 &
	for _ in {1..400}; do
		[ ! -S sock ] || break
		sleep 0.02
	done
	qemu-img map --output=json --image-opts \
		"driver=nbd,server.type=unix,server.path=$PWD/sock,x-dirty-bitmap=qemu:dirty-bitmap:${2//,/,,}" |
		jq -c '[.[] | select(.data | not) | [.start, .length]]'
	kill $!
	wait $! 2>/dev/null
}

# infos FILE: name, granularity and flags of each, as QEMU has them
infos() {
	qemu-img info -U --output=json "$1" |
		jq -c '[."format-specific".data.bitmaps // [] | .[] | [.name, .granularity, (.flags | sort)]] | sort'
}

# lists FILE: all of it, as we have it; the rest is looked at here
lists() {
	"${tool[-1]}" bitmap list "$1" --json >out.list 2>err &&
		jq -e 'all(.persistent and (.busy | not))' out.list >/dev/null &&
		jq -c '[.[] | [.name, .granularity, .count, .recording, .inconsistent]] | sort' out.list
}

# edit FILE OFFSET HEX: bytes of the bitmap directory
edit() {
	python3 - "$@" <<-'END'
		import struct, sys
		with open(sys.argv[1], "r+b") as f:
		    h = f.read(65536)
		    e = h.find(bytes.fromhex("2385287500000018"))
		    at, = struct.unpack(">Q", h[e + 24:e + 32])
		    f.seek(at + int(sys.argv[2]))
		    f.write(bytes.fromhex(sys.argv[3]))
	END
}

# place FILE OFFSET REST: lay out the extensions so that the bitmaps are there, or
# would come there; REST: bytes of an unknown one behind it
place() {
	python3 - "$@" <<-'END'
		import struct, sys
		name, want, rest = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
		with open(name, "r+b") as f:
		    head = bytearray(f.read(65536))
		    bits, = struct.unpack(">I", head[20:24])
		    cluster = 1 << bits
		    at, = struct.unpack(">I", head[100:104])
		    start, parts, bitmaps = at, b"", b""
		    while True:
		        kind, size = struct.unpack(">II", head[at:at + 8])
		        if not kind:
		            break
		        part = bytes(head[at:at + 8 + (size + 7 & ~7)])
		        at += len(part)
		        if kind == 0x23852875:
		            bitmaps = part
		        elif kind != 0x6803f857 or len(part) + start + len(parts) + 8 <= want:
		            parts += part
		    fill = want - start - len(parts)
		    if fill:
		        parts += struct.pack(">II", 0x11223344, fill - 8) + b"x" * (fill - 8)
		    parts += bitmaps
		    if rest:
		        parts += struct.pack(">II", 0x55667788, rest) + b"y" * (rest + 7 & ~7)
		    backing, length = struct.unpack(">QI", head[8:20])
		    text = bytes(head[backing:backing + length])
		    if backing:
		        struct.pack_into(">Q", head, 8, start + len(parts) + 8)
		    new = bytes(head[:start]) + parts + bytes(8) + text
		    assert len(new) <= cluster
		    f.seek(0)
		    f.write(new.ljust(min(cluster, 65536), b"\0"))
	END
}
