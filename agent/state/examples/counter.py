#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Counts, and goes on counting when kmorph replaces the kernel under it (docs/state.md).

Every line of a client is answered with the next number. Clients keep their connections, too: publish
the port with `--publish tcp:8080=vsock:5000,sessions`.
"""

import argparse
import hashlib
import json
import os
import socket
import struct
import sys
import threading
import time

LINE_LIMIT = 1024  # of the agent's lines, and of a client's
PIECE_LIMIT = 256 << 10  # bytes of a piece of state
FRAME_LIMIT = 64 << 10  # bytes of a frame of a session
WINDOW = 256 << 10  # answers that may be kept because the switch has not confirmed them
CONFIRM = 32 << 10  # bytes of requests that are confirmed at the latest
HEAD = struct.Struct("<IIQ")  # head of a frame: length, flags, confirmed
LONGEST_GAP = 1.0  # seconds between two changes of the state when it is throttled
END = 1  # flag: nothing comes after this frame


class Refused(Exception):
    """An order that cannot be carried out. The text is for the operator."""


class Session:
    """A client's connection, whichever kernel carries it."""

    def __init__(self, consumed=0, first=0, ended=False, answers=""):
        self.consumed = consumed  # bytes of requests that were taken
        self.first = first  # number of the first byte in answers
        self.ended = ended  # there will be no more answers
        self.answers = bytearray(answers.encode())  # sent, and not confirmed
        self.carrier = None  # the connection it is carried by; None: its client has not come back yet

    def confirm(self, until):
        if not self.first <= until <= self.first + len(self.answers):
            raise ValueError(f"bytes up to {until} were never sent")
        del self.answers[: until - self.first]
        self.first = until

    def saved(self):
        return [self.consumed, self.first, self.ended, self.answers.decode()]


def frames(answers, confirmed, end):
    """These bytes in frames: one at least, which confirms what was taken."""
    pieces = [answers[n : n + FRAME_LIMIT] for n in range(0, len(answers), FRAME_LIMIT)] or [b""]
    flags = [0] * (len(pieces) - 1) + [END if end else 0]
    return b"".join(HEAD.pack(len(p), f, confirmed) + p for p, f in zip(pieces, flags))


def pairs(words):
    return dict(word.split("=", 1) for word in words)


