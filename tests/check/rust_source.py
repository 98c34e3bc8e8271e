# SPDX-License-Identifier: MIT OR Apache-2.0
"""Rust source read far enough to count it: comments, items, modules, and which file uses a name of which other file.

This is no compiler. It knows paths, not types: a method that is called on a value whose type the file never names is not
seen as a use of the file that defines the method.
"""
import bisect
import re
from pathlib import Path

TOKEN = re.compile(
    r"""(?P<line>//[^\n]*)
      | (?P<block>/\*)
      | (?P<raw>\b[bc]?r(?P<hashes>\#*)".*?"(?P=hashes))
      | (?P<string>"(?:\\.|[^"\\])*")
      | (?P<char>'(?:\\(?:u\{[^}]*\}|x..|.)|[^'\\\n])')""",
    re.VERBOSE | re.DOTALL,
)
IDENTIFIER = re.compile(r"[A-Za-z_]\w*")
CFG = re.compile(r"#\[cfg\(")
USE = re.compile(r"(?P<pub>\bpub(?:\([^)]*\))?\s+)?\buse\s+(?P<tree>[^;]+);")
PATH = re.compile(r"(?<![\w:.])\$?(?P<path>[A-Za-z_]\w*(?:::[A-Za-z_]\w*)+)")
DEFINITION = re.compile(
    r"\b(?:fn|struct|enum|union|trait|type|const|static(?:\s+mut)?)\s+(\w+)|\bmacro_rules!\s*(\w+)")
ITEM_WORDS = {"fn", "impl", "mod", "struct", "enum", "union", "trait", "use", "const", "static", "type", "unsafe",
              "async", "extern", "macro_rules"}

# Configurations that are false in every build that is no test, and in the library as it is shipped.
NOT_IN_TESTS = {"test": False, "fuzzing": False}
SHIPPED = {**NOT_IN_TESTS, "loom": False, "shuttle": False, "kuf_tsan": False, 'feature = "reserve"': True}


def blank(text, fill=" "):
    return re.sub(r"[^\n]", fill, text)


def split_code(text):
    """The code with comments as spaces and strings as quotes, and the comments as (start, text)."""
    code, comments, at = [], [], 0
    while match := TOKEN.search(text, at):
        code.append(text[at:match.start()])
        at = match.end()
        if match["block"]:
            depth = 1
            while depth:
                mark = re.compile(r"/\*|\*/").search(text, at)
                at, depth = mark.end(), depth + (1 if mark[0] == "/*" else -1)
        if match["line"] or match["block"]:
            comments.append((match.start(), text[match.start():at]))
            code.append(blank(text[match.start():at]))
        else:
            code.append(blank(match[0], '"'))
    code.append(text[at:])
    return "".join(code), comments


def closing(code, at):
    """The position of the bracket that closes the one at `at`."""
    pairs, depth = re.compile(r"[()\[\]{}]"), 0
    for match in pairs.finditer(code, at):
        depth += 1 if match[0] in "([{" else -1
        if depth == 0:
            return match.start()
    return len(code) - 1


def possible(expression, known):
    """The values that a cfg expression may have when only the names in `known` are known."""
    expression = expression.strip()
    if expression in known:
        return {known[expression]}
    call = re.match(r"(all|any|not)\s*\((.*)\)$", expression, re.DOTALL)
    if not call:
        return {True, False}
    parts, depth, start, inner = [], 0, 0, call[2]
    for at, letter in enumerate(inner + ","):
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            parts.append(inner[start:at])
            start = at + 1
    values = [possible(part, known) for part in parts if part.strip()]
    if call[1] == "not":
        return {not value for value in values[0]}
    # Of `all`, one false part makes it false and true needs every part; of `any` the other way round.
    decisive = call[1] == "any"
    out = set()
    if any(decisive in value for value in values):
        out.add(decisive)
    if all((not decisive) in value for value in values):
        out.add(not decisive)
    return out


