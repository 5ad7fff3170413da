"""Mirror processes, one of them usually started before it is needed: loading an interpreter takes half a second.

A process that waits knows nothing yet, not even the secret; with its `Start` come the connection that it
is to serve and its network namespace.  Loop only.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
from collections.abc import Callable
from typing import NamedTuple

from termite.worker import control

NEXT_AFTER_S = 10.0
"""How long after one was taken the next is started, and how often it is put off while commands run."""

LATEST_AFTER_S = 600.0
"""Then it is started even so: the first build of a master needs the processor more, but builds may go on for ever."""

END_LIMIT_S = 5.0
"""How long one that was never needed may take to end before it is killed."""


class Waiting(NamedTuple):
    """A mirror process, and our end of its control channel."""

    process: asyncio.subprocess.Process
    channel: socket.socket


class Spare:
    """`prepare` begins to start one, `take` gives one away, `close` ends what was not taken."""

    def __init__(self, is_busy: Callable[[], bool] = lambda: False) -> None:
        self._is_busy = is_busy  # do commands run?
        self._starting: asyncio.Task[Waiting] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def prepare_later(self) -> None:
        """In a while, when nothing else is to be done."""
        if self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(NEXT_AFTER_S, self._prepare_if_quiet, loop.time() + LATEST_AFTER_S)

    def _prepare_if_quiet(self, latest: float) -> None:
        loop = asyncio.get_running_loop()
        if self._is_busy() and loop.time() < latest:
            self._timer = loop.call_later(NEXT_AFTER_S, self._prepare_if_quiet, latest)
        else:
            self.prepare()

    def prepare(self) -> None:
        """So that the next `take` need not wait; no effect if one waits already."""
        self._stop_timer()
        if self._starting is None:
            self._starting = asyncio.get_running_loop().create_task(_start())
            self._starting.add_done_callback(_fetch_failure)

    async def take(self) -> Waiting:
        """The one that waits, or another one if it has died; OSError if none can be started."""
        starting, self._starting = self._starting, None
        if starting is not None:
            with contextlib.suppress(OSError):
                waiting = await asyncio.shield(starting)
                if waiting.process.returncode is None:
                    return waiting
                waiting.channel.close()
        return await _start()

    async def close(self) -> None:
        """The end of its channel is the end of a process that waits."""
        self._stop_timer()
        starting, self._starting = self._starting, None
        if starting is not None:
            with contextlib.suppress(OSError):
                waiting = await starting
                waiting.channel.close()
                try:
                    await asyncio.wait_for(waiting.process.wait(), END_LIMIT_S)
                except TimeoutError:
                    waiting.process.kill()
                    await waiting.process.wait()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None


def _fetch_failure(starting: asyncio.Task[Waiting]) -> None:
    """Nobody may ever ask for it; whoever does starts another one and gets its failure."""
    if not starting.cancelled():
        starting.exception()


async def _start() -> Waiting:
    ours, theirs = control.pair()
    try:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "termite.worker.mirror", str(theirs.fileno())),
            pass_fds=(theirs.fileno(),),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the daemon
            env={**_python_environment(), "PATH": os.defpath},
        )
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
    ours.setblocking(False)
    return Waiting(process, ours)


def _python_environment() -> dict[str, str]:
    """What a child interpreter needs to find this very package, and nothing else of ours."""
    return {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "PYTHONDONTWRITEBYTECODE": "1"}
