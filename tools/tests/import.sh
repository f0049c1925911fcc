#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# qcow2setup import: needs no kernel module.  Usage: [WRAPPER...] TOOL

# shellcheck source=tools/tests/lib.sh
. "$(dirname "$0")/lib.sh"

# source FORMAT FILE [OPTION...]: 8 MiB with some data, some of it zeros
source_image() {
	local format=$1 file=$2
	shift 2
	qemu-img convert -f raw -O "$format" "$@" content.raw "$file"
}

yes something | head -c 3000000 >content.raw
truncate -s 8M content.raw

for format in raw qcow2 vdi vhdx vpc qed vmdk; do
	source_image $format "s.$format"
done

for format in raw qcow2 vdi vhdx vpc qed; do
	rm -f t.raw
	exits 0 import "s.$format" t.raw --verify && [ ! -s out ] && [ ! -s err ] &&
		same -f $format -F raw "s.$format" t.raw
	ok "import of $format, whose format is looked for"
done

[ "$(stat -c %b t.raw)" -lt 8192 ] && [ "$(stat -c %s t.raw)" -ge $((8 << 20)) ]
ok "holes stay holes"

[ "$(stat -c %a t.raw)" = 600 ]
ok "a disk is its owner's"

refuse 4 '--format' import s.vmdk none.raw && [ ! -e none.raw ]
ok "a vmdk can name other files: its format is not guessed"

exits 0 import s.vmdk v.raw --format vmdk --verify && same -f raw -F raw content.raw v.raw
ok "it is taken as one if the user says so"

refuse 5 'exists; remove it' import s.qcow2 t.raw && same -f raw -F raw content.raw t.raw
ok "what exists is not overwritten"

# A guest that writes a header into its raw disk, which names a secret
echo secret >secret
qemu-img create -q -f qcow2 -b secret -F raw evil.raw 8M
refuse 4 '--trust-image-paths' import evil.raw e.raw && [ ! -e e.raw ]
ok "a backing file that is named by what was found is not read"
refuse 4 '--trust-image-paths' import evil.raw e.raw --format qcow2 && [ ! -e e.raw ]
ok "nor with a format"
exits 0 import evil.raw e.raw --format raw && cmp -s -n "$(stat -c %s evil.raw)" evil.raw e.raw
ok "as a raw disk it is what it is"
rm e.raw
exits 0 import evil.raw e.raw --trust-image-paths && head -c 6 e.raw | grep -q secret
ok "it is read if that is trusted"

image 8M
qemu-io -f qcow2 -c 'write -q -P 3 0 1M' t.qcow2
refuse 4 '--trust-image-paths' import t.qcow2 x.raw && [ ! -e x.raw ]
ok "a data file likewise"
exits 0 import t.qcow2 x.raw --trust-image-paths --verify && same -f qcow2 -F raw t.qcow2 x.raw
ok "an image of this project's becomes a raw disk"

refuse 4 'check --format' import s.raw y.raw --format vdi && [ ! -e y.raw ]
ok "a wrong format: nothing is left"
refuse 4 'no such\|cannot' import none.qcow2 y.raw || grep -q none.qcow2 err
ok "a source that is not there"
refuse 1 '--format' import nbd://127.0.0.1:1/x y.raw && [ ! -e y.raw ]
ok "what others serve is not guessed"

mkdir -p "a b:c" && cp s.qcow2 "a b:c/-s:1.qcow2" && cd "a b:c" &&
	exits 0 import ./-s:1.qcow2 ./-t:1.raw && same -f raw -F raw ../content.raw ./-t:1.raw
ok "names with blanks, colons and a dash"
cd "$work" || exit 1

# The target is full: there is a limit on the size of files.
(
	ulimit -f 2048
	exits 4 import s.qcow2 full.raw
) && [ ! -e full.raw ] && [ "$(wc -l <err)" = 1 ] && grep -q 'full.raw: cannot' err
ok "a target that cannot be made: one line, and nothing is left"

(
	mkdir -p bin
	# shellcheck disable=SC2016 # that script's
	printf '#!/bin/sh\ncase $1 in convert) echo "qemu-img: error while writing: No space left" >&2; exit 1 ;; esac\nexec %s "$@"\n' \
		"$(command -v qemu-img)" >bin/qemu-img
	chmod +x bin/qemu-img
	PATH=$PWD/bin:$PATH refuse 4 'full.raw: cannot be written: .*No space left; free some' import s.qcow2 full.raw
) && [ ! -e full.raw ]
ok "a target that gets full: qemu-img's reason, and nothing is left"

(
	mkdir -p bin
	# shellcheck disable=SC2016 # that script's
	printf '#!/bin/sh\ncase $1 in convert) kill -INT $PPID; exec sleep 1000 ;; esac\nexec %s "$@"\n' \
		"$(command -v qemu-img)" >bin/qemu-img
	chmod +x bin/qemu-img
	PATH=$PWD/bin:$PATH env --default-signal=INT "${tool[-1]}" import s.qcow2 int.raw
) >out 2>err
[ $? -eq 130 ] && [ ! -e int.raw ] && [ ! -s err ]
ok "it is interrupted: the copier ends, and nothing is left"

(
	# shellcheck disable=SC2016 # that script's
	printf '#!/bin/sh\ncase $1 in compare) exit 1 ;; esac\nexec %s "$@"\n' \
		"$(command -v qemu-img)" >bin/qemu-img
	PATH=$PWD/bin:$PATH refuse 4 'differs from' import s.qcow2 differs.raw --verify
) && [ ! -e differs.raw ]
ok "it differs from what was copied: it is not kept"

mkdir empty
PATH=$PWD/empty exits 4 import s.qcow2 no.raw --format qcow2 && [ ! -e no.raw ] && [ "$(wc -l <err)" = 1 ] && grep -q 'qemu-img cannot be run; install it' err
ok "no qemu-img"

exits 0 import s.qcow2 j.raw --json --verify &&
	[ "$(jq -s 'map(select(.done == .total and .total == 8388608)) | length' out)" -ge 2 ] && [ ! -s err ]
ok "--json: lines that end with all of it, of the copy and of the comparison"

finish import
