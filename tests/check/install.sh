#!/usr/bin/env bash
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# The steps of a packager and a user: install under a prefix, find the library with pkg-config, CMake and Meson, link it
# shared, as an archive and fully static, load it with dlopen, install through DESTDIR, and uninstall.

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

# With a prefix of its own, and LIBDIR as distributions set it.
prefix="$work/a user's prefix"
try "make install" "$MAKE" -s install PREFIX="$prefix" LIBDIR="$prefix/lib/multi" DESTDIR= || finish
for file in lib/multi/libkuf.so."$version" lib/multi/libkuf.a lib/multi/pkgconfig/kuf.pc include/*.h; do
    try "installs $file" test -f "$prefix/$file"
done
for page in man/*.[137]; do try "installs $page" test -f "$prefix/share/man/man${page##*.}/${page##*/}"; done
for script in examples/trace/*; do
    if [ -f "$script" ]; then try "installs $script" test -f "$prefix/share/doc/libkuf/$script"; fi
done
try "links $soname" test "$(readlink -f "$prefix/lib/multi/$soname")" = "$(readlink -f "$prefix/lib/multi/libkuf.so.$version")"
try "links libkuf.so" test "$(readlink -f "$prefix/lib/multi/libkuf.so")" = "$(readlink -f "$prefix/lib/multi/libkuf.so.$version")"

export PKG_CONFIG_PATH=$prefix/lib/multi/pkgconfig
try "pkg-config knows the version" says "$version" pkg-config --modversion kuf
# pkg-config escapes for the shell.
declare -a cflags libs all_libs moved sysroot
words_of() { # NAME COMMAND...: the words that the command prints, as an array
    local -n words=$1
    shift
    eval "words=($("$@"))"
}
words_of cflags pkg-config --cflags kuf
words_of libs pkg-config --libs kuf
words_of all_libs pkg-config --static --libs kuf

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
    try "loads with dlopen" says "$number" env LD_LIBRARY_PATH="$prefix/lib/multi" "$work/by_hand"

# The prefix is one variable of kuf.pc, so that a moved tree works with another value.
mv "$prefix" "$work/moved"
PKG_CONFIG_PATH=$work/moved/lib/multi/pkgconfig
words_of moved pkg-config --define-variable=prefix="$work/moved" --cflags --libs kuf
try "a moved tree compiles" compiles -o "$work/shared" examples/c/minimal.c "${moved[@]}"
mv "$work/moved" "$prefix"
PKG_CONFIG_PATH=$prefix/lib/multi/pkgconfig

# CMake and Meson as docs/building.md shows them.
snippet() { # LANGUAGE FILE
    sed -n "/^ *[\`]\{3\}$1\$/,/^ *[\`]\{3\}\$/p" docs/building.md | sed '1d;$d' >"$2"
    test -s "$2"
}
mkdir "$work/vmm" "$work/vmm.meson"
cp examples/c/minimal.c "$work/vmm/vmm.c"
if tests/check/need.sh cmake=cmake 2>"$work/why"; then
    try "docs/building.md has CMake's lines" snippet cmake "$work/vmm/CMakeLists.txt" &&
        try "cmake finds it" cmake -S "$work/vmm" -B "$work/vmm/build" &&
        try "cmake builds" cmake --build "$work/vmm/build" &&
        try "serves faults, built by cmake" says "$served" "$work/vmm/build/vmm"
else
    skipped "cmake" "$(tail -n 1 "$work/why")"
fi
if tests/check/need.sh meson=meson ninja=ninja-build 2>"$work/why"; then
    try "docs/building.md has Meson's lines" snippet meson "$work/vmm/meson.build" &&
        try "meson finds it" meson setup "$work/vmm.meson" "$work/vmm" &&
        try "meson builds" ninja -C "$work/vmm.meson" &&
        try "serves faults, built by meson" says "$served" "$work/vmm.meson/vmm"
else
    skipped "meson" "$(tail -n 1 "$work/why")"
fi

# As a package is built: no file outside DESTDIR, and no file that contains its path. A relative DESTDIR is below the source.
dest="$work/a dest"
try "make install DESTDIR" "$MAKE" -s install PREFIX=/usr LIBDIR=/usr/lib/multi MANDIR=/usr/man \
    DESTDIR="$(realpath --relative-to=. "$dest")"
try "kuf.pc does not name DESTDIR" test -z "$(grep -F "a dest" "$dest/usr/lib/multi/pkgconfig/kuf.pc")"
try "kuf.pc is relative to its prefix" test "$(grep -c "=\${prefix}/" "$dest/usr/lib/multi/pkgconfig/kuf.pc")" = 2
try "installs under MANDIR" test -f "$dest/usr/man/man3/kuf.3"
# pkg-config omits -I/usr/include, so that the path must come from the sysroot.
from_dest=(env PKG_CONFIG_PATH='' PKG_CONFIG_LIBDIR="$dest/usr/lib/multi/pkgconfig" pkg-config)
try "pkg-config knows /usr/include" test -z "$("${from_dest[@]}" --cflags kuf)"
words_of sysroot env PKG_CONFIG_SYSROOT_DIR="$dest" PKG_CONFIG_ALLOW_SYSTEM_CFLAGS=1 "${from_dest[@]}" --cflags --libs kuf
try "compiles against DESTDIR" compiles -o "$work/shared" examples/c/minimal.c "${sysroot[@]}"

refuses() { # TEXT WORD...
    local text=$1
    shift
    ! "$MAKE" -s install DESTDIR="$work/refused" "$@" >"$work/refusal" 2>&1 && grep -F "$text" "$work/refusal" &&
        ! [ -e "$work/refused" ]
}
try "refuses a relative PREFIX" refuses "PREFIX is a relative path: 'relative'" PREFIX=relative
try "refuses a relative LIBDIR" refuses "LIBDIR is a relative path: 'lib64'" PREFIX=/usr LIBDIR=lib64
try "refuses what kuf.pc cannot hold" refuses "PREFIX has a character that kuf.pc cannot hold" PREFIX='/a"b'

for words in "PREFIX=$prefix|LIBDIR=$prefix/lib/multi|DESTDIR=" "PREFIX=/usr|LIBDIR=/usr/lib/multi|MANDIR=/usr/man|DESTDIR=$dest"; do
    IFS='|' read -ra as_installed <<<"$words"
    try "make uninstall" "$MAKE" -s uninstall "${as_installed[@]}"
done
try "uninstall leaves no file" test -z "$(find "$prefix" "$dest" ! -type d)"
try "uninstall leaves no folder of its own" test -z "$(find "$prefix" "$dest" -path '*/share/doc/libkuf')"

