"""Contents that are fetched where they are read, piece by piece."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from termite.store.manifest import PIECE_BYTES, Manifest


class PiecedContent:
    """A large file.  Any thread.

    `open_pieces` gives a descriptor for each of the pieces asked for, which we close.  `read_own`, which is tried
    first, fills a buffer with what stands at an offset, within some pieces; False: not from there.
    """

    __slots__ = ("_manifest", "_open_pieces", "_read_own", "hash", "size")

    def __init__(
        self,
        hash: bytes,
        manifest: Manifest,
        open_pieces: Callable[[Sequence[int]], list[int]],
        read_own: Callable[[Sequence[int], memoryview, int], bool] | None = None,
    ) -> None:
        self.hash = hash
        self.size = manifest.size
        self._manifest = manifest
        self._open_pieces = open_pieces
        self._read_own = read_own

    def read_into(self, buffer: Any, offset: int) -> int:
        """Fill `buffer` with what stands at `offset`; the number of bytes, less only at the end.  May block."""
        end = min(offset + len(buffer), self.size)
        if offset >= end:
            return 0
        indices = range(offset // PIECE_BYTES, (end - 1) // PIECE_BYTES + 1)
        view = memoryview(buffer).cast("B")[: end - offset]
        if self._read_own is not None and self._read_own(indices, view, offset):
            return end - offset
        fds = self._open_pieces(indices)
        try:
            at = offset
            for index, fd in zip(indices, fds, strict=True):
                start, length = self._manifest.range_of(index)
                stop = min(end, start + length)
                at += os.preadv(fd, [view[at - offset : stop - offset]], at - start)
                if at != stop:
                    break  # somebody has cut a file of the store short
            return at - offset
        finally:
            for fd in fds:
                os.close(fd)