def item_end(code, at):
    """The end of the item, field or statement that starts at `at`, its other attributes included."""
    while match := re.compile(r"\s*#\[").match(code, at):
        at = closing(code, match.end() - 1) + 1
    word = re.compile(r"\s*(?:pub(?:\([^)]*\))?\s+)?(\w+)").match(code, at)
    item = word and word[1] in ITEM_WORDS
    block_ends = word is None or word[1] not in {"let", "use"}
    while at < len(code):
        letter = code[at]
        if letter in "([":
            at = closing(code, at)
        elif letter == "{":
            at = closing(code, at)
            if block_ends:
                return at + 1
        elif letter == ";" or (letter == "," and not item):
            return at + 1
        elif letter in ")]}":
            return at
        at += 1
    return at


def without(code, text, known):
    """The code without the items that no build has in which `known` holds."""
    for match in CFG.finditer(code):
        if code[match.start()] != "#":
            continue
        end = closing(code, match.end() - 1)
        if possible(text[match.end():end], known) == {False}:
            stop = item_end(code, closing(code, match.start() + 1) + 1)
            code = code[:match.start()] + blank(code[match.start():stop]) + code[stop:]
    return code


class Lines:
    """From a position in a text to its line."""

    def __init__(self, text):
        self.starts = [0] + [match.end() for match in re.finditer("\n", text)]

    def at(self, position):
        return bisect.bisect_right(self.starts, position)


class File:
    """One file of src/."""

    def __init__(self, root, path):
        self.path = path
        self.name = str(path.relative_to(root))
        self.text = path.read_text()
        self.lines = Lines(self.text)
        self.all_code, self.comments = split_code(self.text)
        #: Without tests.
        self.code = without(self.all_code, self.text, NOT_IN_TESTS)
        #: As it is in the library that is shipped.
        self.shipped = without(self.all_code, self.text, SHIPPED)

    def production_lines(self):
        """The lines of the file that belong to no test."""
        gone = {number for number, (all_code, code) in
                enumerate(zip(self.all_code.split("\n"), self.code.split("\n"))) if all_code != code}
        # A comment inside a test goes with it.
        kept, last = 0, self.text.rstrip("\n").count("\n")
        spans = sorted(gone)
        for number in range(last + 1):
            place = bisect.bisect_left(spans, number)
            before, after = (spans[place - 1] if place else None), (spans[place] if place < len(spans) else None)
            inside = before is not None and after is not None and not any(
                line.strip() for line in self.code.split("\n")[before:after + 1])
            kept += number not in gone and not inside
        return kept

    def declared(self, code):
        """The files that `mod name;` of this code names."""
        folder = self.path.parent if self.path.name in ("mod.rs", "lib.rs") else self.path.with_suffix("")
        for match in re.finditer(r"\bmod\s+(\w+)\s*;", code):
            # The attributes just before it: only strings of theirs name another file.
            head = self.text[code.rfind("\n\n", 0, match.start()) + 1:match.start()]
            other = re.search(r'#\[path\s*=\s*"([^"]+)"\](?:\s*#\[[^\n]*\])*\s*(?:pub(?:\([^)]*\))?\s+)?$', head)
            for path in ([self.path.parent / other[1]] if other else
                         [folder / f"{match[1]}.rs", folder / match[1] / "mod.rs"]):
                if path.exists():
                    yield path

    def functions(self):
        """(name, line, lines) of each function with a body."""
        for match in re.finditer(r"\bfn\s+(\w+)", self.code):
            at = match.end()
            while at < len(self.code) and self.code[at] not in "{;":
                at = (closing(self.code, at) if self.code[at] in "([" else at) + 1
            if self.code[at:at + 1] == "{":
                first, last = self.lines.at(match.start()), self.lines.at(closing(self.code, at))
                yield match[1], first, last - first + 1

    def blocks(self, word):
        """(header, line, methods) of each `impl` or `trait` block."""
        for match in re.finditer(rf"(?:^|[;}}\]{{]|\bunsafe|\bpub|\bpub\([^)]*\))\s*\b{word}\b", self.code):
            start = self.code.find("{", match.end())
            header = self.code[match.end():start]
            if start < 0 or ";" in header:
                continue
            body = self.code[start + 1:closing(self.code, start)]
            methods, depth = 0, 0
            for token in re.finditer(r"[{}]|\bfn\s+\w", body):
                depth += {"{": 1, "}": -1}.get(token[0], 0)
                methods += token[0] not in "{}" and depth == 0
            yield " ".join(header.split()), self.lines.at(match.end()), methods


