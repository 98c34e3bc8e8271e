#!/usr/bin/env bash
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# The models: every interleaving of the claim, wait and install steps, under loom. They have a target directory of their
# own, because the flag changes every crate.

. "$(dirname "$0")/common.sh"

needs cc=gcc
if ! compgen -G 'tests/loom*.rs' >/dev/null; then
    failed "no models: there is no tests/loom*.rs"
    finish
fi
export RUSTFLAGS="${RUSTFLAGS:-} --cfg loom"
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-target}/loom"
cargo_test --release --test 'loom*'
finish
