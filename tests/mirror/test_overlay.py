"""Reaping of upper directories made by hand, mark by mark; tests/test_roundtrip.py lets the kernel make them."""

from __future__ import annotations

import ctypes
import hashlib
import os
import socket
import stat
from pathlib import Path

import pytest

from termite.attr.fileattr import ABSENT, FileAttr
from termite.mirror.overlay import AT_ONCE_BYTES, AT_ONCE_FILES, NotAtOnce, Reaped, reap, reap_at_once
from termite.store.local import ContentStore
from termite.wire.messages import FileResult

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="trusted.overlay marks need root")

ROOT = b"home/u/project"
OLD = 1_500_000_000 * 10**9


class Upper:
    """An upper directory, and what the lower tree holds."""

    def __init__(self, top: Path) -> None:
        self.path = top / "u"
        self.path.mkdir(mode=0o755)
        self.store = ContentStore(str(top / "store"), 1 << 30)
        self.lower: dict[bytes, FileAttr] = {ROOT: FileAttr(stat.S_IFDIR | 0o755, mtime_ns=OLD)}

    def file(self, name: str, data: bytes = b"new", *, origin: bool = False, mtime_ns: int = OLD) -> Path:
        path = self.path / name
        path.write_bytes(data)
        path.chmod(0o644)
        if origin:
            os.setxattr(path, "trusted.overlay.origin", b"\0\xfb\x15\0\0" + bytes(16))
        os.utime(path, ns=(mtime_ns, mtime_ns))
        return path

    def directory(self, name: str, **marks: bytes) -> Path:
        path = self.path / name
        path.mkdir(mode=0o755)
        for mark, value in marks.items():
            os.setxattr(path, f"trusted.overlay.{mark}", value)
        return path

    def had_file(self, name: str, data: bytes = b"old", nlink: int = 1) -> None:
        hash = hashlib.sha256(data).digest()
        attr = FileAttr(stat.S_IFREG | 0o644, len(data), OLD, nlink, hash=hash)
        self.lower[ROOT + b"/" + name.encode()] = attr

    def had_directory(self, name: str) -> None:
        self.lower[ROOT + b"/" + name.encode()] = FileAttr(stat.S_IFDIR | 0o755, mtime_ns=OLD)

    def reap(self, inline_bytes: int = 1 << 20, userxattr: bool = False) -> Reaped:
        for directory, _, _ in os.walk(self.path, topdown=False):
            os.utime(directory, ns=(OLD, OLD))
        return reap(
            os.fsencode(self.path),
            ROOT,
            lambda path: self.lower.get(path, ABSENT),
            self.store,
            inline_bytes=inline_bytes,
            userxattr=userxattr,
        )


@pytest.fixture
def upper(tmp_path: Path) -> Upper:
    return Upper(tmp_path)


def names(reaped: Reaped) -> list[str]:
    return [os.fsdecode(file.path[len(ROOT) + 1 :]) for file in reaped.files]


def one(reaped: Reaped) -> FileResult:
    assert len(reaped.files) == 1, reaped.files
    return reaped.files[0]


def test_an_untouched_upper_directory_gives_nothing(upper: Upper) -> None:
    assert upper.reap() == Reaped([], b"", [], [])


def test_a_new_file_is_inlined_and_moves_into_the_store(upper: Upper) -> None:
    path = upper.file("x", b"contents")
    reaped = upper.reap()
    result = one(reaped)
    assert result.path == ROOT + b"/x" and result.attr.mode == stat.S_IFREG | 0o644 and result.attr.size == 8
    assert result.attr.hash == hashlib.sha256(b"contents").digest() and result.attr.mtime_ns == OLD
    assert (result.inline_at, reaped.body, result.in_place, result.kept) == (0, b"contents", False, False)
    assert upper.store.has(result.attr.hash) and not path.exists()


def test_contents_beyond_the_limits_go_by_hash_only(upper: Upper) -> None:
    for name, size in (("a", 10), ("b", 26), ("c", 10), ("d", 10)):
        upper.file(name, name.encode() * size)
    reaped = upper.reap(inline_bytes=25)
    inlined = [file for file in reaped.files if file.inline_at >= 0]
    assert len(inlined) == 2 and b"b" not in reaped.body and len(reaped.body) == 20
    for file in inlined:  # in whatever order the directory was read
        assert reaped.body[file.inline_at : file.inline_at + 10] == file.path[-1:] * 10
    assert all(upper.store.has(file.attr.hash) for file in reaped.files)


def test_an_empty_file_is_inlined(upper: Upper) -> None:
    upper.file("empty", b"")
    assert one(upper.reap()).inline_at == 0


