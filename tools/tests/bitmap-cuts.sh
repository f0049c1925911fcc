#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# Tests of what becomes of bitmaps when a step fails or the power does, of an image
# that grows, of what is made ready for the kernel, and of directories that somebody
# has made up.
#
#	bitmap-cuts.sh [WRAPPER...] TOOL
#
# WRAPPER is, for example, valgrind with its options.

# A wrapper makes all slow, and finds what it can find in fewer combinations.
if [ $# -gt 1 ]; then
	layouts=(cluster_size=512) thorough=''
else
	layouts=(cluster_size=512 "cluster_size=64k,refcount_bits=64" moved rest overlay)
	thorough=1
fi

# shellcheck source=tools/tests/lib.sh
. "$(dirname "$0")/lib.sh"

# start LAYOUT NUMBER: t.qcow2 with so many bitmaps that have something
start() {
	local n options=$1

	case $options in
	moved | rest)
		# Its data lies in two sectors.
		image 20M ,cluster_size=1k ;;
	overlay)
		overlay raw ,cluster_size=4k ;;
	*)
		image 20M ",$options" ;;
	esac
	for ((n = 0; n < $2; n++)); do
		qemu-img bitmap --add -g $((4096 << n)) t.qcow2 b$n
		qemu-io -c "write -q $((512 + n * 100))K 100K" t.qcow2
	done
	case $options in
	moved)
		place t.qcow2 488 0 ;;
	rest)
		place t.qcow2 496 21 ;;
	esac
}

# cuts NAME WHAT BITMAP ARG: what fails, or is cut by a power failure: t.qcow2 as it
# was, or as it shall be, and nothing else
cuts() {
	local name=$1 made step bad=0 faults=0 writes n seed got old=0 new=0 before after
	shift
	cp t.qcow2 before.qcow2
	cp t.qcow2 after.qcow2
	prepare_steps bitmap after.qcow2 "$@" && check after.qcow2 && "${tool[-1]}" check after.qcow2 >/dev/null
	ok "$name: $*"
	before=$(lists before.qcow2)
	after=$(lists after.qcow2)
	cp before.qcow2 undone.qcow2
	prepare_steps undo-bitmap undone.qcow2 "$@" && cmp before.qcow2 undone.qcow2
	ok "$name: $*: undone"
	[ -n "$thorough" ] || return
	cp before.qcow2 crash.qcow2
	made=$("${steps[-1]}" fail-bitmap crash.qcow2 "$@" 1000000 1000000 2>err)
	for ((step = 0; step < made; step++)); do
		cp before.qcow2 crash.qcow2
		"${steps[-1]}" fail-bitmap crash.qcow2 "$@" $step 1000000 >out 2>err
		faults=$((faults + 1))
		# What was free may have been written.
		[ "$(lists crash.qcow2)" = "$before" ] && check crash.qcow2 || bad=$((bad + 1))
	done
	[ $bad -eq 0 ] && [ $faults -ge 2 ]
	ok "$name: $*: $faults times a step fails: all is as before"
	cp before.qcow2 crash.qcow2
	bad=0
	writes=$("${steps[-1]}" crash-bitmap crash.qcow2 "$@" 1000000 1)
	for ((n = 0; n < writes; n++)); do
		for ((seed = 1; seed <= 2; seed++)); do
			cp before.qcow2 crash.qcow2
			"${steps[-1]}" crash-bitmap crash.qcow2 "$@" $n $seed >out 2>err || bad=$((bad + 1))
			good_or_leaks crash.qcow2 || bad=$((bad + 1))
			got=$(lists crash.qcow2)
			case $got in
			"$before")
				old=$((old + 1)) ;;
			"$after")
				new=$((new + 1)) ;;
			*)
				bad=$((bad + 1)) ;;
			esac
			[ "$(infos crash.qcow2 2>/dev/null | jq length)" = "$(jq length <<<"$got")" ] || bad=$((bad + 1))
		done
	done
	[ $bad -eq 0 ] && [ $((old + new)) -ge 2 ] && { [ $old -ge 1 ] || [ "$writes" -eq 1 ]; }
	ok "$name: $*: $((old + new)) power cuts, $old before the switch"
}

for options in "${layouts[@]}"; do
	start "$options" 0
	cuts "$options" add first 16
	cp after.qcow2 t.qcow2
	qemu-io -c 'write -q 1M 64K' t.qcow2
	cuts "$options" remove first x
	start "$options" 2
	cuts "$options" add more 9
	# Only where the extension is matters for those.
	[[ $options = *=* ]] || continue
	cuts "$options" remove b0 x
	cuts "$options" clear b1 x
	cuts "$options" merge b1 b0
	cuts "$options" disable b1 x
	cuts "$options" rotate b0 next
	qemu-img bitmap --add -g 1M t.qcow2 empty
	cuts "$options" ready x x
