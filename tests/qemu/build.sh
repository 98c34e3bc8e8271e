#!/bin/sh
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# Build the QEMU fork, unless that has been done already, and print the
# directory that holds it on standard output.  Everything else that there is to
# say goes to standard error.
#
#   build.sh PREFIX     where libkuf is installed: its header is needed
#
# LIBKUF_QEMU_CACHE   directory to build and keep it in
# LIBKUF_QEMU_JOBS    jobs for ninja, instead of one for each processor

set -eu

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
cache=${LIBKUF_QEMU_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/libkuf}
jobs=${LIBKUF_QEMU_JOBS:-$(nproc)}
[ $# = 1 ] || { sed -n '3,/^$/s/^# \{0,1\}//p' "$0" >&2; exit 2; }
prefix=$(CDPATH='' cd -- "$1" && pwd)

# What the series is for.  Of this, whatever Debian has now.
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

# What the binaries need to run, also if they come from the cache.
need_packages ipxe-qemu qemu-system-data seabios libglib2.0-0 libpixman-1-0 \
	libfdt1 zlib1g

mkdir -p "$cache"

# Lists of source packages of our own: the system's configuration, which may
# have no deb-src at all, stays as it is.
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
	say "the sources of this system have no qemu $wanted*, which the series is for: it is that of Debian 12"
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

# What a build that was killed has left behind.
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

# In the background, for a shell does not heed a signal while it waits for what
# is in the foreground, and a build takes minutes.
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
	# The lists may be of a time when there was another version.
	update_lists
	[ "$(newest)" = "$version" ] || { say "there is a new version of the source: run this again"; exit 1; }
	fetch || fail "cannot fetch the source"
fi
run dpkg-source --no-check -x ./*.dsc src || fail "cannot unpack the source"
for p in "$here"/patches/*.patch; do
	patch -d src -p1 -s -f -F0 --no-backup-if-mismatch <"$p" >>"$log" 2>&1 ||
		fail "${p##*/} does not apply"
done

# Whatever the environment of our caller has for his own builds is not ours.
unset MAKEFLAGS MFLAGS MAKELEVEL CFLAGS CXXFLAGS LDFLAGS
PKG_CONFIG_PATH=$prefix/lib/pkgconfig
export PKG_CONFIG_PATH

mkdir build
cd build
# shellcheck disable=SC2086 # words on purpose
run ../src/configure $configure || fail "cannot configure"
run ninja -j"$jobs" qemu-system-x86_64 tests/qtest/migration-test || fail "cannot build"

# Only what is whole ever has the name that is looked for.
mkdir "$temp/out"
cp qemu-system-x86_64 tests/qtest/migration-test "$temp/out"
echo "$version" >"$temp/out/version"
echo "$(($(date +%s) - start))" >"$temp/out/build-seconds"
mv -T "$temp/out" "$dir" 2>/dev/null || [ -d "$dir" ] || fail "cannot keep the build"

say "built in $(($(date +%s) - start)) s"
echo "$dir"
