#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""
Is what the tool prints as Documentation/qcow2setup-json.schema.json says?

    schema.py NAME FILE     FILE is one NAME of the schema's definitions
    schema.py lines NAME FILE
                            each line of FILE is one
    schema.py serve         answers lines "NAME FILE" with a line each: nothing, or what
                            is wrong
    schema.py self PAGE     is the schema one, is all of it described, and is each key
                            in PAGE, the manual page?

Here a key that the schema does not have is an error, so that none is forgotten;
readers skip such keys.
"""
import copy
import json
import os
import re
import sys

import jsonschema

SCHEMA = os.path.join(os.path.dirname(os.path.realpath(__file__)),
                      "../../Documentation/qcow2setup-json.schema.json")


def load():
    with open(SCHEMA, encoding="utf-8") as f:
        return json.load(f)


def each(node, where=""):
    """all schemas in a schema, and where they are"""
    if isinstance(node, dict):
        yield where, node
        for key, value in node.items():
            if key in ("properties", "$defs"):
                for name, sub in value.items():
                    yield from each(sub, f"{where}/{name}")
            elif key == "items":
                yield from each(value, f"{where}[]")


def strict(schema):
    schema = copy.deepcopy(schema)
    for _, node in each(schema):
        if "properties" in node:
            node["additionalProperties"] = False
    return schema


def problems(name, value):
    """what of a value is not as the definition has it"""
    schema = strict(load())
    del schema["anyOf"]
    assert name in schema["$defs"], name
    schema["$ref"] = f"#/$defs/{name}"
    found = jsonschema.Draft202012Validator(schema).iter_errors(value)
    return [f"{name}{''.join(f'[{p!r}]' for p in e.absolute_path)}: {e.message}" for e in found]


def itself(page):
    """what is wrong with the schema, and with the page about it"""
    schema = load()
    jsonschema.Draft202012Validator.check_schema(schema)
    for where, node in each(schema):
        if "$ref" not in node and "description" not in node and \
                not re.search(r"\[\]$|/(extents|reason|user)$", where):
            yield f"{where}: no description"
        for key in set(node.get("required", ())) - set(node.get("properties", ())):
            yield f"{where}: {key} is required, but not there"
    with open(page, encoding="utf-8") as f:
        text = f.read()
    for where, node in each(schema):
        for key in node.get("properties", ()):
            if not re.search(rf"^\.It Dq (?:.*\.)?{re.escape(key)}$", text, re.M):
                yield f"{page}: says nothing of {where}/{key}"
    for name in (r["$ref"].split("/")[-1] for r in schema["anyOf"]):
        if f".Ss {name}\n" not in text:
            yield f"{page}: no section {name}"


def judged(name, path):
    """the same of what cannot even be read"""
    try:
        with open(path, encoding="utf-8") as f:
            return problems(name, json.load(f))
    except ValueError as e:
        return [f"{path}: {e}"]


def main():
    args = sys.argv[1:]
    if args[0] == "serve":
        for line in sys.stdin:
            print("; ".join(judged(*line.split())).replace("\n", " "), flush=True)
        return 0
    if args[0] == "self":
        found = list(itself(args[1]))
    else:
        with open(args[-1], encoding="utf-8") as f:
            text = f.read()
        values = [json.loads(t) for t in (text.splitlines() if args[0] == "lines" else [text])]
        found = [p for v in values for p in problems(args[-2], v)]
        if not values:
            found = ["there is nothing"]
    print("\n".join(found), end="\n" if found else "")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
