%% SPDX-License-Identifier: Apache-2.0
%% Supervises COUNT instances behind the sockets in a folder, until standard input ends or SIGTERM comes.
-module(bench).
-behaviour(application).

-export([main/0, start/2, stop/1]).

main() ->
    %% With -noshell an application that cannot start must end the VM itself.
    case init:get_plain_arguments() of
        [Dir, Text] ->
            Application = {application, bench, [{mod, {bench, {Dir, list_to_integer(Text)}}}, {registered, []},
                                                {applications, [kernel, stdlib]}, {vsn, "1"}]},
            ok = application:load(Application),
            ok = application:start(bench, permanent);
        Other ->
            io:format(standard_error, "bench: a folder and a number are needed, not ~p~n", [Other]),
            halt(2)
    end.

start(_, {Dir, Count}) when Count > 0, Count =< 65533 ->
    1000000000 = erlang:convert_time_unit(1, second, native),
    persistent_term:put(bench, #{
        dir => Dir,
        count => Count,
        plain => os:getenv("KMORPH_BENCH_PLAIN", "") =/= "",
        began => erlang:monotonic_time(millisecond),
        up => atomics:new(Count, []),           % 1 for an instance that has answered
        answers => counters:new(1, [write_concurrency]),
        lags => bench_histogram:new(),
        rtts => bench_histogram:new()
    }),
    {ok, Tree} = bench_sup:start_link(tree),
    spawn_link(fun until_input_ends/0),
    {ok, Tree}.

stop(_) -> ok.

until_input_ends() ->
    case io:get_line("") of
        eof -> init:stop();
        {error, _} -> init:stop();
        _ -> until_input_ends()
    end.
