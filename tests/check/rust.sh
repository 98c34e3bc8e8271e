#!/usr/bin/env bash
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# rust.sh [ARGUMENT OF CARGO TEST...]: the unit and integration tests in Rust; tests/header.rs, which finds that
# include/kuf.h has drifted from the source, is one of them.

. "$(dirname "$0")/common.sh"

needs cc=gcc
cargo_test "$@"
finish
