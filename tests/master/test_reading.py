"""Large directories are read in pieces, and what happens meanwhile is in the answer, or found by the next refresh."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from termite import paths
from termite.attr.fileattr import FileAttr
from termite.master import reading
from termite.master.export import Export
from termite.master.reading import answer, readings_end
from termite.wire.messages import DirListing
from tests.master.refreshing import refreshed

NAMES = 20


@pytest.fixture
def large() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="termite-test-", dir="/var/tmp") as name:
        Path(name).chmod(0o755)
        large = Path(name) / "large"
        large.mkdir()
        for number in range(NAMES):
            (large / f"f{number}").write_text(str(number))
        yield large


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "LARGE_NAMES", NAMES // 2)
    monkeypatch.setattr(reading, "HOLD_S", 0)


def rel(path: Path) -> bytes:
    return paths.relative(os.fsencode(path))


class Interrupted(Export):
    """Something happens in the middle of each scan."""

    def __init__(self, directory: Path, happens: Callable[[], object] = lambda: None) -> None:
        super().__init__(rel(directory.parent))
        self.happens = happens
        self.scans = 0

    def scan(self, path: bytes) -> Iterator[tuple[bytes, FileAttr]]:
        self.scans += 1
        for number, item in enumerate(super().scan(path)):
            if number == NAMES // 2:
                self.happens()
            yield item


def answered(export: Export, path: Path) -> DirListing:
    async def ask() -> DirListing:
        found = answer(export, rel(path))
        assert isinstance(found, Awaitable)
        return await found

    return asyncio.run(ask())


def on_disk(export: Export, directory: Path) -> dict[bytes, FileAttr]:
    return {name: export.look(rel(directory) + b"/" + name) for name in os.listdir(os.fsencode(directory))}


def test_small_directories_known_ones_and_those_that_are_not_there_are_answered_at_once(large: Path) -> None:
    export = Export(rel(large.parent))
    assert isinstance(answer(export, rel(large.parent)), DirListing)
    for path in (rel(large / "nothing"), rel(large / "f1"), b"proc", b"../up"):
        found = answer(export, path)
        assert isinstance(found, DirListing) and not found.entries
    export.read_dir(rel(large))
    assert isinstance(answer(export, rel(large)), DirListing)


def test_the_answer_holds_every_name(large: Path) -> None:
    export = Export(rel(large.parent))
    found = answered(export, large)
    assert found.exists and found.entries == on_disk(export, large) and len(found.entries) == NAMES
    assert export.listings_told == 1
    export.check()
    assert refreshed(export) == {}


def test_others_run_while_it_is_read(large: Path) -> None:
    export = Export(rel(large.parent))

    async def ask() -> int:
        found, beats = asyncio.ensure_future(answer(export, rel(large))), 0
        while not found.done():
            await asyncio.sleep(0)
            beats += 1
        return beats

    assert asyncio.run(ask()) >= NAMES


def written(export: Export, large: Path) -> None:
    for name in ("f3", "f12", "new"):
        (large / name).write_text("result")
    export.note([rel(large / name) for name in ("f3", "f12", "new")], {})


def removed(export: Export, large: Path) -> None:
    for name in ("f3", "f12"):
        (large / name).unlink()
    export.note([rel(large / name) for name in ("f3", "f12")], {})


@pytest.mark.parametrize("replayed", [written, removed])
def test_results_that_are_replayed_meanwhile_are_in_the_answer(
    large: Path, replayed: Callable[[Export, Path], None]
) -> None:
    export = Interrupted(large, lambda: replayed(export, large))
    assert answered(export, large).entries == on_disk(export, large)
    export.check()


def test_what_else_happens_meanwhile_is_found_by_the_next_refresh(large: Path) -> None:
    def happens() -> None:
        for name in ("f3", "f12", "new"):
            (large / name).write_text("changed")
        (large / "f4").unlink()

    export = Interrupted(large, happens)
    answered(export, large)
    refreshed(export)
    assert export.listed[rel(large)] == on_disk(export, large)


def test_a_directory_that_is_replaced_meanwhile_is_answered_as_the_new_one(large: Path) -> None:
    def happens() -> None:
        if large.with_name("old").exists():
            return
        large.rename(large.with_name("old"))
        large.mkdir()
        (large / "other").touch()

    export = Interrupted(large, happens)
    assert answered(export, large).entries.keys() == {b"other"}


def test_a_directory_that_is_removed_meanwhile_does_not_exist(large: Path) -> None:
    export = Interrupted(large, lambda: large.rename(large.with_name("old")))
    assert not answered(export, large).exists
    assert not export.listed and not export.marks


def test_a_directory_that_was_told_by_other_ways_meanwhile_is_answered_as_it_was_told(large: Path) -> None:
    def happens() -> None:
        if export.scans == 1:
            told.append(export.read_dir(rel(large)).entries)

    told: list[dict[bytes, FileAttr]] = []
    export = Interrupted(large, happens)
    assert answered(export, large).entries is told[0]


def test_who_asks_meanwhile_waits_for_the_same_reading_even_if_the_first_gives_up(large: Path) -> None:
    export = Interrupted(large)

    async def ask() -> None:
        first, second = (asyncio.ensure_future(answer(export, rel(large))) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        assert len((await second).entries) == NAMES
        assert first.cancelled() and not export.readings

    asyncio.run(ask())
    assert export.scans == 1


def test_a_refresh_can_wait_until_nothing_is_being_read(large: Path) -> None:
    export = Interrupted(large)

    async def ask() -> None:
        await readings_end(export)
        asked = asyncio.ensure_future(answer(export, rel(large)))
        await asyncio.sleep(0)
        await readings_end(export)
        assert rel(large) in export.listed
        await asked

    asyncio.run(ask())
