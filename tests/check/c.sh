#!/usr/bin/env bash
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# c.sh [TEST...]: the C tests, through the staged libkuf.so, plain and with AddressSanitizer; and that docs/bad-input.md is
# the table that tests/c/bad_input.c walks.

. "$(dirname "$0")/common.sh"

needs cc=gcc pkg-config=pkg-config
if [ $# -eq 0 ]; then
    for file in tests/c/*.c; do set -- "$@" "$(basename "$file" .c)"; done
fi
export LD_LIBRARY_PATH=$PWD/build/stage/lib

try "build" "$MAKE" -s "${@/#/build/tests/}" || finish
for test; do
    program "$test" "build/tests/$test"
done

if [ -x build/tests/bad_input ]; then
    build/tests/bad_input --markdown >"$work/table"
    sed -n '/^| call/,$p' docs/bad-input.md >"$work/documented"
    try "docs/bad-input.md is the tested table (else: build/tests/bad_input --markdown)" diff "$work/documented" "$work/table"
fi

echo 'int main(void) { return 0; }' >"$work/empty.c"
if ! cc -fsanitize=address -o "$work/empty" "$work/empty.c" 2>/dev/null || ! "$work/empty"; then
    skipped "with AddressSanitizer" "this compiler cannot build for it"
    finish
fi
try "build with AddressSanitizer" "$MAKE" -s "${@/#/build/tests-asan/}" || finish
for test; do
    program "$test with AddressSanitizer" "build/tests-asan/$test"
done
finish