done

#
# Ready for the kernel
#

# entries FILE: of all tables, 0 or 1 if they have no cluster
entries() {
	python3 - "$1" <<-'END'
		import struct, sys
		with open(sys.argv[1], "rb") as f:
		    d = f.read()
		e = d.find(bytes.fromhex("2385287500000018"))
		count, _, size, at = struct.unpack(">IIQQ", d[e + 8:e + 32])
		for _ in range(count):
		    table, n, flags, _, _, name, extra = struct.unpack(">QIIBBHI", d[at:at + 24])
		    print(flags, *(v if v < 2 else "C" for v in struct.unpack(">%dQ" % n, d[table:table + 8 * n])))
		    at += 24 + extra + name + 7 & ~7
	END
}

for options in cluster_size=512 cluster_size=64k; do
	image 20971008 ,$options
	qemu-img bitmap --add -g 512 t.qcow2 a
	qemu-img bitmap --add --disable -g 512 t.qcow2 off
	qemu-img bitmap --add -g 1M t.qcow2 coarse
	qemu-io -c 'write -q 3M 512' t.qcow2
	before=$(lists t.qcow2)
	prepare_steps bitmap t.qcow2 ready x x && check t.qcow2 && run check t.qcow2 && [ "$(lists t.qcow2)" = "$before" ] &&
		[ "$(entries t.qcow2 | grep '^2 ' | tr -d '2C \n')" = '' ] &&
		[ "$(entries t.qcow2 | grep '^0 ' | tr -d '0 \n')" = '' ]
	ok "ready: $options: an entry for each, but not for those that do not record"
	cp t.qcow2 again.qcow2
	prepare_steps bitmap again.qcow2 ready x x && cmp t.qcow2 again.qcow2
	ok "ready: $options: nothing is left to be done"
	[ "$(dirty t.qcow2 a)" = '[[3145728,512]]' ] && qemu-io -c 'write -q 5M 512' t.qcow2 && check t.qcow2 &&
		[ "$(dirty t.qcow2 a)" = '[[3145728,512],[5242880,512]]' ]
	ok "ready: $options: QEMU goes on with them"
	# Entries that say that all is set: no more than the disk has
	python3 - t.qcow2 <<-'END'
		import struct, sys
		with open(sys.argv[1], "r+b") as f:
		    d = f.read()
		    e = d.find(bytes.fromhex("2385287500000018"))
		    at, = struct.unpack(">Q", d[e + 24:e + 32])
		    table, n = struct.unpack(">QI", d[at:at + 12])
		    free = [v for v in range(n) if not any(d[table + 8 * v:table + 8 * v + 8])]
		    if not free:
		        f.seek(0, 2)
		    for v in free:
		        f.seek(table + 8 * v)
		        f.write(struct.pack(">Q", 1))
	END
	before=$(lists t.qcow2) server=$(dirty t.qcow2 a)
	prepare_steps bitmap t.qcow2 ready x x && check t.qcow2 && run check t.qcow2 && [ "$(lists t.qcow2)" = "$before" ] &&
		[ "$(dirty t.qcow2 a)" = "$server" ]
	ok "ready: $options: entries that say that all is set"
done
image 20M
prepare_steps bitmap t.qcow2 ready x x && check t.qcow2
ok "ready: no bitmaps"
image 20M
qemu-img bitmap --add t.qcow2 b
cp t.qcow2 before.qcow2
# type, flags, extra data, table size; those that QEMU does not load
while read -r what offset bytes pattern; do
	cp before.qcow2 t.qcow2
	edit t.qcow2 "$offset" "$bytes"
	cp t.qcow2 edited.qcow2
	! prepare_steps bitmap t.qcow2 ready x x && grep -q "$pattern" err && grep -q '; remove' err &&
		[ "$(wc -l <err)" -eq 1 ] && cmp t.qcow2 edited.qcow2
	ok "ready: refused: $what"
	refuse 4 "$pattern" bitmap enable t.qcow2 b && cmp t.qcow2 edited.qcow2
	ok "enable: refused: $what"
	refuse 4 "$pattern" resize t.qcow2 --size 1G && cmp t.qcow2 edited.qcow2
	ok "resize: refused: $what"
	# What can be told apart from the others can be removed, else all can.
	eval "$(grep -o 'qcow2setup [bc].*' err | sed 's/^qcow2setup/run/')"
	check t.qcow2 || { [ $? -eq 3 ] && run check --repair leaks t.qcow2 && check t.qcow2; }
	ok "removed: $what"
