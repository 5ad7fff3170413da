"""Which workers have which contents, so that our uplink carries each file once.

A mirror that asks for contents is told of up to two others that have them; while the first one is
still fetching them from here, the others wait for it a while instead of fetching them as well: the
line is busy with the same bytes anyway.  Knowledge may be wrong (contents are trimmed, workers lie):
a mirror that was sent elsewhere in vain says so and is served from here.  Loop only.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass, field

from termite.wire.messages import Peer

MAX_KNOWN = 100_000
"""Contents whose holders are remembered; those heard of longest ago are forgotten first."""

NAMED = 2
"""How many holders are named at a time."""

MAX_FAILED = 4
"""A mirror that was failed by this many is served from here, whoever else has it."""

WAIT_BASE_S, WAIT_BYTES_PER_S, WAIT_MAX_S = 1.0, 4 << 20, 20.0
"""How long a mirror waits for another one's fetch of the same contents, by size, and at most."""


@dataclass(slots=True)
class _Known:
    """What is known of one content."""

    holders: dict[str, Peer] = field(default_factory=dict)  # by worker's name
    fetcher: str = ""  # who is fetching it from here now
    size: int = 0
    turn: int = 0  # so that holders are named by turns
    news: asyncio.Event | None = None  # set when the fetch has ended; None: nobody waits for that


class PeerBook:
    """`scale`: multiplies the waiting times; tests make it small."""

    def __init__(self, scale: float = 1.0) -> None:
        self._known: OrderedDict[bytes, _Known] = OrderedDict()
        self._scale = scale
        self.referred = 0  # how many fetches went to peers ...
        self.referred_bytes = 0  # ... and how much that was
        self.returned = 0  # how many of them came back

    def __len__(self) -> int:
        return len(self._known)

    def status(self) -> dict[str, int]:
        """Everything countable."""
        return {
            "fetches_elsewhere": self.referred,
            "bytes_elsewhere": self.referred_bytes,
            "fetches_come_back": self.returned,
        }

    def has(self, digest: bytes, name: str, peer: Peer, size: int = 0) -> None:
        """A worker's store has these contents."""
        known = self._entry(digest)
        known.holders[name] = peer
        known.size = size or known.size
        if known.fetcher == name:
            self._ended(known)

    def has_not(self, digest: bytes, failed: list[Peer]) -> None:
        """These were asked for it in vain."""
        known = self._known.get(digest)
        if known is None or not failed:
            return
        self.returned += 1
        known.holders = {name: peer for name, peer in known.holders.items() if peer not in failed}

    def fetching(self, digest: bytes, name: str, size: int) -> None:
        """A mirror begins to fetch this from here; `has` says that it has it, `lost` that it never will."""
        known = self._entry(digest)
        self._ended(known)
        known.fetcher = name
        known.size = size

    def lost(self, name: str) -> None:
        """A worker is gone."""
        for known in self._known.values():
            known.holders.pop(name, None)
            if known.fetcher == name:
                self._ended(known)

    async def elsewhere(self, digest: bytes, name: str, failed: list[Peer]) -> list[Peer]:
        """Who else has it, perhaps after a wait for somebody's fetch to end; none: serve it."""
        self.has_not(digest, failed)
        if len(failed) >= MAX_FAILED:
            return []
        until: float | None = None
        loop = asyncio.get_running_loop()
        while not (named := self._named(digest, name, failed)):
            known = self._known.get(digest)
            if known is None or known.fetcher in ("", name):
                return []  # whoever is first becomes the fetcher before the next one looks
            if until is None:
                until = loop.time() + self._scale * min(WAIT_MAX_S, WAIT_BASE_S + known.size / WAIT_BYTES_PER_S)
            try:
                known.news = known.news or asyncio.Event()
                async with asyncio.timeout_at(until):
                    await known.news.wait()
            except TimeoutError:
                return []
        return named

    def _named(self, digest: bytes, name: str, failed: list[Peer]) -> list[Peer]:
        known = self._known.get(digest)
        if known is None:
            return []
        holders = [peer for holder, peer in known.holders.items() if holder != name and peer not in failed]
        if not holders:
            return []
        known.turn += 1
        start = known.turn % len(holders)
        self.referred += 1
        self.referred_bytes += known.size
        return (holders[start:] + holders[:start])[:NAMED]

    def _entry(self, digest: bytes) -> _Known:
        known = self._known.get(digest)
        if known is None:
            known = self._known[digest] = _Known()
            if len(self._known) > MAX_KNOWN:
                _, oldest = self._known.popitem(last=False)
                self._ended(oldest)
        else:
            self._known.move_to_end(digest)
        return known

    @staticmethod
    def _ended(known: _Known) -> None:
        known.fetcher = ""
        if known.news is not None:
            known.news.set()
            known.news = None
