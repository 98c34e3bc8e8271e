#!/usr/bin/env bash
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# need.sh COMMAND=PACKAGE...: sees to it that the commands are there. What is missing is installed with apt-get when that
# is possible, else named.
set -eu

missing=()
for pair; do
    command -v "${pair%%=*}" >/dev/null || missing+=("${pair#*=}")
done
[ ${#missing[@]} -gt 0 ] || exit 0

if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
    echo "needed and not installed: ${missing[*]} (Debian's names); install them, or run this as root where apt-get is" >&2
    exit 1
fi
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if ! { apt-get install -y --no-install-recommends "${missing[@]}" ||
    { apt-get update && apt-get install -y --no-install-recommends "${missing[@]}"; }; } >"$log" 2>&1; then
    cat "$log" >&2
    echo "could not install: ${missing[*]}" >&2
    exit 1
fi
