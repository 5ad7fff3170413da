"""When what a mirror's store holds in memory goes to disk: some of it if there is too much, all once there is time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from termite.errors import StoreError
from termite.store.recent import RecentStore

log = logging.getLogger(__name__)

QUIET_S = 15.0
"""Without a task for this long, what came or was made lately goes to disk, where others see it too."""


class Spiller:
    """To be told of each task's end (`soon`).  Loop only; the work is done on a thread of its own."""

    def __init__(self, store: RecentStore, is_busy: Callable[[], object]) -> None:
        self._store = store
        self._is_busy = is_busy
        self._loop = asyncio.get_running_loop()
        self._thread = ThreadPoolExecutor(1, "spill")
        self._timer: asyncio.TimerHandle | None = None
        self._quiet_since = 0.0  # when the last task ended, by the loop's clock
        self._spilling: Future[None] | None = None
        self._trouble = ""

    def soon(self) -> None:
        """Some of it now if there is too much, all of it once nothing has run for a while."""
        self._quiet_since = self._loop.time()
        if self._timer is None:
            self._timer = self._loop.call_later(QUIET_S, self._all)
        if self._store.is_full:
            self._start(self._spill)

    def stop(self) -> None:
        """Nothing is started any more."""
        if self._timer is not None:
            self._timer.cancel()

    def close(self) -> None:
        """Blocks until the thread has done what it began."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _all(self) -> None:
        self._timer = None
        left_s = self._quiet_since + QUIET_S - self._loop.time()
        if self._is_busy() or left_s > 0:
            self._timer = self._loop.call_later(max(1.0, left_s), self._all)
        elif self._store.holds:
            self._start(partial(self._spill, 0))

    def _start(self, spill: Callable[[], None]) -> None:
        if self._spilling is None or self._spilling.done():
            self._spilling = self._thread.submit(spill)

    def _spill(self, least_bytes: int = -1) -> None:
        """On the thread.  If the disk is full, memory fills; then tasks go to disk, and fail with a clear error."""
        try:
            self._store.spill(least_bytes)
        except StoreError as e:
            if str(e) != self._trouble:  # once, not with each task
                self._trouble = str(e)
                log.error("what commands have made stays in memory: %s", e)
