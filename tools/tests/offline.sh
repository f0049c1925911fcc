#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# Tests of what the tool does without a kernel: info, create, table, and the
# steps of open and close that change an image.  QEMU's tools are the judges.
#
#	offline.sh [WRAPPER...] TOOL
#
# WRAPPER is, for example, valgrind with its options.

# A wrapper makes all slow, and finds what it can find in fewer combinations.
if [ $# -gt 1 ]; then
	sizes=(512 2M) widths=(1 64)
else
	sizes=(512 4K 64K 2M) widths=(1 16 64)
fi

# shellcheck source=tools/tests/lib.sh
. "$(dirname "$0")/lib.sh"

#
# create
#
truncate -s 64M data.raw
printf 'old content' | dd of=data.raw bs=1 seek=70000 conv=notrunc status=none
cp data.raw before.raw
truncate -s 64M zeros.raw
for cluster in "${sizes[@]}"; do
	for bits in "${widths[@]}"; do
		rm -f c.qcow2
		run create c.qcow2 --data-file data.raw --cluster-size "$cluster" \
			--refcount-bits "$bits" &&
			check c.qcow2 && same -f qcow2 -F raw c.qcow2 zeros.raw
		ok "create: $cluster clusters, $bits bits: clean, reads zeros"
		rm -f c.qcow2
		run create c.qcow2 --data-file data.raw --cluster-size "$cluster" \
			--refcount-bits "$bits" --data-file-raw &&
			check c.qcow2 && same -f qcow2 -F raw c.qcow2 before.raw
		ok "create: $cluster clusters, $bits bits, raw: clean, reads the data"
		[ "$(qemu-img info --output=json c.qcow2 |
			jq -r '."format-specific".data."data-file"')" = data.raw ]
		ok "create: $cluster clusters, $bits bits: data file is recorded"
	done
done
cmp data.raw before.raw
ok "create: data is untouched"

# a new image stays good in QEMU's hands
for cluster in 512 64K; do
	rm -f c.qcow2 w.raw
	truncate -s 20971008 w.raw
	run create c.qcow2 --data-file w.raw --cluster-size "$cluster" &&
		qemu-io -c 'write -P 7 1000K 3000K' -c 'write -z 2M 512K' \
			-c 'read -P 7 3M 512K' -c 'read -P 0 2M 512K' \
			c.qcow2 >out 2>err && check c.qcow2
	ok "create: QEMU writes to it, $cluster clusters, odd size"
done
run info c.qcow2 && grep -q '20971008 bytes' out
ok "create: size is that of the data, in sectors"

# What ends within a sector: nothing may be lost, and the data is not changed.
for size in 1 511 1000 100000001; do
	rm -f c.qcow2
	yes tail | head -c $size >odd.raw
	cp odd.raw odd.before
	refuse 4 "truncate -s $(((size + 511) / 512 * 512))," create c.qcow2 \
		--data-file odd.raw --data-file-raw && [ ! -e c.qcow2 ] &&
		cmp odd.raw odd.before &&
		eval "$(grep -o 'truncate -s [0-9]*' err)" odd.raw &&
		run create c.qcow2 --data-file odd.raw --data-file-raw &&
		check c.qcow2 && same -f qcow2 -F raw c.qcow2 odd.before
	ok "create: $size bytes of raw data: refused, and the remedy"
	rm -f c.qcow2
	run create c.qcow2 --data-file data.raw --size $size --data-file-raw 2>err
	if [ $size -gt $((64 << 20)) ]; then
		grep -q 'less than the size' err && [ ! -e c.qcow2 ]
	else
		qemu-img create -q -f qcow2 -o data_file=q.raw q.qcow2 $size &&
			[ "$(qemu-img info --output=json c.qcow2 | jq '."virtual-size"')" = \
			"$(qemu-img info --output=json q.qcow2 | jq '."virtual-size"')" ] &&
			run measure --size $size --json &&
			jq -e --argjson n $(((size + 511) / 512 * 512)) '."data-file" == $n' out
	fi >/dev/null
	ok "create: --size $size is rounded up as QEMU does it"
	rm -f q.qcow2 q.raw
done
refuse 4 'smaller --size' create c.qcow2 --data-file data.raw \
	--size 18446744073709551615 && [ ! -e c.qcow2 ] &&
	refuse 1 'smaller --size' measure --size 18446744073709551615
ok "create: the largest number of bytes"
rm -f c.qcow2 odd.raw odd.before

rm -f c.qcow2
run create c.qcow2 --data-file data.raw --size 1000s --preallocation metadata &&
	check c.qcow2 && [ "$(stat -c %s c.qcow2)" -eq $((5 * 65536)) ] &&
	truncate -s 512000 z.raw && same -f qcow2 -F raw c.qcow2 z.raw
ok "create: preallocated metadata shows no old content"

mkdir sub
rm -f c.qcow2
cp before.raw sub/d.raw
(cd sub && "${tool[@]}" create ../c.qcow2 --data-file ./d.raw --data-file-raw) &&
	[ "$(qemu-img info --output=json c.qcow2 |
		jq -r '."format-specific".data."data-file"')" = "$PWD/sub/d.raw" ]
ok "create: data file in another folder is recorded with its full name"
rm -f sub/c.qcow2 sub/data.raw
# What is there by that name below the image must not be taken for it.
yes wrong | head -c 64M >sub/data.raw
run create sub/c.qcow2 --data-file data.raw --data-file-raw &&
	same -f qcow2 -F raw sub/c.qcow2 data.raw &&
	(cd sub && qemu-img compare -q -f qcow2 -F raw c.qcow2 ../data.raw) &&
	refuse 4 "$PWD/data.raw is a file\|image is a file" table sub/c.qcow2 \
		--data-file data.raw
ok "create: image in another folder: QEMU finds the data from anywhere"
rm -f sub/data.raw c.qcow2
(cd sub && "${tool[@]}" create c2.qcow2 --data-file d.raw --data-file-raw) &&
	[ "$(qemu-img info --output=json sub/c2.qcow2 2>/dev/null |
		jq -r '."format-specific".data."data-file"')" = d.raw ]
ok "create: image in this folder: the name is recorded as it is given"

rm -f c.qcow2 big.raw
truncate -s 8T big.raw
run create c.qcow2 --data-file big.raw && check c.qcow2 &&
	[ "$(stat -c %s c.qcow2)" -lt 1000000 ]
ok "create: 8 TiB"

rm -f c.qcow2
refuse 1 'data-file' create c.qcow2 && [ ! -e c.qcow2 ]
ok "create: without data file"
refuse 4 'no such file' create c.qcow2 --data-file none && [ ! -e c.qcow2 ]
ok "create: missing data file"
run -v create c.qcow2 --data-file new.raw --size 1.5M && [ "$(stat -c '%s %b' new.raw)" = '1572864 0' ] &&
	grep -q 'new.raw: made, with 1572864 bytes' err && grep -q 'c.qcow2: a disk of 1572864 bytes, in clusters of 64 KiB' err &&
	[ "$(wc -l <err)" = 4 ] && check c.qcow2 && [ "$(qemu-img info --output=json c.qcow2 | jq '."virtual-size"')" = 1572864 ]
ok "create: makes the data file, and says what it does"
rm -f new.raw
refuse 5 'exists' create c.qcow2 --data-file new.raw --size 1M && [ ! -e new.raw ] &&
	refuse 1 'cannot\|16K' create d.qcow2 --data-file new.raw --size 1M --extended-l2 --cluster-size 4K && [ ! -e new.raw ] &&
	[ ! -e d.qcow2 ] && ln -s nowhere link && refuse 4 'no such file' create d.qcow2 --data-file link --size 1M &&
	[ ! -e nowhere ] && ls -l link >out
ok "create: takes the data file back if it fails"
rm -f c.qcow2 link
refuse 4 '67108864' create c.qcow2 --data-file data.raw --size 65M &&
	[ ! -e c.qcow2 ]
ok "create: larger than the data"
: >empty.raw
refuse 4 'sector' create c.qcow2 --data-file empty.raw
ok "create: empty data"
refuse 4 'cluster-size' create c.qcow2 --data-file big.raw --cluster-size 512 &&
	[ ! -e c.qcow2 ]
ok "create: L1 table would be too large"
cp before.raw exists.qcow2
refuse 5 'exists' create exists.qcow2 --data-file data.raw &&
	cmp exists.qcow2 before.raw
ok "create: existing file is not overwritten"
ln -s nowhere link.qcow2
refuse 5 'exists' create link.qcow2 --data-file data.raw && [ ! -e nowhere ]
ok "create: dangling link is not followed"
refuse 4 'folder' create none/c.qcow2 --data-file data.raw
ok "create: missing folder"
for size in 0 256 1000 4M x 65537; do
	refuse 1 'cluster-size' create c.qcow2 --data-file data.raw \
		--cluster-size $size
	ok "create: cluster size $size"
done
for bits in 0 3 128 x; do
	refuse 1 'refcount-bits' create c.qcow2 --data-file data.raw \
		--refcount-bits "$bits"
	ok "create: $bits refcount bits"
done
refuse 1 'preallocation' create c.qcow2 --data-file data.raw \
	--preallocation full
ok "create: unknown preallocation"
long=$(printf 'n%.0s' {1..250})
mkdir -p "$long/$long"
cp before.raw "$long/$long/d"
refuse 4 'too long' create c.qcow2 --cluster-size 512 \
	--data-file "$long/$long/d" && [ ! -e c.qcow2 ]
ok "create: data file name does not fit the header"
refuse 5 'no block device' create exists.qcow2 --data-file data.raw \
	--overwrite-device && cmp exists.qcow2 before.raw
ok "create: --overwrite-device does not overwrite files"
(ulimit -f 128
 "${tool[@]}" create c.qcow2 --data-file data.raw --cluster-size 4K \
	--data-file-raw >out 2>err)
[ $? -eq 4 ] && [ ! -e c.qcow2 ] && grep -q 'cannot write' err
ok "create: an unfinished file is removed"

# extended L2 entries
cp data.raw w.raw
for cluster in 16K 64K 2M; do
	rm -f c.qcow2
	run create c.qcow2 --data-file data.raw --cluster-size $cluster --extended-l2 &&
		check c.qcow2 && same -f qcow2 -F raw c.qcow2 zeros.raw &&
		qemu-img info c.qcow2 | grep -q 'extended l2: true'
	ok "create: $cluster clusters, extended L2: clean, reads zeros"
	rm -f c.qcow2
	run create c.qcow2 --data-file data.raw --cluster-size $cluster --extended-l2 \
		--data-file-raw && check c.qcow2 &&
		same -f qcow2 -F raw c.qcow2 before.raw
	ok "create: $cluster clusters, extended L2, raw: clean, reads the data"
	rm -f c.qcow2
	run create c.qcow2 --data-file w.raw --cluster-size $cluster --extended-l2 \
		--preallocation metadata && qemu-io -c 'write -P 7 1000K 3000K' \
		-c 'write -z 2M 5K' -c 'read -P 7 3M 512K' -c 'read -P 0 2M 5K' \
		c.qcow2 >out 2>err && check c.qcow2
	ok "create: $cluster clusters, extended L2: QEMU writes to it"
done
cmp data.raw before.raw
ok "create: data is untouched"
refuse 1 '16K' create x.qcow2 --data-file data.raw --cluster-size 8K --extended-l2 &&
	[ ! -e x.qcow2 ]
ok "create: extended L2 needs larger clusters"

# backing files
yes backing | head -c 5000000 >base.raw
cp base.raw base.full
truncate -s 5000192 base.full
for cluster in 512 64K; do
	rm -f c.qcow2
	run create c.qcow2 --data-file w.raw --cluster-size $cluster \
		--backing-file base.raw --backing-format raw && check c.qcow2 &&
		qemu-img info --output=json c.qcow2 >out 2>err &&
		jq -e '."virtual-size" == 5000192 and ."backing-filename" == "base.raw" and
			."backing-filename-format" == "raw"' out >/dev/null &&
		same -f qcow2 -F raw c.qcow2 base.full
	ok "create: backing file, $cluster clusters: its size and content"
	qemu-io -c 'write -q -P 5 100K 70K' c.qcow2 && check c.qcow2 &&
		qemu-io -c 'read -P 5 100K 70K' c.qcow2 | grep -qv failed
	ok "create: backing file, $cluster clusters: QEMU writes to it"
done
rm -f c.qcow2
mkdir -p over
(cd over && "${tool[@]}" create ../c.qcow2 --data-file ../w.raw --size 4M \
	--backing-file ../base.raw --backing-format raw) >out 2>err &&
	qemu-img info --output=json c.qcow2 >out 2>err &&
	jq -e '."virtual-size" == 4194304 and
		."backing-filename" == "'"$(realpath base.raw)"'"' out >/dev/null &&
	(cd over && qemu-io -c 'read -q 0 4M' ../c.qcow2)
ok "create: backing file in another folder is found from that of the image"
rm -f c.qcow2 d.qcow2
run create c.qcow2 --data-file w.raw --size 3M && cp w.raw w2.raw &&
	run create d.qcow2 --data-file w2.raw --backing-file c.qcow2 \
		--backing-format qcow2 && check d.qcow2 &&
	qemu-img info --output=json d.qcow2 >out 2>err &&
	jq -e '."virtual-size" == 3145728 and ."backing-filename-format" == "qcow2"' \
		out >/dev/null
ok "create: backing image"
refuse 4 'not a qcow2' create x.qcow2 --data-file w.raw --backing-file base.raw \
	--backing-format qcow2
ok "create: backing image is none"
refuse 1 'not guessed' create x.qcow2 --data-file w.raw --backing-file c.qcow2
ok "create: format of the backing file is not guessed"
refuse 1 'backing-format vmdk' create x.qcow2 --data-file w.raw --backing-file c.qcow2 \
	--backing-format vmdk
ok "create: unknown backing format"
refuse 1 'backing-file, too' create x.qcow2 --data-file w.raw --backing-format raw
ok "create: backing format without backing file"
refuse 1 'data-file-raw out' create x.qcow2 --data-file w.raw --data-file-raw \
	--backing-file base.raw --backing-format raw
ok "create: backing file with raw data"
refuse 1 'once' create x.qcow2 --data-file w.raw --backing-format raw \
	--backing-file base.raw --backing-file base.raw
ok "create: two backing files"
refuse 4 'the same' create x.qcow2 --data-file w.raw --backing-file w.raw --backing-format raw
ok "create: data is its own backing file"
refuse 4 'no such file' create x.qcow2 --data-file w.raw --backing-file none --backing-format raw
ok "create: missing backing file"
truncate -s 1M short.raw
refuse 4 '1048576 bytes.*5000192' create x.qcow2 --data-file short.raw \
	--backing-file base.raw --backing-format raw
ok "create: data is smaller than the backing file"
[ ! -e x.qcow2 ]
ok "create: nothing is left of what was refused"

#
# info
#
image 1G
qemu-img info --output=json t.qcow2 | jq -S 'del(."full-backing-filename")' >want
run info --json t.qcow2 && jq -S 'del(."dm-qcow2")' out >got && cmp want got
ok "info: same JSON as qemu-img"
jq -e '."dm-qcow2".mappable == "read-write" and ."dm-qcow2".reasons == []' out >/dev/null
ok "info: can be opened"
qemu-img bitmap --add t.qcow2 'bit"map' && qemu-img bitmap --add --disable t.qcow2 b2
qemu-img info --output=json t.qcow2 | jq -S . >want
run info --json t.qcow2 && jq -S 'del(."dm-qcow2")' out >got && cmp want got
ok "info: same JSON as qemu-img, with bitmaps"
rm t.raw
run info t.qcow2 && grep -q 'data file: t.raw' out && grep -q 'bitmap: b2' out
ok "info: data file need not exist"

image 1G ,data_file_raw=on,cluster_size=4k,refcount_bits=64,lazy_refcounts=on
qemu-img info --output=json t.qcow2 | jq -S . >want
run info --json t.qcow2 && jq -S 'del(."dm-qcow2")' out >got && cmp want got
ok "info: same JSON as qemu-img, other options"

qemu-img create -q -f raw base.raw 1G
qemu-img create -q -f qcow2 -b base.raw -F raw o.qcow2
qemu-img info --output=json o.qcow2 | jq -S 'del(."full-backing-filename")' >want
run info --json o.qcow2 && jq -S 'del(."dm-qcow2")' out >got && cmp want got &&
	jq -e '[."dm-qcow2".reasons[].cause] == ["image has no external data file"]' \
		out >/dev/null
ok "info: image with a backing file"
qemu-img create -q -f qcow2 -o compat=0.10 o.qcow2 1G
qemu-img info --output=json o.qcow2 | jq -S . >want
run info --json o.qcow2 && jq -S 'del(."dm-qcow2")' out >got && cmp want got &&
	jq -e '."dm-qcow2".mappable == "no"' out >/dev/null
ok "info: version 2"
qemu-img create -q -f qcow2 o.qcow2 1M
poke o.qcow2 35 02
run info o.qcow2 && grep -q 'encryption: luks' out && grep -q 'is encrypted' out
ok "info: encrypted"
qemu-img create -q -f qcow2 o.qcow2 1M && qemu-img snapshot -c one o.qcow2
run info o.qcow2 && grep -q '1 internal snapshots' out
ok "info: snapshots"
image 1G ,extended_l2=on
run info --json t.qcow2 &&
	jq -e '."dm-qcow2".mappable == "read-write" and ."format-specific".data."extended-l2"' \
		out >/dev/null
ok "info: extended L2"

overlay raw
qemu-img info --output=json t.qcow2 | jq -S 'del(."full-backing-filename")' >want
run info --json t.qcow2 && jq -S 'del(."dm-qcow2")' out >got && cmp want got &&
	jq -e '."dm-qcow2".mappable == "read-write"' out >/dev/null
ok "info: overlay"
qemu-img rebase -u -F vmdk -b b.raw t.qcow2
run info t.qcow2 && grep -q 'can be opened: no' out && grep -q 'format vmdk;.*rebase' out
ok "info: backing file of another format"
# the extension with the format becomes one that nobody knows
python3 -c '
b = open("t.qcow2", "r+b")
i = b.read(4096).find(bytes.fromhex("e2792aca"))
b.seek(i)
b.write(b"\x12\x34\x56\x78")'
run info t.qcow2 && grep -q 'not recorded.*rebase -u' out
ok "info: backing file without a format"
refuse 4 'not recorded' table t.qcow2 --data-file t.raw --backing-file b.raw
ok "table: backing file without a format"
# A place for the name, and no name: there is none.
for raw in off on; do
	image 4M ",data_file_raw=$raw"
	truncate -s 4M t.raw
	poke t.qcow2 8 0000000000008000
	qemu-img info --output=json t.qcow2 | jq 'has("backing-filename")' >want
	run info t.qcow2 --json && jq 'has("backing-filename")' out | cmp - want &&
		run info t.qcow2 && ! grep -q '^backing' out && check t.qcow2 &&
		exits 0 check t.qcow2
	ok "info, check: backing file without a name, raw $raw"
done
run info t.qcow2 && grep -q 'can be opened: read-write' out
ok "info: raw data, and a backing file without a name"
image 4M
poke t.qcow2 8 0000000000008000
run info t.qcow2 && grep -q 'can be opened: read-write' out &&
	run resize t.qcow2 --size 8M && check t.qcow2 && [ "$(hex -j 8 -N 8 t.qcow2)" = 0000000000008000 ]
ok "resize: backing file without a name"

# flags of the header
for bit in 1:corrupt 0:dirty; do
	image 1G
	poke t.qcow2 79 "$(printf '%02x' $((4 | 1 << ${bit%:*})))"
	run info --json t.qcow2 &&
		jq -e '."dm-qcow2".mappable == "read-only"' out >/dev/null &&
		run info t.qcow2 && grep -q "^${bit#*:}: yes" out
	ok "info: ${bit#*:}"
done
image 1G
poke t.qcow2 72 01
run info --json t.qcow2 && jq -e '."dm-qcow2".mappable == "no" and
	(."dm-qcow2".reasons[0].cause | test("bit 56"))' out >/dev/null
ok "info: unknown feature"
poke t.qcow2 128 "6803f857000000300038$(printf 'e\x1bvil' | hex)"
poke t.qcow2 143 "$(printf '00%.0s' {1..49})"
run info t.qcow2 && grep -qF 'bit 56 (e\x1bvil)' out
ok "info: unknown feature with a hostile name"

# hostile names
name=$'n\n\x1b[31m"\\\xff\xc3\xa4'
rm -f t.qcow2 hex
image 1G
poke t.qcow2 112 "44415441$(printf '%08x' ${#name})"
python3 - "$name" <<'PYTHON' >hex
import os, sys
print(os.fsencode(sys.argv[1]).hex())
PYTHON
poke t.qcow2 116 "$(printf '%08x' $(($(wc -c <hex) / 2)))"
poke t.qcow2 120 "$(cat hex)"
poke t.qcow2 $((120 + ($(wc -c <hex) / 2 + 7) / 8 * 8)) 0000000000000000
run info t.qcow2 && ! grep -q $'\x1b' out &&
	grep -qF 'data file: n\x0a\x1b[31m"\\\xff\xc3\xa4' out
ok "info: hostile name, escaped"
run info --json t.qcow2 && python3 -c '
import json
d = json.load(open("out", encoding="utf-8"))
assert d["format-specific"]["data"]["data-file"] == "n\n\x1b[31m\"\\\ufffd\xe4"'
ok "info: hostile name in valid JSON"

for kind in 'short:truncate -s 100 t.qcow2:too short' \
	'cut cluster:truncate -s 65535 t.qcow2:too short' \
	'magic:poke t.qcow2 0 00:not a qcow2' \
	'version:poke t.qcow2 7 09:version 9' \
	'cluster bits:poke t.qcow2 23 08:cluster_bits' \
	'header length:poke t.qcow2 103 71:header_length' \
	'backing name:poke t.qcow2 8 ffffffffffffffff:backing' \
	'extension length:poke t.qcow2 116 7fffffff:longer than' \
	'NUL in a name:poke t.qcow2 112 444154410000000574002e7261:NUL'; do
	IFS=: read -r what how text <<<"$kind"
	image 1G
	$how
	refuse 4 "$text" info t.qcow2
	ok "info: malformed: $what"
done
for kind in 'L1 offset:poke t.qcow2 40 0000000000030200:L1 table offset' \
	'L1 beyond:poke t.qcow2 40 0000000010000000:beyond' \
	'L1 cut:truncate -s 196616 t.qcow2:beyond' \
	'L1 small:poke t.qcow2 36 00000001:too small' \
	'L1 on reftable:poke t.qcow2 40 0000000000010000:overlaps' \
	'reftable offset:poke t.qcow2 48 0000000000010001:refcount table' \
	'reftable empty:poke t.qcow2 56 00000000:empty' \
	'reftable large:poke t.qcow2 56 00000081:larger' \
	'refcount order:poke t.qcow2 96 00000007:refcount_order' \
	'size:poke t.qcow2 24 0200000000000000:2^56'; do
	IFS=: read -r what how text <<<"$kind"
	image 1G
	$how
	run info t.qcow2 && grep -q '^can be opened: no' out && grep -q "$text" out
	ok "info: impossible: $what"
done
refuse 4 'not a qcow2' info data.raw
ok "info: raw file"
refuse 4 'no such file' info none
ok "info: missing file"
refuse 4 'regular file' info .
ok "info: a folder"
mkfifo fifo
refuse 4 'regular file' info fifo
ok "info: a FIFO does not block"

#
# table, and what open finds wrong before it needs a device
#
image 1G
refuse 4 'losetup' table t.qcow2 --data-file t.raw
ok "table: files are refused, with a hint"
refuse 1 't.raw' table t.qcow2
ok "table: recorded name is not followed"
refuse 4 'same file' table t.qcow2 --data-file t.qcow2
ok "table: image is its own data"
truncate -s 1023M t.raw
refuse 4 '1072693248 bytes.*1073741824.*truncate' table t.qcow2 --data-file t.raw
ok "table: data too small, both sizes are named"
refuse 4 'no such file' table t.qcow2 --data-file none
ok "table: missing data"

#
# Backing files: what is refused before a device is needed
#
overlay raw
refuse 1 'image says b.raw' table t.qcow2 --data-file t.raw
ok "chain: recorded backing file is not followed"
refuse 4 'no such file' table t.qcow2 --data-file t.raw --backing-file none
ok "chain: missing backing file"
refuse 4 'losetup' table t.qcow2 --data-file t.raw --backing-file b.raw
ok "chain: table takes devices only"
refuse 4 'two places' table t.qcow2 --data-file t.raw --backing-file t.raw
ok "chain: data is its own backing file"
refuse 4 'two places' table t.qcow2 --data-file t.raw --backing-file t.qcow2
ok "chain: image is its own backing file"
refuse 1 'no data file' table t.qcow2 --data-file t.raw --backing-file b.raw,data-file=x
ok "chain: raw backing file with a data file"
image 1G
refuse 1 'no backing file' table t.qcow2 --data-file t.raw --backing-file b.raw
ok "chain: image without backing file"
overlay qcow2
refuse 1 'image says b.data' table t.qcow2 --data-file t.raw --backing-file b.qcow2
ok "chain: data file of a backing image is not named"
refuse 4 'same file' table t.qcow2 --data-file t.raw \
	--backing-file b.qcow2,data-file=b.qcow2
ok "chain: backing image is its own data"
refuse 4 'two places' table t.qcow2 --data-file t.raw --backing-file b.qcow2,data-file=t.raw
ok "chain: one data file for two images"
refuse 4 'not a qcow2' table t.qcow2 --data-file t.raw --backing-file b.data,data-file=b.qcow2
ok "chain: backing image is none"
refuse 1 'no backing file.*more' table t.qcow2 --data-file t.raw \
	--backing-file b.qcow2,data-file=b.data --backing-file more
ok "chain: more backing files than the chain has"
refuse 4 'qcow2setup open' table t.qcow2 --data-file t.raw --backing-file b.qcow2,data-file=b.data
ok "chain: table does not open images"
truncate -s 1M b.data
refuse 4 '1048576 bytes.*3145728' table t.qcow2 --data-file t.raw \
	--backing-file b.qcow2,data-file=b.data
ok "chain: data of a backing image is too small"
truncate -s 3M b.data
qemu-img create -q -f qcow2 b.qcow2 3M
refuse 4 'qemu-nbd' table t.qcow2 --data-file t.raw --backing-file b.qcow2,data-file=b.data
ok "chain: ordinary backing image"
overlay qcow2
qemu-img rebase -u -F qcow2 -b t.qcow2 b.qcow2
refuse 4 'two places' table t.qcow2 --data-file t.raw \
	--backing-file b.qcow2,data-file=b.data --backing-file t.qcow2,data-file=t.raw
ok "chain: goes round"
many=()
for _ in {1..33}; do many+=(--backing-file b.raw); done
refuse 1 'more than 32' table t.qcow2 --data-file t.raw "${many[@]}"
ok "chain: too many backing files"

image 1G
held t.qcow2 refuse 5 'locked' table t.qcow2 --data-file t.raw
ok "table: image is in use by QEMU"
held t.qcow2 run info t.qcow2
ok "info: image is in use by QEMU"
cp t.qcow2 u.qcow2
held t.raw refuse 5 'locked' table u.qcow2 --data-file t.raw
ok "table: data is in use by QEMU"
overlay raw
held b.raw refuse 5 'locked' table t.qcow2 --data-file t.raw --backing-file b.raw
ok "chain: backing file is in use by QEMU"
overlay qcow2
held b.qcow2 refuse 5 'locked' table t.qcow2 --data-file t.raw \
	--backing-file b.qcow2,data-file=b.data
ok "chain: backing image is in use by QEMU"

#
# What open and close do to an image
#
for cluster in "${sizes[@]}"; do
	for bits in "${widths[@]}"; do
		# enough for the refcount table to grow, but QEMU is slow with so many
		size=1G
		[ "$cluster" != 512 ] || size=128M
		image $size ",cluster_size=$cluster,refcount_bits=$bits"
		[ "$cluster" = 2M ] || qemu-io -c 'write -P 9 3M 5M' t.qcow2 >/dev/null
		cp t.qcow2 before.qcow2
		prepare_steps undo t.qcow2 && cmp t.qcow2 before.qcow2
		ok "prepare: undone, $cluster clusters, $bits bits"
		prepare_steps prepare t.qcow2 && check t.qcow2 &&
			same t.qcow2 before.qcow2
		ok "prepare: clean and equal, $cluster clusters, $bits bits"
		# QEMU fills it up: nothing of that may need a longer file
		bytes=$(stat -c %s t.qcow2)
		cp t.qcow2 full.qcow2
		qemu-io -c "write -z 0 $size" full.qcow2 >out 2>err && check full.qcow2 &&
			[ "$(stat -c %s full.qcow2)" -le "$bytes" ]
		ok "prepare: QEMU needs no more room, $cluster clusters, $bits bits"
		cp t.qcow2 twice.qcow2
		prepare_steps prepare twice.qcow2 && cmp t.qcow2 twice.qcow2
		ok "prepare: nothing to do the second time, $cluster clusters, $bits bits"
		prepare_steps trim t.qcow2 && check t.qcow2 &&
			same t.qcow2 before.qcow2 &&
			[ "$(stat -c %s t.qcow2)" -lt $(($(stat -c %s before.qcow2) + 2200000)) ]
		ok "trim: clean, equal and short, $cluster clusters, $bits bits"
	done
done

# Unknown autoclear bits go, the others stay.
image 1G ,data_file_raw=on
poke t.qcow2 88 8000000000000006
prepare_steps prepare t.qcow2 && [ "$(hex -j 88 -N 8 t.qcow2)" = 0000000000000002 ]
ok "prepare: unknown autoclear bits are cleared, the raw bit is kept"
image 1G
poke t.qcow2 95 01
prepare_steps prepare t.qcow2 && [ "$(hex -j 88 -N 8 t.qcow2)" = 0000000000000000 ] &&
	grep -q warning err
ok "prepare: bitmaps bit without bitmaps is cleared"

# Bitmaps that record by themselves are marked, others are not.
image 1G
qemu-img bitmap --add t.qcow2 auto1
qemu-img bitmap --add --disable t.qcow2 manual
qemu-img bitmap --add t.qcow2 auto2
cp t.qcow2 before.qcow2
prepare_steps prepare t.qcow2 &&
	grep -q 'bitmap auto1 ' err && grep -q 'bitmap auto2 ' err &&
	! grep -q manual err && check t.qcow2 &&
	[ "$(qemu-img info --output=json t.qcow2 | jq -c \
		'[."format-specific".data.bitmaps[] | [.name, .flags]] | sort')" = \
	'[["auto1",["in-use","auto"]],["auto2",["in-use","auto"]],["manual",[]]]' ]
ok "prepare: automatic bitmaps are marked as in use"
prepare_steps prepare t.qcow2 && ! grep -q warning err
ok "prepare: marked bitmaps are not mentioned again"
prepare_steps trim t.qcow2 && check t.qcow2
ok "trim: with bitmaps"
cp before.qcow2 t.qcow2
prepare_steps undo t.qcow2 && cmp t.qcow2 before.qcow2
ok "prepare: bitmaps, undone"
bitmaps=$(python3 -c '
import struct
b = open("before.qcow2", "rb").read()
i = b.find(bytes.fromhex("2385287500000018"))
print(struct.unpack(">Q", b[i + 24:i + 32])[0])')
poke t.qcow2 $((bitmaps + 16)) 05
cp t.qcow2 before.qcow2
! prepare_steps prepare t.qcow2 && grep -q 'unknown type' err
ok "prepare: malformed bitmap directory is refused"

image 1G
qemu-img bitmap --add t.qcow2 b
table=$(python3 -c '
import struct
b = open("t.qcow2", "rb").read()
i = b.find(bytes.fromhex("2385287500000018"))
d = struct.unpack(">Q", b[i + 24:i + 32])[0]
print(struct.unpack(">Q", b[d:d + 8])[0])')
poke t.qcow2 "$table" 0000040000000000
cp t.qcow2 before.qcow2
! prepare_steps prepare t.qcow2 && grep -q 'bitmap refers' err &&
	cmp t.qcow2 before.qcow2
ok "prepare: bitmap beyond the end of the file is refused"

#
# Whatever QEMU makes can be prepared, and is the same afterwards.
#
# prepared NAME: t.qcow2, whose content is that of t.want
prepared() {
	cp t.qcow2 before.qcow2
	run info --json t.qcow2 &&
		jq -e '."dm-qcow2".mappable == "read-write"' out >/dev/null &&
		prepare_steps undo t.qcow2 && cmp t.qcow2 before.qcow2 &&
		prepare_steps prepare t.qcow2 && check t.qcow2 &&
		same -f qcow2 -F raw t.qcow2 t.want &&
		prepare_steps trim t.qcow2 && check t.qcow2 &&
		same -f qcow2 -F raw t.qcow2 t.want &&
		[ "$(extensions t.qcow2)" = "$(extensions before.qcow2)" ]
	ok "QEMU's: $1"
}

# All of the header cluster but the fields that change.
extensions() {
	python3 -c '
import sys
h = open(sys.argv[1], "rb").read(65536)
print(hash(0), h[:48].hex(), h[60:88].hex(), h[96:1 << h[23]].hex())' "$1"
}

truncate -s 10000384 t.want
for cluster in "${sizes[@]}"; do
	for mode in metadata falloc full; do
		image 10000384 ",cluster_size=$cluster,preallocation=$mode"
		prepared "preallocation=$mode, $cluster clusters"
	done
done
for mode in off metadata falloc full; do
	image 10000384 ",extended_l2=on,preallocation=$mode"
	prepared "preallocation=$mode, extended L2"
	image 10000384 ",data_file_raw=on,preallocation=$mode"
	prepared "preallocation=$mode, raw"
done
(yes some; :) | head -c 3000000 >t.want
truncate -s 7M t.want
yes other | head -c 99999 | dd of=t.want bs=1 seek=5M conv=notrunc status=none
for options in '' ,cluster_size=512 ,extended_l2=on ,data_file_raw=on \
	,extended_l2=on,data_file_raw=on,cluster_size=16k; do
	rm -f t.qcow2 t.raw
	qemu-img convert -f raw -O qcow2 -o "data_file=t.raw$options" t.want t.qcow2
	prepared "convert$options"
done
image 7M ,lazy_refcounts=on
qemu-img convert -n -f raw -O qcow2 t.want t.qcow2
prepared "lazy refcounts"
for change in lazy_refcounts=on refcount_bits=64 refcount_bits=1; do
	image 7M
	qemu-img convert -n -f raw -O qcow2 t.want t.qcow2
	qemu-img amend -q -f qcow2 -o $change t.qcow2
	prepared "amend $change"
done
image 7M ,data_file_raw=on
qemu-img convert -n -f raw -O qcow2 t.want t.qcow2
qemu-img amend -q -f qcow2 -o data_file_raw=off t.qcow2
prepared "amend data_file_raw=off"
image 5M
qemu-img resize -q t.qcow2 7M
qemu-img convert -n -f raw -O qcow2 t.want t.qcow2
prepared "resize, larger"
image 100M ,cluster_size=512
qemu-io -c 'write -q 90M 1M' t.qcow2
qemu-img resize -q --shrink t.qcow2 7M
qemu-img convert -n -f raw -O qcow2 t.want t.qcow2
prepared "resize, smaller"
overlay raw
qemu-io -c 'write -q -P 9 2M 1500K' t.qcow2
qemu-img convert -O raw t.qcow2 t.want
prepared "overlay"
qemu-img rebase -q -b '' t.qcow2
prepared "rebase, without a backing file"
overlay qcow2 ,extended_l2=on
qemu-io -c 'write -q -P 9 2M 700K' -c 'write -q -z 100K 70K' t.qcow2
qemu-img convert -O raw t.qcow2 t.want
prepared "overlay of an image, extended L2"
qemu-img commit -q t.qcow2
qemu-img convert -O raw b.qcow2 t.want
mv b.qcow2 t.qcow2
prepared "commit"
for bits in 1 40 63; do
	image 7M
	poke t.qcow2 80 "$(printf '%016x' $((1 << bits)))"
	truncate -s 7M t.want
	qemu-img convert -O raw t.qcow2 t.want
	prepared "unknown compatible bit $bits"
done
# a header with fields that are not known, and an extension that is not
image 7M
python3 -c '
import struct
f = open("t.qcow2", "r+b")
h = f.read(4096)
known = h[112:h.find(bytes(8), 112 + 16)]
f.seek(100)
f.write(struct.pack(">I", 144))
f.seek(112)
f.write(b"unknown header fields, 32 bytes." + struct.pack(">II", 0x12345678, 5) +
        b"mine!\1\2\3" + known + bytes(16))'
run info t.qcow2 && grep -q 'unknown header extensions: 1' out
ok "info: longer header, unknown extension"
prepared "longer header, unknown extension"
image 7M
poke t.qcow2 79 05
cp t.qcow2 before.qcow2
! prepare_steps prepare t.qcow2 && run info t.qcow2 &&
	grep -q 'dirty.*; repair it with qcow2setup check --repair all' out &&
	cmp t.qcow2 before.qcow2
ok "dirty image is refused, with a remedy"

# Entries that would make the kernel write to the wrong place.
for kind in 'L1 unaligned:196608:8000000000040200:multiple' \
	'L1 reserved:196608:8100000000040000:reserved' \
	'L1 beyond:196608:8000000010000000:beyond' \
	'L1 on reftable:196608:8000000000010000:another' \
	'L1 on refcounts:196608:8000000000020000:another' \
	'refcounts unaligned:65536:0000000000020200:multiple' \
	'refcounts reserved:65536:0000000000020001:reserved' \
	'refcounts beyond:65536:0000000100000000:beyond' \
	'refcounts on L1:65536:0000000000030000:another'; do
	IFS=: read -r what offset hex text <<<"$kind"
	image 1G
	poke t.qcow2 "$offset" "$hex"
	truncate -s 262144 t.qcow2
	cp t.qcow2 before.qcow2
	! prepare_steps prepare t.qcow2 && grep -q "$text" err &&
		cmp t.qcow2 before.qcow2
	ok "prepare: $what is refused, nothing changes"
done
image 1G
qemu-io -c 'write 0 4k' -c 'write 600M 4k' t.qcow2 >/dev/null
python3 -c '
f = open("t.qcow2", "r+b")
f.seek(196608)
e = f.read(8)
f.write(e)'
! prepare_steps prepare t.qcow2 && grep -q 'another' err
ok "prepare: L2 table that is used twice is refused"

# remedies that the tool prints are done as they are printed
# remedy FILE: the command of qcow2setup that it names, to run with an image
remedy() {
	grep -o 'qcow2setup check --repair [a-z]*' "$1" | head -n 1 | cut -d ' ' -f 2-
}
for how in mark 'mark and data elsewhere' 'refcount table entry' 'refcount table'; do
	image 1G
	qemu-io -c 'write 0 128k' t.qcow2 >/dev/null
	case $how in
	mark*)	poke t.qcow2 79 06 ;;
	*entry)	poke t.qcow2 65536 0000000000020100 ;;
	ref*)	poke t.qcow2 56 00000000 ;;
	esac
	# The second cluster of data is said to be where the first one is.
	[[ $how != *elsewhere ]] || poke t.qcow2 262152 8000000000000000
	if [ "$how" = 'refcount table entry' ]; then
		! run resize t.qcow2 --size 2G && cp err says
	else
		run info t.qcow2 && cp out says
	fi
	! grep -q 'qemu-img check' says && fix=$(remedy says) && [ -n "$fix" ]
	ok "remedy: $how: the project's own check"
	# shellcheck disable=SC2086 # words are wanted
	run $fix t.qcow2
	status=$?
	run info t.qcow2 && cp out says
	if [ $status -eq 0 ]; then
		grep -q 'can be opened: read-write' says && run check t.qcow2
	else
		! grep -q 'can be opened: read-write' says && ! run check t.qcow2
	fi
	ok "remedy: $how: read-write if, and only if, no fault is left"
	[[ $how = *elsewhere ]] || [ $status -eq 0 ]
	ok "remedy: $how: what can be repaired is"
