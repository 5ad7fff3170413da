"""Files on their way into the user's tree: without a name until they are complete.

A process that is killed at any moment leaves nothing behind, as an unnamed file (O_TMPFILE) goes with
its last descriptor.  File systems without that get a temporary name beside the target.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import itertools
import os
from collections.abc import Iterator

from termite import paths
from termite.errors import ReplayError, StoreError
from termite.store.local import pieces, write_sparse

TEMP_PREFIX = b".termite-tmp-"
_NO_TMPFILE = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT)
_libc = ctypes.CDLL(None, use_errno=True)
_renameat2 = _libc.renameat2
_renameat2.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
_RENAME_EXCHANGE = 2
_counter = itertools.count()


def temp_name() -> bytes:
    return b"%s%d-%d" % (TEMP_PREFIX, os.getpid(), next(_counter))


def proc_path(fd: int) -> bytes:
    """A path to what a descriptor stands for, whatever its name or the rights it was opened with."""
    return b"/proc/self/fd/%d" % fd


class Unfinished:
    """A regular file in the file system of one directory, to be filled and then given its name."""

    __slots__ = ("_dir_fd", "_name", "fd")

    def __init__(self, dir_fd: int, *, unnamed: bool = True) -> None:
        self._dir_fd = -1  # of the temporary name; -1: it has none
        self._name = b""
        self.fd = -1
        if unnamed:
            try:
                self.fd = os.open(b".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=dir_fd)
                return
            except OSError as error:
                if error.errno not in _NO_TMPFILE:
                    raise
        self._name = temp_name()
        with _same_time(dir_fd):
            self.fd = os.open(self._name, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=dir_fd)
        self._dir_fd = os.dup(dir_fd)

    def install(self, dir_fd: int, name: bytes, *, durable: bool = False) -> None:
        """Make it the file `name`, in the place of any file there; IsADirectoryError for a directory.

        `durable`: a file system that writes a replaced file out at once (ext4) shall do so, for ten times the
        price; a compiler's unlink and create would not have asked for it.
        """
        if self._name:
            with _same_time(self._dir_fd):
                _replace(self._dir_fd, self._name, dir_fd, name, durable=durable)
            self._name = b""
            return
        source = proc_path(self.fd)
        try:
            os.link(source, name, dst_dir_fd=dir_fd, follow_symlinks=True)
        except FileExistsError:
            temp = temp_name()
            os.link(source, temp, dst_dir_fd=dir_fd, follow_symlinks=True)
            try:
                _replace(dir_fd, temp, dir_fd, name, durable=durable)
            except OSError:  # once linked, it can never again become nameless
                self._name, self._dir_fd = temp, os.dup(dir_fd)
                raise

    def close(self) -> None:
        """Without `install`, it is gone; harmless to repeat."""
        if self._name:
            with contextlib.suppress(OSError), _same_time(self._dir_fd):
                os.unlink(self._name, dir_fd=self._dir_fd)
            self._name = b""
        for fd in (self.fd, self._dir_fd):
            if fd >= 0:
                os.close(fd)
        self.fd = self._dir_fd = -1


def _replace(temp_fd: int, temp: bytes, dir_fd: int, name: bytes, *, durable: bool) -> None:
    """Give a file its name; an old one is swapped out and removed unless `durable`."""
    if durable or _renameat2(temp_fd, temp, dir_fd, name, _RENAME_EXCHANGE) != 0:
        os.rename(temp, name, src_dir_fd=temp_fd, dst_dir_fd=dir_fd)
        return
    try:
        os.unlink(temp, dir_fd=temp_fd)
    except IsADirectoryError:
        _renameat2(temp_fd, temp, dir_fd, name, _RENAME_EXCHANGE)
        raise


@contextlib.contextmanager
def _same_time(dir_fd: int) -> Iterator[None]:
    """Our temporary names leave no trace in a directory's time."""
    before = os.fstat(dir_fd)
    yield
    os.utime(proc_path(dir_fd), ns=(before.st_atime_ns, before.st_mtime_ns))


