%% SPDX-License-Identifier: Apache-2.0
%% Payloads of the messages a supervisor sends and reads on a control connection.
-module(kmp_message).

-include("kmp.hrl").
-export([hello/2, bye/0, bye_ack/0, refusal/2, heartbeat_req/1, read_hello_ack/1, read_heartbeat_rsp/1,
         read_error/1, read_health_status/1]).

hello(Instance, Release) ->
    kmp_msgpack:map([{<<"min_version">>, ?VERSION}, {<<"max_version">>, ?VERSION},
                     {<<"instance">>, Instance}, {<<"incarnation">>, 0}, {<<"boot_nonce">>, 0},
                     {<<"role">>, <<"control">>}, {<<"capabilities">>, []}, {<<"release">>, Release}]).

bye() ->
    kmp_msgpack:map([{<<"reason">>, <<"disconnect">>}, {<<"grace_ms">>, 0}]).

bye_ack() ->
    kmp_msgpack:map([{<<"detail">>, <<>>}]).

refusal(Code, Text) ->
    kmp_msgpack:map([{<<"code">>, Code}, {<<"message">>, Text}]).

%% Written out, because it is sent ten thousand times a second. Metrics are always wanted.
heartbeat_req(0) ->
    <<16#81, 16#A7, "metrics", 16#C3>>;
heartbeat_req(GuardianMs) when GuardianMs > ?U16 ->
    <<16#82, 16#A7, "metrics", 16#C3, 16#AB, "guardian_ms", 16#CE, GuardianMs:32>>;
heartbeat_req(GuardianMs) ->
    kmp_msgpack:map([{<<"metrics">>, true}, {<<"guardian_ms">>, GuardianMs}]).

read_hello_ack(Payload) ->
    M = kmp_msgpack:read(Payload),
    Role = maps:get(<<"role">>, M, <<"control">>),
    lists:member(Role, [<<"control">>, <<"bulk">>]) orelse throw({payload, {role, Role}}),
    #hello_ack{version = number(<<"version">>, ?U16, M), instance = number(<<"instance">>, ?U16, M),
               incarnation = number(<<"incarnation">>, ?U64, M),
               boot_nonce = number(<<"boot_nonce">>, ?U64, M), role = Role,
               capabilities = maps:get(<<"capabilities">>, M, []), release = text(<<"release">>, M)}.

%% {Code, Text}
read_error(Payload) ->
    M = kmp_msgpack:read(Payload),
    {text(<<"code">>, M), text(<<"message">>, M)}.

