"""Has the kernel forget what is out of date, on a thread of its own, and tells the event loop when that is done.

What `Mount.forget` does may wait for an answer that only the event loop can get; see `mirror/forget.py`.  An executor
would do as well, but every command waits for this, and a future of each kind and its callbacks cost more than the work.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue

from termite.attr.cache import Stale
from termite.errors import BoxError

log = logging.getLogger(__name__)


class Notifier:
    """In order, one at a time.  Made while the loop runs; `close` ends it."""

    def __init__(self, forget: Callable[[Sequence[Stale]], None]) -> None:
        self._forget = forget
        self._loop = asyncio.get_running_loop()
        self._queue: SimpleQueue[Sequence[Stale] | None] = SimpleQueue()
        self._adding = threading.Lock()
        self._added = 0
        self._done = 0  # written by the thread alone
        self._failure: Exception | None = None
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []  # what must be done for them
        self._thread = threading.Thread(target=self._work, name="notify", daemon=True)
        self._thread.start()

    def add(self, stale: Sequence[Stale]) -> None:
        """Any thread; does not wait."""
        with self._adding:
            self._queue.put(stale)
            self._added += 1

    @property
    def is_idle(self) -> bool:
        """True if all that was added is done."""
        return self._done == self._added

    async def wait(self) -> None:
        """Until what was added so far is done; BoxError if anything ever went wrong.  Loop only."""
        if not self.is_idle:
            heard: asyncio.Future[None] = self._loop.create_future()
            self._waiting.append((self._added, heard))
            self._wake()  # it may have been done just now
            await heard
        if self._failure is not None:
            raise BoxError(f"the kernel could not be told what has changed: {self._failure}")

    def close(self) -> None:
        """Does not wait for what is being done."""
        self._queue.put(None)

    def _work(self) -> None:
        while (stale := self._queue.get()) is not None:
            try:
                self._forget(stale)
            except Exception as error:
                log.error("telling the kernel what has changed", exc_info=error)
                self._failure = error
            self._done += 1
            if self._waiting:
                try:
                    self._loop.call_soon_threadsafe(self._wake)
                except RuntimeError:
                    return  # the loop has ended

    def _wake(self) -> None:
        still = []
        for target, heard in self._waiting:
            if target > self._done:
                still.append((target, heard))
            elif not heard.done():
                heard.set_result(None)
        self._waiting = still
