"""Reading a file of which only pieces are here."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest

from termite.mirror.pieces import PiecedContent
from termite.store.manifest import PIECE_BYTES, Manifest

SIZE = 2 * PIECE_BYTES + 1000
DATA = os.urandom(SIZE)


class Pieces:
    """Counts which are asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.content = PiecedContent(b"", Manifest(SIZE, (b"", b"", b"")), self.open)
        self.cut_short = -1

    def open(self, indices: Sequence[int]) -> list[int]:
        self.asked += indices
        fds = []
        for index in indices:
            fd = os.memfd_create("piece")
            piece = DATA[index * PIECE_BYTES :][:PIECE_BYTES]
            os.write(fd, piece[:10] if index == self.cut_short else piece)
            fds.append(fd)
        return fds

    def read(self, offset: int, size: int) -> bytes:
        buffer = bytearray(size)
        before = len(os.listdir("/proc/self/fd"))
        done = self.content.read_into(buffer, offset)
        assert len(os.listdir("/proc/self/fd")) == before
        return bytes(buffer[:done])


@pytest.mark.parametrize(
    ("offset", "size", "pieces"),
    [
        (0, 10, [0]),
        (PIECE_BYTES - 5, 10, [0, 1]),
        (PIECE_BYTES, PIECE_BYTES, [1]),
        (5, SIZE, [0, 1, 2]),
        (SIZE - 1, 100, [2]),
        (SIZE, 100, []),
        (SIZE + 5, 100, []),
    ],
)
def test_only_the_pieces_that_are_read_are_asked_for(offset: int, size: int, pieces: list[int]) -> None:
    scene = Pieces()
    assert scene.read(offset, size) == DATA[offset : offset + size]
    assert scene.asked == pieces


def test_a_piece_that_is_cut_short_ends_the_read_there() -> None:
    scene = Pieces()
    scene.cut_short = 1
    assert scene.read(PIECE_BYTES - 5, PIECE_BYTES) == DATA[PIECE_BYTES - 5 : PIECE_BYTES + 10]
