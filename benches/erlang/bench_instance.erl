%% SPDX-License-Identifier: Apache-2.0
%% One instance: its connection, its heartbeats, what is known of it.
-module(bench_instance).
-behaviour(gen_server).

-include("kmp.hrl").
-include_lib("kernel/include/logger.hrl").
-export([start_link/1, readings/1]).
-export([init/1, handle_continue/2, handle_call/3, handle_cast/2, handle_info/2, terminate/2]).

%% The policy kmorphd is measured with: heartbeat-timeout 4s, hence one heartbeat a second, distrust of itself when
%% it was a second late, and 8 s for the agent's guardian.
-define(INTERVAL_MS, 1000).
-define(TIMEOUT_MS, 4000).
-define(LAG_LIMIT_MS, 1000).
-define(GUARDIAN_MS, 8000).
%% Longest time for connecting and the HELLO exchange, each.
-define(OPEN_LIMIT_MS, 2000).
%% How long a heartbeat's answer is waited for: later ones are of no use.
-define(BEAT_LIMIT_MS, 120000).
%% Waits between attempts to connect.
-define(RECONNECT_BASE_MS, 20).
-define(RECONNECT_MAX_MS, 1000).
%% Heartbeats are left out when more than this waits to be written; asked only when this many are unanswered.
-define(MAX_BACKLOG, 16384).
-define(SUSPICIOUS, 16).
%% Before HELLO_ACK the versions this side speaks, then the one agreed on. They are the same in version 1.
-define(VERSIONS, {?VERSION, ?VERSION}).

-define(SOCKET, [binary, {packet, raw}, {active, 64}, {buffer, 512}, {high_watermark, 2 * ?MAX_BACKLOG},
                 {low_watermark, ?MAX_BACKLOG div 2}]).

-record(state, {
    id, common,
    socket, phase = closed,             % closed | hello_sent | open
    bytes = <<>>, hello_timer, attempt = 0, said_down = false,
    sequence = 1, pending = [],         % {Sequence, Serial, Sent}, the latest first
    incarnation = 0, beats, answered, metrics, restarts = 0
}).

start_link(Id) ->
    %% fullsweep_after 0: a small heap is copied whole, and no old one is kept beside it.
    #{plain := Plain} = persistent_term:get(bench),
    gen_server:start_link(?MODULE, Id, [{spawn_opt, [{fullsweep_after, 0}]} || not Plain]).

%% What is known of the instance.
readings(Pid) -> gen_server:call(Pid, readings).

