"""Which names in a directory may have changed since the last look, by a mark per name; see mkbox/fingerprint.c.

Looking at a hundred thousand files with Python takes a second; this takes a tenth of that, on a thread, and
without the interpreter's lock.  A name that is pointed out may be the same as before; one that is not, is.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import struct
import sysconfig
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from termite import paths

log = logging.getLogger(__name__)

SETTLED_NS = 50_000_000
"""What changed this shortly before it was looked at may change again without looking different."""

COARSE_NS = 2_000_000_000
"""The same, on a file system that counts whole seconds."""

_RECORD = struct.Struct("<QQQQ")
_READ_ONLY = 0x100  # PyBUF_READ
_memory_at = ctypes.pythonapi.PyMemoryView_FromMemory
_memory_at.argtypes = [ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int]
_memory_at.restype = ctypes.py_object
_MARK_BYTES = 16


class Looked(NamedTuple):
    """One directory in which there may be something new."""

    path: bytes
    marks: bytes | None  # to be handed back at the next look; None: it cannot be read
    moved: list[bytes]  # names that are new or may have changed; b"": the directory itself
    names: set[bytes] | None  # all names, with b""; None: none has come or gone


class Look:
    """What was found in one look at some directories: those in which there may be something new.

    Made on a thread, since it waits for the disk.  Iterating takes the records apart, one at a time, so that the
    event loop can do it in pieces; a thread that did would hold the interpreter's lock against the loop.
    """

    def __init__(self, directories: Sequence[bytes], marks: Mapping[bytes, bytes]) -> None:
        """`marks`: what the latest look said of these directories, as far as there was one."""
        self._directories = directories
        self._found = _changes(directories, [marks.get(directory, b"") for directory in directories])

    def __iter__(self) -> Iterator[Looked]:
        if self._found is None:
            yield from map(_without_library, self._directories)
            return
        found = self._found.memory
        at = 0
        while at < len(found):
            number, marks, moved, names = _RECORD.unpack_from(found, at)
            to_moved = at + _RECORD.size + marks
            to_names = to_moved + moved
            end = to_names + names
            yield Looked(
                self._directories[number],
                bytes(found[at + _RECORD.size : to_moved]) if marks else None,
                bytes(found[to_moved:to_names]).split(b"\0")[:-1],
                set(bytes(found[to_names:end]).split(b"\0")) if names else None,
            )
            at = end


class _Found:
    """What the library found, where it is: to copy megabytes holds the interpreter's lock for milliseconds."""

    def __init__(self, library: Any, address: int, length: int) -> None:
        self.memory: memoryview = _memory_at(address, length, _READ_ONLY)
        self._address = address
        self._free = library.termite_free

    def __del__(self) -> None:
        self.memory.release()
        self._free(self._address)


def _changes(directories: Sequence[bytes], marks: Sequence[bytes]) -> _Found | None:
    library = _library()
    if library is None:
        return None
    now = time.time_ns()
    length = ctypes.c_size_t()
    found = library.termite_changes(
        b"".join(paths.absolute(directory) + b"\0" for directory in directories),
        len(directories),
        b"".join(marks),
        struct.pack(f"<{len(marks)}Q", *(len(m) // _MARK_BYTES for m in marks)),
        now - SETTLED_NS,
        now - COARSE_NS,
        ctypes.byref(length),
    )
    if not found:
        raise MemoryError
    return _Found(library, found, length.value)


def _without_library(directory: bytes) -> Looked:
    """All names may have changed."""
    try:
        names = {b"", *os.listdir(paths.absolute(directory))}
    except OSError:
        return Looked(directory, None, [], None)
    return Looked(directory, b"", list(names), names)


@functools.cache
def _library() -> Any:
    path = Path(sysconfig.get_path("data")) / "lib" / "termite" / "libtermite-fingerprint.so"
    try:
        library = ctypes.CDLL(str(path))
        changes, free = library.termite_changes, library.termite_free
    except (OSError, AttributeError) as error:
        log.warning("looking for changed files takes longer without %s: %s; install termite again", path.name, error)
        return None
    size = ctypes.c_size_t
    changes.argtypes = (
        ctypes.c_char_p, size, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int64, ctypes.c_int64, ctypes.POINTER(size)
    )  # fmt: skip
    changes.restype = ctypes.c_void_p
    free.argtypes = (ctypes.c_void_p,)
    free.restype = None
    return library
