#!/usr/bin/env bash
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# Tests the bench itself: runs each row once with small sizes and verifies each byte; checks that results, plots and table
# are well-formed and that a wrong byte is detected. Times are not judged.

. "$(dirname "$0")/common.sh"

needs cc=gcc pkg-config=pkg-config python3=python3
try "build" "$MAKE" -s bench-programs || finish
code=0
timeout -k 10 300 python3 -B benches/run.py --check --out "$work/bench" >"$work/rows" 2>"$work/errors" </dev/null || code=$?
while read -r verdict text; do
    case $verdict in
    ok) passed "$text" ;;
    SKIP) skipped "${text%%: *}" "${text#*: }" ;;
    *) failed "$text" ;;
    esac
done <"$work/rows"
if [ "$code" -ne 0 ] && [ "$n_failed" -eq 0 ]; then
    failed "run.py --check ended with $code"
    sed 's/^/    /' "$work/errors"
fi
finish