%% Hibernation after every answer costs as much as the collection it saves and halves the memory.
init(Id) ->
    process_flag(trap_exit, true),
    %% Shared by all and not copied.
    Common = #{began := Began, count := Count} = persistent_term:get(bench),
    arm(next(Began + Id * ?INTERVAL_MS div Count)),
    Beats = bench_beats:new(native(?TIMEOUT_MS), erlang:monotonic_time()),
    {ok, #state{id = Id, common = Common, beats = Beats}, {continue, connect}}.

handle_continue(connect, S) -> rest(connect(S)).

rest(S = #state{common = #{plain := true}}) -> {noreply, S};
rest(S) -> {noreply, S, hibernate}.

handle_call(readings, _, S = #state{beats = Beats, metrics = Metrics, answered = Answered, restarts = Restarts}) ->
    {reply, #{stats => bench_beats:stats(Beats), answered => Answered, metrics => Metrics,
              agent_restarts => Restarts}, S}.

handle_cast(_, S) -> {noreply, S}.

handle_info({tcp, Socket, Data}, S = #state{socket = Socket, bytes = <<>>}) ->
    rest(frames(Data, S));
handle_info({tcp, Socket, Data}, S = #state{socket = Socket, bytes = Before}) ->
    rest(frames(<<Before/binary, Data/binary>>, S));
handle_info({beat, Due}, S) -> {noreply, beat(Due, S)};
handle_info({tcp_passive, Socket}, S = #state{socket = Socket}) ->
    case inet:setopts(Socket, [{active, 64}]) of
        ok -> {noreply, S};
        {error, Why} -> {noreply, lost(Why, S)}
    end;
handle_info({tcp_closed, Socket}, S = #state{socket = Socket}) ->
    {noreply, lost("the other side closed the stream", S)};
handle_info({tcp_error, Socket, Why}, S = #state{socket = Socket}) -> {noreply, lost(Why, S)};
handle_info({timeout, Timer, hello}, S = #state{hello_timer = Timer}) -> {noreply, lost("no HELLO_ACK in time", S)};
handle_info(connect, S = #state{socket = undefined}) -> {noreply, connect(S)};
handle_info(_, S) -> {noreply, S}.     % of a connection that is gone

terminate(_, S = #state{phase = open}) -> send(?BYE, 0, kmp_message:bye(), S);
terminate(_, _) -> ok.

%% ---- connection ----

connect(S = #state{id = Id, common = #{dir := Dir}}) ->
    Path = filename:join(Dir, [integer_to_list(Id + 2), $_ | integer_to_list(?PORT)]),
    case gen_tcp:connect({local, Path}, 0, ?SOCKET, ?OPEN_LIMIT_MS) of
        {ok, Socket} ->
            Timer = erlang:start_timer(?OPEN_LIMIT_MS, self(), hello),
            S1 = S#state{socket = Socket, phase = hello_sent, hello_timer = Timer},
            sent(send(?HELLO, 0, kmp_message:hello(Id, <<"erlang">>), S1), S1);
        {error, Why} ->
            lost(Why, S)
    end.

%% Say so once, and connect again after 20 ms, growing by 1.6 up to 1 s, each wait up to a fifth shorter.
lost(Why, S = #state{id = Id, socket = Socket, attempt = Attempt, said_down = SaidDown}) ->
    SaidDown orelse ?LOG_WARNING("instance ~b: no connection to the agent: ~0tp", [Id, Why]),
    is_port(Socket) andalso gen_tcp:close(Socket),
    is_reference(S#state.hello_timer) andalso erlang:cancel_timer(S#state.hello_timer),
    Wait = min(?RECONNECT_BASE_MS * math:pow(1.6, min(Attempt, 20)), ?RECONNECT_MAX_MS),
    erlang:send_after(round(Wait * (1 - 0.2 * rand:uniform())), self(), connect),
    S#state{socket = undefined, phase = closed, bytes = <<>>, hello_timer = undefined, attempt = Attempt + 1,
            said_down = true, pending = []}.

%% End the connection and tell the other side why.
refuse(Code, Text, S) ->
    send(?ERROR, 0, kmp_message:refusal(Code, Text), S),
    lost(Text, S).

send(Type, Sequence, Payload, #state{socket = Socket}) ->
    %% For frame headers nanoseconds since boot, as far as Erlang can tell.
    gen_tcp:send(Socket, kmp_frame:encode(?VERSION, Type, Sequence, os:perf_counter(nanosecond), Payload)).

sent(ok, S) -> S;
sent({error, Why}, S) -> lost(Why, S).

frames(Bytes, S) ->
    case kmp_frame:next(Bytes, ?VERSIONS) of
        {Type, Sequence, Payload, Rest} ->
            case message(Type, Sequence, Payload, S) of
                S1 when S1#state.phase =:= closed -> S1;
                S1 when Rest =:= <<>> -> S1#state{bytes = <<>>};
                S1 -> frames(Rest, S1)
            end;
        more -> S#state{bytes = Bytes};
        {error, Text} -> refuse(<<"protocol">>, Text, S)
    end.

message(Type, Sequence, Payload, S = #state{phase = Phase, id = Id}) ->
    try message(Phase, Type, Sequence, Payload, S)
    catch
        throw:{payload, What} when Phase =:= open ->
            ?LOG_DEBUG("instance ~b: message ~.16B, sequence ~b, left unread: ~0tp", [Id, Type, Sequence, What]),
            S;
        throw:{payload, What} ->
            refuse(<<"protocol">>, iolist_to_binary(io_lib:format("payload: ~0tp", [What])), S)
    end.

message(open, ?HEARTBEAT_RSP, Sequence, Payload, S) ->
    answer(Sequence, kmp_message:read_heartbeat_rsp(Payload), S);
message(open, ?HEALTH_STATUS, _, Payload, S) ->
    {Level, Reason, _} = kmp_message:read_health_status(Payload),
    ?LOG_INFO("instance ~b: the agent reports its health: ~ts, ~ts", [S#state.id, Level, Reason]),
    S;
message(open, ?ERROR, _, Payload, S) ->
    {Code, Text} = kmp_message:read_error(Payload),
    ?LOG_DEBUG("instance ~b: the agent reports an error: ~ts, ~ts", [S#state.id, Code, Text]),
    S;
message(open, ?BYE, _, _, S) ->
    send(?BYE_ACK, 0, kmp_message:bye_ack(), S),
    lost("the agent said goodbye", S);
message(hello_sent, ?HELLO_ACK, _, Payload, S) ->
    hello_ack(kmp_message:read_hello_ack(Payload), S);
message(hello_sent, ?ERROR, _, Payload, S) ->
    {_, Text} = kmp_message:read_error(Payload),
    lost(Text, S);
message(Phase, Type, _, _, S) when Phase =:= hello_sent; Type =< ?BYE_ACK ->
    Text = io_lib:format("message type ~.16B is not allowed while the connection is ~s", [Type, Phase]),
    refuse(<<"protocol">>, iolist_to_binary(Text), S);
message(open, Type, _, _, S) ->
    ?LOG_DEBUG("instance ~b: message of type ~.16B is of no use here", [S#state.id, Type]),
    S.

%% Is this the instance that is wanted?
hello_ack(#hello_ack{version = V}, S) when V =/= ?VERSION ->
    refuse(<<"version">>, <<"no common KMP version">>, S);
hello_ack(#hello_ack{instance = Instance, role = Role}, S = #state{id = Id})
        when Instance =/= Id, Instance =/= 0; Role =/= <<"control">> ->
    refuse(<<"wrong-instance">>, <<"another instance or role is on the other side">>, S);
hello_ack(#hello_ack{incarnation = Incarnation, release = Release}, S = #state{id = Id, hello_timer = Timer}) ->
    ?LOG_INFO("instance ~b: agent connected: incarnation ~b, release ~ts", [Id, Incarnation, Release]),
    erlang:cancel_timer(Timer),
    S1 = S#state{phase = open, hello_timer = undefined, attempt = 0, said_down = false, sequence = 1,
                 incarnation = Incarnation},
    ask(erlang:monotonic_time(), another_life(S, S1)).

%% Another life of the instance is measured anew.
another_life(#state{incarnation = Was}, S = #state{incarnation = Is}) when Was =:= Is; Was =:= 0 ->
    S;
another_life(_, S) ->
    S#state{beats = bench_beats:new(native(?TIMEOUT_MS), erlang:monotonic_time()), answered = undefined,
            metrics = undefined, restarts = 0}.

%% ---- heartbeats ----

beat(Due, S = #state{id = Id, beats = Beats, common = #{lags := Lags}}) ->
    Now = erlang:monotonic_time(),
    Lag = Now - native(Due),
    bench_histogram:record(Lags, Lag),
    arm(next(Due + ?INTERVAL_MS)),
    {_Missed, Silent, Beats1} = bench_beats:tick(Now, trusted(Lag, Now, Id, Beats)),
    is_tuple(Silent) andalso ?LOG_WARNING("instance ~b: the agent is silent: ~0p", [Id, Silent]),
    ask(Now, S#state{beats = Beats1}).

trusted(Lag, Now, Id, Beats) ->
    case Lag > native(?LAG_LIMIT_MS) of
        true ->
            ?LOG_WARNING("instance ~b: the supervisor itself was ~b ns late: measuring anew", [Id, Lag]),
            bench_beats:remeasure(Now, Beats);
        false -> Beats
    end.

%% Without a connection a heartbeat has no answer.
ask(Now, S = #state{beats = Beats, phase = Phase, pending = Pending}) ->
    {Serial, Beats1} = bench_beats:send(Now, Beats),
    S1 = S#state{beats = Beats1},
    case Phase =:= open andalso has_room(Pending, S) of
        true -> request(Now, Serial, S1);
        false -> S1
    end.

request(Now, Serial, S = #state{sequence = Sequence, pending = Pending}) ->
    S1 = S#state{sequence = max(1, (Sequence + 1) band ?U32),
                 pending = [{Sequence, Serial, Now} | waited_for(Now, Pending)]},
    sent(send(?HEARTBEAT_REQ, Sequence, kmp_message:heartbeat_req(?GUARDIAN_MS), S1), S1).

waited_for(_, []) -> [];
waited_for(Now, Pending) ->
    Limit = Now - native(?BEAT_LIMIT_MS),
    lists:takewhile(fun({_, _, Sent}) -> Sent > Limit end, Pending).

has_room(Pending, _) when length(Pending) =< ?SUSPICIOUS -> true;
has_room(_, #state{socket = Socket}) ->
    case inet:getstat(Socket, [send_pend]) of
        {ok, [{send_pend, Bytes}]} -> Bytes =< ?MAX_BACKLOG;
        {error, _} -> false
    end.

answer(Sequence, #heartbeat_rsp{inc = Life, rst = Restarts, metrics = Metrics}, S = #state{pending = Pending}) ->
    case lists:keytake(Sequence, 1, Pending) of
        {value, {_, Serial, Sent}, Rest} when Life =:= 0; Life =:= S#state.incarnation ->
            Now = erlang:monotonic_time(),
            Beats = answered(Serial, Now - Sent, Now, S),
            Restarts =:= S#state.restarts
                orelse ?LOG_NOTICE("instance ~b: agent restarted, ~b times by now", [S#state.id, Restarts]),
            S#state{pending = Rest, beats = Beats, answered = Now, restarts = Restarts,
                    metrics = latest(Metrics, Now, S#state.metrics)};
        {value, _, Rest} ->
            ?LOG_DEBUG("instance ~b: answer of another life ignored: ~b", [S#state.id, Life]),
            S#state{pending = Rest};
        false -> S
    end.

answered(Serial, Rtt, Now, #state{id = Id, beats = Beats, common = #{rtts := Rtts, up := Up, answers := Answers}}) ->
    {How, Beats1} = bench_beats:answer(Serial, Rtt, Now, Beats),
    How =:= first andalso atomics:put(Up, Id, 1),
    How =/= late andalso bench_histogram:record(Rtts, Rtt),
    How =/= late andalso counters:add(Answers, 1, 1),
    Beats1.

latest(#metrics{cpu = undefined, memory = undefined, io = undefined}, _, Before) -> Before;
latest(Metrics, Now, _) -> {Now, Metrics}.

%% ---- time ----

%% Beats are due at absolute times, so they do not drift; what is overdue by more than a beat is left out.
next(Due) ->
    case erlang:monotonic_time(millisecond) - Due of
        Late when Late >= ?INTERVAL_MS -> Due + (Late div ?INTERVAL_MS) * ?INTERVAL_MS;
        _ -> Due
    end.

arm(Due) -> erlang:send_after(Due, self(), {beat, Due}, [{abs, true}]).

%% The native unit is the nanosecond on Linux; bench:main/1 makes sure.
native(Ms) -> Ms * 1000000.
