"""The native programs, compiled once, and masters that answer as a test wants."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.mkbox.native import Answer, FakeMaster, build


@pytest.fixture(scope="session")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory with termite-shell-wrapper, termite-make, termite-run and the interposer."""
    return build(tmp_path_factory.mktemp("native"))


@pytest.fixture(autouse=True)
def outside_any_build(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("TERMITE_", "MAKE", "LD_PRELOAD", "MFLAGS"))]:
        monkeypatch.delenv(name)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    path = tmp_path / "project"
    path.mkdir()
    return path


@pytest.fixture
def master(project: Path) -> Iterator[Callable[..., FakeMaster]]:
    """master(answer) starts one in the project, or in the directory named as well."""
    started: list[FakeMaster] = []

    def start(answer: Answer, directory: Path | str | None = None) -> FakeMaster:
        started.append(FakeMaster(directory or project, answer))
        return started[-1]

    yield start
    for one in started:
        one.close()
