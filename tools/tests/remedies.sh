#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# Every remedy that the tool prints, and that needs no device: it is provoked, done as
# it is printed, and then what was refused works.  remedies.list says which remedies
# there are, and who tests each; none may be missing there, or here.
#
#	remedies.sh [WRAPPER...] TOOL
#
# WRAPPER is, for example, valgrind with its options.

tests=$(realpath "$(dirname "$0")")
# shellcheck source=tools/tests/lib.sh
. "$tests/lib.sh"

parse=(python3 "$tests/remedies.py")
: >seen
: >said
# What is printed is run with this tool.
mkdir bin
printf '#!/bin/bash\nexec %s "$@"\n' "$(printf '%q ' "${tool[@]}")" >bin/qcow2setup
chmod +x bin/qcow2setup
PATH=$PWD/bin:$PATH

# refused CODE PATTERN ARG...: kept is what is said
refused() {
	refuse "$@" && cp err said
}

# told PATTERN ARG...: it is done, with that warning, or finding
told() {
	local pattern=$1
	shift
	run "$@"
	grep -e "$pattern" err >said
}

# judged PATTERN IMAGE: that is a reason that info gives
judged() {
	run info "$2" && grep -e "^  .*$1.*; " out >said
}

# printed [@N] [PLACEHOLDER=VALUE...]: the command, or the Nth one
printed() {
	"${parse[@]}" command "$@" <said >cmd || { echo "no command: $(cat said)" >>err; return 1; }
	bash -ec "$(cat cmd)" >out.cmd 2>err.cmd || { cat cmd err.cmd >>err; return 1; }
}

# option: the first that the remedy names
option() {
	sed 's/.*; //' said | grep -oe '--[a-z-]*' | head -n 1
}

# between AFTER BEFORE: a word of what is said
between() {
	sed -n "s/.*$1\\([^ ]*\\)${2:-$}/\\1\n/p" said | head -n 1
}

# works ARG...: what was refused, with what was said to be done; it counts as tested
works() {
	run "$@" && tested
}

tested() {
	cat said >>seen
}

# found ARG...: files and devices are right, as far as it goes without devices
found() {
	refuse 4 'is a file, and a table names block devices' table "$@" && tested
}

# mappable IMAGE
mappable() {
	run info --json "$1" && jq -e '."dm-qcow2".mappable == "read-write"' out >/dev/null && tested
}

#
# Parameters
#
truncate -s 10G d.raw
truncate -s 1M b.raw
while IFS=@ read -r action bad after before good; do
	rm -f c.qcow2 n.qcow2 n.raw
	image 4M ,backing_file=d.raw,backing_fmt=raw
	# shellcheck disable=SC2086 # words are wanted
	refused 1 ';' $action $bad && [ "$(between "$after" "$before")" = "$good" ] &&
		if [ "${action%% *}" = table ]; then
			found ${action#table } ${bad% *} "$good"
		else
			works $action ${bad% *} "$good"
		fi
	ok "parameter: $bad"
done <<'TABLE'
create c.qcow2 --data-file d.raw@--size x@such as @@10G
measure@--size x@such as @@10G
resize t.qcow2@--size +x@use @ for@+10G
resize t.qcow2@--size -1G@such as @@10G
resize t.qcow2@--size 12Q@such as @@10G
table t.qcow2 --data-file t.raw --backing-file d.raw@--cache-limit x@such as @@64M
table t.qcow2 --data-file t.raw --backing-file d.raw@--cache-limit 0@such as @@64M
create c.qcow2 --data-file d.raw@--cluster-size 4x@from @ to@512
create c.qcow2 --data-file d.raw@--refcount-bits x@use @, 2@1
create c.qcow2 --data-file d.raw@--cluster-size 3@from @ to@512
create c.qcow2 --data-file d.raw@--cluster-size 3@ to @@2M
create c.qcow2 --data-file d.raw@--refcount-bits 3@use @, 2@1
create c.qcow2 --data-file d.raw@--refcount-bits 3@or @@64
create c.qcow2 --data-file d.raw@--preallocation x@use @ or@off
create c.qcow2 --data-file d.raw@--preallocation x@or @@metadata
create c.qcow2 --data-file d.raw --backing-file b.raw@--backing-format x@use @ or@raw
bitmap add t.qcow2 g1@--granularity 3@from @ to@512
bitmap add t.qcow2 g2@--granularity 3@ to @@2G
check t.qcow2@--repair x@use @, all@leaks
check t.qcow2@--repair x@, @ or@all
check t.qcow2@--repair x@or @@bitmaps
TABLE

image 4M
for args in '' 'frobnicate' 'info --frobnicate t.qcow2' 'info --size' 'info --size 4M t.qcow2'; do
	# shellcheck disable=SC2086 # words are wanted
	refused 1 'see qcow2setup ' $args && printed && grep -q '^Usage' out.cmd && tested
	ok "help: $args"
done
refused 1 'usage' info && printed IMAGE=t.qcow2 && tested
ok "number of arguments"
refused 1 'usage' help info more && sed -i 's/ \[ACTION\]//' said && printed && grep -q '^Usage' out.cmd && cp err said &&
	tested
ok "number of arguments: help"
image 4M
while IFS=@ read -r args words; do
	# shellcheck disable=SC2086 # words are wanted
	refused 1 'usage' bitmap $args && sed -i "s/IMAGE|NAME/IMAGE/; s/ \[.*//; s/SOURCE\.\.\./SOURCE/" said &&
		printed IMAGE=t.qcow2 $words && cp err said && tested
	ok "bitmap: usage: $args"
done <<'TABLE'
add t.qcow2@BITMAP=b0
add t.qcow2 b1 --json@BITMAP=b1
list t.qcow2 b0@
list t.qcow2 --disabled@
disable t.qcow2@BITMAP=b0
enable t.qcow2 b0 b1@BITMAP=b0
merge t.qcow2 b0@TARGET=b1 SOURCE=b0
clear t.qcow2 b1 --granularity 4K@BITMAP=b1
remove t.qcow2 b1 --json@BITMAP=b1
TABLE

# needs WHAT OPTION ARG...: without the option it is refused, and names it
needs() {
	local what=$1 add=$2
	shift 2
	refused 1 ';' "$@" || refused 4 ';' "$@" || return
	[[ $(option) == "${add%% *}"* ]] || { cat said >err; return 1; }
	# shellcheck disable=SC2086 # words are wanted
	case $what in
	found)	found "${@:2}" $add ;;
	*)	works "$@" $add ;;
	esac
}

