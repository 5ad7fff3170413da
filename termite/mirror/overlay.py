"""What a command changed is exactly what lies in the upper directory of its overlay.

`reap` reads it once the box is dead: new and changed files, whiteouts (removed), opaque directories
(replaced), redirects (renamed).  What it counts on:

- the overlay was mounted with redirect_dir=on, metacopy=off, index=off, xino=off;
- the upper directory began with the mode and the times of the writable root: they are what the command
  sees there, and what is compared at the end;
- the lower file system shows regular files with st_nlink 1: only then does the kernel mark a copied-up
  file with its origin, and without the mark "written in place" looks like "replaced by a new file".

Contents move out of the upper directory into the content store, in the very end, so an upper directory is
reaped once.  `reap` blocks on disk and on `lower`: any thread but those that answer for the lower file
system.  `reap_at_once` is for the event loop: it never blocks for long, and if it would have to, it raises
NotAtOnce and has changed nothing.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import stat
import time
from collections.abc import Callable
from typing import NamedTuple

from termite import paths
from termite.attr.fileattr import ABSENT, FileAttr, attr_of
from termite.store.local import USED_EVERY_S, ContentStore, digest
from termite.wire.messages import FileResult

_OPEN = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_HANDLE_BYTES = 128

INLINE_BYTES = 1 << 20
"""So much of what a command made travels with the answer, one file after the other for as long as they fit."""

_libc = ctypes.CDLL(None, use_errno=True)


AT_ONCE_BYTES = 1 << 20
AT_ONCE_FILES = 64
"""Hashing so much takes 0.6 ms, or 2.5 on a processor without instructions for it."""


class NotAtOnce(Exception):
    """The command changed too much, or something of which the master must be asked first."""


class Reaped(NamedTuple):
    files: list[FileResult]  # in path order, parents first
    body: bytes  # the inlined contents, where `inline_at` says
    notes: list[str]  # what could not be carried, for the log
    directories: list[bytes]  # in which something changed that were there before; relative to the root


class _Found(NamedTuple):
    """One name in the upper directory that is neither a directory nor a whiteout."""

    directory: bytes  # relative to the upper directory
    name: bytes
    path: bytes  # relative to the exported root
    before: bytes | None  # where the lower file that this name showed has its place; None: nowhere
    st: os.stat_result


def reap(
    upper: bytes,
    root: bytes,
    lower: Callable[[bytes], FileAttr],
    store: ContentStore,
    *,
    inline_bytes: int = INLINE_BYTES,
    lower_fd: int = -1,
    userxattr: bool = False,
) -> Reaped:
    """What the command whose overlay had this upper directory left different from what it found.

    `root` is the writable root, `lower` tells what stands at an exported path beneath the overlay.
    `lower_fd`, the open lower directory, lets hard-linked files be told apart exactly.
    """
    return _Reaper(upper, root, lower, store, inline_bytes, lower_fd, userxattr).run()


def reap_at_once(
    upper: bytes, root: bytes, known: Callable[[bytes], FileAttr | None], store: ContentStore, *, lower_fd: int
) -> Reaped:
    """As `reap`, if it can be done at once; `known` tells what stands at a path, None if it does not know."""

    def lower(path: bytes) -> FileAttr:
        attr = known(path)
        if attr is None:
            raise NotAtOnce
        return attr

    limits = _Limits(AT_ONCE_FILES, AT_ONCE_BYTES)
    return _Reaper(upper, root, lower, store, INLINE_BYTES, lower_fd, False, limits).run()


class _Limits(NamedTuple):
    files: int
    bytes: int


class _Reaper:
    def __init__(
        self,
        upper: bytes,
        root: bytes,
        lower: Callable[[bytes], FileAttr],
        store: ContentStore,
        inline_bytes: int,
        lower_fd: int,
        userxattr: bool,
        limits: _Limits | None = None,
    ) -> None:
        self._upper = upper
        self._root = root
        self._lower = lower
        self._store = store
        self._inline_left = inline_bytes
        self._recent_ns = time.time_ns() - USED_EVERY_S * 10**9
        self._lower_fd = lower_fd
        prefix = "user.overlay." if userxattr else "trusted.overlay."
        self._opaque, self._redirect = prefix + "opaque", prefix + "redirect"
        self._origin, self._whiteout = prefix + "origin", prefix + "whiteout"
        self._files: list[FileResult] = []
        self._body: list[bytes] = []
        self._body_len = 0
        self._notes: list[str] = []
        self._changed: list[bytes] = []  # directories
        self._links: dict[int, list[_Found]] = {}  # inode -> all its names
        self._taken: list[tuple[bytes, bytes, int, bool]] = []  # path, hash, size, is it recent: for the store
        self._limits = limits
        self._entries = self._bytes = 0
        self._todo: list[tuple[bytes, bytes | None, int]] = [(b"", root, -1)]

    def run(self) -> Reaped:
        self._top = os.open(self._upper, _OPEN | os.O_DIRECTORY)
        try:
            while self._todo:
                self._visit(*self._todo.pop())
            for names in self._links.values():
                self._linked(names)
            for path, hash, size, recent in self._taken:
                self._store.adopt(path, hash, size, dir_fd=self._top, recent=recent)
        finally:
            os.close(self._top)
        self._files.sort(key=lambda file: file.path)  # a prefix sorts first: parents before children
        return Reaped(self._files, b"".join(self._body), self._notes, self._changed)

    # -- directories ------------------------------------------------------------------------------

    def _visit(self, directory: bytes, inherited: bytes | None, mode: int) -> None:
        """One directory of the upper tree; `inherited`: the lower path its name stood for, None: nothing."""
        fd = self._open_directory(directory)
        try:
            before = self._directory(fd, directory, inherited, mode)
            with os.scandir(fd) as entries:
                found = list(entries)
            if found and before is not None:
                self._changed.append(directory)
            for entry in found:
                name = os.fsencode(entry.name)
                child = None if before is None else paths.join(before, name)
                self._entry(fd, directory, name, entry.stat(follow_symlinks=False), child)
        finally:
            os.close(fd)

    def _open_directory(self, directory: bytes) -> int:
        name = directory or b"."
        try:
            return os.open(name, _OPEN | os.O_DIRECTORY, dir_fd=self._top)
        except PermissionError:  # an ordinary user's worker; the mode to report was read before
            self._may_block()
            os.chmod(name, 0o700, dir_fd=self._top)
            return os.open(name, _OPEN | os.O_DIRECTORY, dir_fd=self._top)

    def _directory(self, fd: int, directory: bytes, inherited: bytes | None, mode: int) -> bytes | None:
        """Report the directory itself if it changed; where its unchanged children lie in the lower tree."""
        st = os.fstat(fd)
        mode = st.st_mode if mode < 0 else mode
        marks = os.listxattr(fd)
        path = paths.join(self._root, directory) if directory else self._root
        standing = self._standing(inherited)
        before, old, moved_from = inherited, standing, b""
        opaque = self._opaque in marks and os.getxattr(fd, self._opaque) == b"y"
        if self._redirect in marks:
            before = self._redirected(os.getxattr(fd, self._redirect), inherited, directory)
            old = self._standing(before)
            moved_from = b"" if before == inherited else before
        elif opaque:
            before, old = None, ABSENT
        if not old.is_dir():
            before = None
        replaced = opaque and standing.is_dir()
        if moved_from or replaced or mode != old.mode or st.st_mtime_ns != old.mtime_ns:
            attr = FileAttr(mode=mode, mtime_ns=st.st_mtime_ns)
            self._files.append(FileResult(path, attr, moved_from=moved_from, opaque=replaced))
        return before

    def _redirected(self, redirect: bytes, inherited: bytes | None, directory: bytes) -> bytes:
        """The lower path that a redirect names: from the overlay's top, or a sibling of where it was."""
        if redirect.startswith(b"/"):
            return paths.join(self._root, redirect.strip(b"/"))
        beside = inherited if inherited is not None else paths.join(self._root, directory)
        return paths.join(paths.split(beside)[0], redirect)

    def _standing(self, before: bytes | None) -> FileAttr:
        return ABSENT if before is None else self._lower(before)

    # -- everything else --------------------------------------------------------------------------

    def _entry(self, fd: int, directory: bytes, name: bytes, st: os.stat_result, before: bytes | None) -> None:
        child = paths.join(directory, name)
        path = paths.join(self._root, child)
        mode = st.st_mode
        self._count(st)
        if len(path) > paths.MAX_PATH:
            self._notes.append(f"{paths.for_people(path)[:200]}...: path too long, left out")
        elif stat.S_ISDIR(mode):
            self._todo.append((child, before, mode))
        elif stat.S_ISCHR(mode) and st.st_rdev == 0:
            self._files.append(FileResult(path, ABSENT))
        elif not (stat.S_ISREG(mode) or stat.S_ISLNK(mode) or stat.S_ISFIFO(mode)):
            kind = "socket" if stat.S_ISSOCK(mode) else "device"
            self._notes.append(f"{paths.for_people(path)}: a {kind} is not carried over")
            if self._standing(before).exists():
                self._files.append(FileResult(path, ABSENT))
        elif st.st_nlink > 1:
            self._links.setdefault(st.st_ino, []).append(_Found(directory, name, path, before, st))
        else:
            result = self._file(fd, _Found(directory, name, path, before, st), linked=False)
            if result is not None:
                self._files.append(result)

    def _count(self, st: os.stat_result) -> None:
        if self._limits is not None:
            self._entries += 1
            self._bytes += st.st_size
            if self._entries > self._limits.files or self._bytes > self._limits.bytes:
                raise NotAtOnce

    def _may_block(self) -> None:
        if self._limits is not None:
            raise NotAtOnce

    def _linked(self, names: list[_Found]) -> None:
        """All names of one file: one of them carries it, the others link to that one."""
        names.sort(key=lambda found: found.path)
        first = next((found for found in names if self._is_own(found)), names[0])
        fd = self._open_directory(first.directory)
        try:
            result = self._file(fd, first, linked=True)
        finally:
            os.close(fd)
        if result is None:
            return
        self._files.append(result)
        for other in names:
            if other is not first:
                self._files.append(FileResult(other.path, result.attr, link_to=first.path))

    def _is_own(self, found: _Found) -> bool:
        """True if this name is where the file stood before it got other names."""
        old = self._standing(found.before)
        if not old.is_regular() or not stat.S_ISREG(found.st.st_mode):
            return old.exists() and old.mode == found.st.st_mode and old.mtime_ns == found.st.st_mtime_ns
        directory = self._open_directory(found.directory)
        try:
            fd = self._open_file(directory, found.name)
        finally:
            os.close(directory)
        try:
            return self._is_from(self._origin_of(fd), found.before)
        finally:
            os.close(fd)

    def _file(self, directory: int, found: _Found, *, linked: bool) -> FileResult | None:
        """The result for one name, None if it is what it was; `linked`: others need it even so."""
        old = self._standing(found.before)
        if stat.S_ISREG(found.st.st_mode):
            return self._regular(directory, found, old, linked)
        target = os.readlink(found.name, dir_fd=directory) if stat.S_ISLNK(found.st.st_mode) else b""
        attr = attr_of(found.st, target)
        same = attr.mode == old.mode and attr.mtime_ns == old.mtime_ns and attr.target == old.target
        if same and not linked:
            return None
        return FileResult(found.path, _anonymous(attr), kept=same)

    def _regular(self, directory: int, found: _Found, old: FileAttr, linked: bool) -> FileResult | None:
        st = found.st
        fd = self._open_file(directory, found.name)
        try:
            origin = self._origin_of(fd)
            copied = bool(origin) and old.is_regular()
            itself = copied and self._is_from(origin, found.before)
            moved_from = self._linked_source(origin) if origin and not itself else b""
            in_place = itself or (copied and not moved_from and not linked and old.nlink == 1)
            if old.is_regular() and not in_place and st.st_size == 0 and self._whiteout in os.listxattr(fd):
                return FileResult(found.path, ABSENT)
            data = None
            if st.st_size <= self._inline_left:
                data = os.read(fd, st.st_size + 1)
                hash = hashlib.sha256(data).digest()
            else:
                hash = digest(fd)
        finally:
            os.close(fd)
        attr = FileAttr(mode=st.st_mode, size=st.st_size, mtime_ns=st.st_mtime_ns, hash=hash)
        if in_place and old.hash == hash:
            if (st.st_mode, st.st_mtime_ns) != (old.mode, old.mtime_ns):
                return FileResult(found.path, attr, in_place=True, kept=True)
            return FileResult(found.path, attr, kept=True) if linked else None
        recent = st.st_mtime_ns > self._recent_ns
        self._taken.append((paths.join(found.directory, found.name), hash, st.st_size, recent))
        if moved_from:
            was = self._lower(moved_from)
            in_place = (was.hash, was.mode, was.mtime_ns) != (hash, st.st_mode, st.st_mtime_ns)
        return FileResult(found.path, attr, inline_at=self._inline(data), moved_from=moved_from, in_place=in_place)

    def _open_file(self, directory: int, name: bytes) -> int:
        try:
            return os.open(name, _OPEN, dir_fd=directory)
        except PermissionError:  # an ordinary user's worker and a file without read permission
            self._may_block()
            os.chmod(name, 0o400, dir_fd=directory)
            return os.open(name, _OPEN, dir_fd=directory)

    def _inline(self, data: bytes | None) -> int:
        """Where in the body these contents stand now; -1: not there."""
        if data is None or len(data) > self._inline_left:
            return -1
        at = self._body_len
        self._body.append(data)
        self._body_len += len(data)
        self._inline_left -= len(data)
        return at

    def _origin_of(self, fd: int) -> bytes:
        """Of which lower file this open upper one is a copy, as the kernel wrote it down; b"": of none."""
        try:
            return os.getxattr(fd, self._origin)
        except OSError:
            return b""

    def _is_from(self, origin: bytes, before: bytes | None) -> bool:
        """True if the lower file at `before` is meant, or if that cannot be told."""
        if not origin or before is None:
            return False
        if self._lower_fd < 0 or len(origin) <= _ORIGIN_HEAD:
            return True
        handle = _handle(self._lower_fd, before[len(self._root) :].lstrip(b"/"))
        return not handle or origin[_ORIGIN_HEAD:] == handle

    def _linked_source(self, origin: bytes) -> bytes:
        """Where the lower file stands that was renamed, if it has other names on the master; else b""."""
        inside = _place(self._lower_fd, origin)
        if not inside:
            return b""
        source = paths.join(self._root, inside)
        attr = self._lower(source)
        return source if attr.is_regular() and attr.nlink > 1 and self._is_from(origin, source) else b""


