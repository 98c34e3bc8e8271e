#!/bin/sh
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# Run programs on the patched kernel, in an emulated machine.
#
#   run.sh [-dnv] [-a WORDS] [-A ARCH] [-s PATTERN] [-k IMAGE] [-K DIR]
#          [-L DIR]... [-f FILE]... [-l LIST] [-t SECONDS] [-T SECONDS] [-m MIB]
#          [-o DIR] [PROGRAM | DIRECTORY]...
#
#   -d          the debug variant of the kernel (lockdep and the like)
#   -n          run only the given programs, not the kernel's selftests
#   -s PATTERN  only the selftests whose name matches the shell pattern
#   -v          show the console
#   -a WORDS    add this to the kernel's command line, e.g. kvm_amd.npt=0 for
#               shadow paging
#   -A ARCH     the machine's architecture: x86_64 (the default) or aarch64
#   -k IMAGE    boot this kernel instead of the one of build.sh
#   -K DIR      load the kernel modules of DIR/list, in its order
#   -L DIR      search this directory for shared libraries first (repeatable)
#   -f FILE     pack this file too, as /tests/NAME
#   -l LIST     run the programs of this file, see below
#   -t SECONDS  time limit for a program without one in the list (60; -d: 240)
#   -T SECONDS  time limit for all, boot included (900; -d: 2700)
#   -m MIB      memory of the machine (1536)
#   -o DIR      keep console.log, results.log and the initramfs here
#
# It packs programs with the shared libraries that ldd names; for a directory,
# all executable files in it.  A program passes with exit status 0, is skipped
# with 77 and fails otherwise; if it prints lines "ok NAME", "ok NAME # SKIP
# why" and "not ok NAME: why", these are counted instead.
#
# A line of LIST: [timeout=SECONDS] [NAME=VALUE]... PROGRAM [ARGUMENT]...
# PROGRAM is relative to the list.  "#" starts a comment line.

set -eu

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
append=
debug=
selftests='*'
verbose=
image=
arch=x86_64
modules=
libdirs=
files=
list=
timeout=
total=
memory=1536
out=
nl='
'

die() {
	echo "run.sh: $*" >&2
	exit 1
}

usage() {
	sed -n '3,/^$/s/^# \{0,1\}//p' "$0" >&2
	exit 2
}

while getopts a:A:dns:vk:K:L:f:l:t:T:m:o:h opt; do
	case $opt in
	a) append=$OPTARG ;;
	d) debug=-d ;;
	n) selftests= ;;
	s) selftests=$OPTARG ;;
	v) verbose=1 ;;
	A) arch=$OPTARG ;;
	k) image=$OPTARG ;;
	K) modules=$OPTARG ;;
	L) libdirs=${libdirs:+$libdirs:}$(CDPATH='' cd -- "$OPTARG" && pwd) ;;
	f) files=$files$OPTARG$nl ;;
	l) list=$OPTARG ;;
	t) timeout=$OPTARG ;;
	T) total=$OPTARG ;;
	m) memory=$OPTARG ;;
	o) out=$OPTARG ;;
	*) usage ;;
	esac
done
shift $((OPTIND - 1))

timeout=${timeout:-$([ -n "$debug" ] && echo 240 || echo 60)}
total=${total:-$([ -n "$debug" ] && echo 2700 || echo 900)}

# The machine, its two serial lines, and the tools to build and inspect
# programs for it. -cpu or -M make KVM work inside.
case $arch in
x86_64)
	machine="qemu-system-x86_64 -accel tcg,thread=single -cpu max"
	console_at=ttyS0
	results_at=/dev/ttyS1
	prefix=
	sysroot=
	tools="qemu-system-x86_64:qemu-system-x86 cc:build-essential"
	;;
aarch64)
	machine="qemu-system-aarch64 -accel tcg -M virt,virtualization=on,gic-version=3
		-cpu max,lpa2=off,pauth-impdef=on"
	console_at=ttyAMA0
	results_at=/dev/ttyS0
	prefix=aarch64-linux-gnu-
	sysroot=/usr/aarch64-linux-gnu
	tools="qemu-system-aarch64:qemu-system-arm
		aarch64-linux-gnu-gcc:gcc-aarch64-linux-gnu"
	;;
*) die "no machine for $arch" ;;
esac

