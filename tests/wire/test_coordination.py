"""A link to a coordinator that comes, goes, refuses and comes back; real sockets on loopback."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from termite.errors import Refused
from termite.wire.auth import Purpose
from termite.wire.coordination import CoordinatorLink, LinkTimes
from termite.wire.messages import Message, Ok, Register, Status, Subscribe, WorkerCommand, WorkerInfo, Workers
from termite.wire.rpc import Connection
from termite.wire.transport import Accepted, listen
from tests.wire.conftest import Run

KEY = b"a secret for tests"
LIMIT_S = 10.0
QUICK = LinkTimes(retry_min_s=0.01, retry_max_s=0.05, retry_refused_s=0.02, settle_s=30.0)


def info(name: str, port: int = 1) -> WorkerInfo:
    return WorkerInfo(name=name, host="h", port=port, jobs=1, arch="x")


class FakeCoordinator:
    """Says Ok to everyone and remembers what they said."""

    def __init__(self) -> None:
        self.greetings: list[Message] = []
        self.conns: list[Connection] = []
        self.refusing = ""
        self.changed = asyncio.Event()

    @asynccontextmanager
    async def listening(self, port: int = 0, key: bytes = KEY) -> AsyncIterator[int]:
        self.changed.clear()
        listener = await listen("127.0.0.1", port, key, self._admit)
        try:
            yield listener.port
        finally:
            await listener.close()
            for conn in self.conns:
                await conn.close("stopped")
            self.conns.clear()

    async def _admit(self, accepted: Accepted) -> None:
        self.conns.append(await accepted.connect(self._serve))

    def _serve(self, conn: Connection, message: Message, body: bytes) -> Message:
        if self.refusing:
            raise Refused(self.refusing)
        self.greetings.append(message)
        self.changed.set()
        return Ok()

    async def greeted(self, link: CoordinatorLink) -> None:
        """Returns when the link has come to this coordinator, and knows it."""
        await self.changed.wait()
        await link.connected.wait()

    async def send(self, *workers: WorkerInfo) -> None:
        await self.conns[-1].call(Workers(list(workers)), timeout_s=LIMIT_S)


def subscriber(port: int, lists: list[list[str]], times: LinkTimes = QUICK, key: bytes = KEY) -> CoordinatorLink:
    def on_workers(workers: list[WorkerInfo]) -> None:
        lists.append([worker.name for worker in workers])

    return CoordinatorLink(
        "127.0.0.1", port, key, Purpose.MASTER_SUBSCRIBE, Subscribe("me"), on_workers, times=times, jitter=lambda: 0.5
    )


async def logged(caplog: pytest.LogCaptureFixture, part: str) -> None:
    """Returns as soon as a log line holds `part`."""
    async with asyncio.timeout(LIMIT_S):
        while part not in caplog.text:
            await asyncio.sleep(0.005)


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "termite.wire.coordination"]


@pytest.fixture(autouse=True)
def _info_level(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "termite.wire.coordination")


def test_a_worker_registers_as_soon_as_it_is_connected(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        coordinator = FakeCoordinator()
        async with coordinator.listening() as port, asyncio.timeout(LIMIT_S):
            link = CoordinatorLink("127.0.0.1", port, KEY, Purpose.WORKER_REGISTER, Register(info("a")))
            link.start()
            link.start()
            await coordinator.greeted(link)
            assert coordinator.greetings == [Register(info("a"))]
            with pytest.raises(Refused):
                await coordinator.send(info("a"))  # no list is wanted
            await link.stop()
            await link.stop()
            assert not link.connected.is_set()
            assert lines(caplog) == [f"coordinator 127.0.0.1:{port} reached"]

    run(test())


def test_what_a_coordinator_says_to_a_worker_reaches_it(run: Run) -> None:
    async def test() -> None:
        coordinator, heard = FakeCoordinator(), list[Message]()

        def on_message(message: Message) -> None:
            if not isinstance(message, WorkerCommand):
                raise Refused("only commands")
            heard.append(message)

        async with coordinator.listening() as port, asyncio.timeout(LIMIT_S):
            link = CoordinatorLink(
                "127.0.0.1", port, KEY, Purpose.WORKER_REGISTER, Register(info("a")), on_message=on_message
            )
            link.start()
            await coordinator.greeted(link)
            await coordinator.conns[-1].call(WorkerCommand("restart"), timeout_s=LIMIT_S)
            with pytest.raises(Refused, match="only commands"):
                await coordinator.conns[-1].call(Status(), timeout_s=LIMIT_S)
            assert heard == [WorkerCommand("restart")]
            await link.stop()

    run(test())


def test_a_worker_that_greets_anew_is_known_by_what_it_said_last(run: Run) -> None:
    async def test() -> None:
        coordinator = FakeCoordinator()
        async with coordinator.listening() as port, asyncio.timeout(LIMIT_S):
            link = CoordinatorLink("127.0.0.1", port, KEY, Purpose.WORKER_REGISTER, Register(info("a")))
            link.start()
            await coordinator.greeted(link)
            coordinator.changed.clear()
            link.greet_anew(Register(info("a", 0)))
            await coordinator.changed.wait()
            assert coordinator.greetings == [Register(info("a")), Register(info("a", 0))]
            await link.stop()

    run(test())


def test_a_master_hears_every_list(run: Run) -> None:
    async def test() -> None:
        coordinator, lists = FakeCoordinator(), list[list[str]]()
        async with coordinator.listening() as port, asyncio.timeout(LIMIT_S):
            link = subscriber(port, lists)
            link.start()
            await coordinator.greeted(link)
            await coordinator.send()
            await coordinator.send(info("a"), info("b", 2))
            await coordinator.send(info("b", 2))
            assert lists == [[], ["a", "b"], ["b"]]
            await link.stop()

    run(test())


def test_a_link_waits_for_a_coordinator_that_is_not_there_yet(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        link = subscriber(port, [])
        link.start()
        await logged(caplog, "is not there")
        coordinator = FakeCoordinator()
        async with coordinator.listening(port), asyncio.timeout(LIMIT_S):
            await coordinator.greeted(link)
            await link.stop()
        first, second = lines(caplog)
        assert first.startswith(f"coordinator 127.0.0.1:{port} is not there: ")
        assert first.endswith("; trying again")
        assert second == f"coordinator 127.0.0.1:{port} back"

    run(test())


def test_a_lost_coordinator_is_found_again_and_each_change_is_one_line(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        coordinator = FakeCoordinator()
        async with coordinator.listening() as port, asyncio.timeout(LIMIT_S):
            link = subscriber(port, [])
            link.start()
            await coordinator.greeted(link)
        await logged(caplog, "lost")
        async with coordinator.listening(port), asyncio.timeout(LIMIT_S):
            await coordinator.greeted(link)
            await link.stop()
        where = f"coordinator 127.0.0.1:{port}"
        assert lines(caplog) == [
            f"{where} reached",
            f"{where} lost: closed by the other side: stopped; trying again",
            f"{where} back",
        ]
        assert coordinator.greetings == [Subscribe("me"), Subscribe("me")]

    run(test())


def test_losing_the_coordinator_takes_no_worker_off_the_list(run: Run) -> None:
    async def test() -> None:
        coordinator, lists = FakeCoordinator(), list[list[str]]()
        async with coordinator.listening() as port, asyncio.timeout(LIMIT_S):
            link = subscriber(port, lists)
            link.start()
            await coordinator.greeted(link)
            await coordinator.send(info("a"), info("b", 2))
        async with coordinator.listening(port), asyncio.timeout(LIMIT_S):
            await coordinator.greeted(link)
            await coordinator.send()  # a coordinator that has just been started
            await coordinator.send(info("b", 2), info("c", 3))
            assert lists == [["a", "b"], ["a", "b"], ["b", "c", "a"]]
            await link.stop()

    run(test())


def test_a_worker_that_does_not_come_back_in_time_is_off_the_list(run: Run) -> None:
    async def test() -> None:
        coordinator, lists = FakeCoordinator(), list[list[str]]()
        times = LinkTimes(retry_min_s=0.01, retry_max_s=0.05, settle_s=0.1)
        async with coordinator.listening() as port, asyncio.timeout(LIMIT_S):
            link = subscriber(port, lists, times)
            link.start()
            await coordinator.greeted(link)
            await coordinator.send(info("a"), info("b", 2))
        async with coordinator.listening(port), asyncio.timeout(LIMIT_S):
            await coordinator.greeted(link)
            await coordinator.send(info("b", 2))
            while lists[-1] != ["b"]:
                await asyncio.sleep(0.01)
            await link.stop()

    run(test())


def test_a_wrong_secret_is_told_once_and_tried_again_slowly(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        coordinator = FakeCoordinator()
        async with coordinator.listening(key=b"another") as port:
            link = subscriber(port, [])
            link.start()
            await logged(caplog, "refused")
            for _ in range(3):  # several attempts, no further line
                await asyncio.sleep(QUICK.retry_refused_s)
            (line,) = lines(caplog)
            assert line == (
                f"coordinator 127.0.0.1:{port} refused: does not accept our secret; "
                "give both sides the same secret file; trying again every 0.02 s"
            )
        async with coordinator.listening(port), asyncio.timeout(LIMIT_S):
            await coordinator.greeted(link)  # somebody has mended it
            await link.stop()
        assert lines(caplog)[-1].endswith("back")

    run(test())


def test_a_coordinator_that_refuses_us_is_told_once(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        coordinator = FakeCoordinator()
        coordinator.refusing = "it speaks version 7"
        async with coordinator.listening() as port, asyncio.timeout(LIMIT_S):
            link = subscriber(port, [])
            link.start()
            await logged(caplog, "refused: it speaks version 7")
            assert not link.connected.is_set()
            coordinator.refusing = ""
            await coordinator.greeted(link)
            await link.stop()

    run(test())


def test_something_else_on_that_port_is_no_reason_to_give_up(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        def on_connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"220 mail.example ESMTP at your service, how do you do, who are you\r\n")
            writer.close()

        server = await asyncio.start_server(on_connect, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        link = subscriber(port, [])
        link.start()
        await logged(caplog, "refused: does not speak our protocol")
        await link.stop()
        server.close()
        await server.wait_closed()

    run(test())


@pytest.mark.parametrize("host", ["a..b", "no-such-host.invalid", "x" * 70])
def test_a_name_that_leads_nowhere_is_told_and_tried_again(
    run: Run, host: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        link = CoordinatorLink(host, 1, KEY, Purpose.MASTER_SUBSCRIBE, Subscribe("me"), times=QUICK)
        link.start()
        await logged(caplog, f"coordinator {host}:1 is not there")
        await link.stop()

    run(test())


@pytest.mark.parametrize("moment", ["dialing", "waiting"])
def test_stopping_is_possible_at_any_moment(run: Run, moment: str, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            link = subscriber(silent.getsockname()[1], [])
            if moment == "waiting":
                silent.close()
            link.start()
            if moment == "waiting":
                await logged(caplog, "is not there")
            else:
                await asyncio.sleep(0)
            async with asyncio.timeout(LIMIT_S):
                await link.stop()

    run(test())


def test_attempts_become_rarer_and_are_spread(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    waits: list[float] = []
    sleep: Callable[[float], object] = asyncio.sleep

    async def test() -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        done = asyncio.Event()

        async def noting(delay: float) -> None:
            waits.append(round(delay, 3))
            if len(waits) == 7:
                done.set()
                await asyncio.Event().wait()

        link = subscriber(port, [], LinkTimes())
        monkeypatch.setattr("termite.wire.coordination.asyncio.sleep", noting)
        link.start()
        await done.wait()
        monkeypatch.setattr("termite.wire.coordination.asyncio.sleep", sleep)
        await link.stop()

    run(test())
    assert waits == [0.2, 0.4, 0.8, 1.6, 3.0, 3.0, 3.0]
    assert CoordinatorLink("h", 1, KEY, Purpose.MASTER_SUBSCRIBE, Subscribe("m"), jitter=lambda: 0)._spread(2.0) == 1.5
    assert CoordinatorLink("h", 1, KEY, Purpose.MASTER_SUBSCRIBE, Subscribe("m"), jitter=lambda: 1)._spread(2.0) == 2.5
