%% SPDX-License-Identifier: Apache-2.0
%% Starts the instances, says `ready` when all have answered, and then every five seconds how it goes.
-module(bench_report).
-behaviour(gen_server).

-export([start_link/0]).
-export([init/1, handle_continue/2, handle_call/3, handle_cast/2, handle_info/2]).

-define(LOOK_MS, 50).
-define(TELL_MS, 5000).

start_link() -> gen_server:start_link(?MODULE, [], []).

init([]) -> {ok, waiting, {continue, start}}.

%% After a failure of this process alone the instances are still there.
handle_continue(start, waiting) ->
    #{count := Count} = persistent_term:get(bench),
    bench_sup:instances() > 0 orelse [{ok, _} = bench_sup:add(Id) || Id <- lists:seq(1, Count)],
    self() ! look,
    {noreply, waiting}.

handle_call(_, _, S) -> {noreply, S}.
handle_cast(_, S) -> {noreply, S}.

handle_info(look, waiting) ->
    #{count := Count, up := Up, lags := Lags} = persistent_term:get(bench),
    case lists:all(fun(Id) -> atomics:get(Up, Id) =:= 1 end, lists:seq(1, Count)) of
        true ->
            io:format("ready ~b~n", [Count]),
            {noreply, {arm(erlang:monotonic_time(millisecond)), bench_histogram:snapshot(Lags)}, hibernate};
        false ->
            erlang:send_after(?LOOK_MS, self(), look),
            {noreply, waiting}
    end;
handle_info(tell, {Due, Before}) ->
    #{answers := Answers, lags := Lags} = persistent_term:get(bench),
    Now = bench_histogram:snapshot(Lags),
    io:format("beats ~b lag_p99_us ~b~n", [counters:get(Answers, 1), bench_histogram:percentile(0.99, Before, Now)]),
    {noreply, {arm(Due), Now}, hibernate};
handle_info(_, S) ->
    {noreply, S}.

arm(Before) ->
    Due = Before + ?TELL_MS,
    erlang:send_after(Due, self(), tell, [{abs, true}]),
    Due.
