# shellcheck shell=bash
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# Sourced by every suite in this folder. A suite reports with passed, failed, skipped or try, and ends with finish,
# which prints the sum (or hands it to run.sh).

set -u
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1
suite=$(basename "$0" .sh)
MAKE=${MAKE:-make}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
n_passed=0
n_failed=0
n_skipped=0

passed() { n_passed=$((n_passed + ${2:-1})) && echo "ok    $suite: $1"; }
failed() { n_failed=$((n_failed + ${2:-1})) && echo "FAIL  $suite: $1"; }
# skipped NAME REASON
skipped() { n_skipped=$((n_skipped + 1)) && echo "SKIP  $suite: $1: $2"; }

# try NAME COMMAND...: passes when the command does. Its output is shown only when it fails.
try() {
    local name=$1
    shift
    if "$@" >"$work/output" 2>&1; then
        passed "$name"
    else
        failed "$name: $*"
        sed 's/^/    /' "$work/output"
        return 1
    fi
}

# needs COMMAND=PACKAGE...: ends the suite, failed, when they cannot be had.
needs() {
    tests/check/need.sh "$@" && return
    failed "tools"
    finish
}

# program NAME COMMAND...: runs a test program that says "SKIP: reason" on a line of its own (with its name before it, or
# without) for what it leaves out, and ends with 77 when that is everything. The time limit is for a program whose own
# watchdog is stuck as well.
program() {
    local name=$1 code=0 reason
    shift
    timeout -k 10 "${KUF_PROGRAM_SECONDS:-300}" "$@" >"$work/output" 2>&1 </dev/null || code=$?
    case $code in
    0 | 77)
        if [ "$code" -eq 0 ]; then passed "$name"; fi
        sed -n 's/^\([a-z_]*: \)\?SKIP[: ]*//p' "$work/output" >"$work/skips"
        if [ "$code" -eq 77 ] && ! [ -s "$work/skips" ]; then tail -n 1 "$work/output" >"$work/skips"; fi
        while read -r reason; do skipped "$name" "$reason"; done <"$work/skips"
        ;;
    *)
        failed "$name (exit status $code)"
        sed 's/^/    /' "$work/output"
        ;;
    esac
}

# cargo_test ARGUMENT...: counts tests as cargo does. A test that prints a line "SKIP reason" has left something out.
cargo_test() {
    local code=0 good bad reason name
    cargo test --no-fail-fast "$@" -- --show-output >"$work/log" 2>&1 || code=$?

    # One line a test program: "test result: ok. 5 passed; 0 failed; 1 ignored; ..."
    read -r good bad < <(sed -n 's/^test result: .* \([0-9]*\) passed; \([0-9]*\) failed; .*/\1 \2/p' "$work/log" |
        awk '{ p += $1; f += $2 } END { print p + 0, f + 0 }')
    grep -E '^(test result:|     Running|   Doc-tests)' "$work/log" | sed 's/^ */    /'
    if [ "$good" -gt 0 ]; then passed "$good tests" "$good"; fi
    if [ "$bad" -gt 0 ]; then failed "$bad tests" "$bad"; fi
    # A test program that could not be built, or died, has no result line.
    if [ "$code" -ne 0 ] && [ "$bad" -eq 0 ]; then failed "cargo test ended with $code"; fi
    if [ "$code" -ne 0 ]; then grep -vE '^(test .* \.\.\. ok$| *Compiling|$)' "$work/log" | sed 's/^/    /'; fi
    while read -r reason; do skipped "part of a test" "$reason"; done < <(
        sed -n 's/^\([a-z_]*: \)\?SKIP[: ]*//p' "$work/log")
    while read -r name; do skipped "$name" "ignored by default"; done < <(
        sed -n 's/^test \(.*\) \.\.\. ignored.*/\1/p' "$work/log")
}

sum() {
    if [ "$3" -gt 0 ]; then
        echo "$1 passed, $2 failed, $3 skipped"
    else
        echo "$1 passed, $2 failed"
    fi
}

finish() {
    if [ -n "${KUF_TALLY:-}" ]; then
        echo "$suite $n_passed $n_failed $n_skipped" >>"$KUF_TALLY"
    else
        sum "$n_passed" "$n_failed" "$n_skipped"
    fi
    [ "$n_failed" -eq 0 ] && [ $((n_passed + n_skipped)) -gt 0 ]
    exit
}