rm -f c.qcow2
needs works '--data-file t.raw' create c.qcow2
ok "create: no data file"
rm -f c.qcow2
needs works '--size 1M' create c.qcow2 --data-file new.raw && [ "$(stat -c %s new.raw)" = 1048576 ]
ok "create: a data file that is not there"
rm -f c.qcow2
refused 4 'below /dev; check the name' create c.qcow2 --data-file /dev/nothing-here --size 1M && [ ! -e /dev/nothing-here ] &&
	works create c.qcow2 --data-file t.raw --size 1M
ok "create: a device that is not there"
rm -f c.qcow2 n.raw
refused 4 'is a qcow2 image' create c.qcow2 --data-file t.qcow2 --data-file-raw && [ ! -e c.qcow2 ] && printed NEW=n.raw &&
	works create c.qcow2 --data-file n.raw --data-file-raw && rm c.qcow2 &&
	works create c.qcow2 --data-file t.qcow2 --data-file-raw "$(option)"
ok "create: an image as data"
rm -f c.qcow2 n.qcow2
refused 4 'not a qcow2 image; check the name' info t.raw && printed NEW=n.qcow2 && works info n.qcow2 && cp err said
ok "a raw disk as image"
needs works '--size 1G' measure
ok "measure: no size"
needs works '--size 8M' resize t.qcow2
ok "resize: no size"
truncate -s 9M t.raw
needs works '--data-file t.raw' resize t.qcow2 --size auto
ok "resize: auto needs the data"
rm -f c.qcow2
needs works '--backing-file b.raw' create c.qcow2 --data-file t.raw --backing-format raw
ok "create: a format, but no backing file"
rm -f c.qcow2
refused 1 'not guessed' create c.qcow2 --data-file t.raw --backing-file b.raw &&
	works create c.qcow2 --data-file t.raw --backing-file b.raw "$(option)" raw
ok "create: a backing file, but no format"
image 4M
needs found '--data-file t.raw' table t.qcow2
ok "no data file: the image names it"
qemu-img create -q -f qcow2 -o data_file=t.raw n.qcow2 4M && poke n.qcow2 112 "$(printf '%032x' 0)"
needs found '--data-file t.raw' table n.qcow2
ok "no data file: the image names none"

refused 1 'leave --backing-file b.raw out' table t.qcow2 --data-file t.raw --backing-file b.raw &&
	found t.qcow2 --data-file t.raw
ok "table: a backing file too many"
refused 1 'leave --backing-file out' resize t.qcow2 --size 5M --backing-file b.raw && works resize t.qcow2 --size 5M
ok "resize: a backing file too many"
overlay qcow2
refused 1 'give --backing-file once' resize t.qcow2 --size 5M --backing-file b.qcow2 --backing-file x &&
	works resize t.qcow2 --size 5M --backing-file b.qcow2
