"""Contents in memory in front of the store on disk."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from termite.store.local import ContentStore
from termite.store.recent import MOST_SMALL_BYTES, SMALL_BYTES, RecentStore

SHM = Path("/dev/shm")
pytestmark = pytest.mark.skipif(not SHM.is_dir(), reason="no file system in memory")


class Scene:
    """A store whose memory is really one, and a place for what tasks make."""

    def __init__(self, disk: Path, memory: Path) -> None:
        self.memory = memory
        self.disk = ContentStore(str(disk), 1 << 30)
        self.store = RecentStore(str(disk), 1 << 30)
        self.store.use_memory(os.fsencode(memory / "results"))

    def make(self, data: bytes) -> bytes:
        """The hash of contents that a task has left."""
        source = self.memory / "out"
        source.write_bytes(data)
        hash = hashlib.sha256(data).digest()
        self.store.adopt(os.fsencode(source), hash, len(data))
        assert not source.exists()
        return hash

    def read(self, hash: bytes, size: int = -1) -> bytes:
        fd = self.store.open(hash, size)
        try:
            return os.read(fd, 1 << 20)
        finally:
            os.close(fd)


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    memory = SHM / f"termite-test-{os.getpid()}-{tmp_path.name}"
    memory.mkdir()
    yield Scene(tmp_path / "store", memory)
    for path in [*(memory / "results").iterdir(), memory / "results", memory]:
        path.rmdir() if path.is_dir() else path.unlink()


def test_what_was_made_is_read_from_memory(scene: Scene) -> None:
    hash = scene.make(b"made")
    assert scene.read(hash) == scene.read(hash, 4) == b"made"
    assert scene.store.has(hash) and not scene.disk.has(hash)
    with pytest.raises(KeyError):
        scene.store.open(hash, 5)


def test_what_is_on_disk_is_found_as_well(scene: Scene) -> None:
    assert scene.read(scene.disk.add(b"there")) == b"there"
    with pytest.raises(KeyError):
        scene.store.open(bytes(32))


def test_large_contents_go_to_disk_at_once(scene: Scene) -> None:
    scene.store._most_bytes = 100
    assert scene.disk.has(scene.make(b"x" * 50))


def test_the_oldest_go_to_disk_when_there_is_too_much(scene: Scene) -> None:
    scene.store._most_bytes = 100
    hashes = [scene.make(b"%010d" % number) for number in range(11)]
    assert scene.store.is_full
    scene.store.spill()
    assert not scene.store.is_full
    assert [scene.disk.has(hash) for hash in hashes] == [True] * 6 + [False] * 5
    assert [scene.read(hash) for hash in hashes] == [b"%010d" % number for number in range(11)]


def test_the_same_contents_count_once(scene: Scene) -> None:
    scene.store._most_bytes = 100
    for _ in range(20):
        scene.make(b"0123456789")
    assert not scene.store.is_full


def test_in_the_end_everything_is_on_disk(scene: Scene) -> None:
    hashes = [scene.make(b"%d" % number) for number in range(3)]
    scene.store.close()
    assert all(scene.disk.has(hash) for hash in hashes)
    assert not list((scene.memory / "results").iterdir())


def test_the_end_is_bounded(scene: Scene) -> None:
    hash = scene.make(b"left behind")
    scene.store.close(limit_s=-1)
    assert not scene.disk.has(hash)


def test_small_contents_that_come_are_no_files_until_there_is_time(scene: Scene) -> None:
    hash = scene.store.add(b"came")
    assert scene.store.has(hash) and scene.store.get(hash) == b"came" and not scene.disk.has(hash)
    assert scene.read(hash) == scene.read(hash, 4) == b"came"
    assert scene.store.holds == 4 and not list((scene.memory / "results").iterdir())
    scene.store.spill(0)
    assert scene.disk.has(hash) and scene.store.get(hash) is None and scene.store.holds == 0
    assert scene.read(hash) == b"came"


def test_of_small_contents_only_so_many_are_kept_in_memory(scene: Scene) -> None:
    first, *others = [scene.store.add(bytes([number]) * SMALL_BYTES) for number in range(200)]
    assert scene.store.get(first) is not None and scene.store.get(others[-1]) is None
    assert all(scene.store.has(hash) for hash in others)
    assert scene.store._small_bytes <= MOST_SMALL_BYTES


def test_without_memory_it_is_an_ordinary_store(tmp_path: Path) -> None:
    store = RecentStore(str(tmp_path / "store"), 1 << 30)
    source = tmp_path / "out"
    source.write_bytes(b"made")
    store.adopt(os.fsencode(source), hashlib.sha256(b"made").digest(), 4)
    assert ContentStore(str(tmp_path / "store"), 1 << 30).has(hashlib.sha256(b"made").digest())
