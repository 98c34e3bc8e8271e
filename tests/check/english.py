# SPDX-License-Identifier: MIT OR Apache-2.0
"""The sentences of comments: in Rust, C, assembly, shell, Python, awk and make."""
import ast
import io
import re
import tokenize

from rust_source import blank, split_code

C_TOKEN = re.compile(
    r"""(?P<comment>//[^\n]*|/\*.*?\*/)|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])+'""", re.DOTALL)
# Quoted text, and a `#` that begins a word. A here-document is read as if it were code.
SHELL_TOKEN = re.compile(r"""'[^']*'|"(?:\\.|[^"\\])*"|\\.|(?P<comment>(?<!\S)\#(?:[ \t][^\n]*|(?=\n)))""", re.DOTALL)

QUESTION_WORD = re.compile(r"\W*(who|what|whoever)\b", re.IGNORECASE)
SOMEBODY = re.compile(r"\b(nobody|somebody)\b", re.IGNORECASE)


def tokens(pattern, text):
    return [(match.start(), match["comment"]) for match in pattern.finditer(text) if match["comment"]]


def python_comments(text):
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield starts[token.start[0] - 1] + token.start[1], token.string
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
            literal = node.body[0].value
            start = starts[literal.lineno - 1] + literal.col_offset
            yield start, text[start:starts[literal.end_lineno]].strip()


def comments(path, text):
    """(position, text) of each comment of a file; None: of a file that has none that could be read."""
    kind = path.suffix
    if kind == "" and text.startswith("#!"):
        kind = ".py" if "python" in text.partition("\n")[0] else ".sh"
    if kind == ".rs":
        return split_code(text)[1]
    if kind in (".c", ".h", ".S"):
        return tokens(C_TOKEN, text)
    if kind == ".py":
        return sorted(python_comments(text))
    if kind in (".sh", ".awk"):
        return tokens(SHELL_TOKEN, text)
    return None


def paragraphs(path, text):
    """(line, text) of each paragraph of the comments of a file. Code in comments and licence lines are left out."""
    found = comments(path, text)
    if found is None:
        return
    line, at, before = 1, 0, None
    lines = []  # (number, marker, text)
    for start, comment in found:
        line, at = line + text.count("\n", at, start), start
        alone = not text[text.rfind("\n", 0, start) + 1:start].strip()
        for offset, words in enumerate(comment.split("\n")):
            marker = re.match(r"\s*(//[/!]?|/\*+|\*/|\*(?=\s|$)|#+!?|\"\"\"|)", words)
            words = re.sub(r"(\*/|\"\"\")\s*$", "", words[marker.end():])
            kind = "block" if offset or not marker[1].startswith(("//", "#")) else marker[1]
            # A comment beside code stands by itself, and so does each block.
            lines.append((line + offset, kind if alone else None, words, offset == 0 and (kind == "block" or not alone)))
    paragraph, number, last, fenced = [], None, None, False

    def flush():
        nonlocal paragraph
        words, paragraph = " ".join(paragraph), []
        return [(number, words)] if words and "SPDX-License-Identifier" not in words else []

    for line, kind, words, begins in lines:
        if begins or kind != before or last is not None and line != last + 1 and kind != "block":
            yield from flush()
            fenced = False
        before, last = kind, line
        if words.strip().startswith("```"):
            fenced = not fenced
            words = ""
        # Indented by four: an example.
        if fenced or words.startswith("     ") or not words.strip(" -=*#|"):
            yield from flush()
            continue
        if re.match(r"\s*([-*+]|\d+\.|#+|\|)\s", words) or re.match(r"\s*\|", words):
            yield from flush()
        for cell in [cell for cell in words.split("|") if cell.strip()] if words.strip().startswith("|") else [words]:
            if not paragraph:
                number = line
            paragraph.append(re.sub(r"^\s*([-*+#]+|\d+\.)?\s*|[-\s]*$", "", cell))
            if cell is not words:
                yield from flush()
    yield from flush()


def sentences(path, text):
    """(line of its paragraph, sentence); a single word is none."""
    for line, paragraph in paragraphs(path, text):
        for sentence in re.split(r"(?<=[.!?:])[\"')\]`*]*\s+", paragraph):
            if len(re.findall(r"[A-Za-z]\w*", sentence)) > 1:
                yield line, sentence


def code_lines(text, found):
    """Lines with code and lines with nothing but a comment, of a text whose comments were `found`."""
    code, at = [], 0
    for start, comment in found:
        code += [text[at:start], blank(comment)]
        at = start + len(comment)
    pairs = list(zip(("".join(code) + text[at:]).split("\n"), text.split("\n")))
    return (sum(bool(code.strip()) for code, _ in pairs),
            sum(bool(whole.strip()) and not code.strip() for code, whole in pairs))
