#!/usr/bin/env python3
# SPDX-License-Identifier: MIT OR Apache-2.0
"""Counts that the layout of the source keeps. Fails when one is over its ceiling.

    house.py           each count with its ceiling and the worst places
      --all            every place
      --list           each sentence that the counts of English mean, with file and line
      --cuts           the uses that hold the circles together, by what each takes out of them when it goes
      --goals          fails where a goal is not reached
      --root DIR       counts another tree
"""
import argparse
import statistics
import sys
from collections import defaultdict
from pathlib import Path

import english
import rust_source

# name: (goal, ceiling). A goal is where the tree has to come to, a ceiling where it stands: nothing may become worse.
# Lower the ceiling with each step. A count that has reached its goal has that as its ceiling.
LIMITS = {
    "circles between files": (0, 0),
    "files in circles": (0, 0),
    "imports that point upward": (0, 0),
    "files of src/ over 450 lines": (0, 0),
    "most lines of a file": (450, 450),
    "most methods of an impl block": (40, 40),
    "most methods of a trait": (10, 10),
    "functions over 80 lines": (0, 0),
    "comment lines for 100 lines of code in src/, least": (18, 18),
    "comment lines for 100 lines of code in src/, most": (30, 30),
}
# Sentences of 1000 that start with who, what, whoever, and that have nobody, somebody.
ENGLISH = {
    "src": ((5, 5), (5, 5)),
    "tests": ((5, 5), (5, 5)),
    "benches": ((5, 5), (5, 5)),
    "examples": ((5, 5), (5, 5)),
    "all": ((5, 5), (5, 5)),
}

# Bottom first. A file uses names of its own layer and of those below. A layer is a folder or a file of src/. A slot holds its
# source and what its mechanism keeps of it; a mechanism knows the region that a slot maps, and no slots.
LAYERS = ["abi_kvm", "abi", "uapi", "sync", "alloc", "errno", "error", "panics", "caller", "os", "pages", "stats", "mapping",
          "source", "mechanism", "memory", "record_file", "probe", "service", "api", "capi"]
# The struct texts and the documented calls of kuf.h, which stand in one place each.
LONG = {"abi.rs", "capi/mod.rs"}
# Not counted as layers: the map of the modules.
ABOVE = {"lib"}

WORST = 6


