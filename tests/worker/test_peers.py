from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from termite.errors import Refused
from termite.store.local import ContentStore
from termite.wire import transport
from termite.wire.auth import Purpose
from termite.wire.messages import Fetch, Fetched, Message, Peer
from termite.wire.rpc import Connection, Reply, Result
from termite.worker import peers as peers_module
from termite.worker.peers import Peers, PeerTimes
from tests.wire.conftest import Run, run

__all__ = ["run"]

KEY = b"a secret for tests"
DATA = os.urandom(700_000)
HASH = hashlib.sha256(DATA).digest()
QUICK = PeerTimes(connect_s=0.3, answer_s=0.3, turn_s=0.1, idle_s=0.2, avoid_s=30, least_rate=1 << 20)


def store(tmp_path: Path, name: str) -> ContentStore:
    return ContentStore(str(tmp_path / name), 1 << 30)


@contextlib.asynccontextmanager
async def listening(serve: Callable[[transport.Accepted], Any]) -> AsyncIterator[Peer]:
    listener = await transport.listen("127.0.0.1", 0, KEY, serve, purposes={Purpose.PEER_FETCH})
    try:
        yield Peer("127.0.0.1", listener.port)
    finally:
        await listener.close()


@contextlib.asynccontextmanager
async def giving(store: ContentStore) -> AsyncIterator[tuple[Peers, Peer]]:
    giver = Peers(store, KEY, QUICK)
    async with listening(giver.serve) as peer:
        yield giver, peer
        await giver.close()


@contextlib.asynccontextmanager
async def getting(store: ContentStore) -> AsyncIterator[Peers]:
    getter = Peers(store, KEY, QUICK)
    yield getter
    await getter.close()


@contextlib.asynccontextmanager
async def odd(answer: Callable[[Fetch], Any]) -> AsyncIterator[Peer]:
    """A peer with an own idea of what to answer."""
    conns: list[Connection] = []

    def handle(conn: Connection, message: Message, body: bytes) -> Result:
        if not isinstance(message, Fetch):
            raise Refused("no")
        result: Result = answer(message)
        return result

    async def serve(accepted: transport.Accepted) -> None:
        conns.append(await accepted.connect(handle))

    async with listening(serve) as peer:
        yield peer
        for conn in conns:
            await conn.close("the test ends")


def test_contents_go_from_one_store_to_another_over_one_connection(run: Run, tmp_path: Path) -> None:
    async def scene() -> None:
        here, there = store(tmp_path, "here"), store(tmp_path, "there")
        others = [os.urandom(100_000) for _ in range(5)]
        hashes = [there.add(data) for data in others]
        there.add(DATA)
        async with giving(there) as (giver, peer), getting(here) as getter:
            assert await getter.get(HASH, len(DATA), [peer])
            found = await asyncio.gather(*(getter.get(digest, 100_000, [peer]) for digest in hashes))
            assert all(found) and all(here.verify(digest) for digest in [HASH, *hashes])
            assert len(giver._served) == 1
            assert getter.bytes_got == giver.bytes_sent == len(DATA) + 500_000

    run(scene())


def test_the_same_contents_wanted_twice_are_fetched_once(run: Run, tmp_path: Path) -> None:
    async def scene() -> None:
        here, there = store(tmp_path, "here"), store(tmp_path, "there")
        there.add(DATA)
        async with giving(there) as (giver, peer), getting(here) as getter:
            assert await asyncio.gather(*(getter.get(HASH, len(DATA), [peer]) for _ in range(4))) == [True] * 4
            assert giver.bytes_sent == len(DATA)

    run(scene())


def test_an_idle_connection_is_closed_and_made_again_when_needed(run: Run, tmp_path: Path) -> None:
    async def scene() -> None:
        here, there = store(tmp_path, "here"), store(tmp_path, "there")
        second = there.add(b"x" * 1000)
        there.add(DATA)
        async with giving(there) as (giver, peer), getting(here) as getter:
            assert await getter.get(HASH, len(DATA), [peer])
            async with asyncio.timeout(5):
                while giver._served:
                    await asyncio.sleep(0.01)
            assert await getter.get(second, 1000, [peer])

    run(scene())


