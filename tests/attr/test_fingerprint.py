"""Whatever lstat could show of a directory and of what is in it shows in its fingerprint."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from termite import paths
from termite.attr import fingerprint
from termite.attr.fingerprint import Fingerprint, fingerprints


def taken(directory: Path) -> Fingerprint | None:
    relative = paths.relative(os.fsencode(directory))
    return fingerprints([relative]).get(relative)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    directory = tmp_path / "d"
    (directory / "sub").mkdir(parents=True)
    for name in ("f", "g"):
        (directory / name).write_text(name)
    (directory / "l").symlink_to("f")
    return directory


def test_a_directory_that_nobody_touches_keeps_its_fingerprint(directory: Path) -> None:
    first = taken(directory)
    (directory / "f").read_text()
    assert first is not None and taken(directory) == first


CHANGES: dict[str, Callable[[Path], object]] = {
    "contents": lambda d: (d / "f").write_text("F"),
    "mode": lambda d: (d / "f").chmod(0o600),
    "time": lambda d: os.utime(d / "f", ns=(1, 1)),
    "another file": lambda d: (d / "new").touch(),
    "no file": lambda d: (d / "g").unlink(),
    "other names": lambda d: (d / "f").rename(d / "h"),
    "each other's names": lambda d: [(d / "f").rename(d / "x"), (d / "g").rename(d / "f"), (d / "x").rename(d / "g")],
    "a link": lambda d: [(d / "l").unlink(), (d / "l").symlink_to("g")],
    "one more link": lambda d: os.link(d / "f", d.parent / "elsewhere"),
    "its own mode": lambda d: d.chmod(0o700),
    "a file below": lambda d: (d / "sub" / "f").touch(),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_shows(directory: Path, what: str) -> None:
    first = taken(directory)
    CHANGES[what](directory)
    assert taken(directory) != first


def test_a_copy_in_its_place_shows(directory: Path) -> None:
    first = taken(directory)
    directory.rename(directory.with_name("old"))
    directory.mkdir()
    assert taken(directory) != first


def test_what_cannot_be_read_has_none(directory: Path) -> None:
    assert taken(directory / "nothing") is taken(directory / "f") is taken(directory / "l") is None
    assert fingerprints([]) == {}


def test_one_that_has_just_changed_is_not_settled(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "SETTLED_NS", 10**12)
    found = taken(directory)
    assert found is not None and not found.is_settled
    monkeypatch.setattr(fingerprint, "SETTLED_NS", -1_000_000_000)
    found = taken(directory)
    assert found is not None and found.is_settled
