#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# Tests of the action bitmap, of bitmaps that grow with their image or are made ready
# for the kernel, and of power cuts on the way.  QEMU's tools are the judges.
#
#	bitmaps.sh [WRAPPER...] TOOL
#
# WRAPPER is, for example, valgrind with its options.

# A wrapper makes all slow, and finds what it can find in fewer combinations.
if [ $# -gt 1 ]; then
	layouts=(cluster_size=512 extended_l2=on)
else
	layouts=(cluster_size=512 cluster_size=4k cluster_size=64k "cluster_size=2M,refcount_bits=1"
		extended_l2=on "cluster_size=16k,extended_l2=on,refcount_bits=64"
		"cluster_size=4k,data_file_raw=on")
fi

# shellcheck source=tools/tests/lib.sh
. "$(dirname "$0")/lib.sh"

# counts FILE BITMAP: the sum of what the server tells is what list tells
counts() {
	[ "$(dirty "$1" "$2" | jq 'map(.[1]) | add // 0')" = \
		"$("${tool[-1]}" bitmap list "$1" --json | jq --arg b "$2" '.[] | select(.name == $b).count')" ]
}

# pair SIZE OPTIONS: t.qcow2 and q.qcow2, to be treated by the tool and by QEMU
pair() {
	image "$1" ",$2"
	cp t.qcow2 q.qcow2
}

#
# The actions, with the same done by qemu-img
#
for options in "${layouts[@]}"; do
	pair 20M "$options"
	qemu-img bitmap --add q.qcow2 a && run bitmap add t.qcow2 a && [ ! -s out ] && [ ! -s err ] && check t.qcow2 &&
		run check t.qcow2 && [ "$(infos t.qcow2)" = "$(infos q.qcow2)" ]
	ok "bitmap: $options: add, as qemu-img has it"
	refuse 5 'bitmap a already' bitmap add t.qcow2 a
	ok "bitmap: $options: add one that is there"
	run bitmap add t.qcow2 b --granularity 512 && qemu-img bitmap --add -g 512 q.qcow2 b &&
		run bitmap add t.qcow2 c --granularity 2G --disabled &&
		qemu-img bitmap --add --disable -g 2G q.qcow2 c &&
		check t.qcow2 && run check t.qcow2 && [ "$(infos t.qcow2)" = "$(infos q.qcow2)" ]
	ok "bitmap: $options: granularities"
	for file in t q; do
		qemu-io -c 'write -q 1M 1M' -c 'write -q 2600K 100K' -c 'write -q 19M 1M' $file.qcow2
	done
	check t.qcow2 && run check t.qcow2 && counts t.qcow2 a && counts t.qcow2 b && counts t.qcow2 c &&
		[ "$(dirty t.qcow2 b)" = '[[1048576,1048576],[2662400,102400],[19922944,1048576]]' ]
	ok "bitmap: $options: QEMU records in it"
	qemu-img bitmap --merge a q.qcow2 c && run bitmap merge t.qcow2 c a && check t.qcow2 && run check t.qcow2 &&
		[ "$(dirty t.qcow2 c)" = "$(dirty q.qcow2 c)" ] && [ "$(dirty t.qcow2 c)" = '[[0,20971520]]' ]
	ok "bitmap: $options: merge into a coarse one"
	for file in t q; do
		qemu-img bitmap --add --disable -g 4K $file.qcow2 d
	done
	qemu-img bitmap --merge a --merge b q.qcow2 d && run bitmap merge t.qcow2 d a b && check t.qcow2 &&
		run check t.qcow2 && [ "$(dirty t.qcow2 d)" = "$(dirty q.qcow2 d)" ] &&
		[ "$(dirty t.qcow2 d)" != '[]' ] && counts t.qcow2 d
	ok "bitmap: $options: merge two into a finer one"
	cp t.qcow2 before.qcow2
	run bitmap merge t.qcow2 d b && cmp t.qcow2 before.qcow2 && run bitmap merge t.qcow2 d d && cmp t.qcow2 before.qcow2
	ok "bitmap: $options: merge what is there: nothing is written"
	qemu-img bitmap --clear q.qcow2 b && run bitmap clear t.qcow2 b && check t.qcow2 && run check t.qcow2 &&
		[ "$(dirty t.qcow2 b)" = '[]' ] && [ "$(infos t.qcow2)" = "$(infos q.qcow2)" ]
	ok "bitmap: $options: clear"
	cp t.qcow2 before.qcow2
	run bitmap clear t.qcow2 b && cmp t.qcow2 before.qcow2
	ok "bitmap: $options: clear what is clear: nothing is written"
	qemu-img bitmap --disable q.qcow2 b && run bitmap disable t.qcow2 b && check t.qcow2 &&
		[ "$(infos t.qcow2)" = "$(infos q.qcow2)" ] && [ "$(cmp -l t.qcow2 before.qcow2 | wc -l)" -eq 1 ] &&
		qemu-img bitmap --enable q.qcow2 c && run bitmap enable t.qcow2 c && check t.qcow2 &&
		[ "$(infos t.qcow2)" = "$(infos q.qcow2)" ]
	ok "bitmap: $options: disable, enable: one byte"
	cp t.qcow2 before.qcow2
	run bitmap enable t.qcow2 c && cmp t.qcow2 before.qcow2
	ok "bitmap: $options: enable what records: nothing is written"
	qemu-io -c 'write -q 5M 64K' t.qcow2 && check t.qcow2 && [ "$(dirty t.qcow2 b)" = '[]' ] &&
		[ "$(dirty t.qcow2 c)" = '[[0,20971520]]' ] && counts t.qcow2 a
	ok "bitmap: $options: QEMU records in what records"
	for b in a c b; do
		run bitmap remove t.qcow2 $b && check t.qcow2 && run check t.qcow2 &&
			! infos t.qcow2 | grep -q "\"$b\""
		ok "bitmap: $options: remove $b"
	done
	run bitmap remove t.qcow2 d && check t.qcow2 && run check t.qcow2 && [ "$(infos t.qcow2)" = '[]' ] &&
		[ "$(lists t.qcow2)" = '[]' ] && run bitmap list t.qcow2 && [ ! -s out ] && [ ! -s err ] &&
		[ "$(hex -j 95 -N 1 t.qcow2)" = "$([[ $options = *raw=on* ]] && echo 02 || echo 00)" ]
	ok "bitmap: $options: remove the last one"
	length=$(stat -c %s t.qcow2)
	for ((n = 0; n < 8; n++)); do
		run bitmap add t.qcow2 n || break
		run bitmap remove t.qcow2 n || break
	done
	[ $n -eq 8 ] && [ "$(stat -c %s t.qcow2)" = "$length" ]
	ok "bitmap: $options: added and removed, the file does not grow"
done

# create, and what measure says of it
for options in "--cluster-size 512" "--cluster-size 64K" "--cluster-size 2M" --extended-l2 "--cluster-size 4K --data-file-raw" \
	"--backing-file b.raw --backing-format raw --cluster-size 512"; do
	rm -f t.qcow2 t.raw
	truncate -s 20M t.raw b.raw
	# shellcheck disable=SC2086 # words are wanted
	run create t.qcow2 --data-file t.raw $options --bitmap one --bitmap 'two,2,granularity=512' && check t.qcow2 &&
		run check t.qcow2 && [ "$(lists t.qcow2 | jq -c 'map([.[0], .[2], .[3]])')" = \
		'[["one",0,true],["two,2",0,true]]' ] && [ "$(lists t.qcow2 | jq '.[1][1]')" -eq 512 ]
	ok "create: $options: bitmaps"
	length=$(stat -c %s t.qcow2)
	[[ $options = *back* || $options = *raw* ]] || {
		# shellcheck disable=SC2086 # words are wanted
		run measure --size 20M $options --bitmap one --bitmap 'two,2,granularity=512' --json &&
			[ "$(jq .required out)" -eq "$length" ]
		ok "create: $options: as measure says"
	}
	qemu-io -c 'write -q 1M 64K' -c 'write -q 19M 1M' t.qcow2 && check t.qcow2 && run check t.qcow2 &&
		[ "$(dirty t.qcow2 two,2)" = '[[1048576,65536],[19922944,1048576]]' ] && ! infos t.qcow2 | grep in-use
	ok "create: $options: QEMU records in them"
done
rm -f t.qcow2
for bitmap in a,granularity=100 a,granularity=x a,granularity=4G; do
	refuse 1 'from 512 to 2G' create t.qcow2 --data-file t.raw --bitmap $bitmap && [ ! -e t.qcow2 ] &&
		refuse 1 'from 512 to 2G' measure --size 1G --bitmap $bitmap
	ok "create: --bitmap $bitmap"
done
refuse 5 'bitmap a already' create t.qcow2 --data-file t.raw --bitmap a --bitmap a && [ ! -e t.qcow2 ]
ok "create: two of the same name"
bitmaps=()
for n in {1..17}; do
	bitmaps+=(--bitmap "r$n")
done
refuse 1 'more than 16' create t.qcow2 --data-file t.raw "${bitmaps[@]}" && [ ! -e t.qcow2 ] &&
	run create t.qcow2 --data-file t.raw "${bitmaps[@]:2}" && check t.qcow2 && [ "$(lists t.qcow2 | jq length)" -eq 16 ]
ok "create: 16 bitmaps"

# All granularities, on disks that are no multiple of anything
for size in 512 1536 20971008 7516193280; do
	image $size
	bad=0 names=()
	for ((g = 512, n = 0; g <= 2 << 30; g *= 8, n++)); do
		run bitmap add t.qcow2 g$n --granularity $g || bad=1
		names+=("g$n")
	done
	[ $bad -eq 0 ] && check t.qcow2 && run check t.qcow2
	ok "bitmap: disk of $size: all granularities"
	qemu-io -c "write -q $((size - 512)) 512" -c 'write -q 0 512' t.qcow2
	image_dirty=$(lists t.qcow2)
	for b in "${names[@]}"; do
		counts t.qcow2 "$b" || bad=1
	done
	[ $bad -eq 0 ]
	ok "bitmap: disk of $size: counts"
	run bitmap add t.qcow2 m --granularity 512 --disabled && run bitmap merge t.qcow2 m g1 && counts t.qcow2 m &&
		[ "$(dirty t.qcow2 m)" = "$(dirty t.qcow2 g1)" ] && check t.qcow2 && run check t.qcow2 &&
		[ "$(lists t.qcow2 | jq -c 'map(select(.[0] != "m"))')" = "$image_dirty" ]
	ok "bitmap: disk of $size: merge, with the end of the disk"
done

#
# What is refused
#
image 20M
refuse 1 'list, add' bitmap frobnicate t.qcow2
ok "refused: what is not known"
while IFS=@ read -r args; do
	# shellcheck disable=SC2086 # words are wanted
	refuse 1 'usage: qcow2setup bitmap' bitmap $args
	ok "refused: bitmap $args"
done <<'TABLE'
list
add t.qcow2
add t.qcow2 a b
remove t.qcow2
clear t.qcow2 a b
merge t.qcow2 a
list t.qcow2 a
list t.qcow2 --disabled
list t.qcow2 --granularity 64K
add t.qcow2 a --json
remove t.qcow2 a --disabled
TABLE
for g in 256 4G 3K x; do
	refuse 1 'from 512 to 2G' bitmap add t.qcow2 a --granularity $g
	ok "refused: granularity $g"
done
refuse 4 'has no bitmaps.*bitmap add' bitmap remove t.qcow2 a
ok "refused: no bitmaps"
run bitmap add t.qcow2 one && run bitmap add t.qcow2 two
cp t.qcow2 before.qcow2
while read -r what names; do
	# shellcheck disable=SC2086 # words are wanted
	refuse 4 'has no bitmap none; choose one that is there: one, two$' bitmap "$what" t.qcow2 $names &&
		cmp t.qcow2 before.qcow2
	ok "refused: $what $names: what is not there, and what is"
done <<'TABLE'
remove none
clear none
enable none
disable none
merge one none
merge none two
merge one two none
TABLE
refuse 1 '1 to 1023' bitmap add t.qcow2 '' &&
	refuse 1 '1 to 1023' bitmap add t.qcow2 "$(printf '%01024d' 0)" && cmp t.qcow2 before.qcow2
ok "refused: names"
name=$(printf '%01023d' 0)
run bitmap add t.qcow2 "$name" && check t.qcow2 && run bitmap add t.qcow2 $'odd\e[1m,"name' && check t.qcow2 &&
	run bitmap list t.qcow2 && ! grep -q $'\e' out && lists t.qcow2 | grep -q "$name" &&
	run bitmap remove t.qcow2 $'odd\e[1m,"name' && run bitmap remove t.qcow2 "$name" && check t.qcow2
ok "names: long and odd ones"
held t.qcow2 refuse 5 'locked' bitmap add t.qcow2 three
ok "refused: in use by QEMU"
held t.qcow2 refuse 5 'locked' bitmap list t.qcow2
ok "refused: list, in use by QEMU"
for kind in corrupt:06 dirty:05; do
	cp before.qcow2 marked.qcow2
	poke marked.qcow2 79 ${kind#*:}
	refuse 4 ${kind%:*} bitmap add marked.qcow2 three && run bitmap list marked.qcow2 && grep -q '^one: ' out
	ok "refused: ${kind%:*} image, but for list"
done
# As QEMU: what it would not store would be lost.
rm -f big.qcow2
qemu-img create -q -f qcow2 -o data_file=big.raw,cluster_size=2M big.qcow2 64T
for g in 4K 8K 16K 1M; do
	if qemu-img bitmap --add -g $g big.qcow2 q$g 2>/dev/null; then
		run bitmap add big.qcow2 t$g --granularity $g && check big.qcow2
	else
		refuse 4 'choose a granularity of 16384' bitmap add big.qcow2 t$g --granularity $g
	fi
	ok "64 TiB: granularity $g, as QEMU"
done
qemu-img create -q -f qcow2 -o data_file=big.raw,cluster_size=2M big.qcow2 512T
refuse 4 'choose a granularity of 131072' bitmap add big.qcow2 x
ok "512 TiB: the default is not enough"
rm -f big.raw

# As many as the kernel keeps up to date
image 20M
bad=0
for n in {1..16}; do
	run bitmap add t.qcow2 "r$n" || bad=1
done
[ $bad -eq 0 ] && check t.qcow2 && refuse 4 'bitmap disable' bitmap add t.qcow2 r17 &&
	run bitmap add t.qcow2 r17 --disabled && refuse 4 'bitmap disable' bitmap enable t.qcow2 r17 &&
	run bitmap disable t.qcow2 r3 && run bitmap enable t.qcow2 r17 && check t.qcow2
ok "16 bitmaps record"
prepare_steps bitmap t.qcow2 ready x x && check t.qcow2
ok "ready: 16 bitmaps"
qemu-img bitmap --enable t.qcow2 r3
cp t.qcow2 before.qcow2
! prepare_steps bitmap t.qcow2 ready x x && grep -q 'more than 16 .*; stop one: qcow2setup bitmap disable' err &&
	cmp t.qcow2 before.qcow2
ok "ready: 17 bitmaps are refused"

#
# Inconsistent ones
#
image 20M
qemu-img bitmap --add t.qcow2 bad
qemu-img bitmap --add t.qcow2 good
qemu-io -c 'write -q 0 2M' t.qcow2
run info t.qcow2 && grep -q '^bitmap: good (granularity 65536, auto, 2097152 bytes dirty)' out
ok "info: bytes"
# the first entry of the directory is in use
edit t.qcow2 15 03
run info t.qcow2 && grep -q '^bitmap: bad (.*in use, inconsistent' out && run info t.qcow2 --json &&
	[ "$(jq -c '."dm-qcow2".bitmaps | map([.name, .count, .inconsistent])' out)" = \
	'[["bad",null,true],["good",2097152,false]]' ]
ok "info: inconsistent"
cp t.qcow2 before.qcow2
[ "$(lists t.qcow2)" = '[["bad",65536,null,false,true],["good",65536,2097152,true,false]]' ]
ok "inconsistent: listed, with no number of bytes"
run bitmap list t.qcow2 && grep -q '^bad: .*inconsistent' out && grep -q '^good: .*2097152 bytes dirty, recording' out
ok "inconsistent: listed as text"
while read -r what names; do
	# shellcheck disable=SC2086 # words are wanted
	refuse 4 'bad: inconsistent.*bitmap remove .*t.qcow2 bad' bitmap "$what" t.qcow2 $names && cmp t.qcow2 before.qcow2
	ok "inconsistent: $what $names is refused"
done <<'TABLE'
clear bad
enable bad
disable bad
merge bad good
merge good bad
TABLE
run bitmap add t.qcow2 new && check t.qcow2 && run bitmap remove t.qcow2 bad && check t.qcow2 && run check t.qcow2 &&
	[ "$(lists t.qcow2)" = '[["good",65536,2097152,true,false],["new",65536,0,true,false]]' ]
ok "inconsistent: removed"

# Bitmaps that the header does not vouch for
image 20M
qemu-img bitmap --add t.qcow2 old
qemu-io -c 'write -q 0 2M' t.qcow2
poke t.qcow2 95 00
run info t.qcow2 && grep -q '^bitmap: old (.*not valid' out &&
	run bitmap list t.qcow2 && [ ! -s out ] && grep -q 'not valid' err && refuse 4 'has no bitmaps' bitmap remove t.qcow2 old
ok "not vouched for: there are none"
run bitmap add t.qcow2 old && good_or_leaks t.qcow2 && [ "$(lists t.qcow2)" = '[["old",65536,0,true,false]]' ] &&
	run check --repair leaks t.qcow2 && check t.qcow2
ok "not vouched for: a new one of that name is empty"
image 20M
poke t.qcow2 88 8000000000000001
run bitmap add t.qcow2 a && check t.qcow2 && [ "$(hex -j 88 -N 8 t.qcow2)" = 0000000000000001 ]
ok "unknown autoclear bits, and one without bitmaps, are cleared"

#
# The place of the extension
#
declare -A want=([qemu]='[["a",1048576],["b",0],["c",0]]' [new]='[["b",0],["c",0]]')
for options in cluster_size=1k cluster_size=64k; do
	for at in 480:0 488:0 488:13 496:13 504:0; do
		rest=${at#*:} at=${at%:*}
		for made in qemu new; do
			image 20M ,$options
			if [ $made = qemu ]; then
				qemu-img bitmap --add t.qcow2 a
				qemu-io -c 'write -q 1M 1M' t.qcow2
			fi
			place t.qcow2 "$at" "$rest" && check t.qcow2
			ok "place: $options, $made, $at, $rest: QEMU takes it"
			run bitmap add t.qcow2 b && check t.qcow2 && run check t.qcow2 &&
				run bitmap add t.qcow2 c && check t.qcow2 && run bitmap disable t.qcow2 b && check t.qcow2 &&
				[ "$(lists t.qcow2 | jq -c 'map([.[0], .[2]])')" = "${want[$made]}" ]
			ok "place: $options, $made, $at, $rest: bitmaps are added"
			qemu-io -c 'write -q 3M 64K' t.qcow2 && check t.qcow2 && run check t.qcow2 &&
				! infos t.qcow2 | grep in-use
			ok "place: $options, $made, $at, $rest: QEMU goes on with them"
			for b in a b c; do
				run bitmap remove t.qcow2 $b 2>/dev/null
			done
			check t.qcow2 && run check t.qcow2 && [ "$(infos t.qcow2)" = '[]' ] && [ "$(hex -j 95 -N 1 t.qcow2)" = 00 ]
			ok "place: $options, $made, $at, $rest: bitmaps are removed"
		done
	done
done

finish bitmaps
