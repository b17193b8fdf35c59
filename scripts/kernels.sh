#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# kernels.sh [SERIES...] - fetch and unpack the newest stock Debian cloud kernel
# of each series (default: 6.1 6.12), with the headers its modules are built
# against. Nothing is installed on the host. Result, below $KMORPH_CACHE
# (default build/cache):
#
#   kernels/<release>/vmlinuz
#   kernels/<release>/modules/lib/modules/<release>/
#   kernels/<release>/headers        -> the build directory for `make -C`
#   kernels/<series>                 -> <release>
#
# Quick when the newest releases are there. Without network the releases in the
# cache serve; KMORPH_REFRESH=1 updates the package lists first.
set -euo pipefail
. "$(dirname "$0")/common.sh"

series=("$@")
[ ${#series[@]} -gt 0 ] || series=(6.1 6.12)
kernels=$KMORPH_CACHE/kernels
mkdir -p "$kernels"
exec 9>"$KMORPH_CACHE/.kernels.lock"
flock 9

work=
trap '[ -z "$work" ] || rm -rf "$work"' EXIT

# The newest release of a series that the package lists know, or nothing.
newest() {
	local pattern
	pattern="^linux-image-${1//./\\.}\\.[0-9]+(-[0-9]+|\\+deb[0-9]+)-cloud-amd64\$"
	apt-cache --names-only search "$pattern" 2>/dev/null |
		sed -n 's/^linux-image-\([^ ]*\) .*/\1/p' | sort -V | tail -n 1
}

# The packages a release is made of: image, both headers, kbuild.
packages() {
	local common=${1%-cloud-amd64}-common kbuild
	kbuild=$(apt-cache depends "linux-headers-$1" |
		sed -n 's/^ *|\{0,1\}Depends: \(linux-kbuild-[^ ]*\)$/\1/p' | head -n 1)
	[ -n "$kbuild" ] || die "linux-headers-$1 names no linux-kbuild package"
	echo "linux-image-$1 linux-headers-$1 linux-headers-$common $kbuild"
}

# Download the packages of a release into $work/debs; 1 when that fails.
download() {	# release
	local list
	list=$(packages "$1")
	work=$(mktemp -d "$kernels/.new.XXXXXX")
	chmod 755 "$work"
	mkdir "$work/debs" "$work/root"
	say "fetching $list"
	# apt drops its privileges for a download where it can.
	[ "$(id -u)" != 0 ] || chown _apt "$work/debs" 2>/dev/null || true
	# shellcheck disable=SC2086
	(cd "$work/debs" && apt-get -q download $list >&2) && return 0
	rm -rf "$work"
	work=
	return 1
}

# Unpack what lies in $work/debs, then rename it into place: all or nothing.
unpack() {	# release
	local release=$1 root=$work/root makefile deb link
	for deb in "$work"/debs/*.deb; do
		step "unpacking ${deb##*/}" dpkg -x "$deb" "$root"
	done
	rm -rf "$work/debs"

	[ -e "$root/boot/vmlinuz-$release" ] || die "no vmlinuz-$release in the package"
	mv "$root/boot/vmlinuz-$release" "$work/vmlinuz"
	mv "$root/boot/config-$release" "$work/config"
	mkdir -p "$work/modules/lib"
	if [ -d "$root/usr/lib/modules/$release" ]; then
		mv "$root/usr/lib/modules" "$work/modules/lib/modules"
	else
		mv "$root/lib/modules" "$work/modules/lib/modules"
	fi
	rm -f "$work/modules/lib/modules/$release/build" "$work/modules/lib/modules/$release/source"

	# The headers name each other by absolute paths below /usr. Relative ones
	# let the cache lie, and be moved, anywhere.
	makefile=$root/usr/src/linux-headers-$release/Makefile
	[ -f "$makefile" ] || die "no headers Makefile in linux-headers-$release"
	# shellcheck disable=SC2016
	sed -i 's|/usr/src/|$(dir $(lastword $(MAKEFILE_LIST)))../|g' "$makefile"
	find "$root/usr/src" -type l -lname '/usr/*' | while read -r link; do
		ln -sfnr "$root$(readlink "$link")" "$link"
	done
	ln -s "root/usr/src/linux-headers-$release" "$work/headers"
	rm -rf "$root/usr/share/doc" "$root/boot" "${kernels:?}/$release"
	mv "$work" "$kernels/$release"
	work=
}

[ "${KMORPH_REFRESH:-0}" != 1 ] || step "apt-get update" apt-get -q update
for one in "${series[@]}"; do
	release=$(newest "$one")
	if [ -z "$release" ] || [ ! -e "$kernels/$release/headers/Makefile" ]; then
		# Old lists name packages that are gone, so one more try with new ones.
		if [ -n "$release" ] && download "$release"; then
			unpack "$release"
		elif apt-get -q update >&2 && release=$(newest "$one") && [ -n "$release" ] &&
			{ [ -e "$kernels/$release/headers/Makefile" ] || download "$release"; }; then
			[ -z "$work" ] || unpack "$release"
		elif [ -e "$kernels/$one/headers/Makefile" ]; then
			release=$(readlink "$kernels/$one")
			say "cannot download a newer kernel: using $release of the cache"
		else
			die "step failed: download of a $one kernel (is there a network?)"
		fi
	fi
	ln -sfn "$release" "$kernels/$one"
	printf '%s %s\n' "$one" "$release"
done
rm -rf "$kernels"/.new.*
