#!/bin/sh
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# cargo.sh VERSION [OPTION...]: builds the static library with cargo and prints its path. Its place depends on
# CARGO_TARGET_DIR, CARGO_BUILD_TARGET, cargo's configuration and the options, so that cargo is asked for it.
#
# The same source gives the same bytes in every directory: paths of this machine are replaced in debug information and in
# the texts of panics. RUSTFLAGS, where it is set, takes the place of these flags; it is then the caller's to remap.
set -eu

version=$1
shift

# flag PATH NAME: an element of an array in TOML.
flag() {
    printf '"--remap-path-prefix=%s=%s",' "$(printf %s "$1" | sed 's/["\\]/\\&/g')" "$2"
}

# real PATH: with links followed, as rustc's own folder is; or PATH
real() {
    (cd "$1" 2>/dev/null && pwd -P) || printf %s "$1"
}

home=${CARGO_HOME:-${HOME:-}/.cargo}
sysroot=$(${RUSTC:-rustc} --print sysroot)
commit=$(${RUSTC:-rustc} -vV | sed -n 's/^commit-hash: //p')
# The last prefix that matches is the one that counts.
flags=$(
    for path in "$home" "$(real "$home")"; do flag "$path" /usr/src/cargo; done
    for folder in registry git; do flag "$(real "$home/$folder")" "/usr/src/cargo/$folder"; done
    # With its source installed, rustc names the files of std by their place on this machine.
    flag "$sysroot/lib/rustlib/src/rust" "/rustc/$commit"
    flag "$(pwd -P)" "/usr/src/libkuf-$version"
)

messages=$(mktemp)
trap 'rm -f "$messages"' EXIT
# Only the static library: cargo's other kinds need a linker for the target.
${CARGO:-cargo} rustc --release --lib --crate-type staticlib --locked --features reserve --config "build.rustflags=[$flags]" \
    --message-format=json-render-diagnostics "$@" >"$messages"

archive=$(sed -n 's/.*"\([^"]*\.a\)".*/\1/p' "$messages")
case $archive in
/*.a) ;;
*) echo "cargo names no static library" >&2 && exit 1 ;;
esac
if [ "$(printf '%s\n' "$archive" | wc -l)" -ne 1 ]; then
    echo "cargo built for several targets; name one: make TARGET=..." >&2
    exit 1
fi
printf '%s\n' "$archive"