for tool in $tools cpio:cpio readelf:binutils; do
	command -v "${tool%%:*}" >/dev/null && continue
	sudo=
	[ "$(id -u)" = 0 ] || sudo=sudo
	echo "run.sh: installing ${tool#*:}" >&2
	{ $sudo apt-get update &&
	  DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y \
		--no-install-recommends "${tool#*:}"; } >/dev/null 2>&1 ||
		die "cannot install ${tool#*:}"
done

[ -n "$image" ] || image=$("$here/build.sh" $debug)

work=$(mktemp -d)
qemu=
cleanup() {
	[ -z "$qemu" ] || kill "$qemu" 2>/dev/null || :
	rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 130' INT TERM HUP

root=$work/root
mkdir -p "$root/tests" "$root/lib" "$root/lib64" "$root/dev" "$root/proc" \
	"$root/sys" "$root/tmp" "$root/bin"
: >"$root/tests/list"

warnings='-std=c11 -D_GNU_SOURCE -O2 -g -Wall -Wextra -Werror -Wshadow
	-Wstrict-prototypes -Wmissing-prototypes -Wpointer-arith -Wvla'
# shellcheck disable=SC2086 # words on purpose
compile() {
	${prefix:+${prefix}g}cc $warnings -static -pthread -o "$1" "$2" || die "cannot compile ${2##*/}"
}

# Finds a library for the machine's programs: in the directories of -L, then in
# the compiler's.
find_library() {
	(
		IFS=:
		for dir in $libdirs; do
			[ ! -e "$dir/$1" ] || { echo "$dir/$1"; exit; }
		done
		found=$(${prefix:+${prefix}g}cc -print-file-name="$1")
		[ "$found" = "$1" ] || echo "$found"
	)
}

pack_libraries() {
	interpreter=$(readelf -l "$1" 2>/dev/null |
		sed -n 's/.*program interpreter: \(.*\)\]/\1/p')
	if [ -n "$interpreter" ] && [ ! -e "$root$interpreter" ]; then
		mkdir -p "$root${interpreter%/*}"
		cp -L "$sysroot$interpreter" "$root$interpreter"
	fi
	for needed in $(readelf -d "$1" 2>/dev/null |
		sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p'); do
		[ ! -e "$root/lib/$needed" ] || continue
		library=$(find_library "$needed")
		[ -n "$library" ] || die "${1##*/} needs $needed; name its directory with -L"
		cp -L "$library" "$root/lib/$needed"
		pack_libraries "$library"
	done
}

# Sets $packed to the program's path in the machine.
pack() {
	[ -x "$1" ] || die "$1 is not a program"
	packed=/tests/${1##*/}
	[ -e "$root$packed" ] && cmp -s "$1" "$root$packed" && return
	[ ! -e "$root$packed" ] || die "two programs have the name ${1##*/}"
	cp -L "$1" "$root$packed"
	pack_libraries "$1"
}

compile "$root/init" "$here/init.c"

if [ -n "$selftests" ]; then
	for source in "$here"/selftests/*.c; do
		name=$(basename "$source" .c)
		# shellcheck disable=SC2254 # it is a pattern
		case $name in
		$selftests) ;;
		*) continue ;;
		esac
		compile "$root/tests/$name" "$source"
		echo "timeout=$timeout /tests/$name" >>"$root/tests/list"
	done
fi

for program; do
	if [ -d "$program" ]; then
		for file in "$program"/*; do
			if [ ! -f "$file" ] || [ ! -x "$file" ]; then
				continue
			fi
			pack "$file"
			echo "timeout=$timeout $packed" >>"$root/tests/list"
		done
	else
		pack "$program"
		echo "timeout=$timeout $packed" >>"$root/tests/list"
	fi
done

if [ -n "$list" ]; then
	base=$(CDPATH='' cd -- "$(dirname -- "$list")" && pwd)
	while IFS= read -r line; do
		case $line in
		'#'* | '') continue ;;
		esac
		words="timeout=$timeout"
		program=
		for word in $line; do
			case $program$word in
			[A-Za-z_]*=*) words="$words $word"; continue ;;
			esac
			if [ -n "$program" ]; then
				words="$words $word"
				continue
			fi
			case $word in
			/*) program=$word ;;
			*) program=$base/$word ;;
			esac
			pack "$program"
			words="$words $packed"
		done
		echo "$words" >>"$root/tests/list"
	done <"$list"
fi

printf '%s' "$files" | while IFS= read -r file; do
	cp -L "$file" "$root/tests/"
done

[ -s "$root/tests/list" ] || die "nothing to run"

if [ -n "$modules" ]; then
	mkdir "$root/modules"
	cp "$modules"/* "$root/modules/"
fi

(cd "$root" && find . | cpio -o -H newc --quiet -R 0:0 | gzip -1) >"$work/initramfs"

# A machine that is stuck must report this and stop, because nothing watches
# it; the reason is on the console.
cmdline="console=$console_at results=$results_at loglevel=6 panic=-1 oops=panic panic_on_warn=1
	softlockup_panic=1 hung_task_panic=1 sysctl.kernel.panic_on_rcu_stall=1
	sysctl.kernel.hung_task_timeout_secs=20 mitigations=off
	hugepagesz=2M hugepages=48 transparent_hugepage=madvise"
if [ -n "$debug" ]; then
	# An emulated processor that checks all locks is slow, not stuck.
	cmdline="$cmdline sysctl.kernel.hung_task_timeout_secs=60
		watchdog_thresh=30 rcupdate.rcu_cpu_stall_timeout=60"
fi
cmdline="$cmdline $append"

console=$work/console.log
results=$work/results.log
: >"$console"
: >"$results"
case $arch in
x86_64) results_line="-serial file:$results" ;;
# This machine has only one serial line of its own.
*) results_line="-chardev file,id=results,path=$results -device pci-serial,chardev=results" ;;
esac

# shellcheck disable=SC2086,SC2116 # joins the lines
timeout -k 5 "$total" $machine \
	-smp 2 -m "$memory" -nodefaults -no-user-config -display none -no-reboot \
	-kernel "$image" -initrd "$work/initramfs" -append "$(echo $cmdline)" \
	-serial "file:$console" $results_line \
	</dev/null >"$work/qemu.log" 2>&1 &
qemu=$!
if [ -n "$verbose" ]; then
	tail -n +1 -f --pid="$qemu" "$console" &
fi
status=0
wait "$qemu" || status=$?
qemu=

if [ -n "$out" ]; then
	mkdir -p "$out"
	cp "$console" "$results" "$work/initramfs" "$out"
fi

tr -d '\r' <"$results" >"$work/results"
tr -d '\r' <"$console" | grep -v 'Kernel command line:' >"$work/console" || :

passed=0
failed=0
skipped=0
finished=
while read -r word rest; do
	case $word in
	ok) passed=$((passed + 1)); echo "$word $rest" ;;
	not) failed=$((failed + 1)); echo "$word $rest" ;;
	skip) skipped=$((skipped + 1)); echo "$word $rest" ;;
	up) echo "# kernel and init were up after $rest s" ;;
	done) finished=1 ;;
	esac
done <"$work/results"

# Matches only the kernel's messages, which start with the time.  They may
# start anywhere in a line, because programs print on the same console.
trouble='\[ *[0-9]+\.[0-9]{6}\].*(BUG|WARNING|INFO: task|INFO: rcu|Oops|Kernel panic|general protection|kernel stack|lockup|stall|possible .* (deadlock|recursion)|bad unlock|held lock|refcount_t|list_(add|del) corruption|UBSAN|KASAN|KCSAN|ODEBUG|Call Trace|unable to handle|Bad page|invalid opcode|double fault|cut here)'
if grep -Eq "$trouble" "$work/console"; then
	failed=$((failed + 1))
	echo "not ok kernel: it reported a problem:"
	grep -E -m 1 -A 60 "$trouble" "$work/console" | sed 's/^/# /'
fi

if [ -z "$finished" ]; then
	failed=$((failed + 1))
	if [ "$status" = 124 ] || [ "$status" = 137 ]; then
		echo "not ok rig: did not end within $total s"
	else
		echo "not ok rig: the machine stopped before the tests ended (qemu: $status)"
	fi
	sed 's/^/# /' "$work/qemu.log"
	tail -n 30 "$work/console" | sed 's/^/# /'
fi

if [ "$skipped" -gt 0 ]; then
	echo "$passed passed, $failed failed, $skipped skipped"
else
	echo "$passed passed, $failed failed"
fi
[ "$failed" = 0 ] && [ "$passed" -gt 0 ]
