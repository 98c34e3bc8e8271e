#!/bin/sh
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# Build the patched kernel, unless the cache has it, and print the path of the
# image on standard output.  All other output goes to standard error.
#
#   build.sh [-d]
#
#   -d  the debug variant (lockdep and the like)
#
# LIBKUF_KERNEL_CACHE   directory to build and keep kernels in
# LIBKUF_KERNEL_JOBS    jobs for make, instead of one for each processor

set -eu

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
cache=${LIBKUF_KERNEL_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/libkuf}
jobs=${LIBKUF_KERNEL_JOBS:-$(nproc)}
source_package=linux-source-6.12
tarball=/usr/src/$source_package.tar.xz
variant=

while getopts d opt; do
	case $opt in
	d) variant=debug ;;
	*) exit 2 ;;
	esac
done

say() {
	echo "build.sh: $*" >&2
}

# shellcheck source=tests/packages.sh
. "$here/../packages.sh"

need_packages "$source_package"

# The variant's fragment is part of only the variant's hash, so that a change
# does not rebuild the other kernel.
hash=$({
	dpkg-query -W -f '${Version}\n' "$source_package"
	cat "$here/config"
	[ -z "$variant" ] || cat "$here/config.$variant"
	cat "$here"/patches/*.patch
} | sha256sum | cut -c1-16)

dir=$cache/kernel-$hash
image=$dir/bzImage

if [ -f "$image" ]; then
	echo "$image"
	exit 0
fi

need_packages build-essential bc bison flex libelf-dev libssl-dev kmod cpio \
	xz-utils patch perl

mkdir -p "$cache"
# Remove the remains of killed builds.
find "$cache" -maxdepth 1 -type d -name 'build.*' -mmin +720 -exec rm -rf {} +
log=$cache/kernel-$hash.log
temp=$(mktemp -d "$cache/build.XXXXXX")
make_pid=
cleanup() {
	[ -z "$make_pid" ] || { kill "$make_pid"; wait "$make_pid"; } 2>/dev/null || :
	rm -rf "$temp"
}
trap cleanup EXIT
trap 'exit 130' INT TERM HUP

fail() {
	say "$1; the end of $log:"
	tail -n 40 "$log" >&2
	exit 1
}

start=$(date +%s)
say "building ${variant:+$variant }kernel $hash, log in $log"
: >"$log"

tar -C "$temp" -xf "$tarball" >>"$log" 2>&1 || fail "cannot unpack the source"
src=$temp/$source_package

for p in "$here"/patches/*.patch; do
	patch -d "$src" -p1 -s -f --no-backup-if-mismatch <"$p" >>"$log" 2>&1 ||
		fail "${p##*/} does not apply"
done

# Ignore the settings that the environment has for other builds.
unset MAKEFLAGS MFLAGS MAKELEVEL CFLAGS LDFLAGS ARCH CROSS_COMPILE

# Run it in the background, because a shell handles no signal while it waits
# for a foreground command, and a build takes minutes.
run_make() {
	nice -n 10 make -s -C "$src" "$@" >>"$log" 2>&1 &
	make_pid=$!
	wait "$make_pid" || return
	make_pid=
}

run_make tinyconfig || fail "cannot configure"
set -- "$here/config"
[ -z "$variant" ] || set -- "$@" "$here/config.$variant"
(cd "$src" && scripts/kconfig/merge_config.sh -m .config "$@") >>"$log" 2>&1 ||
	fail "cannot merge the configuration"
run_make olddefconfig || fail "cannot configure"

# A silently dropped option would make tests pass or skip for the wrong reason.
cat "$@" | grep '^CONFIG_[A-Z0-9_]*=[^n]' | grep -v '^CONFIG_LOCALVERSION=' \
	>"$temp/wanted"
grep -xvFf "$src/.config" "$temp/wanted" >"$temp/missing" || :
if [ -s "$temp/missing" ]; then
	sed 's/^/not in .config: /' "$temp/missing" >>"$log"
	fail "the kernel dropped options of the configuration"
fi

# The image must depend only on the inputs of the hash.
run_make -j"$jobs" KBUILD_BUILD_TIMESTAMP=@1 KBUILD_BUILD_USER=libkuf \
	KBUILD_BUILD_HOST=libkuf bzImage || fail "cannot build"

# Give the directory its final name only when it is complete.
mkdir "$temp/out"
cp "$src/arch/x86/boot/bzImage" "$src/.config" "$src/System.map" "$temp/out"
mv -T "$temp/out" "$dir" 2>/dev/null || [ -f "$image" ] || fail "cannot keep the image"

say "built in $(($(date +%s) - start)) s"
echo "$image"