_ORIGIN_HEAD = 21
"""The file handle in `overlay.origin` follows: version, magic, length, flags, type, 16 bytes of uuid."""


class _FileHandle(ctypes.Structure):
    _fields_ = [("size", ctypes.c_uint), ("type", ctypes.c_int), ("bytes", ctypes.c_ubyte * _HANDLE_BYTES)]


def _handle(directory: int, path: bytes) -> bytes:
    """What the kernel calls this file in `overlay.origin`; b"" if it has no name for it."""
    handle, mount = _FileHandle(_HANDLE_BYTES, 0), ctypes.c_int()
    if _libc.name_to_handle_at(directory, path, ctypes.byref(handle), ctypes.byref(mount), 0) != 0:
        return b""
    return bytes(handle.bytes[: handle.size])


def _place(directory: int, origin: bytes) -> bytes:
    """Where below this lower directory the file of an `overlay.origin` stands; b"" if the kernel cannot tell.

    It can as long as it remembers the file; the overlay has just used it.
    """
    handle = _FileHandle(len(origin) - _ORIGIN_HEAD, origin[4] if len(origin) > _ORIGIN_HEAD else 0)
    if directory < 0 or not 0 < handle.size <= _HANDLE_BYTES:
        return b""
    ctypes.memmove(handle.bytes, origin[_ORIGIN_HEAD:], handle.size)
    top_fd = os.open(b".", _OPEN | os.O_DIRECTORY, dir_fd=directory)  # which may be O_PATH: not good enough here
    try:
        fd = _libc.open_by_handle_at(top_fd, ctypes.byref(handle), os.O_PATH | os.O_CLOEXEC)
        if fd < 0:
            return b""
        try:
            top, path = (os.readlink(b"/proc/self/fd/%d" % each) for each in (top_fd, fd))
        finally:
            os.close(fd)
    finally:
        os.close(top_fd)
    return path[len(top) + 1 :] if path.startswith(top + b"/") else b""


def _anonymous(attr: FileAttr) -> FileAttr:
    """Without the owner, who means nothing on another machine."""
    return FileAttr(mode=attr.mode, size=attr.size, mtime_ns=attr.mtime_ns, target=attr.target)