def implemented(header):
    """The name of the type that an `impl` header is for, and whether it implements a trait."""
    if header.startswith("<"):
        depth = 0
        for at, letter in enumerate(header):
            depth += (letter == "<") - (letter == ">" and header[at - 1] != "-")
            if depth == 0:
                header = header[at + 1:].strip()
                break
    header = header.split(" where ")[0]
    trait = re.split(r"\bfor\s+(?!<)", header)
    name = re.match(r"[&*\s]*(?:'\w+\s+)?(?:mut\s+|const\s+|dyn\s+)*([\w:]+)", trait[-1])
    return name[1] if name else trait[-1], len(trait) > 1


def use_tree(tree, before=()):
    """(path, name, whether all of it is meant) of each leaf of a `use` tree."""
    tree = tree.strip()
    if match := re.match(r"((?:\w+\s*::\s*)*)\{(.*)\}$", tree, re.DOTALL):
        path = before + tuple(IDENTIFIER.findall(match[1]))
        depth, start, inner = 0, 0, match[2] + ","
        for at, letter in enumerate(inner):
            depth += {"{": 1, "}": -1}.get(letter, 0)
            if letter == "," and depth == 0:
                if inner[start:at].strip():
                    yield from use_tree(inner[start:at], path)
                start = at + 1
        return
    tree, _, alias = (part.strip() for part in re.sub(r"\s+as\s+", " as ", tree).partition(" as "))
    path = before + tuple(IDENTIFIER.findall(tree))
    if tree.endswith("*"):
        yield path, None, True
    else:
        if path[-1] == "self" and len(path) > 1:
            path = path[:-1]
        yield path, alias or path[-1], False


class Module:
    """A module: a file, or a block inside one. Blocks of one name under several cfgs are one."""

    def __init__(self, file, parent):
        self.file, self.parent = file, parent
        self.children, self.defined = {}, set()
        self.imports, self.globs = {}, []  # name: path; (path)
        self.uses = []  # (path, name, glob, pub)
        self.paths = []  # paths in the code, outside `use`


