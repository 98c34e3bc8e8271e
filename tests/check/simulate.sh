#!/usr/bin/env bash
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# simulate.sh [SEED...]: runs the whole library over a simulated kernel, with a schedule determined by a seed
# (tests/simulation). It runs the given seeds, or a fixed set of seeds, or, with SECONDS_OF_SEEDS=n in the environment,
# new seeds for n seconds. These runs have their own target directory, because the flag changes all crates.

. "$(dirname "$0")/common.sh"

needs cc=gcc
export RUSTFLAGS="${RUSTFLAGS:-} --cfg shuttle"
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-target}/simulation"
before=$SECONDS
if cargo test --profile simulation --test simulation --no-run >"$work/build" 2>&1; then
    # A first build takes a minute and a quarter of one CPU.
    passed "built in $((SECONDS - before)) s"
else
    failed "the build"
    sed 's/^/    /' "$work/build"
    finish
fi

# simulate NAME VARIABLE=VALUE...: runs the program once. It has one thread.
simulate() {
    local name=$1
    shift
    env "$@" cargo test -q --profile simulation --test simulation >"$work/output.$name" 2>&1
}

# report NAME STATUS: reports the result of that run.
report() {
    local output=$work/output.$1
    if [ "$2" -eq 0 ]; then passed "$1: $(grep '^simulation:' "$output")"; else failed "$1"; fi
    if [ "$2" -ne 0 ] || [ -n "${KUF_SIM_TRACE:-}" ]; then sed 's/^/    /' "$output"; fi
}

# both NAME COUNT FROM VARIABLE=VALUE...: runs COUNT seeds, from FROM on, half of them in a second process.
both() {
    local name=$1 half=$(($2 / 2)) from=$3 code=0
    shift 3
    simulate "$name-1" KUF_SIM_FROM="$from" KUF_SIM_RUNS="$half" "$@" &
    simulate "$name-2" KUF_SIM_FROM=$((from + half)) KUF_SIM_RUNS="$half" "$@" || code=$?
    report "$name-2" "$code"
    code=0
    wait $! || code=$?
    report "$name-1" "$code"
}

if [ -n "${SECONDS_OF_SEEDS:-}" ]; then
    from=$(od -An -N6 -tu8 /dev/urandom | tr -d ' ')
    both "new" 2000000000 "$from" KUF_SIM_SECONDS="$SECONDS_OF_SEEDS"
elif [ $# -gt 0 ]; then
    for seed; do
        code=0
        simulate "seed-$seed" KUF_SIM_SEED="$seed" || code=$?
        report "seed-$seed" "$code"
    done
else
    both "fixed" "${KUF_SIM_RUNS:-16000}" 1 KUF_SIM_SECONDS=300
fi
finish
