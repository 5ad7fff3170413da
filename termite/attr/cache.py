"""What a mirror has been told about the master's files, directory by directory.

A directory is either known whole (`listing`), so that every name in it resolves here, found or not,
or not at all; then the mirror must ask.  Reads no disk and asks nobody: listings come in with
`put_listing`, news with `apply`, both **in the order in which they arrived**, or an old answer would
overwrite newer news for good.  What comes out is `Stale`: the names whose cached copies elsewhere (the
kernel) no longer hold.

Threads: writers (the event loop, and `learn` on a FUSE thread) exclude each other with a lock.
Readers take none: each of their steps is one dict operation, which the GIL makes atomic, and a reader
that lost a race has simply looked a moment earlier.
"""

from __future__ import annotations

import enum
import stat
import threading
from collections.abc import Iterable
from typing import NamedTuple, Protocol

from termite import paths
from termite.attr.fileattr import ABSENT, FileAttr


class Listing(Protocol):
    """One directory, as the master answers for it (`DirListing` on the wire)."""

    @property
    def exists(self) -> bool: ...
    @property
    def attr(self) -> FileAttr: ...
    @property
    def entries(self) -> dict[bytes, FileAttr]: ...


class Told(Protocol):
    """One path and its attributes now (`Change` on the wire)."""

    @property
    def path(self) -> bytes: ...
    @property
    def attr(self) -> FileAttr: ...


class What(enum.Enum):
    """In which way a copy of a name is out of date."""

    ATTRIBUTES = "attributes"  # of the same file or directory, with the same contents
    CONTENTS = "contents"  # of the same file, and its attributes
    TARGET = "target"  # of a link, which still is one
    NEW = "new"  # there was nothing
    NAMES = "names"  # of the same directory: what stands in it
    GONE = "gone"  # what was there is not there any more, and perhaps something of another type is


class Stale(NamedTuple):
    """A path whose copies elsewhere are out of date."""

    path: bytes
    what: What
    was_dir: bool = False  # GONE only: other names went with it


