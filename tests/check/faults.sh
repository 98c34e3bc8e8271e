#!/usr/bin/env bash
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# faults.sh [alloc|calls|filter]...: fails each allocation and each system call of the library, one in each run of
# tests/faults, once and for good; and refuses each kind of call after kuf_open, as a seccomp filter does. A run must end
# with right bytes, an error, a poisoned page or a service that reports that it stopped. Any other end is a failure, which
# is printed with the command to repeat the run.
#
# SECONDS_EACH=N: time limit for each of the three (0: none). ALL=1: each occurrence of a call; otherwise the first ones
# and then a sample. JOBS=N: the number of runs at once. SCENARIO=NAME: only this scenario.

. "$(dirname "$0")/common.sh"

needs cc=gcc pkg-config=pkg-config
[ $# -gt 0 ] || set -- alloc calls filter
export LD_LIBRARY_PATH=$PWD/build/stage/lib
program=build/faults/faults

try "build" "$MAKE" -s $program || finish
for what; do
    code=0
    $program "$what" --seconds "${SECONDS_EACH:-0}" ${ALL:+--all} ${JOBS:+--jobs "$JOBS"} \
        ${SCENARIO:+--scenario "$SCENARIO"} >"$work/runs" 2>&1 </dev/null || code=$?
    if [ $code -eq 77 ]; then
        skipped "$what" "$(tail -n 1 "$work/runs")"
        continue
    fi
    runs=$(sed -n 's/^\([0-9]*\) of [0-9]* runs in .*/\1/p' "$work/runs")
    wrong=$(grep -c '^FAIL' "$work/runs")
    grep -v '^FAIL' "$work/runs" | sed 's/^/    /'
    if [ "$wrong" -gt 0 ]; then
        grep '^FAIL' "$work/runs" >"$work/wrong"
        tests/faults/names.py build/stage/lib/libkuf.so*.debug <"$work/wrong" >"$work/named" 2>/dev/null ||
            cp "$work/wrong" "$work/named"
        sed "s|^FAIL|    LD_LIBRARY_PATH=build/stage/lib $program|" "$work/named"
    fi
    if [ -z "$runs" ]; then
        failed "$what: ended with $code and printed no count"
    else
        if [ $((runs - wrong)) -gt 0 ]; then passed "$what: $((runs - wrong)) runs" $((runs - wrong)); fi
        if [ "$wrong" -gt 0 ]; then failed "$what: $wrong runs" "$wrong"; fi
    fi
done
finish
