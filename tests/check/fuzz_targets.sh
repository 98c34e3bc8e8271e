#!/usr/bin/env bash
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# fuzz_targets.sh [TARGET...]: runs the targets of fuzz/, FUZZ_SECONDS each (60), starting from the corpus in the tree. It
# prints the findings and keeps them in build/fuzz. It needs a nightly toolchain and cargo-fuzz; without them `cargo test`
# (src/fuzz.rs) and tests/c/firecracker_message.c still run the corpus.

. "$(dirname "$0")/common.sh"

[ $# -gt 0 ] || set -- recording proc_maps structs firecracker
if ! cargo +nightly --version >/dev/null 2>&1; then
    skipped "$*" "no nightly toolchain (rustup toolchain install nightly)"
    finish
fi
if ! cargo +nightly fuzz --version >/dev/null 2>&1; then
    skipped "$*" "no cargo-fuzz (cargo install cargo-fuzz)"
    finish
fi
needs cc=gcc c++=g++

for target; do
    try "build $target" cargo +nightly fuzz build "$target" || continue
    built+=" $target"
done

mkdir -p build/fuzz
run() {
    mkdir -p "$work/new-$1"
    cargo +nightly fuzz run "$1" "$work/new-$1" "fuzz/corpus/$1" -- -max_total_time="${FUZZ_SECONDS:-60}" -timeout=20 \
        -rss_limit_mb=2048 -max_len=4096 -artifact_prefix=build/fuzz/"$1"- >"$work/log-$1" 2>&1
    echo $? >"$work/code-$1"
}

# Runs as many targets at once as there are CPUs.
for target in ${built:-}; do
    while [ "$(jobs -pr | wc -l)" -ge "$(nproc)" ]; do wait -n; done
    run "$target" &
done
wait
for target in ${built:-}; do
    runs=$(sed -n 's/^Done \([0-9]*\) runs in .*/\1/p' "$work/log-$target")
    if [ "$(cat "$work/code-$target")" -eq 0 ] && [ "${runs:-0}" -gt 0 ]; then
        passed "$target: $runs runs"
    else
        failed "$target"
        tail -n 60 "$work/log-$target" | sed 's/^/    /'
    fi
done
finish
