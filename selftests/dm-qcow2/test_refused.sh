#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# qcow2setup: each of its refusals. A refusal must be one line, have the right exit status,
# and leave no trace.

# shellcheck source=common.sh
. "$(dirname "$0")/common.sh"

name=$prefix-i

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
	for a in 0 -1 x 1.5 1,5G 1X 99999999999999999999 16E ''; do
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
	refused 4 'file|device' timeout 300 "$tool" open "$dir/fifo" "$name" --data-file "$dir/i.data"
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

start setpriv mkfs.ext4
need_tool
[ -n "$list" ] || mkdir -p /run/modprobe.d
check "wrong parameters" usage
check "no permission" unprivileged
check "headers that cannot be mapped" bad_headers
check "images of other kinds, and what is no image" other_images
check "a corrupt L1 table" bad_tables
check "data files that do not fit, and names in images" data_files
check "hostile names" hostile_names
check "names and devices in use" name_in_use
check "without the module" no_module
finish
