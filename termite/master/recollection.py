"""What mirrors asked for when they were new, so that the next one gets it before it asks.

A new mirror asks for some hundred headers and programs, one after the other, as commands come upon them; each costs a
round trip.  The names of those that are not the project's are remembered in the order in which they were asked for,
across masters too, and offered to each new mirror in portions, for which it asks many at a time (`Prefetch`).  When
there are too many, the oldest go.  Only names are kept: what they contain is looked at anew.  Loop only.

    NUL-terminated paths, oldest first, in a file of the user's for each project
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Callable

from termite import paths
from termite.errors import TermiteError
from termite.master.link import MirrorLink
from termite.master.mirrortasks import MirrorTasks

log = logging.getLogger(__name__)

MOST_NAMES = 4096
MOST_FILE_BYTES = MOST_NAMES * 512
PORTION = 64

LARGE_BYTES, MOST_BYTES = 1 << 20, 64 << 20
"""So much in all is offered to one mirror; of larger files only the list of pieces is sent."""


class Recollection:
    """Of one project.  `directory`: where it is kept between masters; empty: nowhere."""

    def __init__(
        self, root: bytes, directory: bytes, is_excluded: Callable[[bytes], bool] = lambda path: False
    ) -> None:
        self._is_excluded = is_excluded
        self._directory = directory
        self._file = os.path.join(directory, b"first-" + hashlib.sha256(root).hexdigest()[:24].encode())
        self._names: dict[bytes, None] = dict.fromkeys(self._load() if directory else ())
        self._is_new = False
        self._offering = MirrorTasks()

    def __len__(self) -> int:
        return len(self._names)

    def asked_for(self, path: bytes) -> None:
        """By a new mirror; not one of the project's files."""
        if path not in self._names:
            self._names[path] = None
            self._is_new = True
            if len(self._names) > MOST_NAMES:
                del self._names[next(iter(self._names))]

    def _forget(self, name: bytes) -> None:
        """It is not there any more."""
        self._is_new |= self._names.pop(name, self) is None

    # -- telling a new mirror --------------------------------------------------------------------------

    def begin(self, link: MirrorLink) -> None:
        """A mirror was opened."""
        if self._names:
            self._offering.begin(link, self._offer(link, list(self._names)))

    def end(self, link: MirrorLink) -> None:
        """It is lost."""
        self._offering.end(link)

    async def close(self) -> None:
        await self._offering.close()

    async def _offer(self, link: MirrorLink, names: list[bytes]) -> None:
        try:
            left = MOST_BYTES
            for at in range(0, len(names), PORTION):
                portion = []
                for name in names[at : at + PORTION]:
                    try:
                        size = os.lstat(paths.absolute(name)).st_size
                    except OSError:
                        self._forget(name)
                        continue
                    left -= size if size <= LARGE_BYTES else 0
                    if left > 0 and not self._is_excluded(name):
                        portion.append(name)
                if portion:
                    await link.prefetch(portion)
        except TermiteError as error:
            log.info("worker %s: telling it what others asked for ended: %s", link.name, error)

    # -- between masters -------------------------------------------------------------------------------

    def save(self) -> None:
        """If there is anything new.  A disk that does not take it costs a line in the log."""
        if not self._is_new or not self._directory:
            return
        self._is_new = False
        temp = b"%s.%d" % (self._file, os.getpid())
        try:
            os.makedirs(self._directory, 0o700, exist_ok=True)
            with open(temp, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
                file.write(b"".join(name + b"\0" for name in self._names))
            os.rename(temp, self._file)
        except OSError as error:
            log.info("what workers ask for is not kept in %s: %s", paths.for_people(self._file), error.strerror)
            with contextlib.suppress(OSError):
                os.unlink(temp)

    def _load(self) -> list[bytes]:
        try:
            with open(self._file, "rb") as file:
                if os.fstat(file.fileno()).st_uid != os.geteuid():
                    return []
                data = file.read(MOST_FILE_BYTES)
        except OSError:
            return []
        return [name for name in data.split(b"\0")[:-1][:MOST_NAMES] if name and paths.is_clean(name)]
