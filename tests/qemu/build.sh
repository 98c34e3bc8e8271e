#!/bin/sh
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# Build the QEMU fork, unless the cache has it, and print its directory on
# standard output.  All other output goes to standard error.
#
#   build.sh PREFIX     where libkuf is installed, for its header
#
# LIBKUF_QEMU_CACHE   directory to build and keep it in
# LIBKUF_QEMU_JOBS    jobs for ninja, instead of one for each processor

set -eu

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
cache=${LIBKUF_QEMU_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/libkuf}
jobs=${LIBKUF_QEMU_JOBS:-$(nproc)}
[ $# = 1 ] || { sed -n '3,/^$/s/^# \{0,1\}//p' "$0" >&2; exit 2; }
prefix=$(CDPATH='' cd -- "$1" && pwd)

# The version that the series applies to, in Debian's newest revision.
wanted='1:7.2+'

configure='--target-list=x86_64-softmmu --without-default-features
	--enable-kvm --enable-tcg --enable-vhost-user --enable-libkuf
	--enable-trace-backends=nop --disable-docs --disable-install-blobs
	--firmwarepath=/usr/share/qemu:/usr/share/seabios:/usr/lib/ipxe/qemu'

say() {
	echo "build.sh: $*" >&2
}

# shellcheck source=tests/packages.sh
. "$here/../packages.sh"

# The binaries need these to run, also if they come from the cache.
need_packages ipxe-qemu qemu-system-data seabios libglib2.0-0 libpixman-1-0 \
	libfdt1 zlib1g

mkdir -p "$cache"

# Use separate lists of source packages, so that the system's configuration,
# which may have no deb-src, is not changed.
apt=$cache/qemu-apt
update_lists() {
	rm -rf "$apt"
	mkdir -p "$apt/parts" "$apt/lists/partial"
	for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.list; do
		[ ! -e "$file" ] || sed -n 's/^deb \(.*\/debian\(-security\)\{0,1\}\/\{0,1\} .*\)/deb-src \1/p' "$file"
	done >"$apt/parts/debian.list"
	for file in /etc/apt/sources.list.d/*.sources; do
		[ ! -e "$file" ] || awk -v RS= -v ORS='\n\n' '/\/debian(-security)?\/?[ \n]/ {
			sub(/Types:[^\n]*/, "Types: deb-src"); print }' "$file"
	done >"$apt/parts/debian.sources"
	cat >"$apt/conf" <<-END
		Dir::Etc::sourcelist "/dev/null";
		Dir::Etc::sourceparts "$apt/parts";
		Dir::State::lists "$apt/lists";
		Dir::Cache::pkgcache "";
		Dir::Cache::srcpkgcache "";
		APT::Sandbox::User "";
	END
	APT_CONFIG=$apt/conf apt-get update >"$apt/log" 2>&1 || {
		cat "$apt/log" >&2
		say "cannot fetch the lists of source packages"
		rm -rf "$apt"
		exit 1
	}
}

newest() {
	APT_CONFIG=$apt/conf apt-cache showsrc --only-source qemu 2>/dev/null |
		sed -n 's/^Version: //p' | grep -F "$wanted" | sort -V | tail -n 1
}

[ -e "$apt/conf" ] || update_lists
version=$(newest)
if [ -z "$version" ]; then
	say "the package sources of this system lack qemu $wanted* of Debian 12, which the series applies to"
	exit 1
fi

hash=$({
	echo "$version $configure"
	cat "$prefix/include/kuf.h" "$here"/patches/*.patch
} | sha256sum | cut -c1-16)

dir=$cache/qemu-$hash
if [ -d "$dir" ]; then
	echo "$dir"
	exit 0
fi

need_packages build-essential bison dpkg-dev flex libfdt-dev libglib2.0-dev \
	libpixman-1-dev meson ninja-build patch pkg-config python3 xz-utils zlib1g-dev

# Remove the remains of killed builds.
find "$cache" -maxdepth 1 -type d -name 'qemu-build.*' -mmin +720 -exec rm -rf {} +
log=$cache/qemu-$hash.log
temp=$(mktemp -d "$cache/qemu-build.XXXXXX")
child=
cleanup() {
	[ -z "$child" ] || { kill "$child"; wait "$child"; } 2>/dev/null || :
	rm -rf "$temp"
}
trap cleanup EXIT
trap 'exit 130' INT TERM HUP

fail() {
	say "$1; the end of $log:"
	tail -n 40 "$log" >&2
	exit 1
}

# Run it in the background, because a shell handles no signal while it waits
# for a foreground command, and a build takes minutes.
run() {
	nice -n 10 "$@" >>"$log" 2>&1 &
	child=$!
	wait "$child" || return
	child=
}

start=$(date +%s)
say "building QEMU $hash from qemu $version, log in $log"
: >"$log"
cd "$temp"

fetch() {
	APT_CONFIG=$apt/conf run apt-get source --download-only "qemu=$version"
}
if ! fetch; then
	# The lists may be outdated.
	update_lists
	[ "$(newest)" = "$version" ] || { say "the source has a new version: run this again"; exit 1; }
	fetch || fail "cannot fetch the source"
fi
run dpkg-source --no-check -x ./*.dsc src || fail "cannot unpack the source"
for p in "$here"/patches/*.patch; do
	patch -d src -p1 -s -f -F0 --no-backup-if-mismatch <"$p" >>"$log" 2>&1 ||
		fail "${p##*/} does not apply"
done

# Ignore the settings that the environment has for other builds.
unset MAKEFLAGS MFLAGS MAKELEVEL CFLAGS CXXFLAGS LDFLAGS
PKG_CONFIG_PATH=$prefix/lib/pkgconfig
export PKG_CONFIG_PATH

mkdir build
cd build
# shellcheck disable=SC2086 # words on purpose
run ../src/configure $configure || fail "cannot configure"
run ninja -j"$jobs" qemu-system-x86_64 tests/qtest/migration-test || fail "cannot build"

# Give the directory its final name only when it is complete.
mkdir "$temp/out"
cp qemu-system-x86_64 tests/qtest/migration-test "$temp/out"
echo "$version" >"$temp/out/version"
echo "$(($(date +%s) - start))" >"$temp/out/build-seconds"
mv -T "$temp/out" "$dir" 2>/dev/null || [ -d "$dir" ] || fail "cannot keep the build"

say "built in $(($(date +%s) - start)) s"
echo "$dir"