class House:
    def __init__(self, options):
        self.options = options
        self.failed = 0
        self.tree = rust_source.Tree(options.root / "src")
        self.files = [self.tree.files[path] for path in sorted(self.tree.production)]

    def limit(self, name, count, goal, ceiling, places=(), least=False):
        """One line of a count, and the places that make it."""
        bound = goal if self.options.goals else ceiling
        good = count >= bound if least else count <= bound
        self.failed += not good
        shown = f"{count:.1f}" if isinstance(count, float) else count
        reached = count >= goal if least else count <= goal
        lower = (count > ceiling if least else count < ceiling - 1 + isinstance(count, int)) and ceiling != goal
        print(f"{'ok   ' if good else 'FAIL '} house: {name}: {shown}",
              f"({'goal' if reached else f'goal {goal}, ceiling'} {goal if reached else ceiling})",
              *["the ceiling can come closer"] * lower)
        self.show(places)

    def show(self, places):
        places = list(places)
        shown = places if self.options.all else places[:WORST]
        for place in shown:
            print(f"          {place}")
        if len(places) > len(shown):
            print(f"          and {len(places) - len(shown)} more (--all)")

    def row(self, name, count, places=(), least=False):
        self.limit(name, count, *LIMITS[name], places, least)

    def imports(self):
        """Circles and arrows.

        A `mod.rs` is the head of its folder and may use what is in it: that a folder is entered at its head, and the files
        of the folder use what the head defines, is how folders are made. So an edge from a mod.rs to a file of its own folder
        makes no circle here; a circle through two folders, or between two files of one folder, is counted. The count with
        these edges is shown beside it.
        """
        edges = self.tree.uses()
        outward = {name: {other for other in others
                          if not (name.endswith("mod.rs") and other.startswith(name.removesuffix("mod.rs")))}
                   for name, others in edges.items()}
        found, with_heads = rust_source.circles(outward), rust_source.circles(edges)

        def texts(found, edges):
            for circle in found:
                pairs = [f"{name} and {other}" for name in circle for other in circle
                         if name < other and other in edges[name] and name in edges[other]]
                yield f"{len(circle)} files: " + ", ".join(circle)
                yield f"    use each other: {', '.join(pairs) or 'none; it takes more than two'}"
                if self.options.all:
                    for name in circle:
                        yield f"    {name} uses " + ", ".join(sorted(edges[name] & set(circle)))

        self.row("circles between files", len(found), texts(found, outward))
        # Two circles that grow together are one.
        self.row("files in circles", sum(map(len, found)))
        print(f"      {len(edges)} files, {sum(map(len, edges.values()))} uses; circles when a mod.rs that uses its own folder "
              f"counts: {len(with_heads)} of {', '.join(str(len(circle)) for circle in with_heads) or 'none'} files")

        if self.options.cuts:
            self.cuts(outward)

        def layer(name):
            name = name.split("/")[0].removesuffix(".rs")
            return None if name in ABOVE else LAYERS.index(name)

        upward = [f"{name} uses {other}" for name, others in edges.items() for other in sorted(others)
                  if layer(name) is not None and layer(other) is not None and layer(other) > layer(name)]
        self.row("imports that point upward", len(upward), upward)

    def cuts(self, edges):
        """Takes away the use that leaves the fewest files in circles, until there are none."""
        while found := rust_source.circles(edges):
            best = None
            for name, other in [(name, other) for circle in found for name in circle for other in edges[name] & set(circle)]:
                edges[name].remove(other)
                left = sum(map(len, rust_source.circles(edges)))
                edges[name].add(other)
                best = min(best or (left, name, other), (left, name, other))
            left, name, other = best
            edges[name].remove(other)
            print(f"      without {name} using {other}, in circles: {left}")

    def lengths(self):
        """Lines without tests."""
        long = sorted(((file.production_lines(), file.name) for file in self.files if file.name not in LONG), reverse=True)
        goal = LIMITS["most lines of a file"][0]
        over = [f"{lines} {name}" for lines, name in long if lines > goal]
        self.row("files of src/ over 450 lines", len(over), over)
        self.row("most lines of a file", long[0][0])

        functions = sorted(((lines, file.name, line, name) for file in self.files for name, line, lines in file.functions()),
                           reverse=True)
        lengths = [lines for lines, *_ in functions]
        self.row("functions over 80 lines", sum(lines > 80 for lines in lengths),
                 [f"{lines} {file}:{line} {name}" for lines, file, line, name in functions if lines > 55])
        print(f"      {len(lengths)} functions; median {statistics.median(lengths):.0f} lines, mean "
              f"{statistics.mean(lengths):.1f}, over 55 lines: {sum(lines > 55 for lines in lengths)}")

    def methods(self):
        blocks, total, places = [], defaultdict(int), defaultdict(set)
        for file in self.files:
            for header, line, methods in file.blocks("impl"):
                blocks.append((methods, file.name, line, header))
                name, of_trait = rust_source.implemented(header)
                # Types of one name in several places are told apart by where their name leads.
                module = self.tree.modules.get(file.path)
                home = module and self.tree.resolve(module, name.split("::"))
                key = (name.split("::")[-1], getattr(home, "name", file.name))
                if not of_trait:
                    total[key] += methods
                    places[key].add(file.name)
        blocks.sort(reverse=True)
        goal = LIMITS["most methods of an impl block"][0]
        self.row("most methods of an impl block", blocks[0][0],
                 [f"{methods} {file}:{line} impl {header}" for methods, file, line, header in blocks if methods > goal])
        print("      methods of a type over all its impl blocks, without those of traits:")
        self.show(f"{count} {name} ({home}), in {len(places[name, home])} files"
                  for (name, home), count in sorted(total.items(), key=lambda item: -item[1])[:5])
        goal = LIMITS["most methods of a trait"][0]
        traits = sorted(((methods, file.name, line, header) for file in self.files
                         for header, line, methods in file.blocks("trait")), reverse=True)
        self.row("most methods of a trait", traits[0][0],
                 [f"{methods} {file}:{line} {header}" for methods, file, line, header in traits if methods > goal])

    def comments(self):
        """Folders of source, each file read once."""
        counts = {}
        for folder in list(ENGLISH)[:-1]:
            code = comment = total = 0
            marked = ([], [])  # (file, line, sentence) of each kind
            for path in sorted((self.options.root / folder).rglob("*")):
                try:
                    text = path.read_text() if path.is_file() else ""
                except UnicodeDecodeError:
                    continue
                found = english.comments(path, text)
                if found is None:
                    continue
                lines = english.code_lines(text, found)
                code, comment = code + lines[0], comment + lines[1]
                name = str(path.relative_to(self.options.root))
                for line, sentence in english.sentences(path, text):
                    total += 1
                    for kind, pattern in enumerate((english.QUESTION_WORD.match, english.SOMEBODY.search)):
                        if pattern(sentence):
                            marked[kind].append((name, line, sentence))
            counts[folder] = (total, marked)
            ratio = 100 * comment / max(code, 1)
            if folder == "src":
                self.row("comment lines for 100 lines of code in src/, least", ratio, least=True)
                self.row("comment lines for 100 lines of code in src/, most", ratio)
            else:
                print(f"      comment lines for 100 lines of code in {folder}/: {ratio:.1f}")
        counts["all"] = (sum(total for total, _ in counts.values()),
                         tuple(sum((marked[kind] for _, marked in counts.values()), []) for kind in (0, 1)))
        for folder, limits in ENGLISH.items():
            total, marked = counts[folder]
            for kind, (what, limit) in enumerate(zip(("start with who, what, whoever", "have nobody, somebody"), limits)):
                worst = defaultdict(int)
                for name, _, _ in marked[kind]:
                    worst[name] += 1
                worst = [] if folder == "all" else sorted(worst.items(), key=lambda item: -item[1])
                where = "src/ to examples/" if folder == "all" else f"{folder}/"
                self.limit(f"of 1000 sentences in {where}, {what}", 1000 * len(marked[kind]) / max(total, 1), *limit,
                           [", ".join(f"{name} {count}" for name, count in
                                      (worst if self.options.all else worst[:WORST]))] if worst else [])
                if self.options.list and folder != "all":
                    for name, line, sentence in marked[kind]:
                        print(f"{name}:{line}: {sentence}")
            if folder != "all":
                print(f"      {total} sentences in {folder}/")


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--cuts", action="store_true")
    parser.add_argument("--goals", action="store_true")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parent.parent.parent)
    house = House(parser.parse_args())
    house.imports()
    house.lengths()
    house.methods()
    house.comments()
    sys.exit(house.failed > 0)


if __name__ == "__main__":
    main()
