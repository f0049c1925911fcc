#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# Tests of the space that open takes for the metadata of an image before it is
# needed: all of it or nothing, and nothing remains if it cannot be had.
#
#	space.sh [WRAPPER...] TOOL
#
# WRAPPER is, for example, valgrind with its options.

# shellcheck source=tools/tests/lib.sh
. "$(dirname "$0")/lib.sh"

enospc=28 edquot=122 eopnotsupp=95 eio=5 efbig=27
plenty=$((1 << 50))

# Length, and what is allocated to it
extent() {
	stat -c '%s %b' t.qcow2
}

# No hole is left in the first so many bytes of t.qcow2, or in all of it.
real() {
	[ $(($(stat -c %b t.qcow2) * 512)) -ge "${1:-$(stat -c %s t.qcow2)}" ]
}

# without_space FREE ROOM ERRNO: prepare is refused, and has changed nothing
without_space() {
	local before status

	before=$(extent)
	prepare_steps space t.qcow2 "$@"
	status=$?
	[ $status -eq 4 ] && cmp t.qcow2 before.qcow2 && [ "$before" = "$(extent)" ] &&
		[ "$(wc -l <err)" -eq 1 ] && grep -q '^qcow2setup: t.qcow2: ' err
}

for cluster in 64k 512; do
	size=1G
	[ $cluster = 512 ] || size=8G
	for holes in never always; do
		what="$cluster clusters, sparse: $holes"
		image $size ",cluster_size=$cluster,refcount_bits=64"
		qemu-io -c 'write -q -P 9 3M 5M' -c 'write -q 900M 1M' t.qcow2
		cp --sparse=$holes t.qcow2 before.qcow2
		cp --sparse=$holes before.qcow2 t.qcow2
		[ $holes = never ] || ! real
		ok "$what: holes are there"
		before=$(extent)
		prepare_steps undo t.qcow2 && cmp t.qcow2 before.qcow2 && [ "$before" = "$(extent)" ]
		ok "$what: undone, the holes are there again"

		# There is less than that, which is seen before anything is taken.
		without_space 4096 $plenty $enospc &&
			grep -q 'can need [0-9.]* [KM]iB, [0-9.]* [KM]iB more than it has now.*only 4 KiB left; free some space there, or use --sparse' err
		ok "$what: no space"
		# It ends on the way: in what was there, at its end, behind it.
		bytes=$(stat -c %s t.qcow2)
		bad=0 tried=0
		for room in 0 4096 $((bytes / 2)) $((bytes - 4096)) "$bytes" $((bytes + 4096)) \
			$((bytes + 65536)); do
			for err in $enospc:'no space for that' $edquot:'quota is used up' \
				$eio:'Input/output error' $efbig:'extend.*too large'; do
				# Without holes nothing is asked for what is there.
				tried=$((tried + 1))
				without_space $plenty "$room" "${err%%:*}" && grep -q "${err#*:}" err ||
					bad=$((bad + 1))
			done
		done
		[ $bad -eq 0 ] && [ $tried -eq 28 ]
		ok "$what: space that ends on the way, $tried times"
		bad=0
		prepare_steps signal t.qcow2 1
		[ $? -eq 4 ] && [ ! -s err ] && cmp t.qcow2 before.qcow2 && [ "$before" = "$(extent)" ]
		ok "$what: interrupted"

		# File systems that cannot do it, and users who do not want it
		length=''
		for how in "space t.qcow2 $plenty 0 $eopnotsupp" "sparse t.qcow2"; do
			cp --sparse=$holes before.qcow2 t.qcow2
			# shellcheck disable=SC2086 # words are wanted
			prepare_steps $how && ! real &&
				[ "$(grep -c 'warning: t.qcow2: .*sparse.*full.*writes.*fail' err)" -eq 1 ] &&
				check t.qcow2 && same t.qcow2 before.qcow2 &&
				[ "$(stat -c %s t.qcow2)" -gt "$bytes" ] &&
				[ "${length:-$(stat -c %s t.qcow2)}" = "$(stat -c %s t.qcow2)" ]
			ok "$what: ${how%% *}: as long, but sparse"
			length=$(stat -c %s t.qcow2)
		done
		cp --sparse=$holes before.qcow2 t.qcow2
		prepare_steps prepare t.qcow2 && real && ! grep -q warning err &&
			check t.qcow2 && same t.qcow2 before.qcow2 && [ "$(stat -c %s t.qcow2)" = "$length" ]
		ok "$what: all of it is real"
		cp t.qcow2 before.qcow2
		# What was taken is not asked for again, however full it is by now.
		prepare_steps space t.qcow2 0 $plenty $enospc && cmp t.qcow2 before.qcow2 && real
		ok "$what: needs nothing the second time"
		prepare_steps trim t.qcow2 && [ "$(stat -c %s t.qcow2)" -lt "$length" ] && check t.qcow2 &&
			[ $(($(stat -c %b t.qcow2) * 512)) -le $(($(stat -c %s t.qcow2) + 65536)) ]
		ok "$what: close gives it back"
	done
