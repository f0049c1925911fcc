#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# Tests of resize --shrink of an image that is closed, and of power cuts on the way.
# QEMU's tools are the judges, and what qemu-img resize --shrink makes is the model.
#
#	shrink.sh [WRAPPER...] TOOL
#
# WRAPPER is, for example, valgrind with its options.

# A wrapper makes all slow, and finds what it can find in fewer combinations.
if [ $# -gt 1 ]; then
	layouts=(cluster_size=512 extended_l2=on) thorough=''
else
	layouts=(cluster_size=512 "cluster_size=512,refcount_bits=64" cluster_size=64k
		"cluster_size=2M,refcount_bits=1" extended_l2=on
		"cluster_size=16k,extended_l2=on" "cluster_size=512,preallocation=metadata")
	thorough=1
fi

# shellcheck source=tools/tests/lib.sh
. "$(dirname "$0")/lib.sh"

# size FILE: the virtual one
size() {
	qemu-img info -U --output=json "$1" | jq '."virtual-size"'
}

# granules: what the bitmaps of t.qcow2 have set, and whether they are valid
bitmaps() {
	qemu-img info --output=json "$1" | jq -c '."format-specific".data.bitmaps | sort_by(.name)'
	for b in $(qemu-img info --output=json "$1" | jq -r '."format-specific".data.bitmaps[].name'); do
		dirty "$1" "$b"
	done
}

for options in "${layouts[@]}"; do
	for size in 1M 3146240 7300608; do
		image 20M ",$options"
		qemu-io -c 'write -q -P 3 1M 1M' -c 'write -q -P 4 3M 512K' -c 'write -q -P 5 7M 3M' \
			-c 'write -q -P 6 19M 1M' t.qcow2 >/dev/null
		qemu-img convert -O raw t.qcow2 t.want
		cp t.qcow2 before.qcow2
		cp t.raw before.raw
		bytes=$(numfmt --from=iec "$size")
		refuse 4 'use --shrink' resize t.qcow2 --size "$size" && cmp t.qcow2 before.qcow2 &&
			cmp t.raw before.raw
		ok "shrink: $options, to $size: not without the option"
		truncate -s "$bytes" t.want
		run resize t.qcow2 --size "$size" --shrink && [ ! -s err ] && check t.qcow2 &&
			same -f qcow2 -F raw t.qcow2 t.want && [ "$(size t.qcow2)" = "$bytes" ] &&
			cmp t.raw before.raw && run check t.qcow2
		ok "shrink: $options, to $size"
		# There are more tables than one with clusters of 512 only.
		[ "$(stat -c %s t.qcow2)" -lt "$(stat -c %s before.qcow2)" ] ||
			[[ $options != *cluster_size=512* ]]
		ok "shrink: $options, to $size: the file is shorter"
		# Nothing comes back.
		truncate -s 20M t.want
		cp t.qcow2 small.qcow2
		run resize t.qcow2 --size 20M --data-file t.raw && check t.qcow2 &&
			same -f qcow2 -F raw t.qcow2 t.want
		ok "shrink: $options, to $size, and larger again"
		mv small.qcow2 t.qcow2
		prepare_steps prepare t.qcow2 && check t.qcow2 &&
			qemu-io -c "write -q -P 7 $((bytes - 70144)) 70144" t.qcow2 >out && check t.qcow2
		ok "shrink: $options, to $size: QEMU writes to it"
		# The data file, if it is named, and is a file: as qemu-img does
		cp before.qcow2 t.qcow2
		cp before.raw t.raw
		truncate -s "$bytes" t.want
		run resize t.qcow2 --size "$size" --shrink --data-file t.raw && check t.qcow2 &&
			same -f qcow2 -F raw t.qcow2 t.want && [ "$(stat -c %s t.raw)" = "$bytes" ]
		ok "shrink: $options, to $size: with the data file"
	done
done

for options in "--cluster-size 512" "--cluster-size 64K" --extended-l2; do
	rm -f t.qcow2
	(yes raw; :) | head -c 20M >t.raw
	# shellcheck disable=SC2086 # words are wanted
	run create t.qcow2 --data-file t.raw --data-file-raw $options
	cp t.raw before.raw
	cp t.qcow2 before.qcow2
	refuse 4 'use --shrink' resize t.qcow2 --size 3146240 && cmp t.qcow2 before.qcow2
	ok "shrink: raw, $options: not without the option"
	run resize t.qcow2 --size 3146240 --shrink && check t.qcow2 && cmp t.raw before.raw
	ok "shrink: raw, $options: the data is not touched if it is not named"
	cp before.qcow2 t.qcow2
	head -c 3146240 before.raw >t.want
	run resize t.qcow2 --size 3146240 --shrink --data-file t.raw && check t.qcow2 && cmp t.raw t.want &&
		same -f qcow2 -F raw t.qcow2 t.want && [ "$(size t.qcow2)" = 3146240 ]
	ok "shrink: raw, $options: with the data file"
	truncate -s 8M t.raw
	run resize t.qcow2 --size auto --data-file t.raw && check t.qcow2 && [ "$(size t.qcow2)" = $((8 << 20)) ] &&
		truncate -s 5M t.raw &&
		refuse 4 '5242880.*8388608.*enlarge.*--shrink' resize t.qcow2 --size auto --data-file t.raw &&
		run resize t.qcow2 --size auto --shrink --data-file t.raw && check t.qcow2 &&
		[ "$(size t.qcow2)" = $((5 << 20)) ] && same -f qcow2 -F raw t.qcow2 t.raw
	ok "shrink: raw, $options: to the size of the data"
done

# A backing file does not come to be seen behind the end, when it is larger again.
for options in "" ",extended_l2=on" ",cluster_size=512"; do
	overlay raw "$options"
	qemu-io -c 'write -q -P 8 1500K 1M' t.qcow2
	qemu-img convert -O raw t.qcow2 t.want
	truncate -s 2M t.want
	run resize t.qcow2 --size 2M --shrink && check t.qcow2 && same -f qcow2 -F raw t.qcow2 t.want &&
		truncate -s 4M t.want && run resize t.qcow2 --size 4M && check t.qcow2 &&
		same -f qcow2 -F raw t.qcow2 t.want
	ok "shrink: overlay$options, and larger again"
done

image 20M
run resize t.qcow2 --size 30M --shrink && [ "$(size t.qcow2)" = $((30 << 20)) ] && check t.qcow2
ok "shrink: the option does not hinder what is larger"
refuse 1 'takes no option --shrink' info t.qcow2 --shrink
ok "shrink: the option is for resize"
refuse 1 'multiple of 512.*--size 1536' resize t.qcow2 --size 1025 --shrink
ok "shrink: no multiple of a sector"
held t.qcow2 refuse 5 'locked' resize t.qcow2 --size 1M --shrink
ok "shrink: in use by QEMU"
for kind in corrupt:06 dirty:05; do
	cp t.qcow2 marked.qcow2
	poke marked.qcow2 79 ${kind#*:}
	refuse 4 ${kind%:*} resize marked.qcow2 --size 1M --shrink
	ok "shrink: ${kind%:*} image"
done

# Bitmaps: valid, with what is left of them; as qemu-img leaves them
for options in cluster_size=512 cluster_size=64k; do
	for size in 2M 2622976; do
		image 40M ",$options"
		qemu-img bitmap --add -g 512 t.qcow2 fine
		qemu-img bitmap --add -g 64K t.qcow2 coarse
		qemu-img bitmap --add --disable -g 4K t.qcow2 frozen
		qemu-io -c 'write -q 1M 1M' -c 'write -q 2600K 100K' -c 'write -q 30M 1M' t.qcow2 >/dev/null
		qemu-img bitmap --disable t.qcow2 coarse
		cp t.qcow2 q.qcow2
		sed -i 's/t\.raw/q.raw/' q.qcow2
		cp t.raw q.raw
		qemu-img resize -q --shrink q.qcow2 $size
		run resize t.qcow2 --size $size --shrink && [ ! -s err ] && check t.qcow2 && run check t.qcow2
		ok "shrink: bitmaps, $options, to $size"
		bitmaps t.qcow2 >got
		bitmaps q.qcow2 >want
		cmp got want && [ "$(wc -l <got)" -eq 4 ] && grep -q '\[\[' got
		ok "shrink: bitmaps, $options, to $size: they are as qemu-img leaves them"
		qemu-io -c 'write -q 0 64k' t.qcow2 && check t.qcow2 && ! bitmaps t.qcow2 | grep -q in-use
		ok "shrink: bitmaps, $options, to $size: QEMU goes on with them"
	done
done

# What fails, or is cut by a power failure: the old image or the new one.
for kind in "20M cluster_size=512" "20M cluster_size=512,refcount_bits=64" "20M cluster_size=16k,extended_l2=on" \
	"20M cluster_size=512,bitmaps"; do
	read -r size options <<<"$kind"
	image "$size" ",${options%,bitmaps}"
	case $options in
	*bitmaps)
		qemu-img bitmap --add -g 512 t.qcow2 b ;;
	esac
	qemu-io -c 'write -q -P 9 3K 900K' -c 'write -q -P 8 5M 3M' -c 'write -q -P 7 18M 1M' t.qcow2 >/dev/null
	new=$(((6 << 20) + 512))
	truncate -s 20M t.raw
	cp t.qcow2 before.qcow2
	cp t.qcow2 after.qcow2
	prepare_steps grow after.qcow2 $new 0 && check after.qcow2
	ok "shrink: $options, shrunk"
	cp before.qcow2 undone.qcow2
	prepare_steps undo-grow undone.qcow2 $new 0 && cmp before.qcow2 undone.qcow2
	ok "shrink: $options, undone"
	[ -n "$thorough" ] || continue
	bad=0 faults=0
	cp before.qcow2 crash.qcow2
	made=$("${steps[-1]}" fail-grow crash.qcow2 $new 0 1000000 1000000 2>err)
	for ((step = 0; step < made; step++)); do
		cp before.qcow2 crash.qcow2
		# It cannot be made; what was made before can be undone.
		"${steps[-1]}" fail-grow crash.qcow2 $new 0 $step 1000000 >out 2>err
		faults=$((faults + 1))
		cmp -s crash.qcow2 before.qcow2 || bad=$((bad + 1))
	done
	[ $bad -eq 0 ] && [ $faults -ge 6 ]
	ok "shrink: $options, $faults times a step fails: all is as before"
	bad=0 cuts=0 old=0
	cp before.qcow2 crash.qcow2
	writes=$("${steps[-1]}" crash-grow crash.qcow2 $new 0 1000000 1)
	for ((n = 0; n < writes; n++)); do
		for ((seed = 1; seed <= 4; seed++)); do
			cp before.qcow2 crash.qcow2
			"${steps[-1]}" crash-grow crash.qcow2 $new 0 $n "$seed" >out 2>err || bad=$((bad + 1))
			cuts=$((cuts + 1))
			good_or_leaks crash.qcow2 || bad=$((bad + 1))
			if [ "$(hex -j 24 -N 8 crash.qcow2)" = "$(hex -j 24 -N 8 before.qcow2)" ]; then
				old=$((old + 1))
				same crash.qcow2 before.qcow2 || bad=$((bad + 1))
			else
				same crash.qcow2 after.qcow2 || bad=$((bad + 1))
			fi
			# A bitmap is what it was, what it shall be, or known to be neither.
			[[ $options = *bitmaps ]] || continue
			bitmaps crash.qcow2 >got 2>err
			cmp -s got <(bitmaps before.qcow2) || cmp -s got <(bitmaps after.qcow2) ||
				grep -q in-use got || bad=$((bad + 1))
		done
	done
	[ $bad -eq 0 ] && [ $old -ge 2 ] && [ $cuts -gt $old ]
	ok "shrink: $options, $cuts power cuts, $old before the switch"
done

finish shrink
