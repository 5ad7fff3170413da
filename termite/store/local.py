"""Contents by SHA-256 on this machine's disk, shared by every process that opens the same directory.

One file per content, mode 0444, under a directory named after the first byte of its hash.  Nothing is
remembered in memory, so several processes may add, read and trim at once and a restart loses nothing.
A file is complete before it gets its name: written under `tmp/` and renamed, or adopted from elsewhere
on the same file system.  Contents may vanish between `has` and `open` (somebody trimmed): `open` says
so with KeyError and the caller fetches again; an open descriptor stays good.  Any thread.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import itertools
import os
import time
from collections.abc import Iterator

from termite import paths
from termite.errors import StoreError

CHUNK = 1 << 20
ZEROS = bytes(64 * 1024)
USED_EVERY_S = 60
"""How exactly `trim` knows what was used last; saves a write to the disk per use."""

STALE_TEMP_S = 60
"""Temporary files younger than this are left alone: their writer may be about to lock them."""


class ContentStore:
    """A directory of contents that `trim` keeps below `max_bytes`."""

    def __init__(self, directory: bytes | str, max_bytes: int) -> None:
        self.directory = os.fsencode(os.path.abspath(directory))
        self.max_bytes = max_bytes
        self.held_bytes = 0  # as the latest `trim` by this object left it
        self._temp = self.directory + b"/tmp"
        self._counter = itertools.count()
        try:
            os.makedirs(self._temp, 0o700, exist_ok=True)
            os.chmod(self.directory, 0o700)
            for first in range(256):
                with contextlib.suppress(FileExistsError):
                    os.mkdir(b"%s/%02x" % (self.directory, first), 0o700)
        except OSError as error:
            raise self.trouble(error) from error

    def has(self, hash: bytes) -> bool:
        return os.access(self._path(hash), os.F_OK)

    def open(self, hash: bytes, size: int = -1) -> int:
        """A descriptor to read from; KeyError if the contents are not here, or not `size` bytes long."""
        path = self._path(hash)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            raise KeyError(hash) from None
        except OSError as error:
            raise self.trouble(error) from error
        found = os.fstat(fd)
        if size >= 0 and found.st_size != size:  # cut short when the machine went down
            os.close(fd)
            self._remove(path)
            raise KeyError(hash)
        if time.time() - found.st_mtime > USED_EVERY_S:
            with contextlib.suppress(OSError):
                os.utime(fd)
        return fd

    def get(self, hash: bytes) -> bytes | None:
        """The contents themselves, where they are in memory; None if they have to be opened."""
        return None

    def size(self, hash: bytes) -> int:
        try:
            return os.stat(self._path(hash)).st_size
        except FileNotFoundError:
            raise KeyError(hash) from None

    def add(self, data: bytes) -> bytes:
        """Keep these bytes; their hash."""
        hash = hashlib.sha256(data).digest()
        if not self.has(hash):
            with self.writer(hash, len(data)) as writer:
                writer.write(data)
                writer.commit()
        return hash

    def adopt(self, name: bytes, hash: bytes, size: int, *, dir_fd: int | None = None, recent: bool = False) -> None:
        """Take a finished regular file whose hash and size are known; its old name is gone afterwards.

        Nothing is copied when the file lies on the store's file system.  `recent`: its time need not be
        set to count as just used.
        """
        try:
            os.chmod(name, 0o444, dir_fd=dir_fd)
            if not recent:
                os.utime(name, dir_fd=dir_fd)
            os.rename(name, self._path(hash), src_dir_fd=dir_fd)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise self.trouble(error) from error
            self._copy_in(name, hash, dir_fd)

    def writer(self, hash: bytes, size: int) -> Writer:
        """For contents that come in pieces."""
        path = b"%s/%d-%d" % (self._temp, os.getpid(), next(self._counter))
        try:
            # No O_EXCL: a name like ours can only be what a dead process with our pid left behind.
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise self.trouble(error) from error
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # dies with us, which is how trim() knows
        return Writer(self, fd, path, self._path(hash), hash, size)

    def verify(self, hash: bytes) -> bool:
        """True if the contents are here and right; wrong ones are removed, so that they are fetched again."""
        try:
            fd = self.open(hash)
        except KeyError:
            return False
        try:
            good = digest(fd) == hash
        finally:
            os.close(fd)
        if not good:
            self._remove(self._path(hash))
        return good

    def trim(self) -> int:
        """Remove what was not used for longest until the store fits; the number of bytes freed.

        Only one process trims at a time; the others return at once.
        """
        try:
            lock = os.open(self.directory + b"/lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise self.trouble(error) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._remove_stale_temps()
            return self._remove_oldest()
        except BlockingIOError:
            return 0
        finally:
            os.close(lock)

    def trouble(self, error: OSError) -> StoreError:
        """The one line to tell the user."""
        where = f"content store {paths.for_people(self.directory)}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return StoreError(f"{where}: the disk is full; free some space or name another directory with -cachedir")
        return StoreError(f"{where}: {error.strerror}; make it writable for this user or name another with -cachedir")

    def _path(self, hash: bytes) -> bytes:
        text = hash.hex().encode()
        return b"%s/%s/%s" % (self.directory, text[:2], text[2:])

    def _remove(self, path: bytes) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)

    def _copy_in(self, name: bytes, hash: bytes, dir_fd: int | None) -> None:
        source = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=dir_fd)
        try:
            with self.writer(hash, os.fstat(source).st_size) as writer:
                for piece in pieces(source):
                    writer.write(piece)
                writer.commit()
        finally:
            os.close(source)
        os.unlink(name, dir_fd=dir_fd)

    def _remove_stale_temps(self) -> None:
        for entry in os.scandir(self._temp):
            with contextlib.suppress(OSError):
                fd = os.open(entry.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # refused while the writer lives
                    if time.time() - os.fstat(fd).st_mtime > STALE_TEMP_S:
                        os.unlink(entry.path)
                finally:
                    os.close(fd)

    def _remove_oldest(self) -> int:
        kept: list[tuple[int, int, bytes]] = []
        for first in range(256):
            with contextlib.suppress(FileNotFoundError), os.scandir(b"%s/%02x" % (self.directory, first)) as entries:
                for entry in entries:
                    with contextlib.suppress(FileNotFoundError):
                        found = entry.stat(follow_symlinks=False)
                        kept.append((found.st_mtime_ns, found.st_blocks * 512, entry.path))
        excess = sum(size for _, size, _ in kept) - self.max_bytes
        freed = 0
        kept.sort()
        for _, size, path in kept:
            if freed >= excess:
                break
            self._remove(path)
            freed += size
        self.held_bytes = self.max_bytes + excess - freed
        return freed


class Writer:
    """Contents on their way into the store; they are in it once `commit` has returned."""

    def __init__(self, store: ContentStore, fd: int, temp: bytes, path: bytes, hash: bytes, size: int) -> None:
        self._store = store
        self._fd = fd  # -1: committed or aborted
        self._temp = temp
        self._path = path
        self._hash = hash
        self._sha = hashlib.sha256()
        self._size = size
        self.written = 0  # bytes so far, which is the offset of the next piece

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()

    def write(self, piece: bytes | memoryview) -> None:
        if self.written + len(piece) > self._size:
            self.abort()
            raise StoreError(f"contents {self._hash.hex()[:12]} are longer than the {self._size} bytes announced")
        try:
            write_sparse(self._fd, piece, self.written)
        except OSError as error:
            self.abort()
            raise self._store.trouble(error) from error
        self._sha.update(piece)
        self.written += len(piece)

    def commit(self) -> None:
        """Check length and hash and give the contents their name; StoreError if they are not what was promised."""
        if self.written != self._size or self._sha.digest() != self._hash:
            got = f"{self.written} of {self._size} bytes"
            self.abort()
            raise StoreError(f"contents {self._hash.hex()[:12]} are damaged ({got}); fetch them again")
        try:
            os.truncate(self._fd, self._size)  # a hole at the end
            os.fchmod(self._fd, 0o444)
            os.rename(self._temp, self._path)
        except OSError as error:
            self.abort()
            raise self._store.trouble(error) from error
        self._close()

    def abort(self) -> None:
        """Forget it; harmless after `commit`."""
        if self._fd >= 0:
            self._store._remove(self._temp)
            self._close()

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        os.close(fd)


def is_zero(piece: bytes | memoryview) -> bool:
    return len(piece) > 0 and piece[0] == 0 and piece[-1] == 0 and bytes(piece) == bytes(len(piece))


def write_sparse(fd: int, piece: bytes | memoryview, offset: int) -> None:
    """Write a piece of a new file; blocks of zeros become holes (the caller sets the length at the end)."""
    block = len(ZEROS)
    if len(piece) <= block:
        if not is_zero(piece):
            _write_all(fd, piece, offset)
        return
    view = memoryview(piece)
    start = 0  # of the data not yet written
    for at in range(0, len(view), block):
        if is_zero(view[at : at + block]):
            _write_all(fd, view[start:at], offset + start)
            start = at + block
    _write_all(fd, view[start:], offset + start)


def _write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    while len(data):
        n = os.pwrite(fd, data, offset)
        if n == len(data):
            return
        data, offset = memoryview(data)[n:], offset + n


def pieces(fd: int) -> Iterator[memoryview]:
    """A file's bytes in order, each piece valid until the next; holes are not read."""
    size = os.fstat(fd).st_size
    buffer = memoryview(bytearray(min(CHUNK, max(size, 1))))
    zeros = memoryview(bytes(CHUNK))
    at = 0
    for start, end in _data_ranges(fd, size):
        while at < start:
            piece = zeros[: min(CHUNK, start - at)]
            at += len(piece)
            yield piece
        while at < end and (n := os.preadv(fd, [buffer[: end - at]], at)):
            at += n
            yield buffer[:n]


def digest(fd: int) -> bytes:
    """The SHA-256 of an open file, whatever its size, in constant memory."""
    sha = hashlib.sha256()
    for piece in pieces(fd):
        sha.update(piece)
    return sha.digest()


def _data_ranges(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """(start, end) of everything that is not a hole; ends with (size, size)."""
    at = 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
            at = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno != errno.ENXIO:  # a file system that knows no holes
                yield at, size
            break
        yield start, at
    yield size, size
