# SPDX-License-Identifier: MIT OR Apache-2.0
# shellcheck shell=bash
#
# shellcheck disable=SC2034 # the scripts that source this use the variables set here
#
# Runs kernels of kernels.table in emulated machines. Source it from the top of the tree.

kernels=tests/kernels
export KUF_INSTALL_TOOLS=1 # for tests/check/need.sh, also where make calls it

# kernels_of [NAME...]: prints the names, or all of the table without one.
kernels_of() {
    if [ $# -gt 0 ]; then
        printf '%s\n' "$@"
    else
        sed -n 's/^\([0-9][^ ]*\) .*/\1/p' "$kernels/kernels.table"
    fi
}

# choose NAME: fetches the kernel into $directory. If its architecture is not this machine's, $words makes `make` build
# for it in $build, apart from this machine's programs, and $target_words does so for cargo.
choose() {
    local arch
    arch=$(awk -v name="$1" '$1 == name { print $4 }' "$kernels/kernels.table")
    directory=$("$kernels/fetch.sh" "$1") || return
    case $arch in
    arm64)
        # The compiler does not depend on the C library's files, only recommends them.
        tests/check/need.sh aarch64-linux-gnu-gcc=gcc-aarch64-linux-gnu \
            /usr/aarch64-linux-gnu/lib/crti.o=libc6-dev-arm64-cross || return
        export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
        rustup target list --installed 2>/dev/null | grep -qx aarch64-unknown-linux-gnu ||
            rustup target add aarch64-unknown-linux-gnu >&2 || return
        build=build/aarch64
        words=(BUILD=build/aarch64 TARGET=aarch64-unknown-linux-gnu CC=aarch64-linux-gnu-gcc
            OBJCOPY=aarch64-linux-gnu-objcopy)
        target_words=(--target aarch64-unknown-linux-gnu)
        machine=aarch64
        ;;
    *)
        build=build
        words=()
        target_words=()
        machine=x86_64
        ;;
    esac
}

# build_all TARGET...: builds the targets in $build.
build_all() {
    make -s ${words[@]+"${words[@]}"} "$@"
}

# boot LIST OUT [WORD...]: runs the programs of the list on the chosen kernel; the words go to tests/kernel/run.sh.
boot() {
    local list=$1 out=$2
    shift 2
    tests/kernel/run.sh -n -A "$machine" -k "$directory/vmlinuz" -K "$directory/modules" -L "$build/stage/lib" \
        -l "$list" -o "$out" "$@"
}
