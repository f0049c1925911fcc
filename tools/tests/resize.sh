#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# Tests of resize of an image that is closed, and of power cuts on the way.  QEMU's
# tools are the judges.
#
#	resize.sh [WRAPPER...] TOOL
#
# WRAPPER is, for example, valgrind with its options.

# A wrapper makes all slow, and finds what it can find in fewer combinations.
if [ $# -gt 1 ]; then
	layouts=(cluster_size=512 extended_l2=on) thorough=''
	overlays=(",extended_l2=on" ",cluster_size=512")
else
	layouts=(cluster_size=512 "cluster_size=512,refcount_bits=64" cluster_size=64k
		"cluster_size=2M,refcount_bits=1" extended_l2=on
		"cluster_size=16k,extended_l2=on" "cluster_size=512,preallocation=metadata")
	overlays=("" ",extended_l2=on" ",cluster_size=512" ",cluster_size=2M") thorough=1
fi

inject=$(realpath "$(dirname "$0")/inject-lib")
# shellcheck source=tools/tests/lib.sh
. "$(dirname "$0")/lib.sh"

# 3: leaked clusters, which is all that a power cut may do
good_or_leaks() {
	local status

	qemu-img check -q "$1" >out 2>err
	status=$?
	[ $status -eq 0 ] || [ $status -eq 3 ]
}

# resized SIZE OPTIONS...: t.qcow2 grows and is what t.want is, with zeros
resized() {
	truncate -s "$1" t.want
	run resize t.qcow2 --size "$@" && check t.qcow2 &&
		same -f qcow2 -F raw t.qcow2 t.want &&
		[ "$(qemu-img info --output=json t.qcow2 | jq '."virtual-size"')" = \
		"$(stat -c %s t.want)" ]
}
for options in "${layouts[@]}"; do
	for size in 1M 1049088; do
		image $size ",$options"
		qemu-io -c 'write -q -P 3 1M 512' -c 'write -q -P 4 1000K 20K' \
			t.qcow2 >/dev/null
		qemu-img convert -O raw t.qcow2 t.want
		# what lies behind the old end must not show
		(yes junk; :) | head -c 3M | dd of=t.raw bs=512 status=none \
			seek=$(($(stat -c %s t.want) / 512)) conv=notrunc
		resized 20M --data-file t.raw
		ok "resize: $options, from $size"
		[ "$(stat -c %s t.raw)" -ge $((20 << 20)) ] &&
			prepare_steps prepare t.qcow2 && check t.qcow2 &&
			qemu-io -c 'write -q -P 5 19M 1M' -c 'write -q -P 6 1M 1M' t.qcow2 >out &&
			check t.qcow2
		ok "resize: $options, from $size: QEMU writes to it"
	done
done
# The data ends within a sector: its last bytes are the guest's, too.
rm -f t.qcow2 t.raw
yes tail | head -c 100000001 >t.raw
cp t.raw t.want
run create t.qcow2 --data-file t.raw --data-file-raw --size 1M &&
	run resize t.qcow2 --size auto --data-file t.raw && check t.qcow2 &&
	[ "$(stat -c %s t.raw)" -eq 100000256 ] && truncate -s 100000256 t.want &&
	same -f qcow2 -F raw t.qcow2 t.want
ok "resize: --size auto: data that ends within a sector"
for options in "--cluster-size 512" "--cluster-size 64K" --extended-l2; do
	rm -f t.qcow2
	(yes raw; :) | head -c 40M >t.raw
	# shellcheck disable=SC2086 # words are wanted
	run create t.qcow2 --data-file t.raw --size 1049088 --data-file-raw $options
	cp t.raw t.want
	resized 40M --data-file t.raw
	ok "resize: raw, $options: shows the data"
done
rm -f t.qcow2
run create t.qcow2 --data-file t.raw --size 1M --cluster-size 512 && cp t.qcow2 small.qcow2 &&
	run resize t.qcow2 --size auto --data-file t.raw && check t.qcow2 &&
	[ "$(qemu-img info --output=json t.qcow2 | jq '."virtual-size"')" = $((40 << 20)) ]
ok "resize: to the size of the data"
cp t.qcow2 before.qcow2
run resize t.qcow2 --size 40M && cmp t.qcow2 before.qcow2
ok "resize: to the same size"
truncate -s 20M t.raw
run resize t.qcow2 --size 40M --data-file t.raw && cmp t.qcow2 before.qcow2 &&
	[ "$(stat -c %s t.raw)" = $((40 << 20)) ]
ok "resize: to the same size: the data gets it, too"
truncate -s 20M t.raw
(ulimit -f 30000
 "${tool[@]}" resize t.qcow2 --size 40M --data-file t.raw >out 2>err)
[ $? -eq 4 ] && cmp t.qcow2 before.qcow2 && grep -q 'cannot extend' err &&
	[ "$(stat -c %s t.raw)" = $((20 << 20)) ]
ok "resize: to the same size: the data cannot get it"
refuse 4 'use --shrink' resize t.qcow2 --size 39M
ok "resize: smaller"
truncate -s 20M t.raw
refuse 4 '20971520.*41943040' resize t.qcow2 --size auto --data-file t.raw
ok "resize: to the size of the data, which is smaller"
refuse 1 'multiple of 512.*41943552' resize t.qcow2 --size 41943041
ok "resize: no multiple of a sector"
refuse 1 'give --size' resize t.qcow2
ok "resize: without a size"
refuse 1 'data-file' resize t.qcow2 --size auto
ok "resize: auto without data"
refuse 4 'at most' resize t.qcow2 --size 200G
ok "resize: larger than such an image can be"
refuse 4 'same file' resize t.qcow2 --size 50M --data-file t.qcow2
ok "resize: image is its own data"
refuse 1 'no backing file' resize t.qcow2 --size 50M --backing-file t.raw
ok "resize: backing file for an image without one"
cmp t.qcow2 before.qcow2 && [ "$(stat -c %s t.raw)" = $((20 << 20)) ]
ok "resize: what is refused changes nothing"
held t.qcow2 refuse 5 'locked' resize t.qcow2 --size 50M
ok "resize: in use by QEMU"
(ulimit -f 40000
 "${tool[@]}" resize t.qcow2 --size 60M --data-file t.raw >out 2>err)
[ $? -eq 4 ] && cmp t.qcow2 before.qcow2 && [ "$(stat -c %s t.raw)" = $((20 << 20)) ]
ok "resize: data cannot be extended, nothing is changed"
(ulimit -f 800
 "${tool[@]}" resize t.qcow2 --size 1G >out 2>err)
[ $? -eq 4 ] && cmp t.qcow2 before.qcow2 && grep -q 'extend' err
ok "resize: image cannot be extended, nothing is changed"
for kind in corrupt:06 dirty:05; do
	cp before.qcow2 t.qcow2
	poke t.qcow2 79 ${kind#*:}
	refuse 4 ${kind%:*} resize t.qcow2 --size 50M
	ok "resize: ${kind%:*} image"
done

# SIGINT at each call: all is as before, or it is done. Half of the calls write tables.
rm -f t.qcow2
truncate -s 1M t.raw
run create t.qcow2 --data-file t.raw --data-file-raw --cluster-size 512
cp t.qcow2 before.qcow2
grow_raw() {
	cp before.qcow2 t.qcow2
	truncate -s 1M t.raw
	# Whoever runs this in the background may have had it ignored.
	env --default-signal=INT "$@" LD_PRELOAD="$inject" "${tool[-1]}" resize t.qcow2 --size 512M --data-file t.raw >out 2>err
}
grow_raw INJECT_COUNT=calls && check t.qcow2
ok "resize: $(cat calls) calls"
bad=0 taken_back=0
for ((k = 1; k <= $(cat calls); k += 1 + k / 40)); do
	# the shell would tell of each death
	grow_raw INJECT_AT=$k INJECT_SIGNAL=2 2>/dev/null
	case $? in
	0)	check t.qcow2 && [ "$(stat -c %s t.raw)" = $((512 << 20)) ] || bad=$((bad + 1)) ;;
	130)	taken_back=$k
		cmp t.qcow2 before.qcow2 && [ "$(stat -c %s t.raw)" = $((1 << 20)) ] && [ ! -s err ] ||
			bad=$((bad + 1)) ;;
	*)	bad=$((bad + 1)) ;;
	esac
