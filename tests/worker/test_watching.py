"""One epoll for the pipes of all commands, and the thread that has the kernel forget."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Sequence

import pytest

from termite.attr.cache import Stale, What
from termite.errors import BoxError
from termite.worker.notifier import Notifier
from termite.worker.watching import Watch


def test_what_can_be_read_is_told_and_what_was_removed_is_not() -> None:
    async def run() -> None:
        watch = Watch()
        pipes = [os.pipe2(os.O_NONBLOCK) for _ in range(3)]
        read: dict[int, bytes] = {}
        told = asyncio.Event()

        def readable(fd: int) -> None:
            read[fd] = os.read(fd, 10)
            watch.remove(fd)
            told.set()

        for fd, _ in pipes:
            watch.add(fd, lambda fd=fd: readable(fd))  # type: ignore[misc]
        os.write(pipes[0][1], b"one")
        async with asyncio.timeout(10):
            await told.wait()
        told.clear()
        os.write(pipes[0][1], b"more")  # nobody watches it any more
        watch.remove(pipes[1][0])
        os.write(pipes[1][1], b"two")
        os.close(pipes[2][1])  # the end of a pipe is told as well
        async with asyncio.timeout(10):
            await told.wait()
        await asyncio.sleep(0.05)
        assert read == {pipes[0][0]: b"one", pipes[2][0]: b""}
        watch.close()
        for fd in (pipes[0][0], pipes[0][1], pipes[1][0], pipes[1][1], pipes[2][0]):
            os.close(fd)

    asyncio.run(run())


def test_a_callback_that_removes_others_is_the_last_to_be_called() -> None:
    async def run() -> None:
        watch = Watch()
        pipes = [os.pipe2(os.O_NONBLOCK) for _ in range(5)]
        calls: list[int] = []

        def readable(fd: int) -> None:
            calls.append(fd)
            for other, _ in pipes:
                watch.remove(other)

        for fd, _ in pipes:
            watch.add(fd, lambda fd=fd: readable(fd))  # type: ignore[misc]
        for _, fd in pipes:
            os.write(fd, b"x")
        await asyncio.sleep(0.1)
        assert len(calls) == 1
        watch.close()
        for pipe in pipes:
            for fd in pipe:
                os.close(fd)

    asyncio.run(run())


STALE = [Stale(b"a", What.NEW)]


def test_whoever_waits_hears_when_all_before_is_done_and_not_sooner() -> None:
    async def run() -> None:
        go, forgotten = threading.Event(), list[Sequence[Stale]]()

        def forget(stale: Sequence[Stale]) -> None:
            go.wait(10)
            forgotten.append(stale)

        notifier = Notifier(forget)
        assert notifier.is_idle
        await notifier.wait()
        for _ in range(3):
            notifier.add(STALE)
        assert not notifier.is_idle
        waiting = [asyncio.create_task(notifier.wait()) for _ in range(4)]
        waiting[0].cancel()  # a command that was called off
        await asyncio.sleep(0.05)
        assert not any(task.done() for task in waiting[1:])
        go.set()
        async with asyncio.timeout(10):
            await asyncio.gather(*waiting[1:])
        assert len(forgotten) == 3
        assert notifier.is_idle
        notifier.close()

    asyncio.run(run())


def test_many_threads_may_add() -> None:
    async def run() -> None:
        count = 0

        def forget(stale: Sequence[Stale]) -> None:
            nonlocal count
            count += 1

        notifier = Notifier(forget)
        threads = [threading.Thread(target=lambda: [notifier.add(STALE) for _ in range(500)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        await asyncio.to_thread(lambda: [thread.join() for thread in threads])
        async with asyncio.timeout(10):
            await notifier.wait()
        assert count == 2000
        notifier.close()

    asyncio.run(run())


def test_a_failure_is_told_to_whoever_waits() -> None:
    async def run() -> None:
        def forget(stale: Sequence[Stale]) -> None:
            raise OSError("no such mount")

        notifier = Notifier(forget)
        notifier.add(STALE)
        for _ in range(2):
            with pytest.raises(BoxError, match="no such mount"):
                async with asyncio.timeout(10):
                    await notifier.wait()
        notifier.close()

    asyncio.run(run())
