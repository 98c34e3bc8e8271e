#!/usr/bin/env bash
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# run.sh [SUITE...]: runs the suites of this folder, all by default, and prints the sum of their counts at the end.

. "$(dirname "$0")/common.sh"

[ $# -gt 0 ] || set -- lint house rust fuzz_targets loom simulate header symbols trace install dist deb abi c fuzz sanitize examples bench

export KUF_TALLY=$work/tally
: >"$KUF_TALLY"
broken=0
for suite; do
    echo "== $suite"
    before=$SECONDS
    tests/check/"$suite".sh
    counted=$(sed -n "s/^$suite //p" "$KUF_TALLY")
    # A suite that died before it printed its counts is one failure.
    [ -n "$counted" ] || { echo "FAIL  $suite: ended without a count" && broken=$((broken + 1)); }
    echo "== $suite: ${counted:-none} (passed, failed, skipped) in $((SECONDS - before)) s"
done

read -r n_passed n_failed n_skipped < <(awk '{ p += $2; f += $3; s += $4 } END { print p + 0, f + 0, s + 0 }' "$KUF_TALLY")
n_failed=$((n_failed + broken))
unset KUF_TALLY
finish
