"""The user's tree while one result is replayed: directories reached safely, remembered, put right at the end.

Every directory that is changed is opened once, beneath the root and without a step through a symlink, and
its time and mode are noted first: `settle` gives them back, or what the command made of them.  Paths are
relative to the root here.  One thread.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Mapping

from termite import paths
from termite.errors import ReplayError
from termite.master.staging import born, open_directory, proc_path

MAX_OPEN = 200
"""Directories kept open at a time; the others are opened again when needed."""


class Directory:
    """What is remembered of one directory."""

    __slots__ = ("fd", "made", "mode", "mtime_ns")

    def __init__(self, fd: int, mode: int, mtime_ns: int, *, made: bool) -> None:
        self.fd = fd  # -1: closed for now
        self.mode = mode  # before the first change
        self.mtime_ns = mtime_ns  # before the first change
        self.made = made  # by this result


class Tree:
    """The directories below one root; `since_ns`: nothing made later was seen by the command.

    `arrived`: path -> when a file was moved there, which its birth does not tell.
    """

    def __init__(self, root: bytes, since_ns: int, arrived: Mapping[bytes, int]) -> None:
        self._since_ns = since_ns
        self._arrived = arrived
        self._root_fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._uid = os.geteuid()
        self._open = 0
        self.directories: dict[bytes, Directory] = {}
        self.changed: set[bytes] = set()  # names made, replaced, removed
        self.notes: list[str] = []

    def __enter__(self) -> Tree:
        return self

    def __exit__(self, *_: object) -> None:
        for known in self.directories.values():
            if known.fd >= 0:
                os.close(known.fd)
        self.directories.clear()
        os.close(self._root_fd)

    # -- reaching a directory -----------------------------------------------------------------------

    def directory(self, path: bytes) -> int:
        """A descriptor to change this directory with; a missing one is made."""
        fd = self.existing(path)
        if fd >= 0:
            return fd
        parent, name = paths.split(path)
        os.mkdir(name, dir_fd=self.directory(parent))
        self.changed.add(path)
        self.notes.append(f"{paths.for_people(path)}: this directory was gone, made it again")
        return self.existing(path, made=True)

    def existing(self, path: bytes, *, made: bool = False) -> int:
        """The same for a directory that need not be there: -1."""
        known = self.directories.get(path)
        if known is not None and known.fd >= 0:
            return known.fd
        try:
            fd = open_directory(self._root_fd, path)
            found = os.fstat(fd)
            if self._uid:
                self._unlock(fd, found)
        except PermissionError:
            fd, found = self._force(path)
        except (FileNotFoundError, NotADirectoryError):
            return -1
        if self._open >= MAX_OPEN:
            self._close_some()
        self._open += 1
        if known is None:
            self.directories[path] = Directory(fd, stat.S_IMODE(found.st_mode), found.st_mtime_ns, made=made)
        else:
            known.fd = fd
        return fd

    def both(self, first: bytes, second: bytes) -> tuple[int, int]:
        """Two directories that are open at the same time."""
        self.directory(first)
        second_fd = self.directory(second)  # may have closed the first to make room
        return self.directory(first), second_fd

    def _force(self, path: bytes) -> tuple[int, os.stat_result]:
        """Open a directory of this user that does not let its owner in."""
        if not path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), ".")
        parent, name = paths.split(path)
        beside = self.existing(parent)  # which lets its owner in from here on
        handle = open_directory(beside, name, readable=False)
        try:
            found = os.fstat(handle)
            self._unlock(handle, found)
            return open_directory(beside, name), found
        finally:
            os.close(handle)

    def _unlock(self, fd: int, found: os.stat_result) -> None:
        """Let the owner in for the time of the replay; `settle` restores the mode."""
        if found.st_uid == self._uid and found.st_mode & 0o700 != 0o700:
            os.chmod(proc_path(fd), stat.S_IMODE(found.st_mode) | 0o700)

    def _close_some(self) -> None:
        for known in self.directories.values():
            if known.fd >= 0:
                os.close(known.fd)
                known.fd = -1
        self._open = 0

    # -- changing it --------------------------------------------------------------------------------

    def stat(self, path: bytes) -> os.stat_result | None:
        """None: there is nothing."""
        parent, name = paths.split(path)
        fd = self.existing(parent)
        if fd < 0:
            return None
        try:
            return os.stat(name, dir_fd=fd, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def remove(self, path: bytes) -> bool:
        """Remove whatever stands there; False if a directory stays because of what the command did not see."""
        parent, name = paths.split(path)
        fd = self.existing(parent)
        self.changed.add(path)
        if fd < 0:
            return True
        try:
            os.unlink(name, dir_fd=fd)
        except FileNotFoundError:
            pass
        except IsADirectoryError:
            if not self.empty(path):
                return False
            os.rmdir(name, dir_fd=self.existing(parent))
            self.forget(path)
        return True

    def empty(self, path: bytes) -> bool:
        """Remove all below a directory but what was made after the command was sent; False if there is such.

        Where the command can have seen no child at all (new, or private and therefore not shown to
        workers), it may have used rmdir, which would have failed here: all stays.
        """
        fd = self.existing(path)
        found = [(paths.join(path, name), *born(fd, name)) for name in _names(fd)]
        if found and all(self._is_new(child, when) or _is_private(mode) for child, mode, when in found):
            self.notes.append(f"{paths.for_people(path)}: kept, the command saw nothing of what is in it")
            return False
        seen = [path]
        kept: set[bytes] = set()
        for directory in seen:  # grows: parents come before their children
            if self._remove_files(directory, seen):
                kept.add(directory)
        for directory in reversed(seen[1:]):
            parent, name = paths.split(directory)
            if directory in kept:
                kept.add(parent)
            else:
                os.rmdir(name, dir_fd=self.existing(parent))
                self._drop(directory)
        return path not in kept

    def _remove_files(self, directory: bytes, seen: list[bytes]) -> bool:
        """Remove what is not a directory; appends the directories to `seen`.  True if something stays."""
        fd = self.existing(directory)
        stays = False
        for name in _names(fd):
            path = paths.join(directory, name)
            mode, when = born(fd, name)
            if self._is_new(path, when):
                self.notes.append(f"{paths.for_people(path)}: kept, made while the command ran")
                stays = True
                continue
            self.changed.add(path)
            if stat.S_ISDIR(mode):
                seen.append(path)
            else:
                os.unlink(name, dir_fd=fd)
        return stays

    def is_new(self, path: bytes) -> bool:
        """True if what stands there was made after the command was sent."""
        parent, name = paths.split(path)
        return self._is_new(path, born(self.directory(parent), name)[1])

    def _is_new(self, path: bytes, born_ns: int) -> bool:
        return max(born_ns, self._arrived.get(path, 0)) >= self._since_ns

    def clear_for(self, path: bytes) -> None:
        """Remove a directory that stands where something else must; ReplayError if it cannot go."""
        if not self.remove(path):
            raise ReplayError(
                f"{paths.for_people(path)}: a directory with new files stands where a command made a file; "
                "move it away and build again"
            )

    def rename(self, source: bytes, target: bytes) -> None:
        """Rename a directory, with all that is remembered below it; OSError if something is in the way."""
        (old_dir, old_name), (new_dir, new_name) = paths.split(source), paths.split(target)
        old_fd, new_fd = self.both(old_dir, new_dir)
        os.rename(old_name, new_name, src_dir_fd=old_fd, dst_dir_fd=new_fd)
        self.forget(target)
        for path in [path for path in self.directories if paths.is_inside(path, source)]:
            self.directories[target + path[len(source) :]] = self.directories.pop(path)

    def below(self, path: bytes) -> list[bytes]:
        """Every path in a directory, relative to it."""
        found: list[bytes] = []
        pending = [b""]
        while pending:
            at = pending.pop()
            with contextlib.suppress(OSError):
                fd = open_directory(self._root_fd, paths.join(path, at) if at else path)
                try:
                    with os.scandir(fd) as entries:
                        for entry in entries:
                            child = paths.join(at, os.fsencode(entry.name))
                            found.append(child)
                            if entry.is_dir(follow_symlinks=False):
                                pending.append(child)
                finally:
                    os.close(fd)
        return found

    def forget(self, path: bytes) -> None:
        """A directory is gone, and with it all below."""
        for gone in [known for known in self.directories if paths.is_inside(known, path)]:
            self._drop(gone)

    def _drop(self, path: bytes) -> None:
        known = self.directories.pop(path)
        if known.fd >= 0:
            os.close(known.fd)
            self._open -= 1

    # -- at the end ---------------------------------------------------------------------------------

    def settle(self, path: bytes, mode: int, mtime_ns: int) -> None:
        """Give a directory its final mode and time; children first, as a parent may become unreachable."""
        fd = self.directory(path)
        found = os.fstat(fd)
        if found.st_mtime_ns != mtime_ns:
            os.utime(fd, ns=(found.st_atime_ns, mtime_ns))
        if stat.S_IMODE(found.st_mode) != mode:
            os.fchmod(fd, mode)


def _is_private(mode: int) -> bool:
    return not stat.S_ISLNK(mode) and mode & 0o077 == 0


def _names(fd: int) -> list[bytes]:
    return [os.fsencode(name) for name in os.listdir(fd)]
