#!/usr/bin/env bash
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# Checks build/libkuf.so as the dynamic linker sees it: the exported names and versions against symbols.txt, soname,
# nodelete, relocations, needed libraries, hardening. Also checks that zero detection is vector code.

. "$(dirname "$0")/common.sh"

needs readelf=binutils objdump=binutils
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

# libm, libpthread and others are part of glibc, but old versions have them as separate files.
sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p' "$work/dynamic" |
    grep -vxE 'lib(c|m|dl|rt|util|pthread|gcc_s)\.so\.[0-9]+|ld-linux.*\.so\.[0-9]+' >"$work/unexpected"
try "needs only the C library and libgcc_s" diff /dev/null "$work/unexpected"

readelf -lW "$so" >"$work/segments"
try "RELRO" grep -q 'GNU_RELRO' "$work/segments"
try "stack is not executable" grep -qE 'GNU_STACK .* RW +' "$work/segments"
try "no segment is writable and executable" test -z "$(grep -E 'LOAD .* RWE ' "$work/segments")"

# Checks the loop of zero detection (src/service/fault/zero.rs): it has loads, and each load is of a vector. A loop is the
# code between a backward jump and its target.
vector_loop() {
    local memory vector line target first='' last
    case $(uname -m) in
    x86_64) memory='\(%r' vector='\(%r[^)]*\),.*%[xyz]mm' ;;
    aarch64) memory='\[' vector='(ld1|ld[pu]?r?)\s+\{?[qv][0-9]' ;;
    esac
    sed -nE 's/^ *([0-9a-f]+):\s*/\1 /p' "$1" >"$work/instructions"
    while read -r last line; do
        target=$(sed -nE 's/^(j[a-z]+|b\.[a-z]+|cbn?z.*,|tbn?z.*,)\s+([0-9a-f]+) <.*/\2/p' <<<"$line")
        [ -n "$target" ] && [ $((16#$target)) -lt $((16#$last)) ] && first=$target && break
    done <"$work/instructions"
    [ -n "$first" ] || { echo "no loop found"; return 1; }
    sed -n "/^$first /,/^$last /p" "$work/instructions" >"$work/loop"
    grep -E "$memory" "$work/loop" | grep -vE 'lea|nop' >"$work/loads"
    echo "reads in the loop: $(wc -l <"$work/loads"); not of vectors:"
    ! grep -vE "$vector" "$work/loads" && [ -s "$work/loads" ]
}

objdump -d --no-show-raw-insn "$so.debug" | sed -n '/4zero7is_zero.*>:$/,/^$/p' >"$work/is_zero"
case $(uname -m) in
x86_64 | aarch64)
    try "the scan for pages of zeroes is there" test -s "$work/is_zero"
    if vector_loop "$work/is_zero" >"$work/output"; then
        passed "the scan for pages of zeroes is vector code"
    else
        failed "the scan for pages of zeroes is vector code"
        sed 's/^/    /' "$work/output"
    fi
    ;;
*) skipped "the scan for pages of zeroes is vector code" "not known how that looks on $(uname -m)" ;;
esac
finish
