#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# static.sh [PACKAGE...] - build static release binaries (default: all programs)
# into build/static/: they run in any initramfs, without a library.
set -euo pipefail
. "$(dirname "$0")/common.sh"

packages=("$@")
[ ${#packages[@]} -gt 0 ] || packages=(kmorphd kmorphctl kmorph-agent kmorph-criu kmorph-qemu-tests)
args=()
for p in "${packages[@]}"; do args+=(-p "$p"); done
# With all programs comes the daemon that fails on purpose.
[ $# -gt 0 ] || args+=(--bins --example kmorphd-failpoints)
target=x86_64-unknown-linux-gnu
cd "$KMORPH_ROOT"
CARGO_TARGET_DIR=${KMORPH_STATIC:-$KMORPH_ROOT/build/static} exec cargo build --locked --release --target "$target" \
	--config "target.$target.rustflags=['-Ctarget-feature=+crt-static','-Cstrip=debuginfo']" "${args[@]}"