done
[ $bad -eq 0 ] && [ $taken_back -ge $(($(cat calls) / 2)) ]
ok "resize: a signal while tables are written: all is as before, up to call $taken_back"
# How far it is: on a terminal, if it takes more than a second. Eight calls write tables,
# the fifth is the first.
table=8
cp before.qcow2 t.qcow2
INJECT_AT=$table INJECT_COMMAND="sleep 1.1" LD_PRELOAD=$inject \
	script -qec "${tool[-1]} resize t.qcow2 --size 512M --data-file t.raw" /dev/null </dev/null >shown
grep -q 'qcow2setup: writing tables: .* MiB of .* MiB (.*%)' shown && check t.qcow2 &&
	[ "$(tr '\r' '\n' <shown | tail -n 1 | tr -d ' ')" = "" ]
ok "resize: progress, on a terminal"
grow_raw INJECT_AT=$table "INJECT_COMMAND=sleep 1.1" && [ ! -s out ] && [ ! -s err ]
ok "resize: no progress, if it is no terminal"

# The last cluster is cut by the old end, and its rest comes to be seen.
image 1049088 ,cluster_size=64k
qemu-io -c 'write -q -P 3 1M 512' t.qcow2
refuse 1 'data-file' resize t.qcow2 --size 2M
ok "resize: the rest of the last cluster is to be cleared in the data"

