#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# run.sh DIR COUNT - supervise the instances 1 to COUNT behind the sockets DIR/<id + 2>_9000 with Erlang/OTP.
# run.sh --test    - check the frames against ones the Rust codec wrote.
#
# Standard output: "ready COUNT" once all have answered, then every 5 s "beats TOTAL lag_p99_us N".
# It does what kmorphd does for a heartbeat, except looking at the pulse, which is memory Erlang cannot map.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
build=${KMORPH_BENCH_BUILD:-$(mktemp -d)}
command -v erlc >/dev/null || { echo "run.sh: no erlc; apt-get install --no-install-recommends erlang-base" >&2; exit 1; }
mkdir -p "$build"
erlc +deterministic -I "$here" -o "$build" "$here"/*.erl

if [ "${1:-}" = --test ]; then
	exec erl -noshell -pa "$build" -eval 'halt(bench_test:run()).'
fi
[ $# -eq 2 ] || { echo "usage: run.sh DIR COUNT | --test" >&2; exit 2; }
[ "$(ulimit -n)" = unlimited ] || [ "$(ulimit -n)" -gt $(($2 + 100)) ] || ulimit -n $(($2 + 1000)) ||
	{ echo "run.sh: $2 connections need more descriptors; raise ulimit -n" >&2; exit 1; }

# erl replaces itself, so the process id stays. What makes it cheap: kernel polling in the schedulers' own time and no
# busy waiting, which would count as CPU time.
exec erl -noshell -pa "$build" +sbwt none +sbwtdcpu none +sbwtdio none +P 262144 +Q 262144 \
	-kernel logger_level warning -eval "bench:main([\"$1\", \"$2\"])."
