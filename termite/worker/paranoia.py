"""-paranoia, the mirror's part: is what we know consistent, and is it what the master's disk says?

Three looks: at the cache after every change; at some of the files that are read, against the master's disk;
and, when a task has ended, at a random sample of names as commands see them, through the kernel with all that
it has cached, against what the master told.  Costs time, changes nothing, and writes an ERROR line for every
breach, which names the path and both values.  Loop only; files are looked at on a thread.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import random
import stat
from collections.abc import Callable, Sequence
from typing import NamedTuple

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

SAMPLE = 16
"""Names that are looked at through the kernel when a task has ended."""

SAMPLE_BYTES = 1 << 20
"""Larger files are looked at without their contents."""


class Seen(NamedTuple):
    """A name as a command sees it."""

    mode: int  # 0: there is nothing
    size: int
    mtime_ns: int
    target: bytes
    hash: bytes  # b"": not read


class Paranoia:
    """`chance`: random.random, or what a test puts in its place."""

    def __init__(self, cache: AttrCache, chance: Callable[[], float] = random.random) -> None:
        self._cache = cache
        self._chance = chance
        self._running: set[asyncio.Task[None]] = set()
        self._looking: asyncio.Task[None] | None = None
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

    def after_task(self, mountpoint: bytes) -> None:
        """Looks at a sample through the mount; one look at a time.  The kernel must have heard all news."""
        if self._looking is None or self._looking.done():
            self._looking = asyncio.get_running_loop().create_task(self.look_through(mountpoint, self.sample()))

    def sample(self) -> list[bytes]:
        """Names of directories that are known, each directory as likely as any other."""
        found = []
        directories = self._cache.directories()
        for directory in random.sample(directories, min(SAMPLE, len(directories))):
            names = list(self._cache.listing(directory) or ())
            if names:
                found.append(paths.join(directory, random.choice(names)))
        return found

    async def look_through(self, mountpoint: bytes, sample: Sequence[bytes]) -> None:
        before = {path: self._cache.lookup(path) for path in sample}

        def look() -> dict[bytes, Seen | None]:
            return {
                path: _seen(os.path.join(mountpoint, path), bool(attr is not None and attr.hash))
                for path, attr in before.items()
            }

        seen = await asyncio.to_thread(look)
        for path, attr in before.items():
            found = seen[path]
            if attr is None or found is None or self._cache.lookup(path) != attr:
                continue  # not to be had, or news have come meanwhile
            self.checked += 1
            for name in ("mode", "size", "mtime_ns", "target", "hash"):
                told, here = getattr(attr, name), getattr(found, name)
                if (name == "hash" and not (told and here)) or (name == "size" and not attr.is_regular()):
                    continue
                if told != here:
                    shown = (here.hex(), told.hex()) if name == "hash" else (repr(here), repr(told))
                    what = "contents are" if name == "hash" else f"{name} is"
                    self._breach(f"{_shown(path)}: {what} {shown[0]} in a box, but {shown[1]} was told")

    def _breach(self, text: str) -> None:
        self.breaches += 1
        log.error("paranoia: %s", text)


def _digest_of(opened: int | bytes) -> bytes:
    return digest(opened) if isinstance(opened, int) else hashlib.sha256(opened).digest()


def _seen(path: bytes, with_contents: bool) -> Seen | None:
    """None: it cannot be looked at, because the mount has ended or the file may not be read."""
    try:
        st = os.lstat(path)
        target, contents = b"", b""
        if stat.S_ISLNK(st.st_mode):
            target = os.readlink(path)
        elif with_contents and stat.S_ISREG(st.st_mode) and st.st_size <= SAMPLE_BYTES:
            with open(path, "rb", buffering=0) as file:
                contents = digest(file.fileno())
    except FileNotFoundError:
        return Seen(0, 0, 0, b"", b"")
    except OSError:
        return None
    return Seen(st.st_mode, st.st_size, st.st_mtime_ns, target, contents)


def _shown(path: bytes) -> str:
    return paths.for_people(paths.absolute(path))
