#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# Tests of map, check and measure.  QEMU's tools are the judges: what they make
# must be found as they find it, and what check repairs must be good to them.
#
#	check.sh [WRAPPER...] TOOL
#
# WRAPPER is, for example, valgrind with its options.

# A wrapper makes all slow, and finds what it can find in fewer combinations.
if [ $# -gt 1 ]; then
	kinds=("512 1" "64K 16 ext") preallocations=(off) sizes=(1G) thorough=''
else
	kinds=("512 1" "4K 64" "64K 16" "2M 8" "16K 4 ext" "64K 16 ext" "2M 32 ext")
	preallocations=(off metadata) sizes=(512 1000K 1G 100G) thorough=1
fi

# shellcheck source=tools/tests/lib.sh
. "$(dirname "$0")/lib.sh"

# io COMMAND...: in t.qcow2, with discards
io() {
	local c args=()
	for c in "$@"; do
		args+=(-c "$c")
	done
	qemu-io -d unmap "${args[@]}" t.qcow2 >/dev/null
}

# Metadata without holes: else QEMU looks for holes in the data file, too.
same_map() {
	cp --sparse=never "$1" dense.qcow2
	qemu-img map --output=json dense.qcow2 2>err | jq -c '.[] | del(.compressed)' >map.qemu &&
		"${tool[@]}" map --json "$1" 2>err >map.json &&
		jq -c '.[]' map.json >map.ours &&
		diff map.qemu map.ours >out && [ -s map.ours ]
}

# Exit code and numbers of both.
numbers='[."image-end-offset", ."total-clusters", ."allocated-clusters", ."check-errors", .corruptions, .leaks] | map(. // 0)'
same_check() {
	local theirs ours
	qemu-img check --output=json "$1" 2>err >check.qemu
	theirs=$?
	"${tool[@]}" check --json "$1" 2>>err >check.json
	ours=$?
	jq -c "$numbers" check.qemu check.json >out
	echo "exit codes $theirs and $ours" >>out
	verdict=$ours
	[ $theirs -eq $ours ] && [ "$(sort -u out | wc -l)" -eq 2 ]
}

#
# The same as QEMU says
#
n=0
for kind in "${kinds[@]}"; do
	read -r cluster bits ext <<<"$kind"
	for raw in off on; do
		for preallocation in "${preallocations[@]}"; do
			n=$((n + 1))
			# odd sizes in turn, and with them tables that are not full
			size=$(((24 << 20) + 1536 * (n % 3)))
			what="$cluster clusters, $bits bits${ext:+, extended}, raw $raw, preallocation $preallocation, size $size"
			image $size ",cluster_size=$cluster,refcount_bits=$bits,data_file_raw=$raw,preallocation=$preallocation${ext:+,extended_l2=on}"
			same_map t.qcow2 && same_check t.qcow2
			ok "new: $what"
			io 'write -P 1 0 64k' 'write -P 2 1M 3000k' 'write -P 3 9000k 1k' \
				"write -P 4 $((size - 512)) 512" 'write -z 2M 128k' \
				'write -z -u 2500k 300k' 'discard 3M 400k' 'write -P 5 3100k 5k' \
				'write -z 20M 1M' 'write -P 6 21M 3k' 'write -z 9001k 512' \
				'discard 0 4M' 'write -P 1 70k 2k' 'write -z 0 1k'
			same_map t.qcow2 && same_check t.qcow2
			ok "used: $what"
		done
	done
done

image 24M
io 'write 1M 1M' 'write -z 4M 1M'
run map t.qcow2 && [ "$(tail -n +2 out | tr -s ' ' | sed 's/^ //')" = \
"0 1048576 unallocated
1048576 1048576 data
2097152 2097152 unallocated
4194304 1048576 zero
5242880 19922944 unallocated" ]
ok "map: table"
io 'write 4M 64k' 'write -z 4M 64k'
run map t.qcow2 && [ "$(grep -c zero out)" -eq 1 ] &&
	same_map t.qcow2 && [ "$(grep -c '"zero":true,"data":false,"offset"' map.ours)" -eq 1 ]
ok "map: what is allocated and zero is an extent of its own only in JSON"
image 64M ,cluster_size=512
python3 -c '
for i in range(1500):
    print(f"write {i * 4096} 512")' >cmds
qemu-io t.qcow2 <cmds >/dev/null
run map t.qcow2 && [ "$(wc -l <out)" -eq 3001 ] &&
	[ "$(grep -c START out)" -eq 1 ] &&
	[ "$(awk 'NR > 1 { print length }' out | sort -u | wc -l)" -eq 2 ]
ok "map: long table"
cp out table
same_map t.qcow2 && same_check t.qcow2
ok "map: many extents"
image 1M
run map t.qcow2 && [ "$(wc -l <out)" -eq 2 ]
ok "map: empty image"
image 64T
[ -z "$thorough" ] || io 'write 5T 1M' 'write 63T 512'
SECONDS=0
same_map t.qcow2 && same_check t.qcow2 && [ $SECONDS -lt 60 ]
ok "64 TiB"

# What comes out of QEMU's other tools
qemu-img create -q -f raw src.raw 30M
qemu-io -f raw -c 'write -P 7 3M 5M' -c 'write -P 8 20M 64k' src.raw >/dev/null
qemu-img convert -f raw -O qcow2 -o data_file=t.raw src.raw t.qcow2
same_map t.qcow2 && same_check t.qcow2
ok "convert"
qemu-img convert -f raw -O qcow2 -o data_file=t.raw,extended_l2=on,cluster_size=2M src.raw t.qcow2
same_map t.qcow2 && same_check t.qcow2
ok "convert: extended"
qemu-img amend -o lazy_refcounts=on t.qcow2
io 'write 9M 64k'
same_map t.qcow2 && same_check t.qcow2
ok "amend: lazy refcounts"
qemu-img resize -q t.qcow2 100M && io 'write 99M 1M' && qemu-img resize -q --shrink t.qcow2 99M
same_map t.qcow2 && same_check t.qcow2
ok "resize"
image 1G ,cluster_size=512,refcount_bits=64
qemu-img resize -q t.qcow2 3G && io 'write 3000M 1M'
same_map t.qcow2 && same_check t.qcow2
ok "resize: larger L1 table"
image 24M
io 'write -P 1 0 10M'
rm -f top.qcow2
qemu-img create -q -f qcow2 -o data_file=top.raw -b t.qcow2 -F qcow2 top.qcow2
qemu-io -c 'write -P 2 5M 1M' -c 'write -z 8M 1M' -c 'write -z 12M 1M' top.qcow2 >/dev/null
same_check top.qcow2
ok "backing file: check"
run map --json top.qcow2 && [ "$(jq -c '.[]' out)" = \
'{"start":0,"length":5242880,"depth":1,"present":false,"zero":false,"data":false}
{"start":5242880,"length":1048576,"depth":0,"present":true,"zero":false,"data":true,"offset":5242880}
{"start":6291456,"length":2097152,"depth":1,"present":false,"zero":false,"data":false}
{"start":8388608,"length":1048576,"depth":0,"present":true,"zero":true,"data":false}
{"start":9437184,"length":3145728,"depth":1,"present":false,"zero":false,"data":false}
{"start":12582912,"length":1048576,"depth":0,"present":true,"zero":true,"data":false}
{"start":13631488,"length":11534336,"depth":1,"present":false,"zero":false,"data":false}' ]
ok "backing file: map says what comes from below"
qemu-img commit -q top.qcow2
same_map t.qcow2 && same_check t.qcow2
ok "commit: backing image"
same_check top.qcow2
ok "commit: top image"
qemu-io -c 'write -P 2 5M 1M' top.qcow2 >/dev/null
qemu-img rebase -b '' top.qcow2
same_map top.qcow2 && same_check top.qcow2
ok "rebase"
image 64M
qemu-img bitmap --add t.qcow2 one
qemu-img bitmap --add -g 512 t.qcow2 two
io 'write 0 1M' 'write 60M 1M'
qemu-img bitmap --add --disable t.qcow2 three
same_map t.qcow2 && same_check t.qcow2
ok "bitmaps"


#
# Damage
#
cat >damage.py <<'PYTHON'
"""damage.py IMAGE STATEMENT...: change an image as i, see below"""
import os
import struct
import sys


class Image:
    def __init__(self, path):
        self.f = open(path, "r+b", buffering=0)
        self.cs = 1 << self.get(20, 4)
        self.l1, self.reftable = self.get(40), self.get(48)
        self.order = self.get(96, 4)
        self.words = 2 if self.get(72) & 16 else 1
        self.l1e = self.l1
        for n in range(self.get(36, 4)):
            if self.get(self.l1 + 8 * n):
                self.l1e = self.l1 + 8 * n
                break

    def get(self, off, n=8):
        self.f.seek(off)
        return int.from_bytes(self.f.read(n), "big")

    def put(self, off, v, n=8):
        self.f.seek(off)
        self.f.write((v % (1 << 8 * n)).to_bytes(n, "big"))

    def xor(self, off, v):
        self.put(off, self.get(off) ^ v)

    def end(self):
        return os.fstat(self.f.fileno()).st_size

    def grow(self, clusters=1):
        """clusters at the end of the file, of which nobody knows"""
        at = -(-self.end() // self.cs) * self.cs
        self.f.truncate(at + clusters * self.cs)
        return at

    def l2(self, table=None):
        """the first L2 table that is there, or another one"""
        at = self.l1e if table is None else self.l1 + 8 * table
        return self.get(at) & 0xfffffffffffe00

    def free_table(self):
        n = [self.l2(n) for n in range(self.get(36, 4))]
        return n.index(0) if 0 in n else len(n) - 1

    def entry(self, guest):
        """where the L2 entry is"""
        c, n = guest // self.cs, self.cs // 8 // self.words
        return self.l2(c // n) + c % n * 8 * self.words

    def tables(self):
        """L1 and L2 without COPIED"""
        result = []
        for n in range(self.get(36, 4)):
            at = self.l2(n)
            self.f.seek(at)
            table = bytearray(self.f.read(self.cs) if at else b"")
            for k in range(0, len(table), 8 * self.words):
                table[k] &= 0x7f
            result.append((at, table))
        return result

    def block(self, n=0):
        return self.get(self.reftable + 8 * n) & ~511

    def refcount(self, off, v):
        c, n = off // self.cs, self.cs * 8 >> self.order
        bits = c % n << self.order
        at = self.block(c // n) + bits // 8
        if self.order >= 3:
            self.put(at, v, 1 << self.order - 3)
        else:
            mask = (1 << (1 << self.order)) - 1 << bits % 8
            self.put(at, self.get(at, 1) & ~mask | v << bits % 8, 1)

    def bitmaps(self):
        self.f.seek(0)
        h = self.f.read(self.cs)
        e = h.find(bytes.fromhex("2385287500000018"))
        return struct.unpack(">Q", h[e + 24:e + 32])[0]


i = Image(sys.argv[1])
for statement in sys.argv[2:]:
    exec(statement)
PYTHON

damage() {
	python3 damage.py "$@"
}

# The image that is damaged, in several kinds; 3 to 5 MiB and 100 to 101 MiB are
# data, and there is a second L2 table at least.
base() {
	image 2G ",cluster_size=$1,refcount_bits=$2${3:+,extended_l2=on}"
	io 'write -P 1 3M 2M' 'write -z 5M 1M' 'write -P 2 100M 1M' 'write -P 3 600M 1M'
}

# as_before: the image is good to QEMU, too, and reads as before it was damaged
as_before() {
	check t.qcow2 && same t.qcow2 before.qcow2
}

# repaired CODE: --repair all leaves what exits with CODE; 0 is good to QEMU, too.
# Tables that cannot be repaired are as they were.
repaired() {
	exits "$1" check --repair all t.qcow2 || return
	if [ "$1" -eq 0 ]; then
		as_before
	else
		damage t.qcow2 'assert i.tables() == Image("damaged.qcow2").tables()' 2>>err
	fi
}

# Columns: name @ what QEMU's check says: same, or what ours must exit with @
# pattern of the finding @ what is left after --repair all @ damage
# The name begins with what the kind of image must be for it.
if [ -n "$thorough" ]; then
	kinds=("64K 16" "512 2" "16K 4 ext")
else
	kinds=("64K 16 ext")
fi
for kind in "${kinds[@]}"; do
	read -r cluster bits ext <<<"$kind"
	base "$cluster" "$bits" "$ext"
	cp t.qcow2 before.qcow2
	kind="$cluster clusters, $bits bits${ext:+, extended}"
	line=0
	while IFS=@ read -r what judge pattern left how; do
		line=$((line + 1))
		[ -n "$thorough" ] || [ $((line % 4)) -eq 0 ] || continue
		case $what in
		wide!*) [ "$bits" -gt 1 ] || continue ;;
		big!*) [ "$cluster" != 512 ] || continue ;;
		ext!*) [ -n "$ext" ] || continue ;;
		std!*) [ -z "$ext" ] || continue ;;
		esac
		cp before.qcow2 t.qcow2
		damage t.qcow2 "$how"
		cp t.qcow2 damaged.qcow2
		if [ "$judge" = same ]; then
			same_check t.qcow2 && [ $verdict -gt 1 ]
		else
			exits "$judge" check t.qcow2
		fi && grep -qe "$pattern" err && cmp t.qcow2 damaged.qcow2
		ok "check: ${what#*!}: $kind"
		repaired "$left"
		ok "repair: ${what#*!}: $kind"
	done <<'TABLE'
leaked cluster@same@leaked@0@i.refcount(i.grow(), 1)
leaked clusters@same@leaked, refcount is 1@0@at = i.grow(9); [i.refcount(at + n * i.cs, 1) for n in range(9)]
wide!refcount of an L2 table is 2@same@leaked, refcount is 2@0@i.refcount(i.l2(), 2)
wide!refcount of an L2 table is 2, COPIED is clear@same@leaked, refcount is 2@0@i.refcount(i.l2(), 2); i.xor(i.l1e, 1 << 63)
refcount of an L2 table is 0@same@refcount is 0@0@i.refcount(i.l2(), 0)
refcount of the header is 0@same@cluster 0: refcount is 0@0@i.refcount(0, 0)
refcount of the L1 table is 0@same@refcount is 0@0@i.refcount(i.l1, 0)
refcount of the refcount table is 0@same@refcount is 0@0@i.refcount(i.reftable, 0)
refcount of a block is 0@same@refcount is 0@0@i.refcount(i.block(), 0)
all refcounts are 0@2@refcount is 0@0@i.f.seek(i.block()); i.f.write(bytes(i.cs))
block is lost@2@refcount is 0@0@i.put(i.reftable, 0)
block is beyond the end@2@beyond the end@0@i.put(i.reftable, i.grow() + 9 * i.cs)
big!block is unaligned@2@not a multiple@0@i.put(i.reftable, i.block() + 512)
refcount table: reserved bits@2@reserved@0@i.put(i.reftable, i.block() + 2)
block is an L2 table@2@used 2 times@0@i.put(i.reftable, i.l2())
block is the L1 table@2@used 2 times@0@i.put(i.reftable, i.l1)
two blocks in one@2@used 2 times@0@i.put(i.reftable + 8, i.block())
no refcount table@2@empty@0@i.put(56, 0, 4)
refcount table is beyond the end@2@beyond@0@i.put(48, i.grow() + i.cs)
COPIED is clear in L1@same@COPIED. is clear@0@i.xor(i.l1e, 1 << 63)
COPIED is set in L1 without a table@2@there is no table@0@i.put(i.l1 + 8 * i.free_table(), 1 << 63)
COPIED is clear in L2@same@COPIED. is clear@0@i.xor(i.entry(3 << 20), 1 << 63)
COPIED is clear in the last entry@same@COPIED. is clear@0@i.xor(i.entry((601 << 20) - 1), 1 << 63)
L1: reserved bits@same@reserved@2@i.xor(i.l1e, 1 << 57)
L1: low reserved bits@same@reserved@2@i.xor(i.l1e, 4)
L1: beyond the end@2@beyond@2@i.put(i.l1e, 1 << 63 | i.grow() + 9 * i.cs)
big!L1: unaligned@2@not a multiple@2@i.xor(i.l1e, 512)
L2 table is the L1 table@2@used .* times: by the L1 table@2@i.put(i.l1e, 1 << 63 | i.l1)
L2 table is the refcount table@2@used .* times: by the refcount table@2@i.put(i.l1e, 1 << 63 | i.reftable)
L2 table is used twice@2@used 2 times: by L2 table@2@i.put(i.l1 + 8 * i.free_table(), i.get(i.l1e))
L2: reserved bits@same@reserved@2@i.xor(i.entry(3 << 20), 1 << 60)
L2: low reserved bits@same@reserved@2@i.xor(i.entry(3 << 20), 16)
L2: another place@2@does not equal@2@i.xor(i.entry(3 << 20), i.cs)
L2: place beyond everything@2@does not equal@2@i.xor(i.entry(3 << 20), 1 << 50)
L2: compressed@2@compressed@2@i.xor(i.entry(3 << 20), 3 << 62)
L2: first place where it is not@2@does not equal@2@i.put(i.entry(4 << 20), 1 << 63)
std!zero and at another place@2@does not equal@2@i.put(i.entry(5 << 20), 3 << 20 | 1 << 63 | 1)
ext!both bits@same@both allocated and zero@2@i.put(i.entry(3 << 20) + 8, 1 << 32 | 1)
ext!allocated in nothing@same@in a cluster that is not@2@i.put(i.entry(8 << 20) + 8, 1)
ext!zero flag@2@reserved@2@i.xor(i.entry(3 << 20), 1)
big!a table is cut off@2@beyond the end@0@i.f.truncate(i.end() - 512)
two faults@2@COPIED@2@i.xor(i.l1e, 1 << 63); i.refcount(i.l1, 0); i.xor(i.entry(3 << 20), 16)
many faults@2@COPIED@0@i.xor(i.l1e, 1 << 63); i.put(i.reftable, 0); [i.xor(i.entry((3 << 20) + n * i.cs), 1 << 63) for n in range(1 << 20 >> i.get(20, 4))]
TABLE
done

#
# Repair, and what it leaves alone
#
base 64K 16
cp t.qcow2 before.qcow2
exits 0 check --repair all t.qcow2 && cmp t.qcow2 before.qcow2
ok "repair: a good image is not touched"

# leaks alone
damage t.qcow2 'i.refcount(i.grow(), 1)' 'i.refcount(i.l1, 5)' 'i.xor(i.entry(3 << 20), 1 << 63)' 'i.put(79, 7, 1)'
exits 2 check --repair leaks --json t.qcow2 &&
	[ "$(jq -c '[.corruptions, .leaks, ."corruptions-fixed", ."leaks-fixed"]' out)" = '[1,0,0,2]' ] &&
	damage t.qcow2 'assert i.get(72) == 7' 'assert not i.get(i.entry(3 << 20)) >> 63' &&
	qemu-img check --output=json t.qcow2 2>/dev/null |
	jq -e '.corruptions == 1 and has("leaks") == false' >out
ok "repair: leaks, and nothing else"
exits 0 check --repair all --json t.qcow2 &&
	[ "$(jq -c '[.corruptions, .leaks, ."corruptions-fixed", ."leaks-fixed"]' out)" = '[0,0,1,0]' ] &&
	damage t.qcow2 'assert i.get(72) == 4' && as_before
ok "repair: all, with both marks"
damage t.qcow2 'i.refcount(i.grow(), 1)' 'i.xor(i.l1e, 2)' && cp t.qcow2 damaged.qcow2
exits 2 check --repair leaks t.qcow2 && grep -q 'not freed' err && cmp t.qcow2 damaged.qcow2
ok "repair: leaks are kept where a table may be lost"
cp before.qcow2 t.qcow2
damage t.qcow2 'i.put(79, 7, 1)'
cp t.qcow2 damaged.qcow2
exits 0 check t.qcow2 && [ "$(grep -c 'warning.*mark' err)" -eq 2 ] && cmp t.qcow2 damaged.qcow2
ok "check: marks are told, and kept"
exits 0 check --repair leaks t.qcow2 && cmp t.qcow2 damaged.qcow2 &&
	exits 0 check --repair all t.qcow2 && cmp t.qcow2 before.qcow2
ok "repair: marks of a good image are cleared by all"
damage t.qcow2 'i.put(79, 7, 1)' 'i.xor(i.entry(3 << 20), 16)'
exits 2 check --repair all t.qcow2 && damage t.qcow2 'assert i.get(72) == 7'
ok "repair: marks stay if errors are left"
cp before.qcow2 t.qcow2
damage t.qcow2 'i.put(88, 1 << 63)'
cp t.qcow2 damaged.qcow2
exits 0 check --repair all t.qcow2 && cmp t.qcow2 damaged.qcow2
ok "repair: unknown autoclear bits stay if nothing changes"
damage t.qcow2 'i.refcount(i.l1, 0)'
exits 0 check --repair all t.qcow2 && cmp t.qcow2 before.qcow2
ok "repair: unknown autoclear bits go with the first change"

# What a crash leaves of lazy refcounts
image 1G ,lazy_refcounts=on
io 'write -P 1 3M 1M'
qemu-io -c 'write -P 2 600M 1M' -c 'write -P 3 5M 1M' -c flush -c abort t.qcow2 >/dev/null 2>&1
cp t.qcow2 before.qcow2
damage t.qcow2 'assert i.get(72) == 5'
ok "lazy refcounts: dirty after a crash"
same_check t.qcow2 && exits 0 check t.qcow2 && grep -q 'warning.*dirty' err
ok "lazy refcounts: told"
damage t.qcow2 'i.refcount(i.l2(1), 0)'
exits 0 check --repair all t.qcow2 && damage t.qcow2 'assert i.get(72) == 4' &&
	check t.qcow2 && qemu-io -c 'read -P 1 3M 1M' -c 'read -P 2 600M 1M' -c 'read -P 3 5M 1M' t.qcow2 >out 2>err
ok "lazy refcounts: repaired"

# Bitmaps
image 1G
qemu-img bitmap --add t.qcow2 one
qemu-img bitmap --add -g 512 t.qcow2 two
io 'write -P 1 0 1M'
cp t.qcow2 before.qcow2
while IFS=@ read -r what judge pattern left how; do
	cp before.qcow2 t.qcow2
	damage t.qcow2 'd = i.bitmaps(); t = i.get(d)' "$how"
	if [ "$judge" = same ]; then
		same_check t.qcow2 && [ $verdict -gt 1 ]
	else
		exits "$judge" check t.qcow2
	fi && grep -qe "$pattern" err
	ok "check: bitmaps: $what"
	exits "$left" check --repair all t.qcow2 &&
		{ [ "$left" -ne 0 ] || { check t.qcow2 && cmp t.qcow2 before.qcow2; }; }
	ok "repair: bitmaps: $what"
done <<'TABLE'
refcount of the directory is 0@same@refcount is 0@0@i.refcount(d, 0)
refcount of a table is 0@same@refcount is 0@0@i.refcount(t, 0)
refcount of the data is 2@same@leaked@0@i.refcount(i.get(t) & ~511, 2)
reserved bits@2@reserved@2@i.xor(t, 16)
unaligned@2@not a multiple@2@i.put(t, i.get(t) + 512)
beyond the end@2@beyond@2@i.put(t, i.grow() + 5 * i.cs)
data is an L2 table@2@used 2 times@2@i.put(t, i.l2())
directory of another kind@2@unknown type@2@i.put(d + 16, 9, 1)
flags that are not known@2@bitmap 0: @2@i.put(d + 12, 10, 4)
table of another length@2@bitmap 0: @2@i.put(d + 8, 2, 4)
TABLE
# QEMU does not look at these.
for size in 1G 1048064; do
	image $size
	qemu-img bitmap --add -g 512 t.qcow2 one
	io 'write -P 1 0 512K'
	cp t.qcow2 before.qcow2
	damage t.qcow2 't = i.get(i.bitmaps()); n = i.get(i.bitmaps() + 8, 4)' \
		'b = i.get(t + 8 * n - 8)' 'i.put((b or i.get(t)) + i.cs - 1, 128, 1)'
	if [ $size = 1G ]; then
		# They have all bits of their clusters.
		exits 0 check t.qcow2
		ok "check: bitmaps: the last bit of the disk"
		continue
	fi
	exits 2 check t.qcow2 && grep -q 'bitmap 0: .*behind the end' err && cp t.qcow2 damaged.qcow2 &&
		exits 0 check --repair all t.qcow2 && check t.qcow2 && cmp t.qcow2 before.qcow2
	ok "check: bitmaps: bits behind the end of the disk"
done
cp before.qcow2 t.qcow2
damage t.qcow2 'i.put(88, 0)'
same_check t.qcow2 && exits 3 check t.qcow2 && exits 0 check --repair leaks t.qcow2 && check t.qcow2
ok "bitmaps that the header does not vouch for are leaks"

# Blocks that must be made again, and more than one of them
image 2G ,cluster_size=512,refcount_bits=64
for ((n = 0; n < 2048; n += 4)); do
	echo "write ${n}M 512"
done | qemu-io t.qcow2 >/dev/null
cp t.qcow2 before.qcow2
damage t.qcow2 'i.put(i.reftable + 8 * 3, 0)' 'i.put(i.reftable + 8 * 7, i.block(8))' 'i.refcount(i.block(9), 0)'
! run check t.qcow2 && repaired 0
ok "repair: several blocks of many"

# Encrypted metadata there is none.  On a busy machine QEMU cannot always find out
# how fast it is, which it wants to know for a new key.
secret=(--object "secret,id=s,data=x")
for _ in {1..20}; do
	qemu-img create -q "${secret[@]}" -f qcow2 \
		-o data_file=e.raw,encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10 \
		e.qcow2 64M 2>err && break
done
image=driver=qcow2,file.filename=e.qcow2,encrypt.key-secret=s
qemu-img check "${secret[@]}" --image-opts --output=json $image >check.qemu 2>>err &&
	exits 0 check --json e.qcow2 &&
	[ "$(jq -c "$numbers" check.qemu out | sort -u | wc -l)" -eq 1 ] &&
	damage e.qcow2 'i.refcount(i.grow(), 1)' && exits 0 check --repair leaks e.qcow2
ok "encrypted image"

# Power cuts during a repair: another one ends it
if [ -n "$thorough" ]; then
	for kind in "64K 16" "512 2"; do
		read -r cluster bits <<<"$kind"
		base "$cluster" "$bits"
		cp t.qcow2 before.qcow2
		for how in 'i.xor(i.l1e, 1 << 63); i.put(i.reftable, 0); i.xor(i.entry(3 << 20), 1 << 63); i.put(79, 7, 1)' \
			'i.refcount(i.l2(), 0); i.refcount(0, 0); i.refcount(i.grow(), 1); i.refcount(i.grow(), 1); i.xor(i.entry((601 << 20) - 1), 1 << 63); i.put(79, 7, 1); i.put(88, 128)'; do
			cp before.qcow2 damaged.qcow2
			damage damaged.qcow2 "$how"
			bad=0 cuts=0
			for ((n = 0; n < 1000; n++)); do
				for seed in {1..8}; do
					[ $bad -lt 5 ] || break 2
					cp damaged.qcow2 t.qcow2
					"${steps[-1]}" crash-repair t.qcow2 $n "$seed" >out 2>err
					status=$?
					[ $status -eq 9 ] && break 2
					[ $status -eq 0 ] || bad=$((bad + 1))
					cuts=$((cuts + 1))
					# marks are cleared when all else is durable
					"${tool[@]}" check t.qcow2 >out 2>err ||
						damage t.qcow2 'assert i.get(72) == 7' 2>>err || bad=$((bad + 1))
					[ "$seed" -le 2 ] || continue
					exits 0 check --repair all t.qcow2 && as_before || bad=$((bad + 1))
				done
			done
			[ $bad -eq 0 ] && [ $cuts -ge 10 ]
			ok "repair: $cuts power cuts, all can be repaired, $cluster clusters"
		done
	done
fi

#
# Refusals
#
image 1G
held t.qcow2 refuse 1 'locked' check t.qcow2
ok "check: image is in use"
held t.qcow2 refuse 1 'locked' check --repair all t.qcow2
ok "repair: image is in use"
held t.qcow2 refuse 5 'locked' map t.qcow2
ok "map: image is in use"
qemu-img create -q -f qcow2 plain.qcow2 1G
qemu-img create -q -f qcow2 -o compat=0.10 old.qcow2 1G
refuse 1 'qemu-img check' check plain.qcow2 && refuse 4 'qemu-img map' map plain.qcow2
ok "an image with its data inside"
refuse 1 'qemu-img check' check old.qcow2 && refuse 4 'qemu-img map' map old.qcow2
ok "an image of version 2"
refuse 1 'not a qcow2' check t.raw && refuse 4 'not a qcow2' map t.raw
ok "not an image"
refuse 1 'no such file' check none && refuse 4 'no such file' map none
ok "no such image"
qemu-img create -q -f qcow2 -o data_file=e.raw e.qcow2 0
refuse 1 'less than one sector; enlarge it with qemu-img resize' check e.qcow2
ok "check: virtual size 0"
# QEMU ends the file behind the last entry of the L1 table.
image 64M
cp t.qcow2 before.qcow2
damage t.qcow2 'i.put(i.get(40), 1 << 63)'
exits 2 check t.qcow2 && exits 0 check --repair all t.qcow2 && check t.qcow2 && cmp t.qcow2 before.qcow2
ok "repair: an L1 entry with nothing but COPIED, in a cluster that is cut off"
refuse 1 'not known' check --repair some t.qcow2
ok "repair: of an unknown kind"
while IFS=@ read -r what code pattern how; do
	image 1G
	damage t.qcow2 "$how"
	cp t.qcow2 damaged.qcow2
	exits "$code" check --repair all t.qcow2 && grep -qe "$pattern" err &&
		cmp t.qcow2 damaged.qcow2 && refuse 4 "$pattern" map t.qcow2
	ok "header: $what"
done <<'TABLE'
L1 is beyond the end@2@beyond@i.put(40, 99 * i.cs)
L1 is on the refcount table@2@overlaps the refcount table@i.put(40, i.reftable)
L1 is on the header@2@overlaps the header@i.put(40, 0)
L1 is unaligned@1@not a multiple@i.put(40, i.l1 + 512)
L1 is too small@1@too small@i.put(36, 1, 4)
refcount table is too large@1@larger than@i.put(56, 129, 4)
unknown feature@1@unknown incompatible@i.put(72, 4 | 1 << 40)
less than a sector@1@less than one sector@i.put(24, 511)
TABLE
image 1G
damage t.qcow2 'i.put(60, 1, 4)'
exits 2 check --repair all t.qcow2 && [ "$(grep -c 'snapshots' err)" = 1 ] && grep -q '^What is left.*restore' out &&
	! check t.qcow2
ok "header: snapshots"
image 1G
io 'write 5M 1M'
for how in 'i.xor(i.l1e, 1 << 57)' 'i.put(i.l1e, 99 * i.cs)' 'i.put(i.l1e, i.reftable)' \
	'i.xor(i.entry(5 << 20), 1 << 60)' 'i.xor(i.entry(5 << 20), 1 << 20)'; do
	cp t.qcow2 damaged.qcow2
	damage damaged.qcow2 "$how"
	exits 4 map damaged.qcow2 && grep -q 'corrupt image: L1 entry 0.*;' err &&
		exits 4 map --json damaged.qcow2 && ! jq . out >/dev/null 2>&1
	ok "map: corrupt image: $how"
done
for what in map check measure; do
	args=(t.qcow2)
	[ $what != measure ] || args=(--size 1G)
	! "${tool[@]}" $what --json "${args[@]}" >/dev/full 2>err
	ok "$what: a full disk does not look like success"
done

#
# measure
#
for kind in "${kinds[@]}" "2M 64"; do
	read -r cluster bits ext <<<"$kind"
	for size in "${sizes[@]}"; do
		rm -f data.raw t.qcow2
		truncate -s "$size" data.raw
		# what create makes is as large, and can grow to that
		run measure --json --size "$size" --cluster-size "$cluster" --refcount-bits "$bits" ${ext:+--extended-l2} &&
			cp out measured &&
			run create t.qcow2 --data-file data.raw --cluster-size "$cluster" --refcount-bits "$bits" ${ext:+--extended-l2} &&
			[ "$(stat -c %s t.qcow2)" -eq "$(jq .required measured)" ] &&
			prepare_steps prepare t.qcow2 &&
			[ "$(stat -c %s t.qcow2)" -le "$(jq '."fully-allocated"' measured)" ] &&
			[ "$(stat -c %s t.qcow2)" -ge "$(jq '."fully-allocated" * 0.98 - 4 * '"$(numfmt --from=iec "$cluster")" measured | cut -d. -f1)" ] &&
			[ "$(stat -c %s data.raw)" -eq "$(jq '."data-file"' measured)" ]
		ok "measure: $size, $cluster clusters, $bits bits${ext:+, extended}"
	done
done
run measure --size 1T && grep -q '^required size: 262144$' out && grep -q '^fully allocated size: 134479872$' out
ok "measure: text"
refuse 1 '\-\-size' measure ; ok "measure: without size"
refuse 1 '\-\-size' measure --size auto ; ok "measure: of nothing"
run measure --size 511 && grep -q '^data file size: 512$' out
ok "measure: less than a sector"
refuse 1 'cluster-size' measure --size 1T --cluster-size 512 ; ok "measure: too large for the clusters"
refuse 1 '2\^56' measure --size 65P --cluster-size 2M ; ok "measure: too large"
refuse 1 'extended-l2' measure --size 1G --cluster-size 8K --extended-l2 ; ok "measure: clusters too small"

finish check
