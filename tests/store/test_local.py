"""The content store on a real directory."""

from __future__ import annotations

import errno
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from termite.errors import StoreError
from termite.store import local
from termite.store.local import ContentStore, digest, pieces, write_sparse

BLOCK = 4096
OLD = 1_000_000_000


@pytest.fixture
def store(tmp_path: Path) -> ContentStore:
    return ContentStore(os.fsencode(tmp_path / "store"), 1 << 30)


def hash_of(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def contents(store: ContentStore, hash: bytes) -> bytes:
    fd = store.open(hash)
    try:
        return os.read(fd, 1 << 22)
    finally:
        os.close(fd)


def file_of(store: ContentStore, hash: bytes) -> Path:
    return Path(os.fsdecode(store.directory)) / hash.hex()[:2] / hash.hex()[2:]


def temps(store: ContentStore) -> list[str]:
    return os.listdir(os.fsdecode(store.directory) + "/tmp")


def test_what_was_added_is_found_by_its_hash(store: ContentStore) -> None:
    hash = store.add(b"hello")
    assert hash == hash_of(b"hello")
    assert store.has(hash) and store.size(hash) == 5 and contents(store, hash) == b"hello"
    assert file_of(store, hash).stat().st_mode & 0o777 == 0o444


def test_absent_contents_are_a_key_error(store: ContentStore) -> None:
    assert not store.has(bytes(32))
    with pytest.raises(KeyError):
        store.open(bytes(32))
    with pytest.raises(KeyError):
        store.size(bytes(32))


def test_a_second_store_on_the_same_directory_sees_the_same_contents(store: ContentStore) -> None:
    hash = store.add(b"shared")
    assert contents(ContentStore(store.directory, 1), hash) == b"shared"


def test_a_writer_takes_pieces_and_shows_nothing_before_commit(store: ContentStore) -> None:
    hash = hash_of(b"abcdef")
    with store.writer(hash, 6) as writer:
        writer.write(b"abc")
        writer.write(memoryview(b"def"))
        assert not store.has(hash)
        writer.commit()
    assert contents(store, hash) == b"abcdef" and temps(store) == []


@pytest.mark.parametrize("pieces", [[b"abc"], [b"abcdeX"], []])
def test_wrong_or_short_contents_are_refused_and_leave_nothing(store: ContentStore, pieces: list[bytes]) -> None:
    hash = hash_of(b"abcdef")
    with store.writer(hash, 6) as writer, pytest.raises(StoreError, match="damaged"):
        for piece in pieces:
            writer.write(piece)
        writer.commit()
    assert not store.has(hash) and temps(store) == []


def test_contents_longer_than_announced_are_refused_at_once(store: ContentStore) -> None:
    with store.writer(bytes(32), 3) as writer, pytest.raises(StoreError, match="longer"):
        writer.write(b"abcd")


def test_pieces_of_zeros_become_holes(store: ContentStore) -> None:
    data = bytes(1 << 20) + b"x" + bytes((1 << 20) - 1) + bytes(1 << 20)
    hash = hash_of(data)
    with store.writer(hash, len(data)) as writer:
        for at in range(0, len(data), 1 << 18):
            writer.write(data[at : at + (1 << 18)])
        writer.commit()
    assert contents(store, hash) == data
    assert file_of(store, hash).stat().st_blocks * 512 <= 1 << 18


def test_an_adopted_file_moves_into_the_store(store: ContentStore, tmp_path: Path) -> None:
    source = tmp_path / "out"
    source.write_bytes(b"made")
    source.chmod(0)
    ino = source.stat().st_ino
    directory = os.open(tmp_path, os.O_RDONLY)
    store.adopt(b"out", hash_of(b"made"), 4, dir_fd=directory)
    os.close(directory)
    assert not source.exists() and file_of(store, hash_of(b"made")).stat().st_ino == ino
    assert contents(store, hash_of(b"made")) == b"made"


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="no second file system")
def test_a_file_of_another_file_system_is_copied_and_removed(store: ContentStore) -> None:
    name = b"/dev/shm/termite-test-%d" % os.getpid()
    with open(name, "wb") as file:
        file.write(b"far away")
    store.adopt(name, hash_of(b"far away"), 8)
    assert not os.path.exists(name) and contents(store, hash_of(b"far away")) == b"far away"


