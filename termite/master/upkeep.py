"""What the master does beside running commands: the ends of builds, and the use of quiet moments.

Builds: notices when a topmost make has ended and logs what it came to (`builds.py`).  Quiet moments: hashes
go into xattrs (`hashes.py`), mirrors fetch ahead (`prefetch.py`, `recollection.py`).  Loop only.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable

from termite.errors import UsageError
from termite.master.builds import LOCAL, Build, Builds, token_in
from termite.master.export import SMALL_HASH_BYTES, Export
from termite.master.link import MirrorLink
from termite.master.local import Caller, LocalRequest
from termite.master.prefetch import Prefetcher, Quiet
from termite.master.recollection import Recollection

log = logging.getLogger(__name__)

LOCAL_AS_ASKED = f"{LOCAL}, asked for"
"""$(shell ...) and `termite-shell-wrapper -local`."""

SAVE_AT_ONCE = 16
"""Xattrs set in one go: one or two milliseconds."""

LAST_SAVE_S = 5.0
"""How long the end of the master may be put off for xattrs that are still to be set."""


class Upkeep:
    """`served`: bytes sent to workers so far; `is_busy`: is there anything that must not be disturbed?"""

    def __init__(
        self,
        export: Export,
        recollection: Recollection,
        served: Callable[[], int],
        is_busy: Callable[[], bool],
        *,
        fetch_all: bool,
    ) -> None:
        self.builds = Builds()
        self.quiet = Quiet(is_busy)
        self.prefetcher = Prefetcher(export, self.quiet) if fetch_all else None
        self._export = export
        self._recollection = recollection
        self._served = served
        self._watched: dict[int, bytes] = {}  # pidfd -> token

    # -- builds --------------------------------------------------------------------------------------

    def build_begins(self, request: LocalRequest, caller: Caller) -> None:
        """To be called while the caller still waits for its answer, so that its pid is surely its own."""
        token = token_in(request.env)
        if not token or token in self._watched.values():
            return
        try:
            fd = os.pidfd_open(caller.pid)
        except OSError:
            return
        self.builds.begin(token, caller.pid, time.monotonic(), self._served())
        self._watched[fd] = token
        asyncio.get_running_loop().add_reader(fd, self._build_ends, fd)
        log.info("build %d: begins", caller.pid)

    def _build_ends(self, fd: int) -> None:
        asyncio.get_running_loop().remove_reader(fd)
        os.close(fd)
        build = self.builds.end(self._watched.pop(fd), time.monotonic(), self._served())
        if build is not None:
            log.info("build %d: ended: %s", build.pid, build.summary())

    def summarize(self, request: LocalRequest, caller: Caller) -> None:
        """Answers a make that is about to end; a build that ran nothing is not worth a line."""
        token = token_in(request.env)
        build = self.builds.so_far(token, time.monotonic(), self._served())
        if build is None and not token:
            raise UsageError("a summary is for builds only")
        if build is not None and build.counts.keys() - {LOCAL_AS_ASKED}:
            caller.message(build.summary())
        caller.exit_status(0)

    def status(self) -> dict[str, object]:
        """For `-inspect`."""
        last = self.builds.ended[-1] if self.builds.ended else None
        return {
            "builds": {"running": self.builds.running, "last": last.as_dict() if last is not None else None},
            "fetch_all": self.prefetcher.status() if self.prefetcher is not None else None,
        }

    def count(self, build: Build, what: str) -> None:
        self.builds.count(build, what)

    # -- mirrors -------------------------------------------------------------------------------------

    def mirror_opened(self, link: MirrorLink) -> None:
        """It is told what it will ask for."""
        self._recollection.begin(link)
        if self.prefetcher is not None:
            self.prefetcher.begin(link)

    def asked_for(self, path: bytes) -> None:
        """A mirror asked what a file contains."""
        if not self._export.is_of_project(path):
            self._recollection.asked_for(path)

    def mirror_lost(self, link: MirrorLink) -> None:
        self._recollection.end(link)
        if self.prefetcher is not None:
            self.prefetcher.end(link)

    # -- quiet moments -------------------------------------------------------------------------------

    async def household(self) -> None:
        """Sets xattrs as long as nothing else is to be done."""
        while self._export.hashes.unsaved and self.quiet.is_quiet():
            self._export.hashes.save_some(SAVE_AT_ONCE, SMALL_HASH_BYTES)
            await asyncio.sleep(0.002)
        if self.quiet.is_quiet():
            self._export.hashes.save_file()
            self._recollection.save()

    async def close(self) -> None:
        """Once no more commands come."""
        if self.prefetcher is not None:
            await self.prefetcher.close()
        await self._recollection.close()
        self._recollection.save()
        for fd in list(self._watched):
            self._build_ends(fd)
        self._export.hashes.save_file()
        until = time.monotonic() + LAST_SAVE_S
        while self._export.hashes.unsaved and time.monotonic() < until:
            self._export.hashes.save_some(SAVE_AT_ONCE, 1 << 62)
        if self._export.hashes.unsaved:
            log.info("%d files will be hashed again by the next master", self._export.hashes.unsaved)