class Counter:
    def __init__(self):
        # Whoever looks at or changes what follows holds this lock, so that nothing moves once it is frozen.
        self.changed = threading.Condition()
        self.state = "new"
        self.count = 0
        self.sessions = {}
        self.latest = {}  # connections of sessions that wait for their turn, the last that came of each
        self.exported = None  # the state as the agent has it
        self.arriving = bytearray()  # the state as it comes from the kernel before
        self.changes = 0  # times requests were taken
        self.measured = (0.0, 0)  # when a morph began to copy, and the changes until then
        self.gap = 0.0  # seconds from one change to the next at least: it is throttled
        self.next = 0.0  # when the state may change again

    # The agent's side.

    def follow(self, address):
        """Do what the agent says, for ever. One that is lost is sought again; the state stays what it is."""
        while True:
            try:
                with socket.socket(socket.AF_UNIX) as connection:
                    connection.connect("\0" + address[1:] if address.startswith("@") else address)
                    with connection.makefile("rwb", PIECE_LIMIT) as agent:
                        self.obey(agent)
            except (OSError, ValueError, KeyError) as error:
                print(f"counter: the agent at {address}: {error}", file=sys.stderr)
            with self.changed:
                self.throttle(0)
                self.changed.notify_all()
            time.sleep(0.2)

    def obey(self, agent):
        agent.write(f"hello version=1 name=counter state={self.state} knows=throttle\n".encode())
        agent.write(b"section name=state compatible=example,counter-json version=1 size=67108864\nready\n")
        agent.flush()
        while line := agent.readline(LINE_LIMIT):
            word, *rest = line.decode().split()
            values = pairs(rest)
            if word == "import":
                # This alone is not answered.
                piece = agent.read(int(values["bytes"]))
                self.arriving[int(values["offset"]) :] = piece
                continue
            try:
                with self.changed:
                    answer = self.carry_out(word, values)
                    self.changed.notify_all()
            except Refused as why:
                answer = f"error {why}\n".encode()
            agent.write(answer)
            agent.flush()

    def carry_out(self, word, values):
        if word == "activate":
            self.insist("new", "active")
            self.state = "active"
        elif word == "freeze":
            self.insist("active", "frozen")
            if self.state == "active":
                # Clients that did not come back since the kernel before this one never will.
                self.sessions = {n: s for n, s in self.sessions.items() if s.carrier}
            self.state = "frozen"
        elif word == "thaw":
            if self.state == "frozen":
                # Those left meanwhile, and did not go to another kernel.
                self.sessions = {n: s for n, s in self.sessions.items() if s.carrier}
            self.state = "active" if self.state == "frozen" else self.state
            self.throttle(0)
        elif word == "throttle":
            self.throttle(int(values["percent"]))
        elif word == "retire":
            self.state = "retired"
            self.throttle(0)
        elif word == "discard":
            self.insist("new")
            self.count, self.sessions = 0, {}
            self.arriving.clear()
        elif word == "export":
            return self.export(values["full"] != "0")
        elif word == "imported":
            self.insist("new")
            self.imported()
        elif word == "digest":
            return f"digest value={hashlib.sha256(self.encode()).hexdigest()}\n".encode()
        else:
            raise ValueError(f"what is {word}?")
        return b"ok\n"

    def throttle(self, percent):
        """Change at no more than the rest of the pace seen since the morph began to copy."""
        if not self.gap:
            since, changes = self.measured
            self.mean = (time.monotonic() - since) / max(self.changes - changes, 1)
        self.gap = min(self.mean * 100 / (100 - percent), LONGEST_GAP) if percent else 0.0

    def insist(self, *states):
        if self.state not in states:
            raise Refused(f"the counter is {self.state}")

    def encode(self):
        sessions = {number: session.saved() for number, session in self.sessions.items()}
        return json.dumps({"count": self.count, "sessions": sessions}, sort_keys=True).encode()

    def export(self, full):
        """The whole state in pieces; nothing when it is what was last exported."""
        state = self.encode()
        out = []
        if full:
            self.measured = (time.monotonic(), self.changes)
        if full or state != self.exported:
            for offset in range(0, len(state), PIECE_LIMIT):
                piece = state[offset : offset + PIECE_LIMIT]
                out += [f"piece offset={offset} bytes={len(piece)}\n".encode(), piece]
        self.exported = state
        return b"".join(out) + b"done\n"

    def imported(self):
        # A round in which nothing changed brings nothing.
        if not self.arriving:
            return
        try:
            state = json.loads(self.arriving)
            self.count = int(state["count"])
            self.sessions = {number: Session(*saved) for number, saved in state["sessions"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Refused(f"what was imported is not the state of a counter: {error}") from None
        finally:
            self.arriving.clear()

    # The clients' side.

    def wait_until_active(self):
        self.changed.wait_for(lambda: self.state in ("active", "retired"))
        if self.state == "retired":
            raise ValueError("another kernel has taken over")

    def wait_until_it_may_change(self):
        self.wait_until_active()
        while self.gap and (left := self.next - time.monotonic()) > 0:
            self.changed.wait(left)
            self.wait_until_active()
        self.next = time.monotonic() + self.gap
        self.changes += 1

    def serve(self, connection):
        """Carry a session until the switch or another connection ends that."""
        try:
            with connection, connection.makefile("rb") as stream:
                self.carry(connection, stream)
        except (OSError, ValueError, KeyError, struct.error) as error:
            print(f"counter: a session: {error}", file=sys.stderr)

    def carry(self, connection, stream):
        protocol, *rest = stream.readline(128).decode().split() or [""]
        values = pairs(rest)
        if protocol != "kmorph-session" or values["version"] != "1":
            raise ValueError("not the greeting of a session")
        number = values["id"]
        with self.changed:
            self.latest[number] = connection
            if values["resume"] == "1" and number in self.sessions:
                # It is waited for from here on.
                self.sessions[number].carrier = connection
            self.wait_until_active()
            if self.latest.get(number) is not connection:
                # Its client has another one since, which may have had its turn already.
                return
            del self.latest[number]
            if values["resume"] == "0":
                self.sessions[number] = Session()
            session = self.sessions.get(number)
            if not session:
                connection.sendall(b"unknown\n")
                return
            session.carrier = connection
            out = f"ok consumed={session.consumed} from={session.first}\n".encode()
            # The client may not have these answers.
            out += frames(bytes(session.answers), session.consumed, session.ended)
        try:
            connection.sendall(out)
            self.answer(session, connection, stream)
        finally:
            with self.changed:
                # The switch holds the client: when it lets go of the session, nobody comes back for it.
                if session.carrier is connection:
                    session.carrier = None
                    if self.state == "active":
                        self.sessions.pop(number, None)

    def answer(self, session, connection, stream):
        requests, ended, told = bytearray(), False, session.consumed
        while head := stream.read(HEAD.size):
            length, flags, confirmed = HEAD.unpack(head)
            if length > FRAME_LIMIT or flags & ~END:
                raise ValueError("not a frame")
            requests += stream.read(length)
            ended = ended or bool(flags & END)
            with self.changed:
                self.wait_until_it_may_change()
                if session.carrier is not connection:
                    return
                session.confirm(confirmed)
                answers, end = self.take(session, requests, ended)
                consumed = session.consumed
            if answers or end or consumed - told >= CONFIRM:
                connection.sendall(frames(answers, consumed, end))
                told = consumed

    def take(self, session, requests, ended):
        """Take whole requests. Both count and answers are state: they change together, or not at all."""
        before = len(session.answers)
        full = before >= WINDOW
        while not session.ended and not full and (length := requests.find(b"\n") + 1):
            del requests[:length]
            session.consumed += length
            self.count += 1
            session.answers += b"%d\n" % self.count
            full = len(session.answers) >= WINDOW
        if not full and len(requests) > LINE_LIMIT:
            raise ValueError("a line is too long")
        end = ended and not full and not session.ended
        session.ended = session.ended or end
        return bytes(session.answers[before:]), end


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=5000, help="vsock port to serve on")
    parser.add_argument("--listen", metavar="PATH", help="serve on a Unix socket instead")
    arguments = parser.parse_args()
    if arguments.listen:
        listener = socket.socket(socket.AF_UNIX)
        if os.path.exists(arguments.listen):
            os.unlink(arguments.listen)
        listener.bind(arguments.listen)
    else:
        listener = socket.socket(socket.AF_VSOCK)
        listener.bind((socket.VMADDR_CID_ANY, arguments.port))
    listener.listen(128)
    counter = Counter()
    address = os.environ.get("KMORPH_STATE") or "@kmorph-state"
    threading.Thread(target=counter.follow, args=[address], daemon=True).start()
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=counter.serve, args=[connection], daemon=True).start()


if __name__ == "__main__":
    main()
