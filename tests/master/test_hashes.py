from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from termite import paths
from termite.attr.fileattr import FileAttr
from termite.master.export import Export, read_and_hash
from termite.master.hashes import MAX_UNSAVED, RACY_NS, XATTR, Hashes, recorded_hash
from tests.master.refreshing import refreshed

LARGE = 1 << 20


@pytest.fixture
def root() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="termite-test-", dir="/var/tmp") as name:
        path = Path(name) / "p"
        path.mkdir()
        Path(name).chmod(0o755)
        try:
            os.setxattr(path, XATTR, b"")
        except OSError:
            pytest.skip("/var/tmp keeps no user xattrs")
        os.removexattr(path, XATTR)
        yield path


def rel(path: Path) -> bytes:
    return paths.relative(os.fsencode(path))


def master(root: Path) -> Export:
    return Export(rel(root), xattrs=True)


def written(path: Path, text: str = "contents") -> Path:
    path.write_text(text)
    return path


def ask(export: Export, path: Path) -> None:
    """As a mirror would: reads the file if its hash is not known."""
    fd, st = export.open_for_reading(rel(path))
    try:
        digest = export.known_hash(rel(path), st)
        if not digest:
            _, digest = read_and_hash(fd, st)
            export.hashes.count(rel(path), st.st_size)
    finally:
        os.close(fd)
    export.remember_hash(rel(path), st, digest)


def warm(root: Path, *files: Path) -> None:
    """A master that has hashed these files and ended."""
    first = master(root)
    for file in files:
        ask(first, file)
    while first.hashes.unsaved:
        first.hashes.save_some(10, LARGE)
    assert all(XATTR.decode() in os.listxattr(file) for file in files)


def twritten(export: Export, path: Path) -> FileAttr:
    return export.read_dir(rel(path.parent)).entries[os.fsencode(path.name)]


def test_a_second_master_on_a_warm_tree_hashes_nothing(root: Path) -> None:
    files = [written(root / f"f{i}", f"contents {i}") for i in range(20)]
    warm(root, *files)
    second = master(root)
    for i, file in enumerate(files):
        assert twritten(second, file).hash == hashlib.sha256(f"contents {i}".encode()).digest()
        ask(second, file)
    assert (second.hashes.files, second.hashes.recalled, second.hashes.unsaved) == (0, 20, 0)


def test_setting_the_xattr_does_not_look_like_a_change(root: Path) -> None:
    file = written(root / "f")
    export = master(root)
    export.read_dir(rel(root))
    ask(export, file)
    before = file.stat().st_ctime_ns
    assert export.hashes.save_some(10, LARGE) == 1
    assert file.stat().st_ctime_ns >= before and export.hashes.saved == 1
    assert refreshed(export) == {}
    assert twritten(export, file).hash
    export.check()


def replaced(file: Path) -> None:
    st = file.stat()
    file.unlink()
    file.write_text("Contents")
    os.utime(file, ns=(st.st_atime_ns, st.st_mtime_ns))


def rewritten_with_its_time_put_back(file: Path) -> None:
    st = file.stat()
    mark = file.with_name("mark")
    while not mark.exists() or mark.stat().st_ctime_ns <= st.st_ctime_ns + RACY_NS:
        mark.write_text("a file system's clock ticks")
    file.write_text("Contents")
    os.utime(file, ns=(st.st_atime_ns, st.st_mtime_ns))


def grown(file: Path) -> None:
    with open(file, "a") as f:
        f.write("more")


def touched(file: Path) -> None:
    os.utime(file, ns=(1, 1))


def copied_with_its_xattrs(file: Path) -> None:
    copy = file.with_name("copy")
    shutil.copy2(file, copy)
    assert os.getxattr(copy, XATTR) == os.getxattr(file, XATTR)
    os.rename(copy, file)


@pytest.mark.parametrize("change", [replaced, rewritten_with_its_time_put_back, grown, touched, copied_with_its_xattrs])
def test_a_file_whose_stat_changed_is_hashed_anew(root: Path, change: Callable[[Path], None]) -> None:
    file = written(root / "f")
    warm(root, file)
    change(file)
    second = master(root)
    assert twritten(second, file).hash == b""
    ask(second, file)
    assert second.hashes.files == 1
    assert twritten(second, file).hash == hashlib.sha256(file.read_bytes()).digest()


