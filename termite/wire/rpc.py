"""One connection, calls in both directions at once, and bulk bytes that never get in their way.

Either end calls the other; the handler of the other end answers.  Loop only; no locks, no tasks but
those of handlers that wait.  What holds for every connection:

- Messages (requests, replies, notifications) arrive in the order in which they were sent, and are
  handled in that order: a plain handler has returned, and `on_reply` has been called, before any
  later frame is looked at.  A reply is sent in the same step in which its handler returns it, so
  what the handler saw is not older than anything that was sent before.
- A body of at most `INLINE_BYTES` arrives together with its message; of a longer one, pieces are sent
  whenever nothing else is, so later messages may overtake it.
- A call that is cancelled or timed out is forgotten on both ends: its handler is cancelled, its
  body stops, a late answer is dropped.
- When the connection ends, every call raises `PeerLost` with the reason, every handler that still
  waits is cancelled, every file that is being sent is closed.
- Everything is bounded (`Limits`), every wait too: a peer of which not one byte is heard within
  `silence_limit_s` is lost.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import socket
import time
from collections.abc import Awaitable, Callable
from typing import ClassVar, cast

from termite.errors import PeerLost, Refused, WireError
from termite.wire.bodies import Body, FileBody
from termite.wire.calls import Calls, OnReply, Sink
from termite.wire.codec import MAX_MESSAGE_BYTES, decode
from termite.wire.framing import Framer, Session
from termite.wire.kinds import (
    CONTENTS_LAST,
    CONTENTS_PIECE,
    DEFAULT_LIMITS,
    FORGET,
    GOODBYE,
    INLINE_BYTES,
    NOTIFY,
    PART,
    PING,
    PONG,
    REPLY,
    REPLY_LAST,
    REPLY_PIECE,
    REPLY_WITH_BODY,
    REQUEST,
    REQUEST_LAST,
    REQUEST_PIECE,
    REQUEST_WITH_BODY,
    Limits,
    Reply,
    Result,
)
from termite.wire.messages import Message
from termite.wire.outbox import Outbox
from termite.wire.pulse import Pulse
from termite.wire.serving import Serving

__all__ = ["INLINE_BYTES", "Body", "Connection", "FileBody", "Handler", "Limits", "Reply", "Result", "Sink", "refuse"]

log = logging.getLogger(__name__)

HEARTBEAT_S = 2.0
SILENCE_LIMIT_S = 10.0
_FIRST_PINGS = 4  # in quick succession: the very first round trip is seldom a typical one
_CLOSE_LIMIT_S = 1.0
_MAX_REASON_BYTES = 500

Handler = Callable[["Connection", Message, bytes], Result | Awaitable[Result]]
"""Gets request and body.  A plain result costs no task; an awaitable is cancelled when its caller is
gone.  A `TermiteError` that it raises is raised at the caller as the same class; any other exception
is logged here and is a `TermiteError` there."""


def refuse(conn: Connection, message: Message, body: bytes) -> Result:
    """The handler of an end that serves nothing."""
    raise Refused(f"{type(message).__name__} is not served here")


class Connection(asyncio.BufferedProtocol):
    """Both ends of a connection look like this; the module's text says what it promises."""

    def __init__(
        self,
        session: Session,
        handler: Handler = refuse,
        *,
        name: str = "",
        heartbeat_s: float = HEARTBEAT_S,
        silence_limit_s: float = SILENCE_LIMIT_S,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        self.name = name or "peer"
        self.closed = asyncio.Event()  # set when the socket is closed
        self.close_reason = ""  # empty while open
        self._heartbeat_s = heartbeat_s
        self._silence_limit_s = silence_limit_s
        self._loop = asyncio.get_running_loop()
        self._framer = Framer(session)
        self._outbox = Outbox(session, limits.max_backlog_bytes, self._on_overflow)
        self._calls = Calls(self._outbox, self.name, limits)
        self._serving = Serving(self._outbox, functools.partial(handler, self), limits)
        self._transport: asyncio.Transport | None = None
        self._part = bytearray()  # of the message whose beginning has arrived ...
        self._part_stream = 0  # ... and its stream
        self._pulse = Pulse()
        self._heard = self._loop.time()  # when the last byte came
        self._beat_due = 0.0  # 0: not begun
        self._timer: asyncio.TimerHandle | None = None

    @classmethod
    async def from_socket(
        cls,
        sock: socket.socket,
        session: Session,
        handler: Handler = refuse,
        *,
        name: str = "",
        heartbeat_s: float = HEARTBEAT_S,
        silence_limit_s: float = SILENCE_LIMIT_S,
        limits: Limits = DEFAULT_LIMITS,
    ) -> Connection:
        """Carry on with an authenticated socket, here or in another process; the socket is owned from now on."""
        conn = cls(session, handler, name=name, heartbeat_s=heartbeat_s, silence_limit_s=silence_limit_s, limits=limits)
        sock.setblocking(False)
        try:
            await conn._loop.create_connection(lambda: conn, sock=sock)
        except BaseException:
            conn._end("given up while it was made")  # it may have begun already: uvloop tells it nothing more
            sock.close()
            raise
        return conn

    def __repr__(self) -> str:
        state = f"ended: {self.close_reason}" if self.close_reason else "open"
        return (
            f"<Connection {self.name} {state}, {len(self._calls)} calls, {len(self._serving)} served, "
            f"{len(self._outbox)} bodies, rtt {self.rtt_s * 1e6:.0f} us>"
        )

    @property
    def rtt_s(self) -> float:
        """The shortest of the recent round trips; 0.0 until measured, which is before the first reply arrives."""
        return self._pulse.rtt_s

    @property
    def clock_offset_ns(self) -> int:
        """The peer's wall clock minus ours, as seen on that round trip."""
        return self._pulse.clock_offset_ns

    def is_open(self) -> bool:
        return not self.close_reason

    async def call(
        self,
        request: Message,
        *,
        body: bytes = b"",
        timeout_s: float | None,
        sink: Sink | None = None,
        on_reply: OnReply | None = None,
        compares: bool = False,
    ) -> Reply:
        """Ask and wait for the answer; raises what the other end's handler raised.

        `timeout_s` bounds the wait for the reply, and then for each further piece of its body; None
        leaves it to the heartbeat.  `sink` gets the reply's body piece by piece as it arrives, and the
        returned body is empty; without it the body is gathered.  A `FileBody`, or what the other end says is
        `hashed`, comes without a MAC: only to a sink, or to a caller that `compares`.  Either has to compare
        all of it with hashes that it knows from a message before any of it is used for anything.
        `on_reply` is called with a reply that is not a failure, in the order of arrival and before any
        later frame of this connection is processed: what it notes down is older than whatever the peer
        sent afterwards.  An exception of either fails this call only.  The request is sent before `call` first waits.
        """
        if self.close_reason:
            raise self._lost()
        call = self._calls.begin(request, body, timeout_s, sink, on_reply, compares)
        try:
            return await call.future
        finally:
            self._calls.forget(call)

    def notify(self, message: Message) -> None:
        """Tell, one way.  Dropped without a word if the connection has ended."""
        self._outbox.send(NOTIFY, 0, message)

    async def close(self, reason: str = "closed") -> None:
        """Say goodbye and end; messages already sent are delivered, long bodies on their way are not."""
        self._leave(reason, farewell=reason)
        await self.wait_closed()

    def abort(self, reason: str) -> None:
        """End at once, telling nobody."""
        self._end(reason)
        if self._transport is not None:
            self._transport.abort()

    async def wait_closed(self) -> None:
        await self.closed.wait()

    # -- for the transport ------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._outbox.attach(self._transport)
        if self.close_reason:
            self._transport.abort()
            return
        self._heard = self._loop.time()
        self._ping()
        self._beat()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._framer.space()

    def buffer_updated(self, nbytes: int) -> None:
        self._heard = self._loop.time()
        self._outbox.gather()  # whatever is sent meanwhile goes out together, at the end
        try:
            for kind, stream, payload in self._framer.take(nbytes):
                self._act(kind, stream, payload)
                if self.close_reason:
                    return
        except WireError as exc:
            log.warning("%s broke the protocol: %s", self.name, exc)
            self._leave(f"it broke the protocol: {exc}", farewell=f"protocol broken: {exc}")
        self._outbox.flush()

    def pause_writing(self) -> None:
        self._outbox.pause()

    def resume_writing(self) -> None:
        self._outbox.resume()

    def eof_received(self) -> bool:
        self.abort("closed by the other side")
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(f"connection broken: {exc}" if exc else "closed by the other side")
        if self._timer is not None:
            self._timer.cancel()
        self.closed.set()

    # -- frames -----------------------------------------------------------------------------------

    def _act(self, kind: int, stream: int, payload: memoryview) -> None:
        on_message = self._MESSAGE_KINDS.get(kind)
        if on_message is not None:
            on_message(self, stream, self._message(stream, payload) if self._part else decode(payload))
            return
        on_frame = self._OTHER_KINDS.get(kind)
        if on_frame is None:
            raise WireError(f"frame of unknown kind {kind}")
        on_frame(self, stream, payload)

    _MESSAGE_KINDS: ClassVar[dict[int, Callable[[Connection, int, Message], object]]] = {
        REQUEST: lambda self, stream, message: self._serving.on_request(stream, message),
        REQUEST_WITH_BODY: lambda self, stream, message: self._serving.on_request_with_body(stream, message),
        REPLY: lambda self, stream, message: self._calls.on_reply(stream, message),
        REPLY_WITH_BODY: lambda self, stream, message: self._calls.on_reply_with_body(stream, message),
        NOTIFY: lambda self, stream, message: self._serving.on_notify(message),
    }
    _OTHER_KINDS: ClassVar[dict[int, Callable[[Connection, int, memoryview], object]]] = {
        REQUEST_PIECE: lambda self, stream, payload: self._serving.on_request_piece(stream, payload),
        REQUEST_LAST: lambda self, stream, payload: self._serving.on_request_last(stream, payload),
        REPLY_PIECE: lambda self, stream, payload: self._calls.on_reply_piece(stream, payload),
        REPLY_LAST: lambda self, stream, payload: self._calls.on_reply_last(stream, payload),
        CONTENTS_PIECE: lambda self, stream, payload: self._calls.on_contents_piece(stream, payload),
        CONTENTS_LAST: lambda self, stream, payload: self._calls.on_contents_last(stream, payload),
        FORGET: lambda self, stream, payload: self._serving.on_forget(stream),
        PART: lambda self, stream, payload: self._on_part(stream, payload),
        PING: lambda self, stream, payload: self._on_ping(payload),
        PONG: lambda self, stream, payload: self._on_pong(payload),
        GOODBYE: lambda self, stream, payload: self._on_goodbye(payload),
    }

    def _on_part(self, stream: int, payload: memoryview) -> None:
        if self._part and stream != self._part_stream:
            raise WireError("two long messages at a time")
        if len(self._part) + len(payload) > MAX_MESSAGE_BYTES:
            raise WireError(f"a message over the limit of {MAX_MESSAGE_BYTES} bytes")
        self._part_stream = stream
        self._part += payload

    def _message(self, stream: int, payload: memoryview) -> Message:
        self._on_part(stream, payload)
        whole, self._part = self._part, bytearray()
        return decode(whole)

    # -- life and death ---------------------------------------------------------------------------

    def _ping(self) -> None:
        self._outbox.send_frame(PING, 0, Pulse.ping(time.monotonic_ns()))

    def _on_ping(self, payload: memoryview) -> None:
        self._outbox.send_frame(PONG, 0, Pulse.pong(payload, time.time_ns()))

    def _on_pong(self, payload: memoryview) -> None:
        self._pulse.heard(payload, time.monotonic_ns(), time.time_ns())
        if len(self._pulse) < _FIRST_PINGS:
            self._ping()

    def _beat(self) -> None:
        """Ping, and see whether the peer lives; keeps itself going."""
        now = self._loop.time()
        if self._beat_due:
            if now - self._beat_due > self._heartbeat_s:
                self._heard = now  # it was this loop that stood still; the peer's bytes may lie unread
            self._ping()
        if now - self._heard >= self._silence_limit_s:
            self.abort(f"silent for {self._silence_limit_s:g} s")
            return
        self._beat_due = min(now + self._heartbeat_s, self._heard + self._silence_limit_s)
        self._timer = self._loop.call_at(self._beat_due, self._beat)

    def _on_goodbye(self, payload: memoryview) -> None:
        reason = bytes(payload).decode("utf-8", "replace")
        self._leave(f"closed by the other side: {reason}", farewell=None)

    def _on_overflow(self) -> None:
        self.abort("it does not read what it is sent")

    def _leave(self, reason: str, farewell: str | None) -> None:
        """End, but let what was sent go out first, for a moment."""
        if self.close_reason:
            return
        if farewell is not None:
            self._outbox.send_frame(GOODBYE, 0, farewell.encode("utf-8", "replace")[:_MAX_REASON_BYTES])
        self._outbox.flush()  # may itself end the connection
        if self.close_reason:
            return
        self._end(reason)
        if self._transport is not None:
            self._transport.close()
            self._timer = self._loop.call_later(_CLOSE_LIMIT_S, self._transport.abort)

    def _end(self, reason: str) -> None:
        """From now on nothing is sent and nothing is awaited."""
        if self.close_reason:
            return
        self.close_reason = reason or "closed"
        if self._timer is not None:
            self._timer.cancel()
        self._outbox.close()
        self._serving.end()
        self._calls.end(self._lost())
        self._part = bytearray()

    def _lost(self) -> PeerLost:
        return PeerLost(f"lost {self.name}: {self.close_reason}")
