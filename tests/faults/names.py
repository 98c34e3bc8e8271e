#!/usr/bin/env python3
# SPDX-License-Identifier: MIT OR Apache-2.0
"""names.py LIBRARY [--group]: replaces the addresses in "[failed at 0x1 0x2]" on standard input by names of functions.

With --group it prints the number of lines for each place of the library that failed.
"""
import collections
import re
import subprocess
import sys


def symbols(library, addresses):
    """Returns the names of the library's own functions at each address, innermost first."""
    names = {}
    if not addresses:
        return names
    command = ["addr2line", "-Cifpa", "-e", library]
    out = subprocess.run(command, input="\n".join(addresses), text=True, capture_output=True, check=True).stdout
    at = None
    for line in out.splitlines():
        found = re.match(r"(0x[0-9a-f]+): (.*)", line)
        if found:
            at, line = hex(int(found[1], 16)), found[2]
            names[at] = []
        line = line.replace(" (inlined by) ", "")
        function, _, place = line.partition(" at ")
        if "kuf::" in function or "/src/" in place and "/rustc/" not in place and "/registry/" not in place:
            function = re.sub(r"::\{\{?closure\}?(_env\$\d+)?\}?", "{}", function)
            names[at].append(f"{function} ({place.rpartition('/src/')[2]})")
    return names


def main():
    library = sys.argv[1]
    lines = sys.stdin.read().splitlines()
    found = [re.search(r"\[failed at((?: 0x[0-9a-f]+)*)", line) for line in lines]
    # A return address is the one after the call.
    stacks = [[hex(int(at, 16) - 1) for at in one[1].split()] if one else [] for one in found]
    names = symbols(library, sorted({at for stack in stacks for at in stack}))
    groups = collections.Counter()
    example = {}
    for line, one, stack in zip(lines, found, stacks):
        functions = [function for at in stack for function in names.get(at, [])][:6]
        if "--group" not in sys.argv:
            print(line[:one.start()] + "[failed in " + " < ".join(functions) + "]" if one else line)
        elif one:
            what = line.split(": ")[1] + ": " + (functions[0] if functions else "?") + "".join(" < " + f for f in functions[1:3])
            groups[what] += 1
            example.setdefault(what, line.split(": ")[0].removeprefix("FAIL "))
        elif not line.startswith("FAIL"):
            print(line)
    for what, count in groups.most_common():
        print(f"{count:6} {what}\n       {example[what]}")


main()
