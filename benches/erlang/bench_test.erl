%% SPDX-License-Identifier: Apache-2.0
%% Checks of the codec and of the statistics: run.sh --test.
-module(bench_test).

-include("kmp.hrl").
-export([main/0]).
-compile([export_all, nowarn_export_all]).

-define(V1, {1, 1}).
%% Written by the Rust codec (kmp::frame::Encoder).
-define(REQ,
        "00504d4b01000101090000001b0000004d00000000000000a70c7afa0000000082a76d657472696373c3ab67756172646961"
        "6e5f6d73ce0001d4c0").
-define(HELLO_FRAME,
        "00504d4b01000100000000006d0000000807060504030201372315420000000088ab6d696e5f76657273696f6e01ab6d6178"
        "5f76657273696f6e01a8696e7374616e636507ab696e6361726e6174696f6e00aa626f6f745f6e6f6e636500a4726f6c65a7"
        "636f6e74726f6cac6361706162696c697469657390a772656c65617365ab6b6d6f7270686420302e31").
-define(BYE_FRAME,
        "00504d4b01000300000000001d00000005000000000000007abf21240000000082a6726561736f6eaa646973636f6e6e6563"
        "74a867726163655f6d7300").
-define(RSP,
        "00504d4b01000201feffffff9e0000008877665544332211e387a3a70000000085a3696e632aa575705f6e73cf0000001cbe"
        "991a14a3706964ce00011170a76d65747269637383a363707584a66f6e6c696e6504a462757379ca41480000a56c6f616431"
        "ca3f400000a3707369ca3fc00000a66d656d6f727983a5746f74616ccf0000000200000000a5617661696ccf000000010000"
        "0000a3707369ca3e800000a2696f82a870726f62655f7573ccb4a3707369ca40000000a372737403").

main() ->
    Tests = [F || {F, 0} <- ?MODULE:module_info(functions), lists:suffix("_test", atom_to_list(F))],
    Failed = [T || T <- Tests, not passes(T)],
    io:format("~b tests, ~b failed~n", [length(Tests), length(Failed)]),
    halt(min(1, length(Failed) + if Tests =:= [] -> 1; true -> 0 end)).

passes(Test) ->
    try ?MODULE:Test() of
        _ -> io:format("ok   ~s~n", [Test]), true
    catch
        Class:Why:Stack -> io:format("FAIL ~s: ~p ~p~n  ~p~n", [Test, Class, Why, Stack]), false
    end.

the_catalogue_crc_test() ->
    16#CBF43926 = erlang:crc32(<<"123456789">>).

