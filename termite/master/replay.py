"""The only code that changes the user's tree.

`Replayer.apply` puts what one command changed into the writable root as a local run would have left it.
Everything is checked before the first change.  A regular file is complete before it gets its name, so
whoever looks, and whoever is killed, finds all of it or none of it; only a file with several names is
written in place, as the command did.  Where the tree has changed since the command was sent, the
command's own changes win and what it cannot have seen stays.  Synchronous; one call at a time.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from termite import paths
from termite.errors import ReplayError, StoreError, TermiteError
from termite.master.joined import Joined
from termite.master.renames import Renames
from termite.master.staging import TEMP_PREFIX, Content, Staged, Unfinished, fill, proc_path, temp_name
from termite.master.tree import Tree
from termite.wire.messages import FileResult

__all__ = ["SLACK_NS", "Content", "Replayed", "Replayer", "Span", "Staged"]

SLACK_NS = 20_000_000
"""File systems stamp with a clock that ticks every 1 to 10 ms: a time may lie this far beside the run."""

_SET_ID = stat.S_ISUID | stat.S_ISGID
_HANDLE = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
Contents = Mapping[bytes, Content] | Callable[[FileResult], Content]


class Span(NamedTuple):
    """When a command ran, by both clocks, in ns; translates its files' times to the master's clock."""

    sent_ns: int  # master's clock
    received_ns: int  # master's clock
    started_ns: int  # worker's clock
    ended_ns: int  # worker's clock
    offset_ns: int  # the master's clock minus the worker's; 0 if that is below what can be measured

    def is_implicit(self, mtime_ns: int) -> bool:
        """True for a time that the kernel gave during the run, False for one the command chose (touch -d)."""
        return self.started_ns - SLACK_NS <= mtime_ns <= self.ended_ns + SLACK_NS

    def translate(self, mtime_ns: int) -> int:
        if not self.is_implicit(mtime_ns):
            return mtime_ns
        return min(max(mtime_ns + self.offset_ns, self.sent_ns), self.received_ns)


class Replayed(NamedTuple):
    changed: list[bytes]  # exported paths to look at again: made, changed, removed, and their directories
    notes: list[str]  # what was left out or kept, for the log


MOST_ARRIVALS = 10_000


class Replayer:
    """Changes one writable root; `protected` names in it are never touched."""

    def __init__(
        self, root: bytes, *, protected: Iterable[bytes] = (b".termite-socket",), unnamed: bool = True
    ) -> None:
        self.root = b"/" + paths.relative(root)
        self._protected = frozenset(protected)
        self._unnamed = unnamed  # False: as if the file system had no O_TMPFILE
        self._arrived: dict[bytes, int] = {}  # path in the root -> when; the oldest first

    def note_arrival(self, path: bytes, at_ns: int) -> None:
        """A file was moved to `path` (relative to /); old as it is, commands sent before have not seen it."""
        inside = path[len(self.root) - 1 :].lstrip(b"/")
        self._arrived.pop(inside, None)
        self._arrived[inside] = at_ns
        if len(self._arrived) > MOST_ARRIVALS:
            del self._arrived[next(iter(self._arrived))]

    def stage(self, size: int, hash: bytes) -> Staged:
        """For contents that arrive in pieces; to be closed by the caller, used or not."""
        try:
            fd = os.open(self.root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                return Staged(Unfinished(fd, unnamed=self._unnamed), size, hash)
            finally:
                os.close(fd)
        except OSError as error:
            raise ReplayError(f"{paths.for_people(self.root)}: cannot write here: {error.strerror}") from error

    def apply(self, files: list[FileResult], contents: Contents, clock: Span) -> Replayed:
        """Make the changes; ReplayError if one is impossible or forbidden, StoreError if contents are not as told.

        A forbidden one, or wrong contents, are found before anything has changed.  After an impossible one (a
        full disk) look at all the files again: each of them is as it was or as it was to become.
        """
        run = _Apply(self.root, self._protected, self._unnamed, clock)
        run.plan(files, contents)
        try:
            with Tree(self.root, clock.sent_ns, self._arrived) as tree:
                return run.run(tree)
        except OSError as error:
            where = paths.for_people(paths.join(self.root, run.at))
            raise ReplayError(f"{where}: cannot put a command's result here: {_reason(error)}") from error


class _Apply:
    """One result.  Paths are relative to the root from here on, b"" the root itself."""

    _tree: Tree
    _renames: Renames
    _joined: Joined

    def __init__(self, root: bytes, protected: frozenset[bytes], unnamed: bool, clock: Span) -> None:
        self._root = root[1:]
        self._protected = protected
        self._unnamed = unnamed
        self._clock = clock
        self._files: dict[bytes, FileResult] = {}
        self._contents: dict[bytes, Content] = {}
        self._ends: dict[bytes, FileResult] = {}  # directories: what they are to look like
        self._notes: list[str] = []
        self.at = b""  # what is being done, for messages

    def run(self, tree: Tree) -> Replayed:
        self._tree = tree
        moves = {path: self._relative(file.moved_from) for path, file in self._files.items() if file.moved_from}
        directories = {path for path in moves if stat.S_ISDIR(self._files[path].attr.mode)}
        self._renames = Renames(tree, {path: moves[path] for path in directories}, self._files)
        self._joined = Joined(tree, {path: moves[path] for path in moves.keys() - directories}, self._files)
        try:
            self._joined.start()
            self._renames.start()
            for path, file in self._files.items():
                self.at = path
                self._one(path, file)
            for path, file in self._files.items():
                if file.link_to:
                    self.at = path
                    self._link(path, self._relative(file.link_to))
        finally:
            self._joined.close()
            self._renames.put_back()
            self._settle()
        return Replayed(sorted(self._absolute(path) for path in self._changed()), self._notes + tree.notes)

    # -- checks -------------------------------------------------------------------------------------

    def plan(self, files: list[FileResult], contents: Contents) -> None:
        """Check everything and put it in order, parents first."""
        get = contents if callable(contents) else lambda file: contents[file.path]
        for file in sorted(files, key=lambda file: file.path):
            path = self._relative(file.path)
            if path in self._files:
                raise ReplayError(f"{paths.for_people(path)}: told twice in one result; its worker is broken")
            if any(paths.is_inside(path, name) for name in self._protected):
                self._notes.append(f"{paths.for_people(path)}: left alone, it belongs to termite")
                continue
            self._check(path, file)
            self._files[path] = file
            if stat.S_ISREG(file.attr.mode) and not file.kept and not file.link_to:
                self._contents[path] = _verified(path, file, get(file))

    def _check(self, path: bytes, file: FileResult) -> None:
        mode = file.attr.mode
        kind = stat.S_IFMT(mode)
        if mode and kind not in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFIFO):
            raise ReplayError(f"{paths.for_people(path)}: refused, not a file, directory, symlink or fifo")
        if not path and (kind != stat.S_IFDIR or file.moved_from or file.opaque):
            raise ReplayError("refused: a command cannot replace the project's own directory")
        if file.moved_from and kind not in (stat.S_IFDIR, stat.S_IFREG):
            raise ReplayError(f"{paths.for_people(path)}: refused, only directories and files can have been renamed")
        if kind == stat.S_IFREG and mode & _SET_ID:
            self._notes.append(f"{paths.for_people(path)}: set-id bits are not carried over")
        for other in (file.moved_from, file.link_to):
            if other and not self._relative(other):
                raise ReplayError(f"{paths.for_people(path)}: refused, names the project's own directory")

    def _relative(self, path: bytes) -> bytes:
        try:
            inside = paths.is_inside(paths.checked(path), self._root)
        except TermiteError as error:
            raise ReplayError(f"refused: {error}") from error
        if not inside:
            raise ReplayError(f"{paths.for_people(path)}: refused, outside the project")
        return path[len(self._root) :].lstrip(b"/")

    def _absolute(self, path: bytes) -> bytes:
        return paths.join(self._root, path) if path else self._root

    # -- one name -----------------------------------------------------------------------------------

    def _one(self, path: bytes, file: FileResult) -> None:
        mode = file.attr.mode
        if mode == 0:
            self._tree.remove(path)  # gone already: fine
        elif stat.S_ISDIR(mode):
            self._directory(path, file)
        elif file.link_to:
            return  # when its target is in place
        elif file.kept:
            if file.in_place:
                self._attributes(path, file)
        elif stat.S_ISREG(mode):
            self._regular(path, file)
        else:
            self._special(path, file)

    def _directory(self, path: bytes, file: FileResult) -> None:
        self._ends[path] = file
        if not path or self._renames.place(path):
            return
        if file.moved_from:
            self._notes.append(f"{paths.for_people(file.moved_from)}: was to be renamed but is gone")
        if self._is_directory(path):
            if file.opaque and not self._tree.is_new(path):
                self._tree.empty(path)
            return
        self._tree.remove(path)
        parent, name = paths.split(path)
        os.mkdir(name, 0o700, dir_fd=self._tree.directory(parent))
        self._tree.changed.add(path)
        self._tree.existing(path, made=True)

    def _is_directory(self, path: bytes) -> bool:
        try:
            return self._tree.existing(path) >= 0
        except OSError as error:
            found = self._tree.stat(path)
            if error.errno != errno.ELOOP or found is None or not stat.S_ISLNK(found.st_mode):
                raise
            return False

    def _regular(self, path: bytes, file: FileResult) -> None:
        content = self._contents[path]
        parent, name = paths.split(path)
        directory = self._tree.directory(parent)
        self._tree.changed.add(path)
        if file.moved_from and self._joined.place(path) and not file.in_place:
            return
        if file.in_place and self._write_in_place(directory, name, file, content):
            return
        if isinstance(content, Staged) and not content.used:
            content.used = True
            try:
                self._finish(content.file, directory, name, path, file)
                return
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
        made = Unfinished(directory, unnamed=self._unnamed)
        try:
            fill(made.fd, content)
            self._finish(made, directory, name, path, file)
        finally:
            made.close()

    def _finish(self, made: Unfinished, directory: int, name: bytes, path: bytes, file: FileResult) -> None:
        os.fchmod(made.fd, _file_mode(file))
        mtime_ns = self._clock.translate(file.attr.mtime_ns)
        os.utime(made.fd, ns=(mtime_ns, mtime_ns))
        try:
            made.install(directory, name, durable=file.in_place)
        except IsADirectoryError:
            self._tree.clear_for(path)
            made.install(self._tree.directory(paths.split(path)[0]), name)

    def _write_in_place(self, directory: int, name: bytes, file: FileResult, content: Content) -> bool:
        """Write through to a file that has other names; False if it has none, and may be replaced as a whole."""
        try:
            handle = os.open(name, _HANDLE, dir_fd=directory)
        except FileNotFoundError:
            return False
        try:
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode) or found.st_nlink < 2:
                return False
            try:
                fd = os.open(proc_path(handle), os.O_WRONLY | os.O_CLOEXEC)
            except PermissionError:  # the command allowed itself to write, wrote, and took that back
                os.chmod(proc_path(handle), stat.S_IMODE(found.st_mode) | stat.S_IWUSR)
                fd = os.open(proc_path(handle), os.O_WRONLY | os.O_CLOEXEC)
            try:
                fill(fd, content)
                os.ftruncate(fd, file.attr.size)
            finally:
                os.close(fd)
            self._give_attributes(handle, file)
        finally:
            os.close(handle)
        return True

    def _attributes(self, path: bytes, file: FileResult) -> None:
        """The contents stayed, the mode or the time did not (chmod, touch)."""
        parent, name = paths.split(path)
        try:
            handle = os.open(name, _HANDLE, dir_fd=self._tree.directory(parent))
        except FileNotFoundError:
            self._notes.append(f"{paths.for_people(path)}: gone, its mode and time were to change")
            return
        try:
            if stat.S_ISREG(os.fstat(handle).st_mode):
                self._give_attributes(handle, file)
                self._tree.changed.add(path)
        finally:
            os.close(handle)

    def _give_attributes(self, handle: int, file: FileResult) -> None:
        mtime_ns = self._clock.translate(file.attr.mtime_ns)
        os.chmod(proc_path(handle), _file_mode(file))
        os.utime(proc_path(handle), ns=(mtime_ns, mtime_ns))

    def _special(self, path: bytes, file: FileResult) -> None:
        """A symlink or a fifo: made beside its place if that is taken."""
        parent, name = paths.split(path)
        self._tree.changed.add(path)
        found = self._tree.stat(path)
        if found is not None and stat.S_ISDIR(found.st_mode):
            self._tree.clear_for(path)
            found = None
        directory = self._tree.directory(parent)
        made = name if found is None else temp_name()
        mtime_ns = self._clock.translate(file.attr.mtime_ns)
        if stat.S_ISLNK(file.attr.mode):
            os.symlink(file.attr.target, made, dir_fd=directory)
        else:
            os.mkfifo(made, 0o600, dir_fd=directory)
            os.chmod(made, _file_mode(file), dir_fd=directory)
        os.utime(made, ns=(mtime_ns, mtime_ns), dir_fd=directory, follow_symlinks=False)
        if made != name:
            os.rename(made, name, src_dir_fd=directory, dst_dir_fd=directory)

    def _link(self, path: bytes, to: bytes) -> None:
        """Another name for a file that is in place."""
        old = self._tree.stat(to)
        if old is None or stat.S_ISDIR(old.st_mode):
            raise ReplayError(f"{paths.for_people(to)}: gone, {paths.for_people(path)} was to be a hard link to it")
        found = self._tree.stat(path)
        self._tree.changed.update((path, to))  # the number of links is an attribute of both
        if found is not None and (found.st_dev, found.st_ino) == (old.st_dev, old.st_ino):
            return
        if found is not None and stat.S_ISDIR(found.st_mode):
            self._tree.clear_for(path)
            found = None
        (old_dir, old_name), (new_dir, new_name) = paths.split(to), paths.split(path)
        made = new_name if found is None else temp_name()
        source, directory = self._tree.both(old_dir, new_dir)
        os.link(old_name, made, src_dir_fd=source, dst_dir_fd=directory, follow_symlinks=False)
        if made != new_name:
            os.rename(made, new_name, src_dir_fd=directory, dst_dir_fd=directory)

    # -- the end ------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Modes and times of directories, children first: every change in one of them is done."""
        for path in sorted({*self._tree.directories, *self._ends}, reverse=True):
            if self._tree.existing(path) < 0:
                continue
            known = self._tree.directories[path]
            file = self._ends.get(path)
            if file is not None:
                mode = stat.S_IMODE(file.attr.mode) & ~stat.S_ISUID
                self._tree.settle(path, mode, self._directory_time(path, file))
            elif not known.made:
                self._tree.settle(path, known.mode, known.mtime_ns)

    def _directory_time(self, path: bytes, file: FileResult) -> int:
        """Others may have changed the directory since; then the later time is the true one."""
        known = self._tree.directories[path]
        mtime_ns = self._clock.translate(file.attr.mtime_ns)
        if known.made or (known.mtime_ns < self._clock.sent_ns and not self._clock.is_implicit(file.attr.mtime_ns)):
            return mtime_ns
        return max(known.mtime_ns, mtime_ns)

    def _changed(self) -> set[bytes]:
        changed = self._tree.changed.union(self._tree.directories, self._ends, self._renames.changed())
        return {path for path in changed if not path.startswith(TEMP_PREFIX)}


def _verified(path: bytes, file: FileResult, content: Content) -> Content:
    """The contents; StoreError if they are not what the result announces."""
    if isinstance(content, Staged):
        good = content.complete and (content.size, content.hash) == (file.attr.size, file.attr.hash)
    else:
        good = len(content) == file.attr.size and hashlib.sha256(content).digest() == file.attr.hash
    if not good:
        raise StoreError(f"{paths.for_people(path)}: its contents arrived damaged")
    return content


def _file_mode(file: FileResult) -> int:
    return stat.S_IMODE(file.attr.mode) & ~_SET_ID


def _reason(error: OSError) -> str:
    if error.errno == errno.ELOOP:
        return "a symlink stands where the command saw a directory"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full; free some space and build again"
    return error.strerror or str(error)
