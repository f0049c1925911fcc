#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# Completion, in the shells that are installed.
#
#	completion.sh [WRAPPER...] TOOL
#
# WRAPPER is, for example, valgrind with its options.

tests=$(realpath "$(dirname "$0")")
# shellcheck source=tools/tests/lib.sh
. "$tests/lib.sh"

for need in zsh fish; do
	if ! command -v $need >/dev/null; then
		echo "${0##*/}: $need is missing; install $need" >&2
		exit 1
	fi
done
mkdir bin home files
ln -s "${tool[-1]}" bin/qcow2setup
export PATH=$PWD/bin:$PATH HOME=$PWD/home SCRIPTS=$tests/../completion
touch files/vm.qcow2 files/vm.raw

# offers WANT WORD...: behind WORD..., the last of which is begun, there is just that, in any order
offers() {
	local want=$1
	shift
	run completion -- "$@" && [ "$(cut -f1 out | sort)" = "$(tr -s ' ' '\n' <<<"$want" | sort)" ]
}

actions=$("${tool[-1]}" --help | sed -n '/^Actions:/,/^$/s/^  \([a-z]*\) .*/\1/p')
offers "$actions help" '' && ! grep -q '^completion' out && grep -q '^check	' out
ok "actions"
wrong=
for action in $actions; do
	options=$("${tool[-1]}" help "$action" | sed -n '/^Options:/,/^$/s/^  \(--[a-z0-9-]*\).*/\1/p')
	offers "${options:+$options }--verbose --help --version" "$action" -- || wrong+=" $action"
done
[ -z "$wrong" ] || { echo "other options:$wrong" >err; false; }
ok "each action has its own options, and all of them"
offers "check checkpoint clone close create" c && offers "check checkpoint" --json ch && offers '' x && offers '' frobnicate '' &&
	offers "--data-file --data-file-raw" create vm.qcow2 --data
ok "what is begun"
offers "off metadata" create --preallocation '' && offers "metadata" create --preallocation m &&
	offers "--preallocation=off" create --preallocation=o && offers "leaks all bitmaps" check x --repair '' &&
	offers auto resize x --size '' && offers '' create --size '' && offers '' create --cluster-size ''
ok "words of options"
offers ":files" create --data-file '' && offers ":files" create --data-file= && offers ":files" backup begin x --cow '' &&
	offers ":files" create '' && offers '' create x '' && offers ":files" open --readonly '' && offers '' open x '' &&
	offers '' measure '' && offers ":files" import '' && offers ":files" import a '' && offers ":files" clone '' &&
	offers '' clone a ''
ok "files"
offers "list add remove clear enable disable merge" bitmap '' && offers "begin" backup b && offers ":files" backup restore ''
ok "words of actions"

# in_bash LINE: what bash offers
in_bash() {
	# shellcheck disable=SC2016 # that bash's
	(cd files && LINE=$1 bash --norc --noprofile -c '
		. "$SCRIPTS/qcow2setup.bash"
		COMP_LINE=$LINE COMP_POINT=${#LINE} COMP_TYPE=9 COMP_KEY=9
		pieces=${LINE//=/ = }
		read -ra COMP_WORDS <<< "$pieces"
		[[ $LINE != *" " ]] || COMP_WORDS+=("")
		COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
		_qcow2setup qcow2setup
		printf "%s\n" "${COMPREPLY[@]}"') 2>err | sort | xargs >out
}

# offered WANT
offered() {
	[ "$(cat out)" = "$1" ] && [ ! -s err ]
}

in_bash 'qcow2setup ch' && offered "check checkpoint" && in_bash 'qcow2setup check --rep' && offered --repair &&
	in_bash 'qcow2setup check --repair ' && offered "all bitmaps leaks" && in_bash 'qcow2setup create --data-file v' &&
	offered "vm.qcow2 vm.raw" && in_bash 'qcow2setup create --preallocation=m' && offered metadata &&
	in_bash 'qcow2setup create --preallocation=' && offered "metadata off" &&
	in_bash 'qcow2setup create --data-file=vm.r' && offered vm.raw && in_bash 'qcow2setup frob ' && offered ''
ok "bash"
# And as a user has it: a terminal, and TAB
in_terminal() {
	python3 - "$@" <<-'PYTHON' >out 2>err
		import os, pty, re, select, sys, time
		shell, typed, want = sys.argv[1:]
		argv = {"bash": ["bash", "--norc", "--noprofile", "-i"], "zsh": ["zsh", "-f", "-i"]}[shell]
		pid, fd = pty.fork()
		if not pid:
		    os.environ.update(TERM="dumb", PS1="$ ")
		    os.execvp(argv[0], argv)
		seen = b""
		def until(pattern):
		    global seen
		    end = time.monotonic() + 120
		    while not re.search(pattern, seen):
		        if time.monotonic() > end or not select.select([fd], [], [], 120)[0]:
		            sys.exit(f"no {pattern!r} in {seen!r}")
		        seen += os.read(fd, 4096)
		setup = {"bash": ". $SCRIPTS/qcow2setup.bash", "zsh":
		         "autoload -U compinit && compinit -u -D && source $SCRIPTS/_qcow2setup"}[shell]
		os.write(fd, setup.encode() + b"; echo rea''dy\n")
		until(rb"ready\r?\n")
		seen = b""
		os.write(fd, typed.encode() + b"\t")
		until(want.encode())
		os.close(fd)
	PYTHON
}
in_terminal bash 'qcow2setup measu' 'qcow2setup measure ' && in_terminal bash 'qcow2setup create --preallocation=m' '=metadata ' &&
	in_terminal bash 'qcow2setup check files/vm.q' 'files/vm.qcow2 '
ok "bash, in a terminal"
in_terminal zsh 'qcow2setup measu' 'measure ' && in_terminal zsh 'qcow2setup create --preallocation=m' '=metadata' &&
	in_terminal zsh 'qcow2setup check files/vm.q' 'files/vm.qcow2 '
ok "zsh, in a terminal"

# in_fish LINE
in_fish() {
	# shellcheck disable=SC2016 # that fish's
	(cd files && LINE=$1 fish --no-config -c 'source $SCRIPTS/qcow2setup.fish; complete -C "$LINE"') 2>err |
		cut -f1 | sort | xargs >out
}
in_fish 'qcow2setup ch' && offered "check checkpoint" && in_fish 'qcow2setup check --repair ' && offered "all bitmaps leaks" &&
	in_fish 'qcow2setup create --data-file v' && offered "vm.qcow2 vm.raw" && in_fish 'qcow2setup create --preallocation=m' &&
	offered --preallocation=metadata
ok "fish"

finish completion
