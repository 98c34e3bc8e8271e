#!/usr/bin/env bash
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# fetch.sh NAME: fetches a kernel of kernels.table, unless the cache has it, and prints its directory: vmlinuz, config,
# release, and modules/ with a list in the order in which to load them. All other output goes to standard error.
#
# It fetches packages with its own apt configuration, so that the machine's is not changed; apt verifies them against
# Debian's archive keys. The cache holds them by package version. build.sh builds a kernel that has no package.
#
# LIBKUF_KERNEL_CACHE   directory to keep kernels in
set -eu -o pipefail

here=$(cd "$(dirname "$0")" && pwd)
cache=${LIBKUF_KERNEL_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/libkuf}
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
# The modules that KVM needs if it is not built in.
wanted_modules="kvm-amd"

say() { echo "fetch.sh: $*" >&2; }

read -r name suite package arch _ < <(awk -v name="$1" '$1 == name' "$here/kernels.table") || {
    say "$1 is not in kernels.table"
    exit 2
}

KUF_INSTALL_TOOLS=1 "$here/../check/need.sh" apt-get=apt dpkg-deb=dpkg depmod=kmod xz=xz-utils

# A separate apt configuration for one suite and one architecture.
apt=$cache/apt-$suite-$arch
mkdir -p "$apt"/etc/apt.conf.d "$apt"/etc/preferences.d "$apt"/state/lists/partial "$apt"/cache/archives/partial
: >>"$apt/status"
cat >"$apt/apt.conf" <<CONFIGURATION
Dir "$apt";
Dir::Etc "$apt/etc";
Dir::State "$apt/state";
Dir::State::status "$apt/status";
Dir::Cache "$apt/cache";
APT::Architecture "$arch";
APT::Architectures { "$arch"; };
APT::Sandbox::User "root";
Acquire::Languages "none";
CONFIGURATION
mirror=${LIBKUF_DEBIAN_MIRROR:-http://deb.debian.org/debian}
{
    echo "deb [signed-by=$keyring] $mirror $suite main"
    # The dependencies of a backport may be in the suite that it extends.
    case $suite in *-backports) echo "deb [signed-by=$keyring] $mirror ${suite%-backports} main" ;; esac
} >"$apt/etc/sources.list"
export APT_CONFIG=$apt/apt.conf

if [ -z "$(find "$apt/updated" -mmin -1440 2>/dev/null)" ]; then
    apt-get -qq update >&2
    touch "$apt/updated"
fi

# closure PACKAGE=VERSION: prints the package and the exact kernel packages that it depends on.
closure() {
    local todo=("$1") seen=" " one next
    while [ ${#todo[@]} -gt 0 ]; do
        one=${todo[0]}
        todo=("${todo[@]:1}")
        case $seen in *" $one "*) continue ;; esac
        seen+="$one "
        echo "$one"
        while read -r next; do todo+=("$next"); done < <(
            apt-cache show "$one" | sed -n 's/^Depends: //p' | tr ',' '\n' |
                sed -n 's/^ *\(linux-\(image\|base\|binary\|modules\)-[0-9][^ ]*\) (= \([^)]*\)).*/\1=\3/p')
    done
}

version=$(apt-cache madison "$package" | awk -F ' *[|] *' -v suite="$suite/main" '$3 ~ suite { print $2; exit }')
[ -n "$version" ] || { say "$suite has no $package"; exit 1; }
if [ "$package" = linux-source ]; then
    exec "$here/build.sh" "$version" "$arch-${name##*-}" "$cache"
fi
directory=$cache/kernel-$package-$arch-$version
if [ -e "$directory/vmlinuz" ]; then
    echo "$directory"
    exit 0
fi

temp=$(mktemp -d "$cache/fetch.XXXXXX")
trap 'rm -rf "$temp"' EXIT
mapfile -t packages < <(closure "$package=$version" | tail -n +2)
say "$1: ${packages[*]}"
(cd "$temp" && apt-get -qq download "${packages[@]}" >&2)
for deb in "$temp"/*.deb; do
    dpkg-deb -x "$deb" "$temp/root"
done
mkdir "$temp/out"
# The place of these files differs between versions of the packages.
one_of() { find "$temp/root" -type f -name "$1" 2>/dev/null | head -n 1 || :; }
mv "$(one_of 'vmlinuz*')" "$temp/out/vmlinuz"
config=$(one_of 'config*')
if [ -n "$config" ]; then cp "$config" "$temp/out/config"; fi
tree=$temp/root
if ! [ -d "$tree/lib/modules" ]; then mv "$temp/root/usr/lib" "$temp/root/lib"; fi
release=$(basename "$(find "$tree/lib/modules" -mindepth 1 -maxdepth 1 -type d | head -n 1)")
echo "$release" >"$temp/out/release"
depmod -b "$tree" "$release" 2>/dev/null
mkdir "$temp/out/modules"
: >"$temp/out/modules/list"
for module in $wanted_modules; do
    while read -r word path _; do
        [ "$word" = insmod ] || continue
        name=$(basename "${path%.xz}")
        case $path in
        *.xz) xz -dc "$path" >"$temp/out/modules/$name" ;;
        *) cp "$path" "$temp/out/modules/$name" ;;
        esac
        grep -qx "$name" "$temp/out/modules/list" || echo "$name" >>"$temp/out/modules/list"
    done < <(modprobe -d "$tree" -S "$release" --show-depends "$module" 2>/dev/null || :)
done
mv -T "$temp/out" "$directory"
echo "$directory"