ok "resize: two backing files"
rm -f c.qcow2
refused 1 'give --backing-file once' create c.qcow2 --data-file t.raw --backing-file b.qcow2 \
	--backing-file b.raw --backing-format qcow2 &&
	works create c.qcow2 --data-file t.raw --backing-file b.qcow2 --backing-format qcow2
ok "create: two backing files"
overlay raw
rm -f c.qcow2
refused 1 'leave --backing-file or --data-file-raw out' create c.qcow2 --data-file t.raw --data-file-raw \
	--backing-file b.raw --backing-format raw &&
	works create c.qcow2 --data-file t.raw --data-file-raw && rm c.qcow2 &&
	works create c.qcow2 --data-file t.raw --backing-file b.raw --backing-format raw
ok "create: raw data and a backing file"
refused 1 'leave ,data-file= out' table t.qcow2 --data-file t.raw --backing-file b.raw,data-file=b.raw &&
	found t.qcow2 --data-file t.raw --backing-file b.raw
ok "table: a raw backing file with data"

#
# Sizes
#
rm -f c.qcow2 s.raw
truncate -s 300 s.raw
refused 4 'middle of a sector' create c.qcow2 --data-file s.raw && printed && [ ! -e 512 ]
# "it" is the file at the start of the line
bash -c "$(cat cmd) s.raw" && works create c.qcow2 --data-file s.raw
ok "create: data that ends within a sector"
rm -f c.qcow2
: >s.raw
refused 4 'give a larger --size and data file' create c.qcow2 --data-file s.raw && truncate -s 1M s.raw &&
	works create c.qcow2 --data-file s.raw --size 1M
ok "create: data of no size"
rm -f c.qcow2
refused 4 'enlarge it' create c.qcow2 --data-file s.raw --size 2M && truncate -s 2M s.raw &&
	works create c.qcow2 --data-file s.raw --size 2M && rm c.qcow2 &&
	works create c.qcow2 --data-file s.raw --size 1M
ok "create: data that is too small"
rm -f c.qcow2
refused 4 'give a smaller --size' create c.qcow2 --data-file d.raw --size 100P &&
	works create c.qcow2 --data-file d.raw --size 10G
ok "create: larger than a disk can be"
truncate -s 4T d.raw
for args in '--cluster-size 512' '--cluster-size 4K --extended-l2'; do
	for action in 'create c.qcow2 --data-file d.raw' measure; do
		rm -f c.qcow2
		[[ $args$action != '--cluster-size 512measure' ]] || args+=' --size 4T'
		[[ $args$action != *l2measure ]] || args+=' --size 4T'
		# shellcheck disable=SC2086 # words are wanted
		refuse 1 'larger --cluster-size' $action $args || refuse 4 'larger --cluster-size' $action $args
		# shellcheck disable=SC2086 # words are wanted
		cp err said && works $action ${args/4K/16K} "$(option)" 64K
		ok "${action%% *}: $args"
	done
done
truncate -s 10G d.raw
refused 1 'give a smaller --size' measure --size 100P && works measure --size 10G
ok "measure: larger than a disk can be"
image 4M ,cluster_size=512
refused 4 'give a smaller --size' resize t.qcow2 --size 1T && works resize t.qcow2 --size 1G && printed FILE=n.raw NEW=n.qcow2 &&
	bash -c "$(sed 's/data_file=n.raw/&,cluster_size=64k/' cmd)" && run resize n.qcow2 --size 1T
ok "resize: larger than the clusters allow"
refused 4 'give a smaller --size' resize n.qcow2 --size 100P && works resize n.qcow2 --size 2T
ok "resize: larger than a disk can be"
image 4M
refused 1 'give --size' resize t.qcow2 --size 5000001 && works resize t.qcow2 --size "$(between '--size ')"
ok "resize: not whole sectors"
truncate -s 1M t.raw
refused 4 'enlarge the data' resize t.qcow2 --size auto --data-file t.raw && truncate -s 6M t.raw &&
	works resize t.qcow2 --size auto --data-file t.raw
ok "resize: data that is smaller"
image 6000K
qemu-io -c 'write -q 0 6000K' t.qcow2
needs works '--data-file t.raw' resize t.qcow2 --size 8M
ok "resize: what follows the end must be cleared"
image 4M
truncate -s 3M t.raw
refused 4 'enlarge it' table t.qcow2 --data-file t.raw && printed && found t.qcow2 --data-file t.raw
ok "table: data that is too small"

