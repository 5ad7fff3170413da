"""Calls between two connected ends, over real sockets, on every event loop."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from termite.errors import BoxError, Canceled, PeerLost, Refused, TermiteError, Timeout, WireError
from termite.wire.framing import MAX_PAYLOAD
from termite.wire.messages import (
    Cancel,
    DirListing,
    Failure,
    Fetch,
    Fetched,
    Message,
    Ok,
    ReadDir,
    Run,
    StatusText,
    Want,
    Workers,
)
from termite.wire.rpc import INLINE_BYTES, Connection, FileBody, Limits, Reply

MIB = 1024 * 1024


def echo(conn: Connection, message: Message, body: bytes) -> Reply:
    """Answers with what it was given: the path as text, the body as it came."""
    assert isinstance(message, ReadDir)
    return Reply(StatusText(message.path), body)


async def never(conn: Connection, message: Message, body: bytes) -> Message:
    await asyncio.Event().wait()
    raise AssertionError


@pytest.fixture
def zeros(tmp_path: Path) -> Iterator[Callable[[int], FileBody]]:
    """A sparse file's body of any length."""
    path = tmp_path / "zeros"
    path.touch()

    def body(length: int) -> FileBody:
        os.truncate(path, length)
        return FileBody(os.open(path, os.O_RDONLY), 0, length)

    yield body


def is_closed(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return True
    return False


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


# -- bulk bytes -----------------------------------------------------------------------------------


def test_a_quarter_gigabyte_streams_through_little_memory(run: Any, pair: Any, zeros: Any) -> None:
    """Neither end ever holds more than a few pieces."""

    async def body() -> None:
        big = zeros(256 * MIB)
        total, most = 0, 0

        def sink(piece: bytes) -> None:
            nonlocal total, most
            total += len(piece)
            most = max(most, theirs._transport.get_write_buffer_size())

        async with pair(theirs=lambda *_: Reply(Fetched(big.length), big)) as (ours, theirs):
            reply = await ours.call(Fetch(b""), timeout_s=10, sink=sink)
        assert reply == Reply(Fetched(big.length), b"")
        assert total == big.length
        assert most <= 3 * MAX_PAYLOAD
        assert is_closed(big.fd)

    run(body())


def test_a_receiver_that_stands_still_stops_the_sender(run: Any, pair: Any, zeros: Any) -> None:
    async def body() -> None:
        big = zeros(1 << 40)
        async with pair(theirs=lambda *_: Reply(Fetched(1), big)) as (ours, theirs):
            begun = asyncio.Event()

            def sink(piece: bytes) -> None:
                begun.set()
                ours._transport.pause_reading()

            call = asyncio.create_task(ours.call(Fetch(b""), timeout_s=5, sink=sink))
            await begun.wait()
            while not theirs._outbox._paused:
                await asyncio.sleep(0)
            at = os.lseek(big.fd, 0, os.SEEK_CUR)  # pread leaves it alone: the file is only read when it is wanted
            assert at == 0
            assert theirs._transport.get_write_buffer_size() <= 3 * MAX_PAYLOAD
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)

    run(body())


def test_a_small_call_passes_a_large_body(run: Any, pair: Any, zeros: Any) -> None:
    """While 64 MiB are on their way, hundreds of small calls are answered; none waits for the end."""

    async def body() -> None:
        big = zeros(64 * MIB)
        order: list[str] = []

        def serve(conn: Connection, message: Message, body: bytes) -> Message | Reply:
            return Reply(Fetched(1), big) if isinstance(message, Fetch) else Ok()

        async with pair(theirs=serve) as (ours, _):
            fetch = asyncio.create_task(ours.call(Fetch(b""), timeout_s=10, sink=lambda _: order.append("piece")))
            while not order:
                await asyncio.sleep(0)
            while not fetch.done():
                await ours.call(Ok(), timeout_s=10)
                order.append("call")
            await fetch
        pieces = 64 * MIB // MAX_PAYLOAD
        assert order.count("piece") == pieces
        # Bytes in the kernel's buffers on both sides are ahead of a call, whatever we do; 4 MiB each at most.
        longest = max(len(run) for run in "".join("." if o == "piece" else "c" for o in order).split("c"))
        assert longest <= pieces // 4

    run(body())


def test_a_small_message_is_behind_no_more_than_two_pieces_of_our_own(run: Any, pair: Any, zeros: Any) -> None:
    async def body() -> None:
        big = zeros(1 << 40)
        async with pair(theirs=lambda *_: Reply(Fetched(1), big)) as (ours, theirs):
            sizes: list[int] = []
            done = asyncio.Event()

            def sink(piece: bytes) -> None:
                sizes.append(theirs._transport.get_write_buffer_size())
                if len(sizes) == 200:
                    done.set()

            call = asyncio.create_task(ours.call(Fetch(b""), timeout_s=10, sink=sink))
            await done.wait()
            assert max(sizes) <= 2 * (MAX_PAYLOAD + 100)
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)

    run(body())


