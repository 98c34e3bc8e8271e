#!/usr/bin/env bash
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# Runs the loom models: all interleavings of the claim, wait and install steps. They have their own target directory,
# because the flag changes all crates.

. "$(dirname "$0")/common.sh"

needs cc=gcc
if ! compgen -G 'tests/loom*.rs' >/dev/null; then
    failed "no models: tests/loom*.rs is missing"
    finish
fi
export RUSTFLAGS="${RUSTFLAGS:-} --cfg loom"
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-target}/loom"
cargo_test --release --test 'loom*'
finish
