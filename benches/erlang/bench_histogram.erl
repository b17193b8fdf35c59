%% SPDX-License-Identifier: Apache-2.0
%% A histogram of times in lock-free counters: sixteen buckets to every doubling, from 1 us to two minutes.
-module(bench_histogram).

-export([new/0, record/2, snapshot/1, percentile/3]).

-define(SUB, 16).
-define(BUCKETS, 27 * ?SUB).
-define(ONE, 1023 * ?SUB).

new() ->
    counters:new(?BUCKETS, [write_concurrency]).

%% The bucket is read off the float: its exponent and the first four bits of its mantissa.
record(H, Ns) ->
    <<_:1, Bits:15, _/bits>> = <<(max(Ns, 0) / 1000 + 1.0)/float>>,
    counters:add(H, min(Bits - ?ONE + 1, ?BUCKETS), 1).

snapshot(H) ->
    [counters:get(H, I) || I <- lists:seq(1, ?BUCKETS)].

%% In microseconds, rounded up to the end of its bucket; of what was recorded between two snapshots.
percentile(P, Before, After) ->
    Counts = lists:zipwith(fun(A, B) -> B - A end, Before, After),
    rank(ceil(P * lists:sum(Counts)), Counts, 0).

rank(0, _, _) -> 0;
rank(Rank, [N | Rest], I) when N < Rank, Rest =/= [] -> rank(Rank - N, Rest, I + 1);
rank(_, _, I) -> round(math:pow(2, I div ?SUB) * (1 + (I rem ?SUB + 1) / ?SUB) - 1).