frames_are_the_rust_codecs_test() ->
    Req = binary:decode_hex(<<?REQ>>),
    Req = encoded(?HEARTBEAT_REQ, 9, 77, kmp_message:heartbeat_req(120000)),
    Hello = binary:decode_hex(<<?HELLO_FRAME>>),
    Hello = encoded(?HELLO, 0, 16#0102030405060708, kmp_message:hello(7, <<"kmorphd 0.1">>)),
    Bye = binary:decode_hex(<<?BYE_FRAME>>),
    Bye = encoded(?BYE, 0, 5, kmp_message:bye()).

a_small_guardian_time_is_a_small_number_test() ->
    Same = fun(Ms, Fields) ->
        Payload = iolist_to_binary(kmp_msgpack:map(Fields)),
        Payload = iolist_to_binary(kmp_message:heartbeat_req(Ms))
    end,
    Metrics = {<<"metrics">>, true},
    Same(0, [Metrics]),
    [Same(Ms, [Metrics, {<<"guardian_ms">>, Ms}]) || Ms <- [1, 127, 128, 255, 256, 8000, 65535, 65536, ?U32]].

the_rust_codecs_answer_is_read_whole_test() ->
    {?HEARTBEAT_RSP, 16#FFFFFFFE, Payload, <<>>} = kmp_frame:next(binary:decode_hex(<<?RSP>>), ?V1),
    Want = #heartbeat_rsp{
        inc = 42, up_ns = 123456789012, pid = 70000, rst = 3,
        metrics = #metrics{cpu = #cpu{online = 4, busy = 12.5, load1 = 0.75, psi = 1.5},
                           memory = #memory{total = 1 bsl 33, avail = 1 bsl 32, psi = 0.25},
                           io = #io{probe_us = 180, psi = 2.0}}},
    Want = kmp_message:read_heartbeat_rsp(Payload).

a_frame_may_come_in_any_pieces_test() ->
    All = <<(binary:decode_hex(<<?RSP>>))/binary, (binary:decode_hex(<<?REQ>>))/binary>>,
    Whole = frames(All, []),
    2 = length(Whole),
    [begin
         <<A:At/binary, B/binary>> = All,
         {Some, Left} = take(A, []),
         Whole = Some ++ frames(<<Left/binary, B/binary>>, [])
     end || At <- lists:seq(0, byte_size(All))],
    %% And byte by byte.
    Whole = lists:reverse(element(1, lists:foldl(
        fun(Byte, {Done, Held}) ->
            {New, Left} = take(<<Held/binary, Byte>>, []),
            {lists:reverse(New) ++ Done, Left}
        end, {[], <<>>}, binary_to_list(All)))).

every_damaged_bit_is_refused_test() ->
    Good = binary:decode_hex(<<?REQ>>),
    Bits = bit_size(Good),
    %% A longer length is more to wait for; its upper bits are too long, the rest waits for a checksum that fails.
    Refused = [begin
         <<A:At/bits, Bit:1, B/bits>> = Good,
         case kmp_frame:next(<<A/bits, (1 - Bit):1, B/bits>>, ?V1) of
             {error, _} -> refused;
             more when At div 8 >= 12, At div 8 < 14 -> waits
         end
     end || At <- lists:seq(0, Bits - 1)],
    Bits = length(Refused),
    true = length([waits || waits <- Refused]) < 16.

what_cannot_be_a_frame_is_refused_at_its_header_test() ->
    Header = fun(Version, Type, Len) ->
        <<0, "PMK", Version:16/little, Type:16/little, 1:32/little, Len:32/little, 0:64, 0:64>>
    end,
    {error, <<"frame has KMP version 9", _/binary>>} = kmp_frame:next(Header(9, ?HEARTBEAT_RSP, 10), ?V1),
    more = kmp_frame:next(Header(9, ?HELLO_ACK, 10), ?V1),
    more = kmp_frame:next(Header(1, ?HEARTBEAT_RSP, 65504), ?V1),
    {error, _} = kmp_frame:next(Header(1, ?HEARTBEAT_RSP, 65505), ?V1),
    {error, <<"frame begins with", _/binary>>} = kmp_frame:next(binary:copy(<<255>>, 32), ?V1),
    more = kmp_frame:next(<<255>>, ?V1).

unknown_fields_are_skipped_test() ->
    Odd = <<16#84, 16#A1, "x", 16#92, 1, 16#81, 16#C0, 16#C7, 2, 5, 0, 0,  % "x": [1, {nil: ext 5}]
            16#D9, 3, "inc", 16#CD, 1:16,                                  % a known name with a long head
            16#A7, "metrics", 16#82, 16#A3, "cpu", 16#82, 16#A1, "z", 16#CB, 1.0/float, 16#A6, "online", 3,
            16#A3, "gpu", 16#C4, 2, 0, 0,
            16#D9, 40, (binary:copy(<<"n">>, 40))/binary, 16#D6, 1, 0:32>>,
    #heartbeat_rsp{inc = 1, up_ns = undefined, metrics = #metrics{cpu = #cpu{online = 3}, memory = undefined}} =
        kmp_message:read_heartbeat_rsp(Odd),
    #heartbeat_rsp{inc = 0} = kmp_message:read_heartbeat_rsp(<<>>),
    #hello_ack{version = 1, instance = 7, incarnation = 0} =
        kmp_message:read_hello_ack(iolist_to_binary(kmp_msgpack:map(
            [{<<"later">>, [1, {f32, 2.5}, nil]}, {<<"version">>, 1}, {<<"instance">>, 7}]))).

bad_payloads_are_refused_test() ->
    Good = binary:part(binary:decode_hex(<<?RSP>>), 32, 158),
    Refused = fun(P) -> {payload, _} = (catch kmp_message:read_heartbeat_rsp(P)) end,
    [Refused(binary:part(Good, 0, N)) || N <- lists:seq(1, 157)],
    Refused(<<Good/binary, 0>>),
    Refused(<<16#81, 16#A3, "inc", 16#A1, "x">>),
    Refused(<<16#81, 16#A3, "rst", 16#CF, (1 bsl 32):64>>),
    Refused(<<16#81, 16#A1, "x", (binary:copy(<<16#91>>, 40))/binary, 0>>).

numbers_come_back_as_they_went_test() ->
    Numbers = [0, 1, 127, 128, 255, 256, 65535, 65536, ?U32, ?U32 + 1, ?U64, -1, -32, -33, -129, -40000, -(1 bsl 40)],
    Map = maps:from_list([{integer_to_binary(N), N} || N <- lists:sublist(Numbers, 12)]),
    Map = kmp_msgpack:read(iolist_to_binary(kmp_msgpack:map(maps:to_list(Map)))),
    [#{<<"n">> := N} = kmp_msgpack:read(iolist_to_binary(kmp_msgpack:map([{<<"n">>, N}]))) || N <- Numbers].

beats_are_counted_as_kmorphd_counts_them_test() ->
    B0 = bench_beats:new(100, 0),
    %% Before the first answer nothing is missed.
    {1, B1} = bench_beats:send(0, B0),
    {0, {silent, 100}, B2} = bench_beats:tick(100, B1),
    {0, false, B3} = bench_beats:tick(101, B2),
    {2, B4} = bench_beats:send(110, B3),
    {first, B5} = bench_beats:answer(2, 3, 113, B4),
    #{sent := 1, received := 1, missed := 0, min := 3, max := 3} = bench_beats:stats(B5),
    {3, B6} = bench_beats:send(150, B5),
    {4, B7} = bench_beats:send(200, B6),
    {2, {silent, 187}, B8} = bench_beats:tick(300, B7),
    {late, B9} = bench_beats:answer(3, 160, 310, B8),
    {5, B10} = bench_beats:send(320, B9),
    {counted, B11} = bench_beats:answer(5, 7, 327, B10),
    #{sent := 4, received := 2, missed := 2, missed_in_row := 0, last := 7, min := 3, max := 7, sum := 10,
      silent := false} = bench_beats:stats(B11).

percentiles_are_of_their_bucket_test() ->
    H = bench_histogram:new(),
    None = bench_histogram:snapshot(H),
    [bench_histogram:record(H, Us * 1000) || Us <- lists:seq(1, 1000)],
    Some = bench_histogram:snapshot(H),
    P99 = bench_histogram:percentile(0.99, None, Some),
    true = P99 >= 990 andalso P99 =< 990 * 1.07,
    0 = bench_histogram:percentile(0.99, Some, Some),
    bench_histogram:record(H, -5),
    bench_histogram:record(H, 1 bsl 60).

encoded(Type, Sequence, Time, Payload) ->
    iolist_to_binary(kmp_frame:encode(1, Type, Sequence, Time, Payload)).

frames(Bytes, Acc) ->
    {Frames, <<>>} = take(Bytes, Acc),
    Frames.

take(Bytes, Acc) ->
    case kmp_frame:next(Bytes, ?V1) of
        {Type, Sequence, Payload, Rest} -> take(Rest, [{Type, Sequence, Payload} | Acc]);
        more -> {lists:reverse(Acc), Bytes}
    end.
