#!/usr/bin/env bash
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# fault_path.sh [--all]: how many files, functions and frames of the library a demand fault passes when nothing is switched
# on: anonymous memory, a callback that fills at once, pages far apart. Counted by valgrind's callgrind in an unoptimised
# build, so that no function is inlined. FAULTS=1000, DEMAND_RUN=4096 (one page: no readahead; 0 for the default).

. "$(dirname "$0")/common.sh"

needs cc=gcc valgrind=valgrind python3=python3
faults=${FAULTS:-1000}
run=${DEMAND_RUN:-4096}
target=$(realpath -m "${CARGO_TARGET_DIR:-target}/fault_path")

# Valgrind takes the vDSO away, in which rustix's own system calls look for functions: it goes through the C library here.
RUSTFLAGS="--cfg rustix_use_libc" CARGO_PROFILE_DEV_OPT_LEVEL=0 CARGO_PROFILE_DEV_DEBUG=2 \
    try "library" cargo build --lib --target-dir "$target" || finish
ln -s "$target/debug/libkuf.so" "$work/libkuf.so.0"
try "program" cc -g -O1 -std=c11 -Wall -Wextra -Werror -Iinclude -o "$work/fault_path" tests/check/fault_path.c \
    "$work/libkuf.so.0" || finish

export LD_LIBRARY_PATH=$work
program "faults without valgrind" "$work/fault_path" "$faults" "$run"
if [ "$n_skipped" -gt 0 ]; then finish; fi
for times in 1 2; do
    # The names of ioctl's callers, so that the frames above it are those of one call.
    try "$((times * faults)) faults" timeout -k 10 300 valgrind --tool=callgrind --callgrind-out-file="$work/$times.out" \
        --separate-callers60=ioctl "$work/fault_path" $((times * faults)) "$run" || finish
done

tests/check/fault_path.py "$faults" "$work/1.out" "$work/2.out" "$target/debug/libkuf.so" "$@" | tee "$work/counts"
code=${PIPESTATUS[0]}
n_passed=$((n_passed + $(grep -c '^ok    fault_path: ' "$work/counts")))
n_failed=$((n_failed + $(grep -c '^FAIL  fault_path: ' "$work/counts")))
if [ "$code" -ne 0 ] && [ "$n_failed" -eq 0 ]; then failed "fault_path.py ended with $code"; fi
finish
