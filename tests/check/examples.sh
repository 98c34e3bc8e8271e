#!/usr/bin/env bash
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# Builds each example with pkg-config only and runs it without arguments; each checks its own results.
# (firecracker_handler needs a Firecracker: tests/c/firecracker_peer.c of the suite c acts as one.)

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

# The program of docs/adopting.md, over an image of which each page is different.
awk '/^```c$/ { on = 1; next } /^```$/ { on = 0 } on' docs/adopting.md >"$work/restore.c"
seq -f '%015.0f' 0 262143 >"$work/image"
export PKG_CONFIG_PATH=$PWD/build/stage/lib/pkgconfig
# shellcheck disable=SC2046
if try "build the program of docs/adopting.md" \
    cc -std=gnu11 -O2 -Wall -Wextra -Werror -pthread -o "$work/restore" "$work/restore.c" $(pkg-config --cflags --libs kuf); then
    program "adopting" env LD_LIBRARY_PATH="$PWD/build/stage/lib" "$work/restore" "$work/image"
    cp "$work/output" "$work/restored"
    try "the program of docs/adopting.md reads every page" grep -qx '1024 pages read, 0 wrong' "$work/restored"
fi
finish
