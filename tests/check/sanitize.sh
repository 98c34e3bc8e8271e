#!/usr/bin/env bash
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# sanitize.sh [TEST...]: runs the C tests, all by default, with AddressSanitizer (and its leak check), then with
# ThreadSanitizer. The library is instrumented too if rustc has the sanitizers' runtimes. All tests take ten minutes, so
# `make check` runs only those in which most calls, events and threads run concurrently.

. "$(dirname "$0")/common.sh"

needs cc=gcc pkg-config=pkg-config nm=binutils

# Tests with concurrent calls, events and threads.
meet=(adopt_race api_threads call_pairs deferred direct discard ensure given_back huge_race install_conflicts
    many_handles parked populate process_killed refault remove_memory remove_races resolve serve shared_in_place
    source stress unregister vcpu_fault)

if [ $# -eq 0 ] && [ -n "${KUF_TALLY:-}" ]; then set -- "${meet[@]}"; fi
if [ $# -eq 0 ]; then
    for file in tests/c/*.c; do set -- "$@" "$(basename "$file" .c)"; done
fi
export LD_LIBRARY_PATH=$PWD/build/stage/lib

# runtime KIND: prints the path of rustc's runtime, if it has one.
runtime() { find "$(rustc --print sysroot)/lib/rustlib" -name "librustc*_rt.$1.a" 2>/dev/null | head -n 1; }

# calls KIND SYMBOL: counts the references to the sanitizer in the library in build/KIND. With none, it is not
# instrumented.
calls() { nm --undefined-only "build/$1/libkuf.a" 2>/dev/null | grep -c "$2"; }

# without LIST TEST...: the tests that are not in the list.
without() {
    local list=" ${1//[[:space:]]/ } " test
    shift
    for test; do
        case $list in *" $test "*) ;; *) echo "$test" ;; esac
    done
}

# with_sanitizer NAME KIND SYMBOL VARIABLE TEST...: builds them for a sanitizer and runs them.
with_sanitizer() {
    local name=$1 kind=$2 symbol=$3 variable=$4 test
    shift 4
    [ $# -gt 0 ] || return 0
    try "build with $name" "$MAKE" -s -j"$(nproc)" "$variable" "${@/#/build/tests-$kind/}" || return 0
    if [ -n "${variable#*=}" ]; then try "the library calls $name" test "$(calls "$kind" "$symbol")" -ge 10; fi
    for test; do program "$test with $name" "build/tests-$kind/$test"; done
}

ASAN_RUNTIME=$(runtime asan)
TSAN_RUNTIME=$(runtime tsan)

echo 'int main(void) { return 0; }' >"$work/empty.c"
if ! cc -fsanitize=address -o "$work/empty" "$work/empty.c" 2>/dev/null || ! "$work/empty"; then
    skipped "AddressSanitizer" "this C compiler cannot build for it"
else
    if [ -z "$ASAN_RUNTIME" ]; then skipped "AddressSanitizer in the library" "rustc has no runtime for it"; fi
    # no_mappings uses up all mappings of the process, but the sanitizer needs some.
    mapfile -t tests < <(without "no_mappings" "$@")
    with_sanitizer AddressSanitizer asan __asan_report "ASAN_RUNTIME=$ASAN_RUNTIME" "${tests[@]}"
fi

if [ -z "$TSAN_RUNTIME" ]; then
    skipped "ThreadSanitizer" "rustc has no runtime for it"
    finish
fi
# Lets forked children start threads, which is safe because the sanitizer's locks are free at the fork.
export TSAN_OPTIONS="suppressions=$PWD/tests/check/tsan.suppressions:die_after_fork=0"
# Leave out tests that load the library with dlopen, compare speeds, count costs, or use processes instead of threads.
# Also leave out those in which the library has to do more than read events during a fork: ThreadSanitizer holds its locks
# until fork(2) returns, and fork(2) waits for the library. fork and fork_family pass, but perhaps not always.
mapfile -t tests < <(without "ahead bad_input cpus dlclose firecracker_peer fork_descriptors fork_malloc many_slots
    no_mappings" "$@")
with_sanitizer ThreadSanitizer tsan __tsan_write8 "TSAN_RUNTIME=$TSAN_RUNTIME" "${tests[@]}"
finish