#
# Names
#
image 4M
mkdir dir fifo
mkfifo fifo/p
refused 4 'check the name' info T.qcow2 && works info t.qcow2
ok "no such file"
refused 4 'check the name' info t.raw && works info t.qcow2
ok "no image"
refused 1 'name a regular file' check --repair all dir && works check --repair all t.qcow2
ok "a folder"
refused 4 'name one of these' info fifo/p && works info t.qcow2
ok "a pipe"
refused 4 'create it' create none/c.qcow2 --data-file t.raw && mkdir none && works create none/c.qcow2 --data-file t.raw
ok "create: no folder"
refused 5 'remove it' create t.qcow2 --data-file t.raw && rm t.qcow2 && works create t.qcow2 --data-file t.raw
ok "create: it exists"
refused 5 'remove it' create t.qcow2 --data-file t.raw --overwrite-device && rm t.qcow2 &&
	works create t.qcow2 --data-file t.raw
ok "create: it exists, and is no device"
long=$(printf 'x%.0s' {1..250})
mkdir -p "$long/$long/$long/$long/$long"
truncate -s 1M "$long/$long/$long/$long/$long/b"
rm -f c.qcow2
refused 4 'use a shorter path' create c.qcow2 --data-file t.raw --backing-file "$long/$long/$long/$long/$long/b" \
	--backing-format raw && works create c.qcow2 --data-file t.raw --backing-file b.raw --backing-format raw
ok "create: a long name"
rm -f c.qcow2
cp b.raw "$long"x
refused 4 'larger --cluster-size' create c.qcow2 --cluster-size 512 --data-file "$long/../${long}x" &&
	works create c.qcow2 --cluster-size 64K --data-file "$long/../${long}x" && rm c.qcow2 &&
	works create c.qcow2 --cluster-size 512 --data-file b.raw
ok "create: a long name and small clusters"
rm -f c.qcow2
image 4M
refused 4 'give the data file' table t.qcow2 --data-file t.qcow2 && found t.qcow2 "$(option)" t.raw
ok "image and data are the same"
refused 4 'give the data file' resize t.qcow2 --size 5M --data-file t.qcow2 &&
	works resize t.qcow2 --size 5M "$(option)" t.raw
ok "resize: image and data are the same"
refused 4 'name two files' create c.qcow2 --data-file t.raw --backing-file t.raw --backing-format raw &&
	works create c.qcow2 --data-file t.raw --backing-file b.raw --backing-format raw
ok "create: data and backing file are the same"
overlay qcow2
refused 4 'name another file' table t.qcow2 --data-file t.raw --backing-file b.qcow2,data-file=t.raw &&
	found t.qcow2 --data-file t.raw --backing-file b.qcow2,data-file=b.data
ok "a file with two places in a chain"
refused 4 'cannot find its full name\|no such file' create none/d.qcow2 --data-file nothing && works create none/d.qcow2 --data-file t.raw
ok "create: no such data"

#
# Images that cannot be mapped
#
converted() {
	rm -f n.qcow2 n.raw
	qemu-img convert -O raw "$1" want.raw 2>/dev/null
	printed FILE=n.raw NEW=n.qcow2 && mappable n.qcow2 && check n.qcow2 &&
		{ [ ! -s want.raw ] || same -f qcow2 -F raw n.qcow2 want.raw; }
}
yes data | head -c 4M >src.raw
for how in compat=0.10 compat=1.1; do
	qemu-img convert -f raw -O qcow2 -o $how src.raw p.qcow2
	judged 'version 2\|no external data file' p.qcow2 && converted p.qcow2
	ok "ordinary image, $how"
done
qemu-img convert -c -f raw -O qcow2 src.raw p.qcow2
judged 'no external data file' p.qcow2 && converted p.qcow2
ok "compressed clusters"
qemu-img convert -f raw -O qcow2 src.raw p.qcow2
qemu-img snapshot -c one p.qcow2
run info p.qcow2 && grep 'internal snapshots; ' out >said && converted p.qcow2
ok "internal snapshots"
qemu-img convert -f raw -O qcow2 src.raw "it's a, b.qcow2"
judged 'no external data file' "it's a, b.qcow2" && converted "it's a, b.qcow2"
ok "a name that has to be quoted"
qemu-img convert -f raw -O qcow2 src.raw p.qcow2 && mv p.qcow2 nbd:x && mv ./nbd:x -- -x && mv -- -x $'a\nb:c'
judged 'no external data file' $'a\nb:c' && converted $'./a\nb:c'
ok "a name that is none for a terminal"
printf secret >phrase
qemu-img create -q -f qcow2 --object secret,id=s,file=phrase -o encrypt.format=aes,encrypt.key-secret=s p.qcow2 4M 2>/dev/null
run info p.qcow2 && grep 'encrypted; ' out >said && rm -f want.raw n.qcow2 n.raw &&
	printed FILE=n.raw NEW=n.qcow2 PASSPHRASE=phrase && mappable n.qcow2 && check n.qcow2
