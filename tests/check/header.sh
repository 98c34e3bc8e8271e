#!/usr/bin/env bash
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# include/kuf.h by itself: with no other header before it, twice, as C11 and as C++17, with every warning an error; and
# that it names the version and the calls of this tree. (That it is what cbindgen makes is tests/header.rs.)

. "$(dirname "$0")/common.sh"

needs gcc=gcc g++=g++

printf '#include "kuf.h"\n' >"$work/once.c"
printf '#include "kuf.h"\n#include "kuf.h"\n' >"$work/twice.c"
cp "$work/once.c" "$work/once.cc"
cp "$work/twice.c" "$work/twice.cc"

for pair in gcc:g++ clang:clang++; do
    for how in "${pair%:*} -std=c11 c" "${pair#*:} -std=c++17 cc"; do
        read -r compiler standard ending <<<"$how"
        if ! command -v "$compiler" >/dev/null; then
            skipped "$compiler $standard" "$compiler is not installed"
            continue
        fi
        for file in once twice; do
            try "$compiler $standard, included $file" "$compiler" "$standard" -Wall -Wextra -Wpedantic -Werror -Iinclude \
                -fsyntax-only "$work/$file.$ending"
        done
    done
done

version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
in_header=$(sed -n 's/^#define KUF_VERSION_\(MAJOR\|MINOR\|PATCH\) //p' include/kuf.h | paste -sd .)
try "header's version is Cargo.toml's" test "$version" = "$in_header"

# A call that is declared and not exported, or the other way round, is found here rather than by a host's linker.
grep -oE '^[a-z].*\bkuf_[a-z_]+\(' include/kuf.h | grep -v '^typedef' | grep -oE 'kuf_[a-z_]+' | sort >"$work/declared"
grep -oE '^ +kuf_[a-z_]+;' src/capi/libkuf.map | tr -d ' ;' | sort >"$work/exported"
try "header declares what libkuf.map exports" diff "$work/declared" "$work/exported"
finish
