#!/usr/bin/env bash
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# Every example builds with nothing but pkg-config and does what it is for when run with no argument.

. "$(dirname "$0")/common.sh"

needs cc=gcc pkg-config=pkg-config
if ! compgen -G 'examples/c/*.c' >/dev/null; then
    failed "there are no examples"
    finish
fi
try "build" "$MAKE" -s examples WERROR=-Werror || finish
for file in examples/c/*.c; do
    name=$(basename "$file" .c)
    program "$name" env LD_LIBRARY_PATH="$PWD/build/stage/lib" "build/examples/$name"
done
finish
