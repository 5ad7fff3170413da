"""The coordinator and its peers in one process, over real sockets on loopback."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from termite.coordinator import daemon
from termite.coordinator.daemon import Coordinator, CoordinatorOptions
from termite.errors import AuthError, Refused, TermiteError
from termite.wire.auth import Purpose
from termite.wire.messages import (
    Message,
    Ok,
    OpenMirror,
    Register,
    Status,
    StatusText,
    Subscribe,
    WorkerInfo,
    Workers,
)
from termite.wire.rpc import Connection
from termite.wire.transport import dial
from tests.wire.conftest import Run

KEY = b"a secret for tests"
LIMIT_S = 10.0


@asynccontextmanager
async def running(**changes: Any) -> AsyncIterator[Coordinator]:
    options = CoordinatorOptions(
        key=KEY, host="127.0.0.1", port=0, heartbeat_s=2.0, silence_limit_s=10.0, greeting_limit_s=10.0
    )
    coordinator = Coordinator(dataclasses.replace(options, **changes))
    await coordinator.start()
    try:
        yield coordinator
        coordinator.registry.check()
    finally:
        await coordinator.stop()


def info(name: str, port: int = 1232, host: str = "") -> WorkerInfo:
    return WorkerInfo(name=name, host=host, port=port, jobs=4, arch="x86_64")


async def worker(coordinator: Coordinator, name: str, port: int = 1232, host: str = "") -> Connection:
    conn = await dial("127.0.0.1", coordinator.port, KEY, Purpose.WORKER_REGISTER)
    await conn.call(Register(info(name, port, host)), timeout_s=LIMIT_S)
    return conn


class FakeMaster:
    """Subscribes and keeps every list it is sent."""

    def __init__(self) -> None:
        self.lists: list[list[WorkerInfo]] = []
        self._changed = asyncio.Event()
        self.conn: Connection | None = None

    def _handle(self, conn: Connection, message: Message, body: bytes) -> Message:
        assert isinstance(message, Workers)
        self.lists.append(message.workers)
        self._changed.set()
        return Ok()

    async def subscribe(self, coordinator: Coordinator) -> FakeMaster:
        self.conn = await dial("127.0.0.1", coordinator.port, KEY, Purpose.MASTER_SUBSCRIBE, handler=self._handle)
        await self.conn.call(Subscribe("me@here:/src"), timeout_s=LIMIT_S)
        return self

    async def until(self, *names: str) -> list[WorkerInfo]:
        async with asyncio.timeout(LIMIT_S):
            while not self.lists or [w.name for w in self.lists[-1]] != list(names):
                self._changed.clear()
                await self._changed.wait()
        return self.lists[-1]

    async def close(self) -> None:
        assert self.conn is not None
        await self.conn.close()


def test_a_master_gets_the_list_at_once_and_on_every_change(run: Run) -> None:
    async def test() -> None:
        async with running() as coordinator:
            a = await worker(coordinator, "a", 1)
            master = await FakeMaster().subscribe(coordinator)
            (entry,) = await master.until("a")
            assert (entry.host, entry.port, entry.jobs) == ("127.0.0.1", 1, 4)
            b = await worker(coordinator, "b", 2)
            await master.until("a", "b")
            await a.close()
            await master.until("b")
            b.abort("killed")
            await master.until()
            await master.close()

    run(test())


def test_the_first_list_may_be_empty(run: Run) -> None:
    async def test() -> None:
        async with running() as coordinator:
            master = await FakeMaster().subscribe(coordinator)
            assert await master.until() == []
            await master.close()

    run(test())


def test_many_changes_in_one_turn_of_the_loop_are_one_list(run: Run) -> None:
    async def test() -> None:
        async with running() as coordinator:
            master = await FakeMaster().subscribe(coordinator)
            await master.until()
            conn = await dial("127.0.0.1", coordinator.port, KEY, Purpose.WORKER_REGISTER)
            for jobs in range(50):  # one write, so they arrive together
                conn.notify(Register(msgspec.structs.replace(info("a"), jobs=jobs)))
            conn.notify(Register(info("last")))
            await master.until("last")
            assert len(master.lists) < 25
            await conn.close()
            await master.until()
            await master.close()

    run(test())


def test_a_worker_that_is_frozen_is_lost_within_the_silence_limit(run: Run) -> None:
    async def test() -> None:
        async with running(heartbeat_s=0.05, silence_limit_s=0.3) as coordinator:
            master = await FakeMaster().subscribe(coordinator)
            frozen = await worker(coordinator, "frozen")
            await master.until("frozen")
            transport = frozen._transport
            assert transport is not None
            transport.pause_reading()  # it answers no ping any more ...
            if frozen._timer is not None:
                frozen._timer.cancel()  # ... and sends none
            started = asyncio.get_running_loop().time()
            await master.until()
            assert asyncio.get_running_loop().time() - started < 2.0
            frozen.abort("thawed")
            await frozen.wait_closed()
            await master.close()

    run(test())


def test_a_worker_may_name_the_host_where_it_is_reached(run: Run) -> None:
    async def test() -> None:
        async with running() as coordinator:
            conn = await worker(coordinator, "a", host="build7.example")
            assert [w.host for w in coordinator.registry.workers()] == ["build7.example"]
            await conn.close()

    run(test())


def test_a_worker_beside_the_coordinator_is_shown_to_others_where_they_reach_the_coordinator() -> None:
    here = daemon._Peer(Purpose.MASTER_SUBSCRIBE, host="127.0.0.1", reached_at="127.0.0.1")
    elsewhere = daemon._Peer(Purpose.MASTER_SUBSCRIBE, host="10.0.0.9", reached_at="10.0.0.1")
    beside, remote = info("a", host="127.0.0.1"), info("b", host="10.0.0.7")
    assert daemon._seen_from(here, beside).host == "127.0.0.1"
    assert daemon._seen_from(elsewhere, beside).host == "10.0.0.1"
    assert daemon._seen_from(elsewhere, info("c", host="::1")).host == "10.0.0.1"
    assert daemon._seen_from(elsewhere, remote) is remote
    assert daemon._seen_from(elsewhere, info("d", host="some.host")).host == "some.host"


def test_the_status_tells_who_is_there(run: Run) -> None:
    async def test() -> None:
        async with running() as coordinator:
            conn = await worker(coordinator, "a")
            reply = await conn.call(Status(), timeout_s=LIMIT_S)
            assert isinstance(reply.message, StatusText)
            status = msgspec.json.decode(reply.message.json)
            assert [w["name"] for w in status["workers"]] == ["a"]
            assert status["jobs"] == 4
            await conn.close()

    run(test())


def test_other_purposes_and_other_secrets_are_not_admitted(run: Run) -> None:
    async def test() -> None:
        async with running() as coordinator:
            for purpose in (Purpose.MASTER_MIRROR, Purpose.PEER_FETCH, Purpose.CONTROL):
                with pytest.raises(AuthError, match=purpose.name):
                    await dial("127.0.0.1", coordinator.port, KEY, purpose)
            with pytest.raises(AuthError, match="secret"):
                await dial("127.0.0.1", coordinator.port, b"another", Purpose.WORKER_REGISTER)
            assert coordinator.registry.workers() == []

    run(test())


def test_messages_of_the_other_kind_of_peer_are_refused(run: Run) -> None:
    async def test() -> None:
        async with running() as coordinator:
            conn = await dial("127.0.0.1", coordinator.port, KEY, Purpose.WORKER_REGISTER)
            mirror = OpenMirror(master="m", root=b"", uid=0, gid=0, jobs=1)
            for message in (Subscribe("m"), Workers([]), mirror, Register(info("")), Register(info("a"), version=99)):
                with pytest.raises(Refused):
                    await conn.call(message, timeout_s=LIMIT_S)
            assert coordinator.registry.workers() == []
            await conn.close()

    run(test())


def test_who_does_not_say_who_it_is_is_sent_away(run: Run) -> None:
    async def test() -> None:
        async with running(greeting_limit_s=0.05) as coordinator:
            silent = await dial("127.0.0.1", coordinator.port, KEY, Purpose.WORKER_REGISTER)
            async with asyncio.timeout(LIMIT_S):
                await silent.wait_closed()

    run(test())


def test_one_too_many_is_sent_away(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon, "MAX_PEERS", 1)

    async def test() -> None:
        async with running() as coordinator:
            first = await worker(coordinator, "a")
            second = await dial("127.0.0.1", coordinator.port, KEY, Purpose.WORKER_REGISTER)
            async with asyncio.timeout(LIMIT_S):
                await second.wait_closed()
            assert first.is_open()
            await first.close()

    run(test())


def test_garbage_and_silence_disturb_nobody(run: Run) -> None:
    async def test() -> None:
        async with running() as coordinator:
            strangers = []
            for text in (b"GET / HTTP/1.0\r\n\r\n", b"\0" * 10_000, b""):
                stranger = socket.create_connection(("127.0.0.1", coordinator.port))
                stranger.sendall(text)
                strangers.append(stranger)
            master = await FakeMaster().subscribe(coordinator)
            conn = await worker(coordinator, "a")
            await master.until("a")
            for stranger in strangers:
                stranger.close()
            await conn.close()
            await master.close()

    run(test())


def test_stopping_says_goodbye_to_everyone(run: Run) -> None:
    async def test() -> None:
        async with running() as coordinator:
            master = await FakeMaster().subscribe(coordinator)
            conn = await worker(coordinator, "a")
        async with asyncio.timeout(LIMIT_S):
            await conn.wait_closed()
            assert master.conn is not None
            await master.conn.wait_closed()
        assert "the coordinator was stopped" in conn.close_reason

    run(test())


def test_a_taken_port_is_an_error_with_the_remedy(run: Run) -> None:
    async def test() -> None:
        async with running() as coordinator:
            with pytest.raises(TermiteError, match="is taken"):
                async with running(port=coordinator.port):
                    pass

    run(test())
