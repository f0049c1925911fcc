# SPDX-License-Identifier: GPL-2.0-or-later
# fish completion of qcow2setup; what there is, it is asked itself.
function __qcow2setup_words
	set -l words (commandline -opc) (commandline -ct)
	for line in (command $words[1] completion -- $words[2..-1] 2>/dev/null)
		if test "$line" = :files
			__fish_complete_path (string replace -r '^--[a-z-]+=' '' -- (commandline -ct))
		else
			echo $line
		end
	end
end
complete -c qcow2setup -f -a '(__qcow2setup_words)'