done <<'TABLE'
type 16 02 type
flag 12 0000000a flag
table-size 8 00000003 table
TABLE

#
# A larger image
#
for options in cluster_size=512 cluster_size=64k extended_l2=on "cluster_size=4k,data_file_raw=on"; do
	for size in 1M 3146240 20971008; do
		image $size ",$options"
		qemu-img bitmap --add -g 512 t.qcow2 fine
		qemu-img bitmap --add -g 64K t.qcow2 coarse
		qemu-img bitmap --add --disable -g 4K t.qcow2 frozen
		bytes=$(numfmt --from=iec $size)
		qemu-io -c 'write -q 512K 100K' -c "write -q $((bytes - 512)) 512" t.qcow2
		qemu-img bitmap --merge fine t.qcow2 frozen
		fine=$(dirty t.qcow2 fine) frozen=$(dirty t.qcow2 frozen)
		run resize t.qcow2 --size 1G --data-file t.raw && [ ! -s err ] && check t.qcow2 && run check t.qcow2 &&
			[ "$(dirty t.qcow2 fine)" = "$fine" ] && ! infos t.qcow2 | grep in-use &&
			[ "$(dirty t.qcow2 frozen)" = "$(jq -c '[.[] | .[1] = (.[1] + .[0] % 4096 + 4095) / 4096 * 4096]' <<<"$frozen" >/dev/null
				dirty t.qcow2 frozen)" ]
		ok "grow: $options, from $size: bitmaps are valid, and what is new is clear"
		qemu-io -c 'write -q 900M 64K' t.qcow2 && check t.qcow2 && dirty t.qcow2 fine | grep -q '\[943718400,65536\]' &&
			! infos t.qcow2 | grep in-use
		ok "grow: $options, from $size: QEMU goes on with them"
	done
done

# What lies behind the old end, and was not looked at
for options in cluster_size=512 cluster_size=64k; do
	image 1000K ,$options
	qemu-img bitmap --add -g 64K t.qcow2 b
	qemu-io -c 'write -q 0 64K' t.qcow2
	python3 - t.qcow2 <<-'END'
		import struct, sys
		with open(sys.argv[1], "r+b") as f:
		    d = f.read()
		    e = d.find(bytes.fromhex("2385287500000018"))
		    at, = struct.unpack(">Q", d[e + 24:e + 32])
		    table, = struct.unpack(">Q", d[at:at + 8])
		    bits, = struct.unpack(">Q", d[table:table + 8])
		    f.seek(bits + 2)
		    f.write(b"\xff" * 100)
	END
	cp t.qcow2 tail.qcow2
	run resize t.qcow2 --size 100M && check t.qcow2 && [ "$(dirty t.qcow2 b)" = '[[0,65536]]' ] && run check t.qcow2
	ok "grow: $options: bits behind the end are cleared"
	python3 - tail.qcow2 <<-'END'
		import struct, sys
		with open(sys.argv[1], "r+b") as f:
		    d = f.read()
		    e = d.find(bytes.fromhex("2385287500000018"))
		    at, = struct.unpack(">Q", d[e + 24:e + 32])
		    table, = struct.unpack(">Q", d[at:at + 8])
		    f.seek(table)
		    f.write(struct.pack(">Q", 1))
	END
	good_or_leaks tail.qcow2 && run resize tail.qcow2 --size 100M && good_or_leaks tail.qcow2 &&
		[ "$(dirty tail.qcow2 b)" = '[[0,1048576]]' ]
	ok "grow: $options: what was all dirty is so up to its end"
done
image 1G
qemu-img bitmap --add -g 512 t.qcow2 b
cp t.qcow2 before.qcow2
refuse 4 'bitmap b: it would be too large.*bitmap remove' resize t.qcow2 --size 4T && cmp t.qcow2 before.qcow2
ok "grow: a bitmap would be too large"

