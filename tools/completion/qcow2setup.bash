# SPDX-License-Identifier: GPL-2.0-or-later
# shellcheck shell=bash
# bash completion of qcow2setup; what there is, it is asked itself.
_qcow2setup()
{
	local line=${COMP_LINE:0:COMP_POINT} words word cur prefix reply

	# COMP_WORDS is split at = and :, too.
	read -ra words <<< "$line"
	[[ $line != *[[:space:]] ]] || words+=('')
	cur=${words[-1]} prefix=
	# What readline takes for the word begins behind these.
	[[ $COMP_WORDBREAKS != *=* || $cur != *=* ]] || prefix=${cur%"${cur##*=}"}
	[[ $COMP_WORDBREAKS != *:* || $cur != *:* ]] || prefix=${cur%"${cur##*:}"}
	COMPREPLY=()
	while IFS=$'\t' read -r word _; do
		if [[ $word = :files ]]; then
			compopt -o filenames 2>/dev/null
			mapfile -t reply < <(compgen -f -- "${COMP_WORDS[COMP_CWORD]#=}")
			COMPREPLY+=("${reply[@]}")
		else
			COMPREPLY+=("${word#"$prefix"}")
		fi
	done < <("$1" completion -- "${words[@]:1}" 2>/dev/null)
}
complete -F _qcow2setup qcow2setup