# What comes new reads as zeros, although the backing file goes on.
for options in "${overlays[@]}"; do
	for size in 2M 2100736; do
		for format in raw qcow2; do
			overlay $format "$options"
			rm t.qcow2
			qemu-img create -q -f qcow2 -b b.$format -F $format \
				-o "data_file=t.raw$options" t.qcow2 $size
			truncate -s 5M t.raw
			qemu-img convert -O raw t.qcow2 t.want
			cp t.qcow2 before.qcow2
			if [ $size = 2M ] || [ "$options" = ,cluster_size=512 ]; then
				resized 5M
				ok "resize: $format overlay$options from $size"
				same before.qcow2 b.raw >/dev/null
				cp before.qcow2 t.qcow2
				resized 2500096 --data-file t.raw --backing-file b.$format
				ok "resize: $format overlay$options, within the backing file"
			elif [ $format = raw ]; then
				refuse 1 'data-file' resize t.qcow2 --size 5M
				ok "resize: $format overlay$options: end is cut, needs the data"
				resized 5M --data-file t.raw --backing-file b.raw
				ok "resize: $format overlay$options: end is cut"
			else
				refuse 4 'open device' resize t.qcow2 --size 5M --data-file t.raw
				ok "resize: $format overlay$options: end is cut, needs the device"
				cmp t.qcow2 before.qcow2
				ok "resize: $format overlay$options: refused, nothing is changed"
			fi
		done
	done
done

# Bitmaps stay valid, also those whose tables become longer.
image 7M
qemu-img bitmap --add t.qcow2 b
run resize t.qcow2 --size 1G && check t.qcow2 &&
	qemu-io -c 'write -q 900M 1M' t.qcow2 && qemu-img info t.qcow2 >out 2>err &&
	! grep -q 'in-use' out && grep -q 'name: b' out
