"""What replay refuses, and that nothing has changed then; what a full disk and missing rights come to."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from pathlib import Path

import pytest

from termite.attr.fileattr import FileAttr
from termite.errors import ReplayError, StoreError
from termite.master import replay
from termite.master.replay import Replayer
from termite.wire.messages import FileResult
from tests.master.replaying import OLD, Tree


@pytest.mark.parametrize(
    "path", [b"etc/passwd", b"/etc/passwd", b"", b"%s/../x", b"%s/./x", b"%s//x", b"%sx/y", b"%s/a\0b"]
)
def test_a_path_outside_the_project_is_refused_before_anything_changes(tree: Tree, path: bytes) -> None:
    tree.file("first")
    attr = FileAttr(stat.S_IFDIR | 0o755)
    tree.files.append(FileResult(path.replace(b"%s", tree.root[1:]), attr))
    with pytest.raises(ReplayError, match="refused"):
        tree.apply()
    assert list(tree.path.iterdir()) == []


@pytest.mark.parametrize("field", ["link_to", "moved_from"])
def test_a_link_or_a_rename_from_outside_is_refused(tree: Tree, field: str) -> None:
    kind = stat.S_IFREG if field == "link_to" else stat.S_IFDIR
    attr = FileAttr(kind | 0o755)
    other = {field: b"etc"}
    tree.files.append(FileResult(tree.at("x"), attr, **other))  # type: ignore[arg-type]
    with pytest.raises(ReplayError, match="outside"):
        tree.apply()


@pytest.mark.parametrize("kind", ["file", "directory", "symlink", "removed"])
def test_no_step_goes_through_a_symlink(tree: Tree, tmp_path: Path, kind: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "x").write_text("safe")
    os.symlink(outside, tree.path / "link")
    if kind == "symlink":
        tree.symlink("link/x", b"to")
    else:
        getattr(tree, kind)("link/x")
    with pytest.raises(ReplayError, match="symlink stands"):
        tree.apply()
    assert os.listdir(outside) == ["x"] and (outside / "x").read_text() == "safe"


@pytest.mark.parametrize("kind", [stat.S_IFCHR, stat.S_IFBLK, stat.S_IFSOCK])
def test_devices_and_sockets_are_refused(tree: Tree, kind: int) -> None:
    tree.files.append(FileResult(tree.at("x"), FileAttr(kind | 0o666)))
    with pytest.raises(ReplayError, match="refused"):
        tree.apply()


def test_set_id_bits_are_taken_away_and_noted(tree: Tree) -> None:
    tree.file("x", mode=0o6755)
    notes = tree.apply().notes
    assert stat.S_IMODE((tree.path / "x").stat().st_mode) == 0o755 and "set-id" in notes[0]


def test_wrong_contents_are_refused_before_anything_changes(tree: Tree) -> None:
    tree.file("a")
    tree.file("b")
    tree.contents[tree.at("b")] = b"DATA"
    with pytest.raises(StoreError, match="damaged"):
        tree.apply()
    assert list(tree.path.iterdir()) == []


@pytest.mark.parametrize("pieces", [[b"dat"], [b"dat", b"X"], [b"data", b"more"]])
def test_wrong_staged_contents_are_refused(tree: Tree, pieces: list[bytes]) -> None:
    staged = tree.replayer.stage(4, hashlib.sha256(b"data").digest())
    with pytest.raises(StoreError, match=r"arrived damaged|longer than"):
        for piece in pieces:
            staged.write(piece)
        staged.finish()
    tree.file("x")
    tree.contents[tree.at("x")] = staged
    with pytest.raises(StoreError, match="damaged"):
        tree.apply()
    staged.close()
    staged.close()
    assert list(tree.path.iterdir()) == []


def test_a_name_told_twice_is_refused(tree: Tree) -> None:
    tree.file("x")
    tree.file("x")
    with pytest.raises(ReplayError, match="twice"):
        tree.apply()


def test_the_project_directory_itself_can_only_change_its_attributes(tree: Tree) -> None:
    tree.removed("")
    with pytest.raises(ReplayError, match="own directory"):
        tree.apply()
    tree.directory("", mode=0o750, mtime=OLD)
    tree.begin()
    tree.apply()
    assert stat.S_IMODE(tree.path.stat().st_mode) == 0o750


def test_the_masters_socket_is_never_touched(tree: Tree) -> None:
    tree.has(".termite-socket", "ours")
    tree.file(".termite-socket")
    tree.file("x")
    notes = tree.apply().notes
    assert (tree.path / ".termite-socket").read_text() == "ours" and (tree.path / "x").exists() and len(notes) == 1


def test_a_full_disk_is_one_line_and_leaves_the_file_as_it_was(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    tree.has("x", "old")
    tree.file("x")
    monkeypatch.setattr(replay, "fill", full)
    with pytest.raises(ReplayError, match="disk is full") as caught:
        tree.apply()
    assert (tree.path / "x").read_text() == "old" and tree.leftovers() == [] and "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_an_ordinary_user_changes_what_the_command_had_locked_again(tree: Tree) -> None:
    tree.has("d/sub/x")
    os.link(tree.has("d/joined"), tree.path / "d/other")
    tree.path.parent.chmod(0o755)
    for path in [tree.path, *tree.path.rglob("*")]:
        os.chown(path, 4242, 4242)
    (tree.path / "d/joined").chmod(0o444)
    (tree.path / "d/sub").chmod(0o500)
    (tree.path / "d").chmod(0)
    tree.begin()
    tree.file("d/joined", in_place=True, mode=0o444)
    tree.removed("d/sub/x")
    tree.file("d/sub/y", mode=0)
    tree.replayer = Replayer(tree.root)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            reach(tree.path.parent)
            os.setresgid(4242, 4242, 4242)
            os.setresuid(4242, 4242, 4242)
            tree.apply()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    assert os.listdir(tree.path / "d/sub") == ["y"] and (tree.path / "d/other").read_bytes() == b"data"
    assert stat.S_IMODE((tree.path / "d").stat().st_mode) == 0
    assert stat.S_IMODE((tree.path / "d/sub").stat().st_mode) == 0o500


def reach(path: Path) -> None:
    """Let everybody walk down to a directory of the test run."""
    for parent in [path, *path.parents][:-2]:
        parent.chmod(parent.stat().st_mode | 0o011)
