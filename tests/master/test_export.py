from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from termite import paths
from termite.errors import PathError, PrivateError
from termite.master.export import Export, read_and_hash
from termite.master.hashes import hash_file
from termite.master.names import Names
from tests.master.refreshing import refreshed


@pytest.fixture
def root() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="termite-test-", dir="/var/tmp") as name:
        Path(name).chmod(0o755)
        (Path(name) / "p").mkdir()
        yield Path(name) / "p"


@pytest.fixture
def export(root: Path) -> Export:
    return Export(rel(root))


def rel(path: Path) -> bytes:
    return paths.relative(os.fsencode(path))


def ask(export: Export, path: Path) -> bytes:
    """Reads a file as a mirror would, so that its hash is known."""
    fd, st = export.open_for_reading(rel(path))
    try:
        data, digest = read_and_hash(fd, st)
    finally:
        os.close(fd)
    export.remember_hash(rel(path), st, digest)
    return data


def test_a_listing_holds_every_name_with_its_attributes(export: Export, root: Path) -> None:
    (root / "f").write_text("four")
    (root / "d").mkdir()
    (root / "l").symlink_to("f")
    os.mkfifo(root / "pipe")
    listing = export.read_dir(rel(root))
    assert listing.exists
    assert set(listing.entries) == {b"f", b"d", b"l", b"pipe"}
    assert listing.entries[b"f"].size == 4
    assert listing.entries[b"l"].target == b"f"
    assert listing.entries[b"d"].is_dir()


def test_the_listing_of_nothing_does_not_exist(export: Export, root: Path) -> None:
    assert not export.read_dir(rel(root / "nothing")).exists
    (root / "f").touch()
    assert not export.read_dir(rel(root / "f")).exists


def test_private_names_are_told_without_permissions_and_never_opened(export: Export, root: Path) -> None:
    (root / "secret").write_text("x")
    (root / "secret").chmod(0o600)
    (root / "closed").mkdir(mode=0o700)
    (root / "closed" / "inner").write_text("x")
    entries = export.read_dir(rel(root)).entries
    assert entries[b"secret"].mode == stat.S_IFREG and entries[b"secret"].size == 0
    assert entries[b"closed"].mode == stat.S_IFDIR
    assert export.read_dir(rel(root / "closed")).entries == {}
    for name in ("secret", "closed/inner"):
        with pytest.raises(PrivateError):
            export.open_for_reading(rel(root / name))


def test_symlinks_are_not_followed_when_opening(export: Export, root: Path) -> None:
    (root / "l").symlink_to("/etc/passwd")
    with pytest.raises(OSError):
        export.open_for_reading(rel(root / "l"))
    (root / "d").symlink_to("/etc")
    with pytest.raises(PathError):
        export.open_for_reading(rel(root / "d" / "passwd"))


def test_paths_that_climb_are_refused(export: Export) -> None:
    for path in (b"a/../b", b"/etc/passwd", b"a//b", b"."):
        with pytest.raises(PathError):
            export.open_for_reading(path)
        assert not export.read_dir(path).exists


def test_excluded_trees_show_only_the_branch_to_the_writable_root(export: Export, root: Path) -> None:
    listing = export.read_dir(b"var/tmp")
    assert {name for name, attr in listing.entries.items() if attr.mode & 0o777} == {os.fsencode(root.parent.name)}
    assert export.read_dir(b"proc").entries == {}
    assert export.read_dir(b"").entries[b"proc"].mode == stat.S_IFDIR


def test_a_second_question_is_answered_from_memory_until_a_refresh(export: Export, root: Path) -> None:
    export.read_dir(rel(root))
    (root / "new").touch()
    assert b"new" not in export.read_dir(rel(root)).entries
    assert rel(root / "new") in refreshed(export)
    assert b"new" in export.read_dir(rel(root)).entries