@pytest.mark.parametrize(
    "answer",
    [
        lambda _: Reply(Fetched(len(DATA)), b"?" * len(DATA)),
        lambda _: Reply(Fetched(len(DATA)), DATA[:-1]),
        lambda _: Reply(Fetched(len(DATA)), DATA + b"?"),
        lambda _: Reply(Fetched(len(DATA) + 1), DATA),
        lambda _: Reply(Fetched(len(DATA))),
        lambda message: message,
    ],
    ids=["other bytes", "too few", "too many", "another size", "none", "another message"],
)
def test_a_peer_that_lies_is_passed_over_and_avoided(
    run: Run, tmp_path: Path, answer: Callable[[Fetch], Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "termite.worker.peers")
    caplog.clear()

    async def scene() -> None:
        here, there = store(tmp_path, "here"), store(tmp_path, "there")
        there.add(DATA)
        async with odd(answer) as liar, giving(there) as (_, honest), getting(here) as getter:
            assert not await getter.get(HASH, len(DATA), [liar])
            assert not here.has(HASH)
            assert await getter.get(HASH, len(DATA), [liar, honest])
            assert here.verify(HASH)

    run(scene())
    assert len([r for r in caplog.records if "did not give" in r.getMessage()]) == 1


def test_a_peer_that_says_nothing_or_is_not_there_costs_a_moment(run: Run, tmp_path: Path) -> None:
    async def scene() -> None:
        async def never(_: Fetch) -> Result:
            await asyncio.sleep(20)
            raise AssertionError

        loop = asyncio.get_running_loop()
        async with odd(never) as silent, getting(store(tmp_path, "here")) as getter:
            begun = loop.time()
            assert not await getter.get(HASH, len(DATA), [silent, Peer("127.0.0.1", 1)])
            assert loop.time() - begun < 3

    run(scene())


@contextlib.asynccontextmanager
async def dripping(peer: Peer, every_s: float) -> AsyncIterator[Peer]:
    """The same peer behind a line that lets 4 KiB through at a time."""
    lines: set[asyncio.Task[None]] = set()

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, pause_s: float) -> None:
        try:
            while data := await reader.read(4096):
                writer.write(data)
                await asyncio.sleep(pause_s)
        except ConnectionError:
            pass
        finally:
            writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there = await asyncio.open_connection(peer.host, peer.port)
        for line in (forward(reader, there, 0), forward(there_reader, writer, every_s)):
            lines.add(asyncio.create_task(line))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield Peer("127.0.0.1", server.sockets[0].getsockname()[1])
    finally:
        server.close()
        for line in lines:
            line.cancel()
        await asyncio.gather(*lines, return_exceptions=True)


def test_a_peer_that_is_slow_over_all_is_given_up_for_the_next_one(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    data = os.urandom(3 << 20)

    async def scene() -> None:
        here, there = store(tmp_path, "here"), store(tmp_path, "there")
        digest = there.add(data)
        times = PeerTimes(connect_s=2, connect_ssh_s=0.1, answer_s=1.5, least_rate=10 << 20)
        getter = Peers(here, KEY, times)
        async with giving(there) as (_, peer), dripping(peer, 0.008) as slow:
            assert await getter.get(digest, len(data), [slow, peer])
            await getter.close()
            assert here.verify(digest)

    run(scene())
    (line,) = [message for message in caplog.messages if "did not give" in message]
    assert line.endswith(": too slow")


def test_one_that_lacks_it_is_asked_again_another_time(run: Run, tmp_path: Path) -> None:
    async def scene() -> None:
        here, there = store(tmp_path, "here"), store(tmp_path, "there")
        async with giving(there) as (_, peer), getting(here) as getter:
            assert not await getter.get(HASH, len(DATA), [peer])
            there.add(DATA)
            assert await getter.get(HASH, len(DATA), [peer])

    run(scene())


def test_what_a_receiver_found_damaged_is_removed_from_the_store(run: Run, tmp_path: Path) -> None:
    async def scene() -> None:
        here, there = store(tmp_path, "here"), store(tmp_path, "there")
        there.add(DATA)
        path = tmp_path / "there" / HASH.hex()[:2] / HASH.hex()[2:]
        path.chmod(0o644)
        path.write_bytes(b"?" * len(DATA))
        async with giving(there) as (_, peer), getting(here) as getter:
            assert not await getter.get(HASH, len(DATA), [peer])
            async with asyncio.timeout(5):
                while path.exists():
                    await asyncio.sleep(0.01)

    run(scene())


def test_only_so_many_are_sent_at_a_time(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers_module, "MAX_SENDING", 1)

    async def scene() -> None:
        there = store(tmp_path, "there")
        there.add(DATA)
        giver = Peers(there, KEY, QUICK)
        first = await giver._give(Fetch(HASH))
        with pytest.raises(Refused, match="too many"):
            await giver._give(Fetch(HASH))
        assert isinstance(first, Reply) and not isinstance(first.body, bytes)
        first.body.close()
        second = await giver._give(Fetch(HASH))
        assert isinstance(second, Reply) and not isinstance(second.body, bytes)
        second.body.close()

    run(scene())
