#!/usr/bin/env bash
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# Builds the Debian packages and takes the steps of their user: dpkg installs both, a program is built with pkg-config and
# served, the library is replaced by itself, and after the purge no file is left. dpkg works in a folder of its own, with this
# machine's list of packages, so that dependencies are checked and the machine stays as it is.

# shellcheck disable=SC2317 # functions here are called through try
. "$(dirname "$0")/common.sh"

if ! command -v dpkg dpkg-deb >/dev/null || ! [ -s /var/lib/dpkg/status ]; then
    skipped "Debian packages" "this system does not use dpkg"
    finish
fi
if [ "$(id -u)" -ne 0 ]; then
    skipped "Debian packages" "dpkg installs as root only"
    finish
fi
needs dh=debhelper dpkg-gencontrol=dpkg-dev cc=gcc pkg-config=pkg-config
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
arch=$(dpkg --print-architecture)
triplet=$(dpkg-architecture -qDEB_HOST_MULTIARCH)
served="the first touch of page 3 reads 'k'"

try "debian/changelog is of Cargo.toml's version" test "$(dpkg-parsechangelog -S Version | sed 's/-[^-]*$//')" = "$version"
try "make" "$MAKE" -s build || finish
# The library and its debug information take a minute to compress as Debian does.
export DPKG_DEB_COMPRESSOR_TYPE=gzip DPKG_DEB_COMPRESSOR_LEVEL=1
before=$(stat -c %Y build/libkuf.a build/libkuf.so.*)
files=$(find debian)
try "make deb" "$MAKE" -s deb || finish
try "make deb takes the library that is built" test "$(stat -c %Y build/libkuf.a build/libkuf.so.*)" = "$before"
debs=(build/deb/libkuf0_*_"$arch".deb build/deb/libkuf-dev_*_"$arch".deb)
try "debhelper leaves no file in the tree" test "$(find debian)" = "$files"

names() { # FILE: the files of a package, without folders
    dpkg-deb -c "$1" | awk '$1 !~ /^d/ { print $6 }' | sort
}
names "${debs[0]}" >"$work/library"
names "${debs[1]}" >"$work/dev"
holds() { # LIST NAME...
    local list=$1 name
    shift
    for name; do grep -qx "\./usr/$name" "$list" || { echo "no $name" && return 1; }; done
}
try "libkuf0 has the library" holds "$work/library" "lib/$triplet/libkuf.so.$version" "lib/$triplet/libkuf.so.0"
try "libkuf-dev has what a program is built with" holds "$work/dev" "lib/$triplet/libkuf.so" "lib/$triplet/libkuf.a" \
    "lib/$triplet/pkgconfig/kuf.pc"
for file in include/*.h; do try "libkuf-dev has $file" holds "$work/dev" "$file"; done
for page in man/*.[137]; do
    try "libkuf-dev has $page" holds "$work/dev" "share/man/man${page##*.}/${page##*/}.gz"
done
try "no file is in both" test -z "$(comm -12 "$work/library" "$work/dev")"
try "links stay inside" test -z "$(for deb in "${debs[@]}"; do dpkg-deb -c "$deb" | sed -n 's/.* -> //p' | grep /; done)"
try "files belong to root" test -z "$(dpkg-deb -c "${debs[0]}" | grep -v ' root/root ')"
try "depends on the C library, and has symbols" grep -qE '^Depends: .*libc6 \(>= ' <(dpkg-deb -I "${debs[0]}" | sed 's/^ *//')
try "programs depend on the version that introduced their symbols" grep -qF "(symver)KUF_0.1" debian/libkuf0.symbols &&
    try "symbols in the package" grep -q "kuf_open@KUF_0.1 $version" <(dpkg-deb --info "${debs[0]}" symbols)
if command -v lintian >/dev/null; then
    try "lintian" lintian --fail-on error --suppress-tags initial-upload-closes-no-bugs,unreleased-changes "${debs[@]}"
else
    skipped "lintian" "not installed (apt-get install lintian)"
fi

# dpkg's own folder, in which this machine's packages count as installed.
root=$work/root
mkdir -p "$root/var/lib/dpkg"/{info,updates,triggers}
cp /var/lib/dpkg/status "$root/var/lib/dpkg/status"
cp /var/lib/dpkg/arch "$root/var/lib/dpkg/arch" 2>/dev/null
installs() { dpkg --root="$root" "$@"; }
left() { find "$root" -mindepth 1 -path "$root/var" -prune -o -print; }

try "dpkg installs both" installs -i "${debs[@]}" || finish
try "dpkg finds the files as they were packed" test -z "$(dpkg --root="$root" --verify libkuf0 libkuf-dev 2>&1)"

lib=$root/usr/lib/$triplet
export PKG_CONFIG_PATH='' PKG_CONFIG_LIBDIR=$lib/pkgconfig PKG_CONFIG_SYSROOT_DIR=$root
# Without these pkg-config leaves out what a compiler searches by itself, which is not below $root.
export PKG_CONFIG_ALLOW_SYSTEM_CFLAGS=1 PKG_CONFIG_ALLOW_SYSTEM_LIBS=1
read -ra words < <(pkg-config --cflags --libs kuf)
read -ra static < <(pkg-config --static --cflags --libs kuf)
runs() { # PROGRAM [FOLDER]
    diff <(echo "$served") <(LD_LIBRARY_PATH=${2:-} "$1")
}
try "compiles against libkuf-dev" cc -std=c11 -Wall -Werror -o "$work/shared" examples/c/minimal.c "${words[@]}" &&
    try "serves faults with libkuf0" runs "$work/shared" "$lib"
try "compiles against its archive" cc -std=c11 -Wall -Werror -o "$work/archive" examples/c/minimal.c \
    "${static[@]/-lkuf/-l:libkuf.a}" && try "serves faults without libkuf0" runs "$work/archive"
try "examples of the package compile" cc -std=gnu11 -Wall -o "$work/probe" \
    "$root/usr/share/doc/libkuf-dev/examples/c/probe.c" "${words[@]}"

try "installs over itself" installs -i "${debs[@]}"
try "libkuf-dev goes" installs --purge libkuf-dev &&
    try "libkuf0 serves on without it" runs "$work/shared" "$lib"
try "libkuf0 goes" installs --purge libkuf0
try "nothing is left" test -z "$(left)"
finish