ok "resize: valid bitmap"
run resize t.qcow2 --size 100G && check t.qcow2 &&
	qemu-io -c 'write -q 90G 1M' t.qcow2 && qemu-img info t.qcow2 >out 2>err &&
	! grep -q 'in-use' out && grep -q 'name: b' out
ok "resize: bitmap that has to grow"
prepare_steps prepare t.qcow2
run resize t.qcow2 --size 200G && check t.qcow2
ok "resize: bitmap that is not valid is no hindrance"
image 1G
poke t.qcow2 88 8000000000000000
run resize t.qcow2 --size 2G && [ "$(hex -j 88 -N 8 t.qcow2)" = 0000000000000000 ]
ok "resize: unknown autoclear bits are cleared"

# Entries behind the old end, that nobody has looked at so far.
image 1M ,cluster_size=512
qemu-io -c 'write -q -P 7 0 1M' t.qcow2
poke t.qcow2 24 "$(printf '%016x' $((512 * 1024)))"
qemu-img convert -O raw t.qcow2 t.want
resized 1M --data-file t.raw
ok "resize: L2 entries behind the old end are not brought back"

# A power cut at each write: the old image or the new one.
for kind in "1M 0 cluster_size=512" "1M 0 cluster_size=512,data_file_raw=on,refcount_bits=64" \
	"1M 0 cluster_size=512,refcount_bits=64" "2M 3M overlay" "2M 3M overlay,extended_l2=on"; do
	read -r size backing options <<<"$kind"
	new=$((24 << 20))
	case $options in
	*raw*)	new=$((5 << 20)) ;;&
	overlay*)
		new=$((3 << 20))
		overlay raw "${options#overlay},cluster_size=16k"
		qemu-img resize -q --shrink t.qcow2 "$size" ;;
	*)	image "$size" ",$options"
		qemu-io -c 'write -q -P 9 3K 900K' t.qcow2 ;;
	esac
	backing=$(numfmt --from=iec "$backing")
	# Data that is raw, and long enough for both.
	truncate -s 24M t.raw
	cp t.qcow2 before.qcow2
	cp t.qcow2 after.qcow2
	prepare_steps grow after.qcow2 $new "$backing" && check after.qcow2
	ok "resize: $options, grown"
	cp before.qcow2 undone.qcow2
	prepare_steps undo-grow undone.qcow2 $new "$backing" && cmp before.qcow2 undone.qcow2
	ok "resize: $options, undone"
	[ -n "$thorough" ] || continue
	# One of the last steps cannot be made, and one of those before cannot be undone.
	bad=0 faults=0
	cp before.qcow2 crash.qcow2
	made=$("${steps[-1]}" fail-grow crash.qcow2 $new "$backing" 1000000 1000000 2>err)
	for ((step = made - 1; step >= made - 6; step--)); do
		for ((n = 0; n < made; n++)); do
			cp before.qcow2 crash.qcow2
			"${steps[-1]}" fail-grow crash.qcow2 $new "$backing" $step $n >out 2>err
			status=$?
			[ $status -ne 9 ] || break
			faults=$((faults + 1))
			[ $status -eq 0 ] && grep -q 'could not be put back' err || bad=$((bad + 1))
			good_or_leaks crash.qcow2 || bad=$((bad + 1))
			same crash.qcow2 before.qcow2 || same crash.qcow2 after.qcow2 || bad=$((bad + 1))
		done
	done
	[ $bad -eq 0 ] && [ $faults -ge 15 ]
	ok "resize: $options, $faults times two steps fail"

	bad=0 cuts=0 old=0
	cp before.qcow2 crash.qcow2
	writes=$("${steps[-1]}" crash-grow crash.qcow2 $new "$backing" 1000000 1)
	# in between there are only new tables
	for ((n = 0; n < writes; n++)); do
		[ $n -lt 30 ] || [ $n -gt $((writes - 30)) ] || continue
		for ((seed = 1; seed <= 4; seed++)); do
			cp before.qcow2 crash.qcow2
			"${steps[-1]}" crash-grow crash.qcow2 $new "$backing" $n "$seed" >out 2>err || bad=$((bad + 1))
			cuts=$((cuts + 1))
			good_or_leaks crash.qcow2 || bad=$((bad + 1))
			if [ "$(hex -j 24 -N 8 crash.qcow2)" = "$(hex -j 24 -N 8 before.qcow2)" ]; then
				old=$((old + 1))
				same crash.qcow2 before.qcow2 || bad=$((bad + 1))
			else
				same crash.qcow2 after.qcow2 || bad=$((bad + 1))
			fi
		done
	done
	[ $bad -eq 0 ] && [ $old -ge $((8)) ] && [ $cuts -gt $old ]
	ok "resize: $options, $cuts power cuts, $old before the switch"
