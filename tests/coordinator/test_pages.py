"""The coordinator's pages: what workers said of themselves, and commands on their way to them."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp

from termite.coordinator.daemon import Coordinator
from termite.errors import Refused
from termite.web.pages import WebOptions
from termite.wire.auth import Purpose
from termite.wire.messages import (
    Message,
    Ok,
    Register,
    RunningCommand,
    Subscribe,
    Use,
    WorkerCommand,
    WorkerReport,
)
from termite.wire.rpc import Connection
from termite.wire.transport import dial
from tests.coordinator.test_daemon import KEY, LIMIT_S, info, running
from tests.wire.conftest import Run

WEB = WebOptions("127.0.0.1", 0)
REPORT = WorkerReport(
    state="running", load=1.0, cpu=10.0, memory_used=1, memory_total=2, running=1, done=5,
    uses=[Use("me@here:/src", 2, 1)], tasks=[RunningCommand(4, "cc -c <a>.c", "me@here:/src", 3.0)],
)  # fmt: skip


class FakeWorker:
    """Registers, reports once, and keeps what it is told to do."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.conn: Connection | None = None

    def _handle(self, conn: Connection, message: Message, body: bytes) -> Message:
        assert isinstance(message, WorkerCommand)
        if self.told:
            raise Refused("I am <leaving> already")
        self.told.append(message.kind)
        return Ok()

    async def register(self, coordinator: Coordinator, name: str, port: int) -> FakeWorker:
        self.conn = await dial("127.0.0.1", coordinator.port, KEY, Purpose.WORKER_REGISTER, handler=self._handle)
        await self.conn.call(Register(info(name, port)), timeout_s=LIMIT_S)
        await self.conn.call(REPORT, timeout_s=LIMIT_S)
        return self


async def get_json(coordinator: Coordinator, path: str = "/") -> Any:
    url = f"http://127.0.0.1:{coordinator.pages.port}{path}?json"
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        return await answer.json()


def test_a_page_shows_who_runs_what_for_whom(run: Run) -> None:
    async def scenario() -> None:
        async with running(web=WEB) as coordinator:
            master = await dial("127.0.0.1", coordinator.port, KEY, Purpose.MASTER_SUBSCRIBE, handler=lambda *_: Ok())
            await master.call(Subscribe("me@here:/src"), timeout_s=LIMIT_S)
            worker = await FakeWorker().register(coordinator, "w", 1)
            await coordinator.pages.ready()
            status = await get_json(coordinator)
            assert (status["jobs"], status["running"], status["takes_commands"]) == (4, 1, False)
            assert status["workers"][0]["load"]["tasks"][0]["label"] == "cc -c <a>.c"
            assert [(m["name"], m["granted"], m["running"]) for m in status["masters"]] == [("me@here:/src", 2, 1)]
            assert (await get_json(coordinator, "/worker/w"))["name"] == "w"
            assert worker.conn is not None
            await asyncio.gather(worker.conn.close(), master.close())

    run(scenario())


def test_a_command_goes_to_the_worker_that_was_named_or_to_all(run: Run) -> None:
    async def scenario() -> None:
        async with running(web=WEB, web_password="secret") as coordinator:
            workers = [await FakeWorker().register(coordinator, name, port) for port, name in enumerate("abc", 1)]
            await coordinator.pages.ready()
            url = f"http://127.0.0.1:{coordinator.pages.port}/command"
            async with aiohttp.ClientSession() as session:
                async with session.post(url, data={"do": "restart b", "password": "secret"}) as answer:
                    assert answer.status == 200 and "restart: b" in await answer.text()
                assert [w.told for w in workers] == [[], ["restart"], []]
                async with session.post(url, data={"do": "kill b", "password": "secret"}) as answer:
                    assert answer.status == 502 and "I am &lt;leaving&gt; already" in await answer.text()
                async with session.post(url, data={"do": "kill", "password": "secret"}) as answer:
                    assert "kill: 2 of 3 workers" in await answer.text()
                assert [w.told for w in workers] == [["kill"], ["restart"], ["kill"]]
                async with session.post(url, data={"do": "kill nobody", "password": "secret"}) as answer:
                    assert answer.status == 404
            await asyncio.gather(*(w.conn.close() for w in workers if w.conn is not None))

    run(scenario())
