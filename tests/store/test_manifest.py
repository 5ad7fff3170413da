"""Large files as lists of pieces."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from termite.errors import WireError
from termite.store.manifest import PIECE_BYTES, Manifest, cut, decode_manifest, manifest_bytes


def cut_file(tmp_path: Path, data: bytes) -> Manifest:
    path = tmp_path / "file"
    path.write_bytes(data)
    fd = os.open(path, os.O_RDONLY)
    try:
        return cut(fd, len(data))
    finally:
        os.close(fd)


@pytest.mark.parametrize("size", [1, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES + 17])
def test_the_pieces_of_a_file_cover_it_without_a_gap(tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    manifest = cut_file(tmp_path, data)
    joined = b""
    for index, hash in enumerate(manifest.pieces):
        offset, length = manifest.range_of(index)
        assert offset == len(joined)
        piece = data[offset : offset + length]
        assert len(piece) == length and hashlib.sha256(piece).digest() == hash
        joined += piece
    assert joined == data


def test_what_was_encoded_is_decoded(tmp_path: Path) -> None:
    manifest = cut_file(tmp_path, os.urandom(2 * PIECE_BYTES + 5))
    encoded = manifest.encode()
    assert len(encoded) == manifest_bytes(manifest.size)
    assert decode_manifest(encoded, manifest.size) == manifest


@pytest.mark.parametrize("change", ["shorter", "longer", "another size", "another beginning"])
def test_what_is_no_manifest_of_that_file_is_refused(tmp_path: Path, change: str) -> None:
    manifest = cut_file(tmp_path, os.urandom(2 * PIECE_BYTES))
    encoded, size = manifest.encode(), manifest.size
    match change:
        case "shorter":
            encoded = encoded[:-1]
        case "longer":
            encoded += bytes(32)
        case "another size":
            size -= 1
        case "another beginning":
            encoded = b"T" + encoded[1:]
    with pytest.raises(WireError):
        decode_manifest(encoded, size)


def test_a_file_that_has_shrunk_gives_a_manifest_that_fits_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"short")
    with open(path, "rb") as file:
        manifest = cut(file.fileno(), 2 * PIECE_BYTES)
    assert manifest.size == 2 * PIECE_BYTES
    assert hashlib.sha256(b"short").digest() == manifest.pieces[0]