class Tree:
    """The modules of the crate as it is shipped."""

    def __init__(self, root):
        self.root = root
        self.files = {path: File(root, path) for path in sorted(root.rglob("*.rs"))}
        self.production = self.reached("code")
        self.crate = Module(self.files[root / "lib.rs"], None)
        self.modules = {}
        for path in sorted(self.reached("shipped"), key=lambda path: len(path.parts)):
            self.module_of(path)

    def reached(self, code):
        """The files that lib.rs leads to by `mod name;`."""
        seen, left = set(), [self.root / "lib.rs"]
        while left:
            path = left.pop()
            if path not in seen:
                seen.add(path)
                left += self.files[path].declared(getattr(self.files[path], code))
        return seen

    def module_of(self, path):
        """The module of a file, which its place decides: `#[path]` makes no second one."""
        parts = path.relative_to(self.root).with_suffix("").parts
        parts = parts[:-1] if parts[-1] in ("mod", "lib") else parts
        if path in self.modules:
            return self.modules[path]
        module = self.crate
        if parts:
            folder = self.root.joinpath(*parts[:-1])
            parent = self.module_of(folder / "mod.rs" if parts[:-1] else self.root / "lib.rs")
            module = parent.children.setdefault(parts[-1], Module(self.files[path], parent))
        self.modules[path] = module
        self.read(module, self.files[path].shipped)
        return module

    def read(self, module, code):
        while match := re.search(r"\bmod\s+(\w+)\s*\{", code):
            end = closing(code, match.end() - 1)
            inner = module.children.setdefault(match[1], Module(module.file, module))
            self.read(inner, code[match.end():end])
            code = code[:match.start()] + blank(code[match.start():end + 1]) + code[end + 1:]
        for match in USE.finditer(code):
            for path, name, glob in use_tree(match["tree"]):
                module.uses.append((path, name, glob, bool(match["pub"])))
                if glob:
                    module.globs.append(path)
                else:
                    module.imports.setdefault(name, path)
        rest = USE.sub(lambda match: blank(match[0]), code)
        # `pub(in crate::service)` says who may use something, and uses nothing.
        rest = re.sub(r"\bpub\(in [^)]*\)", lambda match: blank(match[0]), rest)
        module.paths += {tuple(match["path"].split("::")) for match in PATH.finditer(rest)}
        module.words = set(IDENTIFIER.findall(rest)) | getattr(module, "words", set())
        depth, at = 0, 0
        for match in DEFINITION.finditer(rest):
            depth += rest.count("{", at, match.start()) - rest.count("}", at, match.start())
            at = match.start()
            if depth == 0:
                module.defined.add(match[1] or match[2])

    def look_up(self, module, name, seen):
        """The module called so there, or the file that defines such a name; None: it is not of this crate."""
        if (id(module), name) in seen:
            return None
        seen = seen | {(id(module), name)}
        if name in module.children:
            return module.children[name]
        if name in module.defined:
            return module.file
        if name in module.imports:
            # This file re-exports the names of other crates.
            return self.resolve(module, module.imports[name], seen) or module.file
        for path in module.globs:
            target = self.resolve(module, path, seen)
            if isinstance(target, Module) and (found := self.look_up(target, name, seen)):
                return found
        return None

    def resolve(self, module, path, seen=frozenset()):
        """Resolves a path in a module: a module, the file that defines it, or None."""
        at, rest = module, list(path)
        own = rest[0] in ("crate", "self", "super")
        if rest[0] == "crate":
            at = self.crate
            rest.pop(0)
        while rest and rest[0] in ("self", "super"):
            at = at.parent or at if rest.pop(0) == "super" else at
        for name in rest:
            found = self.look_up(at, name, seen)
            if found is None:
                # A macro may have made it.
                return at.file if own or at is not module else None
            if not isinstance(found, Module):
                return found
            at, own = found, True
        return at

    def uses(self):
        """{file: {files whose names it uses}}, by name.

        A name counts for the file that defines it, whatever `pub use` it comes through: a mod.rs that only declares its
        children and hands their names on uses nothing. It does use a child whose names stand in its own code; a child that
        in turn uses the parent's makes a circle with it, since neither can be read without the other.
        """
        edges = {file.name: set() for file in {module.file for module in self.modules.values()}}

        def visit(module):
            targets = []
            for path, name, glob, public in module.uses:
                target = self.resolve(module, path)
                if glob and not public and isinstance(target, Module):
                    targets.append(target.file)
                # A module that is imported is used where a path goes through it.
                elif not glob and not isinstance(target, Module) and (not public or name in module.words):
                    targets.append(target)
            for path in module.paths:
                target = self.resolve(module, path)
                targets.append(target.file if isinstance(target, Module) else target)
            edges[module.file.name] |= {target.name for target in targets if target} - {module.file.name}
            for child in module.children.values():
                if child.file is module.file:
                    visit(child)

        for module in self.modules.values():
            visit(module)
        return edges


def circles(edges):
    """The strongly connected components of more than one node, largest first."""
    index, low, stack, out, number = {}, {}, [], [], [0]

    def visit(node):
        index[node] = low[node] = number[0]
        number[0] += 1
        stack.append(node)
        for other in sorted(edges[node]):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            component = stack[stack.index(node):]
            del stack[stack.index(node):]
            if len(component) > 1:
                out.append(sorted(component))

    for node in sorted(edges):
        if node not in index:
            visit(node)
    return sorted(out, key=len, reverse=True)
