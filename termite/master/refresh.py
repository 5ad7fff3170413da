"""Finds what happened on the disk behind the master's back, among all that mirrors were told.

Threads find out which names may have changed (`attr/fingerprint.py`).  They only point at them: the event loop looks
at each of these itself at the moment of comparing, in short steps.  So nothing is ever told that is older than what a
listing or a replayed result has told meanwhile.

What holds between two refreshes, for every name that was told: it is in `Export.touched`, or what was told of it is
what the disk held when the marks of its directory were taken, or the mark of it says that it may have changed.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import chain

from termite import paths
from termite.attr.fileattr import ABSENT, FileAttr, signature_of
from termite.attr.fingerprint import Look, Looked
from termite.errors import PathError, PrivateError
from termite.master.export import SMALL_HASH_BYTES, Export
from termite.master.hashes import RACY_NS, hash_file
from termite.master.reading import in_pieces
from termite.master.staging import TEMP_PREFIX
from termite.wire.messages import Change

_LOOKERS = min(4, os.cpu_count() or 1)
"""Threads that look at the disk: it is the kernel that takes the time, and a build waits for them."""

_STEP_NAMES = 16
"""Names that are compared in one step; on a disk that answers at once that takes 0.2 ms."""


class Refresh:
    """One comparison of everything that was told when this was made.  Loop only."""

    def __init__(self, export: Export) -> None:
        self._export = export
        self._directories = sorted(export.listed, reverse=True)  # what lies below goes first: a step forgets one
        self._marks = dict(export.marks)
        self._found: Iterable[Looked] = ()
        self._large: list[bytes] = []  # files to be hashed again that take long

    async def run(self, tell: Callable[[list[Change]], None]) -> int:
        """All of it; how many changes were told."""
        told = 0
        looks = [asyncio.to_thread(Look, part, self._marks) for part in self._parts()]
        self._found = chain(*await asyncio.gather(*looks))
        async for changes in in_pieces(self.steps()):
            tell(changes)
            told += len(changes)
        for path in self._large:
            changes = await self._hash_large(path)
            tell(changes)
            told += len(changes)
        return told

    def _parts(self) -> Iterator[list[bytes]]:
        size = len(self._directories) // _LOOKERS + 1
        return (self._directories[at : at + size] for at in range(0, len(self._directories), size))

    def look(self) -> None:
        """Waits for the disk; `run` does it on threads."""
        self._found = Look(self._directories, self._marks)

    def steps(self) -> Iterator[list[Change]]:
        """What changed.  Each step is short; between two the caller may let the event loop run."""
        touched, self._export.touched = self._export.touched, {}
        try:
            for looked in self._found:
                path = looked.path
                if path in self._export.listed and self._export.marks.get(path) is self._marks.get(path):
                    yield from self._directory(looked, touched.pop(path, set()))
                else:
                    yield []  # dropped, or told anew since this refresh began
            for path, names in touched.items():
                yield from self._names(path, names)
        except BaseException:
            self._export.marks.clear()  # not everything was compared
            raise

    def _directory(self, looked: Looked, touched: set[bytes]) -> Iterator[list[Change]]:
        path = looked.path
        if looked.marks is None or (b"" in looked.moved and not self._may_be_listed(path)):
            yield self._lost(path)
            return
        told = self._export.listed[path]
        names = touched | set(looked.moved)
        if looked.names is not None:
            names.update([name for name in told if name not in looked.names])
        names.discard(b"")
        yield from self._names(path, names)
        if self._export.listed.get(path) is told:
            self._export.marks[path] = looked.marks

    def _may_be_listed(self, path: bytes) -> bool:
        """Looks at the directory itself."""
        self._export.dir_attrs.pop(path)
        try:
            self._export.dir_attrs[path] = self._export.check_directory(path)
        except (OSError, PathError, PrivateError):
            return False
        return True

    def _lost(self, path: bytes) -> list[Change]:
        """It is a directory no more, or must not be looked into any more."""
        self._export.forget_below(path)
        if not path:
            return []
        changes = [Change(path, ABSENT)]
        directory, name = paths.split(path)
        if directory in self._export.listed:
            attr = self._export.attr_now(path, check_excluded=True)
            self._export.tell(directory, name, attr)
            if attr.mode:
                changes.append(Change(path, attr))
        return changes

    def _names(self, directory: bytes, names: Iterable[bytes]) -> Iterator[list[Change]]:
        told = self._export.listed.get(directory)
        check_excluded = self._export.hides_some_of(directory)
        changes: list[Change] = []
        for count, name in enumerate(names, 1):
            if self._export.listed.get(directory) is not told or told is None:
                break
            if not name.startswith(TEMP_PREFIX):
                changes += self._name(directory, name, told.get(name, ABSENT), check_excluded)
            if count % _STEP_NAMES == 0:
                yield changes
                changes = []
        yield changes

    def _name(self, directory: bytes, name: bytes, told: FileAttr, check_excluded: bool) -> list[Change]:
        path = paths.join(directory, name)
        attr = self._export.attr_now(path, check_excluded=check_excluded)
        if attr.hash and self._export.hashes.is_racy(path):
            attr = self._hash_again(path, attr)
        elif told.hash and not attr.hash:
            self._export.hashes.forget(path)
        if attr == told:
            return []
        if not attr.mode or (told.is_dir() and not attr.is_dir()):
            self._export.forget_below(path)
        self._export.tell(directory, name, attr)
        return [Change(path, attr)]

    # -- files that may have changed without looking different -----------------------------------------

    def _hash_again(self, path: bytes, attr: FileAttr) -> FileAttr:
        if attr.size > SMALL_HASH_BYTES:
            self._large.append(path)
            return attr
        try:
            fd, st = self._export.open_for_reading(path)
        except (OSError, PathError, PrivateError):
            return attr
        try:
            self._export.hashes.count(path, st.st_size, again=True)
            return self._export.remember_hash(path, st, hash_file(fd))
        finally:
            os.close(fd)

    async def _hash_large(self, path: bytes) -> list[Change]:
        try:
            fd, st = self._export.open_for_reading(path)
        except (OSError, PathError, PrivateError):
            return []  # the next refresh will tell
        try:
            await asyncio.sleep((st.st_ctime_ns + RACY_NS - time.time_ns()) / 1e9)
            digest = await asyncio.to_thread(self._export.hashes.hash_contents, path, fd, st.st_size)
            self._export.hashes.count(path, st.st_size, again=True)
            if signature_of(os.lstat(paths.absolute(path))) != signature_of(st):
                return []
        except OSError:
            return []
        finally:
            os.close(fd)
        directory, name = paths.split(path)
        told = self._export.listed.get(directory, {}).get(name, ABSENT)
        attr = self._export.remember_hash(path, st, digest)
        return [Change(path, attr)] if told.mode and attr != told else []