def test_several_bodies_share_the_connection_evenly(run: Any, pair: Any, zeros: Any) -> None:
    async def body() -> None:
        order: list[int] = []

        def serve(conn: Connection, message: Message, body: bytes) -> Reply:
            return Reply(Fetched(1), zeros(8 * MIB))

        async with pair(theirs=serve) as (ours, _):
            await asyncio.gather(
                *[ours.call(Fetch(b""), timeout_s=10, sink=lambda _, n=n: order.append(n)) for n in range(4)]
            )
        pieces = 8 * MIB // MAX_PAYLOAD
        assert sorted(order) == sorted([0, 1, 2, 3] * pieces)
        assert order.index(3) < 2 * 4  # the last one began after a turn or two, not after the first had ended

    run(body())


def test_part_of_a_file_is_sent_from_its_offset(run: Any, pair: Any, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")

    async def body() -> None:
        fds: list[int] = []

        def serve(conn: Connection, message: Message, body: bytes) -> Reply:
            assert isinstance(message, Fetch)
            fds.append(os.open(path, os.O_RDONLY))
            return Reply(Fetched(10), FileBody(fds[-1], message.offset, 10 - message.offset))

        async with pair(theirs=serve) as (ours, _):
            assert (await ours.call(Fetch(b"", offset=4), timeout_s=5)).body == b"456789"
            assert (await ours.call(Fetch(b"", offset=10), timeout_s=5)).body == b""
        assert all(map(is_closed, fds))

    run(body())


def test_a_file_that_shrinks_while_it_is_sent_fails_the_call_only(run: Any, pair: Any, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(MIB))

    async def body() -> None:
        def serve(conn: Connection, message: Message, body: bytes) -> Message | Reply:
            if isinstance(message, Fetch):
                return Reply(Fetched(1), FileBody(os.open(path, os.O_RDONLY), 0, message.offset))
            return Ok()

        async with pair(theirs=serve) as (ours, _):
            for length in (2 * MIB, MIB + 1):
                with pytest.raises(Refused, match="shorter"):
                    await ours.call(Fetch(b"", offset=length), timeout_s=5)
            path.write_bytes(b"")
            with pytest.raises(Refused, match="shorter"):
                await ours.call(Fetch(b"", offset=5), timeout_s=5)
            await ours.call(Ok(), timeout_s=5)

    run(body())


def test_a_body_too_long_to_be_gathered_fails_its_call_only(run: Any, pair: Any) -> None:
    async def body() -> None:
        async with pair(theirs=lambda *_: Reply(Ok(), bytes(2 * MIB)), limits=Limits(max_body_bytes=MIB)) as (ours, _):
            with pytest.raises(WireError, match="reply to Ok is too long"):
                await ours.call(Ok(), timeout_s=5)
            with pytest.raises(WireError, match="body of Want is too long"):
                await ours.call(Want(1), body=bytes(2 * MIB), timeout_s=5)
            await ours.call(Ok(), timeout_s=5, sink=lambda _: None)

    run(body())


def test_all_bodies_being_gathered_are_bounded_together(run: Any, pair: Any) -> None:
    async def body() -> None:
        limits = Limits(max_held_bytes=3 * MIB)
        async with pair(theirs=lambda *_: Reply(Ok(), bytes(MIB)), limits=limits) as (ours, _):
            results = await asyncio.gather(*[ours.call(Ok(), timeout_s=5) for _ in range(8)], return_exceptions=True)
            assert any(isinstance(r, WireError) for r in results)
            assert any(isinstance(r, Reply) for r in results)
            assert len((await ours.call(Ok(), timeout_s=5)).body) == MIB
            assert ours._calls._held == 0

    run(body())


# -- life and death -------------------------------------------------------------------------------


def test_calls_in_flight_and_later_ones_raise_the_reason_when_the_connection_ends(run: Any, pair: Any) -> None:
    async def body() -> None:
        async with pair(theirs=never) as (ours, theirs):
            calls = [asyncio.create_task(ours.call(Ok(), timeout_s=5)) for _ in range(3)]
            await asyncio.sleep(0)
            await theirs.close("going home")
            for call in calls:
                with pytest.raises(PeerLost, match="lost theirs: closed by the other side: going home"):
                    await call
            with pytest.raises(PeerLost, match="going home"):
                await ours.call(Ok(), timeout_s=5)
            ours.notify(Ok())
            await ours.wait_closed()
            assert not ours.is_open()
            assert theirs.close_reason == "going home"
            assert "ended: closed by the other side: going home" in repr(ours)

    run(body())


def test_handlers_are_cancelled_when_the_one_who_asked_is_gone(run: Any, pair: Any) -> None:
    async def body() -> None:
        begun, ended = asyncio.Event(), asyncio.Event()

        async def wait(conn: Connection, message: Message, body: bytes) -> Message:
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()
            return Ok()

        async with pair(theirs=wait) as (ours, _):
            call = asyncio.create_task(ours.call(Ok(), timeout_s=5))
            await begun.wait()
            ours.abort("crash")
            with pytest.raises(PeerLost, match="crash"):
                await call
            await ended.wait()

    run(body())


def test_files_being_sent_are_closed_when_the_connection_ends(run: Any, pair: Any, zeros: Any) -> None:
    async def body() -> None:
        bodies = [zeros(1 << 40) for _ in range(3)]
        left = list(bodies)
        async with pair(theirs=lambda *_: Reply(Fetched(1), left.pop())) as (ours, theirs):
            begun = asyncio.Event()
            calls = [
                asyncio.create_task(ours.call(Fetch(b""), timeout_s=5, sink=lambda _: begun.set())) for _ in bodies
            ]
            await begun.wait()
            ours.abort("crash")
            await theirs.wait_closed()
            await asyncio.gather(*calls, return_exceptions=True)
        assert all(is_closed(b.fd) for b in bodies)

    run(body())


def test_a_file_answered_too_late_is_closed(run: Any, pair: Any, zeros: Any) -> None:
    async def body() -> None:
        big = zeros(MIB)
        asked, done = asyncio.Event(), asyncio.Event()

        async def late(conn: Connection, message: Message, body: bytes) -> Reply:
            asked.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                done.set()
            return Reply(Fetched(1), big)

        async with pair(theirs=late) as (ours, theirs):
            call = asyncio.create_task(ours.call(Fetch(b""), timeout_s=5))
            await asked.wait()
            ours.abort("crash")
            await asyncio.gather(call, return_exceptions=True)
            await done.wait()
            await theirs.wait_closed()
        assert is_closed(big.fd)

    run(body())


def test_what_was_sent_before_close_is_delivered(run: Any, pair: Any) -> None:
    async def body() -> None:
        seen: list[Message] = []

        def collect(conn: Connection, message: Message, body: bytes) -> Message:
            seen.append(message)
            return Ok()

        async with pair(theirs=collect) as (ours, theirs):
            for n in range(100):
                ours.notify(Want(n))
            await ours.close("done")
            await theirs.wait_closed()
        assert seen == [Want(n) for n in range(100)]

    run(body())


def test_closing_is_bounded_although_the_peer_does_not_read(run: Any, raw_pair: Any, session_pair: Any) -> None:
    async def body() -> None:
        sock, peer = raw_pair()
        with peer:
            conn = await Connection.from_socket(sock, session_pair[0])
            for _ in range(4):
                conn.notify(ReadDir(bytes(4 * MIB)))
            begun = time.monotonic()
            await conn.close()
            assert time.monotonic() - begun < 5

    run(body())


def test_a_silent_peer_is_lost(run: Any, raw_pair: Any, session_pair: Any) -> None:
    async def body() -> None:
        sock, peer = raw_pair()
        with peer:
            conn = await Connection.from_socket(sock, session_pair[0], heartbeat_s=0.01, silence_limit_s=0.1)
            with pytest.raises(PeerLost, match=r"silent for 0\.1 s"):
                await conn.call(Ok(), timeout_s=None)
            await conn.wait_closed()

    run(body())


def test_heartbeats_keep_an_idle_connection_alive(run: Any, pair: Any) -> None:
    async def body() -> None:
        async with pair(heartbeat_s=0.02, silence_limit_s=0.2) as (ours, theirs):
            samples = len(ours._pulse)
            async with asyncio.timeout(10):
                while len(ours._pulse) < samples + 15:
                    await asyncio.wait([asyncio.create_task(ours.wait_closed())], timeout=0.02)
            assert ours.is_open() and theirs.is_open()
            theirs.abort("enough")

    run(body())


def test_a_loop_that_stood_still_does_not_blame_its_peer(run: Any, pair: Any) -> None:
    async def body() -> None:
        async with pair(theirs=echo, heartbeat_s=0.02, silence_limit_s=0.1) as (ours, theirs):
            await ours.call(ReadDir(b""), timeout_s=5)
            time.sleep(0.3)
            await ours.call(ReadDir(b""), timeout_s=5)
            assert ours.is_open() and theirs.is_open()

    run(body())


def test_distance_and_clock_are_known_with_the_first_reply(run: Any, pair: Any) -> None:
    async def body() -> None:
        async with pair(theirs=echo) as (ours, _):
            await ours.call(ReadDir(b""), timeout_s=5)
            assert 0 < ours.rtt_s < 5
            assert abs(ours.clock_offset_ns) < ours.rtt_s * 1e9

    run(body())


def test_a_peer_that_does_not_read_is_lost_when_too_much_waits_for_it(
    run: Any, raw_pair: Any, session_pair: Any
) -> None:
    async def body() -> None:
        sock, peer = raw_pair()
        with peer:
            conn = await Connection.from_socket(sock, session_pair[0], limits=Limits(max_backlog_bytes=8 * MIB))
            async with asyncio.timeout(10):
                while conn.is_open():
                    conn.notify(ReadDir(bytes(MIB)))
                    await asyncio.sleep(0)
            assert "does not read" in conn.close_reason
            await conn.wait_closed()

    run(body())


# -- peers that break the protocol ----------------------------------------------------------------

REQUEST, REQUEST_LAST, REPLY, REPLY_PIECE, PART = 1, 4, 5, 7, 10
OK = b"\x81\xa4type\xa2Ok"


@pytest.mark.parametrize(
    ("frames", "says"),
    [
        ([(99, 1, b"")], "unknown kind 99"),
        ([(REQUEST, 1, b"junk")], "malformed"),
        ([(REPLY, 77, b"junk")], "malformed"),
        ([(REQUEST, 1, OK), (REQUEST, 1, OK)], "made twice"),
        ([(PART, 1, b"x"), (PART, 2, b"x")], "two long messages"),
        ([(PART, 1, b"x"), (REQUEST, 2, b"x")], "two long messages"),
        ([(12, 0, b"short")], "ping of 5 bytes"),
        ([(13, 0, b"short")], "pong of 5 bytes"),
    ],
)
def test_a_peer_that_breaks_the_protocol_is_left_with_a_reason(
    run: Any, raw_pair: Any, session_pair: Any, frames: list[tuple[int, int, bytes]], says: str
) -> None:
    async def body() -> None:
        sock, peer = raw_pair()
        with peer:
            conn = await Connection.from_socket(sock, session_pair[0], never)
            for frame in frames:
                await asyncio.get_running_loop().sock_sendall(peer, b"".join(session_pair[1].seal(*frame)))
            await conn.wait_closed()
            assert says in conn.close_reason
            assert conn.close_reason.startswith("it broke the protocol")

    run(body())


def test_replies_and_pieces_that_nobody_waits_for_do_no_harm(run: Any, raw_pair: Any, session_pair: Any) -> None:
    async def body() -> None:
        sock, peer = raw_pair()
        with peer:
            seen = asyncio.Event()
            conn = await Connection.from_socket(sock, session_pair[0], lambda *_: seen.set() or Ok())
            for frame in [(REPLY, 5, OK), (REPLY_PIECE, 6, b"x"), (REQUEST_LAST, 7, b"x"), (11, 8, b""), (9, 0, OK)]:
                await asyncio.get_running_loop().sock_sendall(peer, b"".join(session_pair[1].seal(*frame)))
            await seen.wait()
            assert conn.is_open()
            conn.abort("test over")
            await conn.wait_closed()

    run(body())


def test_a_changed_byte_ends_the_connection(run: Any, raw_pair: Any, session_pair: Any) -> None:
    async def body() -> None:
        sock, peer = raw_pair()
        with peer:
            conn = await Connection.from_socket(sock, session_pair[0])
            frame = bytearray(b"".join(session_pair[1].seal(REQUEST, 1, OK)))
            frame[12] ^= 1
            await asyncio.get_running_loop().sock_sendall(peer, frame)
            await conn.wait_closed()
            assert "changed, lost, repeated or reordered" in conn.close_reason

    run(body())


def test_a_large_listing_survives(run: Any, pair: Any) -> None:
    from termite.attr.fileattr import FileAttr

    listing = DirListing(True, FileAttr(0o40755), {b"f%d" % n: FileAttr(0o100644, n) for n in range(20_000)})

    async def body() -> None:
        async with pair(theirs=lambda *_: listing) as (ours, _):
            assert (await ours.call(Ok(), timeout_s=10)).message == listing

    run(body())


def test_many_tasks_run_their_calls_at_once(run: Any, pair: Any) -> None:
    async def serve(conn: Connection, message: Message, body: bytes) -> Message:
        assert isinstance(message, Run)
        await asyncio.sleep(0)
        return Want(message.task)

    async def body() -> None:
        async with pair(theirs=serve) as (ours, _):
            run_one = lambda n: ours.call(Run(n, b"x", [], [], b"", 0), timeout_s=20)  # noqa: E731
            replies = await asyncio.gather(*map(run_one, range(2000)))
            assert [r.message.jobs for r in replies] == list(range(2000))

    run(body())