def test_a_whiteout_is_a_removed_name(upper: Upper) -> None:
    upper.had_file("gone")
    os.mknod(upper.path / "gone", stat.S_IFCHR, os.makedev(0, 0))
    assert one(upper.reap()) == FileResult(ROOT + b"/gone", ABSENT)


def test_a_whiteout_may_be_an_attribute(upper: Upper) -> None:
    upper.had_file("gone")
    os.setxattr(upper.file("gone", b""), "trusted.overlay.whiteout", b"y")
    assert one(upper.reap()) == FileResult(ROOT + b"/gone", ABSENT)


def test_a_copied_up_file_that_did_not_change_is_no_result(upper: Upper) -> None:
    upper.had_file("same")
    upper.file("same", b"old", origin=True)
    assert upper.reap().files == []


def test_a_file_made_anew_with_the_same_contents_is_a_result(upper: Upper) -> None:
    upper.had_file("same")
    upper.file("same", b"old")
    result = one(upper.reap())
    assert not result.in_place and not result.kept and result.inline_at == 0


def test_a_copied_up_file_with_new_contents_was_written_in_place(upper: Upper) -> None:
    upper.had_file("f")
    upper.file("f", b"changed", origin=True)
    assert one(upper.reap()).in_place


def test_a_touched_file_keeps_its_contents(upper: Upper) -> None:
    upper.had_file("f")
    upper.file("f", b"old", origin=True, mtime_ns=OLD + 1)
    reaped = upper.reap()
    result = one(reaped)
    assert result.kept and result.in_place and result.attr.mtime_ns == OLD + 1 and reaped.body == b""


def test_a_changed_file_whose_time_was_set_back_is_a_result(upper: Upper) -> None:
    upper.had_file("f", b"old")
    upper.file("f", b"OLD", origin=True)
    assert one(upper.reap()).attr.hash == hashlib.sha256(b"OLD").digest()


def test_a_directory_that_only_holds_changes_is_no_result(upper: Upper) -> None:
    upper.had_directory("d")
    upper.directory("d")
    upper.file("d/x")
    assert names(upper.reap()) == ["d/x"]


def test_a_directory_with_another_mode_or_time_is_a_result(upper: Upper) -> None:
    for name in ("mode", "time", "same"):
        upper.had_directory(name)
        upper.directory(name)
    upper.lower[ROOT + b"/time"] = FileAttr(stat.S_IFDIR | 0o755, mtime_ns=OLD - 1)
    (upper.path / "mode").chmod(0o700)
    assert names(upper.reap()) == ["mode", "time"]


def test_the_writable_root_itself_may_change(upper: Upper) -> None:
    upper.path.chmod(0o700)
    assert one(upper.reap()).path == ROOT


def test_a_new_directory_is_not_opaque_for_whoever_had_none(upper: Upper) -> None:
    upper.directory("d", opaque=b"y")
    result = one(upper.reap())
    assert result.attr.is_dir() and not result.opaque


def test_a_directory_that_replaced_another_is_opaque_and_hides_its_children(upper: Upper) -> None:
    upper.had_directory("d")
    upper.had_file("d/x", b"new")
    upper.directory("d", opaque=b"y")
    upper.file("d/x", b"new", origin=True)
    first, second = upper.reap().files
    assert first.opaque and not second.in_place and not second.kept


def test_a_renamed_directory_names_where_it_was(upper: Upper) -> None:
    upper.had_directory("src")
    upper.had_file("src/f", b"f")
    upper.had_file("src/g", b"g")
    upper.directory("dst", redirect=b"src")
    upper.file("dst/f", b"f", origin=True)
    upper.file("dst/g", b"changed", origin=True)
    os.mknod(upper.path / "src", stat.S_IFCHR, os.makedev(0, 0))
    files = upper.reap().files
    assert [file.path[len(ROOT) + 1 :] for file in files] == [b"dst", b"dst/g", b"src"]
    assert files[0].moved_from == ROOT + b"/src" and files[1].in_place


def test_a_redirect_inside_a_renamed_directory_is_relative_to_where_that_was(upper: Upper) -> None:
    for name in ("a", "a/b", "a/b/c"):
        upper.had_directory(name)
    upper.directory("x", redirect=b"a")
    upper.directory("x/y", redirect=b"b")
    upper.directory("z", redirect=b"/a/b/c")
    moved = [(file.path[len(ROOT) :], file.moved_from[len(ROOT) :]) for file in upper.reap().files]
    assert moved == [(b"/x", b"/a"), (b"/x/y", b"/a/b"), (b"/z", b"/a/b/c")]


