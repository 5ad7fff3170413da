"""What may be read from this machine's own files: only what is the same, byte by byte."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from termite.store.manifest import PIECE_BYTES, Manifest, cut
from termite.worker import ownfiles
from termite.worker.ownfiles import OwnFiles

SIZE = 2 * PIECE_BYTES + 1000
DATA = os.urandom(SIZE)


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was made a moment ago counts as old; the last test is about that."""
    monkeypatch.setattr(ownfiles, "SETTLED_NS", 0)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "library"
    file.write_bytes(DATA)
    file.chmod(0o644)
    return file


def manifest_of(data: bytes) -> Manifest:
    fd = os.memfd_create("data")
    try:
        os.write(fd, data)
        return cut(fd, len(data))
    finally:
        os.close(fd)


def read(own: OwnFiles, file: Path, manifest: Manifest, offset: int, size: int) -> bytes | None:
    """As PiecedContent does it; None: not from there."""
    buffer = memoryview(bytearray(size))
    indices = range(offset // PIECE_BYTES, (offset + size - 1) // PIECE_BYTES + 1)
    before = len(os.listdir("/proc/self/fd"))
    found = own.read_into(os.fsencode(file)[1:], manifest, indices, buffer, offset)
    assert len(os.listdir("/proc/self/fd")) == before
    return bytes(buffer) if found else None


@pytest.mark.parametrize(("offset", "size"), [(0, 10), (PIECE_BYTES - 5, 10), (5, SIZE - 5), (SIZE - 1, 1)])
def test_the_same_file_is_read(file: Path, offset: int, size: int) -> None:
    own = OwnFiles()
    for _ in range(2):
        assert read(own, file, manifest_of(DATA), offset, size) == DATA[offset : offset + size]
    assert own.bytes == 2 * size


def test_what_was_compared_is_not_hashed_again(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, manifest = OwnFiles(), manifest_of(DATA)
    read(own, file, manifest, 0, SIZE)
    monkeypatch.setattr(ownfiles.hashlib, "sha256", None)
    assert read(own, file, manifest, 0, SIZE) == DATA


@pytest.mark.parametrize("at", [0, PIECE_BYTES, SIZE - 1])
def test_a_file_that_differs_in_a_byte_is_another_one(file: Path, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    other = bytearray(DATA)
    other[at] ^= 1
    own, manifest = OwnFiles(), manifest_of(bytes(other))
    assert read(own, file, manifest, 0, SIZE) is None
    monkeypatch.setattr(ownfiles.hashlib, "sha256", None)  # which is known from then on
    assert read(own, file, manifest, 0, SIZE) is None


def test_pieces_that_are_right_do_not_vouch_for_others(file: Path) -> None:
    other = bytearray(DATA)
    other[-1] ^= 1
    own, manifest = OwnFiles(), manifest_of(bytes(other))
    assert read(own, file, manifest, 0, 10) == DATA[:10]
    assert read(own, file, manifest, SIZE - 10, 10) is None
    assert read(own, file, manifest, 0, 10) is None


def test_what_the_master_has_now_counts_not_what_it_had(file: Path) -> None:
    """The master's file becomes another one of the same size, ours stays as it is; and back again."""
    other = bytearray(DATA)
    other[PIECE_BYTES] ^= 1
    own, before, now = OwnFiles(), manifest_of(DATA), manifest_of(bytes(other))
    assert read(own, file, before, 0, SIZE) == DATA
    assert read(own, file, now, PIECE_BYTES, 10) is None
    assert read(own, file, now, 0, SIZE) is None
    assert read(own, file, before, 0, SIZE) == DATA


def test_a_file_that_changes_is_compared_anew(file: Path) -> None:
    own, manifest = OwnFiles(), manifest_of(DATA)
    assert read(own, file, manifest, 0, 10) == DATA[:10]
    with open(file, "r+b") as change:
        change.write(b"other")
    assert read(own, file, manifest, 0, 10) is None
    assert read(own, file, manifest, PIECE_BYTES, 10) is None
    file.write_bytes(DATA)
    assert read(own, file, manifest, 0, 10) == DATA[:10]


def test_what_is_no_readable_file_of_that_size_is_left_alone(file: Path, tmp_path: Path) -> None:
    own, manifest = OwnFiles(), manifest_of(DATA)
    (tmp_path / "link").symlink_to(file)
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "long").write_bytes(DATA + b"x")
    file.with_name("private").write_bytes(DATA)
    file.with_name("private").chmod(0o640)
    for name in ("link", "fifo", "long", "private", "missing", "."):
        assert read(own, tmp_path / name, manifest, 0, 10) is None, name
    assert own.bytes == 0


def test_a_file_that_has_just_changed_is_left_alone(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownfiles, "SETTLED_NS", 3600 * 10**9)
    assert read(OwnFiles(), file, manifest_of(DATA), 0, 10) is None