ok "encrypted"
qemu-img create -q -f qcow p.qcow2 4M
refused 4 'version 1' info p.qcow2 && rm -f want.raw n.qcow2 n.raw && printed FILE=n.raw NEW=n.qcow2 && mappable n.qcow2
ok "qcow version 1"
image 4M
cp t.qcow2 before.qcow2
poke t.qcow2 4 00000004
refused 4 'use the program that made it' info t.qcow2 && cp before.qcow2 t.qcow2 && mappable t.qcow2
ok "version 4"
poke t.qcow2 72 0000000000000104
judged 'unknown incompatible' t.qcow2 && cp before.qcow2 t.qcow2 && mappable t.qcow2
ok "unknown features"
overlay raw
poke t.qcow2 88 0000000000000002
judged 'exclude each other' t.qcow2 && rm -f want.raw n.qcow2 n.raw && printed FILE=n.raw NEW=n.qcow2 && mappable n.qcow2
ok "raw data and a backing file"

# Also where the data is not where the image says, as Incus has it
for there in yes no; do
	qemu-img create -q -f raw b.raw 4M
	for n in 1 2; do
		rm -f t.qcow2
		qemu-img create -q -f qcow2 -u -b b.raw -o data_file=t.raw -F raw t.qcow2 4M
		# No format is recorded any more.
		python3 - <<-'END'
			import struct
			with open("t.qcow2", "r+b") as f:
			    h = f.read(1024)
			    at = h.find(struct.pack(">I", 0xe2792aca))
			    f.seek(at)
			    f.write(struct.pack(">I", 0x7fffffff))
		END
		[ $there = yes ] || rm -f t.raw
		judged 'not recorded' t.qcow2 && printed && mappable t.qcow2
		ok "format of the backing file, data is there: $there, $n"
	done
	qemu-img convert -f raw -O vmdk src.raw b.vmdk
	mkdir -p folder && mv b.vmdk folder
	qemu-img create -q -f qcow2 -u -b b.vmdk -F vmdk -o data_file=t.raw folder/v.qcow2 4M
	[ $there = yes ] || rm -f t.raw
	judged 'of format vmdk' folder/v.qcow2 && rm -f new.raw && printed NEW="$PWD/new.raw" &&
		cmp new.raw src.raw && mappable folder/v.qcow2
	ok "another format, data is there: $there"

	image 1G
	qemu-img bitmap --add -g 512 t.qcow2 "the first"
	[ $there = yes ] || rm -f t.raw
	refused 4 'bitmap the first' resize t.qcow2 --size 4T && printed && works resize t.qcow2 --size 4T
	ok "resize: a bitmap, data is there: $there"
	image 4M
	poke t.qcow2 79 06
	[ $there = yes ] || rm -f t.raw
	judged 'marked corrupt' t.qcow2 && printed && mappable t.qcow2
	ok "marked as corrupt, data is there: $there"
	poke t.qcow2 79 05
	judged 'marked dirty' t.qcow2 && printed && mappable t.qcow2
	ok "marked as dirty, data is there: $there"
done

# bad_bitmap: of t.qcow2
bad_bitmap() {
	python3 - <<-'END'
		import struct
		with open("t.qcow2", "r+b") as f:
		    h = f.read(65536)
		    at, = struct.unpack(">Q", h[(e := h.find(bytes.fromhex("2385287500000018"))) + 24:e + 32])
		    f.seek(at + 17)
		    f.write(b"\x50")
	END
}
image 1G
qemu-img bitmap --add t.qcow2 b
bad_bitmap
cp t.qcow2 bad.qcow2
run info t.qcow2 && grep 'granularity' out >said && ! qemu-img check -q t.qcow2 2>/dev/null
ok "malformed bitmaps: QEMU does not take the image"
printed
mappable t.qcow2 && run check --repair leaks t.qcow2 && check t.qcow2 && qemu-io -c 'write -q 0 64k' t.qcow2 2>/dev/null && check t.qcow2
ok "malformed bitmaps: given up"
cp bad.qcow2 t.qcow2
refused 4 'granularity' resize t.qcow2 --size 2G && printed
works resize t.qcow2 --size 2G
ok "resize: malformed bitmaps"
image 1G ,data_file_raw=on
qemu-img bitmap --add t.qcow2 b
bad_bitmap
refused 4 'granularity' resize t.qcow2 --size 2G && printed
works resize t.qcow2 --size 2G && run info --json t.qcow2 && jq -e '."format-specific".data."data-file-raw"' out >/dev/null
ok "malformed bitmaps: the raw bit stays"

