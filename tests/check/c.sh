#!/usr/bin/env bash
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# c.sh [TEST...]: runs the C tests with the staged libkuf.so, and checks that docs/bad-input.md is the table of
# tests/c/bad_input.c.

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

finish
