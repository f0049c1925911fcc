#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""
What the tool tells its users to do, and what the tests have done.

    remedies.py sources DIR         the remedies in the sources, one a line
    remedies.py lint DIR LIST       is LIST, which says who tests each, complete?
    remedies.py tested LIST SUITE SEEN
                                    is each remedy that SUITE has to test among the
                                    messages in the file SEEN?
    remedies.py command [PLACEHOLDER=VALUE...]
                                    the first command in the message on standard
                                    input, with words for placeholders; @N: the Nth

A line of LIST is SUITE, a tab, and the text as it stands in the sources. Instead of
a suite there can be "-" and a reason in brackets why it cannot be tested.
"""
import glob
import os
import re
import sys

TOKEN = re.compile(r'/\*.*?\*/|//[^\n]*|"(?:[^"\\]|\\.)*"|\'(?:[^\'\\]|\\.)*\'|[A-Za-z_]\w*|\s+|.', re.S)
VERBS = ("add", "check", "choose", "close", "compare", "convert", "create", "decrypt", "detach",
         "enlarge", "find", "free", "get", "give", "install", "leave", "load", "look", "make",
         "merge", "modprobe", "name", "open", "put", "raise", "record", "reload", "remove",
         "repair", "resize", "restore", "resume", "run", "save", "see", "start", "stop", "take",
         "try", "unmount", "use", "wait", "unload", "copy", "detach", "release")
# Where a remedy begins in a text
REMEDY = re.compile(r"(?:^|; |, or |, and |: |\(|then )(?:" + "|".join(VERBS) + r")\b|--[a-z]|"
                    r"\b(?:qcow2setup|qemu-img|dmsetup|losetup|modprobe|truncate|mknod) [-%a-z]")
COMMANDS = ("qcow2setup", "qemu-img", "qemu-nbd", "dmsetup", "losetup", "modprobe", "truncate",
            "mknod", "umount", "swapoff", "dd")


def literals(text, macros):
    """all string literals of a C source, joined as the compiler does it"""
    joined, parts = [], None
    for token in TOKEN.findall(text):
        if token[0].isspace() or token.startswith(("/*", "//")):
            continue
        if token[0] == '"':
            parts = (parts or "") + token[1:-1]
        elif token in macros:
            parts = (parts or "") + macros[token]
        elif parts is not None:
            joined.append(parts)
            parts = None
    return joined


def read(path):
    with open(path, encoding="utf-8") as f:
        return f.read()


def sources(folder):
    folder = os.path.realpath(folder)
    files = [f for f in sorted(glob.glob("**/*.[ch]", root_dir=folder, recursive=True))
             if not re.match(r"(tests|fuzz)/", f)]
    files = [os.path.join(folder, f) for f in files]
    macros = {"PRIu64": "llu", "PRId64": "lld", "PRIx64": "llx", "VERSION": "%s"}
    for path in files:
        for name, value in re.findall(r'^#define (\w+)\t+((?:"(?:[^"\\\n]|\\.)*"(?: \w+ ?)?)+)$',
                                      read(path), re.M):
            macros[name] = "".join(literals(value + " ;", macros))
    found = set()
    for path in files:
        text = re.sub(r"^#.*(?:\\\n.*)*$", "", read(path), flags=re.M)
        # Tables of actions and options, and what --help says
        if os.path.basename(path) in ("main.c", "options.c"):
            text = " ; ".join(re.findall(r"\bfail\((?:[^()\"]|\([^()]*\)|\"(?:[^\"\\]|\\.)*\")*\)|"
                                         r"\.wrong =\s+\"[^\"]*\"", text) + [";"])
        for s in literals(text, macros):
            s = s.replace('\\"', '"').replace("\\n", " ").strip()
            if " " in s and REMEDY.search(s) and not re.match(r"[^ ]+ [^ ]+$", s):
                found.add(re.sub(r" +", " ", s))
    return found


def entries(path):
    """{text: who tests it}"""
    result = {}
    for line in read(path).splitlines():
        if line and not line.startswith("#"):
            who, text = line.split("\t", 1)
            if text in result:
                sys.exit(f"{path}: twice: {text}")
            result[text] = who
    return result


def pattern(text):
    """of the messages that are made of a text"""
    parts = re.split(r"(%%|%[-#0-9.*l]*[a-zA-Z])", text)
    for i, part in enumerate(parts):
        if part == "%%":
            parts[i] = "%"
        elif i % 2:
            parts[i] = r"[0-9a-f]+" if part[-1] in "dux" else ".*"
        else:
            parts[i] = re.sub(r"(\\ )+", r"\\s+", re.escape(part))
    return re.compile("".join(parts))


def lint(folder, path):
    listed, there = entries(path), sources(folder)
    for text in sorted(there - listed.keys()):
        print(f"not in {path}: {text}")
    for text in sorted(listed.keys() - there):
        print(f"{path}: not in the sources: {text}")
    tests = os.path.join(os.path.dirname(path), "../../selftests/dm-qcow2")
    who = [w for w in set(listed.values()) if w not in ("offline", "device") and
           not (re.fullmatch(r"-\(.+\)", w) or os.path.exists(os.path.join(tests, w)))]
    for w in who:
        print(f"{path}: who is that: {w}")
    return there != listed.keys() or bool(who)


def tested(path, suite, seen):
    missing = 0
    messages = set(read(seen).splitlines())
    for text, who in entries(path).items():
        if who == suite and not any(map(pattern(text).search, messages)):
            print(f"not tested: {text}")
            missing += 1
    return missing > 0


def commands(message):
    """what a user would copy"""
    start = re.compile(r"(?:^|(?<=[ (]))(?:" + "|".join(COMMANDS) + r")(?= )")
    pos, result = 0, []
    while m := start.search(message, pos):
        i, quote = m.start(), ""
        while i < len(message):
            rest = message[i:]
            if quote:
                if quote == "$" and rest[0] == "\\":
                    i += 1
                elif rest[0] == "'":
                    quote = ""
            elif rest.startswith("$'"):
                quote, i = "$", i + 1
            elif rest[0] == "'":
                quote = "'"
            elif rest[0] == "\\":
                i += 1
            elif re.match(r"\)|,(?: |$)|; |\n|\.(?:\s|$)| \(| (?:says|tells|lists|and|or|to|when)\b", rest):
                break
            i += 1
        result.append(message[m.start():i].strip())
        pos = max(i, m.end())
    return result


def command(args):
    message, which = sys.stdin.read(), 1
    fill = {}
    for a in args:
        if a.startswith("@"):
            which = int(a[1:])
        else:
            name, value = a.split("=", 1)
            fill[name] = value
    found = commands(message)
    if len(found) < which:
        return 1
    print(re.sub(r"\b(?:" + "|".join(fill) + r")\b", lambda m: fill[m.group()],
                 found[which - 1]) if fill else found[which - 1])
    return 0


def main():
    action, args = sys.argv[1], sys.argv[2:]
    if action == "sources":
        print("\n".join(sorted(sources(*args))))
        return 0
    return {"lint": lint, "tested": tested, "command": lambda *a: command(a)}[action](*args)


if __name__ == "__main__":
    sys.exit(main())
