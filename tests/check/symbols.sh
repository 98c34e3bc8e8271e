#!/usr/bin/env bash
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# build/libkuf.so as the dynamic linker sees it: exported names with their versions against symbols.txt, soname, nodelete,
# relocations, needed libraries, hardening.

. "$(dirname "$0")/common.sh"

needs readelf=binutils
try "make" "$MAKE" -s build || finish
so=$(echo build/libkuf.so.*.*[0-9])

readelf --dyn-syms -W "$so" | awk '$7 != "UND" && $4 != "OBJECT" && NF == 8 && $1 ~ /^[0-9]+:$/ { print $8 }' |
    LC_ALL=C sort >"$work/symbols"
try "exported symbols are those of symbols.txt" diff tests/check/symbols.txt "$work/symbols"

readelf -dW "$so" >"$work/dynamic"
major=$(sed -n 's/^#define KUF_VERSION_MAJOR //p' include/kuf.h)
try "soname" grep -qF "soname: [libkuf.so.$major]" "$work/dynamic"
try "dlclose leaves it loaded (NODELETE)" grep -q 'FLAGS_1.*NODELETE' "$work/dynamic"
try "relocated before it runs (BIND_NOW)" grep -q 'BIND_NOW' "$work/dynamic"
try "no text relocations" test -z "$(grep TEXTREL "$work/dynamic")"

# libm, libpthread and so on are part of glibc, and separate files only in old ones.
sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p' "$work/dynamic" |
    grep -vxE 'lib(c|m|dl|rt|util|pthread|gcc_s)\.so\.[0-9]+|ld-linux.*\.so\.[0-9]+' >"$work/unexpected"
try "needs nothing but the C library and libgcc_s" diff /dev/null "$work/unexpected"

readelf -lW "$so" >"$work/segments"
try "RELRO" grep -q 'GNU_RELRO' "$work/segments"
try "stack is not executable" grep -qE 'GNU_STACK .* RW +' "$work/segments"
try "no segment is writable and executable" test -z "$(grep -E 'LOAD .* RWE ' "$work/segments")"
finish
