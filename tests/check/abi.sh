#!/usr/bin/env bash
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# abi.sh [TAG]: compares include/kuf.h with that of the last tag (v0.1.0, ...): calls with their types by abidiff, constants by
# their values. Within a soname calls and constants may be added and structs may grow at their end; nothing else may change.
#
# The header is what programs are compiled with, so that it is compared and not the library: tests/header.rs checks that it is
# what the source says, symbols.sh that the library exports its calls. The calls of kuf-kvm.h may change.

# shellcheck disable=SC2317 # functions here are called through try
. "$(dirname "$0")/common.sh"

if ! git rev-parse --git-dir >/dev/null 2>&1; then
    skipped "abidiff" "this tree is no git repository"
    finish
fi
tag=${1:-$(git describe --tags --abbrev=0 --match 'v[0-9]*' 2>/dev/null)}
if [ -z "$tag" ]; then
    skipped "abidiff" "no version is tagged yet"
    finish
fi
major() { sed -n 's/^version = "\([0-9]*\).*/\1/p' | head -n 1; }
if [ "$(git show "$tag:Cargo.toml" | major)" != "$(major <Cargo.toml)" ]; then
    skipped "abidiff" "$tag has another soname"
    finish
fi
needs abidiff=abigail-tools cc=gcc

# model HEADER FOLDER: a library with a variable of the type of each call, callback and field, and a list of the places of the
# fields and the values of the constants.
model() {
    mkdir "$2"
    cp "$1" "$2/kuf.h"
    cc -E -P "$2/kuf.h" -o "$2/plain.h"
    awk '/^struct [a-z_]+ *\{/ { name = $2 }
        /^\};/ { name = "" }
        name != "" && /;$/ { sub(/(\[[^]]*\])*;$/, ""); sub(/.*[ *]/, ""); print name, $0 }' "$2/plain.h" >"$2/fields"
    {
        echo '#include "kuf.h"'
        grep -oE '\bkuf_[a-z_]+\(' "$2/plain.h" | sed 's/\(.*\)(/__typeof__(\1) *call_\1;/'
        sed -nE 's/^typedef .*\(\*(kuf_[a-z_]+)\)\(.*/\1 callback_\1;/p' "$2/plain.h"
        sed -E 's/(.*) (.*)/__typeof__(((struct \1 *)0)->\2) *field_\1_\2;/' "$2/fields"
    } >"$2/types.c"
    cc -g -shared -fPIC -o "$2/types.so" "$2/types.c" || return
    {
        printf '#include "kuf.h"\n#include <stddef.h>\n#include <stdio.h>\nint main(void)\n{\n'
        # No values: the guard, macros with arguments, KUF_HAVE_*; and the version is to change.
        sed -nE 's/^#define (KUF_[A-Z0-9_]+) +[^ ].*/\1/p' "$2/kuf.h" | grep -vE '^KUF_(VERSION|HAVE)_' |
            sed 's/.*/    printf("%s %#llx\\n", "&", (unsigned long long)(&));/'
        # A struct that does not carry its size is in arrays, or in another struct, and must not grow.
        awk '{ all[$1] } $2 == "size" { sized[$1] } END { for (s in all) if (!(s in sized)) print s }' "$2/fields" |
            sed 's/.*/    printf("%s has %zu bytes\\n", "&", sizeof(struct &));/'
        sed -E 's/(.*) (.*)/    printf("%s at %zu\\n", "\1.\2", offsetof(struct \1, \2));/' "$2/fields"
        echo '}'
    } >"$2/values.c"
    cc -o "$2/values" "$2/values.c" && "$2/values" | LC_ALL=C sort >"$2/values.txt"
}
git show "$tag:include/kuf.h" >"$work/old.h"
try "$tag's header compiles" model "$work/old.h" "$work/old" || finish
try "this header compiles" model include/kuf.h "$work/new" || finish

# How structs grow is seen in the places of their fields: abidiff would report a field that was added at the end.
printf '[suppress_type]\ntype_kind = struct\n' >"$work/suppressions"
try "calls, callbacks and fields of $tag have their types" abidiff --no-added-syms --suppressions "$work/suppressions" \
    "$work/old/types.so" "$work/new/types.so"
try "fields and constants were found" test "$(wc -l <"$work/old/fields")" -gt 50 -a "$(wc -l <"$work/old/values.txt")" -gt 100
LC_ALL=C comm -23 "$work/old/values.txt" "$work/new/values.txt" >"$work/changed"
try "fields are where they were in $tag, and constants have their values" diff /dev/null "$work/changed"
finish