%% {Level, Reason, Metrics}
read_health_status(Payload) ->
    M = kmp_msgpack:read(Payload),
    {text(<<"level">>, M), text(<<"reason">>, M), maps:get(<<"metrics">>, M, #{})}.

number(Key, Max, M) ->
    case M of
        #{Key := N} when is_integer(N), N >= 0, N =< Max -> N;
        #{Key := Other} -> throw({payload, {Key, Other}});
        #{} -> 0
    end.

%% A copy: a part of a payload would keep all of it.
text(Key, M) ->
    case M of
        #{Key := T} when is_binary(T) -> binary:copy(T);
        #{Key := Other} -> throw({payload, {Key, Other}});
        #{} -> <<>>
    end.

%% The one that matters for speed: field by field into records, nothing built in between.
read_heartbeat_rsp(<<>>) ->
    #heartbeat_rsp{};
read_heartbeat_rsp(Payload) ->
    {N, B} = kmp_msgpack:map_size_of(Payload),
    case rsp(N, B, #heartbeat_rsp{}) of
        {Rsp, <<>>} -> Rsp;
        {_, Rest} -> throw({payload, {bytes_follow, byte_size(Rest)}})
    end.

rsp(0, B, R) -> {R, B};
rsp(N, <<16#A3, "inc", B/binary>>, R) ->
    {V, B1} = kmp_msgpack:uint(B, ?U64),
    rsp(N - 1, B1, R#heartbeat_rsp{inc = V});
rsp(N, <<16#A5, "up_ns", B/binary>>, R) ->
    {V, B1} = kmp_msgpack:optional(fun(X) -> kmp_msgpack:uint(X, ?U64) end, B),
    rsp(N - 1, B1, R#heartbeat_rsp{up_ns = V});
rsp(N, <<16#A3, "pid", B/binary>>, R) ->
    {V, B1} = kmp_msgpack:optional(fun(X) -> kmp_msgpack:uint(X, ?U32) end, B),
    rsp(N - 1, B1, R#heartbeat_rsp{pid = V});
rsp(N, <<16#A7, "metrics", B/binary>>, R) ->
    {Size, B1} = kmp_msgpack:map_size_of(B),
    {V, B2} = metrics(Size, B1, #metrics{}),
    rsp(N - 1, B2, R#heartbeat_rsp{metrics = V});
rsp(N, <<16#A3, "rst", B/binary>>, R) ->
    {V, B1} = kmp_msgpack:uint(B, ?U32),
    rsp(N - 1, B1, R#heartbeat_rsp{rst = V});
rsp(N, B, R) ->
    other(fun rsp/3, N, B, R).

metrics(0, B, M) -> {M, B};
metrics(N, <<16#A3, "cpu", B/binary>>, M) ->
    {V, B1} = optional_map(fun cpu/3, #cpu{}, B),
    metrics(N - 1, B1, M#metrics{cpu = V});
metrics(N, <<16#A6, "memory", B/binary>>, M) ->
    {V, B1} = optional_map(fun memory/3, #memory{}, B),
    metrics(N - 1, B1, M#metrics{memory = V});
metrics(N, <<16#A2, "io", B/binary>>, M) ->
    {V, B1} = optional_map(fun io/3, #io{}, B),
    metrics(N - 1, B1, M#metrics{io = V});
metrics(N, B, M) ->
    other(fun metrics/3, N, B, M).

optional_map(_, _, <<16#C0, B/binary>>) -> {undefined, B};
optional_map(Read, Default, B) ->
    {N, B1} = kmp_msgpack:map_size_of(B),
    Read(N, B1, Default).

cpu(0, B, C) -> {C, B};
cpu(N, <<16#A6, "online", B/binary>>, C) ->
    {V, B1} = kmp_msgpack:uint(B, ?U32),
    cpu(N - 1, B1, C#cpu{online = V});
cpu(N, <<16#A4, "busy", B/binary>>, C) ->
    {V, B1} = kmp_msgpack:real(B),
    cpu(N - 1, B1, C#cpu{busy = V});
cpu(N, <<16#A5, "load1", B/binary>>, C) ->
    {V, B1} = kmp_msgpack:real(B),
    cpu(N - 1, B1, C#cpu{load1 = V});
cpu(N, <<16#A3, "psi", B/binary>>, C) ->
    {V, B1} = kmp_msgpack:optional(fun kmp_msgpack:real/1, B),
    cpu(N - 1, B1, C#cpu{psi = V});
cpu(N, B, C) ->
    other(fun cpu/3, N, B, C).

memory(0, B, M) -> {M, B};
memory(N, <<16#A5, "total", B/binary>>, M) ->
    {V, B1} = kmp_msgpack:uint(B, ?U64),
    memory(N - 1, B1, M#memory{total = V});
memory(N, <<16#A5, "avail", B/binary>>, M) ->
    {V, B1} = kmp_msgpack:uint(B, ?U64),
    memory(N - 1, B1, M#memory{avail = V});
memory(N, <<16#A3, "psi", B/binary>>, M) ->
    {V, B1} = kmp_msgpack:optional(fun kmp_msgpack:real/1, B),
    memory(N - 1, B1, M#memory{psi = V});
memory(N, B, M) ->
    other(fun memory/3, N, B, M).

io(0, B, I) -> {I, B};
io(N, <<16#A8, "probe_us", B/binary>>, I) ->
    {V, B1} = kmp_msgpack:uint(B, ?U64),
    io(N - 1, B1, I#io{probe_us = V});
io(N, <<16#A3, "psi", B/binary>>, I) ->
    {V, B1} = kmp_msgpack:optional(fun kmp_msgpack:real/1, B),
    io(N - 1, B1, I#io{psi = V});
io(N, B, I) ->
    other(fun io/3, N, B, I).

%% A field the reader does not know, or one it knows with a long head.
other(Read, N, B, Acc) ->
    case kmp_msgpack:key(B) of
        {again, B1} -> Read(N, B1, Acc);
        {unknown, B1} -> Read(N - 1, kmp_msgpack:skip(B1), Acc)
    end.
