"""A worker's job slots: how they are shared among masters, and how the tasks of one master take turns.

`share`: everyone gets what they want while there is enough, otherwise equal shares, what one does not
want going to the others.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping

from termite.errors import Leaving


def share(total: int, wants: Mapping[int, int]) -> dict[int, int]:
    """Slots granted per master key.  The sum is min(total, sum of wants); ties go to the earlier key."""
    granted = dict.fromkeys(wants, 0)
    left = total
    while left > 0:
        hungry = [key for key, want in wants.items() if granted[key] < want]
        if not hungry:
            break
        each = max(1, left // len(hungry))
        for key in hungry:
            more = min(each, wants[key] - granted[key], left)
            granted[key] += more
            left -= more
    return granted


class Turns:
    """The slots that one mirror was granted; tasks beyond them wait, first come, first served.  Loop only."""

    def __init__(self) -> None:
        self.granted = 0
        self.running = 0
        self.closed = ""  # why no more tasks are taken; empty: they are
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def waiting(self) -> int:
        return sum(not turn.done() for turn in self._waiting)

    async def take(self) -> None:
        """Returns when there is a slot; Leaving if there will be none."""
        if self.closed:
            raise Leaving(self.closed)
        if self.running < self.granted and not self._waiting:
            self.running += 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give_back()  # it came in the same moment
            raise

    def give_back(self) -> None:
        self.running -= 1
        self._hand_out()

    def grant(self, slots: int) -> None:
        """So many from now on; tasks that run are left alone."""
        self.granted = slots
        self._hand_out()

    def close(self, reason: str) -> None:
        """Turns away those who wait and those who come."""
        self.closed = reason
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_exception(Leaving(reason))

    def _hand_out(self) -> None:
        while self._waiting and self.running < self.granted:
            turn = self._waiting.popleft()
            if not turn.done():
                self.running += 1
                turn.set_result(None)
