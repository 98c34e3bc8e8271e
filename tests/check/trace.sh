#!/usr/bin/env bash
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# Checks the static tracepoints of build/libkuf.so: the notes and their arguments against examples/trace/README.md, that each
# is a nop, and with gdb that each fires as often as kuf_stats counts. Checks examples/trace/kuf-latency.bt with bpftrace,
# which takes root and a kernel with uprobes.

. "$(dirname "$0")/common.sh"

needs cc=gcc readelf=binutils objdump=binutils
try "make" "$MAKE" -s stage build/examples/minimal || finish
so=$(realpath build/stage/lib/libkuf.so)
export LD_LIBRARY_PATH=$PWD/build/stage/lib
try "build" cc -std=gnu11 -O2 -Wall -Wextra -Werror -o "$work/trace" tests/check/trace.c -Iinclude -Lbuild/stage/lib -lkuf || finish

# Each tracepoint and how many arguments it has, by the notes and by the documentation.
readelf -nW "$so" >"$work/notes"
awk '/Provider: / { provider = $NF } $1 == "Name:" { name = $2 } $1 == "Arguments:" { print provider ":" name, NF - 1 }' \
    "$work/notes" | sort -u >"$work/there"
awk -F '|' '/^\| `/ && NF == 5 { gsub(/[` ]/, "", $2); print "kuf:" $2, split($3, arguments, ",") }' examples/trace/README.md |
    sort >"$work/documented"
try "there are tracepoints" grep -q '^kuf:install 5$' "$work/there"
try "tracepoints and their arguments are those of examples/trace/README.md" diff "$work/documented" "$work/there"

awk '$1 == "Location:" { sub(/,/, "", $2); print $2 }' "$work/notes" |
    while read -r at; do
        instruction=$(objdump -d --no-show-raw-insn --start-address="$at" --stop-address=$((at + 4)) "$so" |
            sed -nE '/^ +[0-9a-f]+:/ { s/^ *[0-9a-f]+:\s*//; s/ *$//; p; q }')
        [ "$instruction" = nop ] || echo "$at is $instruction"
    done >"$work/others"
try "a tracepoint that is not in use is a nop" diff /dev/null "$work/others"

if ! program "the program to trace" "$work/trace" || [ "$n_skipped" -gt 0 ]; then finish; fi

# With gdb.
{
    echo 'set pagination off'
    echo 'set confirm off'
    echo 'start'
    while read -r name n; do
        printf 'break -probe-stap %s\ncommands\nsilent\n' "$name"
        printf 'printf "hit %s' "${name#kuf:}"
        for ((i = 1; i < n; i++)); do printf ' %%ld'; done
        printf '\\n"'
        for ((i = 1; i < n; i++)); do printf ", \$_probe_arg%d" "$i"; done
        printf '\ncontinue\nend\n'
    done <"$work/documented"
    echo continue
} >"$work/commands"
if ! tests/check/need.sh gdb=gdb 2>"$work/why"; then
    skipped "hits in gdb" "$(tail -n 1 "$work/why")"
elif ! env -u DEBUGINFOD_URLS gdb -nx -batch -ex run --args true >"$work/why" 2>&1 || ! grep -q 'exited normally' "$work/why"; then
    skipped "hits in gdb" "gdb cannot run a program here: $(tail -n 1 "$work/why")"
else
    env -u DEBUGINFOD_URLS timeout 120 gdb -nx -batch -x "$work/commands" "$work/trace" >"$work/printed" 2>&1 </dev/null
    if try "the program ends well in gdb" grep -q 'exited normally' "$work/printed"; then
        # The stops of a debugger have a blocked thread fault again: kuf_stats counts those faults too.
        sed -nE '/^(faults|fills|failed|deferred|copied|zeroed|touched) /p' "$work/printed" | sort >"$work/counted"
        # Lines of `hit NAME`, with all arguments but the first.
        awk '
            $1 != "hit" { next }
            $3 < 2 ^ 32 || $3 >= 2 ^ 32 + 2 ^ 25 { print "not of the slot:", $0 }
            $2 == "fault_read" { faults++ }
            $2 == "fill_begin" { fills++; touched += $5 }
            $2 == "fill_end" { fills_ended++; failed += $5 == -5; deferred += $5 == 0 }
            $2 == "install" && $5 == 0 && $6 > 0 { copied += $6 }
            $2 == "install" && $5 == 2 && $6 > 0 { zeroed += $6 }
            END {
                if (fills != fills_ended) print "fills ended:", fills_ended
                print "faults", faults; print "fills", fills; print "touched", touched; print "failed", failed
                print "deferred", deferred; print "copied", copied; print "zeroed", zeroed
            }' "$work/printed" | sort >"$work/hit"
        try "hits in gdb are what kuf_stats counts" diff "$work/counted" "$work/hit"
    else
        sed 's/^/    /' "$work/printed"
    fi
fi

# With bpftrace: the script, and every tenth of a second what it knows, to see when it has begun.
{
    cat examples/trace/kuf-latency.bt
    echo 'interval:ms:100 { print(@read_to_installed_us); print(@fill_us); }'
} >"$work/latency.bt"
# count MAP PID: the sum of the last histogram of this map and process.
count() {
    awk -v from="@$1[$2]:" '
        index($0, from) == 1 { on = 1; sum = 0; next }
        on && /\|$/ { sub(/ *\|.*/, ""); sum += $NF; next }
        { on = 0 }
        END { print sum + 0 }' "$work/printed"
}
has_begun() {
    local try
    for ((try = 0; try < 200; try++)); do
        kill -0 "$tracer" 2>/dev/null || return
        build/examples/minimal >"$work/output" 2>&1
        sleep 0.2
        if grep -q '^@read_to_installed_us' "$work/printed" && grep -q '^@fill_us' "$work/printed"; then return; fi
    done
    return 1
}
if ! tests/check/need.sh bpftrace=bpftrace 2>"$work/why"; then
    skipped "kuf-latency.bt" "$(tail -n 1 "$work/why")"
    finish
fi
bpftrace "$work/latency.bt" "$so" >"$work/printed" 2>&1 </dev/null &
tracer=$!
if has_begun; then
    program "the program in bpftrace" "$work/trace"
    cp "$work/output" "$work/counted"
    kill -INT "$tracer"
    wait "$tracer"
    counted() { sed -n "s/^$1 //p" "$work/counted"; }
    pid=$(counted pid)
    good=$(($(counted fills) - $(counted failed) - $(counted deferred)))
    try "kuf-latency.bt: a latency for each page touched" test "$(count read_to_installed_us "$pid")" -eq "$(counted touched)"
    try "kuf-latency.bt: a time for each fill" test "$(count fill_us "$pid")" -eq "$good"
    try "kuf-latency.bt: fills that failed" grep -qxF "@fills_failed[$pid, -5]: $(counted failed)" "$work/printed"
    try "kuf-latency.bt: fills that were deferred" grep -qxF "@fills_deferred[$pid]: $(counted deferred)" "$work/printed"
    try "kuf-latency.bt: the slowest fills" grep -qE '^@slowest_fills_us\[[0-9]+, [0-9]+, 4096\]: [0-9]+$' "$work/printed"
elif kill -0 "$tracer" 2>/dev/null; then
    kill -INT "$tracer"
    failed "kuf-latency.bt: no histogram came in 40 seconds"
    sed 's/^/    /' "$work/printed"
else
    skipped "kuf-latency.bt" "bpftrace cannot run here: $(tail -n 1 "$work/printed")"
fi
finish
