#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# What --json prints is as the schema says, errors, too.  Without a device; for those see
# selftests/dm-qcow2/test_json.py.
#
#	json.sh [WRAPPER...] TOOL
#
# WRAPPER is, for example, valgrind with its options.

tests=$(realpath "$(dirname "$0")")
# shellcheck source=tools/tests/lib.sh
. "$tests/lib.sh"

if ! python3 -c 'import jsonschema' 2>/dev/null; then
	echo "${0##*/}: jsonschema is missing; install python3-jsonschema" >&2
	exit 1
fi
page=$tests/../../Documentation/qcow2setup-json.7

# One process for all of them: it takes long to start.
mkfifo ask answer
python3 "$tests/schema.py" serve <ask >answer &
exec 7>ask 8<answer

# valid NAME: what was printed last
valid() {
	local wrong

	echo "$1 out" >&7
	read -r wrong <&8 || wrong="no answer"
	[ -z "$wrong" ] || { echo "$wrong" >>err; return 1; }
}

# fails STATUS KIND PATTERN ARG...: one line on stderr, and the same as an object
fails() {
	local status=$1 kind=$2 pattern=$3
	shift 3
	exits "$status" "$@" && [ "$(wc -l <err)" -eq 1 ] && [ "$(wc -l <out)" -eq 1 ] && valid error &&
		jq -e --arg k "$kind" --arg p "$pattern" --argjson s "$status" \
			'.error | .exit == $s and .kind == $k and (.message | test($p)) and (.remedy as $r | .message | endswith("; " + $r))' \
			out >/dev/null &&
		[ "qcow2setup: $(jq -r .error.message out)" = "$(cat err)" ]
}

python3 "$tests/schema.py" self "$page" >err
ok "schema: it is one, and the page has each key"
# The judge can say no.
image 4M
run measure --size 1G --json && cp out good
wrong=
for edit in '.more = 1' 'del(.version)' '.version = 2' '.required = "x"' '."fully-allocated" = -1' '[.]'; do
	jq "$edit" good >out
	! valid measure || wrong+=" taken: $edit"
done
cp good out
[ -z "$wrong" ] && valid measure
ok "schema: what is different is not taken"

for options in '' ,compat=0.10 ,cluster_size=512,refcount_bits=1 ,extended_l2=on ,data_file_raw=on ,lazy_refcounts=on; do
	rm -f t.qcow2 t.raw
	case $options in
	,compat*)	qemu-img create -q -f qcow2 -o compat=0.10 t.qcow2 4M ;;
	*)		image 4M "$options" ;;
	esac
	run info --json t.qcow2 && valid info
	ok "info: ${options:-plain}"
	[[ $options != ,compat* ]] || continue
	qemu-io -c 'write -q 1M 64K' -c 'write -q -z 2M 64K' t.qcow2
	run map --json t.qcow2 && valid map && jq -e 'length > 0' out >/dev/null &&
		run check --json t.qcow2 && valid check
	ok "map, check: ${options:-plain}"
done
overlay raw
qemu-io -c 'write -q 1M 64K' t.qcow2
run info --json t.qcow2 && valid info && run map --json t.qcow2 && valid map && jq -e 'any(.depth == 1)' out >/dev/null
ok "info, map: a backing file"
image 4M
qemu-io -c 'write -q 0 64K' t.qcow2
run bitmap add t.qcow2 one && run bitmap add t.qcow2 two --disabled && qemu-io -c 'write -q 1M 1M' t.qcow2 &&
	run info --json t.qcow2 && valid info && jq -e '."dm-qcow2".bitmaps | length == 2' out >/dev/null &&
	run bitmap list t.qcow2 --json && valid bitmap-list && jq -e 'length == 2' out >/dev/null &&
	run map --bitmap one --json t.qcow2 && valid map
ok "bitmaps"
held t.qcow2 run info --json t.qcow2 && valid info && jq -e '."dm-qcow2".users | length > 0' out >/dev/null
ok "info: somebody has it"
for args in '--size 1.5G' '--size 1P --cluster-size 2M' '--size 1G --bitmap one'; do
	# shellcheck disable=SC2086 # words are wanted
	run measure $args --json && valid measure && jq -e '."data-file" == ."data-file-size"' out >/dev/null
	ok "measure: $args"
done

rm -f t.raw nothing
fails 4 wrong '^nothing: no such file' info nothing --json && fails 4 wrong 'no such file' map nothing --json &&
	fails 4 wrong 'no such file' bitmap list nothing --json
ok "error: no such image"
fails 1 wrong 'no such file' check nothing --json
ok "error: with another exit status than its kind"
fails 1 parameter 'is not known' map --json --frobnicate t.qcow2 && fails 1 parameter 'usage' map --json &&
	fails 1 parameter 'needs a value' measure --json --size &&
	fails 1 parameter 'takes no option --size' --json --size 3 info t.qcow2 &&
	fails 1 parameter 'no whole number of bytes; use a number' measure --json --size 1.3 &&
	fails 1 parameter '3 is not possible; use a power of two' measure --json --size 3G --cluster-size 3
ok "error: parameters"
fails 4 wrong '^a; b: no such file' map 'a; b' --json && [ "$(jq -r .error.remedy out)" = "check the name" ] &&
	fails 4 wrong 'x1b' map $'\e[31m' --json
ok "error: names that hold anything"
for args in 'create --json x' 'bitmap add t.qcow2 x --json' 'frobnicate --json' 'help --json x'; do
	# shellcheck disable=SC2086 # words are wanted
	exits 1 $args && [ ! -s out ]
	ok "no object where nobody asked for one: $args"
done
run info nothing
[ ! -s out ]
ok "no object without --json"
image 1G
qemu-io -c 'write -q 5M 1M' t.qcow2
at=$((0x$(hex -j 40 -N 8 t.qcow2)))
l2=$((0x$(hex -j $((at)) -N 8 t.qcow2) & 0xfffffffffffe00))
poke t.qcow2 $((l2 + 80 * 8)) 8000000000000200
exits 4 map t.qcow2 --json && ! jq . out >/dev/null 2>&1 && tail -n 1 out >last && cp last out && valid error &&
	jq -e '.error.message | test("corrupt")' out >/dev/null
ok "error: a list that does not end: the last line says why"
exits 2 check t.qcow2 --json && valid check && jq -e '.corruptions > 0' out >/dev/null
ok "check: what it finds is no error"

exec 7>&-
finish json
