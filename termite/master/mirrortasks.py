"""What is done for a mirror beside its commands: one background task each, which ends with the mirror.  Loop only."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine

from termite.master.link import MirrorLink


class MirrorTasks:
    """As many as `len` says."""

    def __init__(self) -> None:
        self._tasks: dict[MirrorLink, asyncio.Task[None]] = {}

    def __len__(self) -> int:
        return len(self._tasks)

    def begin(self, link: MirrorLink, work: Coroutine[None, None, None]) -> None:
        """A mirror was opened."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks[link] = task
        task.add_done_callback(lambda _: self._tasks.pop(link, None))

    def end(self, link: MirrorLink) -> None:
        """It is lost."""
        task = self._tasks.pop(link, None)
        if task is not None:
            task.cancel()

    async def close(self) -> None:
        """None of them runs any more; what they raised is not told."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
