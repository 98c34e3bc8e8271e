#!/usr/bin/env bash
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# rust.sh [ARGUMENT OF CARGO TEST...]: runs the unit and integration tests in Rust, and the examples of the documentation. One
# of the tests, tests/header.rs, checks that include/kuf.h matches the source. Without an argument it also runs the program in
# examples/rust, and checks that the crate builds for other targets.

. "$(dirname "$0")/common.sh"

needs cc=gcc
cargo_test --features vm-memory "$@"
[ $# -eq 0 ] || finish

for file in examples/rust/*.rs; do
    name=$(basename "$file" .rs)
    try "build $name" cargo build --features vm-memory --example "$name" &&
        program "$name" "${CARGO_TARGET_DIR:-target}/debug/examples/$name"
done

# has_std TARGET: whether the toolchain has the standard library for it, or rustup can add it.
has_std() {
    [ -d "$(rustc --print sysroot)/lib/rustlib/$1/lib" ] && return
    command -v rustup >/dev/null && timeout 120 rustup target add "$1" >/dev/null 2>&1
}

for target in x86_64-unknown-linux-musl aarch64-unknown-linux-gnu; do
    if has_std "$target"; then
        try "cargo check for $target" cargo check --lib --features vm-memory --target "$target"
    else
        skipped "cargo check for $target" "the toolchain has no standard library for it, and rustup could not add it"
    fi
done
finish
