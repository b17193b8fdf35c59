%% SPDX-License-Identifier: Apache-2.0
%% Paces heartbeats and judges their answers, as BeatTracker of kmorphd does (actors/src/core/measure.rs).
%% Times are native units of erlang:monotonic_time/0.
-module(bench_beats).

-export([new/2, send/2, answer/4, tick/2, remeasure/2, stats/1]).

-record(stats, {sent = 0, received = 0, missed = 0, missed_in_row = 0, last, min, max, sum = 0}).
-record(beats, {
    timeout,
    serial = 0,
    open = [],          % requests without an answer, oldest first: {Serial, Sent}
    since,
    answered,
    silent = false,
    stats = #stats{}
}).

new(Timeout, Now) ->
    #beats{timeout = Timeout, since = Now}.

%% Whoever looks was late: silence counts from now on.
remeasure(Now, B = #beats{open = Open}) ->
    B#beats{since = Now, silent = false, open = [{Serial, Now} || {Serial, _} <- Open]}.

%% A request goes out.
send(Now, B = #beats{serial = Last, open = Open, stats = S}) ->
    Serial = Last + 1,
    {Serial, B#beats{serial = Serial, open = Open ++ [{Serial, Now}], stats = S#stats{sent = S#stats.sent + 1}}}.

%% An answer came: {first | counted | late, Beats}. A late one still proves life.
answer(Serial, Rtt, Now, B0 = #beats{open = Open, answered = Before, stats = S0}) ->
    B = B0#beats{since = Now, silent = false, answered = Now},
    case lists:keytake(Serial, 1, Open) of
        false ->
            {late, B};
        {value, _, _} when Before =:= undefined ->
            %% What was asked while the kernel started could not be answered and was not missed.
            {first, B#beats{open = [], stats = count(Rtt, #stats{sent = 1})}};
        {value, _, Rest} ->
            {counted, B#beats{open = Rest, stats = count(Rtt, S0)}}
    end.

count(Rtt, S = #stats{received = Received, min = Min, max = Max, sum = Sum}) ->
    S#stats{received = Received + 1, missed_in_row = 0, last = Rtt, min = min(Rtt, Min),
            max = if Max =:= undefined -> Rtt; true -> max(Rtt, Max) end, sum = Sum + Rtt}.

%% Requests that had their time: {how many were missed just now, false | {silent, Age}, Beats}.
tick(Now, B = #beats{timeout = Timeout, since = Since, silent = Was, open = Open, answered = Answered,
                     stats = S}) ->
    {Expired, Rest} = expired(Now - Timeout, Open, 0),
    Missed = if Answered =:= undefined -> 0; true -> Expired end,
    Age = Now - Since,
    Silent = not Was andalso Age >= Timeout,
    if
        Expired =:= 0, not Silent ->
            {0, false, B};
        true ->
            Stats = S#stats{missed = S#stats.missed + Missed, missed_in_row = S#stats.missed_in_row + Missed},
            {Missed, Silent andalso {silent, Age}, B#beats{open = Rest, silent = Was or Silent, stats = Stats}}
    end.

expired(Limit, [{_, Sent} | Rest], N) when Sent =< Limit -> expired(Limit, Rest, N + 1);
expired(_, Rest, N) -> {N, Rest}.

stats(#beats{stats = #stats{sent = Sent, received = Received, missed = Missed, missed_in_row = Row, last = Last,
                            min = Min, max = Max, sum = Sum}, answered = Answered, silent = Silent}) ->
    #{sent => Sent, received => Received, missed => Missed, missed_in_row => Row, last => Last, min => Min,
      max => Max, sum => Sum, answered => Answered, silent => Silent}.
