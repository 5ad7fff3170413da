"""Commands that wrappers run on this machine in place of themselves.

The wrapper becomes the command, so nobody reports its end: the kernel does, through a pidfd.  Until
the master has looked at the disk again after such an end, what it told the mirrors may be wrong
(`stale`).  Commands that run here only because no worker is there are bounded in number, so that a
`-j50` meant for a farm does not melt one machine.  Loop only.
"""

from __future__ import annotations

import asyncio
import logging
import os
import select

log = logging.getLogger(__name__)


class LocalRuns:
    """`slots`: how many fallback commands may run here at once."""

    def __init__(self, slots: int) -> None:
        self.stale = False
        self.count = 0  # ever started
        self._slots = asyncio.Semaphore(slots)
        self._running: dict[int, tuple[bool, bool]] = {}  # pidfd -> (makes the view stale, holds a slot)

    @property
    def running(self) -> int:
        return len(self._running)

    async def slot(self) -> None:
        """Waits for a place among the fallback commands; `watch(..., holds_slot=True)` gives it back."""
        await self._slots.acquire()

    def give_back(self) -> None:
        self._slots.release()

    def watch(self, pid: int, *, makes_stale: bool, holds_slot: bool = False) -> None:
        """To be called while the wrapper still waits for its answer, so that `pid` is surely its own."""
        self.count += 1
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            self._ended(makes_stale, holds_slot)
            return
        self._running[fd] = (makes_stale, holds_slot)
        asyncio.get_running_loop().add_reader(fd, self._reap, fd)

    def _reap(self, fd: int) -> None:
        flags = self._running.pop(fd, None)
        if flags is None:
            return
        asyncio.get_running_loop().remove_reader(fd)
        os.close(fd)
        self._ended(*flags)

    def _ended(self, makes_stale: bool, holds_slot: bool) -> None:
        self.stale |= makes_stale
        if holds_slot:
            self._slots.release()

    def notice_ends(self) -> None:
        """Takes note of every command that has ended by now.

        Make starts a command only after the one before it has ended; so asking the kernel when a
        request arrives is enough to never miss what a finished local command did.
        """
        if not self._running:
            return
        poller = select.poll()
        for fd in self._running:
            poller.register(fd, select.POLLIN)
        for fd, _ in poller.poll(0):
            self._reap(fd)

    def close(self) -> None:
        for fd in list(self._running):
            asyncio.get_running_loop().remove_reader(fd)
            os.close(fd)
        self._running.clear()
