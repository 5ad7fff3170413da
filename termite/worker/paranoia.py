"""-paranoia, the mirror's part: is what we know consistent, and is it what the master's disk says?

Costs time, changes nothing, and writes an ERROR line for every breach, which names the path and both
values.  Loop only; contents are hashed on a thread.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import random
from collections.abc import Callable

from termite import paths
from termite.attr.cache import AttrCache
from termite.attr.fileattr import FileAttr
from termite.errors import TermiteError
from termite.store.local import digest
from termite.wire.messages import Check, Checked, Message
from termite.wire.rpc import Connection

log = logging.getLogger(__name__)

ONE_IN = 8
"""How many of the files that are read are compared with the master's."""

AT_ONCE = 4
"""Comparisons at a time; more are left out, so that the master can breathe."""

LIMIT_S = 60.0


class Paranoia:
    """`chance`: random.random, or what a test puts in its place."""

    def __init__(self, cache: AttrCache, chance: Callable[[], float] = random.random) -> None:
        self._cache = cache
        self._chance = chance
        self._running: set[asyncio.Task[None]] = set()
        self.checked = 0
        self.breaches = 0

    def after_change(self, what: str) -> None:
        """Looks at the invariants of the cache."""
        try:
            self._cache.check()
        except AssertionError as e:
            self._breach(f"the attributes are inconsistent after {what}: {e}")

    def after_reading(self, conn: Connection, path: bytes, expected: bytes, opened: int | bytes | None) -> None:
        """Perhaps compares a file that was just opened for its `expected` hash; a descriptor stays the caller's.

        None: it is read in pieces, each of which is looked at as it comes.
        """
        if len(self._running) >= AT_ONCE or self._chance() >= 1 / ONE_IN:
            return
        own = os.dup(opened) if isinstance(opened, int) else opened
        task = asyncio.get_running_loop().create_task(self._compare(conn, path, expected, own))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _compare(self, conn: Connection, path: bytes, expected: bytes, opened: int | bytes | None) -> None:
        mine: FileAttr | None = None

        def look(_message: Message, _body: bytes) -> None:
            nonlocal mine
            mine = self._cache.lookup(path)  # as of the moment in which the master answered

        try:
            contents = await asyncio.to_thread(_digest_of, opened) if opened is not None else expected
            if contents != expected:
                found = f"contents are {contents.hex()} in the store"
                self._breach(f"{_shown(path)}: {found}, but should be {expected.hex()}")
            reply = await conn.call(Check(path), timeout_s=LIMIT_S, on_reply=look)
        except TermiteError as e:
            log.debug("%s was not compared: %s", _shown(path), e)
            return
        finally:
            if isinstance(opened, int):
                os.close(opened)
        if isinstance(reply.message, Checked) and reply.message.settled and mine is not None:
            self.compare(path, mine, expected, reply.message)

    def compare(self, path: bytes, mine: FileAttr, opened: bytes, checked: Checked) -> None:
        """`opened`: the hash of what commands here read when they opened the path."""
        self.checked += 1
        shown = _shown(path)
        for name in ("mode", "size", "mtime_ns", "target"):
            here, told, disk = (getattr(attr, name) for attr in (mine, checked.told, checked.disk))
            if here != told:
                self._breach(f"{shown}: {name} is {here!r} here, but {told!r} was told")
            elif here != disk:
                self._breach(f"{shown}: {name} is {here!r} here, but {disk!r} on the master's disk")
        disk_hash = checked.disk.hash
        if mine.hash in (b"", opened) and disk_hash and disk_hash != opened:  # else it changed after it was opened
            self._breach(f"{shown}: contents are {opened.hex()} here, but {disk_hash.hex()} on the master's disk")

    def _breach(self, text: str) -> None:
        self.breaches += 1
        log.error("paranoia: %s", text)


def _digest_of(opened: int | bytes) -> bytes:
    return digest(opened) if isinstance(opened, int) else hashlib.sha256(opened).digest()


def _shown(path: bytes) -> str:
    return paths.for_people(paths.absolute(path))
