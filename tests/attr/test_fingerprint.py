"""Whatever lstat could show of a directory and of what is in it is pointed out, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from termite import paths
from termite.attr import fingerprint
from termite.attr.fingerprint import Look, Looked
from tests.clock import tick


def rel(path: Path) -> bytes:
    return paths.relative(os.fsencode(path))


class Looker:
    """Looks at a directory again and again."""

    def __init__(self, directory: Path) -> None:
        self.path = rel(directory)
        self.marks: dict[bytes, bytes] = {}
        self.look()

    def look(self) -> Looked | None:
        """What is new since the last time; None: nothing."""
        found = list(Look([self.path], self.marks))
        assert len(found) <= 1
        for looked in found:
            if looked.marks is not None:
                self.marks[self.path] = looked.marks
            return looked
        return None


@pytest.fixture
def always_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "SETTLED_NS", -1_000_000_000)


@pytest.fixture
def directory(tmp_path: Path, always_settled: None) -> Path:
    directory = tmp_path / "d"
    (directory / "sub").mkdir(parents=True)
    for name in ("f", "g"):
        (directory / name).write_text(name)
    (directory / "l").symlink_to("f")
    tick(directory)
    return directory


def test_nothing_is_pointed_out_in_a_directory_that_nobody_touches(directory: Path) -> None:
    looker = Looker(directory)
    (directory / "f").read_text()
    assert looker.look() is None


SAME = frozenset({b"", b"f", b"g", b"l", b"sub"})
CHANGES: dict[str, tuple[Callable[[Path], object], set[bytes], frozenset[bytes] | None]] = {
    "contents": (lambda d: (d / "f").write_text("F"), {b"f"}, None),
    "mode": (lambda d: (d / "f").chmod(0o600), {b"f"}, None),
    "time": (lambda d: os.utime(d / "f", ns=(1, 1)), {b"f"}, None),
    "another file": (lambda d: (d / "new").touch(), {b"", b"new"}, SAME | {b"new"}),
    "no file": (lambda d: (d / "g").unlink(), {b""}, SAME - {b"g"}),
    "another name": (lambda d: (d / "f").rename(d / "h"), {b"", b"h"}, SAME - {b"f"} | {b"h"}),
    "each other's names": (
        lambda d: [(d / "f").rename(d / "x"), (d / "g").rename(d / "f"), (d / "x").rename(d / "g")],
        {b"", b"f", b"g"},
        SAME,
    ),
    "a link": (lambda d: [(d / "l").unlink(), (d / "l").symlink_to("g")], {b"", b"l"}, SAME),
    "one more link": (lambda d: os.link(d / "f", d.parent / "elsewhere"), {b"f"}, None),
    "its own mode": (lambda d: d.chmod(0o700), {b""}, SAME),
    "a file below": (lambda d: (d / "sub" / "f").touch(), {b"sub"}, None),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_is_pointed_out_once_and_what_is_as_before_is_not(directory: Path, what: str) -> None:
    change, moved, names = CHANGES[what]
    looker = Looker(directory)
    change(directory)
    found = looker.look()
    assert found is not None and set(found.moved) == moved
    assert found.names == names
    assert looker.look() is None


def test_all_is_pointed_out_in_a_copy_that_took_its_place(directory: Path) -> None:
    looker = Looker(directory)
    directory.rename(directory.with_name("old"))
    directory.mkdir()
    (directory / "f").write_text("f")
    found = looker.look()
    assert found is not None and (set(found.moved), found.names) == ({b"", b"f"}, {b"", b"f"})


def test_all_is_pointed_out_at_first(directory: Path) -> None:
    (found,) = Look([rel(directory)], {})
    assert (set(found.moved), found.names) == (SAME, SAME)


def test_what_cannot_be_read_has_no_marks(directory: Path) -> None:
    wrong = [rel(directory / name) for name in ("nothing", "f", "l")]
    assert [looked.marks for looked in Look(wrong, {})] == [None] * 3
    assert list(Look([], {})) == []


def test_directories_are_told_apart_by_their_place_in_the_question(directory: Path) -> None:
    (directory / "sub" / "below").touch()
    asked = [rel(directory), rel(directory / "nothing"), rel(directory / "sub")]
    first = list(Look(asked, {}))
    assert [looked.path for looked in first] == asked
    marks = {looked.path: looked.marks for looked in first if looked.marks is not None}
    (directory / "sub" / "below").write_text("x")
    found = {looked.path: looked for looked in Look(asked, marks)}
    assert found.keys() == {asked[1], asked[2]}
    assert found[asked[2]].moved == [b"below"]


def test_names_of_any_bytes_and_directories_of_any_size_are_told_in_full(directory: Path) -> None:
    names = {os.fsencode(f"n{i}") for i in range(100)} | {b"new\nline", b"\xff\xfe", b"x" * 255}
    for name in names:
        os.close(os.open(os.fsencode(directory / "sub") + b"/" + name, os.O_CREAT, 0o644))
    (found,) = Look([rel(directory / "sub")], {})
    assert found.names == set(found.moved) == names | {b""}


def test_a_name_that_has_just_changed_is_pointed_out_again(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looker = Looker(directory)
    monkeypatch.setattr(fingerprint, "SETTLED_NS", 10**12)
    (directory / "f").write_text("F")
    assert [set(looked.moved) for looked in (looker.look(), looker.look()) if looked] == [SAME, SAME]
    monkeypatch.setattr(fingerprint, "SETTLED_NS", -1_000_000_000)
    assert looker.look() is not None
    assert looker.look() is None


@pytest.fixture
def without_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(fingerprint.sysconfig, "get_path", lambda name: "/nowhere")
    fingerprint._library.cache_clear()
    yield
    fingerprint._library.cache_clear()


def test_without_the_library_all_is_pointed_out_every_time(directory: Path, without_library: None) -> None:
    looker = Looker(directory)
    found = looker.look()
    assert found is not None and (set(found.moved), found.names) == (SAME, SAME)
    assert [looked.marks for looked in Look([rel(directory / "nothing")], {})] == [None]
