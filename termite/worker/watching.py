"""Watches the pipes of running commands for the event loop.

A reader of the event loop's own costs half a dozen system calls to add and to remove, and every command has three.
Here they share one epoll, which the loop watches instead.  Loop only.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
from collections.abc import Callable


class Watch:
    """Until `close`; made while the loop runs."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callable[[], None]] = {}
        asyncio.get_running_loop().add_reader(self._epoll.fileno(), self._ready)

    def add(self, fd: int, readable: Callable[[], None]) -> None:
        """`readable` is called as long as there is something to read, or the end; now and then for nothing."""
        self._epoll.register(fd, select.EPOLLIN)
        self._callbacks[fd] = readable

    def remove(self, fd: int) -> None:
        """To be called before the descriptor is closed; no effect if it is not watched, or after `close`."""
        if self._callbacks.pop(fd, None) is not None and not self._epoll.closed:
            self._epoll.unregister(fd)

    def close(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            asyncio.get_running_loop().remove_reader(self._epoll.fileno())
        self._epoll.close()

    def _ready(self) -> None:
        for fd, _ in self._epoll.poll(0):
            readable = self._callbacks.get(fd)
            if readable is not None:  # else another one's callback has removed it
                readable()
