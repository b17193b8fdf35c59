%% SPDX-License-Identifier: Apache-2.0
%% Supervise COUNT instances and say every five seconds how it goes.
-module(bench).

-export([main/1]).

-define(TELL_MS, 5000).
-define(LOOK_MS, 20).
-define(INTENSITY, 100).

main([Dir, CountText]) ->
    Count = list_to_integer(CountText),
    %% Answers; instances that have answered.
    Answers = counters:new(2, [write_concurrency]),
    Lags = bench_histogram:new(),
    Shared = #{dir => Dir, count => Count, answers => Answers, lags => Lags},
    {ok, _} = bench_sup:start_link(?INTENSITY),
    [{ok, _} = bench_sup:add(Id, Shared) || Id <- lists:seq(1, Count)],
    ready(Count, Answers),
    io:format("ready ~b~n", [Count]),
    Main = self(),
    spawn_link(fun() -> wait_for_end(Main) end),
    tell(Answers, Lags, bench_histogram:snapshot(Lags)).

ready(Count, Answers) ->
    case counters:get(Answers, 2) of
        Up when Up >= Count -> ok;
        _ -> timer:sleep(?LOOK_MS), ready(Count, Answers)
    end.

tell(Answers, Lags, Before) ->
    receive
        stop -> init:stop()
    after ?TELL_MS ->
        Now = bench_histogram:snapshot(Lags),
        io:format("beats ~b lag_p99_us ~b~n",
                  [counters:get(Answers, 1), bench_histogram:percentile(0.99, Before, Now)]),
        tell(Answers, Lags, Now)
    end.

%% Standard input ends with whoever started this.
wait_for_end(Main) ->
    case io:get_line("") of
        eof -> Main ! stop;
        {error, _} -> Main ! stop;
        _ -> wait_for_end(Main)
    end.