done
image 1G
qemu-io -c 'write 0 128k' t.qcow2 >/dev/null
poke t.qcow2 196608 8000000000040100
refuse 4 'L1 entry 0.*; see what qcow2setup check says, and restore' resize t.qcow2 --size 2G &&
	exits 2 check t.qcow2 --repair all && grep -q 'L1 entry 0' err
ok "remedy: an L1 entry that nobody can repair"
# No option that the action does not take
image 1G
poke t.qcow2 79 06
for action in 'resize t.qcow2 --size 2G' 'table t.qcow2 --data-file t.raw'; do
	# shellcheck disable=SC2086 # words are wanted
	run $action
	case $action in
	resize*)	! grep -q -e '--readonly' err ;;
	table*)		grep -q -e '--readonly' err ;;
	esac && grep -q 'qcow2setup check --repair all' err
	ok "remedy: options of ${action%% *} only"
done
image 1G
refuse 1 '--data-file DEV|FILE (the image says t.raw)$' table t.qcow2
ok "remedy: table has no --trust-image-paths"

# trim never cuts what something refers to, even if refcounts deny it
image 1G
qemu-io -c 'write -P 1 0 4k' t.qcow2 >/dev/null
size=$(stat -c %s t.qcow2)
poke t.qcow2 131072 "$(printf '00%.0s' {1..64})"
prepare_steps trim t.qcow2
[ "$(stat -c %s t.qcow2)" -eq "$size" ]
ok "trim: keeps what has no refcount but is used"
image 1G
truncate -s 10M t.qcow2
poke t.qcow2 79 06
prepare_steps trim t.qcow2
[ "$(stat -c %s t.qcow2)" -eq $((10 << 20)) ]
ok "trim: leaves a corrupt image alone"

