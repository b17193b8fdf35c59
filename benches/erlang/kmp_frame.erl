%% SPDX-License-Identifier: Apache-2.0
%% KMP frames: a 32-byte little-endian header and a payload.
-module(kmp_frame).

-include("kmp.hrl").
-export([encode/5, next/2]).

%% One frame as an iolist. The checksum is over the header with its own field zero, then the payload.
encode(Version, Type, Sequence, TimestampNs, Payload) ->
    Head = <<0, "PMK", Version:16/little, Type:16/little, Sequence:32/little,
             (iolist_size(Payload)):32/little, TimestampNs:64/little>>,
    Crc = erlang:crc32([Head, <<0:64>> | Payload]),
    [Head, <<Crc:32/little, 0:32>> | Payload].

%% The first frame of a byte stream: {Type, Sequence, Payload, Rest}, `more` when it is not whole yet, or
%% {error, Text}, which ends the connection. HELLO, HELLO_ACK and ERROR are read in any version.
next(Bytes, _) when byte_size(Bytes) < ?HEADER_LEN ->
    more;
next(<<0, "PMK", Version:16/little, Type:16/little, Sequence:32/little, Len:32/little, _:64,
       Crc:32/little, _/binary>> = Bytes, {Min, Max}) ->
    if
        (Version < Min orelse Version > Max)
        andalso Type =/= ?HELLO_ACK andalso Type =/= ?HELLO andalso Type =/= ?ERROR ->
            bad("frame has KMP version ~b, expected ~b to ~b", [Version, Min, Max]);
        Len > ?CONTROL_LIMIT - ?HEADER_LEN ->
            bad("frame of type ~.16B announces ~b bytes of payload", [Type, Len]);
        byte_size(Bytes) < ?HEADER_LEN + Len ->
            more;
        true ->
            Covered = Len + 4,
            <<Head:24/binary, _:32, Tail:Covered/binary, Rest/binary>> = Bytes,
            case erlang:crc32([Head, <<0:32>> | Tail]) of
                Crc ->
                    <<_:32, Payload/binary>> = Tail,
                    {Type, Sequence, Payload, Rest};
                Expected ->
                    bad("frame of type ~.16B, sequence ~b, has checksum ~.16B, expected ~.16B",
                          [Type, Sequence, Crc, Expected])
            end
    end;
next(<<Found:32/little, _/binary>>, _) ->
    bad("frame begins with ~.16B, expected the magic number 4B4D5000", [Found]).

bad(Format, Args) ->
    {error, iolist_to_binary(io_lib:format(Format, Args))}.
