#!/usr/bin/env bash
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# run.sh [NAME...]: boots kernels of kernels.table, all by default, in an emulated machine (tests/kernel/run.sh) and runs
# the C tests, the unit tests and the examples there. It prints a line for each kernel, then the sum.
#
# KUF_KERNEL_LOGS     a directory in which to keep the output of each kernel
# QUICK=1             only the C tests in the list "quick", which differ most between kernels, and two examples
# KUF_KERNEL_TESTS    only these C tests, by name; no unit tests and no examples
# KUF_KERNEL_SECONDS  the time limit for each kernel (3000)
set -u -o pipefail

here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../.." || exit 1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
logs=${KUF_KERNEL_LOGS:-$work}
mkdir -p "$logs"
n_passed=0
n_failed=0
n_skipped=0

# shellcheck source=tests/kernels/rig.sh
. "$here/rig.sh"
mapfile -t names < <(kernels_of "$@")

# Tests left out because they need another program next to them, or something that an emulated machine with only a memory
# file system does not have.
left_out=" firecracker_peer "

# These machines are slow.
slow=KUF_TEST_PATIENCE=5

tests_of() {
    local file name
    local all="${KUF_KERNEL_TESTS:-$([ -z "${QUICK:-}" ] || grep -v '^#' "$here/quick")}"
    for file in ${all:-tests/c/*.c}; do
        name=$(basename "$file" .c)
        case $left_out in *" $name "*) ;; *) echo "$name" ;; esac
    done
}

# unit_tests: builds the unit tests and prints the path of the program.
unit_tests() {
    cargo test --lib --no-run ${target_words[@]+"${target_words[@]}"} --message-format=json 2>/dev/null |
        sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' | tail -n 1
}

# Prints the unit tests and the examples as lines for the list. The machines are slow, so lazy_restore gets a small guest.
others() {
    local unit example
    build_all examples >&2 || return
    echo "$slow $PWD/$build/examples/probe --json"
    if [ -z "${QUICK:-}" ]; then
        unit=$(unit_tests) && [ -n "$unit" ] || return
        echo "timeout=900 $unit --test-threads=2"
        for example in minimal event_loop postcopy external_handler kvm_run_loop; do
            echo "$slow $PWD/$build/examples/$example"
        done
    fi
    echo "$slow $PWD/$build/examples/lazy_restore --memory 16"
}

# one NAME: runs the tests on a kernel; the last line of its log is the sum.
one() {
    local name=$1 tests
    choose "$name" || return
    mapfile -t tests < <(tests_of)
    build_all "${tests[@]/#/$build/tests/}" || return
    printf "$slow $PWD/$build/tests/%s\n" "${tests[@]}" >"$work/list"
    if [ -z "${KUF_KERNEL_TESTS:-}" ]; then
        others >>"$work/list" || return
    fi
    boot "$work/list" "$logs/$name" -t 600 -T "${KUF_KERNEL_SECONDS:-3000}"
}

for name in "${names[@]}"; do
    before=$SECONDS
    one "$name" >"$logs/$name.log" 2>&1
    read -r passed failed skipped < <(
        sed -n 's/^\([0-9]*\) passed, \([0-9]*\) failed\(, \([0-9]*\) skipped\)\?$/\1 \2 \4/p' "$logs/$name.log" | tail -n 1)
    if [ -z "${passed:-}" ]; then
        echo "FAIL  kernels: $name: did not run"
        tail -n 20 "$logs/$name.log" | sed 's/^/    /'
        n_failed=$((n_failed + 1))
        continue
    fi
    word=ok
    if [ "$failed" -gt 0 ]; then word=FAIL; fi
    echo "$word  kernels: $name: $passed passed, $failed failed, ${skipped:-0} skipped in $((SECONDS - before)) s"
    grep -E '^not ok' "$logs/$name.log" | sed 's/^/    /'
    n_passed=$((n_passed + passed))
    n_failed=$((n_failed + failed))
    n_skipped=$((n_skipped + ${skipped:-0}))
done
if [ "$n_skipped" -gt 0 ]; then
    echo "$n_passed passed, $n_failed failed, $n_skipped skipped"
else
    echo "$n_passed passed, $n_failed failed"
fi
[ "$n_failed" -eq 0 ] && [ "$n_passed" -gt 0 ]
