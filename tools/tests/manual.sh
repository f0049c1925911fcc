#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# Tests of the manual pages of the tool against what its help says: each action is on
# one page, which its help names, with the options that it has, and no others.
#
#	manual.sh [WRAPPER...] TOOL
#
# WRAPPER is, for example, valgrind with its options.

pages=$(realpath "$(dirname "$0")/../../Documentation")
# shellcheck source=tools/tests/lib.sh
. "$(dirname "$0")/lib.sh"

# part PAGE SECTION: what is in it
part() {
	awk -v title=".Sh $2" '/^\.Sh / { on = $0 == title; next } on' "$pages/$1.8"
}

# synopsis PAGE ACTION: what is behind the action there
synopsis() {
	part "$1" SYNOPSIS | awk -v action=".Cm $2" '/^\.Nm/ { on = 0; first = 1; next }
		first { on = $0 == action; first = 0 } on'
}

# The options that a text with macros names, as "-NAME"
options() {
	grep -o 'Fl -[a-z0-9-]*' | sed 's/Fl //' | sort -u
}

# The commands of the tool that a page shows, a line each
examples() {
	part "$1" EXAMPLES | sed -e ':a' -e '/\\$/{ N; s/\\*\n */ /; ba' -e '}' | grep '^qcow2setup '
}

# The actions that the first page lists: name, page and summary
listed() {
	part qcow2setup ACTIONS | awk '/^\.Xr qcow2setup-[a-z]* 8/ { page = $2 }
		name { print name, page, $0; name = "" } /^\.It Cm / { name = $3 }'
}

mapfile -t names < <(cd "$pages" && printf '%s\n' qcow2setup-*.8 | sed 's/\.8$//')
[ ${#names[@]} -ge 5 ] ; ok "pages: those of groups of actions"

run help && cp out general
mapfile -t actions < <(sed -n '/^Actions:/,/^$/s/^  \([a-z]*\) .*/\1/p' out)
[ ${#actions[@]} -ge 10 ] && tail -n 1 general | grep -qF 'See qcow2setup(8).'
ok "help: actions, and the first page"

for action in "${actions[@]}"; do
	run help "$action" && cp out "help.$action"
	page=$(sed -n '$s/^See \(qcow2setup-[a-z]*\)(8)\.$/\1/p' out)
	has=$(for p in qcow2setup "${names[@]}"; do
		[ -z "$(synopsis "$p" "$action")" ] || echo "$p"
	done)
	echo "help: ${page:-none}; synopsis: ${has:-none}" >err
	[ -n "$page" ] && [ "$has" = "$page" ] ; ok "$action: on the page that its help names, and no other"
	echo "$page" >>used
	echo "$action" >>"actions.$page"

	grep -o '^  --[a-z0-9-]*' "help.$action" | sed 's/^  -//' | sort -u >takes
	synopsis "$page" "$action" | options >manual
	cmp takes manual >out 2>&1 ; ok "$action: its options are those of the synopsis"
	listed | grep -x "$action .*" >out
	summary=$(sed -n "s/^$action: \(.*\)\.$/\1/p" "help.$action")
	[ "$(cat out)" = "$action $page $summary" ] ; ok "$action: once in the list of the first page, as help has it"
done
[ "$(listed | wc -l)" -eq ${#actions[@]} ] ; ok "the first page lists no other action"
printf '%s\n' "${names[@]}" | sort | diff - <(sort -u used) >out ; ok "each page has an action"

# Options of all actions, and one that is the same for all that have it
part qcow2setup OPTIONS | grep '^\.It ' | options >common
printf '%s\n' -help -json -verbose -version | diff - common >out ; ok "the first page: common options"
for page in "${names[@]}"; do
	missing=()
	for section in NAME SYNOPSIS DESCRIPTION OPTIONS EXAMPLES 'SEE ALSO'; do
		[ -n "$(part "$page" "$section")" ] || missing+=("$section")
	done
	echo "missing: ${missing[*]}" >err
	[ ${#missing[@]} -eq 0 ] ; ok "$page: its sections"
	grep -qx "\.Dt ${page^^} 8" "$pages/$page.8" &&
		part "$page" NAME | grep -qx "\.Nm $page" ; ok "$page: its name"

	# What has a section of its own is all that a page is about, or one of its actions.
	part "$page" DESCRIPTION >description
	if [ "$(wc -l <"actions.$page")" -gt 1 ]; then
		while read -r action; do
			[ "$(grep -cx "\.Ss $action" description)" -eq 1 ] || echo "no section $action"
		done <"actions.$page" >out
		[ ! -s out ] ; ok "$page: a section for each action"
	fi
	part "$page" SYNOPSIS | options | comm -23 - common >takes
	part "$page" OPTIONS | grep '^\.It ' | options | diff takes - >out
	ok "$page: each option of the synopsis is told of, and no other"

	# What it shows can be typed.
	examples "$page" >shown
	while read -r _ action rest; do
		[ -e "help.$action" ] || { echo "no action $action"; continue; }
		grep -o -- ' --[a-z][a-z0-9-]*' <<<" $rest" | while read -r option; do
			grep -q "^  $option\( \|$\)" "help.$action" || echo "$action: no option $option"
		done
	done <shown >out
	[ ! -s out ] && cut -d ' ' -f 2 shown | grep -qxFf "actions.$page" ; ok "$page: its examples"

	part "$page" 'SEE ALSO' | grep -q '^\.Xr qcow2setup 8' &&
		part qcow2setup 'SEE ALSO' | grep -q "^\.Xr $page 8" ; ok "$page: it and the first page name each other"
done
grep -oh '^\.Xr qcow2[a-z-]* [0-9]' "$pages"/qcow2*.[1-8] | sort -u | while read -r _ page part; do
	[ -e "$pages/$page.$part" ] || echo "no page $page($part)"
done >out
[ ! -s out ] ; ok "pages that are named exist"

finish manual
