"""How connections end, by themselves, by their peer, and by breaking the protocol."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

import pytest

from termite.errors import PeerLost
from termite.wire.messages import (
    DirListing,
    Fetch,
    Fetched,
    Message,
    Ok,
    ReadDir,
    Run,
    Want,
)
from termite.wire.rpc import Connection, Limits, Reply
from tests.wire.conftest import sessions, tcp_pair
from tests.wire.handlers import MIB, echo, is_closed, never

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


@pytest.mark.parametrize("turns", range(6))
def test_a_connection_that_is_given_up_while_it_is_made_does_nothing_more(run: Any, turns: int) -> None:
    async def body() -> None:
        ours, theirs = tcp_pair()
        with ours, theirs:
            making = asyncio.create_task(Connection.from_socket(ours, sessions()[0]))
            for _ in range(turns):
                await asyncio.sleep(0)
            making.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                (await making).abort("made in time")
            await asyncio.sleep(0.05)  # whatever is still due complains now

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
REPLY_WITH_BODY, CONTENTS_PIECE, CONTENTS_LAST = 6, 0x8F, 0x90
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


@pytest.mark.parametrize("kind", [CONTENTS_PIECE, CONTENTS_LAST])
def test_contents_without_a_mac_are_taken_by_none_but_a_sink(
    run: Any, raw_pair: Any, session_pair: Any, kind: int
) -> None:
    async def body() -> None:
        sock, peer = raw_pair()
        with peer:
            conn = await Connection.from_socket(sock, session_pair[0])
            call = asyncio.create_task(conn.call(Ok(), timeout_s=5))
            await asyncio.sleep(0)
            for frame in [(REPLY_WITH_BODY, 1, OK), (kind, 1, b"x")]:
                await asyncio.get_running_loop().sock_sendall(peer, b"".join(session_pair[1].seal(*frame)))
            with pytest.raises(PeerLost, match="contents without a MAC in the reply to Ok"):
                await call
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
