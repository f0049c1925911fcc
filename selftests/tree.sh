# SPDX-License-Identifier: GPL-2.0-or-later
# shellcheck shell=bash
#
# What the tests of packages share. To be sourced by bash, behind vm/lib.sh.

# make_tree FOLDER: a repository of what is here, committed or not, so that what is
# tested is this.
make_tree()
{
	# shellcheck disable=SC2154 # set by vm/lib.sh
	mkdir "$1" && cd "$top" || return
	if [ -e .git ]; then
		git -c safe.directory="$top" ls-files -co --exclude-standard -z
	else
		find . -path ./.build -prune -o -path ./dist -prune -o ! -type d -print0
	fi | while IFS= read -r -d '' f; do
		[ ! -e "$f" ] || printf '%s\0' "$f"
	done | cpio -p0dm --quiet "$1" && cd "$1" || return
	git -c init.defaultBranch=main init -q && git add -A &&
		git -c user.name=test -c user.email=test@example.org commit -q -m test
}
