"""Answers that are ready before the kernel asks; see mkbox/fuse_answers.c, which gives them."""

from __future__ import annotations

import ctypes
from typing import Any

from termite.attr.fileattr import FileAttr

MOST = 2048
"""So many are kept; the oldest make way."""


class Answers:
    """Of one mount.  Calls are short and may come from any thread, until `close`.

    `library` keeps the interpreter while it is called (`ctypes.PyDLL`): giving it away and waiting to have it back
    takes longer than the calls.  Paths are the view's, without a leading slash.

    Both ways to change an answer return the size that was answered with the old one, and -1 if it was not used.
    """

    def __init__(self, library: Any, ask: Any, ask_contents: Any, get_context: Any) -> None:
        for name, result, arguments in (
            ("new", ctypes.c_void_p, (ctypes.c_void_p,) * 3),
            ("free", None, (ctypes.c_void_p,)),
            ("drop", ctypes.c_int64, (ctypes.c_void_p, ctypes.c_char_p)),
            ("told", ctypes.c_int64, (ctypes.c_void_p, ctypes.c_char_p)),
            (
                "put",
                ctypes.c_int64,
                (ctypes.c_void_p, ctypes.c_char_p, *(ctypes.c_uint32,) * 4, *(ctypes.c_int64,) * 2, ctypes.c_char_p),
            ),
            ("counts", None, (ctypes.c_void_p, *(ctypes.POINTER(ctypes.c_int64),) * 2)),
        ):
            function = getattr(library, f"termite_answers_{name}")
            function.restype, function.argtypes = result, arguments
        self._library = library
        functions = (ctypes.cast(function, ctypes.c_void_p) for function in (ask, ask_contents, get_context))
        self.handle: int | None = library.termite_answers_new(*functions)
        if self.handle is None:
            raise MemoryError
        self.getattr = ctypes.cast(library.termite_answers_getattr, ctypes.c_void_p)
        self.read = ctypes.cast(library.termite_answers_read, ctypes.c_void_p)
        self._paths: dict[bytes, None] = {}  # the oldest first

    def put(self, path: bytes, attr: FileAttr, contents: bytes = b"") -> int:
        """What is told from now on; ABSENT: that there is nothing.

        `contents`: a file that holds them and never changes; when it is gone, the view is asked.
        """
        self._paths.pop(path, None)
        self._paths[path] = None
        links = attr.nlink if attr.is_dir() else 1  # as in fuse.py
        told: int = self._library.termite_answers_put(
            self.handle, b"/" + path, attr.mode, links, attr.uid, attr.gid, attr.size, attr.mtime_ns, contents or None
        )
        return told

    def drop(self, path: bytes) -> int:
        """No answer from now on: the view is asked."""
        if self._paths.pop(path, self) is self:
            return -1
        told: int = self._library.termite_answers_drop(self.handle, b"/" + path)
        return told

    def told(self, path: bytes) -> int:
        """The size that was answered from here, or -1."""
        told: int = self._library.termite_answers_told(self.handle, b"/" + path)
        return told

    def counts(self) -> tuple[int, int]:
        """(how often contents were read from here, how many bytes)."""
        reads, size = ctypes.c_int64(), ctypes.c_int64()
        self._library.termite_answers_counts(self.handle, ctypes.byref(reads), ctypes.byref(size))
        return reads.value, size.value

    def __contains__(self, path: bytes) -> bool:
        return path in self._paths

    def below(self, directory: bytes) -> list[bytes]:
        """Paths in it that have an answer."""
        inside = directory + b"/"
        return [path for path in self._paths if path.startswith(inside)]

    def oldest(self) -> bytes | None:
        """One that is to be dropped, because there are too many."""
        return next(iter(self._paths)) if len(self._paths) > MOST else None

    def close(self) -> None:
        """When nobody can ask any more."""
        if self.handle is not None:
            self._library.termite_answers_free(self.handle)
        self.handle = None
