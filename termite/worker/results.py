"""Large results, which the master fetches after the answer: kept open until then, whatever the store's bound says."""

from __future__ import annotations

import asyncio
import contextlib
import os

from termite.store.local import ContentStore
from termite.wire.messages import Done, Failure, Fetch, Fetched
from termite.wire.rpc import FileBody, Reply, Result

KEPT_S = 120.0
"""How long a result waits for the master to fetch it."""


class LargeResults:
    """`keep` what an answer names, `fetch` it, `close`.  Loop only."""

    def __init__(self, store: ContentStore) -> None:
        self._store = store
        self._held: dict[bytes, int] = {}  # hash -> descriptor

    def __len__(self) -> int:
        return len(self._held)

    def keep(self, done: Done) -> None:
        """Those of its files whose contents do not travel with it."""
        for result in done.files:
            hash = result.attr.hash
            if result.inline_at < 0 and hash and not result.kept and hash not in self._held:
                with contextlib.suppress(KeyError):
                    self._held[hash] = self._store.open(hash)
                    asyncio.get_running_loop().call_later(KEPT_S, self._drop, hash)

    def fetch(self, message: Fetch) -> Result:
        """These contents, or any others in the store."""
        held = self._held.get(message.hash)
        try:
            fd = os.dup(held) if held is not None else self._store.open(message.hash)
        except KeyError:
            return Failure("Refused", f"contents {message.hash.hex()[:16]} are not in this worker's store")
        size = os.fstat(fd).st_size
        if message.offset > size:
            os.close(fd)
            return Failure("Refused", "the offset lies behind the end")
        return Reply(Fetched(size), FileBody(fd, message.offset, size - message.offset))

    def close(self) -> None:
        for hash in list(self._held):
            self._drop(hash)

    def _drop(self, hash: bytes) -> None:
        fd = self._held.pop(hash, -1)
        if fd >= 0:
            os.close(fd)
