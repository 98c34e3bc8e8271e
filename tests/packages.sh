# SPDX-License-Identifier: MIT OR Apache-2.0
# shellcheck shell=sh
#
# Installs Debian packages for the scripts that build kernels and QEMU, which source this and define say(). For a command
# instead of a package, use tests/check/need.sh.

installed() {
	dpkg-query -W -f '${db:Status-Abbrev}' "$1" 2>/dev/null | grep -q '^ii'
}

# Returns silently if all packages are installed, without running apt, which
# takes time and needs root.
need_packages() {
	missing=
	for package; do
		installed "$package" || missing="$missing $package"
	done
	[ -n "$missing" ] || return 0

	say "installing$missing"
	sudo=
	[ "$(id -u)" = 0 ] || sudo=sudo
	packages_log=$(mktemp)
	# shellcheck disable=SC2086 # words on purpose
	if ! { $sudo apt-get update &&
	       DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y \
			--no-install-recommends $missing; } >"$packages_log" 2>&1; then
		tail -n 30 "$packages_log" >&2
		rm -f "$packages_log"
		say "cannot install$missing"
		exit 1
	fi
	rm -f "$packages_log"
}
