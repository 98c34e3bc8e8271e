#!/usr/bin/env bash
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# Every example builds with nothing but pkg-config and does what it is for when run with no argument. (That of
# firecracker_handler takes a Firecracker: the suite c has tests/c/firecracker_peer.c, which plays one.)

. "$(dirname "$0")/common.sh"

needs cc=gcc pkg-config=pkg-config
if ! compgen -G 'examples/c/*.c' >/dev/null; then
    failed "there are no examples"
    finish
fi
try "build" "$MAKE" -s examples WERROR=-Werror || finish
for file in examples/c/*.c; do
    name=$(basename "$file" .c)
    if [ "$name" = firecracker_handler ]; then set -- --help; else set --; fi
    program "$name" env LD_LIBRARY_PATH="$PWD/build/stage/lib" "build/examples/$name" "$@"
done
finish