#
# Bitmaps
#
image 20M
refused 1 'is not known' bitmap frobnicate t.qcow2 && works bitmap "$(between 'use bitmap ' ,)" t.qcow2
ok "bitmap: not known"
refused 1 'usage' bitmap add t.qcow2 && works bitmap add t.qcow2 a --granularity 64K --disabled
ok "bitmap: number of arguments"
refused 1 'no option --json' bitmap add t.qcow2 b --json && works bitmap add t.qcow2 b
ok "bitmap: an option of another"
refused 1 '1 to 1023' bitmap add t.qcow2 '' && works bitmap add t.qcow2 c
ok "bitmap: no name"
refused 5 'bitmap c already' bitmap add t.qcow2 c && printed && works bitmap add t.qcow2 c
ok "bitmap: exists"
refused 1 'give --start' checkpoint t.qcow2 --stop b && works checkpoint t.qcow2 --stop b --start b2
ok "checkpoint: nothing begins"
refused 4 'no bitmap d' bitmap clear t.qcow2 d && works bitmap clear t.qcow2 "$(between 'is there: ' ,)"
ok "bitmap: another one is there"
image 20M
refused 4 'no bitmaps' bitmap clear t.qcow2 'a b' && printed && works bitmap clear t.qcow2 'a b'
ok "bitmap: none is there"
for n in {1..15}; do
	run bitmap add t.qcow2 "n$n"
done
refused 4 'record already' bitmap add t.qcow2 more && printed NAME=n7 && works bitmap add t.qcow2 more
ok "bitmap: too many record"
image 20M
qemu-img bitmap --add t.qcow2 bad
prepare_steps prepare t.qcow2
refused 4 'inconsistent' bitmap clear t.qcow2 bad && printed && run bitmap add t.qcow2 bad && works bitmap clear t.qcow2 bad
ok "bitmap: inconsistent"
image 16T
refused 4 'too large' bitmap add t.qcow2 b --granularity 512 &&
	works bitmap add t.qcow2 b --granularity "$(between 'granularity of ')"
ok "bitmap: too large"
image 4M ",cluster_size=512,data_file=$(printf './%.0s' {1..180})t.raw"
refused 4 'no room' bitmap add t.qcow2 a && printed FILE=roomy.raw NEW=roomy.qcow2 && works bitmap add roomy.qcow2 a
ok "bitmap: no room in the header"
rm -f c.qcow2
refused 1 'from 512 to 2G' create c.qcow2 --data-file t.raw --bitmap a,granularity=3 &&
	works create c.qcow2 --data-file t.raw --bitmap a,granularity=512
ok "bitmap: granularity of a new one"
bitmaps=()
for n in {1..17}; do
	bitmaps+=(--bitmap "n$n")
done
refused 1 'more than 16' measure --size 1G "${bitmaps[@]}" && works measure --size 1G "${bitmaps[@]:2}"
ok "bitmap: too many new ones"

#
# Damage
#
image 1G
qemu-io -c 'write -q 0 128k' t.qcow2
cp t.qcow2 before.qcow2
# provoked PATTERN info|ACTION...: one of info's reasons, or a refusal
provoked() {
	if [ "$2" = info ]; then
		judged "$1" t.qcow2
	else
		# shellcheck disable=SC2086 # words are wanted
		refused 4 "$1" $2
	fi
}
# The backup is there, unless a command is printed that does it.
mended() {
	if grep -q 'restore it' said; then
		cp before.qcow2 t.qcow2
	else
		printed SIZE=1G
	fi
}
judged_again() {
	if [ "$1" = info ]; then
		mappable t.qcow2
	else
		# shellcheck disable=SC2086 # words are wanted
		works $1
	fi
}
while IFS=@ read -r what at hex args; do
	cp before.qcow2 t.qcow2
	poke t.qcow2 "$at" "$hex"
	provoked "$what" "$args" && mended && judged_again "$args"
	ok "damage: $what: ${args%% *}"
