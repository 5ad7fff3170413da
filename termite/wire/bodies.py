"""Bulk bytes on their way out, piece by piece, each body getting its turn.

A body never stands in a message and never goes out in one go: `BodyQueue` hands out one piece of
one body after the other, so ten large files share a connection evenly and a small message passes
between any two pieces.  The queue owns the descriptors of the files it sends.  Loop only.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from dataclasses import dataclass

from termite.errors import Refused
from termite.wire.framing import MAX_PAYLOAD


@dataclass(frozen=True, slots=True)
class FileBody:
    """Part of an open file, sent straight from it to somebody who knows its hash.

    Whoever takes this owns `fd` and closes it.
    """

    fd: int
    offset: int
    length: int

    def __len__(self) -> int:
        return self.length

    def close(self) -> None:
        os.close(self.fd)


Body = bytes | FileBody


class Sending:
    """One body and how much of it is still to be sent."""

    __slots__ = ("_body", "_offset", "last_kind", "left", "piece_kind", "stream")

    def __init__(self, stream: int, piece_kind: int, last_kind: int, body: Body) -> None:
        self.stream = stream
        self.piece_kind = piece_kind  # of frames that another one follows
        self.last_kind = last_kind
        self._body = body
        self._offset = 0
        self.left = len(body)  # bytes still to be sent
        if isinstance(body, FileBody):
            # The loop reads it, so let the kernel have it in memory by then.
            with contextlib.suppress(OSError):
                os.posix_fadvise(body.fd, body.offset, body.length, os.POSIX_FADV_SEQUENTIAL)

    def piece(self) -> tuple[int, bytes | memoryview]:
        """(kind, payload) of the next frame; Refused if the file has shrunk or cannot be read."""
        count = min(self.left, MAX_PAYLOAD)
        payload = self._read(count)
        self._offset += count
        self.left -= count
        return (self.piece_kind if self.left else self.last_kind), payload

    def close(self) -> None:
        if isinstance(self._body, FileBody):
            with contextlib.suppress(OSError):
                self._body.close()
        self._body = b""
        self.left = 0

    def _read(self, count: int) -> bytes | memoryview:
        body = self._body
        if not isinstance(body, FileBody):
            return body if count == len(body) else memoryview(body)[self._offset : self._offset + count]
        try:
            piece = os.pread(body.fd, count, body.offset + self._offset)
        except OSError as exc:
            raise Refused(f"a file could not be read while it was sent: {exc.strerror}; ask again") from None
        if len(piece) < count:
            raise Refused("a file became shorter while it was sent; ask again")
        return piece


class BodyQueue:
    """Bodies that take turns."""

    def __init__(self) -> None:
        self._turns: deque[Sending] = deque()

    def __len__(self) -> int:
        return len(self._turns)

    def add(self, sending: Sending) -> None:
        self._turns.append(sending)

    def next(self) -> Sending:
        """Whose turn it is; put it back with `add` if some of it is left."""
        return self._turns.popleft()

    def drop(self, stream: int, piece_kind: int) -> None:
        """Send no more of this one."""
        for sending in self._turns:
            if sending.stream == stream and sending.piece_kind == piece_kind:
                self._turns.remove(sending)
                sending.close()
                return

    def clear(self) -> None:
        while self._turns:
            self._turns.popleft().close()
