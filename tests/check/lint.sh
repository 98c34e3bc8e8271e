#!/usr/bin/env bash
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# Form: rustfmt, clippy with warnings as errors, shellcheck.

. "$(dirname "$0")/common.sh"

# component COMMAND COMPONENT: part of the Rust toolchain, which a minimal installation lacks.
component() {
    cargo "$1" --version >/dev/null 2>&1 && return
    command -v rustup >/dev/null && rustup component add "$2" >/dev/null 2>&1 && return
    skipped "cargo $1" "the toolchain has no $2, and rustup could not add it"
    return 1
}

component fmt rustfmt && try "cargo fmt --check" cargo fmt --check
component clippy clippy && try "cargo clippy" cargo clippy --all-targets -- -D warnings

if tests/check/need.sh shellcheck=shellcheck 2>"$work/why"; then
    try "shellcheck" shellcheck -x -P SCRIPTDIR tests/check/*.sh .ci/run
else
    skipped "shellcheck" "$(tail -n 1 "$work/why")"
fi
finish
