from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from termite import paths
from termite.attr.fileattr import FileAttr
from termite.master.export import Export
from termite.master.suspicion import Suspicion
from termite.wire.messages import Change
from tests.master.refreshing import refresh_steps


@pytest.fixture
def root() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="termite-test-", dir="/var/tmp") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def export(root: Path) -> Export:
    for name in ("f", "g"):
        (root / name).write_text(name)
    (root / "d").mkdir()
    export = Export(rel(root))
    for directory in (root.parent, root, root / "d"):
        export.read_dir(rel(directory))
    return export


def rel(path: Path) -> bytes:
    return paths.relative(os.fsencode(path))


def later() -> int:
    """A moment that lies after all that was done so far, whatever the file system's clock."""
    return time.time_ns() + 10**9


def test_what_is_true_is_no_breach(export: Export, root: Path) -> None:
    suspicion = Suspicion(export)
    (root / "f").write_text("other")
    (root / "g").unlink()
    (root / "d").rmdir()
    for changes in refresh_steps(export):
        suspicion.changed(changes)
    suspicion.refreshed(later())
    assert suspicion.compared > 0
    assert not suspicion.breaches


def test_an_attribute_that_is_not_the_disks_names_path_and_both_values(export: Export, root: Path) -> None:
    suspicion = Suspicion(export)
    entries = export.listed[rel(root)]
    entries[b"f"] = msgspec.structs.replace(entries[b"f"], size=77)
    suspicion.refreshed(later())
    (breach,) = suspicion.breaches
    assert str(root / "f") in breach and "size=77" in breach and "size=1" in breach


def test_contents_that_are_not_the_disks_name_path_and_both_hashes(export: Export, root: Path) -> None:
    wrong = hashlib.sha256(b"wrong").digest()
    export.remember_hash(rel(root / "f"), (root / "f").stat(), wrong)
    suspicion = Suspicion(export)
    suspicion.refreshed(later())
    (breach,) = suspicion.breaches
    assert str(root / "f") in breach
    assert wrong.hex() in breach and hashlib.sha256(b"f").hexdigest() in breach


def test_a_file_that_is_gone_is_a_breach_only_if_its_directory_kept_still(export: Export, root: Path) -> None:
    suspicion = Suspicion(export)
    (root / "f").unlink()
    suspicion.refreshed(0)
    assert not suspicion.breaches
    suspicion.refreshed(later())
    assert any(str(root / "f") in breach for breach in suspicion.breaches)


def test_a_file_that_changes_while_we_look_is_no_breach(export: Export, root: Path) -> None:
    began = time.time_ns()
    (root / "f").write_text("something else")
    suspicion = Suspicion(export)
    suspicion.refreshed(began)
    assert not suspicion.breaches


def test_mirrors_must_be_told_what_is_remembered(export: Export, root: Path) -> None:
    suspicion = Suspicion(export)
    told = FileAttr(mode=0o100644, size=5)
    suspicion.changed([Change(rel(root / "f"), told)])
    (breach,) = suspicion.breaches
    assert str(root / "f") in breach and "size=5" in breach and "size=1" in breach


def test_invariants_of_others_are_checked_as_well(export: Export) -> None:
    def broken() -> None:
        raise AssertionError("pool: 3 tasks run, -1 slots are left")

    suspicion = Suspicion(export, [broken])
    suspicion.changed([])
    assert suspicion.found == 1 and "-1 slots" in suspicion.breaches[0]


def test_a_directory_that_becomes_private_stays_visible_as_such(export: Export, root: Path) -> None:
    (root / "d" / "inner").touch()
    suspicion = Suspicion(export)
    (root / "d").chmod(0o700)
    changes = []
    for step in refresh_steps(export):
        suspicion.changed(step)
        changes += step
    assert [c.attr.mode & 0o7777 for c in changes if c.path == rel(root / "d")][-1] == 0
    assert [c.attr.is_dir() for c in changes if c.path == rel(root / "d")][-1]
    assert not suspicion.breaches
