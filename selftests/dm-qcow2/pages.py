# SPDX-License-Identifier: GPL-2.0-or-later
"""The commands of a page of Documentation, for tests that run them.

What a page has in literal blocks is

- a file, if the paragraph before ends with its name: ``/path``::
- an example, if that says (not run: why)::
- a session, if its first line begins with "# ": so do commands, and what they print follows them. "..." there stands
  for what is not told, a line of it for any lines. A command fails if the last line that is shown begins
  with its name and a colon, or if the next command is "echo $?";
- else commands, one in each line.

A line that ends with a backslash goes on in the next one.
"""
import re


class Block:
    """Literal text of a page"""

    def __init__(self, section, before, lines):
        self.section, self.before, self.lines = section, before, lines
        self.run = "(not run: " not in before
        name = re.search(r"``(/\S+)``::$", before)
        self.file = name and name[1]

    def __str__(self):
        return f"{self.section}: {self.lines[0]}"

    def commands(self):
        """Of each the line, and what is shown of its output; None: nothing is said of that"""
        session = self.lines[0].startswith("# ")
        found = []
        for line in self.lines:
            if found and found[-1][0].endswith("\\"):
                found[-1][0] = f"{found[-1][0][:-1].rstrip()} {line.strip()}"
            elif not session:
                found.append([line, None])
            elif line.startswith("# "):
                found.append([line[2:], []])
            else:
                found[-1][1].append(line)
        return found


def blocks_of(page):
    """All literal blocks of a page in reStructuredText"""
    section, before, found, literal = None, "", [], None
    lines = page.splitlines()
    for n, line in enumerate(lines):
        if literal is not None:
            if line.startswith("\t") or not line:
                literal.append(line[1:])
                continue
            while literal and not literal[-1]:
                literal.pop()
            found.append(Block(section, before, literal))
            literal, before = None, ""
        if n + 1 < len(lines) and re.fullmatch("=+|-+", lines[n + 1]) and line and line[0] not in "=-":
            section = line
        before = f"{before} {line}".strip() if line else before if before.endswith("::") else ""
        if before.endswith("::") and not lines[n + 1]:
            literal = []
            lines[n + 1] = ""
    if literal is not None:
        found.append(Block(section, before, literal))
    for block in found:
        while block.lines and not block.lines[0]:
            block.lines.pop(0)
    return found