def test_a_directory_renamed_away_and_back_is_no_result(upper: Upper) -> None:
    upper.had_directory("d")
    upper.directory("d", redirect=b"d")
    assert upper.reap().files == []


def test_hard_links_name_one_of_them(upper: Upper) -> None:
    os.link(upper.file("b"), upper.path / "c")
    os.link(upper.path / "b", upper.path / "a")
    reaped = upper.reap()
    assert [(file.link_to, file.inline_at) for file in reaped.files] == [
        (b"", 0),
        (ROOT + b"/a", -1),
        (ROOT + b"/a", -1),
    ]


def test_a_hard_link_to_an_unchanged_file_keeps_that_file(upper: Upper) -> None:
    upper.had_file("m")
    os.link(upper.file("m", b"old", origin=True), upper.path / "a")
    first, second = upper.reap().files
    assert first.link_to == second.path == ROOT + b"/m"
    assert second.kept and not second.in_place and not second.link_to


def test_symlinks_and_fifos_are_told_as_they_are(upper: Upper) -> None:
    os.symlink(b"to\n\xff", upper.path / "link")
    os.mkfifo(upper.path / "pipe")
    link, pipe = upper.reap().files
    assert link.attr.target == b"to\n\xff" and stat.S_ISFIFO(pipe.attr.mode)


def test_sockets_and_devices_are_left_out_with_a_note(upper: Upper) -> None:
    upper.had_file("s")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(upper.path / "s"))
        os.mknod(upper.path / "null", stat.S_IFCHR, os.makedev(1, 3))
        reaped = upper.reap()
    assert reaped.files == [FileResult(ROOT + b"/s", ABSENT)] and len(reaped.notes) == 2


def test_names_of_any_bytes_arrive(upper: Upper) -> None:
    name = os.fsdecode(b"a\nb\xff ")
    upper.file(name)
    assert one(upper.reap()).path == ROOT + b"/a\nb\xff "


def test_results_come_parents_first(upper: Upper) -> None:
    for name in ("b", "b/c", "a", "b-x"):
        upper.directory(name)
    upper.file("b/c/d")
    assert names(upper.reap()) == ["a", "b", "b-x", "b/c", "b/c/d"]


def test_the_marks_of_an_ordinary_users_overlay_are_understood(upper: Upper) -> None:
    upper.had_directory("src")
    path = upper.directory("dst")
    os.setxattr(path, "user.overlay.redirect", b"src")
    assert one(upper.reap(userxattr=True)).moved_from == ROOT + b"/src"


def test_a_deep_tree_needs_neither_recursion_nor_descriptors(upper: Upper) -> None:
    fd = os.open(upper.path, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("d", dir_fd=fd)
        inner = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = inner
    os.close(fd)
    reaped = reap(os.fsencode(upper.path), ROOT, lambda path: upper.lower.get(path, ABSENT), upper.store)
    assert len(reaped.files) == 1501
    _remove_deep(upper.path)


def _remove_deep(path: Path) -> None:
    """Faster and surer than pytest's own clearing up."""
    assert ctypes.CDLL(None).system(b"rm -rf '%s'" % os.fsencode(path)) == 0


def at_once(upper: Upper, known: bool = True) -> Reaped:
    for directory, _, _ in os.walk(upper.path, topdown=False):
        os.utime(directory, ns=(OLD, OLD))
    return reap_at_once(
        os.fsencode(upper.path),
        ROOT,
        (lambda path: upper.lower.get(path, ABSENT)) if known else upper.lower.get,
        upper.store,
        lower_fd=-1,
    )


def test_a_small_result_is_reaped_at_once_and_alike(upper: Upper) -> None:
    upper.directory("d")
    upper.file("d/new", b"contents")
    reaped = at_once(upper)
    assert names(reaped) == ["d", "d/new"] and reaped.body == b"contents"
    assert upper.store.has(hashlib.sha256(b"contents").digest()) and not (upper.path / "d" / "new").exists()


@pytest.mark.parametrize("reason", ["unknown", "many", "large"])
def test_what_cannot_be_done_at_once_has_changed_nothing(upper: Upper, reason: str) -> None:
    upper.file("a", b"first")
    if reason == "many":
        for number in range(AT_ONCE_FILES):
            upper.file(f"n{number}")
    if reason == "large":
        upper.file("b", b"x" * AT_ONCE_BYTES)
    with pytest.raises(NotAtOnce):
        at_once(upper, known=reason != "unknown")
    assert (upper.path / "a").read_bytes() == b"first"
    assert "a" in names(upper.reap())