done <<'TABLE'
refcount table is empty@56@00000000@info
beyond the end@40@0000000010000000@info
not a multiple@40@0000000000030200@info
less than one sector@24@0000000000000000@info
refcount table entry@65536@0000000000020100@resize t.qcow2 --size 2G
L1 entry 0.*restore@196608@8000000000040100@resize t.qcow2 --size 2G
malformed@100@00000001@info t.qcow2 --json
TABLE
# In the last cluster, which is in use and grows
image 6000K
truncate -s 8M t.raw
qemu-io -c 'write -q 0 6000K' t.qcow2
cp t.qcow2 before.qcow2
entry=$((262144 + 93 * 8))
poke t.qcow2 $entry 80000000005d0200
refused 4 'L2 entry of offset.*restore' resize t.qcow2 --size 8M --data-file t.raw && cp before.qcow2 t.qcow2 &&
	works resize t.qcow2 --size 8M --data-file t.raw
ok "damage: an L2 entry"
overlay raw
qemu-io -c 'write -q 0 1M' t.qcow2
poke t.qcow2 $((0x$(hex -j 40 -N 8 t.qcow2))) 00
refused 4 'is shared; repair' resize t.qcow2 --size 5M && printed && works resize t.qcow2 --size 5M
ok "damage: an L2 table without COPIED"
cp before.qcow2 t.qcow2
poke t.qcow2 $entry 80000000005d0200
refused 4 'see what qcow2setup check says' map t.qcow2 && ! bash -c 'qcow2setup check t.qcow2' >out 2>err &&
	grep -q '0x5d0200\|offset' err && cp before.qcow2 t.qcow2 && works map t.qcow2
ok "map: damage"
poke t.qcow2 40 0000000010000000
refused 4 'see what qcow2setup info' map t.qcow2 && printed && grep -q 'beyond the end' out.cmd && cp before.qcow2 t.qcow2 &&
	works map t.qcow2
ok "map: a header that cannot be right"
cp before.qcow2 t.qcow2
poke t.qcow2 24 0000000000000000
refused 1 'less than one sector' check t.qcow2 && printed SIZE=6144000 && works check t.qcow2
ok "check: less than a sector"
qemu-img convert -f raw -O qcow2 src.raw p.qcow2
for action in check map; do
	refuse 1 'use qemu-img' $action p.qcow2 || refuse 4 'use qemu-img' $action p.qcow2
	cp err said && printed && [ -s out.cmd ] && tested
	ok "$action: an ordinary image"
done
for mark in 5 6; do
	image 1G
	poke t.qcow2 79 0$mark
	told 'warning.*--repair all' check t.qcow2 && works check t.qcow2 --repair all && ! grep warning err && mappable t.qcow2
	ok "check: mark $mark"
done
# Leaks, and a table that may be one of them
image 1G
qemu-io -c 'write -q 0 128k' t.qcow2
cp t.qcow2 before.qcow2
poke t.qcow2 $((131072 + 2 * 20)) 0001
poke t.qcow2 196616 8000000000040100
truncate -s 2M t.qcow2
told 'repair the rest first' check t.qcow2 --repair leaks && poke t.qcow2 196616 0000000000000000 &&
	works check t.qcow2 --repair leaks
ok "check: leaks, and what is not known"
image 64M ,cluster_size=512
qemu-io -c 'write -q 0 64M' t.qcow2
python3 - <<'END'
with open("t.qcow2", "r+b") as f:
    f.seek(40)
    f.seek(int.from_bytes(f.read(8), "big"))
    l1 = [int.from_bytes(f.read(8), "big") & ~(1 << 63) for _ in range(2048)]
    for l2 in l1[:1100]:
        f.seek(l2)
        f.write(b"\x40")
END
told 'verbose shows it all' check t.qcow2 && ! run check t.qcow2 --verbose && [ "$(wc -l <err)" -ge 1100 ] && tested
ok "check: more than is shown"

#
# Space, by the steps that open makes
#
image 8G
cp --sparse=always t.qcow2 before.qcow2
for why in '4096 99999999999 28 free.some' '1125899906842624 0 122 quota'; do
	read -r left room err text <<<"$why"
	cp --sparse=always before.qcow2 t.qcow2
	! prepare_steps space t.qcow2 "$left" "$room" "$err" && grep "${text/./ }.*--sparse" err >said &&
		prepare_steps sparse t.qcow2 && tested && cp --sparse=always before.qcow2 t.qcow2 &&
		prepare_steps space t.qcow2 1125899906842624 1125899906842624 0 && tested
	ok "space: ${text/./ }"
