"""-fetch-all: while nothing is to do, mirrors are told to fetch what they will be asked for anyway.

The mirror pulls: it is given names in small portions and gets what it lacks in the usual way, with the
usual questions, so nothing new can arrive out of order.  The listings of all directories come first, then
the contents, small files first: every pass over the tree takes the next size class, so that what is
held in memory is one portion and no list of the tree.  A portion is called off as soon as a command
arrives, and asked for again in the next quiet moment.  Loop only.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator

from termite import paths
from termite.errors import TermiteError
from termite.master.export import Export
from termite.master.link import MirrorLink
from termite.master.mirrortasks import MirrorTasks

log = logging.getLogger(__name__)

QUIET_S = 0.25
"""How long nothing must have happened: between two commands of a serial make there is no time for us."""

PORTION_FILES = 64
PORTION_BYTES = 1 << 20
"""One portion; a single larger file is one by itself."""

SIZE_CLASSES = (16 << 10, 128 << 10, 1 << 20, 1 << 62)
MAX_NAMES = 1_000_000
"""What mirrors and master remember of the tree must fit into their memory; more names are left to be asked for."""

REPOSITORIES = frozenset({b".git", b".hg", b".svn"})
"""Commands hardly ever read these, and they are as large as everything else."""


class Quiet:
    """Since when nothing has happened; `is_busy` says what only the daemon knows."""

    def __init__(self, is_busy: Callable[[], bool], now: Callable[[], float] = time.monotonic) -> None:
        self._is_busy = is_busy
        self._now = now
        self._last = now()
        self._interrupt: set[asyncio.Future[object]] = set()

    def disturb(self) -> None:
        """A command or a question has come: whatever `during` runs ends here and now."""
        self._last = self._now()
        for work in list(self._interrupt):
            work.cancel()

    def is_quiet(self) -> bool:
        if self._is_busy():
            self._last = self._now()
        return self._now() - self._last >= QUIET_S

    async def wait(self) -> None:
        """Returns in a quiet moment."""
        while not self.is_quiet():
            await asyncio.sleep(QUIET_S / 2)

    async def during(self, work: asyncio.Future[object]) -> bool:
        """Waits for the work; False if it was called off because the quiet ended."""
        self._interrupt.add(work)
        try:
            await asyncio.wait({work})
        except asyncio.CancelledError:
            work.cancel()
            raise
        finally:
            self._interrupt.discard(work)
        if work.cancelled():
            return False
        work.result()
        return True


class Prefetcher:
    """Fills every mirror that is given to `begin`."""

    def __init__(self, export: Export, quiet: Quiet) -> None:
        self._export = export
        self._quiet = quiet
        self._filling = MirrorTasks()
        self.files = 0  # offered so far, to all mirrors
        self.interrupted = 0  # portions that were called off

    def begin(self, link: MirrorLink) -> None:
        """A mirror was opened."""
        self._filling.begin(link, self._fill(link))

    def end(self, link: MirrorLink) -> None:
        """It is lost."""
        self._filling.end(link)

    async def close(self) -> None:
        await self._filling.close()

    def status(self) -> dict[str, int]:
        """`filling`: mirrors that do not have everything yet."""
        return {"filling": len(self._filling), "names": self.files, "interrupted": self.interrupted}

    async def _fill(self, link: MirrorLink) -> None:
        started, names = time.monotonic(), 0
        try:
            await self._quiet.wait()
            for portion in self._portions():
                await self._offer(link, portion)
                names += len(portion)
        except TermiteError as error:
            log.info("worker %s: fetching ahead ended: %s", link.name, error)
        else:
            took = time.monotonic() - started
            log.info("worker %s: has all of the project, %d names in %.1f s", link.name, names, took)

    async def _offer(self, link: MirrorLink, portion: list[bytes]) -> None:
        while True:
            await self._quiet.wait()
            work: asyncio.Future[object] = asyncio.ensure_future(link.prefetch(portion))
            if await self._quiet.during(work):
                self.files += len(portion)
                return
            self.interrupted += 1

    def _portions(self) -> Iterator[list[bytes]]:
        """Directories, then files by size class.  Looks at the tree as it goes."""
        portion: list[bytes] = []
        for directory in self._directories():
            portion.append(directory)
            if len(portion) >= PORTION_FILES:
                yield portion
                portion = []
        if portion:
            yield portion
        above = -1
        for up_to in SIZE_CLASSES:
            yield from self._files(above, up_to)
            above = up_to

    def _directories(self) -> Iterator[bytes]:
        """All of the project, parents first, as far as workers may see it and memory allows."""
        waiting = list(dict.fromkeys(reversed(self._export.roots)))
        names = 0
        seen = set()
        while waiting:
            path = waiting.pop()
            if path in seen:
                continue  # one root lies in the other
            seen.add(path)
            entries = self._export.read_dir(path).entries
            names += len(entries)
            if names > MAX_NAMES:
                log.info("more than %d files: the rest is fetched when it is asked for", MAX_NAMES)
                return
            yield path
            waiting += [
                paths.join(path, name)
                for name, attr in entries.items()
                if attr.is_dir() and not attr.is_private() and name not in REPOSITORIES
            ]

    def _files(self, above: int, up_to: int) -> Iterator[list[bytes]]:
        """Regular files of this size class, in portions."""
        portion: list[bytes] = []
        size = 0
        for directory in self._directories():
            for name, attr in list(self._export.read_dir(directory).entries.items()):
                if not attr.is_regular() or attr.is_private() or not above < attr.size <= up_to:
                    continue
                if portion and (len(portion) >= PORTION_FILES or size + attr.size > PORTION_BYTES):
                    yield portion
                    portion, size = [], 0
                portion.append(paths.join(directory, name))
                size += attr.size
        if portion:
            yield portion
