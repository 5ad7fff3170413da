"""A large file as a list of pieces, each of them contents of its own.

Of a compiler's libraries a command reads here a part and there a part.  So a large file that is not the
project's own is named by the hash of its manifest, which lists the hashes of its pieces; manifest and
pieces are had, checked, kept and passed on like all other contents, and only those that are read.

    "termite pieces 1\\n" | u64 size of the file | 32 bytes SHA-256 for each piece        (little-endian)
"""

from __future__ import annotations

import hashlib
import os
import struct
from typing import NamedTuple

from termite.errors import WireError

PIECE_BYTES = 512 << 10
MAX_BYTES = 64 << 30
"""Larger files are not cut into pieces: their manifests would be as large as other people's files."""

_HEAD = struct.Struct("<17sQ")
_MAGIC = b"termite pieces 1\n"
_HASH_BYTES = 32


class Manifest(NamedTuple):
    size: int  # of the file, in bytes
    pieces: tuple[bytes, ...]  # SHA-256 of each; all but the last are PIECE_BYTES long

    def encode(self) -> bytes:
        return _HEAD.pack(_MAGIC, self.size) + b"".join(self.pieces)

    def range_of(self, index: int) -> tuple[int, int]:
        """(offset, length) of a piece."""
        offset = index * PIECE_BYTES
        return offset, min(PIECE_BYTES, self.size - offset)


def decode_manifest(data: bytes, size: int) -> Manifest:
    """The manifest of a file of this size; WireError if these bytes are none."""
    count = -(-size // PIECE_BYTES)
    if len(data) != _HEAD.size + count * _HASH_BYTES or _HEAD.unpack_from(data) != (_MAGIC, size):
        raise WireError(f"{len(data)} bytes are no list of the pieces of a file of {size} bytes")
    starts = range(_HEAD.size, len(data), _HASH_BYTES)
    return Manifest(size, tuple(data[start : start + _HASH_BYTES] for start in starts))


def manifest_bytes(size: int) -> int:
    """How long the manifest of a file of this size is."""
    return _HEAD.size + -(-size // PIECE_BYTES) * _HASH_BYTES


def cut(fd: int, size: int) -> Manifest:
    """Reads an open file of this size; a file that is shorter by now gives a manifest that fits nothing."""
    buffer = memoryview(bytearray(min(PIECE_BYTES, max(size, 1))))
    pieces = []
    for offset in range(0, size, PIECE_BYTES):
        piece = buffer[: min(PIECE_BYTES, size - offset)]
        done = os.preadv(fd, [piece], offset)
        pieces.append(hashlib.sha256(piece[:done]).digest())
    return Manifest(size, tuple(pieces))
