%% SPDX-License-Identifier: Apache-2.0
%% One instance: its connection, its heartbeats, what is known of it.
-module(bench_instance).
-behaviour(gen_server).

-include("kmp.hrl").
-export([start_link/2]).
-export([init/1, handle_call/3, handle_cast/2, handle_info/2, terminate/2]).

-define(PERIOD_MS, 1000).
-define(TIMEOUT_MS, 4000).
%% What kmorphd tells the agent's guardian under the same policy: twice the timeout.
-define(GUARDIAN_MS, 8000).
-define(BACKOFF_MS, {20, 1000}).
-define(VERSIONS, {?VERSION, ?VERSION}).
-define(OPTIONS, [binary, {packet, raw}, {active, true}, {buffer, 512}, {send_timeout, 1000}, {send_timeout_close, true}]).

-record(state, {
    id, path, shared,
    socket, open = false, bytes = <<>>, wait,
    sequence = 0, pending = [],         % {Sequence, Serial, Sent}
    due, beats, incarnation, metrics, restarts = 0, answered
}).

start_link(Id, Shared) ->
    gen_server:start_link(?MODULE, {Id, Shared}, [{spawn_opt, [{fullsweep_after, 0}]}]).

init({Id, Shared = #{dir := Dir, count := Count}}) ->
    Path = filename:join(Dir, integer_to_list(Id + 2) ++ "_" ++ integer_to_list(?PORT)),
    Now = erlang:monotonic_time(),
    %% Spread over the period, then paced by absolute times.
    Due = erlang:monotonic_time(millisecond) + Id * ?PERIOD_MS div Count,
    self() ! connect,
    arm(Due),
    {ok, #state{id = Id, path = Path, shared = Shared, wait = element(1, ?BACKOFF_MS), due = Due,
                beats = bench_beats:new(native(?TIMEOUT_MS), Now)}}.

handle_call(stats, _, S) -> {reply, bench_beats:stats(S#state.beats), S}.

handle_cast(_, S) -> {noreply, S}.

handle_info({timeout, _, beat}, S) -> {noreply, beat(S)};
handle_info({tcp, Socket, Data}, S = #state{socket = Socket}) -> {noreply, received(Data, S)};
handle_info({tcp_closed, Socket}, S = #state{socket = Socket}) -> {noreply, lost(closed, S)};
handle_info({tcp_error, Socket, Why}, S = #state{socket = Socket}) -> {noreply, lost(Why, S)};
handle_info(connect, S = #state{socket = undefined}) -> {noreply, connect(S)};
handle_info(_, S) -> {noreply, S}.

terminate(_, #state{socket = undefined}) -> ok;
terminate(_, S) -> send(?BYE, 0, kmp_message:bye(), S).

%% ---- connection ----

connect(S = #state{path = Path}) ->
    case gen_tcp:connect({local, Path}, 0, ?OPTIONS, 2000) of
        {ok, Socket} ->
            S1 = S#state{socket = Socket, open = false, bytes = <<>>},
            sent(send(?HELLO, 0, kmp_message:hello(S#state.id, <<"erlang">>), S1), S1);
        {error, _} ->
            again(S)
    end.

again(S = #state{wait = Wait}) ->
    erlang:send_after(Wait + rand:uniform(Wait) div 5, self(), connect),
    S#state{wait = min(Wait * 8 div 5, element(2, ?BACKOFF_MS))}.

lost(Why, S = #state{socket = Socket, id = Id}) ->
    logger:warning("instance ~b: connection lost: ~p", [Id, Why]),
    gen_tcp:close(Socket),
    again(S#state{socket = undefined, open = false, bytes = <<>>, pending = []}).

send(Type, Sequence, Payload, #state{socket = Socket}) ->
    gen_tcp:send(Socket, kmp_frame:encode(?VERSION, Type, Sequence, boot_ns(), Payload)).

sent(ok, S) -> S;
sent({error, Why}, S) -> lost(Why, S).

received(Data, S = #state{bytes = <<>>}) -> frames(Data, S);
received(Data, S = #state{bytes = Before}) -> frames(<<Before/binary, Data/binary>>, S).

frames(<<>>, S) ->
    S#state{bytes = <<>>};
frames(Bytes, S) ->
    case kmp_frame:next(Bytes, ?VERSIONS) of
        more -> S#state{bytes = binary:copy(Bytes)};
        {error, Text} -> lost(Text, S);
        {Type, Sequence, Payload, Rest} ->
            try message(Type, Sequence, Payload, S) of
                S1 = #state{socket = undefined} -> S1;
                S1 -> frames(Rest, S1)
            catch
                throw:{payload, What} -> lost({payload, Type, What}, S)
            end
    end.

message(?HELLO_ACK, _, Payload, S = #state{open = false, id = Id}) ->
    case kmp_message:read_hello_ack(Payload) of
        #hello_ack{instance = Id, incarnation = Incarnation} ->
            %% What was asked before there was a connection has no answer.
            ask(S#state{open = true, incarnation = Incarnation, wait = element(1, ?BACKOFF_MS)});
        Other ->
            lost({answered_by, Other}, S)
    end;
message(?HEARTBEAT_RSP, Sequence, Payload, S = #state{open = true}) ->
    answer(Sequence, kmp_message:read_heartbeat_rsp(Payload), S);
message(?HEALTH_STATUS, _, Payload, S) ->
    logger:info("instance ~b: ~p", [S#state.id, kmp_message:read_health_status(Payload)]),
    S;
message(?BYE, Sequence, _, S) ->
    send(?BYE_ACK, Sequence, kmp_message:bye_ack(), S),
    lost(bye, S);
message(?ERROR, _, Payload, S) ->
    lost({error, kmp_message:read_error(Payload)}, S);
message(_, _, _, S) ->
    S.

%% ---- heartbeats ----

beat(S = #state{due = Due, beats = Beats, shared = #{lags := Lags}}) ->
    Now = erlang:monotonic_time(),
    bench_histogram:record(Lags, erlang:convert_time_unit(Now, native, nanosecond) - Due * 1000000),
    {_Missed, Silent, Beats1} = bench_beats:tick(Now, Beats),
    is_tuple(Silent) andalso logger:warning("instance ~b: silent", [S#state.id]),
    Next = Due + ?PERIOD_MS,
    arm(Next),
    ask(S#state{due = Next, beats = Beats1}).

ask(S = #state{open = false}) ->
    S;
ask(S = #state{sequence = Last, pending = Pending, beats = Beats}) ->
    Now = erlang:monotonic_time(),
    Sequence = (Last + 1) band ?U32,
    {Serial, Beats1} = bench_beats:send(Now, Beats),
    S1 = S#state{sequence = Sequence, beats = Beats1,
                 pending = [{Sequence, Serial, Now} | lists:sublist(Pending, 120)]},
    sent(send(?HEARTBEAT_REQ, Sequence, kmp_message:heartbeat_req(?GUARDIAN_MS), S1), S1).

answer(Sequence, Rsp, S = #state{pending = Pending, beats = Beats, incarnation = Incarnation,
                                 shared = #{answers := Answers}}) ->
    #heartbeat_rsp{inc = Life, metrics = Metrics, rst = Restarts} = Rsp,
    case lists:keytake(Sequence, 1, Pending) of
        {value, {_, Serial, Sent}, Rest} when Life =:= 0; Life =:= Incarnation ->
            Now = erlang:monotonic_time(),
            {How, Beats1} = bench_beats:answer(Serial, Now - Sent, Now, Beats),
            counters:add(Answers, 1, 1),
            How =:= first andalso counters:add(Answers, 2, 1),
            Restarts =:= S#state.restarts orelse logger:warning("instance ~b: its agent was restarted", [S#state.id]),
            S#state{pending = Rest, beats = Beats1, answered = Now, restarts = Restarts,
                    metrics = {Now, Metrics}};
        {value, _, Rest} ->
            S#state{pending = Rest};
        false ->
            S
    end.

%% ---- time ----

arm(DueMs) -> erlang:start_timer(DueMs, self(), beat, [{abs, true}]).

native(Ms) -> erlang:convert_time_unit(Ms, millisecond, native).

%% Nanoseconds for frame headers.
boot_ns() -> erlang:monotonic_time(nanosecond) - erlang:system_info(start_time).