class AttrCache:
    """Directories by path; b"" is the root of the exported file system."""

    def __init__(self) -> None:
        self._writing = threading.Lock()
        self._root: FileAttr | None = None  # None: not told yet
        self._dirs: dict[bytes, dict[bytes, FileAttr]] = {}  # the directories that are known whole
        # directory -> its children that are in _dirs or have something below them that is
        self._below: dict[bytes, set[bytes]] = {}

    # -- readers -------------------------------------------------------------------------------

    def lookup(self, path: bytes) -> FileAttr | None:
        """The attributes; ABSENT: known not to exist; None: not known, ask for its directory."""
        if not path:
            return self._root
        directory, _, name = path.rpartition(b"/")
        listing = self._dirs.get(directory)
        if listing is not None:
            return listing.get(name, ABSENT)
        above = self.lookup(directory)
        return ABSENT if above is not None and not above.is_dir() else None

    def listing(self, path: bytes) -> dict[bytes, FileAttr] | None:
        """A copy of the whole directory; None: not known."""
        listing = self._dirs.get(path)
        return None if listing is None else listing.copy()

    def knows(self, path: bytes) -> bool:
        """True if the directory is known whole."""
        return path in self._dirs

    def directories(self) -> list[bytes]:
        """Those that are known whole."""
        return list(self._dirs)

    def __len__(self) -> int:
        """How many names are known."""
        return sum(map(len, list(self._dirs.values())))

    # -- writers -------------------------------------------------------------------------------

    def put_listing(self, path: bytes, told: Listing) -> list[Stale]:
        """Take the answer for a directory; returns what earlier answers said otherwise."""
        with self._writing:
            if not told.exists or not told.attr.is_dir():
                return self._no_directory(path, told.attr if told.exists else ABSENT)
            stale = self._set(path, told.attr)
            known = self._dirs.get(path)
            if known is None:
                self._adopt(path, dict(told.entries))
                return stale
            for name in known.keys() | told.entries.keys():
                stale += self._set(paths.join(path, name), told.entries.get(name, ABSENT))
            return stale

    def apply(self, changes: Iterable[Told]) -> list[Stale]:
        """Take news; returns the paths that really changed, in the order given."""
        stale: list[Stale] = []
        with self._writing:
            for change in changes:
                stale += self._set(change.path, change.attr)
        return stale

    def learn(self, path: bytes, known: FileAttr, attr: FileAttr) -> bool:
        """Replace what the caller has looked up by what it found out since; False: news came first.

        For answers that do not pass through here in their order of arrival (a file's contents).
        """
        with self._writing:
            if self.lookup(path) is not known:
                return False
            self._set(path, attr)
            return True

    def _no_directory(self, path: bytes, attr: FileAttr) -> list[Stale]:
        known = self.lookup(path)
        stale = self._set(path, attr) if attr.exists() or (known is not None and known.is_dir()) else []
        self._drop(path)
        if known is None:  # nothing above says so: remember that there is nothing in it
            self._adopt(path, {})
        return stale

    def _set(self, path: bytes, attr: FileAttr) -> list[Stale]:
        if not path:
            old, self._root = self._root, attr
            return [] if old is None or old == attr else [Stale(path, What.ATTRIBUTES)]
        directory, name = paths.split(path)
        listing = self._dirs.get(directory)
        if listing is None:
            if not attr.is_dir() or not self._dirs.get(path):  # (empty: perhaps known not to be there)
                self._drop(path)
            return []
        old = listing.get(name, ABSENT)
        if old == attr:
            return []
        if old.is_dir() != attr.is_dir():
            self._drop(path)
        if attr.exists():
            listing[name] = attr
        else:
            del listing[name]
        return [staleness(path, old, attr)]

    def _adopt(self, path: bytes, entries: dict[bytes, FileAttr]) -> None:
        """A directory that was not known is known now."""
        for child in list(self._below.get(path, ())):  # told before its parent, and wrong
            if not entries.get(paths.split(child)[1], ABSENT).is_dir():
                self._drop(child)
        self._dirs[path] = entries
        while path:
            directory = paths.split(path)[0]
            siblings = self._below.setdefault(directory, set())
            if path in siblings:
                return
            siblings.add(path)
            path = directory

    def _drop(self, path: bytes) -> None:
        """Forget what is in this directory, and below; costs as much as is known there, no more."""
        pending = [path]
        while pending:
            directory = pending.pop()
            self._dirs.pop(directory, None)
            pending += self._below.pop(directory, ())
        while path:
            above = paths.split(path)[0]
            siblings = self._below.get(above)
            if siblings is None:
                return
            siblings.discard(path)
            if siblings:
                return
            del self._below[above]
            if above in self._dirs:
                return
            path = above

    # -- invariants ----------------------------------------------------------------------------

    def check(self) -> None:
        """Assert what must hold between any two calls."""
        for path, listing in self._dirs.items():
            assert paths.is_clean(path), path
            for name, attr in listing.items():
                assert name and b"/" not in name and name not in (b".", b".."), (path, name)
                assert attr.exists(), (path, name)
            if path:
                parent, name = paths.split(path)
                assert path in self._below.get(parent, ()), f"{path!r} cannot be found from above"
                if parent in self._dirs:
                    assert self._dirs[parent].get(name, ABSENT).is_dir(), f"{path!r} is not a directory"
        for path, children in self._below.items():
            assert children, f"{path!r} has an empty set of children"
            for child in children:
                assert paths.split(child)[0] == path, (path, child)
                assert child in self._dirs or child in self._below, f"{child!r} leads nowhere"


def staleness(path: bytes, old: FileAttr, new: FileAttr) -> Stale:
    """What no longer holds for those who were told `old`."""
    if not old.exists():
        return Stale(path, What.NEW)
    if stat.S_IFMT(old.mode) != stat.S_IFMT(new.mode):
        return Stale(path, What.GONE, old.is_dir())
    if old.target != new.target:
        return Stale(path, What.TARGET)
    same = not old.is_regular() or (old.hash == new.hash != b"" and old.size == new.size)
    return Stale(path, What.ATTRIBUTES if same else What.CONTENTS)
