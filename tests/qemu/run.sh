#!/bin/sh
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# Test the QEMU fork: build it and the guest if necessary, then migrate.
#
#   run.sh PREFIX [PATTERN]
#
#   PREFIX    where libkuf is installed
#   PATTERN   only the tests whose name matches the regular expression
#
# The table that compares libkuf with QEMU's own post-copy goes to standard
# output and to build/qemu/table.md.

set -eu

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
root=$(CDPATH='' cd -- "$here/../.." && pwd)
[ $# -ge 1 ] || { sed -n '3,/^$/s/^# \{0,1\}//p' "$0" >&2; exit 2; }
prefix=$(CDPATH='' cd -- "$1" && pwd)

KUF_INSTALL_TOOLS=1 "$root/tests/check/need.sh" cpio=cpio gzip=gzip cc=gcc python3=python3
qemu=$("$here/build.sh" "$prefix")
kernel=$("$root/tests/kernel/build.sh")

work=$(mktemp -d)
tests=
cleanup() {
	[ -z "$tests" ] || { kill "$tests"; wait "$tests"; } 2>/dev/null || :
	rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 130' INT TERM HUP

mkdir -p "$work/root" "$root/build/qemu"
cc -std=c11 -D_GNU_SOURCE -O2 -Wall -Wextra -Werror -Wshadow -static -pthread \
	-o "$work/root/init" "$here/guest.c"
(cd "$work/root" && echo init | cpio -o -H newc --quiet) | gzip >"$work/initramfs"

export KUF_QEMU="$qemu/qemu-system-x86_64" KUF_MIGRATION_TEST="$qemu/migration-test"
export KUF_KERNEL="$kernel" KUF_INITRD="$work/initramfs" KUF_LIBDIR="$prefix/lib"
export PYTHONDONTWRITEBYTECODE=1 TMPDIR="$work"
python3 "$here/tests.py" --table "$root/build/qemu/table.md" ${2+"$2"} &
tests=$!
wait "$tests" && status=0 || status=$?
tests=
exit "$status"
