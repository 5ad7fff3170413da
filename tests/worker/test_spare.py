"""A mirror process that is started ahead of its master."""

from __future__ import annotations

import asyncio
import signal

import pytest

from termite.worker.spare import Spare


def test_what_waits_is_given_away_and_only_once() -> None:
    async def scene() -> None:
        spare = Spare()
        spare.prepare()
        spare.prepare()
        first = await spare.take()
        second = await spare.take()
        assert first.process.pid != second.process.pid
        for waiting in (first, second):
            waiting.channel.close()
            await waiting.process.wait()

    asyncio.run(scene())


def test_one_that_died_while_it_waited_is_replaced() -> None:
    async def scene() -> None:
        spare = Spare()
        spare.prepare()
        assert spare._starting is not None
        dead = await spare._starting
        dead.process.send_signal(signal.SIGKILL)
        await dead.process.wait()
        other = await spare.take()
        assert other.process.returncode is None
        assert other.process.pid != dead.process.pid
        other.channel.close()
        await other.process.wait()

    asyncio.run(scene())


def test_the_next_one_is_started_a_while_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("termite.worker.spare.NEXT_AFTER_S", 0.05)

    async def scene() -> None:
        spare = Spare()
        spare.prepare_later()
        spare.prepare_later()
        assert spare._starting is None
        await asyncio.sleep(0.2)
        assert spare._starting is not None
        await spare.close()
        spare.prepare_later()
        await spare.close()
        await asyncio.sleep(0.2)
        assert spare._starting is None

    asyncio.run(scene())


def test_the_next_one_is_not_started_while_commands_run_but_not_put_off_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("termite.worker.spare.NEXT_AFTER_S", 0.02)
    busy = True

    async def scene() -> None:
        nonlocal busy
        spare = Spare(lambda: busy)
        spare.prepare_later()
        await asyncio.sleep(0.2)
        assert spare._starting is None
        busy = False
        await asyncio.sleep(0.2)
        assert spare._starting is not None
        await spare.close()
        busy = True
        monkeypatch.setattr("termite.worker.spare.LATEST_AFTER_S", 0.1)
        spare.prepare_later()
        await asyncio.sleep(0.4)
        assert spare._starting is not None
        await spare.close()

    asyncio.run(scene())


def test_closing_ends_the_one_that_waits_without_an_error() -> None:
    async def scene() -> None:
        spare = Spare()
        spare.prepare()
        starting = spare._starting
        assert starting is not None
        waiting = await starting
        await spare.close()
        assert waiting.process.returncode == 0

    asyncio.run(scene())


def test_one_that_does_not_end_by_itself_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("termite.worker.spare.END_LIMIT_S", 0.05)

    async def scene() -> None:
        spare = Spare()
        spare.prepare()
        assert spare._starting is not None
        waiting = await spare._starting
        waiting.process.send_signal(signal.SIGSTOP)
        await spare.close()
        assert waiting.process.returncode == -signal.SIGKILL

    asyncio.run(scene())


def test_closing_without_one_is_harmless() -> None:
    asyncio.run(Spare().close())
