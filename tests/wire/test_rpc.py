"""Calls between two connected ends, over real sockets, on every event loop."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from typing import Any

import pytest

from termite.errors import BoxError, Canceled, Refused, TermiteError, Timeout, WireError
from termite.wire.framing import MAX_PAYLOAD
from termite.wire.messages import (
    Cancel,
    Failure,
    Fetch,
    Fetched,
    Message,
    Ok,
    ReadDir,
    StatusText,
    Want,
    Workers,
)
from termite.wire.rpc import INLINE_BYTES, Connection, Limits, Reply
from tests.wire.handlers import MIB, echo, is_closed, never

# -- calls ----------------------------------------------------------------------------------------


def test_a_call_is_answered_with_message_and_body(run: Any, pair: Any) -> None:
    async def body() -> None:
        async with pair(theirs=echo) as (ours, _):
            assert await ours.call(ReadDir(b"a"), timeout_s=5) == Reply(StatusText(b"a"), b"")
            assert await ours.call(ReadDir(b"b"), body=b"xyz", timeout_s=None) == Reply(StatusText(b"b"), b"xyz")

    run(body())


@pytest.mark.parametrize("size", [1, INLINE_BYTES, INLINE_BYTES + 1, MAX_PAYLOAD, MAX_PAYLOAD + 1, 5 * MIB])
def test_bodies_of_any_size_go_there_and_back(run: Any, pair: Any, size: int) -> None:
    data = os.urandom(size)

    async def body() -> None:
        async with pair(theirs=echo) as (ours, _):
            assert (await ours.call(ReadDir(b""), body=data, timeout_s=10)).body == data

    run(body())


@pytest.mark.parametrize("size", [MAX_PAYLOAD - 100, MAX_PAYLOAD, MAX_PAYLOAD + 1, 3 * MAX_PAYLOAD, 5 * MIB])
def test_messages_longer_than_a_frame_go_there_and_back(run: Any, pair: Any, size: int) -> None:
    path = os.urandom(size)

    async def body() -> None:
        async with pair(theirs=echo) as (ours, _):
            assert (await ours.call(ReadDir(path), timeout_s=10)).message == StatusText(path)

    run(body())


def test_both_ends_call_each_other_at_once(run: Any, pair: Any) -> None:
    async def body() -> None:
        async with pair(echo, echo) as (ours, theirs):
            calls = [end.call(ReadDir(b"%d" % n), timeout_s=10) for n in range(200) for end in (ours, theirs)]
            replies = await asyncio.gather(*calls)
            assert [r.message.json for r in replies] == [b"%d" % n for n in range(200) for _ in "ab"]

    run(body())


def test_a_handler_may_wait_while_others_are_answered(run: Any, pair: Any) -> None:
    async def body() -> None:
        release = asyncio.Event()

        async def slow(conn: Connection, message: Message, body: bytes) -> Message:
            if isinstance(message, Fetch):
                await release.wait()
            return Ok()

        async with pair(theirs=slow) as (ours, _):
            waiting = asyncio.create_task(ours.call(Fetch(b""), timeout_s=5))
            await ours.call(Want(1), timeout_s=5)
            assert not waiting.done()
            release.set()
            await waiting

    run(body())


def test_a_handler_may_answer_with_a_future(run: Any, pair: Any) -> None:
    async def body() -> None:
        future: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        async with pair(theirs=lambda *_: future) as (ours, _):
            call = asyncio.create_task(ours.call(Ok(), timeout_s=5))
            future.get_loop().call_soon(future.set_result, Want(7))
            assert (await call).message == Want(7)

    run(body())


def test_a_handler_may_call_back_before_it_answers(run: Any, pair: Any) -> None:
    async def ask_back(conn: Connection, message: Message, body: bytes) -> Message:
        return (await conn.call(ReadDir(b"back"), timeout_s=5)).message

    async def body() -> None:
        async with pair(echo, ask_back) as (ours, _):
            assert (await ours.call(Ok(), timeout_s=5)).message == StatusText(b"back")

    run(body())


# -- failures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("waits", [False, True])
def test_a_termite_error_of_the_handler_is_raised_at_the_caller(run: Any, pair: Any, waits: bool) -> None:
    def now(conn: Connection, message: Message, body: bytes) -> Message:
        raise BoxError("no box; try again")

    async def later(conn: Connection, message: Message, body: bytes) -> Message:
        raise BoxError("no box; try again")

    async def body() -> None:
        async with pair(theirs=later if waits else now) as (ours, _):
            with pytest.raises(BoxError, match="no box; try again"):
                await ours.call(Ok(), timeout_s=5)

    run(body())


@pytest.mark.parametrize("waits", [False, True])
def test_a_bug_in_the_handler_is_logged_there_and_told_here(
    run: Any, pair: Any, waits: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def now(conn: Connection, message: Message, body: bytes) -> Message:
        raise ZeroDivisionError("oops")

    async def later(conn: Connection, message: Message, body: bytes) -> Message:
        raise ZeroDivisionError("oops")

    async def body() -> None:
        async with pair(theirs=later if waits else now) as (ours, _):
            with pytest.raises(TermiteError, match="internal error while serving Ok"):
                await ours.call(Ok(), timeout_s=5)
            assert ours.is_open()

    run(body())
    assert "oops" in caplog.text and "Traceback" in caplog.text


def test_an_answer_that_is_no_message_is_a_bug_of_the_handler(
    run: Any, pair: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def body() -> None:
        async with pair(theirs=lambda *_: None) as (ours, _):
            with pytest.raises(TermiteError, match="internal error"):
                await ours.call(Ok(), timeout_s=5)

    run(body())


def test_a_failure_with_an_unknown_code_is_a_termite_error(run: Any, pair: Any) -> None:
    async def body() -> None:
        async with pair(theirs=lambda *_: Failure("FromTheFuture", "text")) as (ours, _):
            with pytest.raises(TermiteError, match="text"):
                await ours.call(Ok(), timeout_s=5)

    run(body())


def test_without_a_handler_every_call_is_refused(run: Any, pair: Any) -> None:
    async def body() -> None:
        async with pair() as (ours, _):
            with pytest.raises(Refused, match="Ok is not served"):
                await ours.call(Ok(), timeout_s=5)

    run(body())


def test_a_message_that_cannot_be_encoded_fails_at_home_and_harms_nobody(run: Any, pair: Any) -> None:
    async def body() -> None:
        async with pair(theirs=echo) as (ours, _):
            with pytest.raises(WireError, match="cannot encode Want"):
                await ours.call(Want(1 << 70), timeout_s=5)
            await ours.call(ReadDir(b""), timeout_s=5)

    run(body())


def test_a_call_beyond_the_limit_is_refused_and_the_others_go_on(run: Any, pair: Any) -> None:
    async def body() -> None:
        release = asyncio.Event()

        async def slow(conn: Connection, message: Message, body: bytes) -> Message:
            await release.wait()
            return Ok()

        async with pair(theirs=slow, limits=Limits(max_serving=3)) as (ours, _):
            served = [asyncio.create_task(ours.call(Ok(), timeout_s=5)) for _ in range(3)]
            await asyncio.sleep(0)
            for data in (b"", b"body"):
                with pytest.raises(Refused, match="more than 3 calls"):
                    await ours.call(Ok(), body=data, timeout_s=5)
            release.set()
            await asyncio.gather(*served)

    run(body())


# -- time and cancellation ------------------------------------------------------------------------


def test_an_answer_that_does_not_come_in_time_is_a_timeout_and_its_handler_is_cancelled(run: Any, pair: Any) -> None:
    async def body() -> None:
        cancelled = asyncio.Event()

        async def wait(conn: Connection, message: Message, body: bytes) -> Message:
            try:
                return await never(conn, message, body)
            finally:
                cancelled.set()

        async with pair(theirs=wait) as (ours, _):
            with pytest.raises(Timeout, match=r"theirs did not answer Ok within 0\.01 s"):
                await ours.call(Ok(), timeout_s=0.01)
            await cancelled.wait()
            assert ours.is_open()

    run(body())


def test_a_cancelled_call_is_forgotten_and_its_late_answer_dropped(run: Any, pair: Any) -> None:
    async def body() -> None:
        asked = asyncio.Event()
        seen: list[Message] = []

        async def stubborn(conn: Connection, message: Message, body: bytes) -> Message:
            if isinstance(message, Want):
                return Ok()
            asked.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                return Want(9)  # answers all the same
            return Ok()

        async with pair(theirs=stubborn) as (ours, theirs):
            call = asyncio.create_task(ours.call(Ok(), timeout_s=5, on_reply=lambda m, _: seen.append(m)))
            await asked.wait()
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            await ours.call(Want(1), timeout_s=5)
            assert seen == []
            assert "0 calls" in repr(ours) and "0 served" in repr(theirs)

    run(body())


def test_a_handler_that_is_cancelled_from_within_is_a_failure(run: Any, pair: Any) -> None:
    async def cancelled(conn: Connection, message: Message, body: bytes) -> Message:
        raise asyncio.CancelledError

    async def body() -> None:
        async with pair(theirs=cancelled) as (ours, _):
            with pytest.raises(Canceled):
                await ours.call(Ok(), timeout_s=5)

    run(body())


def test_a_cancelled_call_stops_the_body_on_its_way(run: Any, pair: Any, zeros: Any) -> None:
    async def body() -> None:
        big = zeros(1 << 40)
        begun = asyncio.Event()

        def serve(conn: Connection, message: Message, body: bytes) -> Message | Reply:
            return Reply(Fetched(big.length), big) if isinstance(message, Fetch) else Ok()

        async with pair(theirs=serve) as (ours, theirs):
            call = asyncio.create_task(ours.call(Fetch(b""), timeout_s=5, sink=lambda _: begun.set()))
            await begun.wait()
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            await ours.call(Ok(), timeout_s=5)
            assert is_closed(big.fd)
            assert "0 bodies" in repr(theirs)

    run(body())


def test_a_cancelled_call_stops_its_own_body_too(run: Any, pair: Any) -> None:
    async def body() -> None:
        async with pair(theirs=lambda *_: Ok()) as (ours, theirs):
            call = asyncio.create_task(ours.call(Ok(), body=bytes(32 * MIB), timeout_s=5))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            await ours.call(Ok(), timeout_s=5)
            assert "0 bodies" in repr(ours) and "0 served" in repr(theirs)

    run(body())


def test_the_time_limit_is_for_each_piece_not_for_the_whole_body(run: Any, pair: Any) -> None:
    async def body() -> None:
        now = time.monotonic()
        async with pair(theirs=lambda *_: Reply(Ok(), bytes(8 * MIB))) as (ours, _):
            # Each piece takes the sink longer than a thirtieth of the limit; the whole takes longer than the limit.
            reply = await ours.call(Ok(), timeout_s=0.3, sink=lambda _: time.sleep(0.01))
            assert reply == Reply(Ok(), b"")
        assert time.monotonic() - now > 0.3

    run(body())


# -- order ----------------------------------------------------------------------------------------


def test_on_reply_runs_before_any_later_frame_is_looked_at(run: Any, pair: Any) -> None:
    """A listing is noted down before the change that the peer sent right after it."""

    async def body() -> None:
        order: list[str] = []
        told = asyncio.Event()

        def notice(conn: Connection, message: Message, body: bytes) -> Message:
            order.append(type(message).__name__)
            told.set()
            return Ok()

        def answer_then_tell(conn: Connection, message: Message, body: bytes) -> Message | Reply:
            asyncio.get_running_loop().call_soon(conn.notify, Cancel(1))
            return Reply(Workers([]), bytes(INLINE_BYTES))

        async with pair(notice, answer_then_tell) as (ours, _):
            await asyncio.gather(
                *[
                    ours.call(Ok(), timeout_s=5, on_reply=lambda m, b: order.append(f"{type(m).__name__}:{len(b)}"))
                    for _ in range(50)
                ]
            )
            await told.wait()
            first_notice = order.index("Cancel")
            assert order.count(f"Workers:{INLINE_BYTES}") == 50
            assert f"Workers:{INLINE_BYTES}" in order[:first_notice]

    run(body())


def test_messages_arrive_in_the_order_in_which_they_were_sent_however_long(run: Any, pair: Any) -> None:
    async def body() -> None:
        seen: list[int] = []

        def collect(conn: Connection, message: Message, body: bytes) -> Message:
            seen.append(len(message.path) if isinstance(message, ReadDir) else -1)
            return Ok()

        sizes = [1, 3 * MAX_PAYLOAD, 2, MAX_PAYLOAD, 3, 10 * MAX_PAYLOAD, 4]
        async with pair(theirs=collect) as (ours, _):
            for size in sizes:
                ours.notify(ReadDir(bytes(size)))
            await ours.call(Want(0), timeout_s=10)
        assert seen == [*sizes, -1]

    run(body())


def test_nothing_is_sent_between_the_return_of_a_handler_and_its_reply(run: Any, pair: Any) -> None:
    async def body() -> None:
        order: list[str] = []

        def notice(conn: Connection, message: Message, body: bytes) -> Message:
            order.append("change")
            return Ok()

        async def long_answer(conn: Connection, message: Message, body: bytes) -> Message:
            asyncio.get_running_loop().call_soon(conn.notify, Cancel(1))
            return StatusText(bytes(3 * MIB))

        async with pair(notice, long_answer) as (ours, theirs):
            await ours.call(Ok(), timeout_s=10, on_reply=lambda *_: order.append("reply"))
            await theirs.call(Ok(), timeout_s=10)
        assert order == ["reply", "change", "change"]

    run(body())


def test_an_exception_of_on_reply_or_sink_fails_its_call_only(run: Any, pair: Any) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    async def body() -> None:
        async with pair(theirs=lambda *_: Reply(Ok(), bytes(4 * MIB))) as (ours, theirs):
            with pytest.raises(ZeroDivisionError):
                await ours.call(Ok(), timeout_s=5, on_reply=fail)
            with pytest.raises(ZeroDivisionError):
                await ours.call(Ok(), timeout_s=5, sink=fail)
            assert len((await ours.call(Ok(), timeout_s=5)).body) == 4 * MIB
            assert "0 bodies" in repr(theirs)

    run(body())


def test_on_reply_is_not_called_with_a_failure(run: Any, pair: Any) -> None:
    async def body() -> None:
        seen: list[object] = []
        async with pair() as (ours, _):
            with pytest.raises(Refused):
                await ours.call(Ok(), timeout_s=5, on_reply=lambda *a: seen.append(a))
        assert seen == []

    run(body())


def test_notifications_are_handled_and_their_failures_only_logged(
    run: Any, pair: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def body() -> None:
        async def later(message: Message) -> Message:
            raise Refused(f"no {type(message).__name__}")

        def handler(conn: Connection, message: Message, body: bytes) -> Any:
            if isinstance(message, Cancel):
                return later(message)
            if isinstance(message, ReadDir):
                raise Refused("no ReadDir")
            return Ok()

        async with pair(theirs=handler) as (ours, _):
            for message in (Cancel(1), ReadDir(b""), Want(1)):
                ours.notify(message)
            await ours.call(Ok(), timeout_s=5)

    with caplog.at_level(logging.WARNING):
        run(body())
    assert "no Cancel" in caplog.text and "no ReadDir" in caplog.text
