#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# run.sh DIR COUNT   supervise the instances 1 to COUNT behind the sockets DIR/<id + 2>_9000 with Erlang/OTP
# run.sh --test      check the codec, partly against frames that the Rust codec wrote
#
# Standard output: "ready COUNT" once all have answered, then every 5 s "beats TOTAL lag_p99_us N". See README.md.
set -eu
fail() { echo "run.sh: $1" >&2; exit 1; }

here=$(cd "$(dirname "$0")" && pwd)
command -v erlc >/dev/null || fail "no erlc: apt-get install -y --no-install-recommends erlang-base"
build=${KMORPH_BENCH_BUILD:-}
[ -n "$build" ] || build=$(mktemp -d)
mkdir -p "$build"
erlc -Werror +deterministic -I "$here" -o "$build" "$here"/*.erl || fail "the program does not compile"

if [ "${1:-}" = --test ]; then
	exec erl -noinput -pa "$build" -run bench_test main
fi
[ $# -eq 2 ] || { echo "usage: run.sh DIR COUNT | --test" >&2; exit 2; }
[ -d "$1" ] || fail "no folder $1"
case $2 in '' | *[!0-9]*) fail "$2 is no number of instances" ;; esac

# As root beyond the hard limit; else as far as it goes, which must do.
ulimit -n 65536 2>/dev/null || ulimit -n "$(ulimit -H -n)"
limit=$(ulimit -n)
[ "$limit" = unlimited ] || [ "$limit" -ge $(($2 + 100)) ] ||
	fail "$2 connections need $(($2 + 100)) descriptors, the limit is $limit: raise it (ulimit -n, LimitNOFILE)"

# erl and erlexec replace themselves, so this process becomes the VM. README.md says what the options do.
saving="+S 1:1 +Mulmbcs 1024"
[ -z "${KMORPH_BENCH_PLAIN:-}" ] || saving=
# shellcheck disable=SC2086
exec erl -noshell -pa "$build" +sbwt none +sbwtdcpu none +sbwtdio none $saving +P 65536 +Q 65536 \
	-kernel logger_level warning \
	-kernel logger '[{handler, default, logger_std_h, #{config => #{type => standard_error}}}]' \
	${KMORPH_BENCH_ERL_FLAGS:-} -s bench main -extra "$1" "$2"