def test_refresh_finds_what_was_edited_added_removed_and_replaced(export: Export, root: Path) -> None:
    for name in ("edited", "removed", "same", "replaced", "mode"):
        (root / name).write_text(name)
    (root / "dir").mkdir()
    (root / "dir" / "child").write_text("x")
    export.read_dir(rel(root))
    export.read_dir(rel(root / "dir"))
    refreshed(export)
    assert refreshed(export) == {}
    (root / "edited").write_text("other")
    (root / "removed").unlink()
    (root / "added").touch()
    (root / "replaced").unlink()
    (root / "replaced").mkdir()
    (root / "mode").chmod(0o755)
    (root / "dir" / "child").unlink()
    found = refreshed(export)
    assert rel(root / "same") not in found
    assert not found[rel(root / "removed")].attr.exists()
    assert not found[rel(root / "dir" / "child")].attr.exists()
    assert found[rel(root / "replaced")].attr.is_dir()
    assert found[rel(root / "mode")].attr.mode & 0o777 == 0o755
    assert {rel(root / n) for n in ("edited", "added")} <= set(found)
    assert refreshed(export) == {}


def test_a_changed_file_loses_its_hash_even_with_size_and_time_restored(export: Export, root: Path) -> None:
    file = root / "f"
    file.write_text("one")
    export.read_dir(rel(root))
    ask(export, file)
    st = file.stat()
    assert export.read_dir(rel(root)).entries[b"f"].hash == hashlib.sha256(b"one").digest()
    file.write_text("two")
    os.utime(file, ns=(st.st_atime_ns, st.st_mtime_ns))
    change = refreshed(export)[rel(file)]
    assert change.attr.hash in (b"", hashlib.sha256(b"two").digest())


def test_a_removed_directory_is_forgotten_with_all_below_it(export: Export, root: Path) -> None:
    (root / "d" / "e").mkdir(parents=True)
    (root / "d" / "e" / "f").write_text("x")
    for directory in (root, root / "d", root / "d" / "e"):
        export.read_dir(rel(directory))
    (root / "d" / "e" / "f").unlink()
    (root / "d" / "e").rmdir()
    (root / "d").rmdir()
    assert not refreshed(export)[rel(root / "d")].attr.exists()
    assert not [p for p in export.listed if p.startswith(rel(root / "d"))]


def test_noted_results_are_told_with_the_hash_that_is_known(export: Export, root: Path) -> None:
    export.read_dir(rel(root))
    (root / "out").write_text("result")
    digest = hashlib.sha256(b"result").digest()
    changes = {c.path: c for c in export.note([rel(root / "out")], {rel(root / "out"): digest})}
    assert changes[rel(root / "out")].attr.hash == digest
    assert refreshed(export) == {}
    (root / "out").unlink()
    gone = {c.path: c for c in export.note([rel(root / "out")], {})}
    assert not gone[rel(root / "out")].attr.exists()


def test_what_was_written_through_one_name_is_told_of_all_names(export: Export, root: Path) -> None:
    (root / "d").mkdir()
    (root / "one").write_text("before")
    os.link(root / "one", root / "d" / "two")
    os.link(root / "one", root / "three")
    export.read_dir(rel(root))
    export.read_dir(rel(root / "d"))
    (root / "three").unlink()
    (root / "three").write_text("a file of its own")
    (root / "one").write_text("after!")
    digest = hashlib.sha256(b"after!").digest()
    changes = {c.path: c.attr for c in export.note([rel(root / "one")], {rel(root / "one"): digest})}
    assert changes[rel(root / "d" / "two")].hash == changes[rel(root / "one")].hash == digest
    assert rel(root / "three") not in changes, "another file by now, whose hash this is not"


def test_names_are_forgotten_with_their_files(root: Path) -> None:
    names = Names()
    for round in range(3):
        (root / "a").write_text(str(round))
        os.link(root / "a", root / "b")
        for name in ("a", "b"):
            names.see(rel(root / name), (root / name).lstat())
        assert names.others(rel(root / "a")) == [rel(root / "b")]
        (root / "a").unlink()
        names.forget(rel(root / "a"))
        names.see(rel(root / "b"), (root / "b").lstat())
        (root / "b").unlink()
    assert len(names) == 0 and names.others(rel(root / "b")) == []


def test_hashing_reads_the_whole_file_and_leaves_its_offset(root: Path) -> None:
    data = os.urandom(3 << 20)
    (root / "f").write_bytes(data)
    with open(root / "f", "rb") as f:
        assert hash_file(f.fileno()) == hashlib.sha256(data).digest()
        assert f.tell() == 0
