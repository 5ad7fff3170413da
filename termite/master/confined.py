"""Making directories, deleting trees, moving, touching and writing files inside one root, never through a symlink.

What `mkdir`, `rm`, `mv`, `touch` and `>` do in the cases where they succeed; in every other case `NotSimple` is raised
before anything has changed, so that the real command can still be run and say what is wrong.  Every
step is taken relative to an open directory that was reached without following a symlink.  Blocking.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Self

from termite import paths

PROTECTED = frozenset({b".termite-socket"})
"""Names that are never deleted, wherever they lie."""
MAX_ENTRIES = 5000
"""More are not deleted here: the caller waits, and so does everything else on its loop."""
MAX_DEPTH = 100
MAX_DIRECTORIES = 200
"""Directories that the operands of one `rm` may lie in; each is kept open."""

_OPEN_FILE = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ_FILE = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_NOFOLLOW | os.O_CLOEXEC
_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_DEFAULT_ACL = "system.posix_acl_default"


class NotSimple(Exception):
    """Not for us: the real command must be run.  Nothing has been changed."""


@dataclass(frozen=True, slots=True)
class Removal:
    """One operand of `rm`."""

    path: bytes  # relative to the exported root
    shown: bytes  # as the user wrote it
    only_directory: bool  # written with a closing slash


@dataclass(slots=True)
class Outcome:
    """What was done.  `changed`: paths relative to the exported root, with the directories they lie in."""

    status: int = 0  # exit status
    stdout: bytes = b""
    stderr: bytes = b""
    changed: dict[bytes, None] = field(default_factory=dict)  # in order, each once
    arrived: list[bytes] = field(default_factory=list)  # of these, files that were elsewhere before
    renewed: list[bytes] = field(default_factory=list)  # of these, files with new times alone

    def note(self, path: bytes) -> None:
        self.changed[paths.split(path)[0]] = None
        self.changed[path] = None


class ConfinedRoot:
    """The directory nothing here gets out of; open while in a `with` block."""

    def __init__(self, root: bytes, protected: Collection[bytes] = PROTECTED) -> None:
        self.path = paths.relative(root)
        self._protected = protected

    def __enter__(self) -> Self:
        try:
            self._fd = os.open(paths.absolute(self.path), _OPEN_DIRECTORY)
        except OSError as error:
            raise NotSimple(str(error)) from None
        self._device = os.fstat(self._fd).st_dev
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def parts(self, path: bytes) -> list[bytes]:
        """The names that lead from the root to `path`."""
        if not paths.is_clean(path) or not paths.is_inside(path, self.path):
            raise NotSimple("outside the root")
        return path[len(self.path) :].strip(b"/").split(b"/") if path != self.path else []

    @contextmanager
    def directory(self, path: bytes) -> Iterator[int]:
        """The open directory at `path`; FileNotFoundError if there is none."""
        fd = os.dup(self._fd)
        try:
            for name in self.parts(path):
                fd = self._step(fd, name)
            yield fd
        finally:
            os.close(fd)

    # -- mkdir ---------------------------------------------------------------------------------------

    def make_directories(self, targets: Sequence[bytes], *, parents: bool, mode: int | None, umask: int) -> Outcome:
        """`mkdir [-p] [-m MODE] TARGETS`; `mode` as -m gives it, None without."""
        wanted = 0o777 & ~umask if mode is None else mode
        between = 0o777 & ~(umask & ~0o300)  # directories on the way must let us make the next one
        if wanted & 0o500 != 0o500 or between & 0o500 != 0o500:
            raise NotSimple("a directory that could not be opened again")
        if len(targets) > 1:
            self._check_targets(targets, parents)
        outcome = Outcome()
        made: list[bytes] = []
        try:
            for target in targets:
                self._make(target, parents, wanted, between, made)
        except (OSError, NotSimple) as error:
            self._unmake(made)
            raise NotSimple(str(error)) from None
        for path in made:
            outcome.note(path)
        return outcome

    def _check_targets(self, targets: Sequence[bytes], parents: bool) -> None:
        """With several, the first must not be made if the last cannot be."""
        if not parents and len(set(targets)) < len(targets):
            raise NotSimple("the same directory twice")
        for target in targets:
            directory, name = paths.split(target)
            try:
                with self.directory(target if parents else directory) as fd:
                    if not parents and _exists(fd, name):
                        raise NotSimple("exists")
            except FileNotFoundError:
                if not parents:
                    raise NotSimple("its directory is missing") from None

    def _make(self, target: bytes, parents: bool, wanted: int, between: int, made: list[bytes]) -> None:
        parts = self.parts(target)
        if not parts:
            if parents:
                return
            raise NotSimple("the root itself")
        fd = os.dup(self._fd)
        path = self.path
        try:
            for index, name in enumerate(parts):
                is_last = index == len(parts) - 1
                path = paths.join(path, name)
                if is_last and not parents:
                    self._make_one(fd, name, wanted)
                    made.append(path)
                    return
                try:
                    fd = self._step(fd, name)
                except FileNotFoundError:
                    if not parents:
                        raise NotSimple("its directory is missing") from None
                    # Somebody else may make it at the same moment: `mkdir -p` does not mind.
                    with suppress(FileExistsError):
                        self._make_one(fd, name, wanted if is_last else between)
                        made.append(path)
                    fd = self._step(fd, name)
        finally:
            os.close(fd)

    @staticmethod
    def _make_one(parent: int, name: bytes, wanted: int) -> None:
        _check_no_default_acl(parent)
        os.mkdir(name, wanted, dir_fd=parent)
        got = os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode
        if got & 0o777 != wanted:  # our own umask took something away
            fd = os.open(name, _OPEN_DIRECTORY, dir_fd=parent)
            try:
                os.fchmod(fd, wanted | got & 0o7000)  # a set-group-id bit was inherited
            finally:
                os.close(fd)

    def _unmake(self, made: list[bytes]) -> None:
        for path in reversed(made):
            directory, name = paths.split(path)
            with suppress(OSError), self.directory(directory) as fd:
                os.rmdir(name, dir_fd=fd)

    # -- rm ------------------------------------------------------------------------------------------

    def remove(self, removals: Sequence[Removal], *, recursive: bool, force: bool) -> Outcome:
        """`rm [-r] [-f] REMOVALS`: looks at everything first, then deletes.

        What fails after that look fails as in `rm`: a line on stderr, status 1, and on to the next.
        """
        if not force and _overlap([removal.path for removal in removals]):
            raise NotSimple("the second one will be missing")
        opened: dict[bytes, int] = {}
        outcome = Outcome()
        try:
            there = [
                removal for removal in removals if self._is_removable(removal, opened, recursive=recursive, force=force)
            ]
            for removal in there:
                directory, name = paths.split(removal.path)
                deletion = _Deletion()
                deletion.delete(opened[directory], name, b"")
                for inner, error in deletion.failures:
                    shown = removal.shown.rstrip(b"/") + inner
                    reason = os.strerror(error.errno or errno.EIO).encode()
                    outcome.stderr += b"rm: cannot remove '%s': %s\n" % (shown, reason)
                    outcome.status = 1
                outcome.note(removal.path)
                if deletion.failures:
                    for inner in reversed(deletion.deleted):
                        outcome.note(removal.path + inner)
        finally:
            for fd in opened.values():
                os.close(fd)
        return outcome

    def _is_removable(self, removal: Removal, opened: dict[bytes, int], *, recursive: bool, force: bool) -> bool:
        """True if it is there and nothing speaks against deleting it; False if it may be missing and is."""
        directory, name = paths.split(removal.path)
        if not self.parts(removal.path) or name in self._protected:
            raise NotSimple("protected")
        try:
            if directory not in opened:
                if len(opened) >= MAX_DIRECTORIES:
                    raise NotSimple("too many directories")
                with self.directory(directory) as fd:
                    opened[directory] = os.dup(fd)
            parent = opened[directory]
            st = os.stat(name, dir_fd=parent, follow_symlinks=False)
            _check_may_delete(parent)
            if stat.S_ISDIR(st.st_mode):
                if not recursive:
                    raise NotSimple("a directory")
                self._check_tree(parent, name, force, depth=0, seen=[0])
            elif removal.only_directory:
                raise NotSimple("no directory")
            else:
                _check_would_not_ask(parent, name, st, force)
        except FileNotFoundError:
            if not force:
                raise NotSimple("missing") from None
            return False
        except OSError as error:
            raise NotSimple(str(error)) from None
        return True

    def _check_tree(self, parent: int, name: bytes, force: bool, depth: int, seen: list[int]) -> None:
        if depth >= MAX_DEPTH:
            raise NotSimple("too deep")
        with _subdirectory(parent, name) as fd:
            if os.fstat(fd).st_dev != self._device:
                raise NotSimple("another file system")
            _check_may_delete(fd)
            with os.scandir(fd) as entries:
                for entry in entries:
                    seen[0] += 1
                    if seen[0] > MAX_ENTRIES:
                        raise NotSimple("too many files")
                    entry_name = os.fsencode(entry.name)
                    if entry_name in self._protected:
                        raise NotSimple("protected")
                    if entry.is_dir(follow_symlinks=False):
                        self._check_tree(fd, entry_name, force, depth + 1, seen)
                    elif not force:
                        _check_would_not_ask(fd, entry_name, entry.stat(follow_symlinks=False), force)

    # -- mv and touch ----------------------------------------------------------------------------------

    def move(self, source: bytes, target: bytes, *, force: bool) -> Outcome:
        """`mv [-f] SOURCE TARGET` of one regular file; TARGET is missing or another one."""
        try:
            with self._place(source) as (old_directory, old_name), self._place(target) as (new_directory, new_name):
                moved = self._lone_file(old_directory, old_name)
                if moved is None:
                    raise NotSimple("missing")
                replaced = self._lone_file(new_directory, new_name)
                if replaced is not None:
                    if replaced.st_ino == moved.st_ino:
                        raise NotSimple("the same file")
                    _check_would_not_ask(new_directory, new_name, replaced, force)
                _check_may_delete(old_directory)
                _check_may_delete(new_directory)
                os.rename(old_name, new_name, src_dir_fd=old_directory, dst_dir_fd=new_directory)
        except OSError as error:
            raise NotSimple(str(error)) from None
        outcome = Outcome(arrived=[target])
        outcome.note(source)
        outcome.note(target)
        return outcome

    def touch(self, target: bytes, *, umask: int) -> Outcome:
        """`touch TARGET`: a regular file becomes as new as can be; a missing one is made, empty."""
        outcome = Outcome()
        try:
            with self._place(target) as (directory, name):
                if self._lone_file(directory, name) is None:
                    _make_empty(directory, name, 0o666 & ~umask)
                else:
                    _renew(directory, name)
                    outcome.renewed.append(target)
        except OSError as error:
            raise NotSimple(str(error)) from None
        outcome.note(target)
        return outcome

    # -- small files -----------------------------------------------------------------------------------

    def read(self, path: bytes, limit: int) -> bytes | None:
        """The contents of a regular file of at most `limit` bytes; None if there is none."""
        try:
            with self._place(path) as (directory, name):
                if self._lone_file(directory, name) is None:
                    return None
                fd = os.open(name, _READ_FILE, dir_fd=directory)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise NotSimple(str(error)) from None
        try:
            data = os.read(fd, limit + 1)
        finally:
            os.close(fd)
        if len(data) > limit:
            raise NotSimple("too long")
        return data

    def overwrite(self, directory: bytes, names: Collection[bytes], data: bytes, *, umask: int) -> tuple[Outcome, int]:
        """`printf DATA > NAME` for files of one directory, and how many entries that has then.

        A file that cannot be written is left as it is if all that was looked at before said it could.
        """
        if umask & 0o200:
            raise NotSimple("a file that could not be opened again")
        outcome = Outcome()
        try:
            with self.directory(directory) as fd:
                missing = {name for name in names if self._lone_file(fd, name) is None}
                if missing:
                    _check_may_delete(fd)  # or add
                    _check_no_default_acl(fd)
                for name in names:
                    if name not in missing and not os.access(name, os.W_OK, dir_fd=fd, effective_ids=True):
                        raise NotSimple("write-protected")
                for name in names:
                    outcome.note(paths.join(directory, name))
                    with suppress(OSError):
                        if name in missing:
                            _make_empty(fd, name, 0o666 & ~umask)
                        _write(fd, name, data)
                return outcome, len(os.listdir(fd))
        except OSError as error:
            raise NotSimple(str(error)) from None

    @contextmanager
    def _place(self, path: bytes) -> Iterator[tuple[int, bytes]]:
        """(the open directory that holds it, its name in there)."""
        directory, name = paths.split(path)
        if not self.parts(path) or name in self._protected:
            raise NotSimple("protected")
        with self.directory(directory) as fd:
            yield fd, name

    def _lone_file(self, directory: int, name: bytes) -> os.stat_result | None:
        """A regular file without other names; None if there is nothing."""
        try:
            st = os.stat(name, dir_fd=directory, follow_symlinks=False)
        except FileNotFoundError:
            return None
        if not stat.S_ISREG(st.st_mode) or st.st_nlink != 1 or st.st_dev != self._device:
            raise NotSimple("no regular file, or one that shows elsewhere as well")
        return st

    def _step(self, fd: int, name: bytes) -> int:
        """The directory `name` in `fd`, which is closed once that is open."""
        try:
            inner = os.open(name, _OPEN_DIRECTORY, dir_fd=fd)
        except FileNotFoundError:
            raise
        except OSError as error:  # a symlink, a file, or not readable
            raise NotSimple(str(error)) from None
        if os.fstat(inner).st_dev != self._device:
            os.close(inner)
            raise NotSimple("another file system")
        os.close(fd)
        return inner


@contextmanager
def _subdirectory(parent: int, name: bytes) -> Iterator[int]:
    fd = os.open(name, _OPEN_DIRECTORY, dir_fd=parent)
    try:
        yield fd
    finally:
        os.close(fd)


def _make_empty(directory: int, name: bytes, mode: int) -> None:
    _check_no_default_acl(directory)
    fd = os.open(name, _OPEN_FILE | os.O_CREAT | os.O_EXCL, mode, dir_fd=directory)
    with suppress(OSError):
        if os.fstat(fd).st_mode & 0o777 != mode:  # our own umask took something away
            os.fchmod(fd, mode)
    os.close(fd)


def _write(directory: int, name: bytes, data: bytes) -> None:
    fd = os.open(name, _OPEN_FILE | os.O_TRUNC, dir_fd=directory)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)


def _renew(directory: int, name: bytes) -> None:
    fd = os.open(name, _OPEN_FILE, dir_fd=directory)
    try:
        os.utime(fd)
    finally:
        os.close(fd)


def _check_no_default_acl(directory: int) -> None:
    with suppress(OSError):
        os.getxattr(directory, _DEFAULT_ACL)
        raise NotSimple("a default ACL decides about modes here")


def _check_may_delete(directory: int) -> None:
    """NotSimple if names in this directory cannot be deleted by this user."""
    if not os.access(b".", os.W_OK | os.X_OK, dir_fd=directory, effective_ids=True):
        raise NotSimple("not writable")
    st = os.fstat(directory)
    if st.st_mode & stat.S_ISVTX and os.geteuid() not in (0, st.st_uid):
        raise NotSimple("sticky")


def _check_would_not_ask(directory: int, name: bytes, st: os.stat_result, force: bool) -> None:
    """Without -f, `rm` asks before it deletes a file that cannot be written (if it has a terminal to ask on)."""
    if force or stat.S_ISLNK(st.st_mode):
        return
    if not os.access(name, os.W_OK, dir_fd=directory, effective_ids=True):
        raise NotSimple("write-protected")


def _exists(directory: int, name: bytes) -> bool:
    try:
        os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise NotSimple(str(error)) from None
    return True


class _Deletion:
    """Deletes a file or a tree, going on after what cannot be deleted."""

    def __init__(self) -> None:
        self.deleted: list[bytes] = []  # b"" for the thing itself, b"/a/b" for what was in it
        self.failures: list[tuple[bytes, OSError]] = []

    def delete(self, parent: int, name: bytes, inner: bytes) -> None:
        try:
            os.unlink(name, dir_fd=parent)
            self.deleted.append(inner)
        except FileNotFoundError:
            pass  # somebody else was quicker
        except OSError as error:
            if error.errno in (errno.EISDIR, errno.EPERM):
                self._delete_directory(parent, name, inner, error)
            else:
                self.failures.append((inner, error))

    def _delete_directory(self, parent: int, name: bytes, inner: bytes, not_unlinked: OSError) -> None:
        before = len(self.failures)
        try:
            with _subdirectory(parent, name) as fd:
                for entry in os.listdir(fd):
                    entry_name = os.fsencode(entry)
                    self.delete(fd, entry_name, inner + b"/" + entry_name)
            if len(self.failures) == before:
                os.rmdir(name, dir_fd=parent)
                self.deleted.append(inner)
        except FileNotFoundError:
            pass
        except NotADirectoryError:
            self.failures.append((inner, not_unlinked))
        except OSError as error:
            self.failures.append((inner, error))


def _overlap(targets: Sequence[bytes]) -> bool:
    """True if one of them is another, or lies in it."""
    ordered = sorted(target + b"/" for target in targets)
    return any(after.startswith(before) for before, after in pairwise(ordered))
