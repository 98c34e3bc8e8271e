# SPDX-License-Identifier: MIT OR Apache-2.0
# shellcheck shell=sh
#
# Debian packages for the scripts that build something big. To be sourced; they say what they do with say(). What is wanted
# as a command, whatever package it is from, tests/check/need.sh sees to.

installed() {
	dpkg-query -W -f '${db:Status-Abbrev}' "$1" 2>/dev/null | grep -q '^ii'
}

# Quiet if there is nothing to do, which must not cost the time that apt takes
# to find that out, nor need the right to install anything.
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