done
image 1G
python3 - <<'END'
# A cluster at 1 TiB counts as used, and nobody uses it.
with open("t.qcow2", "r+b") as f:
    far = 1 << 40
    per_block = 65536 // 2
    f.seek(65536 + far // 65536 // per_block * 8)
    f.write((262144).to_bytes(8, "big"))
    f.seek(131072 + 4 * 2)
    f.write(b"\0\1")
    f.seek(262144 + far // 65536 % per_block * 2)
    f.write(b"\0\1")
    f.truncate(far + 65536)
END
! prepare_steps prepare t.qcow2 && grep 'spread over' err >said && cp --sparse=always t.qcow2 far.qcow2 && printed &&
	prepare_steps prepare t.qcow2 && tested && prepare_steps sparse far.qcow2
ok "space: metadata that is spread"
image 1M ,cluster_size=512
cp t.qcow2 before.qcow2
made=$("${steps[-1]}" fail-grow t.qcow2 $((24 << 20)) 0 1000000 1000000 2>err)
for ((n = 0; n < made; n++)); do
	cp before.qcow2 t.qcow2
	! prepare_steps fail-grow t.qcow2 $((24 << 20)) 0 $((made - 1)) "$n" || :
	! grep 'could not be put back' err >said || break
done
printed && tested
ok "resize: what could not be undone"

#
# Others
#
image 4M
coproc qemu-io t.qcow2 >/dev/null 2>&1
for _ in {1..1200}; do
	grep -q "OFDLCK.*:$(stat -c %i t.qcow2) " /proc/locks && break
	sleep 0.05
done
qemu=$COPROC_PID
refused 1 'locked' check t.qcow2 && printed && grep -q "process $qemu (qemu-io)" out.cmd
ok "in use: who it is"
cp said locked
run info t.qcow2 && grep '  in use: ' out >said && grep -q '; stop that' said
ok "in use: info"
kill "$qemu"
wait "$qemu" 2>/dev/null
mappable t.qcow2 && run info t.qcow2 && ! grep 'in use' out && cp locked said && works check t.qcow2
ok "in use: no more"

# Without privileges
chmod 755 "$work"
cp "${tool[-1]}" user-tool
user() {
	if [ "$(id -u)" = 0 ]; then
		setpriv --reuid 65534 --regid 65534 --clear-groups "${tool[@]:0:${#tool[@]}-1}" "$work/user-tool" "$@"
	else
		"$work/user-tool" "$@"
	fi >out 2>err
}
chmod 000 t.qcow2
! user info t.qcow2 && cp err said && [ "$(wc -l <err)" = 1 ] && grep -q 'run as root, or get access' err &&
	chmod 644 t.qcow2 && user info t.qcow2 && tested
ok "no permission to read"
# No option that check does not take
chmod 444 t.qcow2
! user check --repair all t.qcow2 && cp err said && [ "$(wc -l <err)" = 1 ] && grep -q 'get write access$' err &&
	chmod 666 t.qcow2 && user check --repair all t.qcow2 && tested
ok "check --repair: no permission to write"

# A chain that is too long: 34 images, the lowest one first
rm -f c*.qcow2 c*.raw
"${tool[-1]}" create c0.qcow2 --data-file b.raw
for n in {1..33}; do
	cp --sparse=always b.raw "c$n.raw"
	"${tool[-1]}" create "c$n.qcow2" --data-file "c$n.raw" --backing-file "c$((n - 1)).qcow2" --backing-format qcow2
done
# below N: the options for what is below image N
below() {
	local n
	args=()
	for ((n = $1 - 1; n >= 0; n--)); do
		[ $n -gt 0 ] && args+=(--backing-file "c$n.qcow2,data-file=c$n.raw") || args+=(--backing-file "c0.qcow2,data-file=b.raw")
	done
}
below 33
refused 1 'more than 32 backing files' table c33.qcow2 --data-file c33.raw "${args[@]}" &&
	printed BASE=c31.qcow2 IMAGE=c33.qcow2 && below 32 && found c33.qcow2 --data-file c33.raw "${args[@]}"
ok "a chain of 34 images"

# What QEMU cannot do, either: an action's own options
for action in 'check --repair all' 'resize --size 2G'; do
	image 1G
	chmod 444 t.qcow2
	# shellcheck disable=SC2086 # words are wanted
	! user $action t.qcow2 && ! grep -q -e --readonly err
	ok "no option of another action: ${action%% *}"
done

#
# All of them
#
"${parse[@]}" lint "$tests/.." "$tests/remedies.list" >out 2>err
ok "every remedy in the sources is in the list"
"${parse[@]}" tested "$tests/remedies.list" offline seen >out 2>err
ok "every remedy that needs no device was tested"
[ -z "${KEEP-}" ] || cp seen "$KEEP"

finish remedies
