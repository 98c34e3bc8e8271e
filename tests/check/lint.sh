#!/usr/bin/env bash
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# Runs rustfmt, clippy and rustdoc with warnings as errors, the examples in doc comments, and shellcheck; and compares
# tests/README.md with the tests there are, and docs/architecture.md with the files and constants of src/; and looks for names
# that are gone in all documents.

. "$(dirname "$0")/common.sh"

# component COMMAND COMPONENT: adds a part of the Rust toolchain that a minimal installation lacks.
component() {
    cargo "$1" --version >/dev/null 2>&1 && return
    command -v rustup >/dev/null && rustup component add "$2" >/dev/null 2>&1 && return
    skipped "cargo $1" "the toolchain has no $2, and rustup could not add it"
    return 1
}

component fmt rustfmt && try "cargo fmt --check" cargo fmt --check
component clippy clippy && try "cargo clippy" cargo clippy --all-targets --features vm-memory -- -D warnings
try "cargo doc" env RUSTDOCFLAGS="-D warnings" cargo doc --no-deps --lib --features vm-memory
try "cargo doc, with private items" env RUSTDOCFLAGS="-D warnings" \
    cargo doc --no-deps --lib --features vm-memory --document-private-items
# A fenced block without `text` is one of them, wherever it is: cargo doc says nothing of it.
try "examples in doc comments" cargo test --doc --features vm-memory

if tests/check/need.sh shellcheck=shellcheck 2>"$work/why"; then
    try "shellcheck" shellcheck -x -P SCRIPTDIR tests/check/*.sh tests/kernels/*.sh packaging/*.sh .ci/run
else
    skipped "shellcheck" "$(tail -n 1 "$work/why")"
fi

# The table of behaviours in tests/README.md has a column for each of these folders, and names each test there.
for column in 3:tests/c 4:src/service/tests; do
    folder=${column#*:}
    grep -lE '^(int main\(|#\[test\])' "$folder"/*.* | sed 's|.*/||; s|\.[a-z]*$||' | sort >"$work/tests"
    sed -n '/^| behaviour /,/^$/p' tests/README.md | cut -d '|' -f "${column%%:*}" | grep -oE "[\`][a-z_]+[\`]" |
        tr -d "\`" | sort -u >"$work/named"
    try "tests/README.md names the tests in $folder, and no others" diff "$work/named" "$work/tests"
done
# Paths in docs/architecture.md are relative to the root or to src/.
grep -oE "[\`][^\` ]+(\.(c|h|py|rs|sh)|/)[\`]" docs/architecture.md | tr -d "\`" | grep -v '^/' | sort -u |
    while read -r path; do [ -e "$path" ] || [ -e "src/$path" ] || echo "$path"; done >"$work/missing"
try "each path in docs/architecture.md exists" diff /dev/null "$work/missing"
# Names too: `function`, `Type::function`, `struct.field`.
grep -oE "[\`]([A-Za-z]\w*(::|\.))?[A-Za-z_]\w*[\`]" docs/architecture.md | tr -d "\`" | sed 's/.*[:.]//' | sort -u >"$work/names"
grep -rhoE '\w+' src include tests/c Makefile | sort -u | comm -13 - "$work/names" | grep -vE '^(rs|sh|h|py)$' >"$work/missing"
try "each name in docs/architecture.md is one of the source" diff /dev/null "$work/missing"

# All documents.
if tests/check/need.sh python3=python3 2>"$work/why"; then
    try "names and links in the documents exist, and their words are the field's" tests/check/docs.py
else
    skipped "the documents" "$(tail -n 1 "$work/why")"
fi

# Its tables: | number | file | function | what happens | and | constants | file | value | why |. The file has each of these names,
# and the second table has all times.
awk -F '|' '
    NF == 6 && $3 ~ /\.rs/ {
        gsub(/[` ]/, "")
        n = split($2 ~ /^[0-9]+$/ ? $4 : $2, names, ",")
        for (i = 1; i <= n; i++) print $3, names[i]
    }' docs/architecture.md | sort -u >"$work/named"
while read -r file name; do grep -qE "(const|fn) $name\b" "src/$file" || echo "$file $name"; done <"$work/named" >"$work/missing"
try "each function and constant in the tables of docs/architecture.md exists" diff /dev/null "$work/missing"
(cd src && grep -rE 'const [A-Z_]+: (Duration|Timespec) = |const [A-Z_]+_MS: ' --include='*.rs' . | grep -v '/tests/') |
    sed -E 's|^\./([^:]*):.*const ([A-Z_]+):.*|\1 \2|' | sort -u | comm -23 - "$work/named" >"$work/missing"
try "docs/architecture.md has each constant of src/ that is a time" diff /dev/null "$work/missing"
finish
