#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# build-modules.sh [RELEASE...] - build kmorph.ko and kerf-vsock.ko for the
# releases in the cache (default: those the series links name) into
# $KMORPH_MODULES/<release>/ (default build/modules). The sources are copied,
# so nothing is written to kmod/. Nothing is rebuilt while sources and headers
# are unchanged. KMORPH_WERROR=1 makes warnings errors (the default).
set -euo pipefail
. "$(dirname "$0")/common.sh"

kernels=$KMORPH_CACHE/kernels
releases=("$@")
if [ ${#releases[@]} -eq 0 ]; then
	for link in "$kernels"/*; do
		[ -L "$link" ] && releases+=("$(readlink "$link")")
	done
fi
[ ${#releases[@]} -gt 0 ] || die "no kernel in $kernels: run scripts/kernels.sh first"
mkdir -p "$KMORPH_MODULES"
exec 9>"$KMORPH_MODULES/.lock"
flock 9

sources() { (cd "$KMORPH_ROOT/kmod" && find . -type f \( -name '*.[chS]' -o -name Kbuild -o -name Makefile \) ! -name '*.mod.c' ! -path './test/*' | sort); }
digest=$(cd "$KMORPH_ROOT/kmod" && sources | xargs sha256sum | sha256sum | cut -d' ' -f1)

for release in "${releases[@]}"; do
	headers=$kernels/$release/headers
	[ -e "$headers/Makefile" ] || die "no headers for $release in the cache: run scripts/kernels.sh"
	out=$KMORPH_MODULES/$release
	stamp="$digest $(readlink -f "$headers") werror=${KMORPH_WERROR:-1}"
	if [ "$(cat "$out/.stamp" 2>/dev/null)" = "$stamp" ] && [ -e "$out/kmorph.ko" ] && [ -e "$out/kerf-vsock.ko" ]; then
		continue
	fi
	say "building for $release"
	src=$out/src
	rm -rf "$src" "$out/.stamp"
	mkdir -p "$src"
	(cd "$KMORPH_ROOT/kmod" && sources | cpio -pdm --quiet "$src")
	step "make modules for $release" make -k -C "$src" KDIR="$headers" \
		${CC:+CC="$CC"} KMORPH_WERROR="${KMORPH_WERROR:-1}" -j"$(nproc)" modules
	for module in kmorph.ko kerf-vsock.ko; do
		[ -e "$src/$module" ] || die "step failed: $module was not built for $release"
		mv "$src/$module" "$out/$module.new"
		strip --strip-debug "$out/$module.new"
		mv "$out/$module.new" "$out/$module"
	done
	echo "$stamp" >"$out/.stamp"
done
