#!/usr/bin/env python3
# SPDX-License-Identifier: MIT OR Apache-2.0
"""Checks the Markdown files for users: names, links and words. Prints one line for each fault and fails if there are any."""
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Debian's tools and cargo have copies of these files in other folders.
SKIPPED = {"build", "target", "vendor", "node_modules"}
NAME = re.compile(r"\b(?:KUF|kuf)_\w+")
# Names that are no part of the headers: symbol versions, and variables of the environment.
OTHER_NAME = re.compile(r"KUF_(0|EXPERIMENTAL|LIBRARY|BLESS|DEBUG|(SIM|TEST|STRESS|KERNEL|FUZZ|PROGRAM)_\w+)")
# The first column of its tables has names that are gone.
CHANGED = "changed.md"
BANNED = re.compile(r"\b(nobody|somebody|who(?:ever)? (?:waits?|polls?|touch\w*)|closed pages?|open(?:s|ed)? pages?)\b", re.IGNORECASE)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")


def documents():
    for path in sorted(ROOT.rglob("*.md")):
        parts = path.relative_to(ROOT).parts
        if not (SKIPPED & set(parts) or parts[0].startswith(".")):
            yield path


def anchors(path):
    """The anchors of the headings of a file, as GitHub makes them."""
    found, fenced = {}, False
    for line in path.read_text().splitlines():
        fenced ^= line.startswith("```")
        if not fenced and (heading := re.match(r"#+ +(.*)", line)):
            text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[1])
            anchor = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            count = found.get(anchor, 0)
            found[anchor] = count + 1
            yield f"{anchor}-{count}" if count else anchor


def faults(path, names):
    for number, line in enumerate(path.read_text().splitlines(), 1):
        checked = line.split("|", 2)[-1] if path.name == CHANGED else line
        for name in NAME.findall(checked):
            if name not in names and not OTHER_NAME.fullmatch(name):
                yield number, f"{name} is not in include/*.h"
        for word in BANNED.findall(line):
            yield number, f"say it in the field's words: {word}"
        for link in LINK.finditer(line):
            target, _, anchor = (link[1] or link[2]).partition("#")
            if re.match(r"[a-z]+:", target):
                continue
            file = path.parent / target if target else path
            if not file.exists():
                yield number, f"{target} does not exist"
            elif anchor and file.suffix == ".md" and anchor not in set(anchors(file)):
                yield number, f"{target} has no heading #{anchor}"


def main():
    names = set(NAME.findall("".join(header.read_text() for header in (ROOT / "include").glob("*.h"))))
    count = 0
    for path in documents():
        for number, text in faults(path, names):
            print(f"{path.relative_to(ROOT)}:{number}: {text}")
            count += 1
    return count != 0


if __name__ == "__main__":
    sys.exit(main())