# make and make install say what is missing, and install no package. Two that are asked for it: need.sh alone.
mkdir "$work/bin"
printf '#!/bin/sh\ntouch "%s/called"\nexit 1\n' "$work" >"$work/bin/apt-get"
chmod +x "$work/bin/apt-get"
says_what_is_missing() {
    ! env -u KUF_INSTALL_TOOLS PATH="$work/bin:$PATH" "$MAKE" -s "$@" BUILD="$work/empty" OBJCOPY=no-such-objcopy \
        >"$work/missing" 2>&1 && grep -F "needed and not installed: binutils" "$work/missing" && ! [ -e "$work/called" ]
}
try "make names what is missing" says_what_is_missing build
try "make install names what is missing" says_what_is_missing install PREFIX="$work/missing_prefix"

# cargo.sh asks cargo for the archive, which is where cargo's configuration and environment say.
host=$(rustc -vV | sed -n 's/^host: //p')
crate="$work/a crate"
mkdir -p "$crate/src" "$crate/.cargo"
printf '[package]\nname = "kuf"\nversion = "1.2.3"\nedition = "2021"\n[features]\nreserve = []\n' >"$crate/Cargo.toml"
printf 'version = 4\n[[package]]\nname = "kuf"\nversion = "1.2.3"\n' >"$crate/Cargo.lock"
echo '#[no_mangle] pub extern "C" fn kuf_where() -> *const u8 { file!().as_ptr() }' >"$crate/src/lib.rs"
archive() ( # EXPECTED [NAME=VALUE...] [OPTION...]
    local expected=$1 script=$PWD/packaging/cargo.sh
    shift
    unset CARGO_TARGET_DIR CARGO_BUILD_TARGET CARGO_BUILD_TARGET_DIR
    cd "$crate" || return
    while [[ ${1:-} == *=* ]]; do export "${1?}" && shift; done
    found=$("$script" 1.2.3 "$@") && diff <(echo "$crate/$expected") <(echo "$found") && [ -s "$found" ]
)
try "archive where cargo puts it" archive target/release/libkuf.a
try "archive in CARGO_TARGET_DIR" archive "of cargo/release/libkuf.a" CARGO_TARGET_DIR="of cargo"
try "archive of CARGO_BUILD_TARGET" archive "target/$host/release/libkuf.a" CARGO_BUILD_TARGET="$host"
try "archive of --target" archive "target/$host/release/libkuf.a" --target "$host"
printf '[build]\ntarget = "%s"\ntarget-dir = "elsewhere"\n' "$host" >"$crate/.cargo/config.toml"
try "archive of build.target" archive "elsewhere/$host/release/libkuf.a"
finish
