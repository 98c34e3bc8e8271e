#!/usr/bin/env bash
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# Makes the source archive, builds it in another folder, without network and with another CARGO_HOME, and compares the bytes
# with those of build/. That is a whole build of the library, about a minute of CPU: less would not be the bytes that are
# installed. Also looks at what `cargo package` would publish.

# shellcheck disable=SC2317 # functions here are called through try
. "$(dirname "$0")/common.sh"

needs cc=gcc readelf=binutils
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)

if ! git rev-parse --git-dir >/dev/null 2>&1; then
    skipped "source archive" "this tree is no git repository"
    finish
fi

# The crate: no rigs, and each file that its pages lead to. There is no address for its metadata yet.
CARGO_TARGET_DIR=$work/crate cargo package --no-verify --allow-dirty --quiet >"$work/warnings" 2>&1
grep -vE '^warning: manifest has no documentation, homepage or repository|^ +\||^ += note: see https|^$' "$work/warnings" >"$work/others"
try "cargo package has nothing to say" diff /dev/null "$work/others"
cargo package --list --allow-dirty >"$work/published" 2>/dev/null
try "the crate has no rigs" test -z "$(grep -E '^(tests/(c|check|kernel|kernels|qemu|fuzz|faults)|fuzz|benches|debian)/' \
    "$work/published" | grep -v '/README\.md$')"
grep '\.md$' "$work/published" | while read -r page; do
    grep -oE '\]\([^)#: ]+' "$page" | cut -c 3- | sort -u | while read -r path; do
        path=$(realpath -m --relative-to=. "$(dirname "$page")/$path")
        grep -qxF "$path" "$work/published" || echo "$page: $path"
    done
done >"$work/missing"
try "links of the pages in the crate lead to its files" diff /dev/null "$work/missing"

try "make" "$MAKE" -s build || finish
try "make dist" "$MAKE" -s dist || finish
archive=build/libkuf-$version.tar.gz
cp "$archive" "$work/first.tar.gz"
try "make dist again" "$MAKE" -s dist && try "source archives have the same bytes" cmp "$archive" "$work/first.tar.gz"
copy="$work/a copy"
mkdir -p "$copy"
try "unpacks" tar -xzf "$archive" -C "$copy" || finish
copy+=/libkuf-$version
try "nothing but source is in it" test ! -e "$copy/build" -a ! -e "$copy/target"

# The crates, under another name.
home=${CARGO_HOME:-$HOME/.cargo}
mkdir "$work/cargo home"
for folder in registry git; do
    if [ -e "$home/$folder" ]; then ln -s "$(realpath "$home/$folder")" "$work/cargo home/"; fi
done
if [ -f "$home/config.toml" ]; then cp "$home/config.toml" "$work/cargo home/"; fi
RUSTUP_TOOLCHAIN=$(rustup show active-toolchain 2>/dev/null | cut -d ' ' -f 1)
if [ -n "$RUSTUP_TOOLCHAIN" ]; then export RUSTUP_TOOLCHAIN; else unset RUSTUP_TOOLCHAIN; fi
if [ "${CARGO_INCREMENTAL:-0}" = 1 ]; then
    skipped "the same bytes" "with CARGO_INCREMENTAL=1 they depend on earlier builds"
    finish
fi
try "builds without network" env -u CARGO_TARGET_DIR CARGO_HOME="$work/cargo home" CARGO_NET_OFFLINE=true \
    SOURCE_DATE_EPOCH=1 "$MAKE" -s -C "$copy" build || finish
for file in libkuf.so."$version" libkuf.so."$version".debug libkuf.a; do
    try "$file has the same bytes" cmp "build/$file" "$copy/build/$file"
done
if [ "$(uname -m)" = x86_64 ] && ! env | grep -q '^CARGO_PROFILE_RELEASE_'; then
    stated=$(sed -n 's/^| .libkuf\.so. | \([0-9.]*\) MiB.*/\1/p' docs/building.md)
    try "libkuf.so is as large as docs/building.md says" awk -v bytes="$(stat -c %s "build/libkuf.so.$version")" -v stated="$stated" \
        'BEGIN { mib = bytes / 2^20; print mib " MiB"; exit !(mib > stated * 0.9 && mib < stated * 1.1) }'
fi
names_of() { strings -a "$1" | grep -F -e "$PWD/" -e "$HOME/" -e "$work"; }
try "no path of this machine in libkuf.so and its debug information" test -z "$(names_of "build/libkuf.so.$version.debug")"
finish
