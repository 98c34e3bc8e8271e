#!/usr/bin/env python3
# SPDX-License-Identifier: MIT OR Apache-2.0
"""fault_path.py FAULTS BEFORE AFTER LIBRARY [--all]: the functions of the library that one fault passes.

BEFORE and AFTER are callgrind's files of a run with so many faults and of one with twice as many: the difference is what
the faults did, without what opening and ending cost. LIBRARY is the shared library. A function that is called in fewer than
half of the faults is not on the way: the threads that look around now and then come by while valgrind is slow.
"""
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

SRC = str(Path(__file__).resolve().parent.parent.parent / "src") + "/"
# name: (goal, ceiling), as in house.py.
LIMITS = {"files of src/": (20, 51), "frames between serve_loop and ioctl": (12, 12)}
# The function that a service thread stays in, and the one that makes the ioctl which installs a page: the ends of their paths.
FIRST, LAST = "::serve_loop", "::ioctl::copy"


class Profile:
    """Callgrind's format: lines that name the object (ob), file (fl, fi, fe) and function (fn) of the costs that follow, and
    those of a call (cob, cfi, cfl, cfn, calls, then its inclusive cost). A name is written once, with a number that
    stands for it from then on."""

    def __init__(self, path):
        self.file_of, self.calls, self.instructions = {}, Counter(), Counter()
        names = defaultdict(dict)
        objects, file, function, called, inclusive = None, None, None, None, False
        for line in open(path, errors="replace"):
            if match := re.match(r"(c?)(ob|fl|fi|fe|fn)=\((\d+)\)(?: (.*))?$", line):
                of_call, kind, number, text = match.groups()
                table = names["file" if kind in ("fl", "fi", "fe") else kind]
                if text is not None:
                    table[number] = text
                name = table.get(number, "???")
                if of_call:
                    called = name if kind == "fn" else called
                elif kind == "ob":
                    objects = name
                elif kind == "fl":
                    file = name
                elif kind == "fn":
                    function = name
                    self.file_of.setdefault(function, file)
            elif match := re.match(r"calls=(\d+)", line):
                self.calls[called] += int(match[1])
                inclusive = True
            elif match := re.match(r"[-+*\d]\S* (\d+)$", line):
                if not inclusive:
                    self.instructions[objects] += int(match[1])
                inclusive = False


def main():
    every = "--all" in sys.argv
    faults, before, after, library = [argument for argument in sys.argv[1:] if argument != "--all"]
    faults, before, after = int(faults), Profile(before), Profile(after)
    calls = {name: (count - before.calls[name]) / faults for name, count in after.calls.items()}
    way = {name: count for name, count in calls.items()
           if count >= 0.5 and "'" not in name and after.file_of.get(name, "").startswith(SRC)}
    files = defaultdict(dict)
    for name, count in way.items():
        files[after.file_of[name][len(SRC):]][name] = count
    closures = sum("{{closure}}" in name for name in way)

    # Where ioctl was called from, by callgrind's names of a function with its callers behind it. Valgrind makes fills slow, and
    # the library chooses by that who serves a fault: the longest way that at least a tenth of the faults take.
    stacks = {}
    for name, count in calls.items():
        stack = name.split("'")
        first = next((at for at, caller in enumerate(stack) if caller.endswith(FIRST)), None)
        if stack[0] == "ioctl" and first and count >= 0.1 and any(caller.endswith(LAST) for caller in stack[:first]):
            frames = tuple(caller for caller in stack[1:first] if after.file_of.get(caller, "").startswith(SRC))
            stacks[frames] = stacks.get(frames, 0) + count
    if not stacks:
        sys.exit(f"no call of ioctl was seen from {LAST} below {FIRST}: have they another name?")
    frames = max(stacks, key=len)

    failed = 0
    for name, count in zip(LIMITS, (len(files), len(frames))):
        goal, ceiling = LIMITS[name]
        good = count <= ceiling
        failed += not good
        print(f"{'ok   ' if good else 'FAIL '} fault_path: {name}: {count} (goal {goal}, ceiling {ceiling})")
    instructions = (after.instructions[library] - before.instructions[library]) / faults
    print(f"      functions of src/: {len(way) - closures}, and {closures} closures; {sum(way.values()):.0f} calls a fault")
    print(f"      instructions a fault in the library, built without optimisation: {instructions:.0f}")
    print("      from serve_loop to ioctl: " + ", ".join(name.split("::")[-1] for name in reversed(frames)))
    print(f"      ({stacks[frames]:.0%} of the faults)")
    for file, functions in sorted(files.items(), key=lambda item: -sum(item[1].values())):
        print(f"          {file}: {len(functions)} functions, {sum(functions.values()):.1f} calls")
        for name, count in sorted(functions.items(), key=lambda item: -item[1]) if every else ():
            print(f"              {count:6.1f} {name}")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
