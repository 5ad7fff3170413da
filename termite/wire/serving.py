"""The peer's requests: handing them to the handler, and its results back.

One side of `wire/rpc.py`.  A handler that has to wait costs a task, which is cancelled when the
caller forgets the call or the connection ends.  Loop only.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
from collections.abc import Awaitable, Callable

from termite.errors import TermiteError, WireError
from termite.wire.bodies import Body, FileBody, Sending
from termite.wire.kinds import (
    CONTENTS_LAST,
    CONTENTS_PIECE,
    REPLY,
    REPLY_LAST,
    REPLY_PIECE,
    REPLY_WITH_BODY,
    Limits,
    Reply,
    Result,
)
from termite.wire.messages import Failure, Message
from termite.wire.outbox import Outbox

log = logging.getLogger(__name__)


class _Incoming:
    """A request whose body has not arrived completely."""

    __slots__ = ("body", "message")

    def __init__(self, message: Message) -> None:
        self.message = message
        self.body = bytearray()


class _Running:
    """A handler that waits, in its task."""

    __slots__ = ("task", "waiting")

    def __init__(self, waiting: Awaitable[Result]) -> None:
        self.waiting = waiting
        self.task: asyncio.Task[None] | None = None

    def cancel(self) -> None:
        if self.task is not None:
            self.task.cancel()
        _drop_awaitable(self.waiting)


class Serving:
    def __init__(
        self, outbox: Outbox, handle: Callable[[Message, bytes], Result | Awaitable[Result]], limits: Limits
    ) -> None:
        self._outbox = outbox
        self._handle = handle
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._serving: dict[int, _Incoming | _Running] = {}
        self._notified: set[_Running] = set()
        self._held = 0  # bytes of bodies being gathered

    def __len__(self) -> int:
        return len(self._serving) + len(self._notified)

    def end(self) -> None:
        serving, self._serving = self._serving, {}
        for served in (*serving.values(), *self._notified):
            if isinstance(served, _Running):
                served.cancel()
        self._notified.clear()

    # -- frames -----------------------------------------------------------------------------------

    def on_request(self, stream: int, message: Message) -> None:
        if self._is_admitted(stream):
            self._serve(stream, message, b"")

    def on_request_with_body(self, stream: int, message: Message) -> None:
        if self._is_admitted(stream):
            self._serving[stream] = _Incoming(message)

    def on_request_piece(self, stream: int, payload: memoryview) -> _Incoming | None:
        """The request, if it still wants more."""
        incoming = self._serving.get(stream)
        if not isinstance(incoming, _Incoming):
            return None  # refused meanwhile
        self._held += len(payload)
        incoming.body += payload
        if len(incoming.body) <= self._limits.max_body_bytes and self._held <= self._limits.max_held_bytes:
            return incoming
        self._drop(stream, incoming)
        text = f"the body of {type(incoming.message).__name__} is too long to be gathered"
        self._outbox.send(REPLY, stream, Failure("WireError", text))
        return None

    def on_request_last(self, stream: int, payload: memoryview) -> None:
        incoming = self.on_request_piece(stream, payload)
        if incoming is not None:
            self._drop(stream, incoming)
            self._serve(stream, incoming.message, bytes(incoming.body))

    def on_forget(self, stream: int) -> None:
        served = self._serving.get(stream)
        if isinstance(served, _Incoming):
            self._drop(stream, served)
        elif served is not None:
            del self._serving[stream]
            served.cancel()
        self._outbox.drop_body(stream, REPLY_PIECE)
        self._outbox.drop_body(stream, CONTENTS_PIECE)

    def on_notify(self, message: Message) -> None:
        try:
            result = self._handle(message, b"")
        except Exception as exc:
            _note(message, exc)
            return
        if not inspect.isawaitable(result):
            _discard(result)
            return
        if len(self) >= self._limits.max_serving:
            _drop_awaitable(result)
            raise WireError(f"more than {self._limits.max_serving} notifications at a time")
        running = _Running(result)
        running.task = self._loop.create_task(self._finish_notified(message, running))
        self._notified.add(running)

    # -- results ----------------------------------------------------------------------------------

    def _is_admitted(self, stream: int) -> bool:
        if stream in self._serving:
            raise WireError(f"call {stream} was made twice")
        if len(self._serving) < self._limits.max_serving:
            return True
        text = f"more than {self._limits.max_serving} calls at a time on one connection; ask again later"
        self._outbox.send(REPLY, stream, Failure("Refused", text))
        return False

    def _serve(self, stream: int, message: Message, body: bytes) -> None:
        try:
            result = self._handle(message, body)
        except Exception as exc:
            result = _failure_of(exc, message)
        if inspect.isawaitable(result):
            running = _Running(result)
            running.task = self._loop.create_task(self._finish(stream, message, running))
            self._serving[stream] = running
        else:
            self._answer(stream, message, result)

    async def _finish(self, stream: int, message: Message, running: _Running) -> None:
        """Answers in the same step in which the handler returned: nothing it could not know of is sent before."""
        result: object
        try:
            result = await running.waiting
        except asyncio.CancelledError:
            result = Failure("Canceled", f"{type(message).__name__} was cancelled")
        except Exception as exc:
            result = _failure_of(exc, message)
        if self._serving.get(stream) is not running:
            _discard(result)  # forgotten, or the connection has ended
            return
        del self._serving[stream]
        self._answer(stream, message, result)

    async def _finish_notified(self, message: Message, running: _Running) -> None:
        try:
            _discard(await running.waiting)
        except Exception as exc:
            _note(message, exc)
        finally:
            self._notified.discard(running)

    def _answer(self, stream: int, message: Message, result: object) -> None:
        body: Body = b""
        hashed = False
        if isinstance(result, Reply):
            reply, body, hashed = result
        elif isinstance(result, Message):
            reply = result
        else:
            reply = _failure_of(TypeError(f"the handler returned {result!r}"), message)
        has_body = len(body) > 0
        try:
            self._outbox.send(REPLY_WITH_BODY if has_body else REPLY, stream, reply)
        except WireError as exc:
            _discard(result)
            self._outbox.send(REPLY, stream, _failure_of(exc, message))
            return
        if has_body:
            is_bare = hashed or isinstance(body, FileBody)
            kinds = (CONTENTS_PIECE, CONTENTS_LAST) if is_bare else (REPLY_PIECE, REPLY_LAST)
            self._outbox.send_body(Sending(stream, *kinds, body))
        else:
            _discard(result)

    def _drop(self, stream: int, incoming: _Incoming) -> None:
        del self._serving[stream]
        self._held -= len(incoming.body)


def _failure_of(exc: Exception, message: Message) -> Failure:
    if isinstance(exc, TermiteError):
        return Failure(type(exc).__name__, str(exc))
    what = type(message).__name__
    log.error("serving %s failed", what, exc_info=exc)
    return Failure("TermiteError", f"internal error while serving {what} ({type(exc).__name__}); its log says more")


def _note(message: Message, exc: Exception) -> None:
    """A notification failed; there is nobody to tell."""
    if isinstance(exc, TermiteError):
        log.warning("%s: %s", type(message).__name__, exc)
    else:
        log.error("serving %s failed", type(message).__name__, exc_info=exc)


def _discard(result: object) -> None:
    """A result that nobody gets must not keep its file open."""
    if isinstance(result, Reply) and isinstance(result.body, FileBody):
        with contextlib.suppress(OSError):
            result.body.close()


def _drop_awaitable(waiting: Awaitable[Result]) -> None:
    """A coroutine that will never take its first step; one that has is ended through its task."""
    if inspect.iscoroutine(waiting) and inspect.getcoroutinestate(waiting) == inspect.CORO_CREATED:
        waiting.close()