done

# More than one step, the signal in each of them
image 128G ,cluster_size=512
before=$(extent)
cp t.qcow2 before.qcow2
bad=0
for n in 1 2 9; do
	prepare_steps signal t.qcow2 $n
	[ $? -eq 4 ] && [ ! -s err ] && [ "$before" = "$(extent)" ] || bad=$((bad + 1))
done
cmp t.qcow2 before.qcow2 && [ $bad -eq 0 ]
ok "2 GiB: interrupted on the way"

# A file that somebody has made longer: no more than it can need.
image 1G ,cluster_size=512
truncate -s 40M t.qcow2
prepare_steps prepare t.qcow2 && real && [ "$(stat -c %s t.qcow2)" -eq $((40 << 20)) ]
ok "longer than it needs: all of it is real"
image 1G ,cluster_size=512
truncate -s 10G t.qcow2
prepare_steps prepare t.qcow2 && real $((16 << 20)) && ! real $((64 << 20)) &&
	[ "$(stat -c %s t.qcow2)" -eq $((10 << 30)) ] && check t.qcow2
ok "far longer than it needs: what it needs is real"

# Who made an image must not take the file system of who opens it.
image 1G ,cluster_size=512
l1=$(python3 -c 'print(int.from_bytes(open("t.qcow2", "rb").read()[40:48], "big"))')
for mib in 200 1000; do
	poke t.qcow2 "$l1" "$(printf '%016x' $((1 << 63 | mib << 20)))"
	truncate -s $(((mib << 20) + 512)) t.qcow2
	cp --sparse=always t.qcow2 before.qcow2
	before=$(extent)
	# with all the space that it may want
	without_space $plenty $plenty $enospc &&
		grep -q 'spread over.*far more than an image of 1 GiB can need.*check --repair leaks.*--sparse' err
	ok "a table at $mib MiB: refused"
	prepare_steps sparse t.qcow2 && [ "${before#* }" -ge "$(($(stat -c %b t.qcow2) - 4096))" ]
	ok "a table at $mib MiB: sparse"
	cp --sparse=always before.qcow2 t.qcow2
done
# Bitmaps take a cluster each, and one for their table.
image 1G ,cluster_size=2M
bad=0
for n in {1..30}; do
	qemu-img bitmap --add t.qcow2 "b$n" || bad=1
done
qemu-io -c 'write -q 0 64k' t.qcow2
qemu-img bitmap --disable t.qcow2 b1
[ $bad -eq 0 ] && [ "$(stat -c %s t.qcow2)" -gt $((100 << 20)) ] &&
	prepare_steps prepare t.qcow2 && real
ok "many bitmaps are no reason to refuse"
# Not if their tables say so again and again.
image 1G ,cluster_size=2M
qemu-img bitmap --add t.qcow2 b
truncate -s 2G t.qcow2
python3 - t.qcow2 <<'PYTHON'
import struct, sys
with open(sys.argv[1], "r+b") as f:
    header = f.read(4096)
    at = header.find(bytes.fromhex("2385287500000018"))
    directory, = struct.unpack(">Q", header[at + 24:at + 32])
    f.seek(directory)
    table, = struct.unpack(">Q", f.read(8))
    f.write(struct.pack(">I", 4096))
    f.seek(table)
    f.write(struct.pack(">Q", (2 << 30) - (2 << 20)) * 4096)
PYTHON
cp --sparse=always t.qcow2 before.qcow2
without_space $plenty $plenty $enospc && grep -q 'spread over' err
ok "a bitmap with the same cluster again and again: refused"

# resize of a closed image takes what it writes, and cuts the rest off.
image 1M ,cluster_size=512
run resize t.qcow2 --size 100G && check t.qcow2 && [ "$(stat -c %b t.qcow2)" -lt $((64 << 11)) ] &&
	[ ! -s err ]
ok "resize of a closed image takes no space ahead"
run resize t.qcow2 --size 101G --sparse && [ ! -s err ]
ok "resize of a closed image: --sparse"
refuse 1 'takes no option --sparse' info t.qcow2 --sparse
ok "--sparse is for open and resize"

finish space