class Staged:
    """Contents that come in pieces; blocks of zeros become holes.

    `finish` checks length and hash: StoreError if they are not what was announced.
    """

    def __init__(self, file: Unfinished, size: int, hash: bytes) -> None:
        self.file = file
        self.size = size
        self.hash = hash
        self.complete = False
        self.used = False  # has become a file of the tree
        self.written = 0
        self._sha = hashlib.sha256()

    def write(self, piece: bytes | memoryview) -> None:
        if self.written + len(piece) > self.size:
            raise StoreError(f"a result is longer than the {self.size} bytes announced")
        try:
            write_sparse(self.file.fd, piece, self.written)
        except OSError as error:
            raise ReplayError(f"cannot store a result of {self.size} bytes: {error.strerror}") from error
        self._sha.update(piece)
        self.written += len(piece)

    def finish(self) -> None:
        """To be called once, after the last piece."""
        if self.written != self.size or self._sha.digest() != self.hash:
            raise StoreError(f"a result arrived damaged ({self.written} of {self.size} bytes)")
        os.ftruncate(self.file.fd, self.size)
        self.complete = True

    def close(self) -> None:
        self.file.close()


Content = bytes | bytearray | memoryview | Staged


def fill(fd: int, content: Content) -> None:
    """Make an open file's contents these; it may have held others."""
    if isinstance(content, Staged):
        os.ftruncate(fd, 0)
        at = 0
        for piece in pieces(content.file.fd):
            write_sparse(fd, piece, at)
            at += len(piece)
        os.ftruncate(fd, content.size)
        return
    at = 0
    while at < len(content):
        at += os.write(fd, memoryview(content)[at:] if at else content)


class _How(ctypes.Structure):
    _fields_ = [("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64)]


_syscall = _libc.syscall
_syscall.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(_How), ctypes.c_size_t]
_syscall.restype = ctypes.c_long
_OPENAT2 = 437  # the same on every architecture
_RESOLVE_NO_SYMLINKS, _RESOLVE_BENEATH = 0x04, 0x08
_DIRECTORY = os.O_DIRECTORY | os.O_CLOEXEC


def open_directory(beneath: int, path: bytes, *, readable: bool = True) -> int:
    """A directory below another one, reached without a step through a symlink or out of it."""
    flags = _DIRECTORY | (os.O_RDONLY if readable else os.O_PATH)
    how = _How(flags, 0, _RESOLVE_NO_SYMLINKS | _RESOLVE_BENEATH)
    while True:
        fd = _syscall(_OPENAT2, beneath, path or b".", ctypes.byref(how), ctypes.sizeof(how))
        if fd >= 0:
            return int(fd)
        number = ctypes.get_errno()
        if number not in (errno.EINTR, errno.EAGAIN):  # EAGAIN: something was renamed meanwhile
            raise OSError(number, os.strerror(number), paths.for_people(path))


class _Statx(ctypes.Structure):
    _fields_ = [
        ("mask", ctypes.c_uint32),
        ("_head", ctypes.c_ubyte * 24),  # blksize, attributes, nlink, uid, gid
        ("mode", ctypes.c_uint16),
        ("_middle", ctypes.c_ubyte * 50),  # ino, size, blocks, attributes_mask, atime
        ("btime_s", ctypes.c_int64),
        ("btime_ns", ctypes.c_uint32),
        ("_pad", ctypes.c_int32),
        ("ctime_s", ctypes.c_int64),
        ("ctime_ns", ctypes.c_uint32),
        ("_rest", ctypes.c_ubyte * 148),
    ]


_statx = _libc.statx
_statx.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.POINTER(_Statx)]
_BTIME = 0x800
_BASIC_AND_BTIME = 0x7FF | _BTIME
_NOFOLLOW = 0x100


def born(dir_fd: int, name: bytes) -> tuple[int, int]:
    """(mode, when this name's file was made in ns); the last change where the file system does not know."""
    found = _Statx()
    if _statx(dir_fd, name, _NOFOLLOW, _BASIC_AND_BTIME, ctypes.byref(found)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), paths.for_people(name))
    if found.mask & _BTIME:
        return found.mode, found.btime_s * 10**9 + found.btime_ns
    return found.mode, found.ctime_s * 10**9 + found.ctime_ns
