%% SPDX-License-Identifier: Apache-2.0
%% MessagePack, as far as KMP uses it. Readers exit by throw({payload, What}).
-module(kmp_msgpack).

-export([map/1, read/1, map_size_of/1, key/1, uint/2, real/1, optional/2, skip/1]).

%% Deepest nesting a payload may have.
-define(MAX_DEPTH, 32).

%% ---- writing ----

%% A map from its fields in order. Values: booleans, integers, {f32, F}, binaries (str), lists (array).
map(Fields) when length(Fields) < 16 ->
    [16#80 + length(Fields) | [[value(K) | value(V)] || {K, V} <- Fields]].

value(true) -> [16#C3];
value(false) -> [16#C2];
value(nil) -> [16#C0];
value({f32, F}) -> <<16#CA, F:32/float>>;
value(N) when is_integer(N) -> integer(N);
value(S) when is_binary(S) -> string(S, byte_size(S));
value(L) when is_list(L), length(L) < 16 -> [16#90 + length(L) | [value(V) || V <- L]].

integer(N) when N >= 0, N < 16#80 -> <<N>>;
integer(N) when N >= 0, N =< 16#FF -> <<16#CC, N>>;
integer(N) when N >= 0, N =< 16#FFFF -> <<16#CD, N:16>>;
integer(N) when N >= 0, N =< 16#FFFFFFFF -> <<16#CE, N:32>>;
integer(N) when N >= 0 -> <<16#CF, N:64>>;
integer(N) when N >= -32 -> <<N>>;
integer(N) -> <<16#D3, N:64>>.

string(S, N) when N < 32 -> <<(16#A0 + N), S/binary>>;
string(S, N) when N =< 16#FF -> <<16#D9, N, S/binary>>;
string(S, N) when N =< 16#FFFF -> <<16#DA, N:16, S/binary>>;
string(S, N) -> <<16#DB, N:32, S/binary>>.

%% ---- reading a whole payload ----

%% The map a payload is; an empty one has no fields. Nothing may follow.
read(<<>>) -> #{};
read(Payload) ->
    case term(Payload, ?MAX_DEPTH) of
        {Map, <<>>} when is_map(Map) -> Map;
        {Map, Rest} when is_map(Map) -> bad({bytes_follow, byte_size(Rest)});
        {Other, _} -> bad({no_map, Other})
    end.

term(_, 0) -> bad(too_deep);
term(<<0:1, N:7, R/binary>>, _) -> {N, R};
term(<<7:3, N:5, R/binary>>, _) -> {N - 32, R};
term(<<5:3, L:5, S:L/binary, R/binary>>, _) -> {S, R};
term(<<8:4, N:4, R/binary>>, D) -> fields(N, R, D - 1, #{});
term(<<9:4, N:4, R/binary>>, D) -> items(N, R, D - 1, []);
term(<<16#C0, R/binary>>, _) -> {nil, R};
term(<<16#C2, R/binary>>, _) -> {false, R};
term(<<16#C3, R/binary>>, _) -> {true, R};
term(<<16#C4, L, S:L/binary, R/binary>>, _) -> {{bin, S}, R};
term(<<16#C5, L:16, S:L/binary, R/binary>>, _) -> {{bin, S}, R};
term(<<16#C6, L:32, S:L/binary, R/binary>>, _) -> {{bin, S}, R};
term(<<16#CA, F:32/float, R/binary>>, _) -> {F, R};
term(<<16#CB, F:64/float, R/binary>>, _) -> {F, R};
term(<<16#CA, _:32, R/binary>>, _) -> {nan, R};
term(<<16#CB, _:64, R/binary>>, _) -> {nan, R};
term(<<16#CC, N, R/binary>>, _) -> {N, R};
term(<<16#CD, N:16, R/binary>>, _) -> {N, R};
term(<<16#CE, N:32, R/binary>>, _) -> {N, R};
term(<<16#CF, N:64, R/binary>>, _) -> {N, R};
term(<<16#D0, N/signed, R/binary>>, _) -> {N, R};
term(<<16#D1, N:16/signed, R/binary>>, _) -> {N, R};
term(<<16#D2, N:32/signed, R/binary>>, _) -> {N, R};
term(<<16#D3, N:64/signed, R/binary>>, _) -> {N, R};
term(<<16#D9, L, S:L/binary, R/binary>>, _) -> {S, R};
term(<<16#DA, L:16, S:L/binary, R/binary>>, _) -> {S, R};
term(<<16#DB, L:32, S:L/binary, R/binary>>, _) -> {S, R};
term(<<16#DC, N:16, R/binary>>, D) -> items(N, R, D - 1, []);
term(<<16#DD, N:32, R/binary>>, D) -> items(N, R, D - 1, []);
term(<<16#DE, N:16, R/binary>>, D) -> fields(N, R, D - 1, #{});
term(<<16#DF, N:32, R/binary>>, D) -> fields(N, R, D - 1, #{});
term(Bytes, _) ->
    case extension(Bytes) of
        {L, R} when byte_size(R) > L ->
            <<_, _:L/binary, Rest/binary>> = R,
            {extension, Rest};
        _ -> bad(cut_short)
    end.

%% Length of an extension and what follows it, the type byte first.
extension(<<16#C7, L, R/binary>>) -> {L, R};
extension(<<16#C8, L:16, R/binary>>) -> {L, R};
extension(<<16#C9, L:32, R/binary>>) -> {L, R};
extension(<<T, R/binary>>) when T >= 16#D4, T =< 16#D8 -> {1 bsl (T - 16#D4), R};
extension(_) -> none.

items(0, R, _, Acc) -> {lists:reverse(Acc), R};
items(N, B, D, Acc) ->
    {V, R} = term(B, D),
    items(N - 1, R, D, [V | Acc]).

fields(0, R, _, Acc) -> {Acc, R};
fields(N, B, D, Acc) ->
    {K, R1} = term(B, D),
    {V, R2} = term(R1, D),
    fields(N - 1, R2, D, Acc#{K => V}).

%% ---- reading field by field, without building terms ----

map_size_of(<<8:4, N:4, R/binary>>) -> {N, R};
map_size_of(<<16#DE, N:16, R/binary>>) -> {N, R};
map_size_of(<<16#DF, N:32, R/binary>>) -> {N, R};
map_size_of(_) -> bad(no_map).

%% A key no reader knew as a short string: the same bytes with a short head, or what follows an unknown one.
key(<<5:3, L:5, _:L/binary, R/binary>>) -> {unknown, R};
key(<<16#D9, L, S:L/binary, R/binary>>) when L < 32 -> {again, <<5:3, L:5, S/binary, R/binary>>};
key(<<16#DA, L:16, S:L/binary, R/binary>>) when L < 32 -> {again, <<5:3, L:5, S/binary, R/binary>>};
key(<<16#DB, L:32, S:L/binary, R/binary>>) when L < 32 -> {again, <<5:3, L:5, S/binary, R/binary>>};
key(<<T, _/binary>> = B) when T >= 16#D9, T =< 16#DB -> {unknown, skip(B)};
key(_) -> bad(no_field_name).

uint(<<0:1, N:7, R/binary>>, _) -> {N, R};
uint(<<16#CC, N, R/binary>>, _) -> {N, R};
uint(<<16#CD, N:16, R/binary>>, _) -> {N, R};
uint(<<16#CE, N:32, R/binary>>, Max) when N =< Max -> {N, R};
uint(<<16#CF, N:64, R/binary>>, Max) when N =< Max -> {N, R};
uint(B, Max) ->
    case term(B, ?MAX_DEPTH) of
        {N, R} when is_integer(N), N >= 0, N =< Max -> {N, R};
        {Other, _} -> bad({no_number, Other})
    end.

real(<<16#CA, F:32/float, R/binary>>) -> {F, R};
real(<<16#CB, F:64/float, R/binary>>) -> {F, R};
real(B) ->
    case term(B, ?MAX_DEPTH) of
        {N, R} when is_number(N) -> {N * 1.0, R};
        {nan, R} -> {nan, R};
        {Other, _} -> bad({no_number, Other})
    end.

%% nil is absent.
optional(_, <<16#C0, R/binary>>) -> {undefined, R};
optional(Read, B) -> Read(B).

%% What follows one value.
skip(B) -> element(2, term(B, ?MAX_DEPTH)).

bad(What) -> throw({payload, What}).
