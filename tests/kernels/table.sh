#!/usr/bin/env bash
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# table.sh [NAME...]: runs examples/c/probe.c on the kernels of kernels.table, all by default, and rewrites the table in
# docs/kernels.md.
set -eu -o pipefail

cd "$(dirname "$0")/../.."
# shellcheck source=tests/kernels/rig.sh
. tests/kernels/rig.sh
tests/check/need.sh python3=python3
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

for name in $(kernels_of "$@"); do
    choose "$name"
    build_all "$build/examples/probe"
    echo "$PWD/$build/examples/probe --json" >"$work/list"
    boot "$work/list" "$work/$name" -t 60 -T 300 >"$work/log" 2>&1 || {
        cat "$work/log"
        exit 1
    }
    sed 's/\r//' "$work/$name/console.log" | sed -n 's/.*\({"version".*}\).*/\1/p' >"$work/$name.json"
    echo "$name $(cat "$directory/release")" >>"$work/order"
done
tests/kernels/table.py "$work" docs/kernels.md
