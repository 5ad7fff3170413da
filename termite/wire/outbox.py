"""Everything that leaves on one connection, in order, written once per iteration of the loop.

Messages go out at once and in order.  Long bodies wait until the socket has taken what was written
before, a piece at a time, so a message is never behind more than a piece or two.  After `close`
whatever comes is dropped.  Loop only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from termite.errors import Refused
from termite.wire.bodies import BodyQueue, Sending
from termite.wire.codec import encode
from termite.wire.framing import MAX_PAYLOAD, Session
from termite.wire.kinds import INLINE_BYTES, PART, REPLY
from termite.wire.messages import Failure, Message

_PIECES_A_TURN = 2  # then the loop gets to see everything else
_LOW_WATER = MAX_PAYLOAD // 4


class Outbox:
    def __init__(self, session: Session, max_backlog_bytes: int, on_overflow: Callable[[], None]) -> None:
        self._session = session
        self._max_backlog_bytes = max_backlog_bytes
        self._on_overflow = on_overflow  # the peer does not read
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._frames: list[bytes | memoryview] = []  # of this iteration of the loop
        self._bodies = BodyQueue()
        self._flush_due = False
        self._pump_due = False
        self._paused = False
        self._closed = False

    def __len__(self) -> int:
        """Bodies on their way."""
        return len(self._bodies)

    def attach(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        transport.set_write_buffer_limits(high=MAX_PAYLOAD, low=_LOW_WATER)

    def send(self, kind: int, stream: int, message: Message) -> None:
        """WireError, and nothing is sent, if the message cannot be encoded or is too long."""
        data: bytes | memoryview = encode(message)
        if self._closed:
            return
        if len(data) > MAX_PAYLOAD:
            # All parts at once: parts that wait would let later messages overtake this one.
            data = memoryview(data)
            while len(data) > MAX_PAYLOAD:
                self._frames += self._session.seal(PART, stream, data[:MAX_PAYLOAD])
                data = data[MAX_PAYLOAD:]
        self.send_frame(kind, stream, data)

    def send_frame(self, kind: int, stream: int, payload: bytes | memoryview) -> None:
        if self._closed:
            return
        self._frames += self._session.seal(kind, stream, payload)
        if not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self.flush)

    def send_body(self, sending: Sending) -> None:
        """Takes ownership; to be called right after the message it belongs to was sent."""
        if self._closed:
            sending.close()
        elif sending.left <= INLINE_BYTES:
            self._send_piece(sending)
        else:
            self._bodies.add(sending)
            self._pump_soon()

    def drop_body(self, stream: int, piece_kind: int) -> None:
        """Send no more of this one, if any of it is left."""
        if self._bodies:
            self._bodies.drop(stream, piece_kind)

    def gather(self) -> None:
        """Whatever is sent from now on waits for `flush`, which the caller promises to call."""
        self._flush_due = True

    def flush(self) -> None:
        self._flush_due = False
        if not self._frames or self._transport is None:
            return
        frames, self._frames = self._frames, []
        self._transport.write(b"".join(frames))
        if self._paused and self._transport.get_write_buffer_size() > self._max_backlog_bytes:
            self._on_overflow()

    def pause(self) -> None:
        self._paused = True

    def resume(self) -> None:
        self._paused = False
        self._pump_soon()  # not within the transport's callback: a write that fails there is reported twice

    def close(self) -> None:
        """What was flushed may still go out; bodies stop, their files are closed."""
        self._closed = True
        self._frames.clear()
        self._bodies.clear()

    def _pump_soon(self) -> None:
        if not self._pump_due:
            self._pump_due = True
            self._loop.call_soon(self._pump_now)

    def _pump_now(self) -> None:
        self._pump_due = False
        self._pump()

    def _pump(self) -> None:
        """A few pieces, as long as the socket takes them."""
        for _ in range(_PIECES_A_TURN):
            if self._paused or not self._bodies:
                return
            sending = self._bodies.next()
            if self._send_piece(sending):
                self._bodies.add(sending)
            self.flush()
        if self._bodies:
            self._pump_soon()

    def _send_piece(self, sending: Sending) -> bool:
        """True if more of it follows."""
        try:
            kind, payload = sending.piece()
        except Refused as exc:
            sending.close()
            self.send(REPLY, sending.stream, Failure("Refused", str(exc)))
            return False
        self.send_frame(kind, sending.stream, payload)
        if sending.left:
            return True
        sending.close()
        return False
