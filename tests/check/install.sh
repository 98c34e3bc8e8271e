#!/usr/bin/env bash
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# What a packager and a user do: install under a prefix, find it with pkg-config, link it shared, as an archive and fully
# static, load it by hand, move it through DESTDIR, take it away again.

# shellcheck disable=SC2317 # functions here are called through try
. "$(dirname "$0")/common.sh"

needs cc=gcc pkg-config=pkg-config readelf=binutils
try "make" "$MAKE" -s build || finish
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
soname=libkuf.so.${version%%.*}
served="the first touch of page 3 reads 'k'"

cat >"$work/by_hand.c" <<'END'
#define _GNU_SOURCE
#include <dlfcn.h>
#include <kuf.h>
#include <stdio.h>

int main(void)
{
    void *lib = dlopen("libkuf.so.0", RTLD_NOW);
    uint32_t (*version)(void) = NULL;
    if (lib != NULL)
        *(void **)&version = dlvsym(lib, "kuf_version", "KUF_0.1");
    if (version == NULL) {
        fprintf(stderr, "%s\n", dlerror());
        return 1;
    }
    printf("%u\n", version());
    return dlclose(lib);
}
END

says() { # EXPECTED COMMAND...
    local expected=$1
    shift
    diff <(echo "$expected") <("$@")
}

compiles() { # LANGUAGE-OPTIONS... (words of pkg-config among them)
    cc -std=c11 -Wall -Wextra -Wpedantic -Werror "$@"
}

# Under a prefix of its own, and LIBDIR as distributions set it.
prefix=$work/prefix
try "make install" "$MAKE" -s install PREFIX="$prefix" LIBDIR="$prefix/lib/multi" DESTDIR= || finish
for file in lib/multi/libkuf.so."$version" lib/multi/libkuf.a lib/multi/pkgconfig/kuf.pc include/kuf.h share/man/man3/kuf.3; do
    try "installs $file" test -f "$prefix/$file"
done
try "links $soname" test "$(readlink -f "$prefix/lib/multi/$soname")" = "$(readlink -f "$prefix/lib/multi/libkuf.so.$version")"
try "links libkuf.so" test "$(readlink -f "$prefix/lib/multi/libkuf.so")" = "$(readlink -f "$prefix/lib/multi/libkuf.so.$version")"

export PKG_CONFIG_PATH=$prefix/lib/multi/pkgconfig
try "pkg-config knows the version" says "$version" pkg-config --modversion kuf
read -ra cflags < <(pkg-config --cflags kuf)
read -ra libs < <(pkg-config --libs kuf)
read -ra all_libs < <(pkg-config --static --libs kuf)

try "compiles against the shared library" compiles -o "$work/shared" examples/c/minimal.c "${cflags[@]}" "${libs[@]}" &&
    try "needs it by its soname" grep -qF "[$soname]" <(readelf -d "$work/shared") &&
    try "serves faults, linked to the shared library" says "$served" env LD_LIBRARY_PATH="$prefix/lib/multi" "$work/shared"

try "compiles against the archive" compiles -o "$work/archive" examples/c/minimal.c "${cflags[@]}" \
    "${all_libs[@]/-lkuf/-l:libkuf.a}" &&
    try "serves faults, linked to the archive" says "$served" "$work/archive"

if [ -f "$(cc -print-file-name=libc.a)" ]; then
    # The linker warns of getaddrinfo in a static program; libkuf never calls it.
    try "compiles fully static" compiles -static -o "$work/static" examples/c/minimal.c "${cflags[@]}" "${all_libs[@]}" &&
        try "serves faults, fully static" says "$served" "$work/static"
else
    skipped "fully static" "this C library has no libc.a"
fi

number=$((0x$(printf '%x%02x%02x' "${version%%.*}" "$(cut -d. -f2 <<<"$version")" "${version##*.}")))
try "compiles for dlopen" compiles -o "$work/by_hand" "$work/by_hand.c" "${cflags[@]}" -ldl &&
    try "loads by hand" says "$number" env LD_LIBRARY_PATH="$prefix/lib/multi" "$work/by_hand"

# The prefix is one variable: a tree that was moved is used by naming it.
mv "$prefix" "$work/moved"
PKG_CONFIG_PATH=$work/moved/lib/multi/pkgconfig
read -ra moved < <(pkg-config --define-variable=prefix="$work/moved" --cflags --libs kuf)
try "a moved tree compiles" compiles -o "$work/shared" examples/c/minimal.c "${moved[@]}"
mv "$work/moved" "$prefix"

# As a package is built: nothing outside DESTDIR, and its path in no file.
dest=$work/dest
try "make install DESTDIR" "$MAKE" -s install PREFIX=/usr LIBDIR=/usr/lib/multi MANDIR=/usr/man DESTDIR="$dest"
try "kuf.pc does not name DESTDIR" test -z "$(grep -F "$dest" "$dest/usr/lib/multi/pkgconfig/kuf.pc")"
try "installs under MANDIR" test -f "$dest/usr/man/man3/kuf.3"
# pkg-config leaves out -I/usr/include, which the sysroot then has to bring.
read -ra sysroot < <(PKG_CONFIG_PATH='' PKG_CONFIG_LIBDIR=$dest/usr/lib/multi/pkgconfig PKG_CONFIG_SYSROOT_DIR=$dest \
    PKG_CONFIG_ALLOW_SYSTEM_CFLAGS=1 pkg-config --cflags --libs kuf)
try "compiles against DESTDIR" compiles -o "$work/shared" examples/c/minimal.c "${sysroot[@]}"

try "make uninstall" "$MAKE" -s uninstall PREFIX="$prefix" LIBDIR="$prefix/lib/multi" DESTDIR=
try "uninstall leaves no file" test -z "$(find "$prefix" ! -type d)"
finish
