"""Directories that a command renamed: done first, whatever way they went (swaps, chains, into each other).

A plain rename is done at once.  One whose new place is not there yet, or still taken, is put aside under
a temporary name in the root and takes its place when the walk through the result gets there.  Paths are
relative to the root.
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Mapping

from termite import paths
from termite.master.staging import temp_name
from termite.master.tree import Tree
from termite.wire.messages import FileResult

_TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR, errno.EINVAL, errno.EBUSY)


class Renames:
    """`moves`: new path -> path before the command; `files`: the whole result."""

    def __init__(self, tree: Tree, moves: dict[bytes, bytes], files: Mapping[bytes, FileResult]) -> None:
        self._tree = tree
        self._pending = moves
        self._files = files
        self._aside: dict[bytes, tuple[bytes, bytes]] = {}  # new path -> (temporary path, path before)
        self._done: set[bytes] = set()  # new paths that are in place
        self._moved: list[tuple[bytes, bytes, list[bytes]]] = []  # path before, new path, what is below

    def start(self) -> None:
        """Do the plain ones, put the others aside.  Nothing else may have changed before."""
        progress = True
        while self._pending and progress:
            progress = False
            for target, source in self._deepest_first():
                if self._is_free(target, source) and self._rename(source, target, target):
                    del self._pending[target]
                    self._done.add(target)
                    progress = True
        for target, source in self._deepest_first():
            aside = temp_name()
            if self._rename(source, aside, target):
                self._aside[target] = (aside, source)

    def place(self, path: bytes) -> bool:
        """True if the directory with this new path stands there now; False if there is none to put there."""
        if path not in self._aside:
            return path in self._done
        if self._tree.stat(path) is not None:
            self._tree.clear_for(path)
        self._tree.rename(self._aside[path][0], path)
        del self._aside[path]
        return True

    def put_back(self) -> None:
        """After a failure: whatever is aside returns to where it was, if there is still room."""
        for aside, source in self._aside.values():
            if self._tree.stat(source) is None:
                self._tree.rename(aside, source)
            else:
                self._tree.notes.append(f"{paths.for_people(source)}: is now {paths.for_people(aside)}")
        self._aside.clear()

    def changed(self) -> set[bytes]:
        """Every path that may now show something else, or nothing."""
        changed: set[bytes] = set()
        for source, target, below in self._moved:
            changed.update((source, target))
            for top in (source, target):
                if self._tree.stat(top) is not None:
                    changed.update(paths.join(top, path) for path in below)
        return changed

    def _deepest_first(self) -> list[tuple[bytes, bytes]]:
        """A directory leaves another one before that one is renamed itself."""
        return sorted(self._pending.items(), key=lambda item: -item[1].count(b"/"))

    def _is_free(self, target: bytes, source: bytes) -> bool:
        """True if `source` and the directory that is to hold `target` are already what they will be."""
        for other in self._pending.values():
            if paths.is_inside(target, other) or (other != source and paths.is_inside(other, source)):
                return False
        parent = paths.split(target)[0]
        if self._tree.existing(parent) < 0:
            return False
        while parent:
            file = self._files.get(parent)
            if file is not None and (not stat.S_ISDIR(file.attr.mode) or file.opaque):
                return False
            if file is not None and file.moved_from and parent not in self._done:
                return False
            parent = paths.split(parent)[0]
        return True

    def _rename(self, source: bytes, place: bytes, target: bytes) -> bool:
        """False: the way is not free, or the source is gone."""
        found = self._tree.stat(source)
        if found is None or not stat.S_ISDIR(found.st_mode):
            return False
        below = self._tree.below(source)
        try:
            self._tree.rename(source, place)
        except OSError as error:
            if error.errno not in _TAKEN:
                raise
            return False
        self._moved.append((source, target, below))
        return True
