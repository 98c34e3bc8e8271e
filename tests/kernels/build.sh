#!/usr/bin/env bash
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# build.sh VERSION NAME CACHE: builds a kernel from Debian's linux-source of that version with config.NAME, unless CACHE
# has it, and prints its directory. fetch.sh calls it with its apt configuration. It takes about ten minutes of one CPU.
#
# LIBKUF_KERNEL_JOBS   jobs for make, instead of one for each processor
set -eu -o pipefail

here=$(cd "$(dirname "$0")" && pwd)
version=$1
name=$2
cache=$3
config=$here/config.$name
directory=$cache/kernel-linux-source-$name-$version-$(sha256sum "$config" | cut -c1-12)

say() { echo "build.sh: $*" >&2; }

if [ -e "$directory/vmlinuz" ]; then
    echo "$directory"
    exit 0
fi

unset MAKEFLAGS MFLAGS MAKELEVEL CFLAGS LDFLAGS
(
    unset APT_CONFIG
    KUF_INSTALL_TOOLS=1 "$here/../check/need.sh" make=make gcc=gcc bc=bc flex=flex bison=bison xz=xz-utils aarch64-linux-gnu-gcc=gcc-aarch64-linux-gnu
)
export ARCH=arm64 CROSS_COMPILE=aarch64-linux-gnu-

temp=$(mktemp -d "$cache/build.XXXXXX")
log=$directory.log
trap 'rm -rf "$temp"' EXIT
fail() {
    say "$1; the end of $log:"
    tail -n 40 "$log" >&2
    exit 1
}
: >"$log"
# linux-source is empty and depends on the source of its version.
package=$(apt-cache show "linux-source=$version" | sed -n 's/^Depends: .*\(linux-source-[0-9.]*\).*/\1/p')
say "building $name from $package $version, log in $log"
(cd "$temp" && apt-get -qq download "$package=$version" >&2 && dpkg-deb -x "$package"_*.deb . && rm -- *.deb)
tar -C "$temp" -xf "$temp/usr/src/$package.tar.xz" >>"$log" 2>&1 || fail "cannot unpack the source"
rm -r "${temp:?}/usr"
src=$temp/$package

run_make() { nice -n 10 make -s -C "$src" "$@" >>"$log" 2>&1; }
run_make tinyconfig || fail "cannot configure"
(cd "$src" && scripts/kconfig/merge_config.sh -m .config "$config") >>"$log" 2>&1 || fail "cannot merge the configuration"
run_make olddefconfig || fail "cannot configure"
# A silently dropped option would make tests skip for the wrong reason.
if grep '^CONFIG_[A-Z0-9_]*=[^n]' "$config" | grep -vxFf "$src/.config" >>"$log"; then
    fail "the kernel dropped an option of the configuration"
fi
run_make -j"${LIBKUF_KERNEL_JOBS:-$(nproc)}" KBUILD_BUILD_TIMESTAMP=@1 KBUILD_BUILD_USER=libkuf KBUILD_BUILD_HOST=libkuf \
    Image || fail "cannot build"

mkdir -p "$temp/out/modules"
cp "$src/arch/arm64/boot/Image" "$temp/out/vmlinuz"
cp "$src/.config" "$temp/out/config"
make -s -C "$src" kernelrelease >"$temp/out/release"
: >"$temp/out/modules/list"
mv -T "$temp/out" "$directory"
echo "$directory"
