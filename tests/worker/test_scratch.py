from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from termite.worker import scratch as module
from termite.worker.scratch import Scratch, Sweeper

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


@pytest.fixture
def sweeper() -> Iterator[Sweeper]:
    program = Path(sys.executable).with_name("termite-mkbox")
    sweeper = Sweeper(os.fsencode(program))
    yield sweeper
    sweeper.close()


def test_a_task_directory_is_removed_whatever_is_in_it(sweeper: Sweeper, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("x")
    for name in ("bare", "full", "deep"):
        directory = tmp_path / name
        (directory / "u").mkdir(parents=True)
        (directory / "w" / "work" / "incompat" / "volatile").mkdir(parents=True)
        if name == "full":
            (directory / "u" / "d").mkdir()
            (directory / "u" / "d" / "f").write_text("x")
            (directory / "u" / "link").symlink_to(outside)
            (directory / "u" / "d").chmod(0)
        if name == "deep":
            (directory / "u" / "/".join("d" * 300)).mkdir(parents=True)
        sweeper.remove(os.fsencode(directory))
    sweeper.remove(os.fsencode(tmp_path / "nothing"))
    sweeper.close()
    assert [entry.name for entry in tmp_path.iterdir()] == ["outside"] and (outside / "kept").exists()


def test_more_than_the_sweepers_socket_holds_is_removed_too(sweeper: Sweeper, tmp_path: Path) -> None:
    for number in range(2000):
        (tmp_path / str(number)).mkdir()
        sweeper.remove(os.fsencode(tmp_path / str(number)))
    sweeper.close()
    assert not list(tmp_path.iterdir())