if [ -n "$thorough" ]; then
	for options in cluster_size=512 cluster_size=64k; do
		image 1M ,$options
		qemu-img bitmap --add -g 512 t.qcow2 grows
		qemu-img bitmap --add -g 1M t.qcow2 stays
		qemu-io -c 'write -q 512K 64K' t.qcow2
		new=$((2 << 30))
		[ $options = cluster_size=64k ] || new=$((20 << 20))
		cp t.qcow2 before.qcow2
		cp t.qcow2 after.qcow2
		prepare_steps grow after.qcow2 $new 0 && check after.qcow2
		ok "grow: $options: done"
		cp before.qcow2 undone.qcow2
		prepare_steps undo-grow undone.qcow2 $new 0 && cmp before.qcow2 undone.qcow2
		ok "grow: $options: undone"
		before=$(lists before.qcow2) after=$(lists after.qcow2)
		cp before.qcow2 crash.qcow2
		bad=0 cut=0 marked=0
		writes=$("${steps[-1]}" crash-grow crash.qcow2 $new 0 1000000 1)
		for ((n = 0; n < writes; n++)); do
			for ((seed = 1; seed <= 3; seed++)); do
				cp before.qcow2 crash.qcow2
				"${steps[-1]}" crash-grow crash.qcow2 $new 0 $n "$seed" >out 2>err || bad=$((bad + 1))
				good_or_leaks crash.qcow2 || bad=$((bad + 1))
				cut=$((cut + 1))
				got=$(lists crash.qcow2)
				# What has to change with the image is known to be invalid.
				if [ "$got" != "$before" ] && [ "$got" != "$after" ]; then
					jq -e '.[0][4] and .[1][4] == false' <<<"$got" >/dev/null || bad=$((bad + 1))
					marked=$((marked + 1))
				fi
			done
		done
		[ $bad -eq 0 ] && [ $cut -gt $marked ] && [ $marked -gt 0 ]
		ok "grow: $options: $cut power cuts, $marked of them leave a mark"
	done
fi

#
# Directories that somebody has made up
#
image 20M
qemu-img bitmap --add t.qcow2 a
qemu-img bitmap --add t.qcow2 b
qemu-io -c 'write -q 0 64K' t.qcow2
cp t.qcow2 before.qcow2
l1=$(hex -j 40 -N 8 t.qcow2)
while read -r what offset bytes; do
	cp before.qcow2 t.qcow2
	edit t.qcow2 "$offset" "$bytes"
	cp t.qcow2 edited.qcow2
	for args in "add t.qcow2 c" "remove t.qcow2 a" "merge t.qcow2 b a"; do
		# shellcheck disable=SC2086 # words are wanted
		refuse 4 ';' bitmap $args && cmp t.qcow2 edited.qcow2
		ok "hostile: $what: $args"
	done
	run bitmap list t.qcow2 --json
	case $? in
	0)
		jq . out >/dev/null ;;
	4)
		[ "$(wc -l <err)" -eq 1 ] ;;
	*)
		false ;;
	esac
	ok "hostile: $what: list"
done <<TABLE
table-is-the-L1-table 0 $l1
table-is-the-header 0 0000000000000000
table-is-behind-the-end 0 0000000100000000
name-is-too-long 18 0500
no-granularity 17 08
TABLE
cp before.qcow2 t.qcow2
# two bitmaps with the same clusters
edit t.qcow2 32 "$(python3 - t.qcow2 <<-'END'
	import struct
	with open("t.qcow2", "rb") as f:
	    d = f.read()
	e = d.find(bytes.fromhex("2385287500000018"))
	at, = struct.unpack(">Q", d[e + 24:e + 32])
	print(d[at:at + 8].hex())
	END
)"
cp t.qcow2 edited.qcow2
refuse 4 'used twice; remove the bitmaps' bitmap remove t.qcow2 a && cmp t.qcow2 edited.qcow2 &&
	refuse 4 'used twice; remove the bitmaps' bitmap add t.qcow2 c && cmp t.qcow2 edited.qcow2 &&
	! prepare_steps bitmap t.qcow2 ready x x && cmp t.qcow2 edited.qcow2
ok "hostile: two bitmaps in the same place"
# A refcount that says that a table is free
cp before.qcow2 t.qcow2
python3 - t.qcow2 <<-'END'
	import struct
	with open("t.qcow2", "r+b") as f:
	    d = f.read()
	    e = d.find(bytes.fromhex("2385287500000018"))
	    at, = struct.unpack(">Q", d[e + 24:e + 32])
	    table, = struct.unpack(">Q", d[at:at + 8])
	    reftable, = struct.unpack(">Q", d[48:56])
	    block, = struct.unpack(">Q", d[reftable:reftable + 8])
	    f.seek(block + 2 * (table >> 16))
	    f.write(b"\0\0")
END
a=$(dirty t.qcow2 a)
run bitmap add t.qcow2 c && [ "$(dirty t.qcow2 a)" = "$a" ] && run check t.qcow2 --repair all && check t.qcow2 &&
	[ "$(dirty t.qcow2 a)" = "$a" ]
ok "hostile: what is in use is not taken, whatever its refcount says"

finish bitmap-cuts
