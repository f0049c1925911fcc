# SPDX-License-Identifier: GPL-2.0-or-later
# shellcheck shell=bash
#
# Packages of any of Debian's releases, unpacked into trees in the cache: nothing is
# installed, and neither the packages nor the package lists of this machine change. To
# be sourced by bash, behind lib.sh; the script goes on like this:
#
#	find_mirror
#	lock_folder FOLDER		(and exit if the tree is there now)
#	begin_packages WHAT		WHAT: for messages
#	use_suites SUITE...
#	get_packages PACKAGE...
#	unpack_packages TAR'S OPTION...
#	keep_tree NAME

export LC_ALL=C
PATH=$PATH:/usr/sbin:/sbin
debian_arch=amd64

# The mirror is that of this machine.
find_mirror()
{
	local codename

	# shellcheck source=/dev/null
	codename=$(. /etc/os-release && echo "${VERSION_CODENAME-}")
	mirror=$(apt-get indextargets --format "\$(RELEASE) \$(REPO_URI)" 'Created-By: Packages' |
		awk -v r="$codename" '$1 == r || $1 ~ /^(old)*stable$/ { print $2; exit }')
	[ -n "$mirror" ] || die "apt knows no mirror of Debian $codename; name one in /etc/apt/sources.list"
	keys=/usr/share/keyrings/debian-archive-keyring.gpg
	[ -e "$keys" ] || die "$keys is missing; run: apt-get install debian-archive-keyring"
}

# One at a time. Whatever work folder there is, then, was left by one that was killed.
lock_folder()
{
	trees=$1
	mkdir -p "$trees" || die "$trees cannot be made; check its permissions, or set CACHE="
	exec 9> "$trees/.lock"
	flock 9
}

# shellcheck disable=SC2317 # called by the trap
remove_work()
{
	trap '' INT TERM HUP
	rm -rf "$tmp"
}

# apt with this machine's settings (proxies ...), but lists and packages of its own.
begin_packages()
{
	what=$1
	rm -rf "$trees"/.tmp.*
	tmp=$(mktemp -d "$trees/.tmp.XXXXXX") || die "no space in $trees; free some"
	trap remove_work EXIT
	trap 'exit 129' HUP
	trap 'exit 130' INT
	trap 'exit 143' TERM
	mkdir -p "$tmp"/apt/{lists,cache/archives}/partial
	: > "$tmp/apt/status"
	private=(-q -o "Dir::Etc::SourceList=$tmp/apt/sources.list" -o Dir::Etc::SourceParts=-
		 -o "Dir::State=$tmp/apt" -o "Dir::State::Lists=$tmp/apt/lists" -o "Dir::State::status=$tmp/apt/status"
		 -o "Dir::Cache=$tmp/apt/cache" -o "Dir::Cache::archives=$tmp/apt/cache/archives"
		 -o "APT::Architecture=$debian_arch" -o APT::Sandbox::User=root -o APT::Install-Recommends=0
		 -o APT::Update::Error-Mode=any -o Acquire::Languages=none)
}

private_apt()
{
	local reason

	apt-get "${private[@]}" "$@" < /dev/null > "$tmp/log" 2>&1 9>&- && return
	reason=$(grep -E '^(E|W): ' "$tmp/log" | head -n 1)
	die "apt-get $1 for $what failed (${reason:-no reason given}); check network and disk space, then try again"
}

use_suites()
{
	printf "deb [signed-by=$keys] $mirror %s main\n" "$@" > "$tmp/apt/sources.list"
	private_apt update
}

# The version that there is of a package; false if there is none.
package_version()
{
	apt-cache "${private[@]}" show --no-all-versions "$1" 2>/dev/null | sed -n 's/^Version: //p' | grep .
}

get_packages()
{
	private_apt install -y --download-only "$@"
}

# Into $tree.
unpack_packages()
{
	local deb

	tree=$tmp/tree
	mkdir -p "$tree"/usr/{bin,sbin,lib,lib64}
	ln -s usr/{bin,sbin,lib,lib64} "$tree/"
	for deb in "$tmp"/apt/cache/archives/*.deb; do
		dpkg-deb --fsys-tarfile "$deb" | tar -x -C "$tree" --keep-directory-symlink "$@" ||
			die "${deb##*/} cannot be unpacked; check disk space in $trees"
	done
}

keep_tree()
{
	mv -T "$tree" "$trees/$1" || die "$trees/$1 cannot be made; check its permissions"
}
