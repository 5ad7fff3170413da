"""What refreshes find, whatever happens between the thread's look and the loop's comparison."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from termite import paths
from termite.attr import fingerprint
from termite.attr.fileattr import FileAttr
from termite.master import refresh
from termite.master.export import Export, read_and_hash
from termite.master.refresh import Refresh
from termite.wire.messages import Change
from tests.clock import tick
from tests.master.refreshing import refresh_steps, refreshed


def rel(path: Path) -> bytes:
    return paths.relative(os.fsencode(path))


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever has changed would look different if it changed again; tests see to it with `tick`."""
    monkeypatch.setattr(fingerprint, "SETTLED_NS", -1_000_000_000)


@pytest.fixture
def root() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="termite-test-", dir="/var/tmp") as name:
        root = Path(name) / "p"
        for directory in (root / "a", root / "b"):
            directory.mkdir(parents=True)
            for file in ("f", "g", "h"):
                (directory / file).write_text(file)
        Path(name).chmod(0o755)
        yield root


class Watched(Export):
    """Remembers which names were looked at one by one."""

    def __init__(self, root: Path) -> None:
        super().__init__(rel(root))
        self.root = root
        self.seen: list[str] = []
        for directory in (root, root / "a", root / "b"):
            self.read_dir(rel(directory))
        tick(root)

    def attr_now(self, path: bytes, *, check_excluded: bool) -> FileAttr:
        self.seen.append(os.fsdecode(os.path.relpath(paths.absolute(path), os.fsencode(self.root))))
        return super().attr_now(path, check_excluded=check_excluded)

    def seen_in(self, action: Callable[[], object]) -> set[str]:
        self.seen.clear()
        action()
        return set(self.seen)

    def told_of(self, path: Path) -> FileAttr | None:
        return self.listed[rel(path.parent)].get(os.fsencode(path.name))


@pytest.fixture
def export(root: Path) -> Iterator[Watched]:
    export = Watched(root)
    yield export
    tick(root)
    refreshed(export)
    assert_true(export)


def replay(export: Export, path: Path, text: str) -> list[Change]:
    """As a result comes in: a new file takes the place of the old one and is told."""
    tick(path.parent)
    new = path.with_name("new")
    new.write_text(text)
    new.rename(path)
    return export.note([rel(path)], {rel(path): hashlib.sha256(text.encode()).digest()})


# -- what is looked at -----------------------------------------------------------------------------------------------


def test_nothing_is_looked_at_where_nothing_changed_not_even_at_first(export: Watched) -> None:
    assert export.seen_in(lambda: refreshed(export)) == set()


def test_only_names_that_moved_are_looked_at(export: Watched, root: Path) -> None:
    (root / "a" / "f").write_text("changed")
    assert export.seen_in(lambda: refreshed(export)) == {"a/f"}
    (root / "b" / "new").touch()
    (root / "b" / "g").unlink()
    assert export.seen_in(lambda: refreshed(export)) == {"a/f", "b", "b/new", "b/g"}  # a/f: told since the marks


def test_what_was_told_meanwhile_is_looked_at_once_more(export: Watched, root: Path) -> None:
    replay(export, root / "a" / "f", "result")
    assert export.seen_in(lambda: refreshed(export)) == {"a", "a/f"}
    assert export.seen_in(lambda: refreshed(export)) == set()


def test_reading_a_file_is_no_reason_to_look_at_it(export: Watched, root: Path) -> None:
    file = root / "a" / "f"
    fd, st = export.open_for_reading(rel(file))
    os.close(fd)
    export.remember_hash(rel(file), st, hashlib.sha256(b"f").digest())
    assert export.seen_in(lambda: refreshed(export)) == set()


def test_what_may_still_change_unseen_is_looked_at_again(
    export: Watched, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "SETTLED_NS", 10**12)
    (root / "a" / "f").write_text("changed")
    everything = {"a", "b", *(f"{d}/{f}" for d in "ab" for f in "fgh")}
    assert [export.seen_in(lambda: refreshed(export)) for _ in range(3)] == [everything] * 3


def test_no_step_looks_at_many_names(export: Watched, root: Path) -> None:
    for number in range(500):
        (root / "a" / f"n{number}").touch()
    found, most = 0, 0
    export.seen.clear()
    for changes in refresh_steps(export):
        found += sum(b"/n" in change.path for change in changes)
        most = max(most, len(export.seen))
        export.seen.clear()
    assert found == 500 and most <= 16


# -- races -----------------------------------------------------------------------------------------------------------


