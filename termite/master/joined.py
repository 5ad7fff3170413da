"""Files with several names of which a command renamed one: the new name is joined to the others again.

A worker shows each name as a file of its own, so its result is a new file and a removed one.  Before anything
changes, each such file gets a temporary name in the root, and takes its place when the walk through the result
gets there.  Where that cannot be (the file is gone, changed or in another file system), the caller makes a new
file of the contents that have come anyway.  Paths are relative to the root.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from contextlib import suppress

from termite import paths
from termite.master.staging import proc_path, temp_name
from termite.master.tree import Tree
from termite.store.local import digest
from termite.wire.messages import FileResult


class Joined:
    """`moves`: new path -> path before the command; `files`: the whole result."""

    def __init__(self, tree: Tree, moves: Mapping[bytes, bytes], files: Mapping[bytes, FileResult]) -> None:
        self._tree = tree
        self._moves = moves
        self._files = files
        self._aside: dict[bytes, bytes] = {}  # new path -> temporary name in the root

    def start(self) -> None:
        """Nothing else may have changed before."""
        for target, source in self._moves.items():
            parent, name = paths.split(source)
            directory = self._tree.existing(parent)
            if directory < 0 or not _is_as_seen(directory, name, self._files[target]):
                continue
            with suppress(OSError):
                aside = temp_name()
                root, directory = self._tree.both(b"", parent)
                os.link(name, aside, src_dir_fd=directory, dst_dir_fd=root, follow_symlinks=False)
                self._aside[target] = aside

    def place(self, path: bytes) -> bool:
        """True if the file stands at its new path now; False if it is to be made there."""
        aside = self._aside.get(path)
        if aside is None:
            return False
        found = self._tree.stat(path)
        if found is not None and stat.S_ISDIR(found.st_mode):
            self._tree.clear_for(path)
        parent, name = paths.split(path)
        root, directory = self._tree.both(b"", parent)
        os.rename(aside, name, src_dir_fd=root, dst_dir_fd=directory)
        return True

    def close(self) -> None:
        """Temporary names that are still there: of what failed, and where a file came to stand upon itself."""
        for aside in self._aside.values():
            with suppress(OSError):
                os.unlink(aside, dir_fd=self._tree.directory(b""))


def _is_as_seen(directory: int, name: bytes, file: FileResult) -> bool:
    """True if this is a file with other names and, unless it is written anyway, the contents that the command saw."""
    try:
        handle = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    except OSError:
        return False
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink < 2:
            return False
        if file.in_place:
            return True
        if found.st_size != file.attr.size:
            return False
        fd = os.open(proc_path(handle), os.O_RDONLY | os.O_CLOEXEC)
        try:
            return digest(fd) == file.attr.hash
        finally:
            os.close(fd)
    except OSError:
        return False
    finally:
        os.close(handle)
