#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# demo-processes.sh - the story of `make demo` on stand-ins: processes that speak kmorph's protocol instead of
# kernels. Needs neither root nor QEMU nor dtc. Exits non-zero if any step did not happen.
set -euo pipefail
. "$(dirname "$0")/common.sh"

cd "$KMORPH_ROOT"
cargo build --locked -q -p kmorphd -p kmorphctl -p kmorph-agent
bin=${CARGO_TARGET_DIR:-$KMORPH_ROOT/target}/debug
dir=$(mktemp -d)
socket=$dir/kmorphd.sock
ctl() {
	printf '\n$ kmorphctl %s\n' "$*"
	"$bin/kmorphctl" --socket "$socket" "$@"
}
finish() {
	"$bin/kmorphctl" --socket "$socket" daemon stop --graceful >/dev/null 2>&1 || true
	rm -rf "$dir"
}
trap finish EXIT
fail() {
	echo "demo-processes.sh: $*" >&2
	exit 1
}

# Follow the log until an instance serves again; the line of its last step.
recovered() { # INSTANCE COUNT
	local line n=0
	while read -r line; do
		case $line in *"$1"*RECOVERY_COMPLETE*) n=$((n + 1)) ;; esac
		if [ "$n" -ge "$2" ]; then return 0; fi
	done < <(timeout 60 "$bin/kmorphctl" --socket "$socket" recovery-log --instance "$1" --follow 2>/dev/null)
	fail "$1 was not recovered"
}

cat >"$dir/kmorphd.conf" <<CONF
platform: process
process:
  dir: $dir/run
  cpus: 4
  memory: 1G
agent: $bin/kmorph-agent
instances: $KMORPH_ROOT/demo/instances
state: $dir/state
metrics: null
policy:
  pulse-misses: 50
CONF
echo "stands for a kernel" >"$dir/vmlinuz-6.1"
cp "$dir/vmlinuz-6.1" "$dir/vmlinuz-6.12"

echo "This machine offers no root to start kernels with: these are STAND-INS, processes that behave like kernels."
echo "The supervisor, its protocol and its decisions are the real ones; make demo as root shows real kernels."
ctl config check "$dir/kmorphd.conf"
ctl daemon start --config="$dir/kmorphd.conf" --program="$bin/kmorphd"
ctl spawn web-server --kernel="$dir/vmlinuz-6.1" --heartbeat-timeout=1
ctl spawn database --kernel="$dir/vmlinuz-6.12"
ctl list

printf '\n--- web-server panics\n'
"$bin/kmorph-agent" fault --dir "$dir/run" 1 panic out of luck
recovered web-server 1
printf '\n--- database hangs with interrupts off\n'
"$bin/kmorph-agent" fault --dir "$dir/run" 2 hang
recovered database 1
ctl recovery-log
ctl list --verbose

printf '\n--- kill -9 of the daemon: the stand-ins run on, and the next daemon takes them over\n'
pid=$("$bin/kmorphctl" --socket "$socket" daemon status --output json | sed -n 's/.*"pid": *\([0-9]*\).*/\1/p')
kill -9 "$pid"
while kill -0 "$pid" 2>/dev/null; do :; done
ctl daemon start --config="$dir/kmorphd.conf" --program="$bin/kmorphd"
ctl ping web-server
ctl ping database
list=$("$bin/kmorphctl" --socket "$socket" list)
echo "$list"
[ "$(grep -c RUNNING <<<"$list")" = 2 ] || fail "not both run"
ctl events
ctl daemon stop --graceful
! pgrep -f "stand-in --dir $dir/" >/dev/null || fail "a stand-in was left behind"
printf '\nThat was the story on stand-ins.\n'