def test_a_result_replayed_after_the_look_is_not_undone(export: Watched, root: Path) -> None:
    (root / "a" / "f").write_text("behind the master's back")
    steps = refresh_steps(export)
    replay(export, root / "a" / "f", "result")
    assert rel(root / "a" / "f") not in {change.path for step in steps for change in step}
    told = export.told_of(root / "a" / "f")
    assert told is not None and told.hash == hashlib.sha256(b"result").digest()


def test_a_file_that_a_replay_made_after_the_look_stays_told(export: Watched, root: Path) -> None:
    (root / "a" / "other").touch()
    steps = refresh_steps(export)
    replay(export, root / "a" / "result", "result")
    assert rel(root / "a" / "result") not in {change.path for step in steps for change in step}
    assert export.told_of(root / "a" / "result") is not None


def test_a_file_that_a_replay_removed_after_the_look_stays_gone(export: Watched, root: Path) -> None:
    (root / "a" / "f").write_text("changed")
    steps = refresh_steps(export)
    (root / "a" / "f").unlink()
    assert len(export.note([rel(root / "a" / "f")], {})) == 2
    assert rel(root / "a" / "f") not in {change.path for step in steps for change in step}


def test_what_was_told_since_the_marks_is_looked_at_whatever_the_marks_say(export: Watched, root: Path) -> None:
    """As if a file was away when a result was told and came back later, all times as before."""
    for directory in (root / "a", root / "b"):
        export.tell(rel(directory), b"f", FileAttr(mode=0o100644, size=77))
    (root / "b" / "g").write_text("changed")
    assert refreshed(export).keys() == {rel(root / "a" / "f"), rel(root / "b" / "f"), rel(root / "b" / "g")}


def test_a_directory_told_anew_after_the_look_is_left_alone(export: Watched, root: Path) -> None:
    (root / "a" / "f").write_text("changed")
    steps = refresh_steps(export)
    export.forget_below(rel(root / "a"))
    assert export.read_dir(rel(root / "a")).entries[b"f"].size == 7
    marks = export.marks[rel(root / "a")]
    assert export.seen_in(lambda: list(steps)) == set()
    assert export.marks[rel(root / "a")] is marks


def test_a_directory_removed_after_the_look_is_told_as_gone(export: Watched, root: Path) -> None:
    (root / "a" / "f").write_text("changed")
    steps = refresh_steps(export)
    for file in "fgh":
        (root / "a" / file).unlink()
    (root / "a").rmdir()
    found = {change.path: change.attr for step in steps for change in step}
    assert not found[rel(root / "a" / "f")].exists()
    assert not refreshed(export)[rel(root / "a")].attr.exists()


def test_a_directory_made_again_after_the_look_is_told_as_another_one(export: Watched, root: Path) -> None:
    for file in "fgh":
        (root / "a" / file).unlink()
    (root / "a").rmdir()
    steps = refresh_steps(export)
    tick(root)
    (root / "a").mkdir()
    (root / "a" / "new").touch()
    mine = [change for step in steps for change in step if change.path == rel(root / "a")]
    assert [change.attr.exists() for change in mine] == [False, True]
    assert rel(root / "a") not in export.listed


def test_a_directory_dropped_between_two_steps_is_not_compared_further(export: Watched, root: Path) -> None:
    for number in range(100):
        (root / "a" / f"n{number}").touch()
    steps = refresh_steps(export)
    next(steps)
    export.forget_below(rel(root / "a"))
    assert not [change for step in steps for change in step if b"/a/n" in change.path]
    assert rel(root / "a") not in export.listed


def test_a_refresh_that_was_given_up_is_made_up_for(export: Watched, root: Path) -> None:
    for number in range(100):
        (root / "a" / f"n{number}").touch()
    export.tell(rel(root / "b"), b"f", FileAttr(mode=0o100644, size=77))
    steps = refresh_steps(export)
    told = {change.path for change in next(steps)}
    steps.close()
    assert 0 < len(told) < 100
    assert len(told | refreshed(export).keys()) == 100 + len([root / "a", root / "b" / "f"])


def test_what_changes_while_a_directory_is_being_read_is_found(root: Path) -> None:
    class Slow(Export):
        def scan(self, path: bytes) -> Iterator[tuple[bytes, FileAttr]]:
            yield from super().scan(path)
            (root / "a" / "f").write_text("changed")

    export = Slow(rel(root))
    export.read_dir(rel(root / "a"))
    assert refreshed(export).keys() == {rel(root / "a" / "f")}


# -- directories -----------------------------------------------------------------------------------------------------


