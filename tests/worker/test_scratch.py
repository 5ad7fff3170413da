from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from termite.worker import scratch as module
from termite.worker.scratch import Scratch, remove

MNT_DETACH = 2
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a tmpfs needs root")


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Scratch]:
    yield Scratch(os.fsencode(tmp_path))
    ctypes.CDLL(None).umount2(os.fsencode(tmp_path / "memory"), MNT_DETACH)


def test_tasks_get_places_of_their_own_in_memory(scratch: Scratch, tmp_path: Path) -> None:
    (one, on_disk), (other, _) = scratch.place(), scratch.place()
    assert one != other and not on_disk
    assert one.startswith(os.fsencode(tmp_path / "memory"))


def test_a_task_can_be_sent_to_disk(scratch: Scratch, tmp_path: Path) -> None:
    directory, on_disk = scratch.place(on_disk=True)
    assert on_disk and directory.startswith(os.fsencode(tmp_path / "disk"))


def test_when_memory_is_short_tasks_go_to_disk_and_it_is_remembered(
    scratch: Scratch, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not scratch.was_tight(since=0.0001)
    monkeypatch.setattr(module, "LEAST_AVAILABLE", 1 << 60)
    monkeypatch.setattr(module, "LOOK_EVERY_S", 0.0)
    scratch._look_at = 0.0
    scratch.sample()
    assert scratch.place()[1]
    monkeypatch.undo()
    assert scratch.was_tight(since=0.0001)
    assert not scratch.place()[1]


def test_a_task_directory_is_removed_whatever_is_in_it(tmp_path: Path) -> None:
    for name in ("bare", "full"):
        directory = tmp_path / name
        (directory / "u").mkdir(parents=True)
        (directory / "w" / "work" / "incompat" / "volatile").mkdir(parents=True)
        if name == "full":
            (directory / "u" / "d").mkdir()
            (directory / "u" / "d" / "f").write_text("x")
        remove(os.fsencode(directory))
        assert not directory.exists()
    remove(os.fsencode(tmp_path / "nothing"))