done

# While the image is live.  QEMU takes the kernel's part, and allocates in the old area
# when the new tables are written: nothing of either is lost, the old end included.
for kind in "4199936 0 24M cluster_size=512,data_file_raw=on,preallocation=off" \
	"4199936 0 2G cluster_size=512" "4199936 0 2G cluster_size=512,refcount_bits=64" \
	"4199936 24M 20M cluster_size=512" "4199936 24M 20M cluster_size=512,refcount_bits=64" \
	"4198400 64M 60M cluster_size=4k" "4M 24M 20M cluster_size=512"; do
	read -r size backing new options <<<"$kind"
	[ -n "$thorough" ] || [[ $options = *=64 ]] || continue
	new=$(numfmt --from=iec "$new") backing=$(numfmt --from=iec "$backing") size=$(numfmt --from=iec "$size")
	rm -f t.qcow2 t.raw b.raw
	if [ "$backing" -gt 0 ]; then
		yes base | head -c "$backing" >b.raw
		qemu-img create -q -f qcow2 -b b.raw -F raw -o "data_file=t.raw,$options" t.qcow2 "$size"
	else
		image "$size" ",${options%,preallocation*}"
	fi
	qemu-io -c 'write -q -P 9 3K 700K' -c 'write -q -P 6 2M 512' t.qcow2
	# Raw ones have all tables, if QEMU has made them.
	raw=$([[ $options != *raw* ]] || echo 1)
	prepare_steps prepare t.qcow2 && check t.qcow2
	ok "resize: live, $kind: prepared"
	cp t.qcow2 before.qcow2
	cp t.raw before.raw
	bad=0 moved=0
	for ((n = 0; n < 12; n++)); do
		cp before.qcow2 t.qcow2
		cp before.raw t.raw
		io=()
		for ((i = 0; i < n; i++)); do
			io+=(-c "write -q -P $((i + 20)) $((RANDOM % (size / 512 - 8) * 512)) 1536")
		done
		# all of it, which needs refcount blocks, too
		[ $n -lt 10 ] || io+=(-c "write -q -P $n 0 $((size - 1024))")
		# the last cluster: its table may have to be made by either
		[ $((n % 3)) -ne 1 ] || io+=(-c "write -q -P 77 $((size - 512)) 512")
		printf '%q ' qemu-io "${io[@]}" -c 'write -q -P 5 1M 64K' -c 'flush' t.qcow2 >guest
		prepare_steps grow-live t.qcow2 "$new" "$backing" \
			"sh guest; qemu-img convert -U -O raw t.qcow2 t.want" || bad=$((bad + 1))
		truncate -s "$new" t.want
		[ -z "$raw" ] || truncate -s "$new" t.raw
		check t.qcow2 || bad=$((bad + 1))
		same -f qcow2 -F raw t.qcow2 t.want || bad=$((bad + 1))
		[ "$(hex -j 40 -N 8 t.qcow2)" = "$(hex -j 40 -N 8 before.qcow2)" ] || moved=$((moved + 1))
		run check t.qcow2 || bad=$((bad + 1))
	done
	[ $bad -eq 0 ]
	ok "resize: live, $kind: QEMU allocates meanwhile; L1 moved $moved times"
	cp before.qcow2 t.qcow2
	prepare_steps undo-live t.qcow2 "$new" "$backing" "sh guest; cp t.qcow2 t.want" && check t.qcow2 &&
		[ "$(stat -c %s t.qcow2)" = "$(stat -c %s before.qcow2)" ] && same t.qcow2 t.want
	ok "resize: live, $kind: undone, and what QEMU has allocated is there"
	[ -n "$thorough" ] || continue
	bad=0 cuts=0 old=0
	cp before.qcow2 crash.qcow2
	cp before.raw t.raw
	sed -i 's/t\.qcow2 $/crash.qcow2/' guest
	writes=$("${steps[-1]}" crash-live crash.qcow2 "$new" "$backing" 'sh guest' 1000000 1 2>err)
	cp crash.qcow2 after.qcow2
	[ -z "$raw" ] || truncate -s "$new" before.raw
	for ((n = 0; n < writes; n++)); do
		for ((seed = 1; seed <= 3; seed++)); do
			cp before.qcow2 crash.qcow2
			cp before.raw t.raw
			"${steps[-1]}" crash-live crash.qcow2 "$new" "$backing" \
				'sh guest; cp crash.qcow2 guest.qcow2' $n $seed >out 2>err || bad=$((bad + 1))
			cuts=$((cuts + 1))
			good_or_leaks crash.qcow2 || bad=$((bad + 1))
			if [ "$(hex -j 24 -N 8 crash.qcow2)" = "$(hex -j 24 -N 8 before.qcow2)" ]; then
				old=$((old + 1))
			else
				same crash.qcow2 after.qcow2 || bad=$((bad + 1))
			fi
		done
	done
	[ $bad -eq 0 ] && [ $old -ge 6 ] && [ $cuts -gt $old ]
	ok "resize: live, $kind: $cuts power cuts, $old before the switch"
