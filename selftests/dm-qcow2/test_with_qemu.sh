#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# Whatever qemu-img makes of an image with an external data file works on the
# device: the same content, writes of all kinds, and an image that QEMU likes as
# before. What the header says and the target does not need is preserved.

# shellcheck source=common.sh
. "$(dirname "$0")/common.sh"

name=$prefix-d
size=$((5 << 20))
# options of qcow2setup open
more=()

# fresh [OPTION,...]: $dir/i.qcow2 with something of every state, made by QEMU
fresh()
{
	image i "$size" "${1-}"
	qemu-io -c 'write -q -P 1 100k 700k' -c 'write -q -z 300k 128k' \
		-c 'write -q -z -u 512k 64k' -c 'write -q -P 2 3M 512' "$dir/i.qcow2"
}

# overlay [OPTION,...]: as fresh, over $dir/base
overlay()
{
	yes base | head -c $((4 << 20)) > "$dir/base"
	qemu-img create -q -f qcow2 -b "$dir/base" -F raw \
		-o "data_file=$dir/i.data${1:+,$1}" "$dir/i.qcow2" "$size"
	yes POISON | head -c "$size" | dd of="$dir/i.data" conv=notrunc status=none
	qemu-io -c 'write -q -P 1 100k 700k' -c 'write -q -z 2M 128k' "$dir/i.qcow2"
	more=(--backing-file "$dir/base")
}

# What of the header cluster the target and the tool have no business with.
others()
{
	python3 -c 'import sys
h = open(sys.argv[1], "rb").read(65536)
print(h[:40].hex(), h[48:56].hex(), h[60:88].hex(), h[96:1 << h[23]].hex())' "$dir/i.qcow2"
}

# works: the image of $dir/i.qcow2
works()
{
	local header at requests

	qemu-img check -q "$dir/i.qcow2"
	qemu-img convert -O raw "$dir/i.qcow2" "$dir/want"
	size=$(stat -c %s "$dir/want")
	truncate -s "$size" "$dir/i.data"
	header=$(others)
	"$tool" open "$dir/i.qcow2" "$name" --data-file "$dir/i.data" "${more[@]}" 2> "$dir/err"
	cmp "$dir/want" "/dev/mapper/$name"
	# the old end, parts of clusters of each state, whole ones, the end
	requests=(-c 'write -q -z 2200k 300k' -c 'write -q -P 3 1500k 200k')
	for at in 1 250 320 520 1000 2048 3073 4097 $((size / 1024 - 3)); do
		requests+=(-c "write -q -P $((at % 251 + 4)) ${at}k 3k")
	done
	qemu-io -f raw -n "${requests[@]}" -c 'discard -q 640k 128k' "/dev/mapper/$name"
	qemu-io -f raw "${requests[@]}" -c 'write -q -z 640k 128k' "$dir/want"
	cmp "$dir/want" "/dev/mapper/$name"
	"$tool" close "$name"
	[ "$header" = "$(others)" ] || fault "the header has changed: $header, now $(others)"
	good_image i "$dir/want"
}

preallocated()
{
	image i "$size" "preallocation=$1,$2"
	works
}

converted()
{
	fresh
	mv "$dir/i.qcow2" "$dir/from.qcow2"
	mv "$dir/i.data" "$dir/from.data"
	qemu-img amend -q -o "data_file=$dir/from.data" --image-opts \
		"driver=qcow2,file.filename=$dir/from.qcow2,data-file.filename=$dir/from.data"
	qemu-img convert -f qcow2 -O qcow2 -o "data_file=$dir/i.data,$1" "$dir/from.qcow2" "$dir/i.qcow2"
	works
}

amended()
{
	fresh "$2"
	qemu-img amend -q -f qcow2 -o "$1" "$dir/i.qcow2"
	works
}

# resized FROM TO [OPTION]: with something at the old end
resized()
{
	image i "$1" cluster_size=4k
	qemu-io -c 'write -q -P 1 100k 700k' -c "write -q -P 4 $(($1 - 5000 & ~511)) 512" "$dir/i.qcow2"
	qemu-img resize -q ${3:+"$3"} -f qcow2 "$dir/i.qcow2" "$2"
	works
}

