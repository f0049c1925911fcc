#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# qcow2setup: what it makes, what it changes, and each of its refusals. A refusal
# must be one line, have the right exit status, and leave no trace.

. "$(dirname "$0")/common.sh"

name=$prefix-i

# json FILE EXPRESSION: of the parsed text j, which must be true
json()
{
	python3 -c '
import json, sys
j = json.load(open(sys.argv[1], encoding="utf-8"))
sys.exit(0 if eval(sys.argv[2]) else f"{sys.argv[2]}: {j}")' "$1" "$2"
}

# Header fields: offset and digits
declare -A fields=(
	[magic]="0 8" [version]="4 8" [cluster_bits]="20 8" [size]="24 16" [crypt_method]="32 8"
	[l1_size]="36 8" [l1_table_offset]="40 16" [refcount_table_offset]="48 16"
	[refcount_table_clusters]="56 8" [nb_snapshots]="60 8" [incompatible_features]="72 16"
	[compatible_features]="80 16" [autoclear_features]="88 16" [refcount_order]="96 8"
	[header_length]="100 8"
)

# poke FILE OFFSET HEX_DIGITS
poke()
{
	local i bytes=''

	for ((i = 0; i < ${#3}; i += 2)); do
		bytes+="\\x${3:i:2}"
	done
	printf '%b' "$bytes" | dd of="$1" bs=1 seek="$2" conv=notrunc,nocreat status=none
}

# field IMAGE FIELD VALUE
field()
{
	local at digits

	read -r at digits <<< "${fields[$2]}"
	poke "$1" "$at" "$(printf "%0${digits}x" "$3")"
}

# A pattern that QEMU can check.
pattern()
{
	yes PATTERN | head -c "$1"
}

whole_cycle()
{
	local size

	truncate -s 32M "$dir/data"
	"$tool" create "$dir/a.qcow2" --data-file "$dir/data"
	qemu-img check -q "$dir/a.qcow2"
	size=$(stat -c %s "$dir/a.qcow2")
	"$tool" open "$dir/a.qcow2" "$name" --data-file "$dir/data"
	[ "$(blockdev --getsize64 "/dev/mapper/$name")" = $((32 << 20)) ]
	[ "$(stat -c %s "$dir/a.qcow2")" -gt "$size" ] || fault "the metadata was not extended"
	truncate -s 32M "$dir/model"
	pattern 1000000 | dd of="/dev/mapper/$name" bs=1M seek=3 oflag=direct iflag=fullblock \
		conv=notrunc status=none
	pattern 1000000 | dd of="$dir/model" bs=1M seek=3 conv=notrunc status=none
	"$tool" status "$name" > "$dir/out"
	grep -q 'mode: *rw' "$dir/out"
	grep -q "$dir/a.qcow2" "$dir/out"
	"$tool" status "$name" --json > "$dir/json"
	json "$dir/json" "j['mode'] == 'rw' and j['virtual-size'] == 32 << 20"
	json "$dir/json" "j['filename'] == '$dir/a.qcow2' and j['data-file'] == '$dir/data'"
	json "$dir/json" "j['cluster-size'] == 65536 and j['statistics']['first-writes'] > 0"
	"$tool" status > "$dir/out"
	grep -q "^$name .*rw" "$dir/out"
	"$tool" status --json > "$dir/json"
	json "$dir/json" "any(d['name'] == '$name' for d in j)"
	"$tool" close "$name"
	poll 30 loops_gone
	nothing_left
	qemu-img check -q "$dir/a.qcow2"
	qemu-img compare -q -f qcow2 -F raw "$dir/a.qcow2" "$dir/model"
	# One L2 table more than before, and not a byte beyond it.
	[ "$(stat -c %s "$dir/a.qcow2")" -le $((size + 2 * 65536)) ] || fault "not trimmed"
	[ "$(stat -c %s "$dir/data")" = $((32 << 20)) ]
	# Once more with nothing written: not a bit of difference in the end.
	before=$(sha256sum < "$dir/a.qcow2")
	"$tool" open "$dir/a.qcow2" "$name" --data-file "$dir/data"
	"$tool" close "$name"
	[ "$before" = "$(sha256sum < "$dir/a.qcow2")" ] || fault "open and close changed the image"
}

# The name of the image leads nowhere any more.
close_without_name()
{
	image i "$((1 << 20))"
	"$tool" open "$dir/i.qcow2" "$name" --data-file "$dir/i.data"
	rm "$dir/i.qcow2"
	"$tool" close --verbose "$name" > "$dir/out" 2>&1
	grep -q 'not trimmed' "$dir/out" || fault "$(cat "$dir/out")"
	not grep -q 'check the name' "$dir/out"
	poll 30 loops_gone
	nothing_left
}

# What is created must be what qemu-img takes, for any cluster size and width.
create_sizes()
{
	local c b bits

	pattern $((5 << 20)) > "$dir/data"
	truncate -s $((5000000 / 512 * 512)) "$dir/data"
	bits=(1 16 64 8 32 2 4)
	for c in 512 1K 4K 16K 64K 256K 2M; do
		b=${bits[0]} bits=("${bits[@]:1}")
		"$tool" create "$dir/c.qcow2" --data-file "$dir/data" --cluster-size "$c" \
			--refcount-bits "$b"
		qemu-img check -q "$dir/c.qcow2" || fault "$c, $b bits: qemu-img check: $?"
		qemu-img info "$dir/c.qcow2" > "$dir/out"
		grep -q '(4999680 bytes)' "$dir/out"
		grep -q "refcount bits: $b\$" "$dir/out"
		grep -q "data file: $dir/data\$" "$dir/out"
		rm "$dir/c.qcow2"
		"$tool" create "$dir/c.qcow2" --data-file "$dir/data" --cluster-size "$c" --data-file-raw
		qemu-img check -q "$dir/c.qcow2" || fault "$c, raw: qemu-img check: $?"
		qemu-img compare -q -f qcow2 -F raw "$dir/c.qcow2" "$dir/data"
		rm "$dir/c.qcow2"
	done
}

# The data file is only looked at. Raw: its content shows; else: it does not.
create_over_a_disk()
{
	local before

	pattern $((8 << 20)) > "$dir/data"
	before=$(sha256sum < "$dir/data")
	"$tool" create "$dir/raw.qcow2" --data-file "$dir/data" --data-file-raw
	"$tool" create "$dir/new.qcow2" --data-file "$dir/data"
	"$tool" create "$dir/pre.qcow2" --data-file "$dir/data" --size 6M --preallocation metadata
	[ "$before" = "$(sha256sum < "$dir/data")" ] || fault "the data was changed"
	"$tool" open "$dir/raw.qcow2" "$name" --data-file "$dir/data"
	cmp "/dev/mapper/$name" "$dir/data"
	"$tool" close "$name"
	truncate -s 8M "$dir/zeros"
	"$tool" open "$dir/new.qcow2" "$name" --data-file "$dir/data"
	cmp "/dev/mapper/$name" "$dir/zeros"
	"$tool" close "$name"
	[ "$before" = "$(sha256sum < "$dir/data")" ] || fault "the data was changed"
	qemu-img check -q "$dir/pre.qcow2"
	[ "$(qemu-img info --output=json "$dir/pre.qcow2" | jq '."virtual-size"')" = $((6 << 20)) ]

	before=$(sha256sum "$dir/raw.qcow2")
	refused 5 'exists' "$tool" create "$dir/raw.qcow2" --data-file "$dir/data"
	refused 5 'exists' "$tool" create "$dir/raw.qcow2" --data-file "$dir/data" --overwrite-device
	refused 5 'exists' "$tool" create "$dir/data" --data-file "$dir/data"
	[ "$before" = "$(sha256sum "$dir/raw.qcow2")" ]
	refused 4 'no such|folder' "$tool" create "$dir/no/x.qcow2" --data-file "$dir/data"
	refused 4 'no such' "$tool" create "$dir/x.qcow2" --data-file "$dir/no"
	refused 4 'enlarge|smaller' "$tool" create "$dir/x.qcow2" --data-file "$dir/data" --size 9M
	[ ! -e "$dir/x.qcow2" ]
	# A name that is a link is taken, whatever it points at.
	ln -s "$dir/target" "$dir/link"
	refused 5 'exists' "$tool" create "$dir/link" --data-file "$dir/data"
	[ ! -e "$dir/target" ]
}

# No space in the middle of it: nothing must remain.
create_no_space()
{
	local size

	mkdir "$dir/small"
	mount -t tmpfs -o size=128k tmpfs "$dir/small"
	truncate -s 64G "$dir/data"
	refused 4 'space|write' "$tool" create "$dir/small/x.qcow2" --data-file "$dir/data" --data-file-raw
	[ ! -e "$dir/small/x.qcow2" ] || fault "an unfinished file was left"
	umount "$dir/small"
	# The file may not grow: open cannot extend it, and must put it back.
	image i $((64 << 20)) ''
	size=$(stat -c %s "$dir/i.qcow2")
	before=$(sha256sum < "$dir/i.qcow2")
	(
		ulimit -f $((size / 1024 + 1))
		refused 4 'large|extend|limit' "$tool" open "$dir/i.qcow2" "$name" --data-file "$dir/i.data"
	)
	nothing_left
	[ "$before" = "$(sha256sum < "$dir/i.qcow2")" ] || fault "the image was changed"
}

# small_fs BYTES: a file system in $dir/mnt, from which all can be taken
small_fs()
{
	truncate -s "$1" "$dir/fs"
	mkfs.ext4 -q -F -m 0 "$dir/fs"
	mkdir "$dir/mnt"
	mount -o loop "$dir/fs" "$dir/mnt"
}

# Nothing is left in it.
fill()
{
	not dd if=/dev/zero of="$dir/mnt/fill" bs=64k status=none 2> "$dir/err"
	not dd if=/dev/zero of="$dir/mnt/fill" bs=1k oflag=append conv=notrunc status=none 2> "$dir/err"
	sync "$dir/mnt/fill"
}

# small_image [OPTION...]: 512 L2 tables of 4 KiB, in the small file system, sparse
small_image()
{
	truncate -s 1G "$dir/i.data" "$dir/model"
	yes POISON | head -c 8M | dd of="$dir/i.data" conv=notrunc status=none
	"$tool" create "$dir/i.qcow2" --data-file "$dir/i.data" --cluster-size 4k "$@"
	cp --sparse=always "$dir/i.qcow2" "$dir/mnt/i.qcow2"
	rm "$dir/i.qcow2"
}

# write_all: something under each L2 table, to the device and to the model
write_all()
{
	python3 - "/dev/mapper/$name" "$dir/model" <<-'END'
		import mmap, os, sys
		buf = mmap.mmap(-1, 4096)
		for path, flags in (sys.argv[1], os.O_DIRECT), (sys.argv[2], 0):
		    fd = os.open(path, os.O_WRONLY | flags)
		    for at in range(4096, 1 << 30, 2 << 20):
		        buf[:16] = b"%016d" % at
		        os.pwrite(fd, buf, at)
		    os.fsync(fd)
	END
}

# The file system is full when the device is used: all that was promised is there.
full_later()
{
	small_fs 24M
	small_image "$@"
	"$tool" open "$dir/mnt/i.qcow2" "$name" --data-file "$dir/i.data" 2> "$dir/log"
	[ ! -s "$dir/log" ] || fault "$(cat "$dir/log")"
	fill
	write_all
	[ "$(mode i)" = rw ] || fault "mode $(mode i)"
	"$tool" close "$name"
	rm "$dir/mnt/fill"
	qemu-img check -q -f qcow2 "$dir/mnt/i.qcow2" || fault "qemu-img check: $?"
	qemu-img compare -q -f qcow2 -F raw "$dir/mnt/i.qcow2" "$dir/model"
}

# It is full before: what is needed is told, and nothing is taken.
full_before()
{
	local before
	local open=("$tool" open "$dir/mnt/i.qcow2" "$name" --data-file "$dir/i.data")

	small_fs 24M
	small_image
	head -c 1M /dev/zero > "$dir/mnt/some"
	fill
	rm "$dir/mnt/some"
	sync -f "$dir/mnt"
	before=$(stat -c '%s %b' "$dir/mnt/i.qcow2"; df --output=avail "$dir/mnt"; sha256sum < "$dir/mnt/i.qcow2")
	refused 4 "$dir/mnt/i.qcow2: .*can need 2.* MiB, 2.* MiB more.*only (1 MiB|[0-9]* KiB) left; free some space there, or use --sparse" \
		"${open[@]}"
	nothing_left_but_fs
	[ "$before" = "$(stat -c '%s %b' "$dir/mnt/i.qcow2"; df --output=avail "$dir/mnt"
		sha256sum < "$dir/mnt/i.qcow2")" ] || fault "something was changed"
	# Reading needs none.
	"${open[@]}" --readonly
	"$tool" close "$name"
	"${open[@]}" --sparse 2> "$dir/err"
	[ "$(wc -l < "$dir/err")" = 1 ]
	grep -q 'warning: .*sparse.*full.*writes that need more metadata fail' "$dir/err"
	dd if=/dev/zero of="/dev/mapper/$name" bs=4k count=1 oflag=direct status=none
	# With some space it becomes real while it is open.
	refused 4 'can need.*use --sparse' "$tool" resize "$name" --size 1G
	[ "$(mode i)" = rw ]
	rm "$dir/mnt/fill"
	"$tool" resize "$name" --size 1G
	fill
	write_all
	"$tool" close "$name"
	rm "$dir/mnt/fill"
	qemu-img check -q -f qcow2 "$dir/mnt/i.qcow2" || fault "qemu-img check: $?"
	qemu-img compare -q -f qcow2 -F raw "$dir/mnt/i.qcow2" "$dir/model"
}

nothing_left_but_fs()
{
	local left

	left=$(losetup -n -l -O BACK-FILE | awk -v d="$dir/" 'index($1, d) == 1 && $1 != d "fs"'; our_devices)
	[ -z "$left" ] || fault "left behind: $left"
}

block_devices()
{
	local meta data

	truncate -s 16M "$dir/meta.disk"
	pattern $((8 << 20)) > "$dir/data.disk"
	meta=$(losetup -f --show "$dir/meta.disk")
	data=$(losetup -f --show "$dir/data.disk")
	refused 5 'overwrite-device' "$tool" create "$meta" --data-file "$data"
	refused 4 'same' "$tool" create "$data" --data-file "$data" --overwrite-device
	"$tool" create "$meta" --data-file "$data" --data-file-raw --overwrite-device
	"$tool" table "$meta" --data-file "$data" > "$dir/line"
	[ "$(cat "$dir/line")" = "$(python3 "$here/qcow2image.py" line "$dir/meta.disk" "$meta" "$data")" ] ||
		fault "table: $(cat "$dir/line")"
	dmsetup create "$name" "$dir/line"
	cmp "/dev/mapper/$name" "$dir/data.disk"
	refused 4 'not opened by|dmsetup remove' "$tool" close "$name"
	dmsetup remove --retry "$name"
	"$tool" open "$meta" "$name" --data-file "$data"
	cmp "/dev/mapper/$name" "$dir/data.disk"
	refused 5 'use' "$tool" open "$meta" "$name-2" --data-file "$data"
	refused 5 'use' "$tool" create "$meta" --data-file "$dir/data.disk" --overwrite-device
	"$tool" close "$name"
	losetup -d "$meta" "$data"
	qemu-img check -q "$dir/meta.disk"
	# For files it says how to get devices.
	refused 4 'losetup|loop' "$tool" table "$dir/meta.disk" --data-file "$dir/data.disk"
}

usage()
{
	local a

	refused 1 'action' "$tool"
	refused 1 'action' "$tool" frobnicate
	for a in open info create close table resize; do
		refused 1 'usage|argument' "$tool" "$a"
	done
	refused 1 'argument|usage' "$tool" info a b
	refused 1 'argument|usage' "$tool" open a b c --data-file d
	refused 1 'option' "$tool" info --frobnicate a
	refused 1 'option|value' "$tool" create a --data-file
	refused 1 'option' "$tool" info a --size 1G
	refused 1 'data-file' "$tool" create "$dir/x"
	truncate -s 1M "$dir/data"
	for a in 0 -1 x 1.5G 1X 99999999999999999999 16E ''; do
		refused 1 'size' "$tool" create "$dir/x" --data-file "$dir/data" --size "$a"
	done
	for a in 0 256 1000 4M 513; do
		refused 1 'cluster' "$tool" create "$dir/x" --data-file "$dir/data" --cluster-size "$a"
	done
	for a in 0 3 128; do
		refused 1 'refcount' "$tool" create "$dir/x" --data-file "$dir/data" --refcount-bits "$a"
	done
	refused 1 'prealloc' "$tool" create "$dir/x" --data-file "$dir/data" --preallocation full
	[ ! -e "$dir/x" ]
	"$tool" --help | grep -q 'open'
	"$tool" --version | grep -q '[0-9]'
	# A reader that goes away, or a full disk, is an error.
	not "$tool" --help > /dev/full 2> /dev/null
}

unprivileged()
{
	image i $((4 << 20)) ''
	chmod 755 "$dir"
	chmod 666 "$dir"/i.*
	refused 2 'root|permission' setpriv --reuid=65534 --regid=65534 --clear-groups \
		"$tool" open "$dir/i.qcow2" "$name" --data-file "$dir/i.data"
	refused 2 'root|permission' setpriv --reuid=65534 --regid=65534 --clear-groups \
		"$tool" close "$name"
	chmod 600 "$dir/i.qcow2"
	refused 2 'root|permission|access' setpriv --reuid=65534 --regid=65534 --clear-groups \
		"$tool" info "$dir/i.qcow2"
	chmod 644 "$dir/i.qcow2"
	# To look at an image needs nothing but to be able to read it.
	setpriv --reuid=65534 --regid=65534 --clear-groups "$tool" info "$dir/i.qcow2" > /dev/null
}

# no_open STATUS PATTERN [OPTION...]: of image i
no_open()
{
	local status=$1 pattern=$2 before

	shift 2
	before=$(sha256sum < "$dir/i.qcow2")
	refused "$status" "$pattern" "$tool" open "$dir/i.qcow2" "$name" --data-file "$dir/i.data" "$@"
	nothing_left
	[ "$before" = "$(sha256sum < "$dir/i.qcow2")" ] || fault "the image was changed"
}

# Each with a header field that cannot be; afterwards the image is put right.
bad_headers()
{
	local good=$dir/good f value pattern size n=0
	local open=("$tool" open "$dir/i.qcow2" "$name" --data-file "$dir/i.data")

	image i $((4 << 20)) ''
	cp "$dir/i.qcow2" "$good"
	while read -r f value pattern; do
		field "$dir/i.qcow2" "$f" "$value"
		cp "$dir/i.qcow2" "$dir/before"
		refused 4 "$pattern" "${open[@]}"
		cmp "$dir/i.qcow2" "$dir/before"
		# It can still be looked at, unless it cannot be understood at all.
		case "$f $value" in
		magic*|header_length*|cluster_bits*|"version 4") ;;
		*)	"$tool" info "$dir/i.qcow2" > "$dir/out" || fault "info: $f $value"
			[[ $(< "$dir/out") =~ "can be opened: "(no|read-only) ]] || fault "info: $f $value"
			"$tool" info --json "$dir/i.qcow2" > "$dir/json.$n" ;;
		esac
		n=$((n + 1))
		cp "$good" "$dir/i.qcow2"
	done <<-'END'
		magic 1 not a qcow2
		version 2 version
		version 4 version|malformed
		cluster_bits 8 cluster
		cluster_bits 22 cluster
		crypt_method 1 encrypt
		crypt_method 2 encrypt
		nb_snapshots 1 snapshot
		incompatible_features 0 external data file
		incompatible_features 5 dirty
		incompatible_features 6 corrupt
		incompatible_features 0xc compress
		incompatible_features 0x16 corrupt
		incompatible_features 0x24 incompatible|feature
		incompatible_features 0x8000000000000004 incompatible|feature
		refcount_order 7 refcount
		header_length 8 header
		header_length 108 header
		l1_size 0 L1
		l1_size 0x10000000 L1
		l1_table_offset 0 L1
		l1_table_offset 512 L1
		l1_table_offset 0x1000000000000 L1
		refcount_table_offset 0 refcount
		refcount_table_offset 3 refcount
		refcount_table_clusters 0 refcount
		refcount_table_clusters 0x1000 refcount
		size 0 size
		size 0x200000000000000 size|L1
	END
	python3 - "$dir"/json.* <<-'END'
		import json, sys
		for path in sys.argv[1:]:
		    with open(path, encoding="utf-8") as f:
		        verdict = json.load(f)["dm-qcow2"]
		    if verdict["mappable"] not in ("no", "read-only") or not verdict["reasons"][0]["remedy"]:
		        sys.exit(f"{path}: {verdict}")
	END
	[ "$n" = 29 ]
	# Extensions: the first one begins at byte 112, its length is at 116.
	poke "$dir/i.qcow2" 116 ffffffff
	refused 4 'extension' "${open[@]}"
	cp "$good" "$dir/i.qcow2"
	for size in 0 3 511 512 4096 196608; do
		truncate -s "$size" "$dir/i.qcow2"
		refused 4 'truncated|not a qcow2|short|small|beyond|malformed' "${open[@]}"
		[ "$(stat -c %s "$dir/i.qcow2")" = "$size" ]
		cp "$good" "$dir/i.qcow2"
	done
	nothing_left

	# These two can be read, at least.
	for f in 5 6; do
		field "$dir/i.qcow2" incompatible_features "$f"
		"${open[@]}" --readonly
		"$tool" close "$name"
	done
}

# Images of other kinds, and things that are no images.
other_images()
{
	local f

	truncate -s 4M "$dir/i.data"
	qemu-img create -q -f qcow2 "$dir/plain.qcow2" 4M
	refused 4 'external data file' "$tool" open "$dir/plain.qcow2" "$name" --data-file "$dir/i.data"
	qemu-img create -q -f qcow2 -o compat=0.10 "$dir/old.qcow2" 4M
	refused 4 'version' "$tool" open "$dir/old.qcow2" "$name" --data-file "$dir/i.data"
	truncate -s 4M "$dir/base"
	qemu-img create -q -f qcow2 -b "$dir/base" -F raw -o "data_file=$dir/o.data" "$dir/o.qcow2"
	refused 1 "backing file is not named.*$dir/base" "$tool" open "$dir/o.qcow2" "$name" \
		--data-file "$dir/i.data"
	for f in plain old; do
		"$tool" info --json "$dir/$f.qcow2" > "$dir/json"
		json "$dir/json" "j['dm-qcow2']['mappable'] == 'no' and j['dm-qcow2']['reasons']"
	done
	refused 4 'no such' "$tool" open "$dir/no" "$name" --data-file "$dir/i.data"
	refused 4 'a directory; name' "$tool" open "$dir" "$name" --data-file "$dir/i.data"
	for f in /dev/null /dev/tty; do
		refused 4 'file|device' "$tool" open "$f" "$name" --data-file "$dir/i.data"
	done
	mkfifo "$dir/fifo"
	refused 4 'file|device' timeout 20 "$tool" open "$dir/fifo" "$name" --data-file "$dir/i.data"
	refused 4 'not a qcow2' "$tool" open "$dir/i.data" "$name" --data-file "$dir/i.data"
	nothing_left
}

# Entries of the tables, which an image that is written must have in order.
bad_tables()
{
	local l1

	image i $((4 << 20)) ''
	qemu-io -f qcow2 -c 'write -q 0 64k' "$dir/i.qcow2"
	l1=$(python3 "$here/qcow2image.py" get "$dir/i.qcow2" l1_table_offset)
	poke "$dir/i.qcow2" "$l1" 8000000000000200
	no_open 4 'L1'
}

data_files()
{
	image i $((4 << 20)) ''
	open=("$tool" open "$dir/i.qcow2" "$name")
	refused 4 'no such' "${open[@]}" --data-file "$dir/no"
	refused 4 'file|device' "${open[@]}" --data-file /dev/null
	refused 4 'same' "${open[@]}" --data-file "$dir/i.qcow2"
	ln "$dir/i.qcow2" "$dir/hardlink"
	refused 4 'same' "${open[@]}" --data-file "$dir/hardlink"
	truncate -s $((4194304 - 512)) "$dir/i.data"
	refused 4 '4193792.*4194304.*truncate|truncate' "${open[@]}" --data-file "$dir/i.data"
	refused 4 '4193792.*4194304' "${open[@]}" --data-file "$dir/i.data" --readonly
	[ "$(stat -c %s "$dir/i.data")" = 4193792 ] || fault "the data file was changed"
	truncate -s 4M "$dir/i.data"

	# The name in the image is a hint, no more, unless it is trusted.
	refused 1 "data-file.*$dir/i.data" "${open[@]}"
	"${open[@]}" --trust-image-paths
	"$tool" close "$name"
	poll 30 loops_gone
	mv "$dir/i.data" "$dir/elsewhere"
	ln -s "$dir/elsewhere" "$dir/i.data"
	refused 4 'link' "${open[@]}" --trust-image-paths
	rm "$dir/i.data"
	refused 4 'no such' "${open[@]}" --trust-image-paths
	nothing_left
	# Relative names start in the image's folder, not in ours.
	mkdir "$dir/sub"
	( cd "$dir/sub" && qemu-img create -q -f qcow2 -o data_file=rel.data rel.qcow2 4M &&
		truncate -s 4M rel.data )
	( cd / && "$tool" open "$dir/sub/rel.qcow2" "$name" --trust-image-paths )
	"$tool" close "$name"
	poll 30 loops_gone
	# What QEMU would open by a driver of its choice is no path.
	for f in 'json:{"driver":"file","filename":"/etc/passwd"}' 'nbd://localhost/x' 'fat:/etc' ''; do
		set_data_file "$dir/sub/rel.qcow2" "$f"
		refused '[14]' 'path|protocol|not named|empty|data-file' "$tool" open "$dir/sub/rel.qcow2" "$name" \
			--trust-image-paths
		nothing_left
	done
}

# set_data_file IMAGE NAME: put another name into the header extension
set_data_file()
{
	python3 - "$1" "$2" <<-'END'
		import struct, sys
		with open(sys.argv[1], "r+b") as f:
		    head = bytearray(f.read(4096))
		    name = sys.argv[2].encode("utf-8", "surrogateescape")
		    ext = struct.pack(">II", 0x44415441, len(name)) + name + bytes(-len(name) % 8)
		    f.seek(112)
		    f.write((ext + bytes(8)).ljust(4096 - 112, b"\0"))
	END
}

# Names that are no names, and names that want to be something else.
hostile_names()
{
	local n bad

	image i $((4 << 20)) ''
	bad=("" "a/b" "../x" "$(printf 'a%.0s' {1..200})")
	for n in "${bad[@]}"; do
		refused 1 'name' "$tool" open "$dir/i.qcow2" "$n" --data-file "$dir/i.data"
	done
	nothing_left
	# In messages they are escaped, so that they stay one line, and harmless.
	n=$dir/$'evil\n\e[31mname\t"\\\x01'
	refused 4 'no such' "$tool" open "$n" "$name" --data-file "$dir/i.data"
	cp "$dir/i.qcow2" "$n"
	"$tool" info "$n" > "$dir/out"
	[ "$(tr -d '\n' < "$dir/out" | tr -d '[:print:]' | wc -c)" = 0 ] || fault "control characters in info"
	"$tool" info --json "$n" > "$dir/json"
	json "$dir/json" "j['filename'].endswith('evil\\n\\x1b[31mname\\t\"\\\\\\x01')"
	set_data_file "$dir/i.qcow2" $'data\n\e]0;evil\a"\\\xff\xfe/x'
	"$tool" info "$dir/i.qcow2" > "$dir/out"
	[ "$(tr -d '\n' < "$dir/out" | tr -d '[:print:]' | wc -c)" = 0 ] || fault "control characters in info"
	"$tool" info --json "$dir/i.qcow2" > "$dir/json"
	json "$dir/json" "j['format-specific']['data']['data-file'].startswith('data\\n\\x1b]0;evil')"
	refused 1 'data-file' "$tool" open "$dir/i.qcow2" "$name"
	# A hostile image name in use, in status.
	image k $((4 << 20)) ''
	mv "$dir/k.qcow2" "$dir/"$'k\n"k'
	"$tool" open "$dir/"$'k\n"k' "$name" --data-file "$dir/k.data"
	"$tool" status --json > "$dir/json"
	json "$dir/json" "[d for d in j if d['name'] == '$name'][0]['filename'].startswith('$dir/k')"
	[ "$("$tool" status | grep -c "$name")" = 1 ]
	"$tool" close "$name"
}

name_in_use()
{
	image i $((4 << 20)) ''
	image j $((4 << 20)) ''
	"$tool" open "$dir/i.qcow2" "$name" --data-file "$dir/i.data"
	before=$(sha256sum < "$dir/j.qcow2")
	refused 5 'name' "$tool" open "$dir/j.qcow2" "$name" --data-file "$dir/j.data"
	[ "$before" = "$(sha256sum < "$dir/j.qcow2")" ]
	[ "$(mode i)" = rw ]
	exec 9< "/dev/mapper/$name"
	refused 5 "use" "$tool" close "$name"
	[ "$(mode i)" = rw ]
	"$tool" close "$name" --deferred
	exec 9<&-
	poll 30 loops_gone
	nothing_left
	refused 4 'no such|active' "$tool" close "$name"
	refused 4 'inactive|no such' "$tool" status "$name"
	dmsetup create "$name" --table '0 8 zero'
	refused 4 'not' "$tool" close "$name"
	refused 4 'not a qcow2' "$tool" status "$name"
	dmsetup remove --retry "$name"
	# Its user is named.
	"$tool" open "$dir/i.qcow2" "$name" --data-file "$dir/i.data"
	mkfs.ext4 -q -F "/dev/mapper/$name"
	mkdir "$dir/mnt"
	mount -t ext4 "/dev/mapper/$name" "$dir/mnt"
	refused 5 "$dir/mnt" "$tool" close "$name"
	umount "$dir/mnt"
	"$tool" close "$name"
}

# Killed anywhere on the way: all is there, or nothing.
interrupted()
{
	local t rc size

	image i $((256 << 20)) cluster_size=4k
	size=$(stat -c %s "$dir/i.qcow2")
	for t in 0.02 0.05 0.1 0.15 0.2 0.25 0.3 0.4; do
		rc=0
		timeout -s TERM "$t" "$tool" open "$dir/i.qcow2" "$name" --data-file "$dir/i.data" \
			> /dev/null 2>&1 || rc=$?
		if dmsetup info "$name" > /dev/null 2>&1; then
			[ "$(mode i)" = rw ]
			"$tool" close "$name"
			# It ends with a whole cluster now.
			size=$(((size + 4095) / 4096 * 4096))
		fi
		poll 30 loops_gone
		nothing_left
		[ "$(stat -c %s "$dir/i.qcow2")" = "$size" ] ||
			fault "after $t s (status $rc): the file has $(stat -c %s "$dir/i.qcow2") bytes, not $size"
		qemu-img check -q "$dir/i.qcow2"
	done
}

autoclear()
{
	local before

	image i $((4 << 20)) data_file_raw=on
	field "$dir/i.qcow2" autoclear_features 0x8000000000000006
	field "$dir/i.qcow2" compatible_features 0x4000000000000002
	before=$(sha256sum < "$dir/i.qcow2")
	"$tool" open "$dir/i.qcow2" "$name" --data-file "$dir/i.data" --readonly
	[ "$(blockdev --getro "/dev/mapper/$name")" = 1 ]
	"$tool" close "$name"
	[ "$before" = "$(sha256sum < "$dir/i.qcow2")" ] || fault "--readonly changed the image"
	"$tool" open "$dir/i.qcow2" "$name" --data-file "$dir/i.data"
	[ "$(python3 "$here/qcow2image.py" get "$dir/i.qcow2" autoclear_features)" = 2 ] ||
		fault "autoclear bits while open"
	dmsetup status "$name" | grep -q data_file_raw
	"$tool" close "$name"
	[ "$(python3 "$here/qcow2image.py" get "$dir/i.qcow2" autoclear_features)" = 2 ]
	[ "$(python3 "$here/qcow2image.py" get "$dir/i.qcow2" compatible_features)" = $((0x4000000000000002)) ]
}

# Bitmaps that are to be kept up to date, which nobody does yet, must say so.
bitmaps()
{
	local before

	image i $((16 << 20)) ''
	qemu-img bitmap --add -f qcow2 "$dir/i.qcow2" live
	qemu-img bitmap --add --disable -f qcow2 "$dir/i.qcow2" frozen
	before=$(sha256sum < "$dir/i.qcow2")
	"$tool" open "$dir/i.qcow2" "$name" --data-file "$dir/i.data" --readonly 2> "$dir/err"
	"$tool" close "$name"
	[ "$before" = "$(sha256sum < "$dir/i.qcow2")" ] || fault "--readonly changed the image"
	"$tool" open "$dir/i.qcow2" "$name" --data-file "$dir/i.data" 2> "$dir/err"
	grep -q 'live' "$dir/err" || fault "no warning names the bitmap: $(cat "$dir/err")"
	not grep -q 'frozen' "$dir/err"
	pattern 100000 | dd of="/dev/mapper/$name" bs=64k oflag=direct iflag=fullblock conv=notrunc status=none
	"$tool" close "$name"
	qemu-img info --output=json "$dir/i.qcow2" > "$dir/json"
	json "$dir/json" "{b['name']: 'in-use' in b['flags'] for b in j['format-specific']['data']['bitmaps']} \
		== {'live': True, 'frozen': False}"
	"$tool" info --json "$dir/i.qcow2" > "$dir/json"
	json "$dir/json" "{b['name']: 'in-use' in b['flags'] for b in j['format-specific']['data']['bitmaps']} \
		== {'live': True, 'frozen': False}"
	qemu-img check -q "$dir/i.qcow2" || fault "qemu-img check: $?"

	# The header says that there are bitmaps, but there are none: QEMU would
	# damage the image at its first write.
	image j $((4 << 20)) ''
	field "$dir/j.qcow2" autoclear_features 1
	"$tool" open "$dir/j.qcow2" "$name" --data-file "$dir/j.data" 2> "$dir/err"
	grep -q 'bitmap' "$dir/err"
	"$tool" close "$name"
	[ "$(python3 "$here/qcow2image.py" get "$dir/j.qcow2" autoclear_features)" = 0 ]
}

# qemu-img ends a file in the middle of a sector; it must not be changed for that.
readonly_odd()
{
	local before s

	for s in 64k 512 2M; do
		image i $((5 << 20)) cluster_size="$s"
		[ $(($(stat -c %s "$dir/i.qcow2") % 512)) != 0 ] || fault "not an odd size: this tests nothing"
		before=$(sha256sum < "$dir/i.qcow2")
		"$tool" open "$dir/i.qcow2" "$name" --data-file "$dir/i.data" --readonly
		truncate -s 5M "$dir/zeros"
		cmp "/dev/mapper/$name" "$dir/zeros"
		not dd if=/dev/zero of="/dev/mapper/$name" count=1 oflag=direct status=none 2> /dev/null
		"$tool" close "$name"
		poll 30 loops_gone
		nothing_left
		[ "$before" = "$(sha256sum < "$dir/i.qcow2")" ] || fault "--readonly changed the image"
		rm -f "$dir"/i.*
	done
	# From where nothing can be written at all.
	image i $((4 << 20)) ''
	mkdir "$dir/ro"
	mount --bind "$dir" "$dir/ro"
	mount -o remount,bind,ro "$dir/ro"
	"$tool" open "$dir/ro/i.qcow2" "$name" --data-file "$dir/ro/i.data" --readonly
	"$tool" close "$name"
	poll 30 loops_gone
	refused '[24]' 'read-only|readonly' "$tool" open "$dir/ro/i.qcow2" "$name" --data-file "$dir/ro/i.data"
	umount "$dir/ro"
	nothing_left
}

# A refcount table that is too small for all L2 tables is replaced by a larger one.
refcount_table_grows()
{
	image i $((136 << 20)) cluster_size=512,refcount_bits=64
	before=$(python3 "$here/qcow2image.py" get "$dir/i.qcow2" refcount_table_clusters)
	"$tool" open "$dir/i.qcow2" "$name" --data-file "$dir/i.data"
	[ "$(python3 "$here/qcow2image.py" get "$dir/i.qcow2" refcount_table_clusters)" -gt "$before" ] ||
		fault "it did not grow: this tests nothing"
	truncate -s 136M "$dir/model"
	python3 - "/dev/mapper/$name" "$dir/model" <<-'END'
		import os, sys
		fds = [os.open(p, os.O_RDWR) for p in sys.argv[1:]]
		for i in range(0, 136 << 20, 32768):
		    for fd in fds:
		        os.pwrite(fd, b"%d" % i * 64, i)
		os.fsync(fds[0])
	END
	"$tool" close "$name"
	qemu-img check -q "$dir/i.qcow2" || fault "qemu-img check: $?"
	qemu-img compare -q -f qcow2 -F raw "$dir/i.qcow2" "$dir/model"
}

info_json()
{
	local k

	image i $((16 << 20)) cluster_size=4k,refcount_bits=32
	qemu-img info --output=json "$dir/i.qcow2" > "$dir/theirs"
	"$tool" info --json "$dir/i.qcow2" > "$dir/json"
	# What qemu-img says too, must be the same.
	python3 - "$dir/theirs" "$dir/json" <<-'END'
		import json, sys
		theirs, ours = (json.load(open(p, encoding="utf-8")) for p in sys.argv[1:])
		def compare(a, b, path):
		    for key, value in a.items():
		        if isinstance(value, dict):
		            compare(value, b[key], path + key + "/")
		        elif b.get(key) != value:
		            sys.exit(f"{path}{key}: {b.get(key)!r}, qemu-img: {value!r}")
		compare(theirs, ours, "")
	END
	json "$dir/json" "j['dm-qcow2']['mappable'] == 'read-write' and not j['dm-qcow2']['reasons']"
	for k in 'virtual size' 'cluster size' 'data file' 'can be opened: read-write'; do
		"$tool" info "$dir/i.qcow2" | grep -q "$k" || fault "info does not tell: $k"
	done
	"$tool" status --json > "$dir/json"
	json "$dir/json" "j == []"
	refused 4 'not a qcow2' "$tool" info "$dir/i.data"
}

no_module()
{
	image i $((4 << 20)) ''
	rmmod dm_qcow2
	# The kernel would load it by itself, if it were installed.
	printf 'install dm-qcow2 /bin/false\ninstall dm_qcow2 /bin/false\n' > /run/modprobe.d/qcow2test.conf
	rc=0
	( no_open 4 'dm-qcow2 module|not available' ) || rc=$?
	rm /run/modprobe.d/qcow2test.conf
	load_module
	[ "$rc" = 0 ]
}

start jq setpriv mkfs.ext4
need_tool
mkdir -p /run/modprobe.d
check "create, open, status, close" whole_cycle
check "close when the image has been removed" close_without_name
check "create: any cluster size and refcount width" create_sizes
check "create: never touches the data, never overwrites an image" create_over_a_disk
check "no space: nothing is left, nothing is changed" create_no_space
check "a full file system: what was taken at open is there" full_later
check "a full file system: tables that are holes" full_later --preallocation metadata
check "a full file system when the image is opened" full_before
check "block devices, and the table line" block_devices
check "wrong parameters" usage
check "no permission" unprivileged
check "headers that cannot be mapped" bad_headers
check "images of other kinds, and what is no image" other_images
check "a corrupt L1 table" bad_tables
check "data files that do not fit, and names in images" data_files
check "hostile names" hostile_names
check "names and devices in use" name_in_use
check "interrupted" interrupted
check "autoclear bits" autoclear
check "bitmaps" bitmaps
check "--readonly changes nothing" readonly_odd
check "the refcount table grows" refcount_table_grows
check "info --json agrees with qemu-img" info_json
check "without the module" no_module
finish
