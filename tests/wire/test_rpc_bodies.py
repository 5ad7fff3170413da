"""Bulk bytes that go with calls: streamed, fair, bounded."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from termite.errors import PeerLost, Refused, WireError
from termite.wire.framing import MAX_PAYLOAD
from termite.wire.messages import (
    Fetch,
    Fetched,
    Message,
    Ok,
    Want,
)
from termite.wire.rpc import Connection, FileBody, Limits, Reply
from tests.wire.handlers import MIB, is_closed

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
            for offset in (4, 10):
                got = bytearray()
                assert (await ours.call(Fetch(b"", offset=offset), timeout_s=5, sink=got.extend)).body == b""
                assert got == b"0123456789"[offset:]
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
                    await ours.call(Fetch(b"", offset=length), timeout_s=5, sink=len)
            path.write_bytes(b"")
            with pytest.raises(Refused, match="shorter"):
                await ours.call(Fetch(b"", offset=5), timeout_s=5, sink=len)
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


def test_what_comes_without_a_mac_is_only_for_those_who_compare_it(run: Any, pair: Any) -> None:
    async def body() -> None:
        async with pair(theirs=lambda *_: Reply(Ok(), bytes(MIB), hashed=True)) as (ours, _):
            assert (await ours.call(Ok(), timeout_s=5, compares=True)).body == bytes(MIB)
            assert (await ours.call(Ok(), timeout_s=5, sink=lambda _: None)).body == b""
            with pytest.raises(PeerLost, match="without a MAC"):
                await ours.call(Ok(), timeout_s=5)

    run(body())
