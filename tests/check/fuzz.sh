#!/usr/bin/env bash
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# Runs the fuzzer of the C ABI (tests/fuzz) for a minute, the tests of its model, and the soak for some seconds.
# KUF_FUZZ_SECONDS and KUF_SOAK_SECONDS change the times.

. "$(dirname "$0")/common.sh"

needs cc=gcc pkg-config=pkg-config awk=gawk
export LD_LIBRARY_PATH=$PWD/build/stage/lib
seconds=${KUF_FUZZ_SECONDS:-49}

try "build" "$MAKE" -s build/fuzz/fuzz build/fuzz/model_test build/fuzz/soak || finish
program "the model" build/fuzz/model_test
for mode in serviced sources caller-driven direct adopted forking remote; do
    KUF_PROGRAM_SECONDS=$((seconds + 300)) program "random calls, $mode" \
        build/fuzz/fuzz --mode="$mode" --seconds=$((seconds / 7)) --huge-pages
    if [ $n_failed -eq 0 ]; then tail -n 1 "$work/output" | sed 's/^/    /'; fi
done
KUF_SOAK_SECONDS=${KUF_SOAK_SECONDS:-10} program "soak" build/fuzz/soak
grep 'verified faults in' "$work/output" | sed 's/^/    /'
finish
