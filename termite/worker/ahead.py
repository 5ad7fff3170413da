"""Fetches what a mirror will be asked for anyway, before it is asked.

The master names it: all of the project (its -fetch-all), or what other mirrors were asked for.

Listings and contents come by the usual questions, in the usual order.  The master calls it off by
cancelling; what was fetched by then is kept.  Loop only.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

from termite import paths
from termite.attr.fileattr import FileAttr
from termite.errors import PrivateError, Refused, WireError
from termite.mirror.view import View
from termite.store.local import ContentStore
from termite.worker.contents import Opened

AT_ONCE = 16
"""Questions on their way at a time: hides the network's delay and leaves room for others."""


class Ahead:
    """`ask_dir` and `ask_file` are the mirror's own ways to ask its master."""

    def __init__(
        self,
        view: View,
        store: ContentStore,
        ask_dir: Callable[[bytes], Awaitable[None]],
        ask_file: Callable[[bytes], Awaitable[tuple[FileAttr, Opened]]],
    ) -> None:
        self._view = view
        self._store = store
        self._ask_dir = ask_dir
        self._ask_file = ask_file

    async def fetch(self, wanted: Sequence[bytes]) -> None:
        """Returns when all of these are here, or cannot be had; StoreError if the store is full."""
        for start in range(0, len(wanted), AT_ONCE):
            await asyncio.gather(*(self._one(paths.checked(path)) for path in wanted[start : start + AT_ONCE]))

    async def _one(self, path: bytes) -> None:
        cache = self._view.cache
        known = cache.lookup(path)
        if known is None:
            await self._ask_dir(paths.split(path)[0])
            known = cache.lookup(path)
        if known is None or known.is_private():
            return
        if known.is_dir():
            if not cache.knows(path):
                await self._ask_dir(path)
        elif known.is_regular() and not (known.hash and self._store.has(known.hash)):
            with suppress(PrivateError, Refused, WireError):  # it has changed since; whoever opens it asks again
                told, opened = await self._ask_file(path)
                if isinstance(opened, int):
                    os.close(opened)
                self._view.learn(path, known, told)