def test_a_tree_that_was_removed_is_forgotten_from_below(export: Watched, root: Path) -> None:
    (root / "a" / "d" / "e").mkdir(parents=True)
    for directory in (root / "a" / "d", root / "a" / "d" / "e"):
        export.read_dir(rel(directory))
    refreshed(export)
    (root / "a" / "d" / "e").rmdir()
    (root / "a" / "d").rmdir()
    gone = [change.path for step in refresh_steps(export) for change in step if not change.attr.exists()]
    assert list(dict.fromkeys(gone)) == [rel(root / "a" / "d" / "e"), rel(root / "a" / "d")]


def test_a_directory_that_becomes_private_is_forgotten_and_told_without_permissions(
    export: Watched, root: Path
) -> None:
    (root / "a").chmod(0o700)
    assert refreshed(export)[rel(root / "a")].attr.mode & 0o7777 == 0
    assert rel(root / "a") not in export.listed


def test_excluded_names_are_told_with_their_type_only(root: Path) -> None:
    export = Export(rel(root), [rel(root / "a" / "x")])
    export.read_dir(rel(root / "a"))
    tick(root)
    (root / "a" / "x").write_text("secret")
    assert refreshed(export)[rel(root / "a" / "x")].attr == FileAttr(mode=0o100000)


# -- files that may have changed without looking different -----------------------------------------------------------


@pytest.mark.parametrize("large", [False, True])
def test_contents_that_changed_right_after_they_were_hashed_are_told(
    export: Watched, root: Path, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    if large:
        monkeypatch.setattr(refresh, "SMALL_HASH_BYTES", 1)
    file = root / "a" / "file"
    file.write_text("before")
    fd, st = export.open_for_reading(rel(file))
    _, digest = read_and_hash(fd, st)
    os.close(fd)
    export.note([rel(file)], {rel(file): hashlib.sha256(b"what it held a moment earlier").digest()})
    told: list[Change] = []
    asyncio.run(Refresh(export).run(told.extend))
    assert [change.attr.hash for change in told if change.path == rel(file)] == [digest]
    assert not export.hashes.is_racy(rel(file)) or not large


# -- everything at once ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_after_any_sequence_of_events_all_that_was_told_is_what_the_disk_holds(
    root: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refresh, "_STEP_NAMES", 1)
    export = Export(rel(root))
    events = Events(root, export, random.Random(seed))
    for _ in range(30):
        events.some()
        for _ in refresh_steps(export):
            events.some()
        tick(root)
        refreshed(export)
        assert_true(export)


def assert_true(export: Export) -> None:
    """What was told is what the disk holds."""
    export.check()
    for directory, entries in export.listed.items():
        names = set(os.listdir(paths.absolute(directory)))
        assert entries == {name: export.look(paths.join(directory, name)) for name in names}


class Events:
    """Things that happen to a tree, whether the master sees them or not.  No two files have the same size."""

    def __init__(self, root: Path, export: Export, rng: random.Random) -> None:
        self.root, self.export, self.rng = root, export, rng
        self.size = 10
        for path in (root, root / "a", root / "b", root / "a" / "a", root / "a" / "b"):
            path.mkdir(exist_ok=True)
            export.read_dir(rel(path))

    def some(self) -> None:
        for _ in range(self.rng.randrange(5)):
            path = self.root.joinpath(*self.rng.choices("abcd", k=self.rng.choice([1, 2, 2, 3])))
            likely = [self.write] * 4 + [self.swap] * 3 + [self.mkdir] * 2
            happens = self.rng.choice([*likely, self.remove, self.link, self.list])
            try:
                changed = happens(path)
            except OSError:
                continue
            if self.rng.random() < 0.3:
                self.export.note([rel(p) for p in changed], {})

    def write(self, path: Path) -> list[Path]:
        self.size += 1
        path.write_bytes(bytes(self.size))
        return [path]

    def remove(self, path: Path) -> list[Path]:
        below = sorted(path.rglob("*"), reverse=True) if path.is_dir() and not path.is_symlink() else []
        for each in [*below, path]:
            each.rmdir() if each.is_dir() and not each.is_symlink() else each.unlink()
        return [*below, path]

    def mkdir(self, path: Path) -> list[Path]:
        path.mkdir()
        return [path]

    def swap(self, path: Path) -> list[Path]:
        other = path.with_name(self.rng.choice("abcd"))
        path.rename(path.with_name("x"))
        moved = [path]
        if other.exists():
            other.rename(path)
            moved.append(other)
        path.with_name("x").rename(other)
        return [*moved, other]

    def link(self, path: Path) -> list[Path]:
        path.symlink_to("x" * self.rng.randrange(1, 100))
        return [path]

    def list(self, path: Path) -> list[Path]:
        for above in reversed(path.relative_to(self.root).parents):
            self.export.read_dir(rel(self.root / above))
        self.export.read_dir(rel(path))
        return []
