"""This machine's own files, where they are what the master's are: a farm of equal machines need not send compilers.

Nothing is believed but hashes: of each piece of a large file that is read, the own one is hashed once and compared
with the master's.  It counts as long as the master's file is the same and ours looks the same, and was left alone for a
while.  (Writing to a file that is mapped shows late; nobody does that to programs and libraries.)  Only files that are
for everybody to read, whatever directory they are in: no command gets to know what it could not have had from its
master.  Any thread.
"""

from __future__ import annotations

import hashlib
import os
import stat
import threading
import time
from collections.abc import Sequence

from termite import paths
from termite.store.manifest import Manifest

SETTLED_NS = 2_000_000_000
"""A file that has changed more recently may change again without looking different."""

MOST_FILES = 4096
"""So many are remembered; then all are compared anew."""

Signature = tuple[int, int, int, int, int]
_NONE: frozenset[int] = frozenset()


class OwnFiles:
    def __init__(self) -> None:
        self.bytes = 0  # read from them so far; about, as threads do not wait for each other to count
        self._lock = threading.Lock()
        # path -> how it looked when it was compared, with which hashes, the pieces that are right (none: another file)
        self._compared: dict[bytes, tuple[Signature, tuple[bytes, ...], frozenset[int]]] = {}

    def read_into(self, path: bytes, manifest: Manifest, indices: Sequence[int], buffer: memoryview, at: int) -> bool:
        """Fill `buffer` with what stands at `at`, which lies in these pieces; False: our file is none, or another."""
        try:
            fd = os.open(paths.absolute(path), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            return False
        try:
            looks = _signature(fd, manifest.size)
            if looks is None or not self._is_right(path, looks, fd, manifest, indices):
                return False
            done = os.preadv(fd, [buffer], at)
            self.bytes += done
            return done == len(buffer) and _signature(fd, manifest.size) == looks
        except OSError:
            return False
        finally:
            os.close(fd)

    def _is_right(self, path: bytes, looks: Signature, fd: int, manifest: Manifest, indices: Sequence[int]) -> bool:
        known = self._known(path, looks, manifest)
        if known == _NONE:
            return False
        for index in indices:
            if known is not None and index in known:
                continue
            offset, length = manifest.range_of(index)
            same = hashlib.sha256(os.pread(fd, length, offset)).digest() == manifest.pieces[index]
            self._note(path, looks, manifest, index if same else None)
            if not same:
                return False
        return True

    def _known(self, path: bytes, looks: Signature, manifest: Manifest) -> frozenset[int] | None:
        """The pieces that are right; none: the file is another one; None: it was not compared yet."""
        before, hashes, right = self._compared.get(path, (looks, (), _NONE))
        return right if before == looks and hashes == manifest.pieces else None

    def _note(self, path: bytes, looks: Signature, manifest: Manifest, index: int | None) -> None:
        """A piece is right, or (None) the file is another one."""
        with self._lock:
            right = _NONE if index is None else (self._known(path, looks, manifest) or _NONE) | {index}
            if len(self._compared) >= MOST_FILES:
                self._compared.clear()
            self._compared[path] = looks, manifest.pieces, right


def _signature(fd: int, size: int) -> Signature | None:
    """How the file looks; None if it cannot be what we look for, or may be changing."""
    st = os.fstat(fd)
    if not stat.S_ISREG(st.st_mode) or not st.st_mode & stat.S_IROTH or st.st_size != size:
        return None
    if abs(time.time_ns() - st.st_ctime_ns) < SETTLED_NS:
        return None
    return st.st_dev, st.st_ino, st.st_size, st.st_mtime_ns, st.st_ctime_ns
