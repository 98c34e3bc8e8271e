#!/usr/bin/env bash
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# need.sh COMMAND=PACKAGE...: makes sure that the commands exist, or the files where COMMAND is a path; otherwise it fails and
# names the missing packages. With KUF_INSTALL_TOOLS=1, which `make check`, `make demo` and the rigs set, it installs them
# with apt-get if possible.
set -eu

missing=()
for pair; do
    case $pair in
    /*) [ -e "${pair%%=*}" ] ;;
    *) command -v "${pair%%=*}" >/dev/null ;;
    esac || missing+=("${pair#*=}")
done
[ ${#missing[@]} -gt 0 ] || exit 0

if [ "${KUF_INSTALL_TOOLS:-}" != 1 ]; then
    echo "needed and not installed: ${missing[*]} (Debian's names)" >&2
    exit 1
fi
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
