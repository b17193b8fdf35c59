#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# setup.sh - the host tools that building the modules and running the kernel
# tests need. Installs what is missing by apt when it may; otherwise says what
# to install and exits 3. Quick and silent when nothing is missing.
#
# setup.sh bench   also what `make bench` compares with
set -euo pipefail
. "$(dirname "$0")/common.sh"

# command (or file) : Debian package
needs=(
	qemu-system-x86_64:qemu-system-x86
	busybox:busybox-static
	dtc:device-tree-compiler
	/usr/sbin/criu:criu
	gcc-12:gcc-12
	cc:gcc
	/usr/bin/python3:python3-minimal
	/usr/bin/pydoc3:python3 # with the whole of its library
	make:make
	modinfo:kmod
	cpio:cpio
	xz:xz-utils
	bc:bc
	flock:util-linux
	/usr/include/libelf.h:libelf-dev
	/usr/lib/x86_64-linux-gnu/libc.a:libc6-dev
)

[ "${1:-}" != bench ] || needs+=(erlc:erlang-base)

command -v cargo >/dev/null || {
	say "missing: cargo, Rust 1.90 or newer (https://rustup.rs, or Debian's cargo where it is new enough)"
	exit 3
}
missing=()
for need in "${needs[@]}"; do
	what=${need%%:*}
	case $what in
	/*) [ -e "$what" ] && continue ;;
	*) PATH=$PATH:/sbin:/usr/sbin command -v "$what" >/dev/null && continue ;;
	esac
	missing+=("${need#*:}")
done
# An initramfs has no shared libraries: the busybox in it must be the static one.
if command -v busybox >/dev/null && command -v dpkg >/dev/null &&
	! dpkg -s busybox-static >/dev/null 2>&1 &&
	ldd "$(command -v busybox)" >/dev/null 2>&1; then
	missing+=(busybox-static)
fi
[ ${#missing[@]} -eq 0 ] && exit 0

command_line="apt-get install -y --no-install-recommends ${missing[*]}"
give_up() {
	say "missing packages: ${missing[*]}"
	say "$1; run as root: $command_line"
	exit 3
}
[ "$(id -u)" = 0 ] || give_up "not root"
command -v apt-get >/dev/null || give_up "no apt on this system"
say "installing: ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
if ! $command_line >/dev/null 2>&1; then
	# The package lists may be absent or old.
	apt-get update >/dev/null 2>&1 || give_up "apt-get update failed"
	$command_line >&2 || give_up "apt could not install them"
fi