rebased()
{
	overlay "$1"
	yes other | head -c $((3 << 20)) > "$dir/other"
	qemu-img rebase -q -f qcow2 ${2:+-F raw} -b "${2:+$dir/other}" "$dir/i.qcow2"
	more=(${2:+--backing-file "$dir/other"})
	works
}

committed()
{
	fresh "$1"
	qemu-img create -q -f qcow2 -b "$dir/i.qcow2" -F qcow2 "$dir/top.qcow2"
	qemu-io -c 'write -q -P 7 300k 400k' -c 'write -q -z 1M 200k' "$dir/top.qcow2"
	qemu-img commit -q -f qcow2 "$dir/top.qcow2"
	works
}

over()
{
	overlay "$1"
	works
}

# with_bitmaps TEXT FLAGS [OPTION]: what open says, and the flags that one has then that records
with_bitmaps()
{
	fresh
	qemu-img bitmap --add "$dir/i.qcow2" enabled
	qemu-img bitmap --add --disable "$dir/i.qcow2" disabled
	more=(${3:+"$3"})
	works
	grep -q "$1" "$dir/err" || fault "it says: $(< "$dir/err")"
	qemu-img info --output=json "$dir/i.qcow2" > "$dir/info" 2> "$dir/err" || fault "$(< "$dir/err")"
	json "$dir/info" "[(b['name'], b['flags']) for b in j['format-specific']['data']['bitmaps']] \
		== [('enabled', $2), ('disabled', [])]"
}

unknown_bit()
{
	fresh
	poke "$dir/i.qcow2" 80 "$(printf '%016x' $((1 << 63 | 1 << 5)))"
	works
}

# A header with fields and an extension that no one knows
long_header()
{
	fresh
	python3 -c 'import struct, sys
f = open(sys.argv[1], "r+b")
h = f.read(4096)
known = h[112:h.index(bytes(8), 128)]
f.seek(100)
f.write(struct.pack(">I", 144))
f.seek(112)
f.write(b"unknown header fields, 32 bytes." + struct.pack(">II", 0x12345678, 5) +
        b"mine!\1\2\3" + known + bytes(16))' "$dir/i.qcow2"
	works
}

dirty()
{
	fresh lazy_refcounts=on
	poke "$dir/i.qcow2" 79 05
	refused 4 'dirty.*check --repair' "$tool" open "$dir/i.qcow2" "$name" --data-file "$dir/i.data"
	"$tool" check --repair all "$dir/i.qcow2" > "$dir/out"
	works
}

need_tool
start cmp
for mode in metadata falloc full; do
	check "preallocation=$mode" preallocated "$mode" cluster_size=4k
done
check "preallocation=falloc, extended L2" preallocated falloc extended_l2=on
check "convert" converted cluster_size=4k
check "convert, extended L2" converted extended_l2=on
check "convert, raw" converted data_file_raw=on
check "amend lazy_refcounts=on" amended lazy_refcounts=on ''
check "amend refcount_bits=64" amended refcount_bits=64 cluster_size=512
check "amend data_file_raw=off" amended data_file_raw=off data_file_raw=on
check "resize, larger" resized $((3 << 20)) $((6 << 20))
check "resize, smaller" resized $((9 << 20)) $((5 << 20)) --shrink
check "rebase" rebased '' other
check "rebase, to nothing" rebased extended_l2=on ''
check "commit" committed cluster_size=4k
check "commit, extended L2" committed extended_l2=on
check "overlay" over cluster_size=16k
check "bitmaps, which are kept" with_bitmaps 'recorded in 1 bitmap$' "['auto']"
check "bitmaps, which are dropped" with_bitmaps 'warning: .*bitmap enabled' "['in-use', 'auto']" --drop-bitmaps
check "unknown compatible bits" unknown_bit
check "long header, unknown extension" long_header
check "dirty, and repaired" dirty
finish