def test_contents_of_the_wrong_size_are_removed_and_count_as_absent(store: ContentStore) -> None:
    hash = store.add(b"complete")
    os.truncate(file_of(store, hash), 3)
    with pytest.raises(KeyError):
        store.open(hash, 8)
    assert not store.has(hash)


def test_verify_removes_damaged_contents(store: ContentStore) -> None:
    good, bad = store.add(b"good"), store.add(b"bad")
    file_of(store, bad).chmod(0o644)
    file_of(store, bad).write_bytes(b"BAD")
    assert store.verify(good) and not store.verify(bad) and not store.verify(bytes(32))
    assert store.has(good) and not store.has(bad)


def test_trim_removes_what_was_not_used_for_longest(store: ContentStore) -> None:
    hashes = [store.add(bytes([n]) * BLOCK) for n in range(1, 5)]
    for n, hash in enumerate(hashes):
        os.utime(file_of(store, hash), (OLD + n, OLD + n))
    os.close(store.open(hashes[0]))  # used again
    store.max_bytes = 2 * BLOCK
    assert store.trim() == 2 * BLOCK
    assert [store.has(hash) for hash in hashes] == [True, False, False, True]


def test_an_open_descriptor_survives_trim(store: ContentStore) -> None:
    fd = store.open(store.add(b"x" * BLOCK))
    store.max_bytes = 0
    store.trim()
    assert os.read(fd, 10) == b"x" * 10
    os.close(fd)


def test_a_use_is_noted_at_most_once_a_minute(store: ContentStore) -> None:
    hash = store.add(b"x")
    os.utime(file_of(store, hash), (OLD, OLD))
    os.close(store.open(hash))
    noted = file_of(store, hash).stat().st_mtime_ns
    os.close(store.open(hash))
    assert noted > OLD * 10**9 and file_of(store, hash).stat().st_mtime_ns == noted


def _die_while_writing(directory: bytes) -> None:
    store = ContentStore(directory, 1)
    store.writer(bytes(32), 10).write(b"half")
    os._exit(0)


def test_trim_removes_temporary_files_of_dead_processes_only(
    store: ContentStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = get_context("fork").Process(target=_die_while_writing, args=(store.directory,))
    child.start()
    child.join(10)
    monkeypatch.setattr(local, "STALE_TEMP_S", -1)
    with store.writer(hash_of(b"alive"), 5) as writer:
        assert len(temps(store)) == 2
        store.trim()
        assert len(temps(store)) == 1
        writer.write(b"alive")
        writer.commit()
    assert store.has(hash_of(b"alive"))


def test_the_same_contents_may_be_added_by_many_at_once(store: ContentStore) -> None:
    data = os.urandom(1 << 20)

    def add(_: int) -> bytes:
        with store.writer(hash_of(data), len(data)) as writer:
            writer.write(data)
            writer.commit()
        return contents(store, hash_of(data))

    with ThreadPoolExecutor(4) as pool:
        assert all(found == data for found in pool.map(add, range(16)))


@pytest.mark.parametrize(
    ("number", "remedy"), [(errno.ENOSPC, "free some space"), (errno.EROFS, "-cachedir"), (errno.EACCES, "writable")]
)
def test_a_disk_that_refuses_is_one_line_with_a_remedy(
    store: ContentStore, monkeypatch: pytest.MonkeyPatch, number: int, remedy: str
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(local, "write_sparse", refuse)
    with pytest.raises(StoreError, match=remedy) as caught:
        store.add(b"data")
    assert "\n" not in str(caught.value) and temps(store) == []


def test_a_directory_that_cannot_be_made_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="-cachedir"):
        ContentStore(str(tmp_path / "file" / "store"), 1)


def test_holes_are_not_read_but_hashed(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with open(path, "wb") as file:
        file.truncate(10 << 20)
        file.seek(5 << 20)
        file.write(b"middle")
        file.truncate(12 << 20)
    fd = os.open(path, os.O_RDONLY)
    assert digest(fd) == hash_of(path.read_bytes())
    assert b"".join(bytes(piece) for piece in pieces(fd)) == path.read_bytes()
    os.close(fd)


def test_write_sparse_keeps_every_byte(tmp_path: Path) -> None:
    data = b"".join([bytes(70_000), b"a", bytes(200_000), b"b" * 70_000, bytes(130_000)])
    fd = os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT)
    write_sparse(fd, data, 0)
    os.ftruncate(fd, len(data))
    os.close(fd)
    assert (tmp_path / "f").read_bytes() == data
