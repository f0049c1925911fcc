#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# How far something is: on a terminal it is drawn, elsewhere there is nothing.  What takes long is
# a qemu-img that takes as long as it is let.  Usage: [WRAPPER...] TOOL

# shellcheck source=tools/tests/lib.sh
. "$(dirname "$0")/lib.sh"
command -v script >/dev/null || { echo "progress.sh: script is missing; install bsdutils" >&2; exit 1; }

truncate -s 4G s.raw
mkdir bin
# It says how far it is until there is a file "goon".
cat >bin/qemu-img <<-END
	#!/bin/sh
	real=$(command -v qemu-img)
	[ "\$1" = convert ] || exec \$real "\$@"
	n=0
	while [ ! -e goon ] && [ \$n -lt 6000 ]; do
		printf '    (25.00/100%%)\r'
		n=\$((n + 1))
		sleep 0.1
	done
	exec \$real "\$@" > /dev/null
	END
chmod +x bin/qemu-img
export PATH=$PWD/bin:$PATH

# wait_for COMMAND...
wait_for() {
	for ((i = 0; i < 6000; i++)); do
		"$@" && return
		sleep 0.1
	done
	return 1
}

# on_terminal FILE ARGUMENTS...: what a terminal shows goes to FILE
on_terminal() {
	local file=$1
	shift
	: >"$file"
	script -qefc "$(printf '%q ' "${tool[-1]}" "$@")" "$file" </dev/null >/dev/null 2>&1 &
}

rm -f goon
on_terminal shown import s.raw t.raw
wait_for grep -qaE 'import: 1 GiB of 4 GiB \(25%\), [0-9.]+ [KMG]iB/s, [0-9]+ (s|min [0-9]+ s|h [0-9]+ min) left' shown
ok "on a terminal: bytes, share, rate and time left"
touch goon
wait $!
ok "and the import goes well"
# The last that is drawn is blanks, and the cursor is where it was.
tail -c 400 shown | tr '\r' '\n' | sed -e '/^Script done/d' -e '/^$/d' | tail -n 1 | grep -qa '^ *$'
ok "nothing is left of it"

rm -f goon t.raw
on_terminal shown import s.raw t.raw --json
wait_for grep -qa '^{"version": 1, "done": 1073741824, "total": 4294967296, "rate": ' shown
ok "on a terminal, with --json: lines, each second"
touch goon
wait $! && ! grep -qa 'import:' shown
ok "and nothing is drawn"

rm -f goon t.raw
"${tool[-1]}" import s.raw t.raw --json >out 2>err &
wait_for grep -q '^{"version": 1, "done": 1073741824, ' out
ok "into a file, with --json: lines"
touch goon
wait $! && [ ! -s err ] && [ "$(tail -n 1 out | jq .done)" = $((4 << 30)) ]
ok "the last one says that all is done"

rm -f goon t.raw
(
	sleep 3
	touch goon
) &
"${tool[-1]}" import s.raw t.raw >out 2>err && [ ! -s out ] && [ ! -s err ]
ok "into a file: nothing"
wait

finish progress
