# shellcheck shell=bash
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# Sourced by each suite in this folder. A suite reports with passed, failed, skipped or try, and ends with finish, which
# prints the sum or passes it to run.sh.

set -u
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1
suite=$(basename "$0" .sh)
MAKE=${MAKE:-make}
export KUF_INSTALL_TOOLS=1 # for need.sh, also where make calls it
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

# needs COMMAND=PACKAGE...: fails and ends the suite if a command is missing and cannot be installed.
needs() {
    tests/check/need.sh "$@" && return
    failed "tools"
    finish
}

# program NAME COMMAND...: runs a test program. The program prints a line "SKIP: reason", with or without its name in
# front, for each part that it skips, and exits with 77 if it skips all. The time limit ends a program whose own watchdog
# hangs too.
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

# cargo_test ARGUMENT...: counts tests as cargo does. A test prints a line "SKIP reason" for each part that it skips.
cargo_test() {
    local code=0 good bad reason name
    cargo test --no-fail-fast "$@" -- --show-output >"$work/log" 2>&1 || code=$?

    # Each test program prints a line "test result: ok. 5 passed; 0 failed; 1 ignored; ..."
    read -r good bad < <(sed -n 's/^test result: .* \([0-9]*\) passed; \([0-9]*\) failed; .*/\1 \2/p' "$work/log" |
        awk '{ p += $1; f += $2 } END { print p + 0, f + 0 }')
    grep -E '^(test result:|     Running|   Doc-tests)' "$work/log" | sed 's/^ */    /'
    if [ "$good" -gt 0 ]; then passed "$good tests" "$good"; fi
    if [ "$bad" -gt 0 ]; then failed "$bad tests" "$bad"; fi
    # A test program that died or could not be built prints no result line.
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
