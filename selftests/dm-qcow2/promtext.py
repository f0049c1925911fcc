# SPDX-License-Identifier: GPL-2.0-or-later
"""The text format of Prometheus, read strictly: whatever a reader may refuse is refused here,
too, and so are what promtool's linter calls bad manners.
"""
import re

from qcow2test import expect

NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\["\\n])*)"')
TYPES = ("counter", "gauge", "histogram", "summary", "untyped")
ESCAPES = {"\\\\": "\\", '\\"': '"', "\\n": "\n"}


def labels(text, line):
    """{name: value} of what stands between the braces"""
    found, at = {}, 0
    while at < len(text):
        m = LABEL.match(text, at)
        expect(m, f"labels: {line}")
        expect(m[1] not in found, f"label {m[1]} is there twice: {line}")
        expect(not m[1].startswith("__"), f"a name that is reserved: {line}")
        found[m[1]] = re.sub(r"\\.", lambda e: ESCAPES[e[0]], m[2])
        at = m.end()
        if at < len(text):
            expect(text[at] == "," and at + 1 < len(text), f"labels: {line}")
            at += 1
    return found


def sample(line, family):
    """labels and value of a line"""
    m = re.fullmatch(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})? ([0-9]+)", line)
    expect(m, f"no sample: {line}")
    expect(m[1] == family, f"not one of {family}: {line}")
    return labels(m[2] or "", line), int(m[3])


def families(text):
    """{name: (type, {labels, sorted: value})} of a whole text, given as bytes"""
    found, family, kind = {}, None, None
    text = text.decode("utf-8")
    expect(text.endswith("\n") and "\r" not in text, "lines do not end as they should")
    for line in text[:-1].split("\n"):
        if line.startswith("# HELP "):
            family, words = line[len("# HELP "):].split(" ", 1)
            expect(NAME.fullmatch(family) and family not in found, f"in two pieces, or no name: {line}")
            expect(words.strip() and not re.search(r"\\[^\\n]", words), f"help: {line}")
            kind = None
        elif line.startswith("# TYPE "):
            expect(family and kind is None, f"no help before, or a second type: {line}")
            name, kind = line[len("# TYPE "):].split(" ")
            expect(name == family and kind in TYPES, f"type: {line}")
            expect((kind == "counter") == name.endswith("_total"), f"counters, and no others, end with _total: {line}")
            found[family] = kind, {}
        else:
            expect(kind, f"no help and type before: {line}")
            names, value = sample(line, family)
            key = tuple(sorted(names.items()))
            expect(key not in found[family][1], f"twice: {line}")
            found[family][1][key] = value
    expect(all(samples for _, samples in found.values()), "a head without samples")
    return found


def value(found, name, **names):
    """of one sample"""
    expect(name in found, f"no {name}")
    samples = found[name][1]
    key = tuple(sorted(names.items()))
    expect(key in samples, f"no {name}{names} in {samples}")
    return samples[key]
