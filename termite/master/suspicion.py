"""-paranoia, the whole of it at once: is what mirrors were told what the master remembers, and what the disk holds?

A breach is an error in the log that names the path and both values, is counted, and changes nothing else.
What the disk holds may rightly differ while something else writes to it: a difference counts only where the
disk says that the file has not changed since we looked.  Loop only; costs time.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections import deque
from collections.abc import Callable, Sequence

import msgspec

from termite import paths
from termite.attr.fileattr import ABSENT, FileAttr, signature_of
from termite.errors import TermiteError
from termite.master.export import SMALL_HASH_BYTES, Export
from termite.master.hashes import hash_file
from termite.wire.messages import Change

log = logging.getLogger(__name__)

SAMPLE_DIRECTORIES = 40
SAMPLE_NAMES = 5
"""Of each of these directories."""

_SLACK_NS = 20_000_000
"""A file's ctime may lie this far before the moment of the change."""


class Suspicion:
    """`checks`: invariants of others, run after every change as well."""

    def __init__(
        self, export: Export, checks: Sequence[Callable[[], None]] = (), rng: random.Random | None = None
    ) -> None:
        self.breaches: deque[str] = deque(maxlen=100)
        self.found = 0
        self.compared = 0  # names that were compared with the disk
        self._export = export
        self._checks = checks
        self._rng = rng or random.Random()

    def changed(self, changes: Sequence[Change]) -> None:
        """These changes are about to be told to the mirrors."""
        for path, told in {change.path: change.attr for change in changes}.items():
            directory, name = paths.split(path)
            entries = self._export.listed.get(directory)
            remembered = entries.get(name, ABSENT) if entries is not None and path else told
            if remembered != told:
                self._breach(path, "mirrors are told", told, "remembered is", remembered)
        for check in (lambda: self._export.check({paths.split(c.path)[0] for c in changes}), *self._checks):
            self._hold(check)

    def refreshed(self, since_ns: int) -> None:
        """A refresh that began at this time (wall clock) is over: looks at a random sample."""
        self._hold(self._export.check)
        listed = self._export.listed
        for directory in self._rng.sample(list(listed), min(SAMPLE_DIRECTORIES, len(listed))):
            names = list(listed[directory])
            for name in self._rng.sample(names, min(SAMPLE_NAMES, len(names))):
                path = paths.join(directory, name)
                if not self._export.is_excluded(path):
                    self.compared += 1
                    self._compare(path, listed[directory][name], since_ns - _SLACK_NS)

    def _compare(self, path: bytes, told: FileAttr, since_ns: int) -> None:
        try:
            st = os.lstat(paths.absolute(path))
            on_disk = self._export.look(path)
        except FileNotFoundError:
            if self._unchanged(paths.split(path)[0], since_ns):
                self._breach(path, "mirrors were told", told, "on disk is", ABSENT)
            return
        except OSError:
            return
        if msgspec.structs.replace(told, hash=b"") != msgspec.structs.replace(on_disk, hash=b""):
            if st.st_ctime_ns < since_ns:
                self._breach(path, "mirrors were told", told, "on disk is", on_disk)
        elif told.hash and st.st_size <= SMALL_HASH_BYTES and st.st_ctime_ns < since_ns:
            self._compare_contents(path, told.hash)

    def _compare_contents(self, path: bytes, told: bytes) -> None:
        try:
            fd, st = self._export.open_for_reading(path)
        except (OSError, TermiteError):
            return
        try:
            digest = hash_file(fd)
            if digest != told and signature_of(os.fstat(fd)) == signature_of(st):
                self._breach(path, "mirrors were told contents", told.hex(), "on disk are", digest.hex())
        finally:
            os.close(fd)

    @staticmethod
    def _unchanged(path: bytes, since_ns: int) -> bool:
        try:
            return os.lstat(paths.absolute(path)).st_ctime_ns < since_ns
        except OSError:
            return False

    def _hold(self, check: Callable[[], None]) -> None:
        try:
            check()
        except AssertionError as error:
            self._note(str(error))

    def _breach(self, path: bytes, said: str, one: object, found: str, other: object) -> None:
        self._note(f"{paths.for_people(paths.absolute(path))}: {said} {one}, {found} {other}")

    def _note(self, text: str) -> None:
        self.found += 1
        self.breaches.append(f"{time.strftime('%H:%M:%S')} {text}")
        log.error("paranoia: %s", text)
