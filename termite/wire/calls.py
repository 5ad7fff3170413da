"""Our requests that wait for their replies.

One side of `wire/rpc.py`; what its text promises to callers is kept here.  Loop only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

from termite import errors
from termite.errors import TermiteError, Timeout, WireError
from termite.wire.bodies import Sending
from termite.wire.kinds import (
    FORGET,
    REQUEST,
    REQUEST_LAST,
    REQUEST_PIECE,
    REQUEST_WITH_BODY,
    Limits,
    Reply,
)
from termite.wire.messages import Failure, Message
from termite.wire.outbox import Outbox

Sink = Callable[[memoryview], None]
"""Takes a piece of a body, which it must not keep; until the whole has the right hash, none may be trusted."""

OnReply = Callable[[Message, bytes], None]


class Call:
    """One request of ours."""

    __slots__ = (
        "body", "compares", "deadline", "future", "on_reply", "reply", "sink", "stream", "timeout_s", "timer", "what",
    )  # fmt: skip

    def __init__(self, stream: int, what: str, future: asyncio.Future[Reply], timeout_s: float | None) -> None:
        self.stream = stream
        self.what = what
        self.future = future
        self.timeout_s = timeout_s
        self.sink: Sink | None = None
        self.compares = False  # the body with hashes, before any of it is used
        self.on_reply: OnReply | None = None
        self.reply: Message | None = None  # set while its body arrives
        self.body = bytearray()
        self.deadline = 0.0
        self.timer: asyncio.TimerHandle | None = None


class Calls:
    def __init__(self, outbox: Outbox, name: str, limits: Limits) -> None:
        self._outbox = outbox
        self._name = name
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._calls: dict[int, Call] = {}
        self._last_stream = 0
        self._held = 0  # bytes of bodies being gathered

    def __len__(self) -> int:
        return len(self._calls)

    def begin(
        self,
        request: Message,
        body: bytes,
        timeout_s: float | None,
        sink: Sink | None,
        on_reply: OnReply | None,
        compares: bool,
    ) -> Call:
        """Send a request; the caller awaits `future` and says `forget` if it gives up."""
        stream = self._new_stream()
        call = Call(stream, type(request).__name__, self._loop.create_future(), timeout_s)
        call.sink, call.on_reply = sink, on_reply
        call.compares = compares or sink is not None
        self._outbox.send(REQUEST_WITH_BODY if body else REQUEST, stream, request)
        if body:
            self._outbox.send_body(Sending(stream, REQUEST_PIECE, REQUEST_LAST, body))
        self._calls[stream] = call
        if timeout_s is not None:
            call.deadline = self._loop.time() + timeout_s
            call.timer = self._loop.call_at(call.deadline, self._expire, call)
        return call

    def forget(self, call: Call) -> None:
        """Tell the other end not to bother; nothing if the call has ended."""
        if self._calls.get(call.stream) is call:
            self._remove(call)
            self._outbox.send_frame(FORGET, call.stream, b"")

    def end(self, exc: TermiteError) -> None:
        """Every call raises this."""
        calls, self._calls = self._calls, {}
        for call in calls.values():
            if call.timer is not None:
                call.timer.cancel()
            if not call.future.done():
                call.future.set_exception(type(exc)(*exc.args))

    # -- frames -----------------------------------------------------------------------------------

    def on_reply(self, stream: int, message: Message) -> None:
        call = self._calls.get(stream)
        if call is None:
            return  # forgotten
        if call.reply is not None and not isinstance(message, Failure):
            raise WireError(f"second reply to {call.what}")
        self._settle(call, message)

    def on_reply_with_body(self, stream: int, message: Message) -> None:
        call = self._calls.get(stream)
        if call is None:
            return
        if call.reply is not None:
            raise WireError(f"second reply to {call.what}")
        call.reply = message
        self._put_off(call)

    def on_reply_piece(self, stream: int, payload: memoryview) -> Call | None:
        """The call, if it still wants more."""
        call = self._calls.get(stream)
        if call is None:
            return None
        if call.reply is None:
            raise WireError(f"body without a reply to {call.what}")
        self._put_off(call)
        if call.sink is None:
            return self._gather(call, payload)
        try:
            call.sink(payload)
        except Exception as exc:
            self._give_up(call, exc)
        return self._calls.get(stream)

    def on_reply_last(self, stream: int, payload: memoryview) -> None:
        call = self.on_reply_piece(stream, payload)
        if call is not None:
            self._settle(call, cast(Message, call.reply))

    def on_contents_piece(self, stream: int, payload: memoryview) -> Call | None:
        self._expect_comparison(stream)
        return self.on_reply_piece(stream, payload)

    def on_contents_last(self, stream: int, payload: memoryview) -> None:
        self._expect_comparison(stream)
        self.on_reply_last(stream, payload)

    def _expect_comparison(self, stream: int) -> None:
        call = self._calls.get(stream)
        if call is not None and not call.compares:
            raise WireError(f"contents without a MAC in the reply to {call.what}")

    def _gather(self, call: Call, payload: memoryview) -> Call | None:
        self._held += len(payload)
        call.body += payload
        if len(call.body) <= self._limits.max_body_bytes and self._held <= self._limits.max_held_bytes:
            return call
        self._give_up(call, WireError(f"the body of the reply to {call.what} is too long to be gathered"))
        return None

    def _settle(self, call: Call, message: Message) -> None:
        self._remove(call)
        if call.future.done():
            return  # cancelled, but not yet awake to forget it
        if isinstance(message, Failure):
            call.future.set_exception(errors.by_name(message.code)(message.text))
            return
        body = bytes(call.body)
        if call.on_reply is not None:
            try:
                call.on_reply(message, body)
            except Exception as exc:
                call.future.set_exception(exc)
                return
        if not call.future.done():
            call.future.set_result(Reply(message, body))

    # -- bookkeeping ------------------------------------------------------------------------------

    def _new_stream(self) -> int:
        while True:
            self._last_stream = (self._last_stream + 1) & 0xFFFFFFFF
            if self._last_stream not in self._calls:
                return self._last_stream

    def _remove(self, call: Call) -> None:
        del self._calls[call.stream]
        self._held -= len(call.body)
        if call.timer is not None:
            call.timer.cancel()
        self._outbox.drop_body(call.stream, REQUEST_PIECE)

    def _give_up(self, call: Call, exc: Exception) -> None:
        self.forget(call)
        if not call.future.done():
            call.future.set_exception(exc)

    def _put_off(self, call: Call) -> None:
        if call.timeout_s is not None:
            call.deadline = self._loop.time() + call.timeout_s

    def _expire(self, call: Call) -> None:
        if call.deadline > self._loop.time():  # pieces have come meanwhile
            call.timer = self._loop.call_at(call.deadline, self._expire, call)
        else:
            self._give_up(call, Timeout(f"{self._name} did not answer {call.what} within {call.timeout_s:g} s"))