done

# A refcount table that must grow, and a power cut at each write of that.
if [ -n "$thorough" ]; then
	image 1G ,cluster_size=512,refcount_bits=64
	qemu-io -c 'write -P 9 3M 1M' t.qcow2 >/dev/null
	cp t.qcow2 before.qcow2
	bad=0 cuts=0
	for ((n = 0; n < 1000; n++)); do
		for ((seed = 1; seed <= 16; seed++)); do
			cp before.qcow2 crash.qcow2
			"${steps[-1]}" crash crash.qcow2 $n "$seed" >out 2>err
			status=$?
			[ $status -eq 9 ] && break 2
			[ $status -eq 0 ] || bad=$((bad + 1))
			cuts=$((cuts + 1))
			good_or_leaks crash.qcow2 || bad=$((bad + 1))
			same crash.qcow2 before.qcow2 || bad=$((bad + 1))
		done
	done
	[ $bad -eq 0 ] && [ $cuts -gt $((60)) ]
	ok "prepare: $cuts power cuts, none corrupts the image"
fi

# virtual FILE: its size
virtual() {
	qemu-img info --output=json "$1" | jq '."virtual-size"'
}

image 20M
run resize t.qcow2 --size +1.5M && [ "$(virtual t.qcow2)" = 22544384 ] &&
	run resize t.qcow2 --size +512 && check t.qcow2 && [ "$(virtual t.qcow2)" = 22544896 ]
ok "resize: by so much"
cp t.qcow2 before.qcow2
refuse 1 'multiple of 512; give --size 22545408' resize t.qcow2 --size +1 &&
	refuse 4 'give a smaller --size' resize t.qcow2 --size +18446744073709551615 &&
	refuse 1 '+0 is nothing' resize t.qcow2 --size +0 &&
	refuse 1 '++1G has a sign' resize t.qcow2 --size ++1G && cmp t.qcow2 before.qcow2
ok "resize: by what cannot be"

finish resize
