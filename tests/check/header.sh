#!/usr/bin/env bash
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# Compiles each header alone: without another header before it, once and twice, in each version of C and C++, with each
# compiler that is installed, with warnings as errors, those for `~FLAG` and for structs that begin at zero among them. Checks
# that the headers have the version and the calls of this tree, and a macro for each call. (tests/header.rs checks that they
# are cbindgen's output.)

. "$(dirname "$0")/common.sh"

needs gcc=gcc g++=g++

uses='static uint32_t use(uint32_t flags) { struct kuf_stats_info s = {0}; return (flags & ~KUF_OPEN_DIRECT) + s.size; }'
in_cpp='static uint32_t use(uint32_t flags) { kuf_stats_info s = {}; return (flags & ~KUF_OPEN_DIRECT) + s.size; }'
for header in kuf kuf-kvm; do
    include="#include \"$header.h\""
    printf '%s\n' "$include" "$uses" >"$work/$header-once.c"
    printf '%s\n' "$include" "$include" "$uses" >"$work/$header-twice.c"
    printf '%s\n' "$include" "$in_cpp" >"$work/$header-once.cc"
    printf '%s\n' "$include" "$include" "$in_cpp" >"$work/$header-twice.cc"
done

strictly=(-Wall -Wextra -Wsign-conversion -Werror -Wno-unused-function -Iinclude -fsyntax-only)
for compiler in gcc clang g++ clang++; do
    if ! command -v $compiler >/dev/null; then
        skipped $compiler "it is not installed"
        continue
    fi
    # uint64_t and its constants are long long, which the oldest versions know as an extension only.
    case $compiler in
    *++)
        try "$compiler, C++98" $compiler -std=c++98 "${strictly[@]}" "$work"/*.cc
        for version in 11 14 17 20; do
            try "$compiler, C++$version" $compiler -std=c++$version -Wpedantic "${strictly[@]}" "$work"/*.cc
        done
        ;;
    *)
        try "$compiler, C89" $compiler -std=c89 "${strictly[@]}" "$work"/*.c
        for version in 99 11 17 2x; do
            try "$compiler, C$version" $compiler -std=c$version -Wpedantic "${strictly[@]}" "$work"/*.c
        done
        ;;
    esac
done

# The program at the top of kuf.h: a function, then the lines of main.
sed -n '/^ \* Words:/q; s/^ \*     //p' include/kuf.h >"$work/example"
{
    printf '#include <kuf.h>\n#include <err.h>\n#include <errno.h>\n#include <unistd.h>\n'
    sed '/^\.\.\.$/,$d' "$work/example"
    printf 'int main(void)\n{\n    int image = -1;\n    size_t len = 0;\n    void *mapping = NULL;\n'
    sed '1,/^\.\.\.$/d; /^\.\.\. /d' "$work/example"
    echo '}'
} >"$work/example.c"
try "the example of kuf.h compiles" gcc -std=gnu11 -Wall -Wextra -Werror -Iinclude -fsyntax-only "$work/example.c"
try "the example of kuf.h is a whole one" grep -q 'kuf_close(&kuf, KUF_END_POISON)' "$work/example.c"

version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
in_header=$(sed -n 's/^#define KUF_VERSION_\(MAJOR\|MINOR\|PATCH\) //p' include/kuf.h | paste -sd .)
try "header's version is Cargo.toml's" test "$version" = "$in_header"

# Finds a call that is declared but not exported, or exported but not declared, before a caller's linker does.
declared() {
    grep -oE '^[a-z].*\bkuf_[a-z_]+\(' "include/$1.h" | grep -v '^typedef' | grep -oE 'kuf_[a-z_]+\(' | tr -d '(' | sort
}
exported() { sed -n "/^$1/,/^}/p" src/capi/libkuf.map | grep -oE '^ +kuf_[a-z_]+;' | tr -d ' ;' | sort; }
try "kuf.h declares what libkuf.map exports" diff <(declared kuf) <(exported KUF_0)
try "kuf-kvm.h declares what libkuf.map exports as experimental" diff <(declared kuf-kvm) <(exported KUF_EXPERIMENTAL)

# A program asks the preprocessor for a call: KUF_HAVE_KUF_OPEN. kuf-kvm.h includes kuf.h.
{
    printf '#include <kuf-kvm.h>\n'
    sed -nE 's/^ +(kuf_[a-z_]+);$/\1/p' src/capi/libkuf.map | while read -r call; do
        printf '#if KUF_HAVE_%s != 1\n#error no macro for %s\n#endif\n' "${call^^}" "$call"
        printf '__typeof__(%s) *use_%s = %s;\n' "$call" "$call" "$call"
    done
    printf '#ifdef KUF_HAVE_KUF_FROM_A_LATER_VERSION\nint later = kuf_from_a_later_version();\n#endif\n'
} >"$work/have.c"
try "each exported call has its macro KUF_HAVE_*" gcc -std=gnu11 -Wall -Wextra -Wundef -Werror -Iinclude -fsyntax-only "$work/have.c"
try "each macro KUF_HAVE_* has its call" diff <(sed -nE 's/^#define KUF_HAVE_(\w+) 1$/\L\1/p' include/*.h | sort) \
    <(sed -nE 's/^ +(kuf_[a-z_]+);$/\1/p' src/capi/libkuf.map | sort)
finish
