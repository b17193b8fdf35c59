# SPDX-License-Identifier: Apache-2.0
# Shared by the scripts beside it; sourced, never run.

KMORPH_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
KMORPH_CACHE=${KMORPH_CACHE:-$KMORPH_ROOT/build/cache}
KMORPH_MODULES=${KMORPH_MODULES:-$KMORPH_ROOT/build/modules}

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
die() { say "error: $*"; exit 1; }

# step NAME COMMAND...: run it quietly; on failure name the step and show the end of what it said.
step() {
	local name=$1 log
	shift
	log=$(mktemp)
	if ! "$@" >"$log" 2>&1; then
		tail -n 40 "$log" >&2
		rm -f "$log"
		die "step failed: $name ($*)"
	fi
	rm -f "$log"
}