#
# Command line
#
refuse 1 'no action' ; ok "no action"
refuse 1 'not known' frobnicate ; ok "unknown action"
refuse 1 'not known' info --frobnicate t.qcow2 ; ok "unknown option"
refuse 1 'needs a value' create x --data-file ; ok "option without value"
refuse 1 'number of arguments' info ; ok "too few arguments"
refuse 1 'number of arguments' info a b ; ok "too many arguments"
refuse 1 'takes no option --json' create --json x ; ok "option of another action"
refuse 1 'is not possible' measure --size 1G --refcount-bits 16B ; ok "bits are no size"
refuse 1 'cannot be the name' open t.qcow2 a/b --data-file t.raw
ok "open: impossible name"
refuse 1 'too long' open t.qcow2 "$long" --data-file t.raw
ok "open: long name"
! run backup end no-such && grep -Eq 'device-mapper|no-such: (no|has gone|is not)' err && ! grep -q memory err
ok "backup end: without device-mapper, or of no device"
run --help && grep -q '^Usage' out && [ ! -s err ] ; ok "--help"
run --version && grep -q '^qcow2setup [0-9]' out ; ok "--version"

# An action's help has its own usage, options and an example; manual.sh holds the manual
# pages against it.
run help && cp out general
mapfile -t actions < <(sed -n '/^Actions:/,/^$/s/^  \([a-z]*\) .*/\1/p' out)
[ ${#actions[@]} -ge 10 ] ; ok "help: actions"
for action in "${actions[@]}"; do
	run "$action" --help && [ ! -s err ] && cp out help &&
		grep -q "^Usage: qcow2setup $action" out &&
		grep -A1 '^Example:' out | grep -q "qcow2setup $action " &&
		! cmp -s out general ; ok "help: $action --help"
	run help "$action" && cmp -s out help ; ok "help: help $action"
	[ -z "$(grep -o '^  --[a-z0-9-]*' help | sort | uniq -d)" ]
	ok "help: each option of $action once"
done
refuse 1 'not known' help frobnicate ; ok "help: unknown action"
refuse 1 'number of arguments' help a b ; ok "help: too many arguments"
refuse 1 'see qcow2setup help create' create --json x ; ok "help: named by a refusal"
run --readonly --help && cmp -s out general ; ok "help: options but no action"
"${tool[@]}" info --json t.qcow2 >/dev/full 2>err
[ $? -eq 4 ] ; ok "a full disk does not look like success"

finish offline