@pytest.mark.parametrize("record", [b"", b"x", b"\2" + bytes(64), bytes(65), b"\1" + os.urandom(64)])
def test_an_xattr_that_is_none_of_ours_means_nothing(root: Path, record: bytes) -> None:
    file = written(root / "f")
    os.setxattr(file, XATTR, record)
    assert recorded_hash(record, file.stat()) == b""
    second = master(root)
    assert twritten(second, file).hash == b""
    ask(second, file)
    second.hashes.save_some(10, LARGE)
    third = master(root)
    assert twritten(third, file).hash == hashlib.sha256(b"contents").digest()


def test_read_only_files_and_files_elsewhere_are_left_alone(root: Path) -> None:
    read_only = written(root / "read-only")
    read_only.chmod(0o444)
    outside = written(root.parent / "outside")
    export = master(root)
    for file in (read_only, outside):
        ask(export, file)
        assert export.hashes.unsaved == 0
        assert os.listxattr(file) == []
    assert Export(rel(root)).hashes.unsaved == 0


def test_xattr_false_keeps_hashes_in_memory_only(root: Path) -> None:
    file = written(root / "f")
    warm(root, file)
    export = Export(rel(root), xattrs=False)
    assert twritten(export, file).hash == b""
    ask(export, file)
    assert export.hashes.files == 1 and export.hashes.unsaved == 0


def test_sources_outside_keep_theirs_too(root: Path) -> None:
    source = root.parent / "source"
    source.mkdir()
    file = written(source / "f")
    for expected in (True, False):
        export = Export(rel(root), sources=[rel(source)], xattrs=True)
        ask(export, file)
        export.hashes.save_some(10, LARGE)
        assert (export.hashes.files > 0) == expected
    assert export.hashes.recalled == 1


def test_a_file_that_changes_before_its_xattr_is_set_gets_none(root: Path) -> None:
    file = written(root / "f")
    export = master(root)
    ask(export, file)
    file.write_text("others")
    export.hashes.save_some(10, LARGE)
    assert (export.hashes.saved, os.listxattr(file)) == (0, [])
    file.unlink()
    ask_again = written(root / "g")
    ask(export, ask_again)
    ask_again.unlink()
    assert export.hashes.save_some(10, LARGE) == 1


def test_hard_links_share_their_xattr(root: Path) -> None:
    file = written(root / "f")
    os.link(file, root / "g")
    warm(root, file)
    second = master(root)
    assert twritten(second, root / "g").hash == hashlib.sha256(b"contents").digest()


def test_a_file_system_without_xattrs_is_named_once_and_works(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> bytes:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "getxattr", refuse)
    monkeypatch.setattr(os, "setxattr", refuse)
    export = master(root)
    with caplog.at_level(logging.INFO):
        for name in ("f", "g"):
            file = written(root / name)
            ask(export, file)
            export.hashes.save_some(10, LARGE)
            assert export.known_hash(rel(file), file.stat())
    assert [r.message for r in caplog.records if "keeps no user xattrs" in r.message] == [
        f"the file system of {root} keeps no user xattrs: a new master hashes its files again"
    ]


def test_what_waits_for_its_xattr_is_bounded(root: Path) -> None:
    hashes = Hashes([rel(root)])
    st = written(root / "f").stat()
    for i in range(MAX_UNSAVED + 10):
        hashes.remember(rel(root) + b"/%d" % i, st, bytes(32))
    assert hashes.unsaved == MAX_UNSAVED
    hashes.check()


def test_a_file_hashed_in_the_moment_of_its_change_is_hashed_again_before_it_is_trusted(root: Path) -> None:
    file = written(root / "f")
    export = master(root)
    export.remember_hash(rel(file), file.stat(), hashlib.sha256(b"not what it holds").digest())
    assert export.hashes.is_racy(rel(file))
    export.hashes.save_some(10, large=0)
    assert os.listxattr(file) == [], "too large to be looked at again"
    export.remember_hash(rel(file), file.stat(), hashlib.sha256(b"not what it holds").digest())
    if export.hashes.is_racy(rel(file)):
        export.hashes.save_some(10, LARGE)
        assert twritten(master(root), file).hash == hashlib.sha256(b"contents").digest()
