%% SPDX-License-Identifier: Apache-2.0
%% The Kernel Morphing Protocol, version 1 (docs/protocol.md).

-define(VERSION, 1).
-define(PORT, 9000).
-define(HEADER_LEN, 32).
%% Longest frame on a control connection, header included.
-define(CONTROL_LIMIT, 65536).

-define(HELLO, 16#0001).
-define(HELLO_ACK, 16#0002).
-define(BYE, 16#0003).
-define(BYE_ACK, 16#0004).
-define(HEARTBEAT_REQ, 16#0101).
-define(HEARTBEAT_RSP, 16#0102).
-define(HEALTH_STATUS, 16#0103).
-define(ERROR, 16#0F00).

-define(U16, 16#FFFF).
-define(U32, 16#FFFFFFFF).
-define(U64, 16#FFFFFFFFFFFFFFFF).

-record(cpu, {online = 0, busy = 0.0, load1 = 0.0, psi}).
-record(memory, {total = 0, avail = 0, psi}).
-record(io, {probe_us = 0, psi}).
-record(metrics, {cpu, memory, io}).
-record(heartbeat_rsp, {inc = 0, up_ns, pid, metrics = #metrics{}, rst = 0}).
-record(hello_ack, {version = 0, instance = 0, incarnation = 0, boot_nonce = 0, role = <<"control">>,
                    capabilities = [], release = <<>>}).
